"""Tables of EXPERIMENTS.md and of the README's toy world, from experiments/*.json.

    python experiments/page.py            # rewrites what stands between <!-- table NAME --> and <!-- end -->
    python experiments/page.py --check    # says what differs, writes nothing; exit code 1 if something does

A number is the mean over seeds, with its 95 % interval (Student's t) in brackets; a dash where nothing was measured.
"""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
# 97.5 % quantile of Student's t for n - 1 degrees of freedom
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}

NAMES = {
    "sft": "SFT", "dvpo": "DVPO, `gae`", "dvpo_q": "DVPO, `q` (paper)", "ppo": "PPO", "remax": "ReMax", "rloo": "RLOO",
    "grpo": "GRPO", "reinforce++": "REINFORCE++", "vcb": "VCB", "dpo": "DPO", "ipo": "IPO", "slic": "SLiC", "rrhf": "RRHF",
    "rest": "ReST", "ppo_gold": "PPO, gold reward", "ppo_rm_2_epochs": "PPO, reward model of two epochs", "dvpo_exact_q": "DVPO, exact Q of the SFT mixture",
    "dvpo_eos_penalty": "DVPO, `--eos_penalty 1`",
    "dvpo_lam_1": "`gae`, λ = 1 (Q_T − V)", "dvpo_q_minus_v": "`gae`, λ = 0 (Q − V)", "dvpo_q_position": "`q` less its position's mean",
    "dvpo_q_start": "`q` less V(s_1)", "dvpo_released": "the released code's form", "dvpo_no_tau": "GVM trained without τ",
    "dvpo_no_tau_shown": "GVM trained with τ, none shown", "dvpo_other_tau": "another policy's τ", "dvpo_all_tokens": "no outcome share",
    "dvpo_td_95": "TD(0.95)", "dvpo_td_0": "TD(0), eq. 1", "dvpo_eq_2": "eq. 2 in the loss", "vcb_full": "VCB, all i ≠ j",
    "vcb_mean": "VCB, mean of pairs", "dpo_length_penalty": "DPO, length penalty 0.1", "vcb_n_2": "VCB, n = 2", "vcb_n_4": "VCB, n = 4",
    "vcb_n_8": "VCB, n = 8", "vcb_noise_1": "VCB, noisy scores", "dpo_noise_1": "DPO, noisy scores", "rest_noise_1": "ReST, noisy scores",
    "rm": "reward model", "astar": "A*-PO, four updates a rollout", "astar_once": "A*-PO, one update a rollout", "online_dpo": "online DPO",
}  # fmt: skip
FORMS = {  # experiments/probes.py: values, and the advantage made of them
    f"{values}_{form}": f"{said}: {text}"
    for values, said in (("gvm", "GVM"), ("exact", "exact Q"))
    for form, text in (("q", "q (paper)"), ("q_position", "q less its position's mean"), ("q_start", "q less V(s_1)"),
                       ("q_minus_v", "Q − V"), ("gae", "gae, λ 0.95"), ("lam_1", "gae, λ 1"))
} | {"reward_gold": "gold reward less its mean", "reward_rm": "reward model's less its mean"}  # fmt: skip

YARDSTICKS = {
    "position": "the mean at a token's position",
    "bayes_no_tau": "Bayes-optimal, no τ",
    "bayes_tau": "Bayes-optimal, two pairs of τ",
}


MARK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.S)
LOGGED = {"sft": ("sft",), "rm": ("rm",), "gvm": ("gvm",), "dvpo": ("dvpo", "dvpo_q"), "ppo": ("ppo",), "vcb": ("vcb",), "rest": ("rest",),
          "dpo": ("dpo", "ipo", "slic", "rrhf"), "reinforce": ("remax", "rloo", "grpo", "reinforce++")}  # fmt: skip
PAGES = ("EXPERIMENTS.md", "README.md", "docs/faults.md", "docs/toy.md")
NOT_YET = "*Not run yet.*"


class Found:
    """experiments/toy.json: what runs measured, a number a seed."""

    def __init__(self, report: dict):
        self.runs, self.seeds, self.code = report["runs"], report["seeds"], report["code"]
        self.probes = report.get("probes", {})

    def probed(self, *path) -> np.ndarray:
        """One number a seed, of experiments/probes.py."""
        return np.array([math.nan if (x := _dig(one, path)) is None else x for one in self.probes.values()], float)

    def numbers(self, run: str, *path) -> np.ndarray:
        """One number a seed, NaN where the run or the number is missing."""
        out = []
        for seed in self.seeds:
            value = self.runs.get(run, {}).get(str(seed))
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            out.append(math.nan if value is None else float(value))
        return np.array(out)


