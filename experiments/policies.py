"""Does tau help a value model on real policies? A GVM with tau, one without, and a reward model, on graded answers of many
policies to the same prompts, with prompts and policies held out.

    python experiments/policies.py --model HuggingFaceTB/SmolLM2-135M-Instruct --data graded.jsonl.gz      # goes on where it stopped

--data has rows {prompt, responses: [{policy, text, score}]}, such as AlpacaEval's 805 prompts answered by a leaderboard's
policies, with a judge's score of each. Every fourth policy by mean score, and some prompts, are in no training data.
Responses are read up to TOKENS tokens. Reported: share of pairs of a held-out prompt's responses that a scorer puts in the
judge's order, for policies of training and for policies held out (eval/value_accuracy.py), beside the length of the
whole text.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import value_accuracy
from experiments import run as runner
from experiments.sentiment import LORA, write_jsonl

TOKENS = 96
SIZES = {  # prompts of training, answers to each, prompts held out, answers to each by policies of training
    "full": {"prompts": 300, "answers": 5, "held_out": 80, "seen": 8},
    "tiny": {"prompts": 6, "answers": 3, "held_out": 3, "seen": 3},
}


def split_policies(rows) -> tuple[list[str], list[str]]:
    """(of training, held out): every fourth by mean score."""
    scores = {}
    for row in rows:
        for answer in row["responses"]:
            scores.setdefault(answer["policy"], []).append(answer["score"])
    order = sorted(scores, key=lambda name: (np.mean(scores[name]), name))
    return [name for i, name in enumerate(order) if i % 4 != 2], order[2::4]


def write_data(data: Path, folder: Path, size: dict) -> dict:
    """train.jsonl, seen.jsonl, unseen.jsonl. -> what is in them."""
    read = gzip.open if data.suffix == ".gz" else open
    with read(data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rng = random.Random(0)
    rng.shuffle(rows)
    train, held_out = split_policies(rows)
    chosen = lambda row, names, n: [
        {key: answer[key] for key in ("policy", "text", "score")}
        for answer in rng.sample([a for a in row["responses"] if a["policy"] in names], n)
    ]
    parts = {
        "seen": [(row, train, size["seen"]) for row in rows[: size["held_out"]]],
        "unseen": [(row, held_out, len(held_out)) for row in rows[: size["held_out"]]],
        "train": [(row, train, size["answers"]) for row in rows[size["held_out"] :][: size["prompts"]]],
    }
    for name, part in parts.items():
        write_jsonl(
            folder / f"{name}.jsonl", [{"prompt": r["prompt"], "responses": chosen(r, *some)} for r, *some in part]
        )
    return {"policies_of_training": train, "policies_held_out": held_out}


def jobs(model: str, folder: Path) -> dict[str, runner.Job]:
    flags = (
        f"--model {model} --data {folder}/train.jsonl --learning_rate 3e-4 {LORA} --epochs 1 --batch_size 8 --eval_share 0.05 "
        f"--max_prompt_tokens 512 --max_response_tokens {TOKENS} --warmup_steps 10 --micro_tokens 2048"
    )
    value = f"{flags} --tau_tokens {TOKENS}"
    names = {
        "gvm": ("gvm", f"{value} --tau_pairs 1"),
        "gvm_no_tau": ("gvm", f"{flags} --tau_pairs 0"),
        "rm": ("rm", flags),
    }
    return {
        name: runner.Job([sys.executable, str(runner.ROOT / f"{script}.py"), *words.split(), "--output_dir", str(folder / name)],
                         folder / name, [], 1200)
        for name, (script, words) in names.items()
    }  # fmt: skip


def of_whole_texts(path: Path) -> dict:
    """The accuracy of a response's length in characters, which no cut hides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    found = [(row["prompt"], a["score"], {"mean": len(a["text"])}) for row in rows for a in row["responses"]]
    return value_accuracy.accuracies(found)["mean"]


def measured(folder: Path) -> dict:
    """file -> scorer -> accuracies; kept beside the runs."""
    found = {}
    for part in ("seen", "unseen"):
        found[part] = {"whole_length": of_whole_texts(folder / f"{part}.jsonl")}
        for name, gvm, flags in (
            ("gvm", "gvm", f"--reward_model {folder}/rm/final"),
            ("gvm_no_tau_shown", "gvm", "--tau_pairs 0"),
            ("gvm_no_tau", "gvm_no_tau", ""),
        ):
            kept = folder / f"{part}_{name}.json"
            if not kept.is_file():
                words = [sys.executable, str(runner.ROOT / "eval" / "value_accuracy.py"), "--gvm", str(folder / gvm / "final"),
                         "--data", str(folder / f"{part}.jsonl"), "--max_prompt_tokens", "1024", "--max_response_tokens", str(TOKENS),
                         "--micro_batch_size", "16", "--output", str(kept), *flags.split()]  # fmt: skip
                subprocess.run(words, check=True, cwd=runner.ROOT)
            found[part][name] = json.loads(kept.read_text())
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="SmolLM2-135M-Instruct: a folder or a hub name")
    parser.add_argument("--data", required=True, type=Path, help="graded answers of many policies, .jsonl or .jsonl.gz")
    parser.add_argument("--output_dir", type=Path, default=runner.ROOT / "runs" / "policies")
    parser.add_argument("--size", choices=SIZES, default="full")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a thread each")
    args = parser.parse_args()
    folder = args.output_dir
    about = write_data(args.data, folder, SIZES[args.size])
    todo = jobs(args.model, folder)
    if not runner.execute(todo, args.workers):
        raise SystemExit(1)
    summaries = {name: json.loads((folder / name / "summary.json").read_text()) for name in todo}
    report = {"model": Path(args.model).name, "code": runner.same_code(), "commit": runner.commit(), "data": args.data.name,
              "size": SIZES[args.size] | {"tokens": TOKENS}, **about, "accuracy": measured(folder), "runs": summaries}  # fmt: skip
    target = folder / "policies.json" if args.size == "tiny" else runner.ROOT / "experiments" / "policies.json"
    target.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{target} written")


if __name__ == "__main__":
    main()
