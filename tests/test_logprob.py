"""kernels/logprob.py against fp64: values, gradients, memory, edges; Triton in its interpreter and on a GPU."""

import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import linear_logprob, linear_nll, logprob, normalize_values, token_logprob, vcb_loss
from kernels.backend import INTERPRETED, triton

ROOT = Path(__file__).resolve().parent.parent

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Both implementations on CPU tensors; Triton's only in the child process of test_interpreter."""
    if request.param == "triton" and not INTERPRETED:
        pytest.skip("runs in test_interpreter's child process")
    monkeypatch.setenv("KERNELS", request.param)
    return request.param


@pytest.mark.skipif(INTERPRETED or triton is None, reason="starts the child process; needs triton")
def test_interpreter():
    """Every test of this file that takes `backend`, with Triton interpreted, in a process of its own."""
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "triton and not without", __file__]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr


def naive(hidden, weight, target, bias=None, temperature=1.0, softcap=None):
    """The definition: logits, log_softmax, gather. Returns logp and entropy."""
    logits = hidden @ weight.T
    if bias is not None:
        logits = logits + bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    token = target != -100
    logp = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return torch.where(token, logp, 0), torch.where(token, -(log_p.exp() * log_p).sum(-1), 0)


def problem(n, d, v, *, bias=True, seed=0, dtype=torch.float32, device="cpu", scale=4.0):
    """hidden, weight, bias, target and two upstream gradients. Targets stand at the edges of the vocabulary and of a
    block; logits have a standard deviation of `scale`."""
    gen = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=gen).mul(scale / d**0.5).to(device, dtype)
    weight = torch.randn(v, d, generator=gen).to(device, dtype)
    b = torch.randn(v, generator=gen).to(device, dtype) if bias else None
    target = torch.randint(v, (n,), generator=gen)
    edges = torch.tensor([0, v - 1, -100, 127, 128, min(4095, v - 1), min(4096, v - 1)])[:n]
    target[: len(edges)] = edges
    g, e = torch.randn(2, n, generator=gen).exp() * torch.randn(2, n, generator=gen).sign()
    return hidden, weight, b, target.to(device), g.to(device), e.to(device)


def run(op, inputs, g, e=None):
    """op(*inputs) → outputs and the gradients of Σ g · logp + e · entropy."""
    inputs = [None if x is None else x.detach().requires_grad_(True) for x in inputs]
    outputs = op(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    loss = (g.to(outputs[0].dtype) * outputs[0]).sum()
    if e is not None:
        loss = loss + (e.to(outputs[1].dtype) * outputs[1]).sum()
    loss.backward()
    return [x.detach() for x in outputs] + [x.grad for x in inputs if x is not None]


def error(got, want):
    """Largest error relative to the largest entry."""
    assert got.shape == want.shape
    if got.numel() == 0:
        return 0.0
    return ((got.double() - want.double()).abs().max() / want.abs().max().clamp(min=1e-30)).item()


def check(n, d, v, seed=0, entropy=True, device="cpu", **options):
    """linear_logprob in fp32 against the definition in fp64: about the error of the definition in fp32, or less."""
    hidden, weight, bias, target, g, e = problem(n, d, v, seed=seed, device=device)
    upstream = (g, e) if entropy else (g,)

    def op(h, w, b):
        return linear_logprob(h, w, target, bias=b, entropy=entropy, **options)

    def definition(h, w, b):
        outputs = naive(h, w, target, b, **options)
        return outputs if entropy else outputs[0]

    got = run(op, (hidden, weight, bias), *upstream)
    plain = run(definition, (hidden, weight, bias), *upstream)
    want = run(definition, [x.double() for x in (hidden, weight, bias)], *(x.double() for x in upstream))
    for a, b, c in zip(got, plain, want, strict=True):
        assert a.dtype == torch.float32
        assert error(a, c) < 2e-6 + 2 * error(b, c)


# --- Values and gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [1000, 50257, 129920])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_against_fp64(backend, n, v, monkeypatch):
    if backend == "triton" and n * v > 10**6:
        pytest.skip("too slow in the interpreter")
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "2" if n < 300 else "16")
    check(n, 24, v, temperature=0.7)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 2])
def test_options(backend, softcap, temperature, entropy, monkeypatch):
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "0.01")
    check(9, 16, 517, softcap=softcap, temperature=temperature, entropy=entropy, seed=1)


