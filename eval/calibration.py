"""What an aligned policy's rewards cost, against its reference: expected reward and KL, misalignment, lengths, best-of-n.

    python eval/calibration.py --policy runs/vcb/final --reference runs/sft/final --reward_model runs/rm/final

The policy answers each prompt n times at temperature 1; a reward model scores the answers; log-ratios are of the policy to
the reference, summed over tokens.

    KL            k1: mean of log pi - log pi_ref; k3: mean over answers of sum_t (exp(-d_t) - 1 + d_t), d_t the token's
                  log-ratio (Schulman 2020): the same expectation, never negative, less noise near the reference
                  and more, by its exponential, far from it                                           `kl_estimates`
    misalignment  share of answer pairs with r_1 > r_2 whose log-ratios are not in that order (VCB, appendix A.5);
                  undefined for the reference itself                                                  `misalignment_rate`
    best of n     expected reward of the best of n answers *of the reference*, by order statistics over all it gave, and
                  its KL, at most log n - (n - 1) / n: the curve that a method should beat            `best_of_n`

Reward against KL, a point per evaluation, is the frontier of VCB's figure 5 (`python eval/demo.py` draws it).
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import sft
from eval import program


@dataclass
class Args:
    policy: str = "runs/vcb/final"
    """the policy: a Hugging Face folder or hub name"""
    reference: str = "runs/sft/final"
    """what it was aligned from"""
    reward_model: str = "runs/rm/final"
    """who scores: a sequence classifier with one label; `gold` is the toy world's true reward"""
    data: str = "toy"
    """prompts: `toy`, a hub name, or a .json/.jsonl(.gz)/.parquet file with `prompt`"""
    split: str = "heldout"
    """the part of the data to read: `train`, `train[80%:]`, ...; toy's `heldout` was never trained on"""
    n: int = 8
    """answers per prompt (paper: 8)"""
    seed: int = 0
    """seed of the answers"""
    batch_size: int = 256
    """answers in one call of the model"""
    max_prompt_tokens: int = 64
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 48
    """an answer is sampled until EOS or this length"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
    output: str = ""
    """a JSON file for the numbers"""
    bf16: bool = False
    """bfloat16 weights and products (GPU)"""
    trust_remote_code: bool = False
    """allow code that comes with a hub model"""


# ------------------------------------------------------------------------------------------------------------ statistics


def kl_estimates(log_ratio: torch.Tensor, mask: torch.Tensor, n: int = 1) -> dict:
    """k1 and k3 of KL(policy || reference) per sequence, from per-token log-ratios (B, T) on the policy's own samples, n
    for each prompt; the standard errors are over prompts."""
    d = torch.where(mask, log_ratio.double(), 0)
    found = {}
    for name, x in (("k1", d.sum(1)), ("k3", ((-d).exp() - 1 + d).sum(1))):
        by_prompt = x.view(-1, n).mean(1)
        error = by_prompt.std().item() / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else math.nan
        found |= {name: x.mean().item(), f"{name}_standard_error": error}
    return found


def misalignment_rate(log_ratio, reward) -> float | None:
    """Share of pairs of a prompt's answers with different rewards whose log-ratios are not in the order of the rewards;
    both (prompts, n). None where no two rewards differ, or all log-ratios are 0: the policy is the reference."""
    log_ratio, reward = np.asarray(log_ratio, float), np.asarray(reward, float)
    if not np.abs(log_ratio).max() > 0:
        return None
    i, j = np.triu_indices(reward.shape[1], 1)
    gap, ratio = reward[:, i] - reward[:, j], log_ratio[:, i] - log_ratio[:, j]
    counts = gap != 0
    return float((gap * ratio <= 0)[counts].mean()) if counts.any() else None


def best_of_n(score, sizes, *values) -> list[dict]:
    """For each n: mean `score` (prompts, m) of the best of n of the m answers by score, the same answer's mean of each
    array in `values`, and the KL bound. Exact over all subsets of size n: the i-th smallest of m is the best of a
    subset with probability C(i - 1, n - 1) / C(m, n)."""
    score = np.asarray(score, float)
    order, m = score.argsort(1, kind="stable"), score.shape[1]
    found = []
    for n in sizes:
        weight = np.array([math.comb(i, n - 1) / math.comb(m, n) for i in range(m)])
        means = [float((np.take_along_axis(np.asarray(x, float), order, 1) @ weight).mean()) for x in (score, *values)]
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, "score": means[0], "values": means[1:]})
    return found


def interval(per_prompt) -> list[float]:
    """95 % interval of the mean over prompts, by the normal approximation."""
    half = 1.96 * np.std(per_prompt, ddof=1) / np.sqrt(len(per_prompt)) if len(per_prompt) > 1 else math.nan
    return [float(np.mean(per_prompt) - half), float(np.mean(per_prompt) + half)]


# ------------------------------------------------------------------------------------------------------------- measuring


def settings_of(args, policy: str = "") -> sample.Args:
    """sample.py's settings for these arguments: whatever it knows of them."""
    shared = {f.name: getattr(args, f.name) for f in dataclasses.fields(sample.Args) if hasattr(args, f.name)}
    return sample.Args(**shared | {"policy": policy})


