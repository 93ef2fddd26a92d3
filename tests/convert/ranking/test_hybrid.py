"""Twin of convert/ranking/hybrid.py."""

import itertools

import pytest
import torch
from demo_pair import demo_windows, fresh_student
from matters import teacher_and_twin

from convert.ranking.hybrid import Hybrid


@pytest.fixture(scope="module")
def pair():
    return teacher_and_twin()


@pytest.fixture(scope="module")
def windows():
    return demo_windows(3, 48)


def written_out(teacher, swapped) -> torch.nn.Module:
    """The same hybrid as a student of its own."""
    kept = [str(layer) for layer in range(len(teacher.model.layers)) if layer not in swapped]
    return fresh_student(teacher, f"layers:{','.join(kept)}" if kept else "none")


@pytest.mark.parametrize("swapped", [set(), {0}, {5}, {1, 4}, {0, 1, 2, 3, 4, 5}])
def test_the_states_are_those_of_a_student_with_these_layers(pair, windows, swapped):
    hybrid, student = Hybrid(*pair, windows), written_out(pair[0], swapped)
    with torch.no_grad():
        expected = student.model(windows).last_hidden_state
    torch.testing.assert_close(hybrid.states(swapped), expected, rtol=1e-4, atol=1e-4)  # float32, six layers
    # compare() leaves out the last token, which predicts nothing
    with torch.no_grad():
        logs = [torch.log_softmax(model(windows).logits[:, :-1], -1) for model in (pair[0], student)]
    kl = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean().item()
    assert hybrid.divergence(swapped) == pytest.approx(kl, rel=1e-3, abs=1e-6)
    assert (kl > 1e-5) == bool(swapped)  # rounding alone makes some 1e-8


def test_where_a_run_starts_from_changes_nothing(pair, windows):
    hybrid = Hybrid(*pair, windows)
    sets = [set(), {5}, {2}, {0, 3}, {1, 2, 3}]
    direct = {frozenset(some): hybrid.states(some) for some in sets}
    for base, some in itertools.product(sets, sets):
        hybrid.rebase(base)
        assert torch.equal(hybrid.states(some), direct[frozenset(some)])
