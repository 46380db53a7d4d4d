"""experiments/: every run that is planned has flags that its script knows, and needs what comes before it."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
import dvpo
import rest
import toy
import vcb
from eval import demo
from experiments import measure, page, pictures, policies, probes, run, sentiment, variants


@pytest.mark.parametrize("wanted", [run.runs, run.runs_to_tune])
def test_runs_have_flags_that_are_known_and_come_in_order(wanted):
    before = set()
    for name, one in wanted().items():
        assert before.issuperset(one.needs()), name
        job = run.job(name, one, 10)
        script, words = Path(job.words[1]).stem, job.words[2:]
        if script == "variants":
            script, words = "dvpo", words[1:]
        script = "experiments.noisy" if script == "noisy" else script
        args = tyro.cli(importlib.import_module(script).Args, args=words, use_underscores=True)
        assert args.seed == 10 and Path(args.output_dir) == job.folder and "{" not in " ".join(words)
        before.add(name)
    assert len(before) > 40


def test_settings_are_those_that_the_grid_chose():
    found = json.loads((Path(run.ROOT) / "experiments" / "tuning.json").read_text())
    assert set(found["methods"]) == set(run.ON_POLICY)
    for name, rows in found["methods"].items():
        assert len(rows) == len(run.GRID)
        allowed = [row for row in rows if row["kl"] <= run.KL_BUDGET]
        best = max(allowed, key=lambda row: row["seen"])
        assert best["chosen"] and (best["kl_coef"], best["learning_rate"]) == run.CHOSEN[name]


def test_sentiment_runs_have_flags_that_are_known():
    jobs = sentiment.jobs("model", Path("out"), sentiment.SIZES["full"])
    for name, job in jobs.items():
        assert set(jobs).issuperset(job.needs), name
        tyro.cli(importlib.import_module(Path(job.words[1]).stem).Args, args=job.words[2:], use_underscores=True)


def test_real_policies_are_held_out_and_their_runs_have_flags_that_are_known(tmp_path):
    answer = lambda i, j: {"policy": f"p{j}", "text": "x" * (j + 1), "score": j + 0.1 * i}
    rows = [{"prompt": f"q{i}", "responses": [answer(i, j) for j in range(8)]} for i in range(12)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    about = policies.write_data(tmp_path / "data.jsonl", tmp_path, policies.SIZES["tiny"])
    read = lambda name: [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
    who = lambda name: {a["policy"] for row in read(name) for a in row["responses"]}
    assert about["policies_held_out"] == ["p2", "p6"] and who("unseen") == {"p2", "p6"}
    assert not who("train") & who("unseen") and not who("seen") & who("unseen")
    asked = {name: {row["prompt"] for row in read(name)} for name in ("train", "seen", "unseen")}
    assert asked["seen"] == asked["unseen"] and not asked["seen"] & asked["train"]
    assert policies.of_whole_texts(tmp_path / "unseen.jsonl")["mean"] == 1  # the longer, the better: by construction
    for job in policies.jobs("model", tmp_path).values():
        tyro.cli(importlib.import_module(Path(job.words[1]).stem).Args, args=job.words[2:], use_underscores=True)


def test_prompts_of_sentiment_are_in_one_split_each():
    splits = [set(sentiment.prompts(split)) for split in ("held_out", "rl", "writers")]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 3 * len(set(sentiment.THINGS))


def test_writers_say_one_sentence():
    first = sentiment.first_sentence
    assert (
        first(" The soup is fine. And more") == "The soup is fine."
        and first("no end") == first("a line\nand an end.") == ""
    )


def test_intervals_are_students():
    mean, low, high = page.interval(np.array([1.0, 2.0, 4.0, np.nan]))
    assert mean == pytest.approx(7 / 3) and high - mean == pytest.approx(4.302653 * np.std([1, 2, 4], ddof=1) / 3**0.5)
    assert low == pytest.approx(2 * mean - high) and page.shown(np.array([-1.0, -1.0])) == "−1.00 [−1.00, −1.00]"


def test_gold_at_a_kl_is_that_of_the_first_passage():
    step = lambda kl, gold: {"kl": kl, "gold": gold}
    row = {"curve": [step(1.0, 0.5), step(3.0, 1.5), step(2.0, 9.0)]}
    found = page.Found({"seeds": [0], "code": "", "runs": {"sft": {"0": {"gold": {"mean": 0.0}}}, "dvpo": {"0": row}}})
    at = lambda kl, **more: page.at_kl(found, "dvpo", kl, **more)
    assert at(0.5, window=1) == pytest.approx([0.25]) and at(2.0, window=1) == pytest.approx([1.0])
    assert np.isnan(at(3.5, window=1)).all()
    assert at(2.0, window=3) == pytest.approx([11 / 3])  # the mean of three steps is the only point beside the start


def test_a_mean_over_some_seeds_says_so_and_one_seed_decides_nothing():
    assert page.shown(np.array([1.0, np.nan, 3.0]), bounds=False) == "2.00 (2 of 3 seeds)"
    assert page.word(np.array([1.0, 1.1, 0.9])) == "above" and page.word(np.array([-1.0, -1.1, -0.9])) == "below"
    assert page.word(np.array([1.0, -1.0])) == "not distinguishable from"
    assert page.word(np.array([1.0])) == page.word(np.array([np.nan, np.nan])) == "on too few seeds to be compared with"


def test_no_final_policy_lies_on_a_line_to_one_that_broke_down():
    row = lambda kl, gold: {"kl": kl, "gold": {"mean": gold}}
    runs = {
        "dvpo": {"0": row(4.0, 1.0), "1": row(4.0, 1.0)},
        "dvpo_beta_0.05": {"0": row(6.0, 1.2), "1": row(5.0, 1.1)},
        "dvpo_beta_0.02": {"0": row(30.0, -1.5), "1": row(8.0, 1.2)},
        "rest": {"0": row(5.0, 1.0), "1": row(4.5, 1.0)},
    }
    found = page.Found({"seeds": [0, 1], "code": "", "runs": runs})
    at = lambda kl: page.matched(found, "dvpo", kl, *page.GOLD)
    assert at(5.0) == pytest.approx([1.1, 1.1]) and at(np.array([6.0, 4.0])) == pytest.approx([1.2, 1.0])
    assert np.isnan(at(7.0)).tolist() == [True, False] and np.isnan(at(6.4)).tolist() == [False, False]
    assert "| 1.00 [1.00, 1.00] | 0.075" in page.at_their_kl(found, ["rest"], ["dvpo"])


def test_final_policies_are_compared_at_equal_kl_and_only_where_all_seeds_reach_it():
    row = lambda kl, gold: {"kl": kl, "gold": {"mean": gold}}
    runs = {
        "vcb_gamma_0.5": {"0": row(1.0, 0.2), "1": row(1.2, 0.2)},
        "vcb": {"0": row(2.0, 0.4), "1": row(2.2, 0.6)},
        "vcb_gamma_0.15": {"0": row(3.0, 1.0), "1": row(2.8, 1.0)},
        "vcb_n_2": {"0": row(9.0, 9.0), "1": row(9.0, 9.0)},
    }
    found = page.Found({"seeds": [0, 1], "code": "", "runs": runs})
    assert page.family(found, "vcb") == ["vcb_gamma_0.15", "vcb", "vcb_gamma_0.5"]
    assert page.matched(found, "vcb", 1.5, *page.GOLD) == pytest.approx([0.3, 0.2 + 0.3 / 1.0 * 0.4])
    assert np.isnan(page.matched(found, "vcb", 2.9, *page.GOLD)).tolist() == [False, True]
    assert page.levels(found, ["vcb"]) == [1.5, 2.0, 2.5] and "–" in page.at_matched_kl(found, ["vcb"])
    assert (
        page.said("vcb_gamma_0.5") == "VCB, γ 0.5"
        and page.said("vcb", True) == "VCB, γ 0.25"
        and page.said("vcb") == "VCB"
    )


def test_vcb_is_compared_at_the_kl_where_runs_of_the_others_end():
    row = lambda kl, gold: {"kl": kl, "gold": {"mean": gold}}
    both = lambda kl, gold: {"0": row(kl, gold), "1": row(kl, gold + 0.01)}
    runs = {"vcb": both(1.0, 0.3), "vcb_gamma_0.15": both(3.0, 0.9)}
    runs |= {"dpo": both(1.0, 0.5), "dpo_gamma_0.5": both(2.5, 0.2)}  # crosses VCB's line between 1 and 2 nats
    runs |= {
        "ipo": {"0": row(1.0, 0.2), "1": row(1.0, 0.4)},
        "ipo_gamma_0.05": {"0": row(2.0, 0.5), "1": row(2.0, 0.7)},
    }
    runs |= {
        "rrhf": both(2.0, 0.2),
        "rrhf_c_30": both(2.0, 0.9),
        "rest_steps_1": both(9.0, 9.0),
        "rest": both(2.0, 0.1),
    }
    runs["rrhf_c_100"] = {"0": row(2.0, 0.5), "1": row(2.0, 0.7)}
    found = page.Found({"seeds": [0, 1], "code": "", "runs": runs})
    said = page.off_at_matched_kl(found)
    assert (
        "is below DPO at 1, above DPO at 1.5, 2 and 2.5 nats; not distinguishable from IPO at 1, 1.5 and 2 nats."
        in said
    )
    assert (
        "it is above RRHF of c 10, ReST of improve steps 3; below RRHF of c 30; not distinguishable from RRHF of c 100;"
        in said
    )
    assert (
        "not compared, since not between runs of VCB's on every seed, is ReST of improve steps 1." in said
        and "ReST, improve steps 1: 9.00 at 9.0" in said
    )
    assert page.claim_rrhf(found).endswith(
        "of 0.21 at c 10 (2.0 nats); 0.91 at c 30 (2.0 nats); 0.60 at c 100 (2.0 nats)."
    )
    rows = {line.split(" | ")[0]: line for line in page.at_their_kl(found, ["rrhf", "rest"], ["vcb"]).splitlines()}
    assert rows["| RRHF, c 10"].endswith("| 0.400 [0.400, 0.400] |") and rows["| ReST, improve steps 1"].endswith(
        "| – |"
    )


def test_a_run_lies_above_the_line_between_its_neighbours_where_the_curve_is_bent():
    row = lambda kl, gold: {seed: {"kl": kl, "gold": {"mean": gold}} for seed in ("0", "1")}
    runs = {"vcb_gamma_0.5": row(1.0, 0.2), "vcb": row(2.0, 0.6), "vcb_gamma_0.15": row(3.0, 0.4), "dpo": row(1.0, 9.0)}
    found = page.Found({"seeds": [0, 1], "code": "", "runs": runs})
    assert page.bent(found, ["vcb", "dpo"]) == pytest.approx([0.3]) and "0.30 at most" in page.about_lines(found)


def test_the_outcomes_share_is_compared_at_equal_kl_and_without_a_seed_that_broke_down():
    row = lambda kl, gold, bump=0.0: {
        "kl": kl + bump,
        "gold": {"mean": gold + bump},
        "curve": [{"gold": gold, "kl": kl}] * 20,
    }
    both = lambda *row_of: {"0": row(*row_of), "1": row(*row_of, 0.01), "2": row(*row_of, 0.02)}
    fit = lambda all_, first3: {"all": {"correlation": all_}, "first3": {"correlation": first3}}
    read = lambda right, none: {key: {"right_tau": fit(*right), "no_tau": fit(*none)} for key in "012"}
    runs = {"gvm": read((0.8, 0.7), (9, 9)), "gvm_tau_all_tokens": read((0.9, 0.75), (9, 9)),
            "gvm_no_tau": read((9, 9), (0.6, 0.5)), "gvm_all_tokens": read((9, 9), (0.59, 0.52))}  # fmt: skip
    runs |= {"dvpo": both(4.0, 1.0), "dvpo_beta_0.2": both(2.0, 0.6), "dvpo_tau_all_tokens": both(3.0, 0.7)}
    runs |= {"dvpo_no_tau": both(4.0, 1.0), "dvpo_all_tokens": both(4.0, 0.9)}
    runs["dvpo_no_tau"]["2"] |= {"gold": {"mean": -1.5}}
    found = page.Found({"seeds": [0, 1, 2], "code": "", "runs": runs})
    first, second = page.answer_outcome(found).split("¶")
    assert (
        "with τ it changes the correlation with the exact values by −0.050 [−0.050, −0.050]" in first
        and "by −0.100" in first
    )
    assert "by 0.30 [0.30, 0.30] at 1.0 [1.0, 1.0] nats more KL, 0.10 [0.10, 0.10] at equal KL." in first
    assert "Without τ" in second and "by −0.020" in second and "by 0.010" in second and "equal KL" not in second
    assert "; 0.10 [0.10, 0.10] without seed 2, where a policy breaks down." in second
    told = page.outcome(found)
    assert (
        "| with τ | half | 0.800" in told
        and "| without τ | none: all tokens alike | 0.590" in told
        and "| 0.30 [0.30, 0.30] |" in told
    )
    del found.runs["dvpo_tau_all_tokens"]
    assert page.answer_outcome(found) == page.NOT_YET


def test_in_short_is_what_stands_before_the_mark():
    assert page.brief("**Answer.** Level.¶ More.") == "Level." and page.brief("One.") == "One."
    assert (
        page.rewritten("<!-- table x -->\n<!-- end -->", {"x": lambda: "a.¶ b."})
        == "<!-- table x -->\na. b.\n<!-- end -->"
    )
    assert [page.listed(list(x)) for x in ("1", "12", "123")] == ["1", "1 and 2", "1, 2 and 3"]


def test_coefficients_that_the_page_says_are_those_of_the_runs():
    toys = {"vcb": vcb.Args().gamma, **{name: dpo.GAMMA[name][0] for name in ("dpo", "ipo")}}
    assert all("--gamma" not in run.OFF_POLICY[name] for name in toys)
    own = {name: float(run.CHOSEN[name][0]) for name in ("dvpo", "ppo")} | toys
    own |= {name: float(run.OFF_POLICY[name].split("--nll_coef ")[1].split()[0]) for name in ("slic", "rrhf")}
    assert {name: float(value) for name, (_, value) in page.OWN.items()} == own | {"rest": len(rest.Args().quantiles)}
    for name, (sign, flag, values) in run.COEFFICIENTS.items():
        assert page.OWN[name][1] not in values  # no run twice
        for value, given in values.items():
            one = run.runs()[f"{name}_{sign}_{value}"]
            args = tyro.cli(importlib.import_module(one.script).Args, args=one.flags.split(), use_underscores=True)
            assert page.said(f"{name}_{sign}_{value}").endswith(f" {value}") and page.coefficient(
                f"{name}_{sign}_{value}"
            ) == float(value)
            got = getattr(args, flag.removeprefix("--"))
            assert got == (tuple(float(x) for x in given.split()) if name == "rest" else float(given))
            own = rest.Args().quantiles
            assert len(got) == int(value) and (*own, *got[3:])[: len(got)] == got if name == "rest" else given == value


def test_a_table_between_its_marks_is_made_anew_and_the_rest_stays():
    text = "a\n<!-- table x -->\nold\n<!-- end -->\nb\n<!-- table y -->\nkept\n<!-- end -->\n"
    found = page.rewritten(text, {"x": lambda: "new"})
    assert found == text.replace("old", "new").replace("kept", page.NOT_YET)


def put_back(patch):
    """At its end, what experiments/variants.py replaces is as before."""
    for name in ("score_rollout", "render", "advantages"):
        patch.setattr(dvpo, name, getattr(dvpo, name))


@pytest.fixture
def small(monkeypatch):
    """A world of few prompts, a model of a layer, few texts to grade by."""
    prompts, config = toy.prompts, toy.config
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    monkeypatch.setattr(toy, "prompts", lambda split: prompts(split)[:16])
    monkeypatch.setattr(toy, "config", lambda **given: config(**given | tiny))
    for name, value in {"TEXTS": 6, "CONTINUED": 4, "DRAWN": 8, "BATCH": 4, "BATCHES": 2}.items():
        monkeypatch.setattr(probes, name, value)
    for name in ("SAMPLES", "POINTS"):
        monkeypatch.setattr(demo, name, 4)
    monkeypatch.setattr(demo, "BEST_OF", (1, 2))
    monkeypatch.setattr(demo, "TEXTS", 6)
    put_back(monkeypatch)


STEPS = {
    "sft": "--steps 1", "gvm": "--steps 1", "rm": "--steps 1", "sample": "--split train[:4] --max_response_tokens 8",
    "vcb": "--steps 1 --snapshot_every 1", "dpo": "--steps 1 --snapshot_every 1",
}  # fmt: skip
RL = "--steps 2 --rollout_batch_size 8 --batch_size 8 --max_response_tokens 8 --snapshot_every 1"


def test_from_runs_to_tables(small, monkeypatch, tmp_path):
    """Every kind of run that EXPERIMENTS.md speaks of, in a small world: run, measured, and shown."""
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    names = [
        "sft",
        "gvm",
        "gvm_no_tau",
        "rm",
        "sample",
        "dvpo",
        "ppo",
        "vcb",
        "dpo",
        "ipo",
        "vcb_gamma_0.5",
        "dvpo_exact_q",
        "dvpo_other_tau",
        "dvpo_released",
        "gvm_all_tokens",
        "dvpo_no_tau",
        "dvpo_all_tokens",
        "gvm_tau_all_tokens",
        "dvpo_tau_all_tokens",
        "gvm_tau_4",
    ]
    wanted = run.runs()
    for seed in (10, 11):
        for name in names:
            job = run.job(name, wanted[name], seed)
            script, words = Path(job.words[1]).stem, [*job.words[2:], *STEPS.get(wanted[name].script, RL).split()]
            with monkeypatch.context() as patch:
                if script == "variants":
                    put_back(patch)
                    variants.VARIANTS[words[0]](words)
                    script, words = "dvpo", words[1:]
                importlib.import_module(script).main(words)
            assert job.done(), name
        monkeypatch.setattr(sys, "argv", ["measure.py", str(tmp_path / f"seed{seed}")])
        measure.main()
        probes.main()
    report = json.loads(json.dumps({"seeds": [10, 11], "code": "", **run.gathered(wanted, (10, 11))}))
    assert set(report["runs"]) == set(names) - {"rm", "sample"}
    for kind, shown in report["runs"]["gvm"]["10"]["pairs_shown"].items():  # as measure.py has it, of as many pairs
        probed = report["probes"]["10"]["pairs"][kind]["gvm"]
        assert set(probed) == {"0", "1", "2", "4"} and {k: probed[k] for k in shown} == shown
    monkeypatch.setattr(page, "ROOT", tmp_path)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "toy.json").write_text(json.dumps(report))
    made = {name: table() for name, table in page.tables().items()}
    golds = [report["runs"]["dvpo"][seed]["gold"]["mean"] for seed in ("10", "11")]
    assert f"| DVPO, `gae` | {page.shown(golds)} |" in made["headline"] and "nan" not in made["headline"]
    for name in (
        "gradients",
        "teachers",
        "moved",
        "targets",
        "implicit",
        "methods",
        "ladder",
        "advantages",
        "tau_policy",
        "values",
        "pairs",
        "readings",
        "outcome",
    ):
        assert len({line.count("|") for line in made[name].splitlines() if line.startswith("|")}) == 1, name
    assert made["values"].count("–") < 9 and "Bayes-optimal, no τ" in made["values"]
    assert "exact Q" in made["ladder"] and page.shown(golds) in made["ladder"]
    monkeypatch.setattr(pictures, "DOCS", tmp_path)
    pictures.main()
    assert {path.stem for path in tmp_path.glob("*.png")} == set(pictures.pictures(page.Found(report)))


def test_parts_of_the_experiments_come_together(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "ROOT", tmp_path)
    (tmp_path / "experiments").mkdir()
    part = lambda seed, name, code="a": {
        "code": code, "seeds": [seed], "runs": {name: {str(seed): {}}}, "probes": {str(seed): {}}
    }  # fmt: skip
    for one in (part(11, "ppo"), part(10, "dvpo"), part(10, "ppo")):
        run.save("toy", run.merged(one))
    found = json.loads((tmp_path / "experiments" / "toy.json").read_text())
    assert found["seeds"] == [10, 11] and found["runs"] == {"ppo": {"10": {}, "11": {}}, "dvpo": {"10": {}}}
    assert run.merged(part(12, "vcb", "b")) == part(12, "vcb", "b")  # of another state of the code: begins anew


def test_noise_has_no_part_in_the_cosine_of_two_gradients():
    """Estimates of one expectation and of another, far noisier than long: their expectations' cosines come out."""
    rng, k, width = np.random.default_rng(0), 32, 20000
    one, other = rng.normal(size=(2, width))
    means = {probes.BEST: one, "same": one, "other": 0.6 * one + 0.8 * other}
    found = {name: torch.tensor(x + 4 * rng.normal(size=(k, width))) for name, x in means.items()}
    sums = {name: x.sum(0) for name, x in found.items()}
    squares = {name: float(x.square().sum()) for name, x in found.items()}
    crossed = {name: float((x * found[probes.BEST]).sum()) for name, x in found.items()}
    told = probes.directions(sums, squares, crossed, k)
    assert told[probes.BEST]["cosine"] == pytest.approx(1) and told["same"]["cosine"] == pytest.approx(1, abs=0.02)
    assert told["other"]["cosine"] == pytest.approx(0.6, abs=0.02)
    assert told["same"]["noise"] == pytest.approx(16 * width / (one @ one), rel=0.02)
    biased = float(sums["same"] @ sums[probes.BEST] / sums["same"].norm() / sums[probes.BEST].norm())
    assert biased < 0.7  # what lengths with the noise in them would say