def test_slices_do_not_matter(backend, monkeypatch):
    hidden, weight, bias, target, g, e = problem(9, 16, 1000)
    results = []
    for megabytes in ("0.001", "0.02", "64"):
        monkeypatch.setenv("KERNELS_WORKSPACE_MB", megabytes)
        results.append(
            run(lambda h, w, b: linear_logprob(h, w, target, bias=b, entropy=True), (hidden, weight, bias), g, e)
        )
    for other in results[1:]:
        assert all(error(a, b) < 1e-6 for a, b in zip(results[0], other, strict=True))


def test_common_offset(backend, monkeypatch):
    """An offset of 1e4 that fp32 logits hold exactly changes nothing, at any temperature, in values and gradients."""
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "0.01")
    gen = torch.Generator().manual_seed(0)
    hidden = torch.randint(-4, 5, (6, 8), generator=gen).float()
    weight = torch.randint(-4, 5, (700, 8), generator=gen) / 16
    target = torch.randint(700, (6,), generator=gen)
    g, e = torch.randn(2, 6, generator=gen)
    hidden[:, 0] = 1.0
    shifted = weight.clone()
    shifted[:, 0] += 1e4
    for op in (
        lambda w: run(lambda h, w: linear_logprob(h, w, target, entropy=True), (hidden, w), g, e),
        lambda w: run(lambda h, w: linear_logprob(h, w, target, entropy=True, temperature=0.7), (hidden, w), g, e),
        lambda w: run(lambda z: token_logprob(z, target, entropy=True), (hidden @ w.T,), g, e),
        lambda w: run(lambda z: token_logprob(z, target, entropy=True, temperature=0.7), (hidden @ w.T,), g, e),
    ):
        got, want = op(shifted), op(weight)
        got[2:3] = got[2:3] if got[2].shape != hidden.shape else want[2:3]  # dh contains the offset
        assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))


def test_large_token_weights(backend):
    """Tokens of tiny probability keep their gradient under the large weights of reinforcement learning."""
    hidden, weight, _, target, g, _ = problem(6, 16, 600, bias=False, scale=20.0)
    g = g * 1e6
    got = run(lambda h, w: linear_logprob(h, w, target), (hidden, weight), g)
    want = run(lambda h, w: naive(h, w, target)[0], (hidden.double(), weight.double()), g.double())
    assert all(error(a, b) < 3e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_token_logprob(backend, temperature):
    hidden, weight, _, target, g, e = problem(9, 16, 5000, bias=False)
    z = (hidden @ weight.T)[:, :4999]  # rows with a stride of their own
    target[1] = 4998
    got = run(lambda z: token_logprob(z, target, temperature=temperature, entropy=True), (z,), g, e)
    eye = torch.eye(4999, dtype=torch.float64)
    want = run(lambda z: naive(z, eye, target, temperature=temperature), (z.double(),), g.double(), e.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True))
    got = run(lambda z: token_logprob(z, target, temperature=temperature), (z.t().contiguous().t(),), g)
    want = run(lambda z: naive(z, eye, target, temperature=temperature)[0], (z.double(),), g.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True))


def test_masked_vocabulary(backend):
    """Logits of -inf: probability 0, no NaN in entropy or gradient."""
    z = torch.randn(4, 300)
    z[:, 100:] = -torch.inf
    z[3, 50:] = torch.finfo(torch.float32).min
    target = torch.tensor([0, 99, 5, 7])
    logp, entropy, grad = run(lambda z: token_logprob(z, target, entropy=True), (z,), torch.ones(4), torch.ones(4))
    log_p = torch.log_softmax(z[:, :100].double(), -1)
    assert error(logp, log_p.gather(1, target[:, None])[:, 0]) < 1e-6
    assert error(entropy, torch.special.entr(log_p.exp()).sum(1)) < 1e-6
    assert grad.isfinite().all() and (grad[:, 100:] == 0).all()


def test_ignored_and_empty(backend):
    hidden, weight, bias, target, g, e = problem(6, 8, 300)

    def call(target):
        ignored = target == -100
        upstream = [torch.where(ignored, torch.nan, x) for x in (g, e)]  # does not count either
        op = lambda h, w, b: linear_logprob(h, w, target, bias=b, entropy=True)
        logp, entropy, dh, dw, db = run(op, (hidden, weight, bias), *upstream)
        assert (logp[ignored] == 0).all() and (entropy[ignored] == 0).all() and (dh[ignored] == 0).all()
        assert all(x.isfinite().all() for x in (logp, entropy, dh, dw, db))
        return dw, db

    call(target)
    assert all((x == 0).all() for x in call(torch.full_like(target, -100)))
    nothing = torch.empty(0, dtype=torch.long)
    op = lambda h, w, b: linear_logprob(h, w, nothing, bias=b, entropy=True)
    logp, entropy, dh, dw, db = run(op, (hidden[:0], weight, bias), torch.empty(0), torch.empty(0))
    assert logp.shape == entropy.shape == (0,) and dh.shape == (0, 8) and (dw == 0).all() and (db == 0).all()
    h, w = hidden[:0].requires_grad_(), weight.clone().requires_grad_()
    loss = linear_nll(h, w, nothing, torch.empty(0))
    loss.backward()
    assert loss == 0 and (w.grad == 0).all() and h.grad.shape == (0, 8)
    assert token_logprob(weight[:0], nothing).shape == (0,)


