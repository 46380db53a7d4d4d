"""dpo.py: every loss against loops in float64 and by hand, TRL's numbers, pairs, and what each method's optimum is."""

import itertools
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dpo
from kernels import vcb_loss

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


def test_vcb_ignores_shift_and_scale_of_rewards():
    for change in (lambda r: r + 7, lambda r: 40 * r):
        values = [
            vcb_loss(normalised(REWARD)[None], REFERENCE[None], r[None], gamma=GAMMA).item()
            for r in (REWARD, change(REWARD))
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-12)


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
