"""What goes wrong while a run writes, computes or is ended: nothing that was saved is lost, nothing that is not finite is kept."""

import gc
import gzip
import importlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny
from test_invariants import SCRIPTS, distance, metrics, run

import sample
import sft
import toy
from eval import samples

home = tiny.home  # a fixture: a tiny policy, data, a GVM and a reward model
ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
SAVED = {"steps": 6, "save_every": 2}
LIVE = ["--model", "toy", "--steps", "400", "--batch_size", "4", "--save_every", "100", "--output_dir"]


def refused(capfd, *words, **named):
    """The one line of a run that ends with exit code 2."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        run(*words, **named)
    lines = [
        line
        for line in re.sub("\r|\x1b.A", "\n", capfd.readouterr().err).splitlines()
        if "it/s" not in line and "it [" not in line and line.strip()
    ]
    told = [line for line in lines if line.startswith("error: ")]
    assert ended.value.code == 2 and told == lines[-1:] and "Traceback" not in "\n".join(lines), lines
    return told[0]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


# ------------------------------------------------------------------------------------------------------- what is on disk
@pytest.mark.parametrize("call", range(1, 7))
def test_a_kill_while_snapshots_and_checkpoints_are_written(home, tmp_path, monkeypatch, call):
    """At each rename of a run with a snapshot and a checkpoint at every second step; half a folder is left behind."""
    settings = SAVED | {"snapshot_every": 2}
    straight = run(home, "vcb", tmp_path / "straight", **settings)
    replace, calls = SCRIPTS["vcb"].replace, []

    def killed(path, part, text=None):
        if text is None:
            calls.append(path)
            if len(calls) == call:
                next(x for x in part.rglob("*") if x.is_file()).unlink()
                raise Killed
        replace(path, part, text)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(SCRIPTS["vcb"], "replace", killed)
        run(home, "vcb", tmp_path / "out", **settings)
    resumed = run(home, "vcb", tmp_path / "out", resume=True, **settings)
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0
    names = lambda folder: sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.name != "lock")
    assert names(straight) == names(resumed) and not list(resumed.rglob("*.part"))


def test_only_files_of_its_own_are_touched_and_what_was_cut_is_left_out(home, tmp_path):
    out = run(home, "sft", tmp_path / "out", **SAVED)
    (out / "summary.json").unlink()  # as if it had been killed before its end
    shutil.rmtree(out / "checkpoints" / "step_0000006")
    mine = {"mine.jsonl": '{"step": 99}\nno json\n', "checkpoints/notes.txt": "mine", "snapshots/mine/x": "mine"}
    for name, text in mine.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(text)
    rows = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(
        rows.splitlines()[0] + '\n{"step": 2, "x": {"y": 1}\n' + "\n".join(rows.splitlines()[1:5]) + '\n{"st'
    )
    resumed = run(home, "sft", tmp_path / "out", resume=True, **SAVED)
    assert [row["step"] for row in metrics(resumed)] == [1, 2, 3, 4, 5, 6]
    assert all((out / name).read_text() == text for name, text in mine.items())


@pytest.mark.parametrize("file", ["engine.pt", "rank_0.pt"])
def test_of_two_checkpoints_the_one_that_can_be_read_is_taken(home, tmp_path, capfd, file):
    straight = run(home, "sft", tmp_path / "straight", **SAVED)
    tiny.interrupted(home, "sft", tmp_path / "out", 6, steps=6)
    last = tmp_path / "out" / "checkpoints" / "step_0000004"
    if file == "engine.pt":
        (last / file).write_bytes((last / file).read_bytes()[:200])
    else:
        (last / file).unlink()
    resumed = run(home, "sft", tmp_path / "out", resume=True, **SAVED)
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0
    tiny.interrupted(home, "sft", tmp_path / "both", 6, steps=6)
    for path in (tmp_path / "both" / "checkpoints").glob("*/engine.pt"):
        path.write_bytes(b"")
    assert "no checkpoint" in refused(capfd, home, "sft", tmp_path / "both", resume=True, **SAVED)


def test_a_full_disk_is_one_line_and_the_checkpoint_before_stays(home, tmp_path, capfd, monkeypatch):
    straight, save = run(home, "sft", tmp_path / "straight", **SAVED), torch.save

    def full(found, path, *rest, **more):
        if "step_0000004" in str(path):
            Path(path).write_bytes(b"half")
            raise RuntimeError(
                "[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nframe #0: ...\nframe #1: ..."
            )
        save(found, path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        error = refused(capfd, home, "sft", tmp_path / "out", **SAVED)
    assert "step_0000004 cannot be written" in error and "saved before" in error
    resumed = run(home, "sft", tmp_path / "out", resume=True, **SAVED)
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0


def test_rows_that_a_full_disk_does_not_take_are_one_line(home, tmp_path, capfd, monkeypatch):
    """sample.py's rows, and what datasets caches: here the error that is left when closing the file fails as well."""
    import datasets

    words = [
        f"--policy={home}/base",
        f"--reward_model={home}/rm/final",
        f"--data={home}/prompts.jsonl",
        "--n=2",
        "--max_response_tokens=8",
    ]

    gc.collect()  # the bars of runs that were stopped in this process go with them

    def told(part: str):
        with pytest.raises(SystemExit) as ended:
            sample.main([*words, f"--output_dir={tmp_path}/{part}"])
        assert ended.value.code == 2
        (line,) = [x for x in re.split("\r|\n", capfd.readouterr().err) if x.startswith("error: ")]
        return line

    real = open
    with monkeypatch.context() as patch:  # what stands on a device that is always full
        full = lambda path, mode="r", **more: real("/dev/full" if mode == "a" else path, mode, **more)
        patch.setattr(sample, "open", full, raising=False)
        assert "rank_0.jsonl cannot be written: [Errno 28]" in told("rows")

    def closed(*_, **__):
        try:
            raise OSError(28, "No space left on device")
        except OSError:
            raise ValueError("I/O operation on closed file")  # noqa: B904

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Dataset, "map", closed)
        assert "its rows cannot be cached ([Errno 28] No space left on device)" in told("cache")
    with monkeypatch.context() as patch:  # a mistake of ours is none of the disk's
        patch.setattr(datasets.Dataset, "map", lambda *_, **__: int("x"))
        with pytest.raises(ValueError, match="invalid literal"):
            sample.main([*words, f"--output_dir={tmp_path}/ours"])


