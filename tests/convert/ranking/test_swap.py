"""Twin of convert/ranking/swap.py."""

import pytest
import torch
from demo_pair import demo_windows
from matters import IMPORTANT, teacher_and_twin

from convert.ranking.hybrid import Hybrid
from convert.ranking.swap import greedy, losses, recall, swap


@pytest.fixture(scope="module")
def pair():
    return teacher_and_twin()


@pytest.fixture(scope="module")
def windows():
    return demo_windows(3, 48)


def test_swapping_the_layer_that_matters_costs_most(pair, windows):
    scores = [row["score"] for row in swap(*pair, windows)]
    others = [score for layer, score in enumerate(scores) if layer != IMPORTANT]
    assert scores[IMPORTANT] > 5 * max(others)
    assert min(scores) > 0


def test_greedy_gives_the_layer_that_matters_its_attention_first(pair, windows):
    found = greedy(*pair, windows)
    assert found[0]["layer"] == IMPORTANT
    assert sorted(row["layer"] for row in found) == list(range(6))


def test_greedy_takes_the_best_layer_of_every_round(pair, windows):
    found, hybrid = greedy(*pair, windows), Hybrid(*pair, windows)
    swapped = set(range(6))
    for row in found:
        assert row["score"] == pytest.approx(hybrid.divergence(swapped), rel=1e-6)
        left = {layer: hybrid.divergence(swapped - {layer}) for layer in swapped}
        assert row["kl"] == pytest.approx(min(left.values()), rel=1e-6)
        assert left[row["layer"]] == min(left.values())
        swapped.remove(row["layer"])
    assert found[-1]["kl"] == pytest.approx(0, abs=1e-6)


def test_recall_is_the_rise_on_the_copy_less_the_rise_on_the_passage(pair, windows):
    found = recall(*pair, windows)
    assert all(row["score"] == pytest.approx(row["recalled"] - row["language"]) for row in found)
    assert [row["layer"] for row in found] == list(range(6))
    ids = torch.cat([windows.reshape(-1, 24)] * 2, 1)[:3]
    with torch.no_grad():
        logits = pair[0](ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, 31:-1].flatten(0, 1), ids[:, 32:].flatten()).item()
    before = losses(pair[0], Hybrid(*pair, ids).states(set()), ids, {"recalled": slice(32, 48)})
    assert before["recalled"] == pytest.approx(expected, rel=1e-5)


def test_each_method_tells_how_far_it_is(pair, windows):
    for method, expected in ((swap, 6), (recall, 6), (greedy, 21)):
        told = []
        method(*pair, windows[:1], told.append)
        assert sum(told) == expected
