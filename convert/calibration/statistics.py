"""Sums over tokens from which every fit is solved, so that no fit needs the tokens again.

A head's output is a combination of *sources*: what it reads from its state, and the values at this and earlier tokens.
An error e of head h is measured as it reaches the residual stream, e^T M_h e with M_h = W_h^T W_h and W_h the head's
part of the output projection. Per token only the products of the sources with each other and with the target are kept:
S (S + 1) numbers per head instead of (S + 1) vectors.

Shapes: N tokens (windows and positions flattened), H heads, S sources, d head size, D hidden size.
"""

import torch

JITTER = 1e-4
"""Added to M_h so that a direction that the output projection ignores still has a defined best value."""


def head_metric(o_proj: torch.Tensor, num_heads: int) -> torch.Tensor:
    """M (H, d, d) from the output projection's weight (D, H * d)."""
    weight = o_proj.view(o_proj.shape[0], num_heads, -1)
    metric = torch.einsum("ohd,ohe->hde", weight, weight)
    return metric + JITTER * torch.eye(metric.shape[-1], dtype=metric.dtype, device=metric.device)


class SourceProducts:
    """Products of sources under the metric, gathered batch by batch."""

    def __init__(self, metric: torch.Tensor):
        self.metric, self._pairs, self._targets = metric, [], []

    def add(self, sources: list[torch.Tensor], target: torch.Tensor) -> None:
        """sources: S tensors (n, T, H, d); target (n, T, H, d)."""
        H, d = target.shape[-2:]
        stacked = torch.stack([source.reshape(-1, H, d) for source in sources], 2)  # N H S d
        measured = torch.einsum("nhsd,hde->nhse", stacked, self.metric)
        self._pairs.append(measured @ stacked.mT)
        self._targets.append((measured @ target.reshape(-1, H, d, 1))[..., 0])

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pairs (N, H, S, S) and targets (N, H, S) of all tokens so far."""
        return torch.cat(self._pairs), torch.cat(self._targets)


def ridge(gram: torch.Tensor, cross: torch.Tensor, prior: torch.Tensor, strength: float) -> torch.Tensor:
    """argmin_W ||F W - Y||^2 + l ||W - prior||^2 with gram = F^T F (n, n), cross = F^T Y (n, m), in float64;
    l = strength * mean diagonal of gram."""
    gram, cross, prior = gram.double(), cross.double(), prior.double()
    penalty = strength * gram.diagonal().mean()
    system = gram + penalty * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(system, cross + penalty * prior)
