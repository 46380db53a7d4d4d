"""gvm.py: targets and loss against loops, tau and its rendering, the positions at which values are read."""

import itertools
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import gvm
import sft
import toy
from kernels import normalize_values

LAMBDAS, DISCOUNTS = (0.0, 0.5, 0.95, 1.0), (1.0, 0.9)


def ragged(seed, rows=7, width=9):
    """Lengths 1 and `width` among others; mask (R, T); values (R, T+1) with noise where masked; reward (R,)."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    lengths = [1, width] + [rng.randint(1, width) for _ in range(rows - 2)]
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    values = torch.randn(rows, width + 1, generator=generator, dtype=torch.float64)
    return lengths, mask, values, torch.randn(rows, generator=generator, dtype=torch.float64)


def naive_targets(v, r, length, discount, td_lambda):
    """[target of V(s_1), G_1 .. G_T] as the mixture of n-step returns: weight (1 - lambda) lambda^(n-1) on n steps, what
    is left on the return of the whole response."""
    g = [None]
    for t in range(1, length + 1):
        left = length - t
        steps = [discount**n * v[t + n] * (1 - td_lambda) * td_lambda ** (n - 1) for n in range(1, left + 1)]
        g.append(sum(steps) + discount**left * td_lambda**left * r)
    g[0] = (1 - td_lambda) * v[1] + td_lambda * g[1]
    return g


# ------------------------------------------------------------------------------------------------------- the mathematics
@pytest.mark.parametrize(("td_lambda", "discount"), itertools.product(LAMBDAS, DISCOUNTS))
def test_td_targets_equal_mixed_n_step_returns_and_are_0_where_masked(td_lambda, discount):
    for seed in range(3):
        lengths, mask, values, reward = ragged(seed)
        found = gvm.td_targets(values, mask, reward, discount=discount, td_lambda=td_lambda)
        for i, length in enumerate(lengths):
            expected = naive_targets(values[i].tolist(), float(reward[i]), length, discount, td_lambda)
            assert found[i, : length + 1].tolist() == pytest.approx(expected, abs=1e-6)
            assert not found[i, length + 1 :].any()


def test_td_targets_by_hand():
    values = torch.tensor([[0.5, 1.0, 2.0, 4.0], [0.0, -1.0, 7.0, 7.0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = gvm.td_targets(values, mask, torch.tensor([3.0, -2.0]), discount=0.9, td_lambda=0.5)
    # G_3 = 3, G_2 = 0.9 (0.5 * 4 + 0.5 * 3) = 3.15, G_1 = 0.9 (0.5 * 2 + 0.5 * 3.15) = 2.3175,
    # V(s_1): 0.5 * 1 + 0.5 * 2.3175 = 1.65875; of the response of length 1: G_1 = -2, V(s_1): 0.5 * -1 + 0.5 * -2 = -1.5
    assert found[0].tolist() == pytest.approx([1.65875, 2.3175, 3.15, 3.0])
    assert found[1].tolist() == pytest.approx([-1.5, -2.0, 0.0, 0.0])


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_td_lambda_0_is_eq_1_to_the_letter(discount):
    lengths, mask, values, reward = ragged(3)
    found = gvm.td_targets(values, mask, reward, discount=discount, td_lambda=0.0)
    for i, length in enumerate(lengths):
        for t in range(1, length):  # r_t = 0, bootstrapped from the next token's value
            assert found[i, t] == discount * values[i, t + 1]
        assert found[i, length] == reward[i]  # r_T = r(x, y), nothing follows
        assert found[i, 0] == values[i, 1]


@pytest.mark.parametrize("discount", DISCOUNTS)
def test_td_lambda_1_is_the_return_and_its_closed_form_is_the_recursions_limit(discount):
    lengths, mask, values, reward = ragged(4)
    found = gvm.td_targets(values, mask, reward, discount=discount, td_lambda=1.0)
    limit = gvm.td_targets(values, mask, reward, discount=discount, td_lambda=1 - 1e-12)
    assert torch.allclose(found, limit, atol=1e-6)
    for i, length in enumerate(lengths):  # the paper's G_t = discount^(T - t) r
        assert found[i, 1 : length + 1].tolist() == pytest.approx(
            [discount ** (length - t) * float(reward[i]) for t in range(1, length + 1)], abs=1e-6
        )


@pytest.mark.parametrize("td_lambda", LAMBDAS)
def test_no_gradient_flows_into_targets(td_lambda):
    lengths, mask, values, reward = ragged(5)
    values.requires_grad_()
    target = gvm.td_targets(values, mask, reward, discount=0.9, td_lambda=td_lambda)
    assert not target.requires_grad
    loss = gvm.value_loss(values, target, gvm.with_start(mask) / (sum(lengths) + len(lengths)))
    loss.backward()
    expected = 2 * (values - target).detach() * gvm.with_start(mask) / (sum(lengths) + len(lengths))
    assert torch.allclose(values.grad, expected)  # as if the targets were data


@pytest.mark.parametrize("td_lambda", LAMBDAS)
def test_what_stands_where_masked_changes_no_target_and_no_loss(td_lambda):
    lengths, mask, values, reward = ragged(6)
    other = torch.where(gvm.with_start(mask), values, 1e6)
    found = [gvm.td_targets(v, mask, reward, discount=0.9, td_lambda=td_lambda) for v in (values, other)]
    assert torch.equal(*found)
    losses = [gvm.value_loss(v, found[0], gvm.with_start(mask) / sum(lengths)) for v in (values, other)]
    assert torch.equal(*losses)


def test_a_row_without_tokens_has_no_targets():
    for td_lambda in LAMBDAS:
        found = gvm.td_targets(
            torch.ones(2, 4), torch.zeros(2, 3, dtype=torch.bool), torch.ones(2), td_lambda=td_lambda
        )
        assert not found.any()


def test_value_loss_equals_a_loop_and_with_start_counts_the_last_prompt_token():
    lengths, mask, values, reward = ragged(7)
    target = gvm.td_targets(values, mask, reward, td_lambda=0.5)
    total, count = 0.0, 0
    for i, length in enumerate(lengths):
        for t in range(length + 1):
            total, count = total + float(target[i, t] - values[i, t]) ** 2, count + 1
    counted = gvm.with_start(mask)
    assert counted.shape == values.shape and counted.sum(1).tolist() == [length + 1 for length in lengths]
    assert int(counted.sum()) == count
    assert float(gvm.value_loss(values, target, counted.double() / count)) == pytest.approx(total / count, rel=1e-12)
    weights = gvm.loss_weights(counted, torch.tensor([True] * len(lengths)), count, len(lengths), 0.0)
    assert float(gvm.value_loss(values, target, weights)) == pytest.approx(total / count, rel=1e-6)


def test_the_last_token_is_the_last_that_is_true():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]).bool()
    assert gvm.last_of(mask).int().tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_outcome_has_its_share_of_the_loss_whatever_the_lengths(share):
    lengths, mask, values, reward = ragged(8)
    target, ended = gvm.td_targets(values, mask, reward, td_lambda=0.5), torch.tensor([i % 3 > 0 for i in range(7)])
    errors = [[float(target[i, t] - values[i, t]) ** 2 for t in range(T + 1)] for i, T in enumerate(lengths)]
    every = sum(map(sum, errors)) / (sum(lengths) + len(lengths))
    outcome = sum(e[-1] for e, whole in zip(errors, ended, strict=True) if whole) / int(ended.sum())
    weights = gvm.loss_weights(gvm.with_start(mask), ended, sum(lengths) + len(lengths), int(ended.sum()), share)
    assert float(weights.sum()) == pytest.approx(1, rel=1e-6)
    expected = (1 - share) * every + share * outcome
    assert float(gvm.value_loss(values, target, weights)) == pytest.approx(expected, rel=1e-5)
    none = gvm.loss_weights(gvm.with_start(mask), ended & False, sum(lengths) + len(lengths), 0, share)
    assert float(gvm.value_loss(values, target, none)) == pytest.approx(every, rel=1e-5)  # all cut: tokens alone


def test_value_loss_by_hand():
    values, mask = torch.tensor([[0.5, 1.0, 2.0], [0.0, -1.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    target = gvm.td_targets(values, mask, torch.tensor([3.0, -2.0]), td_lambda=0.0)
    # targets 1, 2, 3 and -1, -2: squares 0.25 + 1 + 1 and 1 + 1, over 5 positions
    assert float(gvm.value_loss(values, target, gvm.with_start(mask) / 5)) == pytest.approx(0.85)


@pytest.mark.parametrize("td_lambda", [0.0, 1.0])
def test_value_norm_batch_is_finite_with_a_head_of_zeros(td_lambda):
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    config = toy.config(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_labels=1)
    model = gvm.ValueModel(LlamaForTokenClassification(config))
    torch.nn.init.zeros_(model.model.score.weight), torch.nn.init.zeros_(model.model.score.bias)
    batch = gvm.collate_values([[([5, 6], [7, 8, 1])], [([5], [9, 1])]], 0, every=True)
    values = model(batch)
    assert not values.any()
    values = torch.cat([values[:, :1], normalize_values(values[:, 1:], batch.mask[:, 1:])], 1)
    target = gvm.td_targets(values, batch.mask[:, 1:], torch.tensor([1.0, -1.0]), td_lambda=td_lambda)
    loss = gvm.value_loss(values, target, batch.mask / 7)
    loss.backward()
    assert torch.isfinite(loss) and loss > 0
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def naive_percentile(x, p):
    """Linear interpolation between the order statistics."""
    x, at = sorted(x), p / 100 * (len(x) - 1)
    below = int(at)
    return x[below] + (at - below) * (x[min(below + 1, len(x) - 1)] - x[below])


def test_value_statistics_equal_interpolated_order_statistics():
    rng = random.Random(0)
    for length in (1, 2, 3, 17, 60):
        x = [rng.gauss(0, 1) for _ in range(length)]
        found = gvm.value_statistics(torch.tensor(x, dtype=torch.float64))
        assert list(found) == ["mean", "P1", "P5", "P10", "P90", "P95", "P99"]
        assert found["mean"] == pytest.approx(sum(x) / length)
        for p in (1, 5, 10, 90, 95, 99):
            assert found[f"P{p}"] == pytest.approx(naive_percentile(x, p))
    # 0, 1, 2, 3: mean 1.5; P10 at place 0.1 * 3 = 0.3, P90 at place 2.7
    found = gvm.value_statistics([3.0, 1.0, 0.0, 2.0])
    assert (found["mean"], found["P10"], found["P90"]) == pytest.approx((1.5, 0.3, 2.7))


def test_pair_accuracy_equals_a_loop_over_all_pairs_of_a_prompt():
    rng = random.Random(1)
    rows = [(rng.choice("abcd"), rng.randint(0, 3), {k: rng.randint(0, 4) for k in ("mean", "P5")}) for _ in range(40)]
    found = gvm.pair_accuracy(rows)
    for key in ("mean", "P5"):
        wins = []
        for (p, score, one), (q, other_score, other) in itertools.permutations(rows, 2):
            if p == q and score > other_score:
                wins.append(1.0 if one[key] > other[key] else 0.5 if one[key] == other[key] else 0.0)
        assert found[key] == pytest.approx(sum(wins) / len(wins))


def test_pair_accuracy_by_hand():
    one, two = {"mean": 1.0}, {"mean": 2.0}
    # of prompt a: (1, 5) right, (1, 3) a tie, (3, 5) right; b has one response; c's have one score; d is wrong
    rows = [("a", 1, one), ("a", 3, one), ("a", 5, two), ("b", 1, one), ("c", 1, one), ("c", 1, two)]
    assert gvm.pair_accuracy(rows) == {"mean": 2.5 / 3}
    assert gvm.pair_accuracy(rows + [("d", 1, two), ("d", 2, one)]) == {"mean": 2.5 / 4}
    assert gvm.pair_accuracy(rows[3:]) == {}


# ------------------------------------------------------------------------------------------------------------------- tau
def message(role, content):
    return {"role": role, "content": content}


def user(text):
    return [message("user", text)]


def pool(seed=0, prompts=23, policies=("p0", "p1", None)):
    """Answers of each policy to some prompts, several to some of them, told apart by their ids."""
    rng, number = random.Random(seed), itertools.count()
    return [
        gvm.Answer(user(f"prompt {i}"), [next(number), 1], 0.0, policy)
        for policy in policies
        for i in range(prompts)
        for _ in range(rng.choice((0, 1, 1, 3)))
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 50])
def test_conversations_use_every_answer_once_of_one_policy_on_different_prompts(size):
    answers = pool()
    groups = gvm.conversations(answers, size, 0, 0)
    used = [answer.response[0] for group in groups for answer in group]
    assert sorted(used) == [answer.response[0] for answer in answers]
    for group in groups:
        assert 1 <= len(group) <= size
        assert len({answer.policy for answer in group}) == 1
        assert len({answer.key for answer in group}) == len(group)
    assert size == 1 or len(groups) < len(answers)


def test_conversations_fill_their_groups():
    answers = [gvm.Answer(user(f"prompt {i}"), [i], 0.0, "p") for i in range(30)]
    assert [len(group) for group in gvm.conversations(answers, 3, 0, 0)] == [3] * 10
    same = [gvm.Answer(user("one prompt"), [i], 0.0, "p") for i in range(250)]  # nothing to fill them with
    assert [len(group) for group in gvm.conversations(same, 3, 0, 0)] == [1] * 250


def test_conversations_follow_seed_and_epoch_alone():
    def drawn(seed, epoch):
        random.seed(seed + 7 * epoch)  # the global generator has no part in it
        return [[answer.response[0] for answer in group] for group in gvm.conversations(pool(), 3, seed, epoch)]

    assert drawn(0, 0) == drawn(0, 0)
    assert drawn(0, 0) != drawn(0, 1) != drawn(1, 1) != drawn(0, 0)


def test_tau_is_never_about_the_answers_own_prompt_nor_twice_about_another():
    answers, rng = pool(policies=("p",)), random.Random(0)
    for answer in answers:
        for pairs in (0, 1, 3, 8):
            tau = gvm.choose_tau(answers, answer, pairs, rng)
            assert len(tau) == pairs
            assert len({answer.key, *(other.key for other in tau)}) == pairs + 1
    few = answers[:4]
    assert len(gvm.choose_tau(few, few[0], 8, rng)) == len({answer.key for answer in few}) - 1  # all that there are
    assert gvm.choose_tau(few[:1], few[0], 2, rng) == []


def test_load_answers_knows_who_wrote_what(tmp_path):
    rows = [
        {"prompt": "how is the soup ?", "responses": [{"text": "it is good .", "score": 2, "policy": "p3"}]},
        {"prompt": user("how is the soup ?"), "chosen": "good", "rejected": "bad", "chosen_policy": "p1"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    args = SimpleNamespace(data=str(tmp_path / "rows.json"), split="train", seed=0, max_prompt_tokens=9)
    args.max_response_tokens = 3
    tok = toy.tokenizer()
    found = gvm.load_answers(tok, args)
    assert [(a.score, a.policy, tok.decode(a.response)) for a in found] == [
        (2.0, "p3", "it is good"),
        (1.0, "p1", "good <eos>"),
        (-1.0, None, "bad <eos>"),  # a side is no policy
    ]
    assert {a.key for a in found} == {json.dumps(user("how is the soup ?"))}


# --------------------------------------------------------------------------------------------------------------- rendering
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}{{ m.content }} {% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)


def byte_tokenizer(template, eos="</s>"):
    """A token for each byte; <s>, EOS and <|im_start|> are special."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", eos, "<|im_start|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos, chat_template=template,
        additional_special_tokens=["<|im_start|>"], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def metaspace_tokenizer(template):
    """A token for each character; a space is "▁", and a text begins with one, as with Llama 2 and Mistral."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<s>", "</s>", "▁", *map(chr, range(33, 127))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=template)


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "toy": toy.tokenizer(),
        "chatml": byte_tokenizer(CHATML, eos="<|im_end|>"),
        "plain": byte_tokenizer(sft.PLAIN_TEMPLATE),
        "inst": byte_tokenizer(INST),
        "metaspace": metaspace_tokenizer(INST.replace("{{ m.content }}{{ eos_token }}", " {{ m.content }}{{ eos_token }}")),
    }  # fmt: skip


def answer(tok, prompt, text):
    prompt = prompt if isinstance(prompt, list) else user(prompt)
    return gvm.Answer(prompt, tok(text, add_special_tokens=False)["input_ids"] + [tok.eos_token_id])


def flat(turns):
    return [token for turn in turns for part in turn for token in part]


QUESTIONS = "how is the soup ?", "how is the bread ?", "is the bus good ?"
CHAT = [*user("how is the soup ?"), message("assistant", "it is good ."), *user("how is the bread ?")]


@pytest.mark.parametrize("name", ["toy", "chatml", "plain", "inst", "metaspace"])
@pytest.mark.parametrize("prompts", [QUESTIONS[:1], QUESTIONS, (QUESTIONS[2], CHAT), (CHAT, QUESTIONS[2])])
def test_a_rendered_conversation_is_what_the_chat_template_makes_of_its_messages(tokenizers, name, prompts):
    tok, texts = tokenizers[name], ("it is great .", "no", "it is not very good .")
    group = [answer(tok, prompt, text) for prompt, text in zip(prompts, texts, strict=False)]
    turns = gvm.render(tok, group, 10**4)
    messages = [m for a, text in zip(group, texts, strict=False) for m in [*a.prompt, message("assistant", text)]]
    whole = tok.apply_chat_template(messages, return_dict=False)
    found = flat(turns)
    assert found == whole[: len(found)]
    assert tok.decode(whole[len(found) :]).strip() == ""  # what a template prints after the last EOS
    assert [response for _, response in turns] == [a.response for a in group]


@pytest.mark.parametrize("name", ["chatml", "plain", "inst"])
def test_the_system_message_of_x_opens_the_conversation_and_those_of_tau_are_left_out(tokenizers, name):
    tok = tokenizers[name]
    tau = answer(tok, [message("system", "be curt"), *user("one ?")], "yes")
    x = answer(tok, [message("system", "be kind"), *user("two ?")], "no")
    messages = [
        message("system", "be kind"), *user("one ?"), message("assistant", "yes"), *user("two ?"), message("assistant", "no")
    ]  # fmt: skip
    whole = tok.apply_chat_template(messages, return_dict=False)
    found = flat(gvm.render(tok, [tau, x], 10**4))
    assert found == whole[: len(found)] and tok.decode(whole[len(found) :]).strip() == ""
    alone = flat(gvm.render(tok, [x], 10**4))
    assert alone == tok.apply_chat_template(x.prompt, add_generation_prompt=True, return_dict=False) + x.response


def tau_length(turns):
    return sum(len(prompt) + len(response) for prompt, response in turns[:-1])


@pytest.mark.parametrize("pairs", [1, 2, 5])
def test_tau_is_cut_to_tau_tokens_and_y_is_whole(tokenizers, pairs):
    tok = tokenizers["chatml"]
    template = len(tok.apply_chat_template(user(""), add_generation_prompt=True, return_dict=False)) + 1
    for tau_tokens in (100 * pairs, 131 * pairs, 10**4):
        group = [answer(tok, "q" * 300, "a" * 200) for _ in range(pairs)] + [answer(tok, "x" * 300, "y" * 400)]
        turns = gvm.render(tok, group, tau_tokens)
        assert turns[-1][1] == group[-1].response and tok.decode(turns[-1][0]).count("x") == 300
        share = tau_tokens // pairs
        for (prompt, response), shown in zip(turns[:-1], group, strict=False):
            assert len(prompt) <= share // 2 + template
            assert response == shown.response[: share - len(prompt)] and response
        assert tau_length(turns) <= tau_tokens
    assert tau_length(turns) == sum(300 + 201 for _ in range(pairs)) + pairs * template - 1  # 10**4: nothing is cut


def test_tau_of_long_dialogues_is_cut_to_tau_tokens_too(tokenizers):
    tok = tokenizers["chatml"]
    dialogue = [*user("a" * 100), message("assistant", "b" * 100), *user("c" * 5)]
    turns = gvm.render(tok, [answer(tok, dialogue, "d" * 30), answer(tok, "x", "y")], 100)
    assert tau_length(turns) <= 100
    assert "c" * 5 in tok.decode(turns[0][0]) and tok.decode(turns[0][1]) == "d" * 30 + "<|im_end|>"


def test_the_system_message_of_x_takes_nothing_from_tau(tokenizers):
    tok = tokenizers["chatml"]
    tau, x = answer(tok, "q", "a" * 30), answer(tok, [message("system", "s" * 80), *user("x")], "y")
    assert (
        gvm.render(tok, [tau, x], 100)[0][1] == gvm.render(tok, [tau, answer(tok, "x", "y")], 100)[0][1] == tau.response
    )


def test_shorten_cuts_the_last_message_only_if_it_is_too_long():
    tok = toy.tokenizer()
    short, cut = user("how is the soup ?"), user("how is the")
    assert gvm.shorten(tok, short, 5) == short and gvm.shorten(tok, short, 3) == cut
    assert short == user("how is the soup ?")  # the answer's own prompt is left as it is


def test_turns_are_those_of_the_tokenizer_at_hand_even_if_an_earlier_one_is_gone():
    for template in (CHATML, sft.PLAIN_TEMPLATE) * 5:
        tok = byte_tokenizer(template)  # may take the place in memory of the one before
        expected = tok.apply_chat_template(user("one ?"), add_generation_prompt=True, return_dict=False)
        assert gvm.turn(tok, user("one ?"), [], True) == expected
        del tok


# ----------------------------------------------------------------------------------------------------------------- positions
def random_turns(rng, answers):
    return [
        ([rng.randint(5, 90) for _ in range(rng.randint(1, 6))], [rng.randint(5, 90) for _ in range(rng.randint(1, 5))])
        for _ in range(answers)
    ]


@pytest.mark.parametrize("every", [True, False])
def test_values_are_read_at_the_last_prompt_token_and_at_each_response_token(every):
    rng = random.Random(0)
    rows = [random_turns(rng, answers) for answers in (1, 3, 2, 3)] + [[([7], [8])], [([7] * 9, [8] * 9)]]
    batch = gvm.collate_values(rows, 0, every)
    tokens, width = batch.input_ids.flatten(), batch.input_ids.shape[1]
    for i, turns in enumerate(rows):
        whole = flat(turns)
        assert batch.input_ids[i].tolist() == whole + [0] * (width - len(whole))
    asked = [(i, j) for i, turns in enumerate(rows) for j in range(len(turns)) if every or j == len(turns) - 1]
    assert len(asked) == len(batch.position)
    for (i, j), position, mask in zip(asked, batch.position, batch.mask, strict=True):
        prompt, response = rows[i][j]
        size = len(response) + 1
        assert mask.tolist() == [True] * size + [False] * (len(mask) - size)
        assert not position[size:].any()
        assert tokens[position[:size]].tolist() == [prompt[-1], *response]
        start = i * width + len(flat(rows[i][:j])) + len(prompt) - 1  # and at this very place
        assert position[:size].tolist() == list(range(start, start + size))


def test_an_empty_response_has_no_value():
    batch = gvm.collate_values([[([5, 6], [7])], [([5, 6], [])]], 0, every=False)
    assert batch.mask.tolist() == [[True, True], [False, False]] and batch.position[1].tolist() == [0, 0]


def test_the_value_model_is_the_stock_classifier_read_at_those_positions():
    from transformers import LlamaForTokenClassification

    torch.manual_seed(0)
    config = toy.config(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_labels=1)
    model, rng = LlamaForTokenClassification(config).eval(), random.Random(1)
    rows = [random_turns(rng, answers) for answers in (1, 3, 2)]
    with torch.no_grad():
        batch = gvm.collate_values(rows, 0, every=True)
        values = iter(gvm.ValueModel(model)(batch))
        for turns in rows:
            stock, at = model(torch.tensor([flat(turns)])).logits[0, :, 0], 0
            for prompt, response in turns:
                at += len(prompt)
                found = next(values)
                expected = stock[at - 1 : at + len(response)]
                assert found[: len(expected)].tolist() == pytest.approx(expected.tolist(), abs=1e-5)
                assert found.dtype == torch.float32 and not found[len(expected) :].any()
                at += len(response)
