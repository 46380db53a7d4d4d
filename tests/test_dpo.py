"""dpo.py: every loss against loops in float64 and by hand, TRL's numbers, pairs, and what each method's optimum is.

`python -m torch.distributed.run ... tests/test_dpo.py HOME FOLDER` is the helper process of the test with two ranks.
"""

import decimal
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import test_invariants as tiny
from test_invariants import distance, metrics, run

import dpo
import sft
import toy
from kernels import vcb_loss

home = tiny.home  # a fixture: a tiny policy and graded rows, some of two and some of three responses

CHOSEN, REJECTED = torch.tensor([-10.5, -22.25, -7.0]), torch.tensor([-12.0, -20.0, -30.5])
REF_CHOSEN, REF_REJECTED = torch.tensor([-11.0, -21.0, -9.5]), torch.tensor([-11.5, -20.5, -28.0])
LENGTHS = {"chosen_length": torch.tensor([5.0, 9, 3]), "rejected_length": torch.tensor([6.0, 8, 12])}


def loss(name, gamma, **options):
    return dpo.preference_loss(CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED, loss=name, gamma=gamma, **LENGTHS | options)


# Recorded from trl 1.16.0, DPOTrainer, loss_type "sigmoid" and "ipo" (which divides by lengths), on the numbers above.
TRL = {
    ("dpo", 0.1): [0.6443967, 0.7844704, 0.474077],
    ("dpo", 0.3): [0.5543552, 0.9897118, 0.2014133],
    ("ipo", 0.1): [23.2002773, 27.0544453, 15.6684036],
    ("ipo", 0.3): [2.2002778, 3.4896317, 0.390625],
}


@pytest.mark.parametrize("name, gamma", TRL)
def test_trl_gives_the_same(name, gamma):
    found = loss(name, gamma, length_normalize=name == "ipo")
    torch.testing.assert_close(found, torch.tensor(TRL[name, gamma]), rtol=1e-6, atol=0)


def naive(name, gamma, i, *, margin=1.0, nll_coef=1.0, length_normalize=False, length_penalty=0.0):
    pc, pr, rc, rr = (float(x[i]) for x in (CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED))
    lc, lr = (float(x[i]) for x in LENGTHS.values())
    w, l = (pc, pr) if name == "slic" else (pc - rc, pr - rr)
    if length_normalize:
        w, l = w / lc, l / lr
    if name == "dpo":
        return math.log(1 + math.exp(-(gamma * (w - l) + length_penalty * (lc - lr))))
    if name == "ipo":
        return (w - l - 1 / (2 * gamma)) ** 2
    return max(0.0, margin - gamma * w + gamma * l) + nll_coef * -pc / lc


@pytest.mark.parametrize("options", [{}, {"length_normalize": True}])
@pytest.mark.parametrize("gamma", [0.05, 0.7])
@pytest.mark.parametrize("name", ["dpo", "ipo", "slic"])
def test_pair_losses_equal_loops(name, gamma, options):
    extra = {"margin": 3.0, "nll_coef": 0.3} if name == "slic" else {"length_penalty": 0.04} if name == "dpo" else {}
    want = [naive(name, gamma, i, **options, **extra) for i in range(3)]
    torch.testing.assert_close(loss(name, gamma, **options, **extra), torch.tensor(want), rtol=2e-6, atol=0)


def test_pair_losses_by_hand():
    """A pair with Delta = 2 nats: log-ratios 1 and -1."""
    pair = [torch.tensor([x]) for x in (-4.0, -9.0, -5.0, -8.0)]
    length = {"chosen_length": torch.tensor([4.0]), "rejected_length": torch.tensor([3.0])}
    assert dpo.preference_loss(*pair, loss="dpo", gamma=0.5).item() == pytest.approx(math.log(1 + math.exp(-1)))
    assert dpo.preference_loss(*pair, loss="ipo", gamma=0.25).item() == 0  # 2 is its target 1 / (2 gamma)
    # 10 - 0.5 (-4 + 9) = 7.5, and one nat per token of the chosen response
    assert dpo.preference_loss(*pair, loss="slic", gamma=0.5, margin=10.0, **length).item() == pytest.approx(8.5)
    # one token longer: the margin is raised, so that there is less to learn from a pair that length may have decided
    assert dpo.preference_loss(*pair, loss="dpo", gamma=0.5, length_penalty=0.2, **length).item() == pytest.approx(
        math.log(1 + math.exp(-1.2))
    )


