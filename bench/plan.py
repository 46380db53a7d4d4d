"""What a run needs, before it runs: memory of each GPU by phase, host memory, disk, seconds of a step. Computed, not measured.

    python bench/plan.py dvpo llama3.2-3b --gpus 8 --gpu_memory 80 --lora_r 16     # a script, its preset, its flags
    python bench/plan.py sft --model runs/sft/final --bf16 --gpus 1                # any folder with a config.json
    python bench/plan.py --table                                                   # writes docs/plan.md

Presets and flags are read from the script itself. Where the run does not fit, changes of flags are tried in the same
arithmetic, and the fastest of those that fit are named.

Parameters are those of transformers' model, built on the meta device. Saved activations are counted, not guessed: the
backbone runs forward under FakeTensorMode with one layer and with two, the bytes that autograd would keep are summed, and
the difference is what each further layer adds. Value and reward models are taken to be as large as the policy, and every
prompt and response to be as long as the limits allow: for real data these are upper bounds. Not counted: CUDA's context,
the allocator's unused pieces (a card of 80 GiB has 85 GB, of which such things may take 5), the libraries' own host
memory. GB are 1e9 bytes. `step` in passing: gradients in fp32; a layer computed again; what a forward pass needs.

Seconds: matrix products run at COMPUTE of the card's peak; decoding a token takes the longer of moving its bytes at
MEMORY of the bandwidth, and of starting its kernels from the host; ranks exchange at LINK of NVLink, not overlapped.
"""

import argparse
import contextlib
import copy
import dataclasses
import functools
import importlib
import io
import itertools
import json
import math
import re
import sys
import unittest.mock
import warnings
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
import transformers  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

import gvm  # noqa: E402
import sft  # noqa: E402
import toy  # noqa: E402
from kernels import head_name, model_class  # noqa: E402
from kernels.logprob import even_ranges, workspace_bytes  # noqa: E402

ARCHITECTURES = json.loads((ROOT / "bench" / "architectures.json").read_text())  # of public models that presets name
CARDS = {"a100": (312e12, 2.04e12, 300e9), "h100": (989e12, 3.35e12, 450e9)}  # bf16 FLOP/s, bytes/s; NVLink's, one way
COMPUTE, MEMORY, LINK = 0.45, 0.7, 0.6  # the attainable share of each, assumed
LAUNCHES = 1140 / 28  # kernels a layer that `generate` starts for a token
LIVE, BUCKET = 1e9, 5e8  # DeepSpeed's stage3_max_live_parameters and reduce_bucket_size
PHASES = ("loading", "rollout", "scoring", "update")
MODELS = {  # script: (trained, frozen), of `kernels.model_class`'s kinds
    "sft": ({"policy": "causal"}, {}), "rm": ({"reward model": "reward"}, {}), "gvm": ({"value model": "value"}, {}),
    "dvpo": ({"policy": "causal"}, {"reference": "causal", "GVM": "value"}),
    "vcb": ({"policy": "causal"}, {}), "dpo": ({"policy": "causal"}, {}),
    "ppo": ({"policy": "causal", "critic": "value"}, {"reference": "causal", "reward model": "reward"}),
    "reinforce": ({"policy": "causal"}, {"reference": "causal", "reward model": "reward"}),
    "rest": ({"policy": "causal"}, {}), "sample": ({}, {"policy": "causal", "reward model": "reward"}),
}  # fmt: skip


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def total(parts: dict) -> float:
    return sum(parts.values())


