"""Several ranks and hosts: how a run ends when one of them fails; bf16 and ZeRO: precisions, models built in parts.

A host is a torchrun agent here: two of them on this machine, each in a folder of its own, are two hosts that share nothing.
`torchrun ... tests/test_ranks.py CASE ...` is the helper process: a script in which something goes wrong on one rank, or
many small runs in one start.
"""

import math
import os
import signal
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
import ppo
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


def torchrun(folders, script, *argv, ranks=1, limit=100):
    """One agent in each folder; [(exit code, output, time of its end), ...]."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nproc_per_node", ranks, "--nnodes", len(folders), "--master_addr", "127.0.0.1", "--master_port", port]
    agents, ends, until = [], {}, time.time() + limit
    for rank, folder in enumerate(folders):
        command = [sys.executable, "-m", "torch.distributed.run", *where, "--node_rank", rank, ROOT / script, *argv]
        with open(folder / "output.txt", "w") as file:
            agents.append(
                subprocess.Popen(
                    list(map(str, command)), cwd=folder, stdout=file, stderr=subprocess.STDOUT,
                    env=ENV,
                )
            )  # fmt: skip
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


def hosts(tmp_path, count=2):
    folders = [tmp_path / f"host_{i}" for i in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


def end_of(text):
    return "\n".join([line for line in text.splitlines() if line.strip()][-4:])


def fails_main(kind: str, bad: str, note: str, *flags: str):
    """sft.py, in which something goes wrong on one rank; `note` gets the time."""
    bad = os.environ["RANK"] == bad

    def load(*_):
        time.sleep(3)  # the others wait for this rank in a collective by now
        Path(note).write_text(str(time.time()))
        if kind == "power":  # the host is gone, and with it all that it keeps
            os.kill(os.getppid(), signal.SIGKILL), os.kill(os.getpid(), signal.SIGKILL)
        if kind == "mistake":
            sft.stop("name another model")
        raise RuntimeError("the disk is on fire")

    if kind == "late" and bad:
        time.sleep(2)
        Path(note).write_text(str(time.time()))
    elif kind == "power" and not bad:
        sft.load_model = lambda *_: time.sleep(300)  # at work, so that no collective tells it
    elif bad:
        sft.load_model = load
    sft.main([*TINY_RUN, *flags])


def fail(folders, kind, bad, flags="", *, ranks):
    """[(exit code, output, seconds from failure to end), ...]"""
    note = folders[0] / "note"
    found = torchrun(folders, "tests/test_ranks.py", kind, bad, note, *flags.split(), ranks=ranks)
    return [(code, text, end - float(note.read_text())) for code, text, end in found]


def test_hosts_that_do_not_share_the_run_folder_all_end_and_say_so(tmp_path):
    folders = hosts(tmp_path)
    found = torchrun(folders, "sft.py", *TINY_RUN, limit=60)
    begun = (folders[0] / "out" / "args.json").stat().st_mtime
    for code, text, end in found:
        assert code and text.count("is not one folder for all hosts") == 1, text
        assert "error: --output_dir out is not one folder for all hosts" in end_of(text)
        assert end - begun < 30


def tracebacks(text):
    """Of ranks: torchrun's report begins with one of its own."""
    return text.count("Traceback") - 1


def test_a_mistake_that_one_rank_meets_ends_all_within_seconds_and_is_told_once(tmp_path):
    [(code, text, seconds)] = fail(hosts(tmp_path, 1), "mistake", 1, ranks=2)
    assert code and text.count("name another model") == 1 and not tracebacks(text), text
    assert "error: name another model" in end_of(text) and seconds < 10


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.parametrize(
    ("flags", "message"),
    [("--data absent.jsonl", "absent.jsonl (train) cannot be read"), ("--batch_size 0", "it must be 1 or more"),
     ("--no_such_flag 1", "Unrecognized options: --no_such_flag")],
)  # fmt: skip
def test_a_mistake_that_all_ranks_meet_is_told_once(tmp_path, flags, message, late):
    [(code, text, seconds)] = fail(hosts(tmp_path, 1), "late", late, flags, ranks=2)
    assert code and text.count(message) == 1 and not tracebacks(text) and seconds < 30, text
    assert message in end_of(text) or "flag" in flags  # those are told in a box


def test_an_exception_on_one_rank_shows_its_traceback_and_ends_all_within_seconds(tmp_path):
    [(code, text, seconds)] = fail(hosts(tmp_path, 1), "exception", 1, ranks=2)
    assert code and tracebacks(text) == 1 and "in load\n" in text and seconds < 10, text
    assert "error: rank 1 failed: RuntimeError: the disk is on fire" in end_of(text)


