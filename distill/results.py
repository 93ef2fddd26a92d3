"""What a run leaves behind: the export, samples of text, report.*, the page, and the student in other formats.
Twin: tests/distill/test_run.py."""

from collections.abc import Sequence as Many
from pathlib import Path

import torch

from convert.sizes import parse_size
from deltanet import DeltaNetForCausalLM, load_student
from deltanet.config import max_context

from .evaluation.at_end import evaluate_export
from .evaluation.markdown import short
from .evaluation.selection import Chosen
from .evaluation.subject import Subject
from .export import add_reports, export, write_formats
from .metrics import read_metrics
from .packing import Sequence
from .recipe import show
from .report import sample, write_report
from .schema import Recipe


def write_results(
    recipe: Recipe,
    folder: Path,
    *,
    student: Path,
    companions: Path,
    teacher: DeltaNetForCausalLM | None,
    tokenizer,
    held_out: Many[Sequence],
    tasks: Many[Chosen],
    device: torch.device,
    facts: dict,
) -> dict:
    """Writes everything into the run's folder and returns `facts`, which grows by what is found here.

    student: the finished student's folder in its commit; companions: the folder whose tokenizer goes with it.
    """
    out, evaluation, options = folder / "export", recipe.evaluation, recipe.export
    finished = load_student(student, dtype=torch.float32, device=device)
    has_text = any(source.task is None for source in recipe.data.sources)
    samples = {
        who: sample(model, tokenizer, evaluation.prompt)
        for who, model in (("teacher", teacher), ("student", finished))
        if has_text and model is not None
    }
    num_parameters = sum(parameter.numel() for parameter in finished.parameters())
    facts = facts | {"samples": samples, "parameters": num_parameters, "export": str(out)}
    shown, size = show(recipe), parse_size("export.max_shard_size", options.max_shard_size)
    export(student, companions, out, dtype=options.dtype, max_shard_size=size, recipe=shown, report=facts)
    print(write_report(folder, facts, read_metrics(folder / "metrics.jsonl")))
    print(f"\nexport   {out}", flush=True)  # what follows may take long
    if tasks or evaluation.contexts:
        text = held_out if has_text else ()
        subject = _subject(recipe, teacher, tokenizer)
        page, found = evaluate_export(out, subject, device, text, evaluation, tasks, folder)
        add_reports(out, [page.with_suffix(".json"), page.with_suffix(".md")])
        print(f"\n{short(found)}\n\npage     {page}")
    for other in write_formats(out, options.formats, size):
        print(f"export   {other}")
    return facts


def _subject(recipe: Recipe, teacher: DeltaNetForCausalLM | None, tokenizer) -> Subject | None:
    if teacher is None:
        return None
    longest = max_context(teacher.config)
    return Subject(recipe.teacher.model, teacher, tokenizer, teacher.device, teacher.dtype, longest)
