"""Win, tie and loss of one policy's responses against another's: by scores, by a reward model, or by an LLM judge.

    python eval/winrate.py --a runs/dvpo/final --b runs/sft/final --prompts toy --reward_model runs/rm/final
    python eval/winrate.py --a a.jsonl --b b.jsonl --base_url http://localhost:8000/v1 --model NAME
    python eval/winrate.py --a graded.jsonl --policy_a X --b graded.jsonl --policy_b Y                # their own scores

--a and --b are sample files (rows are matched by prompt) or models with --prompts. The i-th response of one is compared
with the i-th of the other. By scores or a reward model a pair is a win (1, 0, 0), tie or loss (VCB, table 2). An LLM
judge sees each pair in both orders, as A and B and as B and A, and the two verdicts are averaged (VCB, section 5.2):
what it thinks of the first place cancels. A pair one of whose verdicts cannot be read is left out and counted.

    win rate = wins + ties / 2,   mean over a prompt's pairs, then over prompts; 95 % bootstrap interval over prompts
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
import sft
from eval import calibration, judge, program, samples


@dataclass(kw_only=True)
class Args(judge.Endpoint, samples.Sampling):
    """Who is compared, and who judges: the scores in the rows unless --reward_model or --base_url is given."""

    a: str
    """a sample file, or a model (with --prompts)"""
    b: str
    """the one it is compared with"""
    policy_a: str = ""
    """of a file, this policy's responses only"""
    policy_b: str = ""
    """of a file, this policy's responses only"""
    reward_model: str = ""
    """a reward model's folder, or its name on the hub: it judges"""
    rubric: Literal["dialogue", "summary"] = "dialogue"
    """what the LLM judge looks at: help and harm, or precision and brevity (VCB, appendix A.3)"""
    prompt: str = ""
    """a prompt file of your own for the LLM judge, with {prompt}, {a}, {b}; it answers `Result: A`, B or C (a tie)"""
    output: str = ""
    """JSON file for the results"""


# ---------------------------------------------------------------------------------------------------- the mathematics


def compare(score_a: float, score_b: float) -> np.ndarray:
    """(win, tie, loss) of a."""
    return np.array([score_a > score_b, score_a == score_b, score_a < score_b], dtype=float)


def average(first: str | None, second: str | None) -> np.ndarray | None:
    """(win, tie, loss) of a, averaged over the verdict with a shown as A and the one with a shown as B; C is a tie."""
    if first is None or second is None:
        return None
    shares = np.zeros(3)
    shares["ACB".index(first)] += 0.5
    shares["BCA".index(second)] += 0.5
    return shares


def summary(shares: np.ndarray, seed: int = 0) -> dict:
    """Means and intervals of (prompts, 3) shares of win, tie and loss."""
    with_rate = np.column_stack([shares, shares[:, 0] + shares[:, 1] / 2])
    low, high = samples.bootstrap(with_rate, seed=seed)
    rows = zip(("win", "tie", "loss", "win_rate"), with_rate.mean(0), low, high)
    return {name: {"mean": m, "ci95": [a, b]} for name, m, a, b in rows} | {"prompts": len(shares)}


# ----------------------------------------------------------------------------------------------------------- judgment


def reward_scores(name: str, pairs: list[tuple], args) -> list[float]:
    """A reward model's scores of (prompt, response) pairs; one that was cut (`complete` is false) has no end to be read."""
    reward = sample.TextReward(name, calibration.settings_of(args), samples.device())
    prompts, responses = zip(*pairs, strict=True)
    texts, complete = zip(*((x["text"], x.get("complete") is not False) for x in responses), strict=True)
    return reward(prompts, texts, complete)


def matched(a: list[dict], b: list[dict]) -> list[tuple[dict, dict, dict]]:
    """(row, response of a, response of b) on the prompts that both have."""
    other = {row["key"]: row for row in b}
    return [
        (row, one, two)
        for row in a
        if row["key"] in other
        for one, two in zip(row["responses"], other[row["key"]]["responses"])
    ]


def run(args: Args) -> dict:
    if args.reward_model and args.base_url:
        sft.stop("--reward_model and --base_url are two judges: give one of them")
    a, b = samples.samples(args.a, args, args.policy_a), samples.samples(args.b, args, args.policy_b)
    pairs = matched(a, b)
    if not pairs:
        sft.stop(f"{args.a} and {args.b} have no prompt in common: they must answer the same prompts")
    prompts = len({row["key"] for row, *_ in pairs})
    if prompts < max(len(a), len(b)):
        print(f"note: {prompts} prompts are in both; {len(a)} in --a, {len(b)} in --b")
    results = {"judge": "score", "unread": 0}
    if args.base_url:
        text = judge.template(args.prompt, judge.PAIRWISE[args.rubric], ("prompt", "a", "b"))
        with judge.Client(args) as client:
            asked = [(row["prompt"], one["text"], two["text"]) for row, one, two in pairs]
            verdicts = judge.both_orders(client, text, asked, judge.read_pairwise, judge.PAIRWISE_FORM)
        shares = [average(*pair) for pair in verdicts]
        said = [verdict for pair in verdicts for verdict in pair if verdict]
        results |= {"judge": args.model, "unread": sum(share is None for share in shares),
                    "first_place": said.count("A") / max(1, len(said)),
                    "agree": float(np.mean([s.max() == 1 for s in shares if s is not None] or [0])),
                    "verdicts": [{"prompt": row["prompt"], "a_first": x, "b_first": y}
                                 for (row, *_), (x, y) in zip(pairs, verdicts)]}  # fmt: skip
    elif args.reward_model:
        flat = [(row["prompt"], response) for row, *two in pairs for response in two]
        scores = reward_scores(args.reward_model, flat, args)
        shares = [compare(*two) for two in zip(scores[::2], scores[1::2])]
        results["judge"] = args.reward_model
    else:
        for _, *two in pairs:
            for name, response in zip((args.a, args.b), two):
                if response.get("score") is None:
                    sft.stop(f"{name} has a response without a score: give --reward_model, or a judge's --base_url")
        shares = [compare(one["score"], two["score"]) for _, one, two in pairs]
    by_prompt = {}
    for (row, *_), share in zip(pairs, shares, strict=True):
        if share is not None:
            by_prompt.setdefault(row["key"], (row, []))[1].append(share)
    if not by_prompt:
        sft.stop(f"no verdict of {results['judge']} could be read: see its replies in {args.cache}")
    rows = [row for row, _ in by_prompt.values()]
    means = [np.mean(found, 0) for _, found in by_prompt.values()]
    groups = judge.by_category(rows, means)
    results["groups"] = {name: summary(np.array(found), args.seed) for name, found in groups.items()}
    cells = lambda x: (f"{100 * x['mean']:.1f}", f"[{100 * x['ci95'][0]:.1f}, {100 * x['ci95'][1]:.1f}]")
    print(samples.table(
        (f"a against b, by {results['judge']}", "win %", "tie %", "loss %", "win rate %", "95 % interval", "prompts"),
        [(name, *(cells(g[x])[0] for x in ("win", "tie", "loss")), *cells(g["win_rate"]), g["prompts"])
         for name, g in results["groups"].items()],
    ))  # fmt: skip
    if args.base_url:
        print(f"the judge named the first response in {results['first_place']:.1%} of its verdicts, the same one in "
              f"both orders of {results['agree']:.1%} of pairs; pairs left out: {results['unread']}")  # fmt: skip
    samples.save(results, args.output)
    return results


@program
def main(argv=None):
    return run(samples.read_flags(Args, argv, __doc__))


if __name__ == "__main__":
    main()
