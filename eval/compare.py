"""Two sides of runs against each other, over seeds: what their flags change, and what comes of it.

    python eval/compare.py --a runs/dvpo-* --b runs/mine-*

A side is one run folder or several, as the scripts write them: those of one setting, a seed each. For every metric
that both sides log, a run counts with its mean over the last tenth of steps, a side with the mean of its runs, and b - a
comes with a 95 % interval over runs:
    same seeds on both sides: of the differences seed by seed, Student's t (1908)                          `paired`
    else: of the difference of the means, with Welch's degrees of freedom (1947)                            `welch`
One run a side gives a difference and no interval. Writes compare.html and compare.png into --output_dir: curves of these
metrics, thin the single runs, thick their mean, shaded (3 runs or more) its 95 % interval, each step by itself. Runs that
have not come to their end are left out; if a side has no other, all are compared up to the last step that every run has.
"""

from __future__ import annotations

import glob
import json
import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import demo, program, report
from eval import samples as eval_samples
from eval.report import Raw, Run, esc, plain, precise

COLUMNS = 3  # of pictures in compare.png


@dataclass(kw_only=True)
class Args:
    """What is compared with what."""

    a: tuple[str, ...]
    """run folders of one side (runs/x-*): one setting, a seed each"""
    b: tuple[str, ...]
    """run folders of the other side; differences are b - a"""
    output_dir: str = "runs/compare"
    """folder for compare.html and compare.png"""


# ------------------------------------------------------------------------------------------------------- which runs


def folders(words: tuple[str, ...]) -> list[Path]:
    """The folders named, each once; a pattern that the shell did not expand is expanded here."""
    found = [
        path for word in words for path in (sorted(glob.glob(word)) if not Path(word).exists() else [word]) or [word]
    ]
    return list({Path(path).resolve(): Path(path) for path in found}.values())


def read_side(name: str, words: tuple[str, ...], notes: list[str]) -> list[Run]:
    """The runs of a side that can be compared; `notes` tells of the others."""
    runs, unended, why = [], [], []
    for folder in folders(words):
        if not folder.exists():
            why.append(f"{plain(folder)} is not there")
        elif folder.is_dir() and (run := report.read_run(folder)).curves:
            if demo.moved_aside(folder, run.args):
                why.append(f"{plain(folder)} is an earlier run that was moved aside")
                continue
            notes += [f"{plain(folder)}: {note}" for note in run.notes]
            (runs if run.summary else unended).append(run)
        else:
            why.append(f"{plain(folder)} has no numbers in a metrics.jsonl")
    if not runs and not unended:
        sft.stop(f"--{name}: no run to compare: {'; '.join(why)}"[:1000])
    notes += [f"{x}: left out" for x in why]
    if runs:
        notes += [f"{plain(run.folder)} has not come to its end: left out" for run in unended]
    return runs or unended


def seed_of(run: Run):
    seed = run.args.get("seed")
    return seed if isinstance(seed, int) else None


def seeds_of(runs: list[Run]) -> str:
    seeds = sorted(seed for run in runs if (seed := seed_of(run)) is not None)
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"seeds {seeds[0]} to {seeds[-1]}"
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}" if seeds else "no seed known"


def count(runs: list) -> str:
    return f"{len(runs)} run{'s' * (len(runs) != 1)}"


def pattern(names: list[str]) -> str:
    """What names have in common, and * for what they have not."""
    shared = lambda texts: "".join(c[0] for c in takewhile(lambda c: len(set(c)) == 1, zip(*texts)))
    start = shared(names)
    end = shared([name[len(start) :][::-1] for name in names])[::-1]
    return start if len(set(names)) == 1 else f"{start}*{end}"


def labels(sides: list[list[Run]]) -> list[str]:
    """What to call the sides: their runs' common name, or path where names do not tell them apart."""
    for tell in (lambda folder: folder.name, str):
        found = [plain(pattern([tell(run.folder.resolve()) for run in runs])) for runs in sides]
        if found[0] != found[1] and "*" not in found:
            return found
    return found


# ------------------------------------------------------------------------------------------------------------ flags


def values(runs: list[Run], flag: str, plainly: bool = True) -> list[str]:
    """The values of a flag among runs, as JSON; not `plainly`: a path with * for the run's own seed, as a number in it."""
    found = set()
    for run in runs:
        value = json.dumps(run.args[flag], ensure_ascii=False) if flag in run.args else "–"
        if not plainly and "/" in value and seed_of(run) is not None:
            value = re.sub(rf"(?<!\d){seed_of(run)}(?!\d)", "*", value)
        found.add(plain(value))
    return sorted(found)


