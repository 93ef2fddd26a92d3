"""How nearly a layer is a linear map of its input, from the teacher alone (arXiv 2405.12250, "Your Transformer is
Secretly Linear").

    linearity = 1 - |Y - (X A + c)|^2 / |Y - mean Y|^2,  A and c by least squares on one text, the share on another

X and Y are what goes into a layer and what comes out of it, one row a token. The paper fits and scores on the same
tokens, where as many tokens as hidden units would score 1 whatever they are; here the scored tokens are unseen.

Shapes: N windows, T tokens, D hidden size.
"""

from collections.abc import Callable

import torch

from deltanet import DeltaNetForCausalLM

from ..calibration import Stream, ridge

PARTS = ("block", "increment", "attention")
"""The whole block, X to Y; what it adds, X to Y - X; and its attention alone, from its normed input."""
TOKENS_PER_UNIT = 16
RIDGE = 1e-6
BATCH = 4


class LinearMap:
    """The least-squares map from X to Y, gathered batch by batch in float64, with a constant."""

    def __init__(self, inner: int, outer: int, device: torch.device):
        self._gram = torch.zeros(inner + 1, inner + 1, dtype=torch.float64, device=device)
        self._cross = torch.zeros(inner + 1, outer, dtype=torch.float64, device=device)
        self._sums = torch.zeros(outer, dtype=torch.float64, device=device)
        self._error = self._size = 0.0
        self._count = 0

    def fit(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """x (..., inner), y (..., outer) of the text that the map is fitted on."""
        x, y = _with_one(x), y.flatten(0, -2).double()
        self._gram += x.T @ x
        self._cross += x.T @ y

    def solve(self) -> None:
        self._map = ridge(self._gram, self._cross, torch.zeros_like(self._cross), RIDGE)

    def score(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The same of the text that is scored."""
        y = y.flatten(0, -2).double()
        self._error += (y - _with_one(x) @ self._map).square().sum().item()
        self._size += y.square().sum().item()
        self._sums += y.sum(0)
        self._count += len(y)

    def share(self) -> float:
        """The share of the variance of Y that the map explains; below 0 where its mean would do better."""
        spread = self._size - (self._sums.square().sum() / self._count).item()
        return 1 - self._error / max(spread, 1e-30)


def _with_one(x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(0, -2).double()
    return torch.cat([x, x.new_ones(len(x), 1)], 1)


@torch.no_grad()
def linearity(
    teacher: DeltaNetForCausalLM,
    fit: torch.Tensor,
    scored: torch.Tensor,
    *,
    advance: Callable[[float], None] = lambda amount: None,
) -> list[dict]:
    """`layer` and the linearity of each of PARTS, of every layer. fit (N, T) and scored (M, T) int64 are windows of
    different text; N T should be TOKENS_PER_UNIT D or more. `advance(1)` is called per layer."""
    streams = [Stream(teacher, tokens, BATCH) for tokens in (fit, scored)]
    width, device = teacher.config.hidden_size, teacher.device
    found = []
    for layer in range(teacher.config.num_hidden_layers):
        maps = {part: LinearMap(width, width, device) for part in PARTS}
        for stream, gather in zip(streams, (LinearMap.fit, LinearMap.score)):
            for rows in stream.rows():
                before, x = stream.hidden[rows].clone(), stream.mixer_input(layer, rows)
                mixed = stream.mix(layer, x)[1]
                stream.advance(layer, rows, mixed)
                after = stream.hidden[rows]
                for part, pair in zip(PARTS, ((before, after), (before, after - before), (x, mixed))):
                    gather(maps[part], *pair)
            if gather is LinearMap.fit:
                for linear_map in maps.values():
                    linear_map.solve()
        found.append({"layer": layer} | {part: linear_map.share() for part, linear_map in maps.items()})
        advance(1)
    return found
