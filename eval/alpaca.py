"""AlpacaEval 2: writes a policy's outputs as the `alpaca-eval` package reads them, and runs that package if it is
installed.

    python eval/alpaca.py --samples runs/dvpo/final --prompts alpaca_eval.jsonl --name dvpo
    python eval/alpaca.py --samples answers.jsonl --name dvpo

The length-controlled win rate (Dubois et al. 2024) is the package's business: it fits, over all 805 prompts, how the
judge's preference depends on length, and needs the judge's log-probs. It wants $OPENAI_API_KEY and asks a paid judge
805 times. Without the package (`pip install alpaca-eval`; it is not among the requirements) the command to run is
printed."""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import program
from eval import samples as eval_samples


@dataclass(kw_only=True)
class Args(eval_samples.Sampling):
    """Whose outputs are judged, and by which of the package's annotators."""

    samples: str
    """a sample file, or a model (with --prompts)"""
    policy: str = ""
    """of a file, this policy's responses only"""
    name: str
    """the policy's name on the leaderboard"""
    annotators_config: str = "weighted_alpaca_eval_gpt4_turbo"
    """the package's judge (AlpacaEval 2's own by default)"""
    output_dir: str = "runs/alpaca"
    """folder for outputs.json and all that the package writes"""
    run: bool = True
    """run the package if it is installed; --no_run only writes the file and prints the command"""


def outputs(rows: list[dict], name: str) -> list[dict]:
    """The package's rows: the first response to each prompt, and who wrote it."""
    found = []
    for row in rows:
        turns = eval_samples.messages(row["prompt"])
        if len(turns) != 1:
            sft.stop(f"a prompt has {len(turns)} messages: AlpacaEval's are single questions")
        found.append(
            {"instruction": turns[0]["content"], "output": row["responses"][0]["text"], "generator": name}
            | ({"dataset": row["category"]} if "category" in row else {})
        )
    return found


def command(args: Args) -> list[str]:
    folder = Path(args.output_dir)
    return [
        "alpaca_eval",
        "--model_outputs",
        str(folder / "outputs.json"),
        "--name",
        args.name,
        "--output_path",
        str(folder),
        "--annotators_config",
        args.annotators_config,
        "--is_overwrite_leaderboard=True",
    ]  # fmt: skip  (else a policy of a known name is not judged again)


@program
def main(argv=None):
    args = eval_samples.read_flags(Args, argv, __doc__)
    rows = outputs(eval_samples.samples(args.samples, args, args.policy), args.name)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "outputs.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{folder / 'outputs.json'} written: {len(rows)} outputs of {args.name}")
    if len(rows) != 805:
        print("note: AlpacaEval has 805 prompts; a length-controlled win rate is only comparable over all of them")
    executable = shutil.which("alpaca_eval") or shutil.which("alpaca_eval", path=str(Path(sys.executable).parent))
    if not args.run or not executable:
        print(("alpaca-eval is not installed (pip install alpaca-eval); " if not executable else "") + "the command:")
        print("  " + shlex.join(command(args)))
        return
    done = subprocess.run([executable, *command(args)[1:]])
    if done.returncode:
        sft.stop(f"alpaca_eval failed (exit code {done.returncode}): its own message is above")
    board = folder / args.annotators_config / "leaderboard.csv"
    for row in csv.DictReader(board.open(encoding="utf-8")) if board.is_file() else ():
        if args.name in row.values():
            kept = {k: float(row[k]) for k in ("length_controlled_winrate", "win_rate", "standard_error") if row.get(k)}
            print(json.dumps(kept))
            eval_samples.save(kept, str(folder / "results.json"))


if __name__ == "__main__":
    main()
