"""kernels/vcb.py: the VCB loss against loops over pairs, its three forms, and every size of its arguments."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import vcb_loss
from kernels.backend import INTERPRETED, triton

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ["upper", "full", "mean"]


@pytest.fixture(params=["torch", "triton"])
def backend(request, monkeypatch):
    """Both implementations on CPU tensors; Triton's only in the child process of test_interpreter."""
    if request.param == "triton" and not INTERPRETED:
        pytest.skip("runs in test_interpreter's child process")
    monkeypatch.setenv("KERNELS", request.param)
    return request.param


@pytest.mark.skipif(INTERPRETED or triton is None, reason="starts the child process; needs triton")
def test_interpreter():
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "-k", "triton", __file__]
    run = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stdout + run.stderr


def naive(policy, ref, reward, gamma, lam, pairs, mask=None):
    """Eq. 9, 19, 20 for one prompt after the other, pair by pair. fp64, differentiable in policy."""
    out = []
    for b in range(len(reward)):
        keep = range(reward.shape[1]) if mask is None else mask[b].nonzero().flatten().tolist()
        r = reward[b, list(keep)]
        n = len(r)
        equal = n == 0 or bool((r == r[0]).all())
        sigma = 1.0 if equal else r.std(correction=1 if pairs == "full" else 0)
        s = [gamma * (policy[b, i] - ref[b, i]) - (0 if equal else reward[b, i] / sigma) for i in keep]
        if pairs == "upper":
            terms = [(s[i] - s[j]) ** 2 for i in range(n) for j in range(i, n)]
        elif pairs == "full":
            terms = [(s[i] - s[j]) ** 2 / 2 for i in range(n) for j in range(n)]
        else:
            terms = [(s[i] - s[j]) ** 2 for i in range(n) for j in range(i + 1, n)]
        if not terms:
            out.append(policy[b].sum() * 0)
        elif pairs == "mean":
            out.append(torch.stack(terms).mean())
        else:
            out.append(lam * torch.logsumexp(torch.stack(terms) / lam, 0))
    return torch.stack(out)


def problem(b, n, seed=0, spread=30.0):
    gen = torch.Generator().manual_seed(seed)
    policy, ref = -200 + spread * torch.randn(2, b, n, generator=gen)
    return policy, ref, torch.randn(b, n, generator=gen), torch.randn(b, generator=gen)


def compare(policy, ref, reward, g, gamma, lam, pairs, mask=None, rtol=2e-5):
    policy, ref = policy.clone().requires_grad_(), ref.clone().requires_grad_()
    loss = vcb_loss(policy, ref, reward, gamma=gamma, lam=lam, pairs=pairs, mask=mask)
    (loss * g).sum().backward()
    exact = policy.detach().double().requires_grad_()
    want = naive(exact, ref.detach().double(), reward.double(), gamma, lam, pairs, mask)
    (want * g).sum().backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.detach(), want.detach().float(), rtol=rtol, atol=rtol)
    scale = exact.grad.abs().max().clamp(min=1e-12)
    assert ((policy.grad.double() - exact.grad).abs().max() / scale) < 3 * rtol
    assert torch.equal(ref.grad, -policy.grad)
    return loss.detach(), policy.grad


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 17])
def test_against_pairs(backend, n, pairs):
    compare(*problem(3, n), gamma=0.05, lam=1.0, pairs=pairs)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("lam", [1e-6, 0.1, 1e3])
def test_lambda(backend, lam, pairs):
    compare(*problem(2, 6), gamma=0.1, lam=lam, pairs=pairs)


@pytest.mark.parametrize("pairs", PAIRS)
def test_ragged(backend, pairs):
    """Prompts with 0 .. 5 responses; what stands at missing ones is never used."""
    policy, ref, reward, g = problem(6, 5)
    mask = torch.arange(5) < torch.arange(6)[:, None]
    mask[3] = torch.tensor([True, False, True, False, True])
    loss, grad = compare(policy, ref, reward, g, 0.05, 0.7, pairs, mask)
    assert loss[0] == 0 and loss[1] == 0 and (grad[:2] == 0).all()
    for x in (policy, ref, reward):
        x[~mask] = torch.nan
    policy.requires_grad_()
    again = vcb_loss(policy, ref, reward, gamma=0.05, lam=0.7, pairs=pairs, mask=mask)
    (again * g).sum().backward()
    assert torch.equal(again.detach(), loss) and torch.equal(policy.grad, grad)


