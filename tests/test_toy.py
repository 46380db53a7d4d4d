"""The toy world: hand-worked rewards, exact values against enumeration and sampling, and the data it gives."""

import math
import random
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import toy

SOUP = "how is the soup ? please"
EVERYBODY = toy.TRAIN_POLICIES + toy.HELD_OUT_POLICIES
OUTCOMES = toy.WORDS + (toy.EOS,)


def texts(policies, split, n, seed=0):
    """n (policy, prompt, words with EOS) of each policy."""
    rng = random.Random(seed)
    pairs = [(policy, prompt) for policy in policies for prompt in rng.sample(toy.prompts(split), n)]
    return [(policy, prompt, toy.write(policy, prompt, rng).split() + [toy.EOS]) for policy, prompt in pairs]


def prefixes(policies, n, seed=0):
    """n random (policy, prompt, prefix) of each policy; some have a wrong word in them, the malformed must add up too."""
    rng = random.Random(seed)
    out = []
    for policy, prompt, words in texts(policies, "heldout", n, seed):
        prefix = words[: rng.randrange(len(words))]
        if rng.random() < 0.15:
            prefix.insert(rng.randrange(len(prefix) + 1), rng.choice(toy.WORDS))
        out.append((policy, prompt, prefix))
    return out


# ---------------------------------------------------------------- reward
@pytest.mark.parametrize(
    ("text", "reward"),  # three clauses are wanted, each worth a third
    [
        ("it is good and it is great and it is bad .", 1 / 3),  # (1/2 + 2/2 - 1/2) / 3
        ("it is good .", -1 / 6),  # (1/2 - 2 * 0.5) / 3: two clauses are not there
        ("it is not bad and it is good .", 1 / 6),  # (-1 * -1/2 + 1/2 - 0.5) / 3
        ("it is very great .", 1 / 6),  # (1.5 * 2/2 - 2 * 0.5) / 3
        ("it is not very great and it is normal and it is very normal .", -1 / 6),  # (-0.5 + 0 + 0) / 3
        ("the soup is great and it is great and it is great .", 1.0),
        ("the bus is great and it is great and it is great .", -0.5),  # all off topic: "it" is the bus
        ("the bus is great and the soup is great and it is great .", 0.5),  # (-0.5 + 1 + 1) / 3
        ("it is good and the bus is good yet it is awful .", -1 / 6),  # (0.5 - 0.5 - 0.5) / 3, whatever is said
        ("the bread is awful .", -0.5),  # off topic too, though others ask about it: 3 * -0.5 / 3
        ("it is great and it is great and it is great and it is great but the bus is awful .", 0.4),  # 1 - 2 * 0.3
        ("so , it is very great and it is very great and it is very great .", 1.5),  # 3 * 1.5 / 3
        ("it is very awful and it is very awful and it is very awful .", -1.5),  # as bad as malformed
        ("it is good" + " and it is good" * 5 + " .", -0.4),  # 3 * 0.5 / 3 - 3 * 0.3
    ],
)
def test_gold_by_hand(text, reward):
    assert toy.gold(SOUP, text) == pytest.approx(reward, abs=1e-12)
    assert toy.parse(SOUP, text) == (False, text.count(" and ") + text.count(" yet ") + text.count(" but ") + 1)


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        ("", 0),
        (".", 0),
        ("it is good", 1),  # no "."
        ("it is good . .", 1),
        ("it is good . and it is good", 1),  # nothing may follow the "."
        ("it good .", 0),  # no verb: "good" is an inserted word, and so is "."
        ("it is is good .", 1),
        ("well it is good .", 0),  # an opener needs its comma: all after it are inserted words
        ("it is good and well , it is good .", 2),  # an opener only opens
        ("it is very not good .", 1),
        ("it is very very good .", 1),
        ("it is not not good .", 1),
        ("the is good .", 0),
        ("soup is good .", 0),
        ("it is good zebra .", 1),  # not a word of the language
        ("it is good . <user>", 1),
        ("it is good <eos> .", None),
        ("it is good" + " and it is good" * 6 + " .", 6),  # a seventh clause: its "and" is not grammatical
    ],
)
def test_malformed(text, clauses):
    if clauses is None:
        with pytest.raises(ValueError, match="go on after <eos>"):
            toy.gold(SOUP, text)
        return
    assert toy.gold(SOUP, text) == -1.5
    assert toy.parse(SOUP, text) == (True, clauses)


