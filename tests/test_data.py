"""Rows as the datasets of the field have them: each is read as docs/data.md says, trains, or is told; settings by model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import rm
import sft
import toy
import vcb

ROOT = Path(__file__).resolve().parent.parent
ASK, GOOD, BAD = toy.prompts("rl")[0], "the soup is good .", "the soup is bad ."


def message(role, content):
    return {"role": role, "content": content}


def completion(model, text, score=None, overall=None):
    return {"model": model, "response": text, "fine-grained_score": score, "overall_score": overall, "critique": "..."}


HH = f"\n\nHuman: {ASK}\n\nAssistant: it is .\n\nHuman: {ASK}\n\nAssistant:"
TURNS = [message("user", ASK), message("assistant", "it is ."), message("user", ASK)]
POST = {"id": "x", "post": ASK, "title": "t", "subreddit": "s", "site": None, "article": None}
SHAPES = {  # rows of the field's datasets -> prompt, what SFT learns, {response: score} and its policies
    "ultrafeedback": (
        {"source": "s", "instruction": ASK, "models": ["a", "b"], "correct_answers": ["None"],
         "completions": [completion("a", GOOD, 4.5, 8.0), completion("b", BAD, None, 2.0)]},
        ASK, GOOD, {GOOD: 4.5, BAD: 2.0}, ["a", "b"],
    ),
    "ultrafeedback_binarized": (
        {"prompt": ASK, "chosen": [message("user", ASK), message("assistant", GOOD)], "score_chosen": 9.0,
         "rejected": [message("user", ASK), message("assistant", BAD)], "score_rejected": 1.0},
        [message("user", ASK)], GOOD, {GOOD: 1.0, BAD: -1.0}, [None, None],
    ),
    "hh": ({"chosen": f"{HH} {GOOD}", "rejected": f"{HH} {BAD}"}, TURNS, GOOD, {GOOD: 1.0, BAD: -1.0}, [None, None]),
    "hh_with_prompt": (
        {"prompt": HH, "chosen": GOOD, "rejected": BAD, "split": "train"}, TURNS, GOOD, {GOOD: 1.0, BAD: -1.0}, [None, None],
    ),
    "tldr": ({"prompt": ASK, "completion": GOOD}, ASK, GOOD, None, None),
    "summarize_comparisons": (
        {"info": POST, "summaries": [{"text": BAD, "policy": "sup2", "note": None}, {"text": GOOD, "policy": "ref", "note": ""}],
         "choice": 1, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 3}},
        f"{ASK}\n\nTL;DR:", GOOD, {BAD: -1.0, GOOD: 1.0}, ["sup2", "ref"],
    ),
    "summarize_axis": (
        {"info": POST | {"post": None, "article": ASK}, "summary": {"text": GOOD, "policy": "ppo", "axes": {"overall": 6}}},
        f"{ASK}\n\nTL;DR:", GOOD, {GOOD: 6}, ["ppo"],
    ),
    "cnn_dailymail": ({"article": ASK, "highlights": GOOD, "id": "x"}, f"{ASK}\n\nTL;DR:", GOOD, None, None),
    "alpaca": ({"instruction": ASK, "input": "", "output": GOOD}, ASK, GOOD, None, None),
    "alpaca_with_input": ({"instruction": ASK, "input": "please", "output": GOOD}, f"{ASK}\n\nplease", GOOD, None, None),
    "messages": ({"messages": [*TURNS, message("assistant", GOOD)]}, TURNS, GOOD, None, None),
}  # fmt: skip


def test_messages_that_end_with_the_user_are_a_prompt():
    found = sft.canonical({"messages": TURNS})
    assert TURNS[-1]["role"] == "user" and found["prompt"] == TURNS and "completion" not in found


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_is_read_as_documented(shape):
    row, prompt, learned, scores, policies = SHAPES[shape]
    found = sft.canonical(row)
    assert found["prompt"] == prompt and found["completion"] == learned
    if scores is None:
        with pytest.raises(ValueError, match="responses"):
            rm.graded(found)
    else:
        responses = rm.graded(found)
        assert {r["text"]: r["score"] for r in responses} == scores
        assert [r["policy"] for r in responses] == policies


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("shape", SHAPES)
def test_each_shape_trains(tmp_path, monkeypatch, shape):
    row, *_, scores, _ = SHAPES[shape]
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(write(tmp_path / "rows.jsonl", [row] * 4)), "--steps", "1", "--max_prompt_tokens", "80"]
    sft.main([*data, "--output_dir", "sft"])
    if scores and len(scores) > 1:
        rm.main([*data, "--model", "sft/final", "--output_dir", "rm", "--eval_share", "0"])
        gvm.main([*data, "--model", "sft/final", "--output_dir", "gvm", "--eval_share", "0"])
    for folder in ("sft", "rm", "gvm")[: 3 if scores and len(scores) > 1 else 1]:
        assert json.loads((tmp_path / folder / "summary.json").read_text())["steps"] == 1


def test_what_is_imitated_is_said(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    data = str(write(tmp_path / "rows.jsonl", [SHAPES["hh"][0]] * 2))
    sft.main(["--data", data, "--steps", "1"])
    assert f"{data}: of each row's responses the chosen one is imitated" in capfd.readouterr().out


BROKEN = {
    "empty completions": {"instruction": ASK, "completions": []},
    "no answer": {"chosen": f"{HH} {GOOD}\n\nHuman: bye", "rejected": f"{HH} {BAD}"},
    "too long": {"prompt": " ".join(["how"] * 90), "completion": GOOD},
}


def test_bad_rows_of_the_hub_are_left_out_and_counted(tmp_path, monkeypatch, capfd):
    """UltraFeedback has a row with no completions; a configuration stands behind a colon."""
    rows, asked = [*BROKEN.values(), *[SHAPES["ultrafeedback"][0]] * 3], []

    def hub(*name, split):
        asked.append((*name, split))
        return datasets.Dataset.from_json(str(write(tmp_path / "hub.jsonl", rows)))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    sft.main(["--data", "some/hub:3.0.0", "--split", "test", "--steps", "1"])
    assert asked == [("some/hub", "3.0.0", "test")]
    assert (
        "some/hub:3.0.0: 3 of 6 rows left out, the first one because of some/hub:3.0.0 row 1" in capfd.readouterr().out
    )


@pytest.mark.parametrize("row", BROKEN.values(), ids=BROKEN)
def test_a_bad_row_of_ones_own_file_stops_unless_asked_otherwise(tmp_path, monkeypatch, capfd, row):
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "rows.jsonl", [SHAPES["tldr"][0], row])
    with pytest.raises(SystemExit) as ended:
        sft.main(["--data", str(path), "--steps", "1"])
    error = capfd.readouterr().err
    assert ended.value.code == 2 and error.startswith(f"error: {path} row 2: ") and "--skip_bad_rows" in error
    assert error.count("\n") == 1 and not (tmp_path / "runs").exists()
    sft.main(["--data", str(path), "--steps", "1", "--skip_bad_rows"])
    assert f"{path}: 1 of 2 rows left out" in capfd.readouterr().out


def test_many_rows_are_encoded_by_several_processes_as_by_one(tmp_path, monkeypatch):
    rows = [{"prompt": ASK, "completion": f"{GOOD} " * (1 + i % 3)} for i in range(20_100)]
    args, tokenizer = sft.Args(data=str(write(tmp_path / "rows.jsonl", rows))), toy.tokenizer()
    found = []
    for count in (1, 2):
        monkeypatch.setattr(os, "cpu_count", lambda count=count: count)
        found.append(sft.load_data(args, "sft", lambda row: [sft.encode(tokenizer, row, "completion", args)]))
    one, two = map(list, found)
    assert one == two and [len(response) for _, response in one[-3:]] == [6, 11, 16]


# ---------------------------------------------------------------------------------------------------- settings by model
@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of the toy world, and one that is none, on the same tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models")
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    for name, config in (
        ("toys", toy.config(**tiny)),
        ("real", LlamaConfig(**tiny, vocab_size=101, num_attention_heads=2)),
    ):
        LlamaForCausalLM(config).save_pretrained(folder / name)
        toy.tokenizer().save_pretrained(folder / name)
    return folder


def parsed(monkeypatch, module, *argv):
    found = []
    monkeypatch.setattr(module, "train", found.append)
    module.main(list(argv))
    return found[0]


@pytest.mark.parametrize(
    ("module", "flag"), [(sft, "model"), (rm, "model"), (gvm, "model"), (dvpo, "policy"), (vcb, "policy")]
)
def test_what_no_flag_says_is_the_toy_worlds_or_the_papers(monkeypatch, models, module, flag):
    toys = parsed(monkeypatch, module, f"--{flag}", str(models / "toys"))
    real = parsed(monkeypatch, module, f"--{flag}", str(models / "real"))
    assert toys.learning_rate == module.Args().learning_rate > 20 * real.learning_rate
    for field, value in module.PAPER.items():
        assert getattr(real, field) == value and getattr(toys, field) == getattr(module.Args(), field)
    assert not real.bf16 and real.zero_stage == 0  # what the machine has is not the paper's to say
    mine = parsed(
        monkeypatch, module, f"--{flag}", str(models / "real"), "--learning_rate", "0.125", "--data", "x.jsonl"
    )
    assert mine.learning_rate == 0.125 and mine.batch_size == real.batch_size
    assert mine.split == "train"  # the paper's share is of the paper's data


def test_the_first_line_of_a_run_says_what_it_trains(models, tmp_path):
    data = write(tmp_path / "rows.jsonl", [SHAPES["tldr"][0]] * 2)
    command = [
        sys.executable,
        str(ROOT / "sft.py"),
        "--model",
        str(models / "real"),
        "--data",
        str(data),
        "--steps",
        "1",
    ]
    done = subprocess.run(
        [*command, "--lora_r", "2"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-1000:]
    first = done.stdout.splitlines()[0]
    for part in (
        str(models / "real"),
        "M parameters",
        "M trained",
        "learning rate 2e-05",
        "at most 2048 tokens a sequence",
        "the paper's",
    ):
        assert part in first, part
