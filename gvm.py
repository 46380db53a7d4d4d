"""Global value model (GVM): token-level Q(tau, s_t, a_t), pretrained offline on graded responses of many policies.

tau is a *trajectory*: `--tau_pairs` question-answer pairs that the same policy wrote on other prompts, shown as earlier
turns of the chat. It tells the model whose future it is predicting (DVPO, section 3.2). The value is read at response
token y_t, after the action; one more is read at the last prompt token, V(s_1).

    G_T = r(x, y),   G_t = discount ((1 - td_lambda) Q_{t+1} + td_lambda G_{t+1})      no gradient   `td_targets`
    L = mean_t (G_t - Q_t)^2                                                           eq. 1         `value_loss`
    Q~ = (Q - mu) / (sigma + eps), mu and sigma over the batch's response tokens       eq. 2         `--value_norm batch`

`--td_lambda 0` is eq. 1, 1 is Monte-Carlo (the default). V(s_1) has target
(1 - td_lambda) Q_1 + td_lambda G_1 and is left out of eq. 2 and of every accuracy. Scores are standardised over the
training rows (mean and std go into the saved config); of a preference pair the chosen response scores +1, the rejected -1.

A training sequence is a conversation of tau_pairs + 1 answers by one policy, and the loss is taken at every answer, the
earlier ones being tau of the later: each token shown is used, and the model learns every length of tau from none upwards.

The authors' released code feeds question and answer only (no tau) and reads V(s_t), not Q.

    python gvm.py                                                    # CPU: the toy world, from runs/sft/final
    python gvm.py llama3.2-3b --micro_batch_size 1                   # 1 GPU
    torchrun --nproc_per_node 8 gvm.py llama3.2-3b                   # 8 GPUs, the paper's sizes
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gzip
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

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from kernels import normalize_values


@dataclass
class Args:
    model: str = "runs/sft/final"
    """where training starts: the SFT model (paper), so that policy and GVM share tokenizer and backbone"""
    data: str = "toy"
    """graded rows `prompt, responses: [{text, score, policy}]` or pairs `prompt, chosen, rejected`; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[30%:80%]` (of a fixed shuffle), `train[2000:4000]`"""
    output_dir: str = "runs/gvm"
    """the run's folder: args.json, metrics.jsonl, checkpoints/, final/"""
    seed: int = 0
    """seed of the new head, data order and dropout"""
    epochs: int = 2
    """passes over the data"""
    steps: int = 0
    """stop after this many optimizer steps; 0 means all epochs"""
    learning_rate: float = 1e-3
    """peak learning rate of AdamW, cosine to zero (paper: 2e-6 with LoRA)"""
    warmup_steps: int = 10
    """steps of linear warm-up"""
    weight_decay: float = 0.0
    """AdamW's weight decay"""
    max_grad_norm: float = 1.0
    """gradient clipping by global norm; 0 turns it off"""
    batch_size: int = 32
    """conversations per optimizer step, over all ranks (paper: 32)"""
    micro_batch_size: int = 32
    """conversations per forward pass on one rank"""
    max_prompt_tokens: int = 64
    """a longer prompt is an error, or left out with --drop_long_prompts"""
    max_response_tokens: int = 64
    """a longer response is cut, and then has no EOS"""
    drop_long_prompts: bool = False
    """leave out rows whose prompt is longer than --max_prompt_tokens instead of stopping"""
    tau_pairs: int = 2
    """question-answer pairs in tau; 0 trains an unconditioned value model"""
    tau_tokens: int = 192
    """tokens that tau may take; each pair gets an equal share, its prompt at most half of that"""
    td_lambda: float = 1.0
    """0: the one-step targets of eq. 1 (paper); 1: Monte-Carlo; the released code uses 0.95"""
    discount: float = 1.0
    """the MDP's discount factor per token (the paper's gamma)"""
    value_norm: Literal["none", "batch"] = "none"
    """`batch` applies eq. 2 to the Q inside the loss (paper), not to V(s_1): for --advantage q only"""
    eval_share: float = 0.05
    """share of the prompts held out for the closing report (Table 4 of the paper)"""
    lora_r: int = 0
    """rank of LoRA adapters on all linear layers (paper: 8); 0 trains all weights"""
    lora_alpha: int = 32
    """LoRA's alpha"""
    lora_dropout: float = 0.1
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
    resume: bool = False
    """continue from the last checkpoint in --output_dir, bit for bit"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


_paper = Args(
    data="openbmb/UltraFeedback", split="train[30%:80%]", learning_rate=2e-6, batch_size=32, micro_batch_size=1,
    max_prompt_tokens=512, max_response_tokens=512, drop_long_prompts=True, tau_pairs=1, tau_tokens=512, lora_r=8,
    gradient_checkpointing=True, bf16=True, zero_stage=1, save_every=500,
)  # fmt: skip
PRESETS: dict[str, Args] = {
    "llama3.2-3b": dataclasses.replace(_paper),
    "llama3-8b": dataclasses.replace(_paper, zero_stage=3),
    "mistral-7b-instruct": dataclasses.replace(_paper, model="mistralai/Mistral-7B-Instruct-v0.2", split="train"),
}


# ---------------------------------------------------------------------------------------------------- the mathematics


def td_targets(values, mask, reward, *, discount: float = 1.0, td_lambda: float = 1.0):
    """Targets of eq. 1, generalised by lambda-returns; no gradient flows into them.

    values (R, T+1): column 0 is V(s_1), column t is Q_t; mask (R, T) bool, true for t = 1..T_i; reward (R,), the
    standardised score. Returns (R, T+1): G_T = r, G_t = discount ((1 - td_lambda) Q_{t+1} + td_lambda G_{t+1}), and for
    V(s_1), which no time step separates from y_1, (1 - td_lambda) Q_1 + td_lambda G_1 without the discount."""
    values = values.detach()
    width = mask.shape[1]
    last = torch.zeros_like(mask)
    last[:, :-1] = mask[:, :-1] & ~mask[:, 1:]
    last[:, -1] = mask[:, -1]
    target = torch.zeros_like(values)
    if td_lambda == 1:  # the recursion's closed form: no loop over tokens
        to_go = mask.sum(1, keepdim=True) - torch.arange(1, width + 1, device=mask.device)
        target[:, 1:] = reward[:, None] * discount ** to_go.clamp(min=0)
    else:
        following = torch.zeros_like(reward)
        for t in range(width, 0, -1):
            q_next = values[:, t + 1] if t < width else torch.zeros_like(reward)
            following = discount * ((1 - td_lambda) * q_next + td_lambda * following)
            following = torch.where(last[:, t - 1], reward, following)
            target[:, t] = following
    target[:, 0] = (1 - td_lambda) * values[:, 1] + td_lambda * target[:, 1]
    return target * with_start(mask)


def with_start(mask):
    """(R, T) mask of response tokens -> (R, T+1) mask that counts the last prompt token, where V(s_1) is read."""
    return torch.cat([mask[:, :1], mask], 1)


def value_loss(values, target, mask, normalizer):
    """eq. 1: squared error, (R, T+1) each, summed over the mask (R, T+1) and divided by the step's number of positions."""
    return ((target - values).square() * mask).sum() / normalizer


def value_statistics(values) -> dict[str, float]:
    """Table 4 of the paper: the mean and percentiles of one response's token values (T,)."""
    values = np.asarray(values, dtype=np.float64)
    return {"mean": float(values.mean())} | {f"P{p}": float(np.percentile(values, p)) for p in (1, 5, 10, 90, 95, 99)}


def pair_accuracy(rows) -> dict[str, float]:
    """Share of pairs of one prompt whose better response (by score) has the higher statistic; a tie counts half.

    rows: (prompt, score, statistics) triples."""
    by_prompt = {}
    for prompt, score, statistics in rows:
        by_prompt.setdefault(prompt, []).append((score, statistics))
    wins = {}
    for group in by_prompt.values():
        for i, (score, one) in enumerate(group):
            for other_score, other in group[:i]:
                if score != other_score:
                    for key in one:
                        wins.setdefault(key, []).append(
                            0.5 + 0.5 * np.sign((one[key] - other[key]) * (score - other_score))
                        )
    return {key: float(np.mean(value)) for key, value in wins.items()}


# ------------------------------------------------------------------------------------------- trajectories (tau), values


@dataclass
class Answer:
    """A graded response. `prompt` is a list of chat messages; `response` ids end in EOS unless cut."""

    prompt: list
    response: list[int]
    score: float = math.nan
    policy: str | None = None

    def __post_init__(self):
        self.key = json.dumps(self.prompt)


def conversations(answers: list[Answer], size: int, seed: int, epoch: int) -> list[list[Answer]]:
    """Every answer once, in groups of up to `size` of one policy, no prompt twice in a group: tau never contains x."""
    rng = random.Random(f"{seed}/{epoch}")
    by_policy = {}
    for answer in answers:
        by_policy.setdefault(answer.policy, []).append(answer)
    groups = []
    for policy in sorted(by_policy, key=str):
        rest = list(by_policy[policy])
        rng.shuffle(rest)
        while rest:
            group, keys, later = [], set(), []
            while rest and len(group) < size and len(later) < 100:
                answer = rest.pop()
                (later if answer.key in keys else group).append(answer)
                keys.add(answer.key)
            groups.append(group)
            rest += later
    rng.shuffle(groups)
    return groups


def choose_tau(pool: list[Answer], answer: Answer, pairs: int, rng: random.Random) -> list[Answer]:
    """`pairs` answers of the pool on prompts other than the answer's own and than each other's."""
    tau, keys = [], {answer.key}
    for other in rng.sample(pool, min(len(pool), 8 * pairs + 8)):
        if len(tau) < pairs and other.key not in keys:
            tau.append(other)
            keys.add(other.key)
    return tau


_turns = {}


def turn(tokenizer, prompt: list, system: list, first: bool) -> list[int]:
    """Ids of a prompt as the chat template renders it: as the `first` turn, or after an earlier answer and its EOS.

    A later turn is what stands behind a marker answer. `system` messages open the conversation and are x's own."""
    key = (tokenizer, json.dumps(prompt), json.dumps(system), first)
    if key not in _turns:
        messages = [m for m in prompt if m["role"] != "system"]
        if first:
            _turns[key] = tokenizer.apply_chat_template(
                system + messages, add_generation_prompt=True, return_dict=False
            )
        else:
            marker = "ANSWERMARKER"
            before = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": marker}]
            text = tokenizer.apply_chat_template(before + messages, add_generation_prompt=True, tokenize=False)
            text = text.partition(marker)[2].lstrip(" ").removeprefix(tokenizer.eos_token)  # the answer brings its EOS
            _turns[key] = tokenizer(tokenizer.eos_token + text, add_special_tokens=False)["input_ids"][1:]
    return _turns[key]


def shorten(tokenizer, prompt: list, limit: int) -> list:
    """The prompt's last messages that `limit` tokens hold, from a question on; a last one that is longer is cut."""
    messages = [m for m in prompt if m["role"] != "system"]
    ids = [tokenizer(m["content"], add_special_tokens=False)["input_ids"] for m in messages]
    while len(messages) > 1 and (sum(map(len, ids)) > limit or messages[0]["role"] == "assistant"):
        messages, ids = messages[1:], ids[1:]
    return messages if len(ids[0]) <= limit else [messages[0] | {"content": tokenizer.decode(ids[0][:limit])}]


def render(tokenizer, group: list[Answer], tau_tokens: int) -> list[tuple[list[int], list[int]]]:
    """[(prompt ids, response ids), ...] of the conversation [tau ; x ; y]; the last answer is y, whole."""
    system = [m for m in group[-1].prompt if m["role"] == "system"]
    share = tau_tokens // max(1, len(group) - 1)
    turns = []
    for i, answer in enumerate(group):
        if answer is group[-1]:
            turns.append((turn(tokenizer, answer.prompt, system, i == 0), answer.response))
        else:
            prompt = shorten(tokenizer, answer.prompt, share // 2)
            room = share - len(turn(tokenizer, prompt, [], i == 0))  # x's system message takes nothing from tau
            turns.append((turn(tokenizer, prompt, system, i == 0), answer.response[: max(1, room)]))
    return turns


@dataclass
class ValueBatch:
    """Conversations in rows of input_ids, and where the values of R responses are read."""

    input_ids: torch.Tensor  # (B, L), right-padded: a causal model needs no mask
    position: torch.Tensor  # (R, T+1) flat positions in (B, L): last prompt token, y_1 .. y_T; 0 where masked
    mask: torch.Tensor  # (R, T+1) bool

    def to(self, device):
        return ValueBatch(*(getattr(self, f.name).to(device, non_blocking=True) for f in dataclasses.fields(self)))


def collate_values(rows: list[list[tuple[list[int], list[int]]]], pad_token_id: int, every: bool) -> ValueBatch:
    """rows of (prompt ids, response ids) turns; values of `every` answer, or of each row's last."""
    spans, length = [], max(sum(len(p) + len(r) for p, r in turns) for turns in rows)
    input_ids = torch.full((len(rows), length), pad_token_id)
    for i, turns in enumerate(rows):
        ids = []
        for j, (prompt, response) in enumerate(turns):
            ids += prompt
            if every or j == len(turns) - 1:
                spans.append((i * length + len(ids) - 1, len(response)))
            ids += response
        input_ids[i, : len(ids)] = torch.tensor(ids)
    offset = torch.arange(1 + max(size for _, size in spans))
    start, size = torch.tensor(spans).T[:, :, None]
    mask = (offset <= size) & (size > 0)
    return ValueBatch(input_ids, torch.where(mask, start + offset, 0), mask)


def head_name(model) -> str:
    """What the architecture calls its linear head: `score` (Llama, Mistral, Qwen) or `classifier` (GPT-NeoX, GPT-2)."""
    return "score" if hasattr(model, "score") else "classifier"


class ValueModel(torch.nn.Module):
    """A token-classification model that returns values at the asked positions only: (R, T+1) fp32, 0 where masked."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: ValueBatch):
        model = plain(self.model)
        backbone = getattr(model, model.base_model_prefix)
        hidden = backbone(input_ids=batch.input_ids, use_cache=False).last_hidden_state
        hidden = hidden.flatten(0, 1).index_select(0, batch.position.flatten())
        return getattr(model, head_name(model))(hidden).float().view(batch.position.shape) * batch.mask


# ------------------------------------------------------------------------------------------------------------ training


def load_answers(tokenizer, args) -> list[Answer]:
    """Graded rows and preference pairs as a flat list of answers; those of no named policy count as one policy's."""
    answers = []
    for row, where in load_rows(args.data, args.split, "graded", args.seed):
        if "responses" in row:
            responses = row["responses"]
        elif "chosen" in row and "rejected" in row:
            responses = [
                {"text": row[side], "score": score, "policy": row.get(f"{side}_policy")}
                for side, score in (("chosen", 1.0), ("rejected", -1.0))
            ]
        else:
            stop(f"{where}: no field responses, nor chosen and rejected: gvm.py needs graded responses or pairs")
        for response in responses:
            score = response.get("score")
            if not isinstance(score, (int, float)) or not math.isfinite(score):
                stop(f"{where}: field score is {score!r}, not a finite number")
            prompt, ids = encode(
                tokenizer, {"prompt": row.get("prompt"), "text": response.get("text")}, "text", where, args
            )
            if prompt is not None:
                messages = (
                    row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
                )
                answers.append(Answer(messages, ids, float(score), response.get("policy")))
    return answers


def predict(engine, tokenizer, groups: list[list[Answer]], args, device) -> list[np.ndarray]:
    """(T_i + 1,) values of each group's last answer: V(s_1), Q_1 .. Q_T."""
    found = []
    with torch.no_grad():
        for at in range(0, len(groups), args.micro_batch_size):
            rows = [render(tokenizer, group, args.tau_tokens) for group in groups[at : at + args.micro_batch_size]]
            batch = collate_values(rows, tokenizer.pad_token_id, every=False).to(device)
            values = engine(batch).cpu().numpy()
            found += [v[: 1 + len(turns[-1][1])] for v, turns in zip(values, rows, strict=True)]
    return found


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    if args.value_norm == "batch" and args.micro_batch_size * world < args.batch_size:
        stop("--value_norm batch normalises over the whole batch, in one forward pass: --micro_batch_size times the number "
             f"of ranks must be {args.batch_size} or more")  # fmt: skip
    missing(args.model, "python sft.py")
    tokenizer = load_tokenizer(args.model, args)
    answers = load_answers(tokenizer, args)
    keys = sorted({answer.key for answer in answers})
    held_out = {keys[i] for i in shuffled(len(keys), args.seed, -1)[: int(args.eval_share * len(keys))]}
    training = [answer for answer in answers if answer.key not in held_out]
    scores = np.array([answer.score for answer in training])
    if not len(scores) or scores.std() == 0:
        stop(f"{args.data} ({args.split}): {len(scores)} responses, all of one score: there is nothing to learn")
    mean, std = float(scores.mean()), float(scores.std())

    torch.manual_seed(args.seed)
    model = load_model("value", args.model, tokenizer, args)
    model.config.reward_mean, model.config.reward_std = mean, std
    model.config.tau_pairs, model.config.tau_tokens = args.tau_pairs, args.tau_tokens
    if args.lora_r:
        model = add_lora(model, args, head=head_name(model))
    value_model = ValueModel(model).to(device)

    plan = []  # (epoch, first conversation) of each step
    for epoch in range(args.steps or args.epochs):
        if not args.steps or len(plan) < args.steps:
            count = len(conversations(training, args.tau_pairs + 1, args.seed, epoch))
            plan += [(epoch, at) for at in range(0, count, args.batch_size)]
    plan = plan[: args.steps or None]
    engine = Engine(value_model, args, world)
    run = Run(args, engine, rank, len(plan), started)
    torch.manual_seed(args.seed + 1000 + rank)  # dropout; a resumed run restores the generator's state instead
    run.restore()
    value_model.train()
    current, order = None, []
    for step in range(run.step, len(plan)):
        epoch, at = plan[step]
        if epoch != current:
            current, order = epoch, conversations(training, args.tau_pairs + 1, args.seed, epoch)
        groups = order[at : at + args.batch_size]
        rows = [
            ([t for turn_ in turns[:-1] for part in turn_ for t in part] + turns[-1][0], turns[-1][1], turns, group)
            for group in groups
            for turns in [render(tokenizer, group, args.tau_tokens)]
        ]  # (all before y, y, ...): what micro_batches sorts by
        positions = sum(len(response) + 1 for _, _, turns, _ in rows for _, response in turns)
        loss_sum = torch.zeros((), device=device)
        engine.set_rate(args.learning_rate * schedule(step, len(plan), args.warmup_steps, "cosine"))
        for micro in micro_batches(rows, rank, world, args):
            batch = collate_values([turns for _, _, turns, _ in micro], tokenizer.pad_token_id, every=True).to(device)
            real = torch.tensor([bool(y) for _, y, turns, _ in micro for _ in turns])
            reward = torch.tensor(  # a cut answer of tau ends before r comes
                [
                    (a.score - mean) / std * args.discount ** (len(a.response) - len(shown))
                    for *_, turns, group in micro
                    for a, (_, shown) in zip(group, turns, strict=True)
                ]
            )
            mask = batch.mask & real[:, None].to(device)
            values = engine(batch)
            if args.value_norm == "batch":
                q = normalize_values(values[:, 1:], mask[:, 1:], group=dist.group.WORLD)
                values = torch.cat([values[:, :1], q], 1)
            target = td_targets(
                values, mask[:, 1:], reward.to(device), discount=args.discount, td_lambda=args.td_lambda
            )
            loss = value_loss(values, target, mask, positions)
            engine.backward(loss)
            loss_sum += loss.detach()
        grad_norm = engine.step()
        run.log(
            {"loss": all_sum(loss_sum), "learning_rate": engine.rate, "grad_norm": grad_norm, "positions": positions}
        )
    return run.finish(model, tokenizer, **evaluate(engine, tokenizer, answers, held_out, args, device))


def evaluate(engine, tokenizer, answers, held_out: set, args, device) -> dict:
    """Table 4 of the paper on the held-out prompts, tau drawn from the same policy's answers to other prompts."""
    by_policy = {}
    for answer in answers:
        by_policy.setdefault(answer.policy, []).append(answer)
    rng, questions = random.Random(args.seed), [answer for answer in answers if answer.key in held_out]
    if not questions:
        return {}
    engine.module.eval()
    groups = [choose_tau(by_policy[a.policy], a, args.tau_pairs, rng) + [a] for a in questions]
    values = predict(engine, tokenizer, groups, args, device)
    accuracy = pair_accuracy(
        [(a.key, a.score, value_statistics(v[1:])) for a, v in zip(questions, values, strict=True)]
    )
    return {f"accuracy_{key}": round(value, 4) for key, value in accuracy.items()}


def main(argv=None):
    train(parse_args(Args, PRESETS, argv, __doc__))


# ====================================================================================================================
# Plumbing: data, models, engine, run folder. The same text in every script (tests/test_copies.py).
# ====================================================================================================================


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