def interval(x: np.ndarray) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds."""
    x = x[~np.isnan(x)]
    if len(x) < 2:
        return (float(x[0]) if len(x) else math.nan), math.nan, math.nan
    half = T95[len(x)] * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def shown(x: np.ndarray, digits: int = 2, percent: bool = False, bounds: bool = True) -> str:
    mean, low, high = (v * 100 if percent else v for v in interval(np.asarray(x, float)))
    if math.isnan(mean):
        return "–"
    text = f"{mean:.{digits}f}{' %' if percent else ''}"
    text += f" [{low:.{digits}f}, {high:.{digits}f}]" if bounds and not math.isnan(low) else ""
    return text.replace("-", "−")


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in lines)


COLUMNS = {  # title -> (path, digits, in per cent, with interval)
    "gold reward": (("gold", "mean"), 2, False, True),
    "proxy (RM)": (("proxy", "mean"), 2, False, False),
    "KL to SFT": (("kl",), 1, False, True),
    "malformed": (("malformed",), 1, True, True),
    "misaligned": (("misaligned",), 1, True, False),
    "misaligned (gold)": (("misaligned_gold",), 1, True, False),
    "tokens": (("length",), 1, False, False),
    "EAD": (("diversity", "ead"), 2, False, False),
    "Self-BLEU-2": (("diversity", "self_bleu_2"), 2, False, False),
}


def policies(
    found: Found, names, columns=("gold reward", "KL to SFT", "malformed", "tokens"), against: str = ""
) -> str:
    head = ["", *columns, *([f"gold − {NAMES[against]}, paired"] if against else [])]
    rows, missing = [], [NAMES.get(name, name) for name in names if name not in found.runs]
    for name in (name for name in names if name in found.runs):
        row = [NAMES.get(name, f"`{name}`")]
        row += [shown(found.numbers(name, *COLUMNS[c][0]), *COLUMNS[c][1:]) for c in columns]
        if against:
            gap = found.numbers(name, "gold", "mean") - found.numbers(against, "gold", "mean")
            row.append("–" if name == against else shown(gap))
        rows.append(row)
    if len(rows) < 1 + bool(against):
        return NOT_YET
    return table(head, rows) + (f"\n\n*Not run yet: {', '.join(missing)}.*" if missing else "")


def at_kl(found: Found, name: str, kl: float, window: int = 5) -> np.ndarray:
    """Gold reward where a run first comes to this KL, one number a seed: along the five-step means of its rollouts or, off
    policy, between SFT and its snapshots."""
    out = []
    for seed in found.seeds:
        row = found.runs.get(name, {}).get(str(seed))
        if row is None:
            out.append(math.nan)
            continue
        points = [(0.0, found.runs["sft"][str(seed)]["gold"]["mean"])]
        if "curve" in row:
            mean = lambda key, row=row: np.convolve(
                [step[key] for step in row["curve"]], np.ones(window) / window, "valid"
            )
            points += list(zip(mean("kl"), mean("gold"), strict=True))
        else:
            points += sorted([(p["kl"], p["gold"]) for p in row["points"]] + [(row["kl"], row["gold"]["mean"])])
        there = next((i for i, point in enumerate(points) if point[0] >= kl), None)
        inside = points[max(0, (there or 0) - 1) : (there or 0) + 1]
        out.append(math.nan if there is None else float(np.interp(kl, *zip(*inside, strict=True))))
    return np.array(out)


def equal_kl(found: Found, names, levels=(1.0, 2.0, 3.0, 4.0)) -> str:
    rows = [[NAMES.get(name, name), *(shown(at_kl(found, name, kl)) for kl in levels)] for name in names]
    return table(["gold reward at a KL of", *(f"{kl:g} nats" for kl in levels)], rows)


def curve(found: Found, name: str, key: str = "gold") -> np.ndarray:
    """(seeds, steps)."""
    rows = [found.runs[name][str(seed)]["curve"] for seed in found.seeds]
    return np.array([[step[key] for step in row] for row in rows])


def steps_to(found: Found, name: str, share: float = 0.95, window: int = 10) -> np.ndarray:
    """The step at which a run's ten-step mean first comes so far of the way from SFT to PPO's plateau (its last ten), a number a
    seed; NaN where it never does."""
    out = []
    for seed, one, ppo in zip(found.seeds, curve(found, name), curve(found, "ppo"), strict=True):
        start = found.runs["sft"][str(seed)]["gold"]["mean"]
        goal = start + share * (ppo[-window:].mean() - start)
        means = np.convolve(one, np.ones(window) / window, "valid")
        there = np.flatnonzero(means >= goal)
        out.append(float(there[0] + window) if len(there) else math.nan)
    return np.array(out)


def lowest(found: Found, name: str, after: int = 30, window: int = 10) -> np.ndarray:
    """The lowest ten-step mean of gold reward after so many steps, a number a seed: a run that breaks down shows here."""
    rows = curve(found, name)
    if rows.shape[1] < after + window:
        return np.full(len(rows), math.nan)
    return np.array([np.convolve(one[after:], np.ones(window) / window, "valid").min() for one in rows])


def broken(found: Found, name: str, fall: float = 0.5) -> list[str]:
    """The seeds on which a run's ten-step mean after step 30 falls so far below what it had at steps 21 to 30."""
    before = curve(found, name)[:, :30][:, -10:].mean(1)
    return [
        str(seed) for seed, low, high in zip(found.seeds, lowest(found, name), before, strict=True) if low < high - fall
    ]


def plateau(found: Found, names) -> str:
    rows = []
    for name in (name for name in names if name in found.runs):
        steps = steps_to(found, name)
        reached = f"{(~np.isnan(steps)).sum()} of {len(steps)}"
        worst = np.nanmin(found.numbers(name, "gold", "mean"))
        low = shown(lowest(found, name).min(keepdims=True))
        rows.append([NAMES[name], shown(steps, 0), reached, f"{worst:.2f}".replace("-", "−"), low])
    return table(
        [
            "",
            "steps to 95 % of PPO's plateau",
            "seeds that reach it",
            "gold of the worst seed",
            "lowest ten-step mean after step 30, worst seed",
        ],
        rows,
    )


def values(found: Found, names, yardsticks: bool = False) -> str:
    rows = []
    for name, label in names:
        for which, text in (("right_tau", "the writer's τ"), ("other_tau", "another's τ"), ("no_tau", "no τ")):
            path = [(which, span, kind) for kind in ("correlation", "mse") for span in ("all", "first3")]
            cells = [shown(found.numbers(name, *p), 3) for p in path]
            if cells[0] != "–" and name in found.runs:
                rows.append([f"{label}, {text}", *cells])
    for which, text in YARDSTICKS.items() if yardsticks else ():
        path = [("yardsticks", which, span, kind) for kind in ("correlation", "mse") for span in ("all", "first3")]
        rows.append([text, *(shown(found.numbers("gvm", *p), 3) for p in path)])
    return table(["GVM", "correlation, all tokens", "first three", "MSE, all tokens", "first three"], rows)


