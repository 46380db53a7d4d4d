"""dvpo.py: advantages, losses and the KL controller against loops and by hand; what sampling and tau must not depend on."""

import itertools
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import toy

FORMS = ("q", "gae")
EPS = 1e-5


def ragged(seed, rows=6, width=8):
    """Lengths 1 and `width` among others, mask (B, T), a source of noise that does not stop where a row does."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [1, width] + [rng.randint(1, width) for _ in range(rows - 2)]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return lengths, mask, lambda columns=width: torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def cells(found, lengths):
    """The unmasked cells, as lists; all others must be 0."""
    for row, length in zip(found, lengths, strict=True):
        assert not row[length:].any()
    return [row[:length].tolist() for row, length in zip(found, lengths, strict=True)]


def normalized(rows):
    """eq. 2 over all tokens of all rows."""
    x = [v for row in rows for v in row]
    mean = sum(x) / len(x)
    sigma = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x))
    return [[(v - mean) / (sigma + EPS) for v in row] for row in rows]


def naive_advantages(values, kl, lengths, advantage, discount, lam, beta, baseline="none"):
    """Straight from the definitions: V_1 is read at the last prompt token, V_t = Q_{t-1} / discount, V_{T+1} = Q_T."""
    raw = []
    for v, k, T in zip(values.tolist(), kl.tolist(), lengths, strict=True):
        kl_to_go = [sum(discount ** (j - t) * k[j] for j in range(t, T)) for t in range(T)]
        if advantage == "q":
            here = [[values[i, t + 1].item() for i, length in enumerate(lengths) if length > t] for t in range(T)]
            less = {"none": [0.0] * T, "start": [v[0]] * T, "position": [sum(x) / len(x) for x in here]}[baseline]
            raw.append([v[t + 1] - less[t] - beta * kl_to_go[t] for t in range(T)])
            continue
        state = [v[0]] + [v[t] / discount for t in range(1, T)] + [v[T]]
        delta = [(1 if t == T - 1 else discount) * state[t + 1] - state[t] for t in range(T)]
        delta = [d - beta * k[t] for t, d in enumerate(delta)]
        raw.append([sum((discount * lam) ** (j - t) * delta[j] for j in range(t, T)) for t in range(T)])
    return normalized(raw)


def close(found, expected, **tolerance):
    for row, other in zip(found, expected, strict=True):
        assert row == pytest.approx(other, **(tolerance or {"rel": 1e-8, "abs": 1e-9}))


# ------------------------------------------------------------------------------------------------------------ advantages
@pytest.mark.parametrize(
    ("advantage", "discount", "lam", "beta"), itertools.product(FORMS, (1.0, 0.9), (0.0, 0.95, 1.0), (0.0, 0.3))
)
def test_advantages_equal_a_loop_and_are_0_where_masked(advantage, discount, lam, beta):
    lengths, mask, noise = ragged(0)
    values, kl = noise(9), noise()
    found = dvpo.advantages(values, kl, mask, advantage=advantage, discount=discount, lam=lam, kl_coef=beta)
    close(cells(found, lengths), naive_advantages(values, kl, lengths, advantage, discount, lam, beta))


@pytest.mark.parametrize("baseline", ["position", "start"])
def test_baselines_of_q_equal_a_loop(baseline):
    lengths, mask, noise = ragged(1)
    values, kl = noise(9), noise()
    found = dvpo.advantages(values, kl, mask, baseline=baseline, discount=0.9, kl_coef=0.3)
    close(cells(found, lengths), naive_advantages(values, kl, lengths, "q", 0.9, 0.0, 0.3, baseline))
    assert not torch.allclose(found, dvpo.advantages(values, kl, mask, discount=0.9, kl_coef=0.3))


@pytest.mark.parametrize("factor", [0.0, 0.5, 0.95, 1.0])
def test_discounted_sum_equals_a_loop(factor):
    x = torch.randn(4, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = [[sum(factor ** (k - t) * row[k] for k in range(t, 7)) for t in range(7)] for row in x.tolist()]
    close(dvpo.discounted_sum(x, factor).tolist(), expected)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_increments_equal_a_loop(discount):
    lengths, mask, noise = ragged(2)
    values = noise(9)
    expected = [
        [v[t] - (v[0] if t == 1 else v[t - 1] / discount) for t in range(1, T + 1)]
        for v, T in zip(values.tolist(), lengths, strict=True)
    ]
    close(cells(dvpo.increments(values, mask, discount=discount), lengths), expected)


# Two responses, of length 2 and 1: V(s_1) = 0.5 and 1.5, Q = (1, 3) and (2); the last cell is masked.
VALUES = torch.tensor([[0.5, 1.0, 3.0], [1.5, 2.0, -77.0]])
KL = torch.tensor([[0.2, 0.4], [-0.6, 55.0]])
MASK = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(
    ("advantage", "beta", "expected"),
    [
        # mean 2, sigma sqrt((1 + 1 + 0) / 3) = 0.816497
        ("q", 0.0, [-1.224745, 1.224745, 0.0]),
        # Q - 0.5 (0.6, 0.4; -0.6) = 0.7, 2.8, 2.3: mean 1.933333, sigma sqrt((1.521111 + 0.751111 + 0.134444) / 3) = 0.895669
        ("q", 0.5, [-1.376996, 0.967619, 0.409378]),
        # lambda 0.5: 0.5 + 0.5 * 2, 2, 0.5 = 1.5, 2, 0.5: mean 4/3, sigma sqrt((1/36 + 16/36 + 25/36) / 3) = 0.623610
        ("gae", 0.0, [0.267261, 1.069045, -1.336306]),
        # delta - 0.5 kl = 0.4, 1.8, 0.8; 0.4 + 0.9, 1.8, 0.8: mean 1.3, sigma sqrt((0 + 0.25 + 0.25) / 3) = 0.408248
        ("gae", 0.5, [0.0, 1.224745, -1.224745]),
    ],
)
def test_advantages_by_hand(advantage, beta, expected):
    found = dvpo.advantages(VALUES, KL, MASK, advantage=advantage, lam=0.5, kl_coef=beta)
    assert found[MASK].tolist() == pytest.approx(expected, abs=1e-4) and found[1, 1] == 0


def test_gae_with_lambda_0_is_the_increment_of_q_and_with_lambda_1_what_is_still_to_come():
    lengths, mask, noise = ragged(3)
    values, kl = noise(9), noise()
    delta = dvpo.increments(values, mask)
    steps = [[v[t + 1] - v[t] for t in range(T)] for v, T in zip(values.tolist(), lengths, strict=True)]
    rest = [[v[T] - v[t] for t in range(T)] for v, T in zip(values.tolist(), lengths, strict=True)]
    close(cells(dvpo.discounted_sum(delta, 0.0), lengths), steps)  # Q_t - Q_{t-1}
    close(cells(dvpo.discounted_sum(delta, 1.0), lengths), rest)  # Q_T - V_t: the GVM as a reward model
    for lam, raw in ((0.0, steps), (1.0, rest)):
        close(cells(dvpo.advantages(values, kl, mask, advantage="gae", lam=lam), lengths), normalized(raw))


@pytest.mark.parametrize("advantage", FORMS)
def test_advantages_have_mean_0_and_variance_1(advantage):
    _, mask, noise = ragged(5)
    values = noise(9).abs().cumsum(1)  # every token better than expected
    found = dvpo.advantages(values, torch.zeros_like(values[:, 1:]), mask, advantage=advantage)[mask]
    assert found.mean().item() == pytest.approx(0, abs=1e-9)
    assert found.square().mean().item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("advantage", FORMS)
def test_the_terminal_value_is_kept(advantage):
    _, mask, noise = ragged(6)
    values, last = noise(9), int(mask[2].sum())
    kl = torch.zeros_like(values[:, 1:])
    low, high = values.clone(), values.clone()
    low[2, last], high[2, last] = -9, 9
    found = [dvpo.advantages(v, kl, mask, advantage=advantage)[2, last - 1] for v in (low, high)]
    assert found[0] < 0 < found[1]


@pytest.mark.parametrize("advantage", FORMS)
def test_a_token_likelier_under_the_policy_than_under_the_reference_has_a_lower_advantage(advantage):
    _, mask, noise = ragged(7)
    values, old_logp, ref_logp = noise(9), noise(), noise()
    more = old_logp.clone()
    more[1, 3] += 2  # length 8: tokens 0 to 7
    found = [dvpo.advantages(values, x - ref_logp, mask, advantage=advantage, kl_coef=0.5) for x in (old_logp, more)]
    assert found[1][1, 3] < found[0][1, 3]
    none = [dvpo.advantages(values, x - ref_logp, mask, advantage=advantage, kl_coef=0.0) for x in (old_logp, more)]
    assert torch.equal(*none)


@pytest.mark.parametrize("advantage", FORMS)
def test_a_constant_added_to_all_values_changes_nothing(advantage):
    _, mask, noise = ragged(8)
    values, kl = noise(9), noise()
    found = [dvpo.advantages(v, kl, mask, advantage=advantage, kl_coef=0.1) for v in (values, values + 100)]
    assert torch.allclose(*found, atol=1e-9)


@pytest.mark.parametrize(("advantage", "discount"), itertools.product(FORMS, (1.0, 0.9)))
def test_what_stands_where_masked_never_matters(advantage, discount):
    lengths, mask, noise = ragged(9)
    values, kl = noise(9), noise()
    found = [
        dvpo.advantages(v, k, mask, advantage=advantage, discount=discount, kl_coef=0.1)
        for v, k in ((values, kl), (torch.where(gvm.with_start(mask), values, -1e6), torch.where(mask, kl, 1e6)))
    ]
    assert torch.equal(*found) and not found[0][~mask].any()
    logp, old, ref, other = noise(), noise(), noise(), torch.where(mask, 0.0, 1e3)
    n = sum(lengths)
    for one, two in (
        (dvpo.dvpo_loss(logp, old, found[0], mask, n), dvpo.dvpo_loss(logp + other, old, found[0] - other, mask, n)),
        ([dvpo.kl_loss(logp, ref, mask, n)], [dvpo.kl_loss(logp + other, ref, mask, n)]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_normalising_the_rollout_is_not_normalising_its_minibatches():
    values = torch.tensor([[0.0, 1.0, 1.0], [0.0, -1.0, -1.0]])  # a good and a bad response, alike throughout
    mask, kl = torch.ones(2, 2, dtype=torch.bool), torch.zeros(2, 2)
    whole = dvpo.advantages(values, kl, mask)
    assert whole.tolist() == [pytest.approx([1, 1], abs=1e-4), pytest.approx([-1, -1], abs=1e-4)]
    alone = [dvpo.advantages(values[i : i + 1], kl[:1], mask[:1]) for i in range(2)]
    assert not any(part.any() for part in alone)  # the difference between the responses is lost
    _, mask, noise = ragged(10)
    values, kl = noise(9), noise()
    for advantage in FORMS:
        whole = dvpo.advantages(values, kl, mask, advantage=advantage, kl_coef=0.1)
        halves = [
            dvpo.advantages(values[i : i + 3], kl[i : i + 3], mask[i : i + 3], advantage=advantage, kl_coef=0.1)
            for i in (0, 3)
        ]
        assert not torch.allclose(whole, torch.cat(halves), atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize(("seed", "clip"), itertools.product(range(3), (0.2, 0.5)))
def test_dvpo_loss_its_gradient_and_its_count_equal_a_loop(seed, clip):
    lengths, mask, noise = ragged(seed)
    logp, old, advantage = noise() * 0.5, noise() * 0.5, noise()
    logp.requires_grad_()
    loss, clipped = dvpo.dvpo_loss(logp, old, advantage, mask, 50, clip=clip)
    loss.backward()
    total, count, grad = 0.0, 0, [[0.0] * 8 for _ in lengths]
    for i, length in enumerate(lengths):
        for t in range(length):
            ratio, a = math.exp((logp[i, t] - old[i, t]).item()), advantage[i, t].item()
            cut = (a > 0 and ratio > 1 + clip) or (a < 0 and ratio < 1 - clip)
            total -= a * (min(max(ratio, 1 - clip), 1 + clip) if cut else ratio) / 50
            grad[i][t] = 0.0 if cut else -a * ratio / 50  # d ratio / d logp = ratio
            count += cut
    assert loss.item() == pytest.approx(total, rel=1e-9) and int(clipped) == count > 0
    close(logp.grad.tolist(), grad)


def test_dvpo_loss_by_hand():
    # ratios 1.5, 0.5, 1.1 (and one masked), advantages 2, -1, -2: min(3, 2.4) = 2.4 and min(-0.5, -0.8) = -0.8 are
    # clipped, min(-2.2, -2.2) is not; the loss is -(2.4 - 0.8 - 2.2) / 3 = 0.2, its gradient 1.1 * 2 / 3 at the last
    logp = torch.tensor([[1.5, 0.5], [1.1, 9.0]]).log().requires_grad_()
    advantage = torch.tensor([[2.0, -1.0], [-2.0, 7.0]])
    loss, clipped = dvpo.dvpo_loss(logp, torch.zeros(2, 2), advantage, MASK, 3, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx(0.2) and int(clipped) == 2
    close(logp.grad.tolist(), [[0.0, 0.0], [2.2 / 3, 0.0]], abs=1e-6)


def test_at_ratio_1_the_gradient_is_the_policy_gradient_and_nothing_is_clipped():
    lengths, mask, noise = ragged(11)
    old, advantage = noise(), noise()
    logp = old.clone().requires_grad_()
    loss, clipped = dvpo.dvpo_loss(logp, old, advantage, mask, sum(lengths))
    loss.backward()
    assert int(clipped) == 0 and loss.item() == pytest.approx(-advantage[mask].sum().item() / sum(lengths))
    assert torch.allclose(logp.grad, -advantage * mask / sum(lengths))


def test_kl_loss_equals_a_loop():
    lengths, mask, noise = ragged(12)
    logp, ref = noise().requires_grad_(), noise()
    loss = dvpo.kl_loss(logp, ref, mask, sum(lengths))
    loss.backward()
    gap = (logp - ref).tolist()
    squares = sum(gap[i][t] ** 2 for i, length in enumerate(lengths) for t in range(length))
    assert loss.item() == pytest.approx(squares / 2 / sum(lengths))
    assert torch.allclose(logp.grad, (logp - ref).detach() * mask / sum(lengths))


def test_kl_loss_by_hand():
    # (0.2^2 + 0.4^2 + 0.6^2) / 2 over 3 tokens = 0.56 / 6
    assert float(dvpo.kl_loss(KL, torch.zeros(2, 2), MASK, 3)) == pytest.approx(0.56 / 6)


def test_on_policy_the_gradient_of_kl_loss_is_that_of_the_conditional_kl():
    generator = torch.Generator().manual_seed(0)
    logits, ref = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    logp, ref = logits.log_softmax(0), ref.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits, retain_graph=True)
    mask, p = torch.ones(1, 1, dtype=torch.bool), logp.exp().tolist()
    expected = sum(p[a] * dvpo.kl_loss(logp[a].view(1, 1), ref[a].view(1, 1), mask, 1) for a in range(6))
    assert torch.allclose(torch.autograd.grad(expected, logits)[0], exact)


def test_kl_controller_by_hand():
    settings = {"target": 6.0, "episodes": 64, "horizon": 1000.0}
    # KL 6.6: e = 0.1, 0.2 (1 + 0.1 * 0.064) = 0.20128; far off, |e| is 0.2: 0.2 (1 +- 0.0128); on target nothing moves
    assert dvpo.kl_controller(0.2, 6.6, **settings) == pytest.approx(0.20128)
    assert dvpo.kl_controller(0.2, 60.0, **settings) == pytest.approx(0.20256)
    assert dvpo.kl_controller(0.2, 0.0, **settings) == pytest.approx(0.19744)
    assert dvpo.kl_controller(0.2, 6.0, **settings) == pytest.approx(0.2)


def test_kl_controller_stays_within_its_bounds():
    for kl, bound in ((0.0, 1e-4), (99.0, 10.0)):
        beta = 0.2
        for _ in range(2000):
            before, beta = beta, dvpo.kl_controller(beta, kl, target=6.0, episodes=64, horizon=1000.0)
            assert abs(beta / before - 1) <= 0.0128 + 1e-9
        assert beta == bound


# -------------------------------------------------------------------------------------------------------------- sampling
@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_greedy_under_the_noise_samples_from_the_softmax_at_the_temperature(temperature):
    logits, n = torch.tensor([1.0, 0.0, -1.0, 0.5, -float("inf")]), 20000
    noise = dvpo.KeyedNoise(list(range(n)), temperature, "cpu")
    expected = n * (logits / temperature).softmax(0)
    for _ in range(3):  # one step of generation after the other
        drawn = noise(None, logits.expand(n, 5)).argmax(-1).bincount(minlength=5)
        assert drawn[4] == 0
        chi_square = ((drawn - expected).square() / expected)[:4].sum()
        assert chi_square < 21.1, drawn  # 3 degrees of freedom: exceeded once in 10,000 times


def test_noise_is_independent_between_rows_and_between_steps():
    n = 20000
    noise = dvpo.KeyedNoise(list(range(n)), 1.0, "cpu")
    first, second = (noise(None, torch.zeros(n, 2)).argmax(-1).double() for _ in range(2))
    for one, two in ((first, second), (first[:-1], first[1:])):
        assert abs(torch.corrcoef(torch.stack([one, two]))[0, 1]) < 4 / math.sqrt(n)


def test_rows_of_a_shard_get_the_noise_that_they_have_in_the_whole_batch():
    scores = torch.randn(8, 11, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    keys = lambda seed: [dvpo.key_of(seed, i) for i in range(8)]
    whole = dvpo.KeyedNoise(keys("0/3"), 0.7, "cpu")
    shards = [dvpo.KeyedNoise(keys("0/3")[i : i + 2], 0.7, "cpu") for i in range(0, 8, 2)]
    torch.manual_seed(5)  # the global generator has no part in it
    for _ in range(3):
        parts = [shard(None, scores[2 * i : 2 * i + 2]) for i, shard in enumerate(shards)]
        assert torch.equal(whole(None, scores), torch.cat(parts)) and parts[0].dtype == torch.float32
    again, other = (dvpo.KeyedNoise(keys(key), 0.7, "cpu")(None, scores) for key in ("0/3", "0/4"))
    assert not torch.equal(again, other)
    assert torch.equal(again, dvpo.KeyedNoise(keys("0/3"), 0.7, "cpu")(None, scores))


def test_a_row_without_a_key_is_greedy_and_drawn_log_probs_are_kept():
    scores = torch.randn(3, 5, 9, generator=torch.Generator().manual_seed(1))  # three steps of five rows
    noise = dvpo.KeyedNoise([4, None, 6, 7, None], 0.7, "cpu")
    token = torch.stack([noise(None, step).argmax(-1) for step in scores], 1)
    assert torch.equal(token[1], scores[:, 1].argmax(-1)) and torch.equal(token[4], scores[:, 4].argmax(-1))
    assert (token[[0, 2, 3]] != scores[:, [0, 2, 3]].argmax(-1).T).any()
    logp = (scores / 0.7).log_softmax(-1).transpose(0, 1).gather(2, token[:, :, None])[:, :, 0]
    found = noise.sampled([[1] * n for n in (3, 1, 2, 3, 0)])
    assert [len(row) for row in found] == [3, 1, 2, 3, 0]
    for row, expected in zip(found, logp.tolist(), strict=True):
        assert row == pytest.approx(expected[: len(row)], abs=1e-5)


def test_truncated_weights():
    old, drawn = torch.tensor([[-1.0, -2.0, -3.0, 0.0]]), torch.tensor([[-1.5, -2.0, -1.0, -9.0]])
    mask = torch.tensor([[True, True, True, False]])
    found = dvpo.truncated_weights(old, drawn, mask, 1.5)[0, :3].tolist()
    assert found == pytest.approx([1.5, 1.0, math.exp(-2)])
    assert dvpo.truncated_weights(old, drawn, mask, 0.0).tolist() == mask.float().tolist()


# ------------------------------------------------------------------------------------------------------------------- tau
def test_tau_partners_are_on_other_prompts_than_x_and_than_each_other():
    rng = random.Random(0)
    keys = [f"prompt {rng.randrange(12)}" for _ in range(40)]
    for pairs in (0, 1, 3):
        partners = dvpo.tau_partners(keys, pairs, "0/1")
        assert len(partners) == 40
        for i, others in enumerate(partners):
            assert len(others) == pairs and len({keys[i], *(keys[j] for j in others)}) == pairs + 1
    distinct = len(set(keys))
    assert all(len(others) == distinct - 1 for others in dvpo.tau_partners(keys, 99, "0/1"))  # all that there are
    assert dvpo.tau_partners(["a", "a"], 2, "0/1") == [[], []]


def test_tau_partners_follow_keys_and_seed_alone():
    keys = [f"prompt {i}" for i in range(16)]
    found = dvpo.tau_partners(keys, 2, "0/1")
    for rank in range(4):  # every rank computes all of them, whatever it has drawn before
        random.seed(rank)
        assert dvpo.tau_partners(keys, 2, "0/1") == found
    assert dvpo.tau_partners(keys, 2, "0/2") != found
    assert {j for others in found for j in others} > set(range(0, 16, 2))  # the partners of all are not the same few


def test_score_rollout_gives_each_row_its_own_log_probs_and_values_in_order():
    from transformers import LlamaForCausalLM, LlamaForTokenClassification

    torch.manual_seed(0)
    rng, small = random.Random(0), {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    policy, reference = (LlamaForCausalLM(toy.config(**small)).eval() for _ in range(2))
    values = LlamaForTokenClassification(toy.config(**small, num_labels=1)).eval()
    tok = toy.tokenizer()
    for model in (policy, reference):
        model.generation_config.eos_token_id = [tok.eos_token_id]  # a list, as load_model leaves it
    questions = [toy.prompts("rl")[i] for i in range(7)]
    answers = [
        dvpo.Answer([{"role": "user", "content": q}], [rng.randint(5, 90) for _ in range(rng.randint(0, 5))] + [1])
        for q in questions
    ]
    partners = dvpo.tau_partners([a.key for a in answers], 2, "0/0")
    rows = []
    for a, others in zip(answers, partners, strict=True):
        turns = dvpo.render(tok, [answers[j] for j in others] + [a], 192)
        rows.append(
            (tok.apply_chat_template(a.prompt, add_generation_prompt=True, return_dict=False), a.response, turns)
        )
    naive = []
    with torch.no_grad():
        for prompt, response, turns in rows:
            ids, at, y = torch.tensor([prompt + response]), len(prompt) - 1, torch.tensor(response)
            logp = [
                (m(ids).logits[0] / 0.7).log_softmax(-1)[at:-1].gather(1, y[:, None])[:, 0] for m in (policy, reference)
            ]
            tau = torch.tensor([[t for turn in turns for part in turn for t in part]])
            naive.append((*logp, values(tau).logits[0, -len(response) - 1 :, 0]))
        frozen = SimpleNamespace(ref_logp=dvpo.Policy(reference), values=dvpo.ValueModel(values))
        width = max(len(a.response) for a in answers)
        args = SimpleNamespace(micro_tokens=96, padding=False, temperature=0.7)
        found = dvpo.score_rollout(dvpo.Policy(policy), frozen, rows, tok, args, 0, 1, "cpu")
    assert [x.shape for x in found] == [(7, width), (7, width), (7, width + 1)]
    for i, expected in enumerate(naive):
        for x, row in zip(found, expected, strict=True):
            assert x[i, : len(row)].tolist() == pytest.approx(row.tolist(), abs=1e-5) and not x[i, len(row) :].any()