class Model:
    """A frozen policy that samples and tells log-probs."""

    def __init__(self, name: str, tokenizer, args, device):
        settings = settings_of(args, name)
        self.args, self.tokenizer, self.device = settings, tokenizer, device
        self.writer = sample.Writer(tokenizer, settings, device)
        self.ends = self.writer.module.ends

    def answers(self, prompts, ids, n: int, seed: int, batch_size: int) -> list[list[int]]:
        """n answers (token ids) to each prompt, prompt by prompt, by the noise of sample.py."""
        jobs, seen = [], {}
        for prompt, i in zip(prompts, ids, strict=True):
            text = json.dumps(prompt)
            seen[text] = seen.get(text, 0) + 1
            jobs += [(i, sample.key_of(sample.key_of(seed, text, seen[text]), j)) for j in range(n)]
        write = sample.Rollouts(self.writer, self.ends, self.tokenizer, self.args, self.device, self.args.top_p)
        found = []
        short = len(jobs) <= 8 * batch_size  # too soon over for a bar
        for at in tqdm(range(0, len(jobs), batch_size), desc="sampling", mininterval=2, leave=False, disable=short):
            some = jobs[at : at + batch_size]
            prompts, keys = zip(*some, strict=True)
            drawn = write(list(prompts), [None] * len(keys) if self.args.greedy else list(keys))
            found += [response for response, _ in drawn]
        return found

    def log_probs(self, ids, responses, batch_size: int = 256):
        """(B, T) fp32 token log-probs of responses, 0 beyond their end."""
        width, parts = max(map(len, responses)), []
        with torch.no_grad(), self.writer.autocast():
            for at in range(0, len(ids), batch_size):
                rows = list(zip(ids[at : at + batch_size], responses[at : at + batch_size], strict=True))
                logp = self.writer.module(sft.collate(rows, self.tokenizer.pad_token_id, self.device))
                parts.append(torch.nn.functional.pad(logp, (0, width - logp.shape[1])).cpu())
        return torch.cat(parts)


def texts_of(responses, ends, tokenizer) -> tuple[list[str], list[bool]]:
    """Texts without EOS, and which of them came to one."""
    texts = [tokenizer.decode([t for t in r if t not in ends]) for r in responses]
    return texts, [bool(r) and r[-1] in ends for r in responses]


def measure(model: Model, reference: Model, prompts, ids, n: int, seed: int, rewards: dict, batch_size: int = 256):
    """Answers of `model` to the prompts and what they are worth. rewards: name -> TextReward, the first of which orders
    the pairs. Returns (numbers, arrays): arrays hold texts, `reward` by name (prompts, n), log_ratio (prompts, n)."""
    responses = model.answers(prompts, ids, n, seed, batch_size)
    asked, repeated = ([x for x in xs for _ in range(n)] for xs in (prompts, ids))
    texts, complete = texts_of(responses, model.ends, model.tokenizer)
    d = model.log_probs(repeated, responses, batch_size) - reference.log_probs(repeated, responses, batch_size)
    lengths = torch.tensor([len(r) for r in responses])
    mask = torch.arange(d.shape[1]) < lengths[:, None]
    found = {name: np.reshape(reward(asked, texts, complete), (-1, n)) for name, reward in rewards.items()}
    log_ratio = d.double().sum(1).view(-1, n).numpy()
    numbers = {
        "reward": {
            name: {"mean": float(r.mean()), "ci95": interval(r.mean(1)), "std": float(r.std())}
            for name, r in found.items()
        },
        "kl": kl_estimates(d, mask, n),
        "misaligned": {name: misalignment_rate(log_ratio, r) for name, r in found.items()},
        "length": {
            "mean": float(lengths.float().mean()),
            "quartiles": np.percentile(lengths, [0, 25, 50, 75, 100]).tolist(),
        },
        "complete": float(np.mean(complete)),
    }
    return numbers, {"prompt": asked, "text": texts, "complete": complete, "reward": found, "log_ratio": log_ratio}


def load_prompts(args, tokenizer):
    """(prompts, their ids)."""
    found = sft.load_data(args, "prompts", lambda row: [(row["prompt"], sft.encode(tokenizer, row, None, args)[0])])
    if not len(found):
        sft.stop(f"{args.data} ({args.split}) has no prompt to answer")
    return [list(x) for x in zip(*found, strict=True)]


@program
def main(argv=None):
    args = tyro.cli(Args, args=argv, description=__doc__, use_underscores=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in (args.policy, args.reference):
        sft.missing(name)
    tokenizer = sft.load_tokenizer(args.reference, args)
    prompts, ids = load_prompts(args, tokenizer)
    reward = {"reward": sample.TextReward(args.reward_model, settings_of(args), device)}
    reference = Model(args.reference, tokenizer, args, device)
    base, drawn = measure(reference, reference, prompts, ids, args.n, args.seed, reward, args.batch_size)
    found, _ = measure(
        Model(args.policy, tokenizer, args, device), reference, prompts, ids, args.n, args.seed, reward, args.batch_size
    )
    sizes = [2**k for k in range(args.n.bit_length())]
    curve = [{k: row[k] for k in ("n", "kl", "score")} for row in best_of_n(drawn["reward"]["reward"], sizes)]
    print(f"{'':12}{'reward':>9}   {'95 % interval':18}{'KL k1':>8}{'KL k3':>8}{'misaligned':>12}{'tokens':>8}")
    for name, row in (("reference", base), ("policy", found)):
        low, high = row["reward"]["reward"]["ci95"]
        wrong = row["misaligned"]["reward"]
        wrong = "-" if wrong is None else f"{wrong:.1%}"
        print(f"{name:12}{row['reward']['reward']['mean']:9.3f}   [{low:.3f}, {high:.3f}]    {row['kl']['k1']:8.2f}"
              f"{row['kl']['k3']:8.2f}{wrong:>12}{row['length']['mean']:8.1f}")  # fmt: skip
    for row in curve:
        print(f"best of {row['n']:<4}{row['score']:9.3f}   {'KL at most':18}{row['kl']:8.2f}")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        Path(args.output).write_text(
            json.dumps({"policy": found, "reference": base, "best_of_n": curve}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