def told(runs: list[Run], flag: str) -> str:
    found = min(values(runs, flag), values(runs, flag, False), key=len)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def differing(sides: list[list[Run]]) -> list[tuple[str, str, str]]:
    """(flag, on a, on b) of the flags that differ between the sides, but for seeds and places."""
    a, b = sides
    keys = {key: None for run in [*a, *b] for key in run.args if key not in ("seed", "output_dir", "resume")}
    same = lambda key: any(values(a, key, how) == values(b, key, how) for how in (True, False))
    return [(key, told(a, key), told(b, key)) for key in keys if not same(key)]


def mixed(runs: list[Run]) -> list[str]:
    """Flags that differ among the runs of one side, but for seeds and places."""
    keys = {key: None for run in runs for key in run.args if key not in ("seed", "output_dir", "resume")}
    alike = lambda key: any(len(values(runs, key, how)) == 1 for how in (True, False))
    return [f"{key} ({told(runs, key)})" for key in keys if not alike(key)]


# ---------------------------------------------------------------------------------------------------------- numbers


def interval(x) -> tuple[float, float, float]:
    """Mean of x (n,) and its 95 % interval by Student's t with n - 1 degrees of freedom; no bounds (NaN) for n = 1."""
    mean = math.fsum(x) / len(x)
    half = report.t95(len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    return mean, mean - half, mean + half


def paired(a: dict, b: dict) -> tuple[float, float, float]:
    """b - a over the seeds, which are those of both: the `interval` of the differences."""
    return interval([b[seed] - a[seed] for seed in a])


def welch(a, b) -> tuple[float, float, float]:
    """b - a of two independent samples a (n,), b (m,): difference of means, and its 95 % interval by Student's t with the
    degrees of freedom of Welch (1947, eq. 28, as Satterthwaite 1946 has it): (u + v)^2 / (u^2 / (n - 1) + v^2 / (m - 1)),
    u = var(a) / n, v = var(b) / m."""
    gap = math.fsum(b) / len(b) - math.fsum(a) / len(a)
    if min(len(a), len(b)) < 2:
        return gap, math.nan, math.nan
    u, v = np.var(a, ddof=1) / len(a), np.var(b, ddof=1) / len(b)
    freedom = (u + v) ** 2 / (u**2 / (len(a) - 1) + v**2 / (len(b) - 1)) if u + v > 0 else 1
    half = report.t95(freedom) * math.sqrt(u + v)
    return gap, gap - half, gap + half


@dataclass
class Row:
    """One number on both sides."""

    name: str
    a: tuple[float, float, float]  # mean over runs, and its interval
    b: tuple[float, float, float]
    gap: tuple[float, float, float]  # b - a
    how: str  # over which runs

    def __post_init__(self):
        mean, low, high = self.gap
        if abs(mean) < 1e-9 * abs(self.a[0]):  # means of equal numbers, but of other counts
            self.gap = mean, low, high = 0.0, min(low, 0.0), max(high, 0.0)
        self.word = "–" if math.isnan(low) else "undecided" if low <= 0 <= high else "above" if low > 0 else "below"
        half, coarse = (high - low) / 2, report.digits_of(self.a[0], self.b[0])
        finest = report.digits_of(half if half > 0 else mean, significant=2) if half > 0 or mean else 0
        self.digits = min(max(finest, coarse - (half > 0)), coarse + 3)  # two digits of the uncertainty

    def shown(self, which: tuple[float, float, float], sign: bool = False) -> str:
        mean, low, high = (precise(x, self.digits, sign) for x in which)
        return mean if math.isnan(which[1]) or which[1] == which[2] else f"{mean} [{low}, {high}]"

    def cells(self) -> tuple:
        return self.name, self.word, self.shown(self.gap, True), self.shown(self.a), self.shown(self.b)

    def verdict(self) -> str:
        mean, low, high = self.gap
        if self.word == "undecided":
            return f"b's {self.name} cannot be told from a's: {self.shown(self.gap, True)}, {self.how}."
        size = (abs(mean), *sorted((abs(low), abs(high))))
        side = "above" if mean > 0 else "below"
        if self.word == "–" and not mean:
            return f"b's {self.name} is that of a; {self.how}."
        return f"b's {self.name} is {side} a's by {self.shown(size)}{'; ' if self.word == '–' else ', '}{self.how}."


def row_of(name: str, sides: list[list[tuple[object, float]]]) -> Row | None:
    """`sides`: (seed, number) of each run; None where a side has no number."""
    a, b = ([(seed, x) for seed, x in side if math.isfinite(x)] for side in sides)
    if not a or not b:
        return None
    numbers = [[x for _, x in side] for side in (a, b)]
    sizes = sorted({len(a), len(b)})
    seeds = [[seed for seed, _ in side] for side in (a, b)]
    same = set(seeds[0]) == set(seeds[1]) and None not in seeds[0] and all(len(set(s)) == len(s) for s in seeds)
    if sizes == [1]:
        how = "one run a side: no interval can be given"
    elif 1 in sizes:
        how = f"one run in {'a' if len(a) == 1 else 'b'}: no interval can be given"
    elif same:
        how = f"{len(a)} seeds paired"
    else:
        how = f"{' and '.join(map(str, (len(a), len(b))))} runs, not paired"
    gap = paired(dict(a), dict(b)) if same else welch(*numbers)
    return Row(name, interval(numbers[0]), interval(numbers[1]), gap, how)


def measured(sides: list[list[Run]], notes: list[str]) -> tuple[list[Row], list[Row]]:
    """Rows of the metrics, and of the summaries' numbers, that both sides have."""
    rows, missing = [], {}
    for name in {name: None for runs in sides for run in runs for name in run.curves}:
        row = row_of(
            name, [[(seed_of(run), report.tail(run.curves.get(name, np.array([])))) for run in runs] for runs in sides]
        )
        if row:
            rows.append(row)
        else:
            has = [any(name in run.curves for run in runs) for runs in sides]
            missing.setdefault(
                "without a number in the last tenth of steps" if all(has) else f"only in {'ab'[has[1]]}", []
            ).append(name)
    notes += [f"{why}: {', '.join(names)}: left out" for why, names in missing.items()]
    works = lambda name: (
        name.endswith("_seconds") or name in ("logp_gap_mean", "logp_gap_max", "useful_tokens", "kl_coef")
    )
    order = lambda row: report.FIRST.index(row.name) if row.name in report.FIRST else 9 + works(row.name)
    if not rows:
        sft.stop(f"the sides have no metric in common ({'; '.join(notes)})"[:1000])
    keys = {key: None for runs in sides for run in runs for key in run.summary if key != "steps"}
    summary = [
        row_of(key, [[(seed_of(run), report.number(run.summary.get(key))) for run in runs] for runs in sides])
        for key in keys
    ]
    return sorted(rows, key=order), [row for row in summary if row]


def verdicts(rows: list[Row]) -> list[str]:
    """The main metrics' verdicts in words. The choice of metrics does not look at their numbers."""
    best = [row for row in rows if row.name in report.FIRST[:-1]][:1] or rows[:1]
    return [row.verdict() for row in [*best, *(row for row in rows if row.name == "kl" and row not in best)]]


# ------------------------------------------------------------------------------------------------------- page, picture


def side_lines(sides: list[list[Run]]) -> list[str]:
    return [f"{key}: {name}, {count(runs)}, {seeds_of(runs)}" for key, name, runs in zip("ab", labels(sides), sides)]


def draw(sides: list[list[Run]], metrics: list[str], ink: str) -> Figure:
    lines = -(-len(metrics) // COLUMNS)
    figure = Figure((10, 2.3 * lines + 0.5), layout="constrained")
    axes = list(figure.subplots(lines, COLUMNS, squeeze=False).flat)
    for metric, axis in zip(metrics, axes, strict=False):
        report.draw_metric(sides, metric, axis, ink)
        axis.set_title(metric if len(metric) < 40 else metric[:38] + "…", fontsize=10)
    for axis in axes[len(metrics) :]:
        axis.axis("off")
    looks = zip((ink, report.CONTRAST), (report.SOLID, report.DASHED), side_lines(sides))
    handles = [Line2D([], [], color=colour, linestyle=line, linewidth=2, label=label) for colour, line, label in looks]
    figure.supxlabel("step; curves are smoothed", fontsize=10)
    figure.legend(handles=handles, loc="outside upper left", ncols=1)
    return figure


def page(sides: list[list[Run]], rows: list[Row], summary: list[Row], flags: list, notes: list[str]) -> str:
    strokes = ("currentColor", ""), (report.CONTRAST, ' stroke-dasharray="7 4"')
    key = [
        f'<svg width="34" height="12" aria-hidden="true"><path d="M1 6H33" stroke="{colour}" stroke-width="2.5"{dash}/></svg>'
        f"<span>{esc(name)}</span>"
        for (colour, dash), name in zip(strokes, side_lines(sides))
    ]
    legend = Raw('<div class="who"><div>' + "</div><div>".join(key) + "</div></div>")
    a, b = labels(sides)
    parts = [Raw(f"<h1>{esc(b)} against {esc(a)}</h1>"), legend, *(report.p(x, "lead") for x in verdicts(rows))]
    parts += [report.p(f"Note: {note}.", "note") for note in notes]
    changed = [(flag, *(Raw(f"<code>{esc(x)}</code>") for x in found)) for flag, *found in flags]
    parts.append(report.section("flags", "Flags that differ", report.table(("flag", "a", "b"), changed, "text flags")
                 if flags else report.p("None, but for seeds and places.")))  # fmt: skip
    # a line may break before an interval, not within it
    breaks = lambda cell: Raw(re.sub(r"(\[.*\])", r'<span class="interval">\1</span>', esc(cell)))
    name = lambda row: Raw(esc(row.name).replace("_", "_<wbr>"))
    cells = lambda row: (name(row), row.word, *map(breaks, row.cells()[2:]))
    lines = [*map(cells, rows), *([["Of the whole run"]] if summary else []), *map(cells, summary)]
    hows = Counter(row.how for row in rows)
    odd = [f"{row.name}: {row.how}" for row in rows if row.how != hows.most_common(1)[0][0]]
    parts.append(report.section(
        "numbers", "Final metrics",
        report.table(("", "b is", "b − a", "a", "b"), lines, "numbers sides"),
        report.p(f"Mean of the last tenth of steps of each run, mean over runs, in brackets its 95 % interval (Student's t): "
                 f"{'; '.join([hows.most_common(1)[0][0], *odd])}. Undecided: the interval of b − a holds 0, which does not "
                 "mean that there is no difference. Of twenty metrics that do not differ, one is above or below by chance.", "note"),
    ))  # fmt: skip
    single = any(len(runs) == 1 for runs in sides)
    caption = ("Against steps. Thin: single runs, smoothed" + (" (a side's only one is not)" if single else "")
               + "; thick: their mean; shaded, from 3 runs on: its 95 % interval. "
               "Averages reach less far at a curve's ends.")  # fmt: skip
    parts.append(report.section("curves", "Curves", legend, report.p(caption, "note"),
                                report.panels(sides, [row.name for row in rows])))  # fmt: skip
    body = [report.details(f"{name}: {plain(run.folder)}", Raw(f"<pre>{esc(flag_lines(run))}</pre>"))
            for name, runs in zip("ab", sides) for run in runs]  # fmt: skip
    parts.append(report.section("config", "Runs and all their flags", *body))
    return report.whole(f"{b} against {a}", parts)


def flag_lines(run: Run) -> str:
    return "\n".join(f"{flag} = {json.dumps(value)}" for flag, value in run.args.items())


# -------------------------------------------------------------------------------------------------------------- main


def run(args: Args) -> list[Row]:
    notes = []
    sides = [read_side(name, words, notes) for name, words in (("a", args.a), ("b", args.b))]
    if both := {run.folder.resolve() for run in sides[0]} & {run.folder.resolve() for run in sides[1]}:
        sft.stop(f"{plain(min(both))} is on both sides")
    everyone = [run for runs in sides for run in runs]
    if not all(run.summary for run in everyone):
        last = min(run.steps[-1] for run in everyone)
        going = ", ".join(plain(run.folder) for run in everyone if not run.summary)
        notes.append(f"compared up to step {last:.0f}, the last that every run has: not come to its end is {going}")
        sides = [[run.until(last) for run in runs] for runs in sides]
    for name, runs in zip("ab", sides):
        seeds = Counter(seed for run in runs if (seed := seed_of(run)) is not None)
        if twice := [str(seed) for seed, n in seeds.items() if n > 1]:
            notes.append(
                f"{name} has seed {', '.join(twice)} more than once: such runs are alike, its interval is too narrow"
            )
        if found := mixed(runs):
            notes.append(f"the runs of {name} differ in more than their seeds: {', '.join(found)}")
    rows, summary = measured(sides, notes)
    flags = differing(sides)
    print("\n".join(side_lines(sides)))
    for note in notes:
        print(f"note: {note}")
    print("", *verdicts(rows), "", sep="\n")
    short = lambda x: x if len(x) < 60 else f"{x[:28]} … {x[-28:]}"
    changed = [(flag, *map(short, found)) for flag, *found in flags]
    print(
        eval_samples.table(("flags that differ", "a", "b"), changed)
        if flags
        else "no flags differ, but for seeds and places",
        end="\n\n",
    )
    head = ("mean of the last tenth of steps", "b is", "b − a", "a", "b")
    cells = [row.cells() for row in rows] + [(f"summary: {x[0]}", *x[1:]) for x in (row.cells() for row in summary)]
    print(eval_samples.table(head, cells))
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "compare.html").write_text(page(sides, rows, summary, flags, notes), encoding="utf-8", errors="replace")
    report.png(draw, sides, [row.name for row in rows], path=folder / "compare.png")
    print(f"{folder / 'compare.html'}, compare.png written")
    return rows


@program
def main(argv=None):
    return run(eval_samples.read_flags(Args, argv, __doc__))


if __name__ == "__main__":
    main()