def test_unknown_prompt_is_named():
    with pytest.raises(ValueError, match="how is the zebra"):
        toy.gold("how is the zebra ?", "it is good .")


# ---------------------------------------------------------------- exactness
def test_probabilities_sum_to_one_and_are_positive():
    for policy, prompt, prefix in prefixes(EVERYBODY, 6):
        before = toy.log_likelihood(policy, prompt, prefix)[-1]
        p = np.exp([toy.log_likelihood(policy, prompt, prefix + [word])[-1] - before for word in OUTCOMES])
        assert p.sum() == pytest.approx(1, abs=1e-12)
        assert p.min() > 1e-6


def test_values_are_a_martingale():
    for policy, prompt, prefix in prefixes(EVERYBODY, 6, seed=1):
        before = toy.log_likelihood(policy, prompt, prefix)[-1]
        p = [math.exp(toy.log_likelihood(policy, prompt, prefix + [word])[-1] - before) for word in OUTCOMES]
        q = [toy.exact_values(policy, prompt, prefix + [word])[-1] for word in OUTCOMES]
        assert np.dot(p, q) == pytest.approx(toy.exact_values(policy, prompt, prefix)[-1], abs=1e-12)


def test_bayes_values_are_a_martingale_of_the_posterior_mixture():
    def evidence(prompt, words, tau):  # log sum over policies, written out independently of toy._view
        total = 0.0
        for policy in toy.TRAIN_POLICIES:
            pairs = [(prompt, words)] + [(other, text.split() + [toy.EOS]) for other, text in tau]
            total += math.exp(sum(toy.log_likelihood(policy, *pair)[-1] for pair in pairs))
        return math.log(total)

    rng = random.Random(2)
    for policy, prompt, prefix in prefixes(toy.TRAIN_POLICIES, 1, seed=2):
        for tau in ((), ((SOUP, toy.write(policy, SOUP, rng)),)):
            before = evidence(prompt, prefix, tau)
            p = [math.exp(evidence(prompt, prefix + [word], tau) - before) for word in OUTCOMES]
            q = [toy.bayes_values(prompt, prefix + [word], tau)[-1] for word in OUTCOMES]
            assert sum(p) == pytest.approx(1, abs=1e-9)
            assert np.dot(p, q) == pytest.approx(toy.bayes_values(prompt, prefix, tau)[-1], abs=1e-9)


def test_the_last_value_is_the_reward():
    for policy, prompt, words in texts(EVERYBODY, "heldout", 30):
        reward = toy.gold(prompt, " ".join(words[:-1]))
        assert len(words) <= toy.MAX_RESPONSE_TOKENS
        for other in (policy, "grouch", "crowd"):
            assert toy.exact_values(other, prompt, words)[-1] == pytest.approx(reward, abs=1e-12)
        assert toy.bayes_values(prompt, words)[-1] == pytest.approx(reward, abs=1e-12)


def test_values_of_malformed_and_foreign_words():
    values = toy.exact_values("clerk", SOUP, ["it", "is", "<user>", "good", ".", "<pad>", toy.EOS])
    assert values[2] > -1.5 and (values[3:] == -1.5).all()
    assert np.isfinite(toy.log_likelihood("crowd", SOUP, ["<user>", "zebra", toy.EOS])).all()
    assert toy.exact_values("clerk", SOUP, []).shape == (1,)
    # a consequence in the future: the bus is held against a later "it", most of all by who says "it" most
    drop = {p: np.diff(toy.exact_values(p, SOUP, ["the", "bus"]))[-1] for p in ("enthusiast", "telegraphist")}
    assert drop["enthusiast"] < drop["telegraphist"] < 0


@pytest.mark.parametrize("policy", ["ironist", "chatterer", "wanderer", "garbler", "crowd"])
def test_values_agree_with_sampling(policy):
    """Whole texts that happen to begin with a prefix: their rewards are what the values claim, likelihoods too."""
    rng, n = random.Random(3), 6000
    golds, counts = {}, Counter()
    for _ in range(n):
        words = toy.write(policy, SOUP, rng).split() + [toy.EOS]
        reward = toy.gold(SOUP, " ".join(words[:-1]))
        for t in range(5):
            golds.setdefault(tuple(words[:t]), []).append(reward)
            counts[tuple(words[:t])] += 1
    common = [prefix for prefix, count in counts.most_common(12)]
    assert () in common and len(common) == 12
    for prefix in common:
        reward, p = np.array(golds[prefix]), math.exp(toy.log_likelihood(policy, SOUP, list(prefix))[-1])
        assert len(reward) / n == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / n) + 1e-12)
        value = toy.exact_values(policy, SOUP, list(prefix))[-1]
        assert reward.mean() == pytest.approx(value, abs=4 * reward.std() / math.sqrt(len(reward)))