def test_entropy_alone(backend):
    """A loss on the entropy only, where the log-prob has no upstream gradient at all."""
    hidden, weight, _, target, _, e = problem(5, 8, 300, bias=False)
    got = run(lambda h, w: linear_logprob(h, w, target, entropy=True)[1], (hidden, weight), e)
    want = run(lambda h, w: naive(h, w, target)[1], (hidden.double(), weight.double()), e.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("megabytes", ["0.02", "64"])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_known_weights(backend, softcap, megabytes, monkeypatch):
    """linear_nll: one chunk and several, an upstream factor, weights of 0, and what it refuses."""
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", megabytes)
    hidden, weight, bias, target, g, _ = problem(23, 16, 600)
    g[5] = 0
    options = {"temperature": 0.8, "softcap": softcap}
    op = lambda h, w, b: linear_nll(h, w, target, g, bias=b, **options)
    got = run(op, (hidden, weight, bias), torch.tensor(-0.37))
    want = run(lambda h, w, b: -(g.double() * naive(h, w, target, b, **options)[0]).sum(),
               [x.double() for x in (hidden, weight, bias)], torch.tensor(-0.37).double())  # fmt: skip
    assert all(error(a, b) < 3e-6 for a, b in zip(got, want, strict=True))
    with torch.no_grad():
        assert error(op(hidden, weight, bias), want[0]) < 3e-6
    loss = op(hidden.requires_grad_(), weight, bias)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once"):
        loss.backward()


@pytest.mark.parametrize("logits_dtype", [None, torch.float64])
@pytest.mark.parametrize("megabytes, slices", [("64", 1), ("0.03", 3)])
def test_last_slice_is_kept(backend, megabytes, slices, logits_dtype, monkeypatch):
    """The first backward multiplies for all slices but one, a second for all; calls do not share their workspace."""
    if backend == "triton" and logits_dtype is not None:
        pytest.skip("fp64 logits go to torch")
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", megabytes if logits_dtype is None else str(3 * float(megabytes)))
    hidden, weight, bias, target, g, e = problem(20, 16, 1000)
    want = run(lambda h, w, b: naive(h, w, target, b, temperature=0.7),
               [x.double() for x in (hidden, weight, bias)], g.double(), e.double())  # fmt: skip
    products, project = [], logprob.project
    monkeypatch.setattr(logprob, "project", lambda *a: (products.append(1), project(*a)))
    workspaces, workspace = [], logprob.Workspace

    def remember(*a):
        made = workspace(*a)
        workspaces.append(weakref.ref(made.buffer))
        return made

    monkeypatch.setattr(logprob, "Workspace", remember)

    def count(f):
        products.clear()
        return f(), len(products)

    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    op = lambda: linear_logprob(
        hidden, weight, target, bias=bias, temperature=0.7, entropy=True, logits_dtype=logits_dtype
    )
    (logp, entropy), forward = count(op)
    assert forward == slices and workspaces[0]() is not None
    op()[0].sum().backward(inputs=[bias])  # another call, forward and backward, in between
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "1")
    loss = (g * logp + e * entropy).sum()
    for again in (False, True):
        got, backward = count(lambda: torch.autograd.grad(loss, inputs, retain_graph=True))
        assert backward == (slices if again else slices - 1)
        assert all(error(a, b) < 3e-6 for a, b in zip((logp, entropy, *got), want, strict=True))
        assert all(x() is None for x in workspaces)  # `logp` is alive, the logits are not
    (logp, _), _ = count(op)
    with torch.no_grad():
        bias += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.sum().backward()
    with torch.no_grad():
        logp, _ = op()
    assert workspaces[-1]() is None


def test_gradcheck(monkeypatch):
    """Finite differences in fp64 of everything that is differentiable."""
    monkeypatch.setenv("KERNELS", "torch")
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "0.001")
    hidden, weight, bias, target, _, _ = problem(4, 5, 150, dtype=torch.float64, scale=1.0)
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]

    def call(**options):
        return lambda h, w, b: linear_logprob(h, w, target, bias=b, **options)

    for options in ({}, {"softcap": 2.0, "temperature": 0.7}):
        for entropy in (False, True):
            assert torch.autograd.gradcheck(call(entropy=entropy, **options), inputs, fast_mode=True)
    z = (hidden @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: token_logprob(z, target, temperature=0.7, entropy=True), z)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has no linear_cross_entropy")
