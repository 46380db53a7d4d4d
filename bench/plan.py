"""What a run needs, before it runs: memory of each GPU by phase, host memory, disk, seconds of a step. Computed, not measured.

    python bench/plan.py dvpo llama3.2-3b --gpus 8 --gpu_memory 80 --lora_r 16     # a script, its preset, its flags
    python bench/plan.py sft --model runs/sft/final --bf16 --gpus 1                # any folder with a config.json
    python bench/plan.py --table                                                   # writes docs/plan.md

Presets and flags are the script's own. Where a run does not fit, changes of flags are tried in the same arithmetic.
Parameters and saved activations are counted, not guessed: transformers' model with one layer and with two is built on the
meta device, its backbone runs forward under FakeTensorMode, and the bytes that autograd would keep are summed; the
difference is what each further layer adds. Value and reward models are taken to be as large as the policy, prompts and
responses as long as the limits allow: for real data these are upper bounds. Not counted: CUDA's context, what the allocator
holds unused (a card of 80 GiB has 85 GB, such things may take 5), the libraries' own host memory. GB are 1e9 bytes.

Seconds: matrix products run at 0.45 of the card's peak; decoding a token takes the longer of moving its bytes at 0.7 of the
bandwidth and of starting its kernels, 41 a layer, from the host; ranks exchange at 0.6 of NVLink's rate, not overlapped.
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode

import gvm
import sft
import toy
from kernels import head_name, model_class
from kernels.logprob import even_ranges, workspace_bytes

warnings.filterwarnings("ignore", category=FutureWarning)
ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = json.loads((ROOT / "bench" / "architectures.json").read_text())  # of public models that presets name
CARDS = {"a100": (312e12, 2.04e12, 300e9), "h100": (989e12, 3.35e12, 450e9)}  # bf16 FLOP/s, bytes/s; NVLink's, one way
COMPUTE, MEMORY, LINK = 0.45, 0.7, 0.6  # the attainable share of each: assumed
LAUNCHES = 1140 / 28  # kernels a layer that `generate` starts for a token
LIVE, BUCKET = 1e9, 5e8  # DeepSpeed's stage3_max_live_parameters and reduce_bucket_size
PHASES = ("loading", "rollout", "scoring", "update", "step")
MODELS = {  # script: trained models and frozen ones, by their kinds in `kernels.model_class`
    "sft": (["causal"], []), "rm": (["reward"], []), "gvm": (["value"], []), "dvpo": (["causal"], ["causal", "value"]),
    "vcb": (["causal"], []), "dpo": (["causal"], []), "ppo": (["causal", "value"], ["causal", "reward"]),
    "reinforce": (["causal"], ["causal", "reward"]), "rest": (["causal"], []), "sample": ([], ["causal", "reward"]),
}  # fmt: skip


def fail(message: str):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


total = lambda parts: sum(parts.values())
gb = lambda x: f"{x / 1e9:.1f}" if x < 99.95e9 else f"{x / 1e9:.0f}"
flags_of = lambda change: " ".join(f"--{name}" if x is True else f"--{name} {x}" for name, x in change.items())


class Job:
    """A script's flags on `gpus` GPUs. Equal to another in what the cached counts below depend on."""

    def __init__(self, script, args, config, gpus: int):
        self.script, self.args, self.config, self.gpus, name = script, args, config, gpus, script.__name__
        flag = lambda key, absent=0: getattr(args, key, absent)
        self.name, self.lora, self.bytes = name, flag("lora_r"), 2 if args.bf16 else 4
        self.checkpointing, self.deepspeed = flag("gradient_checkpointing"), gpus > 1 or flag("zero_stage") > 0
        self.stage = flag("zero_stage") or int(args.bf16 and self.deepspeed and name != "sample")
        self.part = 1 / gpus if self.stage == 3 else 1  # of weights
        self.trained, self.frozen = MODELS[name]
        self.frozen = (["causal"] if not self.lora else []) if flag("share_backbone") else self.frozen
        if flag("rollout_batch_size") % gpus:
            fail(f"--rollout_batch_size {args.rollout_batch_size} must be a multiple of --gpus {gpus}")
        if flag("rollout") == "vllm":
            fail("--rollout vllm holds weights of its own and --cache_gb: plan another rollout, and add these")
        self.length = args.max_prompt_tokens + args.max_response_tokens + (args.tau_tokens if name == "gvm" else 0)
        if config.model_type == "deberta-v2":
            self.length = min(self.length, config.max_position_embeddings)
        self.response = args.max_response_tokens / self.length  # the share of tokens that go through the LM head
        graded = 8 if args.data == "runs/sample/graded.jsonl" else 2  # sample.py's responses to a prompt; or a pair
        self.together = 2 if name == "rm" else flag("n") or graded if name in ("vcb", "dpo") else 1
        self.tokens = max(args.micro_tokens, self.length * self.together)  # of a pass on one rank
        self.rows = max(1, self.tokens // self.length)
        self.tau = gvm.PAPER["tau_tokens"] if name == "dvpo" and args.tau_pairs else 0
        self.rollouts = flag("rollout_batch_size") // gpus
        again = 2 if flag("baseline") == "remax" else flag("best_of", 1)
        self.drawn = max(args.batch_size, args.n * again) if name == "sample" else self.rollouts * again  # at a time
        heads, kv_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", None)
        self.head_dim, self.heads = getattr(config, "head_dim", None) or config.hidden_size // heads, heads
        self.kv_heads, self.layers = kv_heads or heads, config.num_hidden_layers
        self.embedding = config.vocab_size * config.hidden_size
        self.casts = args.bf16 and not (self.deepspeed or self.lora or name == "sample")  # by autocast, of fp32 weights
        self.cache = self.layers * self.kv_heads * self.head_dim * (2 + self.casts) * self.bytes  # bytes of a token
        self.id = (name, config.to_json_string(), self.deepspeed, *map(flag, ("bf16", "lora_r", "lora_dropout")))

    __hash__, __eq__ = lambda self: hash(self.id), lambda self, other: self.id == other.id

    def size(self, *kinds: str) -> int:
        """Parameters of the largest of its models, or of these."""
        return max(parameters(self, kind, False)[0] for kind in kinds or self.trained + self.frozen)

    def sizes(self) -> list[tuple[int, int, int]]:
        return [parameters(self, kind, True) for kind in self.trained]


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
    config.update({key: 0.0 for key in config.to_dict() if "dropout" in key or "pdrop" in key})
    return config


def built(job: Job, kind: str, trained: bool, layers: int, checkpointing: bool = False):
    """The model that the script holds, on the meta device, with LoRA where it is trained so; `backbone`: without a head."""
    args, config = job.args, copy.deepcopy(job.config)
    config.num_labels, config.num_hidden_layers = 1, layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    half = args.bf16 and not (trained and job.casts)
    with torch.device("meta"):
        auto = transformers.AutoModel if kind == "backbone" else model_class(kind, config)
        model = auto.from_config(config, dtype=torch.bfloat16 if half else torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        if trained and job.lora:  # stage 3 would build in parts, by ranks that are not there
            given = SimpleNamespace(**vars(args) | {"zero_stage": int(job.deepspeed)})
            model = job.script.add_lora(model, given, head=head_name(model) if kind in ("value", "reward") else None)
    return model.train() if trained else model.requires_grad_(False)


@functools.cache
def parameters(job: Job, kind: str, trained: bool) -> tuple[int, int, int]:
    """(parameters, trained ones, bytes in the types that they are loaded in), from a layer and from two, as below."""
    found = []
    for layers in (1, 2):
        sizes = [(p.numel(), p.requires_grad, p.element_size()) for p in built(job, kind, trained, layers).parameters()]
        found.append((sum(n for n, *_ in sizes), sum(n for n, on, _ in sizes if on), sum(n * b for n, _, b in sizes)))
    return tuple(one + (job.layers - 1) * (two - one) for one, two in zip(*found, strict=True))


def saved(job: Job, layers: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes that autograd keeps of a backbone's forward pass, beside parameters; bytes of the largest tensor of them)."""
    model, kept = sft.plain(built(job, "backbone", True, layers, checkpointing)), {}
    options = {"use_cache": False} if hasattr(job.config, "use_cache") else {}
    whole = unittest.mock.patch("transformers.masking_utils.find_packed_sequence_indices", lambda ids: None)
    cast = torch.autocast("cpu", torch.bfloat16, enabled=job.args.bf16 and not job.deepspeed)

    def pack(x):
        kept[x.untyped_storage()._cdata] = x.untyped_storage()  # held, so that its address is not used again
        return x

    with FakeTensorMode(), whole, cast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        state = [*model.named_parameters(), *model.named_buffers()]
        state = {name: torch.empty(x.shape, dtype=x.dtype, requires_grad=x.requires_grad) for name, x in state}
        torch.func.functional_call(model, state, torch.zeros(job.rows, job.length, dtype=torch.long), options)
    weights = {x.untyped_storage()._cdata for x in state.values()}
    sizes = [storage.nbytes() for address, storage in kept.items() if address not in weights]
    return sum(sizes), max(sizes)


@functools.cache
def activations(job: Job, rows: int, length: int, checkpointing: bool) -> tuple[int, int]:
    """(bytes that all layers keep; in passing: a layer that is computed again, and gradients in it)."""
    (one, largest), (two, _) = (saved(job, k, checkpointing) for k in (1, 2))
    again = activations(job, rows, length, False)[1] if checkpointing else two - one + 3 * largest
    return one + (job.layers - 1) * (two - one), again


def head_bytes(job: Job, n: int, nll: bool, trained: bool) -> int:
    """What `linear_logprob` (or `linear_nll`) holds for n tokens in its backward pass, beside gradients that are kept."""
    v, d = job.config.vocab_size, job.config.hidden_size
    operand, weight = job.bytes, 4 if job.casts else job.bytes
    limit, logit = workspace_bytes(torch.device("cuda")), 4 if operand == 4 else 4 + operand
    if nll and operand == weight:
        chunks = even_ranges(n, limit // (v * operand), 1)
        gradient = weight if len(chunks) == 1 or weight == 4 else 4 + weight
        return chunks[0][1] * -(-v // 64) * 64 * operand + n * d * operand + trained * v * d * gradient
    columns = limit // (n * logit + (0 if weight == operand else 2 * d * operand))
    width = -(-even_ranges(v, columns, 128)[0][1] // 64) * 64
    return n * width * logit + n * d * logit + trained * v * d * weight


def trained_bytes(job: Job, n: int, t: int, loaded: int) -> dict[str, float]:
    """Bytes of one GPU for a model of n parameters, t of them trained: as `Engine` and DeepSpeed hold them."""
    w, b, stage = job.gpus, job.bytes, job.stage
    if not job.deepspeed:
        return {"weights": loaded, "gradients": 4 * t, "optimizer": 8 * t, "bucket": 0, "step": 0}
    return {
        "weights": b * n * job.part,
        "gradients": b * t / (w if stage >= 2 else 1),
        "optimizer": (12 * t / w) if stage else 8 * t,  # fp32 copies of the weights, and AdamW's moments
        "bucket": b * ((BUCKET if stage else min(t, BUCKET)) + t / w * (stage == 2)),  # stage 2: a pass beside the sum
        "step": (4 + b) * t / w if stage else 0,  # a rank's own part of the gradient, flat and in fp32
    }


def memory_of(job: Job) -> dict[str, dict[str, float]]:
    """{phase: {part: bytes of one GPU}}."""
    args, config, b, stage_3 = job.args, job.config, job.bytes, job.stage == 3
    held = [trained_bytes(job, *size) for size in job.sizes()]
    weights = sum(x["weights"] for x in held) + sum(b * job.size(kind) * job.part for kind in job.frozen)
    gradients, optimizer, buckets = (sum(x[part] for x in held) for part in ("gradients", "optimizer", "bucket"))
    kept = gradients + buckets if stage_3 else 0  # its buffers stay
    states = {"weights": weights, "optimizer": optimizer, "gradients": kept}
    gathered = b * min(job.size(), LIVE) if stage_3 else 0
    wide = (3 * getattr(config, "intermediate_size", 4 * config.hidden_size) + 4 * config.hidden_size) * b
    n_head, casts = max(1, round(job.tokens * job.response)), 2 * job.size() * job.casts  # bf16 copies, kept for a pass
    # stage 3 builds and cuts one tensor at a time; DeepSpeed makes the moments by a step with gradients of zeros
    passing = max(b * job.embedding * stage_3, *(x["optimizer"] / 3 * (job.stage > 0) for x in held), 0)
    phases = {"loading": {"weights": weights, "optimizer": optimizer * job.deepspeed, "passing": passing}}
    if job.drawn:
        whole = b * parameters(job, "causal", True)[0] if stage_3 else 0
        rows = job.drawn * (job.gpus if held else 1) + 4 * job.drawn  # of fp32 logits: noise is drawn for all ranks
        passing = max(job.drawn * args.max_prompt_tokens * wide, 4 * config.vocab_size * rows)
        cache = job.drawn * job.length * job.cache * (1 + 1 / job.layers)  # a layer's is copied as it grows
        phases["rollout"] = states | {"gathered": whole, "cache": cache, "passing": passing + casts}
    if job.drawn or job.name in ("vcb", "dpo"):
        if job.name in ("vcb", "dpo") and args.reference:
            weights += b * job.size("causal") * job.part
        passing = gathered + casts + wide * max(job.tokens, job.rows * (job.length + job.tau))
        head = head_bytes(job, n_head, False, False) if held else 0
        phases["scoring"] = states | {"weights": weights, "head": head, "passing": passing}
    if held:
        kept_bytes, again = activations(job, job.rows, job.length, job.checkpointing)
        again += kept_bytes * job.tokens / (job.rows * job.length)
        again += casts if job.checkpointing else 0  # without, they are among what is saved
        again = max(again, 0 if job.lora else b * job.embedding)  # the embedding's gradient comes last
        head = head_bytes(job, n_head, job.name in ("sft", "rest"), not job.lora) if "causal" in job.trained else 0
        backward = {"gradients": gradients + buckets, "head": head, "activations": again, "passing": gathered}
        step = max(x["step"] + (kept or gradients - x["gradients"]) for x in held)
        phases |= {"update": states | backward, "step": states | {"gradients": step}}
    return phases


def seconds_of(job: Job, card: str, launch_us: float) -> dict[str, float]:
    """{phase: seconds of a step}; of sample.py, of one batch on each rank."""
    args, b, w, length, sizes = job.args, job.bytes, job.gpus, job.length, job.sizes()
    (flops, bandwidth, link), body = CARDS[card], job.size("backbone") - job.embedding

    def compute(tokens, times, head_tokens=0.0, head_times=0):
        attention = 2 * job.layers * job.heads * job.head_dim * length  # causal: half of two products of `length`
        work = times * tokens * (2 * body + attention) + head_times * head_tokens * 2 * job.embedding
        return work / (flops * COMPUTE)

    response, exchange = args.max_response_tokens, lambda size: size * (w - 1) / w / (link * LINK)
    seconds, whole = {}, exchange(b * job.size()) if job.stage == 3 else 0
    if job.drawn:
        group = job.heads // job.kv_heads  # keys and values are copied as they grow, and for every head of a group
        cached = job.drawn * (length - response / 2) * job.cache * (3 + 2 * group * (group > 1))
        moved = cached + b * (body + job.embedding)
        token = max(moved / (bandwidth * MEMORY), launch_us * 1e-6 * LAUNCHES * job.layers)
        seconds["rollout"] = response * token + compute(job.drawn * args.max_prompt_tokens, 1) + whole
        rows, logps = job.rollouts or job.drawn, 2 if sizes else 0  # of policy and reference
        read = (logps * rows + job.drawn + rows * (job.name == "ppo")) * length + rows * job.tau
        seconds["scoring"] = compute(read, 1, rows * response, logps) + math.ceil(read / job.tokens) * whole
    if sizes:
        rows, times = args.batch_size * job.together / w, 2 if job.lora else 3  # sequences of an optimizer step
        head = (times + (job.name not in ("sft", "rest"))) * ("causal" in job.trained)
        step = compute(rows * length, (times + job.checkpointing) * len(sizes), rows * response, head)
        for n, t, _ in sizes if job.deepspeed else ():
            step += exchange(math.ceil(rows * length / job.tokens) * b * (2 * n + t) if job.stage == 3 else 3 * b * t)
        seconds["update"] = step * (args.ppo_epochs * args.rollout_batch_size / args.batch_size if job.drawn else 1)
    return seconds


def plan(script, args, config, gpus: int, card: str = "a100", launch_us: float = 13) -> dict:
    """All that is printed, in bytes and seconds. Host memory while loading: the file, mapped and shared, and copies in fp32."""
    job = Job(script, args, config, gpus)
    memory, sizes, half = memory_of(job), job.sizes(), job.deepspeed or job.lora
    copies = 0 if args.bf16 and (half or not sizes) else 4 * gpus * job.size()
    checkpoint = sum((12 + job.bytes * (job.stage < 3) if job.deepspeed else 12) * t for _, t, _ in sizes)
    disk = max([(job.bytes if half else 4) * n for n, *_ in sizes], default=0)  # final/
    disk += 2 * checkpoint if getattr(args, "save_every", 0) else 0  # the old one goes once the new one is whole
    return {"memory": memory, "peak": max(map(total, memory.values())), "host": 2 * job.size() + copies, "disk": disk,
            "seconds": seconds_of(job, card, launch_us), "trained": sum(t for _, t, _ in sizes)}  # fmt: skip


def parsed(name: str, preset: str | None, argv: list[str]):
    """(the script, its Args, the model's configuration) of a command line."""
    if name not in MODELS:
        fail(f"unknown script {name!r}: choose from {', '.join(MODELS)}")
    script = importlib.import_module(name)
    if preset and preset not in script.PRESETS:
        fail(f"unknown preset {preset!r} of {name}.py: choose from {', '.join(script.PRESETS)}")
    start, said = lambda args: getattr(args, "model", None) or args.policy, io.StringIO()
    read = unittest.mock.patch.object(script, "train")  # the script reads its flags, and does not run
    try:
        with read as train, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            script.main([preset] * bool(preset) + argv)
    except SystemExit:
        if told := re.findall("^error: (.*)$", said.getvalue(), re.M):  # the script's own line
            fail(told[0])
        wrong = [x for x in argv if x[:2] == "--" and not hasattr(script.Args, x[2:].split("=")[0].removeprefix("no_"))]
        fail(f"{name}.py has no flag {wrong[0]}" if wrong else f"{name}.py does not understand {' '.join(argv)}")
    args = train.call_args.args[0]
    default = preset and start(args) == start(script.Args())
    return script, args, config_of(sft.PRESETS[preset]["model"] if default else start(args))


def changes(limit: float, script, args, config, gpus: int, *hardware) -> list[tuple[dict, dict]]:
    """The smallest sets of changed flags with which it fits, the fastest first, but last what trains something else."""
    values = {"share_backbone": [True], "gradient_checkpointing": [True], "lora_r": [16], "bf16": [True]}
    values["zero_stage"] = [x for x in (1, 2, 3) if gpus > 1 and x > getattr(args, "zero_stage", 3)]
    smaller = {"micro_tokens": 512, "max_response_tokens": 128}
    for flag, least in (smaller | {"batch_size": 8} if script.__name__ == "sample" else smaller).items():
        values[flag] = [x for x in (getattr(args, flag, 0) // k for k in (2, 4, 8)) if x >= least]
    values = {k: new for k, v in values.items() if (new := [x for x in v if x != getattr(args, k, x)])}
    for size in (1, 2, 3):
        sets = itertools.combinations(values, size)
        sets = [zip(flags, x) for flags in sets for x in itertools.product(*(values[flag] for flag in flags))]
        tried = [(x, plan(script, dataclasses.replace(args, **x), config, gpus, *hardware)) for x in map(dict, sets)]
        fits = {tuple(x): (x, found) for x, found in reversed(tried) if found["peak"] <= limit}  # the mildest values
        if fits:
            other = lambda x: "lora_r" in x or "max_response_tokens" in x
            return sorted(fits.values(), key=lambda x: (other(x[0]), total(x[1]["seconds"])))[:3]
    return []


def table() -> str:
    """docs/plan.md: every preset of every script on 8 GPUs, and the commands for one GPU in the scripts' first lines."""
    lines = ["# What the presets need", "", "Written by `python bench/plan.py --table`. Computed, not measured (`python bench/plan.py "
             "--help` says how): GB of each A100 of 80 GB, seconds of a step, all sequences as long as the preset allows. A GPU needs the largest "
             "of its phases. vcb.py and dpo.py score once, before the first step.", ""]  # fmt: skip
    limit = 80e9
    for gpus in (8, 1):
        lines += [f"| {gpus} GPU{'s' * (gpus > 1)} | loading | rollout | scoring | update | optimizer step | host GB | disk GB "
                  "| s a step | fits |", "| --- |" + " ---: |" * 8 + " --- |"]  # fmt: skip
        for name in MODELS:
            script = importlib.import_module(name)
            alone = re.findall(rf"python {name}\.py (.*?) +# 1 GPU", script.__doc__)
            for line in script.PRESETS if gpus > 1 else [x for x in alone if "vllm" not in x]:
                job = (*parsed(name, line.split()[0], line.split()[1:]), gpus)
                found = plan(*job)
                fits = [({}, None)] if found["peak"] <= limit else changes(limit, *job)
                told = "; ".join(flags_of(change) or "yes" for change, _ in fits) or "no"
                cells = [gb(total(found["memory"][x])) if x in found["memory"] else "–" for x in PHASES]
                cells += [gb(found["host"]), gb(found["disk"]), f"{total(found['seconds']):.1f}", told]
                lines.append(f"| `{name}.py {line}` | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str]):
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
    fits = [] if found["peak"] <= limit else changes(limit, *job)
    print(f"{name}.py {' '.join([*words[1:], *rest])} on {own.gpus} x {own.card}: {found['trained'] / 1e9:.3f} B parameters trained. "
          "Computed, not measured: --help says how\n")  # fmt: skip
    parts = list(dict.fromkeys(part for phase in found["memory"].values() for part in phase))
    print(f"{'GB per GPU':12}" + "".join(f"{part:>12}" for part in [*parts, "total"]))
    for phase, of in found["memory"].items():
        print(f"{phase:12}" + "".join(f"{gb(x):>12}" for x in [*(of.get(part, 0) for part in parts), total(of)]))
    print(f"\nhost memory while loading {gb(found['host'])} GB, disk {gb(found['disk'])} GB; seconds a step "
          f"{total(found['seconds']):.1f}: " + ", ".join(f"{phase} {x:.1f}" for phase, x in found["seconds"].items()))  # fmt: skip
    no = f"does not fit, needs {gb(found['peak'])}; {'it does with' if fits else 'no change that was tried helps'}"
    print(f"{gb(limit)} GB: {'fits' if found['peak'] <= limit else no}")
    for change, better in fits:
        print(f"  {flags_of(change):50} {gb(better['peak'])} GB, {total(better['seconds']):.1f} s a step")


if __name__ == "__main__":
    main(sys.argv[1:])