def test_means_of_noisy_draws_correlate_with_the_truth_as_much_as_their_noise_allows():
    rng = np.random.default_rng(1)
    truth = 0.3 * rng.normal(size=20000)
    draws = truth[:, None] + rng.normal(size=(20000, 8))
    allowed = np.sqrt(1 - probes.noise_share(draws))
    assert allowed == pytest.approx(np.corrcoef(truth, draws.mean(1))[0, 1], abs=0.02)
    assert allowed == pytest.approx((0.09 / (0.09 + 1 / 8)) ** 0.5, abs=0.02)
    assert probes.noise_share(np.ones((3, 8))) is None


def test_a_method_is_not_compared_with_itself_and_a_breakdown_is_named():
    """The least coefficient beside the method's own: of each seed, and only where it is another."""
    row = lambda kl, gold, curve: {
        "kl": kl, "gold": {"mean": gold}, "proxy": {"mean": gold}, "curve": [{"gold": x, "kl": kl} for x in curve]
    }  # fmt: skip
    fine, ill = [1.0] * 40, [1.0] * 30 + [-1.5] * 10
    both = lambda one: {"0": one, "1": one}
    runs = {
        "ppo": both(row(5.0, 1.0, fine)),
        "ppo_beta_0.1": both(row(4.0, 0.9, fine)),
        "dvpo": both(row(4.0, 1.0, fine)),
    }
    told = lambda: page.over_by_coefficient(page.Found({"seeds": [0, 1], "code": "", "runs": runs}))
    assert told() == ("", "")
    runs["dvpo_beta_0.02"] = {"0": row(9.0, -1.5, ill), "1": row(6.0, 1.1, fine)}
    assert "DVPO, `gae`, β 0.02 (KL 7.5) (breaks down on 1 of 2 seeds): gold −1.20" in told()[1]
    assert told()[0].endswith(
        "more proxy than the own coefficient's with no method; less gold, beyond its noise, with no method."
    )
    runs["dvpo_beta_0.02"] = {key: row(6.0, 0.9, fine) | {"proxy": {"mean": 1.1}} for key in "01"}
    assert told()[0].endswith("the own coefficient's with DVPO, `gae`; less gold, beyond its noise, with DVPO, `gae`.")
    del runs["dvpo_beta_0.02"]["1"]
    assert told() == ("", "")


