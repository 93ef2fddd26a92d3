"""Packed sequences as the tensors of one forward pass: one row of documents that do not see each other.

Twin: tests/distill/test_stages.py.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch

from .losses import TopK, normalised
from .packing import IGNORED, Sequence


@dataclass(frozen=True)
class Batch:
    """N = all tokens of the micro-batch. input_ids, targets, position_ids (1, N) int64; real (1, N) bool, false at
    padding; cu_seqlens (pieces + 1) int32. `targets` is already shifted: the next token, or IGNORED. top_k, with a
    cache of the teacher: a row for each target, in their order."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    real: torch.Tensor
    cu_seqlens: torch.Tensor
    top_k: TopK | None = None


def make_batch(sequences: Many[Sequence], device: torch.device | str = "cpu") -> Batch:
    """The sequences of one micro-batch, end to end, on `device`."""
    lengths = [len(sequence.input_ids) for sequence in sequences]
    starts = np.cumsum([0, *lengths])

    def row(values: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(values))[None].to(device, non_blocking=True)

    def kept() -> TopK | None:
        if any(sequence.top_k is None for sequence in sequences):
            return None
        ids, log_p, log_rest = map(np.concatenate, zip(*(sequence.top_k for sequence in sequences)))
        ids = torch.from_numpy(ids.astype(np.int32)).to(device, non_blocking=True).long()
        log_p, log_rest = (torch.from_numpy(x).to(device, non_blocking=True).float() for x in (log_p, log_rest))
        return normalised(TopK(ids, log_p, log_rest))

    real = [np.arange(length) < sequence.num_tokens for length, sequence in zip(lengths, sequences)]
    bounds = [sequence.cu_seqlens[1:] + start for sequence, start in zip(sequences, starts)]
    return Batch(
        input_ids=row([sequence.input_ids for sequence in sequences]),
        targets=row([sequence.targets for sequence in sequences]),
        position_ids=row([sequence.position_ids for sequence in sequences]),
        real=row(real),
        cu_seqlens=torch.from_numpy(np.concatenate([[0], *bounds]).astype(np.int32)).to(device, non_blocking=True),
        top_k=kept(),
    )


def num_targets(sequences: Many[Sequence]) -> int:
    return sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences)


def num_real(sequences: Many[Sequence]) -> int:
    return sum(sequence.num_tokens for sequence in sequences)
