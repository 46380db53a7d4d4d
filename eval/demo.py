"""Measure a demo folder of the toy world, where truth is known: runs/demo/*/final -> runs/demo/results.json.

    python eval/demo.py runs/demo

Every policy found there (any run folder with a causal model) is sampled on the held-out prompts and graded by the gold
reward, which no model was trained on, and by the reward model (`rm`, if there), the proxy that VCB and others learn
from. Snapshots of a policy in training give its line of reward against KL. The GVM (`gvm`, and `gvm_no_tau` if there) is
compared, token by token, with the exact values of the policies that wrote held-out texts, given a trajectory of the
right policy and one of another policy. Two yardsticks stand beside it: the best predictor that knows only the token's
position, and the Bayes-optimal predictor that knows all policies exactly and infers from tau and prefix which one is
writing.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import sample
import toy
from eval import calibration, diversity, program

SAMPLES = 8  # responses per held-out prompt
POINTS = 4  # responses per held-out prompt where there are snapshots: a point of the frontier
BEST_OF = (1, 2, 4, 8)
TEXTS = 60  # texts per policy for grading a GVM


def grade_policy(folder, reference, prompts, ids, rewards, args, seed: int, n: int = SAMPLES):
    """(row of results, what calibration.measure drew): n responses to each held-out prompt."""
    policy = calibration.Model(str(folder), reference.tokenizer, args, reference.device)
    found, drawn = calibration.measure(policy, reference, prompts, ids, n, seed, rewards)
    parsed = [
        toy.parse(prompt, text if whole else f"{text} {toy.UNK}")
        for prompt, text, whole in zip(drawn["prompt"], drawn["text"], drawn["complete"], strict=True)
    ]
    row = {
        "gold": found["reward"]["gold"],
        "malformed": float(np.mean([bad for bad, _ in parsed])),
        "clauses": float(np.mean([clauses for _, clauses in parsed])),
        "kl": found["kl"]["k1"],
        "length": found["length"]["mean"],
        "length_quartiles": found["length"]["quartiles"],
        "misaligned_gold": found["misaligned"]["gold"],
    }
    if n == SAMPLES:
        texts = [
            {"responses": [{"text": text} for text in drawn["text"][at : at + n]]} for at in range(0, len(parsed), n)
        ]
        found_diversity = diversity.measure(texts, str.split, len(toy.WORDS), n)
        row["diversity"] = {name: found_diversity[name]["mean"] for name in ("ead", "self_bleu_2", "self_bleu_3")}
    if "proxy" in rewards:
        mean, std = rewards["proxy"].mean, rewards["proxy"].std
        row["proxy"] = {"mean": (found["reward"]["proxy"]["mean"] - mean) / std}  # in the RM's standardised units
        row["misaligned"] = found["misaligned"]["proxy"]
    return row, drawn


def frontier(run: Path, reference, prompts, ids, rewards, args, seed: int) -> list[dict]:
    """A point {step, kl, gold, proxy} for each snapshot of a run."""
    points = []
    for folder in sorted((run / "snapshots").glob("step_*[0-9]")):
        row, _ = grade_policy(folder, reference, prompts, ids, rewards, args, seed, POINTS)
        point = {"step": int(folder.name.split("_")[1]), "kl": row["kl"], "gold": row["gold"]["mean"]}
        point["gold_ci95"] = row["gold"]["ci95"]
        points.append(point | ({"proxy": row["proxy"]["mean"]} if "proxy" in row else {}))
    return points


def best_of_n(drawn, rewards) -> list[dict]:
    """The same points for the best of n responses of the SFT policy by proxy reward, with the bound on its KL."""
    proxy, gold = drawn["reward"]["proxy"], drawn["reward"]["gold"]
    mean, std = rewards["proxy"].mean, rewards["proxy"].std
    return [
        {"n": row["n"], "kl": row["kl"], "proxy": (row["score"] - mean) / std, "gold": row["values"][0]}
        for row in calibration.best_of_n(proxy, BEST_OF, gold)
    ]


def stages(name: str, settings: dict) -> list[str]:
    """The runs that a run needs, itself last: a method's time includes training its teacher and sampling its data."""
    needs = [Path(settings[name][flag]).parent.name for flag in ("gvm", "reward_model") if settings[name].get(flag)]
    if str(settings[name].get("data", "")).endswith("graded.jsonl"):
        needs = stages(Path(settings[name]["data"]).parent.name, settings)
    return list(dict.fromkeys(["sft", *(x for x in needs if x in settings), name]))