def test_oracle():
    hidden, weight, _, target, g, _ = problem(20, 32, 3000, bias=False)
    got = run(lambda h, w: linear_logprob(h, w, target), (hidden, weight), g)
    want = run(lambda h, w: -F.linear_cross_entropy(h, w, target, reduction="none"), (hidden, weight), g)
    assert all(error(a, b) < 1e-5 for a, b in zip(got, want, strict=True))


# --- What is frozen, tied, adapted, strided ----------------------------------------------------------------------------


def test_frozen_parts_cost_nothing(monkeypatch):
    """Gradients as if nothing were frozen, and one product less for each frozen operand."""
    hidden, weight, bias, target, g, _ = problem(7, 8, 300)
    want = run(lambda h, w, b: linear_logprob(h, w, target, bias=b), (hidden, weight, bias), g)[1:]
    calls, matmul = [], logprob.matmul
    monkeypatch.setattr(logprob, "matmul", lambda *a, **k: (calls.append(1), matmul(*a, **k)))
    for trained in ((0,), (1,), (2,), (0, 1)):
        inputs = [x.clone().requires_grad_(i in trained) for i, x in enumerate((hidden, weight, bias))]
        calls.clear()
        (linear_logprob(inputs[0], inputs[1], target, bias=inputs[2]) * g).sum().backward()
        assert len(calls) == sum(i in trained for i in (0, 1))
        calls.clear()
        for i, x in enumerate(inputs):
            assert error(x.grad, want[i]) < 1e-6 if i in trained else x.grad is None
        for x in inputs:
            x.grad = None
        linear_nll(inputs[0], inputs[1], target, -g, bias=inputs[2]).backward()
        assert len(calls) == sum(i in trained for i in (0, 1))
        for i, x in enumerate(inputs):
            assert error(x.grad, want[i]) < 1e-6 if i in trained else x.grad is None


def test_tied_and_lora_heads():
    gen = torch.Generator().manual_seed(0)
    tokens, target = torch.randint(200, (2, 30), generator=gen)
    g = torch.randn(30, generator=gen)
    embedding = torch.randn(200, 16, generator=gen, dtype=torch.float64)

    def tied(log_prob):
        return lambda e: log_prob(torch.tanh(F.embedding(tokens, e)), e)

    got = run(tied(lambda h, w: linear_logprob(h, w, target)), (embedding.float(),), g)
    want = run(tied(lambda h, w: naive(h, w, target)[0]), (embedding,), g.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True))

    hidden = torch.randn(30, 16, generator=gen, dtype=torch.float64)
    a, b = (
        torch.randn(4, 16, generator=gen, dtype=torch.float64),
        torch.randn(200, 4, generator=gen, dtype=torch.float64),
    )
    got = run(lambda h, a, b: linear_logprob(h, embedding.float() + 0.5 * b @ a, target),
              [x.float() for x in (hidden, a, b)], g)  # fmt: skip
    want = run(lambda h, a, b: naive(h, embedding + 0.5 * b @ a, target)[0], (hidden, a, b), g.double())
    assert all(error(a, b) < 2e-6 for a, b in zip(got, want, strict=True))


def test_strided_inputs(backend, monkeypatch):
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "0.01")
    hidden, weight, bias, target, g, e = problem(8, 16, 400)
    op = lambda h, w, b: linear_logprob(h, w, target, bias=b, entropy=True)
    want = run(op, (hidden, weight, bias), g, e)
    wide = torch.zeros(8, 32)
    wide[:, ::2] = hidden
    strided = (wide[:, ::2], weight.t().contiguous().t(), bias[:, None].expand(-1, 2).contiguous()[:, 0])
    twice = torch.stack([target, target], 1).int()
    op = lambda h, w, b: linear_logprob(h, w, twice[:, 0], bias=b, entropy=True)
    leaves = [x.detach().requires_grad_() for x in strided]
    logp, entropy = op(*leaves)
    (g * logp + e * entropy).sum().backward()
    got = [logp.detach(), entropy.detach()] + [x.grad for x in leaves]
    assert all(error(a, b) < 1e-6 for a, b in zip(got, want, strict=True))
    nll = linear_nll(strided[0], strided[1].detach().requires_grad_(), twice[:, 0], torch.ones(8))
    assert math.isclose(nll.item(), -linear_logprob(hidden, weight, target).sum().item(), rel_tol=1e-5)


