"""Packed micro-batches: nothing lost, nothing twice, within the budget, and balanced over ranks."""

import math
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dvpo
import gvm
import ppo
import rm
import sft
import vcb

DOC = (Path(__file__).resolve().parent.parent / "docs" / "speed.md").read_text(encoding="utf-8")


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


def useful(script: str, padding: bool = False, times: int = 1) -> float:
    """Mean useful share on eight ranks over 40 steps, with the script's own batch size for real models, `times` over, and
    lengths cut as its settings for real models cut them."""
    rng, module = random.Random(2), {"sft": sft, "rm": rm, "gvm": gvm, "dvpo": dvpo, "ppo": ppo, "vcb": vcb}[script]
    size, sizes = times * module.PAPER.get("batch_size", module.Args.batch_size), ()
    rows = lambda count: ragged(rng, count, module.PAPER["max_response_tokens"])
    if script == "rm":  # UltraFeedback's four responses to a prompt
        sizes = (lambda row: [len(row[0]) + len(r) for r in row[2]],)
        draw = lambda: [(prompt, [True], [r for _, r in rows(4)]) for prompt, _ in rows(size)]
    elif script == "gvm":  # one pair of tau, cut to 512 tokens, and x, y
        sizes = (gvm.conversation_size,)
        draw = lambda: [([], [True], [(p[:256], r[:256]), (q, s)]) for (p, r), (q, s) in zip(rows(size), rows(size))]
    elif script == "vcb":  # eight responses to a prompt
        sizes = (vcb.group_sizes,)
        draw = lambda: [([], [True], SimpleNamespace(rows=[(p, r) for _, r in rows(8)])) for p, _ in rows(size)]
    else:
        draw = lambda: rows(size)
    return sum(module.micro_batches(draw(), 0, 8, settings(padding=padding), *sizes)[1] for _ in range(40)) / 40


def test_useful_tokens_are_those_that_the_docs_tell():
    """docs/speed.md: | script | padded | packed | packed, four times the batch |"""
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", DOC, re.M)
    assert [name for name, *_ in rows] == ["sft", "rm", "gvm", "dvpo", "ppo", "vcb"]
    for name, padded, packed, larger in rows:
        found = useful(name, padding=True), useful(name), useful(name, times=4)
        assert [f"{x:.2f}" for x in found] == [padded, packed, larger], name
        assert found[0] < found[1] and found[2] > 0.9
        assert found[1] > 0.9 or name in ("sft", "rm")  # a rank has two sequences, or one question, a step
