"""What stands between the table marks of EXPERIMENTS.md, README.md and docs/, from experiments/*.json and bench/results/chaos.txt.

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import report

ROOT = Path(__file__).resolve().parent.parent

NAMES = {
    "sft": "SFT", "dvpo": "DVPO, `gae`", "dvpo_q": "DVPO, `q` (paper)", "ppo": "PPO", "remax": "ReMax", "rloo": "RLOO",
    "grpo": "GRPO", "reinforce++": "REINFORCE++", "vcb": "VCB", "dpo": "DPO", "ipo": "IPO", "slic": "SLiC", "rrhf": "RRHF",
    "rest": "ReST", "ppo_gold": "PPO, gold reward", "dvpo_exact_q": "DVPO, exact Q of the SFT mixture",
    "dvpo_eos_penalty": "DVPO, `--eos_penalty 1`",
    "dvpo_lam_1": "`gae`, λ = 1 (Q_T − V)", "dvpo_q_minus_v": "`gae`, λ = 0 (Q − V)", "dvpo_q_position": "`q` less its position's mean",
    "dvpo_q_start": "`q` less V(s_1)", "dvpo_released": "the released code's values and GAE", "dvpo_no_tau": "GVM trained without τ",
    "dvpo_no_tau_shown": "GVM trained with τ, none shown", "dvpo_other_tau": "another policy's τ", "dvpo_all_tokens": "no outcome share",
    "dvpo_tau_all_tokens": "no outcome share", "dvpo_td_95": "TD(0.95)", "dvpo_td_0": "TD(0), eq. 1", "dvpo_q_no_tau": "`q`, outcome share 0.5", "dvpo_q_eq_2": "`q`, eq. 2, Monte-Carlo", "dvpo_q_paper": "`q`, eq. 1 and 2 (paper)", "vcb_full": "VCB, all i ≠ j",
    "vcb_mean": "VCB, mean of pairs", "dpo_length_penalty": "DPO, length penalty 0.1", "vcb_n_2": "VCB, n = 2", "vcb_n_4": "VCB, n = 4",
    "vcb_n_8": "VCB, n = 8", "vcb_noise_1": "VCB, noisy scores", "dpo_noise_1": "DPO, noisy scores", "rest_noise_1": "ReST, noisy scores",
    "rm": "reward model", "astar": "A*-PO, four updates a rollout", "astar_once": "A*-PO, one update a rollout", "online_dpo": "online DPO",
}  # fmt: skip
OWN = {
    "vcb": ("γ", "0.25"),
    "dpo": ("γ", "1"),
    "ipo": ("γ", "0.1"),
    "slic": ("c", "3"),
    "rrhf": ("c", "10"),
    "rest": ("improve steps", "3"),
    "dvpo": ("β", "0.1"),
    "ppo": ("β", "0.05"),
}  # of the runs named so
SIGN = re.compile("_(gamma|c|steps|beta)_")  # before a coefficient in a run's name
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
PAGES = ("EXPERIMENTS.md", "README.md", "docs/faults.md", "docs/gvm.md", "docs/vcb.md", "docs/dpo.md")
NOT_YET = "*Not run yet.*"


def said(name: str, full: bool = False) -> str:
    """`vcb_gamma_0.5`: VCB, γ 0.5; in full, `vcb`: VCB, γ 0.25."""
    base, _, value = SIGN.sub(" ", name).partition(" ")
    sign, own = OWN.get(base, ("", ""))
    return f"{NAMES[base]}, {sign} {value or own}" if value or full else NAMES[name]


def coefficient(run: str) -> float:
    """Of a run, its own or the method's; 0 of a method that has none."""
    base, *own = SIGN.split(run)
    return float(own[-1] if own else OWN.get(base, ("", 0))[1])


class Found:
    """experiments/toy.json: what runs measured, a number a seed."""

    def __init__(self, report: dict):
        self.runs, self.seeds = report["runs"], report["seeds"]
        kept = report.get("probes", {})
        self.probes = {str(seed): kept[str(seed)] for seed in self.seeds if str(seed) in kept}  # in the order of seeds

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
    half = report.t95(len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
    return float(x.mean()), float(x.mean() - half), float(x.mean() + half)


def shown(x: np.ndarray, digits: int = 2, percent: bool = False, bounds: bool = True) -> str:
    scale = 100 if percent else 1
    mean, low, high = (round(v * scale, digits) + 0.0 for v in interval(np.asarray(x, float)))  # no −0.00
    if math.isnan(mean):
        return "–"
    text = f"{mean:.{digits}f}{' %' if percent else ''}"
    text += f" [{low:.{digits}f}, {high:.{digits}f}]" if bounds and not math.isnan(low) else ""
    there = int((~np.isnan(np.asarray(x, float))).sum())
    text += f" ({there} of {len(x)} seeds)" if there < len(x) else ""  # a mean over some seeds says so
    return text.replace("-", "−")


def nats(kl: float) -> str:
    return f"{kl:g} nat{'' if kl == 1 else 's'}"


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
}


def policies(
    found: Found,
    names,
    columns=("gold reward", "KL to SFT", "malformed", "tokens"),
    against: str = "",
    full: bool = False,
) -> str:
    head = ["", *columns, *([f"gold − {NAMES[against]}, paired"] if against else [])]
    rows, missing = [], [said(name) for name in names if name not in found.runs]
    for name in (name for name in names if name in found.runs):
        row = [said(name, full)]
        row += [shown(found.numbers(name, *COLUMNS[c][0]), *COLUMNS[c][1:]) for c in columns]
        if against:
            gap = found.numbers(name, "gold", "mean") - found.numbers(against, "gold", "mean")
            row.append("–" if name == against else shown(gap))
        rows.append(row)
    if len(rows) < 1 + bool(against):
        return NOT_YET
    return table(head, rows) + (f"\n\n*Not run yet: {', '.join(missing)}.*" if missing else "")


def at_kl(found: Found, name: str, kl: float, window: int = 5) -> np.ndarray:
    """Gold reward where a run first comes to this KL, one number a seed: along the five-step means of its rollouts."""
    out = []
    for seed in found.seeds:
        row = found.runs.get(name, {}).get(str(seed))
        if row is None:
            out.append(math.nan)
            continue
        points = [(0.0, found.runs["sft"][str(seed)]["gold"]["mean"])]
        mean = lambda key, row=row: np.convolve([step[key] for step in row["curve"]], np.ones(window) / window, "valid")
        points += list(zip(mean("kl"), mean("gold"), strict=True))
        there = next((i for i, point in enumerate(points) if point[0] >= kl), None)
        inside = points[max(0, (there or 0) - 1) : (there or 0) + 1]
        out.append(math.nan if there is None else float(np.interp(kl, *zip(*inside, strict=True))))
    return np.array(out)


def equal_kl(found: Found, names, levels=(1.0, 2.0, 3.0, 4.0)) -> str:
    rows = [[NAMES[name], *(shown(at_kl(found, name, kl)) for kl in levels)] for name in names]
    return table(["gold reward at a KL of", *map(nats, levels)], rows)


def family(found: Found, name: str) -> list[str]:
    """A method's runs at all its coefficients, the smallest first."""
    return sorted((run for run in found.runs if SIGN.split(run)[0] == name), key=coefficient)