PROGRAMS = (
    "alpaca",
    "calibration",
    "compare",
    "demo",
    "diversity",
    "human",
    "judge",
    "report",
    "token_values",
    "value_accuracy",
    "winrate",
)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_eval_program_that_is_ended_or_cannot_write_says_so_in_one_line(capfd, monkeypatch, name):
    module = importlib.import_module(f"eval.{name}")
    for error, code, says in (
        (KeyboardInterrupt(), 130, "ended by SIGINT; what was written is kept"),
        (
            PermissionError(13, "Permission denied", "out.json"),
            2,
            "error: out.json cannot be read or written: Permission denied",
        ),
    ):

        def failing(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patch:
            for where in ("tyro.cli", "argparse.ArgumentParser.parse_args"):  # what all of them call first
                patch.setattr(where, failing)
            with pytest.raises(SystemExit) as ended:
                module.main(["x"])
        told = capfd.readouterr().err.strip().splitlines()
        assert ended.value.code == code and told == [says]


# ---------------------------------------------------------------------------------------------------------- run folders
def test_a_folder_that_a_live_run_writes_to_is_refused_and_a_dead_ones_is_not(home, tmp_path, capfd):
    out = tmp_path / "out"
    code = "import sft, time, sys; sft._lock.append(sft.locked(sft.Path(sys.argv[1]))); print('held', flush=True); time.sleep(60)"
    out.mkdir()
    (out / "args.json").write_text("{}")
    with subprocess.Popen(
        [sys.executable, "-c", code, str(out / "lock")], cwd=ROOT, stdout=subprocess.PIPE, env=ENV
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        for resume in (False, True):
            error = refused(capfd, home, "sft", out, steps=1, resume=resume)
            assert "is being written by another run" in error and f"process {holder.pid} on" in error
        holder.kill()
    assert (run(home, "sft", out, steps=1) / "final").is_dir() and (tmp_path / "out.1").is_dir()


def test_places_that_no_run_can_be_written_to(home, tmp_path, capfd, monkeypatch):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    shutil.copytree(home / "base", tmp_path / "policy")
    for name, says in (
        ("file", "not a folder"),
        ("link", "not a folder"),
        ("policy", "holds --model"),
        (".", "you are in"),
    ):
        monkeypatch.chdir(tmp_path)
        where = {} if name != "." else {"output_dir": "."}
        error = refused(capfd, home, "sft", tmp_path / name, model=tmp_path / "policy", **where)
        assert says in error, error
    assert "cannot be written" in refused(capfd, home, "sft", tmp_path / "file" / "new")
    assert sorted(x.name for x in tmp_path.iterdir()) == ["file", "link", "policy"]


def test_resume_checks_what_it_goes_on_with(home, tmp_path, capfd):
    out = tmp_path / "out"
    tiny.interrupted(home, "sft", out, 4, steps=6)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    assert "--learning_rate was 0.001" in refused(capfd, home, "sft", out, resume=True, learning_rate=0.1, **SAVED)
    assert "--seed was 0" in refused(capfd, home, "sft", out, resume=True, seed=3, **SAVED)
    sft._lock.clear()  # that run's process has ended
    assert "no run of this script" in refused(capfd, home, "vcb", out, resume=True, **SAVED)
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    saved = torch.load(out / "checkpoints" / "step_0000002" / "rank_0.pt", weights_only=True)
    SCRIPTS["vcb"]._lock.clear()
    torch.save(saved | {"world": 2}, out / "checkpoints" / "step_0000002" / "rank_0.pt")
    assert "is of 2 ranks, and these are 1" in refused(capfd, home, "sft", out, resume=True, **SAVED)


def test_a_resume_without_readable_settings_is_one_line(home, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "args.json").write_text('{"half')
    assert "no run of this script" in refused(capfd, home, "sft", tmp_path / "out", resume=True)


# ------------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("fused", [True, None])
def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_state(fused):
    one, two = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    ours, plain = sft.AdamW([one], lr=0.1, fused=fused), torch.optim.AdamW([two], lr=0.1, fused=fused)
    for values in ([1, 2, 3], [1, float("nan"), 1], [float("inf"), 0, 0], [3, 2, 1]):
        one.grad, two.grad = torch.tensor(values).float(), torch.tensor(values).float()
        ours.step()
        if two.grad.isfinite().all():
            plain.step()
    assert torch.equal(one, two) and ours.state[one]["step"] == 2


@pytest.mark.parametrize("script", SCRIPTS)
def test_steps_that_are_not_finite_are_skipped_and_three_running_end_the_run(
    home, tmp_path, capfd, monkeypatch, script
):
    module, original = SCRIPTS[script], SCRIPTS[script].Engine.backward
    calls = []

    def spoilt(self, loss, last=True):
        calls.append(0)
        original(self, loss * float("nan") if len(calls) in bad else loss, last)

    monkeypatch.setattr(module.Engine, "backward", spoilt)
    bad = [1]
    found = run(home, script, tmp_path / "once")
    assert all(x.isfinite().all() for x in tiny.weights(found).values())
    rows = [json.loads(line) for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert [row.get("skipped", 0) for row in rows][:2] == [1, 0] and "NaN" not in (found / "metrics.jsonl").read_text()
    calls.clear()
    bad = range(1, 1000)
    error = refused(capfd, home, script, tmp_path / "always", **({"quantiles": (0.0,)} if script == "rest" else {}))
    assert "not finite, in 3 steps running" in error and not (tmp_path / "always" / "final").exists()


@pytest.mark.parametrize(
    ("script", "flag", "of"),
    [
        ("sft", "model", "base"),
        ("dvpo", "gvm", "gvm/final"),
        ("ppo", "reward_model", "rm/final"),
        ("vcb", "policy", "base"),
    ],
)
def test_weights_that_are_not_finite_are_refused(home, tmp_path, capfd, script, flag, of):
    from safetensors.torch import load_file, save_file

    shutil.copytree(home / of, tmp_path / "bad", ignore=shutil.ignore_patterns("adapter"))
    tensors = load_file(tmp_path / "bad" / "model.safetensors")
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    assert "weights that are not finite" in refused(capfd, home, script, tmp_path / "out", **{flag: tmp_path / "bad"})
    assert not (tmp_path / "out").exists()


def test_models_that_are_not_what_is_wanted(home, tmp_path, capfd):
    for script, flag, name in (
        ("sft", "model", "rm/final"),
        ("vcb", "policy", "gvm/final"),
        ("dvpo", "policy", "rm/final"),
    ):
        assert "reward or value model" in refused(capfd, home, script, tmp_path / "out", **{flag: home / name})
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "base")
    model.resize_token_embeddings(50)
    model.save_pretrained(tmp_path / "few")
    toy.tokenizer().save_pretrained(tmp_path / "few")
    assert "embeddings for 50 tokens" in refused(capfd, home, "sft", tmp_path / "out", model=tmp_path / "few")


@pytest.mark.parametrize("script", ["dvpo", "ppo", "reinforce", "vcb", "dpo"])
def test_a_reference_with_another_tokenizer_is_refused(home, tmp_path, capfd, script):
    shutil.copytree(home / "brief", tmp_path / "other")
    path = tmp_path / "other" / "tokenizer.json"
    found = json.loads(path.read_text())
    names = found["model"]["vocab"]
    names["soup"], names["good"] = names["good"], names["soup"]
    path.write_text(json.dumps(found))
    error = refused(capfd, home, script, tmp_path / "out", reference=str(tmp_path / "other"))
    assert "different tokenizers" in error and not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ signals, ranks
def begun(folder, *words):
    """A run of sft.py as its own process, once it has taken some steps."""
    process = subprocess.Popen([sys.executable, str(ROOT / "sft.py"), *words, str(folder)], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    until = time.time() + 60
    while time.time() < until and process.poll() is None:
        if (folder / "metrics.jsonl").is_file():
            return process
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_saves_and_says_how_to_go_on(tmp_path, number):
    out = tmp_path / "out"
    process = begun(out, *LIVE)
    process.send_signal(number)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in error, error
    command = said.strip().splitlines()[-1].split("To go on: ")[1]
    assert number.name in said and command.endswith("--resume") and str(out) in command
    (last,) = (out / "checkpoints").glob("step_*")
    step = int(last.name[5:])
    assert (
        0 < step < 400
        and len((out / "metrics.jsonl").read_text().splitlines()) == step
        and not (out / "final").exists()
    )
    process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, env=ENV, text=True, stderr=subprocess.PIPE)
    while len((out / "metrics.jsonl").read_text().splitlines()) < step + 10:  # it goes on from there
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.communicate()


def test_before_a_step_or_twice_a_signal_ends_at_once():
    process = subprocess.Popen([sys.executable, "-c", "import sft, time; sft.catch_signals(); print('ready', flush=True); time.sleep(60)"],
                               cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert (
        "ended by SIGTERM: what was saved before is whole" in process.communicate(timeout=30)[1]
        and process.returncode == 143
    )
    code = "import sft, time; sft.catch_signals(); sft._begun.append(1); print('ready', flush=True)\nwhile True: time.sleep(0.1)"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=ENV, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert "Traceback" not in process.communicate(timeout=30)[1] and process.returncode == 130


def test_workers_that_a_pool_ends_say_nothing():
    code = "import sft, multiprocessing\nsft.catch_signals()\nwith multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(abs, [-1, 2]))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "[1, 2]\n", "")


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "1", "WORLD_SIZE": "2"}])
def test_ranks_without_torchrun_are_told(monkeypatch, capfd, env):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        sft.main(["--steps", "1"])
    assert ended.value.code == 2 and "no torchrun is here" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------------- strangers' rows
