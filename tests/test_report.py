"""The report of a demo folder, or a run's: escaping, its numbers and sections, and what is missing left out."""

import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy
from eval import demo, report

EVIL = "<script>alert(1)</script>"
SECTIONS = ("curves", "methods", "gvm", "tokens", "samples", "config")


def method(mean, malformed=0.1):
    gold = {"mean": mean, "ci95": [mean - 0.05, mean + 0.05], "std": 0.7}
    numbers = {"malformed": malformed, "clauses": 2.125, "kl": 3.456, "length": 15.08, "seconds": 46.5}
    return {"gold": gold, "peak_memory_mb": 701} | numbers


def fit(correlation):
    return {x: {"correlation": correlation, "mse": 0.5 - correlation / 2} for x in ("all", "first3")}


def yardstick_results():
    found = {"right_tau": fit(0.61), "other_tau": fit(-0.21), "no_tau": fit(0.51)}
    yardsticks = {"position": fit(0.11), "bayes_no_tau": fit(0.81), "bayes_tau": fit(0.91)}
    return found | {"yardsticks": yardsticks, "held_out_policies": {"right_tau": fit(0.41)}}


def small(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return toy.config(num_hidden_layers=1, **sizes, **changes)


@pytest.fixture
def folder(tmp_path):
    """A demo folder with random models: sft, gvm, and a run `dvpo_<b>`."""
    torch.manual_seed(0)
    value = small(num_labels=1, reward_mean=-0.2, reward_std=0.9, tau_pairs=2, tau_tokens=192)
    models = {
        "sft": transformers.LlamaForCausalLM(small()),
        "gvm": transformers.LlamaForTokenClassification(value),
        "dvpo_<b>": transformers.LlamaForCausalLM(small()),
    }
    for name, model in models.items():
        model.save_pretrained(tmp_path / name / "final")
        toy.tokenizer().save_pretrained(tmp_path / name / "final")
        (tmp_path / name / "args.json").write_text(json.dumps({"data": EVIL, "learning_rate": 0.000123}))
        (tmp_path / name / "summary.json").write_text(json.dumps({"seconds": 46.5, "peak_memory_mb": 701}))
    steps = [{"step": t + 1, "gold": 0.1 * t, "kl": 0.2 * t} for t in range(12)]
    (tmp_path / "dvpo_<b>" / "metrics.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in steps) + '{"step": 13, "go'
    )
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    methods = {"sft": method(-0.234), "dvpo_<b>": method(0.34, 0.012), f"ppo{EVIL}": method(0.456)}
    methods[f"ppo{EVIL}"]["peak_memory_mb"] = None  # a run that was killed before it wrote its summary
    results = {"methods": methods, "seconds": {"sft": 46.5, "gvm": 117.3}, "gvm": yardstick_results()}
    (tmp_path / "results.json").write_text(json.dumps(results))
    return tmp_path


class Tags(html.parser.HTMLParser):
    """Every tag that is opened is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br", "link", "img", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_page(folder, monkeypatch):
    real = report.samples
    monkeypatch.setattr(report, "samples", lambda *inputs: [*real(*inputs), ("how ?", EVIL, -1.5)])
    aside, dotted = folder / "dvpo_<b>.1", folder / "dvpo_kl0.1"  # an earlier run; a name in its own right
    for run, place in ((aside, "dvpo_<b>"), (dotted, "dvpo_kl0.1")):
        run.mkdir()
        (run / "args.json").write_text(json.dumps({"output_dir": f"runs/demo/{place}"}))
        (run / "metrics.jsonl").write_text('{"step": 1, "gold": 0.5, "kl": 0.5}\n')
    assert report.main([str(folder)]) is None
    page = (folder / "report.html").read_text()
    tags = Tags(page).seen
    assert [attrs["id"] for tag, attrs in tags if tag == "section"] == list(SECTIONS)
    # text of models and data stays text, in cells, flags, names of runs, and in the picture
    assert not {"script", "b_", "link", "img", "iframe"} & {tag for tag, _ in tags}
    assert "dvpo_<b>" not in page and "dvpo_&lt;b&gt;" in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2 + 2 + 3  # samples, the best method, args
    # nothing is loaded from anywhere
    assert not [attrs for _, attrs in tags if "src" in attrs or attrs.get("href", "#").startswith("http")]
    assert "@import" not in page and "url(http" not in page
    # numbers: methods, headline, the GVM's table and the share of the way (0.61 - 0.11) / (0.91 - 0.11)
    methods = (
        "[−0.28, −0.18] [0.29, 0.39] 10.0\N{NO-BREAK SPACE}% 1.2\N{NO-BREAK SPACE}% 3.46 15.1 2.12 46 701 0.000123"
    )
    for text in methods.replace(", ", ",").split(" "):
        assert text.replace(",", ", ") in page, text
    for text in ("0.61", "−0.21", "0.51", "0.11", "0.81", "0.91", "0.41", "0.195", "62\N{NO-BREAK SPACE}% of the way"):
        assert text in page, text
    assert "117 s" in page and "p4" in page and "trained without τ" not in page
    assert "&lt;b&gt;.1" not in page and "<summary>dvpo_kl0.1</summary>" in page
    for name in ("learning_curve.png", "token_values.png"):
        assert (folder / name).read_bytes()[:4] == b"\x89PNG"


def test_the_demo_leaves_out_earlier_runs_and_no_others(folder, capsys, monkeypatch):
    """sft.1 is one; dvpo_kl0.1 is a name in its own right."""
    few = demo.calibration.load_prompts
    monkeypatch.setattr(demo.calibration, "load_prompts", lambda *inputs: [column[:2] for column in few(*inputs)])
    monkeypatch.setattr(demo, "TEXTS", 2)
    for name in ("sft.1", "dvpo_kl0.1"):
        shutil.copytree(folder / "sft", folder / name)
    for run in folder.glob("*/args.json"):
        place = "sft" if run.parent.name == "sft.1" else run.parent.name
        run.write_text(json.dumps({"output_dir": f"runs/demo/{place}", "seed": 0}))
    demo.main([str(folder)])
    results = json.loads((folder / "results.json").read_text())
    assert results["methods"].keys() == {"sft", "dvpo_<b>", "dvpo_kl0.1"}
    assert f"gvm goes {demo.share_of_way(results['gvm']):.0%} of the way" in capsys.readouterr().out


def test_missing_parts(folder):
    results = {"methods": {"sft": method(-0.234)}}
    (folder / "results.json").write_text(json.dumps(results))
    for name in ("gvm", "dvpo_<b>"):
        (folder / name).rename(folder.parent / f"{folder.name} {name[:3]}")
    page = report.report(folder).read_text()
    assert [attrs["id"] for tag, attrs in Tags(page).seen if tag == "section"] == ["methods", "config"]
    assert not list(folder.glob("*.png")) and "−0.23 [−0.28, −0.18]" in page

    results["gvm"] = {"no_tau": fit(0.3)}  # trained without tau, not yet compared with anything
    results["gvm_no_tau"] = {"no_tau": fit(0.37), "held_out_policies": {"no_tau": fit(0.33)}}
    (folder / "results.json").write_text(json.dumps(results))
    page = report.report(folder).read_text()
    assert "GVM trained without τ" in page and "0.37" in page and "0.33" in page and "of the way" not in page


def test_no_results(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(tmp_path)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and "eval/demo.py" in error and "no run folder" in error
    assert not list(tmp_path.iterdir())


def test_any_run(tmp_path):
    run = tmp_path / "mine"
    run.mkdir()
    rows = [
        {"step": t, "seconds": t, "loss": 4.0 - t / 20, EVIL: t / 8, "kl": None if t < 5 else 0.25}
        for t in range(1, 41)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "args.json").write_text(json.dumps({"data": EVIL, "learning_rate": 0.000123}))
    said = [
        {"step": t, "prompt": [{"role": "user", "content": "how ?"}], "response": f"so {t} {EVIL}"} for t in (1, 20, 40)
    ]
    odd = [{"step": 40, "prompt": [{"role": 1}], "response": "odd"}, {"step": 40, "response": 3}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*said, *odd]) + "{")
    assert report.main([str(run)]) is None
    page = (run / "report.html").read_text()
    seen = Tags(page).seen
    assert [attrs["id"] for tag, attrs in seen if tag == "section"] == ["curves", "numbers", "samples", "flags"]
    assert "script" not in {tag for tag, _ in seen} and EVIL not in page and "learning_rate = 0.000123" in page
    assert (
        "not come to its end" in page
        and "at step 40" in page
        and "only some of the 40 steps have a number: kl 36" in page
    )
    cells = re.findall("<td>(.*?)</td>", page)
    at = cells.index("loss")  # first tenth: steps 1 to 4; last: 37 to 40
    assert cells[at + 1 : at + 5] == ["3.88", "2.08", "2.00", "3.95"] and "seconds" not in cells
    assert (
        page.count("<figcaption>") == 3
        and "how ?" in page
        and "so 1 &lt;" in page
        and "so 20" not in page
        and "so 40" in page
    )
    (run / "summary.json").write_text(json.dumps({"steps": 40, "seconds": 12.3, "accuracy": 0.789}))
    for name in ("metrics.jsonl", "samples.jsonl"):  # as a run of sample.py has it
        (run / name).unlink()
    report.main([str(run)])
    page = (run / "report.html").read_text()
    assert [attrs["id"] for tag, attrs in Tags(page).seen if tag == "section"] == ["summary", "flags"]
    assert "accuracy = 0.789" in page and "come to its end" not in page


def test_token_pairs(folder):
    pairs = report.token_pairs(folder / "gvm" / "final", toy.tokenizer())
    words = []
    for pair in pairs:
        assert pair["prompt"] in toy.prompts("heldout") and len(pair["tau"]) == 2
        assert pair["prompt"] not in [prompt for prompt, _ in pair["tau"]]
        better, worse = pair["lines"]
        assert better["gold"] > worse["gold"]
        for line in pair["lines"]:
            assert len(line["q"]) == len(line["exact"]) == len(line["words"]) + 1
            assert line["exact"][-1] == pytest.approx(line["gold"]) and line["words"][-1] == toy.EOS
        t = pair["decisive"]
        assert better["words"][:t] == worse["words"][:t]
        assert np.allclose(better["q"][: t + 1], worse["q"][: t + 1], atol=1e-5)  # the same text so far
        words.append((better["words"][t], worse["words"][t]))
    assert words[0] == ("very", "not") and words[1][1] == "weather" and words[2] == ("and", ".")


def test_token_boxes():
    boxes = report.token_boxes([EVIL, "b"], [0.1, -0.2, 0.3], [0.0, -0.25, 0.4], 1.0, 0.5, marked=1)
    assert "<script" not in boxes and "&lt;script&gt;" in boxes and boxes.count("marked") == 1
    for text in (
        "+0.10",
        "−0.20",
        "+0.30",
        "0.00",
        "−0.25",
        "+0.40",
        "step −0.30, exact −0.25",
        "step +0.50, exact +0.65",
    ):
        assert text in boxes, text
    assert boxes.count('class="down"') == boxes.count('class="up"') == 1
    Tags(boxes)


def test_builders():
    assert report.esc(EVIL) == "&lt;script&gt;alert(1)&lt;/script&gt;"
    assert report.esc(report.Raw("<b>")) == "<b>" and report.esc(report.esc("<")) == "&lt;"
    table = report.table((EVIL, "n"), [(report.Raw("<i>a</i>"), EVIL), ("over",), ("b", 2)])
    assert "<script" not in table and "<i>a</i>" in table and 'colspan="2">over' in table and "<td>2</td>" in table
    assert [report.num(x) for x in (-0.004, -0.256, 1)] == ["0.00", "−0.26", "1.00"]
    assert [report.num(x, 1, True) for x in (0.02, -3, 0.5)] == ["0.0", "−3.0", "+0.5"]
    Tags(report.dot_interval(0.1, 0.0, 0.2, (-1, 1)) + report.bar(-0.3) + table)


def test_smooth():
    assert np.allclose(report.smooth([1.0] * 30), 1) and len(report.smooth([5])) == 1
    assert np.allclose(report.smooth([0, 3, 0, 3]), [0, 1, 2, 3])
    assert np.allclose(
        report.smooth(np.arange(40)), np.arange(40)
    )  # a straight line stays where it is, at its ends too


def test_no_two_methods_look_alike():
    found = report.looks([*report.LOOKS, *(f"run {i}" for i in range(12))])
    assert len(set(found.values())) == len(found) and len({found[name][0] for name in report.LOOKS}) == len(
        report.LOOKS
    )
    assert len({found[name][1:] for name in report.LOOKS}) == len(report.LOOKS)  # in grey: marker and line
    assert report.looks(["ppo", "mine"])["ppo"] == report.looks(["mine", "other", "ppo"])["ppo"]


def test_headline():
    results = {"methods": {"sft": method(-0.23, 0.128), "dvpo": method(0.2), "dvpo_gae": method(0.5, 0.02)}}
    text = report.headline(results)
    assert report.dvpo_run(results) == "dvpo" and "best run of all is dvpo_gae: 0.50" in text
    results["methods"].pop("dvpo_gae")
    text = report.headline(results | {"methods": results["methods"] | {"dvpo": method(0.2, 0.02)}})
    assert "rises from −0.23 [−0.28, −0.18]" in text and "0.20 [0.15, 0.25]" in text and "best run of all" not in text
    assert "falls from 12.8\N{NO-BREAK SPACE}% to 2.0\N{NO-BREAK SPACE}%" in text
    same = {"methods": {"sft": method(0.2, 0.02), "dvpo": method(0.2, 0.02)}}
    assert report.headline(same).count(" goes from ") == 2 and "rises" not in report.headline(same)
    results["methods"]["ppo"] = method(0.7)
    assert "best run of all is ppo: 0.70" in report.headline(results)
    assert "−0.23" in report.headline({"methods": {"sft": method(-0.23)}}) and report.headline({"methods": {}}) == ""


def test_colours():
    for value in np.linspace(-2, 2, 41):  # the text on each box has a contrast of at least 4.5
        background, text = report.colours(value, 1.0)
        light = []
        for colour in (background, text):
            rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
            light.append(
                np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
            )
        assert (max(light) + 0.05) / (min(light) + 0.05) >= 4.5
    assert report.colours(-2, 1) == report.colours(-1, 1)


def test_lengths(folder):
    results = json.loads((folder / "results.json").read_text())
    for row in results["methods"].values():
        row |= {
            "length_quartiles": [2, 9, 14, 20, 40],
            "diversity": {"ead": 0.4321, "self_bleu_2": 0.61, "self_bleu_3": 0.5},
        }
    (folder / "results.json").write_text(json.dumps(results))
    page = report.report(folder).read_text()
    sections = [attrs["id"] for tag, attrs in Tags(page).seen if tag == "section"]
    assert sections == [*SECTIONS[:2], "lengths", *SECTIONS[2:]] and "0.432" in page and EVIL not in page
    figure = report.draw_lengths({"a": results["methods"]["sft"]}, "black")
    box = figure.axes[0].patches[0].get_path().vertices[:, 0]
    assert (box.min(), box.max()) == (9, 20)


def test_frontier(folder):
    results = json.loads((folder / "results.json").read_text())
    for row, kl, proxy in zip(results["methods"].values(), (0.0, 2.0, 3.0, 4.0), (0.0, 1.5, 2.5, 1.0)):
        row |= {"kl": kl, "proxy": {"mean": proxy}, "misaligned": 0.123 if kl else None, "steps": 40}
    points = [{"step": t, "kl": t / 20, "gold": g, "gold_ci95": [g - 0.1, g + 0.1], "proxy": t / 40}
              for t, g in ((20, 0.9), (40, 0.5))]  # fmt: skip
    results |= {"frontier": {"dvpo_<b>": points}, "best_of_n": [{"n": 2, "kl": 0.2, "gold": 0.1, "proxy": 0.5}]}
    lines = report.frontier_lines(results)
    assert [q["kl"] for q in lines["dvpo_<b>"]] == [0, 1, 2.0]  # SFT, a snapshot, the final policy in place of the last
    (name, fall, rise), *more = report.over_optimised(lines)
    assert not more and name == "dvpo_<b>" and (fall, rise) == (pytest.approx(0.9 - 0.34), pytest.approx(1.0))
    (folder / "results.json").write_text(json.dumps(results))
    page = report.report(folder).read_text()
    sections = [attrs["id"] for tag, attrs in Tags(page).seen if tag == "section"]
    assert sections == [*SECTIONS[:2], "frontier", *SECTIONS[2:]] and "12.3\N{NO-BREAK SPACE}%" in page
    assert "is seen in dvpo_&lt;b&gt; (gold −0.56, proxy +1.00" in page
    assert (folder / "frontier.png").read_bytes()[:4] == b"\x89PNG"
    noisy = [{"gold": g, "gold_ci95": [g - e, g + e], "proxy": p} for g, e, p in ((0.95, 0.9, 0.1), (0.9, 0.1, 0.2), (0.5, 0.1, 0.4))]  # fmt: skip
    assert report.over_optimised({"x": noisy}) == [
        ("x", pytest.approx(0.4), pytest.approx(0.2))
    ]  # not the highest, which is noise
    lines["dvpo_<b>"][1]["gold_ci95"] = [0.2, 1.6]  # within the noise
    assert report.over_optimised(lines) == []


OWNED = "document.title='owned'"
STRANGERS = [f"<script>{OWNED}</script>", f"<img src=x onerror={OWNED}>", f"</div></section><svg onload={OWNED}>",
             f"\" autofocus onfocus=\"{OWNED}\" x=\"", f"' onmouseover='{OWNED}", f"</style><script>{OWNED}</script>", "&lt;script&gt;"]  # fmt: skip


def test_what_strangers_write_is_escaped_and_runs_in_no_browser(folder, monkeypatch, tmp_path):
    """Texts, names, flags and grades of pages, in Chromium where it is installed."""
    from eval import compare, human, token_values

    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    words, q = ["", *STRANGERS], np.linspace(-1, 1, len(STRANGERS) + 1)
    real = report.samples
    monkeypatch.setattr(report, "samples", lambda *inputs: [*real(*inputs), *[(x, x, -1.5) for x in STRANGERS]])
    line = lambda x: {"policy": x, "score": 1.0, "words": words, "q": q}
    strange = {f"{x} {i}": np.linspace(0, 1, 4) for i, x in enumerate(STRANGERS)}
    runs = [
        report.Run(Path(f"{'ab'[i > 2]}{STRANGERS[1]}{i}"), {x: x, "seed": 1}, {x: i}, np.arange(4), strange, [x])
        for i, x in enumerate(STRANGERS)
    ]
    sides, notes = [runs[:3], runs[3:]], [*STRANGERS]
    pages = {
        "report": report.report(folder).read_text(),
        "run": report.run_page(runs[0], [{"step": 1, "prompt": x, "response": x} for x in STRANGERS]),
        "compare": compare.page(sides, *compare.measured(sides, notes), compare.differing(sides), notes),
        "values": token_values.page([{"prompt": x, "lines": [line(x)]} for x in STRANGERS], 1.0, STRANGERS[0]),
        "sheet": human.page([{"prompt": x, "left": x, "right": x} for x in STRANGERS], "0" * 8, STRANGERS[0]),
    }
    for name, text in pages.items():
        seen = Tags(re.sub("</main><script>.*</script>", "</main>", text, flags=re.S)).seen  # but for the sheet's own
        assert not [
            tag
            for tag, attrs in seen
            if tag in ("script", "img") or {"onload", "onfocus", "onmouseover"} & attrs.keys()
        ]
        (tmp_path / f"{name}.html").write_text(text)
    if not browser:
        return
    (tmp_path / "control.html").write_text(f"<title>calm</title>{STRANGERS[0]}")
    for name in (*pages, "control"):
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=2000",
            f"--user-data-dir={tmp_path / 'profile'}",
        ]
        found = subprocess.run(
            [browser, *flags, "--dump-dom", f"file://{tmp_path / name}.html"],
            capture_output=True,
            text=True,
            timeout=60,
        )
        title = re.search("<title>(.*?)</title>", found.stdout)
        assert title and (title[1] == "owned") == (name == "control"), (name, title, found.stderr[-300:])
