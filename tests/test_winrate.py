"""Sample files, intervals, win rates: against direct counts and brute force."""

import ast
import gzip
import importlib
import json
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from eval import samples, winrate

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LEAN_RLHF_DATA", ROOT / "data")) / "alpaca_eval_multi_policy.jsonl.gz"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def stopped(capsys, call, *words):
    with pytest.raises(SystemExit) as error:
        call()
    said = capsys.readouterr().err.strip()
    assert error.value.code == 2 and said.startswith("error: ") and "\n" not in said
    for word in words:
        assert word in said, said


def small(kind, **changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    torch.manual_seed(0)
    return getattr(transformers, f"LlamaFor{kind}")(toy.config(num_hidden_layers=1, **sizes, **changes))


def save(model, folder):
    model.save_pretrained(folder)
    toy.tokenizer().save_pretrained(folder)
    return str(folder)


# ------------------------------------------------------------------------------------------------------------- samples


def test_read(tmp_path, capsys):
    chat = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes?"},
        {"role": "user", "content": "go"},
    ]
    rows = [
        {"prompt": "p", "completion": "one", "policy": "x", "category": "c"},
        {"prompt": chat, "responses": [{"text": "two", "policy": "y", "score": 1}, {"text": "three", "policy": "x"}]},
        {"prompt": [{"role": "user", "content": "p"}], "completion": "four", "policy": "x"},
    ]
    found = samples.read(write(tmp_path / "s.jsonl", rows))
    assert [[r["text"] for r in row["responses"]] for row in found] == [["one", "four"], ["two", "three"]]
    assert found[0]["category"] == "c" and "category" not in found[1]
    assert samples.show(chat) == "User: hi\n\nAssistant: yes?\n\nUser: go" and samples.show("p") == "p"
    (only,) = samples.read(str(tmp_path / "s.jsonl"), "y")
    assert [r["text"] for r in only["responses"]] == ["two"]
    stopped(capsys, lambda: samples.read(str(tmp_path / "s.jsonl"), "z"), "policy z", "x, y")
    stopped(capsys, lambda: samples.read(write(tmp_path / "t.jsonl", [{"prompt": "p"}])), "row 1", "responses")
    stopped(capsys, lambda: samples.read(write(tmp_path / "u.jsonl", [{"completion": "p"}])), "row 1", "prompt")
    bare = [{"prompt": [{"content": "hi"}, {"content": "yo"}], "completion": "p"}]  # who speaks is not said
    stopped(capsys, lambda: samples.read(write(tmp_path / "w.jsonl", bare)), "row 1", "{role, content}")
    stopped(capsys, lambda: samples.read(str(tmp_path / "v.jsonl")), "cannot be read")
    with pytest.raises(SystemExit) as error:
        winrate.main(["--a", "x", "--b", "y", "--nonsense", "1"])
    said = capsys.readouterr().err
    assert error.value.code == 2 and "--nonsense" in said and "--help" in said and "Traceback" not in said


def test_a_model_is_sampled(tmp_path, capsys):
    folder = save(small("CausalLM"), tmp_path / "m")
    prompts = write(tmp_path / "p.jsonl", [{"prompt": p, "category": "c"} for p in toy.prompts("heldout")[:3]])
    args = samples.Sampling(prompts=prompts, max_response_tokens=12)
    found = samples.samples(folder, args, n=4)
    assert [len(row["responses"]) for row in found] == [4, 4, 4] and found[0]["category"] == "c"
    texts = [r["text"] for row in found for r in row["responses"]]
    assert len(set(texts)) == 12 and toy.EOS not in " ".join(texts)
    assert found == samples.samples(folder, args, n=4)
    args.temperature = 0
    assert len({r["text"] for r in samples.samples(folder, args, n=4)[0]["responses"]}) == 1
    capsys.readouterr()
    stopped(capsys, lambda: samples.samples(folder, samples.Sampling()), "--prompts")


