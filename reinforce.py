"""REINFORCE with a baseline made of rewards alone: `--baseline remax | rloo | grpo | reinforce++ | astar | dpo`. No critic.

Each step: sample responses to a batch of prompts from the policy; score each whole response once with the frozen reward
model; compare it with other responses; then take clipped policy-gradient steps. In memory: policy, reference, reward
model. With r(x, y) standardised and kl_t = log pi_old(y_t) - log pi_ref(y_t), the same A for all t but for the KL:

    remax        A_t = r(x, y) - r(x, greedy response) - beta sum_{k>=t} kl_k                      `reward_advantages`
    rloo         A_t = R_i - mean of the R_j of the other n - 1 responses, R = r(x, y) - beta sum_k kl_k
    grpo         A_t = (r_i - mean of the n) / (std of the n + 1e-4), the KL is not in it
    reinforce++  A_t = normalize(r(x, y) - beta sum_{k>=t} kl_k), over all response tokens of the rollout
    dpo          A_t = +w, -w for the best and the worst of the n, w = sigmoid(-beta (sum_k kl_k of the best - of the worst)):
                 the gradient of DPO's loss on pairs that the policy has just drawn, over beta         `pair_advantages`
    astar        A = r(x, y) - V*(x), V*(x) = beta_1 log mean_i exp(r(x, y_i) / beta_1) of responses y_i of the reference,
                 which --data has with their scores (from sample.py): made once, before training      `optimal_value`
    L = -sum_t m_t min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps) A_t) / sum_t m_t           `dvpo_loss`, by `policy_loss`
    A_t is weighted by min(pi_old / pi_engine, cap) under --tis_cap, as --ratio has it               `truncated_weights`
    L_KL = beta sum_t m_t (e^-d - 1 + d) / sum_t m_t,   d = log pi(y_t) - log pi_ref(y_t),   grpo alone     `k3_loss`
    L_A* = sum_y (beta log pi(y|x) / pi_ref(y|x) - A)^2 / N in the place of L, astar alone            `regression_loss`

What later papers change in L, a flag each; an optimizer step has N responses y, of D tokens in all:

    --ratio            rho_t = pi(y_t) / pi_old(y_t), or for all t of a response                           `log_ratio`
                       sequence: pi(y) / pi_old(y); gspo: (pi(y) / pi_old(y))^(1 / |y|)
    --clip_high        clip(rho_t, 1 - eps, 1 + eps_high)
    --objective cispo  L = -sum_t m_t sg(clip(rho_t, 1 - eps, 1 + eps_high)) A_t log pi(y_t) / sum_t m_t, sg: a constant
    --no_group_std     A_t = r_i - mean of the n, for grpo
    --loss_mean        token: sum_t / D; sequence: sum_t / (|y| N); sum: sum_t / (max_response_tokens N)

    paper                          flags                                                   TRL's loss_type, and more
    RLOO, Ahmadian et al. 2024     --baseline rloo --ratio sequence --loss_mean sequence   RLOOTrainer
    GRPO, Shao et al. 2024         --baseline grpo --loss_mean sequence                    grpo
    Dr. GRPO, Liu et al. 2025      --baseline grpo --loss_mean sum --no_group_std          dr_grpo, scale_rewards none
    DAPO, Yu et al. 2025           --baseline grpo --clip_high 0.28                        dapo, epsilon_high 0.28
    GSPO, Zheng et al. 2025        --baseline grpo --ratio gspo --loss_mean sequence       grpo, importance sampling
                                   --clip 3e-4 --clip_high 4e-4                            at level sequence
    CISPO, MiniMax-M1 2025         --baseline grpo --objective cispo --clip 1              cispo, epsilon_high 5
                                   --clip_high 4

The last four have no KL: --kl_coef 0 --kl_target 0. DAPO's dynamic sampling and penalty on length are not here. CISPO's
paper sets no lower bound, which is --clip 1, and tunes the upper one; 5 is that of ScaleRL (Khatri et al. 2025), in TRL
the bound itself. TRL's bnpo is a mean over one micro-batch's tokens: here no loss depends on how a step is split.

dpo is online DPO (Guo et al. 2024): its gradient but for a constant where a rollout is one update (--n 2, --ppo_epochs 1,
--batch_size equal to --rollout_batch_size, --loss_mean sum, --kl_target 0). With more updates each token's ratio is
clipped, as in PPO; --loss_mean token divides a step by its tokens, not by its pairs.

astar is A*-PO (Brantley et al. 2025): one response to a prompt, and the value of the optimal policy, made beforehand, in
the place of a baseline; one update a rollout (--ppo_epochs 1, --batch_size equal to --rollout_batch_size). Its authors
draw 8 responses for V* (sample.py --n 8), whose rewards are 0 or 1; they let beta_1 differ from beta.

Where the KL goes: into the reward, as a return-to-go (remax, reinforce++) or whole (rloo), or into the loss (grpo; k3).
What is clipped: each token's ratio, as in PPO, for all but astar, unless --ratio says otherwise. That is the papers' for grpo
and reinforce++; ReMax and RLOO take one unclipped step per rollout, which is --ppo_epochs 1 with --batch_size equal to
--rollout_batch_size: the ratio is then 1, and the gradients of --ratio token (with --loss_mean token) and sequence differ
by the factor D / N alone. With --ratio token, --loss_mean sequence gives a token of a long response less weight.

What differs from ppo.py: no critic, hence no values, no gae and no second optimizer; several responses to a prompt, or
a greedy one beside each. A token is credited with all that comes of its response.

    python reinforce.py --baseline rloo                                             # CPU: the toy world
    python reinforce.py llama3.2-3b --baseline grpo --lora_r 16                     # 1 GPU
    torchrun --nproc_per_node 8 reinforce.py llama3.2-3b --baseline reinforce++     # 8 GPUs
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import fcntl
import functools
import gzip
import hashlib
import heapq
import importlib
import importlib.util
import itertools
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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from kernels import (
    head_name,
    hidden_states,
    keyed_gumbel,
    logit_gap,
    model_class,
    normalize_values,
    packing_gap,
    patch_head,
    read_head,
)


@dataclass
class Args:
    policy: str = "runs/sft/final"
    """the policy to optimise: a Hugging Face folder or hub name with a chat template"""
    reference: str = ""
    """the frozen reference of the KL; default: the starting policy"""
    reward_model: str = "runs/rm/final"
    """the frozen reward model, from rm.py; with --data toy also `gold`, the toy world's true reward"""
    reward: tuple[str, ...] = ()
    """instead of a reward model, functions of your own, added: `check.py:correct 0.1*check.py:short`; see docs/data.md"""
    baseline: Literal["remax", "rloo", "grpo", "reinforce++", "astar", "dpo"] = "rloo"
    """what a reward is compared with: the greedy response's, those of the same prompt (rloo, grpo, dpo), the rollout's, or V* (astar)"""
    n: int = -1
    """responses per prompt; -1: 4 for rloo and grpo, 2 for dpo, else 1"""
    data: str = "toy"
    """prompts: `toy`, a hub name, or a .json/.jsonl(.gz)/.parquet file with `prompt`; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[80%:]` (of a fixed shuffle), `train[2000:4000]`"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
    output_dir: str = "runs/reinforce"
    """the run's folder: args.json, metrics.jsonl, samples.jsonl, checkpoints/, final/"""
    seed: int = 0
    """seed of sampling, prompt order and minibatches"""
    steps: int = 100
    """rollouts; each is followed by ppo_epochs passes over it"""
    learning_rate: float = 2e-4
    """learning rate of AdamW, constant after warm-up"""
    warmup_steps: int = 0
    """optimizer steps of linear warm-up"""
    max_grad_norm: float = 1.0
    """gradient clipping by global norm; 0 turns it off"""
    rollout_batch_size: int = 64
    """responses per rollout, over all ranks: n to each prompt; the greedy ones of remax come on top"""
    batch_size: int = 32
    """responses per optimizer step, over all ranks"""
    micro_tokens: int = 4096
    """tokens per forward pass on one rank, in scoring and in training; a longer sequence is a pass of its own"""
    padding: bool = False
    """one padded sequence per row instead of packed rows: for families that cannot keep packed sequences apart"""
    ppo_epochs: int = 2
    """passes over each rollout"""
    clip: float = 0.2
    """PPO's clipping parameter eps"""
    clip_high: float = 0.0
    """the clipping parameter of ratios above 1 (DAPO's clip-higher); 0: that of clip"""
    objective: Literal["ppo", "cispo"] = "ppo"
    """the clipped objective, or the log-probs weighted by the clipped ratio, under which no token loses its gradient"""
    ratio: Literal["token", "sequence", "gspo"] = "token"
    """the importance ratio: of each token; of the whole response, one action; of that to the power 1 / length (GSPO)"""
    loss_mean: Literal["token", "sequence", "sum"] = "token"
    """the loss is the mean over all response tokens; or over responses of each one's own mean (1/|o| of the GRPO paper); or
    the sum over tokens, divided by max_response_tokens for each response (Dr. GRPO)"""
    group_std: bool = True
    """grpo divides by the standard deviation of a prompt's rewards; --no_group_std does not (Dr. GRPO)"""
    kl_coef: float = 0.05
    """beta, the strength of the KL: in units of the standardised reward; for grpo, in those of the advantage"""
    value_beta: float = 0.0
    """beta_1 of V*, for astar; 0: that of --kl_coef"""
    kl_target: float = 0.0
    """adapt beta towards this KL per sequence, in nats; 0 keeps beta fixed"""
    kl_horizon: float = 10000.0
    """episodes over which the adaptive beta moves"""
    eos_penalty: float = 0.0
    """taken off the standardised reward of a response that was cut before its EOS"""
    rollout: Literal["generate", "graph", "generate_batch", "vllm"] = "generate"
    """transformers' generate, or with a captured decoding step (CUDA), or continuous batching; or vLLM (to be installed)"""
    cache_gb: float = 8.0
    """GB of keys and values that generate_batch and vllm may hold"""
    tis_cap: float = 0.0
    """weigh tokens by pi_old / pi_engine, up to this, where the engine's log-probs differ (logp_gap_*); 0 does not (usual: 2)"""
    temperature: float = 1.0
    """sampling temperature; all log-probs are of logits / temperature. No top-k or top-p: they would bias the ratio"""
    max_prompt_tokens: int = 64
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 48
    """a response is sampled until EOS or this length"""
    eval_data: str = ""
    """held-out prompts; one response to each is judged during training: a file or hub name"""
    eval_split: str = "test"
    """the part of --eval_data to read"""
    eval_every: int = 0
    """rollouts between such looks; 0 looks once, at the end"""
    keep_best: bool = False
    """keep in best/ the weights of the best such look, beside those of the end in final/"""
    lora_r: int = 0
    """rank of LoRA adapters (alpha 32) on all linear layers of the policy; 0 trains all weights"""
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
    snapshot_every: int = 0
    """steps between copies of the policy in snapshots/, for curves over training; 0 keeps none"""
    report_to: str = ""
    """where metrics go besides metrics.jsonl: tensorboard, wandb, trackio; several with commas"""
    resume: bool = False
    """continue from the last checkpoint in --output_dir, bit for bit"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


PAPER = {  # what a flag that is not given means for any model but toy.py's:
    # steps, rollouts and epochs of PPO in the DVPO paper (Table 3)
    "data": "openbmb/UltraFeedback", "split": "train[80%:]", "steps": 600, "learning_rate": 2e-6,
    "ppo_epochs": 4, "kl_coef": 0.2, "kl_target": 0.1, "max_prompt_tokens": 1024,
    "max_response_tokens": 1024,
}  # fmt: skip
_gpus = {"gradient_checkpointing": True, "bf16": True, "zero_stage": 1, "save_every": 50}
PRESETS = {
    "llama3.2-3b": _gpus,
    "llama3-8b": {**_gpus, "steps": 1250, "zero_stage": 3},
    "mistral-7b-instruct": {"policy": "mistralai/Mistral-7B-Instruct-v0.2", "split": "train", **_gpus, "zero_stage": 3},
}


# ---------------------------------------------------------------------------------------------------- the mathematics


# Copied from dvpo.discounted_sum
def discounted_sum(x, factor: float):
    """sum_{k >= t} factor^(k - t) x_k along the last axis of x (B, T), which is 0 where masked."""
    if factor == 1:
        return x.flip(-1).cumsum(-1).flip(-1)
    total, out = torch.zeros_like(x[:, 0]), torch.empty_like(x)
    for t in range(x.shape[1] - 1, -1, -1):
        total = x[:, t] + factor * total
        out[:, t] = total
    return out


def leave_one_out(reward, n: int):
    """Each reward minus the mean of the other n - 1 of its prompt; reward (B,), a prompt's n beside each other."""
    groups = reward.view(-1, n)
    return (groups - (groups.sum(1, keepdim=True) - groups) / (n - 1)).flatten()


