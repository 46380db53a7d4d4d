"""ppo.py: rewards, GAE and both clipped losses against loops and by hand; the critic's positions; best of n; the bandit."""

import itertools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_dvpo import ragged

import dvpo
import ppo
import reinforce
import toy
from kernels import normalize_values


def close(found, expected, **tolerance):
    """Rows of unmasked cells equal lists; all cells behind them are 0."""
    for row, other in zip(found.tolist(), expected, strict=True):
        assert row[: len(other)] == pytest.approx(other, **(tolerance or {"rel": 1e-8, "abs": 1e-9}))
        assert not any(row[len(other) :])


# ------------------------------------------------------------------------------------------------------- rewards and GAE
@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_token_rewards_equal_a_loop(beta):
    lengths, mask, noise = ragged(0)
    reward, kl = noise(1)[:, 0], noise()
    found = ppo.token_rewards(reward, kl, mask, kl_coef=beta)
    expected = [
        [-beta * k[t] + (r if t == T - 1 else 0) for t in range(T)]
        for r, k, T in zip(reward.tolist(), kl.tolist(), lengths, strict=True)
    ]
    close(found, expected)
    assert torch.equal(found, ppo.token_rewards(reward, torch.where(mask, kl, 1e6), mask, kl_coef=beta))


@pytest.mark.parametrize(("discount", "lam"), itertools.product((1.0, 0.9), (0.0, 0.95, 1.0)))
def test_gae_equals_a_loop_and_what_stands_where_masked_never_matters(discount, lam):
    lengths, mask, noise = ragged(1)
    rewards, values = noise() * mask, noise()
    advantage, returns = ppo.gae(rewards, values, mask, discount=discount, lam=lam)
    expected = []
    for r, v, T in zip(rewards.tolist(), values.tolist(), lengths, strict=True):
        v = v[:T] + [0.0]
        delta = [r[t] + discount * v[t + 1] - v[t] for t in range(T)]
        expected.append([sum((discount * lam) ** (k - t) * delta[k] for k in range(t, T)) for t in range(T)])
    close(advantage, expected)
    close(returns, [[a + b for a, b in zip(x, v)] for x, v in zip(expected, values.tolist())])
    again = ppo.gae(rewards, torch.where(mask, values, -1e6), mask, discount=discount, lam=lam)
    assert torch.equal(advantage, again[0]) and torch.equal(returns, again[1])


def test_gae_by_hand():
    # lengths 2 and 1; V = (0.5, 1), (2); reward 3 and 1 at the end, KL 0.1 at the first token: r = (-0.1, 3), (1).
    # delta = -0.1 + 1 - 0.5 = 0.4, 3 - 1 = 2; 1 - 2 = -1. lambda 0.5: A = 0.4 + 1 = 1.4, 2; -1. R = 1.9, 3; 1
    mask, values = torch.tensor([[True, True], [True, False]]), torch.tensor([[0.5, 1.0], [2.0, 9.0]])
    kl, reward = torch.tensor([[0.2, 0.0], [0.0, 7.0]]), torch.tensor([3.0, 1.0])
    rewards = ppo.token_rewards(reward, kl, mask, kl_coef=0.5)
    assert rewards.flatten().tolist() == pytest.approx([-0.1, 3, 1, 0])
    advantage, returns = ppo.gae(rewards, values, mask, lam=0.5)
    assert advantage.flatten().tolist() == pytest.approx([1.4, 2, -1, 0])
    assert returns.flatten().tolist() == pytest.approx([1.9, 3, 1, 0])


def test_with_lambda_1_the_returns_are_what_the_rollout_returned_whatever_the_critic_says():
    lengths, mask, noise = ragged(2)
    rewards = noise() * mask
    for values in (noise(), noise() * 10):
        returns = ppo.gae(rewards, values, mask, lam=1.0)[1]
        close(returns, [[sum(r[t:T]) for t in range(T)] for r, T in zip(rewards.tolist(), lengths, strict=True)])


