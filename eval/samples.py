"""Sample files, and what the programs of eval/ share in dealing with them: reading, sampling, intervals, tables.

A sample file (.jsonl, .jsonl.gz, .json, .parquet) has rows `{"prompt": text or chat messages, "responses": [{"text",
"score"?, "policy"?}, ...]}` or `{"prompt", "completion"}`; rows of one prompt are put together, and a `category` is
kept. Where a program takes a sample file it takes a model as well (a folder, or a hub name), and samples it on
`--prompts`."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import sft
from eval import calibration

DRAWS = 1000  # bootstrap resamples


@dataclass(kw_only=True)
class Sampling:
    """How a model is sampled; of no effect on sample files."""

    prompts: str = ""
    """rows with `prompt` to sample models on: a .json/.jsonl(.gz)/.parquet file, a hub name, or `toy` (held-out)"""
    split: str = "train"
    """the part of the data to read: `train`, `train[:30%]` (of a fixed shuffle), `train[2000:4000]`"""
    temperature: float = 1.0
    """sampling temperature; 0 is greedy"""
    max_prompt_tokens: int = 2048
    """a longer prompt is an error"""
    max_response_tokens: int = 512
    """a longer response is cut"""
    micro_batch_size: int = 16
    """sequences per forward pass"""
    seed: int = 0
    """seed of sampling and of the bootstrap"""
    bf16: bool = False
    """weights in bfloat16 (GPU)"""


# ------------------------------------------------------------------------------------------------------------- reading


def messages(prompt) -> list[dict]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def show(prompt) -> str:
    """A prompt as text for a reader: a single question as it is, a dialogue with who speaks."""
    turns = messages(prompt)
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)


def is_file(name: str) -> bool:
    return Path(name).suffix in (".json", ".jsonl", ".gz", ".parquet") or Path(name).is_file()


def read_flags(kinds, argv, doc: str):
    """Flags as a dataclass, or one of a union of them: subcommands."""
    import tyro

    return tyro.cli(kinds, args=argv, description=doc, use_underscores=True)


def load_rows(name: str, split: str, kind: str) -> list[tuple[dict, str]]:
    """Rows of comma-separated sources in the project's column names, each with its place; stops at a bad one."""
    found = []
    for source in map(str.strip, name.split(",")):
        for row, i in zip(*sft.read_data(source, split, kind), strict=True):
            try:
                found.append((sft.canonical(row), f"{source} row {i + 1}"))
            except Exception as error:  # of a stranger's row anything may be wrong
                why = error if isinstance(error, ValueError) else f"it cannot be read ({type(error).__name__})"
                sft.stop(f"{source} row {i + 1}: {why}"[:1000])
    return found


def read(name: str, policy: str = "", split: str = "train") -> list[dict]:
    """Rows {prompt, key, responses, category?} of a sample file, one a prompt, in the file's order.

    `policy` keeps the responses of that policy only. `key` is the prompt as JSON, by which two files are matched."""
    rows, policies = {}, set()
    for row, where in load_rows(name, split, "graded"):
        prompt = row.get("prompt")
        try:
            sft.as_messages(prompt)
        except ValueError as error:
            sft.stop(f"{where}: {error}")
        responses = row.get("responses")
        if responses is None:
            if "completion" not in row:
                sft.stop(f"{where}: no field responses, nor completion: a sample file has one of them in every row")
            responses = [{"text": row["completion"]} | {k: row[k] for k in ("score", "policy") if k in row}]
        for response in responses:
            if not isinstance(response.get("text"), str):
                sft.stop(f"{where}: field text of a response is missing or not text")
        policies |= {str(response.get("policy")) for response in responses}
        responses = [r for r in responses if not policy or r.get("policy") == policy]
        key = json.dumps(messages(prompt))
        if responses:
            found = rows.setdefault(key, {"prompt": prompt, "key": key, "responses": []})
            found["responses"] += responses
            if row.get("category") is not None:
                found["category"] = str(row["category"])
    if not rows:
        here = f": its policies are {', '.join(sorted(policies))}" if policy and policies else ""
        sft.stop(f"{name} ({split}) has no response{f' of policy {policy}' if policy else ''}{here}")
    return list(rows.values())


