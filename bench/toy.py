"""The demo for several seeds: runs/seedN for each, gathered in bench/results/toy.json.

    python bench/toy.py                       # `make demo`, seeds 10 to 14, one after the other
    python bench/toy.py --all 10 11 12        # `make demo-all`: bench/results/toy_all.json and pictures in docs/

World and settings were tuned on seeds 0 and 1. The interval is over seeds (Student's t), each seed being a new draw of the
data, the initial weights, the sampling and the texts that values are graded on: everything but the prompts. Runs that
are finished (results.json) are not run again. Times are left out: seeds may have run side by side.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
# 97.5 % quantile of Student's t for n - 1 degrees of freedom
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def gather(x: list):
    """Results of one shape -> the same shape, each number as {mean, ci95, seeds}; what is not a number is left out."""
    if isinstance(x[0], dict):
        skip = ("seed", "seconds", "advantage", "ci95", "gold_ci95", "length_quartiles")
        found = {key: gather([one[key] for one in x]) for key in x[0] if key not in skip}
        return {key: value for key, value in found.items() if value is not None}
    if isinstance(x[0], list):
        return [gather(list(row)) for row in zip(*x, strict=True)]
    if not all(isinstance(one, (int, float)) for one in x):
        return None
    half = T95[len(x)] * np.std(x, ddof=1) / len(x) ** 0.5
    return {"mean": np.mean(x), "ci95": [np.mean(x) - half, np.mean(x) + half], "seeds": x}


def means(found):
    """The means of what `gather` gives."""
    if isinstance(found, list):
        return [means(row) for row in found]
    return found["mean"] if "seeds" in found else {key: means(value) for key, value in found.items()}


def mean_curves(folders: list[Path], methods) -> dict:
    """Method -> [{step, gold, kl}], the mean over seeds, of methods that log both."""
    curves = {}
    for name in methods:
        paths = [folder / name / "metrics.jsonl" for folder in folders]
        rows = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
        if all("gold" in row and "kl" in row for some in rows for row in some):
            curves[name] = [
                {key: float(np.mean([row[key] for row in step])) for key in ("step", "gold", "kl")}
                for step in zip(*rows, strict=True)
            ]
    return curves


def pictures(results: dict, folders: list[Path]):
    from eval import report

    methods = means(results["methods"])
    rows = {"methods": methods, "frontier": means(results["frontier"])}
    for row in methods.values():
        row["gold"] |= {"ci95": [row["gold"]["mean"]] * 2}
    lines = report.frontier_lines(rows)
    report.png(report.draw_frontier, lines, means(results["best_of_n"]), path=ROOT / "docs" / "frontier.png")
    curves = mean_curves(folders, methods)
    report.png(report.draw_curves, curves, methods["sft"]["gold"]["mean"], path=ROOT / "docs" / "learning_curves.png")


def main():
    whole = "--all" in sys.argv
    seeds = [int(x) for x in sys.argv[1:] if x != "--all"] or [10, 11, 12, 13, 14]
    folders = [ROOT / "runs" / f"seed{seed}" for seed in seeds]
    for seed, folder in zip(seeds, folders, strict=True):
        if not (folder / "results.json").is_file():
            target = "demo-all" if whole else "demo"
            subprocess.run(["make", target, f"DEMO=runs/seed{seed}", f"SEED={seed}"], cwd=ROOT, check=True)
    found = [json.loads((folder / "results.json").read_text()) for folder in folders]
    if len(found) < 2:
        return
    results = gather(found)
    out = ROOT / "bench" / "results" / ("toy_all.json" if whole else "toy.json")
    out.write_text(json.dumps({"seeds": seeds, **results}, indent=1) + "\n")
    if whole:
        pictures(results, folders)
    print(f"{out} written: seeds {seeds}")


if __name__ == "__main__":
    main()