def test_bootstrap():
    rng = np.random.default_rng(0)
    values, weights = rng.normal(1, 2, (400, 2)), rng.integers(1, 5, (400, 2))
    low, high = samples.bootstrap(values)
    half = 1.96 * values.std(0) / 20
    assert np.allclose(low, values.mean(0) - half, atol=0.15 * half.max())
    assert np.allclose(high, values.mean(0) + half, atol=0.15 * half.max())
    low, high = samples.bootstrap(values * weights, weights)
    brute = []
    for _ in range(3000):
        i = rng.integers(400, size=400)
        brute.append((values[i, 0] * weights[i, 0]).sum() / weights[i, 0].sum())
    assert np.allclose([low[0], high[0]], np.percentile(brute, [2.5, 97.5]), atol=0.03)
    assert np.allclose(samples.bootstrap(np.ones((9, 1))), 1)


# ----------------------------------------------------------------------------------------------------------- win rates


def test_two_orders():
    table = {
        ("A", "B"): (1, 0, 0), ("B", "A"): (0, 0, 1), ("C", "C"): (0, 1, 0), ("A", "A"): (0.5, 0, 0.5),
        ("B", "B"): (0.5, 0, 0.5), ("A", "C"): (0.5, 0.5, 0), ("C", "A"): (0, 0.5, 0.5),
    }  # fmt: skip
    for verdicts, shares in table.items():
        assert winrate.average(*verdicts).tolist() == list(shares)
    assert winrate.average("A", None) is None and winrate.average(None, "B") is None
    assert [winrate.compare(*x).tolist() for x in ((2, 1), (1, 1), (1, 2))] == np.eye(3).tolist()


def test_scores_against_a_direct_count(tmp_path, capsys):
    rng = np.random.default_rng(0)
    score_a, score_b = rng.integers(0, 4, (2, 30, 3)).tolist()
    rows = lambda scores, first: [
        {"prompt": f"q{i}", "category": f"c{i % 2}", "responses": [{"text": "t", "score": s} for s in scores[i]]}
        for i in range(first, 30)
    ]
    a, b = write(tmp_path / "a.jsonl", rows(score_a, 0)), write(tmp_path / "b.jsonl", rows(score_b, 4)[::-1])
    found = winrate.main(["--a", a, "--b", b, "--output", str(tmp_path / "o.json")])
    groups = {"all": range(4, 30), "c0": range(4, 30, 2), "c1": range(5, 30, 2)}
    for name, which in groups.items():
        pairs = [(score_a[i][k], score_b[i][k]) for i in which for k in range(3)]
        group = found["groups"][name]
        assert group["win"]["mean"] == pytest.approx(np.mean([x > y for x, y in pairs]))
        assert group["tie"]["mean"] == pytest.approx(np.mean([x == y for x, y in pairs]))
        assert group["loss"]["mean"] == pytest.approx(np.mean([x < y for x, y in pairs]))
        assert group["win_rate"]["mean"] == pytest.approx(group["win"]["mean"] + group["tie"]["mean"] / 2)
        low, high = group["win_rate"]["ci95"]
        assert low < group["win_rate"]["mean"] < high and group["prompts"] == len(which)
    assert json.loads((tmp_path / "o.json").read_text()) == json.loads(json.dumps(found))
    said = capsys.readouterr().out
    assert "26 prompts are in both" in said and "95 % interval" in said
    write(tmp_path / "c.jsonl", [{"prompt": "other", "completion": "t"}])
    stopped(capsys, lambda: winrate.main(["--a", a, "--b", str(tmp_path / "c.jsonl")]), "no prompt in common")
    write(tmp_path / "d.jsonl", [{"prompt": "q1", "completion": "t"}])
    stopped(capsys, lambda: winrate.main(["--a", a, "--b", str(tmp_path / "d.jsonl")]), "d.jsonl", "--reward_model")
    both = ["--a", a, "--b", b, "--reward_model", "x", "--base_url", "http://x"]
    stopped(capsys, lambda: winrate.main(both), "two judges")


