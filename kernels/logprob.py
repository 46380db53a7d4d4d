"""Log-probability and entropy of tokens, from the input of the LM head: no (N, V) tensor is ever built.

For hidden states h (N, D), the head's weight W (V, D) and bias b (V,), temperature T and soft cap c:

    u = h Wᵀ + b                           raw logits
    a = c tanh(u / c)                      (a = u without a soft cap)
    z = a / T
    logp_i = z_it - log Σ_j exp z_ij       t = target_i
    H_i    = -Σ_j p_ij log p_ij            p = softmax(z)

    ∂(Σ g logp + Σ e H) / ∂z_ij = g_i [j = t] - p_ij (g_i + e_i (log p_ij + H_i))

The logits exist one vocabulary slice at a time, in one workspace of a fixed number of bytes. Forward: for every slice a
matrix product into the workspace and one pass over it, which updates four numbers per token (online softmax, Milakov
and Gimelshein, arXiv:1805.02867). Backward: the product again, but for the last slice, which the workspace still holds;
one pass that turns the logits into their gradient in place, and a product each for dHidden and dWeight. That is 4 matrix
products with many slices and 3, as many as building the logits takes, with one. Slicing over the vocabulary means that
each slice of dWeight is written once, and only dHidden accumulates (in fp32).
A loss whose token weights are known beforehand needs 3: `linear_nll` slices over tokens and forms the gradient at once.

From top to bottom: the pass over the logits in torch, the same in Triton, the matrix products, the autograd functions,
the public ops.

Numerics. Statistics are fp32. A log-prob is (a_t - max a) / T - log Σ exp((a - max a) / T), never z_t - logsumexp: at a
common offset of 1e4 the latter has an error of 1e-3. Logits of a bf16 product are bf16 unless `logits_dtype` says fp32, and that
rounding is the largest error here: up to 2^-9 |z| per token. Matrix products accumulate in fp32 and so do sums of them.
"""

import math
import os

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import not_compiled, triton, use_triton

IGNORE = -100  # a target of -100 is no token: log-prob 0, entropy 0, no gradient (the index that torch ignores, too)
LOWEST = -1e30  # the running maximum before the first logit: finite, because (-inf) - (-inf) and 0 · inf are NaN


# --- One pass over a slice of logits, in torch ------------------------------------------------------------------------
# `state` (4, N) holds per token: the running maximum m of a; with x = (a - m) / T, Σ exp x and Σ x exp x; and a_target.


def new_state(target: Tensor, dtype: torch.dtype) -> Tensor:
    """State before any logit was seen. A target outside the vocabulary keeps its NaN and makes its log-prob NaN."""
    state = torch.zeros((4, len(target)), dtype=dtype, device=target.device)
    state[0] = LOWEST
    state[3] = torch.nan
    return state


