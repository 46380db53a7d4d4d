"""The annotators' sheet tells nothing and the tally counts right."""

import html.parser
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from eval import human

EVIL = "<script>alert(1)</script>"


def write(path, value):
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


@pytest.fixture
def sheet(tmp_path):
    for name in "ab":
        rows = [{"prompt": f"question {i} {EVIL}", "completion": f"{name}{i} & {EVIL}", "policy": f"secret_{name}"}
                for i in range(40)]  # fmt: skip
        write(tmp_path / f"secret_{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    flags = ["sheet", "--a", str(tmp_path / "secret_a.jsonl"), "--b", str(tmp_path / "secret_b.jsonl"), "--n", "30"]
    key = human.main([*flags, "--output", str(tmp_path / "s.html")])
    return key, (tmp_path / "s.html").read_text(), flags


class Page(html.parser.HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_sheet_is_blind_and_inert(sheet, tmp_path):
    key, text, flags = sheet
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 1 and "secret" not in text
    assert not [a for _, a in page.tags if "src" in a or "href" in a] and "http" not in text
    assert [tag for tag, _ in page.tags].count("fieldset") == 30 == len(key["items"])
    for i, item in enumerate(key["items"], 1):
        n = item["prompt"].split()[1]
        assert sorted([item["left"][0], item["right"][0]]) == ["a", "b"] and item[item["a"]] == f"a{n} & {EVIL}"
        assert item["left"] in page.text and f'id="item{i}"' in text
    sides = [item["a"] for item in key["items"]]
    assert 5 < sides.count("left") < 25 and len({item["prompt"] for item in key["items"]}) == 30
    assert [item["prompt"] for item in key["items"]] != sorted(item["prompt"] for item in key["items"])
    assert human.main([*flags, "--output", str(tmp_path / "t.html")]) == key
    other = human.main([*flags, "--output", str(tmp_path / "u.html"), "--seed", "1"])
    assert other["sheet"] != key["sheet"] and other["items"] != key["items"]


def test_kappa():
    """Cohen's own kind of example: 20 + 15 agreements of 50, marginals 25/25 and 30/20: p 0.7, e 0.5, kappa 0.4."""
    one = ["yes"] * 25 + ["no"] * 25
    other = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    found = human.agreement(one, other)
    assert found["agreement"] == pytest.approx(0.7) and found["kappa"] == pytest.approx(0.4) and found["items"] == 50
    assert human.agreement(one, one)["kappa"] == pytest.approx(1)
    assert human.agreement(["tie"] * 3, ["tie"] * 3) == {"items": 3, "agreement": 1.0, "kappa": None}


def test_tally(sheet, tmp_path, capsys):
    key, _, _ = sheet
    side = {str(i): item["a"] for i, item in enumerate(key["items"], 1)}
    other = {"left": "right", "right": "left"}
    # of a: ann says win on 1-12, tie on 13-18, loss on 19-30; bob win on 1-15, loss on 16-25, and leaves 5 open
    ann = {i: side[i] if int(i) <= 12 else "tie" if int(i) <= 18 else other[side[i]] for i in side}
    bob = {i: side[i] if int(i) <= 15 else other[side[i]] for i in side if int(i) <= 25}
    files = [write(tmp_path / f"{name}.json", {"sheet": key["sheet"], "annotator": name, "answers": answers})
             for name, answers in (("ann", ann), ("bob", bob))]  # fmt: skip
    flags = ["tally", "--key", str(tmp_path / "s.key.json"), "--answers"]
    found = human.main([*flags, *files])
    shares = lambda x: [x[k]["mean"] for k in ("win", "tie", "loss")]
    assert np.allclose(shares(found["annotators"]["ann"]), [12 / 30, 6 / 30, 12 / 30])
    assert np.allclose(shares(found["annotators"]["bob"]), [15 / 25, 0, 10 / 25])
    together = np.array([12 + 3 * 0.5, 3 * 0.5 + 3 * 0.5, 3 * 0.5 + 7 + 5]) / 30
    assert np.allclose(shares(found["together"]), together)
    (agreed,) = found["agreement"]
    p, e = (12 + 7) / 25, (12 * 15 + 6 * 0 + 7 * 10) / 25**2
    assert agreed["items"] == 25 and agreed["agreement"] == pytest.approx(p)
    assert agreed["kappa"] == pytest.approx((p - e) / (1 - e))
    assert "kappa 0.60" in capsys.readouterr().out

    def stopped(word, *paths):
        with pytest.raises(SystemExit) as error:
            human.main([*flags, *paths])
        said = capsys.readouterr().err
        assert error.value.code == 2 and word in said and said.count("\n") == 1

    stopped("another sheet", write(tmp_path / "x.json", {"sheet": "no", "annotator": "x", "answers": {}}))
    stopped("item 99", write(tmp_path / "y.json", {"sheet": key["sheet"], "annotator": "y", "answers": {"99": "left"}}))
    stopped("no answers", write(tmp_path / "z.json", {"sheet": key["sheet"], "annotator": "z", "answers": {}}))
    stopped("same annotator", files[0], files[0])
    stopped("cannot be read", str(tmp_path / "none.json"))
    stopped("no field answers", files[0], flags[2])
    flags[2] = files[0]
    stopped("no field items", files[1])