def group_normalize(reward, n: int, std: bool = True):
    """(r - mean) / (std + 1e-4) over the n responses of each prompt, std with ddof 1; all equal: 0. Without std
    r - mean (Dr. GRPO, Liu et al. 2025, section 3)."""
    groups = reward.view(-1, n)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4) if std else centred).flatten()


def optimal_value(scores: list[float], beta: float) -> float:
    """V*(x) = beta log mean exp(r / beta) of the rewards of responses that the reference drew: the value of the optimal policy
    under a KL of strength beta, at a prompt (A*-PO, Brantley et al. 2025)."""
    top = max(scores)
    return top + beta * math.log(sum(math.exp((r - top) / beta) for r in scores) / len(scores))


def regression_loss(logp, ref_logp, advantage, mask, normalizer, beta: float):
    """A*-PO: sum over responses of (beta log pi(y) / pi_ref(y) - A)^2 / normalizer, responses of the optimizer step; (B, T) each,
    A the same all along a row. On policy its gradient is 2 beta times that of REINFORCE with A less beta log pi / pi_ref."""
    total = ((logp - ref_logp) * mask).sum(1)
    return ((beta * total - advantage[:, 0]).square() * mask.any(1)).sum() / normalizer


def pair_advantages(reward, log_ratios, n: int, beta: float):
    """w for the best response to each prompt, -w for the worst, 0 for others: what DPO's loss on that pair multiplies the
    gradient of log pi(y) by, negated and divided by beta. reward (B,), a prompt's n beside each other; log_ratios (B,), log pi(y)
    / pi_ref(y). Of equal rewards none is better: 0."""
    groups, ratios = reward.view(-1, n), log_ratios.view(-1, n)
    ends = torch.stack([groups.argmax(1), groups.argmin(1)], 1)
    best, worst = ratios.gather(1, ends).unbind(1)
    weight = torch.sigmoid(-beta * (best - worst)) * (groups.amax(1) > groups.amin(1))
    return torch.zeros_like(groups).scatter(1, ends, torch.stack([weight, -weight], 1)).flatten()


