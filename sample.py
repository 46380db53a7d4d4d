"""Responses of a policy, scored: the graded rows that vcb.py, dpo.py, rest.py (and gvm.py) learn from.

n responses per prompt are drawn from any causal LM and scored by a reward model, which reads *text* with its own
tokenizer, by functions of your own (--reward), or by the toy world's gold reward. One row a prompt:
{"prompt", "responses": [{"text", "score", "policy", "complete"}]}.
VCB and the methods that it is compared with all learn from one such file, drawn from the SFT model (VCB, section 4.3).

Deterministic: the noise that picks a token is a function of (seed, prompt, sample, position) alone   `keyed_gumbel`
and argmax(log p + Gumbel noise) is an exact sample of p. The same batch size gives the identical file on one machine,
another one the same file up to near-ties of floating point; so do more ranks. A killed run goes on with --resume: rows
are written a batch at a time, and what a kill left in part is drawn again, the same. With --rollout generate_batch
(continuous batching) and vllm the order of the requests decides the noise or the engine draws it: then only the
seed is kept, and rows are as good but not the same.

`--best_of k` draws k responses for each one that it writes, the best by score: its KL to the policy is at most
log k - (k - 1) / k. A response cut at --max_response_tokens is scored without EOS, and by the gold reward as malformed.

    python sample.py                                                 # CPU: the toy world, runs/sft scored by runs/rm
    python sample.py llama3.2-3b --rollout vllm                      # 1 GPU
    torchrun --nproc_per_node 8 sample.py llama3.2-3b                # 8 GPUs, prompts shared out
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
import importlib.util
import json
import math
import os
import random
import re
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

from kernels import head_name, hidden_states, keyed_gumbel, logit_gap, model_class, packing_gap, patch_head, read_head


@dataclass
class Args:
    policy: str = "runs/sft/final"
    """who writes: a Hugging Face folder or hub name with a chat template"""
    reward_model: str = "runs/rm/final"
    """who scores: a sequence classifier with one label, from rm.py or elsewhere; `gold` is the toy world's true reward"""
    reward: tuple[str, ...] = ()
    """instead of a reward model, functions of your own, added: `check.py:correct 0.1*check.py:short`; see docs/data.md"""
    data: str = "toy"
    """prompts: `toy`, a hub name, or a .json/.jsonl(.gz)/.parquet file with `prompt`; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[80%:]` (of a fixed shuffle), `train[2000:4000]`; toy has `heldout` too"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
    output_dir: str = "runs/sample"
    """the run's folder: args.json, graded.jsonl, summary.json, and parts/, what each rank wrote"""
    seed: int = 0
    """seed of the noise"""
    n: int = 8
    """responses per prompt"""
    best_of: int = 1
    """draw this many for each response that is written, which is the best of them by score"""
    temperature: float = 1.0
    """divides the logits"""
    top_p: float = 1.0
    """sample from the smallest set of tokens that holds this much probability"""
    greedy: bool = False
    """the most probable token at each position instead of a sample; needs --n 1"""
    batch_size: int = 256
    """responses in one call of the engine, on one rank"""
    micro_tokens: int = 16384
    """tokens per forward pass of the reward model, on one rank"""
    padding: bool = False
    """one padded sequence per row instead of packed rows: for families that cannot keep packed sequences apart"""
    max_prompt_tokens: int = 64
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 48
    """a response is sampled until EOS or this length"""
    rollout: Literal["generate", "graph", "generate_batch", "vllm"] = "generate"
    """transformers' generate, or with a captured decoding step (CUDA), or continuous batching; or vLLM (to be installed)"""
    cache_gb: float = 8.0
    """GB of keys and values that generate_batch and vllm may hold"""
    bf16: bool = False
    """bfloat16 weights and products (GPU)"""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """auto: what suits the family; PyTorch's own, flash-attn (to be installed), or the plain product"""
    resume: bool = False
    """continue a killed run in --output_dir"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


PAPER = {  # what a flag that is not given means for any model but toy.py's: the RL prompts of the DVPO paper
    "data": "openbmb/UltraFeedback", "split": "train[80%:]", "batch_size": 64, "max_prompt_tokens": 1024,
    "max_response_tokens": 1024,
}  # fmt: skip
PRESETS = {
    "llama3.2-3b": {"bf16": True},
    "llama3-8b": {"bf16": True, "batch_size": 32},
    "pythia-2.8b-hh": {
        "data": "Anthropic/hh-rlhf", "split": "train", "max_prompt_tokens": 512, "max_response_tokens": 256, "bf16": True,
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the mathematics


def key_of(*what) -> int:
    """A signed 64-bit key of anything that JSON can write."""
    return int.from_bytes(hashlib.blake2b(json.dumps(what).encode(), digest_size=8).digest(), "big", signed=True)


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


# -------------------------------------------------------------------------------------------------------------- engines


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


class Writer:
    """A frozen policy, in the shape that `sample_responses` takes a training engine in."""

    def __init__(self, tokenizer, args, device):
        self.module = Policy(load_model("causal", args.policy, tokenizer, args, frozen=True)).to(device)
        self.args, self.deepspeed, self.optimizer, self.device = args, None, None, device
        self.module.check(self)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)


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


def end_tokens(name: str, tokenizer) -> set[int]:
    """The ids that end a response, as `Policy.ends`, without loading the weights."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ends = None
    return {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, control_tokens(tokenizer)[0]} - {
        None
    }


