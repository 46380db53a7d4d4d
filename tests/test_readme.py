"""The README's numbers are those of the committed result files, and its commands name scripts and targets that exist."""

import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8").replace("−", "-")
TOY = json.loads((ROOT / "bench" / "results" / "toy.json").read_text())


def numbers(start: str) -> list[float]:
    """The numbers of the one table row that starts so, from its second cell on."""
    row = next(line for line in README.splitlines() if line.startswith(f"| {start}"))
    return [float(x) for x in re.findall(r"-?\d+\.\d+", row.split("|", 2)[2])]


@pytest.mark.parametrize(
    ("start", "method"), [("SFT |", "sft"), ("DVPO, `--advantage gae`", "dvpo"), ("DVPO, `--advantage q`", "dvpo_q")]
)
def test_methods(start, method):
    row = TOY["methods"][method]
    gold, bad = row["gold"]["mean"], row["malformed"]
    expected = [round(x, 2) for x in (gold["mean"], *gold["ci95"])]
    expected += [round(100 * x, 1) for x in (bad["mean"], *bad["ci95"])]
    assert numbers(start) == expected + [round(row["kl"]["mean"], 1), round(row["length"]["mean"], 1)]


@pytest.mark.parametrize(
    ("start", "where"),
    [
        ("position only", ("yardsticks", "position")),
        ("GVM, another policy", ("other_tau",)),
        ("GVM, no τ", ("no_tau",)),
        ("**GVM, the right", ("right_tau",)),
        ("Bayes-optimal, no τ", ("yardsticks", "bayes_no_tau")),
        ("Bayes-optimal, τ", ("yardsticks", "bayes_tau")),
    ],
)
def test_values(start, where):
    row = TOY["gvm"]
    for key in where:
        row = row[key]
    expected = [row[span][kind]["mean"] for kind in ("correlation", "mse") for span in ("all", "first3")]
    assert numbers(start) == [round(x, 3) for x in expected]


NAMES = {"SFT": "sft", "DVPO, `gae`": "dvpo", "DVPO, `q` (paper)": "dvpo_q", "REINFORCE++": "reinforce++"} | {
    name: name.lower() for name in ("PPO", "ReMax", "RLOO", "GRPO", "VCB", "DPO", "IPO", "SLiC", "RRHF", "ReST")
}


def test_comparison():
    """The table of all methods, cell by cell."""
    methods = json.loads((ROOT / "bench" / "results" / "toy_all.json").read_text())["methods"]
    section = README[README.index("### Beside the baselines") :].split("\n###")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")]
    assert {NAMES[row[0]] for row in rows[2:]} == set(methods)
    for name, gold, proxy, kl, malformed, misaligned, tokens, ead in rows[2:]:
        row = methods[NAMES[name]]
        low, high = row["gold"]["mean"]["ci95"]
        assert gold == f"{row['gold']['mean']['mean']:.2f} [{low:.2f}, {high:.2f}]"
        assert (proxy, kl) == (f"{row['proxy']['mean']['mean']:.2f}", f"{row['kl']['mean']:.2f}")
        assert malformed == f"{100 * row['malformed']['mean']:.1f} %"
        assert misaligned == (f"{100 * row['misaligned']['mean']:.1f} %" if "misaligned" in row else "–")
        assert (tokens, ead) == (f"{row['length']['mean']:.1f}", f"{row['diversity']['ead']['mean']:.2f}")


def test_kernels():
    (shape,) = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())["shapes"]
    first, second, third = (statistics.median(x) for x in shape["gemm"].values())
    products = {1: first, 3: first + second + third, 4: 2 * first + second + third}
    shown = 0
    for name, row in shape["methods"].items():
        if f"| {name} |" not in README:
            continue
        forward, both = statistics.median(row["forward"]), statistics.median(row["both"])
        count = row["products"]
        expected = [forward, forward / products[1], both, both / products[count]]
        assert numbers(f"{name} |") == [round(x, 2) for x in expected], name
        assert f"× {count}) | {row['memory']['both'] / 2**20:.0f} MiB" in README
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
    assert numbers(start) == expected and found["commit"] in README


def test_steps_one_by_one():
    found = json.loads((ROOT / "bench" / "results" / "step_cpu_100m.json").read_text())
    rows = {(row["algo"], row["share_backbone"]): row["rounds"] for row in found["rows"]}
    both = lambda rounds: [a + b for a, b in zip(rounds["scoring"], rounds["update"], strict=True)]
    for shared, text in ((False, "lies between {} and {}"), (True, "`--share_backbone` between {} and {}")):
        pairs = zip(both(rows["dvpo", shared]), both(rows["ppo", False]), strict=True)
        ratios = sorted(f"{ours / ppo:.2f}" for ours, ppo in pairs)
        assert text.format(ratios[0], ratios[-1]) in README, ratios


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
    section = README[README.index("## From PPO to DVPO") :].split("\n## ")[0]
    hunks = re.findall(r"```diff\n(.*?)```", section, re.S)
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


def test_what_it_names_exists():
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"\b[\w/]+\.py\b", README):
        assert (ROOT / path).is_file(), path
    for target in re.findall(r"`?make ([\w-]+)", README):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


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