class Job:
    """A script's flags on `gpus` GPUs. Equal to another in what the cached counts below depend on."""

    def __init__(self, script, args, config, gpus: int):
        self.script, self.args, self.config, self.gpus, name = script, args, config, gpus, script.__name__
        self.name, self.lora, self.bytes = name, getattr(args, "lora_r", 0), 2 if args.bf16 else 4
        self.checkpointing, stage = getattr(args, "gradient_checkpointing", False), getattr(args, "zero_stage", 0)
        self.deepspeed = gpus > 1 or stage > 0
        self.stage = (stage or int(args.bf16)) if self.deepspeed and name != "sample" else 0
        self.part = 1 / gpus if self.stage == 3 else 1  # of weights
        self.trained, self.frozen = MODELS[name]
        if getattr(args, "share_backbone", False):
            self.frozen = {} if self.lora else {"reference and GVM": "causal"}
        self.length = args.max_prompt_tokens + args.max_response_tokens + (args.tau_tokens if name == "gvm" else 0)
        if config.model_type == "deberta-v2":
            self.length = min(self.length, config.max_position_embeddings)
        self.response = args.max_response_tokens / self.length  # the share of tokens that go through the LM head
        graded = 8 if args.data == "runs/sample/graded.jsonl" else 2  # sample.py's responses to a prompt; or a pair
        self.together = 2 if name == "rm" else getattr(args, "n", 0) or graded if name in ("vcb", "dpo") else 1
        self.tokens = tokens_per_pass(args, self.length * self.together)
        self.rows = max(1, self.tokens // self.length)
        self.tau = gvm.PAPER["tau_tokens"] if getattr(args, "tau_pairs", 0) and name == "dvpo" else 0
        self.rollouts = getattr(args, "rollout_batch_size", 0) // gpus
        if getattr(args, "rollout_batch_size", 0) % gpus:
            fail(f"--rollout_batch_size {args.rollout_batch_size} must be a multiple of --gpus {gpus}")
        again = 2 if getattr(args, "baseline", "") == "remax" else getattr(args, "best_of", 1)
        self.drawn = args.batch_size if name == "sample" else self.rollouts * again  # responses sampled at a time
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.embedding = config.vocab_size * config.hidden_size
        self.cache = 2 * self.layers * self.kv_heads * self.head_dim * self.bytes  # keys and values of a token
        fixed = [getattr(args, x, None) for x in ("bf16", "lora_r", "lora_dropout", "attention")]
        self.id = (name, config.to_json_string(), *fixed, self.deepspeed)

    def __hash__(self):
        return hash(self.id)

    def __eq__(self, other):
        return self.id == other.id

    def size(self, kind: str) -> int:
        return parameters(self, kind, False)[0]

    def largest(self) -> int:
        return max(map(self.size, [*self.trained.values(), *self.frozen.values()]))


def tokens_per_pass(args, together: int) -> int:
    """Tokens of one forward pass on one rank, padding included; at least those that must be in it `together`."""
    if hasattr(args, "micro_tokens"):
        return max(args.micro_tokens, together)
    return getattr(args, "micro_batch_size", 64) * together


# -------------------------------------------------------------------------------------------------- models on no device


def config_of(name: str):
    """The configuration of a folder or of a model in the table, without dropout, as `load_model` has it."""
    if name == "toy":
        config = toy.config()
    elif Path(name, "config.json").is_file():
        config = transformers.AutoConfig.from_pretrained(name).get_text_config()
    elif name in ARCHITECTURES:
        config = transformers.AutoConfig.for_model(**ARCHITECTURES[name])
    else:
        fail(f"{name} is neither a folder with a config.json nor one of {', '.join(ARCHITECTURES)}")
    for key in [k for k in config.to_dict() if "dropout" in k or "pdrop" in k]:
        setattr(config, key, 0.0)
    return config


def built(job: Job, kind: str, trained: bool, layers: int = 0, checkpointing: bool = False):
    """The model that the script holds, on the meta device, with LoRA where it is trained so; `backbone`: without a head."""
    args, config = job.args, copy.deepcopy(job.config)
    config.num_labels = 1
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    options = {"dtype": torch.bfloat16 if args.bf16 and (not trained or job.lora or job.deepspeed) else torch.float32}
    options |= {"attn_implementation": "eager"} if args.attention == "eager" else {}
    with torch.device("meta"):
        auto = transformers.AutoModel if kind == "backbone" else model_class(kind, config)
        model = auto.from_config(config, **options)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        if trained and job.lora:  # stage 3 would build in parts, by ranks that are not there
            given = SimpleNamespace(**vars(args) | {"zero_stage": int(job.deepspeed)})
            model = job.script.add_lora(model, given, head=head_name(model) if kind in ("value", "reward") else None)
    return model.train() if trained else model.requires_grad_(False)


@functools.cache
def parameters(job: Job, kind: str, trained: bool) -> tuple[int, int, int]:
    """(parameters, trained ones, bytes in the types that they are loaded in)."""
    sizes = [(p.numel(), p.requires_grad, p.element_size()) for p in built(job, kind, trained).parameters()]
    return sum(n for n, *_ in sizes), sum(n for n, on, _ in sizes if on), sum(n * b for n, _, b in sizes)


def saved(job: Job, layers: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes that autograd keeps of a backbone's forward pass, beside parameters; bytes of the largest tensor of them)."""
    model, kept = built(job, "backbone", True, layers, checkpointing), {}
    whole = unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda ids: None)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=job.args.bf16 and not job.deepspeed)
    with FakeTensorMode(), whole, cast:
        for store in (store for module in model.modules() for store in (module._parameters, module._buffers)):
            for name, x in ((name, x) for name, x in store.items() if x is not None):
                fake = torch.empty(x.shape, dtype=x.dtype)
                store[name] = torch.nn.Parameter(fake, x.requires_grad) if isinstance(x, torch.nn.Parameter) else fake
        weights = {p.untyped_storage()._cdata for p in model.parameters()}

        def pack(x):
            kept[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that its address is not used again
            return x

        ids, options = torch.zeros(job.rows, job.length, dtype=torch.long), {}
        if hasattr(job.config, "use_cache"):
            options["use_cache"] = False
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            sft.plain(model)(input_ids=ids, **options)
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in weights]
    return sum(sizes), max(sizes)


