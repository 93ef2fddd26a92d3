"""The evaluation at the end of a run, on what the run has in memory. Twin: tests/distill/evaluation/test_at_end.py."""

from collections.abc import Sequence as Many
from pathlib import Path

import torch

from deltanet import DeltaNetForCausalLM

from ..packing import Sequence
from ..schema import Evaluation
from .command import NAME, write_reports
from .evaluate import loss_curve, measure
from .selection import Chosen
from .subject import Subject, load_subject
from .windows import TOKENS


def evaluate_export(
    export: Path,
    teacher_name: str,
    teacher: DeltaNetForCausalLM,
    tokenizer,
    held_out: Many[Sequence],
    settings: Evaluation,
    tasks: Many[Chosen],
    folder: Path,
) -> Path:
    """Measures the student in `export` beside the teacher, both in the teacher's dtype, on at most TOKENS of the run's
    held-out text, and writes evaluation.html, .md and .json to `folder`; returns the page."""
    device, dtype = teacher.device, teacher.dtype
    longest = teacher.config.max_position_embeddings
    other = Subject(teacher_name, teacher, tokenizer, device, dtype, longest)
    student = load_subject(export, device=str(device), dtype=str(dtype).removeprefix("torch."))
    report = measure(
        student,
        other,
        windows=whole_windows(held_out),
        tasks=tasks,
        limit=settings.task_examples,
        contexts=sorted(set(settings.contexts)),
        max_context=longest,
    )
    report |= {"text": "held out by the recipe", "losses": loss_curve(export)}
    write_reports(folder, report)
    return folder / f"{NAME}.html"


def whole_windows(sequences: Many[Sequence]) -> torch.Tensor | None:
    """(N, T) int64 of the sequences without padding, at most TOKENS in all; None where every one is padded."""
    whole = [sequence.input_ids for sequence in sequences if sequence.num_tokens == len(sequence.input_ids)]
    if not whole:
        return None
    return torch.stack([torch.from_numpy(ids) for ids in whole[: max(TOKENS // len(whole[0]), 1)]]).long()