ODD = [None, "", " ", "\ud800", "\x00", "<eos>", "\n\nHuman:", 0, -1, 10**30, 1e300, float("nan"), float("inf"), True, [], {}, [[]], [{}],
       {"role": "user"}, [{"role": "user", "content": 3}], [{"role": "alien", "content": "x"}], ["x"], "x" * 5000]  # fmt: skip
FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "responses", "completions", "info", "summaries", "summary", "choice",
          "article", "highlights", "instruction", "input", "output", "split", "policy")  # fmt: skip


def odd_row(rng) -> dict:
    prompt = rng.choice(toy.prompts("rl")[:20])
    answer = lambda: {"text": "the soup is good .", "score": rng.random(), "policy": "a"}
    row = {"prompt": prompt, "completion": "the soup is good .", "responses": [answer(), answer()]}
    for _ in range(rng.randint(1, 4)):
        value = rng.choice(ODD)
        if rng.random() < 0.5:
            row[rng.choice(FIELDS)] = value
        elif isinstance(row.get("responses"), list) and row["responses"] and isinstance(row["responses"][0], dict):
            row["responses"][0][rng.choice(("text", "score", "policy", "complete"))] = value
        else:
            row.pop(rng.choice(list(row)) if row else "", None)
    return row


@pytest.mark.parametrize("seed", range(8))
def test_odd_rows_are_left_out_or_named_and_never_a_traceback(tmp_path, capfd, seed):
    rng, tokenizer, path = random.Random(seed), toy.tokenizer(), tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(odd_row(rng)) + "\n" for _ in range(seed % 3 * 10 + 1)))
    for read in (
        lambda args: sft.load_data(args, "sft", lambda row: [sft.encode(tokenizer, row, "completion", args)]),
        lambda args: SCRIPTS["gvm"].load_answers(tokenizer, args),
        lambda args: samples.read(args.data),
    ):
        try:
            read(SCRIPTS["gvm"].Args(data=str(path), skip_bad_rows=seed % 2 == 0))
        except SystemExit as ended:
            assert ended.code == 2 and str(path) in capfd.readouterr().err


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "", "completion": "x"}, "prompt is empty"), ({"prompt": [], "completion": "x"}, "field prompt"),
        ({"prompt": "q", "responses": []}, "responses is empty"), ({"prompt": "q", "responses": [{"text": "x", "score": True}]}, "field score"),
        ({"prompt": "q", "responses": [{"text": "x", "score": 1e300}]}, "field score"),
        ({"prompt": "q", "responses": [{"text": "x", "score": 1.0, "policy": ["a"]}]}, "field policy"),
        ({"prompt": "q", "responses": [{"text": "x", "score": 1.0, "policy": "a" * 10**6}]}, "field policy"),
        ({"prompt": "q", "completion": "\ud800"}, "cannot be read"),
    ],
)  # fmt: skip
def test_what_a_row_must_not_hold(tmp_path, capfd, row, says):
    path, tokenizer = tmp_path / "rows.jsonl", toy.tokenizer()
    path.write_text(json.dumps(row) + "\n")
    args = sft.Args(data=str(path))
    with pytest.raises(SystemExit) as ended:
        sft.load_data(args, "sft", lambda row: [sft.encode(tokenizer, row, "completion", args)])
    assert ended.value.code == 2 and says in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- --trace