@functools.cache
def activations_of(job: Job, rows: int, length: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes that all layers keep; in passing: a layer that is computed again, and gradients in it)."""
    (one, largest), (two, _) = (saved(job, k, checkpointing) for k in (1, 2))
    again = activations_of(job, rows, length, False)[1] if checkpointing else two - one + 3 * largest
    return one + (job.layers - 1) * (two - one), again


def activations(job: Job) -> float:
    """Bytes at the peak of one forward and backward pass of the backbone."""
    kept, again = activations_of(job, job.rows, job.length, job.checkpointing)
    if job.checkpointing and job.args.bf16 and not job.deepspeed and not job.lora:
        again += 2 * job.largest()  # autocast keeps bf16 weights for the length of a forward pass
    return kept * job.tokens / (job.rows * job.length) + again


def head_bytes(job: Job, n: int, nll: bool, trained: bool) -> int:
    """What `linear_logprob` (or `linear_nll`) holds for n tokens in its backward pass, beside gradients that are kept."""
    v, d = job.config.vocab_size, job.config.hidden_size
    operand, weight = job.bytes, 2 if job.args.bf16 and (job.deepspeed or job.lora) else 4
    limit, logit = workspace_bytes(torch.device("cuda")), 4 if operand == 4 else 4 + operand
    if nll and operand == weight:
        chunks = even_ranges(n, limit // (v * operand), 1)
        gradient = weight if len(chunks) == 1 or weight == 4 else 4 + weight
        return chunks[0][1] * -(-v // 64) * 64 * operand + n * d * operand + trained * v * d * gradient
    columns = limit // (n * logit + (0 if weight == operand else 2 * d * operand))
    width = -(-even_ranges(v, columns, 128)[0][1] // 64) * 64
    return n * width * logit + n * d * logit + trained * v * d * weight


# -------------------------------------------------------------------------------------------------- memory, disk, seconds


def trained_bytes(job: Job, n: int, t: int, loaded: int) -> dict[str, float]:
    """Bytes of one GPU for a model of n parameters, t of them trained: as `Engine` and DeepSpeed hold them."""
    w, b, stage = job.gpus, job.bytes, job.stage
    if not job.deepspeed:
        return {"weights": loaded, "gradients": 4 * t, "optimizer": 8 * t, "bucket": 0, "step": 0}
    return {
        "weights": b * n * job.part,
        "gradients": b * t / (w if stage >= 2 else 1),
        "optimizer": (12 * t / w) if stage else 8 * t,  # fp32 copies of the weights, and AdamW's moments
        "bucket": b * (BUCKET if stage else min(t, BUCKET)),
        "step": (4 + b) * t / w if stage else 0,  # a rank's own part of the gradient, flat and in fp32
    }


def memory_of(job: Job) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes of one GPU}}."""
    args, config, b, stage_3 = job.args, job.config, job.bytes, job.stage == 3
    held = [trained_bytes(job, *parameters(job, kind, True)) for kind in job.trained.values()]
    weights = sum(x["weights"] for x in held) + sum(b * job.size(kind) * job.part for kind in job.frozen.values())
    gradients, optimizer, buckets = (sum(x[part] for x in held) for part in ("gradients", "optimizer", "bucket"))
    kept = gradients + buckets if stage_3 else 0  # its buffers stay
    states = {"weights": weights, "optimizer": optimizer, "gradients": kept}
    gathered = b * min(job.largest(), LIVE) if stage_3 else 0
    wide = (3 * getattr(config, "intermediate_size", 4 * config.hidden_size) + 4 * config.hidden_size) * b
    n_head, causal = max(1, round(job.tokens * job.response)), "causal" in job.trained.values()
    # stage 3 builds and cuts one tensor at a time; DeepSpeed makes the moments by a step with gradients of zeros
    passing = max(b * job.embedding * stage_3, *(x["optimizer"] / 3 * (job.stage > 0) for x in held), 0)
    phases = {"loading": {"weights": weights, "optimizer": optimizer * job.deepspeed, "passing": passing}}
    if job.drawn:
        whole = b * parameters(job, "causal", True)[0] if stage_3 else 0
        rows = job.drawn * (job.gpus if held else 1) + 4 * job.drawn  # of fp32 logits: noise is drawn for all ranks
        passing = max(job.drawn * args.max_prompt_tokens * wide, 4 * config.vocab_size * rows)
        cache = job.drawn * job.length * job.cache * (1 + 1 / job.layers)  # a layer's is copied as it grows
        phases["rollout"] = states | {"gathered": whole, "cache": cache, "passing": passing}
    if job.drawn or job.name in ("vcb", "dpo"):
        if job.name in ("vcb", "dpo") and args.reference:
            weights += b * job.size("causal") * job.part
        passing = gathered + wide * max(job.tokens, job.rows * (job.length + job.tau))
        head = head_bytes(job, n_head, False, False) if held else 0
        phases["scoring"] = states | {"weights": weights, "head": head, "passing": passing}
    if held:
        head = head_bytes(job, n_head, job.name in ("sft", "rest"), not job.lora) if causal else 0
        acts = max(activations(job), 0 if job.lora else b * job.embedding)  # the embedding's gradient comes last
        backward = {"gradients": gradients + buckets, "head": head, "activations": acts, "passing": gathered}
        step = max(x["step"] + (kept or gradients - x["gradients"]) for x in held)
        phases["update"] = states | max(backward, {"gradients": step}, key=total)
    return phases


