"""Two sides of runs against each other: intervals against naive ones, what is left out, what is said."""

import json
import math
import random
import re
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from test_report import Tags

from eval import compare, report

# from a printed table
T = {1: 12.7062, 2: 4.3027, 3: 3.1824, 4: 2.7764, 5: 2.5706, 7: 2.3646, 10: 2.2281, 30: 2.0423, 120: 1.9799}


def make(folder, seed=0, steps=40, ended=True, final=1.0, metrics=("gold", "kl"), **flags):
    """A run whose metrics rise in a line to `final`."""
    folder.mkdir(parents=True)
    rows = [{"step": t, "seconds": t, **{m: final * t / steps for m in metrics}} for t in range(1, steps + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = {"policy": f"runs/seed{seed}/sft", "output_dir": str(folder), "seed": seed, "learning_rate": 1e-4} | flags
    (folder / "args.json").write_text(json.dumps(args))
    if ended:
        (folder / "summary.json").write_text(
            json.dumps({"steps": steps, "seconds": 10.0 + seed, "settings": "the toy's"})
        )
    return str(folder)


def compared(a, b, folder, capsys):
    rows = compare.main(["--a", *a, "--b", *b, "--output_dir", str(folder)])
    return {row.name: row for row in rows}, capsys.readouterr().out


def refused(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        compare.main(argv)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1, error
    return error


# ---------------------------------------------------------------------------------------------------------- intervals


def test_quantiles_are_students():
    for freedom, t in T.items():
        assert report.t95(freedom) == pytest.approx(t, abs=6e-5)
    for freedom in (1.0, 1.3, 3.7, 11.2, 250.5):  # by the density itself, summed over t
        log = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
        x = np.linspace(0, report.t95(freedom), 400_001)
        y = np.exp(log - (freedom + 1) / 2 * np.log1p(x**2 / freedom))
        assert ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum() == pytest.approx(0.475, abs=1e-7)


def test_intervals_are_those_of_naive_ones():
    rng = random.Random(0)
    a = {seed: rng.gauss(1, 0.3) for seed in range(5)}
    b = {seed: a[seed] + rng.gauss(0.2, 0.1) for seed in reversed(range(5))}  # in another order
    gaps = [b[seed] - a[seed] for seed in range(5)]
    half = T[4] * statistics.stdev(gaps) / math.sqrt(5)
    mean = statistics.mean(gaps)
    assert compare.paired(a, b) == pytest.approx((mean, mean - half, mean + half), abs=1e-5)
    half = T[4] * statistics.stdev(a.values()) / math.sqrt(5)
    assert compare.interval(list(a.values()))[1:] == pytest.approx(
        (statistics.mean(a.values()) - half, statistics.mean(a.values()) + half), abs=1e-5
    )
    # n = m and equal variances: Welch's degrees of freedom are 2 n - 2; n = m = 6 here
    x = [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    half = T[10] * math.sqrt(2 * statistics.variance(x) / 6)
    assert compare.welch(x, [v + 7 for v in x]) == pytest.approx((7, 7 - half, 7 + half), abs=1e-4)
    # a side without spread: those of the other alone
    half = T[3] * statistics.stdev([1, 2, 4, 9]) / 2
    assert compare.welch([2.0, 2.0], [1, 2, 4, 9]) == pytest.approx((2, 2 - half, 2 + half), abs=1e-4)
    # unequal: Welch and Satterthwaite's degrees of freedom, written out
    x, y = [10.0, 12.0, 17.0], [20.0, 21.0, 19.0, 24.0]
    u, v = statistics.variance(x) / 3, statistics.variance(y) / 4
    half = report.t95((u + v) ** 2 / (u * u / 2 + v * v / 3)) * math.sqrt(u + v)
    assert compare.welch(x, y) == pytest.approx((8, 8 - half, 8 + half))
    assert compare.welch([1.0, 1.0], [3.0, 3.0]) == (2, 2, 2)
    for one in (compare.interval([0.7]), compare.welch([1.0], [2.0, 3.0]), compare.paired({1: 2.0}, {1: 3.0})):
        assert math.isfinite(one[0]) and math.isnan(one[1]) and math.isnan(one[2])


def test_intervals_hold_the_truth_19_times_in_20(monkeypatch):
    """By simulation; an interval with the normal's 1.96, or an unpaired one of pairs, would miss the band."""
    known = [(freedom, report.t95(freedom)) for freedom in np.linspace(3, 12, 50)]  # fast, for thousands of intervals
    monkeypatch.setattr(report, "t95", lambda freedom: float(np.interp(freedom, *zip(*known))))
    rng = np.random.default_rng(0)
    hits = {"paired": [], "welch": []}
    for _ in range(1500):
        seed = rng.normal(0, 3, 4)
        a, b = seed + rng.normal(0, 1, 4), seed + 0.5 + rng.normal(0, 1, 4)
        _, low, high = compare.paired(dict(enumerate(a)), dict(enumerate(b)))
        hits["paired"].append(low <= 0.5 <= high)
        _, low, high = compare.welch(rng.normal(0, 1, 8), rng.normal(0.5, 1, 6))
        hits["welch"].append(low <= 0.5 <= high)
    for name, found in hits.items():
        assert 0.935 < np.mean(found) < 0.965, (name, np.mean(found))  # 0.95, and 2.7 standard errors


def test_the_last_tenth():
    assert report.tail(np.arange(100.0)) == np.mean(range(90, 100))
    assert report.tail(np.arange(100.0), first=True) == np.mean(range(10))
    assert report.tail(np.arange(7.0)) == 6 and report.tail(np.arange(39.0)) == 37
    values = np.arange(40.0)
    values[[3, 37]] = np.nan
    assert report.tail(values) == pytest.approx((36 + 38 + 39) / 3)
    values[36:] = np.nan
    assert math.isnan(report.tail(values)) and math.isnan(report.tail(np.array([])))


# -------------------------------------------------------------------------------------------------------------- words


def test_verdicts():
    row = lambda a, b: compare.row_of("gold", [list(a.items()), list(b.items())])
    a = {1: 0.10, 2: 0.50, 3: 0.90}
    found = row(a, {3: 1.02, 1: 0.21, 2: 0.63})  # +0.11, +0.13, +0.12: the seeds' own spread is no matter
    half = 4.3027 * 0.01 / math.sqrt(3)
    assert found.verdict() == f"b's gold is above a's by 0.120 [{0.12 - half:.3f}, {0.12 + half:.3f}], 3 seeds paired."
    assert found.word == "above" and row({k: -x for k, x in a.items()}, {1: -0.21, 2: -0.63, 3: -1.02}).word == "below"
    assert (
        "below a's by 0.120 [0.095, 0.145]"
        in row({k: -x for k, x in a.items()}, {1: -0.21, 2: -0.63, 3: -1.02}).verdict()
    )
    # other seeds: not paired, and undecided
    found = row(a, {4: 0.22, 5: 0.63, 6: 1.02})
    assert found.word == "undecided" and "cannot be told from a's: +0.12 [" in found.verdict()
    assert found.how == "3 and 3 runs, not paired" and found.gap[0] == pytest.approx(0.37 / 3)
    assert row(a, {1: 0.2, 2: 0.6}).how == "3 and 2 runs, not paired"
    # a seed twice, or none known: nothing to pair by
    assert compare.row_of("x", [[(1, 1.0), (1, 2.0)], [(1, 1.0), (1, 2.5)]]).how == "2 and 2 runs, not paired"
    assert compare.row_of("x", [[(None, 1.0)] * 2, [(None, 1.0)] * 2]).how == "2 and 2 runs, not paired"
    # one run
    found = row({1: 0.5}, {1: 0.75})
    assert found.verdict() == "b's gold is above a's by 0.250; one run a side: no interval can be given."
    assert (
        found.word == "–"
        and row({1: 0.5}, {2: 0.5}).verdict() == "b's gold is that of a; one run a side: no interval can be given."
    )
    assert row({1: 0.5}, a).how == "one run in a: no interval can be given"
    # settings: equal but for rounding, or different without any spread
    assert (
        compare.row_of("x", [[(1, 0.1), (2, 0.1)], [(1, 0.1 + 1e-17), (2, math.nextafter(0.1, 1))]]).word == "undecided"
    )
    found = compare.row_of("x", [[(1, 0.1), (2, 0.1)], [(1, 0.2), (2, 0.2)]])
    assert found.word == "above" and found.cells()[2:] == ("+0.100", "0.100", "0.200")
    assert row({1: math.nan}, a) is None and compare.row_of("x", [[(1, math.nan), (2, 1.0)], [(2, 3.0)]]).gap[0] == 2


def test_digits():
    assert [report.precise(x, report.digits_of(x)) for x in (123.4, 0.01234, 4.14e-7, -4.14e-7, 0.0, 2.5e9, math.nan)] == \
        ["123", "0.0123", "4.14e−7", "−4.14e−7", "0.00", "2.50e9", "–"]  # fmt: skip
    assert report.precise(1e-9, 11, True) == "+1.00e−9" and report.precise(0, 9) == "0"


def test_flags(tmp_path):
    a = [report.read_run(Path(make(tmp_path / f"a-{s}", s, kl_coef=0.1, old=1, gvm=f"runs/{s}/v11"))) for s in (1, 12)]
    b = [
        report.read_run(Path(make(tmp_path / f"b-{s}", s, kl_coef=0.2, data="x/y", gvm=f"runs/{s}/v11")))
        for s in (1, 12, 3)
    ]
    # policy differs by the seed alone (runs/seed1/sft, runs/seed12/sft): not told; the 1 in v11 is no seed
    assert compare.differing([a, b]) == [("kl_coef", "0.1", "0.2"), ("old", "1", "–"), ("data", "–", '"x/y"')]
    assert compare.mixed(a) == [] and compare.labels([a, b]) == ["a-1*", "b-*"]
    odd = report.read_run(Path(make(tmp_path / "odd", 4, kl_coef=0.3, old=1, gvm="runs/4/v11")))
    assert compare.mixed([*a, odd]) == ["kl_coef (0.1, 0.3)"]
    assert (
        compare.pattern(["x"]) == "x"
        and compare.pattern(["aa", "aaa"]) == "aa*"
        and compare.pattern(["1ab", "2ab"]) == "*ab"
    )
    assert compare.seeds_of(a) == "seeds 1, 12" and compare.seeds_of([]) == "no seed known"


# --------------------------------------------------------------------------------------------------------------- whole


def test_five_seeds(tmp_path, capsys):
    ends = {s: (1 + s / 10, 1 + s / 10 + 0.25 + s / 100) for s in range(5)}
    a = [make(tmp_path / f"old-s{s}", s, final=x, kl_coef=0.1) for s, (x, _) in ends.items()]
    b = [make(tmp_path / f"new-s{s}", s, final=y, kl_coef=0.2) for s, (_, y) in ends.items()]
    rows, out = compared(a, b, tmp_path / "out", capsys)
    share = np.mean([37, 38, 39, 40]) / 40  # of a line's end, over the last tenth of 40 steps
    gap = np.mean([0.25 + s / 100 for s in range(5)]) * share
    half = T[4] * np.std([s / 100 * share for s in range(5)], ddof=1) / math.sqrt(5)
    assert rows["gold"].gap == pytest.approx((gap, gap - half, gap + half), abs=1e-5)
    assert f"b's gold is above a's by {gap:.3f} [{gap - half:.3f}, {gap + half:.3f}], 5 seeds paired." in out
    assert "a: old-s*, 5 runs, seeds 0 to 4" in out and "note" not in out and "b's kl is above" in out
    assert re.search(r"flags that differ +a +b\nkl_coef +0\.1 +0\.2\n\n", out) and "learning_rate" not in out
    page = (tmp_path / "out" / "compare.html").read_text()
    seen = Tags(page).seen
    assert [attrs["id"] for tag, attrs in seen if tag == "section"] == ["flags", "numbers", "curves", "config"]
    assert "new-s* against old-s*" in page and "5 seeds paired" in page and 'class="interval">[' in page
    assert page.count('role="img"') == 2 and not [
        x for _, x in seen if "src" in x or not x.get("href", "#").startswith("#")
    ]
    assert (tmp_path / "out" / "compare.png").read_bytes()[:4] == b"\x89PNG"
    # a pattern that the shell has not expanded; a folder named twice is one run
    again, _ = compared([str(tmp_path / "old-*"), a[0]], b, tmp_path / "out", capsys)
    assert again["gold"].gap == rows["gold"].gap


def test_what_cannot_be_compared_is_said(tmp_path, capsys):
    a = [make(tmp_path / f"a-{s}", s, final=1.0 + s / 10, metrics=("gold", "reward")) for s in (1, 2)]
    b = [make(tmp_path / f"b-{s}", s, final=2.0, metrics=("gold", "value", "value_loss")) for s in (1, 2)]
    going = make(tmp_path / "a-3", 3, steps=7, ended=False, final=50.0)
    (tmp_path / "b-none").mkdir()
    (tmp_path / "b.log").write_text("hello")
    aside = make(tmp_path / "b-1.1", 1, final=9.0, output_dir=str(tmp_path / "b-1"))
    decimal = make(tmp_path / "b-0.3", 3, final=2.0)  # a name in its own right
    given = [[*a, going], [*b, str(tmp_path / "b-none"), str(tmp_path / "b.log"), aside, str(tmp_path / "gone")]]
    rows, out = compared(*given, tmp_path / "out", capsys)
    assert list(rows) == ["gold"] and rows["gold"].how == "2 seeds paired"
    assert rows["gold"].gap[0] == pytest.approx((1.0 - 0.15) * 38.5 / 40)
    for words in ("a-3 has not come to its end: left out", "b-none has no numbers in a metrics.jsonl: left out",
                  "b.log has no numbers", "b-1.1 is an earlier run that was moved aside: left out", "gone is not there",
                  "note: only in a: reward: left out", "note: only in b: value, value_loss: left out"):  # fmt: skip
        assert words in out, words
    rows, out = compared(a, [*b, decimal], tmp_path / "out", capsys)
    assert rows["gold"].how == "2 and 3 runs, not paired" and "moved aside" not in out
    # the same seed twice, and flags that differ within a side
    twin = make(tmp_path / "a-twin", 1, final=1.0, metrics=("gold",), learning_rate=0.5)
    rows, out = compared([*a, twin], b, tmp_path / "out", capsys)
    assert "note: a has seed 1 more than once" in out and "not paired" in rows["gold"].how
    assert "note: the runs of a differ in more than their seeds: learning_rate (0.0001, 0.5)" in out
    # refusals: one line
    assert "is on both sides" in refused(["--a", *a, "--b", a[0]], capsys)
    assert "--b: no run to compare" in refused(["--a", *a, "--b", str(tmp_path / "b-none"), "nowhere"], capsys)
    other = make(tmp_path / "other", metrics=("accuracy",))
    error = refused(["--a", *a, "--b", other, "--output_dir", str(tmp_path / "no")], capsys)
    assert "no metric in common" in error and "only in a: gold, reward" in error and not (tmp_path / "no").exists()


def test_runs_that_are_still_going(tmp_path, capsys):
    a = [make(tmp_path / f"a-{s}", s, final=1.0) for s in (1, 2)]  # ended, 40 steps
    b = [make(tmp_path / f"b-{s}", s, steps=t, final=t / 20, ended=False) for s, t in ((1, 30), (2, 25))]
    rows, out = compared(a, b, tmp_path / "out", capsys)
    # up to step 25, where a has 25 / 40 of its end and b 25 / 20; the last tenth is steps 24 and 25
    assert "compared up to step 25" in out and rows["gold"].gap[0] == pytest.approx(24.5 / 20 - 24.5 / 40)
    assert 'class="group"' not in (tmp_path / "out" / "compare.html").read_text()  # no summaries


def test_odd_metrics(tmp_path, capsys):
    a, b = Path(make(tmp_path / "a")), Path(make(tmp_path / "b"))
    odd = [
        '{"step": 1, "gold": 1.0, "kl": true, "loss": NaN, "part": 3}',
        '{"step": 2, "gold": NaN, "kl": "high", "loss": Infinity}',
        '{"step": 2, "gold": 2.0, "kl": null, "loss": 1e999}',  # the step again: this one holds
        '{"gold": 77.0}', "[1, 2]", '{"step": "3", "gold": 9}', '{"step": null}', "[" * 100_000,
        '{"step": 4, "gold": 1' + "0" * 400 + "}", '{"step": 3, "gold": 3.0, "\\ud800\\u001b[31m": 1}', '{"step": 5, "go',
    ]  # fmt: skip
    (a / "metrics.jsonl").write_text("\n".join(odd))
    run = report.read_run(a)
    assert list(run.steps) == [1, 2, 3, 4] and list(run.curves) == [
        "gold",
        "part",
        "\N{REPLACEMENT CHARACTER}" * 2 + "[31m",
    ]
    assert list(run.curves["gold"][:3]) == [1, 2, 3] and math.isnan(run.curves["gold"][3])
    assert "6 lines of metrics.jsonl" in run.notes[0]
    assert "only some of the 4 steps have a number: gold 3, kl 0, loss 0, part 1" in run.notes[1]
    error = refused(["--a", str(a), "--b", str(b)], capsys)
    assert "without a number in the last tenth of steps: gold: left out" in error and "only in b: kl" in error
    (a / "metrics.jsonl").write_text("\n".join(odd[:4]) + "\n")
    (a / "args.json").write_text('{"seed": [1], "x": "\\ud800"')
    (b / "args.json").write_text('{"seed": [1], "x": "\\ud800"}')
    rows, out = compared([str(a)], [str(b)], tmp_path / "out", capsys)
    assert rows["gold"].a[0] == 2 and "args.json is not a JSON object" in out and "no seed known" in out
    out.encode()
    # bytes that are no text, and an empty file
    (a / "metrics.jsonl").write_bytes(b'{"step": 1, "gold": 0.5}\n\xff\xfe\n')
    (a / "args.json").write_bytes(b'{"seed": 1, "x": "\xff"}')
    assert report.read_run(a).args == {"seed": 1, "x": "\N{REPLACEMENT CHARACTER}"}
    assert compared([str(a)], [str(b)], tmp_path / "out", capsys)[0]["gold"].a[0] == 0.5
    (a / "metrics.jsonl").write_text("")
    assert "no numbers" in refused(["--a", str(a), "--b", str(b)], capsys)


def drawn(sides, metric):
    axis = matplotlib.figure.Figure().subplots()
    report.draw_metric(sides, metric, axis, "black")
    thick = [line.get_xydata() for line in axis.lines if line.get_linewidth() == 2]
    return axis, thick


def test_curves_do_not_bend_at_their_ends(tmp_path):
    runs = [
        report.read_run(Path(make(tmp_path / f"r{s}", s, steps=n, final=n / 10 + s)))
        for s, n in ((0, 40), (1, 50), (2, 30))
    ]
    slopes = [4 / 40, 6 / 50, 5 / 30]
    axis, (mean,) = drawn([runs], "gold")
    # of lines the mean is a line, from the first step to the last one that all have
    assert list(mean[:, 0]) == list(range(1, 31)) and np.allclose(mean[:, 1], np.mean(slopes) * mean[:, 0])
    (band,) = axis.collections
    half = T[2] * np.std(slopes, ddof=1) / math.sqrt(3) * 30
    ends = [y for x, y in band.get_paths()[0].vertices if x == 30]
    assert min(ends) == pytest.approx(np.mean(slopes) * 30 - half, rel=1e-4) and max(ends) == pytest.approx(
        np.mean(slopes) * 30 + half, rel=1e-4
    )
    assert axis.get_ylim()[1] < 6.5  # the band's ends do not squeeze the lines
    assert not drawn([runs[:2]], "gold")[0].collections  # two runs: no band
    # a long run is drawn by means of blocks, and a line stays one
    run = report.read_run(Path(make(tmp_path / "long", steps=3456, final=3456.0)))
    x, raw, smooth = report.curve(run, "gold")
    assert len(x) == 864 and np.allclose(x, raw) and np.allclose(raw, smooth) and x[0] == 2.5 and x[-1] == 3454.5
    # numbers here and there, none in one of the runs
    runs[0].curves["gold"][:] = np.nan
    runs[1].curves["gold"][::2] = np.nan
    _, (mean,) = drawn([runs], "gold")
    assert mean[0, 0] == 2 and np.allclose(mean[:, 1], np.mean(slopes[1:]) * mean[:, 0])