def row_blocks(logits: Tensor):
    """Row ranges that keep the temporaries of the passes below in a CPU's cache (on other devices: small)."""
    bytes_per_block = 2**21 if logits.device.type == "cpu" else 2**26
    rows = max(1, bytes_per_block // (4 * max(1, logits.shape[1])))
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def capped(logits: Tensor, dtype: torch.dtype, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Raw logits u → a in `dtype`, and tanh(u / softcap) where there is a soft cap. Never writes to `logits`."""
    if softcap is None:
        return logits.to(dtype), None
    tanh = (logits.to(dtype) / softcap).tanh_()
    return tanh * softcap, tanh


def locate(target: Tensor, first: int, width: int) -> tuple[Tensor, Tensor]:
    """Each target's column in a slice (some column, where it is not in it), and whether it is in it."""
    column = target - first
    return column.clamp(0, width - 1), (column >= 0) & (column < width)


def stats_torch(logits, first, target, state, temperature, softcap, entropy) -> None:
    """Update `state` (4, N) by the logits (N, width) of vocabulary entries first .. first + width - 1."""
    column, inside = locate(target, first, logits.shape[1])
    a_target, _ = capped(logits.gather(1, column[:, None])[:, 0], state.dtype, softcap)
    state[3] = torch.where(inside, a_target, state[3])
    for rows in row_blocks(logits):
        a, _ = capped(logits[rows], state.dtype, softcap)
        high, total, moment, _ = state[:, rows]
        new_high = torch.maximum(high, a.amax(1))
        shift = ((high - new_high) / temperature).clamp(min=-1e4)  # its exp is 0; infinite, it would turn 0 into NaN
        x = a - new_high[:, None]
        if temperature != 1:
            x.div_(temperature)
        if entropy:
            e = x.exp()
            x.clamp_(min=-1e4)  # the same for logits of -inf
            moment.add_(shift * total).mul_(shift.exp()).add_(x.mul_(e).sum(1))
        else:
            e = x.exp_()
        total.mul_(shift.exp()).add_(e.sum(1))
        high.copy_(new_high)


def grad_torch(logits, first, target, state, grad_logp, grad_entropy, temperature, softcap, out) -> None:
    """out (N, width) = gradient of the raw logits of a slice, given the final `state`; `out` may be `logits`."""
    column, inside = locate(target, first, logits.shape[1])
    at_target = torch.where(inside, grad_logp, 0)
    for rows in row_blocks(logits):
        a, tanh = capped(logits[rows], state.dtype, softcap)
        high, total, moment, _ = state[:, rows]
        x = torch.sub(a, high[:, None], out=out[rows] if out.dtype == state.dtype else None)
        if temperature != 1:
            x.div_(temperature)
        if grad_entropy is None:
            d = x.exp_().mul_((-grad_logp[rows] / total)[:, None])
        else:  # log p + H = x - Σ x exp x / Σ exp x
            e = x.exp().div_(-total[:, None])
            d = x.clamp_(min=-1e4).sub_((moment / total)[:, None]).mul_(grad_entropy[rows][:, None])
            d.add_(grad_logp[rows][:, None]).mul_(e)
        d.scatter_add_(1, column[rows][:, None], at_target[rows][:, None])
        if temperature != 1:
            d.div_(temperature)
        if tanh is not None:
            d.mul_(tanh.square_().neg_().add_(1))
        if d.data_ptr() != out[rows].data_ptr():
            out[rows] = d


# --- The same in Triton: one program per token -------------------------------------------------------------------------

if triton is not None:
    import triton.language as tl

    LOG2E, LN2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)

    # On a GPU exp is a multiplication and an exp2: that factor and 1 / T are one, `scale` = log2(e) / T. Only the state
    # in memory has x = (a - m) / T; here x is (a - m) scale. Whole blocks have no mask: with one, a width that is no
    # multiple of 16 would load element by element. Only a last block that is not whole has one.

    @triton.jit
    def _tanh(x):
        # The libdevice function does not exist in the interpreter. Near 0 the quotient would cancel: a series instead.
        t = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
        far = (1.0 - t) / (1.0 + t)
        square = x * x
        near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0)))
        return tl.where(tl.abs(x) < 0.1, near, tl.where(x < 0, -far, far))

    @triton.jit
    def _capped(u, softcap, inverse_cap, SOFTCAP: tl.constexpr):
        if SOFTCAP:
            u = softcap * _tanh(u * inverse_cap)
        return u

    @triton.jit
    def _add_block(a, high, total, moment, scale, ENTROPY: tl.constexpr):
        new_high = tl.maximum(high, tl.max(a, 0))
        x = (a - new_high) * scale
        e = tl.exp2(x)
        shift = tl.maximum((high - new_high) * scale, -1e4)
        decay = tl.exp2(shift)
        if ENTROPY:
            moment = decay * (moment + shift * total) + tl.sum(e * tl.maximum(x, -1e4), 0)
        total = decay * total + tl.sum(e, 0)
        return new_high, total, moment

    @triton.jit
    def _stats_kernel(
        logits, stride, width, target, first, state, n, scale, softcap, inverse_cap,
        SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)  # row · stride passes 2^31 at 16,384 tokens of a vocabulary of 131,072
        logits += row * stride
        high = tl.load(state + row)
        total = tl.load(state + n + row)
        moment = tl.load(state + 2 * n + row) * LOG2E

        column = tl.load(target + row) - first
        inside = (column >= 0) & (column < width)
        u_target = tl.load(logits + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(state + 3 * n + row, _capped(u_target, softcap, inverse_cap, SOFTCAP), mask=inside)

        whole = width // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            u = tl.load(logits + start + tl.arange(0, BLOCK)).to(tl.float32)
            a = _capped(u, softcap, inverse_cap, SOFTCAP)
            high, total, moment = _add_block(a, high, total, moment, scale, ENTROPY)
        if whole < width:
            columns = whole + tl.arange(0, BLOCK)
            u = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
            # -inf only now: tanh would make it finite.
            a = tl.where(columns < width, _capped(u, softcap, inverse_cap, SOFTCAP), -float("inf"))
            high, total, moment = _add_block(a, high, total, moment, scale, ENTROPY)

        tl.store(state + row, high)
        tl.store(state + n + row, total)
        if ENTROPY:
            tl.store(state + 2 * n + row, moment * LN2)

    @triton.jit
    def _block_gradient(
        u, columns, column, high, mean, at_target, factor, entropy_factor, scale, softcap, inverse_cap,
        SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr,
    ):  # fmt: skip
        if SOFTCAP:
            tanh = _tanh(u * inverse_cap)
            x = (softcap * tanh - high) * scale
        else:
            x = (u - high) * scale
        if ENTROPY:
            factor += entropy_factor * (tl.maximum(x, -1e4) - mean)
        d = tl.exp2(x) * factor + tl.where(columns == column, at_target, 0.0)
        if SOFTCAP:
            d *= 1.0 - tanh * tanh
        return d

    @triton.jit
    def _grad_kernel(
        logits, stride, width, target, first, state, n, grad_logp, grad_entropy, out, out_stride,
        scale, inverse_t, softcap, inverse_cap,
        SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        logits += row * stride
        out += row * out_stride
        high = tl.load(state + row)
        inverse_total = 1.0 / tl.load(state + n + row)
        mean = tl.load(state + 2 * n + row) * (inverse_total * LOG2E)
        column = tl.load(target + row) - first
        # All that is the same for a row is multiplied once: 1 / T of the outer derivative, 1 / Σ exp x of p.
        at_target = tl.load(grad_logp + row) * inverse_t
        factor = -at_target * inverse_total
        entropy_factor = 0.0
        if ENTROPY:
            entropy_factor = -tl.load(grad_entropy + row) * inverse_t * inverse_total * LN2

        # Every element is read and written by the same program, which is why `out` may be `logits`.
        whole = width // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            u = tl.load(logits + columns).to(tl.float32)
            d = _block_gradient(u, columns, column, high, mean, at_target, factor, entropy_factor,
                                scale, softcap, inverse_cap, SOFTCAP, ENTROPY)  # fmt: skip
            tl.store(out + columns, d)
        if whole < width:
            columns = whole + tl.arange(0, BLOCK)
            u = tl.load(logits + columns, mask=columns < width, other=0.0).to(tl.float32)
            d = _block_gradient(u, columns, column, high, mean, at_target, factor, entropy_factor,
                                scale, softcap, inverse_cap, SOFTCAP, ENTROPY)  # fmt: skip
            tl.store(out + columns, d, mask=columns < width)


def _launch(width: int, temperature: float, softcap: float | None) -> dict:
    """What both kernels take. Block size and warps are fixed by the rows' width: a pass over rows is bound by memory,
    not by its tiling."""
    block = min(4096, triton.next_power_of_2(max(16, width)))
    cap = float(softcap or 1)
    return {
        "scale": 1 / (math.log(2) * float(temperature)), "softcap": cap, "inverse_cap": 1 / cap,
        "SOFTCAP": softcap is not None, "BLOCK": block,
        "num_warps": 8 if block >= 2048 else 4, "enable_fp_fusion": True,
    }  # fmt: skip


def stats_triton(logits, first, target, state, temperature, softcap, entropy) -> None:
    """`stats_torch`; rows of `logits` need unit stride, `state` fp32."""
    n, width = logits.shape
    if n == 0:
        return
    with torch.cuda.device_of(logits):
        _stats_kernel[(n,)](
            logits, logits.stride(0), width, target, first, state, n,
            ENTROPY=entropy, **_launch(width, temperature, softcap),
        )  # fmt: skip


def grad_triton(logits, first, target, state, grad_logp, grad_entropy, temperature, softcap, out) -> None:
    """`grad_torch`; rows of `logits` and `out` need unit stride, `state` and the upstream gradients fp32."""
    n, width = logits.shape
    if n == 0:
        return
    with torch.cuda.device_of(logits):
        _grad_kernel[(n,)](
            logits, logits.stride(0), width, target, first, state, n, grad_logp,
            grad_logp if grad_entropy is None else grad_entropy, out, out.stride(0), inverse_t=1 / float(temperature),
            ENTROPY=grad_entropy is not None, **_launch(width, temperature, softcap),
        )  # fmt: skip


def passes(x: Tensor):
    """(stats, grad) for logits on x's device. Triton has no fp64 form."""
    return (stats_triton, grad_triton) if use_triton(x) and x.dtype != torch.float64 else (stats_torch, grad_torch)


def finish(target: Tensor, state: Tensor, temperature: float, entropy: bool):
    """Final state → logp (N,), or (logp, entropy)."""
    high, total, moment, at_target = state
    token = target != IGNORE
    logp = torch.where(token, (at_target - high) / temperature - total.log(), 0)
    return (logp, torch.where(token, total.log() - moment / total, 0)) if entropy else logp


def upstream(grad: Tensor | None, target: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Upstream gradient (N,) in `dtype`, contiguous, 0 at ignored tokens."""
    return None if grad is None else torch.where(target != IGNORE, grad.to(dtype), 0).contiguous()


# --- Matrix products and their workspace -------------------------------------------------------------------------------


def workspace_bytes(device: torch.device) -> int:
    """Bytes that logits may take: KERNELS_WORKSPACE_MB, or 512 MiB on a GPU and 64 MiB on a CPU."""
    text = os.environ.get("KERNELS_WORKSPACE_MB") or ("64" if device.type == "cpu" else "512")
    try:
        size = float(text)
    except ValueError:
        size = -1.0
    if not 0 < size < 2**40:
        raise ValueError(f"KERNELS_WORKSPACE_MB must be a positive number of MiB, got {text!r}")
    return int(size * 2**20)


def even_ranges(length: int, limit: int, multiple: int) -> list[tuple[int, int]]:
    """0 .. length in as few ranges of at most `limit` as it takes, of one size up to a last, smaller one.

    Sizes are a multiple of `multiple` (never smaller than one, even if `limit` is)."""
    if length == 0:
        return []
    limit = max(limit // multiple, 1) * multiple
    count = -(-length // limit)
    size = -(-length // (count * multiple)) * multiple
    return [(i, min(i + size, length)) for i in range(0, length, size)]


def vocabulary_slices(hidden: Tensor, weight: Tensor, logits_dtype: torch.dtype) -> list[tuple[int, int]]:
    """Vocabulary ranges [a, b) whose logits of all N tokens (and whose converted weight) fit the workspace."""
    # The gradient takes the logits' place where it has their dtype. Where the weight has another dtype, so has its
    # gradient: one slice each.
    logit = logits_dtype.itemsize + (0 if logits_dtype == hidden.dtype else hidden.element_size())
    converted = 0 if weight.dtype == hidden.dtype else 2 * weight.shape[1] * hidden.element_size()
    per_column = max(len(hidden), 1) * logit + converted
    return even_ranges(len(weight), workspace_bytes(hidden.device) // per_column, 128)


def token_chunks(hidden: Tensor, weight: Tensor, spared: int) -> list[tuple[int, int]]:
    """Token ranges [a, b) whose logits fit the workspace, or one of all N tokens where its peak of memory is no higher.

    spared: bytes by which the accumulator of dWeight that several chunks need is larger than dWeight. Several chunks
    hold max(workspace + accumulator, accumulator + dWeight), the second in backward; one holds its logits + dWeight.
    """
    budget = workspace_bytes(hidden.device)
    per_token = len(weight) * hidden.element_size()
    if spared and len(hidden) * per_token <= spared + max(budget, weight.numel() * weight.element_size()):
        budget = len(hidden) * per_token
    return even_ranges(len(hidden), budget // per_token, 1)


class Workspace:
    """One buffer, seen as an (n, width) matrix with rows 128 bytes aligned so that any width is fast."""

    def __init__(self, rows: int, columns: int, like: Tensor, dtype: torch.dtype):
        self.columns = -(-columns // 64) * 64
        self.buffer = torch.empty(rows * self.columns, dtype=dtype, device=like.device)

    def view(self, rows: int, columns: int) -> Tensor:
        return self.buffer[: rows * self.columns].view(rows, self.columns)[:, :columns]


def matmul(a: Tensor, b: Tensor, out: Tensor, accumulate: bool = False) -> None:
    """out = a @ b, or out += a @ b. Operands share a dtype; every sum of products is fp32 (fp64 for fp64) inside."""
    if out.dtype == a.dtype:
        out.addmm_(a, b) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32:  # bf16 or fp16 operands, an fp32 result: only CUDA has this
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        out.add_(torch.mm(a, b)) if accumulate else out.copy_(torch.mm(a, b))


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """out (N, width) = hidden @ weightᵀ + bias."""
    if bias is None:
        matmul(hidden, weight.t(), out)
    elif out.dtype == hidden.dtype:
        torch.addmm(bias.to(out.dtype), hidden, weight.t(), out=out)
    else:
        matmul(hidden, weight.t(), out)
        out.add_(bias)


def operand_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """dtype of the matrix products' operands (see `linear_logprob`)."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and torch.float64 not in (hidden.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype == weight.dtype:
        dtype = hidden.dtype
    else:
        raise ValueError(
            f"hidden is {hidden.dtype} and weight is {weight.dtype}: outside torch.autocast they must be the same"
        )
    # Only CUDA multiplies half precision into fp32; elsewhere the slices are converted.
    return dtype if hidden.is_cuda or dtype == torch.float64 else torch.float32


# --- Autograd ----------------------------------------------------------------------------------------------------------


class LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, dtype, logits_dtype, temperature, softcap, entropy):
        ctx.set_materialize_grads(False)
        ctx.config = dtype, logits_dtype, temperature, softcap
        with torch.autocast(hidden.device.type, enabled=False):
            state = new_state(target, torch.promote_types(logits_dtype, torch.float32))
            h = hidden.to(dtype).contiguous()
            slices = vocabulary_slices(h, weight, logits_dtype)
            workspace = Workspace(len(h), slices[0][1], h, logits_dtype)
            stats, _ = passes(workspace.buffer)
            for a, b in slices:
                logits = workspace.view(len(h), b - a)
                project(h, weight[a:b].to(dtype), None if bias is None else bias[a:b], logits)
                stats(logits, a, target, state, temperature, softcap, entropy)
        ctx.save_for_backward(hidden, weight, bias, target, state)
        # This call's own, with the logits of the last slice. Not a saved tensor: the first backward overwrites them.
        ctx.slices, ctx.workspace = slices, workspace
        return finish(target, state, temperature, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy=None):
        hidden, weight, bias, target, state = ctx.saved_tensors
        dtype, logits_dtype, temperature, softcap = ctx.config
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        if grad_logp is None and grad_entropy is None:
            return (None,) * 9
        workspace, ctx.workspace = ctx.workspace, None
        if weight.dim() != 2:
            raise RuntimeError(
                f"the LM head's weight has shape {tuple(weight.shape)} in backward: ZeRO-3 partitioned it. Call the op "
                "inside the forward of the module that owns the weight, whose hooks gather it in backward too"
            )
        with torch.autocast(hidden.device.type, enabled=False):
            if grad_logp is None:
                grad_logp = torch.zeros_like(grad_entropy)
            grad_logp, grad_entropy = (upstream(g, target, state.dtype) for g in (grad_logp, grad_entropy))
            h = hidden.to(dtype).contiguous()
            dh = torch.empty(h.shape, dtype=state.dtype, device=h.device) if need_hidden else None
            dw = torch.empty(weight.shape, dtype=weight.dtype, device=h.device) if need_weight else None
            db = torch.empty(bias.shape, dtype=state.dtype, device=h.device) if need_bias else None

            held = workspace is not None
            width = ctx.slices[0][1]
            workspace = workspace or Workspace(len(h), width, h, logits_dtype)
            gradients = workspace if logits_dtype == dtype else Workspace(len(h), width, h, dtype)
            _, grad = passes(workspace.buffer)
            for a, b in reversed(ctx.slices):
                last = b == len(weight)
                logits, dz = workspace.view(len(h), b - a), gradients.view(len(h), b - a)
                w = weight[a:b].to(dtype)
                if not (last and held):
                    project(h, w, None if bias is None else bias[a:b], logits)
                grad(logits, a, target, state, grad_logp, grad_entropy, temperature, softcap, dz)
                if need_hidden:
                    matmul(dz, w, dh, accumulate=not last)
                if need_weight:
                    matmul(dz.t(), h, dw[a:b])
                if need_bias:
                    torch.sum(dz, 0, dtype=db.dtype, out=db[a:b])
        dh = None if dh is None else dh.to(hidden.dtype)
        db = None if db is None else db.to(bias.dtype)
        return dh, dw, db, *(None,) * 6


class LinearNLL(torch.autograd.Function):
    """-Σ token_weight · logp. The gradient is formed in forward, from the one copy of the logits that is ever made."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, target, token_weight, dtype, temperature, softcap):
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        with torch.autocast(hidden.device.type, enabled=False):
            stats_dtype = torch.promote_types(dtype, torch.float32)
            token_weight = upstream(token_weight, target, stats_dtype)
            # The upstream scalar (a loss scale, say) is not known yet. With a largest weight of 1 fp16 does not underflow.
            scale = token_weight.abs().amax() if len(target) else token_weight.sum()
            scale = torch.where(scale > 0, scale, 1)
            g = -token_weight / scale

            h, w = hidden.to(dtype).contiguous(), weight.to(dtype)
            # Each chunk adds to all of dWeight: in fp32, unless there is but one. In fp16 a sum over tokens, before the
            # upstream scalar makes it small, could overflow.
            narrow = need_weight and weight.dtype == dtype and dtype != torch.float16
            spared = weight.numel() * (stats_dtype.itemsize - dtype.itemsize) if narrow else 0
            chunks = token_chunks(h, w, spared)
            dw_dtype = weight.dtype if narrow and len(chunks) == 1 else stats_dtype
            rows = chunks[0][1] if chunks else 0
            workspace = Workspace(rows, len(weight), h, dtype)
            stats, grad = passes(workspace.buffer)
            dh_dtype = torch.promote_types(hidden.dtype, dtype)  # rounded to hidden's in backward, once
            dh = torch.empty(h.shape, dtype=dh_dtype, device=h.device) if need_hidden else None
            new = torch.empty if chunks else torch.zeros
            dw = new(weight.shape, dtype=dw_dtype, device=h.device) if need_weight else None
            db = torch.zeros(bias.shape, dtype=stats_dtype, device=h.device) if need_bias else None
            loss = torch.zeros((), dtype=stats_dtype, device=h.device)
            for a, b in chunks:
                logits = dz = workspace.view(b - a, len(weight))  # the gradient takes the logits' place
                state = new_state(target[a:b], stats_dtype)
                project(h[a:b], w, bias, logits)
                stats(logits, 0, target[a:b], state, temperature, softcap, False)
                grad(logits, 0, target[a:b], state, g[a:b], None, temperature, softcap, dz)
                loss -= weighted_sum(finish(target[a:b], state, temperature, False), token_weight[a:b])
                if need_hidden:
                    matmul(dz, w, dh[a:b])
                if need_weight:
                    matmul(dz.t(), h[a:b], dw, accumulate=a > 0)
                if need_bias:
                    db += dz.sum(0, dtype=db.dtype)
        # Not through save_for_backward: backward consumes them, so that there is never a second copy of dWeight.
        ctx.scale, ctx.grads = scale, (dh, dw, db)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_nll gives its gradient once: use linear_logprob to call backward again")
        grads, ctx.grads = ctx.grads, None
        grad = grad * ctx.scale
        scaled = []
        for d, dtype in zip(grads, ctx.dtypes, strict=True):
            if d is not None:
                # One pass: scaled in the accumulator's precision, rounded once.
                d = d.mul_(grad) if d.dtype == dtype else torch.mul(d, grad, out=torch.empty_like(d, dtype=dtype))
            scaled.append(d)
        return *scaled, *(None,) * 5


class TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, temperature, entropy):
        ctx.set_materialize_grads(False)
        ctx.temperature = temperature
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        state = new_state(target, torch.promote_types(logits.dtype, torch.float32))
        stats, _ = passes(rows)
        stats(rows, 0, target, state, temperature, None, entropy)
        ctx.save_for_backward(logits, target, state)
        return finish(target, state, temperature, entropy)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy=None):
        logits, target, state = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return None, None, None, None
        if grad_logp is None:
            grad_logp = torch.zeros_like(grad_entropy)
        grad_logp, grad_entropy = (upstream(g, target, state.dtype) for g in (grad_logp, grad_entropy))
        rows = logits if logits.stride(1) == 1 else logits.contiguous()
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        _, grad = passes(rows)
        grad(rows, 0, target, state, grad_logp, grad_entropy, ctx.temperature, None, out)
        return out, None, None, None


# --- The public ops ----------------------------------------------------------------------------------------------------


def check_target(target: Tensor, n: int, vocabulary: int, device: torch.device) -> Tensor:
    if target.shape != (n,) or target.device != device:
        raise ValueError(f"target must be ({n},) on {device}, got {tuple(target.shape)} on {target.device}")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise ValueError(f"target must hold token ids, got {target.dtype}")
    # Reading a value would stall a GPU; there, a target out of range gives NaN.
    if device.type == "cpu":
        wrong = ((target < 0) | (target >= vocabulary)) & (target != IGNORE)
        if wrong.any():
            raise ValueError(f"target {target[wrong][0].item()} is outside 0 .. {vocabulary - 1} (and not {IGNORE})")
    return target.long().contiguous()


def check_scales(temperature: float, softcap: float | None) -> None:
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be None, or positive and finite, got {softcap}")


def check_linear(hidden, weight, target, bias, temperature, softcap, logits_dtype):
    """Validate; returns target as int64, the operands' dtype, the logits' dtype."""
    if weight.dim() == 1 and weight.numel() == 0:
        raise ValueError("weight is empty: under ZeRO-3 call the op inside the forward of the module that owns it")
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1] or 0 in weight.shape:
        raise ValueError(f"hidden (N, D), weight (V, D) expected: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be ({len(weight)},), got {tuple(bias.shape)}")
    for name, x in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if x is not None and not x.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point, got {x.dtype}")
        if x is not None and x.device != hidden.device:
            raise ValueError(f"{name} is on {x.device}, hidden on {hidden.device}")
    if logits_dtype is not None and not logits_dtype.is_floating_point:
        raise ValueError(f"logits_dtype must be a floating point dtype, got {logits_dtype}")
    check_scales(temperature, softcap)
    target = check_target(target, len(hidden), len(weight), hidden.device)
    dtype = operand_dtype(hidden, weight)
    return target, dtype, torch.promote_types(dtype, logits_dtype or dtype)


@not_compiled
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    logits_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `target` under softmax(softcap(hidden @ weightᵀ + bias) / temperature); no (N, V) tensor.

    Args:
        hidden: (N, D), the LM head's input at the N positions that count: drop prompt and padding first. N may be 0.
        weight: (V, D), the LM head. A tied embedding is as good; a LoRA on the head is `W + scale * B @ A`.
        target: (N,) integer token ids; -100 gives log-prob 0, entropy 0 and no gradient.
        bias: (V,) or None.
        temperature: divides the logits, after the soft cap.
        softcap: c of c · tanh(logits / c) (Gemma 2), or None.
        entropy: return the entropy of each position's distribution too.
        logits_dtype: the least precision that logits are held in. None: that of the operands. torch.float32 for
            sums of log-probs (sequence likelihoods): rounding logits to bf16 costs up to 2^-9 |logit| per token.

    Returns:
        logp (N,) fp32, or (logp, entropy), both (N,) fp32; fp64 if the inputs are. Differentiable (once) in hidden,
        weight and bias, through both; gradients have the dtype of their tensor, and what is frozen costs nothing.

    dtypes: hidden and weight share one, and the matrix products are done in it. Under torch.autocast they are done in
    the autocast dtype whatever the inputs are (fp64 stays fp64), as `F.linear` would; gradients of fp32 weights
    stay unrounded. Off CUDA bf16 and fp16 operands are widened, so products and logits are fp32 at least.

    Memory: KERNELS_WORKSPACE_MB (512 on a GPU, 64 on a CPU) of logits, but never less than 128 columns of them; the
    gradients; an fp32 (N, D) accumulator. Kept for backward: the inputs, 16 bytes per token, and that one workspace with
    the last slice of the logits (each call has its own), which the first backward uses up; a second one (retain_graph)
    computes all logits again. Nothing is kept without grad.

    ZeRO-3: the weight is whole only inside the forward of the module that owns it, in backward too. Call the op there.

    Raises:
        ValueError: shapes, dtypes, devices or scales that do not fit; on a CPU also a target outside 0 .. V - 1 (on a
            GPU its log-prob is NaN, because looking would stall the GPU).
    """
    target, dtype, logits_dtype = check_linear(hidden, weight, target, bias, temperature, softcap, logits_dtype)
    return LinearLogprob.apply(hidden, weight, bias, target, dtype, logits_dtype, temperature, softcap, entropy)


@not_compiled
def linear_nll(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    token_weight: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """-Σ_i token_weight_i · logp_i, a scalar, for losses whose token weights are known beforehand (SFT, ReST).

    The same as weighting `linear_logprob`, but the gradient is formed in forward: 3 matrix products instead of 4. It is
    kept until backward (dHidden and dWeight) and given once; a second backward raises RuntimeError.

    Memory: KERNELS_WORKSPACE_MB of logits at a time, each chunk of tokens adding to dWeight in fp32. Where a bf16
    dWeight beside all the logits is no more than that accumulator needs in forward or backward, there is one chunk. A
    weight of another dtype than the products' (autocast, half precision on a CPU) is converted as a whole, for the time
    of the forward.

    Args:
        token_weight: (N,), such as response_mask / number of response tokens. Constants: they get no gradient.
        others, dtype of the result, errors: see `linear_logprob`.
    """
    target, dtype, _ = check_linear(hidden, weight, target, bias, temperature, softcap, None)
    if token_weight.shape != target.shape or token_weight.device != target.device:
        raise ValueError(f"token_weight must be {tuple(target.shape)} on {target.device}, got "
                         f"{tuple(token_weight.shape)} on {token_weight.device}")  # fmt: skip
    token_weight = token_weight.detach()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (hidden, weight, bias)):
        return LinearNLL.apply(hidden, weight, bias, target, token_weight, dtype, temperature, softcap)
    logp = LinearLogprob.apply(hidden, weight, bias, target, dtype, dtype, temperature, softcap, False)
    return -weighted_sum(logp, token_weight)


def weighted_sum(logp: Tensor, token_weight: Tensor) -> Tensor:
    """Σ token_weight · logp, where a weight of 0 silences a log-prob of -inf."""
    return torch.where(token_weight != 0, logp * token_weight.to(logp.dtype), 0).sum()


@not_compiled
def token_logprob(
    logits: Tensor, target: Tensor, *, temperature: float = 1.0, entropy: bool = False
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-prob of `target` under softmax(logits / temperature), for logits that exist anyway.

    Args:
        logits: (N, V), fp32, bf16, fp16 or fp64.
        target: (N,) integer token ids; -100 gives log-prob 0, entropy 0 and no gradient.

    Returns:
        logp (N,) fp32, or (logp, entropy), both (N,) fp32; fp64 if the logits are. Differentiable (once) in the logits.
        Beside the logits' gradient, which one pass writes, nothing of size N · V is allocated.

    Raises:
        ValueError: as `linear_logprob`.
    """
    if logits.dim() != 2 or not logits.dtype.is_floating_point or logits.shape[1] == 0:
        raise ValueError(f"logits must be floating point (N, V), got {logits.dtype} {tuple(logits.shape)}")
    check_scales(temperature, None)
    target = check_target(target, len(logits), logits.shape[1], logits.device)
    return TokenLogprob.apply(logits, target, temperature, entropy)