@pytest.mark.parametrize("script", ["gvm", "dvpo", "ppo", "vcb", "dpo"])
def test_trace_shows_what_the_loss_is_made_of_and_leaves_no_files(home, tmp_path, monkeypatch, script):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    shown = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(tiny.io, "StringIO", lambda: shown)
        run(home, script, tmp_path / "out", trace=True)
    assert not [x for x in tmp_path.iterdir() if (x / "args.json").exists() or (x / "final").exists()]
    dpo_gamma = SCRIPTS["dpo"].GAMMA["dpo"][False]  # of a model of toy.py's
    tables = re.findall(r"\n( {2,}\S.*\n(?:\S.*-?\d+\.\d{3}\n)+)", shown.getvalue())
    assert len(tables) >= (1 if script in ("vcb", "dpo") else 2)
    for table in tables:
        head, *lines = table.rstrip("\n").split("\n")
        names = re.split(r" {2,}", head.strip())
        rows = [dict(zip(names, map(float, re.split(r" {2,}", line)[-len(names) :]), strict=True)) for line in lines]
        for row in rows:
            near = lambda x, of=1.0: pytest.approx(x, abs=0.002 * (1 + abs(of)))
            if script == "gvm":
                loss = row["weight"] * (row["Q_t"] - row["G_t"]) ** 2
                assert row["weight (Q - G)^2"] == near(loss, loss + 2 * row["weight"] * (row["Q_t"] - row["G_t"]))
            elif script == "vcb":
                assert row["log-ratio"] == near(row["log pi"] - row["log pi_ref"])
                assert row["s"] == near(0.25 * row["log-ratio"] - row["r / sigma"])
            elif script == "dpo":
                assert row["log-ratio"] == near(row["log pi"] - row["log pi_ref"])
                assert row["gamma log-ratio"] == near(dpo_gamma * row["log-ratio"])
            else:
                if script == "dvpo":
                    mean, std = map(float, re.search(r"raw_t - (\S+)\) / (\S+),", shown.getvalue()).groups())
                    assert row["A_t"] == near((row["raw_t"] - mean) / std, 1 / std)
                cut = min(max(row["ratio"], 0.8), 1.2)
                assert row["loss"] == near(-min(row["ratio"] * row["A_t"], cut * row["A_t"]), row["A_t"])
    if script == "vcb":
        x = torch.tensor([row["r / sigma"] for row in rows])
        assert float(x.var(correction=0)) == pytest.approx(1, abs=0.01)


