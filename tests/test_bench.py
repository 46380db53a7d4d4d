"""bench/kernels.py: what is measured, against what, and that a method which fails costs one cell; mistakes told by others."""

import importlib.metadata
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench import peers, step
from kernels import linear_logprob, linear_nll

ROOT = Path(__file__).resolve().parent.parent
SPEC = importlib.util.spec_from_file_location(
    "bench_kernels", ROOT / "bench" / "kernels.py"
)  # not the package `kernels`
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


def test_program_runs():
    command = [sys.executable, "bench/kernels.py", "--device", "cpu", "--shape", "40", "16", "500", "--rounds", "1"]
    command += ["--skip", "torch.compile of it", "Liger", "Liger, fp32 accumulator", "Liger, per token"]
    command += ["cut-cross-entropy", "cut-cross-entropy, unfiltered"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 0 and "failed" not in run.stdout, run.stdout + run.stderr
    assert "| linear_logprob |" in run.stdout and "| F.linear_cross_entropy, chunked |" in run.stdout


@pytest.mark.parametrize("setting", bench.SETTINGS)
def test_settings(setting, monkeypatch):
    """All methods of this project and plain torch, in each setting: nothing fails, gradients are those of fp64."""
    ours = {name: entry for name, entry in bench.METHODS.items() if name.startswith("linear") or name == "plain torch"}
    monkeypatch.setattr(bench, "METHODS", ours)
    result = bench.measure((40, 16, 500, setting), "cpu", 2, [])
    assert {row["status"] for row in result["methods"].values()} == {"ok"}
    for name, row in result["methods"].items():
        assert len(row["forward"]) == len(row["both"]) == 2 and set(row["memory"]) == {"forward", "both"}
        assert row["products"] == ours[name][1] - (setting == "frozen head")
        assert set(row["error"]) == ({"hidden"} if setting == "frozen head" else {"hidden", "weight"})
        assert all(0 < x < (1e-2 if setting == "fp32 weight" else 1e-6) for x in row["error"].values())
    assert result["bytes_per_second"] > 0 and result["slices"] == 1
    bench.show({"machine": {"device": "", "load_before": []}, "versions": {"torch": ""}, "date": "", "commit": "",
                "shapes": [result | {"targets": bench.targets(result, "cpu", 2**26)}]})  # fmt: skip


@pytest.mark.parametrize("entropy", [0, 0.01])
def test_reference(entropy):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = (
        torch.randn(1030, 5, generator=gen).requires_grad_(),
        torch.randn(70, 5, generator=gen).requires_grad_(),
    )
    target, token_weight = torch.randint(70, (1030,), generator=gen), torch.rand(1030, generator=gen)
    h, w = (x.detach().double().requires_grad_() for x in (hidden, weight))
    log_p = torch.log_softmax(h @ w.t(), -1)
    loss = log_p.gather(1, target[:, None])[:, 0] - entropy * (log_p.exp() * log_p).sum(1)
    want = torch.autograd.grad(-(loss * token_weight).sum(), (h, w))
    torch.testing.assert_close(bench.reference(hidden, weight, target, token_weight, entropy), want)


def test_a_failure_costs_one_cell(monkeypatch):
    calls, again = [], []

    def no_forward(h, w, t, g):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise torch.OutOfMemoryError("in backward")

    def no_backward(h, w, t, g):
        return NoBackward.apply(linear_nll(h, w, t, g))

    def later(h, w, t, g):
        calls.append(1)
        if len(calls) > 5:  # twice each to begin with, then in the rounds
            raise ValueError("in a round")
        return linear_nll(h, w, t, g)

    def second(h, w, t, g):
        again.append(1)
        if len(again) == 2:  # where memory is measured
            raise RuntimeError("no memory")
        return linear_nll(h, w, t, g)

    def detached(h, w, t, g):
        return -(linear_logprob(h, w, t) * g).sum() * 2  # runs, and is wrong

    def missing(h, w, t, g):
        raise AssertionError("is not called")

    methods = {
        "no forward": no_forward, "no backward": no_backward, "later": later, "second": second, "wrong": detached,
        "missing": missing, "linear_nll (weights known)": linear_nll,
    }  # fmt: skip
    monkeypatch.setattr(bench, "METHODS", {name: (method, 3) for name, method in methods.items()})
    monkeypatch.setattr(bench, "PACKAGES", {missing: "no-such-package"})
    result = bench.measure((40, 16, 500, "all trained"), "cpu", 2, [])
    rows = json.loads(json.dumps(result))["methods"]
    assert list(rows) == list(methods)
    assert rows["no forward"]["failed"] == dict.fromkeys(("forward", "both"), "OutOfMemoryError: CUDA out of memory.")
    assert rows["no backward"]["failed"] == {"both": "OutOfMemoryError: in backward"}
    assert len(rows["no backward"]["forward"]) == 2 and rows["no backward"]["error"] is None
    assert rows["later"]["failed"] == dict.fromkeys(("forward", "both"), "ValueError: in a round")
    assert rows["second"]["failed"] == {"forward": "RuntimeError: no memory"}
    assert rows["missing"] == {"status": "not installed"}
    assert abs(rows["wrong"]["error"]["weight"] - 1) < 1e-5 and rows["wrong"]["status"] == "ok"
    assert rows["linear_nll (weights known)"]["status"] == "ok" and len(rows["linear_nll (weights known)"]["both"]) == 2
    assert bench.median(rows["no backward"], "both") is None and bench.median(rows["no backward"], "forward") > 0
    assert bench.targets(result, "cpu", 2**26) == []  # plain torch is not there to be compared with


def test_a_case_without_memory_does_not_lose_the_file(monkeypatch, tmp_path, capsys):
    measure = bench.measure

    def short_of_memory(case, *rest):
        if case[0] == 50:
            raise torch.OutOfMemoryError("CUDA out of memory.\nmore")
        return measure(case, *rest)

    monkeypatch.setattr(bench, "measure", short_of_memory)
    monkeypatch.setattr(bench, "METHODS", {"linear_nll (weights known)": (linear_nll, 3)})
    monkeypatch.setitem(bench.CASES, "cpu", [(50, 16, 500, "all trained"), (40, 16, 500, "frozen head")])
    out = tmp_path / "out.json"
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--device", "cpu", "--rounds", "1", "--out", str(out)])
    bench.main()
    first, second = json.loads(out.read_text())["shapes"]
    assert first == {"n": 50, "d": 16, "v": 500, "setting": "all trained", "failed": "CUDA out of memory."}
    assert second["methods"]["linear_nll (weights known)"]["status"] == "ok"
    assert "failed: CUDA out of memory." in capsys.readouterr().out


@pytest.mark.parametrize("frozen", [False, True])
def test_targets_on_a_gpu(frozen):
    """Limits from made-up times, counted by hand: products of 1, 2 and 4 s, two slices, 1 s to pass over the logits."""
    n, d, v = 1000, 500, 50000
    row = lambda forward, both, memory: {"forward": [forward], "both": [both], "memory": {"both": memory}, "failed": {}}
    small = 64 * n + 2**20
    gradients = 0 if frozen else 2 * v * d
    scaling = 0 if frozen else 2 * d / n  # dWeight is read and written: 2 d / n of the logits' bytes
    products = 3 if frozen else 7
    rows = {
        "linear_logprob": row(2.0, products + 0.5 + 3, 2**20 + 6 * n * d + gradients + small),
        "linear_nll (weights known)": row(
            2.0, products + 3 + scaling, 3 * gradients + 2 * n * d + small + 2**20 * frozen
        ),
        "plain torch": row(5.0, 20.0, 10**9),
    }
    result = {
        "n": n, "d": d, "v": v, "setting": "frozen head" if frozen else "all trained", "dtype": "bfloat16", "slices": 2,
        "operands": "bfloat16", "gemm": {"a": [1.0], "b": [2.0], "c": [4.0]}, "bytes_per_second": 2.0 * n * v,
        "methods": rows,
    }  # fmt: skip
    found = bench.targets(result, "cuda", 2**20)
    assert [t["value"] for t in found] == pytest.approx([1.0] * 5) and [t["limit"] for t in found] == [1.05] * 3 + [
        1
    ] * 2
    rows["Liger"] = row(1.0, 5.0, 10)
    (liger,) = bench.targets(result, "cuda", 2**20)[5:]
    assert liger["value"] == pytest.approx((products + 3 + scaling) / 5) and not liger["met"]


@pytest.mark.parametrize(
    "line, told",
    [
        ("--method sft", "trl is not installed: pip install trl"),
        ("--losses --method dvpo", "--method dvpo: choose from"),
    ],
)
def test_mistakes_beside_trl(line, told, monkeypatch, tmp_path, capsys):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(sys, "argv", ["peers.py", *line.split(), "--output", str(tmp_path / "out.json")])
    with pytest.raises(SystemExit) as ended:
        peers.main()
    assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_script_measured_by_step_can_tell_a_mistake(tmp_path):
    settings = dict.fromkeys(("prompt_tokens", "response_tokens", "steps", "warmup", "nproc"), 1)
    settings |= dict.fromkeys(("zero_stage", "bf16", "gradient_checkpointing", "empty"), 0)
    settings |= {"rollout_batch_size": 6, "batch_size": 4, "micro_tokens": 64, "clock": "cpu"}
    command = [sys.executable, "bench/step.py", "--worker", json.dumps(["ppo", str(tmp_path), settings])]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert run.returncode == 2 and "error: --rollout_batch_size" in run.stderr, run.stderr


def test_shares_of_the_peak_are_told_apart(capsys):
    row = {"algo": "dvpo", "seconds": dict.fromkeys((*step.PHASES, "total"), 1.0), "ratio_to_ppo": None}
    row |= {"peak_memory_mb": 1.0, "share_of_peak": dict.fromkeys(step.PHASES, 0.5)}
    sizes = ("nproc", "zero_stage", "rollout_batch_size", "batch_size", "response_tokens", "prompt_tokens")
    report = {"settings": dict.fromkeys(sizes, 1) | {"shape": "tiny", "clock": "wall"}, "versions": {"torch": ""}}
    report |= {"machine": {"load_before": [], "load_after": []}} | dict.fromkeys(("device", "date", "commit"), "")
    step.show(report | {"rows": [row | {"share_backbone": shared} for shared in (False, True)]})
    assert capsys.readouterr().out.endswith(f"  dvpo: 0.5, 0.5, 0.5\n  {step.SHARED}: 0.5, 0.5, 0.5\n")
