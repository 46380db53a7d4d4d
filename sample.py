"""Responses of a policy, scored: the graded rows that vcb.py, dpo.py, rest.py (and gvm.py) learn from.

n responses per prompt are drawn from any causal LM and scored by a reward model, which reads *text* with its own
tokenizer, or by the toy world's gold reward. One row a prompt: {"prompt", "responses": [{"text", "score", "policy"}]}.
VCB and the methods that it is compared with all learn from one such file, drawn from the SFT model (VCB, section 4.3).

Deterministic: the noise that picks a token is a function of (seed, prompt, sample, position) alone   `keyed_gumbel`
and argmax(log p + Gumbel noise) is an exact sample of p. The same batch size gives the identical file on one machine,
another one the same file up to near-ties of floating point; so do more ranks. A killed run goes on with --resume: rows
are written a batch at a time, and what a kill left in part is drawn again, the same. With --engine generate_batch
(continuous batching) and vllm the order of the requests decides the noise or the engine draws it: then only the
seed is kept, and rows are as good but not the same.

`--best_of k` draws k responses for each one that it writes, the best by score: its KL to the policy is at most
log k - (k - 1) / k. A response cut at --max_response_tokens is scored without EOS, and by the gold reward as malformed.

    python sample.py                                                 # CPU: the toy world, runs/sft scored by runs/rm
    python sample.py llama3.2-3b --engine vllm                       # 1 GPU
    torchrun --nproc_per_node 8 sample.py llama3.2-3b                # 8 GPUs, prompts shared out
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import gzip
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import AutoConfig

from kernels import linear_logprob, linear_nll


@dataclass
class Args:
    policy: str = "runs/sft/final"
    """who writes: a Hugging Face folder or hub name with a chat template"""
    reward_model: str = "runs/rm/final"
    """who scores: a sequence classifier with one label, from rm.py or elsewhere; `gold` is the toy world's true reward"""
    data: str = "toy"
    """prompts: `toy`, a hub name, or a .json/.jsonl(.gz)/.parquet file with `prompt`; several, comma-separated"""
    split: str = "train"
    """the part of the data to read: `train`, `train[80%:]` (of a fixed shuffle), `train[2000:4000]`; toy has `heldout` too"""
    output_dir: str = "runs/sample"
    """the run's folder: args.json, graded.jsonl, and while it runs parts/"""
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
    max_prompt_tokens: int = 64
    """a longer prompt is an error, or left out with --drop_long_prompts"""
    max_response_tokens: int = 48
    """a response is sampled until EOS or this length"""
    drop_long_prompts: bool = False
    """leave out rows whose prompt is longer than --max_prompt_tokens instead of stopping"""
    engine: Literal["generate", "generate_batch", "vllm"] = "generate"
    """transformers' generate, its continuous batching (faster where lengths differ much, on a GPU), or vLLM (to be installed)"""
    bf16: bool = False
    """bfloat16 weights and products (GPU)"""
    attention: Literal["sdpa", "flash_attention_2", "eager"] = "sdpa"
    """PyTorch's own, flash-attn (to be installed), or the plain product"""
    resume: bool = False
    """continue a killed run in --output_dir"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


_paper = Args(
    data="openbmb/UltraFeedback", split="train[80%:]", n=8, batch_size=64, max_prompt_tokens=1024, max_response_tokens=1024,
    drop_long_prompts=True, bf16=True,
)  # fmt: skip
PRESETS: dict[str, Args] = {
    "llama3.2-3b": _paper,
    "llama3-8b": dataclasses.replace(_paper, batch_size=32),
    "pythia-2.8b-hh": dataclasses.replace(_paper, data="Anthropic/hh-rlhf", split="train", max_prompt_tokens=512, max_response_tokens=256),
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------- the mathematics


def signed(x: int) -> int:
    """The 64-bit number that arithmetic on int64 tensors, which wraps, makes of x."""
    return (x + 2**63) % 2**64 - 2**63


GOLDEN = signed(0x9E3779B97F4A7C15)  # odd: steps of it visit every number


def mixed(x):
    """int64 → int64, the finaliser of SplitMix64 (Steele, Lea and Flood 2014): neighbours in, unrelated numbers out."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * signed(0xBF58476D1CE4E5B9)  # >> keeps the sign: the mask takes it off
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * signed(0x94D049BB133111EB)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def keyed_gumbel(keys, position: int, size: int):
    """Standard Gumbel noise (B, size) fp32, a function of (key, position, index): keys (B,) int64."""
    rows = mixed(mixed(keys) + signed(position * GOLDEN))
    numbers = mixed(rows[:, None] + torch.arange(1, size + 1, device=keys.device) * GOLDEN)
    u = ((numbers & (2**53 - 1)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log1p(-u)).float()  # -log1p(-u) resolves the small numbers that decide who wins


def key_of(*what) -> int:
    """A signed 64-bit key of anything that JSON can write."""
    return int.from_bytes(hashlib.blake2b(json.dumps(what).encode(), digest_size=8).digest(), "big", signed=True)


class KeyedNoise:
    """A logits processor under which greedy decoding is an exact sample of softmax(logits / temperature), cut by top-p."""

    def __init__(self, keys: list[int], args, device):
        from transformers import TopPLogitsWarper

        self.keys, self.position, self.args = torch.tensor(keys, device=device), 0, args
        self.top_p = TopPLogitsWarper(args.top_p) if args.top_p < 1 else None

    def __call__(self, input_ids, scores):
        if self.args.greedy:
            return scores
        scores = scores.float() / self.args.temperature
        if self.top_p:
            scores = self.top_p(input_ids, scores)
        self.position += 1
        return scores + keyed_gumbel(self.keys, self.position, scores.shape[-1])


# -------------------------------------------------------------------------------------------------------------- engines


class Writer:
    """A frozen policy, in the shape that `sample_responses` takes a training engine in."""

    def __init__(self, tokenizer, args, device):
        self.module = Policy(load_model("causal", args.policy, tokenizer, args, frozen=True)).to(device)
        self.args, self.deepspeed, self.device = args, None, device

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.args.bf16)