def pairs_shown(found: Found) -> str:
    rows = []
    for kind, title in (
        ("train", "policies it was trained on"),
        ("held_out", "never seen"),
        ("crowd", "a mixture (as SFT)"),
    ):
        row = [title]
        for k in (0, 1, 2):
            row.append(shown(found.numbers("gvm", "pairs_shown", kind, str(k), "all", "correlation"), 3))
        for k in (0, 1, 2):
            row.append(shown(found.numbers("gvm", "pairs_shown", kind, str(k), "first3", "mse"), 3, bounds=False))
        rows.append(row)
    head = [f"correlation, τ of {k}" for k in (0, 1, 2)] + [f"MSE of the first three, τ of {k}" for k in (0, 1, 2)]
    return table(["texts by", *head], rows)


def readings(found: Found, names) -> str:
    rows = []
    for name in names:
        cells = [
            shown(found.numbers(name, "reading", who, which), bounds=False)
            for which in ("all", "well_formed")
            for who in ("gvm", "gvm_no_tau_shown", "rm")
        ]
        rows.append([NAMES.get(name, name), shown(found.numbers(name, "kl"), 1, bounds=False), *cells])
    head = ["texts of", "KL to SFT", "Q_T", "Q_T, no τ shown", "RM", "Q_T, well-formed", "no τ shown", "RM"]
    return table(head, rows)


def tuning(report: dict) -> str:
    rows = []
    for name, tried in report["methods"].items():
        best = next(row for row in tried if row["chosen"])
        rest = [f"{row['kl']:.1f}" for row in tried]
        rows.append(
            [
                NAMES[name],
                best["kl_coef"],
                best["learning_rate"],
                f"{best['seen']:.2f}",
                f"{best['kl']:.1f}",
                ", ".join(rest),
            ]
        )
    return table(["", "β", "learning rate", "what it saw, last ten steps", "KL", "KL of the six settings"], rows)


def sentiment(report: dict) -> str:
    rows = {}
    for name, row in report["policies"].items():
        rows.setdefault(name.split("-")[0], []).append(row)
    out = []
    for name, found in rows.items():
        mean = lambda *path, found=found: np.array([_dig(row, path) for row in found])
        out.append([f"{NAMES[name]}{f', {len(found)} seeds' if len(found) > 1 else ''}", shown(mean("gold", "mean")),
                    shown(mean("tone"), bounds=False), shown(mean("fluent"), 0, True, False), shown(mean("kl"), 1, bounds=False),
                    shown(mean("base_perplexity"), 0, bounds=False), shown(mean("length"), 1, bounds=False)])  # fmt: skip
    return table(["", "gold reward", "VADER", "fluent", "KL to SFT", "perplexity (base model)", "tokens"], out)


def sentiment_samples(report: dict, prompts: int = 3) -> str:
    """The first answer of each method (of RL the first seed) to the first held-out prompts."""
    first = {}
    for name, row in report["policies"].items():
        first.setdefault(name.split("-")[0], row["samples"])
    asked = [one["prompt"] for one in first["sft"][:prompts]]
    rows = [
        [NAMES[name], *(one["text"].replace("\n", " ").replace("|", "\\|") for one in some[:prompts])]
        for name, some in first.items()
    ]
    return table(["", *asked], rows)


SCORERS = {"whole_length": "length of the whole text", "rm": "reward model", "gvm": "GVM, τ of the writer", "gvm_no_tau_shown": "the same GVM, no τ shown",
           "gvm_no_tau": "GVM trained without τ"}  # fmt: skip


def scored(report: dict, part: str, scorer: str) -> dict:
    """{mean, ci95} of one scorer's pair accuracy (a GVM's by the mean of its token values)."""
    found = report["accuracy"][part]
    if scorer == "whole_length":
        return found[scorer]
    return found["gvm"]["reward_model"] if scorer == "rm" else found[scorer]["gvm"]["mean"]


def rate(found: dict) -> str:
    return f"{100 * found['mean']:.1f} % [{100 * found['ci95'][0]:.1f}, {100 * found['ci95'][1]:.1f}]"


def real_policies(report: dict) -> str:
    rows = [
        [text, *(rate(scored(report, part, name)) for part in ("seen", "unseen"))] for name, text in SCORERS.items()
    ]
    return table(["pairs in the judge's order", "policies of training", "policies held out"], rows)


def answer_real_policies(report: dict) -> str:
    said = []
    for part, text in (("seen", "Of policies it was trained on"), ("unseen", "Of policies never seen")):
        tau, none = (scored(report, part, name) for name in ("gvm", "gvm_no_tau"))
        apart = tau["ci95"][0] > none["ci95"][1] or none["ci95"][0] > tau["ci95"][1]
        said.append(f"{text}, the GVM with τ orders {rate(tau)} of the pairs, the one trained without {rate(none)}: "
                    f"{'a difference' if apart else 'no difference beyond the intervals, which are over prompts'}.")  # fmt: skip
    return f"**Answer.** {' '.join(said)}"


def claim_sentiment(report: dict) -> str:
    found = {}
    for name, row in report["policies"].items():
        found.setdefault(name.split("-")[0], []).append(row["gold"]["mean"])
    at = {name: f"{np.mean(x):.2f}".replace("-", "−") for name, x in found.items()}
    return (
        f"A real model: in controlled sentiment on {report['model']} gold reward, at most 1, goes from {at['sft']} to {at['dvpo']} by DVPO, "
        f"{at['ppo']} by PPO, {at['vcb']} by VCB and {at['dpo']} by DPO, [with samples, KL and perplexity](EXPERIMENTS.md#a-real-language-model)."
    )  # fmt: skip


