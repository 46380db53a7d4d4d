"""What a run of experiments/run.py is worth, kept beside it as measured.json.

    python experiments/measure.py runs/experiments/seed10          # every run there that is finished

A policy: reward, KL, misalignment, length and diversity on the held-out prompts (eval/demo.py), a point for each snapshot, its
rollouts' curve, and how the GVM and the reward model read its finished texts. A value model: its
error against the exact values, with tau of the writer, of another, and with none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import toy
from eval import calibration, demo


class Bench:
    """One seed's reference, reward model, value model and held-out prompts, loaded once."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.seed = folder, seed
        self.args = calibration.Args(max_response_tokens=toy.MAX_RESPONSE_TOKENS)
        self.tokenizer, device = toy.tokenizer(), torch.device("cpu")
        self.prompts, self.ids = calibration.load_prompts(self.args, self.tokenizer)
        self.reference = calibration.Model(str(folder / "sft" / "final"), self.tokenizer, self.args, device)
        settings = calibration.settings_of(self.args)
        self.rewards = {
            "gold": sample.TextReward("gold", settings, device),
            "proxy": sample.TextReward(str(folder / "rm" / "final"), settings, device),
        }

    def policy(self, run: Path) -> dict:
        grade = lambda folder, n: demo.grade_policy(
            folder, self.reference, self.prompts, self.ids, self.rewards, self.args, self.seed, n
        )
        row, drawn = grade(run / "final", demo.SAMPLES)
        row["reading"] = self.reading(drawn)
        row["points"] = demo.frontier(run, self.reference, self.prompts, self.ids, self.rewards, self.args, self.seed)
        if (run / "final").parent.name == "sft":
            row["best_of_n"] = demo.best_of_n(drawn, self.rewards)
        metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if "gold" in metrics[-1]:
            row["curve"] = [{name: m[name] for name in ("step", "gold", "kl")} for m in metrics]
        return row

    def reading(self, drawn) -> dict:
        """Correlation with the gold reward of what the reward model and the GVM (no tau; tau of the same policy) say of the
        finished texts, over all and over the well-formed ones."""
        gold = drawn["reward"]["gold"].flatten()
        fine = np.array([not toy.parse(p, t)[0] for p, t in zip(drawn["prompt"], drawn["text"], strict=True)])
        fine &= np.array(drawn["complete"])
        said = {"rm": drawn["reward"]["proxy"].flatten()}
        n, texts = len(gold), list(zip(drawn["prompt"], drawn["text"], strict=True))
        pairs = json.loads((self.folder / "gvm" / "final" / "config.json").read_text())["tau_pairs"]
        others = lambda i: [texts[(i + (j + 1) * demo.SAMPLES) % n] for j in range(pairs)]
        for name, tau in (("gvm", others), ("gvm_no_tau_shown", lambda i: [])):
            cases = [(*texts[i], tau(i)) for i in range(n)]
            values = self.values(self.folder / "gvm", cases)
            said[name] = np.array([v[-1] for v in values])
        whole = lambda x, keep: float(np.corrcoef(x[keep], gold[keep])[0, 1]) if len(set(gold[keep])) > 1 else None
        return {name: {"all": whole(x, np.ones(n, bool)), "well_formed": whole(x, fine)} for name, x in said.items()}

    def value_model(self, run: Path) -> dict:
        """Fit to the exact values: by whose tau (eval/demo.py), and by how many pairs of the writer's."""
        grade = lambda policies: demo.grade_gvm(run / "final", self.tokenizer, self.reference.args, self.seed, policies)
        found = grade(toy.TRAIN_POLICIES) | {"held_out_policies": grade(toy.HELD_OUT_POLICIES), "pairs_shown": {}}
        pairs = json.loads((run / "final" / "config.json").read_text())["tau_pairs"]
        kinds = {"train": toy.TRAIN_POLICIES, "held_out": toy.HELD_OUT_POLICIES, "crowd": ("crowd",)}
        for kind, policies in kinds.items():
            texts = [x for x in demo.value_texts(sorted({*policies, "grouch"}), self.seed) if x[0] in policies]
            exact = [toy.exact_values(p, prompt, text.split() + [toy.EOS])[1:] for p, prompt, text, *_ in texts]
            found["pairs_shown"][kind] = {
                k: demo.fit(list(zip(self.values(run, [(x[1], x[2], x[3][:k]) for x in texts]), exact, strict=True)))
                for k in range(pairs + 1)
            }
        if run.name == "gvm":
            found["yardsticks"] = demo.yardsticks(pairs, self.seed)
        return found

    def values(self, run: Path, cases):
        return demo.gvm_values(run / "final", cases, self.tokenizer, self.reference.args)


def measured(bench: Bench, name: str):
    run = bench.folder / name
    if not (run / "summary.json").is_file() or not (run / "final").is_dir():
        return
    kept = run / "measured.json"
    if not kept.is_file():
        kind = json.loads((run / "final" / "config.json").read_text())["architectures"][0]
        if kind == "LlamaForCausalLM":
            found = bench.policy(run)
        elif kind == "LlamaForTokenClassification":
            found = bench.value_model(run)
        else:
            return
        found["summary"] = json.loads((run / "summary.json").read_text())
        kept.write_text(json.dumps(rounded(found)) + "\n")


def rounded(x):
    """To four significant digits: what is committed."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.4g}") if isinstance(x, float) else x


def main():
    folder = Path(sys.argv[1])
    bench = Bench(folder, json.loads((folder / "sft" / "args.json").read_text())["seed"])
    for run in sorted(path.parent for path in folder.glob("*/args.json")):
        if not demo.moved_aside(run, json.loads((run / "args.json").read_text())):
            measured(bench, run.name)


if __name__ == "__main__":
    main()
