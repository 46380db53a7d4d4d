"""bench/peers.py: the scripts' losses are TRL's, where TRL is installed; ratios and the table."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
import peers


@pytest.mark.parametrize("method", peers.COMPARED)
def test_losses_are_those_of_trl(method):
    pytest.importorskip("trl")
    found = peers.compare(method)
    assert len(found["ours"]) == 10
    assert found["gap"] < peers.GAP


def test_a_gap_shows():
    pytest.importorskip("trl")
    assert peers.compare("sft", learning_rate=1.1e-3)["gap"] > peers.GAP  # a tenth too much


def test_ratios_are_medians_of_pairs():
    row = {
        "seconds": {"ours": [1.0, 2.0, 30.0], "trl": [2.0, 5.0, 40.0]},
        "reference_seconds": {"ours": 1.0, "trl": 0.0},
        "peak_memory_mb": {"ours": 30.0, "trl": 40.0},
    }
    assert peers.ratios(row) == {"trl": {"seconds": 0.5, "with_reference": 0.775, "memory": 0.75}}
