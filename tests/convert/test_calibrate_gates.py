"""The solvers of calibration against direct least squares in float64. Twin of convert/calibration/{gates,output}.py."""

import pytest
import torch
from torch import nn

from convert.calibration import OutputFit, SourceProducts, fit_gates, head_metric, ridge

N, H, S, HEAD, D = 400, 2, 3, 4, 6


@pytest.fixture
def problem():
    """x, sources and target in float64, with inputs whose mean and spread differ, and one metric per head."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = normal(N, D) * torch.tensor([3.0, 1.0, 1.0, 0.3, 0.1, 2.0], dtype=torch.float64) + normal(D)
    sources = [normal(1, N, H, HEAD) * (1 + normal(1, N, 1, 1).abs()) for _ in range(S)]
    coefficients = torch.einsum("nd,hsd->nhs", x, 0.3 * normal(H, S, D)) + normal(H, S)
    target = sum(coefficients[None, :, :, s, None] * sources[s] for s in range(S)) + normal(1, N, H, HEAD)
    metric = head_metric(normal(7, H * HEAD), H)
    return x, sources, target, metric


def direct(x, sources, target, metric, strength):
    """weight and bias by one dense solve per head over every product of input and source."""
    centred = x - x.mean(0)
    weights, biases = [], []
    for h in range(H):
        root = torch.linalg.cholesky(metric[h])
        measured = [s[0, :, h] @ root for s in sources]
        columns = [m[:, :, None] * centred[:, None, :] for m in measured] + [m[:, :, None] for m in measured]
        design, wanted = torch.cat(columns, -1).flatten(0, 1), (target[0, :, h] @ root).flatten()
        sizes = torch.stack([(m**2).sum(-1) for m in measured])
        slopes = strength * (sizes * (centred**2).mean(1)).sum(1)
        penalty = torch.cat([slopes.repeat_interleave(D), torch.zeros(S, dtype=torch.float64)])
        solved = torch.linalg.solve(design.T @ design + torch.diag(penalty), design.T @ wanted)
        weights.append(solved[: S * D].view(S, D))
        biases.append(solved[S * D :] - weights[-1] @ x.mean(0))
    return torch.stack(weights), torch.stack(biases)


def products_of(sources, target, metric, *, cuts=()):
    products = SourceProducts(metric)
    for a, b in zip((0, *cuts), (*cuts, N)):
        products.add([s[:, a:b] for s in sources], target[:, a:b])
    return products.take()


@pytest.mark.parametrize("strength", [0.0, 0.03, 1.0])
def test_gates_equal_the_dense_least_squares_solution(problem, strength):
    x, sources, target, metric = problem
    pairs, targets = products_of(sources, target, metric)
    weight, bias = fit_gates(x, pairs, targets, strength, iterations=200)
    expected_weight, expected_bias = direct(x, sources, target, metric, strength)
    # The iteration stops at a relative residual of 1e-3; the tiny ridge on the constants moves them by about 1e-6.
    assert (weight - expected_weight).norm() < 2e-3 * expected_weight.norm()
    assert (bias - expected_bias).norm() < 2e-3 * expected_bias.norm()


def test_constant_gates_equal_least_squares(problem):
    x, sources, target, metric = problem
    pairs, targets = products_of(sources, target, metric)
    weight, bias = fit_gates(x, pairs, targets, 0.03, data_dependent=False)
    assert not weight.any()
    for h in range(H):
        root = torch.linalg.cholesky(metric[h])
        design = torch.stack([(s[0, :, h] @ root).flatten() for s in sources], 1)
        wanted = (target[0, :, h] @ root).flatten()[:, None]
        # STATIC_RIDGE is 1e-4 of the mean diagonal.
        torch.testing.assert_close(bias[h], torch.linalg.lstsq(design, wanted).solution[:, 0], rtol=1e-3, atol=1e-3)


def test_products_gathered_in_parts_equal_those_of_one_pass(problem):
    _, sources, target, metric = problem
    whole, parts = (products_of(sources, target, metric, cuts=cuts) for cuts in ((), (1, 130, 399)))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b)


def test_heads_do_not_influence_each_other(problem):
    x, sources, target, metric = problem
    pairs, targets = products_of(sources, target, metric)
    both, _ = fit_gates(x, pairs, targets, 0.1, iterations=200)
    alone, _ = fit_gates(x, pairs[:, :1], targets[:, :1], 0.1, iterations=200)
    assert (both[:1] - alone).norm() < 2e-3 * alone.norm()


def test_ridge_equals_least_squares_with_the_prior_as_extra_rows():
    generator = torch.Generator().manual_seed(1)
    F, Y, prior = (
        torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((90, 8), (90, 5), (8, 5))
    )
    gram, strength = F.T @ F, 0.3
    root = (strength * gram.diagonal().mean()).sqrt()
    rows = torch.cat([F, root * torch.eye(8, dtype=torch.float64)])
    expected = torch.linalg.lstsq(rows, torch.cat([Y, root * prior])).solution
    torch.testing.assert_close(ridge(gram, F.T @ Y, prior, strength), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_the_output_fit_finds_the_map_that_made_its_data(bias):
    generator = torch.Generator().manual_seed(2)
    features = torch.randn(3, 40, 12, generator=generator)
    truth = nn.Linear(12, 6, bias=bias)
    fitted = nn.Linear(12, 6, bias=bias)
    with torch.no_grad():
        fit = OutputFit(fitted)
        for batch in features:
            fit.add(batch[None], truth(batch[None]))
        fit.solve(1e-9)
        torch.testing.assert_close(fitted.weight, truth.weight, rtol=1e-4, atol=1e-5)  # float32 sums of 120 tokens
        if bias:
            torch.testing.assert_close(fitted.bias, truth.bias, rtol=1e-4, atol=1e-5)


def test_a_strong_ridge_keeps_the_projection_as_it_is():
    projection = nn.Linear(4, 4)
    before = projection.weight.clone()
    with torch.no_grad():
        fit = OutputFit(projection)
        fit.add(torch.randn(1, 50, 4), torch.randn(1, 50, 4))
        fit.solve(1e12)
    torch.testing.assert_close(projection.weight, before)