@pytest.mark.parametrize("name, options", [
    ("dpo", {"label_smoothing": 0.1}), ("dpo", {"label_smoothing": 0.4, "length_penalty": 0.04}),
    ("simpo", {"simpo_margin": 0.0, "length_normalize": True}), ("simpo", {"simpo_margin": 1.3, "length_normalize": True}),
    ("simpo", {"simpo_margin": 1.3}), ("orpo", {"orpo_lambda": 0.1, "length_normalize": True}),
    ("orpo", {"orpo_lambda": 2.5, "length_normalize": True}), ("orpo", {"orpo_lambda": 2.5}),
])  # fmt: skip
@pytest.mark.parametrize("gamma", [0.3, 2.5])
def test_later_pair_losses_equal_loops(name, options, gamma):
    """In probabilities and odds, not in logarithms of them."""
    gen = torch.Generator().manual_seed(0)
    chosen, rejected, ref_chosen, ref_rejected = -9 * torch.rand(4, 40, generator=gen, dtype=torch.float64)
    lengths = torch.randint(1, 9, (2, 40), generator=gen).double()
    found = dpo.preference_loss(chosen, rejected, ref_chosen, ref_rejected, loss=name, gamma=gamma,
                                chosen_length=lengths[0], rejected_length=lengths[1], **options)  # fmt: skip
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    want = []
    for pc, pr, rc, rr, lc, lr in zip(*(x.tolist() for x in (chosen, rejected, ref_chosen, ref_rejected, *lengths))):
        w, l = (pc / lc, pr / lr) if options.get("length_normalize") else (pc, pr)
        if name == "dpo":
            e, longer = options["label_smoothing"], options.get("length_penalty", 0.0) * (lc - lr)
            z = gamma * ((pc - rc) - (pr - rr)) + longer
            want.append(-(1 - e) * math.log(sigmoid(z)) - e * math.log(sigmoid(-z)))
        elif name == "simpo":
            want.append(-math.log(sigmoid(gamma * w - gamma * l - options["simpo_margin"])))
        else:
            odds = [math.exp(x) / (1 - math.exp(x)) for x in (w, l)]
            ratio = odds[0] / odds[1]
            want.append(-pc / lc - options["orpo_lambda"] * math.log(ratio / (1 + ratio)))
    torch.testing.assert_close(found, torch.tensor(want, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_without_label_smoothing_nothing_changes():
    """To the bit, its gradient too."""
    found = []
    for options in ({}, {"label_smoothing": 0.0}):
        policy = CHOSEN.clone().requires_grad_()
        value = dpo.preference_loss(policy, REJECTED, REF_CHOSEN, REF_REJECTED, loss="dpo", gamma=0.3, **options)
        value.sum().backward()
        plain = -torch.nn.functional.logsigmoid(0.3 * ((CHOSEN - REF_CHOSEN) - (REJECTED - REF_REJECTED)))
        assert torch.equal(value, plain)
        found.append(policy.grad)
    assert torch.equal(*found)


def test_orpo_and_simpo_by_hand():
    chosen, rejected, two, four = (torch.tensor([x]) for x in (2 * math.log(0.8), 4 * math.log(0.2), 2.0, 4.0))
    lengths = {"chosen_length": two, "rejected_length": four, "length_normalize": True}
    # odds 4 and 1/4: sigmoid(log 16) = 16 / 17
    found = dpo.preference_loss(chosen, rejected, None, None, loss="orpo", gamma=9.0, orpo_lambda=3.0, **lengths)
    assert found.item() == pytest.approx(-math.log(0.8) + 3 * math.log(17 / 16), rel=1e-5)
    # 0.8 is 4 times 0.2; squared 16, less the margin log 2
    found = dpo.preference_loss(
        chosen, rejected, None, None, loss="simpo", gamma=2.0, simpo_margin=math.log(2), **lengths
    )
    assert found.item() == pytest.approx(math.log(9 / 8), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_near_certainty_and_far_from_it(dtype):
    logp = torch.tensor([-1e-6, -1e-3, -0.5, -math.log(2), -1, -20, -100, -1e4], dtype=dtype, requires_grad=True)
    found = dpo.log_odds(logp)
    found.sum().backward()
    with decimal.localcontext(prec=60):
        exact = [decimal.Decimal(x) for x in logp.tolist()]
        odds = torch.tensor([float(x - (1 - x.exp()).ln()) for x in exact], dtype=dtype)
        slope = torch.tensor([float(1 / (1 - x.exp())) for x in exact], dtype=dtype)
    precision = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(found, odds, rtol=precision, atol=precision)
    torch.testing.assert_close(logp.grad, slope, rtol=precision, atol=precision)
    certain = torch.tensor([0.0, -1e-30], dtype=dtype, requires_grad=True)
    dpo.log_odds(certain).sum().backward()
    assert dpo.log_odds(certain).isfinite().all() and (dpo.log_odds(certain) > 15).all() and (certain.grad == 0).all()


def test_kto_equals_a_loop():
    gen = torch.Generator().manual_seed(0)
    ratio = 6 * torch.randn(6, 5, generator=gen, dtype=torch.float64)
    side = torch.randint(-1, 2, (6, 5), generator=gen).double()
    for z0, gamma in ((0.0, 0.1), (1.7, 0.8)):
        found = dpo.kto_loss(ratio, side, z0, gamma=gamma, desirable_weight=1.3, undesirable_weight=0.6)
        for r, s, x in zip(ratio.flatten().tolist(), side.flatten().tolist(), found.flatten().tolist(), strict=True):
            weight = {1: 1.3, -1: 0.6, 0: 0.0}[s]
            value = weight / (1 + math.exp(-gamma * (r - z0) if s > 0 else -gamma * (z0 - r)))
            assert x == pytest.approx(weight - value, rel=1e-10, abs=1e-14)
    # at the reference point a response is worth half its weight; far on its right side it costs nothing
    found = dpo.kto_loss(torch.tensor([2.0, 60.0, 60.0]), torch.tensor([1, 1, -1]), 2.0, gamma=1.0)
    assert found.tolist() == pytest.approx([0.5, 0, 1], abs=1e-12)


def test_kto_reference_point():
    logps, refs, lengths = [-3.0, -8.0, -1.0], [-5.0, -7.0, -4.5], [2, 4, 7]
    assert dpo.reference_point(logps, refs, [1, 1, 1]) == pytest.approx((2 - 1 + 3.5) / 3)
    assert dpo.reference_point(logps, refs, lengths) == pytest.approx((2 / 2 - 1 / 4 + 3.5 / 7) / 3)
    assert dpo.reference_point(refs, logps, [1, 1, 1]) == 0


def test_kto_sides():
    assert dpo.desirability([1.0, -1.0]) == [1, -1]  # chosen, rejected
    assert dpo.desirability([0.1, 0.2, 0.3]) == [-1, 0, 1]
    assert dpo.desirability([5.0, 5.0, 5.0, 1.0]) == [1, 1, 1, -1]


def test_kto_never_shows_a_response_its_own_prompt():
    """And each that has a side just once, whatever the batch: a prompt that comes twice in it, or is all there is."""
    group = lambda prompt, n: dpo.Group([([prompt], [prompt, k]) for k in range(n)], [float(k) for k in range(n)])
    data = [group(prompt, n) for prompt, n in ((1, 2), (2, 3), (2, 4), (3, 2), (4, 5))]
    for batch in (data, data[:3], data[1:3], data[:1], data[3:]):
        rows = dpo.mismatched(batch, data)
        assert all(prompt != [response[0]] for prompt, response in rows)
        kept = [row[1] for q in batch for row, r in zip(q.rows, q.rewards) if r != sum(q.rewards) / len(q.rewards)]
        assert [response for _, response in rows] == kept
    assert [prompt for prompt, _ in dpo.mismatched(data[:2], data)] == [
        [2],
        [2],
        [1],
        [1],
    ]  # of the batch, where it has one
    assert [prompt for prompt, _ in dpo.mismatched(data[1:3], data)] == [[1]] * 6


def naive_rrhf(logp, length, reward, keep, normalize, coef):
    out = []
    for b in range(len(logp)):
        idx = [i for i in range(logp.shape[1]) if keep[b, i]]
        if not idx:
            out.append(0.0)
            continue
        p = {i: float(logp[b, i]) / (float(length[b, i]) if normalize else 1) for i in idx}
        rank = sum(max(0.0, p[j] - p[i]) for i in idx for j in idx if reward[b, i] > reward[b, j])
        best = max(idx, key=lambda i: (float(reward[b, i]), -i))
        out.append(rank - coef * float(logp[b, best]) / float(length[b, best]))
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("normalize", [True, False])
def test_rrhf_equals_a_loop(normalize):
    gen = torch.Generator().manual_seed(0)
    logp = -20 * torch.rand(6, 5, generator=gen, dtype=torch.float64)
    length = torch.randint(1, 9, (6, 5), generator=gen).double()
    reward = torch.randint(0, 4, (6, 5), generator=gen).double()  # ties among them
    keep = torch.arange(5) < torch.arange(6)[:, None]
    found = dpo.rrhf_loss(logp, length, reward, keep, length_normalize=normalize, nll_coef=0.7)
    torch.testing.assert_close(found, naive_rrhf(logp, length, reward, keep, normalize, 0.7))
    logp[~keep] = torch.nan
    reward[~keep] = torch.nan
    again = dpo.rrhf_loss(logp, length, reward, keep, length_normalize=normalize, nll_coef=0.7)
    assert torch.equal(found, again)


def test_rrhf_by_hand():
    logp, length = torch.tensor([[-2.0, -2.0, -3.0]]), torch.tensor([[2.0, 4.0, 1.0]])  # p = -1, -0.5, -3
    reward = torch.tensor([[1.0, 0.0, 0.5]])
    # pairs (0, 1): 0.5; (0, 2): 0; (2, 1): 2.5; NLL of response 0 per token: 1
    assert dpo.rrhf_loss(logp, length, reward).item() == pytest.approx(4.0)


def test_pairs():
    rewards = [0.1, 0.9, 0.1, 0.5]
    assert dpo.select_pairs(rewards, "best_worst") == [(1, 2)] or dpo.select_pairs(rewards, "best_worst") == [(1, 0)]
    assert dpo.select_pairs(rewards, "adjacent") == [(1, 3), (3, 0)]  # 0 and 2 are equal: no pair
    assert sorted(dpo.select_pairs(rewards, "all")) == [(1, 0), (1, 2), (1, 3), (3, 0), (3, 2)]
    for selection in ("best_worst", "adjacent", "all"):
        assert dpo.select_pairs([2.0, 2.0], selection) == [] == dpo.select_pairs([2.0], selection)


def test_ranked_right():
    assert dpo.ranked_right([[3.0, 1.0, 2.0]], [[0.5, 0.1, 0.9]]) == (2, 3)
    assert dpo.ranked_right([[1.0, 1.0]], [[0.0, 1.0]]) == (0, 1)  # a tie is not right


# ------------------------------------------------------------------------------- Theorem 1 and Table 1 of the VCB paper
# A world of five responses to one prompt: the policy is a table, the data are all its pairs, so what a loss leads to is
# seen without sampling. Theorem 1's optimum of E[r] + H is pi ∝ exp(r / alpha - beta).
REFERENCE = torch.tensor([0.40, 0.25, 0.20, 0.10, 0.05], dtype=torch.float64).log()
REWARD = torch.tensor([0.1, 0.85, 0.9, -0.4, 0.5], dtype=torch.float64)
GAMMA = 0.5


def minimiser(objective, steps=4000):
    """log pi (5,) at the minimum of objective(log pi), by L-BFGS from the reference."""
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=steps, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        value = objective(logits.log_softmax(0))
        value.backward()
        return value

    optimizer.step(closure)
    return logits.detach().log_softmax(0)


def normalised(x):
    return x.log_softmax(0)


def pair_index():
    return torch.tensor([(i, j) for i, j in itertools.permutations(range(5), 2) if REWARD[i] > REWARD[j]]).unbind(1)


def test_theorem_1():
    """The optimum of E[r] + E[-alpha log pi + beta] is exp((r + beta) / alpha) / Z. The paper's eq. 5 has - beta for
    psi = -alpha (log pi + beta), the bracket that its proof and Table 1 use."""
    alpha, beta = 0.7, torch.tensor([0.3, -0.2, 0.1, 0.0, 0.6], dtype=torch.float64)
    value = lambda logp: -(logp.exp() * (REWARD - alpha * (logp + beta))).sum()
    torch.testing.assert_close(minimiser(value), normalised(REWARD / alpha - beta), rtol=0, atol=1e-5)


def test_vcb_reaches_its_stated_optimum():
    """pi_sft exp(r / (gamma sigma)) / Z: all s are equal there, the loss is at its floor, and descent gets there."""
    want = normalised(REFERENCE + REWARD / (GAMMA * REWARD.std(correction=0)))
    ref, reward = REFERENCE[None], REWARD[None]
    value = lambda logp, pairs="upper": vcb_loss(logp[None], ref, reward, gamma=GAMMA, pairs=pairs)[0]
    for pairs, floor in (("upper", math.log(15)), ("mean", 0.0)):
        assert value(want, pairs).item() == pytest.approx(floor, abs=1e-9)
        torch.testing.assert_close(minimiser(lambda p, pairs=pairs: value(p, pairs)), want, rtol=0, atol=1e-4)


def test_dpo_reaches_its_stated_optimum_only_with_the_preferences_of_bradley_terry():
    """With labels drawn by sigmoid(r_i - r_j), DPO's minimiser is pi_sft exp(r / gamma) / Z, Table 1's. With pairs ranked
    by reward, as VCB's comparison makes them, it has none: scaling all gaps lowers the loss for ever."""
    i, j = torch.tensor(list(itertools.permutations(range(5), 2))).unbind(1)

    def drawn(logp):
        losses = dpo.preference_loss(logp[i], logp[j], REFERENCE[i], REFERENCE[j], loss="dpo", gamma=GAMMA)
        return (torch.sigmoid(REWARD[i] - REWARD[j]) * losses).sum()

    torch.testing.assert_close(minimiser(drawn), normalised(REFERENCE + REWARD / GAMMA), rtol=0, atol=1e-4)
    i, j = pair_index()
    ranked = lambda logp: dpo.preference_loss(
        logp[i], logp[j], REFERENCE[i], REFERENCE[j], loss="dpo", gamma=GAMMA
    ).mean()
    values = [ranked(normalised(REFERENCE + k * REWARD / GAMMA)).item() for k in (1, 3, 10, 100)]
    assert values == sorted(values, reverse=True) and values[-1] < 0.1 * values[0]


def test_ipo_knows_the_order_alone():
    """Ranked pairs ask for the same gap 1 / (2 gamma) of every pair: a least-squares compromise, the same for any rewards
    of this order, and so not pi_sft exp(r / gamma) / Z."""
    i, j = pair_index()
    value = lambda logp: dpo.preference_loss(
        logp[i], logp[j], REFERENCE[i], REFERENCE[j], loss="ipo", gamma=GAMMA
    ).mean()
    rank = REWARD.argsort().argsort().double()
    found = minimiser(value) - REFERENCE
    # least squares of x_i - x_j = 1 / (2 gamma) over all pairs of n: neighbours in rank are 2 / n of that apart
    torch.testing.assert_close(found - found.mean(), (rank - 2) * (2 / 5) / (2 * GAMMA), rtol=0, atol=1e-4)


def test_slic_and_rrhf_do_not_reach_what_the_table_states():
    """Table 1 states exp(r / gamma) / Z (SLiC) and exp(r) / Z (RRHF). Their hinges are 0 on a whole region of policies, at
    RRHF's stated optimum among them; the cross-entropy then decides, and draws all mass to the chosen responses."""
    i, j = pair_index()
    stated = normalised(REWARD)
    hinge = dpo.rrhf_loss(stated[None], torch.ones(1, 5), REWARD[None], length_normalize=False, nll_coef=0.0)
    assert (
        hinge.item()
        == 0
        == dpo.rrhf_loss(normalised(5 * REWARD)[None], torch.ones(1, 5), REWARD[None], nll_coef=0.0).item()
    )
    whole = lambda logp: dpo.rrhf_loss(logp[None], torch.ones(1, 5), REWARD[None]).sum()
    found = minimiser(whole, steps=300)
    assert found[REWARD.argmax()].exp() > 0.95 > 2 * stated[REWARD.argmax()].exp()

    one = torch.ones(len(i))

    def slic(logp, coef=1.0):
        return dpo.preference_loss(
            logp[i], logp[j], REFERENCE[i], REFERENCE[j], loss="slic", gamma=1.0, margin=1.0, nll_coef=coef,
            chosen_length=one, rejected_length=one,
        ).mean()  # fmt: skip

    wide = normalised(10 * REWARD.argsort().argsort().double())
    assert slic(wide, 0.0) == 0 < slic(stated, 0.0)  # any gaps above the margin do, the stated optimum's are too small
    found = minimiser(slic)
    assert (found - stated).abs().max() > 0.3


# ------------------------------------------------------------------------------------- the same for the later methods
def test_label_smoothing_asks_for_a_finite_gap():
    """On ranked pairs DPO has no minimiser; with labels wrong at rate e each pair's gamma Delta is log((1 - e) / e)."""
    order = REWARD.argsort(descending=True)
    i, j = order[:-1], order[1:]  # neighbours in rank: four gaps that five log-ratios can have
    value = lambda logp: dpo.preference_loss(
        logp[i], logp[j], REFERENCE[i], REFERENCE[j], loss="dpo", gamma=GAMMA, label_smoothing=0.2
    ).mean()
    ratio = minimiser(value) - REFERENCE
    torch.testing.assert_close(ratio[i] - ratio[j], torch.full((4,), math.log(4) / GAMMA).double(), rtol=0, atol=1e-5)


def test_both_readings_of_ipo():
    """Of responses of one length T they are one loss, the mean's gamma T times the sum's; each asks for its gap."""
    i, j = pair_index()
    length = lambda t: {"chosen_length": torch.full((len(i),), t), "rejected_length": torch.full((len(i),), t)}

    def ipo(logp, gamma, normalize, i=i, j=j, **lengths):
        pairs = logp[i], logp[j], REFERENCE[i], REFERENCE[j]
        return dpo.preference_loss(*pairs, loss="ipo", gamma=gamma, length_normalize=normalize, **lengths)

    logp = normalised(2 * REWARD)
    torch.testing.assert_close(
        ipo(logp, 7 * GAMMA, True, **length(7)) * 49, ipo(logp, GAMMA, False), rtol=1e-12, atol=0
    )
    tokens, order = torch.tensor([3.0, 1, 4, 2, 5]).double(), REWARD.argsort(descending=True)
    i, j = order[:-1], order[1:]
    lengths = {"chosen_length": tokens[i], "rejected_length": tokens[j]}
    for normalize, per in ((False, torch.ones(5)), (True, tokens)):
        found = minimiser(lambda p, n=normalize: ipo(p, GAMMA, n, i, j, **lengths).mean())
        ratio = (found - REFERENCE) / per
        torch.testing.assert_close(ratio[i] - ratio[j], torch.full((4,), 1 / (2 * GAMMA)).double(), rtol=0, atol=1e-4)


def test_simpo_reaches_mean_logps_of_the_rewards():
    """With Bradley-Terry's labels and no margin, log pi / length = r / gamma + c; c makes probabilities sum to 1."""
    i, j = torch.tensor(list(itertools.permutations(range(5), 2))).unbind(1)
    tokens = torch.tensor([3.0, 1, 4, 2, 5]).double()

    def drawn(logp):
        losses = dpo.preference_loss(
            logp[i], logp[j], None, None, loss="simpo", gamma=GAMMA, simpo_margin=0.0, chosen_length=tokens[i],
            rejected_length=tokens[j], length_normalize=True,
        )  # fmt: skip
        return (torch.sigmoid(REWARD[i] - REWARD[j]) * losses).sum()

    low, high = -50.0, 50.0
    for _ in range(200):
        c = (low + high) / 2
        low, high = (low, c) if (tokens * (REWARD / GAMMA + c)).exp().sum() > 1 else (c, high)
    torch.testing.assert_close(minimiser(drawn), tokens * (REWARD / GAMMA + c), rtol=0, atol=1e-4)


@pytest.mark.parametrize("weight", [0.0, 0.1, 4.0])
def test_orpo_lies_between_imitation_and_the_odds(weight):
    """Two responses of one token, the first chosen with probability q: the log-odds ratio is 2u of u = log-odds(p), so
    that the minimum has (p - q) + 2 lambda (sigmoid(2u) - q) = 0: p = q without the odds, odds(p)^2 = odds(q) with them alone."""
    q, one = 0.8, torch.ones(2)
    i, j = torch.tensor([0, 1]), torch.tensor([1, 0])

    def value(logits):
        logp = logits[:2].log_softmax(0)
        losses = dpo.preference_loss(
            logp[i], logp[j], None, None, loss="orpo", gamma=1.0, orpo_lambda=weight, chosen_length=one,
            rejected_length=one, length_normalize=True,
        )  # fmt: skip
        return q * losses[0] + (1 - q) * losses[1]

    found = minimiser(value)[:2].log_softmax(0).exp()[0].item()
    low, high = -9.0, 9.0
    sigmoid = lambda x: 1 / (1 + math.exp(-x))
    for _ in range(200):
        u = (low + high) / 2
        low, high = (low, u) if sigmoid(u) - q + 2 * weight * (sigmoid(2 * u) - q) > 0 else (u, high)
    assert found == pytest.approx(sigmoid(u), abs=1e-6) and (weight > 0 or found == pytest.approx(q, abs=1e-6))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0)])
