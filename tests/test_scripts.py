"""The scripts as a user meets them: a run of each from the command line, --help, presets, and what a mistake is told."""

import ast
import dataclasses
import gzip
import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
import dvpo
import gvm
import ppo
import reinforce
import rest
import rm
import sample
import sft
import toy
import vcb

ROOT = Path(__file__).resolve().parent.parent
# FIRST train on the toy world's data, the others on sample.py's
FIRST = {"sft": sft, "rm": rm, "gvm": gvm, "dvpo": dvpo, "ppo": ppo, "reinforce": reinforce}
TRAINERS = FIRST | {"vcb": vcb, "dpo": dpo, "rest": rest}
SCRIPTS = TRAINERS | {"sample": sample}
KIND = {"rm": "SequenceClassification", "gvm": "TokenClassification"}
ROLLOUT = ("dvpo", "ppo", "reinforce")


def command(script, *flags, folder):
    return subprocess.run(
        [sys.executable, str(ROOT / f"{script}.py"), *flags], cwd=folder, capture_output=True, text=True, timeout=120,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"},
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------ the command line
FLAGS = {
    "sft": "--steps 3 --batch_size 8",
    "rm": "--steps 3 --batch_size 4 --split train[:60]",
    "gvm": "--steps 3 --batch_size 4 --split train[:60]",
    "dvpo": "--steps 2 --rollout_batch_size 8 --batch_size 4 --max_response_tokens 12",
    "sample": "--n 4 --split train[:6] --max_response_tokens 12",
    "vcb": "--steps 2 --batch_size 2 --lora_r 4",
    "dpo": "--steps 2 --batch_size 2",
    "rest": "--steps 2 --batch_size 2",
    "ppo": "--steps 2 --rollout_batch_size 8 --batch_size 4 --max_response_tokens 12 --best_of 2 --eos_penalty 1",
    "reinforce": "--steps 2 --rollout_batch_size 8 --batch_size 4 --max_response_tokens 12 --baseline grpo",
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All scripts one after the other, each finding what it starts from by its own defaults."""
    folder = tmp_path_factory.mktemp("runs")
    return folder / "runs", {script: command(script, *FLAGS[script].split(), folder=folder) for script in FLAGS}


def finite(value):
    return value is None or isinstance(value, str) or math.isfinite(value)


def test_sampling_from_the_command_line(runs):
    folder, done = runs[0] / "sample", runs[1]["sample"]
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in (folder / "graded.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == toy.prompts("rl")[:6] and all(len(row["responses"]) == 4 for row in rows)
    assert (
        "runs/sample/graded.jsonl" in done.stdout
        and json.loads((folder / "summary.json").read_text())["responses"] == 24
    )


@pytest.mark.parametrize("script", TRAINERS)
def test_a_run_from_the_command_line(runs, script):
    import transformers

    folder, done = runs[0] / script, runs[1][script]
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Traceback" not in done.stderr and "warning" not in (done.stdout + done.stderr).lower()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = int(FLAGS[script].split()[1])
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    assert all(finite(value) for row in rows for value in row.values()) and all(row["loss"] is not None for row in rows)
    summary, args = (json.loads((folder / f"{name}.json").read_text()) for name in ("summary", "args"))
    assert summary["steps"] == steps == args["steps"] and all(map(finite, summary.values()))
    assert set(args) == {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    assert f"runs/{script}/final: {steps} steps in " in done.stdout  # where the model is, and in words what was found
    assert ("held-out pairs as their scores do" in done.stdout) == (script in ("rm", "gvm"))
    assert (folder / "samples.jsonl").exists() == (script in ROLLOUT)

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "final")
    auto = getattr(transformers, f"AutoModelFor{KIND.get(script, 'CausalLM')}")
    model, loading = auto.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    chat = [{"role": "user", "content": toy.prompts("heldout")[0]}]
    card = (folder / "final" / "README.md").read_text()
    assert (
        card.startswith("---\nlibrary_name: transformers\n")
        and f"`{script}.py` of lean-rlhf" in card
        and "| `--seed` | `0` |" in card
    )
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=False)
    width = model.config.vocab_size if script not in KIND else 1
    with torch.no_grad():
        logits = model(ids).logits
    assert logits.shape[-1] == width and logits.isfinite().all() and float(logits.std() if width > 1 else 1) > 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_soon_and_explains_every_flag(tmp_path, script):
    started = time.time()
    done = command(script, "--help", folder=tmp_path)
    assert done.returncode == 0 and time.time() - started < 15 and not list(tmp_path.iterdir())
    shown = re.sub(r"[│\s]", "", done.stdout)  # words as they are, however the box breaks lines
    args = next(n for n in ast.parse((ROOT / f"{script}.py").read_text()).body if getattr(n, "name", "") == "Args")
    fields = {}
    for node, after in zip(args.body, [*args.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign):
            text = after.value.value if isinstance(after, ast.Expr) else ""
            fields[node.target.id] = re.sub(r"\s", "", text)
    assert set(fields) == {field.name for field in dataclasses.fields(SCRIPTS[script].Args)}
    for name, text in fields.items():
        assert len(text) > 10, f"--{name} is not explained"
        assert re.search(rf"--{name}(?![a-z_]).{{0,60}}?{re.escape(text)}", shown), name
    assert all(preset in done.stdout for preset in SCRIPTS[script].PRESETS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_loads_no_library_that_takes_long(script):
    code = f"import sys, {script}; sys.exit(str({{'transformers', 'datasets', 'peft', 'deepspeed', 'matplotlib'}} & sys.modules.keys()))"
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stderr.strip() == "set()"
    )


def parsed(monkeypatch, script, *argv):
    """What main(argv) would train with."""
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(SCRIPTS[script], "train", found.append)
        SCRIPTS[script].main(list(argv))
    return found[0]


@pytest.mark.parametrize("script", TRAINERS)
def test_presets(monkeypatch, home, tmp_path, capfd, script):
    """What a flag that is not given means: the toy world's value for its models, the paper's or a preset's for others."""
    monkeypatch.chdir(tmp_path)  # where no run has been: the default model is not one of the toy world
    module, world = SCRIPTS[script], {"sft": "toy"}.get(script, str(home / "policy"))
    first = "policy" if hasattr(module.Args(), "policy") else "model"
    assert parsed(monkeypatch, script, f"--{first}", world) == module.Args(**{first: world})
    assert parsed(monkeypatch, script, f"--{first}", "a/b") == module.Args(**module.PAPER | {first: "a/b"})
    mine = parsed(monkeypatch, script, f"--{first}", "a/b", "--data", "c.jsonl", "--batch_size", "8")
    split = {"split": module.Args().split}  # a share of the paper's data is none of another's
    assert mine == module.Args(**module.PAPER | split | {first: "a/b", "data": "c.jsonl", "batch_size": 8})
    assert {"llama3.2-3b", "llama3-8b"} <= set(module.PRESETS)
    for name, values in module.PRESETS.items():
        preset = module.Args(**module.PAPER | values)
        assert parsed(monkeypatch, script, name) == preset != module.Args(**module.PAPER)
        changed = parsed(monkeypatch, script, name, "--learning_rate", "0.125", "--no_bf16")
        assert changed == dataclasses.replace(preset, learning_rate=0.125, bf16=False)
        assert parsed(monkeypatch, script, name, "--data=c.jsonl") == dataclasses.replace(
            preset, data="c.jsonl", **split
        )
        with pytest.raises(SystemExit) as ended:
            module.main([name, f"--{first}", world])
        assert ended.value.code == 2
        assert f"error: preset {name} is for real models, and {world} is of the toy world" in capfd.readouterr().err
        flags = [  # written out, a preset is read back as it is: every value is one that its flag takes
            word
            for field, value in dataclasses.asdict(preset).items()
            for word in (
                [f"--{field}" if value else f"--no_{field}"]
                if isinstance(value, bool)
                else [f"--{field}", *map(str, value if isinstance(value, tuple) else [value])]
            )
        ]
        assert parsed(monkeypatch, script, *flags) == preset


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_commands_in_the_docstring_are_understood(monkeypatch, script):
    commands = re.findall(rf"(?:python|torchrun.*) {script}\.py(.*?)(?:#|$)", SCRIPTS[script].__doc__, re.M)
    assert len(commands) >= 3
    for line in commands:
        parsed(monkeypatch, script, *line.split())


# ---------------------------------------------------------------------------------------------------------- mistakes
PROMPT = toy.prompts("rl")[0]
GRADED = [{"text": "it", "score": 1}, {"text": "the", "score": 2.5}]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny policy and value model; models with something amiss."""
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaForTokenClassification

    home = tmp_path_factory.mktemp("home")
    tiny = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16}
    reward = LlamaForSequenceClassification(toy.config(**tiny, num_labels=1))
    policy = LlamaForCausalLM(toy.config(**tiny))
    values, labels = (LlamaForTokenClassification(toy.config(**tiny, num_labels=n)) for n in (1, 2))
    models = {"policy": policy, "gvm": values, "two_labels": labels, "other_tokens": values, "no_template": policy}
    models["rm"] = reward
    for name, model in models.items():
        model.save_pretrained(home / name)
        tokenizer = toy.tokenizer()
        if name == "other_tokens":
            tokenizer.add_tokens(["another"])
        if name == "no_template":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(home / name)
    return home


def mistake(capfd, monkeypatch, tmp_path, script, *argv, line=True):
    """What a user is told: one line, or of a flag a box, exit code 2, and an earlier run in --output_dir stays as it is."""
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "out" / "final" / "model.safetensors"
    earlier.parent.mkdir(parents=True)
    earlier.write_text("an earlier run")
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main([*argv, "--output_dir", "out"])
    out, error = capfd.readouterr()
    assert ended.value.code == 2 and not out
    if line:
        assert re.fullmatch(r"error: .{20,}\n", error), error
    else:
        assert error.startswith("╭") and "Traceback" not in error, error
        error = " ".join(re.sub("[╮╰│╭╯─]", " ", error).split())  # words as they are, however the box breaks lines
    assert sorted(tmp_path.rglob("*")) == before and earlier.read_text() == "an earlier run"
    return error


def frozen(home, script):
    return ["--gvm", str(home / "gvm")] if script == "dvpo" else ["--reward_model", str(home / "rm")]


def start(home, script):
    """Flags for the models that a script starts from."""
    if script in ROLLOUT:
        return ["--policy", str(home / "policy"), *frozen(home, script)]
    return ["--model", str(home / "policy")]


@pytest.fixture
def told(capfd, monkeypatch, tmp_path):
    return lambda script, *argv, **form: mistake(capfd, monkeypatch, tmp_path, script, *argv, **form)


@pytest.mark.parametrize("script", TRAINERS)
@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["llama9"], ["llama9", "llama3.2-3b", "llama3-8b"]),
        (["--stepz", "3"], ["--stepz", "--help"]),
        (["llama3-8b", "stray"], ["stray", "--help"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps"], ["--steps"]),
        (["--zero_stage", "4"], ["--zero_stage", "'4'", "'3'"]),
        (["--attention", "none"], ["--attention", "sdpa", "eager"]),
        (["--batch_size", "0"], ["--batch_size 0", "1 or more"]),
    ],
)
def test_a_flag_that_is_not_understood(told, script, argv, says):
    error = told(script, *argv, line=argv[0] in ("llama9", "--batch_size"))
    assert all(part in error for part in says), error


@pytest.mark.parametrize("flag", ["advantage", "kl_in", "value_norm"])
def test_a_value_that_a_flag_does_not_take(told, flag):
    error = told("gvm" if flag == "value_norm" else "dvpo", f"--{flag}", "other", line=False)
    choices = {"advantage": ("q", "gae"), "kl_in": ("reward", "loss"), "value_norm": ("none", "batch")}
    assert f"--{flag}" in error and all(f"'{choice}'" in error for choice in choices[flag])


GOOD = {script: {} for script in SCRIPTS} | {
    "sft": {"completion": "it"},
    "rm": {"responses": GRADED},
    "gvm": {"responses": GRADED},
}
BAD_ROWS = [  # scripts, row, the field that the message names
    ("sft rm gvm dvpo ppo reinforce", {"prompt": None}, "prompt"),
    ("sft rm gvm dvpo", {"prompt": 7}, "prompt"),
    ("sft rm gvm dvpo", {"prompt": []}, "prompt"),
    ("sft rm gvm dvpo", {"prompt": [{"role": "user"}]}, "prompt"),
    ("sft rm gvm dvpo", {"prompt": [{"role": "wizard", "content": "how"}]}, "prompt"),
    ("sft rm gvm dvpo", {"messages": [{"role": "user"}]}, "messages"),
    ("sft", {"completion": 7}, "completion"),
    ("sft", {"completion": None}, "completion"),
    ("sft rm gvm", {"completion": None, "responses": "it"}, "responses"),
    ("sft rm gvm", {"completion": None, "responses": [*GRADED, 7]}, "responses"),
    ("sft rm gvm", {"completion": None, "responses": [*GRADED, {"text": "it", "score": "good"}]}, "score"),
    ("sft rm gvm", {"completion": None, "responses": [*GRADED, {"text": "it", "score": math.nan}]}, "score"),
    ("rm gvm", {"responses": [*GRADED, {"text": "it"}]}, "score"),
    ("rm gvm", {"responses": [*GRADED, {"score": 1}]}, "text"),
    ("rm gvm", {"responses": None}, "responses"),
    ("rm gvm", {"responses": None, "chosen": "it"}, "rejected"),
    ("rm gvm", {"responses": None, "chosen": "it", "rejected": 7}, "text"),
]


@pytest.mark.parametrize(
    ("script", "row", "field"), [(script, row, field) for scripts, row, field in BAD_ROWS for script in scripts.split()]
)
def test_a_bad_row_is_named_with_file_row_and_field(told, home, tmp_path, script, row, field):
    good = {"prompt": PROMPT} | GOOD[script]
    bad = {key: value for key, value in (good | row).items() if value is not None}
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in (good, good, bad, good)))
    error = told(script, *start(home, script), "--data", str(path))
    assert f"{path} row 3" in error and re.search(rf"\b{field}\b", error), error


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("absent.jsonl", None, "cannot be read"),
        # Arrow counts from 0, and only lines that hold any
        ("a.jsonl", b'{"prompt": "how"}\n{"prompt": "h', "in row 1"),
        ("a.jsonl", b'{"prompt": "how"}\n\n["how"]\n', "in row 1"),
        ("a.json", b'[{"prompt": "how"}', "cannot be read"),
        ("a.jsonl", b"\xff\xfe", "UTF-8"),
        ("a.jsonl.gz", b"plain text", "cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "how"}' * 9, mtime=0)[:-12], "cannot be read"),
        ("a.parquet", b"plain text", "cannot be read"),
        ("a.jsonl", b"", "it is empty"),
    ],
)
def test_a_file_that_cannot_be_read(told, home, tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    error = told("dvpo", *start(home, "dvpo"), "--data", str(tmp_path / name))
    assert str(tmp_path / name) in error and says in error


@pytest.mark.parametrize("script", FIRST)
def test_a_prompt_that_is_too_long(told, home, script):
    error = told(script, *start(home, script), "--max_prompt_tokens", "3")
    assert all(part in error for part in ("toy row 1:", "prompt", "--max_prompt_tokens 3", "--skip_bad_rows"))


@pytest.mark.parametrize("script", FIRST)
def test_a_model_without_a_chat_template(told, home, script):
    error = told(script, "--policy" if script in ROLLOUT else "--model", str(home / "no_template"),
                 *(frozen(home, script) if script in ROLLOUT else []))  # fmt: skip
    assert f"`python sft.py --model {home / 'no_template'} --chat_template plain`" in error


def test_the_advice_on_a_model_without_a_chat_template_works(home, tmp_path):
    flags = ["--model", str(home / "no_template"), "--chat_template", "plain", "--steps", "1", "--split", "train[:4]"]
    sft.main([*flags, "--output_dir", str(tmp_path / "sft")])
    final = tmp_path / "sft" / "final"
    assert sft.load_tokenizer(str(final), sft.Args()).chat_template == sft.PLAIN_TEMPLATE


WRONG = [  # script, flags with {home}, what the message says
    ("rm", "", "runs/sft/final is not a model folder: run `python sft.py` first"),
    ("gvm", "", "runs/sft/final is not a model folder: run `python sft.py` first"),
    ("dvpo", "", "runs/sft/final is not a model folder: run `python sft.py` first"),
    ("dvpo", "--policy {home}/policy", "runs/gvm/final is not a model folder: run `python gvm.py` first"),
    ("sft", "--model {home}", "not a model folder"),
    ("sft", "--model {home}/no_template --chat_template {home}/absent.jinja", "absent.jinja"),
    ("sft", "--split train[1]", "--split"),
    ("sft", "--model {home}/policy --split train[:0]", "no row"),
    ("rm", "--model {home}/policy --split train[:0]", "nothing to learn"),
    ("gvm", "--model {home}/policy --split train[:0]", "nothing to learn"),
    ("gvm", "--model {home}/policy --value_norm batch --batch_size 8 --micro_tokens 128", "--micro_tokens"),
    ("dvpo", "--policy {home}/policy --gvm {home}/policy", "not a value model"),
    ("dvpo", "--policy {home}/policy --gvm {home}/two_labels", "not a value model"),
    ("dvpo", "--policy {home}/policy --gvm {home}/other_tokens", "tokenizers"),
    ("dvpo", "--policy {home}/policy --gvm {home}/gvm --rollout_batch_size 7", "--batch_size 32"),
    ("dvpo", "--policy {home}/policy --gvm {home}/gvm --split train[:9]", "--rollout_batch_size 64"),
    ("dvpo", "--policy {home}/policy --gvm {home}/gvm --tau_pairs 2", "`python gvm.py --tau_pairs 2`"),
    ("dvpo", "--policy {home}/policy --gvm {home}/gvm --share_backbone", "`python gvm.py --lora_r 8`"),
    ("ppo", "", "runs/sft/final is not a model folder: run `python sft.py` first"),
    ("ppo", "--policy {home}/policy", "runs/rm/final is not a model folder: run `python rm.py` first"),
    ("ppo", "--policy {home}/policy --reward_model {home}/gvm", "not a reward model"),
    ("ppo", "--policy {home}/policy --reward_model gold --data absent.jsonl", "absent.jsonl (train) cannot be read"),
    ("ppo", "--policy {home}/policy --reward_model {home}/rm --critic {home}/other_tokens", "tokenizers"),
    ("ppo", "--policy {home}/policy --reward_model {home}/rm --critic {home}", "not a model folder"),
    ("ppo", "--policy {home}/policy --reward_model {home}/rm --best_of 0", "--best_of 0"),
    ("ppo", "--policy {home}/policy --reward_model {home}/rm --rollout_batch_size 7", "--batch_size 32"),
    ("reinforce", "--policy {home}/policy", "runs/rm/final is not a model folder: run `python rm.py` first"),
    ("reinforce", "--policy {home}/policy --reward_model {home}/rm --n 1", "--n must be 2 or more"),
    ("reinforce", "--policy {home}/policy --reward_model {home}/rm --n 7", "--n 7"),
    ("reinforce", "--policy {home}/policy --reward_model {home}/rm --n 2 --split train[:9]", "--rollout_batch_size 64"),
    ("gvm", "--model {home}/policy --outcome_share 1.5", "--outcome_share 1.5: give a number from 0 to 1"),
    ("dvpo", "--policy {home}/policy --gvm {home}/gvm --baseline start", "--baseline start is for --advantage q"),
]


@pytest.mark.parametrize(("script", "flags", "says"), WRONG)
def test_what_does_not_fit_together(told, home, script, flags, says):
    assert says in told(script, *flags.format(home=home).split())


@pytest.mark.parametrize("script", ["ppo", "reinforce"])
def test_gold_of_another_prompt_is_told(home, tmp_path, capfd, script):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"who is it ? {i}"}) + "\n" for i in range(4)))
    flags = ["--policy", str(home / "policy"), "--reward_model", "gold", "--data", str(tmp_path / "p.jsonl")]
    sizes = ["--rollout_batch_size", "4", "--batch_size", "4", "--max_response_tokens", "4"]
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main([*flags, *sizes, "--output_dir", str(tmp_path / "out")])
    error = capfd.readouterr().err
    assert ended.value.code == 2 and "error: --reward_model gold scores prompts of the toy world only" in error, error


def test_of_several_processes_one_speaks(capfd, monkeypatch, tmp_path):
    """The first on each host: of a flag by tyro, of all else by torchrun, from the file that it names."""
    told = tmp_path / "error.json"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(told))
    monkeypatch.setattr(sft.time, "sleep", lambda _: None)  # in which torchrun ends the others
    for rank, argv in (("1", ["--stepz", "3"]), ("1", ["llama9"]), ("0", ["llama9"])):
        assert not told.exists()
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            sft.main(argv)
        assert ended.value.code == 2 and capfd.readouterr() == ("", "")
    message = json.loads(told.read_text())["message"]
    assert message["message"].startswith("unknown preset 'llama9'")
    assert message["extraInfo"]["py_callstack"] == f"error: {message['message']}"


def test_an_earlier_run_is_moved_aside_and_kept(home, tmp_path, capfd):
    out = tmp_path / "out"
    for rate in ("0.001", "0.002", "0.003"):
        flags = ["--steps", "1", "--split", "train[:4]", "--learning_rate", rate, "--output_dir", str(out)]
        sft.main([*start(home, "sft"), *flags])
    rates = [json.loads((tmp_path / name / "args.json").read_text())["learning_rate"]
             for name in ("out.1", "out.2", "out")]  # fmt: skip
    assert rates == [0.001, 0.002, 0.003] and (tmp_path / "out.1" / "final" / "config.json").exists()
    assert f"moved to {out}.2" in capfd.readouterr().out


def test_a_saved_policy_can_be_talked_to(runs):
    """The stock pipeline, as `transformers chat` and `serve` use it."""
    import transformers

    chat = transformers.pipeline("text-generation", str(runs[0] / "dvpo" / "final"), max_new_tokens=8, do_sample=False)
    (found,) = chat([{"role": "user", "content": toy.prompts("heldout")[0]}])
    assert found["generated_text"][-1]["role"] == "assistant" and len(found["generated_text"]) == 2
