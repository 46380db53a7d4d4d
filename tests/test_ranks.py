"""Several ranks and hosts: how a run ends when one of them fails; bf16 and ZeRO: precisions, models built in parts.

A host is a torchrun agent here: two of them on this machine, each in a folder of its own, are two hosts that share nothing.
`torchrun ... tests/test_ranks.py CASE HOME` is the helper process with many small runs in one start.
"""

import contextlib
import functools
import math
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny
from test_invariants import CPU, KIND, SCRIPTS, metrics, run, sample_prompts, stock, toy_rows, weights

import dvpo
import gvm
import rm
import sft
import toy

home = tiny.home  # a fixture: a tiny policy, data, a GVM and a reward model
ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TINY_RUN = ["--steps", "2", "--batch_size", "4", "--output_dir", "out"]


# ------------------------------------------------------------------------------------------------------- ranks and hosts
@pytest.fixture(scope="module", autouse=True)
def compiled():
    """What DeepSpeed compiles for ranks on a CPU takes minutes, once a machine. A rank that is ended meanwhile leaves a lock
    behind, for which all later runs wait."""
    build = "from deepspeed.comm.torch import build_shm_op; build_shm_op()"
    subprocess.run([sys.executable, "-c", build], check=True, env=ENV | {"DS_ACCELERATOR": "cpu"})


def torchrun(folders, script, *argv, ranks=1, limit=150):
    """One agent in each folder; [(exit code, output, time of its end), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc_per_node", ranks, "--nnodes", len(folders), "--master_addr", "127.0.0.1", "--master_port", port]
    agents, ends, until = [], {}, time.time() + limit
    for rank, folder in enumerate(folders):
        folder.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--node_rank", rank, ROOT / script, *argv]
        with open(folder / "output.txt", "w") as file:
            command = list(map(str, command))
            agents.append(subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=ENV))
    while len(ends) < len(agents) and time.time() < until:
        time.sleep(0.1)
        ends = {i: ends.get(i, time.time()) for i, agent in enumerate(agents) if agent.poll() is not None}
    for agent in agents:
        if agent.poll() is None:  # the agent passes it on to its ranks
            agent.terminate()
            agent.wait(60)
    texts = [(folder / "output.txt").read_text() for folder in folders]
    assert len(ends) == len(agents), f"still running after {limit} s:\n" + "\n".join(text[-3000:] for text in texts)
    return [(agents[i].returncode, texts[i], ends[i]) for i in range(len(agents))]


IMPATIENT = """
import sys, threading, time
sys.path.insert(0, {root!r})
import sft
wait, time.sleep = threading.Event.wait, lambda seconds: None
threading.Event.wait = lambda event, timeout=None: wait(event, 0.0001)
sft.init_distributed(sft.Args())
"""


def test_the_watch_on_other_ranks_is_over_before_the_interpreter_ends(tmp_path):
    """A thread that is inside torch's store while Python shuts down aborts the process: exit code 134 after a run that went
    well. Here it asks without pause, so that it always is."""
    (tmp_path / "main.py").write_text(IMPATIENT.format(root=str(ROOT)))
    ((code, text, _),) = torchrun([tmp_path], tmp_path / "main.py", ranks=2)
    assert code == 0, text[-2000:]


def end_of(text):
    return "\n".join([line for line in text.splitlines() if line.strip()][-4:])


def tracebacks(text):
    """Of ranks: torchrun's report begins with one of its own."""
    return text.count("Traceback") - 1


FAILS = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import sft

kind, rank, note, *flags = sys.argv[2:]
here = os.environ["RANK"] == rank


def load(*_):
    time.sleep(3)  # the others wait for this rank in a collective by now
    Path(note).write_text(str(time.time()))
    if kind == "power":  # the host is gone, and with it all that it keeps
        os.kill(os.getppid(), signal.SIGKILL), os.kill(os.getpid(), signal.SIGKILL)
    if kind == "mistake":
        sft.stop("name another model")
    raise RuntimeError("the disk is on fire")