def answer_sentiment(report: dict) -> str:
    runs = {}
    for name, row in report["policies"].items():
        runs.setdefault(name.split("-")[0], []).append(row)
    number = lambda name, *path: f"{np.mean([_dig(row, path) for row in runs[name]]):.2f}".replace("-", "−")
    each = "; ".join(
        f"{NAMES[name]} {number(name, 'gold', 'mean')} at a KL of {number(name, 'kl')}"
        for name in runs
        if name != "sft"
    )
    of = lambda name: np.array([_dig(row, ("gold", "mean")) for row in runs[name]])
    return (
        f"**Answer.** From {number('sft', 'gold', 'mean')} of the SFT policy gold reward comes to {each}. DVPO's is {word(of('dvpo') - of('ppo'))} PPO's "
        f"(difference {shown(of('dvpo') - of('ppo'))} by RL seed), with {number('dvpo', 'length')} tokens a sentence against {number('ppo', 'length')}."
    )  # fmt: skip


def logged(report: dict, names) -> str:
    """Each metric of a script's runs: at the first step and over the last ten, the least and the greatest of the seeds."""
    runs = [[name, report["logged"][name]] for name in names]
    keys = list(dict.fromkeys(key for _, seeds in runs for one in seeds.values() for key in one))

    def cell(seeds, key, at):
        x = sorted(one[key][at] for one in seeds.values() if key in one)
        low, high = (f"{v:.3g}".replace("-", "−") for v in (x[0], x[-1])) if x else ("–", "–")
        return low if low == high else f"{low} to {high}"

    head = [
        "",
        *(f"{NAMES.get(name, name)}: first step" if at == 0 else "last ten" for name, _ in runs for at in (0, 1)),
    ]
    return table(head, [[f"`{key}`", *(cell(seeds, key, at) for _, seeds in runs for at in (0, 1))] for key in keys])


def gradients(found: Found) -> str:
    rows = [
        [text, shown(found.probed("gradient", name, "cosine")), shown(found.probed("gradient", name, "noise"), 1)]
        for name, text in FORMS.items()
    ]
    return table(["advantage", "cosine with exact Q − V", "noise over signal, batch of 32"], rows)


def teachers(found: Found) -> str:
    """Theorem 3.1: the SFT policy's values from the GVM and from the reward model."""
    names = {"gvm": "GVM, τ of the SFT policy's own", "gvm_no_tau_shown": "GVM, no τ shown", "rm_1": "reward model, 1 continuation",
             "rm_4": "reward model, mean of 4", "rm_8": "reward model, mean of 8", "gold_1": "gold reward, 1 continuation"}  # fmt: skip
    spans = ("all", "first", "later")
    rows = [
        [text, *(shown(found.probed("teachers", "correlation", name, span)) for span in spans)]
        for name, text in names.items()
    ]
    return table(["correlation with the policy's own values", "all places", "after the first token", "later"], rows)


def moved(found: Found) -> str:
    rows, steps = [], [one["moved"] for one in found.probes.values()]
    for i, point in enumerate(steps[0]):
        at = lambda *path, i=i: shown([_dig(some[i], path) for some in steps])
        own, none = (at("correlation", name, "all") for name in ("gvm", "gvm_no_tau_shown"))
        noise = np.array([one[i]["noise"] for one in steps], float)  # none where all texts are worth the same
        most = shown(np.sqrt(np.maximum(1 - noise, 0)), bounds=False)
        rows.append([str(point["step"]), at("kl"), at("gold"), own, none, most])
    return table(
        [
            "step",
            "KL to SFT",
            "gold reward",
            "correlation, τ of its own",
            "no τ shown",
            "most that the truth's noise allows",
        ],
        rows,
    )


def implicit(found: Found) -> str:
    keys = ("gold", "proxy", "length", "gold_linear")
    names = [name for name in next(iter(found.probes.values()))["implicit"]]
    rows = []
    for name in names:
        digits = lambda key: (1, True) if key in ("gold", "proxy") else (2, False)
        cells = [shown(found.probed("implicit", name, key), *digits(key)) for key in keys]
        rows.append(
            [NAMES[name], *("–" if (name, key) == ("rm", "proxy") else x for key, x in zip(keys, cells, strict=True))]
        )
    return table(["", "pairs in the gold order", "in the reward model's", "correlation with length", "with gold"], rows)


def word(gap: np.ndarray) -> str:
    """How one number stands to another, of their paired differences over seeds."""
    _, low, high = interval(gap)
    return "above" if low > 0 else "below" if high < 0 else "not distinguishable from"


def against(found: Found, one: str, other: str, *path) -> str:
    """`above PPO's (0.05 [0.01, 0.09])`."""
    gap = found.numbers(one, *path) - found.numbers(other, *path)
    return f"{word(gap)} {NAMES[other].replace('`', '')}'s (difference {shown(gap)})"


GOLD = ("gold", "mean")


def answer_values(found: Found) -> str:
    at = lambda which, span, kind="correlation": shown(found.numbers("gvm", which, span, kind), bounds=False)
    yard = lambda which: shown(found.numbers("gvm", "yardsticks", which, "all", "correlation"), bounds=False)
    held = lambda which: shown(found.numbers("gvm", "held_out_policies", which, "all", "correlation"), bounds=False)
    return (
        f"**Answer.** For the token values of policies like those it was trained on, τ does it: with the writer's τ the correlation over the first three tokens is {at('right_tau', 'first3')}, with "
        f"none shown {at('no_tau', 'first3')}, with another policy's {at('other_tau', 'first3')}; over all tokens {at('right_tau', 'all')} "
        f"({yard('bayes_tau')} is Bayes-optimal). Of policies never seen it is {held('right_tau')} over all tokens, {held('no_tau')} with none shown."
    )  # fmt: skip