def test_a_perfect_critic_leaves_the_frozen_value_model_s_advantage():
    """Where V(s_{t+1}) = Q_t of dvpo.py and the reward is Q_T, GAE over the critic is dvpo.py's gae over the GVM."""
    lengths, mask, noise = ragged(3)
    q, kl = noise(9), noise()
    last = torch.tensor(lengths)
    reward = q[torch.arange(6), last]
    mine, _ = ppo.gae(ppo.token_rewards(reward, kl, mask, kl_coef=0.2), q[:, :-1], mask, lam=0.95)
    theirs = dvpo.advantages(q, kl, mask, advantage="gae", lam=0.95, kl_coef=0.2)
    assert torch.allclose(normalize_values(mine, mask), theirs, atol=1e-9)


def test_whitening_is_over_all_tokens_of_the_rollout():
    lengths, mask, noise = ragged(4)
    advantage = noise() * 3 + 5
    found = normalize_values(advantage, mask)
    cells = [x for row, T in zip(advantage.tolist(), lengths) for x in row[:T]]
    mean = sum(cells) / len(cells)
    sigma = math.sqrt(sum((x - mean) ** 2 for x in cells) / len(cells))
    close(found, [[(x - mean) / (sigma + 1e-5) for x in row[:T]] for row, T in zip(advantage.tolist(), lengths)])


# ---------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("clip", [0.2, 1.0])
def test_critic_loss_its_gradient_and_its_count_equal_a_loop(clip):
    lengths, mask, noise = ragged(5)
    old, returns = noise(), noise()
    values = (old + noise() * 0.7).requires_grad_()
    loss, clipped = ppo.critic_loss(values, old, returns, mask, 40, clip=clip)
    loss.backward()
    total, count, grad = 0.0, 0, torch.zeros(6, 8, dtype=torch.float64)
    for i, T in enumerate(lengths):
        for t in range(T):
            v, o, r = (x[i, t].item() for x in (values, old, returns))
            near = min(max(v, o - clip), o + clip)
            cut = (near - r) ** 2 > (v - r) ** 2
            total += max((v - r) ** 2, (near - r) ** 2) / 2 / 40
            grad[i, t] = 0 if cut else (v - r) / 40
            count += cut
    assert loss.item() == pytest.approx(total) and int(clipped) == count > 0
    assert torch.allclose(values.grad, grad)


def test_critic_loss_by_hand():
    # V - V_old = 0.5, -0.1, 0.5 (one masked); returns 1, 0, -1 with V_old = 0: the first is clipped to 0.2, where its
    # error 0.64 is larger than 0.25; the second's is 0.01; the third moved away from its return: 2.25 > 1.44
    mask, old = torch.tensor([[True, True], [True, False]]), torch.zeros(2, 2)
    values = torch.tensor([[0.5, -0.1], [0.5, 9.0]], requires_grad=True)
    loss, clipped = ppo.critic_loss(values, old, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]), mask, 3)
    loss.backward()
    assert loss.item() == pytest.approx((0.64 + 0.01 + 2.25) / 6) and int(clipped) == 1
    assert values.grad.flatten().tolist() == pytest.approx([0, -0.1 / 3, 0.5, 0])


def test_explained_variance():
    _, mask, noise = ragged(6)
    returns = noise()
    assert float(ppo.explained_variance(torch.where(mask, returns, 99.0), returns, mask)) == pytest.approx(1)
    assert float(ppo.explained_variance(returns + 3, returns, mask)) == pytest.approx(1)  # but for an offset
    assert float(ppo.explained_variance(torch.full_like(returns, 2.0), returns, mask)) == pytest.approx(0)
    assert float(ppo.explained_variance(-returns, returns, mask)) == pytest.approx(-3)
    assert float(ppo.explained_variance(returns, torch.full_like(returns, -1.5), mask)) == 0


# ---------------------------------------------------------------------------------------------------- rollout, the critic
def test_best_of_each_keeps_the_best_of_neighbours():
    assert ppo.best_of_each([1.0, 3.0, 2.0, 5.0, 4.0, 0.0], 3) == [1, 3]
    assert ppo.best_of_each([1.0, 3.0], 1) == [0, 1]


