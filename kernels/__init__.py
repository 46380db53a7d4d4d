"""Ops that every script shares: log-prob of the LM head, token-value normalisation, the VCB loss."""

from kernels.head import logit_gap, patch_head
from kernels.logprob import linear_logprob, linear_nll, token_logprob
from kernels.values import normalize_values
from kernels.vcb import vcb_loss

__all__ = ["linear_logprob", "linear_nll", "logit_gap", "normalize_values", "patch_head", "token_logprob", "vcb_loss"]