def answer_moved(found: Found) -> str:
    at = lambda i, name: shown(
        [one["moved"][i]["correlation"][name]["all"] for one in found.probes.values()], bounds=False
    )
    kl = shown([one["moved"][-1]["kl"] for one in found.probes.values()], 1, bounds=False)
    start = lambda name: shown(found.probed("teachers", "correlation", name, "all"), bounds=False)
    return (
        f"For a mixture it misleads: of the SFT policy's own values the GVM knows {start('gvm')} with τ of its texts and {start('gvm_no_tau_shown')} with none "
        f"(correlation). And a frozen value model loses most of what it knows of a policy that moves: of DVPO's at a KL of {kl}, {at(-1, 'gvm')} "
        f"and {at(-1, 'gvm_no_tau_shown')}."
    )  # fmt: skip


def answer_ppo(found: Found) -> str:
    kl = lambda name: shown(found.numbers(name, "kl"), 1, bounds=False)
    level = next((x for x in (4.0, 3.5, 3.0) if not np.isnan(at_kl(found, "dvpo", x)).any()), 2.0)
    gap = at_kl(found, "dvpo", level) - at_kl(found, "ppo", level)
    steps, fell = steps_to(found, "dvpo"), broken(found, "dvpo")
    others = [NAMES[name] for name in ON[2:] if name in found.runs and broken(found, name)]
    trouble = ""
    if fell:
        at = [found.seeds.index(int(seed)) for seed in fell]
        low, end = lowest(found, "dvpo")[at].min(), found.numbers("dvpo", *GOLD)[at]
        peak = max(np.convolve(one, np.ones(10) / 10, "valid").max() for one in curve(found, "dvpo", "kl")[at])
        trouble = (
            f" **On seed {', '.join(fell)} it broke down on the way**: a ten-step mean of gold as low as {low:.2f}, of KL as high as {peak:.0f}, and "
            f"{', '.join(f'{x:.2f}' for x in end)} in the end; {'so did ' + ', '.join(others) if others else 'no other method did'}."
        ).replace("-", "−").replace("ten−step", "ten-step")  # fmt: skip
    return (
        f"**Answer.** DVPO's gold reward is {against(found, 'dvpo', 'ppo', *GOLD)}, at a KL of {kl('dvpo')} against {kl('ppo')}; where "
        f"rollouts first come to a KL of {level:.1f} nats it is {word(gap)} PPO's ({shown(gap)}). It comes to 95 % of the way to PPO's plateau on {(~np.isnan(steps)).sum()} of "
        f"{len(steps)} seeds.{trouble} The paper's own advantage, `q`, is {against(found, 'dvpo_q', 'ppo', *GOLD)}. What DVPO saves is the critic, the "
        "reward model and half of an update ([docs/ppo_to_dvpo.md](docs/ppo_to_dvpo.md)), not steps."
    )  # fmt: skip


def gold(found: Found, name: str) -> str:
    return shown(found.numbers(name, *GOLD), bounds=False)


def answer_tau(found: Found) -> str:
    """What tau does for the policy."""
    names = {
        "dvpo_no_tau_shown": "the same GVM with none shown",
        "dvpo_no_tau": "a GVM trained without",
        "dvpo_other_tau": "another policy's τ",
    }
    if not set(names) <= found.runs.keys():
        return NOT_YET
    rest = "; ".join(
        f"with {text} {gold(found, name)} (difference {shown(found.numbers(name, *GOLD) - found.numbers('dvpo', *GOLD))})"
        for name, text in names.items()
    )
    worse = [interval(found.numbers(name, *GOLD) - found.numbers("dvpo", *GOLD))[2] < 0 for name in names]
    seen = (
        "a gain from τ is seen"
        if all(worse)
        else "no gain from τ is seen"
        if not any(worse)
        else "not all tell the same"
    )
    return f"For the policy {seen}: DVPO's gold reward is {gold(found, 'dvpo')} with τ of its own rollout; {rest}."


def answer_2(found: Found) -> str:
    names = {
        "gvm_no_tau": "ours",
        "gvm_all_tokens": "Monte-Carlo without the outcome's share",
        "gvm_td_95": "TD(0.95)",
        "gvm_td_0": "TD(0)",
        "gvm_eq_2": "eq. 2 inside the loss",
    }
    policies = dict(zip(names, ("dvpo_no_tau", "dvpo_all_tokens", "dvpo_td_95", "dvpo_td_0", "dvpo_eq_2"), strict=True))
    there = [name for name in names if name in found.runs and policies[name] in found.runs]
    if len(there) < len(names):
        return NOT_YET
    fit = lambda name: shown(found.numbers(name, "no_tau", "all", "correlation"), bounds=False)
    rest = "; ".join(f"{names[name]} {fit(name)} and {gold(found, policies[name])}" for name in there)
    return (
        f"**Answer.** Correlation with the exact values, and gold reward of the policy that DVPO makes of it: {rest}."
    )


