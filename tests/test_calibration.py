"""eval/calibration.py: KL estimates, misalignment and best-of-n against enumeration; the program on a tiny policy."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from eval import calibration

ROOT = Path(__file__).resolve().parent.parent


def test_kl_estimates_have_the_exact_expectation():
    """A chain of two tokens out of three each: all nine sequences, weighted by the policy."""
    gen = torch.Generator().manual_seed(0)
    first, second = (
        torch.randn(2, 3, generator=gen).double().log_softmax(1),
        torch.randn(2, 3, 3, generator=gen).double().log_softmax(2),
    )
    exact, k1, k3 = 0.0, 0.0, 0.0
    for a, b in itertools.product(range(3), range(3)):
        p = (first[0, a] + second[0, a, b]).exp().item()
        d = torch.stack([first[0, a] - first[1, a], second[0, a, b] - second[1, a, b]])[None]
        exact += p * d.sum().item()
        found = calibration.kl_estimates(d, torch.ones(1, 2, dtype=torch.bool))
        k1, k3 = k1 + p * found["k1"], k3 + p * found["k3"]
        assert found["k3"] >= 0
    assert k1 == pytest.approx(exact, rel=1e-9) and k3 == pytest.approx(exact, rel=1e-9)


def test_kl_estimates_ignore_what_is_masked():
    d = torch.tensor([[0.5, 9.0], [0.1, -0.2]])
    mask = torch.tensor([[True, False], [True, True]])
    found = calibration.kl_estimates(d, mask)
    assert found["k1"] == pytest.approx((0.5 - 0.1) / 2, rel=1e-6)
    k3 = [math.exp(-x) - 1 + x for x in (0.5, 0.1, -0.2)]
    assert found["k3"] == pytest.approx((k3[0] + k3[1] + k3[2]) / 2, rel=1e-6)


def test_misalignment_equals_a_count_of_pairs():
    rng = np.random.default_rng(0)
    ratio, reward = rng.normal(size=(5, 6)), rng.integers(0, 4, (5, 6))
    wrong = pairs = 0
    for b in range(5):
        for i, j in itertools.permutations(range(6), 2):
            if reward[b, i] > reward[b, j]:
                pairs += 1
                wrong += not ratio[b, i] > ratio[b, j]
    assert calibration.misalignment_rate(ratio, reward) == pytest.approx(wrong / pairs)
    assert calibration.misalignment_rate(reward.astype(float), reward) == 0
    assert calibration.misalignment_rate(-1.0 * reward, reward) == 1
    assert calibration.misalignment_rate(0 * ratio, reward) is None  # the reference itself
    assert calibration.misalignment_rate(ratio, 0 * reward) is None


def test_best_of_n_equals_all_subsets():
    rng = np.random.default_rng(1)
    score, gold = rng.normal(size=(3, 7)), rng.normal(size=(3, 7))
    for row in calibration.best_of_n(score, (1, 2, 5, 7), gold):
        n = row["n"]
        best = [[max(s, key=lambda i: score[b, i]) for s in itertools.combinations(range(7), n)] for b in range(3)]
        assert row["score"] == pytest.approx(np.mean([score[b, best[b]].mean() for b in range(3)]))
        assert row["values"] == pytest.approx([np.mean([gold[b, best[b]].mean() for b in range(3)])])
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)


def test_best_of_n_bound_holds():
    """A categorical policy and distinct scores: the exact KL of its best of n is below the bound."""
    p = np.array([0.5, 0.3, 0.15, 0.05])  # worst to best
    for row in calibration.best_of_n(np.zeros((1, 16)), (2, 4, 16)):
        q = np.diff(np.r_[0, p.cumsum() ** row["n"]])
        assert (q * np.log(q / p)).sum() <= row["kl"] + 1e-12


def test_interval():
    x = np.array([0.0, 1.0, 2.0, 5.0])
    half = 1.96 * x.std(ddof=1) / 2
    assert calibration.interval(x) == pytest.approx([2 - half, 2 + half])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("models")
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    for seed, (name, model) in enumerate(
        (("a", LlamaForCausalLM), ("b", LlamaForCausalLM), ("rm", LlamaForSequenceClassification))
    ):
        torch.manual_seed(seed)
        model(toy.config(**small) if name != "rm" else toy.config(num_labels=1, **small)).save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    return folder


def test_program(models, tmp_path):
    command = [sys.executable, str(ROOT / "eval/calibration.py"), "--policy", str(models / "a"), "--reference", str(models / "b"),
               "--reward_model", str(models / "rm"), "--split", "heldout[:5]", "--n", "4", "--max_response_tokens", "6",
               "--output", str(tmp_path / "new" / "out.json")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-1000:]
    found = json.loads((tmp_path / "new" / "out.json").read_text())
    assert found["reference"]["kl"]["k1"] == 0 and found["reference"]["misaligned"]["reward"] is None
    assert found["policy"]["kl"]["k3"] > 0 and 0 <= found["policy"]["misaligned"]["reward"] <= 1
    assert [row["n"] for row in found["best_of_n"]] == [1, 2, 4]
    scores = [row["score"] for row in found["best_of_n"]]
    assert scores == sorted(scores) and scores[0] == pytest.approx(found["reference"]["reward"]["reward"]["mean"])
    assert "best of 4" in done.stdout
    command[command.index("--policy") + 1] = "runs/none/final"
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error:") and done.stderr.count("\n") == 1


def test_log_ratios_are_those_of_the_models(models):
    """On answers sampled by one model: log-probs of both against the stock forward pass."""
    from transformers import AutoModelForCausalLM

    args = calibration.Args(max_response_tokens=6, split="heldout[:3]")
    tokenizer = toy.tokenizer()
    prompts, ids = calibration.load_prompts(args, tokenizer)
    a, b = (calibration.Model(str(models / name), tokenizer, args, torch.device("cpu")) for name in "ab")
    answers = a.answers(prompts, ids, 2, 0, 4)
    assert answers == a.answers(prompts, ids, 2, 0, 4) != a.answers(prompts, ids, 2, 1, 4)
    for model, name in ((a, "a"), (b, "b")):
        stock = AutoModelForCausalLM.from_pretrained(models / name)
        found = model.log_probs([i for i in ids for _ in range(2)], answers)
        for k, answer in enumerate(answers):
            prompt = ids[k // 2]
            logits = stock(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            want = logits.gather(1, torch.tensor(answer)[:, None])[:, 0]
            torch.testing.assert_close(found[k, : len(answer)], want, atol=1e-5, rtol=1e-5)
            assert (found[k, len(answer) :] == 0).all()