def test_the_critic_starts_at_zero_and_reads_the_state_before_each_token():
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    model = LlamaForTokenClassification(toy.config(**small, num_labels=1)).eval()
    critic, rng = ppo.Critic(model, SimpleNamespace(zero_stage=0)), random.Random(0)
    rows = [([rng.randint(5, 90) for _ in range(p)], [rng.randint(5, 90) for _ in range(r)])
            for p, r in ((4, 3), (1, 6), (7, 1), (2, 0))]  # fmt: skip
    batch = ppo.collate(rows, 0)
    with torch.no_grad():
        assert critic(batch).shape == (4, 6) and not critic(batch).any()
        torch.nn.init.normal_(model.score.weight)
        found = critic(batch)
        for i, (prompt, response) in enumerate(rows):
            at = range(len(prompt) - 1, len(prompt) + len(response) - 1)
            expected = [float(model(torch.tensor([(prompt + response)[: t + 1]])).logits[0, -1, 0]) for t in at]
            assert found[i].tolist() == pytest.approx(expected + [0.0] * (6 - len(expected)), abs=1e-5)
        changed = [(prompt, [*response[:-1], 3]) for prompt, response in rows[:3]]  # V(s_T) has not seen y_T
        assert torch.allclose(critic(ppo.collate(changed, 0)), found[:3], atol=1e-6)


def test_a_critic_learns_to_predict_the_return():
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    model = LlamaForTokenClassification(toy.config(**small, num_labels=1))
    critic, rng = ppo.Critic(model, SimpleNamespace(zero_stage=0)), random.Random(0)
    optimizer = torch.optim.AdamW(critic.parameters(), lr=3e-3)

    def rollout(n=32):
        """The reward tells whether more of the prompt and the response are large ids than small ones."""
        rows = [[[rng.randint(5, 90) for _ in range(rng.randint(2, 6))] for _ in range(2)] for _ in range(n)]
        reward = torch.tensor([sum(1 if t > 47 else -1 for t in p + r) / len(p + r) for p, r in rows])
        batch = ppo.collate(rows, 0)
        mask = batch.response_mask
        return batch, ppo.token_rewards(reward, torch.zeros(mask.shape), mask), mask

    found = []
    for _ in range(60):
        batch, rewards, mask = rollout()
        with torch.no_grad():
            old = critic(batch)
        found.append(float(ppo.explained_variance(old, ppo.discounted_sum(rewards, 1.0), mask)))
        returns = ppo.gae(rewards, old, mask)[1]
        for _ in range(2):
            loss, _ = ppo.critic_loss(critic(batch), old, returns, mask, int(mask.sum()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert found[0] == pytest.approx(0, abs=1e-6) and sum(found[-10:]) / 10 > 0.5, found


def test_over_ranks_gives_each_row_its_own_in_order():
    rng = random.Random(0)
    rows = [([1] * rng.randint(1, 9), [rng.randint(5, 90) for _ in range(rng.randint(1, 6))]) for _ in range(7)]

    def tokens(micro):
        batch = ppo.collate(micro, 0, None, args)
        x = torch.zeros(batch.response_mask.numel()).index_copy(0, batch.cell, batch.target.float())
        return x.view(batch.response_mask.shape), -x.view(batch.response_mask.shape)

    args = SimpleNamespace(micro_tokens=20, padding=False)
    found = ppo.over_ranks(rows, (8, 9), tokens, 0, 1, args, "cpu")
    parts = [ppo.over_ranks(rows, (8, 9), tokens, rank, 3, args, "cpu") for rank in range(3)]  # summed by all_sum
    for i, (_, response) in enumerate(rows):
        for x, sign, width in zip(found, (1, -1), (8, 9), strict=True):
            assert x[i].tolist() == [sign * t for t in response] + [0] * (width - len(response))
    assert all(torch.equal(sum(part[k] for part in parts), found[k]) for k in range(2))


# ----------------------------------------------------------------------------------------------------------- the bandit
REWARDS = torch.tensor([0.0, 1.0, 0.3, -0.5, 0.9])
REFERENCE = torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1]).log()


def optimum(beta):
    """pi_ref exp(r / beta) / Z: what maximises E r - beta KL."""
    return (REFERENCE + REWARDS / beta).softmax(0)


