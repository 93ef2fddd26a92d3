"""What a run refuses before it makes anything, so that no hour of training is lost on a word; --dry-run refuses it too.

What needs the tokens is refused as they are there (`prepare.py`). Twin: tests/distill/test_checks.py.
"""

import torch

from deltanet import DeltaNetConfig
from deltanet.config import max_context
from deltanet_errors import UserError, nearest, one_line

from .convert_step import config_after
from .engine import EngineSettings
from .evaluation.evaluate import check_contexts
from .evaluation.selection import Chosen, select
from .export import check_formats, check_push
from .metrics import check_trackers
from .paths import check_paths
from .schema import Recipe
from .stages import needs_teacher
from .task_sources import trained_tasks
from .trainable import check_stage
from .world import quiet_deepspeed


def check_recipe(recipe: Recipe) -> list[Chosen]:
    """The tasks that the run measures at its end. Raises UserError for what this machine lacks (files, trackers, a
    token for the Hub, a folder that can be written) and for what DeepSpeed does not take."""
    check_push(recipe.export.push)
    check_trackers(recipe.logging)
    check_paths(recipe)
    if recipe.deepspeed.extra:
        _check_extra(engine_settings(recipe))
    return [*select(recipe.evaluation.tasks, "evaluation.tasks"), *trained_tasks(recipe.data.sources)]


def check_teacher(recipe: Recipe, config: DeltaNetConfig, tokenizer) -> None:
    """Raises UserError where the teacher of this configuration and tokenizer (None: it has none) cannot read the
    recipe's texts, its chats or sequences of their length."""
    if tokenizer is None:
        raise UserError(f"teacher.model: {recipe.teacher.model} has no tokenizer, so no text can be read")
    longest = max_context(config)
    lengths = {"data.seq_len": recipe.data.seq_len}  # also that of held-out text, which the teacher always reads
    asked = [stage for stage in recipe.stages if stage.seq_len is not None and needs_teacher(stage)]
    lengths |= {f"stages.{stage.name}.seq_len": stage.seq_len for stage in asked}
    for key, length in lengths.items():
        if length > longest:
            raise UserError(
                f"{key} {length}: allowed is 2 to {longest}, the range of the teacher {recipe.teacher.model}"
            )
    for source in (*recipe.data.sources, *recipe.evaluation.sources):
        if source.kind in ("chat", "preference") and not tokenizer.chat_template:
            raise UserError(
                f"source {source.name}: kind {source.kind} needs a chat template, and the tokenizer of the teacher "
                f"{recipe.teacher.model} has none"
            )


def check_student(recipe: Recipe, config: DeltaNetConfig, device: torch.device) -> None:
    """Raises UserError where a student of this configuration cannot go through the stages, be measured or exported as
    the recipe says."""
    check_formats(recipe.export.formats, config, recipe.stages)
    check_contexts(recipe.evaluation.contexts, max_context(config), device, "evaluation.contexts")
    for stage in recipe.stages:
        config = config_after(stage, config)
        if stage.kind != "convert_step":
            check_stage(stage, config)


def engine_settings(recipe: Recipe) -> EngineSettings:
    """The engine's part of a recipe; what a stage decides is put in as it starts."""
    sharding = recipe.deepspeed
    return EngineSettings(
        zero_stage=sharding.stage,
        precision="bf16" if recipe.training.dtype == "bfloat16" else "fp32",
        offload_optimizer=sharding.offload_optimizer == "cpu",
        offload_parameters=sharding.offload_parameters == "cpu",
        extra=sharding.extra,
    )


class _Noting(dict):
    """A mapping that notes which keys it was asked for, there or not; a copy notes them in the same set."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.asked: set[str] = set()

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self  # of which only `in` is asked


def _check_extra(settings: EngineSettings) -> None:
    """Raises UserError for what DeepSpeed refuses, and for a key that it does not look for: it has no list of them,
    and leaves others out without a word."""
    config = _Noting(settings.deepspeed_config())
    try:
        quiet_deepspeed().DeepSpeedConfig(config)
    except Exception as error:  # of pydantic, or whatever a value of the wrong type meets on its way
        raise UserError(f"deepspeed.extra: DeepSpeed refuses it: {one_line(error)}") from None
    for key in settings.extra:
        if key not in config.asked:
            hint = nearest(key, sorted(config.asked))
            raise UserError(f"deepspeed.extra.{key}: DeepSpeed reads no such key, so it would do nothing{hint}")