def test_the_line_of_exact_values_on_a_models(monkeypatch, tmp_path):
    """Values of twice the exact ones and one more: slope 1 / 2, offset -1 / 2."""
    (tmp_path / "gvm_no_tau" / "final").mkdir(parents=True)
    exact = lambda row: toy.exact_values(row[0], row[1], row[2].split() + [toy.EOS])[1:]
    texts = demo.value_texts(toy.TRAIN_POLICIES[:2], 0)[:6]
    monkeypatch.setattr(demo, "value_texts", lambda policies, seed: texts)
    bench = type(
        "Bench", (), {"folder": tmp_path, "seed": 0, "values": lambda *_: [2 * exact(row) + 1 for row in texts]}
    )()
    found = probes.targets(bench, {"gvm_paper": {"last": 0.5}})
    assert found.pop("gvm_no_tau") == pytest.approx({"slope": 0.5, "offset": -0.5, "last": 1.0}, abs=1e-9)
    assert found == {"gvm_paper": {"last": 0.5}}  # what is known is kept, what is not there is left out


def test_the_fall_is_counted_behind_the_first_steps():
    gold = [-0.1] * 10 + [1.0] * 30 + [-1.0] * 15 + [0.5]
    row = {"gold": {"mean": 0.5}, "curve": [{"gold": x} for x in gold]}
    told = page.claim_curve(page.Found({"seeds": [3], "runs": {"dvpo": {"3": row}}}))
    assert "seed 3" in told and "at 15 of 46 steps, the last of them step 55." in told