def answer_breakdown(found: Found) -> str:
    """How DVPO broke down, where else that was seen, and what a penalty on cut answers does."""
    names = {
        "dvpo_eos_penalty": "`--eos_penalty 1`",
        "dvpo_no_tau": "the GVM trained without τ",
        "dvpo_no_tau_shown": "no τ shown",
        "dvpo_exact_q": "exact values",
    }
    if not names.keys() <= found.runs.keys():
        return NOT_YET
    fell = lambda name: f"{len(broken(found, name))} of {len(found.seeds)} seeds"
    worst = lambda name: f"{lowest(found, name).min():.2f}".replace("-", "−")
    rest = ", ".join(f"with {text} on {fell(name)} ({worst(name)})" for name, text in names.items())
    return (
        "What breaks down is the end of the answers: a policy finds that it need not end them and goes on behind the full stop until it is cut. That is malformed and costs "
        "all gold, but the frozen GVM has never read such a text, its value at the cut stays above the mean, and stands as the terminal one. It befell DVPO on "
        f"{fell('dvpo')} (the lowest ten-step mean of gold: {worst('dvpo')}), {rest}. A standard deviation off the value at a cut, `--eos_penalty 1`, does not keep it from happening; what it changes is how "
        f"deep and how long. Gold in the end: {shown(found.numbers('dvpo_eos_penalty', *GOLD))}, without it {shown(found.numbers('dvpo', *GOLD))}."
    )  # fmt: skip


def answer_ladder(found: Found) -> str:
    if not {"dvpo_exact_q", "ppo_gold"} <= found.runs.keys():
        return NOT_YET
    lost = lambda one, other: shown(found.numbers(one, *GOLD) - found.numbers(other, *GOLD))
    return (
        f"With the *exact* values of the SFT mixture, frozen, DVPO comes to {gold(found, 'dvpo_exact_q')}; with the learned GVM that is {lost('dvpo', 'dvpo_exact_q')}. PPO with the "
        f"gold reward itself comes to {gold(found, 'ppo_gold')}; with the learned reward model that is {lost('ppo', 'ppo_gold')}. Exact values against the exact reward: "
        f"{lost('dvpo_exact_q', 'ppo_gold')}."
    )  # fmt: skip


def answer_advantages(found: Found) -> str:
    names = ("dvpo_lam_1", "dvpo_q_minus_v", "dvpo_q_position", "dvpo_q_start", "dvpo_released")
    if not set(names) <= found.runs.keys():
        return NOT_YET
    rest = "; ".join(
        f"{NAMES[name]} {gold(found, name)}, {word(found.numbers(name, *GOLD) - found.numbers('dvpo', *GOLD))} `gae`"
        for name in names
    )
    return f"As policies: `gae` {gold(found, 'dvpo')}, the paper's `q` {gold(found, 'dvpo_q')}; {rest}."


def answer_gradient(found: Found) -> str:
    cosine = lambda name: shown(found.probed("gradient", name, "cosine"), bounds=False)
    noise = lambda name: shown(found.probed("gradient", name, "noise"), 1, bounds=False)
    return (
        f"**Answer.** Steps of Q give by far the best gradient: Q − V of the GVM points where exact Q − V points (cosine {cosine('gvm_q_minus_v')}, noise over "
        f"signal {noise('gvm_q_minus_v')}), `gae` less so ({cosine('gvm_gae')}, {noise('gvm_gae')}), the paper's `q` still less ({cosine('gvm_q')}, "
        f"{noise('gvm_q')}); a whole response weighted by the reward model's score has {cosine('reward_rm')} and {noise('reward_rm')}, by the gold reward "
        f"itself {cosine('reward_gold')} and {noise('reward_gold')}. That is what a value model is for."
    )  # fmt: skip


def answer_off(found: Found) -> str:
    others = {name: found.numbers(name, *GOLD) for name in OFF[1:] if name in found.runs}
    best = max(others, key=lambda name: np.nanmean(others[name]))
    rates = {name: np.nanmean(found.numbers(name, "misaligned")) for name in OFF if name in found.runs}
    least = min(rates, key=rates.get)
    level = [found.numbers("vcb", "kl").mean(), found.numbers(best, "kl").mean()]
    return (
        f"**Answer.** VCB's gold reward is {against(found, 'vcb', best, *GOLD)}, the next best; their KLs are {level[0]:.1f} and {level[1]:.1f}. The lowest "
        f"misalignment is {NAMES[least]}'s, {100 * rates[least]:.1f} % (VCB {100 * rates['vcb']:.1f} %)."
    )  # fmt: skip


def answer_over(found: Found) -> str:
    seen = []
    for name in (name for name in (*ON, *OFF) if name in found.runs):
        for seed in found.seeds:
            row = found.runs[name][str(seed)]
            if not row["points"]:
                continue
            best = max(row["points"], key=lambda point: point["gold"])
            if best["gold_ci95"][0] > row["gold"]["ci95"][1] and row["proxy"]["mean"] > best["proxy"]:
                seen.append(f"{NAMES[name]} on seed {seed}")
    total = sum(len(found.runs[name]) for name in (*ON, *OFF) if name in found.runs)
    drawn = [found.runs["sft"][str(seed)]["best_of_n"] for seed in found.seeds]
    best = np.mean([[(row["kl"], row["gold"]) for row in some] for some in drawn], 0)
    kl = {name: np.mean(found.numbers(name, "kl")) for name in OFF if name in found.runs}
    within = {
        name: at - np.interp(x, *best.T)
        for name, x in kl.items()
        if x <= best[-1, 0]
        for at in [np.mean(found.numbers(name, *GOLD))]
    }
    below = "; ".join(
        f"{NAMES[name]} is {abs(gap):.2f} {'below' if gap < 0 else 'above'} it" for name, gap in within.items()
    )
    return (
        f"**Answer.** Within a run, a final gold reward below an earlier one while the proxy is above, both beyond their noise, is seen in {len(seen)} of {total} "
        f"runs{' (' + ', '.join(seen) + ')' if seen else ''}. Best of {2 ** (len(best) - 1)} of the SFT policy has gold reward {best[-1, 1]:.2f} at a KL of "
        f"{best[-1, 0]:.1f} at most; of the off-policy methods no further from SFT, {below}."
    )  # fmt: skip