# ------------------------------------------------------------------------------------------------------------- trackers
def test_metrics_go_where_they_are_asked_to_and_nowhere_else(home, tmp_path, capfd, monkeypatch):
    """Stand-ins for wandb and trackio, which take `init` and `log`, and for TensorBoard's writer."""
    sent = {"wandb": [], "trackio": [], "tensorboard": []}
    for module, to in list(sent.items())[:2]:
        init = lambda to=to, **options: to.append(options)
        log = lambda row, step, to=to: to.append((step, row))
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(init=init, log=log))

    class SummaryWriter:
        def __init__(self, folder):
            sent["tensorboard"].append(folder)

        def add_scalar(self, key, value, step):
            sent["tensorboard"].append((key, value, step))

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    run(home, "sft", tmp_path / "plain", steps=3)
    assert not any(sent.values())
    out = run(home, "sft", tmp_path / "out", steps=3, report_to="wandb,trackio,tensorboard")
    rows = [{k: v for k, v in row.items() if isinstance(v, (int, float))} for row in tiny.jsonl(out / "metrics.jsonl")]
    for name in ("wandb", "trackio"):
        (options, *logged), settings = sent[name], json.loads((out / "args.json").read_text())
        assert options["config"]["learning_rate"] == settings["learning_rate"]
        assert logged == [(row["step"], row) for row in rows]
    assert sent["tensorboard"] == [
        str(out / "tensorboard"),
        *[(k, v, row["step"]) for row in rows for k, v in row.items()],
    ]
    assert "choose from" in refused(capfd, home, "sft", tmp_path / "no", report_to="mlflow")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in refused(capfd, home, "sft", tmp_path / "no", report_to="wandb")