def matched(found: Found, name: str, kl: float | np.ndarray, *path) -> np.ndarray:
    """What the final policies of a method would be worth at this KL (one for all seeds, or one each), a number a seed: between its
    coefficients' runs, NaN beyond them, and where those on its two sides are WIDE nats apart and neither is near: a chord to a
    run that broke down."""
    names, out = family(found, name), []
    points = (np.array([found.numbers(run, *one) for run in names]).T for one in (("kl",), path))
    for x, y, at in zip(*points, np.broadcast_to(kl, len(found.seeds)), strict=True):
        order = np.argsort(x)
        x, y = x[order], y[order]
        gap = min(x[x >= at], default=math.inf) - max(x[x <= at], default=-math.inf)
        apart = gap > WIDE and np.nanmin(np.abs(x - at)) > NEAR
        out.append(math.nan if apart else np.interp(at, x, y, math.nan, math.nan))
    return np.array(out)


WIDE, NEAR = 4.0, 0.5  # nats: how far apart two runs may be that are interpolated between, unless one is so near
LEVELS = {"γ": (0.5, 1.0, 1.5, 2.0, 2.5, 3.0), "β": (3.0, 4.0, 5.0, 6.0, 7.0)}


def levels(found: Found, names) -> list[float]:
    """The KLs that final policies of all these methods reach on every seed."""
    reach = lambda kl: not any(np.isnan(matched(found, name, kl, *GOLD)).any() for name in names)
    return [kl for kl in LEVELS[OWN[names[0]][0]] if reach(kl)]


def at_matched_kl(found: Found, names) -> str:
    """Gold reward of final policies, between coefficients."""
    if any(len(family(found, name)) < 2 for name in names):
        return NOT_YET
    steps = LEVELS[OWN[names[0]][0]]
    rows = [[NAMES[name], *(of_all(matched(found, name, kl, *GOLD)) for kl in steps)] for name in names]
    return table(["gold reward of final policies at a KL of", *map(nats, steps)], rows)


def of_all(x: np.ndarray, digits: int = 2) -> str:
    """`shown`, but a dash where a seed is missing: a mean over the others would be of the mildest."""
    return "–" if np.isnan(x).any() else shown(x, digits)


def gap_at_end(found: Found, name: str, run: str) -> np.ndarray:
    """Gold reward of a method, between its coefficients, at the KL where another's run ended, less that run's, a number a seed."""
    return matched(found, name, found.numbers(run, "kl"), *GOLD) - found.numbers(run, *GOLD)


def at_their_kl(found: Found, names, others) -> str:
    """Every run of names: what the others are worth at the KL where it ended."""
    runs = [run for name in names for run in family(found, name)]
    if any(len(family(found, other)) < 2 for other in others) or not runs:
        return NOT_YET
    rows = []
    for run in runs:
        own = [said(run, True), shown(found.numbers(run, "kl"), 1), shown(found.numbers(run, *GOLD))]
        rows.append([*own, *(of_all(gap_at_end(found, other, run), 3) for other in others)])
    return table(
        ["", "KL to SFT", "gold reward", *(f"{NAMES[other]}'s gold at this KL, less this run's" for other in others)],
        rows,
    )


def bent(found: Found, names) -> np.ndarray:
    """How far each run with a neighbour on both sides lies above the straight line between these: gold reward, means over seeds."""
    out = []
    for name in names:
        runs = family(found, name)
        for run in runs[1:-1]:
            rest = Found({"runs": {x: found.runs[x] for x in runs if x != run}, "seeds": found.seeds})
            line = matched(rest, name, found.numbers(run, "kl"), *GOLD)
            if not np.isnan(line).all():
                out.append(np.nanmean(found.numbers(run, *GOLD) - line))
    return np.array(out)


def about_lines(found: Found) -> str:
    above = bent(found, CALIBRATED)
    if not len(above):
        return NOT_YET
    return (
        f"Between two runs the line is straight, the curve is not: left out one by one, these methods' runs lie {above.mean():.2f} above the line between their neighbours on the "
        f"mean, {above.max():.2f} at most. A comparison with a line is to the disadvantage of its method, by less than that, since nothing is left out there."
    )  # fmt: skip


def all_at_matched_kl(found: Found, names) -> str:
    """Every column, at the greatest KL that all reach."""
    if any(len(family(found, name)) < 2 for name in names) or not levels(found, names):
        return NOT_YET
    kl, keys = levels(found, names)[-1], [key for key in FULL if key != "KL to SFT"]
    at = lambda name, key: matched(found, name, kl, *COLUMNS[key][0])
    rows = [[NAMES[name], *(shown(at(name, key), *COLUMNS[key][1:]) for key in keys)] for name in names]
    return table([f"at a KL of {nats(kl)}", *keys], rows)


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


def broken(found: Found, name: str, fall: float = 0.5, window: int = 10) -> list[str]:
    """The seeds on which a ten-step mean, or the final policy, falls so far below an earlier ten-step mean."""
    out = []
    for seed, one, end in zip(found.seeds, curve(found, name), found.numbers(name, *GOLD), strict=True):
        means = np.convolve(one, np.ones(window) / window, "valid")
        best = np.maximum.accumulate(means)
        if (np.append(means[window:], end) < np.append(best[:-window], best[-1]) - fall).any():
            out.append(str(seed))
    return out


