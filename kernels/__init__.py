"""Ops that every script shares: log-prob of the LM head, token-value normalisation, the VCB loss."""

from kernels.logprob import linear_logprob, linear_nll, token_logprob
from kernels.values import normalize_values
from kernels.vcb import vcb_loss

__all__ = ["linear_logprob", "linear_nll", "normalize_values", "token_logprob", "vcb_loss"]
