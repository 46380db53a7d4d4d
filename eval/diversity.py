"""How different the responses to one prompt are: EAD and Self-BLEU, over 8 samples a prompt (VCB, appendix A.8, table
7).

    python eval/diversity.py --samples runs/sft/final runs/dvpo/final --prompts toy
    python eval/diversity.py --samples sft.jsonl vcb.jsonl --tokenizer NAME

    EAD = N / (V (1 - ((V - 1) / V)^C))    N distinct of C tokens in a prompt's samples together, V in the vocabulary
                                           (Liu et al. 2022): 1 is what V equally likely tokens would give    `ead`
    Self-BLEU-n = mean over a prompt's samples of BLEU-n with the other samples as references
                                           (Zhu et al. 2018): 1 when all are alike                         `self_bleu`

Both are averaged over prompts. More diverse is a higher EAD and a lower Self-BLEU. V must be the same for all that is
compared, so all files are measured in one go. Tokens of EAD are those of --tokenizer; without one they are
sacrebleu's words, and V is the number of different words in all the files.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
from eval import program
from eval import samples as eval_samples


@dataclass(kw_only=True)
class Args(eval_samples.Sampling):
    """Whose samples are measured."""

    samples: tuple[str, ...]
    """sample files, or models (with --prompts), sampled at --temperature"""
    policy: str = ""
    """of a file, this policy's responses only"""
    tokenizer: str = ""
    """a tokenizer's folder or name on the hub, whose tokens and vocabulary EAD counts; empty: words"""
    n: int = 8
    """samples a prompt; of a file the first so many, and prompts with fewer are left out"""
    output: str = ""
    """JSON file for the results"""


def ead(token_lists: list[list], vocabulary: int) -> float:
    """Expectation-adjusted distinct tokens of one prompt's samples: N / E[N], to what random tokens would give."""
    tokens = [token for tokens in token_lists for token in tokens]
    if not tokens:
        return 0.0
    return len(set(tokens)) / (vocabulary * (1 - ((vocabulary - 1) / vocabulary) ** len(tokens)))


def self_bleu(texts: list[str], n: int) -> float:
    """Mean BLEU-n, from 0 to 1, of each text against the others: uniform weights on 1- to n-grams, clipped counts,
    brevity penalty by the nearest length. An order of n-grams that a text is too short for is left out; one without a
    match is smoothed."""
    from sacrebleu.metrics import BLEU

    bleu = BLEU(max_ngram_order=n, effective_order=True)
    return float(np.mean([bleu.sentence_score(t, texts[:i] + texts[i + 1 :]).score for i, t in enumerate(texts)])) / 100


def words(text: str) -> list[str]:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()(text).split()


def measure(rows: list[dict], tokenize, vocabulary: int, n: int, seed: int = 0) -> dict:
    """EAD, Self-BLEU-2 and Self-BLEU-3 with intervals over prompts, from the first n responses to each."""
    found = []
    for row in rows:
        texts = [response["text"] for response in row["responses"][:n]]
        found.append([ead([tokenize(t) for t in texts], vocabulary), self_bleu(texts, 2), self_bleu(texts, 3)])
    low, high = eval_samples.bootstrap(found, seed=seed)
    named = zip(("ead", "self_bleu_2", "self_bleu_3"), np.mean(found, 0), low, high)
    return {name: {"mean": m, "ci95": [a, b]} for name, m, a, b in named} | {"prompts": len(rows)}


def run(args: Args) -> dict:
    if args.n < 2:
        sft.stop(f"--n {args.n}: diversity is between samples of one prompt, so 2 or more")
    files = {}
    for name in args.samples:
        rows = eval_samples.samples(name, args, args.policy, args.n)
        files[name] = [row for row in rows if len(row["responses"]) >= args.n]
        if not files[name]:
            sft.stop(f"{name} has no prompt with {args.n} responses: lower --n, or sample more")
        if len(files[name]) < len(rows):
            print(f"note: {name}: {len(rows) - len(files[name])} prompts left out, with fewer than {args.n} responses")
    if args.tokenizer:
        tokenizer = sft.load_tokenizer(args.tokenizer, eval_samples.settings(args), chat=False)
        tokenize = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]
        vocabulary = len(tokenizer)
    else:
        tokenize = words
        texts = (r["text"] for rows in files.values() for row in rows for r in row["responses"][: args.n])
        vocabulary = len({word for text in texts for word in words(text)})
    results = {"vocabulary": vocabulary, "n": args.n}
    results["files"] = {name: measure(rows, tokenize, vocabulary, args.n, args.seed) for name, rows in files.items()}
    cell = lambda x: f"{x['mean']:.3f} [{x['ci95'][0]:.3f}, {x['ci95'][1]:.3f}]"
    print(eval_samples.table(
        (f"{args.n} samples a prompt, V {vocabulary}", "EAD", "Self-BLEU-2", "Self-BLEU-3", "prompts"),
        [(name, *(cell(x[k]) for k in ("ead", "self_bleu_2", "self_bleu_3")), x["prompts"])
         for name, x in results["files"].items()],
    ))  # fmt: skip
    eval_samples.save(results, args.output)
    return results


@program
def main(argv=None):
    return run(eval_samples.read_flags(Args, argv, __doc__))


if __name__ == "__main__":
    main()