def reward_advantages(reward, kl, mask, *, baseline: str, n=1, other=None, kl_coef: float = 0.0, group_std=True):
    """Advantages (B, T) of a whole rollout, all ranks; 0 where masked.

    reward (B,), a prompt's n beside each other, kl (B, T) = old_logp - ref_logp, mask (B, T) bool; other (B,): the rewards of
    the greedy responses, for remax, or V* of the prompts, for astar; group_std: grpo divides by it."""
    kl_to_go = kl_coef * discounted_sum(kl * mask, 1.0)
    if baseline == "remax":
        return ((reward - other)[:, None] - kl_to_go) * mask
    if baseline == "dpo":
        return pair_advantages(reward, (kl * mask).sum(1), n, kl_coef)[:, None] * mask
    if baseline == "astar":
        return (reward - other)[:, None] * mask
    if baseline == "reinforce++":
        return normalize_values(reward[:, None] - kl_to_go, mask)
    if baseline == "rloo":
        return leave_one_out(reward - kl_to_go[:, 0], n)[:, None] * mask
    return group_normalize(reward, n, group_std)[:, None] * mask


# Copied from dvpo.dvpo_loss
def dvpo_loss(logp, old_logp, advantage, mask, normalizer, *, clip: float = 0.2):
    """PPO's clipped objective (DVPO eq. 3), negated: (B, T) each, normalizer = response tokens of the optimizer step. Returns (loss, clipped
    tokens): both sums over micro-batches and ranks."""
    ratio = torch.exp((logp - old_logp) * mask)
    unclipped, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
    loss = -(torch.minimum(unclipped, clipped) * mask).sum() / normalizer
    return loss, ((clipped < unclipped) & mask).sum()


def log_ratio(logp, old_logp, mask, ratio: str = "token"):
    """(B, T) log of the importance ratio that each token has in the loss, 0 where masked; a row is a whole response.

    token: its own, log pi(y_t) - log pi_old(y_t). sequence: the sum of these over the response, for all its tokens; the
    response is one action (RLOO, Ahmadian et al. 2024). gspo: their mean (GSPO, Zheng et al. 2025, eq. 7)."""
    own = (logp - old_logp) * mask
    if ratio == "token":
        return own
    total = own.sum(1, keepdim=True) / (mask.sum(1, keepdim=True).clamp(min=1) if ratio == "gspo" else 1)
    return total.clamp(max=80) * mask  # e^89 is inf in fp32, with a gradient of NaN even where it is clipped


def policy_loss(
    logp, old_logp, advantage, mask, normalizer, *, clip=0.2, clip_high=0.0, objective="ppo", ratio="token"
):  # fmt: skip
    """`dvpo_loss` with the ratios of `log_ratio` and a bound of its own above 1 (DAPO, Yu et al. 2025, section 3.1; 0:
    that of `clip`). (B, T) each, advantage with the tokens' weights in it; (loss, clipped tokens), both sums as there.

    cispo: -sum sg(clip(rho, 1 - clip, 1 + clip_high)) A log pi / normalizer, MiniMax-M1 eq. 4 and 5."""
    logs, high = log_ratio(logp, old_logp, mask, ratio), clip_high or clip
    if objective == "cispo":
        rho = logs.detach().exp()
        weight = rho.clamp(1 - clip, 1 + high)
        return -(weight * advantage * logp * mask).sum() / normalizer, ((weight != rho) & mask).sum()
    if high != clip:  # the bound above acts where A > 0 alone, the one below where A < 0
        clip = clip + (high - clip) * (advantage > 0).to(advantage.dtype)
    return dvpo_loss(logs, 0.0, advantage, mask, normalizer, clip=clip)


def k3_loss(logp, ref_logp, weight, normalizer):
    """sum of weight (e^-d - 1 + d), d = logp - ref_logp: never negative, and on policy the KL in expectation. Its
    gradient there is that of the forward KL, KL(ref || pi); (B, T) each, weight 0 where masked."""
    d = (logp - ref_logp) * (weight > 0)
    return ((torch.exp(-d) - 1 + d) * weight).sum() / normalizer


# Copied from dvpo.truncated_weights
def truncated_weights(old_logp, sampled_logp, mask, cap: float):
    """(R, T) min(pi_old / pi_engine, cap): a token's weight in the loss where the engine that drew it computes slightly other
    probabilities than training (truncated importance sampling, Yao et al. 2025, for rollout engines). cap 0: no correction."""
    return torch.exp((old_logp - sampled_logp) * mask).clamp(max=cap) if cap else mask.float()


# Copied from dvpo.kl_controller
def kl_controller(kl_coef: float, kl: float, *, target: float, episodes: int, horizon: float) -> float:
    """beta (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2), clamped to [1e-4, 10]; Ziegler et al. 2019.

    kl: KL per sequence, batch mean, in nats; n: episodes since the last update."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return min(max(kl_coef * (1 + error * episodes / horizon), 1e-4), 10.0)


# -------------------------------------------------------------------------------------------------------------- reward


# Copied from sample.TextReward
class TextReward:
    """Scores of texts by a frozen reward model, which reads them with its own tokenizer; or `gold`, the toy world's."""

    def __init__(self, name: str, args, device):
        from transformers import AutoConfig

        self.name, self.device, self.mean, self.std = name, device, 0.0, 1.0
        if name == "gold":
            return
        missing(name, "python rm.py")
        self.decoder = is_decoder(name, args)
        config = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code)
        kinds = config.architectures or ()
        if config.num_labels != 1 or not any(kind.endswith("ForSequenceClassification") for kind in kinds):
            stop(f"{name} is not a reward model with one score: train one with `python rm.py`, or name another")
        self.tokenizer = load_tokenizer(name, args, chat=self.decoder)
        model = load_model("reward", name, self.tokenizer, args, frozen=True)
        self.mean, self.std = (getattr(config, f"reward_{x}", y) for x, y in (("mean", 0.0), ("std", 1.0)))
        padding = args.padding or not self.decoder  # an encoder's attention sees whole rows
        self.reading = SimpleNamespace(micro_tokens=args.micro_tokens, padding=padding, bf16=args.bf16,
                                       zero_stage=getattr(args, "zero_stage", 0))  # fmt: skip
        self.model = whole_or_parts(RewardModel(model, self.decoder).to(device), self.reading)
        # The policy's limits on length count tokens of another tokenizer; the model's own positions are the limit here.
        self.limit = getattr(config, "max_position_embeddings", None) or 10**9
        part = (
            10**9 if self.decoder else self.limit // 2 - 3
        )  # an encoder's pair is cut to fit; RoBERTa keeps two positions back
        self.limits = SimpleNamespace(max_prompt_tokens=part, max_response_tokens=part)

    def __call__(
        self, prompts: list, texts: list[str], complete: list[bool], rank: int = 0, world: int = 1
    ) -> list[float]:
        """One score per (prompt: string or messages, text); `complete` tells which texts came to an EOS. Of `world` ranks
        each gives its own and gets the scores of all, in order of rank."""
        if self.name == "gold":
            import toy

            asked = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
            whole = [text if ended else f"{text} {toy.UNK}" for text, ended in zip(texts, complete, strict=True)]
            try:
                return gather_lists([toy.gold(*pair) for pair in zip(asked, whole, strict=True)], world)
            except ValueError as error:
                stop(f"--reward_model gold scores prompts of the toy world only, and this is {error}")
        sequences = []
        for prompt, text, whole in zip(prompts, texts, complete, strict=True):
            try:
                if self.decoder:
                    ids, response = encode(self.tokenizer, {"prompt": prompt, "text": text}, "text", self.limits)
                    sequences.append(ids + (response if whole else response[:-1]))
                else:
                    sequences.append(encode_pair(self.tokenizer, prompt, text, self.limits))
            except ValueError as error:
                stop(f"a response to {str(prompt)[:60]!r} cannot be scored by {self.name}: {error}")
            if len(sequences[-1]) > self.limit:
                stop(f"a response to {str(prompt)[:60]!r} has {len(sequences[-1])} tokens for the reward model {self.name}, which reads {self.limit}: "
                     "lower --max_prompt_tokens or --max_response_tokens")  # fmt: skip
        sequences = gather_lists(sequences, world)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.reading.bf16):
            pad = self.tokenizer.pad_token_id
            return score_sequences(self.model, sequences, pad, self.reading, rank, world, self.device)


