"""How many sequences of each source a block holds, so that reading a recipe can tell of a weight that gets none.

Twins: tests/distill/test_data.py, tests/distill/test_recipe.py.
"""

import math
from collections.abc import Sequence

BLOCK = 1024  # sequences; weights are exact to one in this many


def dealt(weights: Sequence[float]) -> list[int]:
    """BLOCK sequences in proportion to the weights; what rounding down leaves goes to the largest remainders, so a
    weight below 1 / BLOCK of all may get none."""
    total = sum(weights)
    shares = [weight / total * BLOCK for weight in weights]
    counts = [math.floor(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda source: counts[source] - shares[source])
    for source in by_remainder[: BLOCK - sum(counts)]:
        counts[source] += 1
    return counts
