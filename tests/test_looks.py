"""--eval_data, --eval_every, --keep_best: looks at held-out rows say what a separate reading of the same weights says, and
change no step of the training."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny

import gvm
import rm
import toy

home = tiny.home  # a fixture: a tiny policy, data, a GVM and a reward model
KEYS = {
    "rm": {"eval_loss", "eval_accuracy", "eval_pairs"},
    "gvm": {"eval_mse", *(f"eval_accuracy_{x}" for x in ("mean", "P1", "P5", "P10", "P90", "P95", "P99"))},
    "vcb": {"eval_loss", "eval_pair_gap", "eval_misaligned"},
    "dpo": {"eval_accuracy", "eval_pairs"},
    "dvpo": {"eval_value", "eval_kl", "eval_length", "eval_eos_share"},
    "ppo": {"eval_reward", "eval_kl", "eval_length", "eval_eos_share"},
    "reinforce": {"eval_reward", "eval_kl", "eval_length", "eval_eos_share"},
}


def held(home, script) -> dict:
    rows = tiny.jsonl(home / ("prompts.jsonl" if script in tiny.ROLLOUT else "graded.jsonl"))
    tiny.write_jsonl(home / f"{script}-held.jsonl", rows[4:])
    tiny.write_jsonl(home / f"{script}-rest.jsonl", rows[:4])
    found = {"eval_data": str(home / f"{script}-held.jsonl"), "eval_split": "train", "eval_every": 2}
    return found | ({} if script in tiny.ROLLOUT else {"data": f"{script}-rest.jsonl"})


@pytest.mark.parametrize("script", KEYS)
def test_looks_change_no_step_and_the_last_is_in_the_summary(home, tmp_path, script):
    how = held(home, script) | {"steps": 4}
    looked = tiny.run(home, script, tmp_path / "looked", keep_best=True, **how)
    plain = tiny.run(home, script, tmp_path / "plain", **{k: v for k, v in how.items() if not k.startswith("eval")})
    rows, others = tiny.metrics(looked), tiny.metrics(plain)
    assert [row["step"] for row in rows if KEYS[script] <= row.keys()] == [2, 4]
    own = [{k: v for k, v in row.items() if not k.startswith("eval_")} for row in rows]
    if script in tiny.OFFLINE:  # the reference's log-probs are made for all rows at once: others' rounding
        tiny.same_metrics(own, others)
        assert tiny.distance(looked, plain) < 1e-4
    else:
        assert own == others and tiny.distance(looked, plain) == 0
    summary = json.loads((looked / "summary.json").read_text())
    for key in KEYS[script]:
        last = summary.get(key, summary.get(key.removeprefix("eval_")))
        assert last == pytest.approx(rows[-1][key], abs=1e-4), key
    assert (looked / "best" / "config.json").is_file() and not (plain / "best").exists()
    best = {key.removeprefix("best_"): value for key, value in summary.items() if key.startswith("best_eval")}
    (key,) = best
    worst_first = sorted(row[key] for row in rows if key in row)
    assert best[key] == worst_first[0 if key.endswith("loss") else -1]
    assert rows[summary["best_step"] - 1][key] == best[key]


def test_a_reward_models_look_equals_its_pairs_in_float64(home, tmp_path):
    folder = tiny.run(home, "rm", tmp_path / "o", keep_best=True, **held(home, "rm"))
    args = rm.Args(max_prompt_tokens=64)
    tokenizer = toy.tokenizer()
    model = rm.load_model("reward", str(folder / "final"), tokenizer, args, frozen=True).double()
    right = pairs = loss = 0.0
    for row in tiny.jsonl(home / "rm-held.jsonl"):
        questions = rm.sequences_of(tokenizer, rm.canonical(row), True, args)  # none where all scores are equal
        _, sequences, scores = questions[0] if questions else ("", [], [])
        found = [float(model(torch.tensor([ids])).logits) for ids in sequences]
        for i, j in rm.ordered_pairs(scores):
            pairs, right = pairs + 1, right + (found[i] > found[j])
            loss += math.log1p(math.exp(found[j] - found[i]))
    last = tiny.metrics(folder)[-1]
    assert (last["eval_pairs"], last["eval_accuracy"]) == (pairs, pytest.approx(right / pairs))
    assert last["eval_loss"] == pytest.approx(loss / pairs, rel=1e-4)
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["reward_std"] > 0 and "reward_mean" in config


def test_a_gvms_look_equals_its_token_values(home, tmp_path):
    """Without tau the values of a held-out answer are one forward pass of the stock model."""
    folder = tiny.run(home, "gvm", tmp_path / "o", tau_pairs=0, **held(home, "gvm"))
    args, tokenizer = gvm.Args(tau_pairs=0), toy.tokenizer()
    model = gvm.load_model("value", str(folder / "final"), tokenizer, args, frozen=True)
    rest, config = gvm.load_answers(tokenizer, args, str(home / "gvm-rest.jsonl"), "train"), model.config
    scores = np.array([answer.score for answer in rest])
    assert (config.reward_mean, config.reward_std) == pytest.approx((scores.mean(), scores.std()))
    errors = []
    for answer in gvm.load_answers(tokenizer, args, str(home / "gvm-held.jsonl"), "train"):
        ((prompt, response),) = gvm.render(tokenizer, [answer], 0)
        ids = torch.tensor([list(prompt) + list(response)])
        values = model.double()(ids).logits[0, -len(response) :, 0].tolist()
        errors += [(q - (answer.score - scores.mean()) / scores.std()) ** 2 for q in values]
    assert json.loads((folder / "summary.json").read_text())["mse"] == pytest.approx(np.mean(errors), rel=1e-4)


@pytest.mark.parametrize("script", ["ppo", "reinforce", "dvpo"])
def test_a_look_at_a_policy_says_what_stock_models_say_of_its_responses(home, tmp_path, monkeypatch, script):
    """Of the closing look every response is read anew, one by one in float64: by the saved policy, the reference, and the
    reward model or the value model. eos_penalty counts where a response was cut."""
    module, drawn = tiny.SCRIPTS[script], []
    own = module.Rollouts.__call__
    monkeypatch.setattr(module.Rollouts, "__call__", lambda *a: drawn.append(own(*a)) or drawn[-1])
    how = held(home, script) | {"eos_penalty": 0.5, "max_response_tokens": 2, "steps": 4, "policy": "brief"}
    folder = tiny.run(home, script, tmp_path / "o", **how | ({"tau_pairs": 0} if script == "dvpo" else {}))
    assert len(drawn) == 4 + 2  # rollouts and looks: the last step's is the closing one
    tokenizer = toy.tokenizer()
    args = module.Args(max_response_tokens=64)  # room for the end token, as a reward model has it
    policy, reference = (tiny.stock("CausalLM", x).double() for x in (folder / "final", home / "brief"))
    ends = set(reference.generation_config.eos_token_id)
    kind, judge = ("TokenClassification", "gvm") if script == "dvpo" else ("SequenceClassification", "rm")
    judge = tiny.stock(kind, home / judge / "final").double()
    mean, std = judge.config.reward_mean, judge.config.reward_std
    rows = tiny.jsonl(home / f"{script}-held.jsonl")
    found = []
    for row, (response, _) in zip(rows, drawn[-1], strict=True):
        prompt, _ = module.encode(tokenizer, row, None, args)
        ids, whole = torch.tensor([prompt + response]), response[-1] in ends
        logp = [
            model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None]).sum()
            for model in (policy, reference)
        ]
        if script == "dvpo":
            score = judge(ids).logits[0, -1, 0]
        else:
            text = tokenizer.decode([t for t in response if t not in ends])
            _, said = module.encode(tokenizer, row | {"text": text}, "text", args)
            said = said if whole else said[:-1]
            score = (judge(torch.tensor([prompt + said])).logits[0, 0] - mean) / std
        found.append((float(score) - 0.5 * (not whole), float(logp[0] - logp[1]), len(response), float(whole)))
    names = ("eval_value" if script == "dvpo" else "eval_reward", "eval_kl", "eval_length", "eval_eos_share")
    summary = json.loads((folder / "summary.json").read_text())
    assert [summary[name] for name in names] == pytest.approx(np.mean(found, 0).tolist(), rel=1e-4, abs=1e-5)
    assert 0 < summary["eval_eos_share"] < 1 and abs(summary["eval_kl"]) > 1e-2


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("dvpo", {}),
        ("rm", {"eval_every": 1, "eval_share": 0.0}),
        ("sft", {"eval_every": 2}),
        ("rm", {"eval_every": 9, "eval_share": 0.3}),
    ],
)
def test_keep_best_without_looks_is_refused(home, tmp_path, capsys, script, how):
    with pytest.raises(SystemExit):
        tiny.run(home, script, tmp_path / "o", keep_best=True, **how)
    assert (
        "--keep_best chooses among looks at held-out rows: give --eval_data, and --eval_every"
        in capsys.readouterr().err
    )
