"""What must not change a run, and what must: padding, micro-batches, ranks, checkpoints, shared weights; EOS, tau, seeds.

Tiny models on a few rows, through `train(args)`. `python -m torch.distributed.run ... tests/test_invariants.py HOME` is the
helper process of the test with two ranks.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
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

ROLLOUT = ("dvpo", "ppo", "reinforce")
OFFLINE = ("vcb", "dpo", "rest")  # learn from graded rows
SCRIPTS = {"sft": sft, "rm": rm, "gvm": gvm, "dvpo": dvpo, "ppo": ppo, "reinforce": reinforce} | {
    "vcb": vcb, "dpo": dpo, "rest": rest
}  # fmt: skip
TINY = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}
EOS, WORDS = toy.tokenizer().eos_token_id, range(5, toy.config().vocab_size)
CPU = torch.device("cpu")


# ---------------------------------------------------------------------------------------------------- tiny models, data
def user(text):
    return {"role": "user", "content": text}


def chat(prompt):
    """The prompt as a second turn: a prompt of another length."""
    earlier = toy.prompts("sft")[0]
    answer = toy.write(toy.TRAIN_POLICIES[0], earlier, random.Random(0))
    return [user(earlier), {"role": "assistant", "content": answer}, user(prompt)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny policy, rows of every kind and unequal lengths, and a GVM trained with LoRA (and its dropout)."""
    from safetensors.torch import load_file, save_file
    from transformers import LlamaForCausalLM

    home = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    base = LlamaForCausalLM(toy.config(**TINY))
    for parameter in base.parameters():  # far from uniform, so that what is computed matters
        if parameter.dim() > 1:
            parameter.data *= 4
    for name in ("base", "pad_is_eos"):
        base.save_pretrained(home / name)
        tokenizer = toy.tokenizer()
        if name == "pad_is_eos":
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.save_pretrained(home / name)
    base.generation_config.eos_token_id = [EOS, *range(30, 60)]  # many tokens end a response: most are short
    base.save_pretrained(home / "brief")
    toy.tokenizer().save_pretrained(home / "brief")
    rng, asked = random.Random(0), toy.prompts("rl")[:10]
    policies = toy.TRAIN_POLICIES[-3:]
    write_jsonl(
        home / "sft.jsonl",
        [{"prompt": chat(p) if i % 3 == 0 else p, "completion": toy.write(policies[i % 2], p, rng)}
         for i, p in enumerate(asked[:7])],
    )  # fmt: skip
    write_jsonl(
        home / "graded.jsonl",
        [{"prompt": chat(p) if i % 3 == 0 else p,
          "responses": [{"text": text, "score": toy.gold(p, text), "policy": name}
                        for name in policies[: 2 + i % 2] for text in [toy.write(name, p, rng)]]}
         for i, p in enumerate(asked[:7])],
    )  # fmt: skip
    write_jsonl(home / "prompts.jsonl", [{"prompt": chat(p) if i % 3 == 0 else p} for i, p in enumerate(asked)])
    final = run(home, "gvm", "gvm", lora_r=4, learning_rate=0.02, steps=6) / "final"
    for path in (final / "model.safetensors", final / "adapter" / "adapter_model.safetensors"):
        tensors = load_file(path)  # a larger head: values that differ as much as trained ones do
        tensors = {name: x * 10 if ".score." in f".{name}" else x for name, x in tensors.items()}
        save_file(tensors, path, metadata={"format": "pt"})
    run(home, "rm", "rm")
    return home


DEFAULTS = {
    "sft": {"data": "sft.jsonl", "steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup_steps": 1},
    "rm": {"data": "graded.jsonl", "steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup_steps": 1},
    "gvm": {
        "data": "graded.jsonl", "steps": 5, "batch_size": 3, "learning_rate": 1e-3, "warmup_steps": 1, "tau_pairs": 1,
        "eval_share": 0.2,
    },
    "dvpo": {
        "data": "prompts.jsonl", "steps": 3, "rollout_batch_size": 6, "batch_size": 3, "learning_rate": 1e-3,
        "max_response_tokens": 10, "tau_pairs": 2,
    },
    "ppo": {
        "data": "prompts.jsonl", "steps": 3, "rollout_batch_size": 6, "batch_size": 3, "learning_rate": 1e-3,
        "critic_learning_rate": 1e-3, "max_response_tokens": 10, "eos_penalty": 0.5,
    },
    "vcb": {"data": "graded.jsonl", "steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup_steps": 1},
    "dpo": {"data": "graded.jsonl", "steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup_steps": 1},
    "rest": {
        "data": "graded.jsonl", "steps": 4, "batch_size": 5, "learning_rate": 1e-3, "warmup_steps": 1,
        "quantiles": (0.0, 0.5), "epochs": 1,
    },
    "reinforce": {
        "data": "prompts.jsonl", "steps": 3, "rollout_batch_size": 6, "batch_size": 3, "learning_rate": 1e-3,
        "max_response_tokens": 10, "n": 3,
    },
}  # fmt: skip


def smooth(script):
    """With its usual eps, AdamW moves a weight whose gradient is rounding alone by a whole learning rate: runs that are
    the same but for the order of sums would differ by as much as wrong ones."""
    return mock.patch.object(SCRIPTS[script], "AdamW", functools.partial(SCRIPTS[script].AdamW, eps=1e-4))


def best_of_each(scores, n, original=ppo.best_of_each):
    """Of responses that differ in their end token alone the text is one and the score as well: of such a pair rounding,
    and so the size of a batch, would choose. Here the first is kept."""
    return original([round(score, 5) for score in scores], n)


