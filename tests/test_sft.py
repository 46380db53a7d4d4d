"""sft.py: the loss against loops, where log-probs are read, rows of every layout and file that the scripts take."""

import gzip
import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sft
import toy
from eval.samples import load_rows

ASK = "how is the soup ?"
ARGS = SimpleNamespace(max_prompt_tokens=64, max_response_tokens=8)


def message(role, content):
    return {"role": role, "content": content}


# ------------------------------------------------------------------------------------------------------- the mathematics
def test_schedule_warms_up_linearly_and_decays():
    factors = {kind: [sft.schedule(s, 10, 2, kind) for s in range(10)] for kind in ("constant", "linear", "cosine")}
    for kind, decay in {
        "constant": lambda done: 1,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: math.cos(math.pi * done / 2) ** 2,  # = (1 + cos(pi done)) / 2
    }.items():
        expected = [1 / 2, 1] + [decay(k / 8) for k in range(8)]
        assert factors[kind] == pytest.approx(expected)
        assert min(factors[kind]) > 0 and sft.schedule(10, 10, 2, kind) == pytest.approx(decay(1), abs=1e-12)
    assert factors["linear"][6] == factors["cosine"][6] == pytest.approx(0.5)  # 4 of 8 steps after the warm-up
    assert sft.schedule(0, 1, 0, "cosine") == sft.schedule(0, 10, 0, "linear") == 1


def test_an_epochs_order_is_a_permutation_that_follows_seed_and_epoch():
    order = sft.shuffled(50, 1, 2)
    random.seed(99)  # the global generator has no part in it
    assert sorted(order) == list(range(50)) and order == sft.shuffled(50, 1, 2)
    assert order != sft.shuffled(50, 1, 3) and order != sft.shuffled(50, 2, 2)


# ---------------------------------------------------------------------------------------------------- tokens and batches
def test_encode_is_the_rendered_prompt_and_the_responses_own_tokens_with_eos():
    tok = toy.tokenizer()
    prompt, response = sft.encode(tok, {"prompt": ASK, "completion": "it is good ."}, "completion", ARGS)
    assert tok.convert_ids_to_tokens(prompt) == f"<user> {ASK} <assistant>".split()
    assert tok.decode(response) == "it is good . <eos>"
    whole = tok.apply_chat_template([message("user", ASK), message("assistant", "it is good .")], return_dict=False)
    assert prompt + response == whole
    assert sft.encode(tok, {"prompt": ASK}, None, ARGS) == (prompt, [])
    as_messages = {
        "prompt": [message("user", ASK)],
        "chosen": "it is good .",
    }  # SFT on preferences takes the better one
    assert sft.encode(tok, sft.canonical(as_messages), "completion", ARGS) == (prompt, response)


def test_a_chat_prompt_keeps_its_turns():
    tok = toy.tokenizer()
    chat = [message("user", ASK), message("assistant", "it is good ."), message("user", "how is the bread ?")]
    prompt, _ = sft.encode(tok, {"prompt": chat}, None, ARGS)
    expected = f"<user> {ASK} <assistant> it is good . <eos> <user> how is the bread ? <assistant>"
    assert tok.convert_ids_to_tokens(prompt) == expected.split()


def test_a_cut_response_has_no_eos_and_one_that_just_fits_has():
    tok = toy.tokenizer()
    for words, ends in ((7, True), (8, False), (30, False)):
        row = {"prompt": ASK, "completion": " ".join(["it"] * words)}
        _, response = sft.encode(tok, row, "completion", ARGS)
        assert (
            len(response) == 8 and (response[-1] == tok.eos_token_id) == ends and tok.eos_token_id not in response[:-1]
        )


def test_a_long_prompt_stops_or_is_left_out(tmp_path, capsys):
    tok, path = toy.tokenizer(), tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("how", ASK, "it")))
    short = {"data": str(path), "split": "train", "seed": 0, "max_prompt_tokens": 3, "max_response_tokens": 8}
    asked = lambda **flags: sft.load_data(
        args := SimpleNamespace(**short | flags), "prompts", lambda row: [sft.encode(tok, row, None, args)[0]]
    )
    with pytest.raises(ValueError, match="prompt has 7 tokens, more than --max_prompt_tokens 3"):
        sft.encode(tok, {"prompt": ASK}, None, SimpleNamespace(**short))
    with pytest.raises(SystemExit) as ended:
        asked()
    error = capsys.readouterr().err
    assert ended.value.code == 2 and f"error: {path} row 2: field prompt has 7 tokens" in error
    assert "Mend the row, or leave such rows out with --skip_bad_rows" in error
    found = asked(skip_bad_rows=True)
    assert [tok.decode(prompt) for prompt in found] == ["<user> how <assistant>", "<user> it <assistant>"]
    assert f"{path}: 1 of 3 rows left out, the first one because of {path} row 2: " in capsys.readouterr().out
    assert len(asked(max_prompt_tokens=7)) == 3


