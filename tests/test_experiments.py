"""experiments/: every run that is planned has flags that its script knows, and needs what comes before it."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import page, run, sentiment


@pytest.mark.parametrize("wanted", [run.runs, run.runs_to_tune])
def test_runs_have_flags_that_are_known_and_come_in_order(wanted):
    before = set()
    for name, one in wanted().items():
        assert before.issuperset(one.needs()), name
        job = run.job(name, one, 10)
        script, words = Path(job.words[1]).stem, job.words[2:]
        if script == "variants":
            script, words = "dvpo", words[1:]
        args = tyro.cli(importlib.import_module(script).Args, args=words, use_underscores=True)
        assert args.seed == 10 and Path(args.output_dir) == job.folder and "{" not in " ".join(words)
        before.add(name)
    assert len(before) > 40


def test_sentiment_runs_have_flags_that_are_known():
    jobs = sentiment.jobs("model", Path("out"), sentiment.SIZES["full"])
    for name, job in jobs.items():
        assert set(jobs).issuperset(job.needs), name
        tyro.cli(importlib.import_module(Path(job.words[1]).stem).Args, args=job.words[2:], use_underscores=True)


def test_prompts_of_sentiment_are_in_one_split_each():
    splits = [set(sentiment.prompts(split)) for split in ("held_out", "rl", "writers")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 3 * len(set(sentiment.THINGS))


def test_intervals_are_students():
    mean, low, high = page.interval(np.array([1.0, 2.0, 4.0, np.nan]))
    assert mean == pytest.approx(7 / 3) and high - mean == pytest.approx(4.30 * np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert low == pytest.approx(2 * mean - high) and page.shown(np.array([-1.0, -1.0])) == "−1.00 [−1.00, −1.00]"


def test_gold_at_a_kl_lies_between_the_snapshots_and_never_beyond_the_last():
    point = lambda kl, gold: {"kl": kl, "gold": gold}
    row = {"points": [point(1.0, 0.5)], "kl": 3.0, "gold": {"mean": 1.5}}
    report = {"seeds": [0], "code": "", "runs": {"sft": {"0": {"gold": {"mean": 0.0}}}, "dvpo": {"0": row}}}
    found = page.Found(report)
    assert page.at_kl(found, "dvpo", 0.5) == pytest.approx([0.25]) and page.at_kl(found, "dvpo", 2.0) == pytest.approx(
        [1.0]
    )
    assert np.isnan(page.at_kl(found, "dvpo", 3.5)).all()


def test_a_table_between_its_marks_is_made_anew_and_the_rest_stays():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\nkept\n<!-- end -->\n"
    assert page.rewritten(text, {"x": lambda: "new"}) == text.replace("old", "new")
