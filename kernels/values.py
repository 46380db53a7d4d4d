"""Normalisation of token values over a batch: DVPO eq. 2.

    Q̃_t = (Q_t - μ) / (σ + ε),  μ, σ over all tokens of the mask, on all ranks of a group

Each block of values gives (n, mean, M2 = Σ (v - mean)²). Blocks of a tensor and then ranks of a group are merged by the
formula of Chan, Golub and LeVeque (1979) for several sets, in fp64: no difference of large sums, whatever the offset.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import not_compiled, triton, use_triton

# --- The two passes, in torch ------------------------------------------------------------------------------------------


def moments_torch(values: Tensor, mask: Tensor) -> Tensor:
    """(M,) values, (M,) mask → (1, 3) fp64: n, mean, M2 of the values under the mask. Masked values may be NaN."""
    v = torch.where(mask, values.double(), 0)
    n = mask.sum().double()
    mean = v.sum() / n.clamp(min=1)
    return torch.stack([n, mean, torch.where(mask, v - mean, 0).square().sum()])[None]


def apply_torch(values: Tensor, mask: Tensor, mean: Tensor, scale: Tensor, out: Tensor) -> None:
    """out = (values - mean) · scale under the mask, 0 elsewhere; all (M,), mean and scale fp64 scalars."""
    out.copy_(torch.where(mask, (values.double() - mean) * scale, 0))


# --- The same in Triton ------------------------------------------------------------------------------------------------
# fp64 throughout: a batch has few values, and the passes are bound by their launch.

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _moments_kernel(values, mask, moments, size, BLOCK: tl.constexpr):
        block = tl.program_id(0).to(tl.int64)
        at = block * BLOCK + tl.arange(0, BLOCK)
        keep = tl.load(mask + at, mask=at < size, other=0) != 0
        v = tl.where(keep, tl.load(values + at, mask=keep, other=0.0).to(tl.float64), 0.0)
        n = tl.sum(keep.to(tl.float64), 0)
        mean = tl.sum(v, 0) / tl.maximum(n, 1.0)
        d = tl.where(keep, v - mean, 0.0)
        tl.store(moments + 3 * block, n)
        tl.store(moments + 3 * block + 1, mean)
        tl.store(moments + 3 * block + 2, tl.sum(d * d, 0))

    @triton.jit
    def _apply_kernel(values, mask, mean, scale, out, size, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        keep = tl.load(mask + at, mask=at < size, other=0) != 0
        v = tl.load(values + at, mask=keep, other=0.0).to(tl.float64)
        v = tl.where(keep, (v - tl.load(mean)) * tl.load(scale), 0.0)
        tl.store(out + at, v, mask=at < size)


BLOCK = 1024


def moments_triton(values: Tensor, mask: Tensor) -> Tensor:
    """`moments_torch` with one row of (n, mean, M2) per block of the values."""
    blocks = triton.cdiv(values.numel(), BLOCK)
    moments = torch.zeros((max(blocks, 1), 3), dtype=torch.float64, device=values.device)
    if blocks:
        with torch.cuda.device_of(values):
            _moments_kernel[(blocks,)](
                values, mask.view(torch.uint8), moments, values.numel(), BLOCK=BLOCK, enable_fp_fusion=True
            )
    return moments


def apply_triton(values: Tensor, mask: Tensor, mean: Tensor, scale: Tensor, out: Tensor) -> None:
    """`apply_torch`."""
    blocks = triton.cdiv(values.numel(), BLOCK)
    if blocks:
        with torch.cuda.device_of(values):
            _apply_kernel[(blocks,)](
                values, mask.view(torch.uint8), mean, scale, out, values.numel(), BLOCK=BLOCK, enable_fp_fusion=True
            )


# --- Merging, autograd, the public op ----------------------------------------------------------------------------------


def merge(moments: Tensor) -> Tensor:
    """(K, 3) n, mean, M2 of K disjoint sets → (3,) of their union. Empty sets count for nothing."""
    n, mean, m2 = moments.unbind(1)
    total = n.sum()
    union_mean = (n * mean).sum() / total.clamp(min=1)
    return torch.stack([total, union_mean, m2.sum() + (n * (mean - union_mean).square()).sum()])


def over_ranks(moments: Tensor, group) -> Tensor:
    """(3,) of this rank → (3,) of all ranks of `group`, with the same bits on each."""
    if group is None:
        return moments
    gathered = [torch.empty_like(moments) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, moments, group=group)
    return merge(torch.stack(gathered))


class NormalizeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, mask, eps, group):
        moments, apply = (moments_triton, apply_triton) if use_triton(values) else (moments_torch, apply_torch)
        v, m = values.contiguous().view(-1), mask.contiguous().view(-1)
        n, mean, m2 = over_ranks(merge(moments(v, m)), group)
        sigma = (m2 / n.clamp(min=1)).sqrt()
        scale = 1 / (sigma + eps)
        out = torch.empty(v.shape, dtype=torch.promote_types(v.dtype, torch.float32), device=v.device)
        apply(v, m, mean, scale, out)
        ctx.group = group
        ctx.save_for_backward(values, mask, n, mean, sigma, scale)
        return out.view(values.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        # In torch on every device: only a loss over predicted values comes here, with few values.
        values, mask, n, mean, sigma, scale = ctx.saved_tensors
        g = torch.where(mask, grad.double(), 0)
        d = torch.where(mask, values.double() - mean, 0)
        sums = torch.stack([g.sum(), (g * d).sum()])
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        sum_g, sum_gd = sums
        # ∂σ/∂v_i = d_i / (n σ), and 0 where σ = 0: there d is 0, and the quotient would be NaN.
        through_sigma = torch.where(sigma > 0, sum_gd * scale / sigma.clamp(min=1e-300), 0)
        dv = torch.where(mask, scale * (g - (sum_g + through_sigma * d) / n.clamp(min=1)), 0)
        return dv.to(values.dtype), None, None, None


@not_compiled
def normalize_values(values: Tensor, mask: Tensor, *, eps: float = 1e-5, group=None) -> Tensor:
    """(values - μ) / (σ + eps) under the mask, 0 elsewhere: DVPO eq. 2.

    Args:
        values: any shape, floating point. What stands outside the mask is never used, NaN included.
        mask: same shape, bool: the response tokens.
        eps: keeps equal values at 0 instead of NaN. Gradients are at most about 1 / eps times the upstream ones, which
            is what a value head that starts at zero sees; inside such a loss an eps like 1e-3 is the calmer choice.
        group: ranks whose tokens share one μ and one σ. None: this process alone. Pass
            `torch.distributed.group.WORLD` for all ranks (it is None, rightly, when nothing is initialised). Every rank
            of the group must call, with or without tokens of its own; so must backward if any rank runs it.

    Returns:
        The shape of values; fp32, or fp64 for fp64. σ has ddof 0, and no tokens at all give zeros. Differentiable (once)
        in values, through μ and σ; over a group the gradient is that of the sum of what all ranks compute with the
        result, so that local sums divided by a global token count give each rank its part of the global gradient.

    Raises:
        ValueError: shapes that differ, values that are not floating point, a mask that is not bool, eps <= 0.
    """
    if values.shape != mask.shape or values.device != mask.device:
        raise ValueError(f"values {tuple(values.shape)} on {values.device} and mask {tuple(mask.shape)} on {mask.device} "
                         "must agree")  # fmt: skip
    if not values.dtype.is_floating_point or mask.dtype != torch.bool:
        raise ValueError(f"values must be floating point and mask bool, got {values.dtype} and {mask.dtype}")
    if not eps > 0:
        raise ValueError(f"eps must be positive, got {eps}")
    return NormalizeValues.apply(values, mask, eps, group)