def solve(update, steps=300, rate=0.05):
    """Responses of one token; `update(token, old, ref, logp, logits)` is the loss: (256,) tokens, their (256, 1) log-probs, the
    policy's (5,) logits. The mean policy of the last third, since the samples' noise stays."""
    torch.manual_seed(0)
    logits = REFERENCE.clone().requires_grad_()
    optimizer, kept = torch.optim.Adam([logits], lr=rate), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        with torch.no_grad():
            token = logits.softmax(0).multinomial(len(MASK), replacement=True)
            old = logits.log_softmax(0)[token][:, None]
        for _ in range(2):
            optimizer.zero_grad()
            update(token, old, REFERENCE[token][:, None], logits.log_softmax(0)[token][:, None], logits).backward()
            optimizer.step()
        kept.append(logits.detach().softmax(0))
    return torch.stack(kept[-steps // 3 :]).mean(0)


MASK = torch.ones(256, 1, dtype=torch.bool)


def ppo_update(beta):
    value = torch.zeros(1, requires_grad=True)
    critic = torch.optim.Adam([value], lr=0.05)

    def update(token, old, ref, logp, _):
        rewards = ppo.token_rewards(REWARDS[token], old - ref, MASK, kl_coef=beta)
        old_value = value.detach().expand(256, 1)
        advantage, returns = ppo.gae(rewards, old_value, MASK)
        critic.zero_grad()
        ppo.critic_loss(value.expand(256, 1), old_value, returns, MASK, 256)[0].backward()
        critic.step()
        return ppo.dvpo_loss(logp, old, normalize_values(advantage, MASK), MASK, 256)[0]

    return update, value


def dvpo_update(beta):
    """The exact Q of the bandit as a global value model, V(s_1) its mean under the policy."""

    def update(token, old, ref, logp, logits):
        v = (logits.detach().softmax(0) * REWARDS).sum().expand(256)
        values = torch.stack([v, REWARDS[token]], 1)
        advantage = dvpo.advantages(values, old - ref, MASK, advantage="gae", kl_coef=beta)
        return dvpo.dvpo_loss(logp, old, advantage, MASK, 256)[0]

    return update


def reinforce_update(baseline, beta):
    n = 8 if baseline in ("rloo", "grpo") else 1

    def update(token, old, ref, logp, logits):
        greedy = REWARDS[logits.argmax()].expand(256)
        advantage = reinforce.reward_advantages(
            REWARDS[token], old - ref, MASK, baseline=baseline, n=n, other=greedy, kl_coef=beta
        )
        loss = reinforce.dvpo_loss(logp, old, advantage, MASK, 256)[0]
        if baseline == "grpo":
            loss = loss + beta * reinforce.k3_loss(logp, ref, MASK.double(), 256)
        return loss

    return update


@pytest.mark.parametrize("method", ["ppo", "dvpo", "remax", "rloo", "reinforce++"])
def test_a_bandit_is_solved_up_to_its_known_optimum(method):
    beta = 0.5
    value = None
    if method == "ppo":
        update, value = ppo_update(beta)
    else:
        update = dvpo_update(beta) if method == "dvpo" else reinforce_update(method, beta)
    found, best = solve(update), optimum(beta)
    assert (REFERENCE.exp() - best).abs().max() > 0.2 > 0.03 > (found - best).abs().max(), (found, best)
    if value is not None:  # at the optimum every token returns beta log Z
        assert value.item() == pytest.approx(float(beta * (REFERENCE + REWARDS / beta).logsumexp(0)), abs=0.05)


def test_grpo_solves_the_bandit_without_kl_and_its_kl_keeps_it_near_the_reference():
    best = solve(reinforce_update("grpo", 0.0))
    held = solve(reinforce_update("grpo", 1.0))
    assert best[1] + best[4] > 0.9 and best[1] > 0.6  # the difference 0.1 of two good tokens is told too
    assert (held[1] + held[4]) < 0.9 and ((held - REFERENCE.exp()).abs().sum() < (best - REFERENCE.exp()).abs().sum())