@pytest.mark.parametrize("pairs", PAIRS)
def test_equal_rewards(backend, pairs):
    """Normalised reward 0: the prompt counts, the KL term remains, and at π = π_sft the loss is its floor."""
    policy, ref, reward, g = problem(3, 4)
    reward[:] = torch.tensor([0.1, -7.7, 1e30])[:, None]
    compare(policy, ref, reward, g, 0.05, 1.0, pairs)
    floor = {"upper": math.log(10), "full": 2 * math.log(4), "mean": 0.0}[pairs]
    loss = vcb_loss(ref, ref, reward, gamma=0.05, pairs=pairs)
    torch.testing.assert_close(loss, torch.full((3,), floor))


@pytest.mark.parametrize("lam", [1e-30, 1e-6])
@pytest.mark.parametrize("gap", [1e-3, 1.0, 1e3, 1e6])
def test_any_size(backend, gap, lam):
    """l / λ up to 1e42, beyond what fp32 holds: finite, the largest pair wins, and the gradient is that pair's."""
    policy = torch.tensor([[0.0, gap, 0.3 * gap]], requires_grad=True)
    loss = vcb_loss(policy, torch.zeros(1, 3), torch.zeros(1, 3), gamma=1.0, lam=lam)
    loss.sum().backward()
    assert loss.isfinite().all() and policy.grad.isfinite().all()
    if gap**2 > 1e3 * lam:
        torch.testing.assert_close(loss, torch.tensor([gap**2]), rtol=1e-5, atol=3 * lam)
    if gap >= 1:
        torch.testing.assert_close(policy.grad, torch.tensor([[-2 * gap, 2 * gap, 0.0]]))


def test_reward_scale(backend):
    """A rescaled or shifted reward gives the same loss: bit for bit by powers of two, to the last digits otherwise."""
    policy, ref, reward, _ = problem(4, 6)
    reward = (reward * 64).round() / 64
    for pairs in PAIRS:
        want = vcb_loss(policy, ref, reward, gamma=0.05, pairs=pairs)
        for change in (lambda r: r * 2.0**-90, lambda r: r * 2.0**100, lambda r: r + 1024):
            assert torch.equal(vcb_loss(policy, ref, change(reward), gamma=0.05, pairs=pairs), want)
        for factor in (1e-30, 0.3, 777.7, 1e30):
            torch.testing.assert_close(
                vcb_loss(policy, ref, reward * factor, gamma=0.05, pairs=pairs), want, rtol=2e-6, atol=0
            )


def test_three_losses(backend):
    """upper, full and mean have other values, other floors and gradients in other directions."""
    policy, ref, reward, _ = problem(1, 4, seed=3, spread=4.0)
    grads = []
    for pairs in PAIRS:
        p = policy.clone().requires_grad_()
        vcb_loss(p, ref, reward, gamma=0.05, pairs=pairs).sum().backward()
        grads.append(p.grad[0] / p.grad.norm())
    values = [vcb_loss(policy, ref, reward, gamma=0.05, pairs=pairs).item() for pairs in PAIRS]
    for i, j in itertools.combinations(range(3), 2):
        assert abs(values[i] - values[j]) > 0.05
        assert torch.dot(grads[i], grads[j]) < 0.999


def test_two_responses():
    """With n = 2 only the order of the rewards counts: the loss is IPO's square of the log-ratio gap, times γ²."""
    policy, ref, _, _ = problem(1, 2)
    gamma = 0.05
    order = torch.tensor([[0.2, 0.1]])
    delta = (policy - ref)[0, 0] - (policy - ref)[0, 1]
    square = gamma**2 * (delta - 2 / gamma) ** 2
    for reward in (order, order * torch.tensor([[900.0, 1.0]]), torch.tensor([[5.0, -70.0]])):
        mean = vcb_loss(policy, ref, reward, gamma=gamma, pairs="mean")
        torch.testing.assert_close(mean[0], square, rtol=1e-5, atol=0)
        upper = vcb_loss(policy, ref, reward, gamma=gamma)
        torch.testing.assert_close(upper[0], (2 + square.exp()).log(), rtol=1e-5, atol=0)


def test_gradient_formula():
    """∂L/∂s_i = Σ_j 2 w_ij (s_i - s_j) with w the softmax over pairs; it sums to 0 over a prompt's responses."""
    policy, ref, reward, _ = (x.double() for x in problem(1, 5, seed=2))
    policy.requires_grad_()
    gamma, lam = 0.05, 0.5
    vcb_loss(policy, ref, reward, gamma=gamma, lam=lam).sum().backward()
    s = (gamma * (policy - ref) - reward / reward.std(correction=0))[0].detach()
    d = s[:, None] - s[None, :]
    upper = torch.ones(5, 5).triu().bool()
    w = torch.zeros(5, 5, dtype=torch.float64)
    w[upper] = torch.softmax(d.square()[upper] / lam, 0)
    w = w + w.T
    torch.testing.assert_close(policy.grad[0], gamma * 2 * (w * d).sum(1))
    assert abs(policy.grad.sum()) < 1e-12
    for pairs in PAIRS:
        check = lambda p, pairs=pairs: vcb_loss(p, ref, reward, gamma=0.5, lam=lam, pairs=pairs)
        assert torch.autograd.gradcheck(check, (policy.detach().requires_grad_(),))