@pytest.mark.parametrize("seed", range(3))
def test_collate_agrees_with_a_loop_even_if_pad_is_eos(seed):
    rng, eos = random.Random(seed), 1
    lengths = [(1, 1), (9, 6), (4, 0)] + [(rng.randint(1, 9), rng.randint(1, 6)) for _ in range(4)]  # 0: an empty row
    rows = [([rng.randint(2, 50) for _ in range(p)], ([rng.randint(2, 50) for _ in range(r)] + [eos])[-r:] * bool(r))
            for p, r in lengths]  # fmt: skip
    batch = sft.collate(rows, pad_token_id=eos)
    flat, target, cell = batch.input_ids.flatten().tolist(), iter(batch.target.tolist()), iter(batch.cell.tolist())
    predict = iter(batch.predict.tolist())
    for i, (prompt, response) in enumerate(rows):
        whole = prompt + response
        assert batch.input_ids[i].tolist() == whole + [eos] * (batch.input_ids.shape[1] - len(whole))
        assert batch.response_mask[i].tolist() == [t < len(response) for t in range(batch.response_mask.shape[1])]
        for t, token in enumerate(response):
            at = next(predict)
            assert divmod(at, batch.input_ids.shape[1]) == (i, len(prompt) + t - 1)  # the token before y_t predicts it
            assert flat[at + 1] == next(target) == token
            assert divmod(next(cell), batch.response_mask.shape[1]) == (i, t)
        assert not response or response[-1] == eos == flat[at + 1]  # EOS is a target
    assert next(predict, None) is next(target, None) is next(cell, None) is None


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = toy.config(hidden_size=16, intermediate_size=32, num_hidden_layers=2)
    model = LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = [toy.tokenizer().eos_token_id]  # a list, as load_model leaves it
    return model


def test_policy_log_probs_equal_a_loop_over_single_sequences(model):
    from copy import deepcopy

    rng = random.Random(4)
    lengths = [(1, 1), (9, 6)] + [(rng.randint(1, 9), rng.randint(1, 6)) for _ in range(3)]
    rows = [
        ([rng.randint(5, 90) for _ in range(p)], [rng.randint(5, 90) for _ in range(r - 1)] + [1]) for p, r in lengths
    ]
    batch = sft.collate(rows, 0)
    with torch.no_grad():
        for temperature in (1.0, 0.7):
            logp = sft.Policy(deepcopy(model))(batch, temperature)
            assert logp.dtype == torch.float32 and not logp[~batch.response_mask].any()
            for i, (prompt, response) in enumerate(rows):
                logits = model(torch.tensor([prompt + response])).logits[0].double() / temperature
                for t, token in enumerate(response):
                    expected = logits[len(prompt) + t - 1].log_softmax(-1)[token]
                    assert float(logp[i, t]) == pytest.approx(float(expected), abs=1e-5)