def run(home, script, name, **changes) -> Path:
    """One run of a script with few rows and steps; returns its folder."""
    settings = DEFAULTS[script] | {"output_dir": str(home / name)} | changes
    settings |= {key: str(home / settings[key]) for key in ("data", "eval_data") if key in settings}
    frozen = {"gvm": "gvm/final"} if script == "dvpo" else {"reward_model": "rm/final"}
    starts = {"policy": "base"} if script in ROLLOUT + OFFLINE else {"model": "base"}
    for key, default in (starts | (frozen if script in ROLLOUT else {})).items():
        settings[key] = str(home / settings.get(key, default))
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        mock.patch("torch.cuda.is_available", return_value=False),  # all that is compared runs on one device
        smooth(script),
        mock.patch("ppo.best_of_each", best_of_each),
    ):
        SCRIPTS[script].train(dataclasses.replace(SCRIPTS[script].Args(), **settings))
    return home / name


def jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(folder):
    kept = lambda key: not key.endswith("seconds") and key != "useful_tokens"  # how work is split is not what it gives
    return [{k: v for k, v in row.items() if kept(k)} for row in jsonl(folder / "metrics.jsonl")]


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "final" / "model.safetensors")


def distance(one, two) -> float:
    """Largest difference of two runs' final weights."""
    one, two = weights(one), weights(two)
    assert one.keys() == two.keys()
    return max(float((one[name].float() - two[name].float()).abs().max()) for name in one)


def same_metrics(one, two, tolerance=2e-5):
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            if a["step"] == 1 and key in ("misaligned", "accuracy") and "forward_kl" in a:
                continue  # at the reference itself: the signs of rounding errors
            if a[key] is not None and b[key] is not None:  # DeepSpeed without ZeRO tells no gradient norm
                assert a[key] == pytest.approx(b[key], rel=tolerance, abs=tolerance), (a["step"], key)


def spy(monkeypatch, module, name, keep):
    """Record keep(result, *arguments) of every call of module.name."""
    original, found = getattr(module, name), []

    def call(*inputs, **options):
        result = original(*inputs, **options)
        found.append(keep(result, *inputs))
        return result

    monkeypatch.setattr(module, name, call)
    return found


def gathered(lists):
    """Of all that ranks gather what is computed: responses (without what goes with them), rewards; not names of folders, signals, nor
    nothing."""
    alone = lambda x: x[0] if isinstance(x, (list, tuple)) and isinstance(x[0], list) else x
    told = lambda x: isinstance(x, str) or (isinstance(x, (list, tuple)) and (not x or isinstance(x[-1], str)))
    return [[alone(item) for item in x] for x in lists if x and not told(x[0])]


def toy_rows(rng, lengths):
    """(prompt ids, response ids with EOS) of the given lengths."""
    return [([rng.choice(WORDS) for _ in range(p)], [rng.choice(WORDS) for _ in range(r - 1)] + [EOS])
            for p, r in lengths]  # fmt: skip


LENGTHS = [(1, 1), (12, 9), (3, 4), (7, 1), (2, 8)]


def stock(kind, folder):
    import transformers

    model = getattr(transformers, f"AutoModelFor{kind}").from_pretrained(folder).eval()
    if kind == "CausalLM" and not isinstance(model.generation_config.eos_token_id, list):
        model.generation_config.eos_token_id = [model.generation_config.eos_token_id]  # as load_model leaves it
    return model


KIND = dict.fromkeys(SCRIPTS, "CausalLM") | {"rm": "SequenceClassification", "gvm": "TokenClassification"}