class Read(dict):
    """A dict that keeps which of its values were asked for."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = set()

    def __getitem__(self, key):
        self.seen.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        if key in self:
            self.seen.add(key)
        return super().get(key, default)


def test_each_section_ends_in_the_command_that_makes_its_runs(monkeypatch):
    """What a section's tables and answers read is made by its --only, or, where probes are read, by the runs that they need."""
    kept, wanted = [], run.runs()

    class Watched(page.Found):
        def __init__(self, report):
            super().__init__(report)
            self.runs = Read(self.runs)
            kept.append(self)

    monkeypatch.setattr(page, "Found", Watched)
    made = page.tables()
    text = (page.ROOT / "EXPERIMENTS.md").read_text(encoding="utf-8")
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        if not (number := re.match(r"\d", section)):
            continue
        words = " ".join(re.findall(r"`python experiments/run.py --only ([^`]*)`", section)).split()
        found, todo = set(run.PROBED), [*words, *run.PROBED]
        while todo:
            found.add(name := todo.pop())
            todo += wanted[name].needs()
        kept[0].runs.seen = set()
        for mark in re.findall(r"<!-- table (\w+) -->", section):
            made[mark]()
        assert words and not kept[0].runs.seen - found, (number[0], sorted(kept[0].runs.seen - found))


