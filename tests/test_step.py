"""bench/step.py: one method measured end to end, the ratios and the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import step

ROOT = step.ROOT


def call(*flags):
    return subprocess.run(
        [sys.executable, str(ROOT / "bench" / "step.py"), *map(str, flags)], capture_output=True, text=True, timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_a_method_is_measured_in_processes_of_its_own(tmp_path):
    sizes = {"rollout_batch_size": 4, "batch_size": 2, "micro_tokens": 64, "prompt_tokens": 8, "response_tokens": 6}
    flags = [part for name, value in sizes.items() for part in (f"--{name}", value)]
    out = tmp_path / "step.json"
    done = call("--algo", "ppo", "--rounds", 2, "--steps", 1, "--warmup", 1, *flags, "--output", out)
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert report["device"] and report["date"] and {"commit", "machine", "versions"} <= set(report)
    assert sizes.items() <= report["settings"].items() and report["settings"]["ppo_epochs"] == 4
    assert row["algo"] == "ppo" and row["shape"] == "tiny" and row["peak_memory_mb"] > 10
    assert all(len(x) == 2 and min(x) > 0 for x in row["rounds"].values())
    assert set(row["seconds"]) == {"rollout", "scoring", "update", "total"}
    assert row["ratio_to_ppo"] == dict.fromkeys(("update", "scoring_update", "total", "memory"), 1.0)
    again = call("--show", out)
    assert again.returncode == 0 and "| ppo |" in again.stdout and again.stdout in done.stdout


def test_ratios_are_to_ppo_of_the_same_call():
    rows = [
        {"algo": "dvpo", "peak_memory_mb": 60.0,
         "rounds": {"scoring": [1.0, 1.0, 2.0], "update": [2.0, 2.0, 4.0], "total": [4.0, 5.0, 8.0]}},
        {"algo": "ppo", "peak_memory_mb": 100.0,
         "rounds": {"scoring": [2.0, 4.0, 4.0], "update": [5.0, 4.0, 10.0], "total": [8.0, 5.0, 16.0]}},
    ]  # fmt: skip
    step.add_ratios(rows)
    assert rows[0]["ratio_to_ppo"] == {"update": 0.4, "scoring_update": 0.429, "total": 0.5, "memory": 0.6}
    step.add_ratios(rows[:1])
    assert rows[0]["ratio_to_ppo"] is None


@pytest.mark.parametrize("algo", step.ALGOS)
def test_arithmetic_by_hand(algo):
    # 3 responses of 5 tokens to prompts of 10; 100 weights in the layers, 20 in the head, 4 epochs
    settings = {"rollout_batch_size": 3, "prompt_tokens": 10, "response_tokens": 5}
    found = step.arithmetic(algo, settings, {"body": 100, "head": 20})
    policy, body = 1600, 1500  # of one response, forward: 15 * 100 + 5 * 20, and without the head
    scoring = {"dvpo": 2 * policy + 2 * body, "ppo": 2 * policy + 2 * body, "remax": 2 * policy + 2 * body}
    trained = policy + body if algo == "ppo" else policy
    assert found["rollout"] == 2 * 3 * policy * (2 if algo == "remax" else 1)
    assert found["scoring"] == 2 * 3 * scoring.get(algo, 2 * policy + body)
    assert found["update"] == 6 * 3 * trained * 4
