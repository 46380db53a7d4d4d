"""The demo for several seeds: runs/seedN for each, gathered in bench/results/toy.json.

    python bench/toy.py                       # seeds 10 to 14, one after the other
    python bench/toy.py 10 11                 # only these; finished ones are not run again

World and settings were tuned on seeds 0 and 1. The interval is over seeds (Student's t), each seed being a new draw of the
data, the initial weights, the sampling and the texts that values are graded on: everything but the prompts. Times are left out: seeds may have run side by side.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
T95 = {
    2: 12.71,
    3: 4.30,
    4: 3.18,
    5: 2.78,
    6: 2.57,
    7: 2.45,
    8: 2.36,
}  # 97.5 % quantile of Student's t for n - 1 degrees of freedom


def gather(x: list) -> dict | None:
    """Results of one shape -> the same shape, each number as {mean, ci95, seeds}."""
    if isinstance(x[0], dict):
        return {key: gather([one[key] for one in x]) for key in x[0] if key not in ("seed", "seconds", "advantage")}
    if not isinstance(x[0], (int, float)):
        return None
    half = T95[len(x)] * np.std(x, ddof=1) / len(x) ** 0.5
    return {"mean": np.mean(x), "ci95": [np.mean(x) - half, np.mean(x) + half], "seeds": x}


def main():
    seeds = [int(x) for x in sys.argv[1:]] or [10, 11, 12, 13, 14]
    for seed in seeds:
        folder = Path(f"runs/seed{seed}")
        if not (ROOT / folder / "results.json").is_file():
            subprocess.run(["make", "demo", f"DEMO={folder}", f"SEED={seed}"], cwd=ROOT, check=True)
    found = {seed: json.loads((ROOT / "runs" / f"seed{seed}" / "results.json").read_text()) for seed in seeds}
    if len(found) > 1:
        out = ROOT / "bench" / "results" / "toy.json"
        out.write_text(json.dumps({"seeds": list(found), **gather(list(found.values()))}, indent=1) + "\n")
        print(f"{out} written: seeds {list(found)}")


if __name__ == "__main__":
    main()
