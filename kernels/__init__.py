"""What scripts share: log-probs of the LM head, normalised token values, the VCB loss, models' heads, keyed noise."""

from kernels.head import head_name, hidden_states, logit_gap, model_class, packing_gap, patch_head, read_head
from kernels.logprob import linear_logprob, linear_nll, token_logprob
from kernels.noise import keyed_gumbel
from kernels.values import normalize_values
from kernels.vcb import vcb_loss

__all__ = [
    "head_name", "hidden_states", "keyed_gumbel", "linear_logprob", "linear_nll", "logit_gap", "model_class", "normalize_values",
    "packing_gap", "patch_head", "read_head", "token_logprob", "vcb_loss",
]  # fmt: skip