def plateau(found: Found, names) -> str:
    rows = []
    for name in (name for name in names if name in found.runs):
        steps = steps_to(found, name)
        reached = f"{(~np.isnan(steps)).sum()} of {len(steps)}"
        worst = np.nanmin(found.numbers(name, "gold", "mean"))
        low = shown(lowest(found, name).min(keepdims=True))
        rows.append([NAMES[name], shown(steps[~np.isnan(steps)], 0), reached, f"{worst:.2f}".replace("-", "−"), low])
    return table(
        [
            "",
            "steps to 95 % of PPO's plateau, of the seeds that reach it",
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


TARGETS = {  # GVM without tau -> (how it was trained, the policy that `gae` makes of it, and `q`)
    "gvm_no_tau": ("Monte-Carlo, outcome share 0.5 (ours)", "dvpo_no_tau", "dvpo_q_no_tau"),
    "gvm_all_tokens": ("Monte-Carlo, all tokens alike", "dvpo_all_tokens", ""),
    "gvm_td_95": ("TD(0.95)", "dvpo_td_95", ""),
    "gvm_td_0": ("TD(0), eq. 1", "dvpo_td_0", ""),
    "gvm_eq_2": ("Monte-Carlo, eq. 2", "", "dvpo_q_eq_2"),
    "gvm_paper": ("TD(0), eq. 1 and 2 (paper)", "", "dvpo_q_paper"),
}


def targets(found: Found) -> str:
    """The value models of question 2; eq. 2 leaves scale and offset open, so that errors say nothing there."""
    there = [name for name in TARGETS if name in found.runs]
    if len(there) < 2:
        return NOT_YET
    rows = []
    for name in there:
        at = lambda span, kind, name=name: shown(found.numbers(name, "no_tau", span, kind), 3, bounds=kind != "mse")
        probe = lambda key, name=name: shown(found.probed("targets", name, key), bounds=False)
        scaled = not TARGETS[name][2] or name == "gvm_no_tau"
        said = [at("all", "mse"), probe("slope"), probe("offset")] if scaled else ["–"] * 3
        accuracy = shown(found.numbers(name, "summary", "accuracy_mean"), 1, percent=True)
        rows.append(
            [TARGETS[name][0], at("all", "correlation"), at("first3", "correlation"), probe("last"), *said, accuracy]
        )
    head = ["correlation, all tokens", "first three", "last", "MSE", "slope", "offset", "pairs ordered, mean of tokens"]
    missing = [TARGETS[name][0] for name in TARGETS if name not in there]
    return table(["GVM", *head], rows) + (f"\n\n*Not run yet: {', '.join(missing)}.*" if missing else "")


PAIRS = (0, 1, 2, 4)


def pairs_shown(found: Found) -> str:
    rows = []
    for kind, title in (
        ("train", "policies it was trained on"),
        ("held_out", "never seen"),
        ("crowd", "a mixture (as SFT)"),
    ):
        run = lambda name, k, *path, kind=kind: found.numbers(name, "pairs_shown", kind, k, *path)
        probe = lambda name, k, *path, kind=kind: found.probed("pairs", kind, name, k, *path)
        of = {
            "GVM, two pairs at most": lambda *at, probe=probe: probe("gvm", *at),
            "four at most": lambda *at, run=run: run("gvm_tau_4", *at),
            "none": lambda *at, run=run: run("gvm_no_tau", *at),
            "Bayes": lambda *at, probe=probe: probe("bayes", *at),
        }
        for name, at in of.items():
            row = [shown(at(str(k), "all", "correlation"), bounds=name != "Bayes") for k in PAIRS]
            row += [shown(at(str(k), "first3", "mse"), 3, bounds=False) for k in PAIRS]
            if set(row) != {"–"}:
                rows.append([title, name, *row])
    if not rows:
        return NOT_YET
    shows = ["no pair", *(f"{k} pair{'s' * (k > 1)}" for k in PAIRS[1:])]
    head = [f"{what}, {k}" for what in ("correlation, all tokens", "MSE of the first three") for k in shows]
    steps = {text: found.numbers(name, "summary", "steps") for name, text in
             (("gvm_no_tau", "without τ"), ("gvm", "with two pairs"), ("gvm_tau_4", "with four"))}  # fmt: skip
    told = ", ".join(f"{shown(x, 0, bounds=False)} {text}" for text, x in steps.items() if not np.isnan(x).all())
    note = f"All of these GVMs read the same answers, but a training row holds as many as τ and one more, so not in as many optimizer steps: {told}."
    of = lambda at, kind: ", ".join(shown(at(kind, str(k)), bounds=False) for k in PAIRS)
    bayes = lambda kind, k: found.probed("pairs", kind, "bayes", k, "all", "correlation")
    four = lambda kind, k: found.numbers("gvm_tau_4", "pairs_shown", kind, k, "all", "correlation")
    note += (
        f" With {listed(shows)} the correlation is, of policies never seen, {of(bayes, 'held_out')} for Bayes; of a mixture {of(bayes, 'crowd')} for Bayes, {of(four, 'crowd')} for the GVM "
        "trained with four."
    )  # fmt: skip
    return f"{table(['texts by', 'trained with', *head], rows)}\n\n{note}"


def readings(found: Found, names) -> str:
    rows = []
    for name in names:
        cells = [
            shown(found.numbers(name, "reading", who, which), bounds=False)
            for which in ("all", "well_formed")
            for who in ("gvm", "gvm_no_tau_shown", "rm")
        ]
        rows.append([NAMES[name], shown(found.numbers(name, "kl"), 1, bounds=False), *cells])
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


def about_real_policies(report: dict) -> str:
    size, policies = report["size"], len(report["policies_of_training"]) + len(report["policies_held_out"])
    return (
        f"{report['model']} with LoRA, one run of one epoch each, on AlpacaEval's prompts with the answers of {policies} policies of its leaderboard and GPT-4-turbo's "
        f"preference for each: {size['answers']} answers to each of {size['prompts']} prompts; {size['held_out']} prompts and {len(report['policies_held_out'])} policies, every "
        f"fourth by mean score, are held out. **All models read the first {size['tokens']} tokens of an answer, the length in the first row is of the whole text.** Share of "
        "pairs put in the judge's order, with 95 % intervals by bootstrap over prompts:"
    )  # fmt: skip


def real_policies(report: dict) -> str:
    rows = [
        [text, *(rate(scored(report, part, name)) for part in ("seen", "unseen"))] for name, text in SCORERS.items()
    ]
    return table(["pairs in the judge's order", "policies of training", "policies held out"], rows)


def answer_real_policies(report: dict) -> str:
    said, better = [], []
    for part, text in (("seen", "Of policies it was trained on"), ("unseen", "Of policies never seen")):
        tau, none = (scored(report, part, name) for name in ("gvm", "gvm_no_tau"))
        apart = tau["ci95"][0] > none["ci95"][1] or none["ci95"][0] > tau["ci95"][1]
        said.append(f"{text}, the GVM with τ orders {rate(tau)} of the pairs, the one trained without {rate(none)}: "
                    f"the intervals, over prompts, {'are apart' if apart else 'overlap'}.")  # fmt: skip
        length = scored(report, part, "whole_length")["mean"]
        better += [name for name in SCORERS if scored(report, part, name)["mean"] > length]
    steps = {name: report["runs"][name]["steps"] for name in ("gvm", "gvm_no_tau", "rm")}
    return (
        f"**Answer.** {' '.join(said)} {'Some scorer does' if better else 'None does'} better than the length of the whole text. All read the same answers once, but not in "
        f"as many optimizer steps: a row has two answers for the GVM with τ ({steps['gvm']} steps), one without ({steps['gvm_no_tau']}), all of a prompt for the reward model ({steps['rm']}). So the "
        "difference is not τ's alone, and one epoch is little."
    )  # fmt: skip


def claim_real_policies(report: dict) -> str:
    """README: is tau worth it, on real text."""
    tau, none = (rate(scored(report, "seen", name)) for name in ("gvm", "gvm_no_tau"))
    steps = [report["runs"][name]["steps"] for name in ("gvm", "gvm_no_tau")]
    return (
        f" On answers of real policies a GVM with τ orders {tau} of pairs, one trained without {none}, in {steps[1]} optimizer steps for {steps[0]} "
        "([how](EXPERIMENTS.md#does-τ-help-on-real-policies))."
    )  # fmt: skip


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
    number = lambda name, *path, digits=2: f"{np.mean([_dig(row, path) for row in runs[name]]):.{digits}f}".replace("-", "−")  # fmt: skip
    each = "; ".join(
        f"{number(name, 'gold', 'mean')} with {NAMES[name]} at a KL of {number(name, 'kl', digits=1)} ({len(runs[name])} seed{'s' * (len(runs[name]) > 1)})"
        for name in runs
        if name != "sft"
    )
    of = lambda name: np.array([_dig(row, ("gold", "mean")) for row in runs[name]])
    return (
        f"**Answer.** Gold reward goes from {number('sft', 'gold', 'mean')} (SFT) to {each}. DVPO's is {word(of('dvpo') - of('ppo'))} PPO's "
        f"(difference {shown(of('dvpo') - of('ppo'))} by RL seed), with {number('dvpo', 'length', digits=1)} tokens a sentence against {number('ppo', 'length', digits=1)}."
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
    rows.append(["most that the truth's noise allows", *(shown(allowed(found, span), bounds=False) for span in spans)])
    return table(["correlation with the policy's own values", "all places", "after the first token", "later"], rows)


def allowed(found: Found, span: str) -> np.ndarray:
    """What values known exactly would correlate with the noisy means that stand for the truth, one number a seed."""
    return np.sqrt(np.maximum(1 - found.probed("teachers", "noise", span), 0))


def moved(found: Found) -> str:
    rows, steps = [], [one["moved"] for one in found.probes.values()]
    for i, point in enumerate(steps[0]):
        at = lambda *path, i=i: shown([_dig(some[i], path) for some in steps])
        own, none = (at("correlation", name, "all") for name in ("gvm", "gvm_no_tau_shown"))
        noise = np.array([one[i]["noise"]["all"] for one in steps], float)  # none where all texts are worth the same
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
    if math.isnan(low):
        return "on too few seeds to be compared with"
    return "above" if low > 0 else "below" if high < 0 else LEVEL


LEVEL = "not distinguishable from"


def listed(some: list[str]) -> str:
    """`1, 2 and 3`."""
    return " and ".join([", ".join(some[:-1]), some[-1]] if some[1:] else some)


def against(found: Found, one: str, other: str, *path) -> str:
    """`above PPO's (difference 0.05 [0.01, 0.09])`."""
    gap = found.numbers(one, *path) - found.numbers(other, *path)
    return f"{word(gap)} {NAMES[other].replace('`', '')}'s (difference {shown(gap)})"


GOLD = ("gold", "mean")


def answer_values(found: Found) -> str:
    at = lambda which, span: found.numbers("gvm", which, span, "correlation")
    without = lambda span: found.numbers("gvm_no_tau", "no_tau", span, "correlation")
    unseen = lambda name, k: shown(
        found.numbers(name, "pairs_shown", "held_out", k, "all", "correlation"), bounds=False
    )
    mean = lambda x: shown(x, bounds=False)
    shown_of = lambda name, kind, k: found.numbers(name, "pairs_shown", kind, k, "all", "correlation")
    more = lambda kind: shown(shown_of("gvm_tau_4", kind, "4") - shown_of("gvm", kind, "2"))
    four = ""
    if "gvm_tau_4" in found.runs:
        four = (
            f"¶ Four pairs, of a GVM trained with four, change the correlation over all tokens that two have by {more('train')} for policies of training, {more('held_out')} for those never "
            f"seen, {more('crowd')} for a mixture."
        )  # fmt: skip
    early, whole = (word(at("right_tau", span) - without(span)) for span in ("first3", "all"))
    head = "At the beginning of a response τ tells who writes: over" if early == "above" else "Over"
    later = (
        ": after a few words the text itself tells" if early == "above" and whole == "not distinguishable from" else ""
    )
    return (
        f"**Answer.** {head} the first three tokens the correlation is {mean(at('right_tau', 'first3'))} with the "
        f"writer's τ, {mean(without('first3'))} for a GVM trained without, {mean(at('other_tau', 'first3'))} with another policy's. Over all tokens it is {mean(at('right_tau', 'all'))} against "
        f"{mean(without('all'))} (difference {shown(at('right_tau', 'all') - without('all'))}){later}. Of policies never seen it is {unseen('gvm', '2')} with two "
        f"pairs, {unseen('gvm', '0')} with none shown, {unseen('gvm_no_tau', '0')} for the GVM trained without.{four}"
    )  # fmt: skip


def answer_moved(found: Found) -> str:
    at = lambda i, name: shown(
        [one["moved"][i]["correlation"][name]["all"] for one in found.probes.values()], bounds=False
    )
    kl = shown([one["moved"][-1]["kl"] for one in found.probes.values()], 1, bounds=False)
    first = lambda name: found.probed("teachers", "correlation", name, "all")
    start = lambda name: shown(first(name), bounds=False)
    effect = {"above": "For a mixture τ helps:", "below": "For a mixture τ misleads:"}
    head = effect.get(word(first("gvm") - first("gvm_no_tau_shown")), "For a mixture:")
    end = np.array([one["moved"][-1]["correlation"]["gvm"]["all"] for one in found.probes.values()], float)
    share = interval(end / first("gvm"))[0]
    lost = "loses most" if share < 0.5 else "loses a part" if share < 1 else "loses nothing"
    return (
        f"{head} with the SFT policy's own values the GVM's correlate {start('gvm')} when it is shown τ of its texts, {start('gvm_no_tau_shown')} when shown none. "
        f"And a frozen value model {lost} of what it knows of a policy that moves: with DVPO's values at a KL of {kl} the correlation is {at(-1, 'gvm')} with τ of its own, "
        f"{at(-1, 'gvm_no_tau_shown')} with none."
    )  # fmt: skip


def answer_ppo(found: Found) -> str:
    kl = lambda name: shown(found.numbers(name, "kl"), 1, bounds=False)
    gap = lambda level: at_kl(found, "dvpo", level) - at_kl(found, "ppo", level)
    reach = [x for x in (1.0, 2.0, 3.0, 4.0) if not np.isnan(gap(x)).any()]
    early = (
        "; ".join(f"{nats(x)}, `gae`'s is {word(gap(x))} PPO's ({shown(gap(x))})" for x in reach)
        or "1 nat, not compared"
    )
    both = ("dvpo", "ppo")
    ends = lambda kl: matched(found, "dvpo", kl, *GOLD) - matched(found, "ppo", kl, *GOLD)
    equal = levels(found, both) if all(len(family(found, name)) > 1 for name in both) else []
    final = "".join(
        f" Of final policies, between several β, `gae`'s is at {nats(x)} {word(ends(x))} PPO's ({shown(ends(x))})."
        for x in equal
    )
    steps, ill = steps_to(found, "dvpo"), broken(found, "dvpo")
    asked = [name for name in ON[1:] if name in found.runs]  # not A*-PO and online DPO, which are of another file
    others = [NAMES[name] for name in asked if broken(found, name)]
    called = ", ".join(NAMES[name].replace(", `q` (paper)", " with `q`") for name in asked)
    rest = f"so did {', '.join(others)}" if others else f"none of these did: {called}"
    saved = steps - steps_to(found, "ppo")
    fewer = "That it saves steps is not seen."
    if not np.isnan(saved).any() and word(saved) == "below":
        fewer = f"It saves steps (difference to that share {shown(saved, 0)})."
    trouble = ""
    if ill:
        at = [found.seeds.index(int(seed)) for seed in ill]
        low, end = lowest(found, "dvpo")[at].min(), found.numbers("dvpo", *GOLD)[at]
        peak = max(np.convolve(one, np.ones(10) / 10, "valid").max() for one in curve(found, "dvpo", "kl")[at])
        last = ", ".join(f"{x:.2f}" for x in curve(found, "dvpo")[at, -10:].mean(1))
        trouble = (
            f" **On seed {', '.join(ill)} `gae` broke down on the way**: a ten-step mean of gold as low as {low:.2f}, of KL as high as {peak:.0f}, and "
            f"{last} over the last ten steps ({', '.join(f'{x:.2f}' for x in end)} of the final policy); {rest}."
        ).replace("-", "−").replace("ten−step", "ten-step")  # fmt: skip
    return (
        f"**Answer.** DVPO's gold reward with `gae` is {against(found, 'dvpo', 'ppo', *GOLD)}, at a KL of {kl('dvpo')} against {kl('ppo')}; with the paper's `q` it is "
        f"{against(found, 'dvpo_q', 'ppo', *GOLD)}.{final} `gae` comes to 95 % of the way to PPO's plateau on {(~np.isnan(steps)).sum()} of "
        f"{len(steps)} seeds. {fewer}{trouble}¶ Early in training, where rollouts first come to a KL of {early}. What DVPO saves is the critic and "
        "its update ([docs/ppo_to_dvpo.md](docs/ppo_to_dvpo.md)); a frozen GVM stands where the reward model was."
    )  # fmt: skip


def gold(found: Found, name: str, bounds: bool = False) -> str:
    return shown(found.numbers(name, *GOLD), bounds=bounds)


def fell(found: Found, name: str) -> str:
    """` (breaks down on 1 of 5 seeds)`, or nothing."""
    seeds = len(broken(found, name))
    return f" (breaks down on {seeds} of {len(found.seeds)} seeds)" if seeds else ""


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
        f"with {text} {gold(found, name)}{fell(found, name)}, difference {shown(found.numbers(name, *GOLD) - found.numbers('dvpo', *GOLD))}"
        for name, text in names.items()
    )
    worse = [interval(found.numbers(name, *GOLD) - found.numbers("dvpo", *GOLD))[2] < 0 for name in names]
    seen = (
        "a gain from τ is seen" if all(worse) else "not all tell the same" if any(worse) else "no gain from τ is seen"
    )
    plain = ("dvpo_all_tokens", "dvpo_tau_all_tokens")
    also = ""
    if set(plain) <= found.runs.keys():
        kl = [shown(found.numbers(name, "kl"), 1, bounds=False) for name in plain]
        also = (
            f" With GVMs that weigh all tokens alike it is {gold(found, plain[0])} without τ and {gold(found, plain[1])} with, difference "
            f"{shown(found.numbers(plain[0], *GOLD) - found.numbers(plain[1], *GOLD))}, at a KL of {kl[0]} against {kl[1]}."
        )
    return f"For the policy {seen}: DVPO's gold reward is {gold(found, 'dvpo')} with τ of its own rollout{fell(found, 'dvpo')}; {rest}.{also}"


def answer_2(found: Found) -> str:
    wanted = [*TARGETS, *(policy for _, *two in TARGETS.values() for policy in two if policy)]
    wanted += [name for _, *both in OUTCOME.values() for pair in both for name in pair]
    if any(len(found.runs.get(name, {})) < len(found.seeds) for name in wanted):
        return NOT_YET
    of = lambda name: found.numbers(name, "no_tau", "all", "correlation")
    best, *rest = sorted(TARGETS, key=lambda name: -of(name).mean())
    told = {}
    for name in rest:
        told.setdefault(word(of(name) - of(best)), []).append(f"{TARGETS[name][0]} ({shown(of(name) - of(best))})")
    others = "; ".join(f"{verdict} it: {', '.join(some)}" for verdict, some in told.items())
    simplest = (
        f"The simplest GVM, without τ and with all tokens alike, makes a policy whose gold reward is {against(found, 'dvpo_all_tokens', 'dvpo', *GOLD)}, of the default GVM, and which breaks "
        f"down on {len(broken(found, 'dvpo_all_tokens'))} of {len(found.seeds)} seeds."
    )  # fmt: skip
    made = "; ".join(
        f"with `{form}` "
        + ", ".join(f"{gold(found, row[at])}{fell(found, row[at])} of {row[0]}" for row in TARGETS.values() if row[at])
        for at, form in ((1, "gae"), (2, "q"))
    )
    return (
        f"**Answer.** Nearest to the exact values is {TARGETS[best][0]} (correlation {shown(of(best), bounds=False)}); {others}. {answer_outcome(found)} The gold reward of the policy that DVPO "
        f"makes of them: {made}. {simplest}"
    )  # fmt: skip


OUTCOME = {  # a GVM -> (how it reads, the GVM and the policy where half of the loss is the outcome's, and where none is)
    "with τ": ("right_tau", ("gvm", "dvpo"), ("gvm_tau_all_tokens", "dvpo_tau_all_tokens")),
    "without τ": ("no_tau", ("gvm_no_tau", "dvpo_no_tau"), ("gvm_all_tokens", "dvpo_all_tokens")),
}


def outcome(found: Found) -> str:
    rows = []
    for text, (which, *both) in OUTCOME.items():
        if any(name not in found.runs for pair in both for name in pair):
            continue
        golds = [found.numbers(policy, *GOLD) for _, policy in both]
        gaps = [shown(golds[0] - golds[1]), "–"]
        for (gvm, policy), said, gap in zip(both, ("half", "none: all tokens alike"), gaps, strict=True):
            row = [shown(found.numbers(gvm, which, span, "correlation"), 3) for span in ("all", "first3")]
            row += [f"{gold(found, policy, True)}{fell(found, policy)}", shown(found.numbers(policy, "kl"), 1), gap]
            rows.append([text, said, *row])
    head = [
        "correlation, all tokens",
        "first three",
        "DVPO's gold reward",
        "KL to SFT",
        "gold − all tokens alike, paired",
    ]
    return table(["GVM", "of the loss, the last token's own part", *head], rows) if rows else NOT_YET


def answer_outcome(found: Found) -> str:
    """What the outcome's share of the loss is good for, in short and in full."""
    told = []
    for text, (which, (gvm, one), (plain, other)) in OUTCOME.items():
        if any(name not in found.runs for name in (gvm, one, plain, other)):
            return NOT_YET
        fit = lambda span, which=which, gvm=gvm, plain=plain: shown(
            found.numbers(gvm, which, span, "correlation") - found.numbers(plain, which, span, "correlation"), 3
        )
        gap = found.numbers(one, *GOLD) - found.numbers(other, *GOLD)
        ill = {*broken(found, one), *broken(found, other)}
        well = gap[[str(seed) not in ill for seed in found.seeds]]
        equal = gap_at_end(found, one, other) if len(family(found, one)) > 1 else np.array([])
        more = f", {shown(equal)} at equal KL" if len(equal) else ""
        more += f"; {shown(well)} without seed {listed(sorted(ill))}, where a policy breaks down" if ill else ""
        told.append(
            f"{text} it changes the correlation with the exact values by {fit('first3')} over the first three tokens, by {fit('all')} over all, and the policy's gold reward by "
            f"{shown(gap)} at {shown(found.numbers(one, 'kl') - found.numbers(other, 'kl'), 1)} nats more KL{more}."
        )
    return f"Half of the loss on the last token, our default, against all tokens alike: {told[0]}¶ {told[1][0].upper()}{told[1][1:]}"


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
    seeds = lambda name: f"{len(broken(found, name))} of {len(found.seeds)} seeds"
    worst = lambda name: f"{lowest(found, name).min():.2f}".replace("-", "−")
    rest = ", ".join(f"with {text} on {seeds(name)} ({worst(name)})" for name, text in names.items())
    other = ("dvpo_q_minus_v", "dvpo_q_start")
    ill = [name for name in other if name in found.runs and broken(found, name)]
    bad = lambda name: f"{100 * np.nanmax(found.numbers(name, 'malformed')):.0f} %"
    others = "".join(
        f" {NAMES[name]} breaks down on {seeds(name)}: of a final policy's answers up to {bad(name)} are malformed."
        for name in ill
    )
    if not any(broken(found, name) for name in ("dvpo", *names)):
        return f"None of these runs broke down: DVPO on {seeds('dvpo')} (the lowest ten-step mean of gold: {worst('dvpo')}), {rest}.{others}"
    return (
        "What breaks down is the end of the answers: a policy finds that it need not end them and goes on behind the full stop until it is cut. That is malformed and costs "
        "all gold, but the frozen GVM has never read such a text, its value at the cut stays above the mean, and stands as the terminal one. It befell DVPO on "
        f"{seeds('dvpo')} (the lowest ten-step mean of gold: {worst('dvpo')}), {rest}; `--eos_penalty 1` takes a standard deviation off the value at a cut.{others}"
    )  # fmt: skip


def answer_ladder(found: Found) -> str:
    if not {"dvpo_exact_q", "ppo_gold"} <= found.runs.keys():
        return NOT_YET
    lost = lambda one, other: shown(found.numbers(one, *GOLD) - found.numbers(other, *GOLD))
    return (
        f"With the *exact* values of the SFT mixture, frozen, DVPO comes to {gold(found, 'dvpo_exact_q')}; the learned GVM changes that by {lost('dvpo', 'dvpo_exact_q')}. PPO with the "
        f"gold reward itself comes to {gold(found, 'ppo_gold')}; the learned reward model changes that by {lost('ppo', 'ppo_gold')}. Exact values less exact reward: "
        f"{lost('dvpo_exact_q', 'ppo_gold')}."
    )  # fmt: skip


def answer_advantages(found: Found) -> str:
    names = ("dvpo_lam_1", "dvpo_q_minus_v", "dvpo_q_position", "dvpo_q_start", "dvpo_released")
    if not set(names) <= found.runs.keys():
        return NOT_YET
    rest = "; ".join(
        f"{NAMES[name]} {gold(found, name)}{fell(found, name)}, {word(found.numbers(name, *GOLD) - found.numbers('dvpo', *GOLD))} `gae`"
        for name in names
    )
    return f"As policies: `gae` {gold(found, 'dvpo')}{fell(found, 'dvpo')}, the paper's `q` {gold(found, 'dvpo_q')}; {rest}."


def answer_gradient(found: Found) -> str:
    at = lambda name, key, digits: shown(found.probed("gradient", name, key), digits, bounds=False)
    both = lambda name: f"{at(name, 'cosine', 2)} and {at(name, 'noise', 1)}"
    of = lambda key: [interval(found.probed("gradient", name, key))[0] for name in FORMS]
    ends = f"of all forms the cosine is {min(of('cosine')):.2f} at least, the noise over signal {min(of('noise')):.1f} to {max(of('noise')):.1f}"
    return (
        f"**Answer.** Cosine with the gradient of exact Q − V, and noise over signal of a batch of 32: with the GVM's values Q − V has {both('gvm_q_minus_v')}, `gae` {both('gvm_gae')}, `q` {both('gvm_q')}; "
        f"a whole response weighted by the reward model's score {both('reward_rm')}.¶ With exact values: Q − V 1 by definition and "
        f"{at('exact_q_minus_v', 'noise', 1)}, `gae` {both('exact_gae')}, the paper's `q` {both('exact_q')}; by the gold reward itself {both('reward_gold')}; {ends}."
    )  # fmt: skip


def answer_off(found: Found) -> str:
    others = {name: found.numbers(name, *GOLD) for name in OFF[1:] if name in found.runs}
    best = max(others, key=lambda name: np.nanmean(others[name]))
    rates = {name: np.nanmean(found.numbers(name, "misaligned")) for name in OFF if name in found.runs}
    least = min(rates, key=rates.get)
    level = [np.nanmean(found.numbers(name, "kl")) for name in ("vcb", best)]
    equal = off_at_matched_kl(found).replace(NOT_YET, "")
    return (
        f"**Answer.** Of the off-policy methods at their own settings VCB's gold reward is {against(found, 'vcb', best, *GOLD)}, the best of the others; their KLs are {level[0]:.1f} and {level[1]:.1f}. {equal}¶ At "
        f"the methods' own settings the lowest misalignment is {NAMES[least]}'s, {100 * rates[least]:.1f} % (VCB {100 * rates['vcb']:.1f} %)."
    )  # fmt: skip


def off_at_matched_kl(found: Found) -> str:
    if any(len(family(found, name)) < 2 for name in CALIBRATED):
        return NOT_YET
    told = []
    for name in CALIBRATED[1:]:
        at = {}
        for kl in LEVELS["γ"]:
            gap = matched(found, "vcb", kl, *GOLD) - matched(found, name, kl, *GOLD)
            if not np.isnan(gap).any():
                at.setdefault(word(gap), []).append(f"{kl:g}")
        if at:
            told.append(
                f"{', '.join(f'{verdict} {NAMES[name]} at {listed(some)}' for verdict, some in at.items())} nats"
            )
    ends = {}
    for name in (name for name in OFF if name not in CALIBRATED):
        for run in family(found, name):
            gap = gap_at_end(found, "vcb", run)
            verdict = (
                "not compared, since not between runs of VCB's on every seed, is" if np.isnan(gap).any() else word(gap)
            )
            ends.setdefault(verdict, {}).setdefault(name, []).append(f"{coefficient(run):g}")
    of = lambda some: ", ".join(f"{NAMES[name]} of {OWN[name][0]} {listed(values)}" for name, values in some.items())
    others = f" At the KL where runs of the other three end it is {'; '.join(f'{verdict} {of(some)}' for verdict, some in ends.items())}." if ends else ""  # fmt: skip
    most = [
        max(family(found, name), key=lambda run: found.numbers(run, *GOLD).mean())
        for name in OFF
        if family(found, name)
    ]
    at = lambda run: f"{said(run, True)}: {gold(found, run)} at {shown(found.numbers(run, 'kl'), 1, bounds=False)} nats"
    return f"At equal KL, between several γ, VCB's gold reward is {'; '.join(told)}.{others} Each method's most gold reward: {'; '.join(map(at, most))}."


def claim_rrhf(found: Found) -> str:
    """docs/dpo.md: what the weight of RRHF's cross-entropy does."""
    runs = family(found, "rrhf")
    if len(runs) < 2:
        return NOT_YET
    each = (f"{gold(found, run)} at c {coefficient(run):g} ({shown(found.numbers(run, 'kl'), 1, bounds=False)} nats)" for run in runs)  # fmt: skip
    return f"Of 16 responses to a prompt `rrhf` comes in the toy world to a gold reward of {'; '.join(each)}."


def answer_vcb(found: Found) -> str:
    """What n, the choice of pairs and noise do."""
    names = ("vcb_n_2", "vcb_n_4", "vcb_n_8", "vcb_full", "vcb_mean")
    if not {*names, "vcb_noise_1", "dpo_noise_1", "rest_noise_1"} <= found.runs.keys():
        return NOT_YET
    sizes = ", ".join(f"{gold(found, name)} of {name.rpartition('_')[2]}" for name in names[:3])
    other = lambda name: f"{gold(found, name)} ({shown(found.numbers(name, *GOLD) - found.numbers('vcb', *GOLD))})"
    lost = "; ".join(
        f"{NAMES[name]} {shown(found.numbers(f'{name}_noise_1', *GOLD) - found.numbers(name, *GOLD))}"
        for name in ("vcb", "dpo", "rest")
    )
    return (
        f"With fewer of the 16 responses to a prompt VCB's gold reward is {sizes}, {gold(found, 'vcb')} of all. Over all i ≠ j it is {other('vcb_full')}, with the mean in "
        f"place of the log-sum-exp {other('vcb_mean')}. What noise of one standard deviation in the scores takes: {lost}."
    )  # fmt: skip


def answer_over(found: Found) -> str:
    end = lambda row: {"gold": row["gold"]["mean"], "gold_ci95": row["gold"]["ci95"], "proxy": row["proxy"]["mean"]}
    lines = {
        f"{NAMES[name]} on seed {seed}": [*row["points"], end(row)]
        for name in (*ON, *OFF)
        for seed, row in found.runs.get(name, {}).items()
        if row.get("points")
    }
    seen = [name for name, *_ in report.over_optimised(lines)]
    short, full = over_by_coefficient(found)
    drawn = [found.runs["sft"][str(seed)]["best_of_n"] for seed in found.seeds]
    best = np.mean([[(row["kl"], row["gold"]) for row in some] for some in drawn], 0)
    line = lambda kl, some: np.interp(
        kl, *zip(*((row["kl"], row["gold"]) for row in some), strict=True), right=math.nan
    )
    ruler = lambda name: np.array([line(kl, some) for kl, some in zip(found.numbers(name, "kl"), drawn, strict=True)])
    gaps = {name: found.numbers(name, *GOLD) - ruler(name) for name in OFF if name in found.runs}
    within = {name: gap for name, gap in gaps.items() if not np.isnan(gap).any()}
    below = "; ".join(f"{NAMES[name]} is {word(gap)} best of n ({shown(gap)})" for name, gap in within.items())
    below = f"; at their own KL, where that is no greater, {below}" if below else ""
    return (
        f"**Answer.** Within a run, a final gold reward below an earlier one while the proxy is above, gold beyond its noise, is seen in {len(seen)} of {len(lines)} "
        f"runs{' (' + ', '.join(seen) + ')' if seen else ''}.{short}¶ Best of {2 ** (len(best) - 1)} of the SFT policy has gold reward {best[-1, 1]:.2f} at a KL of "
        f"{best[-1, 0]:.1f} at most{below}.{full}"
    )  # fmt: skip


def over_by_coefficient(found: Found) -> tuple[str, str]:
    """Whether the smallest coefficient's policy has more proxy and less gold than the method's own, in short and in full."""
    out, verdicts = [], {}
    for name in ("dvpo", "ppo", *CALIBRATED):
        runs = family(found, name)
        if not runs or runs[0] == name or np.isnan(found.numbers(runs[0], "kl")).any():
            continue
        gap = lambda *path, least=runs[0], name=name: found.numbers(least, *path) - found.numbers(name, *path)
        kl = shown(found.numbers(runs[0], "kl"), 1, bounds=False)
        ill = fell(found, runs[0]) if name in ON else ""  # what breaks down has not over-optimised a proxy
        for path in (("proxy", "mean"), GOLD):
            verdicts.setdefault((path[0], word(gap(*path))), []).append(NAMES[name])
        out.append(
            f"{said(runs[0], True)} (KL {kl}){ill}: gold {shown(gap(*GOLD))}, proxy {shown(gap('proxy', 'mean'))}"
        )
    if not out:
        return "", ""
    who = lambda *verdict: listed(verdicts.get(verdict, ["no method"]))
    return (
        f" The smallest coefficient's policy has more proxy than the own coefficient's with {who('proxy', 'above')}; less gold, beyond its noise, with {who('gold', 'below')}.",
        f" Of the smallest coefficients, less the method's own: {'; '.join(out)}.",
    )  # fmt: skip


def answer_implicit(found: Found) -> str:
    at = lambda name, key: shown(found.probed("implicit", name, key), 1, True, False)
    length = lambda name: shown(found.probed("implicit", name, "length"), bounds=False)
    gap = lambda *path: shown(found.numbers("dpo_length_penalty", *path) - found.numbers("dpo", *path))
    there = "dpo_length_penalty" in found.runs
    gap_of_order = shown(found.probed("implicit", "dpo", "gold") - found.probed("implicit", "rm", "gold"), 1, True)
    penalised = (
        f" With the length penalty answers differ by {gap('length')} tokens, gold reward by {gap(*GOLD)}."
        if there
        else ""
    )
    return (
        f"**Answer.** DPO's implicit reward puts {at('dpo', 'gold')} of pairs in the gold order, VCB's {at('vcb', 'gold')}; the reward model that both learned "
        f"from {at('rm', 'gold')}. DPO's less the reward model's: {gap_of_order}.¶ The implicit reward's correlation with length is {length('dpo')}, the reward model's {length('rm')}.{penalised}"
    )  # fmt: skip


def answer_teachers(found: Found) -> str:
    of = lambda name: found.probed("teachers", "correlation", name, "all")
    at = lambda name: shown(of(name), bounds=False)
    most = allowed(found, "all")
    sampling = interval(most - of("gold_1"))[0] > interval(of("gold_1") - of("rm_1"))[0]
    return (
        f"**Answer.** One forward pass of the GVM with no τ shown correlates {at('gvm_no_tau_shown')} with the SFT policy's values ({at('gvm')} with τ; {shown(most, bounds=False)} is the "
        f"most that the truth's noise allows), {word(of('gvm_no_tau_shown') - of('rm_1'))} what the reward model tells by one continuation, {at('rm_1')}; "
        f"by four it is {at('rm_4')}, by eight {at('rm_8')}. One under the gold reward itself tells {at('gold_1')}: "
        f"{'sampling, not the teacher,' if sampling else 'the teacher, not sampling,'} is the larger error."
    )  # fmt: skip


def answer_baselines(found: Found) -> str:
    names = [name for name in ON[3:] if name in found.runs]
    rest = "; ".join(f"{NAMES[name]}'s is {against(found, name, 'ppo', *GOLD)}" for name in names)
    if "grpo" not in names:
        return f"**Answer.** Gold reward at equal rollouts: {rest}."
    kl = lambda name: shown(found.numbers(name, "kl"), 1, bounds=False)
    gap = lambda level: at_kl(found, "grpo", level) - at_kl(found, "ppo", level)
    reach = [x for x in (1.0, 2.0, 3.0) if not np.isnan(gap(x)).any()]
    early = "; ".join(f"{nats(x)}, {word(gap(x))} PPO's ({shown(gap(x))})" for x in reach) or "1 nat, not compared"
    return (
        f"**Answer.** Gold reward at equal rollouts: {rest}. But GRPO ends at a KL of {kl('grpo')}, PPO at {kl('ppo')}; where rollouts first come to a KL of {early}."
    )  # fmt: skip


def claim_questions(found: Found) -> str:
    """README: what everyone asks first."""
    gap = lambda name: found.numbers(name, *GOLD) - found.numbers("ppo", *GOLD)
    seeds = len(broken(found, "dvpo"))
    broke = f", and on {seeds} of {len(found.seeds)} seeds it broke down on the way" if seeds else ""
    names = ("dvpo_no_tau_shown", "dvpo_no_tau", "dvpo_other_tau")
    worse = [
        interval(found.numbers(name, *GOLD) - found.numbers("dvpo", *GOLD))[2] < 0
        for name in names
        if name in found.runs
    ]
    policy = f"{'some' if any(worse) else 'no'} gain from τ is seen" if worse else "what τ gives is not measured yet"
    first = lambda name, which: shown(found.numbers(name, which, "first3", "correlation"), bounds=False)
    all_ = lambda name, which: shown(found.numbers(name, which, "all", "correlation"), bounds=False)
    return (
        f"Does DVPO beat PPO? In the toy world its gold reward is {word(gap('dvpo'))} PPO's (difference {shown(gap('dvpo'))}){broke}; with the paper's `q` it is "
        f"{word(gap('dvpo_q'))} PPO's. Is τ worth it? Token values correlate {first('gvm', 'right_tau')} with the exact ones over a response's "
        f"first three tokens, {first('gvm_no_tau', 'no_tau')} where a GVM was trained without; over all tokens {all_('gvm', 'right_tau')} against {all_('gvm_no_tau', 'no_tau')}. In the policy "
        f"trained on these values {policy}."
    )  # fmt: skip


def claim_curve(found: Found) -> str:
    """README: what the fall in the picture of learning curves is."""
    said = []
    for seed in broken(found, "dvpo"):
        gold = curve(found, "dvpo")[found.seeds.index(int(seed))]
        below = np.flatnonzero(gold[10:] < 0) + 11  # the first steps are near the SFT policy, which is below 0
        last = f", the last of them step {below[-1]}" if len(below) else ""
        said.append(
            f"The fall is seed {seed}, on which DVPO broke down: after step 10 the gold reward of its rollouts is below 0 at {len(below)} of {len(gold) - 10} steps{last}."
        )
    return " ".join(said)


def claim_tokens(found: Found) -> str:
    """README: the picture of token values in numbers, of the first seed."""
    signed = lambda x: f"{x:+.2f}".replace("-", "−")
    step = lambda line, key, at: signed(line[key][at + 1] - line[key][at])
    each = []
    for pair in found.probes[str(found.seeds[0])]["tokens"]:
        at = pair["decisive"]
        two = (f"`{line['words'][at]}` {step(line, 'q', at)} ({step(line, 'exact', at)})" for line in pair["lines"])
        each.append(f"{pair['title'].lower()}: {', '.join(two)}")
    return f"Steps of Q at the word where two part, and in brackets those of the exact values: {'; '.join(each)}."


def brief(text: str) -> str:
    """What stands before the mark ¶, which `rewritten` takes out."""
    return text.removeprefix("**Answer.** ").partition("¶")[0]


def claims(found: Found, real: dict) -> str:
    """The findings in short, at the head of EXPERIMENTS.md, each with the number of its question."""
    answers = {
        "1": (answer_values, answer_moved, answer_tau), "2": (answer_2,), "3": (answer_ppo, answer_ladder), "4": (answer_gradient, answer_advantages), "5": (answer_off,),
        "6": (answer_over,), "7": (answer_implicit,), "8": (answer_teachers,), "9": (answer_baselines,),
    }  # fmt: skip
    asked = [(number, answer(found)) for number, some in answers.items() for answer in some]
    told = [(number, brief(text)) for number, text in [*asked, *real.items()] if text != NOT_YET]
    return "\n".join(f"- **{number}.** {text}" for number, text in told)


def _dig(row, path):
    for key in path:
        row = row.get(key) if isinstance(row, dict) else None
    return row


ON = ("dvpo", "dvpo_q", "ppo", "remax", "rloo", "grpo", "reinforce++")
OFF = ("vcb", "dpo", "ipo", "slic", "rrhf", "rest")
BETAS = [f"{name}_beta_{beta}".replace(f"_beta_{OWN[name][1]}", "") for name in ("dvpo", "ppo") for beta in ("0.02", "0.05", "0.1", "0.2")]  # fmt: skip
CALIBRATED = ("vcb", "dpo", "ipo")  # those that gamma moves along KL
FULL = ("gold reward", "proxy (RM)", "KL to SFT", "malformed", "misaligned", "misaligned (gold)", "tokens", "EAD")


def later(toy: Found, report: dict | None) -> str:
    """A*-PO and online DPO: of a file of their own, made at another commit, until all runs are made anew."""
    names, note = ("astar", "astar_once", "online_dpo"), ""
    of = toy if set(names) <= toy.runs.keys() or report is None else Found(report | {"seeds": toy.seeds})
    if not set(names) <= of.runs.keys():
        return NOT_YET
    own = {name: of.numbers(name, *GOLD) for name in names}
    sft = toy.numbers("sft", *GOLD)
    worse = lambda name: f"{int((own[name] < sft).sum())} of {len(sft)} seeds"
    gap = own["online_dpo"] - toy.numbers("ppo", *GOLD)
    if of is not toy:
        tried = "; ".join(
            f"{NAMES[name]}, β {best['kl_coef']} at {best['learning_rate']}"
            for name, rows in report["tuning"].items() for best in rows if best["chosen"]
        )  # fmt: skip
        note = f" From commit {report['code']}; six settings each on seed 0, chosen by the rule above: {tried}. A*-PO with one update keeps those of four."
    return (
        f"{policies(of, names, FULL)}\n\nA*-PO ends below the SFT policy's gold reward on {worse('astar')} with four updates a rollout, on {worse('astar_once')} with one. "
        f"Online DPO's gold reward is {word(gap)} PPO's (difference {shown(gap)}).{note}"
    )  # fmt: skip


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
        made["about_real_policies"] = lambda: about_real_policies(load("policies"))
        made["real_policies"] = lambda: real_policies(load("policies"))
        made["answer_real_policies"] = lambda: answer_real_policies(load("policies"))
    of_real = {"sentiment": ("A real model", answer_sentiment), "policies": ("Real policies", answer_real_policies)}
    real = {title: answer(load(name)) for name, (title, answer) in of_real.items() if name in there}
    if "toy" in there:
        toy = Found(load("toy"))
        made |= {
            "methods": lambda: policies(toy, ("sft", *ON, *OFF), FULL),
            "headline": lambda: policies(toy, ("sft", "dvpo", "dvpo_q", "ppo")),
            "values": lambda: values(toy, [("gvm", "trained with τ"), ("gvm_no_tau", "trained without")], yardsticks=True),
            "pairs": lambda: pairs_shown(toy),
            "tau_policy": lambda: policies(toy, ("dvpo", "dvpo_no_tau_shown", "dvpo_no_tau", "dvpo_other_tau"), against="dvpo"),
            "readings": lambda: readings(toy, ("sft", "dvpo", "ppo", "grpo")),
            "targets": lambda: targets(toy),
            "outcome": lambda: outcome(toy),
            "claim_outcome": lambda: answer_outcome(toy),
            "claim_vcb": lambda: off_at_matched_kl(toy),
            "claim_rrhf": lambda: claim_rrhf(toy),
            "about_lines": lambda: about_lines(toy),
            "targets_policy": lambda: policies(toy, [gae for _, gae, _ in TARGETS.values() if gae], against="dvpo_no_tau")
            .replace(NAMES["dvpo_no_tau"], "outcome share 0.5"),  # here none has τ
            "targets_q": lambda: policies(toy, [q for *_, q in TARGETS.values() if q], against="dvpo_q_no_tau"),
            "ladder": lambda: policies(toy, ("dvpo_exact_q", "ppo_gold", "dvpo", "dvpo_eos_penalty", "dvpo_no_tau", "ppo"), against="ppo"),
            "equal_kl": lambda: equal_kl(toy, ON),
            "plateau": lambda: plateau(toy, (*ON, "dvpo_eos_penalty", "dvpo_no_tau", "dvpo_exact_q")),
            "advantages": lambda: policies(
                toy, ("dvpo", "dvpo_lam_1", "dvpo_q_minus_v", "dvpo_q", "dvpo_q_position", "dvpo_q_start", "dvpo_released"), against="dvpo"
            ),
            "coefficients": lambda: policies(toy, [run for name in OFF for run in family(toy, name)], FULL, full=True),
            "matched": lambda: at_matched_kl(toy, CALIBRATED),
            "matched_all": lambda: all_at_matched_kl(toy, CALIBRATED),
            "their_kl": lambda: at_their_kl(toy, [name for name in OFF if name not in CALIBRATED], CALIBRATED),
            "vcb": lambda: policies(toy, ("vcb", "vcb_n_2", "vcb_n_4", "vcb_n_8", "vcb_full", "vcb_mean"), FULL, against="vcb"),
            "later": lambda: later(toy, load("later") if "later" in there else None),
            "betas": lambda: policies(toy, BETAS, ("gold reward", "proxy (RM)", "KL to SFT", "malformed"), full=True),
            "matched_betas": lambda: at_matched_kl(toy, ("dvpo", "ppo")),
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
                "answer_4": lambda: f"{answer_gradient(toy)}\n\n{answer_advantages(toy)}", "answer_5": lambda: f"{answer_off(toy)}\n\n{answer_vcb(toy)}", "answer_6": lambda: answer_over(toy),
                "answer_7": lambda: answer_implicit(toy), "answer_8": lambda: answer_teachers(toy),
                "answer_9": lambda: answer_baselines(toy), "claims": lambda: claims(toy, real), "claim_questions": lambda: claim_questions(toy) + (claim_real_policies(load("policies")) if "policies" in there else ""), "claim_tokens": lambda: claim_tokens(toy), "claim_curve": lambda: claim_curve(toy),
                "gradients": lambda: gradients(toy), "teachers": lambda: teachers(toy), "moved": lambda: moved(toy),
                "implicit": lambda: implicit(toy),
            }  # fmt: skip
    return made


def rewritten(text: str, made: dict) -> str:
    """The page with each table that can be made anew; of the others, that there is nothing yet."""
    fill = lambda m: f"{m[1]}{made[m[2]]().replace('¶', '') if m[2] in made else NOT_YET}\n{m[3]}"
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
