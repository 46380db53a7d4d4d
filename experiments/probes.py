"""What EXPERIMENTS.md asks of a seed's models beside the grades of its policies; kept as probes.json in the seed's folder.

    python experiments/probes.py runs/experiments/seed10          # after experiments/measure.py

positions  squared error of value models by token position: tau of the writer, of another, none; and the yardsticks
teachers   values of the SFT policy from the reward model (mean score of k continuations: the Bellman equation of the DVPO
           paper's theorem 3.1, by sampling) and from the GVM, each against the mean gold reward of other continuations
moved      the same of DVPO's snapshots: does the frozen GVM still know a policy that has moved?
gradient   at the SFT policy, for each advantage: noise over signal of a batch's gradient, and the cosine of its mean with
           that of the exact values
pairs      fit of the GVM, and of the Bayes-optimal prediction, by how many pairs of tau are shown
tokens     words of a few responses with their Q and their exact values
targets    of the value models of question 2: the line of exact values on theirs, and correlation at the last token
implicit   DPO's implicit reward, log pi - log pi_ref (and VCB's, IPO's), against gold, the reward model and length, on
           texts of the SFT policy
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import sft
import toy
from eval import calibration, demo, report
from experiments import measure, page

TEXTS = 96  # of a policy, each with three places to go on from
CONTINUED = 16  # continuations from a place; half for the truth, half for what a reward model makes of them
DRAWN = 256  # texts that a snapshot's KL is measured on
BATCH, BATCHES = 32, 32  # responses in a gradient, gradients


def correlation(x, y) -> float | None:
    x, y = np.ravel(x), np.ravel(y)
    return float(np.corrcoef(x, y)[0, 1]) if x.std() > 0 and y.std() > 0 else None


def drawn(bench, policy, n: int, seed: int):
    """n responses (token ids) of a policy to held-out prompts in turn: [(prompt, ids of it, response)]."""
    asked = [(bench.prompts[i % len(bench.prompts)], bench.ids[i % len(bench.ids)]) for i in range(n)]
    found = policy.answers(*zip(*asked, strict=True), 1, seed, 256)
    return [(*one, response) for one, response in zip(asked, found, strict=True)]


def text_of(bench, response) -> tuple[str, bool]:
    texts, complete = calibration.texts_of([response], bench.reference.ends, bench.tokenizer)
    return texts[0], complete[0]


def partners(bench, rows, pairs: int):
    """tau of each row: the next rows' questions and answers."""
    texts = [(prompt, text_of(bench, response)[0]) for prompt, _, response in rows]
    return [[texts[(i + j + 1) % len(rows)] for j in range(pairs)] for i in range(len(rows))]


def gvm_values(bench, rows, pairs: int):
    """[(T + 1,) in gold units]: V(s_1), then Q of each token; tau of `pairs` of the same rows."""
    folder = str(bench.folder / "gvm" / "final")
    model = gvm.load_model("value", folder, bench.tokenizer, bench.reference.args, frozen=True)
    mean, std = model.config.reward_mean, model.config.reward_std
    eos = [bench.tokenizer.eos_token_id]
    ids = lambda text: bench.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer = lambda prompt, tokens: gvm.Answer([{"role": "user", "content": prompt}], tokens)
    tau = partners(bench, rows, pairs)
    groups = [
        [answer(p, ids(text) + eos) for p, text in shown] + [answer(prompt, response)]
        for shown, (prompt, _, response) in zip(tau, rows, strict=True)
    ]
    settings = gvm.Args(tau_tokens=model.config.tau_tokens)
    found = gvm.predict(gvm.ValueModel(model), bench.tokenizer, groups, settings, torch.device("cpu"))
    return [v * std + mean for v in found]


def trained_pairs(bench) -> int:
    return json.loads((bench.folder / "gvm" / "final" / "config.json").read_text())["tau_pairs"]


