"""kernels/values.py: DVPO eq. 2 against its definition, over ranks, for constant, huge and missing values."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from kernels import normalize_values, values
from kernels.backend import INTERPRETED, triton

ROOT = Path(__file__).resolve().parent.parent


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


def naive(v, mask, eps=1e-5):
    kept = v[mask]
    out = torch.zeros_like(v)
    out[mask] = (kept - kept.mean()) / (kept.std(correction=0) + eps)
    return out


def problem(shape, seed=0, offset=0.0, keep=0.7):
    gen = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=gen) * 3 + offset
    mask = torch.rand(shape, generator=gen) < keep
    return v, mask, torch.randn(shape, generator=gen)


@pytest.mark.parametrize("shape", [(1, 2), (7, 33), (40, 130), (3000,), (2, 3, 5)])
def test_definition(backend, shape):
    v, mask, g = problem(shape)
    mask.view(-1)[:2] = True
    v[~mask] = torch.nan  # never looked at
    v.requires_grad_()
    out = normalize_values(v, mask)
    (out * g).sum().backward()
    d = v.detach().double().nan_to_num().requires_grad_()
    want = naive(d, mask)
    (want * g).sum().backward()
    torch.testing.assert_close(out.detach(), want.detach().float(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(v.grad, d.grad.float(), rtol=1e-4, atol=1e-6)
    assert (out[~mask] == 0).all() and (v.grad[~mask] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    v, mask, g = problem((9, 11))
    v = v.to(dtype).requires_grad_()
    out = normalize_values(v, mask)
    (out * g).sum().backward()
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and v.grad.dtype == dtype
    torch.testing.assert_close(out.detach().double(), naive(v.detach().double(), mask), rtol=1e-5, atol=1e-6)


def test_offset(backend):
    """An offset of 2^20 that fp32 holds exactly changes no digit."""
    v, mask, _ = problem((64, 50))
    v = (v * 8).round() / 8
    assert torch.equal(normalize_values(v + 2.0**20, mask), normalize_values(v, mask))


def test_constant_empty_single(backend):
    for v in (torch.full((4, 5), 0.1), torch.zeros(4, 5), torch.full((4, 5), -1e30)):
        v.requires_grad_()
        mask = torch.rand(4, 5) < 0.8
        mask[0, 0] = True
        out = normalize_values(v, mask)
        assert (out == 0).all()
        (out * torch.randn(4, 5)).sum().backward()
        assert v.grad.isfinite().all() and v.grad.abs().max() < 1e6  # about 1 / eps, where a head starts at zero
        assert abs(v.grad.sum()) < 1  # only differences from the mean count
    v = torch.randn(4, 5, requires_grad=True)
    out = normalize_values(v, torch.zeros(4, 5, dtype=torch.bool))
    out.sum().backward()
    assert (out == 0).all() and (v.grad == 0).all()
    one = torch.zeros(4, 5, dtype=torch.bool)
    one[2, 3] = True
    assert (normalize_values(v, one) == 0).all()
    assert normalize_values(torch.empty(0, 7), torch.empty(0, 7, dtype=torch.bool)).shape == (0, 7)


def test_strided(backend):
    v, mask, _ = problem((12, 10))
    want = normalize_values(v, mask)
    assert torch.equal(normalize_values(v.t(), mask.t()), want.t())
    assert torch.equal(
        normalize_values(v[::2, 1:], mask[::2, 1:]), normalize_values(v[::2, 1:].clone(), mask[::2, 1:].clone())
    )


def test_gradcheck():
    v, mask, _ = problem((3, 4), keep=0.8)
    v = v.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: normalize_values(v, mask, eps=1e-3), v)


floats = st.floats(-1e4, 1e4, width=32)


@settings(max_examples=60, deadline=None, database=None)
@given(st.lists(st.tuples(floats, st.booleans()), min_size=1, max_size=50), st.floats(0.01, 100), st.integers(0, 49))
def test_properties(pairs, scale, cut):
    v = torch.tensor([p[0] for p in pairs])
    mask = torch.tensor([p[1] for p in pairs])
    out = normalize_values(v, mask).double()
    assert out.isfinite().all() and (out[~mask] == 0).all()
    kept = out[mask]
    if len(kept):
        assert abs(kept.mean()) < 1e-4 and kept.square().mean() <= 1 + 1e-5
        assert (kept[v[mask].argsort()].diff() >= 0).all()
    spread = v[mask].double().std(correction=0) if len(kept) else 0
    if spread > 1:  # eps is then small beside σ: mean 0, variance 1, and a positive factor changes nothing
        assert abs(kept.square().mean() - 1) < 1e-3
        torch.testing.assert_close(normalize_values(v.double() * scale, mask), out, rtol=1e-2, atol=1e-3)
    # Moments of any split merge into those of the whole.
    halves = torch.cat([values.moments_torch(v[:cut], mask[:cut]), values.moments_torch(v[cut:], mask[cut:])])
    whole = values.merge(values.moments_torch(v, mask))
    torch.testing.assert_close(values.merge(halves), whole, rtol=1e-9, atol=1e-7)


def rank_problem(rank):
    """Ranks of different sizes and offsets; rank 1 has no token at all."""
    v, mask, g = problem((3 + rank, 4 + 5 * rank), seed=rank, offset=10.0 * rank)
    return v, mask & (rank != 1), g


def one_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    v, mask, g = rank_problem(rank)
    v.requires_grad_()
    out = normalize_values(v, mask, group=torch.distributed.group.WORLD)
    (out * g).sum().backward()
    alone = normalize_values(v.detach(), mask)
    torch.save((out.detach(), v.grad, alone), f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def test_ranks(tmp_path):
    """Three ranks, one of them without tokens, get the values and the gradient of the whole batch in one process."""
    torch.multiprocessing.spawn(one_rank, args=(str(tmp_path),), nprocs=3)
    problems = [rank_problem(rank) for rank in range(3)]
    v, mask, g = (torch.cat([p[i].flatten() for p in problems]) for i in range(3))
    v.requires_grad_()
    out = normalize_values(v, mask)
    (out * g).sum().backward()
    got = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    torch.testing.assert_close(torch.cat([x[0].flatten() for x in got]), out.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(torch.cat([x[1].flatten() for x in got]), v.grad, rtol=1e-5, atol=1e-7)
    for rank, (v, mask, _) in enumerate(problems):
        assert torch.equal(got[rank][2], normalize_values(v, mask))
    assert torch.distributed.group.WORLD is None  # what a caller may pass whether or not it runs on several ranks


def test_errors():
    v, mask, _ = problem((3, 4))
    for call, message in (
        (lambda: normalize_values(v, mask[:2]), "must agree"),
        (lambda: normalize_values(v, mask.float()), "bool"),
        (lambda: normalize_values(v.long(), mask), "floating point"),
        (lambda: normalize_values(v, mask, eps=0.0), "eps"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gpu(dtype):
    v, mask, g = problem((64, 1000))
    v = v.to(dtype)
    on_gpu = v.cuda().requires_grad_()
    out = normalize_values(on_gpu, mask.cuda())
    (out * g.cuda()).sum().backward()
    on_cpu = v.clone().requires_grad_()
    want = normalize_values(on_cpu, mask)
    (want * g).sum().backward()
    torch.testing.assert_close(out.detach().cpu(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        on_gpu.grad.cpu(), on_cpu.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6
    )
