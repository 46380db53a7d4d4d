"""Table 4 of the DVPO paper for a global value model, with other scorers of responses beside it.

    python eval/value_accuracy.py --gvm runs/gvm/final                                # the toy world: also calibration
    python eval/value_accuracy.py --gvm G --data graded.jsonl --split test --reward_model R --policy P --reference S

Of each pair of responses to one prompt with different scores: does the better one have the higher statistic of its
token values Q_1 .. Q_T, for the mean and the percentiles P1, P5, P10, P90, P95, P99 (DVPO, appendix C)? A tie counts
half. Beside it stand a reward model's score, the implicit reward of a DPO policy,

    gamma (log pi(y|x) - log pi_ref(y|x))                                      sums over tokens, `implicit_rewards`

(any gamma > 0 gives the same order), and the response's length, which a scorer must beat. Intervals are by bootstrap
over prompts. tau are answers of the same policy to other prompts of the data. Use data that no model here was trained
on.

In the toy world every value has an exact counterpart: for each token position the table tells the mean prediction and
the mean truth, the root mean squared error and the correlation, given tau of the policy that writes.
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import toy
from eval import demo, program, samples, winrate

STATISTICS = ("mean", "P1", "P5", "P10", "P90", "P95", "P99")


@dataclass(kw_only=True)
class Args:
    """Which value model is measured, and on what."""

    gvm: str = "runs/gvm/final"
    """the global value model's folder"""
    data: str = "toy"
    """graded rows or preference pairs held out of training; `toy`: texts of its policies on held-out prompts"""
    split: str = "train"
    """the part of the data to read: `train`, `test`, `train[:30%]` (of a fixed shuffle), `train[2000:4000]`"""
    reward_model: str = ""
    """a reward model to measure on the same pairs"""
    policy: str = ""
    """a policy trained by DPO, whose implicit reward is measured on the same pairs (needs --reference)"""
    reference: str = ""
    """the model that policy was trained from"""
    tau_pairs: int | None = None
    """question-answer pairs in tau; default: as in training"""
    max_prompt_tokens: int = 1024
    """a row with a longer prompt cannot be used"""
    max_response_tokens: int = 1024
    """a longer response is cut"""
    skip_bad_rows: bool = False
    """leave out rows of your own file that cannot be used (as is done with hub data) instead of stopping at the first"""
    micro_batch_size: int = 8
    """of the implicit reward: sequences per forward pass"""
    seed: int = 0
    """seed of the choice of tau, of the toy world's texts and of the bootstrap"""
    bf16: bool = False
    """weights in bfloat16 (GPU)"""
    output: str = ""
    """JSON file for the results"""


# ---------------------------------------------------------------------------------------------------- the mathematics


def accuracies(rows: list[tuple], seed: int = 0) -> dict:
    """{statistic: {mean, ci95}} and the number of pairs, from (prompt, score, {statistic: value}) rows.

    The mean is over all pairs (`gvm.pair_accuracy`); the bootstrap draws prompts, whose pairs belong together."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(row[0], []).append(row)
    names, wins, pairs = list(rows[0][2]) if rows else [], [], []
    for group in by_prompt.values():
        scores = [score for _, score, _ in group]
        n = sum(a != b for i, a in enumerate(scores) for b in scores[:i])
        if n:
            found = gvm.pair_accuracy(group)
            wins.append([found[name] * n for name in names])
            pairs.append([n] * len(names))
    if not wins:
        gvm.stop("the data has no two responses to one prompt with different scores: there is nothing to compare")
    low, high = samples.bootstrap(wins, pairs, seed)
    means = np.sum(wins, 0) / np.sum(pairs, 0)
    found = {name: {"mean": m, "ci95": [a, b]} for name, m, a, b in zip(names, means, low, high)}
    return found | {"pairs": int(np.sum(pairs, 0)[0]), "prompts": len(wins)}


def calibration(values: list[np.ndarray], exact: list[np.ndarray]) -> list[dict]:
    """Prediction against truth at each token position, from one array of token values a text."""
    rows = []
    for t in range(max(map(len, values))):
        q, true = (np.array([x[t] for x in side if len(x) > t]) for side in (values, exact))
        same = q.std() == 0 or true.std() == 0
        rows.append({
            "token": t + 1, "n": len(q), "mean": float(q.mean()), "exact": float(true.mean()),
            "rmse": float(np.sqrt(np.mean((q - true) ** 2))),
            "correlation": None if same else float(np.corrcoef(q, true)[0, 1]),
        })  # fmt: skip
    return rows


# ------------------------------------------------------------------------------------------------------------ scorers


def implicit_rewards(policy: str, reference: str, answers: list[gvm.Answer], args) -> np.ndarray:
    """log pi(y|x) - log pi_ref(y|x) of each answer, with the policy's own tokens."""
    loading = samples.settings(args)
    tokenizer = gvm.load_tokenizer(policy, loading)
    rows = [
        (tokenizer.apply_chat_template(answer.prompt, add_generation_prompt=True, return_dict=False), answer.response)
        for answer in answers
    ]
    sums = []
    for name in (policy, reference):
        model = dvpo.Policy(dvpo.load_model("causal", name, tokenizer, loading, frozen=True)).to(samples.device())
        with torch.no_grad():
            parts = [
                model(dvpo.collate(rows[at : at + args.micro_batch_size], tokenizer.pad_token_id, samples.device()))
                .sum(1).double().cpu()
                for at in range(0, len(rows), args.micro_batch_size)
            ]  # fmt: skip
        sums.append(torch.cat(parts).numpy())
    return sums[0] - sums[1]


