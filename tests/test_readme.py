"""The README's numbers are those of the committed result files, and its commands name scripts and targets that exist."""

import json
import re
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments import page

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "EXPERIMENTS.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
BOOK = {path.name: path.read_text(encoding="utf-8").replace("−", "-") for path in PAGES}


def numbers(page: str, start: str) -> list[float]:
    """The numbers of the one table row of a page that starts so, from its second cell on."""
    row = next(line for line in BOOK[page].splitlines() if line.startswith(f"| {start}"))
    return [float(x) for x in re.findall(r"-?\d+\.\d+", row.split("|", 2)[2])]


@pytest.mark.parametrize("name", page.PAGES)
def test_tables_are_those_of_the_result_files(name):
    """Every table and every sentence with numbers between marks, letter by letter."""
    text = (ROOT / name).read_text(encoding="utf-8")
    assert page.MARK.search(text)
    assert page.rewritten(text, page.tables()) == text, "python experiments/page.py"


def test_result_files_are_of_one_state_of_the_code():
    """But for later.json, whose methods are younger than the others' runs: the page names its commit."""
    reports = {path.stem: json.loads(path.read_text()) for path in (ROOT / "experiments").glob("*.json")}
    codes = {name: report["code"] for name, report in reports.items() if "code" in report and name != "later"}
    assert len(set(codes.values())) == 1 and "tuning" in codes, codes


def test_kernels():
    (shape,) = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["shapes"]
    first, second, third = (statistics.median(x) for x in shape["gemm"].values())
    products = {1: first, 3: first + second + third, 4: 2 * first + second + third}
    shown = 0
    for name, row in shape["methods"].items():
        if f"| {name} |" not in BOOK["kernels.md"]:
            continue
        forward, both = statistics.median(row["forward"]), statistics.median(row["both"])
        count = row["products"]
        expected = [forward, forward / products[1], both, both / products[count]]
        assert numbers("kernels.md", f"{name} |") == [round(x, 2) for x in expected], name
        assert f"× {count}) | {row['memory']['both'] / 2**20:.0f} MiB" in BOOK["kernels.md"]
        shown += 1
    assert shown >= 4


@pytest.mark.parametrize(
    ("start", "algo", "shared"),
    [("PPO, 100M", "ppo", False), ("DVPO |", "dvpo", False), ("DVPO, `--share_backbone`", "dvpo", True)],
)
def test_steps(start, algo, shared):
    found = json.loads((ROOT / "bench" / "results" / "step_cpu_100m.json").read_text())
    (row,) = [r for r in found["rows"] if (r["algo"], r["share_backbone"]) == (algo, shared)]
    ratio, seconds = row["ratio_to_ppo"], row["seconds"]
    expected = [round(seconds["update"], 1), round(ratio["update"], 2)]
    expected += [round(seconds["scoring"] + seconds["update"], 1), round(ratio["scoring_update"], 2)]
    expected += [round(seconds["total"], 1), round(ratio["total"], 2), round(ratio["memory"], 2)]
    assert numbers("ppo_to_dvpo.md", start) == expected and found["commit"] in BOOK["ppo_to_dvpo.md"]


def test_steps_one_by_one():
    found = json.loads((ROOT / "bench" / "results" / "step_cpu_100m.json").read_text())
    rows = {(row["algo"], row["share_backbone"]): row["rounds"] for row in found["rows"]}
    both = lambda rounds: [a + b for a, b in zip(rounds["scoring"], rounds["update"], strict=True)]
    for shared, text in ((False, "lies between {} and {}"), (True, "`--share_backbone` between {} and {}")):
        pairs = zip(both(rows["dvpo", shared]), both(rows["ppo", False]), strict=True)
        ratios = sorted(f"{ours / ppo:.2f}" for ours, ppo in pairs)
        assert text.format(ratios[0], ratios[-1]) in BOOK["ppo_to_dvpo.md"], ratios


def test_lora():
    found = json.loads((ROOT / "bench" / "results" / "lora_cpu.json").read_text())
    beside, merged, merging = (statistics.median(found["seconds"][name]) for name in ("beside", "merged", "merging"))
    off = f"{found['weights_off']:.0e}".replace("e-0", "e-")
    sizes = f"rank {found['rank']} on all linear layers, {found['responses']} responses of {found['tokens']} tokens on one CPU core"
    said = f"{sizes} take {beside:.1f} s beside the base, {merged:.1f} s merged and {merging:.1f} s for merging and taking out, "
    text = " ".join((ROOT / "docs" / "speed.md").read_text(encoding="utf-8").split())
    assert f"{said}after which weights were off by {off}" in text


def test_the_diff_from_ppo_to_dvpo_is_the_real_one():
    """Lines with - stand in ppo.py alone, lines with + in dvpo.py alone, the others in both; each hunk in this order."""
    hunks = re.findall(r"```diff\n(.*?)```", BOOK["ppo_to_dvpo.md"], re.S)
    files = {name: (ROOT / f"{name}.py").read_text().splitlines() for name in ("ppo", "dvpo")}
    assert len(hunks) == 4
    for hunk in hunks:
        lines = [(line[0], line[1:]) for line in hunk.splitlines()]
        for name, own, other in (("ppo", "-", "dvpo"), ("dvpo", "+", "ppo")):
            at = 0
            for sign, text in lines:
                if sign == own:
                    assert text not in files[other], text
                if sign in (own, " "):
                    assert text in files[name][at:], text
                    at += files[name][at:].index(text) + 1


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_what_it_names_exists(path):
    text = BOOK[path.name]
    for name, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        file = path.parent / name if name else path
        assert file.is_file(), name
        heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if anchor else []
        slugs = [re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads]
        assert not anchor or anchor in slugs, anchor
    for name in re.findall(r"(?<![\w/.-])(?:eval/|bench/|experiments/|tests/|kernels/)?\w+\.py\b", text):
        assert (ROOT / name).is_file() or name in THEIRS, name
    for target in re.findall(r"`?make ([\w-]+)`", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


THEIRS = ("check.py", "my_dvpo.py", "mine.py", "x.py", "a.py", "b.py", "file.py")  # files of the reader


def test_the_readme_is_short():
    assert len(BOOK["README.md"].splitlines()) < 200


def peers_table() -> str:
    """What docs/speed.md shows of bench/results/peers.json."""
    lines = [
        "| | ours | ours, padded | TRL | TRL, selecting | memory: TRL | TRL, selecting |",
        "| --- |" + " ---: |" * 6,
    ]
    for row in json.loads((ROOT / "bench" / "results" / "peers.json").read_text())["rows"]:
        seconds = {side: statistics.median(x) for side, x in row["seconds"].items()}
        time = lambda side, s=seconds, r=row: (
            f"{s[side]:.1f} s ({r['ratio'][side]['seconds']:.2f})" if side in s else ""
        )
        memory = lambda side, r=row: f"({r['ratio'][side]['memory']:.2f})" if side in r["ratio"] else ""
        cells = [f"{seconds['ours']:.1f} s", time("ours_padded"), time("trl"), time("trl_selected")]
        lines.append(f"| {row['method']} | {' | '.join([*cells, memory('trl'), memory('trl_selected')])} |")
    return "\n".join(lines)


def test_peers():
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    assert peers_table() in text
    losses = json.loads((ROOT / "bench" / "results" / "peers.json").read_text())["losses"]
    pairs = [pair for row in losses for pair in zip(row["ours"], row["trl"], strict=True)]
    gap = f"{max(abs(a - b) / max(abs(b), 1e-9) for a, b in pairs):.0e}".replace("e-0", "e-")
    assert f"(the largest relative gap is {gap})" in text