# ------------------------------------------------------------------------------------------- the first step of a rollout
VARIANTS = {
    "plain": {},
    "lora": {"lora_r": 4},
    "share": {"share_backbone": True},
    "lora_share": {"lora_r": 4, "share_backbone": True},
}
CASES = [(script, variant) for script in SCRIPTS for variant in ("plain", "lora")] + [("dvpo", "lora_share")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_before_the_first_update_the_ratio_is_1_and_at_step_1_the_kl_is_0(home, tmp_path, monkeypatch, variant):
    calls = spy(monkeypatch, dvpo, "dvpo_loss", lambda _, logp, old, adv, mask, n, **__: ((logp - old) * mask).detach())
    scored = spy(monkeypatch, dvpo, "score_rollout", lambda found, *_: found)
    folder = run(
        home, "dvpo", tmp_path / "out", **VARIANTS[variant], batch_size=6, micro_tokens=128, temperature=0.8,
        learning_rate=0.01, steps=2,
    )  # fmt: skip
    assert len(calls) == 2 * 2 * 2  # rollouts x epochs x micro-batches, which are not those of scoring
    for rollout in range(2):
        before, after = calls[4 * rollout : 4 * rollout + 2], calls[4 * rollout + 2 : 4 * rollout + 4]
        assert max(float(gap.abs().max()) for gap in before) < 2e-6
        assert max(float(gap.abs().max()) for gap in after) > 1e-3
    (old, ref, _), (old_2, ref_2, _) = scored
    assert float((old - ref).abs().max()) < 2e-6 < 1e-3 < float((old_2 - ref_2).abs().max())
    kl = [row["kl"] for row in metrics(folder)]
    assert abs(kl[0]) < 1e-5 and abs(kl[1]) > 1e-3


# --------------------------------------------------------------------------------------------------------------- padding
def test_padding_on_the_right_changes_no_log_prob_and_no_loss(home):
    policy = sft.Policy(stock("CausalLM", home / "base"))
    rows = toy_rows(random.Random(0), LENGTHS)
    with torch.no_grad():
        batch = sft.collate(rows, 0)
        together = policy(batch)
        for pad in (EOS, 50):
            assert torch.equal(together, policy(sft.collate(rows, pad)))
        alone = [policy(sft.collate([row], 0)) for row in rows]
    for i, logp in enumerate(alone):
        assert torch.allclose(together[i, : logp.shape[1]], logp[0], atol=2e-6)
    tokens = sum(len(response) for _, response in rows)
    with torch.no_grad():
        parts = sum(policy(sft.collate([row], 0), token_weight=1 / tokens) for row in rows)
        assert float(policy(batch, token_weight=1 / tokens)) == pytest.approx(float(parts), rel=1e-6)


def test_padding_on_the_right_changes_no_value_and_no_loss(home):
    model = gvm.ValueModel(stock("TokenClassification", home / "gvm" / "final"))
    rng = random.Random(1)
    rows = [toy_rows(rng, LENGTHS[i:]) for i in range(len(LENGTHS))]  # conversations of 5, 4, ... 1 answers
    reward = torch.randn(15, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = gvm.collate_values(rows, 0, every=True)
        together = model(batch)
        for pad in (EOS, 50):
            assert torch.equal(together, model(gvm.collate_values(rows, pad, every=True)))
        alone = [gvm.collate_values([turns], 0, every=True) for turns in rows]
        values = [model(one) for one in alone]
    total, at = 0.0, 0
    for one, v in zip(alone, values, strict=True):
        assert torch.allclose(together[at : at + len(v), : v.shape[1]], v, atol=2e-6)
        target = gvm.td_targets(v, one.mask[:, 1:], reward[at : at + len(v)], td_lambda=0.5)
        total, at = total + gvm.value_loss(v, target, one.mask / 60), at + len(v)
    target = gvm.td_targets(together, batch.mask[:, 1:], reward, td_lambda=0.5)
    assert float(gvm.value_loss(together, target, batch.mask / 60)) == pytest.approx(float(total), rel=1e-5)


def test_padding_on_the_right_changes_no_reward(home):
    torch.manual_seed(1)
    model = rm.RewardModel(sft.load_model("reward", str(home / "base"), toy.tokenizer(), sft.Args()).eval(), True)
    sequences = [prompt + response for prompt, response in toy_rows(random.Random(2), LENGTHS)]
    with torch.no_grad():
        together = model(*rm.collate_scored(sequences, EOS, CPU))
        alone = torch.cat([model(*rm.collate_scored([sequence], 0, CPU)) for sequence in sequences])
    assert torch.allclose(together, alone, atol=2e-6) and float(alone.std()) > 0.02


class Whole:
    """A policy in the shape of an engine."""

    def __init__(self, folder):
        self.module, self.deepspeed = dvpo.Policy(stock("CausalLM", folder)), None
        self.autocast = contextlib.nullcontext


@pytest.mark.parametrize("pad_is_eos", [False, True])
@pytest.mark.parametrize("greedy", [True, False])
def test_padding_on_the_left_changes_no_continuation(home, greedy, pad_is_eos):
    engine, tokenizer = Whole(home / "base"), toy.tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = [prompt for prompt, _ in toy_rows(random.Random(3), [(n, 1) for n in (1, 30, 4, 17, 9, 2)])]
    args = SimpleNamespace(max_response_tokens=12, rollout="generate")
    engine.module.train().model.model.layers[0].self_attn.attention_dropout = 0.5  # not while sampling

    def noise(rows):
        return (lambda ids, scores: scores) if greedy else dvpo.KeyedNoise(list(range(len(prompts)))[rows], 1.0, CPU)

    together = dvpo.sample_responses(engine, prompts, noise(slice(None)), tokenizer, args, CPU)
    assert len({tuple(response) for response in together}) > 3
    for i, prompt in enumerate(prompts):
        assert dvpo.sample_responses(engine, [prompt], noise(slice(i, i + 1)), tokenizer, args, CPU) == [together[i]]
    if greedy:  # one distribution for sampling and scoring: what was sampled is the likeliest, read without padding too
        for prompt, response in zip(prompts, together, strict=True):
            logits = stock("CausalLM", home / "base")(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
            assert logits.argmax(-1).tolist() == response
    assert engine.module.training
    long = max(range(len(prompts)), key=lambda i: len(together[i]))
    stops = together[long][4]  # a token that ends this response early: the others go on as before
    engine.module.ends = {stops}
    engine.module.model.generation_config.eos_token_id = [stops]
    ended = dvpo.sample_responses(engine, prompts, noise(slice(None)), tokenizer, args, CPU)
    assert len(ended[long]) <= 5 < len(together[long])
    for before, after in zip(together, ended, strict=True):
        kept = before.index(stops) + 1 if stops in before else len(before)
        assert after[:kept] == before[:kept] and (stops not in before or len(after) == kept)


# --------------------------------------------------------------------------------------------------- micro-batches, ranks
@pytest.mark.parametrize("script", SCRIPTS)
def test_splitting_a_batch_into_micro_batches_changes_nothing(home, tmp_path, script):
    whole, *parts = (run(home, script, tmp_path / str(size), micro_tokens=size) for size in (4096, 1, 60))
    assert_trained(home, whole)
    for part in parts:  # 7 rows in batches of 5, or conversations in batches of 3: the last of an epoch is not full
        same_metrics(metrics(whole), metrics(part))
        assert distance(whole, part) < 1e-5


def assert_trained(home, folder):
    """The run has moved the weights by far more than the tolerances here."""
    from safetensors.torch import load_file

    start, end = load_file(home / "base" / "model.safetensors"), weights(folder)
    assert max(float((end[name] - start[name]).abs().max()) for name in start if name in end) > 1e-3


LOOKS = {"eval_data": "graded.jsonl", "eval_split": "train", "eval_every": 2, "keep_best": True}
LOOKS_RL = LOOKS | {"eval_data": "prompts.jsonl"}
RANKS = {  # name -> script, settings: what one process and two must do alike
    "sft_0": ("sft", {"micro_tokens": 64}),
    "sft_1": ("sft", {"micro_tokens": 64, "zero_stage": 1}),
    "rm_2": ("rm", {"micro_tokens": 1, "zero_stage": 2, **LOOKS}),
    "gvm_0": ("gvm", {"value_norm": "batch", "td_lambda": 0.9}),
    "gvm_2": ("gvm", {"micro_tokens": 1, "zero_stage": 2, "lora_r": 4, "lora_dropout": 0.0, **LOOKS}),
    "dvpo_0": ("dvpo", {"micro_tokens": 1, "kl_target": 0.1, "kl_horizon": 50.0}),
    "dvpo_1": ("dvpo", {"micro_tokens": 64, "zero_stage": 1, "lora_r": 4, "share_backbone": True}),
    "dvpo_3": ("dvpo", {"micro_tokens": 1, "zero_stage": 3, "advantage": "gae", "kl_in": "loss", **LOOKS_RL}),
    "vcb_0": ("vcb", {"micro_tokens": 1}),
    "vcb_3": ("vcb", {"micro_tokens": 64, "zero_stage": 3, **LOOKS}),
    "dpo_3": ("dpo", {"micro_tokens": 1, "zero_stage": 3, "loss": "rrhf"}),
    "dpo_1": ("dpo", {"micro_tokens": 64, "zero_stage": 1, "lora_r": 4, "gamma": 0.5}),
    "rest_2": ("rest", {"micro_tokens": 1, "zero_stage": 2}),
    "reinforce_3": ("reinforce", {"micro_tokens": 1, "zero_stage": 3, "baseline": "remax", "n": 1, **LOOKS_RL}),
}
STAGES = {f"{script}_stage_{stage}": (script, {"policy": "brief", "micro_tokens": 64, "zero_stage": stage, **settings})
          for script, settings in (("dvpo", {}), ("ppo", {"best_of": 2, **LOOKS_RL})) for stage in range(4)}  # fmt: skip

RESUMED_RANKS = ("sft_1", "dvpo_1", "ppo_stage_2", "vcb_3")


def ranks_main(home: Path):
    """All of RANKS on this rank; what the rollouts sampled, and what a resumed run gives, go into the run folders."""
    gather = dvpo.gather_lists
    for name, (script, settings) in (RANKS | STAGES).items():
        sampled = []
        for module in (dvpo, ppo, reinforce, vcb, dpo):
            module.gather_lists = lambda x, world, sampled=sampled: sampled.append(gather(x, world)) or sampled[-1]
        folder = run(home, script, f"ranks/{name}", **settings)
        (folder / f"sampled_{os.environ['RANK']}.json").write_text(json.dumps(gathered(sampled)))
    sample_prompts(home, home / "ranks" / "sample")
    for name in RESUMED_RANKS:
        script, settings = (RANKS | STAGES)[name]
        interrupted(home, script, f"ranks/{name}_resumed", 3, **settings)
        run(home, script, f"ranks/{name}_resumed", save_every=2, resume=True, **settings)


def sample_prompts(home: Path, folder: Path) -> bytes:
    """sample.py's file: ten prompts, in batches of two."""
    settings = {"policy": str(home / "brief"), "reward_model": str(home / "rm" / "final"), "n": 3, "batch_size": 6}
    data = str(home / "prompts.jsonl")
    with contextlib.redirect_stdout(io.StringIO()), mock.patch("torch.cuda.is_available", return_value=False):
        path = sample.train(sample.Args(**settings, data=data, output_dir=str(folder), max_response_tokens=10))
    return path.read_bytes()


def interrupted(home, script, name, at, **settings):
    """A run that is stopped before it logs step `at`."""
    module, log = SCRIPTS[script], SCRIPTS[script].Run.log

    def stopping(self, found):
        if self.step + 1 == at:
            raise KeyboardInterrupt
        log(self, found)

    module.Run.log = stopping
    try:
        run(home, script, name, save_every=2, **settings)
    except KeyboardInterrupt:
        return
    finally:
        module.Run.log = log
    raise AssertionError("the run was not stopped")


@pytest.fixture(scope="module")
def two_ranks(home):
    """The folder with the runs of two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(home)], capture_output=True, text=True, timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return home / "ranks"


@pytest.mark.parametrize("name", RANKS)
def test_two_ranks_do_what_one_does(home, tmp_path, monkeypatch, two_ranks, name):
    script, settings = RANKS[name]
    gathers = script if script in (*ROLLOUT, "vcb", "dpo") else "dvpo"
    sampled = spy(monkeypatch, SCRIPTS[gathers], "gather_lists", lambda lists, *_: lists)
    one = run(home, script, tmp_path / "out", **settings | {"zero_stage": 0, "micro_tokens": 2048})
    two = two_ranks / name
    same_metrics(metrics(one), metrics(two))
    assert distance(one, two) < 2e-5
    assert_trained(home, one)
    for rank in range(2):
        found = json.loads((two / f"sampled_{rank}.json").read_text())
        one_rank = gathered(sampled)
        assert found == one_rank if script == "dvpo" else len(found) == len(one_rank)  # others gather rewards too


def test_two_ranks_write_the_samples_of_one(home, tmp_path, two_ranks):
    found = sample_prompts(home, tmp_path / "out")
    assert (two_ranks / "sample" / "graded.jsonl").read_bytes() == found and found.count(b"\n") == 10


@pytest.mark.parametrize("script", ["dvpo", "ppo"])
def test_all_zero_stages_do_what_one_process_does(home, tmp_path, two_ranks, script):
    settings = STAGES[f"{script}_stage_0"][1] | {"micro_tokens": 128}
    one = run(home, script, tmp_path / "out", **settings)
    assert_trained(home, one)
    for stage in range(4):
        two = two_ranks / f"{script}_stage_{stage}"
        rows = metrics(two)
        same_metrics(metrics(one), rows)
        assert (
            abs(rows[0]["kl"]) < 1e-5 < 1e-3 < abs(rows[-1]["kl"])
        )  # the policy starts as the reference and leaves it
        assert max(row["logp_gap_max"] for row in rows) < 1e-4  # what generates is what is trained
        assert distance(one, two) < 2e-5


@pytest.mark.parametrize("name", ["dvpo_stage_3", "ppo_stage_3"])
def test_under_zero_3_ranks_may_stop_generating_at_different_lengths(two_ranks, name):
    """That they came to an end is in the fixture; here, that their responses did end at different lengths."""
    lists = json.loads((two_ranks / name / "sampled_0.json").read_text())
    rollouts = [x for x in lists if isinstance(x[0], list)]  # responses, beside the rewards
    longest = [[max(map(len, part)) for part in (x[: len(x) // 2], x[len(x) // 2 :])] for x in rollouts]
    assert any(a != b for a, b in longest), longest


@pytest.mark.parametrize("name", RESUMED_RANKS)
def test_two_ranks_resume_bit_for_bit(two_ranks, name):
    straight, resumed = two_ranks / name, two_ranks / f"{name}_resumed"
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0


# ------------------------------------------------------------------------------------------------------------------- EOS
@pytest.mark.parametrize("base", ["base", "pad_is_eos"])
def test_eos_is_trained(home, tmp_path, base):
    final = run(home, "sft", tmp_path / "out", model=base, steps=60, learning_rate=5e-3) / "final"
    tokenizer = sft.load_tokenizer(str(home / base), sft.Args())
    args = sft.Args(data=str(home / "sft.jsonl"))
    rows = list(sft.load_data(args, "sft", lambda row: [sft.encode(tokenizer, row, "completion", args)]))
    batch, last = sft.collate(rows, tokenizer.pad_token_id), torch.tensor([len(response) - 1 for _, response in rows])
    assert all(response[-1] == EOS for _, response in rows)
    with torch.no_grad():
        before, after = (
            sft.Policy(stock("CausalLM", folder))(batch)[range(len(rows)), last] for folder in (home / base, final)
        )
    assert (after > before + 1).all() and float(after.mean()) > -0.5


def test_the_value_at_eos_is_read_and_a_label_reaches_the_model_through_it(home, tmp_path):
    tokenizer, rng = toy.tokenizer(), random.Random(0)
    args = dataclasses.replace(gvm.Args(), data=str(home / "graded.jsonl"))
    answers = gvm.load_answers(tokenizer, args)[:4]
    assert all(answer.response[-1] == EOS for answer in answers)
    turns = [gvm.render(tokenizer, [rng.choice(answers[:2]), answer], 192) for answer in answers[2:]]
    batch = gvm.collate_values(turns, 0, every=False)
    last = batch.mask.sum(1) - 1
    assert (batch.input_ids.flatten()[batch.position[range(2), last]] == EOS).all()
    model = gvm.ValueModel(stock("TokenClassification", home / "gvm" / "final"))
    gradients = []
    for label in (0.0, 1.0):  # with one-step targets only the last cell knows the label
        values = model(batch)
        target = gvm.td_targets(values, batch.mask[:, 1:], torch.tensor([label, 0.5]), td_lambda=0.0)
        gradients.append(torch.autograd.grad(gvm.value_loss(values, target, batch.mask), values)[0])
    changed = (gradients[0] != gradients[1]).nonzero().tolist()
    assert changed == [[0, int(last[0])]] and float((gradients[0] - gradients[1])[0, last[0]]) == pytest.approx(2.0)

    rows = jsonl(home / "graded.jsonl")  # and so through a whole run: two labels change places, mean and std stay
    a, b = rows[0]["responses"][0], rows[1]["responses"][1]
    a["score"], b["score"] = b["score"], a["score"]
    write_jsonl(tmp_path / "other.jsonl", rows)
    one, two = (
        run(home, "gvm", tmp_path / str(i), data=data, td_lambda=0.0, steps=3, eval_share=0.0)
        for i, data in enumerate((home / "graded.jsonl", tmp_path / "other.jsonl"))
    )
    assert distance(one, two) > 1e-4
    configs = [json.loads((folder / "final" / "config.json").read_text()) for folder in (one, two)]
    assert configs[0]["reward_mean"] == pytest.approx(configs[1]["reward_mean"])


def test_a_cut_response_pays_the_eos_penalty_at_its_last_value(home, tmp_path, monkeypatch):
    seen = []
    for penalty in (0.0, 2.0):
        found = spy(monkeypatch, dvpo, "advantages", lambda out, values, kl, mask, **_: (values.clone(), mask))
        run(home, "dvpo", tmp_path / str(penalty), steps=1, eos_penalty=penalty, max_response_tokens=80)
        seen.append(found[0])
    (plain, mask), (less, _) = seen
    ended = run(home, "dvpo", tmp_path / "again", steps=1, max_response_tokens=80) / "metrics.jsonl"
    share = json.loads(ended.read_text().splitlines()[0])["eos_share"]
    paid = plain - less
    last = mask.sum(1)
    cut = paid[torch.arange(len(last)), last]
    assert (
        0 < share < 1
        and float(cut.mean()) == pytest.approx(2 * (1 - share), abs=1e-5)
        and set(cut.round().tolist()) == {0.0, 2.0}
    )
    assert float(paid.abs().sum()) == pytest.approx(float(cut.sum()), abs=1e-4)  # nothing else moves


# ------------------------------------------------------------------------------------------------------------------- tau
@pytest.mark.parametrize("script", ["gvm", "dvpo"])
def test_tau_never_contains_x(home, tmp_path, monkeypatch, script):
    rendered = spy(monkeypatch, SCRIPTS[script], "render", lambda turns, tokenizer, group, *_: (group, turns))
    if script == "dvpo":  # each prompt three times: one rollout has all of them
        write_jsonl(tmp_path / "rows.jsonl", jsonl(home / "prompts.jsonl")[:4] * 3)
        settings = {"data": tmp_path / "rows.jsonl", "rollout_batch_size": 12, "batch_size": 12, "steps": 2}
    else:  # each response three times
        write_jsonl(tmp_path / "rows.jsonl", jsonl(home / "graded.jsonl") * 3)
        settings = {"data": tmp_path / "rows.jsonl", "tau_pairs": 2, "steps": 6}
    run(home, script, tmp_path / "out", **settings)
    assert len(rendered) >= 18 and sum(len(group) == 3 for group, _ in rendered) > len(rendered) / 2
    for group, turns in rendered:
        prompts = [json.dumps(answer.prompt) for answer in group]
        assert len(set(prompts)) == len(prompts)
        asked = [answer.prompt[-1]["content"] for answer in group]
        before = [t for turn in turns[:-1] for part in turn for t in part]
        words = toy.tokenizer().decode(before)
        assert asked[-1] not in words and all(text in words for text in asked[:-1])
        if script == "gvm":
            assert len({answer.policy for answer in group}) == 1


def test_tau_in_dvpo_is_made_of_the_same_rollout(home, tmp_path, monkeypatch):
    rendered = spy(monkeypatch, dvpo, "render", lambda turns, tokenizer, group, *_: group)
    sampled = spy(monkeypatch, dvpo, "gather_lists", lambda lists, *_: lists)
    run(home, "dvpo", tmp_path / "out")
    assert len(rendered) == 18 and len(gathered(sampled)) == 3
    for step, responses in enumerate(gathered(sampled)):
        for i, group in enumerate(rendered[6 * step : 6 * step + 6]):
            assert len(group) == 3 and group[-1].response == responses[i]
            assert all(answer.response in responses for answer in group)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A folder with a GVM trained in the toy world after a short SFT; the better and the worse of its two policies."""
    from transformers import LlamaForCausalLM

    folder, rng, asked = tmp_path_factory.mktemp("told"), random.Random(0), toy.prompts("reward")
    texts = {name: [toy.write(name, prompt, rng) for prompt in asked] for name in toy.TRAIN_POLICIES}
    gold = {name: sum(map(toy.gold, asked, texts[name])) / len(asked) for name in texts}
    good, bad = max(gold, key=gold.get), min(gold, key=gold.get)
    torch.manual_seed(0)
    small = {"num_hidden_layers": 2, "hidden_size": 48, "intermediate_size": 96}
    LlamaForCausalLM(toy.config(**small)).save_pretrained(folder / "base")
    toy.tokenizer().save_pretrained(folder / "base")
    rows = [
        {"prompt": p, "responses": [{"text": t, "score": toy.gold(p, t), "policy": n} for n, t in (("a", a), ("b", b))]}
        for p, a, b in zip(asked, texts[good], texts[bad], strict=True)
    ]
    write_jsonl(folder / "graded.jsonl", rows)
    flat = [{"prompt": row["prompt"], "completion": r["text"]} for row in rows for r in row["responses"]]
    write_jsonl(folder / "sft.jsonl", flat)
    run(folder, "sft", "sft", steps=20, batch_size=32, learning_rate=3e-3)
    run(folder, "gvm", "gvm", model="sft/final", steps=60, batch_size=16, learning_rate=3e-3, eval_share=0.0)
    return folder, good, bad


def test_a_trained_gvm_expects_more_when_tau_shows_the_better_policy(told):
    folder, *policies = told
    tokenizer, rng = toy.tokenizer(), random.Random(1)
    engine = gvm.ValueModel(stock("TokenClassification", folder / "gvm" / "final"))
    args = SimpleNamespace(micro_tokens=4096, padding=False, tau_tokens=192)
    held_out = toy.prompts("heldout")[:64]
    starts = [toy.write(policies[i % 2], prompt, rng).split()[:2] for i, prompt in enumerate(held_out)]
    found = []
    for name in policies:
        groups = []
        for i, (prompt, start) in enumerate(zip(held_out, starts, strict=True)):
            tau = tokenizer.encode(toy.write(name, held_out[i - 1], rng)) + [EOS]
            y = tokenizer.convert_tokens_to_ids(start)  # two words, the same after either tau
            groups.append([gvm.Answer([user(held_out[i - 1])], tau), gvm.Answer([user(prompt)], y)])
        found.append(torch.tensor(np.array(gvm.predict(engine, tokenizer, groups, args, CPU))))  # V(s_1), Q_1, Q_2
    gap = found[0] - found[1]
    assert ((gap > 0).float().mean(0) > 0.9).all() and (gap.mean(0) > 0.2).all(), gap.mean(0)


# ---------------------------------------------------------------------------------------------------------- reward model
@pytest.mark.parametrize("base", ["base", "pad_is_eos"])
def test_stock_classes_read_the_same_scores_from_a_saved_reward_model(home, tmp_path, monkeypatch, base):
    from transformers import AutoTokenizer

    finish, scored, rng = rm.Run.finish, [], random.Random(5)
    sequences = [prompt + response for prompt, response in toy_rows(rng, LENGTHS)]

    def finishing(self, *said, **summary):
        with torch.no_grad():
            scored.append(self.engine(*rm.collate_scored(sequences, self.tokenizer.pad_token_id, CPU)))
            scored.append(torch.cat([self.engine(*rm.collate_scored([s], 0, CPU)) for s in sequences]))
        return finish(self, *said, **summary)

    monkeypatch.setattr(rm.Run, "finish", finishing)
    final = run(home, "rm", tmp_path / "out", model=base, learning_rate=0.02) / "final"
    together, alone = scored
    assert torch.allclose(together, alone, atol=1e-5) and float(alone.std()) > 0.02
    model, tokenizer = stock("SequenceClassification", final), AutoTokenizer.from_pretrained(final)
    assert model.config.num_labels == 1 and tokenizer.pad_token_id == model.config.pad_token_id != EOS
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        with torch.no_grad():
            assert torch.allclose(model(**padded).logits[:, 0], alone, atol=1e-5)
    texts = [tokenizer.decode(sequence) for sequence in sequences]
    again = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(input_ids=again["input_ids"], attention_mask=again["attention_mask"]).logits[:, 0]
    assert torch.allclose(found, alone, atol=1e-5)
    config = json.loads((final / "config.json").read_text())
    assert config["reward_std"] > 0


# ------------------------------------------------------------------------------------------------------------ checkpoints
RESUMED = {
    "sft": {},
    "rm": {"max_grad_norm": 0.1},
    "gvm": {"lora_r": 4, "lora_dropout": 0.3},
    "dvpo": {"lora_r": 4, "share_backbone": True, "kl_target": 0.1, "kl_horizon": 50.0},
    "ppo": {"best_of": 2, "kl_target": 0.1, "kl_horizon": 50.0},
    "reinforce": {"baseline": "grpo", "lora_r": 4},
    "vcb": {"pairs": "full"},
    "dpo": {"loss": "slic", "lora_r": 4},
    "rest": {"epochs": 4},
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_stopped_again_and_again_resumes_bit_for_bit(home, tmp_path, script):
    settings = RESUMED[script] | {"steps": 6}
    straight = run(home, script, tmp_path / "straight", save_every=2, **settings)
    name = tmp_path / "resumed"
    for at in (1, 3, 4, 6):  # before the first checkpoint, between two, before the second, before the third
        interrupted(home, script, name, at, resume=True, **settings)
        saved = [path.name for path in (name / "checkpoints").glob("*")] if (name / "checkpoints").exists() else []
        assert sorted(saved) == [f"step_{step:07d}" for step in range(2, at, 2)]
    resumed = run(home, script, name, save_every=2, resume=True, **settings)
    assert metrics(straight) == metrics(resumed) and len(metrics(straight)) == 6
    assert distance(straight, resumed) == 0
    assert not list(tmp_path.glob("resumed.*"))
    without = run(home, script, tmp_path / "without", **settings)
    assert distance(straight, without) == 0  # writing checkpoints changes nothing


def test_samples_of_a_resumed_run_are_those_of_one_that_was_not_stopped(home, tmp_path):
    straight, name = run(home, "dvpo", tmp_path / "straight"), tmp_path / "resumed"
    interrupted(home, "dvpo", name, 2, resume=True)
    resumed = run(home, "dvpo", name, resume=True)
    assert jsonl(straight / "samples.jsonl") == jsonl(resumed / "samples.jsonl")


def test_a_checkpoint_that_was_not_finished_is_not_used(home, tmp_path, monkeypatch):
    straight, name = run(home, "sft", tmp_path / "straight"), tmp_path / "resumed"
    save = sft.Engine.save

    def half(self, folder):
        save(self, folder)
        if "0000004" in str(folder):
            (folder / "engine.pt").write_bytes((folder / "engine.pt").read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft.Engine, "save", half)
        with pytest.raises(KeyboardInterrupt):
            run(home, "sft", name, save_every=2)
    resumed = run(home, "sft", name, save_every=2, resume=True)
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0


def test_resuming_a_finished_run_changes_nothing(home, tmp_path):
    folder = run(home, "sft", tmp_path / "out", save_every=2)
    before, rows = weights(folder), metrics(folder)
    with pytest.raises(SystemExit) as ended:
        run(home, "sft", tmp_path / "out", save_every=2, resume=True)
    after = weights(folder)
    assert ended.value.code == 0
    assert all(torch.equal(before[key], after[key]) for key in before) and metrics(folder) == rows


# ------------------------------------------------------------------------------------------------- LoRA, shared backbone
@pytest.mark.parametrize(("script", "variant"), CASES)
def test_the_final_model_loads_with_stock_classes_and_computes_what_was_trained(
    home, tmp_path, monkeypatch, script, variant
):
    from peft import PeftModel
    from transformers import AutoTokenizer

    module, found = SCRIPTS[script], []
    ids = torch.randint(5, len(WORDS), (3, 12), generator=torch.Generator().manual_seed(0))
    finish = module.Run.finish

    def finishing(self, *said, **summary):
        with torch.no_grad():
            found.append(self.model.eval()(ids).logits)
        return finish(self, *said, **summary)

    monkeypatch.setattr(module.Run, "finish", finishing)
    final = run(home, script, tmp_path / "out", **VARIANTS[variant], learning_rate=0.02) / "final"
    models = [stock(KIND[script], final)]
    if variant == "plain":
        assert not (final / "adapter").exists()
    else:
        assert {path.name for path in (final / "adapter").iterdir()} >= {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        config = json.loads((final / "adapter" / "adapter_config.json").read_text())
        assert Path(config["base_model_name_or_path"]) == home / "base"
        torch.manual_seed(0)
        kwargs = {} if KIND[script] == "CausalLM" else {"num_labels": 1}
        import transformers

        base = getattr(transformers, f"AutoModelFor{KIND[script]}").from_pretrained(home / "base", **kwargs)
        models.append(PeftModel.from_pretrained(base, final / "adapter").eval())
    assert "base_layer" not in " ".join(weights(final.parent)) and "lora" not in " ".join(weights(final.parent))
    with torch.no_grad():
        for model in models:
            assert torch.allclose(model(ids).logits, found[0], atol=1e-4, rtol=1e-4)
        base = stock("CausalLM", home / "base")
        if KIND[script] == "CausalLM":
            assert float((base(ids).logits - found[0]).abs().max()) > 0.1
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template and tokenizer.get_vocab() == toy.tokenizer().get_vocab()


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_shared_backbone_gives_the_values_and_log_probs_of_separate_models(home, tmp_path, monkeypatch, lora_r):
    scored = spy(monkeypatch, dvpo, "score_rollout", lambda found, *_: found)
    apart, shared = (
        run(home, "dvpo", tmp_path / str(share), share_backbone=share, lora_r=lora_r, learning_rate=0.002)
        for share in (False, True)
    )
    assert len(scored) == 6 and float(scored[0][2].std()) > 0.1
    # the same trajectory; a merged adapter rounds otherwise than one beside its weight, and updates carry that on
    for step, (one, two) in enumerate(zip(scored[:3], scored[3:], strict=True)):
        for x, y in zip(one, two, strict=True):
            assert torch.allclose(x, y, atol=1e-4 if step else 2e-5)
    same_metrics(metrics(apart), metrics(shared), 1e-4)
    assert distance(apart, shared) < 1e-4
    assert_trained(home, apart)


@pytest.mark.parametrize("settings", [{}, {"lora_r": 4}, {"lora_r": 4, "share_backbone": True}])
def test_the_reference_and_the_gvm_stay_as_they_were(home, tmp_path, monkeypatch, settings):
    """Scoring one fixed rollout after training gives the reference log-probs and values of before."""
    kept, score = [], dvpo.score_rollout

    def scoring(engine, frozen, rows, *rest):
        if not kept:
            kept.append((rows, rest, score(engine, frozen, rows, *rest)))
        first, rest_, found = kept[0]
        again = score(engine, frozen, first, *rest_)
        assert torch.equal(found[1], again[1]) and torch.equal(found[2], again[2])
        kept.append(float((found[0] - again[0]).abs().max()))
        return score(engine, frozen, rows, *rest)

    monkeypatch.setattr(dvpo, "score_rollout", scoring)
    run(home, "dvpo", tmp_path / "out", **settings, learning_rate=0.01)
    assert kept[1] == 0 and kept[-1] > 0.01  # the policy has moved


# ------------------------------------------------------------------------------------------- seeds, recomputed activations
SEEDED = {"sft": {"model": "base"}, "rm": {}, "gvm": {"lora_r": 4, "lora_dropout": 0.3}, "dvpo": {}, "ppo": {},
          "reinforce": {"baseline": "reinforce++", "n": 1}, "vcb": {}, "dpo": {}, "rest": {}}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_seed_decides_the_run_and_nothing_else_does(home, tmp_path, script):
    folders = []
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        torch.manual_seed(len(folders)), random.seed(len(folders))
        folders.append(run(home, script, tmp_path / name, seed=seed, **SEEDED[script]))
    one, two, three = folders
    assert metrics(one) == metrics(two) and distance(one, two) == 0
    assert metrics(one) != metrics(three) and distance(one, three) > 1e-4


@pytest.mark.parametrize(("script", "variant"), CASES)
def test_gradient_checkpointing_changes_nothing_but_the_work(home, tmp_path, script, variant):
    from transformers.models.llama.modeling_llama import LlamaMLP

    calls = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(  # recomputing stops inside the last one
        lambda module, *_: calls.append(1) if isinstance(module, LlamaMLP) else None
    )
    folders, work = [], []
    for name in (False, True):
        calls.clear()
        folders.append(
            run(home, script, tmp_path / str(name), **VARIANTS[variant], steps=2, gradient_checkpointing=name)
        )
        work.append(len(calls))
    hook.remove()
    assert work[1] > work[0]
    same_metrics(*map(metrics, folders), 1e-6)
    assert distance(*folders) < 1e-6


if __name__ == "__main__":
    ranks_main(Path(sys.argv[1]))
