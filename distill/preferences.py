"""Preferences: one prompt with an answer that was chosen and one that was rejected, as two conversations.

In a token cache the two stand one after the other, chosen first, and from there on a pair is one document: it is
held out, packed and dropped as a whole, so no packing can part or mix it. Twin: tests/distill/test_preferences.py.
"""

import os
import shutil
from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np
import torch

from convert.publish.manifest import damage, seal
from convert.text_files import PAIR, Messages, missing, pick, read_answer
from deltanet_errors import DeltanetError, UserError

from .batch import Batch
from .packing import IGNORED, Sequence
from .schema import Source


def read_pair(record: object, source: Source, place: str) -> tuple[Messages, Messages]:
    """(chosen, rejected), each a whole conversation that ends with the assistant's answer.

    The prompt is `messages` or `conversations` (`field` names another), or the text `prompt`; the answers are a text,
    a turn, or a list of turns, which may repeat the prompt. Raises UserError headed by `place`.
    """
    if not isinstance(record, dict):
        raise UserError(f"{place}: expected an object with chosen and rejected, got {type(record).__name__}")
    for key in PAIR:
        if not pick(record, ((key,),)):
            raise missing(record, place, ((key,),))
    chosen, rejected = (read_answer(record, place, key, source.field) for key in PAIR)
    if chosen[:-1] != rejected[:-1]:
        raise UserError(f"{place}: chosen and rejected answer different prompts, so they cannot be compared")
    return chosen, rejected


def num_pairs(sequences: Many[Sequence]) -> int:
    """Pairs in these packed sequences: every conversation has a target, padding has none."""
    pieces = [np.logical_or.reduceat(s.targets != IGNORED, s.cu_seqlens[:-1]) for s in sequences]
    return int(sum(found.sum() for found in pieces)) // 2


def pair_sums(values: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Per pair the sum of `values` (1, N) over the chosen and over the rejected conversation, each (pairs).

    `values` is zero where there is no target. Conversations alternate in a batch, chosen first.
    """
    sizes = batch.cu_seqlens.diff().tolist()
    valid = (batch.targets != IGNORED)[0].split(sizes)
    sums = [piece.sum() for piece, is_target in zip(values[0].split(sizes), valid) if is_target.any()]
    return torch.stack(sums[0::2]), torch.stack(sums[1::2])


def keep_reference(start: Path, folder: Path, goes_on: bool) -> None:
    """Copies the student in `start` to `folder` at the start of a stage, whole or not at all, in place of one that an
    earlier try left, and leaves it there where the stage goes on.

    Raises DeltanetError where the stage goes on (its start is gone) and the copy is not there or damaged.
    """
    if goes_on:
        found = damage(folder) if folder.is_dir() else ["gone"]
        if found:
            raise DeltanetError(f"{folder}: {found[0]}, so the stage cannot go on as it was; restore it")
        return
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        for path in sorted(start.iterdir()):
            if path.suffix in (".safetensors", ".json"):
                shutil.copyfile(path, temporary / path.name)
        seal(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
