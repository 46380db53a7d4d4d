"""Scores of a sample file with noise of so many of their standard deviations: what a worse reward model would have said.

python experiments/noisy.py --data runs/sample/graded.jsonl --noise 1 --seed 0 --output_dir runs/noisy
"""

import json
import random
import statistics
from dataclasses import dataclass
from pathlib import Path

import tyro


@dataclass
class Args:
    data: str
    """rows with `responses: [{text, score}]`"""
    output_dir: str
    """the folder that graded.jsonl and summary.json are written to"""
    noise: float = 1.0
    """standard deviation of what is added, in standard deviations of all scores"""
    seed: int = 0
    """seed of the noise"""


def main(argv=None):
    args = tyro.cli(Args, args=argv, use_underscores=True)
    rows = [json.loads(line) for line in Path(args.data).read_text().splitlines()]
    answers = [answer for row in rows for answer in row["responses"]]
    width = args.noise * statistics.pstdev(answer["score"] for answer in answers)
    rng = random.Random(args.seed)
    for answer in answers:
        answer["score"] = round(answer["score"] + rng.gauss(0, width), 4)
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "graded.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps({"noise": width}) + "\n")


if __name__ == "__main__":
    main()
