"""Packed micro-batches: nothing lost, nothing twice, within the budget, and balanced over ranks."""

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
import ppo
import rm
import sft
import vcb


def settings(micro_tokens=4096, padding=False):
    return SimpleNamespace(micro_tokens=micro_tokens, padding=padding)


def ragged(rng, rows, limit=1024):
    """(prompt, response) lengths as of UltraFeedback: medians 90 and 250 tokens, long tails, cut at `limit`."""
    draw = lambda median, sigma: max(4, min(limit, round(rng.lognormvariate(math.log(median), sigma))))
    return [(range(draw(90, 1.0)), range(draw(250, 0.75))) for _ in range(rows)]


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("room", [1, 300, 2048, 10**9])
def test_micro_batches_hold_every_row_once_within_the_budget(padding, room):
    rng = random.Random(0)
    for world in (1, 2, 8):
        for rows in (1, 3, 16, 33):
            batch = [(*row, i) for i, row in enumerate(ragged(rng, rows))]
            ranks = [sft.micro_batches(batch, rank, world, settings(room, padding)) for rank in range(world)]
            assert len(ranks[0][0]) <= math.ceil(rows / world)
            assert len({len(micros) for micros, _ in ranks}) == 1 and len({useful for _, useful in ranks}) == 1
            micros = [micro for found, _ in ranks for micro in found]
            seen = [i for micro in micros for _, response, i in micro if response]
            assert sorted(seen) == list(range(rows)) and all(micros)
            for micro in micros:
                lengths = [len(p) + len(r) for p, r, _ in micro]
                _, count, width = sft.layout(lengths, not padding, room)
                assert len(micro) == 1 or count * width <= room
                assert not [r for _, r, _ in micro if not r] or len(micro) == 1  # what fills up stands alone
            assert 0 < ranks[0][1] <= 1


def test_layout_keeps_sequences_apart_and_wastes_little():
    rng = random.Random(1)
    for _ in range(50):
        lengths = [len(p) + len(r) for p, r in ragged(rng, rng.randint(1, 24))]
        places, rows, width = sft.layout(lengths, True, 10**9)
        cells = {(row, column + k) for (row, column), n in zip(places, lengths, strict=True) for k in range(n)}
        assert len(cells) == sum(lengths) and all(row < rows and column < width for row, column in cells)
        assert rows * width <= len(lengths) * max(lengths)
        assert sum(lengths) / (rows * width) > (0.85 if len(lengths) > 8 else 0.5)
    places, rows, width = sft.layout([200] * 64, True, 4096)  # more than there is room for: not one row of all
    assert (rows, width) == (64, 200)
    assert sft.layout([5, 3, 9], False) == ([(0, 0), (1, 0), (2, 0)], 3, 9)


def test_lay_out_counts_positions_from_each_sequence_and_fills_rows_on_the_right():
    sequences = [[7] * 5, [8] * 2, [9] * 3, [6] * 9]
    ids, positions, starts = sft.lay_out(sequences, 0, settings())
    flat, at = ids.flatten(), positions.flatten()
    for sequence, start in zip(sequences, starts, strict=True):
        assert flat[start : start + len(sequence)].tolist() == sequence
        assert at[start : start + len(sequence)].tolist() == list(range(len(sequence)))
    assert (ids > 0).sum() == 19 and not at[flat == 0].any()
    ids, positions, starts = sft.lay_out(sequences, 0)
    assert ids.shape == (4, 9) and positions is None and starts == [0, 9, 18, 27]


def share(module, rows, batch_size, sizes=None, world=8, steps=40):
    rest = (sizes,) if sizes else ()
    found = [
        module.micro_batches(rows[at : at + batch_size], 0, world, settings(), *rest)[1]
        for at in range(0, steps * batch_size, batch_size)
    ]
    return sum(found) / len(found)


# Of sft and rm a rank has two sequences and one question a step: their own differences in length are waited for.
SHARES = {"sft": 0.84, "rm": 0.62, "gvm": 0.9, "dvpo": 0.9, "ppo": 0.9, "vcb": 0.9}


@pytest.mark.parametrize("script", SHARES)
def test_useful_tokens_on_eight_ranks(script):
    """With each script's own batch size and lengths."""
    rng, n = random.Random(2), 40
    if script in ("sft", "dvpo", "ppo"):
        module = {"sft": sft, "dvpo": dvpo, "ppo": ppo}[script]
        size = module.PAPER.get("batch_size", module.Args.batch_size)
        found = share(module, ragged(rng, n * size), size)
    elif script == "rm":
        size = rm.PAPER.get("batch_size", rm.Args.batch_size)
        four = lambda: [r for _, r in ragged(rng, 4, 512)]
        rows = [([], [True], [range(len(p) + len(r)) for r in four()]) for p, _ in ragged(rng, n * size, 512)]
        found = share(rm, rows, size, lambda row: list(map(len, row[2])))
    elif script == "gvm":
        size = gvm.PAPER.get("batch_size", gvm.Args.batch_size)
        turns = [[(p[:128], r[:384]), (q, s)] for (p, r), (q, s) in zip(*[iter(ragged(rng, 2 * n * size, 512))] * 2)]
        found = share(gvm, [([], [True], of) for of in turns], size, gvm.conversation_size)
    else:
        size = vcb.PAPER["batch_size"]
        groups = [SimpleNamespace(rows=[(p, r) for _, r in ragged(rng, 8, 256)]) for p, _ in ragged(rng, n * size, 512)]
        found = share(vcb, [([], [True], group) for group in groups], size, vcb.group_sizes)
    assert found > SHARES[script]


def test_with_eight_sequences_a_rank_nine_of_ten_tokens_are_useful():
    rng = random.Random(3)
    assert share(sft, ragged(rng, 40 * 64), 64) > 0.94
    rows = [
        ([], [True], [range(len(p) + len(r)) for _, r in ragged(rng, 4, 512)]) for p, _ in ragged(rng, 40 * 32, 512)
    ]
    assert share(rm, rows, 32, lambda row: list(map(len, row[2]))) > 0.9


def test_flash_attention_is_given_one_row(monkeypatch):
    """flash-attn's variable-length path takes packed sequences in one row: the same flat places, the same positions."""
    from kernels.head import hidden_states

    class Backbone:
        config = SimpleNamespace(_attn_implementation="flash_attention_2")

        def __call__(self, input_ids, position_ids=None, use_cache=None):
            given.append((input_ids.shape, position_ids))
            return SimpleNamespace(last_hidden_state=input_ids[..., None].float())

    given = []
    ids, positions, _ = sft.lay_out([[7] * 5, [8] * 2, [9] * 3, [6] * 9], 0, settings())
    assert torch.equal(hidden_states(Backbone(), ids, positions)[:, 0], ids.flatten().float())
    assert given[0][0] == (1, ids.numel()) and torch.equal(given[0][1][0], positions.flatten())
