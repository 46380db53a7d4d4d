"""Turn a folder into one page, report.html in it: a demo's (results.json and the runs beside it), or any run's.

    python eval/report.py runs/demo      after `python eval/demo.py runs/demo`
    python eval/report.py runs/dvpo      curves of all that the run has logged, its samples, flags and summary

The page is self-contained (pictures are inline SVG). Of a demo, `learning_curve.png`, `frontier.png` and
`token_values.png` are written beside it, for a README. Whatever is missing is left out. All text of models and data is
escaped: only a `Raw` string, built here, reaches the page as HTML. To compare runs: eval/compare.py.
"""

from __future__ import annotations

import functools
import html
import io
import json
import math
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm
import toy
from eval import calibration, demo, program
from eval import samples as eval_samples

SAMPLES = 6  # held-out prompts whose responses are shown
FIRST = ("gold", "reward", "score", "accuracy", "loss", "kl")  # of a run's metrics: shown before the others
POINTS = 1000  # of a curve that is drawn: longer ones are drawn as means of equal blocks
CONTRAST = "#d9661f"  # of the second side of a comparison; the first is drawn in the page's text colour
INK = "#010203"  # stands for the page's text colour in a picture: `svg` turns it into currentColor
SOLID, DASHED = "-", (0, (4, 2))
LOOKS = {  # method -> colour, marker, line: the same in every picture; where two are alike in grey, marker or line tells them apart
    "dvpo": ("#0b3c8c", "o", SOLID), "dvpo_q": ("#5aa9e6", "s", SOLID), "ppo": ("#d1353f", "^", SOLID),
    "remax": ("#ee8a1d", "D", SOLID), "rloo": ("#7a5c00", "v", SOLID), "grpo": ("#3fae49", "P", SOLID),
    "reinforce++": ("#7b2d8b", "X", SOLID), "vcb": ("#006d5b", "o", DASHED), "dpo": ("#e377a8", "s", DASHED),
    "ipo": ("#8d8d8d", "^", DASHED), "slic": ("#b9a800", "D", DASHED), "rrhf": ("#4d2c1d", "v", DASHED),
    "rest": ("#45c4b8", "P", DASHED),
}  # fmt: skip
OTHERS = ("#1a9fb3", "#c2185b", "#6b8e23", "#5d5d9e", "#c76b3a", "#2f4f4f")  # of runs that are no method of ours
MARKERS = "hpd<>*8"  # one more than colours, so that 42 such runs differ
POSITIVE, NEGATIVE = "#2f7fbf", "#d9822b"
# orange - white - blue, its ends of like darkness: safe for colour-blind readers; every box has its number as well
SCALE = LinearSegmentedColormap.from_list("value", ["#a34f00", "#eda557", "#f6f4ef", "#7db2dc", "#0b5394"])
PAIRS = (  # title, who writes tau, better response, worse one, what to look for
    ("Negation", "enthusiast", "the {} is very good .", "the {} is not very good .",
     "One word turns praise into blame before the adjective is said."),
    ("Off topic", "wanderer", "the {} is good and it is great .", "the weather is good and it is great .",
     "The praise is the same, but nobody asked about the weather; “it” carries the mistake on."),
    ("A wanted clause left unsaid", "enthusiast", "the {} is good and it is great .", "the {} is good .",
     "Three clauses are wanted: the earlier the full stop, the more it gives away."),
)  # fmt: skip


# ---------------------------------------------------------------------------------------------------- text and numbers


class Raw(str):
    """HTML that is built already. Everything else is escaped."""


def esc(x) -> Raw:
    return x if isinstance(x, Raw) else Raw(html.escape(str(x)))


def num(x: float, digits: int = 2, sign: bool = False) -> str:
    """A number with a real minus sign; `sign` writes the plus too."""
    text = f"{abs(x):.{digits}f}"
    minus = x < 0 and float(text) != 0
    return ("−" if minus else "+" if sign and float(text) != 0 else "") + text


def percent(x: float, digits: int = 1) -> str:
    return f"{num(100 * x, digits)}\N{NO-BREAK SPACE}%"


def with_interval(gold: dict) -> str:
    low, high = gold["ci95"]
    return f"{num(gold['mean'])} [{num(low)}, {num(high)}]"


