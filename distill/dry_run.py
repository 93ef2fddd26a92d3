"""What a run would do, without doing it: sources and tokens, stages in numbers, memory by ZeRO stage.

Memory is counted, not measured: parameters, gradients, float32 masters and two moments of what is trained, the frozen
rest and the teacher (its part, where it is sharded), unless a cache on disk stands for it, and what a micro-batch keeps
for its backward pass; what a sharded model gathers comes on top. Twin: tests/distill/test_dry_run.py.
"""

import contextlib
import itertools
from pathlib import Path

import torch

from convert.command import load_tokenizer
from convert.families import teacher_config
from convert.sources import open_source
from convert.tokens import num_ids
from deltanet import DeltaNetConfig
from deltanet.config import max_context

from .checks import check_recipe, check_student, check_teacher
from .convert_step import config_after
from .data import Report
from .first_student import check_free, check_planned, check_there, planned
from .logit_cache import bytes_a_target, check_top_k
from .losses import CHUNK_BYTES, FLOATS
from .new_student import plan_new
from .prepare import StagePlan, check_tokenizer, held_out_sequences, plan_stages, prepare
from .recipe_rules import is_sharded, uses_cache
from .schema import Recipe
from .task_sources import check_tasks
from .trainable import check_stage, parameters_of
from .world import World


def describe(recipe: Recipe, cache: Path) -> str:
    """The plan as text; `cache` takes the tokens. Raises UserError for whatever would stop the run at its start."""
    world = World(0, 1, torch.device("cpu"))
    tasks = check_recipe(recipe)
    with contextlib.ExitStack() as stack:
        teacher = None
        if recipe.teacher is None:
            config, tokenizer = plan_new(recipe.student.new)
        else:
            source = stack.enter_context(open_source(recipe.teacher.model, recipe.teacher.revision))
            teacher = teacher_config(source.folder)
            tokenizer = load_tokenizer(source.folder)
            check_teacher(recipe, teacher, tokenizer)
            config = _student(recipe, teacher)
        check_student(recipe, config, world.device)
        if recipe.student.model and Path(recipe.student.model).is_dir():
            check_tokenizer(Path(recipe.student.model), tokenizer)
        stop = (teacher or config).eos_token_id
        stop_ids = [stop] if isinstance(stop, int) else stop or []
        prepared = prepare(recipe, tokenizer, (teacher or config).vocab_size, stop_ids, cache, world)
        plans = plan_stages(recipe, prepared)
    held_out_sequences(recipe, prepared)
    vocab_size = min((teacher or config).vocab_size, num_ids(tokenizer))
    longest, limit = max_context(teacher or config), recipe.evaluation.task_examples
    check_tasks(tasks, tokenizer, vocab_size, longest, limit)
    lines = ["teacher  none"]
    if teacher is not None:
        lines = [f"teacher  {recipe.teacher.model}, {_count(teacher) / 1e6:,.1f} M parameters"]
    kinds = config.layer_types
    lines.append(
        f"student  {_count(config) / 1e6:,.1f} M parameters, {kinds.count('linear_attention')} of {len(kinds)} layers "
        f"linear ({config.mixer_in_words})"
    )
    lines.append("\nsource               documents      tokens     dropped  sequences")
    lines += _read_lines(plans)
    held = sum(part.num_tokens for part in prepared.held_out)
    lines.append(f"held out: {held:,} tokens")
    lines.append("\nstage         kind        steps  batch x length      tokens    epochs    trained")
    configs = list(itertools.accumulate(plans, lambda before, plan: config_after(plan.stage, before), initial=config))
    for plan, after in zip(plans, configs[1:]):
        lines += [_stage_line(plan, after), *_source_lines(plan)]
    lines += _cache_lines(recipe, plans, vocab_size)
    lines.append(_memory(recipe, list(zip(plans, configs[1:])), teacher))
    return "\n".join(lines)


def _read_lines(plans: list[StagePlan]) -> list[str]:
    """What becomes of every source; of one that stages read in ways of their own, a line for each way."""
    ways: dict[str, dict[Report, list[str]]] = {}
    for plan in plans:
        for report in plan.reports:
            ways.setdefault(report.source, {}).setdefault(report, []).append(plan.stage.name)
    lines = []
    for source, reports in ways.items():
        for report, stages in reports.items():
            line = (
                f"{source:<18}{report.documents:>12,}{report.tokens:>12,}{report.dropped:>12,}{report.sequences:>11,}"
            )
            line += f"  answers cut: {report.cut_answers:,}" if report.cut_answers else ""
            lines.append(line + (f"  in {', '.join(stages)}" if len(reports) > 1 else ""))
    return lines


def _student(recipe: Recipe, teacher: DeltaNetConfig) -> DeltaNetConfig:
    folder = Path(recipe.student.model) if recipe.student.model else None
    if recipe.student.convert is None:
        check_there(folder)
    if folder is not None and not (folder / "config.json").exists():
        check_free(folder)
    if folder is None or not (folder / "config.json").is_file():
        return planned(recipe, teacher)
    if recipe.student.convert is not None:
        check_planned(recipe, folder, teacher)
    return DeltaNetConfig.from_pretrained(folder)


def _count(config: DeltaNetConfig) -> int:
    return sum(parameter.numel() for parameter in parameters_of(config).values())


def _trained(plan: StagePlan, config: DeltaNetConfig) -> int:
    if plan.stage.kind == "convert_step":
        return 0
    parameters = parameters_of(config)
    return sum(parameters[name].numel() for name in check_stage(plan.stage, config))


