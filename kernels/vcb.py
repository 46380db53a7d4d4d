"""The loss of value-based calibration (VCB): eq. 9, 10, 19 and 20 of the paper, and two variants of it.

For one prompt x with n responses y_1 .. y_n:

    s_i  = γ (log π(y_i|x) - log π_sft(y_i|x)) - r(x, y_i) / σ(x)         eq. 9; σ: std of the n rewards, eq. 10
    l_ij = (s_i - s_j)²                                                   eq. 19
    L    = λ log Σ_{i <= j} exp(l_ij / λ)                                 eq. 20, `upper`
    ∂L / ∂s_i = Σ_j 2 w_ij (s_i - s_j),   w = softmax of l / λ over the pairs

    pairs     summed over      l_ij             σ(x)      result            its floor (all s equal)
    upper     i <= j           (s_i - s_j)²     ddof 0    λ log Σ exp l/λ   λ log(n (n + 1) / 2)
    full      all (i, j)       (s_i - s_j)²/2   ddof 1    λ log Σ exp l/λ   2 λ log n
    mean      i < j            (s_i - s_j)²     ddof 0    mean              0

`full` is the code of the paper's appendix A.4, `mean` its ablation without the log-sum-exp. They are three losses, not
three forms of one. With two responses the normalised gap of rewards is the same whatever the rewards are (2 with ddof
0): only their order counts then.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import not_compiled, triton, use_triton

PAIRS = ("upper", "full", "mean")

# --- The reference, in torch -------------------------------------------------------------------------------------------


def normalized_reward(reward: Tensor, mask: Tensor, ddof: int) -> Tensor:
    """(B, n) → r / σ up to a constant per prompt (pairs cancel it); 0 where all rewards of a prompt are equal.

    Divided by σ, never by σ + ε, and scaled by the largest gap first: rescaled or shifted rewards change nothing, and
    no square over- or underflows.
    """
    count = mask.sum(1, keepdim=True)
    high = reward.masked_fill(~mask, -torch.inf).amax(1, keepdim=True)
    gap = torch.where(mask, high - reward, 0)
    spread = gap.amax(1, keepdim=True)
    u = -gap / torch.where(spread == 0, 1, spread)
    center = torch.where(mask, u - u.sum(1, keepdim=True) / count.clamp(min=1), 0)
    sigma = (center.square().sum(1, keepdim=True) / (count - ddof).clamp(min=1)).sqrt()
    return center / torch.where(spread == 0, 1, sigma)


def vcb_torch(policy_logp, ref_logp, reward, mask, gamma: float, lam: float, pairs: str) -> Tensor:
    """(B, n) × 3 and the mask → (B,), all in the dtype of policy_logp; differentiable in the log-probs."""
    ratio = torch.where(mask, policy_logp - ref_logp, 0)
    s = gamma * ratio - normalized_reward(reward, mask, ddof=1 if pairs == "full" else 0)
    loss = (s[:, :, None] - s[:, None, :]).square() * (0.5 if pairs == "full" else 1.0)
    n = s.shape[1]
    in_sum = mask[:, :, None] & mask[:, None, :]
    if pairs != "full":
        square = torch.ones((n, n), dtype=torch.bool, device=s.device)
        in_sum = in_sum & square.triu(diagonal=1 if pairs == "mean" else 0)
    loss = torch.where(in_sum, loss, 0).flatten(1)
    in_sum = in_sum.flatten(1)
    if pairs == "mean":
        return loss.sum(1) / in_sum.sum(1).clamp(min=1)
    # Minus the largest l before the division by λ: no quotient can overflow. A prompt without responses gives 0.
    high = loss.detach().amax(1, keepdim=True)
    e = torch.where(in_sum, ((loss - high) / lam).exp(), 0)
    total = torch.where(mask.any(1), e.sum(1), 1)
    return high[:, 0] + lam * total.log()


# --- Triton: one program per prompt, loss and gradient together --------------------------------------------------------

if triton is not None:
    import triton.language as tl

    @triton.jit
    def _vcb_kernel(
        policy_logp, ref_logp, reward, mask, loss, grad, n, gamma, lam,
        HALF: tl.constexpr, UPPER: tl.constexpr, MEAN: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        prompt = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        at = prompt * n + i
        keep = (tl.load(mask + at, mask=i < n, other=0) != 0) & (i < n)
        count = tl.sum(keep.to(tl.float32), 0)

        r = tl.load(reward + at, mask=keep, other=0.0)
        gap = tl.where(keep, tl.max(tl.where(keep, r, -float("inf")), 0) - r, 0.0)
        spread = tl.max(gap, 0)
        u = -gap / tl.where(spread == 0, 1.0, spread)
        center = tl.where(keep, u - tl.sum(u, 0) / tl.maximum(count, 1.0), 0.0)
        ddof = 1.0 if HALF else 0.0
        sigma = tl.sqrt(tl.sum(center * center, 0) / tl.maximum(count - ddof, 1.0))
        ratio = tl.load(policy_logp + at, mask=keep, other=0.0) - tl.load(ref_logp + at, mask=keep, other=0.0)
        s = gamma * ratio - center / tl.where(spread == 0, 1.0, sigma)

        d = s[:, None] - s[None, :]
        in_sum = keep[:, None] & keep[None, :]
        if MEAN:
            in_sum = in_sum & (i[:, None] < i[None, :])
        elif UPPER:
            in_sum = in_sum & (i[:, None] <= i[None, :])
        factor = 0.5 if HALF else 1.0
        pair = tl.where(in_sum, factor * d * d, 0.0)

        if MEAN:
            number = tl.maximum(tl.sum(tl.sum(in_sum.to(tl.float32), 1), 0), 1.0)
            weight = in_sum.to(tl.float32) / number
            value = tl.sum(tl.sum(pair, 1), 0) / number
        else:
            high = tl.max(tl.max(pair, 1), 0)
            e = tl.where(in_sum, tl.exp((pair - high) / lam), 0.0)
            total = tl.sum(tl.sum(e, 1), 0)
            total = tl.where(count > 0, total, 1.0)
            weight = e / total
            value = high + lam * tl.log(total)
        tl.store(loss + prompt, value)

        # Each pair pulls at both of its ends, in opposite directions.
        pull = 2.0 * factor * tl.where(in_sum, weight * d, 0.0)
        tl.store(grad + at, gamma * (tl.sum(pull, 1) - tl.sum(pull, 0)), mask=i < n)


MAX_TRITON_RESPONSES = 64  # a program holds n × n numbers in registers; prompts with more responses go to torch


class VCBLoss(torch.autograd.Function):
    """The Triton form: fp32 (B, n) inputs, contiguous."""

    @staticmethod
    def forward(ctx, policy_logp, ref_logp, reward, mask, gamma, lam, pairs):
        prompts, n = reward.shape
        loss = torch.empty(prompts, dtype=torch.float32, device=reward.device)
        grad = torch.empty_like(reward)
        block = triton.next_power_of_2(max(n, 2))
        if prompts:
            with torch.cuda.device_of(reward):
                _vcb_kernel[(prompts,)](
                    policy_logp, ref_logp, reward, mask.view(torch.uint8), loss, grad, n, gamma, lam,
                    HALF=pairs == "full", UPPER=pairs == "upper", MEAN=pairs == "mean", BLOCK=block,
                    num_warps=8 if block >= 64 else 4 if block >= 32 else 1, enable_fp_fusion=True,
                )  # fmt: skip
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (grad,) = ctx.saved_tensors
        grad = grad * upstream[:, None]
        return grad, -grad if ctx.needs_input_grad[1] else None, None, None, None, None, None


# --- The public op -----------------------------------------------------------------------------------------------------


@not_compiled
def vcb_loss(
    policy_logp: Tensor,
    ref_logp: Tensor,
    reward: Tensor,
    *,
    gamma: float,
    lam: float = 1.0,
    pairs: str = "upper",
    mask: Tensor | None = None,
) -> Tensor:
    """VCB loss of each prompt (the paper's eq. 20; the variants are above).

    Args:
        policy_logp: (B, n), log π(y_i|x) summed over the response's tokens.
        ref_logp: (B, n), the same under the frozen SFT model.
        reward: (B, n), raw rewards. Constants: they get no gradient. Only their differences over their standard
            deviation count, so a shift or a rescaling changes nothing; equal rewards of a prompt are normalised to 0.
        gamma: strength of the KL term (the paper's best on HH: 0.05).
        lam: λ, the temperature of the log-sum-exp; its size may be anything positive.
        pairs: `upper`, `full` or `mean`.
        mask: (B, n) bool, False for responses that are not there (what stands at them is never used). A prompt with
            no response has loss 0, one with a single response has loss 0 and no gradient.

    Returns:
        (B,) fp32 (fp64 if policy_logp is): average it over prompts. Differentiable in policy_logp and ref_logp.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, lam <= 0, an unknown `pairs`.
    """
    if pairs not in PAIRS:
        raise ValueError(f"pairs must be one of {', '.join(PAIRS)}; got {pairs!r}")
    if not lam > 0:
        raise ValueError(f"lam must be positive, got {lam}")
    if policy_logp.dim() != 2 or not policy_logp.shape == ref_logp.shape == reward.shape:
        shapes = ", ".join(str(tuple(x.shape)) for x in (policy_logp, ref_logp, reward))
        raise ValueError(f"policy_logp, ref_logp and reward must have one shape (B, n), got {shapes}")
    mask = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    if mask.shape != reward.shape or mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool {tuple(reward.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    dtype = torch.promote_types(policy_logp.dtype, torch.float32)
    if reward.shape[1] == 0:
        return policy_logp.sum(1).to(dtype)  # no responses: 0, and still differentiable
    tensors = policy_logp, ref_logp, reward.detach()
    if use_triton(reward) and reward.shape[1] <= MAX_TRITON_RESPONSES and dtype == torch.float32:
        tensors = (x.float().contiguous() for x in tensors)
        return VCBLoss.apply(*tensors, mask.contiguous(), float(gamma), float(lam), pairs)
    # fp64 inside: these are B · n numbers, and a scale of the rewards then changes no digit of an fp32 result.
    return vcb_torch(*(x.double() for x in tensors), mask, gamma, lam, pairs).to(dtype)