# --- dtypes, autocast, memory, errors ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_cpu(dtype, monkeypatch):
    """Products are widened: closer to fp64 than plain torch in the same dtype; gradients in the inputs' dtype."""
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "0.05")
    hidden, weight, bias, target, g, e = problem(30, 32, 1000, dtype=dtype)
    doubles = [x.double() for x in (hidden, weight, bias)]
    want = run(lambda h, w, b: naive(h, w, target, b), doubles, g.double(), e.double())
    plain = run(lambda h, w, b: naive(h, w, target, b), (hidden, weight, bias), g, e)
    got = run(lambda h, w, b: linear_logprob(h, w, target, bias=b, entropy=True), (hidden, weight, bias), g, e)
    assert [x.dtype for x in got] == [torch.float32] * 2 + [dtype] * 3
    assert all(error(a, c) <= 1.01 * error(b, c) for a, b, c in zip(got, plain, want, strict=True))
    assert error(got[0], want[0]) < 2e-6 and error(got[1], want[1]) < 2e-6
    nll = run(lambda h, w, b: linear_nll(h, w, target, g, bias=b), (hidden, weight, bias), torch.tensor(1.0))
    assert nll[1].dtype == dtype and error(nll[0], -(g.double() * want[0]).sum()) < 1e-5


def test_autocast():
    """fp32 master weights and bf16 hidden states under autocast: nothing changes but the dtypes that are allowed."""
    hidden, weight, bias, target, g, _ = problem(12, 16, 300)
    want = run(lambda h, w, b: linear_logprob(h, w, target, bias=b), (hidden, weight, bias), g)
    op = lambda h, w, b: linear_logprob(h, w, target, bias=b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = run(op, (hidden, weight, bias), g)  # backward under autocast, too
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        got = run(op, (hidden.bfloat16(), weight, bias), g)
        assert [x.dtype for x in got] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
        assert error(got[2], want[2]) < 2e-2
        nll = run(lambda h, w: linear_nll(h, w, target, g), (hidden.bfloat16(), weight), torch.tensor(1.0))
        assert nll[2].dtype == torch.float32
    with pytest.raises(ValueError, match="autocast"):
        op(hidden.bfloat16(), weight, bias)


def test_one_chunk_where_it_costs_no_memory():
    """linear_nll in bf16: all tokens at once if 2NV + 2VD bytes are at most what several chunks hold."""
    for n, d, v, one in ((8192, 4096, 128256, True), (8193, 4096, 128256, False), (8192, 2048, 128256, False),
                         (2048, 3072, 128256, True), (4096, 576, 49152, True), (8192, 576, 49152, False)):  # fmt: skip
        peak, several = 2 * n * v + 2 * v * d, max(2**29 + 4 * v * d, 6 * v * d)
        assert (peak <= several) == one
        hidden, weight = (torch.empty(x, d, dtype=torch.bfloat16, device="meta") for x in (n, v))
        chunks = logprob.token_chunks(hidden, weight, 2 * v * d)
        assert (len(chunks) == 1) == one and chunks[0][0] == 0 and chunks[-1][1] == n
        assert one or all(2 * (b - a) * v <= 2**29 for a, b in chunks)
        # Nothing is spared in fp32, or where the weight is frozen.
        chunks = logprob.token_chunks(hidden, weight, 0)
        assert (len(chunks) == 1) == (2 * n * v <= 2**29)


@pytest.mark.parametrize("name", ["linear_logprob", "linear_nll", "token_logprob", "normalize_values", "vcb_loss"])
def test_in_a_compiled_function(name):
    """The graph breaks at the op, which runs as it is: the same values and gradients, bit for bit."""
    gen = torch.Generator().manual_seed(0)
    x, weight, target = torch.randn(6, 8, generator=gen), torch.randn(300, 8, generator=gen), torch.arange(6)
    ops = {
        "linear_logprob": lambda x: sum(linear_logprob(x, weight, target, entropy=True)),
        "linear_nll": lambda x: linear_nll(x, weight, target, x[:, 0]),
        "token_logprob": lambda x: token_logprob(x, target),
        "normalize_values": lambda x: normalize_values(x, x > -1),
        "vcb_loss": lambda x: vcb_loss(x, x.detach() - 1, x.detach().flip(1), gamma=0.1),
    }

    def function(x):
        return ops[name](x * 2).sum() * 3

    torch._dynamo.reset()
    eager = run(function, (x,), torch.ones(()))
    compiled = run(torch.compile(function, backend="aot_eager"), (x,), torch.ones(()))
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="should not be traced"):
        torch.compile(function, backend="aot_eager", fullgraph=True)(x)