def host_and_disk(job: Job) -> tuple[float, float]:
    """(host memory while loading: the file, mapped and shared, and copies in another type; checkpoints and final/)."""
    sizes, half = [parameters(job, kind, True) for kind in job.trained.values()], job.deepspeed or job.lora
    copies = 0 if job.args.bf16 and (half or not sizes) else 4 * job.gpus * job.largest()
    checkpoint = sum((12 + job.bytes * (job.stage < 3) if job.deepspeed else 12) * t for _, t, _ in sizes)
    final = max([(job.bytes if half else 4) * n for n, *_ in sizes], default=0)
    twice = 2 if getattr(job.args, "save_every", 0) else 0  # the old one goes once the new one is whole
    return 2 * job.largest() + copies, final + twice * checkpoint


def seconds_of(job: Job, card: str, launch_us: float) -> dict[str, float]:
    """{phase: seconds of a step}; of sample.py, of one batch on each rank."""
    args, b, w, length = job.args, job.bytes, job.gpus, job.length
    sizes = [parameters(job, kind, True) for kind in job.trained.values()]
    (flops, bandwidth, link), body = CARDS[card], job.size("backbone") - job.embedding

    def compute(tokens, times, head_tokens=0.0, head_times=0):
        attention = 2 * job.layers * job.heads * job.head_dim * length  # causal: half of two products of `length`
        work = times * tokens * (2 * body + attention) + head_times * head_tokens * 2 * job.embedding
        return work / (flops * COMPUTE)

    def exchange(size):
        return size * (w - 1) / w / (link * LINK)

    seconds, whole = {}, exchange(b * job.largest()) if job.stage == 3 else 0
    if job.drawn:
        group = job.heads // job.kv_heads  # keys and values are copied as they grow, and for every head of a group
        cached = job.drawn * (length - args.max_response_tokens / 2) * job.cache * (3 + 2 * group * (group > 1))
        moved = (b * (body + job.embedding) + cached) / (bandwidth * MEMORY)
        token = max(moved, launch_us * 1e-6 * LAUNCHES * job.layers)
        seconds["rollout"] = args.max_response_tokens * token + compute(job.drawn * args.max_prompt_tokens, 1) + whole
        rows, logps = job.rollouts or job.drawn, 2 if sizes else 0  # of policy and reference
        read = {"dvpo": rows * (length + job.tau), "ppo": (rows + job.drawn) * length}.get(job.name, job.drawn * length)
        read += logps * rows * length
        seconds["scoring"] = compute(read, 1, rows * args.max_response_tokens, logps)
        seconds["scoring"] += math.ceil(read / job.tokens) * whole
    if sizes:
        rows, causal = args.batch_size * job.together / w, "causal" in job.trained.values()  # of an optimizer step
        times = 2 if job.lora else 3
        head = (times + (job.name not in ("sft", "rest"))) * causal
        times = (times + job.checkpointing) * len(sizes)
        step = compute(rows * length, times, rows * args.max_response_tokens, head)
        for n, t, _ in sizes if job.deepspeed else ():
            step += exchange(math.ceil(rows * length / job.tokens) * b * (2 * n + t) if job.stage == 3 else 3 * b * t)
        seconds["update"] = step * (args.ppo_epochs * args.rollout_batch_size / args.batch_size if job.drawn else 1)
    return seconds