def answer_implicit(found: Found) -> str:
    at = lambda name, key: shown(found.probed("implicit", name, key), 1, True, False)
    length = lambda name: shown(found.probed("implicit", name, "length"), bounds=False)
    return (
        f"**Answer.** DPO's implicit reward puts {at('dpo', 'gold')} of pairs in the gold order, VCB's {at('vcb', 'gold')}; the reward model that both learned "
        f"from {at('rm', 'gold')}. A policy is a worse judge than its teacher. Its correlation with length is {length('dpo')} (the reward model's {length('rm')})."
    )  # fmt: skip


def answer_teachers(found: Found) -> str:
    at = lambda name: shown(found.probed("teachers", "correlation", name, "all"), bounds=False)
    return (
        f"**Answer.** They do not tell the same at equal cost. One forward pass of the GVM without τ knows {at('gvm_no_tau_shown')} of the SFT policy's values "
        f"(correlation; {at('gvm')} with τ); the reward model needs continuations: {at('rm_1')} with one, {at('rm_4')} with four, {at('rm_8')} with eight. One "
        f"continuation under the gold reward itself tells {at('gold_1')}: sampling, not the teacher, is the larger error."
    )  # fmt: skip


def answer_baselines(found: Found) -> str:
    names = [name for name in ON[3:] if name in found.runs]
    rest = "; ".join(f"{NAMES[name]} is {against(found, name, 'ppo', *GOLD)}" for name in names)
    return f"**Answer.** At equal rollouts {rest}."


def claim_questions(found: Found) -> str:
    """README: what everyone asks first."""
    gap = lambda name: found.numbers(name, *GOLD) - found.numbers("ppo", *GOLD)
    fell = len(broken(found, "dvpo"))
    broke = f", and on {fell} of {len(found.seeds)} seeds it broke down on the way" if fell else ""
    names = ("dvpo_no_tau_shown", "dvpo_no_tau", "dvpo_other_tau")
    worse = [interval(found.numbers(name, *GOLD) - found.numbers("dvpo", *GOLD))[2] < 0 for name in names]
    policy = "some" if any(worse) else "no"
    first = lambda which: shown(found.numbers("gvm", which, "first3", "correlation"), bounds=False)
    return (
        f"Does DVPO beat PPO? In the toy world its gold reward is {word(gap('dvpo'))} PPO's (difference {shown(gap('dvpo'))}){broke}; with the paper's `q` it is "
        f"{word(gap('dvpo_q'))} PPO's. Is τ worth it? Over a response's first three tokens the values of the policies that τ shows correlate {first('right_tau')} with the "
        f"exact ones, {first('no_tau')} with no τ; of the policy that is trained with them {policy} gain is seen."
    )  # fmt: skip


def claims(found: Found) -> str:
    """The findings in short, at the head of EXPERIMENTS.md."""
    return "\n".join(
        f"- {text}"
        for text in (
            answer_ppo(found).removeprefix("**Answer.** "), answer_off(found).removeprefix("**Answer.** "),
            answer_values(found).removeprefix("**Answer.** "), answer_moved(found), answer_gradient(found).removeprefix("**Answer.** "),
            answer_tau(found), answer_ladder(found), answer_advantages(found),
            answer_baselines(found).removeprefix("**Answer.** "), answer_over(found).removeprefix("**Answer.** "),
        )
    )  # fmt: skip


def _dig(row, path):
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


ON = ("dvpo", "dvpo_q", "ppo", "remax", "rloo", "grpo", "reinforce++")
OFF = ("vcb", "dpo", "ipo", "slic", "rrhf", "rest")
FULL = ("gold reward", "proxy (RM)", "KL to SFT", "malformed", "misaligned", "misaligned (gold)", "tokens", "EAD")


def later(toy: Found, report: dict | None) -> str:
    """A*-PO and online DPO: of a file of their own, made at another commit, until all runs are made anew."""
    names = ("astar", "astar_once", "online_dpo")
    if set(names) <= toy.runs.keys() or report is None:
        return policies(toy, names, FULL)
    tried = "; ".join(
        f"{NAMES[name]}, β {best['kl_coef']} at {best['learning_rate']}"
        for name, rows in report["tuning"].items() for best in rows if best["chosen"]
    )  # fmt: skip
    of = Found(report)
    own = {name: of.numbers(name, *GOLD) for name in names}
    sft = toy.numbers("sft", *GOLD)
    worse = lambda name: f"{int((own[name] < sft).sum())} of {len(sft)} seeds"
    gap = own["online_dpo"] - toy.numbers("ppo", *GOLD)
    return (
        f"{policies(of, names, FULL)}\n\nA*-PO ends below the SFT policy's gold reward on {worse('astar')} with four updates a rollout, on {worse('astar_once')} with one. "
        f"Online DPO's gold reward is {word(gap)} PPO's (difference {shown(gap)}). From commit {report['code']}; six settings each on seed 0, chosen by the rule "
        f"above: {tried}. A*-PO with one update keeps those of four."
    )  # fmt: skip


def gammas(found: Found) -> list[str]:
    return sorted(name for name in found.runs if "_gamma_" in name)


