"""Gumbel noise that is a function of a key: the same row draws the same, in whatever batch and on however many ranks.

argmax(logits / T + noise) is an exact sample of softmax(logits / T) (Gumbel-max). A rank that draws only its own rows thus
draws what one rank would for all of them.
"""

import torch


def signed(x: int) -> int:
    """The 64-bit number that arithmetic on int64 tensors, which wraps, makes of x."""
    return (x + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)  # odd: steps of it visit every number


def mixed(x):
    """int64 → int64, the finaliser of SplitMix64 (Steele, Lea and Flood 2014): neighbours in, unrelated numbers out."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * signed(0xBF58476D1CE4E5B9)  # >> keeps the sign: the mask takes it off
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def keyed_gumbel(keys, position: int, size: int):
    """Standard Gumbel noise (B, size) fp32, a function of (key, position, index): keys (B,) int64."""
    rows = mixed(mixed(keys) + signed(position * GOLDEN))
    numbers = mixed(rows[:, None] + torch.arange(1, size + 1, device=keys.device) * GOLDEN)
    u = ((numbers & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-u)).float()  # -log1p(-u) resolves the small numbers that decide who wins