def plan(script, args, config, gpus: int, card: str = "a100", launch_us: float = 13) -> dict:
    """All that is printed, in bytes and seconds."""
    job = Job(script, args, config, gpus)
    memory, (host, disk) = memory_of(job), host_and_disk(job)
    trained = sum(parameters(job, kind, True)[1] for kind in job.trained.values())
    return {"memory": memory, "peak": max(map(total, memory.values())), "host": host, "disk": disk, "trained": trained,
            "seconds": seconds_of(job, card, launch_us)}  # fmt: skip


# -------------------------------------------------------------------------------------------- flags, changes, the table


def parsed(name: str, preset: str | None, argv: list[str]):
    """(the script, its Args, the model's configuration) of a command line."""
    import tyro

    if name not in MODELS:
        fail(f"unknown script {name!r}: choose from {', '.join(MODELS)}")
    script = importlib.import_module(name)
    if preset and preset not in script.PRESETS:
        fail(f"unknown preset {preset!r} of {name}.py: choose from {', '.join(script.PRESETS)}")
    read = functools.partial(tyro.cli, script.Args, args=argv, use_underscores=True)
    start = lambda args: getattr(args, "model", None) or args.policy
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            args = read(default=script.Args(**(script.PAPER | script.PRESETS[preset] if preset else {})))
            if not preset and not toy.is_model(start(args)):
                args = read(default=script.Args(**script.PAPER))
    except SystemExit:
        known = {field.name for field in dataclasses.fields(script.Args)}
        wrong = [x for x in argv if x.startswith("--") and x[2:].split("=")[0].removeprefix("no_") not in known]
        fail(f"{name}.py has no flag {wrong[0]}" if wrong else f"{name}.py does not understand {' '.join(argv)}")
    default = preset and start(args) == start(script.Args())
    return script, args, config_of(sft.PRESETS[preset]["model"] if default else start(args))