def test_kto_fills_up_what_most_call_desirable(weights):
    """Response i is called desirable with probability q_i. At gamma 1 and z0 0 sigmoid(log-ratio) is pi / (pi + ref), so
    that sum of a_i pi_i / (pi_i + ref_i) is to be greatest, a_i = w_D q_i - w_U (1 - q_i), each term concave where a_i is
    positive: pi_i = max(0, sqrt(a_i ref_i / mu) - ref_i) for one mu, and 0 where a_i is negative: the majority decides."""
    q = torch.tensor([0.6, 0.9, 0.8, 0.2, 0.7], dtype=torch.float64)
    names = dict(zip(("desirable_weight", "undesirable_weight"), weights, strict=True))

    def value(logp):
        ratio, one = logp - REFERENCE, torch.ones(5)
        liked, disliked = (dpo.kto_loss(ratio, side, 0.0, gamma=1.0, **names) for side in (one, -one))
        return (q * liked + (1 - q) * disliked).sum()

    gain, ref = weights[0] * q - weights[1] * (1 - q), REFERENCE.exp()
    fill = lambda mu: ((gain.clamp(min=0) * ref / mu).sqrt() - ref).clamp(min=0)
    low, high = 1e-9, 1e9
    for _ in range(300):
        mu = math.sqrt(low * high)
        low, high = (mu, high) if fill(mu).sum() > 1 else (low, mu)
    found = minimiser(value).exp()
    torch.testing.assert_close(found, fill(mu), rtol=0, atol=2e-3)
    assert (found[gain < 0] < 2e-3).all() and (gain < 0).sum() == (1 if weights[1] == 1 else 3)


