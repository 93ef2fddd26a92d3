"""From a recipe to what its stages will read: tokens of every source, the held-out part, and each stage in numbers.

Rank 0 tokenises into the run's cache, the others open what it made. Twin: tests/distill/test_run.py.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from convert.command import load_tokenizer
from deltanet_errors import UserError

from .batch import num_targets
from .data import Corpus, Part, Report, chosen, has_target, split, whole
from .onpolicy import prompt_corpus
from .packing import Sequence
from .recipe_rules import stage_sources
from .schedules import Schedule
from .schema import Recipe, Source, Stage
from .teacher_text import planned
from .token_cache import Tokens, check_same_tokenizer, tokenise
from .world import World, once

HELD_OUT_KEY = 1 << 20  # apart from the stages' own keys, which are their numbers


@dataclass(frozen=True)
class Prepared:
    """The tokens of a run: for training by source name, and for evaluation."""

    train: dict[str, Part]
    held_out: list[Part]
    pad_id: int


@dataclass(frozen=True)
class StagePlan:
    """A stage with every number settled, and its training text."""

    index: int
    stage: Stage
    num_steps: int
    batch_size: int
    micro_batch_size: int
    seq_len: int
    corpus: Corpus

    @property
    def num_tokens(self) -> int:
        is_step = self.stage.kind == "convert_step"
        return self.stage.tokens if is_step else self.num_steps * self.batch_size * self.seq_len

    @property
    def schedule(self) -> Schedule:
        stage = self.stage
        return Schedule(
            stage.schedule, self.num_steps, stage.warmup_steps, stage.final_lr_fraction, stage.decay_fraction
        )

    @property
    def reports(self) -> list[Report]:
        return self.corpus.reports


def check_tokenizer(student: Path, teachers) -> None:
    """Raises UserError where the checkpoint folder `student` has a tokenizer that is not its teacher's."""
    own = load_tokenizer(student)
    if own is not None:
        check_same_tokenizer(teachers, own)


def prepare(
    recipe: Recipe,
    tokenizer,
    vocab_size: int,
    stop_ids: Collection[int],
    cache: Path,
    world: World,
    *,
    write: Callable[[Source], Source] | None = None,
    write_once: Callable[[Callable], dict] | None = None,
    advance: Callable[[Source, int], None] = lambda source, tokens: None,
) -> Prepared:
    """Tokenises all sources; `write` makes files of those the teacher writes (None: they are only planned).
    `write_once` is `world.once`, where the teacher is parted over the ranks.

    `advance` is told a source and its tokens so far after every document. Raises UserError for what is wrong with a
    source, on every rank.
    """
    written: dict[str, Source] = {}

    def read(source: Source) -> Tokens:
        if source.from_teacher is not None:
            if write is None:
                return planned(source, recipe.data.seq_len)
            source = written[source.name]
        options = {"vocab_size": vocab_size, "train_on": recipe.data.train_on, "stop_ids": stop_ids}
        return tokenise(source, tokenizer, cache, **options, advance=functools.partial(advance, source))

    sources = [*recipe.data.sources, *recipe.evaluation.sources]
    if write is not None:
        texts = [source for source in sources if source.from_teacher is not None]
        written = (write_once or functools.partial(once, world))(
            lambda: {source.name: write(source) for source in texts}
        )
    if world.size > 1:
        once(world, lambda: [read(source) for source in sources] and None)
    train, held_out = {}, []
    for source in recipe.data.sources:
        share = 0.0 if recipe.evaluation.sources else recipe.data.held_out
        train[source.name], held = split(read(source), share)
        held_out.append(chosen(held))
    if recipe.evaluation.sources:
        held_out = [chosen(whole(read(source))) for source in recipe.evaluation.sources]
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Prepared(train, [part for part in held_out if part.num_tokens], pad_id)


def plan_stages(recipe: Recipe, prepared: Prepared) -> list[StagePlan]:
    """Every stage in numbers. Raises UserError where its sources cannot fill a sequence."""
    plans = []
    for index, stage in enumerate(recipe.stages):
        names = stage_sources(recipe, stage)
        weights = {source.name: source.weight for source in recipe.data.sources}
        seq_len = stage.seq_len or recipe.data.seq_len
        batch_size = stage.batch_size or recipe.training.batch_size
        parts = [prepared.train[name] for name in names]
        order = {
            "key": (recipe.data.seed, index),
            "weights": None if weights[names[0]] is None else [weights[name] for name in names],
        }
        if stage.kind == "onpolicy":
            corpus = prompt_corpus(parts, stage, seq_len, **order)
        else:
            corpus = Corpus(
                parts,
                seq_len=seq_len,
                packing=recipe.data.packing,
                too_long=recipe.data.too_long,
                repeats=recipe.data.repeats,
                noise=recipe.data.noise,
                pad_id=prepared.pad_id,
                **order,
            )
        steps = stage.steps or math.ceil(stage.tokens / (batch_size * seq_len))
        steps = 1 if stage.kind == "convert_step" else steps  # a commit of its own
        micro = stage.micro_batch_size or recipe.training.micro_batch_size
        plans.append(StagePlan(index, stage, steps, batch_size, micro, seq_len, corpus))
    return plans


def held_out_sequences(recipe: Recipe, prepared: Prepared) -> list[Sequence]:
    """Up to evaluation.tokens of held-out text, in sequences of data.seq_len (shorter where no source has as much).

    Of data.sources one whose share is too small to measure anything takes no part. Raises UserError where nothing can
    be measured, or not on one of evaluation.sources.
    """
    longest = max((part.num_tokens for part in prepared.held_out), default=0)
    seq_len, named = min(recipe.data.seq_len, longest), recipe.evaluation.sources
    parts = [part for part in prepared.held_out if named or has_target(part, seq_len)]
    sequences: list[Sequence] = []
    if parts:
        key = (recipe.data.seed, HELD_OUT_KEY)
        corpus = Corpus(parts, seq_len=seq_len, key=key, pad_id=prepared.pad_id, may_be_short=True)
        count = max(1, min(len(corpus), recipe.evaluation.tokens // seq_len))
        sequences = [corpus[index] for index in range(count)]
    if not num_targets(sequences):
        found = f" that says what comes next (most of a source: {longest} tokens)" if longest else ""
        remedy = "give evaluation.sources more text" if named else "set data.held_out higher or give evaluation.sources"
        raise UserError(f"nothing is held out for evaluation{found}; {remedy}")
    return sequences


def sequences_digest(sequences: list[Sequence]) -> str:
    """sha256 of what is measured on these sequences."""
    digest = hashlib.sha256()
    for sequence in sequences:
        for values in (sequence.input_ids, sequence.targets, sequence.cu_seqlens):
            digest.update(values.tobytes())
    return digest.hexdigest()