def changes(limit: float, script, args, config, gpus: int, *hardware) -> list[tuple[dict, dict]]:
    """The smallest sets of changed flags with which the run fits, the fastest first: [({flag: value}, plan), ...]."""
    values = {"share_backbone": [True], "gradient_checkpointing": [True], "lora_r": [16], "bf16": [True]}
    values["zero_stage"] = [x for x in (1, 2, 3) if gpus > 1 and x > getattr(args, "zero_stage", 3)]
    smaller = {"micro_tokens": 512, "micro_batch_size": 1, "max_response_tokens": 128}
    for flag, least in (smaller | {"batch_size": 8} if script.__name__ == "sample" else smaller).items():
        values[flag] = [x for x in (getattr(args, flag, 0) // k for k in (2, 4, 8)) if x >= least]
    values = {k: [x for x in v if x != getattr(args, k)] for k, v in values.items() if hasattr(args, k)}
    for size in (1, 2, 3):
        fits = []
        for flags in itertools.combinations([flag for flag in values if values[flag]], size):
            for chosen in itertools.product(*(values[flag] for flag in flags)):
                change = dict(zip(flags, chosen))
                found = plan(script, dataclasses.replace(args, **change), config, gpus, *hardware)
                fits += [(change, found)] if found["peak"] <= limit else []
        if fits:
            return sorted(fits, key=lambda x: total(x[1]["seconds"]))[:3]
    return []


def flags_of(change: dict) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in change.items())


def gb(x: float) -> str:
    return f"{x / 1e9:.1f}" if x < 99.95e9 else f"{x / 1e9:.0f}"


def show(found: dict, fits: list, limit: float):
    parts = list(dict.fromkeys(part for phase in found["memory"].values() for part in phase))
    print(f"{'GB per GPU':12}" + "".join(f"{part:>12}" for part in [*parts, "total"]))
    for name, phase in found["memory"].items():
        print(f"{name:12}" + "".join(f"{gb(x):>12}" for x in [*(phase.get(part, 0) for part in parts), total(phase)]))
    print(f"\nhost memory while loading {gb(found['host'])} GB, disk {gb(found['disk'])} GB; seconds a step "
          f"{total(found['seconds']):.1f}: " + ", ".join(f"{name} {x:.1f}" for name, x in found["seconds"].items()))  # fmt: skip
    no = "it does with" if fits else "no change of flags that was tried helps"
    print(
        f"{gb(limit)} GB: " + ("fits" if found["peak"] <= limit else f"does not fit, needs {gb(found['peak'])}; {no}")
    )
    for change, better in fits:
        print(f"  {flags_of(change):50} {gb(better['peak'])} GB, {total(better['seconds']):.1f} s a step")


def table(limit: float = 80e9) -> str:
    """docs/plan.md: every preset of every script on 8 GPUs, and the commands for one GPU in the scripts' first lines."""
    lines = ["# What the presets need", "", "Written by `python bench/plan.py --table`. Computed, not measured (`python bench/plan.py "
             "--help` says how): GB of each A100 of 80 GB, all sequences as long as the preset allows.", ""]  # fmt: skip
    for gpus in (8, 1):
        columns = ["loading", "rollout", "scoring", "update", "host GB", "disk GB", "s a step", "fits"]
        lines += [f"| {gpus} GPU{'s' * (gpus > 1)} | {' | '.join(columns)} |", "| --- |" + " ---: |" * 7 + " --- |"]
        for name in MODELS:
            script = importlib.import_module(name)
            alone = re.findall(rf"python {name}\.py (.*?) +# 1 GPU", script.__doc__)
            for line in script.PRESETS if gpus > 1 else alone:
                job = (*parsed(name, line.split()[0], line.split()[1:]), gpus)
                found = plan(*job)
                fits = [({}, None)] if found["peak"] <= limit else changes(limit, *job)
                told = "; ".join(flags_of(change) or "yes" for change, _ in fits) or "no"
                cells = [gb(total(found["memory"][p])) if p in found["memory"] else "–" for p in PHASES]
                cells += [gb(found["host"]), gb(found["disk"]), f"{total(found['seconds']):.1f}", told]
                lines.append(f"| `{name}.py {line}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    words = list(itertools.takewhile(lambda x: not x.startswith("-"), argv))
    parser = argparse.ArgumentParser(usage="plan.py SCRIPT [PRESET] [flags]", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--gpus", type=int, default=8, help="ranks, one GPU each, on one host")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GB of each")
    parser.add_argument("--card", choices=CARDS, default="a100")
    parser.add_argument("--launch_us", type=float, default=13, help="to start a kernel while decoding; 0: a CUDA graph")
    parser.add_argument("--table", action="store_true", help="write docs/plan.md")
    parser.error = lambda message: fail(message.splitlines()[0])
    own, rest = parser.parse_known_args(argv[len(words) :])
    if own.table:
        return (ROOT / "docs" / "plan.md").write_text(table())
    if not 1 <= len(words) <= 2 or own.gpus < 1:
        fail(f"name a script and perhaps a preset, and 1 GPU or more; scripts are {', '.join(MODELS)}")
    limit, name = own.gpu_memory * 1e9, words[0].removesuffix(".py")
    job = (*parsed(name, words[1] if words[1:] else None, rest), own.gpus, own.card, own.launch_us)
    found = plan(*job)
    print(f"{name}.py {' '.join([*words[1:], *rest])} on {own.gpus} x {own.card}: {found['trained'] / 1e9:.3f} B parameters trained. "
          "Computed, not measured: --help says how\n")  # fmt: skip
    show(found, [] if found["peak"] <= limit else changes(limit, *job), limit)


if __name__ == "__main__":
    main()