def test_exact_q_are_the_worlds_own(small, monkeypatch, tmp_path):
    """What dvpo.py would read in place of the GVM's values."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "reward_mean": 0.5, "reward_std": 2.0}))
    tokenizer, prompt, text = toy.tokenizer(), toy.prompts("rl")[0], "the soup is good ."
    answer = dvpo.Answer([{"role": "user", "content": prompt}], tokenizer(text)["input_ids"] + [tokenizer.eos_token_id])
    turns = dvpo.render(tokenizer, [answer], 0)
    zeros = lambda engine, frozen, rows, *rest: (None, None, torch.zeros(1, len(answer.response) + 1))
    monkeypatch.setattr(dvpo, "score_rollout", zeros)
    variants.exact_q(["--gvm", str(tmp_path)])
    *_, values = dvpo.score_rollout(None, None, [(turns[0][0], answer.response, turns)], tokenizer)
    exact = np.array(toy.exact_values("crowd", prompt, [*text.split(), toy.EOS]))
    assert values[0].numpy() == pytest.approx((exact - 0.5) / 2, abs=1e-6)


def test_the_released_form_has_no_terminal_value(small):
    argv, mask = [], torch.ones(1, 3, dtype=torch.bool)
    variants.released(argv)
    assert argv == ["--tau_pairs", "0"]
    values, other = torch.tensor([[1.0, 2.0, 4.0, 7.0]]), torch.tensor([[1.0, 2.0, 4.0, -9.0]])
    found = dvpo.advantages(values, torch.zeros(1, 3), mask, lam=1.0)
    assert torch.equal(found, dvpo.advantages(other, torch.zeros(1, 3), mask, lam=1.0))
    # V is 1, 2, 4 before each token: increments 1, 2 and, with nothing behind it, -4; summed to the end -1, -2, -4
    expected = torch.tensor([-1.0, -2.0, -4.0])
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert found[0].tolist() == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_run_that_is_not_known_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", "--only", "dvpo", "dvpoo"])
    with pytest.raises(SystemExit) as ended:
        run.main()
    assert ended.value.code == 2 and "no run is called dvpoo" in capsys.readouterr().err


def test_runs_of_another_state_of_the_code_are_refused(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "FOLDER", tmp_path)
    code = "import pathlib, sys; pathlib.Path(sys.argv[1]).mkdir(parents=True); (pathlib.Path(sys.argv[1]) / 'summary.json').touch()"
    job = run.Job([sys.executable, "-c", code, str(tmp_path / "a")], tmp_path / "a", [], 1)
    assert run.execute({"a": job}) and run.execute({"a": job})
    other = run.Job([sys.executable, "-c", code, str(tmp_path / "b")], tmp_path / "b", [], 1)
    monkeypatch.setattr(run, "same_code", lambda: "another")
    assert run.execute({"b": other})  # which does not make the first one's code the same
    with pytest.raises(SystemExit) as ended:
        run.execute({"a": job})
    assert ended.value.code == 2 and "another state of the code" in capsys.readouterr().err
