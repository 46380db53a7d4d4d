"""bench/plan.py: its terms against bytes that are really allocated, its counts against known models, its page and its errors.

`torchrun ... tests/test_plan.py OUT` is the helper that measures DeepSpeed's tensors on two ranks.
"""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import plan
import transformers

import dvpo
import gvm
import sample
import sft
import toy
from kernels import linear_logprob, linear_nll, model_class

ENV = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
PUBLISHED = {  # DeBERTa: without a head
    "meta-llama/Llama-3.2-1B": 1_235_814_400, "meta-llama/Llama-3.2-3B": 3_212_749_824,
    "meta-llama/Meta-Llama-3-8B": 8_030_261_248, "mistralai/Mistral-7B-Instruct-v0.2": 7_241_732_096,
    "EleutherAI/pythia-2.8b": 2_775_208_960, "microsoft/deberta-v3-large": 434_012_160,
}  # fmt: skip
SMALL = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 512,
         "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}  # fmt: skip


def job(script, config=None, gpus=1, **flags):
    return plan.Job(script, script.Args(**flags), config or toy.config(**SMALL), gpus)


def near(found, expected, tolerance):
    assert abs(found / expected - 1) <= tolerance, (found, expected, found / expected)


# ----------------------------------------------------------------------------------------------------------- parameters
@pytest.mark.parametrize("name", plan.ARCHITECTURES)
def test_parameters_are_those_of_the_whole_model_and_of_the_published_one(name):
    kind, config = "backbone" if "deberta" in name else "causal", plan.config_of(name)
    with torch.device("meta"):
        whole = (transformers.AutoModel if kind == "backbone" else model_class(kind, config)).from_config(config)
    size = sum(p.numel() for p in whole.parameters())
    assert job(dvpo, config).size(kind) == size == PUBLISHED[name]


def test_every_preset_names_a_model_of_the_table():
    for name in plan.MODELS:
        script = plan.importlib.import_module(name)
        for preset in script.PRESETS:
            _, args, config = plan.parsed(name, preset, [])
            assert args == script.Args(**(script.PAPER | script.PRESETS[preset]))
            wanted = {
                "llama3.2": 3_212_749_824,
                "llama3-8": 8_030_261_248,
                "mistral-": 7_241_732_096,
                "pythia-2": 2_775_208_960,
            }
            if preset[:8] in wanted:
                assert plan.Job(script, args, config, 8).size("causal") == wanted[preset[:8]]


def test_lora_parameters_are_those_of_the_script():
    for script, kind in ((sft, "causal"), (gvm, "value")):
        planned = job(script, lora_r=8)
        config = toy.config(**SMALL, num_labels=1)
        model = model_class(kind, config).from_config(config)
        model = script.add_lora(model, planned.args, head=None if kind == "causal" else "score")
        n, t, size = plan.parameters(planned, kind, True)
        assert n == sum(p.numel() for p in model.parameters()) and size == 4 * n
        assert t == sum(p.numel() for p in model.parameters() if p.requires_grad) and 0 < t < n / 2


# ------------------------------------------------------------------------------------------------- a step of the engine
def bytes_of(tensors):
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def a_policy(args, monkeypatch):
    monkeypatch.setattr(toy, "config", lambda of=toy.config, **changes: of(**SMALL | changes))
    model = sft.load_model("causal", "toy", toy.tokenizer(), args)
    return sft.Policy(sft.add_lora(model, args) if args.lora_r else model)


def a_batch(rows=4, prompt=24, response=40):
    pairs = [(list(range(5, 5 + prompt)), list(range(7, 7 + response))) for _ in range(rows)]
    return sft.collate(pairs, 0, torch.device("cpu"))


@pytest.mark.parametrize("lora", [0, 4])
def test_weights_gradients_and_optimizer_of_a_real_step(lora, monkeypatch):
    planned = job(sft, lora_r=lora, lora_dropout=0.0)
    expected = plan.trained_bytes(planned, *plan.parameters(planned, "causal", True))
    policy = a_policy(planned.args, monkeypatch)
    engine = sft.Engine(policy, planned.args, 1)
    engine.set_rate(1e-3)
    engine.backward(engine(a_batch(), token_weight=0.01))
    gradients = bytes_of(p.grad for p in policy.parameters() if p.grad is not None)
    engine.optimizer.step()
    states = [x for state in engine.optimizer.state.values() for x in state.values() if x.dim()]
    near(bytes_of(policy.parameters()), expected["weights"], 0.01)
    near(gradients, expected["gradients"], 0.1)
    near(bytes_of(states), expected["optimizer"], 0.01)
    assert expected["bucket"] == expected["step"] == 0