# Copied from sample.FunctionReward
class FunctionReward:
    """Scores of texts by functions of the user's own, `--reward file.py:name` each: (prompts, responses) -> a number for each
    response; a prompt is a list of messages. Several are added, `0.5*file.py:name` with a factor."""

    def __init__(self, names):
        self.names, self.functions, self.mean, self.std = names, [], 0.0, 1.0
        for name in names:
            factor, _, place = name.rpartition("*")
            path, _, function = place.rpartition(":")
            try:
                if not (path.endswith(".py") and Path(path).is_file()):
                    raise OSError(f"{path or place} is not a Python file")
                found = importlib.util.spec_from_file_location(Path(path).stem, path)
                module = importlib.util.module_from_spec(found)
                found.loader.exec_module(module)
                self.functions.append((float(factor or 1), getattr(module, function)))
            except (AttributeError, OSError, ValueError) as error:
                stop(f"--reward {name}: {error}. Give a file and a function in it, such as 0.5*check.py:correct")

    def __call__(
        self, prompts: list, texts: list[str], complete: list[bool], rank: int = 0, world: int = 1
    ) -> list[float]:
        """As `TextReward`: of `world` ranks each gives its own, and gets the scores of all."""
        prompts, total = [as_messages(prompt) for prompt in prompts], [0.0] * len(texts)
        for name, (factor, function) in zip(self.names, self.functions, strict=True):
            found = list(map(float, function(prompts, texts)))
            if len(found) != len(texts):
                stop(f"--reward {name} gave {len(found)} numbers for {len(texts)} responses")
            if not all(map(math.isfinite, found)):
                stop(f"--reward {name} gave a number that is not finite")
            total = [x + factor * y for x, y in zip(total, found, strict=True)]
        return gather_lists(total, world)


# Copied from rm.RewardModel
class RewardModel(torch.nn.Module):
    """A sequence-classification model's scores: (R,) fp32, read at the last token by length (decoder) or as stock."""

    def __init__(self, model, decoder: bool):
        super().__init__()
        self.model, self.decoder = model, decoder

    def forward(self, input_ids, position_ids, last):
        if not self.decoder:
            mask = torch.arange(input_ids.numel(), device=last.device).view(input_ids.shape) <= last[:, None]
            return self.model(input_ids=input_ids, attention_mask=mask.long()).logits.float().squeeze(-1)
        return read_head(plain(self.model), input_ids, position_ids, last)


# Copied from rm.is_decoder
def is_decoder(name: str, args) -> bool:
    """A generative architecture, which reads chats; encoders (BERT, DeBERTa) read text pairs."""
    from transformers import AutoConfig
    from transformers.models.auto import modeling_auto as auto

    try:
        kind = AutoConfig.from_pretrained(name, trust_remote_code=args.trust_remote_code).model_type
    except (OSError, ValueError) as error:
        stop(f"cannot load a model from {name!r}: {str(error).splitlines()[0]}")
    return kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES


# Copied from rm.collate_scored
def collate_scored(sequences: list[list[int]], pad_token_id: int, device=None, args=None):
    """(input_ids (B, L), position_ids (B, L) or None, flat positions (R,) of the sequences' last tokens)."""
    ids, positions, starts = lay_out(sequences, pad_token_id, args)
    last = torch.tensor([start + len(sequence) - 1 for start, sequence in zip(starts, sequences, strict=True)])
    return tuple(x if x is None else x.to(device, non_blocking=True) for x in (ids, positions, last))


# Copied from rm.score_sequences
def score_sequences(model, sequences, pad_token_id: int, args, rank: int, world: int, device) -> list[float]:
    """Rewards of token sequences, without gradients, shared out over the ranks; all get all."""
    found = []
    for at in range(0, len(sequences), 1024):
        rows = [([], [True], sequence, i) for i, sequence in enumerate(sequences[at : at + 1024])]
        scores = torch.zeros(len(rows), device=device)
        with torch.no_grad():
            for micro in micro_batches(rows, rank, world, args, lambda row: [len(row[2])])[0]:
                given = model(*collate_scored([row[2] for row in micro], pad_token_id, device, args))
                index = torch.tensor([i for _, real, _, i in micro if real], dtype=torch.long, device=device)
                scores.index_add_(0, index, given[: len(index)])
        found += (all_sum(scores) if world > 1 else scores).tolist()  # sample.py's ranks score by themselves
    return found


# Copied from rm.encode_pair
def encode_pair(tokenizer, prompt, text, args):
    """Ids of (prompt, response) as an encoder's text pair, each cut from its far end: what is near the seam stays."""
    if not isinstance(text, str):
        raise ValueError("field text is missing or not text")
    prompt = "\n\n".join(m["content"] for m in as_messages(prompt))
    a, b = (text_ids(tokenizer, part) for part in (prompt, text))
    a, b = a[-args.max_prompt_tokens :], b[: args.max_response_tokens]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [start, *a, end, *b, end]


# ----------------------------------------------------------------------------------------------------------- rollout


# Copied from sample.key_of
def key_of(*what) -> int:
    """A signed 64-bit key of anything that JSON can write."""
    return int.from_bytes(hashlib.blake2b(json.dumps(what).encode(), digest_size=8).digest(), "big", signed=True)