@pytest.mark.parametrize("text", ["null\n", "3\n", "\n null"])
def test_a_file_whose_first_row_is_no_object_is_one_line(tmp_path, text):
    """Arrow's reader crashes on `null`: in a process of its own, so that a crash is a failure and not the end of the tests."""
    for name in ("rows.jsonl", "rows.jsonl.gz"):
        with (gzip.open if name.endswith("gz") else open)(tmp_path / name, "wt") as file:
            file.write(text)
        words = [
            sys.executable,
            str(ROOT / "sft.py"),
            "--data",
            str(tmp_path / name),
            "--output_dir",
            str(tmp_path / "o"),
        ]
        done = subprocess.run(words, env=ENV, capture_output=True, text=True)
        assert done.returncode == 2 and "does not begin with a JSON object" in done.stderr


# --------------------------------------------------------------------------------------------------------------- flags
@pytest.mark.parametrize(
    ("script", "flag", "value"),
    [
        ("gvm", "tau_pairs", "-1"), ("gvm", "td_lambda", "nan"), ("dvpo", "tau_pairs", "-2"), ("dvpo", "lam", "1.5"),
        ("dvpo", "kl_coef", "nan"), ("dvpo", "steps", "0"), ("sft", "steps", "-5"), ("sft", "epochs", "0"), ("vcb", "gamma", "0"),
        ("vcb", "gamma", "inf"), ("dpo", "n", "-1"), ("reinforce", "n", "-2"), ("sft", "learning_rate", "-1"),
        ("ppo", "discount", "nan"), ("vcb", "lam", "0"), ("rest", "max_grad_norm", "-1"), ("sft", "seed", "99999999999999999999"),
    ],
)  # fmt: skip
def test_values_out_of_bounds(capfd, script, flag, value):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[script].main([f"--{flag}", value])
    error = capfd.readouterr().err
    assert ended.value.code == 2 and re.search(rf"--{flag} \S+: give (a number from )?\S+", error), error


