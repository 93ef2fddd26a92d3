"""What a task gives back. Twin: tests/distill/evaluation/test_result.py."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class TaskResult:
    """accuracy: share of `n` examples answered right; stderr: its standard error.

    floors: name of a strategy that needs no understanding -> the accuracy it reaches on these very examples.
    partial_floors: the same of strategies that understand a part of the task. by_level: level of difficulty, easiest
    first -> accuracy, stderr, n. figures: anything else worth a number, such as a perplexity. samples: a few examples,
    to be read.
    """

    name: str
    accuracy: float
    stderr: float
    n: int
    floors: dict[str, float] = field(default_factory=dict)
    by_level: dict[str, dict] = field(default_factory=dict)
    samples: list[dict] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    partial_floors: dict[str, float] = field(default_factory=dict)

    def as_json(self) -> dict:
        """The fields as plain values for JSON."""
        return asdict(self)


def share(right: int, n: int) -> dict[str, float | int]:
    """accuracy, stderr and n of `right` successes in `n` independent trials; n must be positive.

    The standard error is that of the mean of zeros and ones, sqrt(p (1 - p) / (n - 1)), as evaluation harnesses give
    it; with a single trial it is 0.
    """
    accuracy = right / n
    return {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / max(n - 1, 1)), "n": n}


def mean(values: Sequence[float]) -> dict[str, float | int]:
    """accuracy, stderr and n of values in [0, 1], one for each independent example."""
    n, accuracy = len(values), sum(values) / len(values)
    spread = sum((value - accuracy) ** 2 for value in values)
    return {"accuracy": accuracy, "stderr": math.sqrt(spread / max(n - 1, 1) / n), "n": n}