def engine_generate(tokenizer, args, device):
    writer = Writer(tokenizer, args, device)

    def write(prompts, keys):
        return sample_responses(writer, prompts, KeyedNoise(keys, args, device), tokenizer, args, device)

    return write, writer.module.ends


def engine_generate_batch(tokenizer, args, device):
    """Continuous batching of transformers: a response that ends makes room for the next at once."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    writer = Writer(tokenizer, args, device)
    ends, model = sorted(writer.module.ends), writer.module.model

    def write(prompts, keys):
        config = GenerationConfig(
            do_sample=not args.greedy, temperature=args.temperature, top_p=args.top_p, top_k=0, eos_token_id=ends,
            pad_token_id=tokenizer.pad_token_id, max_new_tokens=args.max_response_tokens,
        )  # fmt: skip
        memory = 0.5 if device.type == "cuda" else 0.02  # of what is free, for its cache
        batching = ContinuousBatchingConfig(seed=key_of(args.seed, keys) % 2**31, max_memory_percent=memory)
        found = model.generate_batch(prompts, config, batching)
        order = sorted(found.values(), key=lambda output: int(output.request_id.rpartition("_")[2]))
        for output in order:
            if output.error:
                stop(f"--engine generate_batch: {output.error}. Use --engine generate")
        return [cut_at(output.generated_tokens, ends) for output in order]

    return write, ends


def engine_vllm(tokenizer, args, device):
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        stop("--engine vllm: vLLM is not installed. `pip install vllm`, or use --engine generate")
    model = LLM(args.policy, dtype="bfloat16" if args.bf16 else "float32", trust_remote_code=args.trust_remote_code,
                max_model_len=args.max_prompt_tokens + args.max_response_tokens)  # fmt: skip
    ends = end_tokens(args.policy, tokenizer, args)

    def write(prompts, keys):
        settings = [
            SamplingParams(
                temperature=0.0 if args.greedy else args.temperature, top_p=args.top_p, top_k=-1, seed=key % 2**31,
                max_tokens=args.max_response_tokens, stop_token_ids=ends,
            )
            for key in keys
        ]  # fmt: skip
        found = model.generate([{"prompt_token_ids": ids} for ids in prompts], settings, use_tqdm=False)
        return [cut_at(list(output.outputs[0].token_ids), ends) for output in found]

    return write, ends


def end_tokens(name: str, tokenizer, args) -> list[int]:
    """The ids that end a response, as `Policy.ends`, without loading the weights."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(name).eos_token_id
    except OSError:
        ends = None
    return sorted({tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends] if ends is not None else [])})