def continued(bench, policy, seed: int, reader=None) -> dict:
    """Places in a policy's texts: the truth (mean gold reward of continuations from there), what the GVM says with the
    policy's tau and with none, and, of other continuations, `reader`'s mean score. Correlations over places."""
    rows = [row for row in drawn(bench, policy, TEXTS, seed) if len(row[2]) > 4]
    places = [(i, t) for i, row in enumerate(rows) for t in (1, len(row[2]) // 2, len(row[2]) - 2)]
    half = CONTINUED // 2
    n = CONTINUED if reader else half
    asked = [rows[i][0] for i, _ in places for _ in range(n)]
    starts = [rows[i][1] + rows[i][2][:t] for i, t in places for _ in range(n)]
    ends = policy.answers(asked, starts, 1, seed + 1, 256)
    heads = [rows[i][2][:t] for i, t in places for _ in range(n)]
    limit = toy.MAX_RESPONSE_TOKENS
    said = [text_of(bench, (head + end)[:limit]) for head, end in zip(heads, ends, strict=True)]
    score = lambda reward: np.reshape(reward(asked, *map(list, zip(*said, strict=True))), (len(places), n))
    gold = score(bench.rewards["gold"])
    truth, pairs = gold[:, :half].mean(1), trained_pairs(bench)
    read = {"gvm": gvm_values(bench, rows, pairs), "gvm_no_tau_shown": gvm_values(bench, rows, 0)}
    said_of = {name: np.array([values[i][t] for i, t in places]) for name, values in read.items()}
    if reader:
        scores = score(reader)[:, half:]
        said_of |= {f"rm_{k}": scores[:, :k].mean(1) for k in (1, 4, half)}
        said_of |= {"gold_1": gold[:, half]}  # what one continuation tells when its reward is exact
    first = np.array([t == 1 for _, t in places])
    spans = {"all": first | ~first, "first": first, "later": ~first}
    found = {name: {span: correlation(x[at], truth[at]) for span, at in spans.items()} for name, x in said_of.items()}
    noise = {span: noise_share(gold[at, :half]) for span, at in spans.items()}
    return {"correlation": found, "noise": noise, "gold": float(gold.mean()), "places": len(places)}


def noise_share(draws) -> float | None:
    """Of the variance of the means of draws (places, k): what the draws' own noise makes of it. Values known exactly would
    correlate sqrt(1 - share) with these means."""
    spread = float(draws.mean(1).var(ddof=1))
    return float(draws.var(1, ddof=1).mean()) / draws.shape[1] / spread if spread else None


def teachers(bench) -> dict:
    """`continued` for the SFT policy, and what the reward model makes of its continuations."""
    return continued(bench, bench.reference, 1, bench.rewards["proxy"])


def moved(bench) -> list[dict]:
    """`continued` for each snapshot of DVPO, and its KL to the SFT policy."""
    found = []
    for folder in sorted((bench.folder / "dvpo" / "snapshots").glob("step_*[0-9]"), key=lambda p: int(p.name[5:])):
        policy = calibration.Model(str(folder), bench.tokenizer, bench.args, bench.reference.device)
        rows = drawn(bench, policy, DRAWN, 5)
        asked, responses = [row[1] for row in rows], [row[2] for row in rows]
        ratio = policy.log_probs(asked, responses) - bench.reference.log_probs(asked, responses)
        one = continued(bench, policy, 3) | {"step": int(folder.name[5:]), "kl": float(ratio.double().sum(1).mean())}
        found.append(one)
    return found


def positions(bench) -> dict:
    """Predictor -> mean squared error at each token position (from the first token) on texts of the training policies."""
    texts = demo.value_texts(toy.TRAIN_POLICIES, bench.seed)
    ended = [text.split() + [toy.EOS] for _, _, text, *_ in texts]
    exact = [toy.exact_values(row[0], row[1], words)[1:] for row, words in zip(texts, ended, strict=True)]
    pairs = trained_pairs(bench)
    cases = lambda which: [(row[1], row[2], row[which][:pairs] if which else []) for row in texts]
    read = lambda name, which: bench.values(bench.folder / name, cases(which))
    said = {"right_tau": read("gvm", 3), "other_tau": read("gvm", 4), "no_tau_shown": read("gvm", 0)}
    if (bench.folder / "gvm_no_tau" / "final").is_dir():
        said["trained_without"] = read("gvm_no_tau", 0)
    for name, k in (("bayes_tau", pairs), ("bayes_no_tau", 0)):
        said[name] = [toy.bayes_values(row[1], words, row[3][:k])[1:] for row, words in zip(texts, ended, strict=True)]
    width = max(t for t in range(1, max(map(len, exact))) if sum(len(x) > t for x in exact) >= 60)
    at = lambda values, t: np.array([x[t] for x in values if len(x) > t])
    found = {name: [float(np.mean((at(x, t) - at(exact, t)) ** 2)) for t in range(width)] for name, x in said.items()}
    return found | {"variance": [float(at(exact, t).var()) for t in range(width)]}


def pairs(bench) -> dict:
    """Whose texts -> predictor -> number of pairs shown -> fit to the exact values; four are more than the GVM was trained with."""
    kinds = {"train": toy.TRAIN_POLICIES, "held_out": toy.HELD_OUT_POLICIES, "crowd": ("crowd",)}
    found = {}
    for kind, policies in kinds.items():
        # measure.value_model's texts
        texts = [x for x in demo.value_texts(sorted({*policies, "grouch"}), bench.seed) if x[0] in policies]
        ended = [text.split() + [toy.EOS] for _, _, text, *_ in texts]
        exact = [toy.exact_values(row[0], row[1], words)[1:] for row, words in zip(texts, ended, strict=True)]
        said = {
            "gvm": lambda k, texts=texts: bench.values(bench.folder / "gvm", [(x[1], x[2], x[3][:k]) for x in texts]),
            "bayes": lambda k, texts=texts, ended=ended: [
                toy.bayes_values(x[1], words, x[3][:k])[1:] for x, words in zip(texts, ended, strict=True)
            ],
        }
        fit = lambda values, exact=exact: demo.fit(list(zip(values, exact, strict=True)))
        found[kind] = {name: {k: fit(values(k)) for k in page.PAIRS} for name, values in said.items()}
    return found


def targets(bench, known: dict) -> dict:
    """GVM -> slope and offset of the line of exact values on its own (1 and 0: calibrated), over all tokens of the training
    policies' texts, and the correlation at the last."""
    texts = demo.value_texts(toy.TRAIN_POLICIES, bench.seed)
    exact = [toy.exact_values(row[0], row[1], row[2].split() + [toy.EOS])[1:] for row in texts]
    found = dict(known)
    for name in page.TARGETS:
        if name not in found and (bench.folder / name / "final").is_dir():
            values = bench.values(bench.folder / name, [(row[1], row[2], []) for row in texts])
            slope, offset = np.polyfit(np.concatenate(values), np.concatenate(exact), 1)
            last = correlation(*(np.array([x[-1] for x in some]) for some in (values, exact)))
            found[name] = {"slope": float(slope), "offset": float(offset), "last": last}
    return found


def tokens(bench) -> list[dict]:
    """The report's picture of token values: pairs of responses that part at one word, by rule on the first held-out prompt."""
    listed = lambda x: x.tolist() if isinstance(x, (np.ndarray, np.generic)) else x
    pairs = report.token_pairs(bench.folder / "gvm" / "final", bench.tokenizer)
    kept = [{key: listed(pair[key]) for key in ("title", "prompt", "span", "decisive")} for pair in pairs]
    for one, pair in zip(kept, pairs, strict=True):
        one["lines"] = [{key: listed(value) for key, value in line.items()} for line in pair["lines"]]
    return kept


def weights(bench, rows) -> tuple[dict, torch.Tensor]:
    """(advantage -> (B, T), mask (B, T)): all of dvpo.py's forms on the GVM's values, the exact ones, and rewards without any value."""
    width = max(len(row[2]) for row in rows)
    mask = torch.arange(width) < torch.tensor([len(row[2]) for row in rows])[:, None]
    filled = lambda values: torch.tensor(np.stack([np.pad(v, (0, width + 1 - len(v))) for v in values])).float()
    read = {"gvm": filled(gvm_values(bench, rows, trained_pairs(bench)))}
    names = [bench.tokenizer.convert_ids_to_tokens(row[2]) for row in rows]
    read["exact"] = filled([toy.exact_values("crowd", row[0], name) for row, name in zip(rows, names, strict=True)])
    forms = {
        "q": {"advantage": "q"}, "q_position": {"advantage": "q", "baseline": "position"},
        "q_start": {"advantage": "q", "baseline": "start"}, "q_minus_v": {"advantage": "gae", "lam": 0.0},
        "gae": {"advantage": "gae"}, "lam_1": {"advantage": "gae", "lam": 1.0},
    }  # fmt: skip
    found = {
        f"{name}_{form}": dvpo.advantages(values, torch.zeros(mask.shape), mask, **settings)
        for name, values in read.items() for form, settings in forms.items()
    }  # fmt: skip
    said = [text_of(bench, row[2]) for row in rows]
    for name, reward in bench.rewards.items():
        score = torch.tensor(reward([row[0] for row in rows], *map(list, zip(*said, strict=True)))).float()
        whole = (score - score.mean())[:, None] * mask  # the mean reward as baseline, every token alike
        found[f"reward_{'rm' if name == 'proxy' else name}"] = dvpo.normalize_values(whole, mask)
    return found, mask


def gradient(bench) -> dict:
    """advantage -> {noise: tr Cov of a batch's gradient / squared length of its expectation, cosine: of the expectation with that of
    exact Q - V}. Both from products of different batches, so that noise has no part in either; an estimated cosine may pass 1."""
    rows = drawn(bench, bench.reference, BATCH * BATCHES, 11)
    form, mask = weights(bench, rows)
    module = bench.reference.writer.module
    parameters = list(module.parameters())
    for p in parameters:
        p.requires_grad_(True)
    sums, squares, crossed = {}, dict.fromkeys(form, 0.0), dict.fromkeys(form, 0.0)
    for at in range(0, len(rows), BATCH):
        some = [(row[1], row[2]) for row in rows[at : at + BATCH]]
        logp = module(sft.collate(some, bench.tokenizer.pad_token_id, bench.reference.device))
        width, flat = logp.shape[1], {}
        for name, weight in form.items():
            loss = -(logp * weight[at : at + BATCH, :width]).sum() / mask[at : at + BATCH].sum()
            found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
            flat[name] = torch.cat([g.flatten() for g in found if g is not None]).double()
        for name, one in flat.items():
            sums[name] = sums.get(name, 0) + one
            squares[name] += float(one @ one)
            crossed[name] += float(one @ flat[BEST])
    for p in parameters:
        p.requires_grad_(False)
    return directions(sums, squares, crossed, BATCHES)


BEST = "exact_q_minus_v"


def directions(sums, squares, crossed, k: int) -> dict:
    """From k batches: sums of gradients, of their squared lengths, of their products with BEST's of the same batch."""
    apart = lambda name, other, same: (
        (float(sums[name] @ sums[other]) - same) / (k * (k - 1))
    )  # mean product of two batches
    signal = {name: apart(name, name, squares[name]) for name in sums}
    cosine = lambda name: apart(name, BEST, crossed[name]) / (signal[name] * signal[BEST]) ** 0.5
    return {
        name: {
            "noise": (squares[name] / k - x) / x if x > 0 else None,
            "cosine": cosine(name) if x > 0 and signal[BEST] > 0 else None,
        }
        for name, x in signal.items()
    }


def implicit(bench) -> dict:
    """Policy -> what its log-ratios to the SFT policy agree with, over pairs of the SFT policy's texts to a prompt."""
    n = demo.SAMPLES
    _, base = calibration.measure(bench.reference, bench.reference, bench.prompts, bench.ids, n, 17, bench.rewards)
    responses = bench.reference.answers(bench.prompts, bench.ids, n, 17, 256)
    repeated = [i for i in bench.ids for _ in range(n)]
    length = np.reshape([len(r) for r in responses], (-1, n)).astype(float)
    gold, proxy = base["reward"]["gold"], base["reward"]["proxy"]
    agrees = lambda x, y: None if (wrong := calibration.misalignment_rate(x, y)) is None else 1 - wrong
    within = lambda x, y: correlation(x - x.mean(1, keepdims=True), y - y.mean(1, keepdims=True))
    told = lambda x: {
        "gold": agrees(x, gold),
        "proxy": agrees(x, proxy),
        "length": within(x, length),
        "gold_linear": within(x, gold),
    }
    found = {"rm": told(proxy)}
    reference = bench.reference.log_probs(repeated, responses)
    for name in ("dpo", "ipo", "vcb", "dpo_length_penalty", "dvpo", "ppo"):
        if (bench.folder / name / "final").is_dir():
            policy = calibration.Model(
                str(bench.folder / name / "final"), bench.tokenizer, bench.args, bench.reference.device
            )
            ratio = policy.log_probs(repeated, responses) - reference
            found[name] = told(ratio.double().sum(1).view(-1, n).numpy())
    return found


def main():
    folder = Path(sys.argv[1])
    kept = folder / "probes.json"
    found = json.loads(kept.read_text()) if kept.is_file() else {}
    asked = {
        "teachers": teachers,
        "moved": moved,
        "gradient": gradient,
        "implicit": implicit,
        "positions": positions,
        "pairs": pairs,
        "tokens": tokens,
    }
    missing = [name for name in asked if name not in found]
    later = {name for name in page.TARGETS if (folder / name / "final").is_dir()} - found.get("targets", {}).keys()
    if not missing and not later:
        return
    bench = measure.Bench(folder, json.loads((folder / "sft" / "args.json").read_text())["seed"])
    found |= {name: asked[name](bench) for name in missing}
    found["targets"] = targets(bench, found.get("targets", {}))
    kept.write_text(json.dumps(measure.rounded(found)) + "\n")


if __name__ == "__main__":
    main()
