"""The scripts' pages in docs/: their commands parse, their functions and flags exist, and they name every metric."""

import dataclasses
import importlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny
from test_looks import KEYS as LOOKS

import sample

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tiny.SCRIPTS | {"sample": sample}
TEXT = {name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in SCRIPTS}
FIELDS = {name: {field.name: field.default for field in dataclasses.fields(of.Args)} for name, of in SCRIPTS.items()}
home = tiny.home  # a fixture: a tiny policy, data, a GVM and a reward model


def section(name: str, heading: str) -> str:
    return TEXT[name].split(f"\n## {heading}\n")[1].split("\n## ")[0]


def rows(name: str, heading: str) -> list[list[str]]:
    """The cells of a section's tables, without their heads."""
    lines = [line for line in section(name, heading).splitlines() if line.startswith("|")]
    ruled = {i for i, line in enumerate(lines) if set(line) <= set("| -:")}
    kept = [line for i, line in enumerate(lines) if not {i, i + 1} & ruled]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in kept]


def code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# -------------------------------------------------------------------------------------------------------------- commands
def commands() -> list[tuple[str, str, list[str]]]:
    """(page, file, words behind it) of every `python FILE.py ...` and `torchrun ... FILE.py ...` in a block of bash."""
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.S):
            for line in block.replace("\\\n", " ").replace("$seed", "0").splitlines():
                words = [[]]
                for word in shlex.split(line, comments=True):
                    words[-1].append(word) if word not in ("&&", "||", ";", "|") else words.append([])
                for some in words:
                    at = next((i for i, word in enumerate(some) if word.endswith(".py")), None)
                    if at and re.match(r"python|torchrun", some[0].split("/")[-1]):
                        found.append((path.stem, some[at], some[at + 1 :]))
    return found


COMMANDS = commands()


@pytest.mark.parametrize(
    ("file", "words"),
    [command[1:] for command in COMMANDS],
    ids=[" ".join([x, *words])[:60] for _, x, words in COMMANDS],
)
def test_a_command_is_understood(file, words, tmp_path, monkeypatch):
    file = file.removeprefix("my_")  # docs/forking.md's own, which has its origin's flags
    assert (ROOT / file).is_file()
    if (name := file.removesuffix(".py")) in SCRIPTS:
        monkeypatch.chdir(tmp_path)  # what stands in runs/ must not count
        with mock.patch.object(SCRIPTS[name], "train") as train:
            SCRIPTS[name].main(words)
        given = {word[2:].split("=")[0].removeprefix("no_") for word in words if word.startswith("--")}
        assert given <= set(dataclasses.asdict(train.call_args.args[0]))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_has_a_command_for_each_reader(name):
    own = [words for page, file, words in COMMANDS if (page, file) == (name, f"{name}.py")]
    assert any("--data" in words for words in own) and any("--data" not in words for words in own)


# ------------------------------------------------------------------------------------------------ functions and flags
@pytest.mark.parametrize("name", SCRIPTS)
def test_functions_of_the_equations_exist(name):
    table = rows(name, "Equations")
    assert table and all(code(cells[-1]) for cells in table)
    for function in (x for cells in table for x in code(cells[-1])):
        module, _, last = function.rpartition(".")
        owner = importlib.import_module(module or name)
        assert callable(getattr(owner, last, None)), function


def shown(value) -> str:
    if isinstance(value, tuple):
        return " ".join(map(shown, value))
    return f"{value:g}".replace("e-0", "e-") if type(value) in (int, float) else f"{value}" or "–"


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_and_their_defaults(name):
    """Columns: flag, default in the toy world, the paper's with what presets change of it, what it does."""
    table = rows(name, "Flags")
    assert len(table) >= 4
    for flag, toy, paper, _ in table:
        (flag,) = code(flag)
        key = flag.removeprefix("--")
        assert toy == shown(FIELDS[name][key]), flag
        usual = SCRIPTS[name].PAPER.get(key, FIELDS[name][key])
        changed = {preset: of[key] for preset, of in SCRIPTS[name].PRESETS.items() if of.get(key, usual) != usual}
        assert paper == "; ".join([shown(usual), *(f"{preset} {shown(x)}" for preset, x in changed.items())]), flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_flags_that_are_spoken_of_exist(name):
    """`--flag` of the page's own script, or behind the name of another: `gvm.py --tau_pairs`."""
    said = re.findall(r"(?:(\w+)\.py )?(?:\w+ )?(--\w+)", TEXT[name])
    others = {"--nproc_per_node", "--help", "--fix", "--plan", "--only", "--gpus", "--gpu_memory"}
    for script, flag in said:
        known = FIELDS[script] if script in FIELDS else FIELDS[name]
        assert flag.removeprefix("--").removeprefix("no_") in known or flag in others, flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_is_short_and_has_its_parts(name):
    lines = TEXT[name].splitlines()
    assert 40 <= len(lines) <= 120
    heads = [line[3:] for line in lines if line.startswith("## ")]
    expected = ["Equations", "Run it", "Flags", "What is logged", "What differs", "Results", "Fork it"]
    assert [head for head in heads if head in expected] == expected
    assert "../EXPERIMENTS.md#" in section(name, "Results")