# ------------------------------------------------------------------------------------------------------------ sampling


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def settings(args) -> dvpo.Args:
    """The scripts' own arguments that loading, encoding and scoring read."""
    return dvpo.Args(
        max_prompt_tokens=args.max_prompt_tokens, max_response_tokens=args.max_response_tokens, bf16=args.bf16,
        skip_bad_rows=getattr(args, "skip_bad_rows", False),
    )  # fmt: skip


class Sampler:
    """A causal model that answers prompts."""

    def __init__(self, name: str, args):
        sft.missing(name)
        self.batch_size = args.micro_batch_size
        self.args, self.tokenizer = settings(args), sft.load_tokenizer(name, settings(args))
        self.model = calibration.Model(name, self.tokenizer, self.args, device())

    def __call__(self, prompts: list, temperature: float, seed: int = 0, n: int = 1) -> tuple[list[str], list[bool]]:
        """n responses to each prompt, prompt by prompt, and which came to an end; temperature 0 is greedy. Same seed and
        prompts: same responses."""
        greedy = not temperature
        self.model.args = dataclasses.replace(self.model.args, temperature=temperature or 1.0, greedy=greedy)
        ids = []
        for i, prompt in enumerate(prompts):
            try:
                ids.append(sft.encode(self.tokenizer, {"prompt": prompt}, None, self.args)[0])
            except ValueError as error:
                sft.stop(f"prompt {i + 1}: {error}")
        found = self.model.answers(prompts, ids, n, seed, self.batch_size)
        return calibration.texts_of(found, self.model.ends, self.tokenizer)


def samples(name: str, args, policy: str = "", n: int = 1) -> list[dict]:
    """Rows of a sample file, or `n` responses of a model to each row of --prompts."""
    if is_file(name):
        return read(name, policy, args.split)
    if not args.prompts:
        sft.stop(f"{name} is not a sample file: give one (.jsonl, .json, .parquet), or a model together with --prompts")
    rows = {}
    source = load_rows(args.prompts, "heldout" if args.prompts == "toy" else args.split, "prompts")
    for row, where in source:
        if not row.get("prompt"):
            sft.stop(f"{where}: field prompt is missing")
        key = json.dumps(messages(row["prompt"]))
        rows[key] = {"prompt": row["prompt"], "key": key, "responses": []}
        rows[key] |= {"category": str(row["category"])} if row.get("category") is not None else {}
    rows = list(rows.values())
    drawn = Sampler(name, args)([row["prompt"] for row in rows], args.temperature, args.seed, n)
    for i, (text, whole) in enumerate(zip(*drawn, strict=True)):
        rows[i // n]["responses"].append({"text": text, "policy": name, "complete": whole})
    return rows


# ------------------------------------------------------------------------------------------------- numbers and tables


def bootstrap(values, weights=None, seed: int = 0) -> np.ndarray:
    """95 % interval of sum(values) / sum(weights) when prompts are drawn anew with replacement (percentile bootstrap).

    values (P, ...): one entry a prompt; weights of the same shape, 1 if not given (the mean). Returns (2, ...)."""
    values = np.asarray(values, dtype=float)
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=float)
    rng, found = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        drawn = rng.integers(len(values), size=len(values))
        with np.errstate(invalid="ignore"):  # a draw without any pair: left out below
            found.append(values[drawn].sum(0) / weights[drawn].sum(0))
    return np.nanpercentile(found, [2.5, 97.5], axis=0)


def table(head, rows) -> str:
    """Columns in line: the first to the left, numbers to the right."""
    lines = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    pad = lambda i, cell: cell.ljust(widths[i]) if i == 0 else cell.rjust(widths[i])
    return "\n".join("  ".join(pad(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines)


def save(results: dict, output: str):
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{output} written")