@pytest.mark.parametrize("bad", [0, 1])
def test_an_exception_on_one_host_ends_the_other_within_seconds_which_says_so_in_one_line(tmp_path, bad):
    found = fail(hosts(tmp_path), "exception", bad, ranks=1)
    for rank, (code, text, seconds) in enumerate(found):
        assert code and tracebacks(text) == ("in load\n" in text) == (rank == bad) and seconds < 30, text
        assert text.count(f"error: rank {bad} failed: RuntimeError: the disk is on fire") == 1, text


def test_where_the_first_host_vanishes_the_others_end_within_seconds_and_say_so(tmp_path):
    _, (code, text, seconds) = fail(hosts(tmp_path), "power", 0, ranks=1)
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
    monkeypatch.setattr(tiny, "Smooth", torch.optim.AdamW)
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


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_shared_backbone_runs_in_bf16_without_deepspeed(home, tmp_path, monkeypatch, lora_r):
    values = tiny.spy(monkeypatch, dvpo, "score_rollout", lambda found, *_: found[2])
    found = engines(monkeypatch, dvpo)
    run(home, "dvpo", tmp_path / "out", share_backbone=True, bf16=True, lora_r=lora_r, steps=2)
    assert_finite(tmp_path / "out")
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.std() > 0.05 for x in values) and len(values) == 2
    assert not found[0][0].deepspeed and {p.dtype for p in found[0][1].values()} == {torch.float32}


def test_heads_answer_in_fp32_whatever_the_weights(home):
    rows, tokenizer = toy_rows(tiny.random.Random(0), [(5, 4), (3, 7)]), toy.tokenizer()
    for frozen in (False, True):
        args = gvm.Args(bf16=True)
        load = lambda kind, args=args, frozen=frozen: sft.load_model(kind, str(home / "base"), tokenizer, args, frozen)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            given = [
                gvm.ValueModel(load("value"))(gvm.collate_values([[row] for row in rows], 0, every=True)),
                rm.RewardModel(load("reward"), True)(*rm.collate_scored([p + r for p, r in rows], 0, CPU)),
                ppo.Critic(load("value"), args)(sft.collate(rows, 0)),
                sft.Policy(load("causal"))(sft.collate(rows, 0)),
            ]
        assert [x.dtype for x in given] == [torch.float32] * 4


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
HARD = {"bf16": True, "gradient_checkpointing": True, "lora_r": 4, "micro_batch_size": 2, "steps": 2}
SHARED = {"share_backbone": True}
CORE = {"sft_hard_3": ("sft", HARD | {"zero_stage": 3}), "dvpo_hard_3": ("dvpo", HARD | SHARED | {"zero_stage": 3})}
FP32 = {  # what ZeRO 1 and ZeRO 3 must do alike
    "sft": {},
    "sft_new": {},
    "rm": {},
    "gvm_lora": {"lora_r": 4, "lora_dropout": 0.0},
}
for _name, _settings in FP32.items():
    for _stage in (1, 3):
        _settings = _settings | {"steps": 2, "micro_batch_size": 2, "zero_stage": _stage}
        CORE[f"{_name}_fp32_{_stage}"] = (_name.partition("_")[0], _settings)
FIRST = {"steps": 1, "learning_rate": 0.02, "micro_batch_size": 2}
FULL = {
    stage: {f"{name}_{stage}": (name.partition("_")[0], HARD | {"zero_stage": stage} | settings)
            for name, settings in [*((name, {}) for name in SCRIPTS), ("dvpo_shared", SHARED)]}
    for stage in (1, 3)
}  # fmt: skip


def ranks_main(home: Path, case: str):
    """Many runs in one process; one that fails leaves its traceback and does not stop the others."""
    (home / "ranks").mkdir(exist_ok=True)
    for name, (script, settings) in (CORE if case == "core" else FULL[int(case)]).items():
        module = SCRIPTS[script]
        load = module.load_model

        def loading(kind, start, *inputs, load=load, name=name, **options):
            model = load(kind, "toy" if "new" in name else start, *inputs, **options)
            whole = [n for n, p in model.named_parameters() if p.numel() or not hasattr(p, "ds_id")]
            (home / "ranks" / f"{name}_whole_{os.environ['RANK']}").write_text("\n".join(whole))
            return model

        module.load_model = loading
        try:
            run(home, script, f"ranks/{name}", **settings)
        except Exception:
            (home / "ranks" / f"{name}_error").write_text(traceback.format_exc())
        module.load_model = load
    if case == "core":
        with pytest.MonkeyPatch.context() as patch:
            found = engines(patch, sft)
            patch.setattr(tiny, "Smooth", torch.optim.AdamW)
            run(home, "sft", "ranks/first", bf16=True, **FIRST)
        assert found[0][0].deepspeed.zero_optimization_stage() == 1
    else:
        sample_prompts(home, home / "ranks" / f"sample_{case}")


