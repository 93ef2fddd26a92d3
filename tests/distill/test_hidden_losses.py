"""Laws of the losses on hidden states and preferences, against formulas written out in float64."""

import math

import pytest
import torch

from distill.hidden_losses import cosine, dpo, l2, layer_cosine, mse

PAIRED = pytest.mark.parametrize("loss", [mse, l2, cosine])


def problem(seed=0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 9, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 9, generator=generator) > 0.4
    return student, teacher, mask


def places(mask):
    return mask.flatten().nonzero()[:, 0]


def test_values_by_their_formulas():
    student, teacher, mask = problem()
    rows = [(student[i], teacher[i]) for i in map(tuple, mask.nonzero().tolist())]
    valid, count = places(mask), len(rows)
    square = [((s - t) ** 2).sum().item() for s, t in rows]
    assert mse(student, teacher, valid, count).item() == pytest.approx(sum(square) / 5 / count, rel=1e-12)
    assert l2(student, teacher, valid, count).item() == pytest.approx(
        sum(math.sqrt(s / 5) for s in square) / count, rel=1e-12
    )
    angles = [1 - (s @ t / s.norm() / t.norm()).item() for s, t in rows]
    assert cosine(student, teacher, valid, count).item() == pytest.approx(sum(angles) / count, rel=1e-12)


@PAIRED
def test_equal_states_have_no_loss_and_no_gradient(loss):
    student, _, mask = problem()
    value = loss(student, student.detach(), places(mask), 4)
    value.backward()
    assert value.abs() < 1e-15
    assert student.grad.abs().max() < 1e-15


@PAIRED
def test_positions_that_are_not_valid_have_gradient_zero_even_with_nan(loss):
    student, teacher, mask = problem()
    valid = places(mask)
    poisoned = student.detach().clone()
    poisoned[~mask] = math.nan
    poisoned.requires_grad_()
    value = loss(poisoned, teacher, valid, len(valid))
    assert value == loss(student, teacher, valid, len(valid))
    value.backward()
    assert (poisoned.grad[~mask] == 0).all()
    assert poisoned.grad[mask].isfinite().all()
    assert (poisoned.grad[mask] != 0).any()


@PAIRED
def test_no_valid_position_gives_zero(loss):
    student, teacher, mask = problem()
    value = loss(student, teacher, places(mask & False), 0)
    value.backward()
    assert value == 0
    assert (student.grad == 0).all()


@PAIRED
def test_parts_sum_to_the_whole_under_the_global_count(loss):
    student, teacher, mask = problem()
    count = int(mask.sum())
    parts = [loss(student[i], teacher[i], places(mask[i]), count) for i in range(2)]
    assert sum(parts).item() == pytest.approx(loss(student, teacher, places(mask), count).item(), rel=1e-12)


@PAIRED
def test_zero_vectors_give_finite_gradients(loss):
    student = torch.zeros(3, 5, requires_grad=True)
    loss(student, torch.zeros(3, 5), torch.arange(3), 3).backward()
    assert student.grad.isfinite().all()


@PAIRED
def test_no_loss_asks_the_device_how_many_positions_are_valid(loss):
    """On a device that has no values it could not be told; on a GPU the host would wait for it."""
    with torch.device("meta"):
        student, teacher, valid = torch.empty(2, 9, 5, requires_grad=True), torch.empty(2, 9, 5), torch.arange(4)
    (loss(student, teacher, valid, 4) + layer_cosine([student, teacher], valid, 4)).backward()
    assert student.grad.shape == student.shape


def test_layer_cosine_sums_over_neighbouring_layers():
    generator = torch.Generator().manual_seed(3)
    layers = [torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = torch.tensor([True, False, True, True, False, False, True])
    valid, expected = places(mask), 0.0
    for before, after in ((layers[0], layers[1]), (layers[1], layers[2])):
        for position in valid:
            a, b = after[position], before[position]
            expected += (1 - (a @ b / a.norm() / b.norm()).item()) / 4
    value = layer_cosine(layers, valid, 4)
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert all((layer.grad[~mask] == 0).all() and (layer.grad[mask] != 0).any() for layer in layers)
    assert layer_cosine(layers[:1], valid, 4) == 0
    same = [layers[0].detach(), 2 * layers[0].detach()]
    assert layer_cosine(same, valid, 4).abs() < 1e-12


def test_dpo_by_hand():
    one = lambda *values: torch.tensor(values, dtype=torch.float64)
    start = dpo(one(-3.0), one(-5.0), one(-3.0), one(-5.0), 0.1, 1)
    assert start.item() == pytest.approx(math.log(2))  # a policy equal to its reference
    chosen = one(-3.0, -1.0).requires_grad_()
    value = dpo(chosen, one(-5.0, -2.0), one(-4.0, -2.0), one(-5.0, -1.0), 0.5, 2)
    expected = (math.log1p(math.exp(-0.5 * 1)) + math.log1p(math.exp(-0.5 * 2))) / 2
    assert value.item() == pytest.approx(expected, rel=1e-12)
    value.backward()
    assert (chosen.grad < 0).all()
    assert dpo(one(-1e4), one(0.0), one(0.0), one(0.0), 1.0, 1).item() == pytest.approx(1e4)