def test_loss_and_its_gradient_equal_a_loop_and_the_stock_loss(model):
    """The loss with known weights (the SFT objective): NLL of response tokens over the whole step's token count."""
    from copy import deepcopy

    rng = random.Random(5)
    rows = [
        ([rng.randint(5, 90) for _ in range(p)], [rng.randint(5, 90) for _ in range(r)])
        for p, r in ((1, 1), (9, 6), (4, 3))
    ]
    tokens = sum(len(response) for _, response in rows)
    policy, exact = deepcopy(model), deepcopy(model).double()
    wrapped = sft.Policy(policy)
    parts = [wrapped(sft.collate(part, 0), token_weight=1 / tokens) for part in (rows[:1], rows[1:])]
    sum(parts).backward()
    expected = 0
    for prompt, response in rows:
        logp = exact(torch.tensor([prompt + response])).logits[0].log_softmax(-1)
        expected -= sum(logp[len(prompt) + t - 1, token] for t, token in enumerate(response)) / tokens
    expected.backward()
    assert sum(parts).item() == pytest.approx(expected.item(), rel=1e-6)
    for (name, p), q in zip(policy.named_parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-4, atol=1e-6, msg=name)
    batch = sft.collate(rows, 0)
    labels = torch.full_like(batch.input_ids, -100)
    for i, (prompt, response) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    with torch.no_grad():
        assert model(batch.input_ids, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


# -------------------------------------------------------------------------------------------------------- rows and files
def test_plain_rows_keep_their_fields():
    for row in (
        {"prompt": ASK, "completion": "it is good ."},
        {"prompt": ASK, "chosen": "it is good .", "rejected": "it is bad ."},
        {"prompt": ASK, "responses": [{"text": "it is good .", "score": 1.0, "policy": "p0"}]},
        {"prompt": [message("user", ASK)]},
    ):
        before = json.dumps(row)
        found = sft.canonical(row)
        of = "chosen" if "chosen" in row else "best" if "responses" in row else "completion"
        answer = {"completion": "it is good ."} if len(row) > 1 else {}  # SFT imitates the chosen, or the best
        assert found == row | answer | {"answer": of} and json.dumps(row) == before


def test_messages_become_prompt_and_completion():
    chat = [message("system", "be kind"), message("user", "a"), message("assistant", "b")]
    row = sft.canonical({"messages": chat})
    assert (row["prompt"], row["completion"]) == (chat[:2], "b")
    chat += [message("user", "c"), message("assistant", "d")]  # of several answers the last is learned
    row = sft.canonical({"messages": chat})
    assert (row["prompt"], row["completion"]) == (chat[:4], "d")


def test_ultrafeedback_binarized_becomes_a_pair():
    ask = message("user", "a")
    row = {
        "prompt": "a",
        "prompt_id": "x",
        "chosen": [ask, message("assistant", "good")],
        "rejected": [ask, message("assistant", "bad")],
        "messages": [ask, message("assistant", "good")],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    }
    found = sft.canonical(row)
    assert (found["prompt"], found["chosen"], found["rejected"], found["completion"]) == ([ask], "good", "bad", "good")
    alone = {"prompt": "a", "chosen": [message("assistant", "good")], "rejected": [message("assistant", "bad")]}
    pair = {"prompt": "a", "chosen": "good", "rejected": "bad"}
    assert sft.canonical(alone) == pair | {"completion": "good", "answer": "chosen"}


def test_ultrafeedback_becomes_graded_responses_by_named_policies():
    completions = [
        {"model": "llama-2-7b", "response": "one", "overall_score": 7.0, "fine-grained_score": 3.25, "critique": "..."},
        {"model": "gpt-4", "response": "two", "overall_score": 8.5, "fine-grained_score": None},
        {"model": "alpaca", "response": "three", "overall_score": 2.0},
    ]
    row = sft.canonical({"source": "sharegpt", "instruction": "a", "completions": completions})
    assert row["prompt"] == "a"
    assert row["responses"] == [
        {"text": "one", "score": 3.25, "policy": "llama-2-7b"},
        {"text": "two", "score": 8.5, "policy": "gpt-4"},
        {"text": "three", "score": 2.0, "policy": "alpaca"},
    ]


def test_sft_on_graded_rows_takes_the_best_and_nulls_are_no_fields():
    for scores in ((-1.0, 0.0), (-1, 0, None), (None, -5, -7)):
        responses = [{"text": str(score), "score": score} for score in scores]
        best = str(max(score for score in scores if score is not None))
        assert sft.canonical({"prompt": "a", "responses": responses, "chosen": None})["completion"] == best
        cut = [r | {"complete": r["text"] != best} for r in responses]  # the best was cut: the next is imitated
        others = [score for score in scores if score is not None and str(score) != best]
        assert sft.canonical({"prompt": "a", "responses": cut})["completion"] == str(max(others))
        cut = [r | {"complete": False} for r in responses]  # all were: the best of them
        assert sft.canonical({"prompt": "a", "responses": cut})["completion"] == best


def test_hh_transcripts_are_split_before_the_last_answer():
    head = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how is the soup?\n\nAssistant:"
    row = sft.canonical({"chosen": head + " It is good.\n\nReally.", "rejected": head + " No."})
    turns = [message("user", "hi"), message("assistant", "hello"), message("user", "how is the soup?")]
    assert (row["prompt"], row["chosen"], row["rejected"]) == (turns, "It is good.\n\nReally.", "No.")


@pytest.fixture
def numbered(tmp_path):
    rows = [{"prompt": f"p{i}", "completion": "x", "n": i, "answer": "completion"} for i in range(10)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


@pytest.mark.parametrize(
    ("split", "kept"),
    [
        ("train", range(10)),
        ("train[2:5]", range(2, 5)),
        ("train[7:]", range(7, 10)),
        ("train[8:99]", range(8, 10)),
        ("test[5:5]", ()),
    ],
)
def test_split_slices(numbered, split, kept):
    path, rows = numbered
    found = load_rows(str(path), split, "sft")
    assert [row for row, _ in found] == [rows[i] for i in kept]
    assert [where for _, where in found] == [
        f"{path} row {i + 1}" for i in kept
    ]  # the place in the file, not the slice


def test_shares_are_cut_from_one_shuffle_and_lose_no_row(numbered):
    path, _ = numbered
    parts = [[w for _, w in load_rows(str(path), f"train[{cut}]", "sft")] for cut in (":30%", "30%:80%", "80%:")]
    assert [len(part) for part in parts] == [3, 5, 2]
    joined = [where for part in parts for where in part]
    assert sorted(joined) == sorted(f"{path} row {i + 1}" for i in range(10)) and joined != sorted(joined)
    assert [len(load_rows(str(path), f"train[{cut}]", "sft")) for cut in (":35%", "35%:")] == [3, 7]


def test_a_split_that_is_not_understood_stops(numbered):
    for split in ("train[:-5]", "train[", "train[1]", ""):
        with pytest.raises(SystemExit):
            load_rows(str(numbered[0]), split, "sft")


def test_every_file_format_gives_the_same_rows(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"prompt": [message("user", f"ä{i}")], "completion": "x\ny", "score": i / 2, "answer": "completion"}
        for i in range(4)
    ]
    lines = "\n".join(json.dumps(row) for row in rows) + "\n"
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "b.jsonl").write_text("\n" + lines)  # an empty line is no row
    (tmp_path / "c.json").write_text(lines)
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(lines)
    with gzip.open(tmp_path / "e.json.gz", "wt") as file:
        file.write(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "f.parquet")
    for path in sorted(tmp_path.iterdir()):
        assert [row for row, _ in load_rows(str(path), "train", "sft")] == rows, path.name