if kind == "flags":
    time.sleep(2 * here)  # a rank that comes late
    Path(note).write_text(str(time.time()))
elif here:
    sft.load_model = load
elif kind == "power":
    sft.load_model = lambda *_: time.sleep(300)  # at work, so that no collective tells it
sft.main(flags)
"""


def fail(folders, kind, rank, flags="", ranks=1):
    """sft.py, in which something goes wrong on one rank: [(exit code, output, seconds from failure to end), ...]"""
    note, script = (folders[0].with_name(name) for name in ("note", "fails.py"))
    script.write_text(FAILS)
    found = torchrun(folders, script, ROOT, kind, rank, note, *TINY_RUN, *flags.split(), ranks=ranks)
    return [(code, text, end - float(note.read_text())) for code, text, end in found]


def test_hosts_that_do_not_share_the_run_folder_all_end_and_say_so(tmp_path):
    found = torchrun([tmp_path / "a", tmp_path / "b"], "sft.py", *TINY_RUN)
    begun = (tmp_path / "a" / "out" / "args.json").stat().st_mtime
    for code, text, end in found:
        assert code and text.count("is not one folder for all hosts") == 1 and end - begun < 30, text
        assert "error: --output_dir out is not one folder for all hosts" in end_of(text)


def test_a_mistake_that_one_rank_meets_ends_all_within_seconds_and_is_told_once(tmp_path):
    [(code, text, seconds)] = fail([tmp_path / "a"], "mistake", 1, ranks=2)
    assert code and text.count("name another model") == 1 and not tracebacks(text) and seconds < 15, text
    assert "error: name another model" in end_of(text)


@pytest.mark.parametrize(
    ("flags", "message", "late"),
    [("--data absent.jsonl", "absent.jsonl (train) cannot be read", None), ("--batch_size 0", "give 1 or more", None),
     ("--no_such_flag 1", "Unrecognized options: --no_such_flag", 0)],
)  # fmt: skip
def test_a_mistake_that_all_ranks_meet_is_told_once(tmp_path, flags, message, late):
    [(code, text, seconds)] = fail([tmp_path / "a"], "flags", late, flags, ranks=2)
    assert code and text.count(message) == 1 and not tracebacks(text) and seconds < 40, text
    assert (message if late is None else "error: --steps 2") in end_of(
        text
    )  # of flags a box tells, and the report's end


def test_an_exception_on_one_rank_shows_its_traceback_and_ends_all_within_seconds(tmp_path):
    [(code, text, seconds)] = fail([tmp_path / "a"], "exception", 1, ranks=2)
    assert code and tracebacks(text) == 1 and "in load\n" in text and seconds < 15, text
    assert "error: rank 1 failed: RuntimeError: the disk is on fire" in end_of(text)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_an_exception_on_one_host_ends_the_other_within_seconds_which_says_so_in_one_line(tmp_path, rank):
    found = fail([tmp_path / "a", tmp_path / "b"], "exception", rank)
    for host, (code, text, seconds) in enumerate(found):
        assert code and tracebacks(text) == ("in load\n" in text) == (host == rank) and seconds < 30, text
        assert text.count(f"error: rank {rank} failed: RuntimeError: the disk is on fire") == 1, text


def test_where_the_first_host_vanishes_the_others_end_within_seconds_and_say_so(tmp_path):
    _, (code, text, seconds) = fail([tmp_path / "a", tmp_path / "b"], "power", 0)
    assert code and text.count("error: the first host has ended") == 1 and not tracebacks(text) and seconds < 40, text


# ------------------------------------------------------------------------------------------------- precision, one process
def engines(monkeypatch, module):
    """Of each engine of a run: itself, its trained weights, and a copy of these at the start."""
    found, init = [], module.Engine.__init__

    def built(self, *inputs):
        init(self, *inputs)
        trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        found.append((self, trained, {name: p.detach().clone() for name, p in trained.items()}))

    monkeypatch.setattr(module.Engine, "__init__", built)
    return found


@pytest.mark.parametrize("script", ["gvm", "rm"])
def test_lora_and_the_head_train_in_fp32_on_a_bf16_model_and_small_steps_count(home, tmp_path, monkeypatch, script):
    found = engines(monkeypatch, SCRIPTS[script])
    monkeypatch.setattr(tiny, "smooth", lambda script: contextlib.nullcontext())
    settings = {"bf16": True, "lora_r": 4, "lora_dropout": 0.0, "learning_rate": 2e-6, "steps": 8}
    run(home, script, tmp_path / "out", **settings)
    [(engine, trained, start)] = found
    backbone = next(p for name, p in engine.module.named_parameters() if name.endswith("mlp.down_proj.weight"))
    assert backbone.dtype == torch.bfloat16  # merged by now
    assert {p.dtype for p in trained.values()} == {torch.float32} and any("lora_B" in name for name in trained)
    heads = [name for name in trained if "lora" not in name]
    assert heads and all((trained[name] != start[name]).all() for name in heads)
    rows = toy_rows(tiny.random.Random(0), [(5, 4), (3, 7), (4, 2)])
    with torch.no_grad():
        if script == "gvm":
            given = engine(gvm.collate_values([[row] for row in rows], 0, every=True))
        else:
            given = engine(*rm.collate_scored([prompt + response for prompt, response in rows], 0, CPU))
    assert given.dtype == torch.float32 and (given != given.bfloat16().float()).any()  # not a rounded product's


@pytest.mark.parametrize("kind", ["gvm", "rm"])
def test_what_a_frozen_model_says_is_not_rounded_to_bf16(home, kind):
    args = sft.Args(bf16=True)
    model = sft.load_model(
        {"gvm": "value", "rm": "reward"}[kind], str(home / kind / "final"), toy.tokenizer(), args, frozen=True
    )
    rows = toy_rows(tiny.random.Random(0), [(5, 4), (3, 7), (4, 2)])
    if kind == "gvm":
        found = gvm.ValueModel(model)(gvm.collate_values([[row] for row in rows], 0, every=True))
    else:
        found = rm.RewardModel(model, True)(
            *rm.collate_scored([prompt + response for prompt, response in rows], 0, CPU)
        )
    assert model.model.layers[0].mlp.down_proj.weight.dtype == torch.bfloat16
    assert found.dtype == torch.float32 and (found != found.bfloat16().float()).any()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_shared_backbone_runs_in_bf16_without_deepspeed(home, tmp_path, monkeypatch, lora_r):
    values = tiny.spy(monkeypatch, dvpo, "score_rollout", lambda found, *_: found[2])
    found = engines(monkeypatch, dvpo)
    run(home, "dvpo", tmp_path / "out", share_backbone=True, bf16=True, lora_r=lora_r, steps=2)
    assert_finite(tmp_path / "out")
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.std() > 0.05 for x in values) and len(values) == 2
    assert not found[0][0].deepspeed and {p.dtype for p in found[0][1].values()} == {torch.float32}


def test_a_tokens_weight_is_not_rounded_to_the_models_bf16(home):
    model = sft.load_model("causal", str(home / "base"), toy.tokenizer(), sft.Args(bf16=True), frozen=True)
    policy = sft.Policy(model.requires_grad_())
    batch, weight = sft.collate(toy_rows(tiny.random.Random(0), [(5, 9), (3, 17), (8, 2)]), 0), 1 / 731
    assert abs(float(torch.tensor(weight).bfloat16()) / weight - 1) > 1e-4
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            loss, whole = policy(batch, token_weight=weight), policy(batch, token_weight=1.0)
            assert loss.dtype == torch.float32
            assert loss.item() == pytest.approx(weight * whole.item(), rel=1e-6)
    assert loss.item() == pytest.approx(-weight * float(policy(batch).detach().double().sum()), rel=1e-6)


# ------------------------------------------------------------------------------------------------------- ZeRO, two ranks
HARD = {"bf16": True, "gradient_checkpointing": True, "lora_r": 4, "steps": 2, "micro_tokens": 64}
CASES = {name: (name, {}) for name in SCRIPTS} | {"dvpo_shared": ("dvpo", {"share_backbone": True})}
FP32 = {"sft": {}, "sft_new": {}, "rm": {}, "gvm_lora": {"lora_r": 4, "lora_dropout": 0.0}}  # ZeRO 1 and 3 do alike
RUNS = {str(stage): {f"{name}_{stage}": (script, HARD | settings | {"zero_stage": stage})
                     for name, (script, settings) in CASES.items()} for stage in (1, 3)}  # fmt: skip
RUNS["core"] = {name: RUNS["3"][name] for name in ("sft_3", "dvpo_shared_3")} | {
    f"{name}_fp32_{stage}": (name.partition("_")[0], {"steps": 2, "micro_tokens": 64, "zero_stage": stage, **settings})
    for name, settings in FP32.items() for stage in (1, 3)
}  # fmt: skip
FIRST = {"steps": 1, "learning_rate": 0.02, "micro_tokens": 64}


def ranks_main(home: Path, case: str):
    """Many runs in one process; one that fails leaves its traceback and does not stop the others."""
    out = home / "ranks" / case
    out.mkdir(parents=True, exist_ok=True)
    for name, (script, settings) in RUNS[case].items():
        module = SCRIPTS[script]
        load = module.load_model

        def loading(kind, start, *inputs, load=load, name=name, **options):
            model = load(kind, "toy" if "new" in name else start, *inputs, **options)
            whole = [n for n, p in model.named_parameters() if p.numel() or not hasattr(p, "ds_id")]
            (out / f"{name}_whole_{os.environ['RANK']}").write_text("\n".join(whole))
            return model

        module.load_model = loading
        try:
            run(home, script, out / name, **settings)
        except Exception:
            (out / f"{name}_error").write_text(traceback.format_exc())
        module.load_model = load
    with pytest.MonkeyPatch.context() as patch:
        if case != "core":
            patch.setattr(tiny.sample, "Args", functools.partial(tiny.sample.Args, bf16=True))
            return sample_prompts(home, out / "sample")
        patch.setattr(tiny, "smooth", lambda script: contextlib.nullcontext())
        found = engines(patch, sft)
        run(home, "sft", out / "first", bf16=True, **FIRST)
    assert found[0][0].deepspeed.zero_optimization_stage() == 1


def start(home, tmp_path_factory, case):
    folder = tmp_path_factory.mktemp("torchrun")
    [(code, text, _)] = torchrun([folder], "tests/test_ranks.py", case, home, ranks=2, limit=500)
    assert code == 0, text[-4000:]
    return home / "ranks" / case


@pytest.fixture(scope="module")
def core(home, tmp_path_factory):
    return start(home, tmp_path_factory, "core")


@pytest.fixture(scope="module", params=["1", "3"])
def full(home, tmp_path_factory, request):
    return start(home, tmp_path_factory, request.param)


def assert_finite(folder):
    error = folder.with_name(f"{folder.name}_error")
    assert not error.exists(), error.read_text()
    rows = metrics(folder)
    assert len(rows) == 2 and all(math.isfinite(x) for row in rows for x in row.values() if x is not None), rows


def assert_ran(home, folder, script):
    """Finite metrics; final/ loads, with all its weights, and is not the model that training started from."""
    import transformers

    assert_finite(folder)
    auto = getattr(transformers, f"AutoModelFor{KIND[script]}")
    model, told = auto.from_pretrained(folder / "final", output_loading_info=True)
    assert not any(told.values()), told
    begun, end = stock("CausalLM", home / "base").state_dict(), model.state_dict()
    changed = {name for name in end.keys() & begun.keys() if (end[name] != begun[name].to(end[name].dtype)).any()}
    assert all(f"model.layers.{i}.mlp.down_proj.weight" in changed for i in range(2)), changed
    assert all(x.isfinite().all() and x.any() for x in end.values())


@pytest.mark.parametrize("name", ["sft", "dvpo_shared"])
def test_bf16_checkpointing_and_lora_at_zero_3(home, core, name):
    assert_ran(home, core / f"{name}_3", CASES[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_bf16_checkpointing_and_lora_at_zero_1_and_3(home, full, name):
    assert_ran(home, full / f"{name}_{full.name}", CASES[name][0])


@pytest.mark.slow
def test_ranks_sample_in_bf16_after_other_runs(full):
    assert (full / "sample" / "graded.jsonl").read_bytes().count(b"\n") == 10


@pytest.mark.parametrize("name", FP32)
def test_models_are_built_in_parts_at_zero_3_and_train_as_whole_ones(core, name):
    one, three = core / f"{name}_fp32_1", core / f"{name}_fp32_3"
    for rank in range(2):
        assert not (core / f"{name}_fp32_3_whole_{rank}").read_text()
        assert (core / f"{name}_fp32_1_whole_{rank}").read_text()
    assert_finite(one), assert_finite(three)
    if name == "sft_new":  # its random numbers are drawn in another order
        assert all(row["loss"] == pytest.approx(math.log(101), abs=0.3) for row in metrics(three))
        return
    tiny.same_metrics(metrics(one), metrics(three), 1e-5)
    assert tiny.distance(one, three) < 1e-6


def test_the_first_update_in_bf16_on_two_ranks_has_full_size(home, core, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "smooth", lambda script: contextlib.nullcontext())
    one, two = run(home, "sft", tmp_path / "out", **FIRST), core / "first"
    begun = stock("CausalLM", home / "base").state_dict()
    size = lambda folder: sum(float((x - begun[name]).square().sum()) for name, x in weights(folder).items()) ** 0.5
    assert size(two) / size(one) == pytest.approx(1, abs=0.05)


# -------------------------------------------------------------------------------------------------------- signals, launcher
def two_ranks_under_way(folder, *argv):
    """A torchrun of two ranks that has taken some steps of sft.py, and the ranks' process ids."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--master_addr",
        "127.0.0.1",
        "--master_port",
        str(port),
    ]
    flags = ["--model", "toy", "--steps", "3000", "--batch_size", "4", "--output_dir", "out", *argv]
    with open(folder / "output.txt", "w") as file:
        command = [sys.executable, *words, str(ROOT / "sft.py"), *flags]
        agent = subprocess.Popen(command, cwd=folder, stdout=file, stderr=subprocess.STDOUT, env=ENV)
    until = time.time() + 90
    while not (folder / "out" / "metrics.jsonl").is_file():
        assert time.time() < until and agent.poll() is None, (folder / "output.txt").read_text()
        time.sleep(0.2)
    ranks = Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split()
    return agent, [int(x) for x in ranks if "sft.py" in Path(f"/proc/{x}/cmdline").read_text()]


def ended(pids, limit):
    until = time.time() + limit
    alive = lambda pid: Path(f"/proc/{pid}").exists() and Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    while any(map(alive, pids)):
        if time.time() > until:
            return False
        time.sleep(0.2)
    return True


def test_a_signal_to_torchrun_saves_on_all_ranks(tmp_path):
    agent, ranks = two_ranks_under_way(tmp_path)
    agent.terminate()
    assert len(ranks) == 2 and ended(ranks, 40), (tmp_path / "output.txt").read_text()
    agent.wait(60)
    (last,) = (tmp_path / "out" / "checkpoints").glob("step_*")
    assert int(last.name[5:]) % 10 == 0 and {x.name for x in last.glob("rank_*")} == {"rank_0.pt", "rank_1.pt"}
    assert "after step" in (tmp_path / "output.txt").read_text() and not (tmp_path / "out" / "final").exists()


def test_when_the_launcher_is_killed_its_ranks_end(tmp_path):
    agent, ranks = two_ranks_under_way(tmp_path)
    agent.kill()
    agent.wait(10)
    assert len(ranks) == 2 and ended(ranks, 30)


if __name__ == "__main__":
    ranks_main(Path(sys.argv[2]), sys.argv[1])