def test_by_a_reward_model(tmp_path):
    folder = save(small("SequenceClassification", num_labels=1), tmp_path / "rm")
    prompts = toy.prompts("heldout")[:5]
    rng = random.Random(0)
    texts = [[toy.write(name, prompts[0], rng) for _ in range(6)] for name in toy.TRAIN_POLICIES[:2]]
    files = [write(tmp_path / f"{i}.jsonl", [{"prompt": p, "completion": t} for p in prompts for t in two])
             for i, two in enumerate(texts)]  # fmt: skip
    found = winrate.main(["--a", files[0], "--b", files[1], "--reward_model", folder, "--micro_batch_size", "3"])
    model, tokenizer = transformers.AutoModelForSequenceClassification.from_pretrained(folder), toy.tokenizer()
    score = lambda p, t: float(model.requires_grad_(False)(torch.tensor([
        tokenizer.apply_chat_template([{"role": "user", "content": p}], add_generation_prompt=True, return_dict=False)
        + tokenizer(t + " " + toy.EOS)["input_ids"]])).logits)  # fmt: skip
    wins = [score(p, x) > score(p, y) for p in prompts for x, y in zip(*texts)]
    assert 0 < np.mean(wins) < 1 and found["groups"]["all"]["win"]["mean"] == pytest.approx(np.mean(wins))
    assert found["judge"] == folder
    pairs = [(p, {"text": t}) for p in prompts for t in texts[0]]
    args = samples.Sampling()
    one_by_one = [winrate.reward_scores(folder, [pair], args)[0] for pair in pairs[:3]]
    assert np.allclose(winrate.reward_scores(folder, pairs, args)[:3], one_by_one, atol=1e-5)
    bare = [{"role": "user", "content": prompts[0]}, {"role": "assistant", "content": texts[0][0]}]
    ids = tokenizer.apply_chat_template(bare, return_dict=False)[:-1]  # a cut text has no end that could be read
    cut = winrate.reward_scores(folder, [(prompts[0], {"text": texts[0][0], "complete": False})], args)
    assert cut == pytest.approx(model(torch.tensor([ids])).logits.flatten().tolist(), abs=1e-5)
    assert abs(cut[0] - one_by_one[0]) > 1e-4


@pytest.mark.skipif(not DATA.is_file(), reason="no real data here")
def test_real_scores_against_a_direct_count():
    with gzip.open(DATA, "rt") as file:
        rows = [json.loads(line) for line in file]
    for one, other in (("claude-2", "vicuna-7b-v1.5"), ("alpaca-7b", "falcon-7b-instruct")):
        found = winrate.main(["--a", str(DATA), "--policy_a", one, "--b", str(DATA), "--policy_b", other])
        count = np.zeros(3)
        for row in rows:
            score = {r["policy"]: r["score"] for r in row["responses"]}
            count += [score[one] > score[other], score[one] == score[other], score[one] < score[other]]
        group = found["groups"]["all"]
        assert group["prompts"] == len(rows) == count.sum() == 805
        assert np.allclose([group[x]["mean"] for x in ("win", "tie", "loss")], count / 805)


@pytest.mark.parametrize(
    "name", ["alpaca", "calibration", "diversity", "human", "judge", "token_values", "value_accuracy", "winrate"]
)
def test_help(name, capsys):
    """--help works, and every flag of every command that has flags by tyro says what it is."""
    module = importlib.import_module(f"eval.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0 and module.__doc__.split("\n")[0][:60] in capsys.readouterr().out
    tree = ast.parse((ROOT / "eval" / f"{name}.py").read_text() + (ROOT / "eval" / "samples.py").read_text())
    for block in [node for node in tree.body if isinstance(node, ast.ClassDef) and node.decorator_list]:
        for field, told in zip(block.body, block.body[1:] + [None]):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(told, ast.Expr) and isinstance(told.value.value, str), field.target.id
