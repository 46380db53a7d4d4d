"""What every script shares: log-prob of the LM head, token-value normalisation, the VCB loss; heads of models."""

from kernels.head import head_name, logit_gap, model_class, patch_head, read_head
from kernels.logprob import linear_logprob, linear_nll, token_logprob
from kernels.values import normalize_values
from kernels.vcb import vcb_loss

__all__ = [
    "head_name", "linear_logprob", "linear_nll", "logit_gap", "model_class", "normalize_values", "patch_head", "read_head",
    "token_logprob", "vcb_loss",
]  # fmt: skip