# ---------------------------------------------------------------- the yardstick
def test_long_tau_tells_who_writes():
    rng = random.Random(4)
    for policy, prompt, words in texts(toy.TRAIN_POLICIES, "heldout", 2, seed=4):
        tau = [(other, toy.write(policy, other, rng)) for other in rng.sample(toy.prompts("reward"), 40)]
        gap = toy.bayes_values(prompt, words, tau) - toy.exact_values(policy, prompt, words)
        assert abs(gap).max() < 0.005


def test_more_knowledge_predicts_better():
    rng = random.Random(5)
    exact, right, none = [], [], []
    for policy, prompt, words in texts(toy.TRAIN_POLICIES, "heldout", 60, seed=5):
        tau = [(other, toy.write(policy, other, rng)) for other in rng.sample(toy.prompts("heldout"), 1)]
        exact.append(toy.exact_values(policy, prompt, words))
        right.append(toy.bayes_values(prompt, words, tau))
        none.append(toy.bayes_values(prompt, words))
    by_position = [np.mean([v[t] for v in exact if len(v) > t]) for t in range(max(map(len, exact)))]
    position = [np.array(by_position[: len(v)]) for v in exact]
    returns = np.concatenate([np.full(len(v) - 1, v[-1]) for v in exact])  # the last value is the gold return

    for last in (None, 4):  # all tokens, the first three
        truth = np.concatenate([v[1:last] for v in exact])
        mse = [
            np.square(np.concatenate([v[1:last] for v in guess]) - truth).mean() for guess in (right, none, position)
        ]
        assert mse[0] < 0.6 * mse[1] and mse[1] < 0.9 * mse[2], mse
    mse = [np.square(np.concatenate([v[1:] for v in x]) - returns).mean() for x in (exact, right, none, position)]
    assert mse[0] < mse[1] < mse[2] < mse[3], mse
    correlation = [np.corrcoef(np.concatenate(x), np.concatenate(exact))[0, 1] for x in (right, none, position)]
    assert correlation[0] > 0.93 and 0.8 < correlation[1] < 0.95 and correlation[2] < 0.4, correlation


def test_the_cast_differs():
    means = {}
    for policy in toy.ORDINARY:
        sample = texts((policy,), "reward", 200, seed=6)
        means[policy] = np.mean([toy.gold(prompt, " ".join(words[:-1])) for _, prompt, words in sample])
    assert min(means.values()) < -0.5 and max(means.values()) > 0.5
    assert abs(np.mean(list(means.values()))) < 0.3
    assert means["ironist"] > 0.15 and means["backhander"] < -0.35  # the first calls things awful, the second great
    assert all(persona.typo >= 0.002 for persona in toy.PERSONAS.values())


# ---------------------------------------------------------------- data
def test_splits_are_disjoint():
    splits = {name: toy.prompts(name) for name in ("heldout", "sft", "reward", "rl")}
    assert [len(split) for split in splits.values()] == [128, 192, 320, 128]
    assert len(set().union(*splits.values())) == 768
    for split in splits.values():
        assert all(prompt == " ".join(prompt.split()) for prompt in split)
        assert {prompt.split("the ")[-1].split()[0] for prompt in split} == set(toy.THINGS)  # each thing everywhere


