"""rm.py: the Bradley-Terry loss against loops, the pairs of graded rows, and the token at which a score is read."""

import json
import math
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rm
import toy

ARGS = SimpleNamespace(split="train", seed=0, max_prompt_tokens=8, max_response_tokens=6, trust_remote_code=False)


@pytest.mark.parametrize("seed", range(3))
def test_reward_loss_and_its_gradient_equal_a_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (torch.randn(11, generator=generator, dtype=torch.float64) * 3 for _ in range(2))
    chosen.requires_grad_(), rejected.requires_grad_()
    loss, right = rm.reward_loss(chosen, rejected, 40)
    loss.backward()
    gaps = (chosen - rejected).tolist()
    assert loss.item() == pytest.approx(sum(math.log1p(math.exp(-gap)) for gap in gaps) / 40, rel=1e-12)
    assert int(right) == sum(gap > 0 for gap in gaps)
    expected = [-1 / (1 + math.exp(gap)) / 40 for gap in gaps]
    assert chosen.grad.tolist() == pytest.approx(expected, rel=1e-9)
    assert rejected.grad.tolist() == pytest.approx([-g for g in expected], rel=1e-9)


def test_reward_loss_by_hand():
    # gaps 0 and log 3: sigmoid 1/2 and 3/4, so (log 2 + log 4/3) / 2 = log(8/3) / 2; a tie is not correctly ordered
    loss, right = rm.reward_loss(torch.tensor([1.0, math.log(3)]), torch.tensor([1.0, 0.0]), 2)
    assert float(loss) == pytest.approx(0.490415, abs=1e-6) and int(right) == 1


def test_reward_loss_is_finite_for_large_gaps_and_needs_only_differences():
    loss, _ = rm.reward_loss(torch.tensor([-500.0, 500.0]), torch.tensor([500.0, -500.0]), 1)
    assert float(loss) == pytest.approx(1000)
    chosen, rejected = torch.tensor([0.5, -1.0]), torch.tensor([0.25, 2.0])
    moved, still = rm.reward_loss(chosen + 8, rejected + 8, 2), rm.reward_loss(chosen, rejected, 2)
    assert [float(x) for x in moved] == pytest.approx([float(x) for x in still])
    empty, right = rm.reward_loss(torch.zeros(0), torch.zeros(0), 2)  # a micro-batch of filling rows
    assert float(empty) == 0 and int(right) == 0


def test_ordered_pairs_are_all_pairs_with_different_scores():
    assert rm.ordered_pairs([1.0, 3.0, 1.0]) == [(1, 0), (1, 2)]
    assert rm.ordered_pairs([2.0, 2.0]) == rm.ordered_pairs([1.0]) == rm.ordered_pairs([]) == []
    rng = random.Random(0)
    for _ in range(20):
        scores = [rng.randint(0, 3) for _ in range(rng.randint(2, 7))]
        found = rm.ordered_pairs(scores)
        assert all(scores[better] > scores[worse] for better, worse in found) and len(set(found)) == len(found)
        ties = sum(scores[i] == scores[j] for i in range(len(scores)) for j in range(i))
        assert len(found) == math.comb(len(scores), 2) - ties


def questions(tmp_path, *rows):
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    args, tok = SimpleNamespace(**vars(ARGS), data=str(path)), toy.tokenizer()
    return list(rm.load_data(args, "graded", lambda row: rm.sequences_of(tok, row, True, args)))


def test_pairs_and_graded_rows_become_questions_and_equal_scores_none(tmp_path):
    ask = "how is the soup ?"
    graded = [{"text": "it is good .", "score": 2}, {"text": "it is bad .", "score": -1.5}, {"text": "it", "score": 2}]
    found = questions(
        tmp_path,
        {"prompt": ask, "chosen": "it is good .", "rejected": "it is bad ."},
        {"prompt": ask, "responses": graded},
        {"prompt": ask, "responses": [graded[0], graded[2]]},
    )
    tok = toy.tokenizer()
    texts = [[tok.decode(sequence) for sequence in sequences] for _, sequences, _ in found]
    start = f"<user> {ask} <assistant>"
    pair = [f"{start} it is good . <eos>", f"{start} it is bad . <eos>"]
    assert texts == [pair, [*pair, f"{start} it <eos>"]]
    assert [scores for *_, scores in found] == [[1.0, -1.0], [2.0, -1.5, 2.0]]
    assert found[0][0] == found[1][0]  # held out together