# Copied from sample.KeyedNoise
class KeyedNoise:
    """A logits processor under which greedy decoding is an exact sample of softmax(logits / temperature), cut by top-p.

    What a row draws is a function of its key alone, so a sample does not depend on what else is in the batch, nor on the
    number of ranks; a row whose key is None is decoded greedily. The log-probs of drawn tokens are kept."""

    def __init__(self, keys: list, temperature: float, device, top_p: float = 1.0):
        self.temperature, self.top_p, self.logp = temperature, None, []
        self.keys = torch.tensor([key or 0 for key in keys], device=device)
        self.greedy = torch.tensor([key is None for key in keys], device=device)[:, None]
        if top_p < 1:
            from transformers import TopPLogitsWarper

            self.top_p = TopPLogitsWarper(top_p)

    def __call__(self, input_ids, scores):
        scores = scores.float() / self.temperature
        if self.top_p:
            scores = self.top_p(input_ids, scores)
        noisy = scores + keyed_gumbel(self.keys, len(self.logp) + 1, scores.shape[-1]).masked_fill(self.greedy, 0)
        drawn = scores.gather(-1, noisy.argmax(-1, keepdim=True))
        self.logp.append(drawn - scores.logsumexp(-1, keepdim=True))
        return noisy

    def sampled(self, responses: list[list[int]]) -> list[list[float]]:
        """Log-probs of the responses' tokens as generation computed them."""
        return [row[: len(r)] for row, r in zip(torch.cat(self.logp, 1).tolist(), responses, strict=True)]


# Copied from dvpo.sample_responses
def sample_responses(engine, prompts, noise, tokenizer, args, device) -> list[list[int]]:
    """Response ids, with the EOS unless cut, of this rank's prompts (ids)."""
    captured = args.rollout == "graph"  # one shape for every rollout: it is compiled once
    width = args.max_prompt_tokens if captured else max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # generation needs padding on the left
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with torch.no_grad(), unwrapped(engine) as model, engine.autocast():
        out = model.generate(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), logits_processor=[noise],
            max_new_tokens=args.max_response_tokens, do_sample=False, use_cache=True,
            cache_implementation="static" if captured else None,
        )  # fmt: skip
    return [cut_at(row, [], engine.module.ends)[0] for row in out[:, width:].tolist()]


# Copied from dvpo.unwrapped
@contextlib.contextmanager
def unwrapped(engine):
    """The Hugging Face model, in eval mode; under ZeRO-3 with whole weights, so that ranks may stop at different lengths."""
    module, training = engine.module, engine.module.training
    module.eval()
    if engine.deepspeed and engine.args.zero_stage == 3:
        from deepspeed.runtime.zero import unwrap_model_for_generation

        with unwrap_model_for_generation(engine.deepspeed):
            yield module.model
    else:
        yield module.model
    module.train(training)


