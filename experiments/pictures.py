"""The pictures of EXPERIMENTS.md and of the README's toy world, from experiments/toy.json: docs/*.png.

    python experiments/pictures.py

Lines and dots are means over seeds, bands the range of the seeds, whiskers 95 % intervals (Student's t), small dots single seeds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import report
from experiments import page
from experiments.page import OFF, ON, Found, family, interval

DOCS = page.ROOT / "docs"
SAID = {"right_tau": "τ of the writer", "other_tau": "τ of another", "no_tau_shown": "none shown", "trained_without": "trained without τ",
        "bayes_tau": "Bayes-optimal, τ", "bayes_no_tau": "Bayes-optimal, no τ", "variance": "position's mean"}  # fmt: skip


def seeds_of(found: Found) -> str:
    return f"seeds {found.seeds[0]} to {found.seeds[-1]}" if len(found.seeds) > 1 else f"seed {found.seeds[0]}"


def plain(name: str) -> str:
    return page.said(name).replace("`", "")


def band(axis, x, rows, look, label: str, every: int = 0, smooth: bool = False):
    """The mean of rows (seeds, points), and from the lowest to the highest seed."""
    colour, marker, line = look
    rows = np.array([report.smooth(row) for row in rows]) if smooth else np.asarray(rows, float)
    mean, low, high = np.nanmean(rows, 0), np.nanmin(rows, 0), np.nanmax(rows, 0)
    axis.fill_between(x, low, high, color=colour, alpha=0.13, linewidth=0)
    axis.plot(
        x,
        mean,
        color=colour,
        linestyle=line,
        marker=marker,
        markevery=every or 1,
        markersize=5,
        linewidth=1.8,
        label=label,
    )


def finish(figure, axes, titles, ink, note: str, columns: int = 4):
    for axis, (title, below) in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=11), axis.set_xlabel(below)
        axis.grid(color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    handles = {label: one for axis in axes for one, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles, loc="outside lower center", ncols=columns, fontsize=9, title=note, title_fontsize=8.5
    )
    return figure


def draw_curves(found: Found, names, ink: str) -> Figure:
    figure = Figure((10, 4.4), layout="constrained")
    axes, look = figure.subplots(1, 2), report.looks(names)
    for i, name in enumerate(names):
        for axis, key in zip(axes, ("gold", "kl"), strict=True):
            rows = page.curve(found, name, key)
            x = np.arange(1, rows.shape[1] + 1)
            band(axis, x, rows, look[name], plain(name), (5 + 2 * i, 18), smooth=True)
    sft = np.mean(found.numbers("sft", "gold", "mean"))
    axes[1].set_ylim(0, 15), axes[0].set_ylim(bottom=-0.6)
    axes[0].axhline(sft, color=ink, linewidth=1.2, linestyle=(0, (1, 2)), label="SFT, held-out prompts")
    titles = [
        ("gold reward of the rollouts (the axis ends at −0.6)", "step (64 responses)"),
        ("KL to the SFT policy, nats a response (the axis ends at 15)", "step (64 responses)"),
    ]
    return finish(figure, axes, titles, ink, f"moving averages; means of {seeds_of(found)} and the range of the seeds")


def points(found: Found, name: str):
    """(kl, gold, proxy) along a run from SFT, mean over seeds."""
    start = [[0.0, 0.0, 0.0], found.numbers("sft", "gold", "mean"), found.numbers("sft", "proxy", "mean")]
    rows = [found.runs[name][str(seed)] for seed in found.seeds]
    final = [[row["kl"], row["gold"]["mean"], row["proxy"]["mean"]] for row in rows]
    steps = min(len(row["points"]) for row in rows)
    middle = [[[row["points"][i][key] for key in ("kl", "gold", "proxy")] for row in rows] for i in range(steps)]
    if steps and rows[0]["points"][-1]["step"] == rows[0]["summary"].get("steps"):
        middle.pop()  # the last snapshot is the final policy, graded on fewer texts
    return (
        [[0.0, float(np.mean(start[1])), float(np.mean(start[2]))], *np.mean(middle, 1), np.mean(final, 0)]
        if middle
        else []
    )


def draw_frontier(found: Found, names, ink: str) -> Figure:
    figure = Figure((10, 5), layout="constrained")
    axes, look = figure.subplots(1, 2), report.looks(names)
    for name in names:
        line = np.array(points(found, name))
        colour, marker, dash = look[name]
        for axis, column in zip(axes, (1, 2), strict=True):
            axis.plot(
                line[:, 0],
                line[:, column],
                color=colour,
                linestyle=dash,
                marker=marker,
                markersize=4.5,
                linewidth=1.5,
                label=plain(name),
            )
            axis.plot(*line[-1, [0, column]], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)
    best = [found.runs["sft"][str(seed)]["best_of_n"] for seed in found.seeds]
    for axis, key in zip(axes, ("gold", "proxy"), strict=True):
        mean = lambda key, best=best: [np.mean([row[i][key] for row in best]) for i in range(len(best[0]))]
        sizes = ", ".join(f"{row['n']:.0f}" for row in best[0])
        axis.plot(
            mean("kl"), mean(key), color=ink, linestyle=":", marker=".", linewidth=1.6, label=f"best of n = {sizes}"
        )
    below = "KL to the SFT policy, nats a response"
    titles = [("gold reward, held-out prompts", below), ("proxy: the reward model's score, standardised", below)]
    return finish(
        figure, axes, titles, ink, f"means of {seeds_of(found)}; a point a snapshot, the final policy ringed", 5
    )


def draw_coefficients(found: Found, names, frame: float, ink: str) -> Figure:
    """Final policies of one coefficient each, gold reward and proxy against KL: a line a method. Single seeds beyond `frame` nats
    are counted below, not drawn: a run that broke down lies far outside."""
    figure = Figure((10, 5.2), layout="constrained")
    axes, look = figure.subplots(1, 2), report.looks(names)
    best, beyond = [found.runs["sft"][str(seed)]["best_of_n"] for seed in found.seeds], set()
    for axis, path in zip(axes, (page.GOLD, ("proxy", "mean")), strict=True):
        line = np.mean([[(row["kl"], row[path[0]]) for row in some] for some in best], 0)
        sizes = ", ".join(f"{row['n']:.0f}" for row in best[0])
        axis.plot(*line.T, color=ink, linestyle=":", label=f"best of n = {sizes}")
        for i, name in enumerate(names):
            colour, marker, dash = look[name]
            runs = family(found, name)
            x, y = (np.array([found.numbers(run, *one) for run in runs]) for one in (("kl",), path))
            axis.plot(x[x < frame], y[x < frame], ".", color=colour, alpha=0.45, markersize=4)
            beyond |= {
                (run, seed) for run, some in zip(runs, x, strict=True) for seed, at in enumerate(some) if at >= frame
            }
            middle = np.median(x, 1), np.median(y, 1)
            axis.plot(*middle, color=colour, marker=marker, linestyle=dash, label=plain(name))
            sign = page.OWN[name][0]
            side = (
                {"ha": "left", "va": "top", "xytext": (5, -3)}
                if i % 2
                else {"ha": "right", "va": "bottom", "xytext": (-5, 3)}
            )
            for end in (0, -1):
                value = f"{page.coefficient(runs[end]):g}"
                text = f"{value} step{'s' * (value != '1')}" if sign == "improve steps" else f"{sign} {value}"
                at = middle[0][end], middle[1][end]
                axis.annotate(text, at, textcoords="offset points", fontsize=7.5, color=colour, **side)
    below = "KL to the SFT policy, nats a response"
    titles = [("gold reward, held-out prompts", below), ("proxy: the reward model's score, standardised", below)]
    note = f"final policies; small dots are {seeds_of(found)}, lines go through medians, labelled at their ends"
    note += f"; single seeds beyond {frame:g} nats, not drawn: {len(beyond)}" if beyond else ""
    return finish(figure, axes, titles, ink, note, 7)


def draw_values(found: Found, ink: str) -> Figure:
    """Left: error of token values by position. Right: what the frozen GVM still knows of DVPO's policy as it moves."""
    figure = Figure((10, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    look = dict(zip(SAID, [*report.looks(list("abcde")).values(), (ink, "", ":"), (ink, "", (0, (5, 2)))], strict=True))
    for name in ("right_tau", "other_tau", "no_tau_shown", "trained_without", "bayes_tau", "bayes_no_tau", "variance"):
        rows = [one["positions"][name] for one in found.probes.values() if name in one["positions"]]
        if rows:
            width = min(map(len, rows))
            band(left, np.arange(1, width + 1), np.array([row[:width] for row in rows]), look[name], SAID[name], (1, 3))
    left.set_ylim(bottom=0)
    for name, key in (("gvm", "right_tau"), ("gvm_no_tau_shown", "no_tau_shown")):
        steps = [[point for point in one["moved"]] for one in found.probes.values()]
        first = [one["teachers"]["correlation"][name]["all"] for one in found.probes.values()]
        rows = np.array(
            [[a, *(p["correlation"][name]["all"] for p in some)] for a, some in zip(first, steps, strict=True)], float
        )
        steps_taken = [0, *(point["step"] for point in steps[0])]
        label = "τ of its own" if name == "gvm" else SAID[key]
        band(right, steps_taken, rows, look[key], label)
    titles = [("mean squared error of token values", "token of the response"),
              ("correlation of Q with the policy's own values", "step of DVPO")]  # fmt: skip
    note = f"right: truth by the gold reward of continuations; means of {seeds_of(found)} and the range of the seeds"
    return finish(figure, (left, right), titles, ink, note)


def draw_dots(found: Found, groups: dict, ink: str) -> Figure:
    """Gold reward and KL of final policies, a row each: groups is title -> names of runs."""
    rows = [row for title, names in groups.items() for row in (None, *names)]
    figure = Figure((10, 0.7 + 0.27 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    look, labels = report.looks([name for name in rows if name]), []
    titles = iter(groups)
    for y, name in enumerate(rows):
        if name is None:
            labels.append(next(titles))
            above = labels[-1]
            continue
        labels.append(CALLED.get((above, name), plain(name)))
        for axis, path in zip(axes, (("gold", "mean"), ("kl",)), strict=True):
            x = found.numbers(name, *path)
            mean, low, high = interval(x)
            axis.plot(x, [y] * len(x), ".", color=look[name][0], alpha=0.45, markersize=4)
            if low == low:
                axis.plot([low, high], [y, y], color=look[name][0], linewidth=1.6)
            axis.plot(mean, y, look[name][1], color=look[name][0], markersize=6.5)
    axes[0].set_yticks(range(len(rows)), labels, fontsize=9), axes[0].set_ylim(len(rows) - 0.5, -0.5)
    for tick, name in zip(axes[0].get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if name else "bold")
    below = f"mean, 95 % interval and single seeds ({seeds_of(found)})"
    for axis, title in zip(axes, ("gold reward, held-out prompts", "KL to the SFT policy"), strict=True):
        axis.set_title(title, fontsize=11), axis.set_xlabel(below if axis is axes[0] else "nats a response")
        axis.grid(axis="x", color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    return figure


CALLED = {  # in a group where that is what differs
    ("targets of the GVM, no τ", "dvpo_no_tau"): "outcome share 0.5",
    ("the same with τ", "dvpo"): "outcome share 0.5",
}
GROUPS = {
    "ladder": {
        "values are exact, or learned": ("dvpo_exact_q", "dvpo", "dvpo_no_tau"),
        "reward is exact, or learned": ("ppo_gold", "ppo"),
        "what τ is shown to DVPO's GVM": ("dvpo", "dvpo_no_tau_shown", "dvpo_other_tau"),
        "advantages from the same Q": ("dvpo", "dvpo_lam_1", "dvpo_q_minus_v", "dvpo_q", "dvpo_q_position", "dvpo_q_start", "dvpo_released"),
        "targets of the GVM, no τ": ("dvpo_no_tau", "dvpo_all_tokens", "dvpo_td_95", "dvpo_td_0"),
        "the same with τ": ("dvpo", "dvpo_tau_all_tokens"),
        "without τ, with q": ("dvpo_q_no_tau", "dvpo_q_eq_2", "dvpo_q_paper"),
    },
    "off_policy": {
        "VCB paper's methods": OFF,
        "responses to a prompt, pairs": ("vcb_n_2", "vcb_n_4", "vcb_n_8", "vcb", "vcb_full", "vcb_mean"),
        "noise of one standard deviation in the scores": ("vcb_noise_1", "dpo_noise_1", "rest_noise_1"),
        "length": ("dpo", "dpo_length_penalty"),
    },
}  # fmt: skip


def draw_gradient(found: Found, ink: str) -> Figure:
    figure = Figure((10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    names = list(next(iter(found.probes.values()))["gradient"])
    for y, name in enumerate(names):
        for axis, key in zip(axes, ("cosine", "noise"), strict=True):
            x = np.array([one["gradient"][name][key] for one in found.probes.values()], float)
            colour = "#d1353f" if name.startswith("reward") else "#0b3c8c" if name.startswith("gvm") else "#3fae49"
            mean, low, high = interval(x)
            (
                axis.plot(x, [y] * len(x), ".", color=colour, alpha=0.45, markersize=4),
                axis.plot(mean, y, "o", color=colour),
            )
            axis.plot([low, high], [y, y], color=colour, linewidth=1.6)
    (
        axes[0].set_yticks(range(len(names)), [page.FORMS[name] for name in names], fontsize=9),
        axes[0].set_ylim(len(names) - 0.5, -0.5),
    )
    axes[1].set_xscale("log")
    axes[1].set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"]), axes[1].minorticks_off()
    titles = ("cosine with the gradient of exact Q − V", "noise over signal of a batch of 32")
    for axis, title in zip(axes, titles, strict=True):
        (
            axis.set_title(title, fontsize=11),
            axis.set_xlabel(f"mean, 95 % interval and single seeds ({seeds_of(found)})", fontsize=9),
        )
        axis.grid(color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    return figure


def draw_sentiment(told: dict, ink: str) -> Figure:
    """Gold reward, and the perplexity of the texts to a model that no run has touched, against KL: a dot a run."""
    figure = Figure((10, 4.2), layout="constrained")
    axes, names = figure.subplots(1, 2), dict.fromkeys(name.split("-")[0] for name in told["policies"])
    looks = report.looks([name for name in names if name != "sft"])
    for axis, key in zip(axes, ("gold", "base_perplexity"), strict=True):
        for name in names:
            rows = [row for run, row in told["policies"].items() if run.split("-")[0] == name]
            y = [row["gold"]["mean"] if key == "gold" else row[key] for row in rows]
            colour, marker, _ = looks.get(name, (ink, "s", ""))
            axis.scatter([row["kl"] for row in rows], y, color=colour, marker=marker, s=46, label=plain(name))
        axis.margins(0.12)
    axes[0].set_ylabel("gold reward, held-out prompts"), axes[1].set_ylabel("perplexity by the base model")
    below = "KL to the SFT policy, nats a response"
    note = f"{told['model']}, a dot a run: RL on seeds 0 to {max(int(n.split('-')[1]) for n in told['policies'] if '-' in n)}"
    return finish(
        figure, axes, [("Controlled sentiment", below), ("What it does to the language", below)], ink, note, 6
    )


def pictures(found: Found) -> dict:
    """File name -> how it is drawn, for what the results hold."""
    there = lambda names: [name for name in names if name in found.runs]
    made = {}
    if "ppo" in found.runs and "dvpo" in found.runs:
        made["learning_curve"] = (draw_curves, found, there(("dvpo", "dvpo_q", "ppo")))
        made["learning_curves"] = (draw_curves, found, there(ON))
        made["frontier"] = (draw_frontier, found, [name for name in there((*ON, *OFF)) if points(found, name)])
    for title, names, frame in (("coefficients", OFF, 4.5), ("betas", ("dvpo", "ppo"), 15)):
        if several := [name for name in names if len(family(found, name)) > 1]:
            made[title] = (draw_coefficients, found, several, frame)
    for name, groups in GROUPS.items():
        groups = {title: some for title, names in groups.items() if len(some := there(names)) > 1}
        if groups:
            made[name] = (draw_dots, found, groups)
    if found.probes:
        made |= {"values": (draw_values, found), "gradient": (draw_gradient, found)}
        pairs = next(iter(found.probes.values()))["tokens"]
        made["token_values"] = (report.draw_tokens, pairs, report.scale_limit(pairs))
    return made


def main():
    found = Found(json.loads((page.ROOT / "experiments" / "toy.json").read_text()))
    made = pictures(found)
    real = page.ROOT / "experiments" / "sentiment.json"
    if real.is_file():
        made["sentiment"] = (draw_sentiment, json.loads(real.read_text()))
    for name, (draw, *inputs) in made.items():
        report.png(draw, *inputs, path=DOCS / f"{name}.png")
        print(f"docs/{name}.png written")


if __name__ == "__main__":
    main()