@pytest.fixture(scope="module")
def core(home, tmp_path_factory):
    return started(home, tmp_path_factory, "core")


@pytest.fixture(scope="module", params=[1, 3])
def full(home, tmp_path_factory, request):
    return request.param, started(home, tmp_path_factory, request.param)


def started(home, tmp_path_factory, case):
    folder = tmp_path_factory.mktemp(f"torchrun_{case}")
    [(code, text, _)] = torchrun([folder], "tests/test_ranks.py", case, home, ranks=2, limit=500)
    assert code == 0, text[-4000:]
    return home / "ranks"


def assert_finite(folder):
    rows = metrics(folder)
    assert rows and all(math.isfinite(value) for row in rows for value in row.values() if value is not None), rows


def assert_ran(home, folder, script):
    """Two steps with finite metrics; final/ loads whole, and is not the model that training started from."""
    import transformers

    error = folder.with_name(f"{folder.name}_error")
    assert not error.exists(), error.read_text()
    assert_finite(folder)
    auto = getattr(transformers, f"AutoModelFor{KIND[script]}")
    model, told = auto.from_pretrained(folder / "final", output_loading_info=True)
    assert len(metrics(folder)) == 2 and not any(told.values()), told
    start = stock("CausalLM", home / "base").state_dict()
    changed = {name for name, x in model.state_dict().items() if name in start and (x != start[name]).any()}
    assert all(f"model.layers.{i}.mlp.down_proj.weight" in changed for i in range(2)), changed
    assert all(x.isfinite().all() and x.any() for x in model.state_dict().values())


@pytest.mark.parametrize("name", [name for name in CORE if "hard" in name])
def test_bf16_checkpointing_and_lora_at_zero_3(home, core, name):
    assert_ran(home, core / name, CORE[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SCRIPTS, "dvpo_shared"])
def test_bf16_checkpointing_and_lora_at_zero_1_and_3(home, full, name):
    stage, folder = full
    assert_ran(home, folder / f"{name}_{stage}", name.partition("_")[0])


@pytest.mark.slow
def test_ranks_sample_after_other_runs(full):
    stage, folder = full
    assert (folder / f"sample_{stage}" / "graded.jsonl").read_bytes().count(b"\n") == 10


@pytest.mark.parametrize("name", FP32)
def test_models_are_built_in_parts_at_zero_3_and_train_as_whole_ones(core, name):
    one, three = core / f"{name}_fp32_1", core / f"{name}_fp32_3"
    for rank in range(2):
        assert not (core / f"{name}_fp32_3_whole_{rank}").read_text()
        assert (core / f"{name}_fp32_1_whole_{rank}").read_text()
    for folder in (one, three):
        error = folder.with_name(f"{folder.name}_error")
        assert not error.exists(), error.read_text()
    if name == "sft_new":  # its random numbers are drawn in another order
        assert all(row["loss"] == pytest.approx(math.log(101), abs=0.3) for row in metrics(three))
        return
    tiny.same_metrics(metrics(one), metrics(three), 1e-5)
    assert tiny.distance(one, three) < 1e-6


def test_the_first_update_in_bf16_on_two_ranks_has_full_size(home, core, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "Smooth", torch.optim.AdamW)
    one, two = run(home, "sft", tmp_path / "out", **FIRST), core / "first"
    start = {name: x.float() for name, x in stock("CausalLM", home / "base").state_dict().items()}
    sizes = []
    for folder in (one, two):
        sizes.append(sum((x.float() - start[name]).square().sum() for name, x in weights(folder).items()).sqrt())
    assert float(sizes[1] / sizes[0]) == pytest.approx(1, abs=0.05)


if __name__ == "__main__":
    if sys.argv[1] in ("mistake", "exception", "power", "late"):
        fails_main(*sys.argv[1:])
    else:
        ranks_main(Path(sys.argv[2]), sys.argv[1])
