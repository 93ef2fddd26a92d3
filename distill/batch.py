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
    """N = all tokens of the micro-batch. input_ids, targets, position_ids (1, N) int64; cu_seqlens (pieces + 1) int32;
    `real` (tokens) int64: the places of what is no padding. `targets` is already shifted: the next token, or IGNORED;
    `valid` (targets) int64: the places of those that are not. longest: tokens of the longest piece. top_k, with a cache
    of the teacher: a row for each target, in their order.

    What the host knows is here, so that no pass has to ask the device for it and wait."""

    input_ids: torch.Tensor
    targets: torch.Tensor
    position_ids: torch.Tensor
    real: torch.Tensor
    cu_seqlens: torch.Tensor
    valid: torch.Tensor
    longest: int
    top_k: TopK | None = None


def make_batch(sequences: Many[Sequence], device: torch.device | str = "cpu") -> Batch:
    """The sequences of one micro-batch, end to end, on `device`."""
    lengths = [len(sequence.input_ids) for sequence in sequences]
    starts = np.cumsum([0, *lengths])
    on_gpu = torch.device(device).type == "cuda"

    def sent(values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(values)
        return (tensor.pin_memory() if on_gpu else tensor).to(device, non_blocking=True)

    def row(values: list[np.ndarray]) -> torch.Tensor:
        return sent(np.concatenate(values))[None]

    def kept() -> TopK | None:
        if any(sequence.top_k is None for sequence in sequences):
            return None
        ids, log_p, log_rest = map(np.concatenate, zip(*(sequence.top_k for sequence in sequences)))
        return normalised(TopK(sent(ids.astype(np.int32)).long(), sent(log_p).float(), sent(log_rest).float()))

    real = [start + np.arange(sequence.num_tokens) for start, sequence in zip(starts, sequences)]
    bounds = [sequence.cu_seqlens[1:] + start for sequence, start in zip(sequences, starts)]
    cu_seqlens = np.concatenate([[0], *bounds]).astype(np.int32)
    targets = [sequence.targets for sequence in sequences]
    return Batch(
        input_ids=row([sequence.input_ids for sequence in sequences]),
        targets=row(targets),
        position_ids=row([sequence.position_ids for sequence in sequences]),
        real=sent(np.concatenate(real)),
        cu_seqlens=sent(cu_seqlens),
        valid=sent(np.flatnonzero(np.concatenate(targets) != IGNORED)),
        longest=int(np.diff(cu_seqlens).max()),
        top_k=kept(),
    )


def num_targets(sequences: Many[Sequence]) -> int:
    return sum(int((sequence.targets != IGNORED).sum()) for sequence in sequences)


def num_real(sequences: Many[Sequence]) -> int:
    return sum(sequence.num_tokens for sequence in sequences)
