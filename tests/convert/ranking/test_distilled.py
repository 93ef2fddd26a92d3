"""Twin of convert/ranking/distilled.py."""

import copy

import pytest
import torch
from demo_pair import demo_windows
from matters import IMPORTANT, teacher_and_twin

from convert.ranking.distilled import _kl, _states, _trained, distilled
from convert.ranking.hybrid import Hybrid
from convert.ranking.rank import parse_method
from convert.ranking.swap import greedy
from deltanet_errors import UserError


@pytest.fixture(scope="module")
def pair():
    return teacher_and_twin()


@pytest.fixture(scope="module")
def scored():
    return demo_windows(2, 32, last=True)


def mixers(twin):
    return {layer: block.self_attn for layer, block in enumerate(twin.model.layers)}


def with_goals(teacher, tokens):
    with torch.no_grad():
        return tokens, _states(teacher, {}, tokens)


def test_without_a_step_it_is_the_greedy_choice(pair, scored):
    found, plain = distilled(*pair, demo_windows(2, 32), scored, steps=0), greedy(*pair, scored)
    assert [row["layer"] for row in found] == [row["layer"] for row in plain]
    for mine, its in zip(found, plain):
        assert mine["score"] == pytest.approx(its["score"], rel=1e-4, abs=1e-6)
        assert mine["kl"] == pytest.approx(its["kl"], rel=1e-4, abs=1e-6)


def test_the_states_are_those_of_the_hybrid_and_of_the_teacher(pair, scored):
    teacher, twin = pair
    swapped = {layer: mixer for layer, mixer in mixers(twin).items() if layer in (0, 3)}
    with torch.no_grad():
        torch.testing.assert_close(_states(teacher, {}, scored), teacher.model(scored)[0])
        mine = _states(teacher, swapped, scored)
    torch.testing.assert_close(mine, Hybrid(teacher, twin, scored).states({0, 3}))


def test_the_divergence_is_that_of_the_definition_in_float64(pair, scored):
    teacher = pair[0]
    draw = torch.Generator().manual_seed(0)
    mine, its = torch.randn(2, 300, teacher.config.hidden_size, generator=draw)  # more rows than logits at once
    with torch.no_grad():
        value = _kl(teacher, mine, its)
        log_q, log_p = ((x @ teacher.lm_head.weight.T).double().log_softmax(-1) for x in (mine, its))
        expected = (log_p.exp() * (log_p - log_q)).sum()
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        assert _kl(teacher, its, its).item() == 0


def test_steps_on_a_text_lower_the_divergence_there_and_leave_both_models_alone(pair, scored):
    teacher, twin = pair
    before = [copy.deepcopy(model.state_dict()) for model in pair]
    text = with_goals(teacher, scored)
    values = [_trained(teacher, mixers(twin), [text], text, steps)[1] for steps in (0, 2, 6)]
    assert values[0] > values[1] > values[2]
    for model, state in zip(pair, before):
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_layer_that_matters_comes_first_after_steps_and_every_layer_once(pair, scored):
    told = []
    found = distilled(*pair, demo_windows(4, 32), scored, 1, told.append)
    assert found[0]["layer"] == IMPORTANT
    assert sorted(row["layer"] for row in found) == list(range(6))
    assert [row["score"] for row in found[1:]] == [row["kl"] for row in found[:-1]]
    assert found[-1]["kl"] == pytest.approx(0, abs=1e-6)
    assert sum(told) == 21


@pytest.mark.parametrize(
    ("text", "found"),
    [("distilled", ("distilled", 8)), ("distilled:3", ("distilled", 3)), ("greedy", ("greedy", 8))],
)
def test_the_number_of_steps_is_part_of_the_method(text, found):
    assert parse_method(text) == found


@pytest.mark.parametrize(
    "text", ["distilled:", "distilled:0", "distilled:-1", "distilled:few", "greedy:3", f"distilled:{'9' * 5000}"]
)
def test_another_number_is_refused(text):
    with pytest.raises(UserError, match=f"--rank {text}: only distilled takes a number, of steps, 1 or more"):
        parse_method(text)