class Conversions(TorchDispatchMode):
    """How many times a tensor of `shape` was converted to bf16."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        converts = func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16
        self.count += converts and args[0].shape == self.shape
        return func(*args, **(kwargs or {}))


def test_fp16_sums_do_not_overflow(monkeypatch):
    """All tokens have one target: the sum of their gradients is beyond fp16's range, their mean is not."""

    def matmul(a, b, out, accumulate=False):
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(logprob, "matmul", matmul)
    monkeypatch.setattr(logprob, "operand_dtype", lambda hidden, weight: torch.float16)
    n = 3000
    hidden, weight, target = torch.full((n, 4), 30.0), torch.zeros(200, 4), torch.zeros(n, dtype=torch.long)
    op = lambda h, w: linear_nll(h, w, target, torch.full((n,), 1 / n))
    *_, dw = run(op, (hidden.half(), weight.half()), torch.tensor(1.0))
    want = torch.where(torch.arange(200)[:, None] == 0, -30 * 199 / 200, 30 / 200).expand(-1, 4)
    torch.testing.assert_close(dw.float(), want, rtol=2e-3, atol=0)


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("megabytes, chunks", [("0.02", 3), ("64", 1)])
def test_known_weights_in_bf16(megabytes, chunks, trained, monkeypatch):
    """linear_nll with CUDA's products, bf16 into fp32, put in for the CPU's: 3 products and one conversion of an fp32
    weight under autocast, none of a bf16 one; gradients as near to fp64 as plain autocast torch has them."""
    n, d, v = 30, 32, 1000
    products = []

    def matmul(a, b, out, accumulate=False):
        assert a.dtype == b.dtype == torch.bfloat16
        products.append(out.dtype)
        product = a.float() @ b.float()
        out.copy_(out + product if accumulate else product)

    monkeypatch.setattr(logprob, "matmul", matmul)
    monkeypatch.setattr(logprob, "operand_dtype", lambda hidden, weight: torch.bfloat16)
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", megabytes)
    hidden, weight, _, target, g, _ = problem(n, d, v, bias=False)
    hidden, weight = hidden.to(trained), weight.to(trained)
    made = []
    token_chunks = logprob.token_chunks
    monkeypatch.setattr(logprob, "token_chunks", lambda *a: made.append(token_chunks(*a)) or made[-1])
    one = torch.tensor(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16), Conversions(weight.shape) as conversions:
        got = run(lambda h, w: linear_nll(h, w, target, g), (hidden, weight), one)
    # 30 tokens: all logits beside a bf16 dWeight (60,000 + 64,000 bytes) are less than its fp32 accumulator (128,000).
    assert [len(x) for x in made] == [1 if trained == torch.bfloat16 else chunks]
    assert conversions.count == (trained == torch.float32)
    assert len(products) == 3 * len(made[0]) and got[2].dtype == got[1].dtype == trained
    assert products.count(torch.float32) == (2 * chunks if trained == torch.float32 else 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = run(lambda h, w: -(g * naive(h, w, target)[0]).sum(), (hidden, weight), one)
    want = run(
        lambda h, w: -(g.double() * naive(h, w, target)[0]).sum(), (hidden.double(), weight.double()), one.double()
    )
    assert all(error(a, c) <= 1.5 * error(b, c) for a, b, c in zip(got, plain, want, strict=True))


class LargestTensor(TorchDispatchMode):
    """The largest number of elements that one op returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


@pytest.mark.parametrize("known", [False, True])
def test_no_logits_matrix(known, monkeypatch):
    n, d, v = 256, 16, 8192
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "1")
    hidden, weight, _, target, g, e = problem(n, d, v, bias=False)
    hidden.requires_grad_(), weight.requires_grad_()
    with LargestTensor() as mode:
        if known:
            linear_nll(hidden, weight, target, g).backward()
        else:
            logp, entropy = linear_logprob(hidden, weight, target, entropy=True)
            (g * logp + e * entropy).sum().backward()
    assert weight.grad is not None
    assert mode.largest <= 2**18  # 1 MiB of fp32


def test_no_grad_keeps_nothing():
    hidden, weight, _, target, _, _ = problem(5, 8, 300, bias=False)
    weight.requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        with torch.no_grad():
            assert not linear_logprob(hidden, weight, target).requires_grad
            assert not linear_nll(hidden, weight, target, torch.ones(5)).requires_grad
        assert not saved
        linear_logprob(hidden, weight, target)
    assert saved and max(x.numel() for x in saved) <= weight.numel()


def test_checkpointed_and_once_differentiable():
    hidden, weight, _, target, g, _ = problem(5, 8, 300, bias=False)
    op = lambda h, w: linear_logprob(h, w, target)
    again = lambda h, w: torch.utils.checkpoint.checkpoint(op, h, w, use_reentrant=False)
    assert all(torch.equal(a, b) for a, b in zip(run(op, (hidden, weight), g), run(again, (hidden, weight), g)))
    g.requires_grad_()
    (dh,) = torch.autograd.grad((g * op(hidden.requires_grad_(), weight)).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dh.sum().backward()


def test_errors(monkeypatch):
    hidden, weight, bias, target, g, _ = problem(5, 8, 300)
    wrong = [
        (lambda: linear_logprob(hidden[None], weight, target), "hidden"),
        (lambda: linear_logprob(hidden, weight[:, :7], target), "hidden"),
        (lambda: linear_logprob(hidden, torch.empty(0), target), "ZeRO-3"),
        (lambda: linear_logprob(hidden, weight.double(), target), "float64"),
        (lambda: linear_logprob(hidden.long(), weight.long(), target), "floating point"),
        (lambda: linear_logprob(hidden, weight, target[:4]), "target"),
        (lambda: linear_logprob(hidden, weight, target.float()), "token ids"),
        (lambda: linear_logprob(hidden, weight, target + 1), "target 300 is outside"),
        (lambda: linear_logprob(hidden, weight, target.clamp(max=4) - 5), "outside"),
        (lambda: linear_logprob(hidden, weight, target, bias=bias[:9]), "bias"),
        (lambda: linear_logprob(hidden, weight, target, temperature=0), "temperature"),
        (lambda: linear_logprob(hidden, weight, target, temperature=math.nan), "temperature"),
        (lambda: linear_logprob(hidden, weight, target, softcap=0.0), "softcap"),
        (lambda: linear_logprob(hidden, weight, target, logits_dtype=torch.int32), "logits_dtype"),
        (lambda: linear_logprob(hidden, weight.to("meta"), target), "meta"),
        (lambda: linear_nll(hidden, weight, target, g[:3]), "token_weight"),
        (lambda: token_logprob(hidden[0], target), "logits"),
        (lambda: token_logprob(hidden, torch.full((5,), 8)), "outside"),
        (lambda: token_logprob(hidden, target.clamp(0, 7), temperature=-1.0), "temperature"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    for name, value in (("KERNELS", "cuda"), ("KERNELS_WORKSPACE_MB", "0"), ("KERNELS_WORKSPACE_MB", "much")):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match=name):
            patch.setenv(name, value)
            linear_logprob(hidden, weight, target)
    weight.requires_grad_()
    loss = linear_logprob(hidden, weight, target).sum()
    weight.data = torch.empty(0)  # what ZeRO-3 does after the forward of the weight's module
    with pytest.raises(RuntimeError, match="ZeRO-3"):
        loss.backward()
    if not INTERPRETED and triton is not None:
        monkeypatch.setenv("KERNELS", "triton")
        with pytest.raises(ValueError, match="TRITON_INTERPRET"):
            token_logprob(hidden, target.clamp(0, 7))


def test_import_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import torch, kernels; "
        "z = torch.randn(3, 5); kernels.token_logprob(z, torch.tensor([0, 1, 4])); "
        "kernels.normalize_values(z, z > 0); kernels.vcb_loss(z, z, z, gamma=0.1)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=100)


# --- Triton on a GPU ---------------------------------------------------------------------------------------------------


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("v", [1000, 50257, 129920])
    @pytest.mark.parametrize("n", [1, 7, 300])
    def test_fp32(self, n, v, monkeypatch):
        monkeypatch.setenv("KERNELS_WORKSPACE_MB", "8")
        monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
        check(n, 64, v, device="cuda", temperature=0.7, softcap=20.0)

    @pytest.mark.parametrize("logits_dtype", [None, torch.float32])
    @pytest.mark.parametrize("n, v", [(7, 50257), (300, 129920), (1024, 32000)])
    def test_bf16(self, n, v, logits_dtype, monkeypatch):
        """At most twice the error that plain bf16 torch makes, both against fp64; far less with fp32 logits."""
        monkeypatch.setenv("KERNELS_WORKSPACE_MB", "16")
        hidden, weight, _, target, g, e = problem(n, 256, v, bias=False, dtype=torch.bfloat16, device="cuda")
        op = lambda h, w: linear_logprob(h, w, target, entropy=True, logits_dtype=logits_dtype)
        got = run(op, (hidden, weight), g, e)

        def plain(h, w):
            log_p = torch.log_softmax((h @ w.T).float(), -1)
            token = target != -100
            logp = log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
            return torch.where(token, logp, 0), torch.where(token, -(log_p.exp() * log_p).sum(-1), 0)

        torch_bf16 = run(plain, (hidden, weight), g, e)
        want = run(lambda h, w: naive(h, w, target), (hidden.double(), weight.double()), g.double(), e.double())
        for a, b, c in zip(got, torch_bf16, want, strict=True):
            assert error(a, c) <= 2 * error(b, c) + 1e-6
        if logits_dtype is not None:
            assert error(got[0], want[0]) < 1e-5 and error(got[1], want[1]) < 1e-5

    @pytest.mark.parametrize("megabytes", ["2", "512"])
    def test_known_weights(self, megabytes, monkeypatch):
        monkeypatch.setenv("KERNELS_WORKSPACE_MB", megabytes)
        hidden, weight, _, target, g, _ = problem(300, 256, 32000, bias=False, dtype=torch.bfloat16, device="cuda")
        got = run(lambda h, w: linear_nll(h, w, target, g), (hidden, weight), torch.tensor(0.5, device="cuda"))
        other = run(lambda h, w: -(g * linear_logprob(h, w, target)).sum(), (hidden, weight), torch.tensor(0.5).cuda())
        doubles = hidden.double(), weight.double()
        want = run(
            lambda h, w: -(g.double() * naive(h, w, target)[0]).sum(), doubles, torch.tensor(0.5).cuda().double()
        )
        for a, b, c in zip(got, other, want, strict=True):
            assert error(a, c) <= 2 * error(b, c) + 1e-6

    def test_autocast_and_sync(self):
        """fp32 masters in bf16 products; no host synchronisation; a target out of range is NaN, not a crash."""
        hidden, weight, _, target, g, _ = problem(64, 128, 5000, bias=False, device="cuda")
        want = run(lambda h, w: linear_logprob(h, w, target), (hidden, weight), g)
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                got = run(lambda h, w: linear_logprob(h, w, target), (hidden, weight), g)
            run(lambda h, w: linear_nll(h, w, target, g), (hidden, weight), torch.ones_like(g[0]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert got[2].dtype == torch.float32 and all(error(a, b) < 3e-2 for a, b in zip(got, want, strict=True))
        assert linear_logprob(hidden, weight, torch.full_like(target, 5000)).isnan().all()


# --- ZeRO-3 ------------------------------------------------------------------------------------------------------------


class Head(torch.nn.Linear):
    """An LM head whose forward gives log-probs: ZeRO-3's hooks gather `weight` around it, in backward as well."""

    def forward(self, hidden, target, token_weight=None):
        assert self.weight.shape == (self.out_features, self.in_features)
        if token_weight is not None:
            return linear_nll(hidden, self.weight, target, token_weight)
        return linear_logprob(hidden, self.weight, target, entropy=True)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(300, 16)
        self.layer = torch.nn.Linear(16, 16)
        self.head = Head(16, 300, bias=False)

    def forward(self, tokens, target, known):
        hidden = torch.tanh(self.layer(self.embedding(tokens)))
        if known:
            return self.head(hidden, target, torch.full(target.shape, 1 / len(target)))
        logp, entropy = self.head(hidden, target)
        return -(logp + 0.1 * entropy).mean()


def zero3_steps():
    """(tokens, targets) of both ranks, and the mode of the head, for each of four steps."""
    gen = torch.Generator().manual_seed(0)
    return [(torch.randint(300, (2, 2, 40), generator=gen), known) for known in (False, True, False, True)]


def zero3_rank(rank: int, folder: str):
    env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": 1}
    os.environ.update({k: str(v) for k, v in env.items()}, KERNELS_WORKSPACE_MB="0.03")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    import deepspeed

    torch.manual_seed(0)
    model = Model()
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Nothing may stay gathered because it is small or soon wanted again.
        "zero_optimization": {"stage": 3, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0}
        | {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    losses = []
    for batch, known in zero3_steps():
        loss = engine(*batch[rank], known)
        assert model.head.weight.numel() == 0  # partitioned again, before backward
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    torch.save(losses, f"{folder}/losses{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_zero3(tmp_path):
    """Two ranks under DeepSpeed ZeRO-3 take the steps that one process takes on both their batches."""
    pytest.importorskip("deepspeed")
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    want = []
    for batch, known in zero3_steps():
        optimizer.zero_grad()
        losses = [model(*part, known) for part in batch]
        (sum(losses) / 2).backward()
        optimizer.step()
        want.append([x.item() for x in losses])
    torch.multiprocessing.spawn(zero3_rank, args=(str(tmp_path),), nprocs=2)
    got = [torch.load(tmp_path / f"losses{rank}.pt") for rank in (0, 1)]
    torch.testing.assert_close(torch.tensor(got).T, torch.tensor(want), rtol=1e-5, atol=0)
