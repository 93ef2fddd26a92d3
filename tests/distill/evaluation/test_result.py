"""Accuracies and their standard errors."""

import json
import math
import statistics

import pytest

from distill.evaluation.result import TaskResult, mean, share


@pytest.mark.parametrize(("right", "n"), [(0, 5), (3, 7), (7, 7), (1, 1), (250, 1000)])
def test_the_error_of_a_share_is_that_of_the_mean_of_its_zeros_and_ones(right, n):
    values = [1] * right + [0] * (n - right)
    wanted = statistics.stdev(values) / math.sqrt(n) if n > 1 else 0
    found = share(right, n)
    assert found["accuracy"] == right / n
    assert found["n"] == n
    assert found["stderr"] == pytest.approx(wanted, abs=1e-15)  # two orders of the same float64 sum
    assert mean(values) == pytest.approx(found, abs=1e-15)


def test_a_result_is_plain_json():
    result = TaskResult("recall", **share(1, 4), floors={"chance": 0.1}, by_level={"8": share(1, 4)})
    assert json.loads(json.dumps(result.as_json())) == result.as_json()
    assert result.as_json()["by_level"]["8"]["accuracy"] == 0.25