def test_the_temperature_of_vcb_may_be_above_1(home, tmp_path):
    flags = {
        "policy": home / "base",
        "data": home / "graded.jsonl",
        "lam": 2,
        "steps": 1,
        "batch_size": 4,
        "output_dir": tmp_path / "out",
    }
    SCRIPTS["vcb"].main([x for name, value in flags.items() for x in (f"--{name}", str(value))])
    assert (tmp_path / "out" / "final").is_dir()


@pytest.mark.parametrize("script", ["ppo", "reinforce"])
def test_a_reward_that_is_a_function_needs_no_reward_model(home, tmp_path, script):
    file = tmp_path / "check.py"
    file.write_text("def three(prompts, responses):\n    return [3 + 0 * len(r) for r in responses]\n")
    out = run(home, script, tmp_path / "out", reward=(f"2*{file}:three",), reward_model="nowhere", eos_penalty=0.0)
    assert {row["reward"] for row in metrics(out)} == {6.0}


# ------------------------------------------------------------------------------------- mistakes, and rows with a catch
def test_rows_of_metrics_are_on_the_disk_before_the_checkpoint_that_goes_on_behind_them(home, tmp_path, monkeypatch):
    """A second signal, or a power cut, may come between the two."""
    out, checkpoint, step = tmp_path / "out", sft.Run.checkpoint, sft.Engine.step
    signalled = lambda engine: sft._signals.append(signal.SIGTERM) or step(engine)

    def killed(run):
        checkpoint(run)
        if run.step == 3:
            raise Killed
        monkeypatch.setattr(sft.Engine, "step", signalled)  # the next step ends with a signal

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(sft.Run, "checkpoint", killed)
        run(home, "sft", out, **SAVED)
    monkeypatch.undo()
    assert [row["step"] for row in metrics(run(home, "sft", out, resume=True, **SAVED))] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("script", ["rm", "gvm"])
def test_best_without_a_held_out_row_is_refused(home, tmp_path, capfd, script):
    how = {"keep_best": True, "eval_every": 1, "eval_share": 0.05}
    assert "holds out none" in refused(capfd, home, script, tmp_path / "out", **how)


def test_a_cut_response_that_sft_imitates_gets_no_end_token():
    whole = {"prompt": "is the soup good ?", "completion": "the soup is", "answer": "completion"}
    ids = lambda row: sft.answers(toy.tokenizer(), sft.canonical(row), sft.Args())[0][1]
    graded = {"prompt": whole["prompt"], "responses": [{"text": "the soup is", "score": 1.0, "complete": False}]}
    assert ids(whole)[-1] == toy.tokenizer().eos_token_id and ids(graded) == ids(whole)[:-1]


def test_a_prompt_that_is_a_system_message_alone_is_no_prompt():
    system = {"role": "system", "content": "be brief ."}
    with pytest.raises(ValueError, match="system message only"):
        sft.as_messages([system])
    assert len(sft.as_messages([system, {"role": "user", "content": "hello"}])) == 2


def test_the_folder_that_holds_one_of_several_files_of_data_is_not_moved_aside(home, tmp_path, capfd):
    (tmp_path / "out").mkdir()
    for name in ("a", "b"):
        shutil.copy(home / "sft.jsonl", tmp_path / "out" / f"{name}.jsonl")
    data = f"{home}/sft.jsonl,{tmp_path}/out/b.jsonl"
    assert f"holds --data {tmp_path}/out/b.jsonl" in refused(capfd, home, "sft", tmp_path / "out", data=data)


