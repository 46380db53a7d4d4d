"""vcb.py, dpo.py and rest.py as runs: what they log against loops, the reference's cache, rows of every kind, and clear
errors."""

import itertools
import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
import rest
import sft
import toy
import vcb


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy, a reward model with one label and one with two, and graded rows."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    for name, model in (
        ("policy", LlamaForCausalLM(toy.config(**small))),
        ("rm", LlamaForSequenceClassification(toy.config(num_labels=1, **small))),
        ("two", LlamaForSequenceClassification(toy.config(num_labels=2, **small))),
    ):
        model.save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    rng = random.Random(0)
    rows = []
    for k, prompt in enumerate(toy.prompts("rl")[:10]):
        texts = [toy.write("crowd", prompt, rng) for _ in range(2 + k % 4)]
        rows.append({"prompt": prompt, "responses": [{"text": t, "score": rng.gauss(0, 1)} for t in texts]})
    write(folder / "graded.jsonl", rows)
    return folder


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(script, home, out, **options):
    args = script.Args(policy=str(home / "policy"), data=str(home / "graded.jsonl"), output_dir=str(out), **options)
    return script.train(args).parent


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------- the mathematics
def test_calibration_equals_a_loop():
    gen = torch.Generator().manual_seed(0)
    ratio, reward = torch.randn(2, 4, 6, generator=gen, dtype=torch.float64)
    reward = (2 * reward).round()  # ties
    mask = torch.arange(6) < torch.tensor([6, 5, 1, 0])[:, None]
    spread = wrong = pairs = 0
    for b in range(4):
        keep = mask[b].nonzero().flatten().tolist()
        sigma = reward[b, keep].std(correction=0).item() if keep else 1
        s = {i: 0.3 * ratio[b, i].item() - (reward[b, i].item() / sigma if sigma else 0) for i in keep}
        for i, j in itertools.combinations(keep, 2):
            if reward[b, i] != reward[b, j]:
                pairs += 1
                spread += abs(s[i] - s[j])
                wrong += (ratio[b, i] > ratio[b, j]) != (reward[b, i] > reward[b, j])
    found = vcb.calibration(ratio, reward, mask, 0.3)
    torch.testing.assert_close(found, torch.tensor([spread, wrong, pairs], dtype=torch.float64))
    assert vcb.calibration(0 * ratio, reward, mask, 0.3)[1] == pairs  # where nothing is said, nothing is right