def test_text_may_hold_characters_that_unicode_calls_line_ends(tmp_path):
    # valid unescaped in JSON, but for \f
    row = {"prompt": "a\u2028b\x85c", "completion": "d\x0ce", "answer": "completion"}
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row, ensure_ascii=False) + "\n") * 2, encoding="utf-8")
    assert [found for found, _ in load_rows(str(path), "train", "sft")] == [row, row]


def test_a_split_field_chooses_rows_and_names_are_joined_by_commas(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text("".join(json.dumps({"prompt": p, "split": s}) + "\n" for p, s in (("1", "train"), ("2", "test"))))
    b.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in "34"))
    assert [row["prompt"] for row, _ in load_rows(f"{a}, {b}", "train", "prompts")] == ["1", "3", "4"]
    assert [row["prompt"] for row, _ in load_rows(f"{a},{b}", "test[:1]", "prompts")] == ["2", "3"]
    order = sft.shuffled(len(toy.rows("prompts")), 0, "split")
    half = [toy.rows("prompts")[i] for i in order[: len(order) // 2]]
    found = load_rows(f"{b},toy", "train[:50%]", "prompts")  # that part of each
    assert [row["prompt"] for row, _ in found] == [found[0][0]["prompt"]] + [row["prompt"] for row in half]
    assert found[0][0]["prompt"] in "34"


# ------------------------------------------------------------------------------------------------- every answer of a talk
def test_each_answer_of_a_conversation_is_learned_and_nothing_else(tmp_path):
    tokenizer, said = toy.tokenizer(), ("the soup is good .", "the bread is not good .", "it is very bad .")
    asked = toy.prompts("sft")[:3]
    chat = [message(role, text) for pair in zip(asked, said) for role, text in zip(("user", "assistant"), pair)]
    row = sft.canonical({"messages": chat})
    found = {tuple(prompt): response for prompt, response, _ in sft.answers(tokenizer, row, LIMITS_ALL)}
    end = tokenizer.eos_token_id
    for i, text in enumerate(said):
        prompt = tokenizer.apply_chat_template(chat[: 2 * i + 1], add_generation_prompt=True)["input_ids"]
        assert found.pop(tuple(prompt)) == [*tokenizer(text, add_special_tokens=False)["input_ids"], end]
    assert not found
    last = sft.answers(tokenizer, row, SimpleNamespace(**vars(LIMITS_ALL) | {"turns": "last"}))
    assert len(last) == 1 and last[0][1][:-1] == tokenizer(said[-1], add_special_tokens=False)["input_ids"]
    # a prompt that is a conversation gives its answers as context only: nobody says that they are to be imitated
    row = sft.canonical({"prompt": chat[:-1], "completion": said[-1]})
    assert len(sft.answers(tokenizer, row, LIMITS_ALL)) == 1
    # and through a run: tokens of a step are those of all three answers
    path = tmp_path / "talks.jsonl"
    path.write_text(json.dumps({"messages": chat}) + "\n")
    out = sft.train(
        sft.Args(data=str(path), output_dir=str(tmp_path / "out"), batch_size=3, steps=1, max_prompt_tokens=200)
    ).parent
    (step,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert step["tokens"] == sum(len(text.split()) + 1 for text in said)


LIMITS_ALL = SimpleNamespace(max_prompt_tokens=200, max_response_tokens=64, turns="all")


def test_a_conversation_that_ends_with_the_user_gives_nothing_to_imitate():
    chat = [message("user", "how is the soup ?"), message("assistant", "good ."), message("user", "and the bread ?")]
    with pytest.raises(ValueError, match="field messages does not end with an answer of the assistant"):
        sft.answers(toy.tokenizer(), sft.canonical({"messages": chat}), LIMITS_ALL)


def test_rows_that_are_learned_are_not_called_held_out(tmp_path, capsys):
    """Such as those of --eval_data toy, whose rows are the ones that are trained on."""
    sft.train(
        sft.Args(output_dir=str(tmp_path / "o"), steps=1, split="train[:40]", eval_data="toy", eval_split="train[:30]")
    )
    assert "--eval_data: 30 of 30 examples are learned as well" in capsys.readouterr().out


def test_held_out_loss_is_the_stock_one_and_changes_no_step(tmp_path):
    from transformers import AutoModelForCausalLM

    rows = [
        {"prompt": x, "completion": toy.write(toy.TRAIN_POLICIES[0], x, random.Random(i))}
        for i, x in enumerate(toy.prompts("sft")[:7])
    ]
    for name, some in (("train", rows[:4]), ("held", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    train = lambda name, **more: sft.train(
        sft.Args(
            data=str(tmp_path / "train.jsonl"),
            output_dir=str(tmp_path / name),
            batch_size=2,
            steps=4,
            learning_rate=1e-3,
            warmup_steps=1,
            **more,
        )
    )
    look = {"eval_data": str(tmp_path / "held.jsonl"), "eval_split": "train", "eval_every": 2}
    final, plain = train("looked", **look), train("plain")
    logged = [
        [json.loads(line) for line in (x.parent / "metrics.jsonl").read_text().splitlines()] for x in (final, plain)
    ]
    assert [row["loss"] for row in logged[0]] == [row["loss"] for row in logged[1]]
    assert [row["step"] for row in logged[0] if "eval_loss" in row] == [2, 4] and not any(
        "eval_loss" in row for row in logged[1]
    )
    tokenizer, model = toy.tokenizer(), AutoModelForCausalLM.from_pretrained(final).double()
    nll, tokens = 0.0, 0
    for row in rows[4:]:
        prompt, response = sft.encode(tokenizer, row, "completion", LIMITS_ALL)
        labels = torch.tensor([[-100] * len(prompt) + response])
        nll += float(model(torch.tensor([prompt + response]), labels=labels).loss) * len(response)
        tokens += len(response)
    summary = json.loads((final.parent / "summary.json").read_text())
    assert summary["eval_loss"] == pytest.approx(nll / tokens, abs=1e-3)
    assert logged[0][3]["eval_loss"] == pytest.approx(nll / tokens, rel=1e-5)


def test_the_best_look_is_kept(tmp_path):
    """With a rate at which the held-out loss falls and rises again: best/ is the model of the lowest, final/ the last."""
    rows = [
        {"prompt": x, "completion": toy.write(toy.TRAIN_POLICIES[0], x, random.Random(i))}
        for i, x in enumerate(toy.prompts("sft")[:12])
    ]
    for name, some in (("train", rows[:4]), ("held", rows[4:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    how = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held.jsonl"), "eval_split": "train"}
    how |= {"batch_size": 4, "learning_rate": 4e-3, "warmup_steps": 1, "eval_every": 2}
    final = sft.train(sft.Args(output_dir=str(tmp_path / "kept"), steps=24, keep_best=True, **how))
    looks = {
        row["step"]: row["eval_loss"]
        for row in map(json.loads, (final.parent / "metrics.jsonl").read_text().splitlines())
        if "eval_loss" in row
    }
    best = min(looks, key=looks.get)
    assert 2 < best < 24 and looks[24] > looks[best] + 0.02
    again = sft.Args(
        model=str(final.parent / "best"), output_dir=str(tmp_path / "again"), steps=1, **how | {"learning_rate": 1e-12}
    )
    found = json.loads((sft.train(again).parent / "summary.json").read_text())["eval_loss"]
    assert found == pytest.approx(looks[best], abs=1e-4)