def _stage_line(plan: StagePlan, config: DeltaNetConfig) -> str:
    epochs = plan.num_steps * plan.batch_size / len(plan.corpus)
    if plan.stage.kind == "convert_step":
        linear = config.layer_types.count("linear_attention")
        return f"{plan.stage.name:<14}convert_step: {linear} of {len(config.layer_types)} layers linear from here on"
    return (
        f"{plan.stage.name:<14}{plan.stage.kind:<10}{plan.num_steps:>7,}  {plan.batch_size:>6} x {plan.seq_len:<6,}"
        f"{plan.num_tokens:>12,}{epochs:>10.2f}{_trained(plan, config) / 1e6:>9,.1f} M"
    )


def _source_lines(plan: StagePlan) -> list[str]:
    """What a stage of several sources reads of each: weights may let a small one be read many times."""
    corpus = plan.corpus
    if plan.stage.kind == "convert_step" or len(corpus.parts) == 1:
        return []
    sequences, lines = plan.num_steps * plan.batch_size, []
    for report, count, size in zip(corpus.reports, corpus.counts, corpus.sizes):
        share = count / sum(corpus.counts)
        lines.append(f"  {report.source:<39}{share:>12.1%} of it{sequences * share / size:>10.2f}")
    return lines


def _cache_lines(recipe: Recipe, plans: list[StagePlan], vocab_size: int) -> list[str]:
    """What the teacher's cache takes on disk; padding and what is no target take less."""
    check_top_k(recipe, vocab_size)
    kept = [plan for plan in plans if uses_cache(recipe, plan.stage)]
    if not kept:
        return []
    top_k, tokens = recipe.teacher.cache.top_k, sum(plan.num_tokens for plan in kept)
    each = bytes_a_target(top_k, vocab_size)
    return [f"\nteacher on disk: its {top_k} likeliest tokens, {each} bytes a target; "
            f"up to {tokens:,} targets, {_bytes(tokens * each)}"]  # fmt: skip


def _bytes(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"


def held_bytes(zero: int, size: int, *, low: bool, trained: float, frozen: float = 0, teacher: float = 0) -> float:
    """Bytes of one process of `size`: `trained` and `frozen` parameters of the student, and as many numbers of the
    teacher as it holds. low: it computes in bfloat16."""
    cast = low and zero > 0
    parameters = trained * (2 if cast else 4) / (size if zero == 3 else 1)
    gradients = trained * 4 / (size if zero >= 2 else 1)
    optimizer = trained * (8 + (4 if zero > 0 else 0)) / (size if zero >= 1 else 1)
    rest = frozen * (2 if cast else 4) / (size if zero == 3 else 1) + teacher * (2 if cast else 4)
    return parameters + gradients + optimizer + rest


def activation_bytes(
    config: DeltaNetConfig, tokens: int, *, low: bool, checkpointing: bool = False, compiled: bool = False
) -> float:
    """Bytes that a micro-batch of `tokens` keeps for the student's backward pass, and the loss's chunk of logits.

    A layer keeps 8 numbers a token for each channel of the residual stream, 8 for each of its heads' and 4 for each of
    the MLP, compiled three quarters of that; with checkpointing every layer its input alone, and one layer all. Fitted
    to peaks on one H100 (27 November 2026): docs/results/multi-gpu.md has them beside these counts.
    """
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    layer = (8 * width + 8 * heads + 4 * config.intermediate_size) * (0.75 if compiled else 1)
    layers = config.num_hidden_layers
    numbers = layers * width + layer if checkpointing else layers * layer
    size = 2 if low else 4
    return tokens * numbers * size + min(CHUNK_BYTES, tokens * config.vocab_size * (2 * size + FLOATS))


def _memory(recipe: Recipe, stages: list[tuple[StagePlan, DeltaNetConfig]], teacher: DeltaNetConfig | None) -> str:
    """What one process holds, of 1 and of 8, in the stage that trains most."""
    counted = [(_trained(plan, config), plan, config) for plan, config in stages]
    trained, plan, config = max(counted, key=lambda item: item[0])
    is_held = teacher is not None and recipe.teacher.cache is None
    frozen, other = _count(config) - trained, _count(teacher) if is_held else 0
    low = recipe.training.dtype == "bfloat16"
    sequences = plan.micro_batch_size
    kept = activation_bytes(
        config,
        sequences * plan.seq_len,
        low=low,
        checkpointing=recipe.training.activation_checkpointing,
        compiled=recipe.training.compile,
    )
    lines = [
        f"\nmemory a process, counted ({recipe.training.dtype}), {_bytes(kept)} of it for the backward pass of "
        f"{sequences} x {plan.seq_len:,} tokens",
        "ZeRO      1 process    8 processes",
    ]
    for zero in range(4):
        figures = []
        for size in (1, 8):
            parts = size if is_sharded(recipe, size, zero) else 1
            held = 0 if parts > 1 and recipe.teacher.offload == "cpu" else other / parts
            whole = held_bytes(zero, size, low=low, trained=trained, frozen=frozen, teacher=held) + kept
            figures.append(_bytes(whole))
        mark = "  <- this recipe" if zero == recipe.deepspeed.stage else ""
        lines.append(f"{zero:<6}{figures[0]:>13}{figures[1]:>15}{mark}")
    return "\n".join(lines)