def cut_at(tokens: list[int], ends) -> list[int]:
    """Up to and with the first end token."""
    return tokens[: next((t + 1 for t, token in enumerate(tokens) if token in ends), len(tokens))]


# --------------------------------------------------------------------------------------------------------------- scores


class TextReward:
    """Scores of texts by a frozen reward model, which reads them with its own tokenizer; or `gold`, the toy world's."""

    def __init__(self, name: str, args, device):
        self.name, self.device, self.mean, self.std = name, device, 0.0, 1.0
        if name == "gold":
            if any(part.strip() != "toy" for part in args.data.split(",")):
                stop("--reward_model gold scores prompts of the toy world only: name a reward model for other --data")
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
        self.model = RewardModel(model, self.decoder).to(device)
        self.bf16 = args.bf16
        # The policy's limits on length count tokens of another tokenizer; the model's own positions are the limit here.
        self.limit = getattr(config, "max_position_embeddings", None) or 10**9
        part = 10**9 if self.decoder else self.limit // 2 - 2  # an encoder's pair is cut to fit, as in training
        self.limits = SimpleNamespace(max_prompt_tokens=part, max_response_tokens=part, drop_long_prompts=False)

    def __call__(self, prompts: list, texts: list[str], complete: list[bool], batch_size: int = 64) -> list[float]:
        """One score per (prompt: string or messages, text); `complete` tells which texts came to an EOS."""
        if self.name == "gold":
            import toy

            asked = [prompt if isinstance(prompt, str) else prompt[-1]["content"] for prompt in prompts]
            return [
                toy.gold(prompt, text if whole else f"{text} {toy.UNK}")
                for prompt, text, whole in zip(asked, texts, complete, strict=True)
            ]
        sequences = []
        for prompt, text, whole in zip(prompts, texts, complete, strict=True):
            where = f"a response to {str(prompt)[:60]!r}"
            if not self.decoder:
                sequences.append(encode_pair(self.tokenizer, prompt, text, where, self.limits))
                continue
            ids, response = encode(self.tokenizer, {"prompt": prompt, "text": text}, "text", where, self.limits)
            sequences.append(ids + (response if whole else response[:-1]))
            if len(sequences[-1]) > self.limit:
                stop(f"{where} has {len(sequences[-1])} tokens for the reward model {self.name}, which reads {self.limit}: "
                     "lower --max_prompt_tokens or --max_response_tokens")  # fmt: skip
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        scores = [0.0] * len(sequences)
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            for at in range(0, len(order), batch_size):
                some = order[at : at + batch_size]
                batch = collate_scored([sequences[i] for i in some], self.tokenizer.pad_token_id, self.device)
                for i, score in zip(some, self.model(*batch).tolist(), strict=True):
                    scores[i] = score
        return scores


# ------------------------------------------------------------------------------------------------------------- the file


def read_parts(folder: Path, batches: list[list[int]]) -> dict[int, dict]:
    """{index of a prompt: its row} of what an earlier run wrote, whole batches only; the rest is cut off the files."""
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
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    part.rename(path)


def open_folder(args, rank: int) -> Path:
    folder = Path(args.output_dir)
    settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "resume"}
    if rank == 0:
        if args.resume and (folder / "args.json").is_file():
            before = json.loads((folder / "args.json").read_text())
            changed = [name for name, value in settings.items() if before.get(name) != value]
            if changed:
                stop(f"--resume: --{changed[0]} was {before.get(changed[0])!r} in {folder}, now {settings[changed[0]]!r}: "
                     "rows would not be of one kind. Give it as it was, or another --output_dir")  # fmt: skip
        elif folder.is_dir() and any(folder.iterdir()):
            aside = next(p for p in (Path(f"{folder}.{i}") for i in range(1, 10**6)) if not p.exists())
            folder.rename(aside)
            print(f"{folder} held an earlier run: moved to {aside}")
        (folder / "parts").mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    barrier()
    return folder


def graded_row(prompt, drawn: list[tuple[str, float]], args) -> dict:
    """A row of n responses from n · best_of (text, score) pairs: of each best_of neighbours the best."""
    groups = [drawn[i : i + args.best_of] for i in range(0, len(drawn), args.best_of)]
    best = [max(group, key=lambda pair: pair[1]) for group in groups]
    return {
        "prompt": prompt,
        "responses": [{"text": t, "score": round(score, 5), "policy": args.policy} for t, score in best],
    }