def smooth(values) -> np.ndarray:
    """Moving average, as far to the left as to the right of each point, so that a curve that rises starts where its data do;
    the window is a tenth of the curve, at least 3."""
    values, half = np.asarray(values, dtype=float), max(3, len(values) // 10) // 2
    reach = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
    return np.array([values[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


def looks(names) -> dict:
    """Name -> colour, marker and line."""
    rest = [name for name in names if name not in LOOKS]
    new = {name: (OTHERS[i % 6], MARKERS[i % 7], SOLID if i < 6 else DASHED) for i, name in enumerate(rest)}
    return {name: LOOKS.get(name) or new[name] for name in names}


def dvpo_run(results: dict) -> str | None:
    """The run that headlines speak of: `dvpo`, with its defaults. Not the best one, which held-out reward would choose."""
    return next((name for name in sorted(results["methods"]) if name.startswith("dvpo")), None)


def headline(results: dict) -> str:
    """The result in one sentence or two, from numbers alone."""
    methods, best = results["methods"], dvpo_run(results)
    sft = methods.get("sft")
    if best is None or sft is None:
        return f"The SFT policy's gold reward is {with_interval(sft['gold'])}." if sft else ""
    row, top = methods[best], max(methods, key=lambda name: methods[name]["gold"]["mean"])
    way = lambda old, new: "rises" if new > old else "falls" if new < old else "goes"
    verb, share = way(sft["gold"]["mean"], row["gold"]["mean"]), way(sft["malformed"], row["malformed"])
    text = (
        f"On held-out prompts the gold reward {verb} from {with_interval(sft['gold'])} after SFT to "
        f"{with_interval(row['gold'])} after DVPO (run {best}; mean and 95\N{NO-BREAK SPACE}% interval), and the share "
        f"of malformed responses {share} from {percent(sft['malformed'])} to {percent(row['malformed'])}."
    )
    if top not in (best, "sft"):
        text += f" The best run of all is {top}: {with_interval(methods[top]['gold'])}."
    return text


# ------------------------------------------------------------------------------------------------------ tables, boxes


def table(head, rows, css: str = "") -> Raw:
    """Cells are escaped unless Raw; a row of one cell is a heading over the rows below it."""
    cells = "".join(f"<th>{esc(cell)}</th>" for cell in head)
    lines = [f"<thead><tr>{cells}</tr></thead>"]
    for row in rows:
        if len(row) == 1:
            lines.append(f'<tr class="group"><th colspan="{len(head)}">{esc(row[0])}</th></tr>')
        else:
            lines.append("<tr>" + "".join(f"<td>{esc(cell)}</td>" for cell in row) + "</tr>")
    return Raw(f'<div class="scroll"><table class="{css}">' + "\n".join(lines) + "</table></div>")


def dot_interval(mean: float, low: float, high: float, domain: tuple[float, float]) -> Raw:
    """A dot with its interval on an axis that all rows share; the tick is 0."""
    width = 140  # that of .ends
    x = lambda value: 6 + (width - 12) * (value - domain[0]) / (domain[1] - domain[0])
    zero = f'<path class="zero" d="M{x(0):.1f} 1V19"/>' if domain[0] <= 0 <= domain[1] else ""
    return Raw(
        f'<svg class="dot" width="{width}" height="20" role="img" aria-label="{esc(num(mean))}"><path class="axis" '
        f'd="M0 10H{width}"/>{zero}<path class="whisker" d="M{x(low):.1f} 10H{x(high):.1f}"/>'
        f'<circle cx="{x(mean):.1f}" cy="10" r="4.5"/></svg>'
    )


def bar(value: float) -> Raw:
    """A correlation with a bar of that length."""
    filled = 100 * min(max(value, 0.0), 1.0)
    return Raw(f'<span class="bar"><i style="width:{filled:.1f}%"></i></span><span class="n">{num(value)}</span>')


def colours(value: float, limit: float) -> tuple[str, str]:
    """(background, text) of a value on the diverging scale from -limit to limit."""
    rgb = np.array(SCALE(0.5 + 0.5 * float(np.clip(value / limit, -1, 1)))[:3])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    return to_hex(rgb), "#111111" if linear @ [0.2126, 0.7152, 0.0722] > 0.18 else "#ffffff"


def decisive(one: list[str], other: list[str]) -> int:
    """The first position at which two responses differ: the same state, two actions."""
    return next((t for t, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)) - 1)


def token_boxes(words, q, exact, limit: float, span: float, marked: int = -1) -> Raw:
    """Words as boxes coloured by Q; beneath them Q, the exact value and the increment Q_t - Q_(t-1).

    q and exact (T+1): entry 0 is V(s_1), shown as a box of the prompt's. limit is the end of the colour scale, span the
    increment that fills a bar, marked the box that gets a frame."""
    boxes = ['<div class="tok key"><span class="word">token</span><b>Q</b><small>exact</small><em>step</em></div>']
    for t, word in enumerate(["prompt", *words]):
        background, text = colours(q[t], limit)
        css = "word start" if t == 0 else "word marked" if t - 1 == marked else "word"
        step = Raw('<svg class="step" width="56" height="50"></svg>')
        if t:
            d, true = (23 * np.clip((x[t] - x[t - 1]) / span, -1, 1) for x in (q, exact))
            step = Raw(
                f'<svg class="step" width="56" height="50" role="img" aria-label="{num(q[t] - q[t - 1], 2, True)}">'
                f"<title>step {num(q[t] - q[t - 1], 2, True)}, exact {num(exact[t] - exact[t - 1], 2, True)}</title>"
                f'<path class="axis" d="M4 25H52"/><rect class="{"up" if d > 0 else "down"}" x="19" width="18" '
                f'y="{25 - max(d, 0):.1f}" height="{abs(d):.1f}"/><path class="true" d="M14 {25 - true:.1f}H42"/></svg>'
            )
        boxes.append(
            f'<div class="tok"><span class="{css}" style="background:{background};color:{text}">{esc(word)}</span>'
            f"<b>{num(q[t], 2, True)}</b><small>{num(exact[t], 2, True)}</small>{step}</div>"
        )
    return Raw('<div class="tokens">' + "".join(boxes) + "</div>")


def details(title, body) -> Raw:
    return Raw(f"<details><summary>{esc(title)}</summary>{esc(body)}</details>")


def section(name: str, title: str, *parts) -> Raw:
    return Raw(f'<section id="{name}"><h2>{esc(title)}</h2>' + "\n".join(map(esc, parts)) + "</section>\n")


def p(text, css: str = "") -> Raw:
    return Raw(f'<p class="{css}">{esc(text)}</p>')


# ------------------------------------------------------------------------------------------------------------ pictures


def style(ink: str) -> dict:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    return dict.fromkeys(names, ink) | {
        "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 10,
        "axes.linewidth": 0.7, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
        "axes.titlelocation": "left",
    }  # fmt: skip


def svg(draw, *inputs, label: str) -> Raw:
    """A picture as inline SVG, in the page's own text colour and font."""
    out = io.StringIO()
    with matplotlib.rc_context(style(INK)):
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw(*inputs, INK).savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.S).replace(INK, "currentColor")
    size = r'width="[\d.]+pt" height="[\d.]+pt"'
    return Raw(re.sub(size, f'class="figure" role="img" aria-label="{esc(label)}"', text, count=1))


def png(draw, *inputs, path: Path):
    with matplotlib.rc_context(style("#222222")):
        draw(*inputs, "#222222").savefig(path, dpi=160, facecolor="white", metadata={"Software": None})


def draw_curves(curves: dict, sft: float | None, ink: str) -> Figure:
    """Gold reward and KL of the rollouts, step by step: raw thin, smoothed thick with the run's own marker."""
    figure = Figure((10, 4.1), layout="constrained")
    axes, look = figure.subplots(1, 2), looks(curves)
    for i, (name, rows) in enumerate(curves.items()):
        (colour, marker, line), steps = look[name], [row["step"] for row in rows]
        every = max(1, len(rows) // 8)
        for axis, key in zip(axes, ("gold", "kl")):
            values = [row[key] for row in rows]
            axis.plot(steps, values, color=colour, linewidth=0.8, alpha=0.42)
            axis.plot(steps, smooth(values), color=colour, linestyle=line, linewidth=2, marker=marker, markersize=6,
                      markevery=(min(i * every // max(1, len(curves)), len(rows) - 1), every), label=name)  # fmt: skip
    if sft is not None:
        axes[0].axhline(sft, color=ink, linewidth=1.2, linestyle=(0, (5, 4)), label="SFT, held-out prompts")
    for axis, title in zip(axes, ("gold reward of the rollouts", "KL to the SFT policy, nats per response")):
        axis.set_title(title, fontsize=11), axis.set_xlabel("step (one rollout batch)")
        axis.grid(axis="y", color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


def draw_frontier(frontier: dict, best_of_n: list, ink: str) -> Figure:
    """Gold and proxy reward against KL: a line per method, a point per snapshot and the final policy, the last one ringed."""
    figure = Figure((10, 4.6), layout="constrained")
    axes, look = figure.subplots(1, 2), looks(frontier)
    for axis, key, title in zip(axes, ("gold", "proxy"), ("gold reward", "proxy reward (the RM's), standardised")):
        for name, points in frontier.items():
            points = [point for point in points if key in point]
            if not points:
                continue
            x, y, (colour, marker, line) = [q["kl"] for q in points], [q[key] for q in points], look[name]
            axis.plot(x, y, color=colour, marker=marker, markersize=4.5, linewidth=1.5, label=name, linestyle=line)
            axis.plot(x[-1:], y[-1:], "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)
        if best_of_n:
            x, y = [row["kl"] for row in best_of_n], [row[key] for row in best_of_n]
            sizes = ", ".join(f"{row['n']:.0f}" for row in best_of_n)
            label = f"best of n = {sizes} (bound)"
            axis.plot(x, y, color=ink, linestyle=":", marker=".", linewidth=1.6, label=label)
        axis.set_title(title, fontsize=11), axis.set_xlabel("KL to the SFT policy, nats per response")
        axis.grid(color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, max(1, len(labels))))
    return figure


def frontier_lines(results: dict) -> dict:
    """Method -> its points from the SFT policy to the final one."""
    point = lambda row: (
        {"kl": row["kl"], "gold": row["gold"]["mean"], "gold_ci95": row["gold"]["ci95"]}
        | ({"proxy": row["proxy"]["mean"]} if "proxy" in row else {})
    )
    methods = results["methods"]
    start = [point(methods["sft"])] if "sft" in methods else []
    return {
        name: [*start, *[q for q in points if q["step"] != methods[name].get("steps")], point(methods[name])]
        for name, points in results["frontier"].items()
        if name in methods
    }


def draw_lengths(methods: dict, ink: str) -> Figure:
    """Response lengths: box from the first to the third quartile, line at the median, whiskers to the extremes."""
    figure = Figure((10, 0.6 + 0.36 * len(methods)), layout="constrained")
    axis = figure.subplots()
    stats = []
    for name, row in methods.items():
        keys = ("whislo", "q1", "med", "q3", "whishi")
        stats.append(dict(zip(keys, row["length_quartiles"])) | {"label": name, "fliers": [], "mean": row["length"]})
    line = {"color": ink, "linewidth": 1}
    axis.bxp(stats, orientation="horizontal", showmeans=True, patch_artist=True, widths=0.55, whiskerprops=line, capprops=line,
             boxprops={"facecolor": "#56B4E9", "edgecolor": ink, "linewidth": 0.8, "alpha": 0.6},
             medianprops={"color": ink, "linewidth": 2},
             meanprops={"marker": "D", "markersize": 5, "markerfacecolor": "#D55E00", "markeredgecolor": ink})  # fmt: skip
    axis.invert_yaxis(), axis.set_xlabel("tokens, EOS included"), axis.set_xlim(left=0)
    axis.grid(axis="x", color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)
    return figure


def over_optimised(frontier: dict) -> list[tuple[str, float, float]]:
    """(method, fall of gold, rise of proxy) to the last point from that of highest gold among those since which the proxy rose and
    gold fell so far that their 95 % intervals do not meet: the highest of several noisy points is always a little too high."""
    found = []
    for name, points in frontier.items():
        if all("proxy" in point for point in points):
            last = points[-1]
            above = [q for q in points if q["gold_ci95"][0] > last["gold_ci95"][1] and last["proxy"] > q["proxy"]]
            if above:
                best = max(above, key=lambda point: point["gold"])
                found.append((name, best["gold"] - last["gold"], last["proxy"] - best["proxy"]))
    return found


def draw_tokens(pairs: list[dict], limit: float, ink: str) -> Figure:
    """`token_boxes` of all pairs as one picture."""
    widest = max(len(line["words"]) for pair in pairs for line in pair["lines"]) + 2
    row, title = 1.28, 0.5
    height = (2 * row + title) * len(pairs) + 0.4
    figure = Figure((0.93 * widest, 0.93 * height))
    axis = figure.add_axes((0, 0, 1, 1), xlim=(-0.1, widest), ylim=(-height, 0))
    axis.axis("off")
    for i, pair in enumerate(pairs):
        top = -(2 * row + title) * i - 0.3
        axis.text(0.04, top, pair["title"], fontsize=12.5, fontweight="bold", va="center")
        axis.text(widest - 0.15, top, f"“{pair['prompt']}”", fontsize=11, style="italic", va="center", ha="right")
        for j, line in enumerate(pair["lines"]):
            y, q, exact = top - 0.42 - row * j, line["q"], line["exact"]
            put = lambda t, dy, text, y=y, **look: axis.text(t + 0.45, y + dy, text, ha="center", va="center", **look)
            for t, word in enumerate(["prompt", *line["words"]]):
                background, colour = colours(q[t], limit)
                edge = {"edgecolor": ink, "linewidth": 2} if t - 1 == pair["decisive"] else {"linewidth": 0}
                corner = (t + 0.06, y - 0.19)
                axis.add_patch(
                    FancyBboxPatch(corner, 0.78, 0.3, boxstyle="round,pad=0.04", facecolor=background, **edge)
                )
                put(t, -0.04, word, color=colour, fontsize=10.5, style="italic" if t == 0 else "normal")
                put(t, -0.34, num(q[t], 2, True), fontsize=10)
                put(t, -0.51, num(exact[t], 2, True), fontsize=8, alpha=0.75)
                if t:
                    d, true = (0.24 * (x[t] - x[t - 1]) / pair["span"] for x in (q, exact))
                    axis.plot([t + 0.08, t + 0.82], [y - 0.83] * 2, color=ink, linewidth=0.5, alpha=0.5)
                    axis.bar(t + 0.45, d, 0.34, y - 0.83, color=POSITIVE if d > 0 else NEGATIVE)
                    axis.plot([t + 0.22, t + 0.68], [y - 0.83 + true] * 2, color=ink, linewidth=1.6)
            put(len(q), -0.04, f"gold {num(line['gold'], 2, True)}", fontsize=10)
    note = "Box and first number: the GVM's Q. Small number: the exact value. Bar: step of Q; line: exact step."
    axis.text(0.04, -height + 0.17, note, fontsize=9, va="center", alpha=0.85)
    return figure


# ------------------------------------------------------------------------------------------------ what the models say


def token_pairs(folder: Path, tokenizer) -> list[dict]:
    """PAIRS on held-out prompts, valued by the GVM given a tau of the pair's persona, and exactly; in gold units."""
    model = gvm.load_model("value", str(folder), tokenizer, gvm.Args(), frozen=True)
    config, rng, out = model.config, random.Random(0), []

    def answer(prompt, text):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        return gvm.Answer([{"role": "user", "content": prompt}], ids)

    for title, policy, better, worse, hint in PAIRS:
        prompt, *others = toy.prompts("heldout")
        thing = toy._task(prompt)
        tau = [(x, toy.write(policy, x, rng)) for x in rng.sample(others, getattr(config, "tau_pairs", 0))]
        texts = [better.format(thing), worse.format(thing)]
        groups = [[answer(*pair) for pair in tau] + [answer(prompt, text)] for text in texts]
        settings = gvm.Args(tau_tokens=getattr(config, "tau_tokens", 0))
        values = gvm.predict(gvm.ValueModel(model), tokenizer, groups, settings, torch.device("cpu"))
        words = [[*text.split(), toy.EOS] for text in texts]
        lines = [
            {"words": mine, "q": v * config.reward_std + config.reward_mean, "gold": toy.gold(prompt, text),
             "exact": toy.exact_values(policy, prompt, mine)}
            for text, mine, v in zip(texts, words, values, strict=True)
        ]  # fmt: skip
        span = max(np.abs(np.diff(line[key])).max() for line in lines for key in ("q", "exact"))
        pair = {"title": title, "hint": hint, "prompt": prompt, "policy": policy, "tau": tau, "lines": lines}
        out.append(pair | {"span": span, "decisive": decisive(*words)})
    return out


def samples(folder: Path, tokenizer) -> list[tuple[str, str, float]]:
    """(prompt, response, gold): one response, at temperature 1, to each of the first held-out prompts."""
    args = calibration.Args(max_response_tokens=toy.MAX_RESPONSE_TOKENS, split=f"heldout[:{SAMPLES}]")
    prompts, ids = calibration.load_prompts(args, tokenizer)
    policy = calibration.Model(str(folder), tokenizer, args, torch.device("cpu"))
    texts, complete = calibration.texts_of(policy.answers(prompts, ids, 1, 0, SAMPLES), policy.ends, tokenizer)
    # a response that was cut counts as malformed
    texts = [text if whole else f"{text} {toy.UNK}" for text, whole in zip(texts, complete, strict=True)]
    return [(prompt, text, toy.gold(prompt, text)) for prompt, text in zip(prompts, texts, strict=True)]


# ------------------------------------------------------------------------------------------------------------ sections


def tiles(results: dict) -> Raw:
    methods, best, out = results["methods"], dvpo_run(results), []
    if best and "sft" in methods:
        sft, row = methods["sft"], methods[best]
        out += [(f"{num(sft['gold']['mean'])} → {num(row['gold']['mean'])}", "gold reward, SFT → DVPO"),
                (f"{percent(sft['malformed'])} → {percent(row['malformed'])}", "malformed responses")]  # fmt: skip
    if {"yardsticks", "right_tau"} <= results.get("gvm", {}).keys():
        out.append((percent(demo.share_of_way(results["gvm"]), 0), "of the way to Bayes-optimal values"))
    if best:
        out.append((f"{methods[best]['seconds']:.0f} s", "all stages of that run"))
    return Raw('<div class="tiles">' + "".join(f"<div><b>{esc(a)}</b>{esc(b)}</div>" for a, b in out) + "</div>")


def curves_section(curves: dict, sft: float | None) -> Raw:
    picture = svg(draw_curves, curves, sft, label="gold reward and KL of the rollouts, step by step")
    caption = (
        "Thin: each rollout batch, on the prompts of training; thick: moving average. The gold reward is measured for "
        "this picture only: no training sees it."
    )
    figure = Raw(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")
    return section("curves", "Learning curves", figure)


def methods_section(methods: dict) -> Raw:
    ends = [x for row in methods.values() for x in row["gold"]["ci95"]]
    pad = 0.05 * (max(ends) - min(ends)) + 0.02
    domain = (min(ends) - pad, max(ends) + pad)
    best = max(methods, key=lambda name: methods[name]["gold"]["mean"])
    proxy = all("proxy" in row for row in methods.values())
    rows = []
    for name, row in methods.items():
        gold, (low, high) = row["gold"], row["gold"]["ci95"]
        rows.append([
            Raw(f"<b>{esc(name)}</b>") if name == best else name,
            num(gold["mean"]), f"[{num(low)}, {num(high)}]", dot_interval(gold["mean"], low, high, domain),
            percent(row["malformed"]), num(row["kl"]),
            *([num(row["proxy"]["mean"]), "–" if row.get("misaligned") is None else percent(row["misaligned"])] if proxy else []),
            num(row["length"], 1), *([] if proxy else [num(row["clauses"])]), f"{row['seconds']:.0f}",
            "–" if row["peak_memory_mb"] is None else f"{row['peak_memory_mb']:.0f}",
        ])  # fmt: skip
    axis = Raw(f'<span class="ends"><span>{num(domain[0])}</span><span>{num(domain[1])}</span></span>')
    head = ["run", "gold", "95 % interval", axis, "malformed", "KL", *(["proxy", "misaligned"] if proxy else []),
            "tokens", *([] if proxy else ["clauses"]), "seconds", "peak MB"]  # fmt: skip
    return section(
        "methods", "Methods", table(head, rows, "numbers"),
        p(f"{demo.SAMPLES} responses at temperature 1 to each of {len(toy.prompts('heldout'))} held-out prompts. The "
          "interval is over prompts: it does not contain the spread between training seeds. KL: nats per response, to "
          "the SFT policy. " + ("Proxy: the reward model's score, standardised, which is all that methods other than DVPO "
          "see of reward; misaligned: pairs of a prompt's responses whose log-ratios to SFT are not in the proxy's "
          "order. " if proxy else "") + "Tokens count EOS. Seconds: all stages that the run needs; MB: peak memory of its "
          "own stage. Bold: the highest gold reward.", "note"),
    )  # fmt: skip


def frontier_section(frontier: dict, best_of_n: list) -> Raw:
    picture = svg(draw_frontier, frontier, best_of_n, label="gold and proxy reward against KL, a line for each method")
    caption = (
        "Each method from the SFT policy (KL 0) over its snapshots to its final policy (ringed), on held-out prompts. "
        "Dotted: the best of n responses of the SFT policy by proxy reward, at the upper bound of its KL."
    )
    parts = [Raw(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>")]
    if any("proxy" in point for points in frontier.values() for point in points):
        found = over_optimised(frontier)
        text = (
            "Over-optimisation of the proxy, a higher reward from the model and a lower true one, is seen in "
            + "; ".join(f"{name} (gold {num(-fall)}, proxy {num(rise, 2, True)} since its best point)" for name, fall, rise in found)
            + "."
            if found
            else "No method over-optimised the proxy within its run: gold reward did not fall, beyond its noise, while the proxy rose."
        )  # fmt: skip
        parts.append(p(text))
    return section("frontier", "Reward against KL", *parts)


def lengths_section(methods: dict) -> Raw:
    picture = svg(draw_lengths, methods, label="response lengths of each method as boxes")
    caption = "Box: first to third quartile; line: median; diamond: mean; whiskers: shortest and longest."
    rows = [
        (name, num(row["length"], 1), *(num(row["diversity"][x], 3) for x in ("ead", "self_bleu_2", "self_bleu_3")))
        for name, row in methods.items()
        if "diversity" in row
    ]
    head = ("run", "mean tokens", "EAD", "Self-BLEU-2", "Self-BLEU-3")
    return section(
        "lengths", "Lengths and diversity",
        Raw(f"<figure>{picture}<figcaption>{caption}</figcaption></figure>"),
        table(head, rows, "numbers") if rows else Raw(""),
        p("Diversity among the responses to one prompt, averaged over prompts: a higher EAD (expectation-adjusted distinct "
          "tokens) and a lower Self-BLEU are more diverse.", "note") if rows else Raw(""),
    )  # fmt: skip


def gvm_section(results: dict) -> Raw:
    with_tau, no_tau = results["gvm"], results.get("gvm_no_tau", {})
    names = {"right_tau": "τ of the policy that writes", "other_tau": "τ of another policy", "no_tau": "no τ shown"}
    yards = {"position": "position of the token only", "bayes_no_tau": "Bayes-optimal, prefix only",
             "bayes_tau": "Bayes-optimal, prefix and τ"}  # fmt: skip
    held_out, held_out_no_tau = with_tau.get("held_out_policies", {}), no_tau.get("held_out_policies", {})
    groups = [
        ("GVM, policies of training", names, with_tau),
        ("GVM trained without τ, same texts", {"no_tau": "no τ"}, no_tau),
        ("Yardsticks, same texts", yards, with_tau.get("yardsticks", {})),
        ("GVM, policies held out of training", names, held_out),
        ("GVM trained without τ, policies held out", {"no_tau": "no τ"}, held_out_no_tau),
    ]
    rows = []
    for title, labels, found in groups:
        found = {label: found[key] for key, label in labels.items() if key in found}
        rows += [[title]] if found else []
        for label, fit in found.items():
            rows.append(
                [label, *(c for x in ("all", "first3") for c in (bar(fit[x]["correlation"]), num(fit[x]["mse"], 3)))]
            )
    head = ("", "correlation, all tokens", "MSE", "correlation, first three", "MSE")
    way = ""
    if "yardsticks" in with_tau and "right_tau" in with_tau:
        low, high = (with_tau["yardsticks"][x]["all"]["correlation"] for x in ("position", "bayes_tau"))
        way = (
            f"In correlation, the GVM goes {percent(demo.share_of_way(with_tau), 0)} of the way from the best predictor "
            f"that knows only the token's position ({num(low)}) to the Bayes-optimal predictor with τ ({num(high)}), "
            f"and {percent(demo.share_of_way(with_tau, 'first3'), 0)} over the first three tokens, where τ has most to say."
        )
    return section(
        "gvm", "The global value model against the exact values",
        p("The GVM predicts, at every token, the reward that the policy which is writing will earn in the end. It is "
          "told who writes by τ: other question-answer pairs of that policy. In the toy world the right answer is "
          "known."),
        table(head, rows, "numbers gvm"), p(way, "lead") if way else Raw(""),
        p("On texts of each policy, to held-out prompts. A Bayes-optimal predictor knows all training policies exactly "
          "and infers from τ and prefix which of them is writing. MSE in gold units squared.", "note"),
    )  # fmt: skip


def scale_limit(pairs: list[dict]) -> float:
    """The end of the colour scale, common to all pairs."""
    return max(np.abs(line["q"]).max() for pair in pairs for line in pair["lines"])


def tokens_section(pairs: list[dict]) -> Raw:
    limit = scale_limit(pairs)
    stops = ",".join(colours(limit * x, limit)[0] for x in np.linspace(-1, 1, 9))
    square = '<svg width="18" height="15"><rect class="{}" width="18" height="15"/></svg><span>{}</span>'
    legend = (
        f'<div class="legend"><span>{num(-limit, 1)}</span><i style="background:linear-gradient(90deg,{stops})"></i>'
        f"<span>+{num(limit, 1)}</span>{square.format('up', 'Q goes up')}{square.format('down', 'Q goes down')}"
        '<svg width="28" height="15"><path class="true" d="M0 8H28"/></svg><span>exact step</span>'
        '<span class="word marked">word</span><span>where they part</span></div>'
    )
    parts = [
        p("A held-out prompt, a better and a worse response that part at one word. Each box is coloured by the GVM's Q "
          "of the text up to that token, in gold units; below it stand the number, the exact value for the policy that "
          "τ shows, and the step that Q takes at this token: what the token itself adds or costs. The first box is the "
          "prompt's own value. Colours are common to all pairs, the bars' scale to the two responses of a pair."),
        Raw(legend),
    ]  # fmt: skip
    for pair in pairs:
        body = [Raw(f"<h3>{esc(pair['title'])} <q>{esc(pair['prompt'])}</q></h3>"), p(pair["hint"])]
        for kind, line in zip(("Better", "Worse"), pair["lines"]):
            body.append(p(f"{kind} response, gold reward {num(line['gold'], 2, True)}", "side"))
            body.append(token_boxes(line["words"], line["q"], line["exact"], limit, pair["span"], pair["decisive"]))
        t = pair["decisive"]
        (good, bad), (q, q_bad), (exact, exact_bad) = (
            [line[key][t + (key != "words")] for line in pair["lines"]] for key in ("words", "q", "exact")
        )
        body.append(p(
            f"After the same words, the GVM gives “{good}” {num(q, 2, True)} and “{bad}” {num(q_bad, 2, True)}: a "
            f"difference of {num(q - q_bad, 2, True)}, where the truth is {num(exact - exact_bad, 2, True)}."
        ))  # fmt: skip
        if pair["tau"]:
            who = toy.POLICY_IDS[pair["policy"]]
            shown = table(("τ: question", "answer"), pair["tau"], "text")
            body.append(details(f"τ given to the GVM: {len(pair['tau'])} pairs written by policy {who}", shown))
        parts.append(Raw('<div class="pair">' + "\n".join(body) + "</div>"))
    return section("tokens", "Values of single tokens", *parts)


def samples_section(left: list, right: list, name: str) -> Raw:
    rows = [
        (prompt, text, num(gold, 2, True), other, num(other_gold, 2, True))
        for (prompt, text, gold), (_, other, other_gold) in zip(left, right, strict=True)
    ]
    return section(
        "samples", "Samples side by side",
        table(("prompt", "SFT", "gold", f"DVPO (run {name})", "gold"), rows, "text samples"),
        p(f"The first {len(rows)} held-out prompts, one response each at temperature 1, nothing selected. A gold "
          f"reward of {num(toy.MALFORMED)} is that of a malformed response.", "note"),
    )  # fmt: skip


def config_section(folders: list[Path], seconds: dict) -> Raw:
    blocks = []
    for folder in folders:
        if (folder / "args.json").is_file():
            found = json.loads((folder / "args.json").read_text())
            lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in found.items())
            blocks.append(details(folder.name, Raw(f"<pre>{esc(lines)}</pre>")))
    times = ", ".join(f"{name} {value:.0f} s" for name, value in sorted(seconds.items(), key=lambda item: item[1]))
    return section("config", "Configuration", p(f"Seconds of each stage: {times}.") if times else Raw(""), *blocks)


CSS = """
:root{color-scheme:light dark;--bg:#fdfdfc;--fg:#1f2328;--soft:#626870;--line:#dcdedf;--panel:#f4f5f5;
  --accent:#0b62a3}
@media(prefers-color-scheme:dark){
:root{--bg:#15181b;--fg:#e3e5e7;--soft:#9aa2aa;--line:#33393f;--panel:#1d2125;--accent:#6db3ea}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.6 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:3.5rem 1.25rem 4rem}
h1{font-size:1.95rem;line-height:1.2;font-weight:650;letter-spacing:-.015em;margin:0 0 1rem}
h2{font-size:1.35rem;font-weight:650;margin:3.5rem 0 .8rem;padding-top:1.1rem;border-top:1px solid var(--line)}
h3{font-size:1.05rem;font-weight:650;margin:0 0 .1rem}
h3 q{font-weight:400;font-style:italic;color:var(--soft);margin-left:.5em}
p{max-width:48rem;margin:.6rem 0} .lead{font-size:1.08rem} .note,figcaption{color:var(--soft);font-size:.88rem}
.side{margin:.9rem 0 .3rem;font-size:.88rem;color:var(--soft)}
.tiles{display:flex;flex-wrap:wrap;gap:.8rem;margin:1.6rem 0 0}
.tiles div{flex:1 1 12rem;background:var(--panel);border-radius:8px;padding:.8rem 1rem;color:var(--soft);
  font-size:.85rem}
.tiles b{display:block;color:var(--fg);font-size:1.3rem;font-weight:600;font-variant-numeric:tabular-nums;
  white-space:nowrap}
figure{margin:0} svg.figure{display:block;width:100%;height:auto} svg.figure text{font-family:inherit!important}
table{border-collapse:collapse;width:100%;margin:1rem 0;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.38rem .5rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{font-weight:550;color:var(--soft);font-size:.82rem;vertical-align:bottom}
.numbers td:nth-child(n+2),.numbers thead th:nth-child(n+2){text-align:right;white-space:nowrap}
.scroll{overflow-x:auto} .scroll table{margin:.3rem 0} .numbers td{vertical-align:middle}
.numbers td:first-child{min-width:8.6rem;overflow-wrap:anywhere}
.group th{padding-top:1.1rem;font-weight:600;font-size:.85rem} .gvm td:first-child{padding-left:1.4rem}
.ends{display:flex;justify-content:space-between;width:140px} .dot{display:block} .dot circle{fill:var(--accent)}
main>section path:not(.figure *){fill:none} .axis{stroke:var(--line)} .zero{stroke:var(--soft);stroke-dasharray:2 2}
.whisker{stroke:var(--accent);stroke-width:2} .true{stroke:var(--fg);stroke-width:1.6}
.bar{display:inline-block;width:110px;height:9px;background:var(--panel);vertical-align:middle;border-radius:2px}
.bar i{display:block;height:9px;background:var(--accent);border-radius:2px} .n{display:inline-block;width:3.4em}
.pair{margin:2.2rem 0} .tokens{display:flex;flex-wrap:wrap;gap:3px}
.tok{width:72px;text-align:center;font-size:.8rem;line-height:1.35;font-variant-numeric:tabular-nums}
.tok>*{display:block;margin:0 auto} .tok b{font-weight:600;margin-top:.25rem}
.tok small{color:var(--soft);font-size:.72rem}
.word{border-radius:5px;padding:.44rem .1rem;font-size:.86rem;line-height:1.35;overflow-wrap:anywhere}
.marked{box-shadow:0 0 0 2px var(--fg),inset 0 0 0 1.5px var(--bg);font-weight:650} .start{font-style:italic}
.key{width:46px;text-align:left;color:var(--soft)} .key .word{padding-left:0;font-size:.8rem;line-height:1.45}
.key em,.key b{font-style:normal;font-weight:400} .key em{margin-top:.95rem}
.up{fill:#2f7fbf} .down{fill:#d9822b}
.legend{display:flex;flex-wrap:wrap;align-items:center;gap:.45rem;font-size:.82rem;color:var(--soft)}
.legend i{width:170px;height:14px;border-radius:3px} .legend svg{margin-left:.8rem}
.who div{display:flex;gap:.6rem;align-items:center;overflow-wrap:anywhere} .who svg{flex:none}
.sides td:nth-child(n+2){white-space:normal} .interval{white-space:nowrap}
@media(max-width:600px){.sides td:first-child{min-width:6.6rem}
  .numbers.sides :is(thead th,td):nth-child(n){text-align:left;padding:.38rem .25rem}}
.legend .word{margin-left:.8rem;padding:.15rem .5rem;font-size:.82rem;color:var(--fg)}
details{margin:.6rem 0;font-size:.9rem} summary{cursor:pointer;color:var(--soft)} summary:hover{color:var(--fg)}
.text td{overflow-wrap:anywhere} .flags td:first-child{overflow-wrap:normal} .flags td:nth-child(n+2){min-width:5.5rem}
.samples :is(th,td):nth-child(odd):not(:first-child){text-align:right;white-space:nowrap}
.samples{table-layout:fixed} .samples th:first-child{width:25%}
.samples th:nth-child(odd):not(:first-child){width:4.6rem}
pre{columns:3 18rem;white-space:pre-wrap;overflow-wrap:anywhere;margin:.6rem 0 1.4rem}
footer{margin-top:4rem;color:var(--soft);font-size:.85rem}
code,pre{font-family:ui-monospace,Menlo,Consolas,monospace;font-size:.8rem}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,18.5rem),1fr));gap:1.3rem 1.5rem;margin:1rem 0}
.panels figure{min-width:0} .panels figcaption{color:var(--fg);font-weight:600;overflow-wrap:anywhere}
@media print{.pair,tr,figure{break-inside:avoid}}
"""

INTRO = (
    "A small language model is improved by Decoupled Value Policy Optimization (DVPO): a global value model (GVM) is "
    "trained once on graded texts of many policies, then frozen, and its token-level values, with a penalty on the KL, "
    "are all that the policy is trained on: there is no reward model and no critic in the loop. The world is a toy, on "
    "purpose: prompts ask for an opinion of one thing, in three clauses; answers come from a small grammar, and so "
    "the true (“gold”) reward of every answer and the true value of every token are known exactly. What is claimed "
    "below is measured against them."
)


# ----------------------------------------------------------------------------------------------------------- any run


@dataclass
class Run:
    """What a script has written into a run folder, as far as it can be read."""

    folder: Path
    args: dict
    summary: dict  # empty until the run has come to its end
    steps: np.ndarray  # (n,)
    curves: dict[str, np.ndarray]  # metric -> (n,), NaN where there is no number
    notes: list[str] = field(default_factory=list)

    def until(self, step: float) -> Run:
        """The same run when it stood there."""
        kept = self.steps <= step
        curves = {name: values[kept] for name, values in self.curves.items()}
        return Run(self.folder, self.args, self.summary, self.steps[kept], curves, self.notes)


def plain(x) -> str:
    """A stranger's text for a terminal or a picture: what cannot be printed is shown as �."""
    return "".join(c if c.isprintable() else "�" for c in str(x))


def number(x) -> float:
    """x if it is a number to draw and to average, else NaN."""
    return float(x) if isinstance(x, (int, float)) and not isinstance(x, bool) and abs(x) < 1e100 else math.nan


def json_object(text: str) -> dict | None:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return {plain(key): value for key, value in found.items()} if isinstance(found, dict) else None


def read_lines(path: Path) -> tuple[list[dict], int]:
    """The objects of a .jsonl file, and how many lines are none."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
    found = [json_object(line) for line in lines if line.strip()]
    return [row for row in found if row is not None], sum(row is None for row in found)


def read_run(folder: Path) -> Run:
    notes, files = [], {}
    for name in ("args.json", "summary.json"):
        text = (folder / name).read_text(encoding="utf-8", errors="replace") if (folder / name).is_file() else "{}"
        files[name] = json_object(text)
        if files[name] is None:
            notes.append(f"{name} is not a JSON object: left out")
    rows, bad = read_lines(folder / "metrics.jsonl")
    stepped = {step: row for row in rows if not math.isnan(step := number(row.get("step")))}  # the last of a step
    if lost := bad + sum(math.isnan(number(row.get("step"))) for row in rows):
        notes.append(f"{lost} line{'s' * (lost > 1)} of metrics.jsonl without a step, or no JSON: left out")
    steps = sorted(stepped)
    curves = {}
    for key in {key: None for step in steps for key in stepped[step] if key not in ("step", "seconds")}:
        curves[key] = np.array([number(stepped[step].get(key)) for step in steps])
    numbers = {key: int(np.isfinite(values).sum()) for key, values in curves.items()}
    # `skipped` is a number that only few steps have
    gaps = [f"{key} {n}" for key, n in numbers.items() if n < len(steps) and key != "skipped"]
    if gaps:
        notes.append(f"only some of the {len(steps)} steps have a number: {', '.join(gaps)}")
    order = sorted((key for key in curves if numbers[key]), key=lambda key: FIRST.index(key) if key in FIRST else 9)
    args, summary = files["args.json"] or {}, files["summary.json"] or {}
    return Run(folder, args, summary, np.array(steps), {key: curves[key] for key in order}, notes)


def tail(values: np.ndarray, first: bool = False) -> float:
    """Mean of the last tenth of steps (of the first, if asked), one at least; NaN where none has a number."""
    n = max(1, len(values) // 10)
    part = values[:n] if first else values[-n:]
    part = part[np.isfinite(part)]
    return math.fsum(part) / len(part) if len(part) else math.nan


def digits_of(*values: float, significant: int = 3) -> int:
    """How many digits after the point give the largest of the values so many significant ones."""
    scale = max((abs(x) for x in values if math.isfinite(x)), default=0.0)
    return max(0, significant - 1 - math.floor(math.log10(scale))) if scale > 0 else 2


def precise(x: float, digits: int, sign: bool = False) -> str:
    """`num`, and as 4.14e−7 what needs more than 6 digits after the point, or 8 before it."""
    if not math.isfinite(x):
        return "–"
    if (digits <= 6 and abs(x) < 1e7) or not x:
        return num(x, digits if digits <= 6 else 0, sign)
    mantissa, power = f"{abs(x):.2e}".split("e")
    return ("−" if x < 0 else "+" if sign else "") + f"{mantissa}e{num(int(power), 0)}"


@functools.cache
def t95(freedom: float) -> float:
    """97.5 % quantile of Student's t with so many degrees of freedom (1 or more, not only whole ones): with
    t = sqrt(freedom) tan(x) its density (Student 1908) is cos(x)^(freedom - 1) dx, up to a factor."""
    x = np.linspace(0, np.pi / 2, 200_001)
    height = np.cos(x) ** (freedom - 1)
    area = np.concatenate([[0], np.cumsum(height[1:] + height[:-1])])
    return float(math.sqrt(freedom) * math.tan(np.interp(0.95, area / area[-1], x)))


def curve(run: Run, metric: str) -> np.ndarray:
    """(3, points): steps, values and their moving average, where there is a number."""
    found = np.isfinite(run.curves[metric])
    x, y = run.steps[found], run.curves[metric][found]
    size = -(-len(x) // POINTS)
    x, y = (np.array([part.mean() for part in np.split(v, range(size, len(v), size))]) for v in (x, y))
    return np.array([x, y, smooth(y)])


def draw_metric(sides: list[list[Run]], metric: str, axis, ink: str):
    """One metric of one side of runs or two: thin the single runs, thick their mean, shaded its 95 % interval."""
    bands = []
    for runs, colour, line in zip(sides, (ink, CONTRAST), (SOLID, DASHED)):
        lines = [curve(run, metric) for run in runs if np.isfinite(run.curves.get(metric, math.nan)).any()]
        for x, raw, mean in lines:
            axis.plot(x, raw if len(lines) == 1 else mean, color=colour, linewidth=0.8, alpha=0.5)
        # the mean where all have steps, so that no run's end bends it
        first, last = max(x[0] for x, _, _ in lines), min(x[-1] for x, _, _ in lines)
        at = [x for x in lines[0][0] if first <= x <= last]
        if not at:
            continue
        rows = np.array([np.interp(at, x, mean) for x, _, mean in lines])
        dots = {"marker": "o", "markersize": 5} if len(at) == 1 else {}
        axis.plot(at, rows.mean(0), color=colour, linewidth=2, linestyle=line, **dots)
        if len(lines) > 2:
            half = t95(len(lines) - 1) * rows.std(0, ddof=1) / len(lines) ** 0.5
            bands.append((at, rows.mean(0) - half, rows.mean(0) + half, colour))
    axis.set_ylim(axis.get_ylim())  # the lines' own
    for at, low, high, colour in bands:
        axis.fill_between(at, low, high, color=colour, alpha=0.16, linewidth=0)
    axis.ticklabel_format(useOffset=False), axis.locator_params(nbins=5)
    axis.grid(axis="y", color=ink, alpha=0.13, linewidth=0.7), axis.tick_params(length=3, width=0.7)


def draw_panel(sides: list[list[Run]], metric: str, ink: str) -> Figure:
    figure = Figure((4.4, 2.4), layout="constrained")
    draw_metric(sides, metric, figure.subplots(), ink)
    return figure


def panels(sides: list[list[Run]], metrics) -> Raw:
    """A picture of each metric, as many side by side as there is room for."""
    pictures = [
        f"<figure><figcaption>{esc(name)}</figcaption>{svg(draw_panel, sides, name, label=f'{name} against steps')}</figure>"
        for name in metrics
    ]
    return Raw('<div class="panels">' + "\n".join(pictures) + "</div>")


def run_samples(rows: list[dict]) -> Raw | None:
    """The first responses of the first step and of the last one that samples.jsonl has."""
    groups = {}
    for row in rows:
        if isinstance(row.get("response"), str):
            groups.setdefault(number(row.get("step")), []).append(row)
    lines = []
    for step in list(groups)[:: max(1, len(groups) - 1)]:
        lines.append([f"step {step:.0f}"])
        for row in groups[step][:SAMPLES]:
            try:
                prompt = eval_samples.show(row.get("prompt"))
            except (TypeError, KeyError, AttributeError, IndexError):
                prompt = json.dumps(row.get("prompt"))
            lines.append((prompt, row["response"]))
    return section("samples", "Samples", table(("prompt", "response"), lines, "text")) if lines else None


def run_page(run: Run, rows: list[dict]) -> str:
    name = plain(run.folder.resolve().name)
    parts = [Raw(f"<h1>{esc(name)}</h1>")]
    if not run.summary:
        where = f" at step {run.steps[-1]:.0f}" if len(run.steps) else ""
        parts.append(p(f"This run has not come to its end: it is still going, or was stopped{where}.", "lead"))
    parts += [p(note, "note") for note in run.notes]
    shown = []
    for key in [key for key in FIRST if key in run.curves][:3]:
        start, end = tail(run.curves[key], first=True), tail(run.curves[key])
        digits = min(digits_of(start, end), 4)
        shown.append((f"{precise(start, digits)} → {precise(end, digits)}", f"{key}, first and last tenth of steps"))
    if len(run.steps):
        seconds = number(run.summary.get("seconds"))
        shown.append((f"{run.steps[-1]:.0f}", f"steps, {seconds:.0f} s in all" if seconds == seconds else "steps"))
    parts.append(
        Raw('<div class="tiles">' + "".join(f"<div><b>{esc(a)}</b>{esc(b)}</div>" for a, b in shown) + "</div>")
    )
    if run.curves:
        size = -(-len(run.steps) // POINTS)
        thin = "each step" if size == 1 else f"mean of {size} steps"
        caption = p(f"Against steps. Thin: {thin}; thick: moving average, which reaches less far at its ends.", "note")
        parts.append(section("curves", "Curves", caption, panels([[run]], run.curves)))
        numbers = []
        for key, values in run.curves.items():
            ends = tail(values, first=True), tail(values), np.nanmin(values), np.nanmax(values)
            numbers.append([key, *(precise(x, digits_of(x)) for x in ends)])
        head = ("", "first tenth", "last tenth", "lowest", "highest")
        parts.append(
            section(
                "numbers",
                "Numbers",
                table(head, numbers, "numbers"),
                p("Means of the first and the last tenth of steps.", "note"),
            )
        )
    parts += [found] if (found := run_samples(rows)) else []
    for title, found in (("Summary", run.summary), ("Flags", run.args)):
        lines = "\n".join(f"{key} = {json.dumps(value)}" for key, value in found.items())
        parts += [section(title.lower(), title, Raw(f"<pre>{esc(lines)}</pre>"))] if found else []
    return whole(f"Run {name}", parts)


# ---------------------------------------------------------------------------------------------------------------- page


def whole(title: str, parts, css: str = "") -> str:
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{esc(title)}</title><style>{CSS}{css}</style></head>\n<body><main>\n"
        + "\n".join(parts)
        + "\n</main></body></html>\n"
    )


def report(folder: Path) -> Path:
    results, tokenizer = json.loads((folder / "results.json").read_text()), toy.tokenizer()
    runs = [x for x in sorted(folder.iterdir()) if x.is_dir() and not demo.moved_aside(x, read_run(x).args)]
    curves = {}
    for run in runs:
        if rows := [row for row in read_lines(run / "metrics.jsonl")[0] if "gold" in row and "kl" in row]:
            curves[run.name] = rows

    methods, best = results["methods"], dvpo_run(results)
    sft = methods["sft"]["gold"]["mean"] if "sft" in methods else None
    parts = [Raw("<h1>Decoupled values, in a world where values are known</h1>"), p(INTRO)]
    parts += [p(headline(results), "lead"), tiles(results)]
    if curves:
        parts.append(curves_section(curves, sft))
        png(draw_curves, curves, sft, path=folder / "learning_curve.png")
    if methods:
        parts.append(methods_section(methods))
    if results.get("frontier"):
        lines = frontier_lines(results)
        parts.append(frontier_section(lines, results.get("best_of_n", [])))
        png(draw_frontier, lines, results.get("best_of_n", []), path=folder / "frontier.png")
    if methods and all("length_quartiles" in row for row in methods.values()):
        parts.append(lengths_section(methods))
    if "gvm" in results:
        parts.append(gvm_section(results))
    if (folder / "gvm" / "final" / "config.json").is_file():
        pairs = token_pairs(folder / "gvm" / "final", tokenizer)
        parts.append(tokens_section(pairs))
        png(draw_tokens, pairs, scale_limit(pairs), path=folder / "token_values.png")
    finals = [folder / name / "final" for name in ("sft", best) if name]
    if best and all((final / "config.json").is_file() for final in finals):
        parts.append(samples_section(*(samples(final, tokenizer) for final in finals), best))
    parts.append(config_section(runs, results.get("seconds", {})))
    parts.append(Raw("<footer>Made by <code>python eval/report.py</code> from what the runs wrote.</footer>"))
    (folder / "report.html").write_text(whole("DVPO in the toy world", parts), encoding="utf-8")
    return folder / "report.html"


@program
def main(argv=None):
    folder = demo.folder_of(argv, __doc__)
    if not (folder / "results.json").is_file():
        if not any((folder / name).is_file() for name in ("metrics.jsonl", "args.json")):
            gvm.stop(f"{folder} is no run folder (args.json, metrics.jsonl) and no demo (results.json, "
                     f"from `python eval/demo.py {folder}`)")  # fmt: skip
        page = run_page(read_run(folder), read_lines(folder / "samples.jsonl")[0])
        (folder / "report.html").write_text(page, encoding="utf-8", errors="replace")
        print(f"{folder / 'report.html'} written")
        return
    print(f"{report(folder)} written")


if __name__ == "__main__":
    main()
