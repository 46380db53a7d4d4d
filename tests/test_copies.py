"""What stands in two of the project's scripts under one name is the same text, under `# Copied from origin.name`.

python tests/test_copies.py --fix        # rewrite every copy from its origin

A fork (any other file) may say and do what it likes: it is not looked at, and never written to.
"""

import ast
import difflib
import re
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NAMES = (
    "dpo",
    "dvpo",
    "gvm",
    "ppo",
    "reinforce",
    "rest",
    "rm",
    "sample",
    "sft",
    "toy",
    "vcb",
)  # a new method's name comes here
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES]
OWN = {"Args", "PAPER", "PRESETS", "train", "main", "_gpus"}  # every script has its own under the same name


def blocks(path: Path) -> dict[str, tuple[int, int, str, str | None]]:
    """name -> (first line, last line, source, origin) of each top-level function, class and constant; lines from 0."""
    text = path.read_text()
    lines = text.splitlines()
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            name, first = node.name, min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, first = node.targets[0].id, node.lineno - 1
        else:
            continue
        marker = re.match(r"# Copied from (\w+)\.(\w+)$", lines[first - 1]) if first else None
        assert not marker or marker[2] == name, f"{path.name}: a copy of {marker[0]} is named {name}"
        origin = marker[1] if marker else None
        found[name] = (first, node.end_lineno, "\n".join(lines[first : node.end_lineno]), origin)
    return found


def differences():
    """(script, name, first, last, source of the origin) of each copy that differs from its origin."""
    every = {path.stem: blocks(path) for path in SCRIPTS}
    for script, found in every.items():
        for name, (first, last, source, origin) in found.items():
            if origin is None:
                continue
            assert name in every.get(origin, {}), (
                f"{script}.py: {name} is copied from {origin}.py, which has no such name"
            )
            assert every[origin][name][3] is None, f"{script}.py: {name} is copied from a copy, {origin}.{name}"
            if source != every[origin][name][2]:
                yield script, name, first, last, every[origin][name][2]


def test_a_copy_is_the_text_of_its_origin():
    wrong = [f"{script}.{name}" for script, name, *_ in differences()]
    assert not wrong, f"{wrong} differ from their origin: python tests/test_copies.py --fix"


def test_what_the_readme_says_of_their_length():
    """The shortest and the longest script to ten lines, and how much of each is text that another has too."""
    every = {path.stem: blocks(path) for path in SCRIPTS if path.stem != "toy"}
    shared = {(origin, name) for found in every.values() for name, (*_, origin) in found.items() if origin}
    sizes = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in every}
    for script, found in every.items():
        same = [last - first for name, (first, last, _, origin) in found.items() if origin or (script, name) in shared]
        assert sum(same) > sizes[script] / 2, script
    said = re.search(r"Scripts are long \(([\d,]+) to ([\d,]+) lines\)", (ROOT / "README.md").read_text())
    assert [int(x.replace(",", "")) for x in said.groups()] == [round(f(sizes.values()), -1) for f in (min, max)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: p.name)
def test_copies_stand_in_the_order_of_their_origin(path):
    """So that a diff of two scripts shows what differs, not what has moved."""
    order = list(blocks(ROOT / "sft.py"))
    copied = [order.index(name) for name, (*_, origin) in blocks(path).items() if origin == "sft"]
    assert copied == sorted(copied)
    found = [name for name, (*_, origin) in blocks(path).items() if origin != "sft"]
    assert found[-1:] == ["main"] or path.stem in ("sft", "toy")  # the plumbing of others comes last, and whole


def test_the_same_name_in_two_scripts_is_a_marked_copy():
    origins = {}
    for path in SCRIPTS:
        for name, (*_, origin) in blocks(path).items():
            if origin is None and name not in OWN and path.stem != "toy":
                origins.setdefault(name, []).append(path.name)
    assert not {name: where for name, where in origins.items() if len(where) > 1}


def test_a_fork_is_left_alone(tmp_path, monkeypatch):
    for script in SCRIPTS:
        shutil.copy(script, tmp_path)
    fork = (tmp_path / "dvpo.py").read_text().replace("def shuffled(", "def shuffled(*ignored, ")
    (tmp_path / "my_dvpo.py").write_text(fork)
    (tmp_path / "dvpo.py").write_text(fork)
    real = ROOT / "dvpo.py"
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "SCRIPTS", [tmp_path / path.name for path in SCRIPTS])
    assert [(script, name) for script, name, *_ in differences()] == [("dvpo", "shuffled")]
    fix()
    assert (tmp_path / "my_dvpo.py").read_text() == fork
    assert (tmp_path / "dvpo.py").read_text() == real.read_text()


@pytest.mark.parametrize(("one", "other", "most"), [("ppo", "dvpo", 350), ("dpo", "vcb", 250), ("rm", "gvm", 400)])
def test_what_two_siblings_have_in_common_reads_as_one(one, other, most):
    """Lines by which docstring, imports, flags, `train` and other parts that both have differ: order and names are aligned. What
    only one of them has (PPO's critic, DVPO's tau) does not count."""
    places = []
    for name in (one, other):
        path = ROOT / f"{name}.py"
        lines = path.read_text().splitlines()
        tags = [""] * len(lines)
        for block, (first, last, *_) in blocks(path).items():
            tags[first:last] = [block] * (last - first)
        places.append((lines, tags))
    (a, at), (b, bt) = places
    both, changed = {*at} & {*bt}, 0
    for kind, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if kind != "equal":
            changed += sum(tag in both for tag in at[i:j] + bt[k:m])
    assert changed <= most


def fix():
    wrong = sorted(differences(), key=lambda d: -d[2])  # from the last line up
    for script in SCRIPTS:
        mine, lines = [d for d in wrong if d[0] == script.stem], script.read_text().splitlines()
        for _, name, first, last, source in mine:
            lines[first:last] = source.splitlines()
            print(f"{script.name}: {name}")
        if mine:
            script.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    fix() if "--fix" in sys.argv else sys.exit(__doc__)
