"""All measurements of a student, beside its teacher if there is one, as one object for JSON.

`evaluate` starts from paths and is what `deltanet-eval` calls; `measure` starts from models in memory, and a recipe
calls it at the end of its run. Everything but seconds, speed and memory is the same for the same seed.
Twin: tests/distill/evaluation/test_evaluate.py.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers

import deltanet
from convert.closeness import recall, recall_by_distance
from convert.progress import progress
from convert.text_files import check_file
from deltanet import DeltaNetConfig
from deltanet_errors import UserError, nearest

from ..export import RECIPE
from ..metrics import read_metrics
from .branches import LAYERS, PARTS
from .diagnostics import diagnose
from .language import continuations, language
from .selection import Chosen, select
from .subject import Subject, check_ids, load_subject
from .windows import NONE, SELF, TOKENS, read_windows
from .worth import DECODED, device_name, worth

DEFAULT_CONTEXTS = {"cpu": (128, 512, 2048), "cuda": (512, 2048, 8192, 32768)}
SHORTEST_CONTEXT = 2 * DECODED
RECALL_WINDOW = 32
RECALL_TOKENS = {"cpu": 2048, "cuda": 16384}  # at each distance
TASK_CONTEXT = 2048
"""Tokens of the longest example of a generated task, unless longer ones, or longer contexts, are asked for."""
CURVE_POINTS = 400


def evaluate(
    student: str | Path,
    *,
    against: str | Path | None = None,
    text: str = SELF,
    tasks: Sequence[str] = ("all",),
    contexts: Sequence[int] | None = None,
    tokens: int = TOKENS,
    window: int | None = None,
    limit: int | None = None,
    task_context: int | None = None,
    parts: str = LAYERS,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    keep: Callable[[dict], None] = lambda report: None,
) -> dict:
    """What `measure` returns, for checkpoints and a text named by paths.

    text: a file, `self` (the teacher, or else the student, writes it) or `none`. tasks: see `select`. contexts: where
    speed and memory are measured; None for some that suit device and models, () for none. tokens, window: how much
    text, and in pieces of what length. limit: examples of each task. task_context: tokens of the longest example
    of a generated one. parts: what diagnostics switch off, one of PARTS. keep: as for `measure`. Raises UserError for
    any wrong input, before anything is measured.
    """
    if parts not in PARTS:
        raise UserError(f"--parts {parts}: allowed are {', '.join(PARTS)}{nearest(parts, list(PARTS))}")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}: allowed is 1 or more")
    chosen = select(tasks)
    if text == NONE and not chosen and contexts is not None and not len(contexts):
        raise UserError("--text none --tasks none --contexts none: nothing is left to measure")
    check_file(text, f"--text {text}", (SELF, NONE))
    mine = load_subject(student, device=device, dtype=dtype)
    other = None if against is None else load_subject(against, device=device, dtype=dtype)
    longest = mine.max_context if other is None else min(mine.max_context, other.max_context)
    check_tokenizers(mine, other)
    for task in chosen:
        for subject in (mine, other):
            if subject is not None:
                task.check(subject, limit)
    contexts = check_contexts(contexts, longest, mine.device)
    if task_context is not None and not 1 <= task_context <= longest:
        raise UserError(f"--task-context {task_context}: allowed is 1 to {longest}, the range of the model")
    windows = None
    if text != NONE:
        writer = mine if other is None else other
        windows = read_windows(text, writer, tokens=tokens, window=window, longest=longest, seed=seed)
        for subject in filter(None, (mine, other)):
            check_ids(subject, int(windows.max()), f"--text {text}")
    report = measure(
        mine,
        other,
        windows=windows,
        tasks=chosen,
        limit=limit,
        task_context=task_context,
        contexts=contexts,
        max_context=longest,
        parts=parts,
        seed=seed,
        keep=keep,
    )
    report["text"] = None if windows is None else text
    if curve := loss_curve(Path(student)):
        report["losses"] = curve
    return report


def measure(
    student: Subject,
    teacher: Subject | None,
    *,
    windows: torch.Tensor | None,
    tasks: Sequence[Chosen] = (),
    limit: int | None = None,
    task_context: int | None = None,
    contexts: Sequence[int] = (),
    max_context: int,
    parts: str = LAYERS,
    seed: int = 0,
    keep: Callable[[dict], None] = lambda report: None,
) -> dict:
    """The report: student, teacher (names), device, dtype, seed, versions, layers; then what was asked for:

    with windows (N, T) int64: tokens, window, perplexity, kl, top1_agreement, by_position, by_seen, samples
    (`language.py`), recall (`convert.closeness.recall`, and in it by_distance, of `recall_by_distance`) and diagnostics
    (`diagnostics.py`); with tasks: tasks, by name of the result (see `TaskResult`, and under `teacher` the same of the
    teacher), and skipped_tasks, with the reasons; with contexts: speed and memory (`worth.py`). keep: is given the
    report after every part, with what it holds by then.
    """
    config = student.model.config
    report: dict = {
        "student": student.name,
        "teacher": None if teacher is None else teacher.name,
        "device": device_name(student.device),
        "dtype": str(student.dtype).removeprefix("torch."),
        "seed": seed,
        "versions": {module.__name__: module.__version__ for module in (deltanet, torch, transformers)},
        "layers": list(config.layer_types) if isinstance(config, DeltaNetConfig) else None,
        "seconds": {},
    }

    @contextmanager
    def measured(part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        report["seconds"][part] = round(time.perf_counter() - start, 3)
        keep(report)

    if tasks:
        with measured("tasks"):
            context = task_context or min(max_context, max(TASK_CONTEXT, *contexts, 0))
            report["tasks"], report["skipped_tasks"] = run_tasks(student, teacher, tasks, limit, context, seed)
    if windows is not None:
        with measured("language"), progress("language", windows.numel(), "tokens") as advance:
            report |= language(student, teacher, windows, advance=advance)
            report["samples"] = continuations(student, teacher, windows)
        if windows.shape[1] >= RECALL_WINDOW:
            with measured("recall"):
                other = None if teacher is None else teacher.model
                held_out = windows.to(student.device)
                report["recall"] = recall(other, student.model, held_out, seed=seed)
                options = {"most": max_context, "tokens": RECALL_TOKENS.get(student.device.type, RECALL_TOKENS["cpu"])}
                report["recall"]["by_distance"] = recall_by_distance(other, student.model, held_out, **options)
        with measured("diagnostics"):
            distances = [row["distance"] for row in report.get("recall", {"by_distance": ()})["by_distance"]]
            report["diagnostics"] = diagnose(student, teacher, windows, distances=distances, parts=parts, seed=seed)
    if contexts:
        with measured("speed and memory"), progress("speed and memory", sum(contexts), "tokens") as advance:
            report |= worth(student, teacher, contexts, seed=seed, advance=advance)
    return report


def run_tasks(
    student: Subject,
    teacher: Subject | None,
    tasks: Sequence[Chosen],
    limit: int | None,
    max_context: int,
    seed: int,
) -> tuple[dict[str, dict], dict[str, str]]:
    """(every result by its name, as JSON, with a teacher its own under `teacher`, on the same examples; why tasks that
    nobody named could not be run). Raises UserError for one that was named and cannot be run."""
    results: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    with progress("tasks", len(tasks) * len(models)) as advance:
        options = {"seed": seed, "limit": limit, "max_context": max_context, "advance": advance}
        for task in tasks:
            try:
                found = {who: task.run(subject, **options) for who, subject in models.items()}
            except UserError as error:
                if task.is_named:
                    raise
                skipped[task.name] = str(error)
                continue
            for index, result in enumerate(found["student"]):
                results[result.name] = result.as_json()
                if teacher is not None:
                    theirs = found["teacher"][index].as_json()
                    shared = ("name", "n", "floors")
                    results[result.name]["teacher"] = {k: v for k, v in theirs.items() if k not in shared}
    return results, skipped


def check_tokenizers(student: Subject, teacher: Subject | None) -> None:
    """Raises UserError where the two do not give the same ids to the same text, so that nothing could be compared."""
    if teacher is None:
        return
    mine, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    probe = "The delta rule, in 1960:\n\n  ünïcode – 12,345.67 (twice?)"
    same = mine == theirs and student.tokenizer(probe)["input_ids"] == teacher.tokenizer(probe)["input_ids"]
    if not same:
        odd = next((token for token in mine if mine[token] != theirs.get(token)), None)
        detail = "they split text differently"
        if odd is not None:
            detail = f"for one, {odd!r} is {theirs.get(odd)} there and {mine[odd]} here"
        raise UserError(
            f"--against {teacher.name}: its tokenizer ({len(theirs)} tokens) is not that of {student.name} "
            f"({len(mine)} tokens): {detail}; a student is compared with the teacher it was made from"
        )


def check_contexts(
    contexts: Sequence[int] | None, longest: int, device: torch.device, option: str = "--contexts"
) -> tuple[int, ...]:
    """The contexts to measure at, rising; the default ones as far as `longest` goes. Raises UserError beyond it."""
    if contexts is None:
        fitting = [context for context in DEFAULT_CONTEXTS.get(device.type, (128, 512)) if context <= longest]
        return tuple(fitting or [longest] * (longest > DECODED))
    for context in contexts:
        if not SHORTEST_CONTEXT <= context <= longest:
            raise UserError(f"{option} {context}: allowed is {SHORTEST_CONTEXT} to {longest}, the range of the model")
    return tuple(sorted(set(contexts)))


def loss_curve(student: Path) -> list[dict]:
    """stage, step and loss of the run that `student` is the export of, at most CURVE_POINTS; [] if it is none."""
    path = student.absolute().parent / "metrics.jsonl"
    if not (student / RECIPE).is_file() or not path.is_file():
        return []
    records = [record for record in read_metrics(path) if record.get("loss") is not None]
    every = -(-len(records) // CURVE_POINTS)
    return [{key: record[key] for key in ("stage", "step", "loss")} for record in records[:: max(every, 1)]]