numbers = st.floats(-50, 50, width=32)


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.tuples(numbers, numbers, st.integers(-5, 5), st.booleans()), min_size=1, max_size=9),
    st.sampled_from(PAIRS), st.floats(0.01, 1), st.floats(0.05, 20), st.randoms(use_true_random=False),
)  # fmt: skip
def test_properties(rows, pairs, gamma, lam, random):
    policy, ref, reward = (torch.tensor([[float(r[i]) for r in rows]]) for i in range(3))
    mask = torch.tensor([[r[3] for r in rows]])
    loss = vcb_loss(policy, ref, reward, gamma=gamma, lam=lam, pairs=pairs, mask=mask)
    want = naive(policy.double(), ref.double(), reward.double(), gamma, lam, pairs, mask)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-5)
    # Never under its floor; the order of responses is nothing; nor is a constant in the log-probs of a prompt.
    k = int(mask.sum())
    floors = {"upper": math.log(k * (k + 1) / 2) if k else 0, "full": 2 * math.log(k) if k else 0, "mean": 0}
    assert loss >= lam * floors[pairs] - 1e-4
    order = random.sample(range(len(rows)), len(rows))
    shuffled = (x[:, order] for x in (policy, ref, reward))
    again = vcb_loss(*shuffled, gamma=gamma, lam=lam, pairs=pairs, mask=mask[:, order])
    torch.testing.assert_close(again, loss, rtol=1e-5, atol=1e-5)
    moved = vcb_loss(policy + 8, ref - 8, reward, gamma=gamma, lam=lam, pairs=pairs, mask=mask)
    torch.testing.assert_close(moved, loss, rtol=1e-4, atol=1e-4)


def test_shapes_and_dtypes(backend):
    policy, ref, reward, _ = problem(2, 70)  # more responses than the Triton form takes
    compare(policy, ref, reward, torch.ones(2), 0.05, 1.0, "upper")
    assert vcb_loss(policy[:0], ref[:0], reward[:0], gamma=0.1).shape == (0,)
    assert torch.equal(vcb_loss(policy[:, :0], ref[:, :0], reward[:, :0], gamma=0.1), torch.zeros(2))
    narrow = [x[:, :5] for x in (policy, ref, reward)]
    loss = vcb_loss(*narrow, gamma=0.1)
    assert torch.equal(loss, vcb_loss(*(x.clone() for x in narrow), gamma=0.1))
    assert vcb_loss(narrow[0].bfloat16(), narrow[1], narrow[2].double(), gamma=0.1).dtype == torch.float32
    assert vcb_loss(narrow[0].double(), narrow[1], narrow[2], gamma=0.1).dtype == torch.float64
    trained = reward[:, :5].clone().requires_grad_()
    assert not vcb_loss(narrow[0], narrow[1], trained, gamma=0.1).requires_grad


def test_errors():
    policy, ref, reward, _ = problem(2, 3)
    for call, message in (
        (lambda: vcb_loss(policy, ref, reward, gamma=0.1, pairs="lower"), "upper, full, mean"),
        (lambda: vcb_loss(policy, ref, reward, gamma=0.1, lam=0.0), "lam"),
        (lambda: vcb_loss(policy, ref[:1], reward, gamma=0.1), "shape"),
        (lambda: vcb_loss(policy[0], ref[0], reward[0], gamma=0.1), "shape"),
        (lambda: vcb_loss(policy, ref, reward, gamma=0.1, mask=torch.ones(2, 3)), "mask"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("n", [1, 2, 5, 8, 33, 64, 70])
def test_gpu(n, pairs):
    policy, ref, reward, g = problem(5, n)
    mask = torch.rand(5, n, generator=torch.Generator().manual_seed(1)) < 0.8
    results = []
    for device in ("cpu", "cuda"):
        p = policy.to(device).requires_grad_()
        rest = [x.to(device) for x in (ref, reward)]
        loss = vcb_loss(p, *rest, gamma=0.05, pairs=pairs, mask=mask.to(device))
        (loss * g.to(device)).sum().backward()
        results.append((loss.detach().cpu(), p.grad.cpu()))
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)