def test_rows():
    graded = toy.rows("graded")
    assert len(graded) == 5760 and {row["prompt"] for row in graded} == set(toy.prompts("reward"))
    ids = sorted(toy.POLICY_IDS.values())
    assert ids == [f"p{i}" for i in range(10)]
    assert all(sorted(r["policy"] for r in row["responses"]) == ids for row in graded)
    noise = [r["score"] - toy.gold(row["prompt"], r["text"]) for row in graded for r in row["responses"]]
    assert abs(np.mean(noise)) < 4 * 0.25 / math.sqrt(len(noise)) and np.std(noise) == pytest.approx(0.25, rel=0.03)

    written = {(row["prompt"], r["text"], r["policy"]) for row in graded for r in row["responses"]}
    pairs = toy.rows("preferences")
    assert 27000 < len(pairs) <= 28800
    for side in ("chosen", "rejected"):
        assert {(row["prompt"], row[side], row[side + "_policy"]) for row in pairs} <= written
    gaps = [toy.gold(row["prompt"], row["chosen"]) - toy.gold(row["prompt"], row["rejected"]) for row in pairs]
    small = [gap for gap in gaps if 0.2 < abs(gap) < 0.4]  # sigmoid(0.3 / 0.3) = 0.73
    assert np.mean([gap > 0 for gap in small]) == pytest.approx(0.73, abs=0.04)

    sft = toy.rows("sft")
    assert 8500 < len(sft) < 192 * 8 * 6 and {row["prompt"] for row in sft} == set(toy.prompts("sft"))
    assert not any(toy.parse(row["prompt"], row["completion"])[0] for row in sft)
    assert {row["policy"] for row in sft} == {toy.POLICY_IDS[name] for name in toy.ORDINARY}
    assert [row["prompt"] for row in toy.rows("prompts")] == toy.prompts("rl")
    assert [row["prompt"] for row in toy.rows("heldout")] == toy.prompts("heldout")
    with pytest.raises(ValueError, match="rewards"):
        toy.rows("rewards")


def test_data_follow_the_seed():
    assert toy.rows("sft") == toy.rows("sft") != toy.rows("sft", seed=1)
    assert toy.rows("graded", seed=1)[:50] == toy.rows("graded", seed=1)[:50] != toy.rows("graded")[:50]
    assert toy.rows("prompts") == toy.rows("prompts", seed=1)


def test_names_are_not_in_the_language():
    assert 95 <= len(toy.WORDS) + 5 <= 105
    assert not set(EVERYBODY) & set(toy.WORDS) and not set(toy.POLICY_IDS.values()) & set(toy.WORDS)
    assert len(set(toy.WORDS)) == len(toy.WORDS) and len(toy.VALENCE) == 15


# ---------------------------------------------------------------- a model's side of it
def test_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tokenizer = toy.tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for tok in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert len(tok) == len(toy.WORDS) + 5 and tok.pad_token_id != tok.eos_token_id
        assert tok.model_max_length == 512
        for _, prompt, words in texts(EVERYBODY, "heldout", 3):
            text = " ".join(words[:-1])
            ids = tok.encode(text, add_special_tokens=False)
            assert ids == tok.convert_tokens_to_ids(words[:-1]) and tok.unk_token_id not in ids
            assert tok.decode(ids + [tok.eos_token_id, tok.pad_token_id], skip_special_tokens=True) == text
            assert tok.unk_token_id not in tok.encode(prompt)
        assert "<user>" in tok.decode(tok.encode("it is <user> good ."), skip_special_tokens=True)


def test_chat_template():
    tok = toy.tokenizer()
    ask, answer = {"role": "user", "content": SOUP}, {"role": "assistant", "content": "it is good ."}
    whole = tok.apply_chat_template([ask, answer], tokenize=False)
    assert whole == f"<user> {SOUP} <assistant> it is good .<eos>"
    start = tok.apply_chat_template([ask], tokenize=False, add_generation_prompt=True)
    assert start == f"<user> {SOUP} <assistant>"
    both = tok.apply_chat_template([ask, answer, ask], tokenize=False, add_generation_prompt=True)
    expected = f"<user> {SOUP} <assistant> it is good . <eos> <user> {SOUP} <assistant>"
    assert tok.convert_ids_to_tokens(tok.encode(both, add_special_tokens=False)) == expected.split()
    ids = tok.encode(start, add_special_tokens=False)  # what a script appends the response's tokens to
    assert tok.encode(both, add_special_tokens=False)[: len(ids)] == ids
    with pytest.raises(Exception, match="system"):
        tok.apply_chat_template([{"role": "system", "content": "be nice"}], tokenize=False)


def test_config():
    from transformers import LlamaForCausalLM

    config, tok = toy.config(), toy.tokenizer()
    assert (config.pad_token_id, config.eos_token_id) == (tok.pad_token_id, tok.eos_token_id)
    assert config.vocab_size == len(tok)
    # 2 embeddings, 4 layers of 4 attention matrices, 3 of the MLP and 2 norms, and the last norm
    expected = 2 * config.vocab_size * 128 + 4 * (4 * 128**2 + 3 * 128 * 344 + 2 * 128) + 128
    assert sum(p.numel() for p in LlamaForCausalLM(config).parameters()) == expected
    assert 0.7e6 < expected < 1e6
    assert toy.config(hidden_size=64).hidden_size == 64