# the fields of PPOConfig in TRL 1.12.0, the last release that had it
TRL = re.findall(r"\w+", """learning_rate dataset_num_proc num_mini_batches total_episodes local_rollout_forward_batch_size
num_sample_generations response_length stop_token stop_token_id temperature missing_eos_penalty sft_model_path world_size
num_total_batches micro_batch_size local_batch_size batch_size local_mini_batch_size mini_batch_size push_to_hub
reward_model_path model_adapter_name ref_adapter_name num_ppo_epochs whiten_rewards kl_coef kl_estimator cliprange vf_coef
cliprange_value gamma lam ds3_gather_for_generation""")  # fmt: skip


def test_each_field_of_ppo_config_has_a_flag_or_none():
    table = rows("ppo", "From TRL's PPOConfig")
    fields = [field for theirs, _ in table for field in code(theirs)]
    assert sorted(fields) == sorted(TRL)
    for theirs, ours in table:
        flags = re.findall(r"`(--\w+)", ours)
        assert ours.startswith("none") or (flags and ours.startswith("`--")), theirs
        assert {flag.removeprefix("--") for flag in flags} <= set(FIELDS["ppo"]), ours


# --------------------------------------------------------------------------------------------------------------- metrics
def logged(home: Path, name: str, out: Path) -> set[str]:
    """Keys of metrics.jsonl and summary.json of a run, and those that only toy data have."""
    if name == "sample":
        tiny.sample_prompts(home, out)
        (row,) = {tuple(r) for line in tiny.jsonl(out / "graded.jsonl") for r in line["responses"]}
        return {*json.loads((out / "summary.json").read_text()), *row}
    changes, keys = {"steps": 2}, set()
    if name in ("sft", *LOOKS):
        held = {"sft": "sft.jsonl"} | dict.fromkeys(tiny.ROLLOUT, "prompts.jsonl")
        changes |= {"eval_data": str(home / held.get(name, "graded.jsonl")), "eval_split": "train", "eval_every": 2}
    if name == "dpo":
        kto = tiny.run(home, name, f"{out}-kto", loss="kto", **changes)
        keys = {key for row in tiny.jsonl(kto / "metrics.jsonl") for key in row}
    folder = tiny.run(home, name, out, **changes)
    keys |= {key for row in tiny.jsonl(folder / "metrics.jsonl") for key in row}
    keys |= set(json.loads((folder / "summary.json").read_text()))
    return keys | set(re.findall(r'metrics\["(\w+)"\] =', (ROOT / f"{name}.py").read_text()))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_metric_is_explained_and_no_other(home, tmp_path, name):
    said = {key for cells in rows(name, "What is logged") for key in code(cells[0])}
    keys = logged(home, name, tmp_path / "out")
    assert len(keys) >= 5 and keys <= said, keys - said
    assert said - keys <= {"skipped"}, said - keys - {"skipped"}


# --------------------------------------------------------------------------------------------- what pages say of a number
def test_losses_before_the_first_update(home, tmp_path):
    """What dpo.md and vcb.md say of the first row, where policy and reference are one."""
    first = lambda script, **changes: tiny.jsonl(
        tiny.run(home, script, tmp_path / str(len(list(tmp_path.iterdir()))), steps=1, **changes) / "metrics.jsonl"
    )[0]
    row = first("dpo")
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-4) and abs(row["pair_gap"]) < 1e-4
    assert first("dpo", loss="ipo", gamma=0.2)["loss"] == pytest.approx(1 / (4 * 0.2**2), rel=1e-4)
    row = first("vcb")
    assert abs(row["forward_kl"]) < 1e-4 and row["reweighted_kl"] < 1e-4
    row = first("ppo")
    assert row["start_value"] == 0 and abs(row["kl"]) < 1e-5


# ------------------------------------------------------------------------------------------------------------ a fork, as printed
def test_the_ablation_of_the_page_on_forking_is_run_as_printed(home, tmp_path):
    """Its cp, its edit, its two runs and its verdict, but for few steps; the fork lies in a folder of its own."""
    page = (ROOT / "docs" / "forking.md").read_text(encoding="utf-8")
    (edit,) = re.findall(r"```diff\n-(.*)\n\+(.*)\n```", page)
    real = (ROOT / "dvpo.py").read_text()
    assert real.count(f"{edit[0]}\n") == 1
    (tmp_path / "forks").mkdir()
    fork = tmp_path / "forks" / "my_dvpo.py"
    fork.write_text(real.replace(edit[0], edit[1]))
    flags = f"--policy {home}/base --gvm {home}/gvm/final --data {home}/prompts.jsonl --steps 2 --rollout_batch_size 6 --batch_size 3".split()
    flags += ["--max_response_tokens", "8", "--learning_rate", "0.01"]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for script, name in ((ROOT / "dvpo.py", "dvpo"), (fork, "my_dvpo")):
        for seed in ("0", "1"):
            words = [
                sys.executable,
                str(script),
                *flags,
                "--seed",
                seed,
                "--output_dir",
                str(tmp_path / f"{name}-{seed}"),
            ]
            subprocess.run(words, cwd=tmp_path, env=env, check=True, capture_output=True)
    (line,) = [line for line in page.splitlines() if line.startswith("python eval/compare.py")]
    words = line.replace("runs/", f"{tmp_path}/").replace("python ", f"{sys.executable} {ROOT}/")
    done = subprocess.run(words, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True)  # noqa: S602
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "compare" / "compare.html").is_file() and "2 seeds" in done.stdout