def measure_ranks(out: Path):
    """On each of two ranks: bytes of DeepSpeed's tensors at ZeRO 1, 2 and 3, in bf16."""
    toy.config = lambda of=toy.config, **changes: of(**SMALL | changes)
    found = {}
    for stage in (1, 2, 3):
        args = sft.Args(zero_stage=stage, bf16=True, batch_size=16, micro_tokens=256)
        rank, world, _ = sft.init_distributed(args)
        model = sft.load_model("causal", "toy", toy.tokenizer(), args)
        policy = sft.Policy(model)
        engine = sft.Engine(policy, args, world)
        engine.set_rate(1e-3)
        optimizer, parameters = engine.deepspeed.optimizer, list(policy.parameters())
        weights = [p.ds_tensor if stage == 3 else p for p in parameters]
        masters = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
        engine.backward(engine(a_batch(), token_weight=0.01), last=False)  # gradients are kept
        where = {1: [p.grad for p in parameters], 2: optimizer.all_grad_tensors[0] if stage == 2 else [],
                 3: [optimizer.grad_partitions_flat_buffer] if stage == 3 else []}  # fmt: skip
        gradients = bytes_of(where[stage])
        bucket = next(iter(optimizer.ipg_buckets.values())).buffer
        if stage == 1:  # the others give theirs back between passes, or hold it as one tensor
            assert [x.numel() for x in bucket] == [plan.BUCKET]
        elif stage == 3:
            assert bucket.numel() == plan.BUCKET
        engine.backward(engine(a_batch(), token_weight=0.01))
        states = [x for state in optimizer.optimizer.state.values() for x in state.values() if x.dim()]
        found[stage] = {
            "weights": bytes_of(weights),
            "gradients": gradients,
            "optimizer": bytes_of([*masters, *states]),
        }
    (out / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_zero_stages_on_two_ranks(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(tmp_path),
    ]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for stage in (1, 2, 3):
        planned = job(sft, gpus=2, bf16=True, zero_stage=stage)
        expected = plan.trained_bytes(planned, *plan.parameters(planned, "causal", True))
        for part in ("weights", "gradients", "optimizer"):
            near(sum(rank[str(stage)][part] for rank in ranks) / 2, expected[part], 0.1)


# ---------------------------------------------------------------------------------------------------------- activations
NEOX = {"model_type": "gpt_neox", "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 4, "vocab_size": 512}  # fmt: skip


@pytest.mark.parametrize("family", [SMALL | {"model_type": "llama"}, NEOX], ids=["llama", "gpt_neox"])
@pytest.mark.parametrize("lora, dropout, bf16", [(0, 0.0, False), (4, 0.0, False), (4, 0.1, False), (0, 0.0, True)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_saves(checkpointing, lora, dropout, bf16, family):
    config = transformers.AutoConfig.for_model(**family, attention_dropout=0.0, hidden_dropout=0.0)
    flags = {"max_prompt_tokens": 24, "max_response_tokens": 40, "micro_tokens": 256, "bf16": bf16}
    planned = job(sft, config, gradient_checkpointing=checkpointing, lora_r=lora, lora_dropout=dropout, **flags)
    model, kept = transformers.AutoModel.from_config(config, dtype=torch.float32), {}
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model = (sft.add_lora(model, planned.args) if lora else model).train()
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    cast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        sft.plain(model)(input_ids=torch.randint(512, (4, 64)), use_cache=False)
    measured = sum(x.nbytes() for address, x in kept.items() if address not in weights)
    near(plan.activations(planned, 4, 64, checkpointing)[0], measured, 0.01)


def test_activations_of_llama_by_hand():
    """bf16, per token and layer: two norms (fp32 input, bf16 normalised, bf16 output), q, k, v after RoPE, attention's output
    and its log-sum-exp, and gate, its SiLU, up and their product. With checkpointing: a layer's input."""
    config = plan.config_of("meta-llama/Llama-3.2-3B")
    planned = job(dvpo, config, 8, bf16=True, max_prompt_tokens=512, max_response_tokens=512, micro_tokens=2048)
    d, f, heads, kv = 3072, 8192, 24 * 128, 8 * 128
    layer = 2 * (4 + 2 + 2) * d + 2 * 4 + 2 * (2 * heads + 2 * kv) + 4 * 24 + 4 * 2 * f
    one, two = (plan.saved(planned, k, False)[0] for k in (1, 2))
    assert two - one == layer * 2048
    one, two = (plan.saved(planned, k, True)[0] for k in (1, 2))
    assert two - one == 2 * d * 2048
    kept, again = plan.activations(planned, 2, 1024, True)
    near(kept, 28 * 2 * d * 2048, 0.15)
    assert layer * 2048 < again < 2 * layer * 2048


# ------------------------------------------------------------------------------------------------------------- the head
def peak_allocated(work):
    """Bytes at the peak of work(), beyond what there was."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events = [x for x in profile.profiler.kineto_results.events() if x.name() == "[memory]"]
    now = high = 0
    for event in sorted(events, key=lambda x: x.start_ns()):
        now += event.nbytes()
        high = max(high, now)
    return high


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("nll", [False, True])
def test_workspace_of_the_head(nll, trained, monkeypatch):
    monkeypatch.setenv("KERNELS_WORKSPACE_MB", "48")
    n, d, v = 1536, 2048, 12000
    planned = job(sft if nll else dvpo, toy.config(**SMALL | {"vocab_size": v, "hidden_size": d}))
    hidden, weight = torch.randn(n, d, requires_grad=True), torch.randn(v, d, requires_grad=trained)
    target = torch.randint(v, (n,))

    def work():
        if nll:
            linear_nll(hidden, weight, target, torch.full((n,), 1 / n)).backward()
        else:
            linear_logprob(hidden, weight, target).sum().backward()

    near(plan.head_bytes(planned, n, nll, trained), peak_allocated(work), 0.1)


# ----------------------------------------------------------------------------------------------------------- whole plans
def test_terms_of_a_plan_by_hand():
    script, args, config = plan.parsed("dvpo", "llama3.2-3b", [])
    found, n = plan.plan(script, args, config, 8), 3_212_749_824
    memory, frozen = found["memory"], 2 * (2 * n + n + 3073)
    near(memory["update"]["weights"], frozen, 1e-4)
    assert memory["update"]["optimizer"] == 12 * n / 8 and found["trained"] == n
    assert memory["update"]["gradients"] == 2 * n + 2 * 5e8
    keys = 28 * 2 * 8 * 128 * 2  # bytes of a token's keys and values
    assert memory["rollout"]["cache"] == 8 * 2048 * keys * (1 + 1 / 28)
    assert found["disk"] == 2 * n + 2 * 14 * n and found["host"] == 2 * (n + 3073)
    launches = 1024 * 1140 * 13e-6
    assert launches < found["seconds"]["rollout"] < 1.1 * launches
    body = n - 128256 * 3072
    update = (
        4 * 8 * (2048 * 4 * 2 * body + 1024 * 4 * 2 * 128256 * 3072) / (312e12 * 0.45)
    )  # epochs x responses of a rank
    assert update < found["seconds"]["update"] < 1.3 * update  # attention, and what ranks exchange
    parts = plan.plan(script, dataclasses.replace(args, zero_stage=3), config, 8)["memory"]
    near(parts["loading"]["weights"], frozen / 8, 1e-4)
    assert parts["rollout"]["gathered"] == 2 * n


def test_all_responses_to_a_prompt_are_drawn_at_once():
    assert [job(sample, batch_size=4, n=2, best_of=k).drawn for k in (1, 16)] == [4, 32]


def test_decoding_is_bound_by_bandwidth_where_kernels_are_captured():
    given = plan.parsed("sample", "llama3.2-3b", [])
    captured, launched = (plan.plan(*given, 1, "a100", us)["seconds"]["rollout"] for us in (0, 13))
    more = plan.plan(*given, 1, "h100", 0)["seconds"]["rollout"]
    assert more < captured <= launched


def test_changes_fit_and_are_the_fewest():
    given = (*plan.parsed("ppo", "llama3.2-3b", []), 1)
    limit, before = 40e9, plan.plan(*given)
    assert before["peak"] > limit
    found = plan.changes(limit, *given)
    assert found and len(found[0][0]) > 1 and all(after["peak"] <= limit for _, after in found)
    script, args, config, gpus = given
    for change, after in found:
        assert plan.plan(script, dataclasses.replace(args, **change), config, gpus)["peak"] == after["peak"]
        for flag in change if len(change) > 1 else ():  # one flag less is not enough
            fewer = {k: x for k, x in change.items() if k != flag}
            assert plan.plan(script, dataclasses.replace(args, **fewer), config, gpus)["peak"] > limit
    assert plan.changes(1e9, *given) == []


# ------------------------------------------------------------------------------------------------------ page and mistakes
def test_page_is_what_the_program_writes():
    assert (plan.ROOT / "docs" / "plan.md").read_text() == plan.table(), "run `python bench/plan.py --table`"


def test_a_plan_on_the_screen(tmp_path, capsys):
    transformers.LlamaConfig(**SMALL).save_pretrained(tmp_path)
    plan.main(["sft", "--model", str(tmp_path), "--bf16", "--gpus", "2"])
    shown = capsys.readouterr().out
    assert (
        "Computed, not measured" in shown and "80.0 GB: fits" in shown and "update" in shown and "rollout" not in shown
    )
    plan.main(["dvpo", "llama3-8b", "--zero_stage", "0", "--gpus", "1"])
    assert "does not fit, needs" in capsys.readouterr().out


@pytest.mark.parametrize(
    "line, told",
    [
        ("pppo", "unknown script 'pppo'"), ("", "name a script"), ("ppo llama4", "unknown preset 'llama4' of ppo.py"),
        ("ppo llama3-8b --lora 3", "ppo.py has no flag --lora"), ("ppo llama3-8b --lora_r x", "does not understand --lora_r x"),
        ("ppo llama3-8b --gpus 5", "must be a multiple of --gpus 5"), ("ppo llama3-8b --gpus x", "--gpus"),
        ("sft --model no/such", "no/such is neither a folder"), ("sample llama3-8b --rollout vllm", "--rollout vllm"),
        ("dvpo llama3.2-3b --batch_size 0", "--batch_size 0: give 1 or more"), ("sft llama3.2-3b --model toy", "is of the toy world"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(line, told, capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(line.split())
    error = capsys.readouterr()
    assert ended.value.code == 2 and told in error.err and error.err.count("\n") == 1 and not error.out


if __name__ == "__main__":
    measure_ranks(Path(sys.argv[1]))