def tables() -> dict[str, callable]:
    """Name -> the text of a table, for each results file that is there."""
    load = lambda name: json.loads((ROOT / "experiments" / f"{name}.json").read_text())
    there = {path.stem for path in (ROOT / "experiments").glob("*.json")}
    made = {}
    if "tuning" in there:
        made["tuning"] = lambda: tuning(load("tuning"))
    chaos = ROOT / "bench" / "results" / "chaos.txt"
    if chaos.is_file():
        made["chaos"] = lambda: f"```text\n{chaos.read_text().strip()}\n```"
    if "sentiment" in there:
        made["sentiment"] = lambda: sentiment(load("sentiment"))
        made["sentiment_samples"] = lambda: sentiment_samples(load("sentiment"))
        made["claim_sentiment"] = lambda: claim_sentiment(load("sentiment"))
        made["answer_sentiment"] = lambda: answer_sentiment(load("sentiment"))
    if "policies" in there:
        made["real_policies"] = lambda: real_policies(load("policies"))
        made["answer_real_policies"] = lambda: answer_real_policies(load("policies"))
    if "toy" in there:
        toy = Found(load("toy"))
        made |= {
            "methods": lambda: policies(toy, ("sft", *ON, *OFF), FULL),
            "headline": lambda: policies(toy, ("sft", "dvpo", "dvpo_q", "ppo")),
            "values": lambda: values(toy, [("gvm", "trained with τ"), ("gvm_no_tau", "trained without")], yardsticks=True),
            "pairs": lambda: pairs_shown(toy),
            "tau_policy": lambda: policies(toy, ("dvpo", "dvpo_no_tau_shown", "dvpo_no_tau", "dvpo_other_tau"), against="dvpo"),
            "readings": lambda: readings(toy, ("sft", "dvpo", "ppo", "grpo")),
            "targets": lambda: NOT_YET if "gvm_td_0" not in toy.runs else values(
                toy, [("gvm_no_tau", "outcome share 0.5"), ("gvm_all_tokens", "no outcome share"), ("gvm_td_95", "TD(0.95)"), ("gvm_td_0", "TD(0)"), ("gvm_eq_2", "eq. 2")]
            ),
            "targets_policy": lambda: policies(toy, ("dvpo_no_tau", "dvpo_all_tokens", "dvpo_td_95", "dvpo_td_0", "dvpo_eq_2"), against="dvpo_no_tau"),
            "ladder": lambda: policies(toy, ("dvpo_exact_q", "ppo_gold", "dvpo", "dvpo_eos_penalty", "dvpo_no_tau", "ppo", "ppo_rm_2_epochs"), against="ppo"),
            "equal_kl": lambda: equal_kl(toy, ON),
            "plateau": lambda: plateau(toy, (*ON, "dvpo_eos_penalty", "dvpo_no_tau", "dvpo_exact_q")),
            "advantages": lambda: policies(
                toy, ("dvpo", "dvpo_lam_1", "dvpo_q_minus_v", "dvpo_q", "dvpo_q_position", "dvpo_q_start", "dvpo_released"), against="dvpo"
            ),
            "off_policy": lambda: policies(toy, (*OFF, *gammas(toy)), FULL),
            "off_equal_kl": lambda: equal_kl(toy, OFF, (0.5, 1.0, 1.5, 2.0)),
            "vcb": lambda: policies(toy, ("vcb", "vcb_n_2", "vcb_n_4", "vcb_n_8", "vcb_full", "vcb_mean"), FULL, against="vcb"),
            "later": lambda: later(toy, load("later") if "later" in there else None),
            "betas": lambda: policies(toy, sorted(n for n in toy.runs if "_beta_" in n), ("gold reward", "proxy (RM)", "KL to SFT", "malformed")),
            "noise": lambda: policies(toy, ("vcb", "vcb_noise_1", "dpo", "dpo_noise_1", "rest", "rest_noise_1"), FULL),
            "length": lambda: policies(toy, ("sft", "dpo", "dpo_length_penalty"), ("gold reward", "tokens", "KL to SFT"), against="dpo"),
        }  # fmt: skip
        of = load("toy").get("logged", {})
        for script, names in LOGGED.items():
            if set(names) <= of.keys():
                made[f"logged_{script}"] = lambda names=names: logged({"logged": of}, names)
        if toy.probes:
            made |= {
                "answer_1": lambda: f"{answer_values(toy)}\n\n{answer_moved(toy)}\n\n{answer_tau(toy)}", "answer_2": lambda: answer_2(toy),
                "answer_3": lambda: f"{answer_ppo(toy)}\n\n{answer_breakdown(toy)}\n\n{answer_ladder(toy)}",
                "answer_4": lambda: f"{answer_gradient(toy)}\n\n{answer_advantages(toy)}", "answer_5": lambda: answer_off(toy), "answer_6": lambda: answer_over(toy),
                "answer_7": lambda: answer_implicit(toy), "answer_8": lambda: answer_teachers(toy),
                "answer_9": lambda: answer_baselines(toy), "claims": lambda: claims(toy), "claim_questions": lambda: claim_questions(toy),
                "gradients": lambda: gradients(toy), "teachers": lambda: teachers(toy), "moved": lambda: moved(toy),
                "implicit": lambda: implicit(toy),
            }  # fmt: skip
    return made


def rewritten(text: str, made: dict) -> str:
    """The page with each table that can be made anew; of the others, that there is nothing yet."""
    fill = lambda m: f"{m[1]}{made[m[2]]() if m[2] in made else NOT_YET}\n{m[3]}"
    return MARK.sub(fill, text)


def main():
    made, wrong = tables(), []
    for name in PAGES:
        path = ROOT / name
        if not path.is_file():
            continue
        old = path.read_text(encoding="utf-8")
        new = rewritten(old, made)
        if new != old:
            wrong.append(name)
            if "--check" not in sys.argv:
                path.write_text(new, encoding="utf-8")
    print(
        "\n".join(f"{name} {'differs' if '--check' in sys.argv else 'rewritten'}" for name in wrong) or "nothing to do"
    )
    raise SystemExit(bool(wrong) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