def train(args: Args) -> Path:
    started = time.time()
    rank, world, device = init_distributed(args)
    if min(args.n, args.best_of) < 1 or not args.temperature > 0 or not 0 < args.top_p <= 1:
        stop("--n and --best_of must be 1 or more, --temperature above 0 (or --greedy), --top_p above 0 and at most 1")
    if args.engine == "vllm" and world > 1:
        stop("--engine vllm is one process, which takes its GPUs itself: run it without torchrun")
    if args.greedy and args.n * args.best_of > 1:
        stop("--greedy gives one response to a prompt: add --n 1 --best_of 1")
    missing(args.policy, "python sft.py")
    tokenizer = load_tokenizer(args.policy, args)
    reward = TextReward(args.reward_model, args, device)
    questions, seen = [], {}
    for row, where in load_rows(args.data, args.split, "prompts", args.seed):
        ids, _ = encode(tokenizer, row, None, where, args)
        if ids is not None:
            text = json.dumps(row["prompt"])
            seen[text] = seen.get(text, 0) + 1  # a prompt that comes again is answered anew
            questions.append((row["prompt"], ids, key_of(args.seed, text, seen[text])))
    if not questions:
        stop(f"{args.data} ({args.split}) has no prompt to answer")
    per_prompt = args.n * args.best_of
    size = max(1, args.batch_size // per_prompt)
    batches = [list(range(at, min(at + size, len(questions)))) for at in range(0, len(questions), size)]
    folder = open_folder(args, rank)
    rows = read_parts(folder / "parts", batches)
    barrier()  # every rank has read before one writes
    if any(row["prompt"] != questions[i][0] for i, row in rows.items()):
        stop(f"--resume: {args.data} holds other prompts than when {folder} was begun: name another --output_dir")
    if rank == 0:
        write_rows(folder / "parts" / "rank_0.jsonl", list(rows.values()))
        for path in (folder / "parts").glob("rank_*[1-9].jsonl"):
            path.unlink()
    barrier()
    part = folder / "parts" / f"rank_{rank}.jsonl"
    write, ends = {"generate": engine_generate, "generate_batch": engine_generate_batch, "vllm": engine_vllm}[
        args.engine
    ](tokenizer, args, device)
    mine = [batch for batch in batches[rank::world] if batch[0] not in rows]
    bar = tqdm(total=len(questions), initial=len(rows), desc="sample", disable=rank > 0, dynamic_ncols=True,
               mininterval=0.2 if sys.stderr.isatty() else 30)  # fmt: skip
    tokens, writing = 0, time.time()
    with open(part, "w" if rank else "a", encoding="utf-8") as file:
        for batch in mine:
            asked = [questions[i] for i in batch for _ in range(per_prompt)]
            keys = [key_of(questions[i][2], j) for i in batch for j in range(per_prompt)]
            responses = write([ids for _, ids, _ in asked], keys)
            texts = [tokenizer.decode([t for t in r if t not in ends]) for r in responses]
            complete = [bool(r) and r[-1] in ends for r in responses]
            try:
                scores = reward([prompt for prompt, *_ in asked], texts, complete)
                if not all(map(math.isfinite, scores)):
                    stop(f"the reward model {args.reward_model} gave a score that is not finite")
            except SystemExit as ended:  # what one rank alone meets, that rank must tell
                if rank:
                    print(f"error: {ended.message}", file=sys.stderr)
                raise
            drawn = list(zip(texts, scores, strict=True))
            lines = [
                {"index": i} | graded_row(questions[i][0], drawn[k * per_prompt : (k + 1) * per_prompt], args)
                for k, i in enumerate(batch)
            ]
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            file.flush()
            tokens += sum(map(len, responses))
            bar.update(len(batch) * world)
            bar.set_postfix(tokens_per_second=f"{world * tokens / (time.time() - writing):.0f}", refresh=False)
    bar.close()
    seconds, tokens = time.time() - writing, int(all_sum(torch.tensor(tokens, device=device)))
    barrier()
    graded = folder / "graded.jsonl"
    if rank == 0:
        rows = read_parts(folder / "parts", batches)
        lost = len(questions) - len(rows)
        assert not lost, f"{lost} prompts have no row"
        write_rows(graded, [{k: v for k, v in rows[i].items() if k != "index"} for i in range(len(questions))])
        scores = [response["score"] for row in rows.values() for response in row["responses"]]
        summary = {"prompts": len(rows), "responses": len(scores), "score": sum(scores) / len(scores),
                   "tokens_per_second": round(tokens / max(seconds, 1e-9)) if tokens else None,
                   "seconds": round(time.time() - started, 1)}  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        print(
            f"{graded}: "
            + ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in summary.items())
        )
    barrier()
    return graded