def test_a_response_that_was_cut_has_no_end_token(tmp_path):
    texts = [("it is good .", True), ("the soup is", False), ("", False), ("it", None)]
    row = {"prompt": "how is the soup ?"}
    row["responses"] = [{"text": t, "score": i, "complete": c} for i, (t, c) in enumerate(texts)]
    row["responses"][-1].pop("complete")
    ((_, sequences, _),) = questions(tmp_path, row)
    tok, ended = toy.tokenizer(), [True, False, True, True]  # a cut one of no token keeps its end: something is read
    assert [sequence[-1] == tok.eos_token_id for sequence in sequences] == ended
    assert tok.decode(sequences[1]) == "<user> how is the soup ? <assistant> the soup is"


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_a_decoder_is_read_at_its_last_token_whatever_the_padding(pad_is_eos):
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(0)
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_labels": 1}
    model = LlamaForSequenceClassification(toy.config(**tiny)).eval()
    rng = random.Random(0)
    sequences = [[rng.randint(5, 90) for _ in range(n - 1)] + [1] for n in (1, 9, 4, 6)]  # all end in EOS = 1
    with torch.no_grad():
        found = rm.RewardModel(model, True)(*rm.collate_scored(sequences, int(pad_is_eos), "cpu"))
        for reward, sequence in zip(found.tolist(), sequences, strict=True):
            hidden = model.model(torch.tensor([sequence])).last_hidden_state[0, -1]
            assert reward == pytest.approx(float(model.score(hidden)), abs=1e-5)
            stock = model(torch.tensor([sequence])).logits  # pad = 0 is not in it: the stock class agrees
            assert reward == pytest.approx(float(stock), abs=1e-5)
    assert found.dtype == torch.float32 and found.shape == (4,)


def test_an_encoder_scores_text_pairs_without_their_padding():
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    tiny = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_labels": 1,
    }
    config = BertConfig(vocab_size=50, max_position_embeddings=32, **tiny)
    model = BertForSequenceClassification(config).eval()
    sequences = [[2, *range(5, 5 + n), 3] for n in (1, 9, 4)]
    with torch.no_grad():
        found = rm.RewardModel(model, False)(*rm.collate_scored(sequences, 0, "cpu"))
        alone = [float(model(torch.tensor([sequence])).logits) for sequence in sequences]
    assert found.tolist() == pytest.approx(alone, abs=1e-5)


def test_decoders_and_encoders_are_told_apart(tmp_path):
    from transformers import BertConfig, DebertaV2Config

    for name, config in {"a": toy.config(), "b": BertConfig(), "c": DebertaV2Config()}.items():
        config.save_pretrained(tmp_path / name)
    assert [rm.is_decoder(str(tmp_path / name), ARGS) for name in "abc"] == [True, False, False]


def test_a_text_pair_is_cut_from_its_far_ends():
    tok = toy.tokenizer()
    tok.cls_token, tok.sep_token = "<user>", "<assistant>"
    prompt, text = "well , how is the soup ? is it good ?", "it is good and it is great ."
    expected = "<user> is the soup ? is it good ? <assistant> it is good and it is <assistant>"  # 8 and 6 tokens
    assert tok.convert_ids_to_tokens(rm.encode_pair(tok, prompt, text, ARGS)) == expected.split()
    chat = [{"role": "user", "content": "is it good"}, {"role": "assistant", "content": "it is"}]
    expected = "<user> is it good it is <assistant> it <assistant>"
    assert tok.convert_ids_to_tokens(rm.encode_pair(tok, chat, "it", ARGS)) == expected.split()


def test_pad_is_made_distinct_from_eos():
    tok = toy.tokenizer()
    tok.pad_token = tok.eos_token
    rm.distinct_pad(tok)
    assert tok.pad_token_id != tok.eos_token_id and tok.pad_token == "<pad>"
    rm.distinct_pad(tok)  # and left alone when it is
    assert tok.pad_token == "<pad>"
