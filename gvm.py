"""Global value model (GVM): token-level Q(tau, s_t, a_t), pretrained offline on graded responses of many policies.

tau is a *trajectory*: `--tau_pairs` question-answer pairs that the same policy wrote on other prompts, shown as earlier
turns of the chat. It tells the model whose future it is predicting (DVPO, section 3.2). The value is read at response
token y_t, after the action; one more is read at the last prompt token, V(s_1).

    G_T = r(x, y),   G_t = discount ((1 - td_lambda) Q_{t+1} + td_lambda G_{t+1})      no gradient   `td_targets`
    L = (1 - o) mean_t (G_t - Q_t)^2 + o mean_i (r_i - Q_T,i)^2     eq. 1 at o = 0    `value_loss`, `loss_weights`
    Q~ = (Q - mu) / (sigma + eps), mu and sigma over the batch's response tokens       eq. 2         `--value_norm batch`

`--td_lambda 0` is eq. 1, 1 is Monte-Carlo (the default). In its mean over tokens the last one, the only one that has seen
the whole answer, has weight 1/T; `--outcome_share` o gives the last tokens a share of the loss that does not depend on T
(a reward model's loss is all outcome); docs/gvm.md has what was measured of it. V(s_1) has target
(1 - td_lambda) Q_1 + td_lambda G_1 and is left out of eq. 2 and of every accuracy. Scores are standardised over the
training rows (mean and std go into the saved config); of a preference pair the chosen response scores +1, the rejected -1.

A training sequence is a conversation of tau_pairs + 1 answers by one policy, and the loss is taken at every answer, the
earlier ones being tau of the later: each token shown is used, and the model learns every length of tau from none upwards.

The authors' released code feeds question and answer only (no tau) and reads V(s_t), not Q.

    python gvm.py                                                    # CPU: the toy world, from runs/sft/final
    python gvm.py llama3.2-3b --micro_tokens 2048                    # 1 GPU
    torchrun --nproc_per_node 8 gvm.py llama3.2-3b                   # 8 GPUs, the paper's sizes
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import gzip
import heapq
import importlib
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import uuid
import warnings
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from kernels import head_name, model_class, normalize_values, packing_gap, read_head


@dataclass
class Args:
    model: str = "runs/sft/final"
    """where training starts: the SFT model (paper), so that policy and GVM share tokenizer and backbone"""
    data: str = "toy"
    """graded rows `prompt, responses: [{text, score, policy}]` or pairs `prompt, chosen, rejected`; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[30%:80%]` (of a fixed shuffle), `train[2000:4000]`"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
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
    max_grad_norm: float = 1.0
    """gradient clipping by global norm; 0 turns it off"""
    batch_size: int = 32
    """conversations per optimizer step, over all ranks (paper: 32)"""
    micro_tokens: int = 4096
    """tokens per forward pass on one rank; a longer sequence is a pass of its own"""
    padding: bool = False
    """one padded sequence per row instead of packed rows: for families that cannot keep packed sequences apart"""
    max_prompt_tokens: int = 64
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 64
    """a longer response is cut, and then has no end token"""
    tau_pairs: int = 2
    """question-answer pairs in tau; 0 trains an unconditioned value model"""
    tau_tokens: int = 192
    """tokens that tau may take; each pair gets an equal share, its prompt at most half of that"""
    td_lambda: float = 1.0
    """0: the one-step targets of eq. 1 (paper); 1: Monte-Carlo; the released code uses 0.95"""
    discount: float = 1.0
    """the MDP's discount factor per token (the paper's gamma)"""
    outcome_share: float = 0.5
    """share of the loss on the last tokens of answers that are not cut, however long these are; 0: all tokens alike (paper)"""
    value_norm: Literal["none", "batch"] = "none"
    """`batch` applies eq. 2 to the Q inside the loss (paper), not to V(s_1): for --advantage q only"""
    eval_share: float = 0.05
    """share of the prompts held out for the report (Table 4 of the paper)"""
    eval_data: str = ""
    """held-out rows of the same kind, in the place of --eval_share: a file or hub name"""
    eval_split: str = "test"
    """the part of --eval_data to read"""
    eval_every: int = 0
    """steps between looks at what is held out; 0 looks once, at the end"""
    keep_best: bool = False
    """keep in best/ the weights of the best such look, beside those of the end in final/"""
    lora_r: int = 0
    """rank of LoRA adapters (alpha 32) on all linear layers (paper: 8); 0 trains all weights"""
    lora_dropout: float = 0.1
    """LoRA's dropout"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, about a third more time"""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage (with --bf16 on several ranks 1 or more); one process with stage 0 needs no DeepSpeed"""
    bf16: bool = False
    """bfloat16 matrix products (GPU)"""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """auto: what suits the family; PyTorch's own, flash-attn (to be installed), or the plain product"""
    max_skipped: int = 3
    """steps in a row that may be skipped for a loss or gradient that is not finite"""
    save_every: int = 0
    """steps between checkpoints to resume from; 0 writes none"""
    report_to: str = ""
    """where metrics go besides metrics.jsonl: tensorboard, wandb, trackio; several with commas"""
    trace: bool = False
    """print a part of the first batch as a table with all that its loss is made of, and end; leaves no files"""
    resume: bool = False
    """continue from the last checkpoint in --output_dir, bit for bit"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


PAPER = {  # defaults for any model but toy.py's: the DVPO paper's settings, room for tau, and
    # the lengths of dvpo.py
    "data": "openbmb/UltraFeedback", "split": "train[30%:80%]", "learning_rate": 2e-6,
    "max_prompt_tokens": 1024, "max_response_tokens": 1024, "tau_pairs": 1, "tau_tokens": 1024, "lora_r": 8,
}  # fmt: skip
_gpus = {"gradient_checkpointing": True, "bf16": True, "zero_stage": 1, "save_every": 500}
PRESETS = {
    "llama3.2-3b": _gpus,
    "llama3-8b": {**_gpus, "zero_stage": 3},
    "mistral-7b-instruct": {"model": "mistralai/Mistral-7B-Instruct-v0.2", "split": "train", **_gpus, "zero_stage": 3},
}


# ---------------------------------------------------------------------------------------------------- the mathematics


def td_targets(values, mask, reward, *, discount: float = 1.0, td_lambda: float = 1.0):
    """Targets of eq. 1, generalised by lambda-returns; no gradient flows into them.

    values (R, T+1): column 0 is V(s_1), column t is Q_t; mask (R, T) bool, true for t = 1..T_i; reward (R,), the
    standardised score. Returns (R, T+1): G_T = r, G_t = discount ((1 - td_lambda) Q_{t+1} + td_lambda G_{t+1}), and for
    V(s_1), which no time step separates from y_1, (1 - td_lambda) Q_1 + td_lambda G_1 without the discount."""
    values = values.detach()
    width = mask.shape[1]
    target = torch.zeros_like(values)
    if td_lambda == 1:  # the recursion's closed form: no loop over tokens
        to_go = mask.sum(1, keepdim=True) - torch.arange(1, width + 1, device=mask.device)
        target[:, 1:] = reward[:, None] * discount ** to_go.clamp(min=0)
    else:
        last, following = last_of(mask), torch.zeros_like(reward)
        for t in range(width, 0, -1):
            q_next = values[:, t + 1] if t < width else torch.zeros_like(reward)
            following = discount * ((1 - td_lambda) * q_next + td_lambda * following)
            following = torch.where(last[:, t - 1], reward, following)
            target[:, t] = following
    target[:, 0] = (1 - td_lambda) * values[:, 1] + td_lambda * target[:, 1]
    return target * with_start(mask)


def last_of(mask):
    """(R, T) bool: the last true position of each row, and no other."""
    return mask & ~torch.cat([mask[:, 1:], torch.zeros_like(mask[:, :1])], 1)


def with_start(mask):
    """(R, T) mask of response tokens -> (R, T+1) mask that counts the last prompt token, where V(s_1) is read."""
    return torch.cat([mask[:, :1], mask], 1)


def loss_weights(mask, ended, positions: int, outcomes: int, outcome_share: float):
    """(R, T+1) weights of the squared errors, which sum to 1 over an optimizer step of so many positions (mask (R, T+1))
    and outcomes (ended (R,) bool): (1 - outcome_share) / positions, and outcome_share / outcomes more on Q_T."""
    share = outcome_share if outcomes else 0.0
    return mask * ((1 - share) / positions) + (last_of(mask) & ended[:, None]) * (share / max(1, outcomes))


def value_loss(values, target, weights):
    """eq. 1: (R, T+1) each; the weighted sum of squared errors."""
    return ((target - values).square() * weights).sum()


def value_statistics(values) -> dict[str, float]:
    """Table 4 of the paper: the mean and percentiles of one response's token values (T,)."""
    values = np.asarray(values, dtype=np.float64)
    return {"mean": float(values.mean())} | {f"P{p}": float(np.percentile(values, p)) for p in (1, 5, 10, 90, 95, 99)}


def pair_accuracy(rows) -> dict[str, float]:
    """Share of pairs of one prompt whose better response (by score) has the higher statistic; a tie counts half.

    rows: (prompt, score, statistics) triples."""
    by_prompt, wins = {}, []
    for prompt, score, statistics in rows:
        by_prompt.setdefault(prompt, []).append([score, *statistics.values()])
    for group in map(np.array, by_prompt.values()):
        one, other = np.triu_indices(len(group), 1)
        sign = np.sign(group[one] - group[other])
        sign = sign[sign[:, 0] != 0]
        wins += (0.5 + 0.5 * sign[:, 1:] * sign[:, :1]).tolist()
    return dict(zip(rows[0][2], np.mean(wins, 0).tolist(), strict=True)) if wins else {}


# ------------------------------------------------------------------------------------------- trajectories (tau), values


@dataclass
class Answer:
    """A graded response. `prompt` is a list of chat messages; `response` ids end in the end token unless cut."""

    prompt: list
    response: list[int]  # or an array, which is smaller
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
    """Up to `pairs` answers of the pool on prompts other than the answer's own and than each other's."""
    tau, keys = [], {answer.key}
    for other in rng.sample(pool, min(len(pool), 8 * pairs + 8)):
        if len(tau) < pairs and other.key not in keys:
            tau.append(other)
            keys.add(other.key)
    return tau


_turns = {}


def turn(tokenizer, prompt: list, system: list, first: bool) -> list[int]:
    """Ids of a prompt as the chat template renders it: as the `first` turn, or after an earlier answer and its end.

    `system` messages open the conversation and are x's own."""
    key = (tokenizer, json.dumps(prompt), json.dumps(system), first)
    if key not in _turns:
        messages = [m for m in prompt if m["role"] != "system"]
        _turns[key] = chat_ids(tokenizer, system + messages if first else messages, later=not first)
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
            turns.append((turn(tokenizer, answer.prompt, system, i == 0), list(answer.response)))
        else:
            prompt = shorten(tokenizer, answer.prompt, share // 2)
            room = share - len(turn(tokenizer, prompt, [], i == 0))  # x's system message takes nothing from tau
            turns.append((turn(tokenizer, prompt, system, i == 0), list(answer.response[: max(1, room)])))
    return turns


class ValueBatch(NamedTuple):
    """Conversations in rows of input_ids, and where the values of R responses are read."""

    input_ids: torch.Tensor  # (B, L): a causal model needs no mask for what fills a row on the right
    position_ids: torch.Tensor | None  # (B, L), from 0 in each conversation; None where each has a row
    position: torch.Tensor  # (R, T+1) flat positions in (B, L): last prompt token, y_1 .. y_T; 0 where masked
    mask: torch.Tensor  # (R, T+1) bool


def collate_values(rows: list[list[tuple]], pad_token_id: int, every: bool, device=None, args=None) -> ValueBatch:
    """rows of (prompt ids, response ids) turns; values of `every` answer, or of each row's last."""
    sequences = [[token for turn in turns for part in turn for token in part] for turns in rows]
    ids, positions, starts = lay_out(sequences, pad_token_id, args)
    spans = []
    for at, turns in zip(starts, rows, strict=True):
        for j, (prompt, response) in enumerate(turns):
            if every or j == len(turns) - 1:
                spans.append((at + len(prompt) - 1, len(response)))
            at += len(prompt) + len(response)
    offset = torch.arange(1 + max(size for _, size in spans))
    start, size = torch.tensor(spans).T[:, :, None]
    mask = (offset <= size) & (size > 0)
    parts = ids, positions, torch.where(mask, start + offset, 0), mask
    return ValueBatch(*(x if x is None else x.to(device, non_blocking=True) for x in parts))


class ValueModel(torch.nn.Module):
    """A token-classification model that returns values at the asked positions only: (R, T+1) fp32, 0 where masked."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch: ValueBatch):
        values = read_head(plain(self.model), batch.input_ids, batch.position_ids, batch.position.flatten())
        return values.view(batch.position.shape) * batch.mask


# ------------------------------------------------------------------------------------------------------------ training


def trace(title: str, words: list[str], columns: dict):
    """Prints a table: a word a row, and of each column (T,) the number at its place."""
    rows = [
        ["", *columns],
        *([word, *(f"{float(x[t]):.3f}" for x in columns.values())] for t, word in enumerate(words)),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)
    print(f"\n{title}\n" + "\n".join(lines), flush=True)


def traced(args, world: int):
    """The settings of --trace: a run that leaves no files."""
    if world > 1:
        stop("--trace is for one process: start it without torchrun")
    found = dataclasses.replace(args, output_dir=tempfile.mkdtemp(), save_every=0, resume=False, report_to="")
    found.settings = getattr(args, "settings", "as in the code")
    return found


# Copied from rm.graded
def graded(row: dict) -> list[dict]:
    """The responses [{text, score, policy}] of a row; of a pair the chosen one scores 1, the rejected one -1."""
    sides = {"chosen": 1.0, "rejected": -1.0}
    if "responses" not in row and not all(side in row for side in sides):
        raise ValueError("no field responses, nor chosen and rejected: pairs or graded responses are needed")
    pair = [{"text": row.get(side), "score": x, "policy": row.get(f"{side}_policy")} for side, x in sides.items()]
    responses = row.get("responses", pair)
    if any(response.get("score") is None for response in responses):
        raise ValueError("field score is missing: it must be a finite number")
    return responses


# Copied from rm.encode_graded
def encode_graded(tokenizer, row: dict, args):
    """(prompt ids, [response ids], scores) of a graded row or a pair; ValueError if it cannot be used. A response whose
    field `complete` is false was cut when it was drawn: no end token follows."""
    end, responses = control_tokens(tokenizer)[0], graded(row)
    found = [response_ids(tokenizer, r.get("text"), args) for r in responses]
    for ids, response in zip(found, responses, strict=True):
        if response.get("complete") is False and ids[-1] == end and len(ids) > 1:
            ids.pop()
    prompt, _ = encode(tokenizer, row, None, args)
    return prompt, found, [float(response["score"]) for response in responses]


def load_answers(tokenizer, args, name: str = "", split: str = "") -> list[Answer]:
    """Graded rows and preference pairs as a flat list of answers; those of no named policy count as one policy's."""

    def answers(row):
        _, responses, scores = encode_graded(tokenizer, row, args)
        return [(as_messages(row["prompt"]), responses, scores, [r.get("policy") for r in graded(row)])]

    return [
        Answer(prompt, array("i", response), score, policy)
        for prompt, *columns in load_data(args, "graded", answers, name, split)
        for response, score, policy in zip(*columns, strict=True)
    ]


def predict(engine, tokenizer, groups: list[list[Answer]], args, device, rank: int = 0, world: int = 1) -> list:
    """(T_i + 1,) values of each group's last answer: V(s_1), Q_1 .. Q_T. Shared out over the ranks; all get all."""
    found = []
    with torch.no_grad():
        for at in range(0, len(groups), 64):
            turns = [render(tokenizer, group, args.tau_tokens) for group in groups[at : at + 64]]
            rows = [([], [True], of, i) for i, of in enumerate(turns)]
            values = torch.zeros(len(rows), 1 + max(len(of[-1][1]) for of in turns), device=device)
            for micro in micro_batches(rows, rank, world, args, conversation_size)[0]:
                batch = collate_values([of for _, _, of, _ in micro], tokenizer.pad_token_id, False, device, args)
                index = torch.tensor([i for *_, i in micro if micro[0][1]], dtype=torch.long, device=device)
                values[:, : batch.mask.shape[1]].index_add_(0, index, engine(batch)[: len(index)])
            values = all_sum(values).cpu().numpy()
            found += [v[: 1 + len(of[-1][1])] for v, of in zip(values, turns, strict=True)]
    return found


def conversation_size(row) -> list[int]:
    """What micro_batches deals by: the tokens of a (_, _, turns, _) row."""
    return [sum(len(prompt) + len(response) for prompt, response in row[2])]


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    args = traced(args, world) if args.trace else args
    most = math.ceil(args.batch_size / world) * (args.tau_tokens + args.max_prompt_tokens + args.max_response_tokens)
    if args.value_norm == "batch" and args.micro_tokens < most:
        stop(f"--value_norm batch normalises over the whole batch, in one forward pass: give --micro_tokens {most}")
    room = args if args.value_norm == "none" else dataclasses.replace(args, micro_tokens=2 * most)
    missing(args.model, "python sft.py")
    tokenizer = load_tokenizer(args.model, args)
    answers = load_answers(tokenizer, args)
    if args.eval_data:
        held_out, training = load_answers(tokenizer, args, args.eval_data, args.eval_split), answers
        answers = training + held_out
        known = lambda answers: [(answer.key, answer.response) for answer in answers]
        check_held_out(args, known(held_out), known(training), rank)
    else:
        keys = sorted({answer.key for answer in answers})
        chosen = {keys[i] for i in shuffled(len(keys), args.seed, -1)[: int(args.eval_share * len(keys))]}
        training = [answer for answer in answers if answer.key not in chosen]
        held_out = [answer for answer in answers if answer.key in chosen]
        if args.keep_best and args.eval_share and not held_out:  # a share of 0 is refused by Run
            stop(
                f"--keep_best: --eval_share {args.eval_share} of {len(keys)} prompts holds out none: give more, or --eval_data"
            )
    scores = np.array([answer.score for answer in training])
    if not len(scores) or scores.std() == 0:
        stop(f"{args.data} ({args.split}): {len(scores)} responses, all of one score: there is nothing to learn")
    mean, std = float(scores.mean()), float(scores.std())
    end = control_tokens(tokenizer)[0]

    torch.manual_seed(args.seed)
    model = load_model("value", args.model, tokenizer, args)
    model.config.reward_mean, model.config.reward_std = mean, std
    model.config.tau_pairs, model.config.tau_tokens = args.tau_pairs, args.tau_tokens
    model = add_lora(model, args, head=head_name(model)) if args.lora_r else model
    value_model = ValueModel(model).to(device)

    plan = []  # (epoch, first conversation) of each step
    for epoch in range(args.steps or args.epochs):
        if not args.steps or len(plan) < args.steps:
            count = len(conversations(training, args.tau_pairs + 1, args.seed, epoch))
            plan += [(epoch, at) for at in range(0, count, args.batch_size)]
    plan = plan[: args.steps or None]
    engine = Engine(value_model, args, world)
    check_packing(engine, args)
    run = Run(args, engine, model, tokenizer, rank, len(plan), started, best="eval_accuracy_mean")
    torch.manual_seed(args.seed + 1000 + rank)  # dropout; a resumed run restores the generator's state instead
    run.restore()
    value_model.train()
    look = functools.lru_cache(1)(  # the closing look is the last step's own, where that had one
        lambda updates: held_out_values(engine, tokenizer, answers, held_out, mean, std, args, rank, world, device)
    )
    current, order = None, []
    for step in range(run.step, len(plan)):
        epoch, at = plan[step]
        if epoch != current:
            current, order = epoch, conversations(training, args.tau_pairs + 1, args.seed, epoch)
        groups = order[at : at + args.batch_size]
        rows = [([], [True], render(tokenizer, group, args.tau_tokens), group) for group in groups]
        texts = [response for _, _, turns, _ in rows for _, response in turns]
        positions, outcomes = sum(map(len, texts)) + len(texts), sum(response[-1] == end for response in texts)
        loss_sum = torch.zeros((), device=device)
        engine.set_rate(args.learning_rate * schedule(step, len(plan), args.warmup_steps, "cosine"))
        micros, useful = micro_batches(rows, rank, world, room, conversation_size)
        for micro in micros:
            batch = collate_values([turns for _, _, turns, _ in micro], tokenizer.pad_token_id, True, device, args)
            real = torch.tensor([bool(real) for _, real, turns, _ in micro for _ in turns])
            reward = torch.tensor(  # a cut answer of tau ends before r comes
                [
                    (a.score - mean) / std * args.discount ** (len(a.response) - len(shown))
                    for *_, turns, group in micro
                    for a, (_, shown) in zip(group, turns, strict=True)
                ]
            )
            ended = torch.tensor([response[-1] == end for *_, turns, _ in micro for _, response in turns])
            mask, ended = batch.mask & real[:, None].to(device), (real & ended).to(device)
            values = engine(batch)
            if args.value_norm == "batch":
                q = normalize_values(values[:, 1:], mask[:, 1:], group=dist.group.WORLD)
                values = torch.cat([values[:, :1], q], 1)
            rule = {"discount": args.discount, "td_lambda": args.td_lambda}
            target = td_targets(values, mask[:, 1:], reward.to(device), **rule)
            weights = loss_weights(mask, ended, positions, outcomes, args.outcome_share)
            loss = value_loss(values, target, weights)
            if args.trace:
                share = weights * positions  # 1 on average
                terms = share * (values.detach() - target).square()
                for i, (answer, (_, shown)) in enumerate(zip(micro[0][3], micro[0][2], strict=True)):
                    trace(
                        f"{'tau' if answer is not micro[0][3][-1] else 'question'}: {answer.policy}, score {answer.score:.3f}, "
                        f"standardised {reward[i]:.3f}: {answer.prompt[-1]['content']}",
                        ["V(s_1)", *(repr(tokenizer.decode([t])) for t in shown)],
                        {"Q_t": values[i].detach(), "G_t": target[i], "weight": share[i], "weight (Q - G)^2": terms[i]},
                    )
                shutil.rmtree(run.folder)
                return run.folder
            engine.backward(loss, last=micro is micros[-1])
            loss_sum += loss.detach()
        rates = {"learning_rate": engine.rate, "grad_norm": engine.step()}
        if args.eval_every and (step + 1) % args.eval_every == 0:
            rates |= {f"eval_{key}": value for key, value in look(step + 1).items()}
        run.log({"loss": all_sum(loss_sum), **rates, "positions": positions, "useful_tokens": useful})
    found = look(len(plan))
    best = found.get("accuracy_mean")
    said = (
        f"; the mean of token values orders {best:.1%} of held-out pairs as their scores do" if best is not None else ""
    )
    return run.finish(said, **found)


def held_out_values(
    engine, tokenizer, answers, held_out, mean: float, std: float, args, rank: int, world: int, device
) -> dict:
    """Table 4 of the paper on the held-out answers, tau drawn from all answers of the same policy to other prompts; and the mean
    squared error of Q_t as a prediction of the score less `mean`, by `std`."""
    if not held_out:
        return {}
    by_policy, rng = {}, random.Random(args.seed)
    for answer in answers:
        by_policy.setdefault(answer.policy, []).append(answer)
    groups = [choose_tau(by_policy[a.policy], a, args.tau_pairs, rng) + [a] for a in held_out]
    engine.module.eval()
    values = predict(engine, tokenizer, groups, args, device, rank, world)
    engine.module.train()
    found = [(a.key, a.score, value_statistics(v[1:])) for a, v in zip(held_out, values, strict=True)]
    errors = [(v[1:] - (a.score - mean) / std) ** 2 for a, v in zip(held_out, values, strict=True)]
    accuracy = {f"accuracy_{key}": round(value, 4) for key, value in pair_accuracy(found).items()}
    return ({"mse": float(np.concatenate(errors).mean())} if args.value_norm == "none" else {}) | accuracy


def main(argv=None):
    train(parse_args(Args, PRESETS, PAPER, argv, __doc__))


# ====================================================================================================================
# Plumbing: flags, ranks, data, models, engine, run folder. The same text in every script (tests/test_copies.py).
# ====================================================================================================================


# Copied from sft.BOUNDS
BOUNDS = {  # (lowest, highest); a lower default is allowed too, as -1 and 0 often mean something. Others: 0 or more
    **dict.fromkeys(("steps", "epochs", "batch_size", "rollout_batch_size", "ppo_epochs", "n", "best_of"), (1, math.inf)),
    **dict.fromkeys(("micro_tokens", "max_prompt_tokens", "max_response_tokens", "max_skipped"), (1, math.inf)),
    **dict.fromkeys(("learning_rate", "critic_learning_rate", "gamma", "temperature", "clip", "kl_horizon"), (1e-12, math.inf)),
    **dict.fromkeys(("eval_share", "outcome_share", "td_lambda", "discount", "lam", "lora_dropout", "quantiles"), (0, 1)),
    "top_p": (1e-12, 1), "seed": (-(2**63), 2**63),
}  # fmt: skip


# Copied from sft.parse_args
def parse_args(args_class, presets, paper, argv=None, doc="", **bounds):
    """`[PRESET] [--flag value ...]`. A flag that is not given has the toy world's value for a model of toy.py's, and
    `paper`'s, or the preset's, for any other. `bounds`: those of flags that mean something else here than in BOUNDS."""
    import tyro

    import toy

    argv = list(sys.argv[1:] if argv is None else argv)
    preset = argv.pop(0) if argv and not argv[0].startswith("-") else None
    if preset and preset not in presets:
        stop(f"unknown preset {preset!r}: choose from {', '.join(presets)}, or give flags only")
    tell, doc = os.environ.get("LOCAL_RANK", "0") == "0", f"{doc}\n\nPresets (first argument): {', '.join(presets)}"
    common = {"args": argv, "description": doc, "use_underscores": True, "console_outputs": tell}
    read = functools.partial(tyro.cli, args_class, **common)
    paper = paper | presets.get(preset, {})
    if any(word.split("=")[0] == "--data" for word in argv):  # a share of the paper's data is none of yours
        paper.pop("split", None)
    try:
        args = read(default=args_class(**(paper if preset else {})))
    except SystemExit as ended:  # tyro has said what is wrong; torchrun's report should end with a word of it
        if ended.code and "TORCHELASTIC_ERROR_FILE" in os.environ:
            stop(f"{' '.join(argv)}: a flag is not understood, the box above says which; --help lists all")
        raise
    start = getattr(args, "model", None) or args.policy
    if preset and toy.is_model(start):
        stop(f"preset {preset} is for real models, and {start} is of the toy world: name yours, or give no preset")
    if not preset and not toy.is_model(start):
        args = read(default=args_class(**paper))
    args.settings = f"preset {preset}'s" if preset else "the toy world's" if toy.is_model(start) else "the paper's"
    for field in dataclasses.fields(args):
        low, high = (BOUNDS | bounds).get(field.name, (0, math.inf))
        value = getattr(args, field.name)
        for x in value if isinstance(value, tuple) else [value]:
            low = min(low, field.default) if isinstance(field.default, (int, float)) else low
            if isinstance(x, (int, float)) and not (low <= x <= high and math.isfinite(x)):
                stop(
                    f"--{field.name} {x}: give "
                    + (f"{low} or more" if high == math.inf else f"a number from {low} to {high}")
                )
    return args


# Copied from sft._store
_store = []  # torchrun's key-value store, by which ranks learn of each other's end


# Copied from sft.stop
def stop(message: str):
    """A user's mistake: one line that says what to do, exit code 2. Told once a host, under torchrun in its report."""
    file, first = os.environ.get("TORCHELASTIC_ERROR_FILE"), os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.suppress(Exception):  # the host that keeps the store may have gone
        for store in _store:
            message = store.compare_set("stopped", "", message).decode()  # what others met first is the cause
            first = store.add(f"told on {os.environ.get('GROUP_RANK')}", 1) == 1
    time.sleep(2 * len(_store) if first else 6)  # other hosts are to read it; torchrun ends who is not first
    if first and file:
        extra = {"py_callstack": f"error: {message}", "timestamp": str(int(time.time()))}
        Path(file).write_text(json.dumps({"message": {"message": message, "extraInfo": extra}}))
    elif first:
        tqdm.write(f"error: {message}", file=sys.stderr)  # on a line of its own, where a bar is drawn
    raise SystemExit(2)


# Copied from sft.init_distributed
def init_distributed(args):
    """(rank, world size, device). Several processes come from torchrun; one process with ZeRO stage 0 needs none of it.
    The end of any rank, on whatever host, ends all within seconds."""
    catch_signals()
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    rank, local, world = (int(os.environ.get(x, alone[x])) for x in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if rank >= world or (world > 1 and "MASTER_ADDR" not in os.environ):
        stop(f"RANK {rank} of WORLD_SIZE {world} is set, but no torchrun is here: start with torchrun, or unset both")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # else DeepSpeed warns that it had to look
    if not by_deepspeed(args) or dist.is_initialized():
        return rank, world, device
    if world == 1:
        with socket.socket() as free:  # a port that no run beside this one has
            free.bind(("127.0.0.1", 0))
            alone["MASTER_PORT"] = str(free.getsockname()[1])
    os.environ.update(alone | os.environ)
    try:
        import deepspeed
    except ImportError:
        stop("several ranks, and --zero_stage 1-3, need DeepSpeed: pip install deepspeed==0.19.8")

    backend, limit = "nccl" if device.type == "cuda" else "gloo", datetime.timedelta(minutes=30)
    deepspeed.init_distributed(backend, timeout=limit, verbose=False)

    def watch():
        message, launcher = "", os.getppid()
        while not message:
            if over.wait(1):
                return
            if os.getppid() != launcher:
                message = "the launcher has ended, and with it this rank"
                break
            try:
                message = _store[0].get("stopped").decode() if _store[0].check(["stopped"]) else ""
            except Exception:  # the host that keeps the store has gone; or this run is over and about to end
                message = "" if over.wait(15) else "the first host has ended: see what it says"
        with contextlib.suppress(SystemExit):
            stop(message)
        os._exit(2)

    def failed(kind, error, trace):
        with contextlib.suppress(Exception):  # a lost connection is what another rank's end looks like
            if _store[0].check(["stopped"]):
                stop("")
        sys.__excepthook__(kind, error, trace)
        stop(f"rank {rank} failed: {kind.__name__}: {error}")

    if world > 1:
        _store.append(dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False))
        over, watcher = threading.Event(), threading.Thread(target=watch, daemon=True)
        watcher.start()
        # a thread inside the store while Python shuts down would abort the process; one that sleeps may be left
        atexit.register(lambda: (over.set(), watcher.join(2)))
        sys.excepthook = failed
    return rank, world, device


# Copied from sft._signals
_signals = []  # SIGINT, SIGTERM, as they came


# Copied from sft._begun
_begun = []  # the run that will see to them


# Copied from sft.catch_signals
def catch_signals():
    """SIGINT and SIGTERM: the first lets a run that has begun finish its step and save; the second ends it at once."""

    owner = os.getpid()

    def caught(number, frame):
        if os.getpid() != owner:  # a worker that reads data, ended by the pool that it belongs to
            os._exit(128 + number)
        if _signals or not _begun:
            print(
                f"\nended by {signal.Signals(number).name}: what was saved before is whole", file=sys.stderr, flush=True
            )
            os._exit(128 + number)
        _signals.append(number)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, caught)


# Copied from sft.by_deepspeed
def by_deepspeed(args) -> bool:
    """Several ranks, or a ZeRO stage: DeepSpeed's engine, which under --bf16 keeps fp32 master weights of its own."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1 or getattr(args, "zero_stage", 0) > 0


# Copied from sft.all_sum
def all_sum(x):
    """Sum over ranks, in place; x as it is without several."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


# Copied from sft.gather_lists
def gather_lists(lists: list, world: int) -> list:
    """The ranks' lists, joined in order of rank; no rank goes on before all have come."""
    if world == 1:
        return lists
    parts = [None] * world
    dist.all_gather_object(parts, lists)
    return [item for part in parts for item in part]


# Copied from sft.shuffled
@functools.lru_cache(1)  # one order serves all steps of an epoch
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


# ---------------------------------------------------------------------------------------------------------------- data


# Copied from sft.is_file
def is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".jsonl", ".gz", ".parquet") or Path(name).is_file()


# Copied from sft.read_data
def read_data(name: str, split: str, kind: str, seed: int = 0):
    """(raw rows, the number of each) of `toy`, a local file or a hub dataset (`name` or `name:configuration`); what the
    split leaves out is not decoded."""
    import datasets

    part = re.fullmatch(r"(\w+)(?:\[(\d*)(%?):(\d*)(%?)\])?", split)
    if not part:
        stop(f"--split {split!r} is not understood: write train, train[:30%] or train[2000:4000]")
    datasets.disable_progress_bars(), datasets.logging.set_verbosity(50)
    try:
        if name == "toy":
            import toy

            kind = "heldout" if (kind, part[1]) == ("prompts", "heldout") else kind
            raw = datasets.Dataset.from_list(toy.rows(kind, seed))
        elif is_file(name):
            form = "parquet" if name.endswith(".parquet") else "json"
            with gzip.open(name) if name.endswith(".gz") else open(name, "rb") as file:
                start = file.read(1000).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
            if form == "json" and start not in (b"", b"{", b"["):  # Arrow crashes where the first row is null
                raise ValueError("it does not begin with a JSON object")
            raw = datasets.load_dataset(form, data_files=name, split="train")
        else:
            raw = datasets.load_dataset(*name.split(":"), split=part[1])
    except Exception as error:  # each format and the hub fail in their own ways; the cause names Arrow's row
        why = str(error.__cause__ or error).split("\n")[0] or "it is empty"
        stop(f"{name} ({split}) cannot be read: {why}. --data takes a whole .json/.jsonl(.gz)/.parquet file in UTF-8, a "
             "dataset on the hub that you can reach, or `toy`")  # fmt: skip
    numbers = range(len(raw))
    if is_file(name) and "split" in raw.column_names:
        numbers = [i for i, of in enumerate(raw["split"]) if of in (None, part[1])]
    if part[3] or part[5]:  # shares of data that may be sorted by source: the same shuffle in every script
        numbers = [numbers[i] for i in shuffled(len(numbers), 0, "split")]
    count = lambda n, sign: int(int(n) * len(numbers) / 100) if sign else int(n)
    numbers = numbers[count(part[2] or 0, part[3]) : count(part[4], part[5]) if part[4] else None]
    return raw.select(numbers), numbers


# Copied from sft.load_data
def load_data(args, kind: str, encode_row, name: str = "", split: str = ""):
    """What `encode_row` makes of each row (a list of examples, JSON), encoded once on each host, in parallel, and
    memory-mapped by its ranks. A row that cannot be used (ValueError) is left out of hub data and counted; in a user's
    own file it stops the run, unless --skip_bad_rows."""
    import datasets

    rank, world, local = (int(os.environ.get(x, y)) for x, y in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    features = datasets.Features({x: datasets.Value("large_string") for x in ("example", "bad")})
    folder, tables = tempfile.mkdtemp() if world > 1 and local == 0 else "", []
    for source in map(str.strip, (name or args.data).split(",")) if local == 0 else ():
        raw, numbers = read_data(source, split or args.split, kind, args.seed)

        def encoded(columns, at, source=source, numbers=numbers):
            found = []
            for i, *values in zip(at, *columns.values(), strict=True):
                try:
                    row = canonical(dict(zip(columns, values, strict=True)))
                    found += [(json.dumps(example), "") for example in encode_row(row)]
                except Exception as error:  # of a stranger's row anything may be wrong
                    why = error if isinstance(error, ValueError) else f"it cannot be read ({type(error).__name__})"
                    there = ", ".join(key for key, value in zip(columns, values, strict=True) if value is not None)
                    why = f"{why}; it has {there or 'no field'}" if "missing" in str(why) else why
                    found.append(("", f"{source} row {numbers[i] + 1}: {why}"[:1000]))
            return {"example": [example for example, _ in found], "bad": [bad for _, bad in found]}

        several = os.cpu_count() if len(raw) > 20000 else None
        try:
            table = raw.map(encoded, with_indices=True, batched=True, remove_columns=raw.column_names, features=features,
                            num_proc=several, new_fingerprint=uuid.uuid4().hex)  # fmt: skip
        except (OSError, ValueError) as error:  # of a full disk a ValueError is left, the file being closed
            why = error if isinstance(error, OSError) else error.__context__
            if not isinstance(why, OSError):
                raise
            stop(f"{source}: its rows cannot be cached ({why}): make room, or set HF_DATASETS_CACHE to where some is")
        table = table if len(raw) else datasets.Dataset.from_dict({x: [] for x in features}, features)
        bad = [reason for reason in table["bad"] if reason]
        if bad and (source == "toy" or is_file(source)) and not getattr(args, "skip_bad_rows", False):
            stop(f"{bad[0]}. Mend the row, or leave such rows out with --skip_bad_rows")
        if bad and rank == 0:
            print(f"{source}: {len(bad)} of {len(raw)} rows left out, the first one because of {bad[0]}")
        tables.append(table.select([i for i, reason in enumerate(table["bad"]) if not reason]) if bad else table)
    table = datasets.concatenate_datasets(tables) if local == 0 else None
    if world > 1:
        if local == 0:
            table.save_to_disk(folder)
        table = datasets.load_from_disk(gather_lists([folder], world)[rank - local])
        gather_lists([], world)
        shutil.rmtree(folder, ignore_errors=True)  # what is mapped outlives its name
    return table.with_transform(lambda rows: {"example": [json.loads(x) for x in rows["example"]]})["example"]


# Copied from sft.check_held_out
def check_held_out(args, held_out: list, learned, rank: int, need: str = "row"):
    """--eval_data must have a `need`; how many of its rows are learned as well is told."""
    if not held_out:
        stop(f"--eval_data {args.eval_data} ({args.eval_split}) has no {need} to look at")
    asked = set(map(repr, held_out)) if rank == 0 else ()  # what is learned may be far larger
    known = {x for x in map(repr, learned) if x in asked} if asked else ()
    twice = sum(repr(x) in known for x in held_out) if known else 0
    if twice:
        print(f"--eval_data: {twice} of {len(held_out)} examples are learned as well: what they tell is not held out")


# Copied from sft.canonical
def canonical(row: dict) -> dict:
    """One row in this project's names: prompt, completion, chosen, rejected, responses [{text, score, policy}]; `answer`
    tells what the completion is. ValueError names the field that is wrong. docs/data.md shows how each dataset is read."""
    row = {field: value for field, value in row.items() if value is not None}  # tables fill with nulls
    roles = {"Human": "user", "Assistant": "assistant"}
    turn = re.compile(r"\n\n(Human|Assistant):(.*?)(?=\n\n(?:Human|Assistant):|\Z)", re.S)
    for field in ("prompt", "rejected", "chosen"):  # HH: transcripts
        if str(row.get(field)).startswith("\n\nHuman:"):
            turns = [(roles[who], text.strip()) for who, text in turn.findall(row[field])]
            turns = turns[:-1] if field == "prompt" and turns[-1] == ("assistant", "") else turns
            row[field] = [{"role": role, "content": text} for role, text in turns]
    for field in ("completion", "rejected", "chosen", "messages"):
        value = row.get(field)
        if isinstance(value, list):
            if not value or not all(isinstance(m, dict) and isinstance(m.get("content"), str) for m in value):
                raise ValueError(f"field {field} is not a list of {{role, content}} messages")
            if field == "messages" and value[-1].get("role") == "user":
                row["prompt"] = value
                continue
            if value[-1].get("role") != "assistant":
                raise ValueError(f"field {field} does not end with an answer of the assistant")
            row |= {"prompt": value[:-1]} if len(value) > 1 or field == "messages" else {}
            row["completion" if field == "messages" else field] = value[-1]["content"]
    if isinstance(row.get("info"), dict):  # summarize_from_feedback: comparisons, and summaries graded by axes
        row["prompt"] = f"{row['info'].get('post') or row['info'].get('article')}\n\nTL;DR:"
        found = row.get("summaries") or [row.get("summary") or {}]
        score = lambda i: 2.0 * (i == row["choice"]) - 1 if "choice" in row else found[i].get("axes", {}).get("overall")
        row["responses"] = [response | {"score": score(i)} for i, response in enumerate(found)]
    if "article" in row and "highlights" in row:  # CNN/DailyMail
        row |= {"prompt": f"{row['article']}\n\nTL;DR:", "completion": row["highlights"]}
    if "instruction" in row and "prompt" not in row:  # Alpaca; UltraFeedback
        row["prompt"] = "\n\n".join(filter(None, (row["instruction"], row.get("input"))))
        row |= {"completion": row["output"]} if "output" in row else {}
    for field in ("completions", "responses"):
        if not isinstance(row.get(field, []), list) or not all(isinstance(r, dict) for r in row.get(field, [])):
            raise ValueError(f"field {field} is not a list of {{text, score, policy}}")
    if "completions" in row:
        grade = lambda c: c.get("overall_score") if c.get("fine-grained_score") is None else c["fine-grained_score"]
        found = row["completions"]
        row["responses"] = [{"text": c.get("response"), "score": grade(c), "policy": c.get("model")} for c in found]
    if row.get("responses") == [] and not {"completion", "chosen"} & row.keys():
        raise ValueError("field responses is empty")
    scores = [response.get("score") for response in row.get("responses", [])]
    for score in scores:  # means and variances of 1e15 still fit into fp32
        number = isinstance(score, (int, float)) and not isinstance(score, bool)
        if score is not None and not (number and abs(score) <= 1e15):
            raise ValueError(f"field score is {score!r:.50}, not a finite number of a size that can be averaged")
    for policy in [response.get("policy") for response in row.get("responses", [])]:
        if policy is not None and not (isinstance(policy, (str, int)) and len(str(policy)) < 1000):
            raise ValueError("field policy is not a name")
    row["answer"] = "completion"  # what SFT imitates; on preferences or grades, the better response
    if "completion" not in row and "chosen" in row:
        row |= {"completion": row["chosen"], "answer": "chosen"}
    elif "completion" not in row and scores:
        whole = lambda i: row["responses"][i].get("complete") is not False
        best = max(range(len(scores)), key=lambda i: (scores[i] is not None, whole(i), scores[i] or 0))
        row |= {"completion": row["responses"][best].get("text"), "answer": "best"}
        row |= {} if whole(best) else {"complete": False}
    return row


# Copied from sft.as_messages
def as_messages(prompt) -> list[dict]:
    """A prompt as chat messages; ValueError if it is none."""
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    text = lambda m: isinstance(m, dict) and all(isinstance(m.get(field), str) for field in ("role", "content"))
    if not chat or not isinstance(chat, list) or not all(map(text, chat)):
        raise ValueError("field prompt is missing, or neither a string nor a list of {role, content} messages")
    if not any(m["content"].strip() for m in chat if m["role"] != "system"):
        raise ValueError("field prompt is empty, or has a system message only")
    return chat


# Copied from sft.MARK
MARK = "ANSWERMARKER"  # an answer that shows in the chat template's text what stands before and behind one

# Copied from sft.EARLIER
EARLIER = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": MARK}]


# Copied from sft.control_tokens
@functools.cache
def control_tokens(tokenizer) -> tuple[int, dict[str, int]]:
    """The token that ends an answer, which is what the chat template writes behind one (`<|im_end|>`, say) or else EOS; and
    all tokens that text must not hold."""
    text = tokenizer.apply_chat_template(EARLIER, tokenize=False) if tokenizer.chat_template else ""
    behind = tokenizer(text.rpartition(MARK)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    end = next((i for i in behind if i in added), tokenizer.eos_token_id)
    written = lambda token: token.content.strip() and token.content in text  # by the template: special in all but name
    return end, {token.content: i for i, token in added.items() if token.special or i == end or written(token)}


# Copied from sft.text_ids
def text_ids(tokenizer, text: str) -> list[int]:
    """Ids of a user's or a model's text. A control token that is spelled in it stays text; ValueError where the tokenizer
    cannot tell the two apart."""
    end, control = control_tokens(tokenizer)
    spelled = {i for token, i in control.items() if token in text}
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=bool(spelled))["input_ids"]
    harmless = {tokenizer.unk_token_id, tokenizer.pad_token_id} - {end, tokenizer.eos_token_id}
    if not (spelled - harmless).isdisjoint(ids):
        raise ValueError("a control token is spelled in the text, and this tokenizer cannot tell it from a real one")
    return ids


# Copied from sft.chat_ids
def chat_ids(tokenizer, chat: list, later: bool = False) -> list[int]:
    """Ids of a conversation up to where the assistant begins, as the chat template renders it: from the start, or
    `later`, from behind another answer's end. A system message that a family does not know opens the first question."""
    ids, control = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"], control_tokens(tokenizer)
    end, texts = tokenizer.decode(control[0]), [m["content"] for m in chat]

    def rendered(chat):
        try:
            text, why = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), None
        except Exception as error:  # templates raise what they like for roles they do not know
            text, why = "", error
        if len(chat) > 1 and chat[0]["role"] == "system" and (why or chat[0]["content"].strip() not in text):
            text = f"{chat[0]['content']}\n\n{chat[1]['content']}"
            return rendered([chat[1] | {"content": text}, *chat[2:]])
        if why:
            raise ValueError(f"the chat template does not take field prompt: {why}")
        return end + text.partition(MARK)[2].lstrip(" ").removeprefix(end) if later else text

    before = EARLIER if later else []
    if not any(token in text for text in texts for token in control[1]):
        return ids(rendered(before + chat))[later:]
    names = [f"MESSAGE{i}MARKER" for i in range(len(chat))]
    named = [m | {"content": name} for m, name in zip(chat, names, strict=True)]
    first, *rest = re.split("|".join(names), rendered(before + named))
    if len(rest) != len(texts):
        raise ValueError("a control token is spelled in field prompt, and the chat template takes messages apart")
    return sum([text_ids(tokenizer, text) + ids(after) for text, after in zip(texts, rest)], ids(first))[later:]


# Copied from sft.response_ids
def response_ids(tokenizer, text, args, field: str = "text") -> list[int]:
    """Ids of a response: the text's, and the token that ends a turn; cut, and then without it, at --max_response_tokens."""
    if not isinstance(text, str):
        raise ValueError(f"field {field} is missing or not text")
    return [*text_ids(tokenizer, text), control_tokens(tokenizer)[0]][: args.max_response_tokens]


# Copied from sft.encode
def encode(tokenizer, row: dict, field: str | None, args):
    """(prompt ids, response ids) of a row; ValueError if it cannot be used. The prompt is rendered up to where the assistant
    begins; the response is of the text in `field`, or empty."""
    ids = chat_ids(tokenizer, as_messages(row.get("prompt")))
    if len(ids) > args.max_prompt_tokens:
        raise ValueError(f"field prompt has {len(ids)} tokens, more than --max_prompt_tokens {args.max_prompt_tokens}")
    return ids, [] if field is None else response_ids(tokenizer, row.get(field), args, field)


# Copied from sft.layout
def layout(lengths: list[int], packed: bool, room: int = 0):
    """Where sequences lie: ((row, column) of each, number of rows, their length). Packed, they share rows so that padding
    and attention, which goes by a row's length squared, cost least; within `room` tokens if they fit at all."""
    if not packed:
        return [(i, 0) for i in range(len(lengths))], len(lengths), max(lengths, default=0)
    order, best, found = sorted(range(len(lengths)), key=lambda i: -lengths[i]), math.inf, ([], 0, 0)
    for rows in range(1, len(lengths) + 1):
        if rows * lengths[order[0]] > best:  # more rows can but cost more
            break
        ends, places = [(0, row) for row in range(rows)], [(0, 0)] * len(lengths)  # a heap: the shortest row first
        for i in order:
            end, row = ends[0]
            places[i] = (row, end)
            heapq.heapreplace(ends, (end + lengths[i], row))
        width = max(end for end, _ in ends)
        cost = rows * width * (1 + width / 24576)  # of a model of a few thousand dimensions; it need not be exact
        if cost < best and (rows == 1 or rows * width <= room or sum(lengths) > room):
            best, found = cost, (places, rows, width)
    return found


# Copied from sft.lay_out
def lay_out(sequences: list[list[int]], pad_token_id: int, args=None):
    """(input_ids (B, L), position_ids (B, L) or None, where each begins in input_ids.flatten()) of token sequences: packed
    into rows under `args` without --padding, else a row each."""
    packed, room = bool(args) and not args.padding, args.micro_tokens if args else 0
    places, rows, width = layout([len(sequence) for sequence in sequences], packed, room)
    input_ids, positions = torch.full((rows, width), pad_token_id), torch.zeros((rows, width), dtype=torch.long)
    for (row, column), sequence in zip(places, sequences, strict=True):
        input_ids[row, column : column + len(sequence)] = torch.tensor(sequence)
        positions[row, column : column + len(sequence)] = torch.arange(len(sequence))
    return input_ids, positions if rows < len(sequences) else None, [row * width + column for row, column in places]


# Copied from sft.micro_batches
def micro_batches(batch: list, rank: int, world: int, args, sizes=lambda row: [len(row[0]) + len(row[1])]):
    """(this rank's micro-batches of one optimizer step, useful share of the tokens that ranks compute or wait for).

    Rows are (prompt, response, ...), of one sequence or of those whose `sizes` are given. They are dealt, the longest
    first, so that micro-batches hold up to --micro_tokens and cost about the same, as many for every rank. Where there are
    too few, a row with an empty response fills up: it has no token in any loss."""
    lengths = [sizes(row) for row in batch]
    total, order = sum(map(sum, lengths)), sorted(range(len(batch)), key=lambda i: -sum(lengths[i]))
    most = math.ceil(len(batch) / world)  # then each row stands alone
    count = min(most, max(1, total // (world * args.micro_tokens)))
    while True:
        bins, costs = [[] for _ in range(count * world)], [0.0] * (count * world)
        for j, i in enumerate(order):  # padded, those of like length go together
            chunk = world * math.ceil(len(batch) / len(bins))
            at = j // chunk * world + j % world if args.padding else costs.index(min(costs))
            bins[at].append(i)
            costs[at] += sum(n * (1 + n / 24576) for n in lengths[i])
        held = [layout([n for i in some for n in lengths[i]], not args.padding, args.micro_tokens) for some in bins]
        areas = [rows * width for _, rows, width in held]
        if all(area <= args.micro_tokens or len(some) == 1 for area, some in zip(areas, bins, strict=True)):
            break
        count = min(most, count + max(1, count // 16))
    areas, bins = zip(*sorted(zip(areas, bins, strict=True), key=lambda of: -of[0]), strict=True)  # like ones at a time
    found = [[batch[i] for i in some] or [(batch[order[-1]][0], [], *batch[order[-1]][2:])] for some in bins]
    waited = sum(max(areas[at : at + world]) for at in range(0, len(areas), world))
    return found[rank::world], total / (world * waited)


# -------------------------------------------------------------------------------------------------------------- models


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
    from jinja2 import TemplateError
    from transformers import AutoTokenizer

    import toy

    try:
        load = functools.partial(AutoTokenizer.from_pretrained, trust_remote_code=args.trust_remote_code)
        tokenizer = toy.tokenizer() if name == "toy" else load(name)
        if chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE if chat_template == "plain" else Path(chat_template).read_text()
            control_tokens(tokenizer)  # else a template's error would be told as a row's
    except (OSError, ValueError, TemplateError) as error:
        told = f" with --chat_template {chat_template}" if chat_template else ""
        stop(f"cannot load a tokenizer from {name!r}{told}: {error}".split("\n")[0])
    if chat and not tokenizer.chat_template:
        command = f"python sft.py --model {name} --chat_template plain"
        stop(f"{name} has no chat template: train it with `{command}` (or a file)")
    if chat and tokenizer.eos_token_id is None:
        stop(f"the tokenizer of {name} has no EOS token: set eos_token in its tokenizer_config.json")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # harmless: every mask here comes from lengths
    return tokenizer


# Copied from sft.zero_3
@contextlib.contextmanager
def zero_3(args):
    """Under ZeRO stage 3, models are built in parts in this context: no rank ever holds one whole."""
    parts = None
    if getattr(args, "zero_stage", 0) == 3:
        from transformers.integrations import HfDeepSpeedConfig

        stage = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": args.bf16}}
        parts = HfDeepSpeedConfig(stage | {"train_micro_batch_size_per_gpu": 1})  # in force as long as it lives
    yield
    del parts


# Copied from sft.whole
def whole(module, args, writer: int | None = None):
    """Inside this context every rank sees whole weights, and `writer` may change them (ZeRO-3 keeps them in parts)."""
    if getattr(args, "zero_stage", 0) < 3:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(module.parameters()), modifier_rank=writer)


# Copied from sft.load_model
def load_model(kind: str, name: str, tokenizer, args, frozen: bool = False):
    """A `causal`, `value` or `reward` model of `kernels.model_class`, without dropout. Trained weights are fp32 (bf16 products
    by autocast), but bf16 where DeepSpeed keeps fp32 ones; frozen weights, and the base of LoRA, are bf16 under --bf16."""
    import transformers

    import toy

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)  # peft asks by the old name
    half = args.bf16 and (frozen or args.lora_r or by_deepspeed(args))
    trust, labels = {"trust_remote_code": args.trust_remote_code}, {} if kind == "causal" else {"num_labels": 1}
    options = {"dtype": torch.bfloat16 if half else torch.float32} | trust
    if args.attention != "auto" and not (kind == "reward" and frozen):  # a reward model of another family has its own
        options["attn_implementation"] = args.attention
    try:
        load = transformers.AutoConfig.from_pretrained
        config = toy.config(**labels) if name == "toy" else load(name, **trust, **labels)
        for key in [k for k in config.to_dict() if "dropout" in k or "pdrop" in k]:
            setattr(config, key, 0.0)
        if kind == "causal" and any("Classification" in x for x in config.architectures or ()):
            stop(f"{name} is a reward or value model, and a language model is wanted here: name another")
        auto = model_class(kind, config)
        with zero_3(args):
            load = auto.from_config if name == "toy" else functools.partial(auto.from_pretrained, name)
            model = load(config=config, **options)
    except (OSError, ValueError, ImportError) as error:
        stop(f"cannot load a model from {name!r}: {str(error).splitlines()[0]}")
    another = kind == "causal" and name not in ("toy", tokenizer.name_or_path)
    if another and load_tokenizer(name, args, chat=False).get_vocab() != tokenizer.get_vocab():
        stop(f"{name} and {tokenizer.name_or_path} have different tokenizers: name a model of the same family")
    strange = next((n for n, p in model.named_parameters() if not getattr(p, "ds_tensor", p).isfinite().all()), None)
    if strange:
        stop(f"{name} has weights that are not finite, such as {strange}: name a model that was trained to its end")
    embedded = getattr(model.get_input_embeddings().weight, "ds_shape", model.get_input_embeddings().weight.shape)[0]
    if embedded < len(tokenizer):
        stop(
            f"{name} has embeddings for {embedded} tokens, and its tokenizer has {len(tokenizer)}: they do not belong together"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    if kind == "causal":  # a hub model's sampling defaults (top-k, penalties, ...) would bias rollouts
        ends = model.generation_config.eos_token_id
        ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, control_tokens(tokenizer)[0]}
        settings = {"eos_token_id": sorted(ends - {None}), "pad_token_id": tokenizer.pad_token_id}
        model.generation_config = transformers.GenerationConfig(**settings)
    if frozen and kind != "causal" and getattr(args, "zero_stage", 0) < 3:
        getattr(model, head_name(model)).float()  # the one number that it gives is not rounded to bf16
    if not frozen and args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.requires_grad_(False).eval() if frozen else model


# Copied from sft.lora_config
def lora_config(model, args, head: str | None = None):
    """LoRA on every linear layer of the backbone; `head` is trained in full and saved with the adapter."""
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D

    names = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    targets = sorted(names - {"lm_head", "embed_out", "score", "classifier", "pooler"})
    return LoraConfig(
        r=args.lora_r, lora_alpha=32, lora_dropout=getattr(args, "lora_dropout", 0.0), target_modules=targets,
        modules_to_save=[head] if head else None,
    )  # fmt: skip


# Copied from sft.add_lora
def add_lora(model, args, head: str | None = None):
    """The model with an adapter. What is trained is fp32, but where DeepSpeed keeps fp32 master weights."""
    from peft import get_peft_model

    model.enable_input_require_grads()  # for gradient checkpointing: the embeddings are frozen
    with zero_3(args):
        model = get_peft_model(model, lora_config(model, args, head))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16 if args.bf16 and by_deepspeed(args) else torch.float32)
    return model


# Copied from sft.plain
def plain(model):
    """The Hugging Face model inside a LoRA wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Copied from sft.check_packing
def check_packing(module, args):
    """Stops if the family mixes up sequences in one row. module: a policy, value or reward model, or an engine around one."""
    model = plain(getattr(module, "module", module).model)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16, enabled=args.bf16):
        if not args.padding and not packing_gap(model) < (0.05 if args.bf16 else 1e-3):
            stop(f"{type(model).__name__} mixes up sequences that are packed into one row: give --padding")


# -------------------------------------------------------------------------------------------------- engine, run folder


# Copied from sft.AdamW
class AdamW(torch.optim.AdamW):
    """Leaves weights and state as they are, on all ranks alike, where a gradient is not finite, and counts how often."""

    norm, skipped = None, 0

    @torch.no_grad()
    def step(self, closure=None):
        norm = self.norm
        if norm is None:  # under DeepSpeed each rank has gradients of its own
            every = [p for group in self.param_groups for p in group["params"]]
            norm = torch.stack([(p.grad if p.grad is not None else p[:0]).sum() for p in every]).sum()
        bad = 1 - norm.isfinite().float()
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.skipped = self.skipped + bad
        if self.defaults["fused"]:
            self.found_inf = bad  # the kernel reads it: the device is not waited for
        elif bad:
            return
        super().step()


# Copied from sft.Engine
class Engine:
    """Backward passes and optimizer steps. One process with ZeRO stage 0 is plain torch; anything else is DeepSpeed.

    Losses are already divided by the whole step's token count, so gradients are *summed* over micro-batches and ranks:
    DeepSpeed's mean over ranks is undone."""

    def __init__(self, module, args, world: int):
        self.module, self.args, self.world, self.deepspeed = module, args, world, None
        parameters = [p for p in module.parameters() if p.requires_grad]
        fused = not by_deepspeed(args) or parameters[0].is_cuda or None
        self.optimizer = self.adamw = AdamW(parameters, lr=args.learning_rate, weight_decay=0.0, fused=fused)
        if not by_deepspeed(args):
            return
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1, "gradient_clipping": args.max_grad_norm, "steps_per_print": 10**9,
            "bf16": {"enabled": args.bf16},
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
            # stage 0 in bf16 would sum the ranks' gradients in bf16 and shorten the first step by a quarter
            "zero_optimization": {"stage": args.zero_stage or int(args.bf16)},
        }  # fmt: skip
        self.deepspeed, self.optimizer, *_ = deepspeed.initialize(model=module, optimizer=self.optimizer, config=config)

    def __call__(self, *inputs, **options):
        with self.autocast():
            return (self.deepspeed or self.module)(*inputs, **options)

    @property
    def skipped(self):
        """Updates so far whose gradient was not finite."""
        return self.adamw.skipped

    def autocast(self):
        """bf16 products for fp32 weights; DeepSpeed casts the weights themselves."""
        device = next(self.module.parameters()).device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.args.bf16 and not self.deepspeed)

    def set_rate(self, rate: float):
        """The learning rate of the coming step; call it before the step's first `backward`."""
        self.rate = rate
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def backward(self, loss, last: bool = True):
        """Of each micro-batch; `last` tells that the step's gradients are complete."""
        if not self.deepspeed:
            return loss.backward()
        self.deepspeed.set_gradient_accumulation_boundary(last)
        self.deepspeed.backward(loss * self.world, scale_wrt_gas=False)
        self.deepspeed.step()  # acts after the last

    def step(self):
        """Returns the gradient's global norm before clipping."""
        if self.deepspeed:
            return self.deepspeed.get_global_grad_norm()
        norm = torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.args.max_grad_norm or float("inf"))
        self.optimizer.norm = norm
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def save(self, folder: Path):
        if self.deepspeed:
            return self.deepspeed.save_checkpoint(str(folder), tag="engine", exclude_frozen_parameters=True)
        weights = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        torch.save({"weights": weights, "optimizer": self.optimizer.state_dict()}, folder / "engine.pt")

    def load(self, folder: Path):
        if self.deepspeed:
            return self.deepspeed.load_checkpoint(str(folder), tag="engine", load_module_strict=False)
        saved = torch.load(folder / "engine.pt", weights_only=True)
        self.module.load_state_dict(saved["weights"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])


# Copied from sft.replace
def replace(path: Path, part: Path, text: str | None = None):
    """`part`, a file or folder, takes the place of `path` once all of it is on the disk."""
    if text is not None:
        part.write_text(text, encoding="utf-8")
    for file in [part] if part.is_file() else [x for x in part.rglob("*") if x.is_file()]:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
    if path.is_dir():
        shutil.rmtree(path)
    part.rename(path)


# Copied from sft.writing
@contextlib.contextmanager
def writing(path: Path):
    """What cannot be written is one line; what was whole before stays."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save says RuntimeError
        stop(
            f"{path} cannot be written: {str(error).splitlines()[0]}. Make room or name another --output_dir; what was saved before is whole"
        )


# Copied from sft.FREE
FREE = (
    "resume", "output_dir", "report_to", "save_every", "max_skipped", "micro_tokens", "gradient_checkpointing", "cache_gb",
)  # fmt: skip


# Copied from sft._lock
_lock = []  # held until this process ends or begins another run


# Copied from sft.claim
def claim(args, ends=("summary.json", "final")) -> bool:
    """Takes --output_dir for this process. An earlier run there is moved aside; with --resume it must be one that had the
    same flags, but for FREE. True if that had come to its end, which left `ends`."""
    folder, settings = Path(args.output_dir), json.loads(json.dumps(dataclasses.asdict(args)))
    _lock.clear()
    if folder.exists() != folder.is_dir() or folder.is_symlink() > folder.exists():
        stop(f"--output_dir {folder} is not a folder: name another")
    here, mine = folder.resolve(), ("lock", "args.json.part")  # what a run has that was killed before it began
    found = [x for x in folder.iterdir() if x.name not in mine] if folder.is_dir() else []
    again = bool(found) and args.resume
    given = {name: x.split(",") for name, x in settings.items() if isinstance(x, str) and name != "output_dir"}
    names = {f"--{name} {x.strip()}": Path(x.strip()) for name, some in given.items() for x in some if x.strip()}
    held = ["the folder you are in"] if Path.cwd().is_relative_to(here) else []
    held += [
        name for name, path in names.items() if not again and path.resolve().is_relative_to(here) and path.exists()
    ]
    if held:
        stop(f"--output_dir {folder} holds {held[0]}: name another")
    with writing(folder):
        if found:
            _lock.append(locked(folder / "lock"))
        if again:
            try:
                before = json.loads((folder / "args.json").read_text())
            except (OSError, ValueError):
                before = {}
            if set(before) != set(settings):
                stop(f"--resume: {folder} holds no run of this script and version: name another --output_dir")
            changed = [name for name in settings if name not in FREE and before[name] != settings[name]]
            if changed:
                stop(f"--resume: --{changed[0]} was {before[changed[0]]!r} in {folder}, now {settings[changed[0]]!r}: "
                     "give it as it was, or another --output_dir")  # fmt: skip
            return all((folder / name).exists() for name in ends)
        if found:
            aside = next(p for p in (Path(f"{folder}.{i}") for i in range(1, 10**6)) if not p.exists())
            folder.rename(aside)
            print(f"{folder} held an earlier run: moved to {aside}")
        elif args.resume:
            print(f"--resume: {folder} holds no run yet: one is begun")
        folder.mkdir(parents=True, exist_ok=True)
        _lock[:] = [locked(folder / "lock")]
        replace(folder / "args.json", folder / "args.json.part", json.dumps(settings, indent=2) + "\n")
    return False


# Copied from sft.locked
def locked(path: Path):
    """The file, locked; the lock ends with the process, however that ends."""
    file = open(path, "a+")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        stop(
            f"{path.parent} is being written by another run ({file.read().strip()}): name another --output_dir, or wait"
        )
    except OSError:
        pass  # a file system that has no locks
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}\n")
    file.flush()
    return file


# Copied from sft.step_of
def step_of(line: str) -> int:
    """The step of a row that one of ours has written; 0 for anything else, such as what a kill has cut."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return 0


# Copied from sft.tracker
def tracker(name: str, args):
    """A function that takes a row of metrics to tensorboard, wandb or trackio. Nothing is sent that is not asked for."""
    folder, settings = Path(args.output_dir), dataclasses.asdict(args)
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(folder / name))
            return lambda row: [writer.add_scalar(k, v, row["step"]) for k, v in row.items()] + [writer.flush()]
        module = importlib.import_module({"wandb": "wandb", "trackio": "trackio"}[name])
    except KeyError:
        stop(f"--report_to {name}: choose from tensorboard, wandb and trackio, several with commas between them")
    except ImportError:
        stop(f"--report_to {name} is not installed: pip install {name}")
    module.init(project="lean-rlhf", name=f"{folder.parent.name}/{folder.name}", config=settings)
    return lambda row: module.log(row, step=row["step"])


# Copied from sft.model_card
def model_card(args, script: str) -> str:
    """README.md of a model that may go to the hub: what made it, with which flags."""
    start = getattr(args, "model", None) or args.policy
    base = "" if Path(start).exists() or start == "toy" else f"base_model: {start}\n"
    flags = "".join(
        f"| `--{name}` | `{value}` |\n"
        for name, value in dataclasses.asdict(args).items()
        if name != "output_dir" and value not in ("", ())
    )
    return (
        f"---\nlibrary_name: transformers\n{base}tags: [lean-rlhf, {script}]\n---\n\n# {Path(args.output_dir).name}\n\n"
        f"Trained by `{script}.py` of lean-rlhf, from {start} on {args.data}.\n\n| flag | value |\n| --- | --- |\n{flags}"
    )


# Copied from sft.Run
class Run:
    """The run folder: args.json, metrics.jsonl (one object a step), checkpoints/, snapshots/, best/, final/, summary.json."""

    def __init__(
        self, args, engine, model, tokenizer, rank: int, total: int, started: float, bar=("loss",), best="eval_loss"
    ):
        self.args, self.engine, self.model, self.tokenizer, self.rank = args, engine, model, tokenizer, rank
        self.best = best if getattr(args, "keep_best", False) else ""
        held = getattr(args, "eval_data", "") or getattr(args, "eval_share", 0)
        if self.best and not (held and 0 < args.eval_every <= total):
            stop(
                f"--keep_best chooses among looks at held-out rows: give --eval_data, and --eval_every of at most {total} steps"
            )
        self.started, self.bar_keys, self.world, self.step = started, bar, engine.world, 0
        self.settings, self.pending, self.state = getattr(args, "settings", "as in the code"), [], {}
        self.folder, token = Path(args.output_dir), uuid.uuid4().hex
        self.skipped, self.updates_skipped, self.read_every = 0, 0, 1 if hasattr(args, "rollout_batch_size") else 10
        ended = rank == 0 and claim(args)
        if rank == 0:
            (self.folder / "token").write_text(token)
        (ended, token), seen = gather_lists([(ended, token)], self.world)[0], self.folder / "token"
        if ended:
            if rank == 0:
                print(f"{self.folder} has come to its end already: nothing is left to do")
            raise SystemExit(0)
        if not any((seen.is_file() and seen.read_text() == token) or time.sleep(1) for _ in range(5)):
            stop(f"--output_dir {self.folder} is not one folder for all hosts: name one on a file system of all")
        gather_lists([], self.world)
        self.name, of = Path(sys.argv[0]).stem, getattr(args, "model", None) or args.policy
        pause = 0.2 if sys.stderr.isatty() else 30  # seconds between drawings: a log file wants few
        if rank == 0:
            seen.unlink()
            sizes = [(getattr(p, "ds_numel", p.numel()) / 1e6, p.requires_grad) for p in engine.module.parameters()]
            tokens = args.max_prompt_tokens + args.max_response_tokens + getattr(args, "tau_tokens", 0)
            print(f"{self.name}: {of}, {sum(n for n, _ in sizes):.4g} M parameters, {sum(n for n, on in sizes if on):.4g} M trained, "
                  f"learning rate {args.learning_rate:g}, batch size {getattr(args, 'rollout_batch_size', args.batch_size)}, at most "
                  f"{tokens} tokens a sequence; what no flag gives is {self.settings}")  # fmt: skip
        self.bar = tqdm(total=total, desc=self.name, disable=rank > 0, dynamic_ncols=True, mininterval=pause)

    def restore(self):
        """With --resume: weights, optimizer, generators and loop state of the last checkpoint that can be read."""
        found = sorted(self.folder.glob("checkpoints/step_*[0-9]"), reverse=True) if self.args.resume else []
        names, bad = gather_lists([[str(x) for x in found]], self.world)[0], []  # the first rank's, for all
        for name in names:
            try:
                saved = torch.load(Path(name) / f"rank_{self.rank}.pt", weights_only=True)
                if saved["world"] == self.world:
                    self.engine.load(Path(name))
                why = "" if saved["world"] == self.world else saved["world"]
            except Exception as error:
                why = f"{type(error).__name__}: {error}".splitlines()[0]
            bad = [x for x in gather_lists([why], self.world) if x]
            if worlds := [x for x in bad if isinstance(x, int)]:
                stop(f"--resume: {name} is of {worlds[0]} ranks, and these are {self.world}: start as many as before")
            if not bad:
                torch.set_rng_state(saved["cpu"])
                if torch.cuda.is_available():
                    torch.cuda.set_rng_state(saved["cuda"])
                self.step, self.state = saved["step"], saved["state"]
                self.bar.update(self.step)
                break
            if self.rank == 0:
                print(f"{name} cannot be read ({bad[0]}): left out")
        if bad:
            stop(f"--resume: no checkpoint in {self.folder / 'checkpoints'} can be read: begin anew without it")
        if self.rank == 0:
            for part in [*self.folder.glob("*/step_*.part"), *self.folder.glob("*.part")]:
                shutil.rmtree(part) if part.is_dir() else part.unlink()
            for path in (self.folder / "metrics.jsonl", self.folder / "samples.jsonl"):
                if path.is_file():  # later steps will be taken again
                    lines = path.read_text(errors="replace").splitlines()
                    kept = [line for line in lines if 0 < step_of(line) <= self.step]
                    with writing(path):
                        replace(path, path.with_suffix(".part"), "".join(line + "\n" for line in kept))
        names = [name for name in self.args.report_to.split(",") if name and self.rank == 0]
        self.trackers = [tracker(name, self.args) for name in names]
        _signals.clear()
        _begun[:] = [self.folder]

    def log(self, metrics: dict):
        """End of a step. Tensors are read back every tenth step only (each, where a step is a rollout), so that the device is not
        waited for; then all ranks also learn of a signal that one of them has had."""
        self.step += 1
        seconds = round(time.time() - self.started, 3)
        self.pending.append({"step": self.step, "seconds": seconds, **metrics, "skipped": self.engine.skipped})
        self.bar.update()
        save, read = self.args.save_every and self.step % self.args.save_every == 0, self.step % self.read_every == 0
        signals = list(_signals)
        if self.world > 1:
            signals = [x for some in gather_lists([signals], self.world) for x in some] if read else []
        if save or read or signals:  # before the checkpoint: a resumed run does not take these steps again
            self.flush()
        if getattr(self.args, "snapshot_every", 0) and self.step % self.args.snapshot_every == 0:
            with writing(self.folder / "snapshots"):  # before the checkpoint: what a kill leaves half is made again
                self.write(self.folder / "snapshots" / f"step_{self.step:07d}")
        if self.best in metrics:
            found = float(metrics[self.best])
            sign = -1 if self.best.endswith("loss") else 1
            if sign * found > sign * self.state.get("best", -sign * math.inf):
                self.state |= {"best": found, "best_step": self.step}
                with writing(self.folder / "best"):
                    self.write(self.folder / "best")
        if save or signals:
            self.checkpoint()
        if signals:
            if self.rank == 0:
                words = [*sys.argv, *([] if "--resume" in sys.argv else ["--resume"])]
                print(
                    f"\nended by {signal.Signals(signals[0]).name} after step {self.step}, which is saved. To go on: {shlex.join(words)}"
                )
            raise SystemExit(0)

    def flush(self):
        rows = [{k: float(v) if isinstance(v, torch.Tensor) else v for k, v in row.items()} for row in self.pending]
        self.pending = []
        for row in rows:
            strange = [k for k, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
            before, self.updates_skipped = self.updates_skipped, int(row.pop("skipped"))
            spoilt = self.updates_skipped > before or "loss" in strange
            self.skipped = self.skipped + 1 if spoilt else 0
            if self.skipped >= self.args.max_skipped:
                stop(f"step {row['step']}: {', '.join(strange) or 'a gradient'} not finite, in {self.skipped} steps running, which changed "
                     f"no weight: lower --learning_rate, or look at the data. What was saved before is in {self.folder}")  # fmt: skip
            row |= dict.fromkeys(strange) | ({"skipped": self.updates_skipped - before} if spoilt else {})
        if self.rank or not rows:
            return
        with writing(self.folder / "metrics.jsonl"), open(self.folder / "metrics.jsonl", "a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        for send in self.trackers:
            for row in rows:
                send({k: v for k, v in row.items() if isinstance(v, (int, float))})
        self.bar.set_postfix(
            {k: f"{math.nan if rows[-1][k] is None else rows[-1][k]:.3g}" for k in self.bar_keys}, refresh=False
        )

    def checkpoint(self):
        """Written under a temporary name and renamed when whole. Two are kept."""
        final = self.folder / "checkpoints" / f"step_{self.step:07d}"
        part = final.with_suffix(".part")
        with writing(final):
            part.mkdir(parents=True, exist_ok=True)
            self.engine.save(part)
            generators = {"cpu": torch.get_rng_state()}
            if torch.cuda.is_available():
                generators["cuda"] = torch.cuda.get_rng_state()
            saved = {"step": self.step, "state": self.state, "world": self.world, **generators}
            torch.save(saved, part / f"rank_{self.rank}.pt")
        gather_lists([], self.world)
        if self.rank == 0:
            with writing(final):
                replace(final, part)
                for old in sorted(final.parent.glob("step_*[0-9]"))[:-2]:
                    shutil.rmtree(old)
        gather_lists([], self.world)

    def write(self, folder: Path, merge: bool = False):
        """A Hugging Face folder, renamed when whole; of a LoRA run the adapter, or with `merge` model and adapter."""
        part, model = folder.with_name(folder.name + ".part"), self.model
        with whole(model, self.args):
            if self.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
                if merge and model is not plain(model):
                    model.save_pretrained(part / "adapter")
                    model = model.merge_and_unload()
                model.save_pretrained(part, **({} if model is plain(model) else {"selected_adapters": ["default"]}))
                self.tokenizer.save_pretrained(part)
                if folder.parent == self.folder:  # final/, best/
                    (part / "README.md").write_text(model_card(self.args, self.name), encoding="utf-8")
                for path in part.rglob("adapter_config.json"):  # peft keeps a set, whose order differs from run to run
                    config = json.loads(path.read_text())
                    config["target_modules"] = sorted(config["target_modules"])
                    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
                replace(folder, part)

    def finish(self, found: str = "", **summary) -> Path:
        """Writes final/: a plain Hugging Face folder (a LoRA run's adapter is merged, and kept in final/adapter), and
        summary.json; says what was `found`."""
        self.flush()
        with writing(self.folder / "final"):
            self.write(self.folder / "final", merge=True)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else memory
        spent = {"seconds": round(time.time() - self.started, 1), "peak_memory_mb": round(memory / 2**20)}
        if "best_step" in self.state:
            found += f"; best/ is of step {self.state['best_step']}, {self.best} {self.state['best']:.4g}"
            summary |= {"best_step": self.state["best_step"], f"best_{self.best}": self.state["best"]}
        summary = {"steps": self.step, **spent, **summary, "settings": self.settings}
        self.bar.close()
        if self.rank == 0:
            with writing(self.folder / "summary.json"):
                replace(
                    self.folder / "summary.json",
                    self.folder / "summary.json.part",
                    json.dumps(summary, indent=2) + "\n",
                )
            _lock.clear()
            print(
                f"{self.folder / 'final'}: {self.step} steps in {spent['seconds']:.0f} s, {spent['peak_memory_mb']} MB at most{found}"
            )
        _begun.clear()
        gather_lists([], self.world)
        return self.folder / "final"


if __name__ == "__main__":
    main()