def main(argv=None):
    train(parse_args(Args, PRESETS, argv, __doc__))


# ====================================================================================================================
# Plumbing: data, models, engine, run folder. The same text in every script (tests/test_copies.py).
# ====================================================================================================================


# Copied from dvpo.sample_responses
def sample_responses(engine, prompts, noise, tokenizer, args, device) -> list[list[int]]:
    """Response ids, with the EOS unless cut, of this rank's prompts (ids)."""
    width = max(map(len, prompts))
    input_ids = torch.full((len(prompts), width), tokenizer.pad_token_id)
    mask = torch.zeros_like(input_ids)
    for i, prompt in enumerate(prompts):  # generation needs padding on the left
        input_ids[i, width - len(prompt) :] = torch.tensor(prompt)
        mask[i, width - len(prompt) :] = 1
    with torch.no_grad(), unwrapped(engine) as model, engine.autocast():
        out = model.generate(
            input_ids=input_ids.to(device), attention_mask=mask.to(device), logits_processor=[noise],
            max_new_tokens=args.max_response_tokens, do_sample=False, use_cache=True,
        )  # fmt: skip
    ends = engine.module.ends
    responses = []
    for row in out[:, width:].tolist():
        length = next((t + 1 for t, token in enumerate(row) if token in ends), len(row))
        responses.append(row[:length])
    return responses


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


# Copied from rm.RewardModel
class RewardModel(torch.nn.Module):
    """A sequence-classification model's scores: (R,) fp32, read at the last token by length (decoder) or as stock."""

    def __init__(self, model, decoder: bool):
        super().__init__()
        self.model, self.decoder = model, decoder

    def forward(self, input_ids, lengths):
        if not self.decoder:
            mask = torch.arange(input_ids.shape[1], device=input_ids.device) < lengths[:, None]
            return self.model(input_ids=input_ids, attention_mask=mask.long()).logits.float().squeeze(-1)
        model = plain(self.model)
        hidden = getattr(model, model.base_model_prefix)(input_ids=input_ids, use_cache=False).last_hidden_state
        last = torch.arange(len(lengths), device=lengths.device) * input_ids.shape[1] + lengths - 1
        return getattr(model, head_name(model))(hidden.flatten(0, 1).index_select(0, last)).float().squeeze(-1)


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
def collate_scored(sequences: list[list[int]], pad_token_id: int, device):
    """Right-padded (R, L) ids and (R,) lengths."""
    lengths = torch.tensor([len(s) for s in sequences])
    input_ids = torch.full((len(sequences), int(lengths.max())), pad_token_id)
    for i, sequence in enumerate(sequences):
        input_ids[i, : len(sequence)] = torch.tensor(sequence)
    return input_ids.to(device, non_blocking=True), lengths.to(device, non_blocking=True)


# Copied from rm.encode_pair
def encode_pair(tokenizer, prompt, text, where: str, args):
    """Ids of (prompt, response) as an encoder's text pair, each cut from its far end: what is near the seam stays."""
    if isinstance(prompt, list):
        prompt = "\n\n".join(m["content"] for m in prompt)
    if not isinstance(prompt, str) or not isinstance(text, str):
        stop(f"{where}: field prompt or text is missing or not text")
    a, b = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, text))
    a, b = a[-args.max_prompt_tokens :], b[: args.max_response_tokens]
    start, end = tokenizer.cls_token_id, tokenizer.sep_token_id
    return [start, *a, end, *b, end]


# Copied from gvm.head_name
def head_name(model) -> str:
    """What the architecture calls its linear head: `score` (Llama, Mistral, Qwen) or `classifier` (GPT-NeoX, GPT-2)."""
    return "score" if hasattr(model, "score") else "classifier"


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


# Copied from sft.barrier
def barrier():
    if dist.is_initialized():
        dist.barrier()


if __name__ == "__main__":
    main()
