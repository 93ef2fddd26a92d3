"""The evaluation at the end of a run, on what the run has in memory. Twin: tests/distill/evaluation/test_at_end.py."""

from collections.abc import Sequence as Many
from pathlib import Path

import torch

from ..packing import Sequence
from ..schema import Evaluation
from .command import NAME, write_reports
from .evaluate import loss_curve, measure
from .selection import Chosen
from .subject import Subject, load_subject
from .windows import TOKENS


@torch.compiler.set_stance("force_eager")  # layers that the run has compiled would pass the hooks of diagnostics by
def evaluate_export(
    export: Path,
    teacher: Subject | None,
    device: torch.device,
    held_out: Many[Sequence],
    settings: Evaluation,
    tasks: Many[Chosen],
    folder: Path,
) -> tuple[Path, dict]:
    """Measures the student in `export`, beside its teacher if there is one and then in the teacher's dtype, on at most
    TOKENS of the run's held-out text, and writes evaluation.html, .md and .json to `folder`; returns the page and the
    report."""
    dtype = "auto" if teacher is None else str(teacher.dtype).removeprefix("torch.")
    student = load_subject(export, device=str(device), dtype=dtype)
    report = measure(
        student,
        teacher,
        windows=whole_windows(held_out),
        tasks=tasks,
        limit=settings.task_examples,
        contexts=sorted(set(settings.contexts)),
        max_context=student.max_context if teacher is None else teacher.max_context,
    )
    report |= {"text": "held out by the recipe" if held_out else None, "losses": loss_curve(export)}
    write_reports(folder, report)
    return folder / f"{NAME}.html", report


def whole_windows(sequences: Many[Sequence]) -> torch.Tensor | None:
    """(N, T) int64 of the sequences without padding, at most TOKENS in all; None where every one is padded."""
    whole = [sequence.input_ids for sequence in sequences if sequence.num_tokens == len(sequence.input_ids)]
    if not whole:
        return None
    return torch.stack([torch.from_numpy(ids) for ids in whole[: max(TOKENS // len(whole[0]), 1)]]).long()
