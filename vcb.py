"""Value-based Calibration (VCB): the gap of log-ratios of any two responses is made proportional to their reward gap.

Off-policy: the SFT model drew n responses per prompt and a reward model scored them (sample.py). With sums of log-probs over
a response's tokens,

    s_i  = gamma (log pi(y_i|x) - log pi_sft(y_i|x)) - r(x, y_i) / sigma(x)       eq. 9; sigma: std of the n rewards, eq. 10
    l_ij = (s_i - s_j)^2                                                          eq. 19
    L(x) = lam log sum_{i<=j} exp(l_ij / lam)                                     eq. 20             `kernels.vcb_loss`

At its optimum pi is pi_sft exp(r / (gamma sigma)) / Z: no partition function is needed, since differences cancel it, and the
reward *values* stay in the loss, where DPO and its like (dpo.py) keep their order only. All n responses of a prompt are in one
step. With n = 2 the normalised gap is 2 whatever the rewards are: use n >= 4.

`--pairs full` is the code of the paper's appendix (all i, j; half the square; ddof 1), `mean` its ablation without the
log-sum-exp. The reference's log-probs are computed once, before the first step, and kept with the data, so training holds
one model. Paper: gamma 0.05, lam 1, AdamW, 1 epoch, 500 warm-up steps, clipping 1.0; its learning rate and batch are not
readable in the copy that we have: the presets take those of DPO.

    python vcb.py                                                    # CPU: the toy world, runs/sample/graded.jsonl
    python vcb.py pythia-2.8b-hh --lora_r 16                         # 1 GPU
    torchrun --nproc_per_node 8 vcb.py pythia-2.8b-hh                # 8 GPUs, the paper's setting
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gzip
import hashlib
import importlib.util
import io
import json
import math
import os
import random
import re
import resource
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm

from kernels import linear_logprob, linear_nll, vcb_loss
from kernels.vcb import normalized_reward


@dataclass
class Args:
    policy: str = "runs/sft/final"
    """the policy to optimise, who drew the responses: a Hugging Face folder or hub name with a chat template"""
    reference: str = ""
    """the frozen reference, gone once its log-probs are known; default: the starting policy"""
    data: str = "runs/sample/graded.jsonl"
    """graded rows `prompt, responses: [{text, score}]` from sample.py, a hub name, or a file; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[80%:]` (of a fixed shuffle), `train[2000:4000]`"""
    output_dir: str = "runs/vcb"
    """the run's folder: args.json, metrics.jsonl, ref_logp.json, checkpoints/, final/"""
    seed: int = 0
    """seed of data order and dropout"""
    n: int = 0
    """take the first n responses of a row; 0 takes all"""
    pairs: Literal["upper", "full", "mean"] = "upper"
    """i <= j (eq. 20), the paper's code, or a plain mean without log-sum-exp: three different losses"""
    gamma: float = 0.25
    """KL strength, in standard deviations of a prompt's rewards (paper: 0.05); the optimum's KL is about 1 / (2 gamma^2) nats"""
    lam: float = 1.0
    """temperature of the log-sum-exp over pairs (paper: hardly matters)"""
    epochs: int = 2
    """passes over the data (paper: 1)"""
    steps: int = 0
    """stop after this many optimizer steps; 0 means all epochs"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW, linear to zero"""
    warmup_steps: int = 10
    """steps of linear warm-up (paper: 500)"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping by global norm; 0 turns it off"""
    batch_size: int = 8
    """prompts, each with all its responses, per optimizer step, over all ranks"""
    micro_batch_size: int = 8
    """prompts per forward pass on one rank"""
    max_prompt_tokens: int = 64
    """a longer prompt is an error, or left out with --drop_long_prompts"""
    max_response_tokens: int = 48
    """a longer response is cut, and then has no EOS; sample.py's own limit keeps what it drew"""
    drop_long_prompts: bool = False
    """leave out rows whose prompt is longer than --max_prompt_tokens instead of stopping"""
    lora_r: int = 0
    """rank of LoRA adapters on all linear layers; 0 trains all weights"""
    lora_alpha: int = 32
    """LoRA's alpha"""
    lora_dropout: float = 0.0
    """LoRA's dropout"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage; one process with stage 0 needs no DeepSpeed"""
    bf16: bool = False
    """bfloat16 matrix products (GPU)"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """PyTorch's own, flash-attn (to be installed), or the plain product"""
    save_every: int = 0
    """steps between checkpoints to resume from; 0 writes none"""
    snapshot_every: int = 0
    """steps between copies of the policy in snapshots/, for curves over training; 0 keeps none"""
    resume: bool = False
    """continue from the last checkpoint in --output_dir, bit for bit"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


_paper = Args(
    gamma=0.05, epochs=1, learning_rate=1e-6, warmup_steps=500, batch_size=64, micro_batch_size=1, max_prompt_tokens=512,
    max_response_tokens=256, drop_long_prompts=True, gradient_checkpointing=True, bf16=True, zero_stage=1, save_every=500,
)  # fmt: skip
PRESETS: dict[str, Args] = {
    "pythia-2.8b-hh": _paper,
    "llama3.2-3b": dataclasses.replace(_paper, max_prompt_tokens=1024, max_response_tokens=1024),
    "llama3-8b": dataclasses.replace(_paper, max_prompt_tokens=1024, max_response_tokens=1024, zero_stage=3),
}


# ---------------------------------------------------------------------------------------------------- the mathematics


def calibration(log_ratio, reward, mask, gamma: float, *, pairs: str = "upper"):
    """What the loss is about, for the log: (3,) sums of |s_i - s_j| and of misaligned pairs over the pairs i < j with
    different rewards, and the number of such pairs; all (B, n).

    A pair with r_i > r_j is misaligned where log_ratio_i <= log_ratio_j (appendix A.5); at pi = pi_sft all are."""
    s = gamma * log_ratio - normalized_reward(reward, mask, ddof=1 if pairs == "full" else 0)
    first, second = torch.triu_indices(reward.shape[1], reward.shape[1], 1, device=reward.device)
    gap = reward[:, first] - reward[:, second]
    counts = mask[:, first] & mask[:, second] & (gap != 0)
    misaligned = (gap * (log_ratio[:, first] - log_ratio[:, second]) <= 0) & counts
    spread = torch.where(counts, (s[:, first] - s[:, second]).abs(), 0)
    return torch.stack([spread.sum(), misaligned.sum(), counts.sum()])


def reweighted_kl(log_ratio, mask):
    """(B,) KL of the policy to the reference on responses that the reference drew: the KL to uniform of their weights
    softmax(log_ratio), so log n at most."""
    logw = log_ratio.masked_fill(~mask, -torch.inf).log_softmax(1)
    count = mask.sum(1).clamp(min=1)
    return torch.where(mask, logw.exp() * (logw + count[:, None].log()), 0).sum(1)


def floor(count, *, lam: float, pairs: str):
    """(B,) the loss's least value for prompts of (B,) responses: the losses' logs start from it."""
    return {"upper": lam * (count * (count + 1) / 2).log(), "full": 2 * lam * count.log(), "mean": 0 * count}[pairs]


# ----------------------------------------------------------------------------------------------------- data, reference


@dataclass
class Group:
    """A prompt with its responses: (prompt ids, response ids) each, their rewards, and the reference's log-probs."""

    prompt: str | list[dict]
    rows: list[tuple[list[int], list[int]]]
    rewards: list[float]
    ref_logp: list[float] = dataclasses.field(default_factory=list)


def load_groups(tokenizer, args, name: str, split: str, pairs_too: bool = False) -> list[Group]:
    """Prompts with two or more scored responses; with `pairs_too` also `chosen, rejected`, which score 1 and -1."""
    groups, single = [], 0
    for row, where in load_rows(name, split, "graded", args.seed):
        if pairs_too and "chosen" in row and "rejected" in row:
            responses = [{"text": row["chosen"], "score": 1.0}, {"text": row["rejected"], "score": -1.0}]
        elif "responses" in row:
            responses = row["responses"][: getattr(args, "n", 0) or None]
        else:
            stop(f"{where}: no field responses: graded rows are needed, `python sample.py` writes them")
        found = Group(row.get("prompt"), [], [])
        for response in responses:
            score = response.get("score")
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                stop(f"{where}: field score is {score!r}, not a finite number")
            prompt, ids = encode(
                tokenizer, {"prompt": row.get("prompt"), "text": response.get("text")}, "text", where, args
            )
            if prompt is not None:
                found.rows.append((prompt, ids))
                found.rewards.append(float(score))
        single += len(found.rows) == 1
        if len(found.rows) > 1:
            groups.append(found)
    if not groups:
        stop(f"{name} ({split}) has no prompt with two responses or more to compare ({single} with one): "
             "draw more with `python sample.py --n 8`")  # fmt: skip
    if single and int(os.environ.get("RANK", 0)) == 0:
        print(f"{single} prompts with one response are left out: there is nothing to compare it with")
    return groups


def sequence_logps(policy, rows, pad_token_id: int, size: int, rank: int, world: int, device) -> list[float]:
    """log pi(y|x), summed over tokens, of (prompt ids, response ids) rows, shared out over the ranks."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]) + len(rows[i][1]))
    order += (order * world)[: -len(order) % world]  # every rank takes as many
    found = []
    with torch.no_grad():
        for at in range(rank, len(order), size * world):
            batch = collate([rows[i] for i in order[at : at + size * world : world]], pad_token_id)
            found.append(policy(batch.to(device)).sum(1))
    parts = gather_lists(torch.cat(found).tolist(), world)
    found = [0.0] * len(rows)
    for r in range(world):
        for k, i in enumerate(order[r::world]):
            found[i] = parts[r * (len(order) // world) + k]
    return found


def add_reference(groups, engine, run, tokenizer, args, rank: int, world: int, device):
    """Gives every group the reference's log-probs: of the policy before its first step, or of --reference, which is
    loaded for this alone. Kept in the run folder for --resume, when the policy is no longer the reference."""
    path = run.folder / "ref_logp.json"
    rows = [row for group in groups for row in group.rows]
    data = hashlib.sha256(json.dumps([args.reference or args.policy, rows]).encode()).hexdigest()
    if args.resume and path.is_file():
        saved = json.loads(path.read_text())
        if saved["data"] != data:
            stop(f"--resume: data or reference are not those that {run.folder} was begun with: give the same flags, or "
                 "another --output_dir")  # fmt: skip
        logps = saved["logps"]
    else:
        engine.module.eval()
        policy = engine
        if args.reference and args.reference != args.policy:
            reference = load_model("causal", args.reference, tokenizer, args, frozen=True)
            policy = Policy(reference, torch.float32).to(device)
        size = args.micro_batch_size * max(len(group.rows) for group in groups)
        logps = sequence_logps(policy, rows, tokenizer.pad_token_id, size, rank, world, device)
        if rank == 0:
            path.with_suffix(".part").write_text(json.dumps({"data": data, "logps": logps}))
            path.with_suffix(".part").rename(path)
    logps = iter(logps)
    for group in groups:
        group.ref_logp = [next(logps) for _ in group.rows]


def padded(lists, device, fill: float = 0.0):
    """(B, n) fp32 of lists of different lengths."""
    width = max(map(len, lists))
    return torch.tensor([[*x, *[fill] * (width - len(x))] for x in lists], device=device)


def policy_logps(engine, micro, tokenizer, device):
    """logp (B, n) of a micro-batch of groups, differentiable, its mask (B, n), and the groups. A row that only
    fills the batch up has an empty mask."""
    groups = [group for *_, group in micro]
    counts = torch.tensor([len(group.rows) for group in groups])
    real = torch.tensor([bool(longest) for _, longest, _ in micro])
    where = torch.arange(int(counts.max())) < counts[:, None]
    batch = collate([row for group in groups for row in group.rows], tokenizer.pad_token_id)
    logp = engine(batch.to(device)).sum(1)
    logp = logp.new_zeros(where.numel()).index_copy(0, where.flatten().nonzero()[:, 0].to(device), logp)
    return logp.view(where.shape), (where & real[:, None]).to(device), groups


# ------------------------------------------------------------------------------------------------------------ training


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    missing(args.policy, "python sft.py")
    tokenizer = load_tokenizer(args.policy, args)
    if args.data == Args.data and not Path(args.data).is_file():
        stop(f"{args.data} does not exist: run `python sample.py` first, or name other graded rows with --data")
    groups = load_groups(tokenizer, args, args.data, args.split)
    torch.manual_seed(args.seed)
    model = load_model("causal", args.policy, tokenizer, args)
    model = add_lora(model, args) if args.lora_r else model
    policy = Policy(model, torch.float32).to(device)

    per_epoch = math.ceil(len(groups) / args.batch_size)
    total = args.steps or args.epochs * per_epoch
    engine = Engine(policy, args, world)
    run = Run(args, engine, rank, total, started, bar=("loss", "misaligned"))
    add_reference(groups, engine, run, tokenizer, args, rank, world, device)
    torch.manual_seed(args.seed + 1000 + rank)  # dropout; a resumed run restores the generator's state instead
    run.restore()
    policy.train()
    for step in range(run.step, total):
        order = shuffled(len(groups), args.seed, step // per_epoch)
        at = (step % per_epoch) * args.batch_size
        chosen = [groups[i] for i in order[at : at + args.batch_size]]
        batch = [([], [0] * sum(len(r) for _, r in q.rows), q) for q in chosen]
        sums = torch.zeros(7, device=device)
        engine.set_rate(args.learning_rate * schedule(step, total, args.warmup_steps, "linear"))
        for micro in micro_batches(batch, rank, world, args):
            logp, mask, asked = policy_logps(engine, micro, tokenizer, device)
            ref_logp, reward = (padded([getattr(q, x) for q in asked], device) for x in ("ref_logp", "rewards"))
            losses = vcb_loss(logp, ref_logp, reward, gamma=args.gamma, lam=args.lam, pairs=args.pairs, mask=mask)
            loss = losses.sum() / len(batch)
            engine.backward(loss)
            log_ratio = logp.detach() - ref_logp
            least = floor(mask.sum(1).clamp(min=1).float(), lam=args.lam, pairs=args.pairs)
            drift = torch.stack([-(log_ratio * mask).sum(), mask.sum(), reweighted_kl(log_ratio, mask).sum()])
            sums += torch.cat(
                [
                    (loss.detach() - least.sum() / len(batch))[None],
                    calibration(log_ratio, reward, mask, args.gamma, pairs=args.pairs),
                    drift,
                ]
            )
        grad_norm = engine.step()
        loss, gap, misaligned, pairs, drift, responses, kl = all_sum(sums)
        run.log(
            {
                "loss": loss,  # above its floor
                "pair_gap": gap / pairs,  # mean |s_i - s_j|: 0 when calibrated
                "misaligned": misaligned / pairs,
                "reweighted_kl": kl / len(batch),  # KL(policy || reference) on these responses, log n at most
                "forward_kl": drift / responses,  # KL(reference || policy)
                "learning_rate": engine.rate,
                "grad_norm": grad_norm,
            }
        )
        run.snapshot(model, tokenizer)
    return run.finish(model, tokenizer)


def main(argv=None):
    train(parse_args(Args, PRESETS, argv, __doc__))


# ====================================================================================================================
# Plumbing: data, models, engine, run folder. The same text in every script (tests/test_copies.py).
# ====================================================================================================================


# Copied from dvpo.gather_lists
def gather_lists(lists: list, world: int) -> list:
    """The ranks' lists, joined in order of rank."""
    if world == 1:
        return lists
    parts = [None] * world
    dist.all_gather_object(parts, lists)
    return [item for part in parts for item in part]


# Copied from sft.stop
def stop(message: str):
    """A user's mistake: one line that says what to do, exit code 2."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr)
    ended = SystemExit(2)
    ended.message = message
    raise ended


# Copied from sft.parse_args
def parse_args(args_class, presets, argv=None, doc=""):
    """`[PRESET] [--flag value ...]`: a preset is a named set of defaults."""
    import tyro

    argv = list(sys.argv[1:] if argv is None else argv)
    default = args_class()
    if argv and not argv[0].startswith("-"):
        name = argv.pop(0)
        if name not in presets:
            stop(f"unknown preset {name!r}: choose from {', '.join(presets)}, or give flags only for the toy world")
        default = presets[name]
    description = f"{doc}\n\nPresets (first argument): {', '.join(presets)}" if presets else doc
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            args = tyro.cli(args_class, args=argv, default=default, description=description, use_underscores=True)
    except SystemExit as ended:
        if not ended.code:  # --help
            raise
        wrong = re.split("[─-]{3,}", shown.getvalue())[1]  # of a box with a title, what is wrong, and advice
        stop(" ".join(re.sub("[╮╰│]", " ", wrong).split()) + " See --help")
    for name in ("batch_size", "micro_batch_size", "rollout_batch_size", "max_prompt_tokens", "max_response_tokens"):
        if getattr(args, name, 1) < 1:
            stop(f"--{name} {getattr(args, name)}: it must be 1 or more")
    return args


# Copied from sft.init_distributed
def init_distributed(args):
    """(rank, world size, device). Several processes come from torchrun; one process with ZeRO stage 0 needs none of it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if cuda else "cpu")  # else DeepSpeed warns that it had to look
    if (world > 1 or getattr(args, "zero_stage", 0)) and not dist.is_initialized():
        import deepspeed

        for name, value in {
            "RANK": 0,
            "LOCAL_RANK": 0,
            "WORLD_SIZE": 1,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": 29541,
        }.items():
            os.environ.setdefault(name, str(value))
        deepspeed.init_distributed("nccl" if cuda else "gloo", timeout=datetime.timedelta(minutes=30), verbose=False)
    return int(os.environ.get("RANK", 0)), world, device


# Copied from sft.all_sum
def all_sum(x):
    """Sum over ranks, for logging."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# Copied from sft.shuffled
def shuffled(n: int, seed: int, epoch) -> list[int]:
    """The order of an epoch, a function of seed and epoch alone: a resumed run finds its place without reading back."""
    order = list(range(n))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


# Copied from sft.schedule
def schedule(step: int, total: int, warmup: int, kind: str) -> float:
    """The factor on the learning rate: linear warm-up, then `constant`, `linear` or `cosine` to zero."""
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)
    return {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}[kind]


# Copied from sft.load_rows
def load_rows(name: str, split: str, kind: str, seed: int = 0):
    """Rows of `toy`, local files and hub datasets (comma-separated), in this project's column names, each with its place."""
    if "," in name:
        return [row for part in name.split(",") for row in load_rows(part.strip(), split, kind, seed)]
    part = re.fullmatch(r"(\w+)(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if not part:
        stop(f"--split {split!r} is not understood: write train, train[:30%] or train[2000:4000]")
    if name == "toy":
        import toy

        kind = "heldout" if (kind, part[1]) == ("prompts", "heldout") else kind
        raw = [(row, f"toy row {i + 1}") for i, row in enumerate(toy.rows(kind, seed))]
    elif Path(name).suffix in (".json", ".jsonl", ".gz", ".parquet") or Path(name).is_file():
        raw = [(row, where) for row, where in read_file(Path(name)) if str(row.get("split", part[1])) == part[1]]
    else:
        import datasets

        try:
            raw = [(row, f"{name} row {i + 1}") for i, row in enumerate(datasets.load_dataset(name, split=part[1]))]
        except Exception as error:  # the hub's many ways to fail: not found, gated, no network, no such split
            stop(f"cannot load {name!r} (split {part[1]}): {str(error).splitlines()[0]} "
                 "Give a local .json/.jsonl(.gz)/.parquet file, a dataset on the hub that you can reach, or `toy`")  # fmt: skip
    if part[3] or part[5]:  # shares of data that may be sorted by source: the same shuffle in every script
        raw = [raw[i] for i in shuffled(len(raw), 0, "split")]
    start, end = (
        int(len(raw) * int(value) / 100) if percent else int(value) if value else default
        for value, percent, default in ((part[2], part[3], 0), (part[4], part[5], len(raw)))
    )
    return [(canonical(row, where), where) for row, where in raw[start:end]]


# Copied from sft.read_file
def read_file(path: Path):
    if not path.is_file():
        stop(f"{path} does not exist: --data takes a .json/.jsonl(.gz)/.parquet file, a hub name, or `toy`")
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return [(row, f"{path} row {i + 1}") for i, row in enumerate(pyarrow.parquet.read_table(path).to_pylist())]
        text = (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8").read()
    except (OSError, ValueError, EOFError) as error:
        stop(
            f"{path} cannot be read ({str(error).splitlines()[0]}): give a whole file, its format as its name says, text in UTF-8"
        )
    whole = text.lstrip().startswith("[")
    rows = []
    try:
        lines = json.loads(text) if whole else text.split("\n")
    except ValueError as error:
        stop(f"{path} is not valid JSON ({error}): mend the file")
    for i, line in enumerate(lines):
        if not whole and not line.strip():
            continue
        try:
            row = line if whole else json.loads(line)
        except ValueError as error:
            stop(f"{path} row {i + 1} is not valid JSON ({error}): mend or remove the line")
        if not isinstance(row, dict):
            stop(f"{path} row {i + 1} is not a JSON object: each row needs named fields such as prompt")
        rows.append((row, f"{path} row {i + 1}"))
    return rows


# Copied from sft.canonical
def canonical(row: dict, where: str) -> dict:
    """One row in this project's names: prompt, completion, chosen, rejected, responses [{text, score, policy}].

    Maps UltraFeedback (binarized: chosen/rejected message lists; original: instruction, completions), HH (transcripts
    without prompt) and TL;DR (prompt, completion)."""
    row = {field: value for field, value in row.items() if value is not None}  # tables fill with nulls
    for field in ("completion", "chosen", "rejected", "messages"):
        value = row.get(field)
        if isinstance(value, list):
            if not value or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
                stop(f"{where}: field {field} is not a list of {{role, content}} messages")
            if len(value) > 1 or field == "messages":
                row["prompt"] = value[:-1]
            row["completion" if field == "messages" else field] = value[-1]["content"]
    if "prompt" not in row and isinstance(row.get("chosen"), str) and "\n\nAssistant:" in row["chosen"]:
        for field in [f for f in ("rejected", "chosen") if isinstance(row.get(f), str)]:
            head, _, row[field] = row[field].rpartition("\n\nAssistant:")
            row["prompt"] = head + "\n\nAssistant:"
    for field in ("completions", "responses"):
        value = row.get(field, [])
        if not isinstance(value, list) or not all(isinstance(r, dict) for r in value):
            stop(f"{where}: field {field} is not a list of {{text, score, policy}}")
    if "instruction" in row and "completions" in row:
        row["prompt"] = row["instruction"]
        scored = [(c, c.get("fine-grained_score")) for c in row["completions"]]
        row["responses"] = [
            {"text": c.get("response"), "score": c.get("overall_score") if s is None else s, "policy": c.get("model")}
            for c, s in scored
        ]
    for response in row.get("responses", []):
        score = response.get("score")
        if score is not None and not (isinstance(score, (int, float)) and math.isfinite(score)):
            stop(f"{where}: field score is {score!r}, not a finite number")
    if "completion" not in row and "chosen" in row:
        row["completion"] = row["chosen"]  # what SFT on preferences or grades imitates: the better response
    elif "completion" not in row and row.get("responses"):
        score = lambda r: -math.inf if r.get("score") is None else r["score"]
        row["completion"] = max(row["responses"], key=score).get("text")
    return row


# Copied from sft.encode
def encode(tokenizer, row: dict, field: str | None, where: str, args):
    """(prompt ids, response ids with EOS) of a row; (None, None) for a long prompt under --drop_long_prompts.

    The prompt is rendered by the chat template up to where the assistant begins; the response is the text's own tokens
    and the EOS, cut (and then without EOS) at --max_response_tokens."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not prompt or not isinstance(prompt, list):
        stop(f"{where}: field prompt is missing, or neither a string nor a list of messages")
    try:
        ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    except Exception as error:  # templates raise what they like for roles they do not know
        stop(f"{where}: the chat template does not take field prompt: {error}")
    if len(ids) > args.max_prompt_tokens:
        if args.drop_long_prompts:
            return None, None
        stop(f"{where}: field prompt has {len(ids)} tokens, more than --max_prompt_tokens {args.max_prompt_tokens}: "
             "raise it, shorten the prompt, or leave such rows out with --drop_long_prompts")  # fmt: skip
    if field is None:
        return ids, []
    text = row.get(field)
    if not isinstance(text, str):
        stop(f"{where}: field {field} is missing or not text")
    response = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return ids, response[: args.max_response_tokens]


# Copied from sft.Batch
@dataclass
class Batch:
    """Sequences [prompt | response | padding]. Causal models need no attention mask for padding on the right."""

    input_ids: torch.Tensor  # (B, L)
    predict: torch.Tensor  # (N,) flat positions in (B, L) whose next token is a response token
    target: torch.Tensor  # (N,) those response tokens
    cell: torch.Tensor  # (N,) their flat positions in (B, T)
    response_mask: torch.Tensor  # (B, T) bool

    def to(self, device):
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


# Copied from sft.collate
def collate(rows, pad_token_id: int) -> Batch:
    """Batch of (prompt ids, response ids) pairs. Masks come from lengths: pad may equal EOS."""
    length = max(len(p) + len(r) for p, r in rows)
    width = max(1, *(len(r) for _, r in rows))
    input_ids = torch.full((len(rows), length), pad_token_id)
    predict, target, cell = [], [], []
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, (prompt, response) in enumerate(rows):
        input_ids[i, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        predict.extend(range(i * length + len(prompt) - 1, i * length + len(prompt) + len(response) - 1))
        cell.extend(range(i * width, i * width + len(response)))
        target.extend(response)
        mask[i, : len(response)] = True
    return Batch(input_ids, *(torch.tensor(x, dtype=torch.long) for x in (predict, target, cell)), mask)


# Copied from sft.micro_batches
def micro_batches(batch: list, rank: int, world: int, args) -> list[list]:
    """This rank's micro-batches of one optimizer step, of (prompt, response, ...) rows.

    Every rank gets the same number, of one size. Rows are sorted by length so that a micro-batch pads little; where the
    rows do not divide, a prompt whose response is empty fills up: it has no token in any loss."""
    count = math.ceil(args.batch_size / (world * args.micro_batch_size))
    size = world * math.ceil(len(batch) / (world * count))
    rows = sorted(batch, key=lambda row: len(row[0]) + len(row[1]))
    rows = [(rows[0][0], [], *rows[0][2:])] * (count * size - len(rows)) + rows
    return [rows[at + rank : at + size : world] for at in range(0, len(rows), size)]


# Copied from sft.PLAIN_TEMPLATE
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'assistant' %}Assistant:{{ m.content }}{{ eos_token }}\n"
    "{% else %}{{ m.role | capitalize }}: {{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)


# Copied from sft.missing
def missing(name: str, command: str = ""):
    """Stop if `name` reads as a local folder that is not there."""
    if name.startswith(("runs/", "./", "../", "/")) and not Path(name, "config.json").is_file():
        first = f"run `{command}` first, or " if command else ""
        stop(f"{name} is not a model folder: {first}name another, or a model on the hub")


# Copied from sft.load_tokenizer
def load_tokenizer(name: str, args, chat_template: str = "", chat: bool = True):
    if name == "toy":
        import toy

        return toy.tokenizer()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        stop(f"cannot load a tokenizer from {name!r}: {str(error).splitlines()[0]}")
    if chat_template:
        if chat_template != "plain" and not Path(chat_template).is_file():
            stop(f"--chat_template {chat_template} does not exist: give a Jinja file, or `plain`")
        tokenizer.chat_template = PLAIN_TEMPLATE if chat_template == "plain" else Path(chat_template).read_text()
    if chat and not tokenizer.chat_template:
        stop(
            f"{name} has no chat template: train it with `python sft.py --model {name} --chat_template plain` (or a Jinja file)"
        )
    if chat and tokenizer.eos_token_id is None:
        stop(f"the tokenizer of {name} has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here comes from lengths
    return tokenizer


# Copied from sft.load_model
def load_model(kind: str, name: str, tokenizer, args, frozen: bool = False):
    """A stock Hugging Face model: `causal`, `value` (token classification) or `reward` (sequence classification).

    Trained weights are fp32 (bf16 products by autocast, or DeepSpeed's bf16 with fp32 master weights); frozen ones, and
    the base of LoRA, are bf16 under --bf16."""
    import transformers
    from transformers import AutoConfig

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    auto = {
        "causal": "AutoModelForCausalLM",
        "value": "AutoModelForTokenClassification",
        "reward": "AutoModelForSequenceClassification",
    }
    auto = getattr(transformers, auto[kind])
    extra = {} if kind == "causal" else {"num_labels": 1}
    dtype = torch.bfloat16 if args.bf16 and (frozen or args.lora_r) else torch.float32
    try:
        if name == "toy":
            import toy

            model = auto.from_config(toy.config(**extra), attn_implementation=args.attention, dtype=dtype)
        else:
            config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code, **extra)
            if kind == "value":
                config.classifier_dropout = 0.0
            model = auto.from_pretrained(
                name,
                config=config,
                dtype=dtype,
                attn_implementation=args.attention,
                trust_remote_code=args.trust_remote_code,
            )
    except (OSError, ValueError, ImportError) as error:
        stop(f"cannot load a model from {name!r}: {str(error).splitlines()[0]}")
    model.config.pad_token_id = tokenizer.pad_token_id
    if kind == "causal":  # a hub model's sampling defaults (top-k, penalties, ...) would bias rollouts
        ends = model.generation_config.eos_token_id
        ends = sorted(
            {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])}
        )
        model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if not frozen and args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if frozen:
        model.requires_grad_(False).eval()
    return model


# Copied from sft.lora_config
def lora_config(model, args, head: str | None = None):
    """LoRA on every linear layer of the backbone; `head` is trained in full and saved with the adapter."""
    from peft import LoraConfig

    names = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    targets = sorted(names - {"lm_head", "score", "classifier", "pooler", "dense_head"})
    return LoraConfig(
        r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, target_modules=targets,
        modules_to_save=[head] if head else None,
    )  # fmt: skip


# Copied from sft.add_lora
def add_lora(model, args, head: str | None = None):
    from peft import get_peft_model

    model.enable_input_require_grads()  # for gradient checkpointing: the embeddings are frozen
    return get_peft_model(model, lora_config(model, args, head))


# Copied from sft.plain
def plain(model):
    """The Hugging Face model inside a LoRA wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Copied from sft.Policy
class Policy(torch.nn.Module):
    """A causal LM that returns log-probabilities of the response tokens: (B, T) fp32, 0 where masked. Given the weight
    of a token it returns -Σ weight · logp instead, a scalar. Losses of whole sequences ask for fp32 logits, whose rounding
    does not add up over tokens.

    Only response positions go through the LM head, inside the head's own forward: there ZeRO-3 has gathered its weight."""

    def __init__(self, model, logits_dtype: torch.dtype | None = None):
        super().__init__()
        self.model = model
        ends = plain(model).generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        head = plain(model).get_output_embeddings()
        plain_forward = head.forward
        softcap = getattr(plain(model).config, "final_logit_softcapping", None)

        def forward(hidden, target=None, temperature=1.0, token_weight=None):
            if target is None:
                return plain_forward(hidden)
            options = {"bias": head.bias, "temperature": temperature, "softcap": softcap, "logits_dtype": logits_dtype}
            if token_weight is None:
                return linear_logprob(hidden, head.weight, target, **options)
            return linear_nll(hidden, head.weight, target, hidden.new_full(target.shape, token_weight), **options)

        head.forward = forward

    def forward(self, batch: Batch, temperature: float = 1.0, token_weight: float | None = None):
        hidden = plain(self.model).get_decoder()(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.predict)
        logp = plain(self.model).get_output_embeddings()(hidden, batch.target, temperature, token_weight)
        if token_weight is not None:
            return logp
        flat = logp.new_zeros(batch.response_mask.numel())
        return flat.index_copy(0, batch.cell, logp).view(batch.response_mask.shape)


# Copied from sft.Engine
class Engine:
    """Backward passes and optimizer steps. One process with ZeRO stage 0 is plain torch; anything else is DeepSpeed.

    Losses are already divided by the whole step's token count, so gradients are *summed* over micro-batches and ranks:
    DeepSpeed's means over both are undone."""

    def __init__(self, module, args, world: int):
        self.module, self.args, self.world, self.deepspeed = module, args, world, None
        self.micro_steps = math.ceil(args.batch_size / (world * args.micro_batch_size))
        parameters = [p for p in module.parameters() if p.requires_grad]
        plain_torch = world == 1 and not args.zero_stage
        self.optimizer = torch.optim.AdamW(
            parameters, lr=args.learning_rate, weight_decay=args.weight_decay, fused=plain_torch or None
        )
        if plain_torch:
            return
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": args.micro_batch_size,
            "gradient_accumulation_steps": self.micro_steps,
            "gradient_clipping": args.max_grad_norm,
            "zero_optimization": {"stage": args.zero_stage, "stage3_gather_16bit_weights_on_model_save": True},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": args.bf16},
            "steps_per_print": 10**9,
        }
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)

    def __call__(self, *inputs, **options):
        if self.deepspeed:
            return self.deepspeed(*inputs, **options)
        with self.autocast():
            return self.module(*inputs, **options)

    def autocast(self):
        """bf16 products for fp32 weights; DeepSpeed casts the weights themselves."""
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.args.bf16 and not self.deepspeed)

    def set_rate(self, rate: float):
        """The learning rate of the coming step; call it before the step's first `backward`."""
        self.rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss):
        if self.deepspeed:
            self.deepspeed.backward(loss * (self.world * self.micro_steps))
            self.deepspeed.step()  # acts once all of the step's micro-batches are in
        else:
            loss.backward()

    def step(self):
        """Returns the gradient's global norm before clipping."""
        if self.deepspeed:
            return self.deepspeed.get_global_grad_norm()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path):
        if self.deepspeed:
            self.deepspeed.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
        else:
            weights = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
            torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, folder / "engine.pt")

    def load(self, folder: Path):
        if self.deepspeed:
            self.deepspeed.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        else:
            saved = torch.load(folder / "engine.pt", weights_only=True)
            self.module.load_state_dict(saved["weights"], strict=False)
            self.optimizer.load_state_dict(saved["optimizer"])

    def gathered(self):
        """Inside this context every rank sees whole weights (ZeRO-3 keeps them in parts)."""
        if not (self.deepspeed and self.args.zero_stage == 3):
            return contextlib.nullcontext()
        import deepspeed

        return deepspeed.zero.GatheredParameters(list(self.module.parameters()))


# Copied from sft.Run
class Run:
    """The run folder: args.json, metrics.jsonl (one object a step), checkpoints/, final/, summary.json."""

    def __init__(self, args, engine: Engine, rank: int, total: int, started: float, bar=("loss",)):
        self.args, self.engine, self.rank, self.started, self.bar_keys = args, engine, rank, started, bar
        self.folder, self.step, self.pending, self.state, self.board = Path(args.output_dir), 0, [], {}, None
        if rank == 0:
            if not args.resume and self.folder.is_dir() and any(self.folder.iterdir()):
                aside = next(p for p in (Path(f"{self.folder}.{i}") for i in range(1, 10**6)) if not p.exists())
                self.folder.rename(aside)
                print(f"{self.folder} held an earlier run: moved to {aside}")
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "args.json").write_text(json.dumps(dataclasses.asdict(args), indent=2) + "\n")
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                self.board = SummaryWriter(self.folder)
        pause = 0.2 if sys.stderr.isatty() else 30  # seconds between drawings: a log file wants few
        name = Path(sys.argv[0]).stem
        self.bar = tqdm(total=total, desc=name, disable=rank > 0, dynamic_ncols=True, mininterval=pause)

    def restore(self):
        """With --resume: weights, optimizer, generators and loop state of the last whole checkpoint."""
        found = sorted(self.folder.glob("checkpoints/step_*[0-9]")) if self.args.resume else []
        if found:
            self.engine.load(found[-1])
            saved = torch.load(found[-1] / f"rank_{self.rank}.pt", weights_only=True)
            torch.set_rng_state(saved["cpu"])
            if torch.cuda.is_available():
                torch.cuda.set_rng_state(saved["cuda"])
            self.step, self.state = saved["step"], saved["state"]
            self.bar.update(self.step)
        for path in self.folder.glob("*.jsonl") if self.rank == 0 else ():  # later steps will be taken again
            whole = [line for line in path.read_text().splitlines() if line.endswith("}")]  # a kill may cut the last
            kept = [line for line in whole if json.loads(line)["step"] <= self.step]
            path.write_text("".join(line + "\n" for line in kept))

    def log(self, metrics: dict):
        """End of a step. Tensors are read back every tenth step only, so that the device is not waited for."""
        self.step += 1
        self.pending.append({"step": self.step, "seconds": round(time.time() - self.started, 3), **metrics})
        self.bar.update()
        save = self.args.save_every and self.step % self.args.save_every == 0
        if save or self.step % 10 == 0:
            self.flush()
        if save:
            self.checkpoint()

    def flush(self):
        rows = [{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in self.pending]
        self.pending = []
        if self.rank or not rows:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for row in rows if self.board else ():
            for key, value in row.items():
                if value is not None:  # DeepSpeed without ZeRO tells no gradient norm
                    self.board.add_scalar(key, value, row["step"])
        self.bar.set_postfix({k: f"{rows[-1][k]:.3g}" for k in self.bar_keys}, refresh=False)

    def checkpoint(self):
        """Written under a temporary name and renamed when whole; the one before is then removed."""
        final = self.folder / "checkpoints" / f"step_{self.step:07d}"
        part = final.with_suffix(".part")
        part.mkdir(parents=True, exist_ok=True)
        self.engine.save(part)
        generators = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            generators["cuda"] = torch.cuda.get_rng_state()
        torch.save({"step": self.step, "state": self.state, **generators}, part / f"rank_{self.rank}.pt")
        barrier()
        if self.rank == 0:
            part.rename(final)
            for old in final.parent.iterdir():
                if old != final:
                    shutil.rmtree(old)
        barrier()

    def write(self, model, tokenizer, folder: Path, merge: bool = False):
        """A Hugging Face folder, renamed when whole; of a LoRA run the adapter, or with `merge` model and adapter."""
        part = folder.with_name(folder.name + ".part")
        with self.engine.gathered():
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                if merge and model is not plain(model):
                    model.save_pretrained(part / "adapter")
                    model = model.merge_and_unload()
                model.save_pretrained(part)
                tokenizer.save_pretrained(part)
                shutil.rmtree(folder, ignore_errors=True)
                part.rename(folder)

    def snapshot(self, model, tokenizer):
        """Every --snapshot_every steps the model as it is, for curves over training: snapshots/step_N/."""
        if self.args.snapshot_every and self.step % self.args.snapshot_every == 0:
            self.write(model, tokenizer, self.folder / "snapshots" / f"step_{self.step:07d}")

    def finish(self, model, tokenizer, **summary) -> Path:
        """Writes final/: a plain Hugging Face folder (a LoRA run's adapter is merged, and kept in final/adapter)."""
        self.flush()
        final = self.folder / "final"
        self.write(model, tokenizer, final, merge=True)
        seconds = time.time() - self.started
        memory = (
            torch.cuda.max_memory_allocated()
            if torch.cuda.is_available()
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        )
        summary = {"steps": self.step, "seconds": round(seconds, 1), "peak_memory_mb": round(memory / 2**20), **summary}
        self.bar.close()
        if self.rank == 0:
            (self.folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
            print(
                f"{final}: "
                + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
            )
        barrier()
        return final


# Copied from sft.barrier
def barrier():
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