# ---------------------------------------------------------------------------------------------------------------- runs
LATER = {"cdpo": {"label_smoothing": 0.1}, "simpo": {"loss": "simpo"}, "orpo": {"loss": "orpo", "orpo_lambda": 1.0},
         "kto": {"loss": "kto"}, "kto_per_token": {"loss": "kto", "length_normalize": "yes", "undesirable_weight": 2.0}}  # fmt: skip


@pytest.mark.parametrize("options", LATER.values(), ids=LATER)
def test_later_methods_learn(home, tmp_path, options):
    rows = metrics(run(home, "dpo", tmp_path / "out", **options, steps=40, batch_size=7, learning_rate=3e-3))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["accuracy"] > 0.75 and rows[-1]["pair_gap"] > 1


@pytest.fixture(scope="module")
def other(home):
    """A model that is not `base`, for a reference that is not the policy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(home / "base")
    torch.manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.1 * parameter.data.std() * torch.randn_like(parameter)
    model.save_pretrained(home / "other")
    toy.tokenizer().save_pretrained(home / "other")
    return home / "other"


@pytest.fixture(scope="module")
def sided(home):
    """The name of seven graded rows that all have an order; two have a response at their mean, which has no side."""
    rows = tiny.jsonl(home / "graded.jsonl")
    for k, row in enumerate(rows):
        scores = ((1, 2, 3), (0, 0, 1), (0.5, 0, 0.25))[k // 2] if k % 2 else ((0, 1), (1, 0))[k // 2 % 2]
        for response, score in zip(row["responses"], scores, strict=True):
            response["score"] = score
    tiny.write_jsonl(home / "sided.jsonl", rows)
    return "sided.jsonl"


def logps_of(folder, rows):
    """log pi(y|x) of each row, alone in its batch, by the stock model in float64."""
    from transformers import AutoModelForCausalLM

    model, found = AutoModelForCausalLM.from_pretrained(folder).double(), []
    for prompt, response in rows:
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logp = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(sum(logp[t, token].item() for t, token in enumerate(response)))
    return found


def test_first_step_of_kto_equals_a_loop(home, tmp_path, other, sided):
    """Prompts, sides, z0 and the mean over responses, all made anew here from the text; either model as the policy, so that z0
    lies on both sides of its clamp."""
    means = []
    for normalize, swapped in itertools.product(("no", "yes"), (False, True)):
        policy, reference = (other, home / "base") if swapped else (home / "base", other)
        settings = {"gamma": 0.3, "length_normalize": normalize, "desirable_weight": 1.2, "undesirable_weight": 0.5}
        settings |= {"policy": str(policy), "reference": str(reference), "data": sided, "micro_tokens": 100}
        out = tmp_path / f"{normalize}_{swapped}"
        first = metrics(run(home, "dpo", out, loss="kto", steps=1, batch_size=7, **settings))[0]
        tokenizer, args = sft.load_tokenizer(str(home / "base"), dpo.Args()), dpo.Args(data=str(home / sided))
        groups = dpo.load_groups(tokenizer, args, args.data, "train")
        order = list(range(len(groups)))
        random.Random("0/0").shuffle(order)
        own, strange, side = [], [], []
        for k, at in enumerate(order):
            group, neighbour = groups[at], groups[order[(k + 1) % len(order)]]
            mean = sum(group.rewards) / len(group.rewards)
            for (prompt, response), reward in zip(group.rows, group.rewards, strict=True):
                if reward != mean:
                    own.append((prompt, response))
                    strange.append((neighbour.rows[0][0], response))
                    side.append(reward > mean)
        assert len(side) == 7 * 2 + 3 - 2
        length = [len(response) if normalize == "yes" else 1 for _, response in own]
        ratios = [
            [(a - b) / n for a, b, n in zip(logps_of(policy, rows), logps_of(reference, rows), length, strict=True)]
            for rows in (own, strange)
        ]
        mean = sum(ratios[1]) / len(ratios[1])
        z0 = max(0.0, mean)
        sigmoid = lambda x: 1 / (1 + math.exp(-x))
        want = [1.2 - 1.2 * sigmoid(0.3 * (r - z0)) if s else 0.5 - 0.5 * sigmoid(0.3 * (z0 - r))
                for r, s in zip(ratios[0], side, strict=True)]  # fmt: skip
        assert first["z0"] == pytest.approx(z0, abs=1e-4)
        assert first["loss"] == pytest.approx(sum(want) / len(want), abs=2e-5)
        means.append(mean)
    assert min(means) < -0.01 and max(means) > 0.01


@pytest.mark.parametrize("options", [LATER["simpo"], LATER["orpo"]], ids=["simpo", "orpo"])
def test_losses_without_a_reference_do_not_see_it(home, tmp_path, other, options):
    one, two = (
        run(home, "dpo", tmp_path / str(k), **options, **of) for k, of in enumerate(({}, {"reference": str(other)}))
    )
    for a, b in zip(metrics(one), metrics(two), strict=True):
        assert a["loss"] == b["loss"] and a["pair_gap"] != b["pair_gap"]
    assert distance(one, two) == 0


@pytest.mark.parametrize(
    "loss, averaged", [("simpo", "yes"), ("orpo", "yes"), ("kto", "no"), ("ipo", "no"), ("dpo", "no")]
)
def test_what_is_averaged_over_tokens_by_itself(home, tmp_path, other, loss, averaged):
    common = {"loss": loss, "reference": str(other), "steps": 1}
    first = {
        x: metrics(run(home, "dpo", tmp_path / x, length_normalize=x, **common))[0]["loss"]
        for x in ("auto", "yes", "no")
    }
    assert first["auto"] == first[averaged] and first["yes"] != first["no"]


def test_gamma_of_the_loss(home, tmp_path, other):
    """simpo 2 everywhere; kto and dpo 1 in the toy world, 0.1 for other models."""
    config = json.loads((other / "config.json").read_text())
    for name, key in (("real", "toy_world"), ("toys", "")):
        (folder := tmp_path / name).mkdir()
        for path in other.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
    for loss, toys, real in (("dpo", 1.0, 0.1), ("kto", 1.0, 0.1), ("simpo", 2.0, 2.0), ("ipo", 0.1, 0.1)):
        for name, gamma in (("toys", toys), ("real", real)):
            common = {"loss": loss, "policy": str(tmp_path / name), "reference": str(home / "base"), "steps": 1}
            found = [
                metrics(run(home, "dpo", tmp_path / f"{loss}_{name}_{g}", gamma=g, **common)) for g in (0.0, gamma, 0.7)
            ]
            assert found[0][0]["loss"] == found[1][0]["loss"] != found[2][0]["loss"]


RANKS = {"loss": "kto", "data": "sided.jsonl", "policy": "other", "steps": 4, "batch_size": 3, "learning_rate": 2e-4}


def ranks_main(home, folder):
    for stage in (0, 3):
        settings = RANKS | {"reference": str(home / "base"), "zero_stage": stage, "micro_tokens": 1}
        run(home, "dpo", folder / str(stage), **settings)


def test_kto_on_two_ranks_is_that_on_one(home, tmp_path, other, sided):
    """z0 is of all ranks and micro-batches: a rank's own would differ. Of seven rows the third batch has but one prompt."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port)]
    done = subprocess.run(
        [*command, __file__, str(home), str(tmp_path)], capture_output=True, text=True, timeout=400,
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    one = run(home, "dpo", tmp_path / "one", reference=str(home / "base"), **RANKS)
    rows = metrics(one)
    assert sum(row["z0"] > 0.1 for row in rows) == 3 and len({row["z0"] for row in rows}) == 4
    for stage in (0, 3):
        tiny.same_metrics(rows, metrics(tmp_path / str(stage)))
        assert distance(one, tmp_path / str(stage)) < 2e-5


def test_kto_resumes_bit_for_bit(home, tmp_path):
    """Log-probs of the mismatched rows are kept with the others: the policy is no longer the reference."""
    settings = {"loss": "kto", "steps": 6, "batch_size": 3}
    straight = run(home, "dpo", tmp_path / "straight", save_every=2, **settings)
    tiny.interrupted(home, "dpo", tmp_path / "resumed", 4, **settings)
    resumed = run(home, "dpo", tmp_path / "resumed", save_every=2, resume=True, **settings)
    assert metrics(straight) == metrics(resumed) and distance(straight, resumed) == 0


def test_mistakes_of_the_later_methods(home, tmp_path, capsys):
    one = json.dumps({"prompt": "is the soup any good ?", "chosen": "it is .", "rejected": "no ."}) + "\n"
    (home / "one.jsonl").write_text(2 * one)
    for options, message in (
        ({"loss": "ipo", "label_smoothing": 0.1}, "--label_smoothing belongs to --loss dpo, not ipo"),
        ({"loss": "kto", "simpo_margin": 0.5}, "--simpo_margin belongs to --loss simpo, not kto"),
        ({"orpo_lambda": 0.5}, "--orpo_lambda belongs to --loss orpo, not dpo"),
        ({"loss": "simpo", "desirable_weight": 2.0}, "--desirable_weight belongs to --loss kto, not simpo"),
        ({"loss": "kto", "data": "one.jsonl"}, "responses to two prompts or more"),
    ):
        with pytest.raises(SystemExit) as ended:
            run(home, "dpo", tmp_path / "o", **options)
        shown = capsys.readouterr().err
        assert ended.value.code == 2 and message in shown and shown.count("\n") == 1 and not (tmp_path / "o").exists()
    with pytest.raises(SystemExit) as ended:
        dpo.main(["--policy", str(home / "base"), "--label_smoothing", "0.5"])
    assert ended.value.code == 2 and "from 0 to 0.499" in capsys.readouterr().err


if __name__ == "__main__":
    ranks_main(Path(sys.argv[1]), Path(sys.argv[2]))