def test_a_template_that_is_no_jinja_is_not_blamed_on_the_rows(home, tmp_path, capfd):
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }")
    told = refused(capfd, home, "sft", tmp_path / "out", chat_template=str(tmp_path / "bad.jinja"))
    assert f"with --chat_template {tmp_path}/bad.jinja" in told and "row" not in told


def test_held_out_prompts_without_an_order_are_refused_by_vcb(home, tmp_path, capfd):
    tied = [{"prompt": "is the soup good ?", "responses": [{"text": x, "score": 1.0} for x in ("yes", "no")]}]
    tiny.write_jsonl(tmp_path / "tied.jsonl", tied)
    told = refused(capfd, home, "vcb", tmp_path / "out", eval_data=str(tmp_path / "tied.jsonl"), eval_split="train")
    assert "pair with an order" in told


def test_log_probs_of_the_reference_that_a_full_disk_does_not_take_are_one_line(home, tmp_path, capfd, monkeypatch):
    replace = SCRIPTS["vcb"].replace

    def full(path, part, text=None):
        if path.name == "ref_logp.json":
            raise OSError(28, "No space left on device")
        replace(path, part, text)

    monkeypatch.setattr(SCRIPTS["vcb"], "replace", full)
    assert "ref_logp.json cannot be written" in refused(capfd, home, "vcb", tmp_path / "out")


@pytest.mark.parametrize("script", ["vcb", "dpo"])
def test_a_trace_reads_its_own_step_alone(home, tmp_path, monkeypatch, script):
    module, rows, original = SCRIPTS[script], [], SCRIPTS[script].sequence_logps
    monkeypatch.setattr(
        module, "sequence_logps", lambda policy, some, *rest: rows.extend(some) or original(policy, some, *rest)
    )
    run(home, script, tmp_path / "out", trace=True, batch_size=1)
    assert len(rows) == 2 or len(rows) == 3


def test_a_flag_of_another_loss_is_refused(home, tmp_path, capfd):
    assert "--margin belongs to --loss slic" in refused(capfd, home, "dpo", tmp_path / "out", loss="simpo", margin=7.0)


def test_a_shared_backbone_with_lora_begins_at_the_policy_or_not_at_all(home, tmp_path, capfd):
    how = {"share_backbone": True, "lora_r": 4, "policy": "brief", "reference": str(home / "base")}
    assert "give the same for both" in refused(capfd, home, "dvpo", tmp_path / "out", **how)


def test_snapshots_of_a_shared_backbone_are_the_policys_alone(home, tmp_path):
    out = run(home, "dvpo", tmp_path / "out", share_backbone=True, lora_r=4, snapshot_every=1, steps=1)
    (snapshot,) = (out / "snapshots").iterdir()
    assert (snapshot / "adapter_model.safetensors").is_file() and not (snapshot / "gvm").exists()


def test_values_of_the_optimal_policy_need_the_references_own_responses(home, tmp_path, capfd):
    how = {"baseline": "astar", "n": 1, "kl_target": 0.0}
    told = refused(capfd, home, "reinforce", tmp_path / "hub", data="openbmb/UltraFeedback", **how)
    assert "needs `python sample.py`'s file as --data" in told
    for name, temperature in (("one", 1.0), ("two", 0.5)):
        (tmp_path / name).mkdir()
        shutil.copy(home / "graded.jsonl", tmp_path / name / "graded.jsonl")
        (tmp_path / name / "args.json").write_text(json.dumps({"temperature": temperature}))
    both = f"{tmp_path}/one/graded.jsonl,{tmp_path}/two/graded.jsonl"
    assert "was drawn with --temperature 0.5" in refused(capfd, home, "reinforce", tmp_path / "out", data=both, **how)


def test_a_discount_that_v_cannot_be_divided_by_is_refused(capfd):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS["dvpo"].main(["--discount", "0"])
    assert ended.value.code == 2 and "--discount 0.0: give a number from" in capfd.readouterr().err


def test_a_trace_tells_no_tracker():
    module = SCRIPTS["gvm"]
    assert module.traced(module.Args(trace=True, report_to="wandb"), 1).report_to == ""