def test_reweighted_kl():
    ratio = torch.tensor([[0.0, math.log(3), 9.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    want = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)  # weights 1/4, 3/4 against 1/2, 1/2
    torch.testing.assert_close(vcb.reweighted_kl(ratio, mask), torch.tensor([want, 0.0]), atol=1e-6, rtol=1e-6)
    sure = vcb.reweighted_kl(torch.tensor([[0.0, 200.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool))
    assert sure.item() == pytest.approx(math.log(4))


def test_threshold():
    rewards = [3.0, 1.0, 2.0, 5.0, 4.0]
    assert [rest.threshold(rewards, q) for q in (0, 0.2, 0.4, 0.5, 0.8, 0.99)] == [1, 2, 3, 4, 5, 5]
    assert rest.threshold([1.0, 1.0, 1.0, 2.0], 0.5) == 2  # of the equal ones all would be too many
    assert rest.threshold([1.0, 1.0], 0.9) == 1  # but something is kept


# ---------------------------------------------------------------------------------------------------------------- runs
def test_reference_logps_are_those_of_the_policy_before_the_first_step(home, tmp_path):
    """Also of a longer batch, and of responses of every length; kept for --resume."""
    folder = run(vcb, home, tmp_path / "vcb", steps=2, batch_size=4, micro_tokens=96)
    cached = json.loads((folder / "ref_logp.json").read_text())["logps"]
    args = vcb.Args(policy=str(home / "policy"))
    tokenizer = sft.load_tokenizer(args.policy, args)
    policy = sft.Policy(sft.load_model("causal", args.policy, tokenizer, args))
    groups = vcb.load_groups(tokenizer, args, str(home / "graded.jsonl"), "train")
    rows = [row for group in groups for row in group.rows]
    assert len(rows) == len(cached) == sum(2 + k % 4 for k in range(10))
    with torch.no_grad():
        alone = [policy(sft.collate([row], 0)).sum().item() for row in rows]
    assert cached == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("options", [{}, {"pairs": "full"}, {"pairs": "mean"}, {"n": 2}])
def test_vcb_learns(home, tmp_path, options):
    rows = metrics(run(vcb, home, tmp_path / "out", epochs=25, batch_size=10, learning_rate=3e-3, **options))
    assert rows[-1]["loss"] < 0.5 * rows[0]["loss"] and rows[-1]["misaligned"] < 0.2
    assert rows[-1]["reweighted_kl"] > 0.05


@pytest.mark.parametrize("options", [{}, {"loss": "ipo"}, {"loss": "slic"}, {"loss": "rrhf"}, {"pair_selection": "best_worst"},
                                     {"loss": "ipo", "length_normalize": "yes"}, {"length_penalty": 0.05}])  # fmt: skip
def test_dpo_learns(home, tmp_path, options):
    rows = metrics(run(dpo, home, tmp_path / "out", epochs=25, batch_size=10, learning_rate=3e-3, **options))
    assert rows[-1]["loss"] < 0.9 * rows[0]["loss"]
    if options.get("loss") not in ("slic", "rrhf"):  # these two order log-probs, not log-ratios
        assert rows[-1]["accuracy"] > 0.75


def test_rest_keeps_better_and_better(home, tmp_path):
    rows = metrics(run(rest, home, tmp_path / "out", quantiles=(0.3, 0.6), epochs=2, batch_size=8))
    scores = {k: [r["score"] for r in rows if r["improve_step"] == k] for k in (1, 2)}
    assert min(scores[2]) > min(scores[1]) and [r["improve_step"] for r in rows] == sorted(
        r["improve_step"] for r in rows
    )


def test_snapshots(home, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = run(vcb, home, tmp_path / "out", steps=5, batch_size=4, snapshot_every=2)
    names = sorted(p.name for p in (folder / "snapshots").iterdir())
    assert names == ["step_0000002", "step_0000004"]
    weights = [
        AutoModelForCausalLM.from_pretrained(p).lm_head.weight
        for p in (folder / "snapshots" / names[0], folder / "final")
    ]
    assert not torch.equal(*weights)


def test_reference_other_than_the_policy(home, tmp_path):
    """--reference: its log-probs, and it is not among the models that train."""
    moved = run(vcb, home, tmp_path / "moved", steps=8, batch_size=10, learning_rate=3e-3) / "final"
    args = vcb.Args(policy=str(moved), reference=str(home / "policy"), data=str(home / "graded.jsonl"), steps=1,
                    batch_size=10, output_dir=str(tmp_path / "out"))  # fmt: skip
    first = metrics(vcb.train(args).parent)[0]
    assert abs(first["forward_kl"]) > 1e-2
    logps = [json.loads((tmp_path / x / "ref_logp.json").read_text())["logps"] for x in ("moved", "out")]
    assert logps[0] == pytest.approx(logps[1], abs=1e-4)


def test_held_out_accuracy_of_the_implicit_reward(home, tmp_path):
    """A policy that has learned the pairs by heart orders them; an untrained one does not."""
    found, held = [], {"eval_data": str(home / "graded.jsonl"), "eval_split": "train", "eval_every": 4}
    for k, rate in enumerate((3e-3, 1e-12)):
        folder = run(dpo, home, tmp_path / str(k), epochs=40, batch_size=10, learning_rate=rate, **held)
        found.append(json.loads((folder / "summary.json").read_text()))
        looks = [row["eval_accuracy"] for row in metrics(folder) if "eval_accuracy" in row]
        assert len(looks) == found[k]["steps"] // 4 and (
            looks[-1] == found[k]["eval_accuracy"] or found[k]["steps"] % 4
        )
    assert found[0]["eval_accuracy"] > 0.9 > found[1]["eval_accuracy"] and found[0]["eval_pairs"] > 30


@pytest.mark.parametrize("script", [vcb, dpo])
def test_resume_with_other_data_is_refused(home, tmp_path, capsys, script):
    """The policy is no longer the reference: log-probs of other rows could not be had."""
    run(script, home, tmp_path / "o", steps=2, batch_size=4, save_every=1)
    (tmp_path / "o" / "summary.json").unlink()  # as if it had been killed before its end
    args = script.Args(**json.loads((tmp_path / "o" / "args.json").read_text()) | {"resume": True})
    rows = (home / "graded.jsonl").read_text()
    (home / "graded.jsonl").write_text("".join(rows.splitlines(keepends=True)[1:]))  # under the same name
    try:
        with pytest.raises(SystemExit):
            script.train(args)
    finally:
        (home / "graded.jsonl").write_text(rows)
    assert "data or reference are not those" in capsys.readouterr().err


def test_calibration_is_0_at_the_optimum_of_each_form():
    """Log-ratios r / (gamma sigma), with the form's own standard deviation."""
    reward, mask = torch.tensor([[0.3, 1.0, -0.5, 0.2]], dtype=torch.float64), torch.ones(1, 4, dtype=torch.bool)
    for pairs, ddof in (("upper", 0), ("full", 1), ("mean", 0)):
        ratio = reward / (0.35 * reward.std(correction=ddof))
        assert vcb.calibration(ratio, reward, mask, 0.35, pairs=pairs)[:2].abs().max() < 1e-12


# -------------------------------------------------------------------------------------------------------------- mistakes
MISTAKES = [
    ([{"prompt": "is the soup any good ?", "completion": "it is ."}], "no field responses"),
    ([{"prompt": "is the soup any good ?", "responses": [{"text": "it is .", "score": 1}]}], "two responses or more"),
    (
        [{"prompt": "is the soup any good ?", "responses": [{"text": "it is .", "score": math.inf}] * 2}],
        "not a finite number",
    ),
    ([{"prompt": "is the soup any good ?", "responses": [{"text": "it is ."}] * 2}], "field score is missing"),
    ([{"responses": [{"text": "it is .", "score": 1}, {"text": "no", "score": 2}]}], "field prompt is missing"),
    (
        [{"prompt": "is the soup any good ?", "responses": [{"text": "it is .", "score": "5"}] * 2}],
        "not a finite number",
    ),
]


@pytest.mark.parametrize("script", [vcb, dpo])
@pytest.mark.parametrize("rows, message", MISTAKES)
def test_mistakes_in_the_data(home, tmp_path, capsys, script, rows, message):
    args = script.Args(
        policy=str(home / "policy"), data=str(write(tmp_path / "d.jsonl", rows)), output_dir=str(tmp_path / "o")
    )
    with pytest.raises(SystemExit) as ended:
        script.train(args)
    shown = capsys.readouterr().err
    assert ended.value.code == 2 and message in shown and shown.count("\n") == 1 and not (tmp_path / "o").exists()


@pytest.mark.parametrize("script", [vcb, dpo, rest])
def test_without_sampled_data_the_command_is_named(home, tmp_path, capsys, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        script.train(script.Args(policy=str(home / "policy"), output_dir=str(tmp_path / "o")))
    assert "python sample.py" in capsys.readouterr().err


def test_one_score_for_all_has_no_order(home, tmp_path, capsys):
    same = [{"prompt": "is the soup any good ?", "responses": [{"text": t, "score": 1} for t in ("it is .", "no .")]}]
    data = str(write(tmp_path / "d.jsonl", same))
    with pytest.raises(SystemExit):
        dpo.train(dpo.Args(policy=str(home / "policy"), data=data, output_dir=str(tmp_path / "o")))
    assert "no pair has an order" in capsys.readouterr().err
    # VCB keeps such a prompt: the normalised reward is 0, the loss finite
    folder = vcb.train(vcb.Args(policy=str(home / "policy"), data=data, output_dir=str(tmp_path / "v"), steps=2)).parent
    assert all(math.isfinite(row["loss"]) for row in metrics(folder))


def test_mistakes_in_the_evaluation_are_told_before_training(home, tmp_path, capsys):
    same = [{"prompt": "is the soup any good ?", "responses": [{"text": t, "score": 1} for t in ("it is .", "no .")]}]
    tied = str(write(tmp_path / "d.jsonl", same))
    for options, message in (
        ({"eval_data": tied, "eval_split": "train"}, "has no pair with an order to look at"),
        ({"loss": "ipo", "length_penalty": 0.1}, "--length_penalty belongs"),
    ):
        with pytest.raises(SystemExit):
            run(dpo, home, tmp_path / "o", **options)
        assert message in capsys.readouterr().err and not (tmp_path / "o").exists()


def test_rest_quantiles(home, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(rest, home, tmp_path / "o", quantiles=(0.9, 0.5))
    assert "rising" in capsys.readouterr().err
