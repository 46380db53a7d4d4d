"""reinforce.py: each baseline's advantages against loops and by hand, the k3 term, the two means, half-greedy decoding."""

import itertools
import math
import random
import statistics
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import reinforce

BASELINES = ("remax", "rloo", "grpo", "reinforce++")


def ragged(seed, rows=8, width=7):
    """Lengths 1 and `width` among others, mask (B, T), a source of noise that does not stop where a row does."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [1, width] + [rng.randint(1, width) for _ in range(rows - 2)]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return lengths, mask, lambda columns=width: torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def naive(reward, kl, lengths, baseline, n, greedy, beta):
    """Straight from the docstring, one response after the other."""
    to_go = [[beta * sum(k[t:T]) for t in range(T)] for k, T in zip(kl, lengths, strict=True)]
    rows = []
    for i, T in enumerate(lengths):
        group = range(i - i % n, i - i % n + n)
        if baseline == "remax":
            rows.append([reward[i] - greedy[i] - to_go[i][t] for t in range(T)])
        elif baseline == "reinforce++":
            rows.append([reward[i] - to_go[i][t] for t in range(T)])
        elif baseline == "rloo":
            whole = [reward[j] - to_go[j][0] for j in group]
            own = whole[i % n]
            rows.append([own - (sum(whole) - own) / (n - 1)] * T)
        else:
            rewards = [reward[j] for j in group]
            rows.append([(reward[i] - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)] * T)
    if baseline == "reinforce++":
        cells = [x for row in rows for x in row]
        mean, sigma = statistics.mean(cells), statistics.pstdev(cells)
        rows = [[(x - mean) / (sigma + 1e-5) for x in row] for row in rows]
    return rows


@pytest.mark.parametrize(("baseline", "n", "beta"), itertools.product(BASELINES, (2, 4), (0.0, 0.3)))
def test_advantages_equal_a_loop_and_are_0_where_masked(baseline, n, beta):
    lengths, mask, noise = ragged(0)
    reward, greedy, kl = noise(1)[:, 0], noise(1)[:, 0], noise()
    found = reinforce.reward_advantages(reward, kl, mask, baseline=baseline, n=n, greedy=greedy, kl_coef=beta)
    expected = naive(reward.tolist(), kl.tolist(), lengths, baseline, n, greedy.tolist(), beta)
    for row, other, length in zip(found.tolist(), expected, lengths, strict=True):
        assert row[:length] == pytest.approx(other, rel=1e-8, abs=1e-9) and not any(row[length:])
    other_kl = torch.where(mask, kl, 1e6)
    again = reinforce.reward_advantages(reward, other_kl, mask, baseline=baseline, n=n, greedy=greedy, kl_coef=beta)
    assert torch.equal(found, again)


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        # rewards 1, 3, greedy 2, 2; KL 0.2, 0.4 and -0.6; beta 0.5: to go 0.3, 0.2 and -0.3
        ("remax", [-1.3, -1.2, 1.3]),
        # R = 1 - 0.3, 3 + 0.3: 0.7 - 3.3 and back
        ("rloo", [-2.6, -2.6, 2.6]),
        # mean 2, standard deviation (ddof 1) sqrt(2)
        ("grpo", [-0.70706, -0.70706, 0.70706]),
        # 0.7, 0.8, 3.3: mean 1.6, sigma sqrt((0.81 + 0.64 + 2.89) / 3) = 1.202775
        ("reinforce++", [-0.748263, -0.665123, 1.413386]),
    ],
)
def test_advantages_by_hand(baseline, expected):
    mask = torch.tensor([[True, True], [True, False]])
    reward, greedy = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])
    kl = torch.tensor([[0.2, 0.4], [-0.6, 55.0]])
    found = reinforce.reward_advantages(reward, kl, mask, baseline=baseline, n=2, greedy=greedy, kl_coef=0.5)
    assert found[mask].tolist() == pytest.approx(expected, abs=1e-4) and found[1, 1] == 0


@pytest.mark.parametrize("baseline", ["rloo", "grpo"])
def test_responses_of_equal_reward_teach_nothing_and_a_constant_reward_changes_nothing(baseline):
    lengths, mask, noise = ragged(1)
    reward, kl = noise(1)[:, 0], torch.zeros(8, 7, dtype=torch.float64)
    advantage = lambda r: reinforce.reward_advantages(r, kl, mask, baseline=baseline, n=4)
    assert torch.allclose(advantage(reward), advantage(reward + 100), atol=1e-9)
    assert not advantage(torch.full_like(reward, 0.7)).abs().gt(1e-12).any()
    assert lengths[0] == 1


def test_leave_one_out_is_the_reward_minus_the_mean_of_the_group_but_for_a_factor():
    reward = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = reward.view(3, 4).mean(1).repeat_interleave(4)
    assert torch.allclose(reinforce.leave_one_out(reward, 4), (reward - mean) * 4 / 3)


@pytest.mark.parametrize("loss_mean", ["token", "response"])
def test_the_two_means_equal_loops(loss_mean):
    """As train() puts them together: a weight per token, and what the loss is divided by."""
    lengths, mask, noise = ragged(2)
    logp, old, ref, advantage = noise() * 0.5, noise() * 0.5, noise() * 0.5, noise()
    size = torch.tensor(lengths)[:, None]
    weight, of = (mask / size, 8) if loss_mean == "response" else (mask.double(), sum(lengths))
    loss, _ = reinforce.dvpo_loss(logp, old, advantage * weight, mask, of)
    k3 = reinforce.k3_loss(logp, ref, weight, of)
    terms, penalties = [], []
    for i, T in enumerate(lengths):
        ratio = [math.exp(float(logp[i, t] - old[i, t])) for t in range(T)]
        a = advantage[i].tolist()
        terms.append([-min(ratio[t] * a[t], min(max(ratio[t], 0.8), 1.2) * a[t]) for t in range(T)])
        d = [float(logp[i, t] - ref[i, t]) for t in range(T)]
        penalties.append([math.exp(-x) - 1 + x for x in d])
    for found, rows in ((loss, terms), (k3, penalties)):
        if loss_mean == "response":
            expected = statistics.mean(statistics.mean(row) for row in rows)
        else:
            expected = statistics.mean(x for row in rows for x in row)
        assert float(found) == pytest.approx(expected)


def test_k3_is_never_negative_and_on_policy_the_kl_with_the_gradient_of_the_reverse_one():
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    p, one = logp.detach().exp(), torch.ones(1, 1, dtype=torch.float64)
    k3 = [reinforce.k3_loss(logp[a].view(1, 1), ref[a].view(1, 1), one, 1) for a in range(6)]
    assert min(k3) >= 0
    mean = sum(p[a] * k3[a] for a in range(6))
    assert torch.allclose(mean, (p * (logp - ref)).sum())
    (expected,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), logits, retain_graph=True)
    assert torch.allclose(torch.autograd.grad(mean, logits)[0], expected)