def value_texts(policies, seed: int):
    """(policy, prompt, text, tau of the same policy, tau of another): TEXTS on held-out prompts of each policy; up to
    four pairs in a tau, on other held-out prompts."""
    rng = random.Random(seed)
    out = []
    for policy in policies:
        for prompt in rng.sample(toy.prompts("heldout"), TEXTS):
            others = [p for p in rng.sample(toy.prompts("heldout"), 5) if p != prompt][:4]
            other = rng.choice([p for p in policies if p != policy])
            out.append((policy, prompt, toy.write(policy, prompt, rng),
                        [(p, toy.write(policy, p, rng)) for p in others], [(p, toy.write(other, p, rng)) for p in others]))  # fmt: skip
    return out


def fit(pairs) -> dict:
    """Correlation and mean squared error of (prediction, truth) token values, over all tokens and over the first three."""
    found = {}
    for name, cut in (("all", None), ("first3", 3)):
        a, b = (np.concatenate([x[i][:cut] for x in pairs]) for i in (0, 1))
        correlation = float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 else 0.0
        found[name] = {"correlation": correlation, "mse": float(np.mean((a - b) ** 2))}
    return found


def gvm_values(folder, cases, tokenizer, args):
    """[(T,) values in gold units, ...] of cases (prompt, text, tau)."""
    model = gvm.load_model("value", str(folder), tokenizer, args, frozen=True)
    mean, std, tokens = model.config.reward_mean, model.config.reward_std, model.config.tau_tokens

    def answer(prompt, text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return gvm.Answer([{"role": "user", "content": prompt}], ids)

    groups = [[answer(*pair) for pair in tau] + [answer(prompt, text)] for prompt, text, tau in cases]
    settings = gvm.Args(tau_tokens=tokens)
    return [
        v[1:] * std + mean for v in gvm.predict(gvm.ValueModel(model), tokenizer, groups, settings, torch.device("cpu"))
    ]


def grade_gvm(folder, tokenizer, args, seed: int = 0, policies=toy.TRAIN_POLICIES) -> dict:
    texts = value_texts(policies, seed)
    config = json.loads((Path(folder) / "config.json").read_text())
    pairs = config["tau_pairs"]
    exact = [toy.exact_values(policy, prompt, text.split() + [toy.EOS])[1:] for policy, prompt, text, *_ in texts]
    found = {}
    for name, which in (("right_tau", 3), ("other_tau", 4), ("no_tau", None)):
        if which and not pairs:
            continue
        cases = [(row[1], row[2], row[which][:pairs] if which else []) for row in texts]
        found[name] = fit(list(zip(gvm_values(folder, cases, tokenizer, args), exact, strict=True)))
    return found


def yardsticks(pairs: int, seed: int = 0, policies=toy.TRAIN_POLICIES) -> dict:
    texts = value_texts(policies, seed)
    exact = [toy.exact_values(policy, prompt, text.split() + [toy.EOS])[1:] for policy, prompt, text, *_ in texts]
    by_position = [np.mean([x[t] for x in exact if len(x) > t]) for t in range(max(map(len, exact)))]
    bayes = {
        name: [toy.bayes_values(row[1], row[2].split() + [toy.EOS], row[3][:k])[1:] for row in texts]
        for name, k in (("bayes_tau", pairs), ("bayes_no_tau", 0))
    }
    guesses = {"position": [np.array(by_position[: len(x)]) for x in exact]} | bayes
    return {name: fit(list(zip(guess, exact, strict=True))) for name, guess in guesses.items()}


def share_of_way(gvm_results: dict, tokens: str = "all") -> float:
    """How far the GVM goes, in correlation, from knowing the position only (0) to Bayes-optimal with tau (1)."""
    yard = gvm_results["yardsticks"]
    low, high = (yard[name][tokens]["correlation"] for name in ("position", "bayes_tau"))
    return (gvm_results["right_tau"][tokens]["correlation"] - low) / (high - low)


def moved_aside(run: Path, args: dict) -> bool:
    """Whether a run is NAME.1, an earlier run of NAME; kl0.1 may be a name in its own right."""
    earlier = re.fullmatch(r"(.*)\.\d+", run.name)
    return bool(earlier) and Path(str(args.get("output_dir"))).name == earlier[1]


def folder_of(argv, doc: str) -> Path:
    """The one argument of this program and of the report."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "folder",
        nargs="?",
        default="runs/demo",
        type=Path,
        help="a demo's folder (report.py: or any run's), by default runs/demo",
    )
    return parser.parse_args(argv).folder


@program
def main(argv=None):
    folder = folder_of(argv, __doc__)
    if not (folder / "sft" / "final" / "config.json").is_file():
        gvm.stop(f"{folder} holds no demo: run `make demo` first")
    args = dvpo.Args(max_response_tokens=toy.MAX_RESPONSE_TOKENS, max_prompt_tokens=64)
    tokenizer, device = toy.tokenizer(), torch.device("cpu")
    summary = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/summary.json")}
    settings = {p.parent.name: json.loads(p.read_text()) for p in folder.glob("*/args.json")}
    seed = settings["sft"]["seed"]
    asked = calibration.Args(max_response_tokens=toy.MAX_RESPONSE_TOKENS)
    prompts, ids = calibration.load_prompts(asked, tokenizer)
    rewards = {"gold": sample.TextReward("gold", calibration.settings_of(asked), device)}
    if (folder / "rm" / "final").is_dir():
        proxy = sample.TextReward(str(folder / "rm" / "final"), calibration.settings_of(asked), device)
        rewards["proxy"] = proxy
    reference = calibration.Model(str(folder / "sft" / "final"), tokenizer, asked, device)
    results = {"methods": {}, "frontier": {}}
    for run in sorted(folder.glob("*/final/config.json"), key=lambda p: p.stat().st_mtime):
        name, config = run.parent.parent.name, json.loads(run.read_text())
        if config["architectures"] != ["LlamaForCausalLM"] or moved_aside(run.parent.parent, settings[name]):
            continue
        row, drawn = grade_policy(run.parent, reference, prompts, ids, rewards, asked, seed)
        row["seconds"] = round(sum(summary[x]["seconds"] for x in stages(name, settings) if x in summary), 1)
        row |= {"peak_memory_mb": summary.get(name, {}).get("peak_memory_mb"), "seed": settings[name]["seed"]}
        row |= {"steps": summary.get(name, {}).get("steps"), "advantage": settings[name].get("advantage")}
        results["methods"][name] = row
        if name == "sft" and "proxy" in rewards:
            results["best_of_n"] = best_of_n(drawn, rewards)
        elif points := frontier(run.parent.parent, reference, prompts, ids, rewards, asked, seed):
            results["frontier"][name] = points
    results["seconds"] = {name: s["seconds"] for name, s in summary.items()}
    for name in ("gvm", "gvm_no_tau"):
        if (folder / name / "final").is_dir():
            results[name] = grade_gvm(folder / name / "final", tokenizer, args, seed)
            results[name]["held_out_policies"] = grade_gvm(
                folder / name / "final", tokenizer, args, seed, toy.HELD_OUT_POLICIES
            )
    if "right_tau" in results.get("gvm", {}):
        # of policies outside its prior, "Bayes-optimal" is no bound: the held-out ones get the position yardstick only
        results["gvm"]["held_out_policies"]["position"] = yardsticks(0, seed, toy.HELD_OUT_POLICIES)["position"]
        pairs = json.loads((folder / "gvm" / "final" / "config.json").read_text())["tau_pairs"]
        results["gvm"]["yardsticks"] = yardsticks(pairs, seed)
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    for name, row in results["methods"].items():
        low, high = row["gold"]["ci95"]
        wrong = "" if row.get("misaligned") is None else f"misaligned {row['misaligned']:.1%}  "
        print(f"{name:14} gold {row['gold']['mean']:6.3f} [{low:.3f}, {high:.3f}]  malformed {row['malformed']:.1%}  {wrong}"
              f"KL {row['kl']:.2f}  tokens {row['length']:.1f}  {row['seconds']:.0f} s")  # fmt: skip
    if "yardsticks" in results.get("gvm", {}):
        for name in ("right_tau", "other_tau", "no_tau"):
            row = results["gvm"].get(name, {})
            print(
                f"gvm {name:10} "
                + "  ".join(f"{span}: correlation {v['correlation']:.3f} mse {v['mse']:.4f}" for span, v in row.items())
            )
        print(f"gvm goes {share_of_way(results['gvm']):.0%} of the way from position-only to Bayes-optimal")
    print(f"{folder / 'results.json'} written")


if __name__ == "__main__":
    main()