def cut_at(tokens: list[int], logps: list[float], ends):
    """Both up to and with the first end token."""
    length = next((t + 1 for t, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:length], logps[:length]


# --------------------------------------------------------------------------------------------------------------- scores


# Copied from dvpo.whole_or_parts
def whole_or_parts(module, args):
    """A frozen module, whole on each rank, or in parts under ZeRO-3; stops where it cannot take packed sequences."""
    if args.zero_stage == 3:
        import deepspeed

        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}, "steps_per_print": 10**9}
        module = deepspeed.initialize(model=module, config=config | {"bf16": {"enabled": args.bf16}})[0]
    check_packing(module, args)
    return module


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


# ------------------------------------------------------------------------------------------------------------- the file


def read_parts(folder: Path, batches: list[list[int]]) -> dict[int, dict]:
    """{index of a prompt: its row} of what is written so far, whole batches only."""
    rows = {}
    for path in sorted(folder.glob("rank_*.jsonl")):
        for line in path.read_bytes().split(b"\n"):  # not splitlines: text may hold other ends of line
            with contextlib.suppress(ValueError):  # a kill may cut the last line
                row = json.loads(line)
                rows[row["index"]] = row
    whole = {i for batch in batches if all(i in rows for i in batch) for i in batch}
    return {i: rows[i] for i in sorted(whole)}