def toy_texts(seed: int) -> list[tuple]:
    """(policy, prompt, text, score) on held-out prompts by every training policy, graded by the gold reward."""
    return [(policy, prompt, text, toy.gold(prompt, text))
            for policy, prompt, text, *_ in demo.value_texts(toy.TRAIN_POLICIES, seed)]  # fmt: skip


def load_answers(tokenizer, args) -> list[gvm.Answer]:
    """The data as this tokenizer reads it."""
    if args.data != "toy":
        return gvm.load_answers(tokenizer, args)
    read = lambda row: gvm.response_ids(tokenizer, row["text"], args)
    return [
        gvm.Answer(samples.messages(prompt), read({"prompt": prompt, "text": text}), score, policy)
        for policy, prompt, text, score in toy_texts(args.seed)
    ]


def table4(name: str, args) -> tuple[dict, list[np.ndarray]]:
    """(accuracies by statistic, token values in units of the grades)."""
    gvm.missing(name, "python gvm.py")
    loading = samples.settings(args)
    tokenizer = gvm.load_tokenizer(name, loading)
    model = gvm.load_model("value", name, tokenizer, loading, frozen=True)
    config, rng = model.config, random.Random(args.seed)
    if not hasattr(config, "reward_std"):
        gvm.stop(f"{name} is no global value model: its config has no reward_std; make one with `python gvm.py`")
    pairs = config.tau_pairs if args.tau_pairs is None else args.tau_pairs
    answers, by_policy = load_answers(tokenizer, args), {}
    for answer in answers:
        by_policy.setdefault(answer.policy, []).append(answer)
    groups = [gvm.choose_tau(by_policy[a.policy], a, pairs, rng) + [a] for a in answers]
    reading = gvm.Args(tau_tokens=config.tau_tokens)
    found = gvm.predict(gvm.ValueModel(model).to(samples.device()), tokenizer, groups, reading, samples.device())
    values = [v[1:] * config.reward_std + config.reward_mean for v in found]
    rows = [
        (a.key, a.score, gvm.value_statistics(v) | {"length": len(v)}) for a, v in zip(answers, values, strict=True)
    ]
    return accuracies(rows, args.seed), values


def reward_model_accuracy(args) -> dict:
    """The same pairs, as text, since the reward model has its own tokenizer."""
    if args.data == "toy":
        rows = [(prompt, {"text": text}, score) for _, prompt, text, score in toy_texts(args.seed)]
    else:
        tokenizer = gvm.load_tokenizer(args.gvm, samples.settings(args))

        def texts(row):
            gvm.encode_graded(tokenizer, row, args)  # a row that the value model cannot read is left out here too
            text = lambda response: {field: response.get(field) for field in ("text", "complete")}
            return [(gvm.as_messages(row["prompt"]), text(r), r["score"]) for r in gvm.graded(row)]

        rows = list(gvm.load_data(args, "graded", texts))
    found = winrate.reward_scores(args.reward_model, [row[:2] for row in rows], args)
    triples = [(str(prompt), score, {"mean": mark}) for (prompt, _, score), mark in zip(rows, found, strict=True)]
    return accuracies(triples, args.seed)


def run(args: Args) -> dict:
    if bool(args.policy) != bool(args.reference):
        gvm.stop("an implicit reward needs both --policy and --reference")
    found, values = table4(args.gvm, args)
    results = {"gvm": {name: found[name] for name in STATISTICS}, "length": found["length"],
               "pairs": found["pairs"], "prompts": found["prompts"]}  # fmt: skip
    lines = [(f"GVM, {name}", results["gvm"][name], found["pairs"]) for name in STATISTICS]
    if args.reward_model:
        other = reward_model_accuracy(args)
        results["reward_model"] = other["mean"]
        lines.append(("reward model", other["mean"], other["pairs"]))
    if args.policy:
        theirs = load_answers(gvm.load_tokenizer(args.policy, samples.settings(args)), args)
        gaps = implicit_rewards(args.policy, args.reference, theirs, args)
        other = accuracies([(a.key, a.score, {"mean": gap}) for a, gap in zip(theirs, gaps, strict=True)], args.seed)
        results["implicit_reward"] = other["mean"]
        lines.append(("implicit reward", other["mean"], other["pairs"]))
    lines.append(("length of the response", results["length"], found["pairs"]))
    rows = [
        (name, f"{100 * x['mean']:.2f}", f"[{100 * x['ci95'][0]:.2f}, {100 * x['ci95'][1]:.2f}]", n)
        for name, x, n in lines
    ]
    print(samples.table(("", "accuracy %", "95 % interval", "pairs"), rows))
    if args.data == "toy":
        exact = [
            toy.exact_values(policy, prompt, text.split() + [toy.EOS])[1:]
            for policy, prompt, text, _ in toy_texts(args.seed)
        ]
        results["calibration"] = calibration(values, exact)
        results["fit"] = demo.fit([(v, true[: len(v)]) for v, true in zip(values, exact, strict=True)])
        print()
        print(samples.table(("token", "texts", "mean Q", "mean exact", "RMSE", "correlation"), [
            (c["token"], c["n"], f"{c['mean']:.3f}", f"{c['exact']:.3f}", f"{c['rmse']:.3f}",
             "-" if c["correlation"] is None else f"{c['correlation']:.3f}")
            for c in results["calibration"] if c["n"] >= 20
        ]))  # fmt: skip
        both = results["fit"]["all"]
        print(f"over all tokens: correlation {both['correlation']:.3f}, mean squared error {both['mse']:.4f}")
    samples.save(results, args.output)
    return results


@program
def main(argv=None):
    return run(samples.read_flags(Args, argv, __doc__))


if __name__ == "__main__":
    main()