# Copied from sample.Rollouts
class Rollouts:
    """Responses of the engine's policy by --rollout, each with the log-probs that its tokens were drawn at.

    generate: transformers' loop. graph: the same with a cache of one shape, so that on CUDA the decoding step is compiled
    and captured. generate_batch: transformers' continuous batching, where a response that ends makes room for the next.
    vllm: in this process and on this rank's GPU; before a rollout it is given a policy in training, afterwards it sleeps.
    The first two draw the same from the same keys on any number of ranks."""

    def __init__(self, engine, ends, tokenizer, args, device, top_p: float = 1.0, rank: int = 0):
        self.engine, self.tokenizer, self.args, self.device, self.top_p = engine, tokenizer, args, device, top_p
        self.ends, self.training = sorted(ends), getattr(engine, "optimizer", None) is not None
        if args.rollout != "vllm":
            return
        try:
            from vllm import LLM
        except ImportError:
            stop("--rollout vllm: vLLM is not installed. `pip install vllm`, or use another engine")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process: weights are handed over by reference
        self.llm = LLM(
            args.policy, dtype="bfloat16" if args.bf16 else "float32", trust_remote_code=args.trust_remote_code,
            max_model_len=args.max_prompt_tokens + args.max_response_tokens, kv_cache_memory_bytes=int(args.cache_gb * 1e9),
            distributed_executor_backend="external_launcher" if dist.is_initialized() else None, seed=rank,
            logprobs_mode="processed_logprobs", enable_sleep_mode=self.training,
        )  # fmt: skip
        if self.training:
            self.llm.sleep(level=2)

    def __call__(self, prompts: list[list[int]], keys: list) -> list[tuple[list[int], list[float]]]:
        """keys: an integer for each prompt (a row of noise), or None for the most probable tokens, whose log-probs are of
        whatever temperature the engine takes: nothing reads them."""
        return getattr(self, "generate" if self.args.rollout == "graph" else self.args.rollout)(prompts, keys)

    def generate(self, prompts, keys):
        noise = KeyedNoise(keys, self.args.temperature, self.device, self.top_p)
        responses = sample_responses(self.engine, prompts, noise, self.tokenizer, self.args, self.device)
        return list(zip(responses, noise.sampled(responses), strict=True))

    def generate_batch(self, prompts, keys):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        greedy = [key is None for key in keys]
        if any(greedy) and not all(greedy):  # one setting for all requests: two calls
            parts = {}
            for kind in (True, False):
                some = [i for i, x in enumerate(greedy) if x == kind]
                parts |= zip(
                    some, self.generate_batch([prompts[i] for i in some], [keys[i] for i in some]), strict=True
                )
            return [parts[i] for i in range(len(keys))]
        args, config = self.args, plain(self.engine.module.model).config.get_text_config()
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        page = 256 * config.num_hidden_layers * 2 * heads * width * self.engine.module.model.dtype.itemsize  # bytes
        pages = math.ceil((args.max_prompt_tokens + args.max_response_tokens) / 256)  # of one response
        blocks = max(pages, min(pages * len(prompts), int(args.cache_gb * 1e9 / page))) + 1
        settings = GenerationConfig(
            do_sample=not any(greedy), temperature=args.temperature, top_p=self.top_p, top_k=0, eos_token_id=self.ends,
            pad_token_id=self.tokenizer.pad_token_id, max_new_tokens=args.max_response_tokens,
        )  # fmt: skip
        batching = ContinuousBatchingConfig(seed=key_of(keys) % 2**31, num_blocks=blocks, max_batch_tokens=4096,
                                            return_logprobs=True)  # fmt: skip
        with torch.no_grad(), unwrapped(self.engine) as model, self.engine.autocast():
            found = model.generate_batch(prompts, settings, batching)
        outputs = sorted(found.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        for output in outputs:
            if output.error:
                stop(f"--rollout generate_batch: {output.error}. Use --rollout generate")
        return [cut_at(output.generated_tokens, output.logprobs, self.ends) for output in outputs]

    def vllm(self, prompts, keys):
        from vllm import SamplingParams

        args = self.args
        if self.training:
            self.llm.wake_up(tags=["weights"])
            with whole(self.engine.module, args):
                weights = merged_weights(self.engine.module.model)
                self.llm.apply_model(lambda model: model.load_weights(weights))
            self.llm.wake_up(tags=["kv_cache"])
        settings = [
            SamplingParams(
                temperature=0.0 if key is None else args.temperature, top_p=self.top_p, seed=(key or 0) % 2**31,
                max_tokens=args.max_response_tokens, stop_token_ids=self.ends, logprobs=0,
            )
            for key in keys
        ]  # fmt: skip
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        found = [output.outputs[0] for output in self.llm.generate(asked, settings, use_tqdm=False)]
        if self.training:
            self.llm.sleep(level=2)
        logps = [[of[token].logprob for token, of in zip(x.token_ids, x.logprobs, strict=True)] for x in found]
        return [cut_at(list(x.token_ids), logp, self.ends) for x, logp in zip(found, logps, strict=True)]


# Copied from sample.merged_weights
def merged_weights(model):
    """(name, tensor) of a causal LM's weights under their Hugging Face names; active adapters are added to copies. The head of
    values that a shared backbone carries is none of them."""
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.endswith((".score.weight", ".score.bias")):
            continue
        layer = layers.get(name.removesuffix(".base_layer.weight"))
        if layer is not None:
            for adapter in layer.active_adapters:
                parameter = parameter.detach() + layer.get_delta_weight(adapter).to(parameter.dtype)
        yield name.removeprefix("base_model.model.").replace(".base_layer", ""), parameter.detach()


# Copied from sample.cut_at
def cut_at(tokens: list[int], logps: list[float], ends):
    """Both up to and with the first end token."""
    length = next((t + 1 for t, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length], logps[:length]


# Copied from dvpo.now
def now(device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.time()


# Copied from dvpo.over_ranks
def over_ranks(rows, widths, found_of, rank: int, world: int, args, device, *sizes) -> list:
    """A tensor (len(rows), width) for each of `widths`, from what `found_of` gives for a micro-batch (of rows with their index
    appended), without gradients. Rows are shared out over the ranks by `sizes`, as in micro_batches; every rank gets all."""
    out = [torch.zeros(len(rows), width, device=device) for width in widths]
    with torch.no_grad():
        for micro in micro_batches([(*row, i) for i, row in enumerate(rows)], rank, world, args, *sizes)[0]:
            index = torch.tensor([i for *_, i in micro], device=device)
            for x, part in zip(out, found_of(micro), strict=True):
                x[:, : part.shape[1]].index_add_(0, index, part)  # a row that only fills up adds 0
    return [all_sum(x) for x in out]


# Copied from vcb.padded
def padded(lists, device, fill: float = 0.0):
    """(B, n) fp32 of lists of different lengths."""
    width = max(map(len, lists))
    table = torch.tensor([[*x, *[fill] * (width - len(x))] for x in lists], dtype=torch.float32)
    return table.to(device, non_blocking=True)


def check_drawn(args):
    """Stops where --data is not a file, or where sample.py's own record beside it is of other responses than V* needs: the
    reference's, at this run's temperature, all of them, scored by this run's reward."""
    asked = {"policy": args.reference or args.policy, "reward": list(args.reward), "temperature": args.temperature}
    asked |= {"top_p": 1, "best_of": 1, "greedy": False} | ({} if args.reward else {"reward_model": args.reward_model})
    place = lambda x: Path(x).resolve() if isinstance(x, str) else x
    for file in map(str.strip, args.data.split(",")):
        if not is_file(file):
            stop(f"--baseline astar needs `python sample.py`'s file as --data, and {file!r} is none")
        beside = Path(file).with_name("args.json")
        drawn = json.loads(beside.read_text()) if beside.is_file() else {}
        for name in asked.keys() & drawn.keys():
            if place(drawn[name]) != place(asked[name]):
                stop(f"--baseline astar: {file} was drawn with --{name} {drawn[name]}; this run needs {asked[name]} there. Draw "
                     "anew with `python sample.py`")  # fmt: skip


def drawn_scores(row: dict, reward, args) -> list[float]:
    """The rewards, standardised and less --eos_penalty as in a rollout, of the responses that a row of sample.py has."""
    found = row.get("responses") or [{}]
    if any(response.get("score") is None for response in found):
        raise ValueError(
            "no field responses with a score each: --baseline astar needs `python sample.py`'s file as --data"
        )
    penalty = lambda response: args.eos_penalty * (response.get("complete") is False)
    return [(response["score"] - reward.mean) / reward.std - penalty(response) for response in found]


def updates_once(args) -> bool:
    """One update on what was just drawn, and no KL in the advantage: then the old log-probs are those that the update
    itself computes, and a pass is spared."""
    return args.baseline in ("grpo", "astar") and args.ppo_epochs == 1 and args.batch_size == args.rollout_batch_size


# Copied from dvpo.whole_or_parts
def whole_or_parts(module, args):
    """A frozen module, whole on each rank, or in parts under ZeRO-3; stops where it cannot take packed sequences."""
    if args.zero_stage == 3:
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**9}
        module = deepspeed.initialize(model=module, config=config | {"bf16": {"enabled": args.bf16}})[0]
    check_packing(module, args)
    return module


# ------------------------------------------------------------------------------------------------------------ training


# Copied from ppo.held_out_rewards
def held_out_rewards(held_out, rollouts, reference, reward, tokenizer, args, rank: int, world: int, device) -> dict:
    """Means of one response to each held-out (prompt ids, messages), drawn with the same noise at every look: the reward as in
    training, the log-ratio to the reference in nats (of the log-probs that tokens were drawn at), tokens, and the share that
    ended."""
    found = []
    for at in range(0, len(held_out), args.rollout_batch_size):
        some = held_out[at : at + args.rollout_batch_size]
        each = len(some) // world
        mine = slice(rank * each, (rank + 1) * each)
        drawn = rollouts([ids for ids, _ in some[mine]], [key_of("held out", at + i) for i in range(len(some))[mine]])
        responses, sampled = zip(*gather_lists(drawn, world), strict=True)
        complete = [response[-1] in rollouts.ends for response in responses]
        texts = [tokenizer.decode([t for t in r if t not in rollouts.ends]) for r in responses]
        scores = reward([messages for _, messages in some[mine]], texts[mine], complete[mine], rank, world)
        rows = [(ids, response) for (ids, _), response in zip(some, responses, strict=True)]
        scored = lambda micro: [reference(collate(micro, tokenizer.pad_token_id, device, args), args.temperature)]
        (ref_logp,) = over_ranks(rows, (max(map(len, responses)),), scored, rank, world, args, device)
        for score, whole, response, logp, ref in zip(
            scores, complete, responses, sampled, ref_logp.tolist(), strict=True
        ):
            score = (score - reward.mean) / reward.std - args.eos_penalty * (not whole)
            found.append((score, sum(logp) - sum(ref), len(response), float(whole)))
    means = [sum(column) / len(found) for column in zip(*found, strict=True)]
    return dict(zip(("eval_reward", "eval_kl", "eval_length", "eval_eos_share"), means, strict=True)) if found else {}


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    n = args.n if args.n > 0 else {"rloo": 4, "grpo": 4, "dpo": 2}.get(args.baseline, 1)
    if args.ratio != "token" and not (
        args.baseline in ("rloo", "grpo") and (args.objective, args.loss_mean) == ("ppo", "sequence")
    ):
        stop(f"--ratio {args.ratio} makes one term of each response: give --baseline rloo or grpo, --objective ppo and "
             "--loss_mean sequence with it")  # fmt: skip
    given = [name for name in ("objective", "loss_mean", "tis_cap") if getattr(args, name) != getattr(Args, name)]
    if args.baseline == "astar" and (given or args.kl_target or not args.kl_coef):
        stop("--baseline astar is a regression with a fixed beta: --kl_coef above 0 and --kl_target 0; and --objective, --ratio, "
             "--loss_mean and --tis_cap have no part in it")  # fmt: skip
    if args.baseline != "grpo" and not args.group_std:
        stop(f"--no_group_std is for --baseline grpo: {args.baseline} divides by no standard deviation of a group")
    if n == 1 and args.baseline in ("rloo", "grpo", "dpo"):
        stop(f"--baseline {args.baseline} compares the responses to a prompt: --n must be 2 or more")
    if args.rollout_batch_size % n:
        stop(f"--rollout_batch_size {args.rollout_batch_size} must be a multiple of --n {n}, the responses per prompt")
    if args.rollout_batch_size % world or args.rollout_batch_size % args.batch_size:
        stop(f"--rollout_batch_size {args.rollout_batch_size} must be a multiple of --batch_size {args.batch_size} and of "
             f"the number of ranks, {world}")  # fmt: skip
    missing(args.policy, "python sft.py")
    tokenizer = load_tokenizer(args.policy, args)
    reward = FunctionReward(args.reward) if args.reward else TextReward(args.reward_model, args, device)
    question = lambda row: [(encode(tokenizer, row, None, args)[0], as_messages(row["prompt"]))]
    optimal = {}  # V* of each prompt, for astar
    if args.baseline == "astar":
        check_drawn(args)
        found = load_data(args, "prompts", lambda row: [(*question(row)[0], drawn_scores(row, reward, args))])
        questions = [(ids, messages) for ids, messages, _ in found]
        for _, messages, scores in found:  # a prompt may have several rows
            optimal.setdefault(json.dumps(messages), []).extend(scores)
        optimal = {x: optimal_value(scores, args.value_beta or args.kl_coef) for x, scores in optimal.items()}
    else:
        questions = load_data(args, "prompts", question)
    per_rollout = args.rollout_batch_size // n  # prompts
    single = updates_once(args)
    if len(questions) < per_rollout:
        stop(f"{args.data} ({args.split}) has {len(questions)} prompts, below the {per_rollout} of a rollout: "
             f"--rollout_batch_size {args.rollout_batch_size}, {n} responses each")  # fmt: skip

    if args.reward_model == "gold" and not args.reward:  # prompts of other worlds are told before anything is written
        reward([messages for _, messages in questions], [""] * len(questions), [True] * len(questions))
    held_out = list(load_data(args, "prompts", question, args.eval_data, args.eval_split)) if args.eval_data else []
    if args.eval_data:
        held_out = held_out[: len(held_out) // world * world]  # each rank answers as many
        ids_of = lambda rows: [ids for ids, _ in rows]
        check_held_out(args, ids_of(held_out), ids_of(questions), rank, "prompt for each rank")
    torch.manual_seed(args.seed)
    model = load_model("causal", args.policy, tokenizer, args)
    model = add_lora(model, args) if args.lora_r else model
    policy = Policy(model).to(device)
    reference = load_model("causal", args.reference or args.policy, tokenizer, args, frozen=True)
    reference = whole_or_parts(Policy(reference).to(device), args)
    engine = Engine(policy, args, world)
    policy.check(engine)
    check_packing(engine, args)
    goal = "gold" if args.data == "toy" else "reward"
    run = Run(args, engine, model, tokenizer, rank, args.steps, started, bar=(goal, "kl"), best="eval_reward")
    run.state = {"kl_coef": args.kl_coef}
    run.restore()
    policy.train()
    rollouts = Rollouts(engine, policy.ends, tokenizer, args, device, rank=rank)
    per_rank = args.rollout_batch_size // world
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    look = functools.lru_cache(1)(  # once for a number of rollouts: the last one's is the closing one
        lambda rollout: held_out_rewards(held_out, rollouts, reference, reward, tokenizer, args, rank, world, device)
    )
    per_epoch = len(questions) // per_rollout
    for step in range(run.step, args.steps):
        clock = [now(device)]
        order = shuffled(len(questions), args.seed, step // per_epoch)
        at = step % per_epoch * per_rollout
        chosen = [questions[i] for i in order[at : at + per_rollout] for _ in range(n)]
        prompts, key = [ids for ids, _ in chosen], f"{args.seed}/{step}"
        keys, asked_twice = [key_of(key, i) for i in range(len(prompts))[mine]], args.baseline == "remax"
        twice = prompts[mine] * (1 + asked_twice), keys + [None] * per_rank * asked_twice  # then greedily
        drawn, sampled = zip(*rollouts(*twice), strict=True)
        clock.append(now(device))

        asked = [messages for _, messages in chosen]
        texts = [tokenizer.decode([t for t in r if t not in policy.ends]) for r in drawn]
        complete = [r[-1] in policy.ends for r in drawn]
        scores = reward(asked[mine] * (1 + asked_twice), texts, complete, rank, world)
        scores = scores[rank * len(drawn) : (rank + 1) * len(drawn)]
        scores = [(x - reward.mean) / reward.std - args.eos_penalty * (not whole) for x, whole in zip(scores, complete)]
        found = list(zip(drawn, sampled, texts, complete, scores, strict=True))
        other = [x for *_, x in gather_lists(found[per_rank:], world)]
        other = [optimal[json.dumps(messages)] for messages in asked] if optimal else other
        other = torch.tensor(other, device=device)
        responses, sampled, texts, complete, scores = zip(*gather_lists(found[:per_rank], world), strict=True)
        score, sampled = torch.tensor(scores, device=device), padded(sampled, device)

        def scored(micro):
            batch = collate(micro, tokenizer.pad_token_id, device, args)
            return [scorer(batch, args.temperature) for scorer in ([reference] if single else [engine, reference])]

        rows, width = list(zip(prompts, responses, strict=True)), max(map(len, responses))
        *found, ref_logp = over_ranks(rows, (width,) * (1 if single else 2), scored, rank, world, args, device)
        old_logp = torch.zeros_like(ref_logp) if single else found[0]
        lengths = torch.tensor([len(response) for response in responses], device=device)
        mask = torch.arange(width, device=device) < lengths[:, None]
        kl = old_logp - ref_logp
        beta = run.state["kl_coef"]
        advantage = reward_advantages(score, kl, mask, baseline=args.baseline, n=n, other=other, kl_coef=beta,
                                      group_std=args.group_std)  # fmt: skip
        weight = mask / lengths[:, None] if args.loss_mean == "sequence" else mask.float()
        clock.append(now(device))

        loss_sum, clipped_sum, useful = torch.zeros((), device=device), torch.zeros((), device=device), []
        for epoch in range(args.ppo_epochs):
            shuffle = shuffled(len(responses), args.seed, f"{step}/{epoch}")
            for first in range(0, len(responses), args.batch_size):
                batch = [(prompts[i], responses[i], i) for i in shuffle[first : first + args.batch_size]]
                by_token = args.loss_mean == "token" and args.baseline != "astar"
                of = sum(len(r) for _, r, _ in batch) if by_token else len(batch)
                of *= args.max_response_tokens if args.loss_mean == "sum" else 1
                update = ((step * args.ppo_epochs + epoch) * len(responses) + first) // args.batch_size
                engine.set_rate(args.learning_rate * schedule(update, 1, args.warmup_steps, "constant"))
                micros, share = micro_batches(batch, rank, world, args)
                useful.append(share)
                for micro in micros:
                    inputs = collate(micro, tokenizer.pad_token_id, device, args)
                    index, cut = torch.tensor([i for *_, i in micro], device=device), inputs.response_mask.shape[1]
                    ref, adv, w, drawn_at = (x[index, :cut] for x in (ref_logp, advantage, weight, sampled))
                    w = w * inputs.response_mask  # a row that fills up has none
                    logp = engine(inputs, args.temperature)
                    if single:
                        old_logp[:, :cut].index_add_(0, index, logp.detach())
                    old = logp.detach() if single else old_logp[index, :cut]
                    if args.baseline == "astar":
                        loss, clipped = regression_loss(logp, ref, adv, inputs.response_mask, of, beta), 0
                    else:
                        # the engine's ratio, of the same kind
                        off = log_ratio(old, drawn_at, inputs.response_mask, args.ratio)
                        adv = adv * w * truncated_weights(off, 0.0, inputs.response_mask, args.tis_cap)
                        loss, clipped = policy_loss(
                            logp, old, adv, inputs.response_mask, of, clip=args.clip, clip_high=args.clip_high,
                            objective=args.objective, ratio=args.ratio,
                        )  # fmt: skip
                    if args.baseline == "grpo":
                        loss = loss + beta * k3_loss(logp, ref, w, of)
                    engine.backward(loss, last=micro is micros[-1])
                    loss_sum += loss.detach()
                    clipped_sum += clipped
                grad_norm = engine.step()
        clock.append(now(device))

        old_logp = all_sum(old_logp) if single else old_logp
        kl, gap = old_logp - ref_logp, (sampled - old_logp).abs() * mask
        kl_mean = (kl * mask).sum() / len(responses)
        if args.kl_target:
            rule = {"target": args.kl_target, "episodes": len(responses), "horizon": args.kl_horizon}
            run.state["kl_coef"] = kl_controller(run.state["kl_coef"], float(kl_mean), **rule)
        tokens = mask.sum()
        rollout, scoring, updating = (round(b - a, 4) for a, b in itertools.pairwise(clock))
        metrics = {
            "reward": score.mean(),  # of the reward model, standardised, less --eos_penalty
            "kl": kl_mean,
            "kl_coef": run.state["kl_coef"],
            "entropy": -(old_logp * mask).sum() / tokens,
            "logp_gap_mean": gap.sum() / tokens,  # of generation and training: cached keys, rounding
            "logp_gap_max": gap.max(),
            "length": lengths.float().mean(),
            "eos_share": sum(complete) / len(complete),
            "loss": all_sum(loss_sum) / args.ppo_epochs / (len(responses) / args.batch_size),
            "clipped_share": all_sum(clipped_sum) / tokens / args.ppo_epochs,
            "grad_norm": grad_norm,
            "useful_tokens": sum(useful) / len(useful),
            "rollout_seconds": rollout,
            "scoring_seconds": scoring,
            "update_seconds": updating,
        }
        if args.data == "toy":  # for the learning curve: nothing above has seen it
            import toy

            metrics["gold"] = sum(toy.gold(a[-1]["content"], t) for a, t in zip(asked, texts, strict=True)) / len(texts)
        if rank == 0 and step % 10 == 0:
            with writing(run.folder / "samples.jsonl"), open(run.folder / "samples.jsonl", "a") as file:
                for prompt, text in list(zip(asked, texts, strict=True))[:4]:
                    file.write(json.dumps({"step": step + 1, "prompt": prompt, "response": text}) + "\n")
        if args.eval_every and (step + 1) % args.eval_every == 0:
            metrics |= look(step + 1)
        run.log(metrics)
    found = look(args.steps)
    said = f"; reward {found['eval_reward']:.3f} of held-out prompts, KL {found['eval_kl']:.2f}" if found else ""
    return run.finish(said, **found)


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


# Copied from sft.Batch
class Batch(NamedTuple):
    """Sequences [prompt | response] in B rows. Causal models need no attention mask for what fills a row on the right."""

    input_ids: torch.Tensor  # (B, L)
    position_ids: torch.Tensor | None  # (B, L), from 0 in each sequence; None where each has a row
    predict: torch.Tensor  # (N,) flat positions in (B, L) whose next token is a response token
    target: torch.Tensor  # (N,) those response tokens
    cell: torch.Tensor  # (N,) their flat positions in (R, T)
    response_mask: torch.Tensor  # (R, T) bool, of R sequences


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


# Copied from sft.collate
def collate(rows, pad_token_id: int, device=None, args=None) -> Batch:
    """Batch of (prompt ids, response ids, ...) rows. Masks come from lengths: pad may equal EOS."""
    ids, positions, starts = lay_out([[*prompt, *response] for prompt, response, *_ in rows], pad_token_id, args)
    width = max(1, *(len(response) for _, response, *_ in rows))
    predict, target, cell = [], [], []
    for i, (start, (prompt, response, *_)) in enumerate(zip(starts, rows, strict=True)):
        predict.extend(range(start + len(prompt) - 1, start + len(prompt) + len(response) - 1))
        cell.extend(range(i * width, i * width + len(response)))
        target.extend(response)
    mask = torch.zeros(len(rows) * width, dtype=torch.bool)
    mask[cell] = True
    flat = (torch.tensor(x, dtype=torch.long) for x in (predict, target, cell))
    parts = ids, positions, *flat, mask.view(len(rows), width)
    return Batch(*(x if x is None else x.to(device, non_blocking=True) for x in parts))


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


# Copied from sft.Policy
class Policy(torch.nn.Module):
    """A causal LM that returns log-probabilities of the response tokens: (R, T) fp32, 0 where masked. Given the weight
    of a token it returns -Σ weight · logp instead, a scalar. Only response positions go through the LM head."""

    def __init__(self, model):
        super().__init__()
        self.model, self.ends = model, set(plain(model).generation_config.eos_token_id)
        patch_head(plain(model))

    def forward(self, batch: Batch, temperature: float = 1.0, token_weight: float | None = None):
        hidden = hidden_states(plain(self.model).get_decoder(), batch.input_ids, batch.position_ids)
        hidden = hidden.index_select(0, batch.predict)
        found = plain(self.model).get_output_embeddings()(hidden, batch.target, temperature, token_weight)
        if token_weight is not None:
            return found
        flat = found.new_zeros(batch.response_mask.numel())
        return flat.index_copy(0, batch.cell, found).view(batch.response_mask.shape)

    def check(self, engine):
        """Stops where a family makes its logits in a way that is not known here."""
        with engine.autocast():
            gap = logit_gap(plain(self.model))
        if not gap < (0.1 if engine.args.bf16 else 1e-3):
            stop(f"{type(plain(self.model)).__name__}: log-probs come out {gap:.2g} nat from the model's own; its head does more "
                 "than scale and soft-cap logits, which is not supported")  # fmt: skip


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