def write_rows(path: Path, rows: list[dict]):
    """Written under another name and renamed when whole."""
    with writing(path):
        replace(path, path.with_suffix(".part"), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def open_samples(args, rank: int, world: int) -> Path:
    """The run's folder: new, or with --resume one whose rows are of the same kind."""
    ended = gather_lists([rank == 0 and claim(args, ends=("graded.jsonl", "summary.json"))], world)[0]
    folder = Path(args.output_dir)
    if ended:
        if rank == 0:
            print(f"{folder} has come to its end already: nothing is left to do")
        raise SystemExit(0)
    (folder / "parts").mkdir(parents=True, exist_ok=True)
    return folder


def graded_row(prompt, drawn: list[tuple[str, bool, float]], args) -> dict:
    """A row of n responses from n · best_of (text, whether it came to its end, score): of each best_of neighbours the best."""
    groups = [drawn[i : i + args.best_of] for i in range(0, len(drawn), args.best_of)]
    best = [max(group, key=lambda one: one[2]) for group in groups]
    line = lambda text, whole, score: {"text": text, "score": round(score, 5), "policy": args.policy, "complete": whole}
    return {"prompt": prompt, "responses": [line(*one) for one in best]}


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    if args.greedy and args.n * args.best_of > 1:
        stop("--greedy gives one response to a prompt: add --n 1 --best_of 1")
    missing(args.policy, "python sft.py")
    tokenizer = load_tokenizer(args.policy, args)
    reward = FunctionReward(args.reward) if args.reward else TextReward(args.reward_model, args, device)
    question = lambda row: [(row["prompt"], encode(tokenizer, row, None, args)[0])]
    questions, seen = [], {}
    for prompt, ids in load_data(args, "prompts", question):
        text = json.dumps(prompt)
        seen[text] = seen.get(text, 0) + 1  # a prompt that comes again is answered anew
        questions.append((prompt, ids, key_of(args.seed, text, seen[text])))
    if not questions:
        stop(f"{args.data} ({args.split}) has no prompt to answer")
    if args.reward_model == "gold" and not args.reward:  # prompts of other worlds are told before anything is written
        reward([prompt for prompt, *_ in questions], [""] * len(questions), [True] * len(questions))
    writer = Writer(tokenizer, args, device) if args.rollout != "vllm" else None
    ends = writer.module.ends if writer else end_tokens(args.policy, tokenizer)
    write = Rollouts(writer, ends, tokenizer, args, device, args.top_p, rank)
    per_prompt = args.n * args.best_of
    size = max(1, args.batch_size // per_prompt)
    batches = [list(range(at, min(at + size, len(questions)))) for at in range(0, len(questions), size)]
    folder = open_samples(args, rank, world)
    rows = read_parts(folder / "parts", batches)
    gather_lists([], world)  # every rank has read before one writes
    if any(row["prompt"] != questions[i][0] for i, row in rows.items()):
        stop(f"--resume: {args.data} holds other prompts than when {folder} was begun: name another --output_dir")
    if rank == 0:
        write_rows(folder / "parts" / "rank_0.jsonl", list(rows.values()))
        for path in (folder / "parts").glob("rank_*.jsonl"):
            if path.name != "rank_0.jsonl":
                path.unlink()
    gather_lists([], world)
    part = folder / "parts" / f"rank_{rank}.jsonl"
    mine = [batch for batch in batches[rank::world] if batch[0] not in rows]
    bar = tqdm(total=len(questions), initial=len(rows), desc="sample", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 30)  # fmt: skip
    tokens, begun = 0, time.time()
    for batch in mine:
        asked = [questions[i] for i in batch for _ in range(per_prompt)]
        keys = [key_of(questions[i][2], j) for i in batch for j in range(per_prompt)]
        found = write([ids for _, ids, _ in asked], [None] * len(keys) if args.greedy else keys)
        responses = [response for response, _ in found]
        texts = [tokenizer.decode([t for t in r if t not in write.ends]) for r in responses]
        complete = [bool(r) and r[-1] in write.ends for r in responses]
        scores = reward([prompt for prompt, *_ in asked], texts, complete)
        if not all(map(math.isfinite, scores)):
            stop(f"the reward model {args.reward_model} gave a score that is not finite")
        drawn = list(zip(texts, complete, scores, strict=True))
        lines = [
            {"index": i} | graded_row(questions[i][0], drawn[k * per_prompt : (k + 1) * per_prompt], args)
            for k, i in enumerate(batch)
        ]
        with writing(part), open(part, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        tokens += sum(map(len, responses))
        bar.update(len(batch) * world)
        bar.set_postfix(tokens_per_second=f"{world * tokens / (time.time() - begun):.0f}", refresh=False)
    bar.close()
    seconds, tokens = time.time() - begun, int(all_sum(torch.tensor(tokens, device=device)))
    gather_lists([], world)
    graded = folder / "graded.jsonl"
    if rank == 0:
        rows = read_parts(folder / "parts", batches)
        if len(rows) < len(questions):
            stop(f"--output_dir {folder} is not one folder for all hosts: name one on a file system of all")
        write_rows(graded, [{k: v for k, v in rows[i].items() if k != "index"} for i in range(len(questions))])
        scores = [response["score"] for row in rows.values() for response in row["responses"]]
        summary = {"prompts": len(rows), "responses": len(scores), "score": round(sum(scores) / len(scores), 5),
                   "tokens_per_second": round(tokens / max(seconds, 1e-9)) if tokens else None,
                   "seconds": round(time.time() - started, 1)}  # fmt: skip
        with writing(folder / "summary.json"):
            replace(folder / "summary.json", folder / "summary.json.part", json.dumps(summary, indent=2) + "\n")
        print(
            f"{graded}: "
            + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
        )
    gather_lists([], world)
    return graded


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


if __name__ == "__main__":
    main()
