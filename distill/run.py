"""One distillation from recipe to export, in a folder that holds everything about it.

    run/recipe.yaml environment.json inputs.json    written before step 1
    run/student/            the converted student, where the recipe converts one; what made it: student.json
    run/written/ tokens/    what the teacher wrote, if the recipe asks; the sources, tokenised once
    run/logits/             with `teacher.cache`: what the teacher says of every target
    run/references/         of `dpo` stages: the student as the stage found it
    run/commits/step-N/     atomic checkpoints; the newest that verifies is where the run goes on
    run/metrics.jsonl report.json report.md loss.png
    run/evaluation.*        the page of deltanet-eval, if the recipe asks for tasks or contexts
    run/export/             the finished student

Every stage starts from a folder (the student's, or a commit), so going on to the next stage and resuming after a kill
are the same thing. Twins: tests/distill/test_run.py, tests/fault/test_kill.py.
"""

import contextlib
import functools
import gc
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
import transformers

from convert.command import load_tokenizer
from convert.families import teacher_config
from convert.loading import load_teacher
from convert.publish.push import push
from convert.sources import open_source
from convert.tokens import num_ids
from deltanet import DeltaNetConfig, DeltaNetForCausalLM, load_student
from deltanet.config import max_context
from deltanet_errors import DeltanetError, UserError

from . import lora
from .checks import check_recipe, check_student, check_teacher, engine_settings
from .commit import Commit, drop_newer, locked, write_commit
from .convert_step import Untrained, convert_more, windows
from .engine import Engine
from .evaluate import compare, mean_parts
from .first_student import first_student, planned
from .interrupts import Interrupts
from .logit_cache import LogitCache, check_top_k, write_cache
from .loop import Job, Rim, positions_of, train
from .metrics import MetricsLog, Pulse, trackers
from .no_room import telling_of_no_room
from .onpolicy import Completions
from .preferences import keep_reference
from .prepare import (
    Prepared,
    StagePlan,
    check_tokenizer,
    held_out_sequences,
    plan_stages,
    prepare,
    sequences_digest,
)
from .recipe import load_recipe
from .recipe_rules import is_sharded, uses_cache
from .records import checkpoint_digests, write_records
from .results import write_results
from .resume import COMMITS, find_commit, run_folder
from .schema import Recipe, Source
from .sharded import frozen_student, frozen_teacher, once_with, partition, student_to_part
from .stages import PREFIX, Align, Dpo, Whole, compile_layers, needs_teacher, share_frozen
from .state import STUDENT, Marks, load_adapters, load_moments, write_state
from .task_sources import check_tasks
from .teacher_text import written_source
from .trainable import parameter_groups, trained_names
from .world import World, ending_together, once, start_world


def distil(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    output: str | Path | None = None,
    resume: str = "auto",
) -> dict:
    """Runs the recipe at `path` in the folder `output` (runs/NAME by default) and returns the report's facts.

    resume: `auto` goes on from the newest commit, `never` refuses a folder that has one, else the folder of a commit.
    Raises UserError for wrong input, Interrupted (exit code 75) after a signal, with everything committed.
    """
    return carry_out(load_recipe(path, overrides), run_folder(path, output), resume)


def carry_out(recipe: Recipe, folder: Path, resume: str) -> dict:
    """As `distil`, where the recipe is read and the folder known."""
    transformers.utils.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        world = start_world()
        stack.enter_context(ending_together(world))
        teacher = None
        if recipe.teacher is not None:
            teacher = stack.enter_context(open_source(recipe.teacher.model, recipe.teacher.revision)).folder
        once(world, lambda: stack.enter_context(locked(folder)))
        stack.enter_context(telling_of_no_room(folder))
        stack.enter_context(interrupts.at_once())
        return _Run(recipe, folder, teacher, world, interrupts).everything(resume)


def _free_memory() -> None:
    """What was dropped goes back to the card, also what the allocator keeps of it, as other runs may share the card."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Run:
    """The steps of a run, in the order of `everything`."""

    def __init__(self, recipe: Recipe, folder: Path, teacher: Path | None, world: World, interrupts: Interrupts):
        self.recipe, self.folder, self.world, self.interrupts = recipe, folder, world, interrupts
        self.teacher_folder, self.commits, self.pulse = teacher, folder / COMMITS, Pulse()
        self.caches: dict[int, LogitCache] = {}
        self.in_parts = is_sharded(recipe, world.size)
        self.settings = engine_settings(recipe)

    def everything(self, resume: str) -> dict:
        self.tasks = once(self.world, lambda: check_recipe(self.recipe))
        commit = once(self.world, lambda: self._find_commit(resume))
        if self.teacher_folder is not None:
            once(self.world, self._check_teacher)
        if self.recipe.student.convert is not None:
            once(self.world, lambda: self._check_student(planned(self.recipe, teacher_config(self.teacher_folder))))
        self.start = once(self.world, lambda: first_student(self.recipe, self.folder, self.teacher_folder, _say))
        once(self.world, lambda: self._check_student(DeltaNetConfig.from_pretrained(self.start)))
        tokenizer = load_tokenizer(self.teacher_folder or self.start)
        if tokenizer is None:
            raise UserError(f"{self.start} has no tokenizer, so no text can be read")
        self.tokenizer = tokenizer
        once(self.world, lambda: check_tokenizer(self.start, tokenizer))
        self.teacher = None if self.teacher_folder is None else self._load_teacher()
        config = DeltaNetConfig.from_pretrained(self.start) if self.teacher is None else self.teacher.config
        longest = max_context(config)
        vocab_size = config.vocab_size
        self.vocab_size = min(vocab_size, num_ids(tokenizer))
        check_top_k(self.recipe, self.vocab_size)
        stop_ids = config.eos_token_id
        stop_ids = [stop_ids] if isinstance(stop_ids, int) else stop_ids or []
        self.stop_ids = {*stop_ids, tokenizer.eos_token_id} - {None}
        prepared = prepare(
            self.recipe,
            tokenizer,
            vocab_size,
            stop_ids,
            self.folder / "tokens",
            self.world,
            write=self._write_text,
            write_once=functools.partial(once_with, self.teacher, self.world),
            advance=self._watch,
        )
        self.plans = plan_stages(self.recipe, prepared)
        self.held_out = held_out_sequences(self.recipe, prepared)
        self.measured_on = sequences_digest(self.held_out)
        once(self.world, lambda: self._write_records(prepared, commit))
        limit = self.recipe.evaluation.task_examples
        once(self.world, lambda: check_tasks(self.tasks, tokenizer, self.vocab_size, longest, limit))
        self.log = MetricsLog(self.folder / "metrics.jsonl")
        if self.world.is_main:
            self.log.sinks = trackers(self.recipe.logging, self.folder, self.folder.name)

        if commit is not None:
            once(self.world, lambda: drop_newer(self.commits, commit.step))
        results = None if commit is None else self._results_of(commit)
        if results is None:
            results = [] if self.teacher is None else [{"model": "teacher", **self._figures(self.teacher, None)}]
            results.append(self._measure_folder("new" if self.teacher is None else "converted", self.start))
        commit = self._train_from(commit, results)
        return self._finish(commit, results)

    def _find_commit(self, resume: str) -> Commit | None:
        found = find_commit(self.recipe, self.folder, resume, _say)
        if found is not None:
            _say(f"goes on from {found.folder}")
        return found

    def _results_of(self, commit: Commit) -> list[dict] | None:
        """What was measured before the commit; None where it was on other text than the run now measures on, so that
        the figures could not stand side by side."""
        if commit.info.get("measured_on", self.measured_on) == self.measured_on:
            return commit.info["results"]
        _say(
            "evaluation is of other text than before: teacher and first student are measured anew, and stages that had "
            "ended before this commit are left out of the report"
        )
        return None

    def _write_text(self, source: Source) -> Source:
        _say(f"the teacher writes {source.from_teacher:,} tokens or more, kept in {self.folder / 'written'}")
        seed, seq_len = self.recipe.data.seed, self.recipe.data.seq_len
        watch = functools.partial(self._watch, source)
        return written_source(source, self.teacher, self.tokenizer, self.folder / "written", seed, seq_len, watch)

    def _watch(self, source: Source, tokens: int) -> None:
        """Says how far long preparations are."""
        what = "tokens so far" if source.from_teacher is None else f"of {source.from_teacher:,} tokens are written"
        self.pulse(f"{source.name}: {tokens:,} {what}")

    def _load_teacher(self) -> DeltaNetForCausalLM:
        names = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        dtype = torch.bfloat16 if self.settings.casts_parameters else torch.float32
        dtype, offload = names.get(self.recipe.teacher.dtype, dtype), self.recipe.teacher.offload == "cpu"
        return frozen_teacher(self.teacher_folder, dtype, self.world, in_parts=self.in_parts, offload=offload)

    def _write_records(self, prepared: Prepared, commit: Commit | None) -> None:
        came_from = None if commit is None else commit.folder.absolute().parent.parent
        write_records(
            self.folder, self.recipe, self.teacher_folder, self.start, prepared, self.plans, self.world, came_from
        )

    def _train_from(self, commit: Commit | None, results: list[dict]) -> Commit:
        """Every stage that is not finished. `results` grows by a row after each."""
        _free_memory()
        marks = None if commit is None else Marks(**commit.info["marks"])
        first = 0 if marks is None else marks.stage_index
        unfinished = self.plans[first + (marks is not None and marks.step == self.plans[first].num_steps) :]
        self._keep_logits([plan for plan in unfinished if uses_cache(self.recipe, plan.stage)])
        if self.world.is_main:
            self.log.keep_before(first, 0 if marks is None else marks.step)
        for plan in self.plans[first:]:
            goes_on = marks is not None and marks.stage_index == plan.index
            if not goes_on or marks.step < plan.num_steps:
                folder = self.start if commit is None else commit.folder / STUDENT
                tokens = 0 if commit is None else Marks(**commit.info["marks"]).tokens
                commit = self._stage(
                    plan, folder, commit if goes_on else None, marks if goes_on else None, results, tokens
                )
                _free_memory()
            results.append(self._measure_folder(f"after {plan.stage.name}", commit.folder / STUDENT))
            marks = None
        return commit

    def _keep_logits(self, plans: list[StagePlan]) -> None:
        """With `teacher.cache`: what these stages need of the teacher goes to disk, and the teacher out of memory."""
        options = None if self.recipe.teacher is None else self.recipe.teacher.cache
        if options is None:
            return
        made_by = once(self.world, lambda: checkpoint_digests(self.teacher_folder))
        for plan in plans:
            name = plan.stage.name
            _say(f"{name}: the teacher's {options.top_k} likeliest tokens of every target are kept on disk")
            self.caches[plan.index] = write_cache(
                self.folder / "logits" if options.folder is None else Path(options.folder),
                plan,
                self.teacher,
                self.world,
                made_by=made_by,
                top_k=options.top_k,
                vocab_size=self.vocab_size,
                bfloat16=self.settings.precision == "bf16",
                report=_say,
                advance=lambda done, name=name: self.pulse(f"{name}: {done:,} sequences are kept"),
            )
        self.teacher = None
        _free_memory()

    def _stage(
        self,
        plan: StagePlan,
        folder: Path,
        commit: Commit | None,
        marks: Marks | None,
        results: list[dict],
        tokens: int,
    ) -> Commit:
        """Trains one stage from the student in `folder`, and from the moments of `commit` if it goes on. `tokens` have
        been learnt from before."""
        stage, training = plan.stage, self.recipe.training
        if stage.kind == "convert_step":
            return self._convert_more(plan, folder, results, tokens)
        reads_parts = self.settings.zero_stage == 3 and not stage.lora  # adapters are put on whole matrices
        student, source = student_to_part(folder) if reads_parts else (load_student(folder, dtype=torch.float32), None)
        names = set(trained_names([name for name, _ in student.named_parameters()], stage, student.config))
        matrices = lora.adapted(names, stage) if stage.lora else set()
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(name in names - matrices)
        if self.settings.zero_stage < 3 and self.teacher is not None and not self.in_parts:
            low = torch.bfloat16 if self.settings.casts_parameters else torch.float32
            share_frozen(student.to(self.world.device), self.teacher, low)
        if stage.lora:
            lora.adapt(student, matrices, stage, training.seed + plan.index)
            if commit is not None:
                load_adapters(commit.folder, student)
        module = self._module(plan, student, folder, commit is not None)
        if reads_parts:
            partition(module, source, self.settings)
        if training.compile:
            compile_layers(module)
        trained = {n.removeprefix(PREFIX): p for n, p in module.named_parameters() if p.requires_grad}
        groups = parameter_groups(trained, stage, student.config)
        settings = replace(self.settings, gradient_clipping=stage.clip, betas=stage.adam_betas)
        engine = Engine(module, groups, settings, self.world, source)
        if commit is not None:
            load_moments(commit.folder, engine, marks.updates)
        first = 0 if marks is None else marks.step
        before = sum(other.num_steps for other in self.plans[: plan.index])
        sequence = self.caches.get(plan.index, plan.corpus).__getitem__
        if stage.kind == "onpolicy":
            sequence = Completions(
                student,
                plan.corpus,
                stage,
                key=(training.seed, plan.index),
                stop_ids=self.stop_ids,
                vocab_size=self.vocab_size,
                micro_batch_size=plan.micro_batch_size,
                compute=engine.compute,
            )
        made: list[Commit] = []

        def save(step: int, tokens: int) -> None:
            position = Marks(plan.index, stage.name, step, engine.steps, self.world.size, tokens)
            made[:] = [
                write_commit(
                    self.commits,
                    before + step,
                    lambda target: write_state(
                        target,
                        engine,
                        student,
                        self.world,
                        adapter_scale=lora.scale_of(stage) if stage.lora else None,
                        is_last=step == plan.num_steps,
                    ),
                    self._info(position, results),
                    keep=training.keep_commits,
                    ranks=self.world,
                    report=_say,
                )
            ]

        def measure() -> dict[str, float]:
            module.eval()
            count = Whole.count if stage.kind == "dpo" else module.count
            return mean_parts(engine.forward, count, self.held_out, self.world, plan.micro_batch_size)

        job = Job(
            index=plan.index,
            name=stage.name,
            num_steps=plan.num_steps,
            first_step=first,
            steps_before=before,
            tokens_before=tokens,
            batch_size=plan.batch_size,
            micro_batch_size=plan.micro_batch_size,
            schedule=plan.schedule,
            sequence=sequence,
            seed=training.seed,
            log_every=self.recipe.logging.every_steps,
            commit_every_steps=training.commit_every_steps,
            commit_every_seconds=training.commit_every_seconds,
            measure_every_steps=self.recipe.evaluation.every_steps,
            max_skipped_steps=training.max_skipped_steps,
        )
        positions_of(0, job, self.world)
        with self.interrupts.noted():
            train(engine, job, Rim(save, measure, self.log, self.interrupts))
        engine.close()
        return made[0]

    def _info(self, marks: Marks, results: list[dict]) -> dict:
        """What a commit says of itself."""
        return {"marks": asdict(marks), "results": results, "measured_on": self.measured_on}

    def _convert_more(self, plan: StagePlan, start: Path, results: list[dict], tokens: int) -> Commit:
        """A stage that trains nothing, but makes more layers linear. It is one step, so that it has its commit."""
        stage, training, out = plan.stage, self.recipe.training, self.folder / "steps" / plan.stage.name

        def convert() -> None:
            teacher = load_teacher(self.teacher_folder, torch.float32).to(self.world.device)
            new = convert_more(start, out, teacher, stage, windows(plan.corpus, stage.tokens))
            _say(f"{stage.name}: layers {', '.join(map(str, new))} are linear now")

        once(self.world, convert)
        student = load_student(out, dtype=torch.float32)
        made = write_commit(
            self.commits,
            sum(other.num_steps for other in self.plans[: plan.index]) + 1,
            lambda target: write_state(target, Untrained(), student, self.world),
            self._info(Marks(plan.index, stage.name, 1, 0, self.world.size, tokens), results),
            keep=training.keep_commits,
            ranks=self.world,
            report=_say,
        )
        once(self.world, lambda: shutil.rmtree(out.parent, ignore_errors=True))
        return made

    def _module(self, plan: StagePlan, student: DeltaNetForCausalLM, start: Path, goes_on: bool) -> Align | Whole:
        training, stage = self.recipe.training, plan.stage
        if stage.kind == "align":
            module = Align(student, self.teacher, stage)
            module.checkpointing = training.activation_checkpointing
            return module
        if training.activation_checkpointing:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        options = {"vocab_size": self.vocab_size, "chunk_tokens": training.loss_chunk_tokens}
        if stage.kind == "dpo":
            return Dpo(student, self._reference(plan, start, goes_on), stage, teacher=self.teacher, **options)
        return Whole(student, self.teacher if needs_teacher(stage) else None, stage, **options)

    def _reference(self, plan: StagePlan, start: Path, goes_on: bool) -> DeltaNetForCausalLM:
        """The student at the start of the stage, frozen. Kept in the run, since commits that old are not."""
        folder = self.folder / "references" / plan.stage.name
        once(self.world, lambda: keep_reference(start, folder, goes_on))
        dtype = torch.bfloat16 if self.settings.casts_parameters else torch.float32
        return frozen_student(folder, dtype, self.world, in_parts=self.in_parts)

    def _figures(self, model: DeltaNetForCausalLM, teacher: DeltaNetForCausalLM | None) -> dict[str, float]:
        options = {
            "micro_batch_size": self.recipe.training.micro_batch_size,
            "bfloat16": self.settings.precision == "bf16",
            "vocab_size": self.vocab_size,
        }
        return compare(model, teacher, self.held_out, self.world, **options)

    def _measure_folder(self, name: str, folder: Path) -> dict:
        model = frozen_student(folder, torch.float32, self.world, in_parts=self.in_parts)
        figures = self._figures(model, self._recalled_teacher())
        if not all(map(math.isfinite, figures.values())):
            raise DeltanetError(
                f"{name}: what the model says of held-out text is not finite, so nothing is exported ({folder}). Where "
                "training diverged, try a lower stages.N.lr or a longer warm-up, in a folder of its own"
            )
        return {"model": name, **figures}

    def _recalled_teacher(self) -> DeltaNetForCausalLM | None:
        """The teacher to measure with, read again where a cache let it go."""
        return self._load_teacher() if self.teacher is None and self.teacher_folder is not None else self.teacher

    def _finish(self, commit: Commit, results: list[dict]) -> dict:
        """Export, samples of text, the report and the page, by rank 0."""
        teacher = self._recalled_teacher()
        facts = {
            "results": results,
            "tokens": Marks(**commit.info["marks"]).tokens,
            "held_out_tokens": sum(sequence.num_tokens for sequence in self.held_out),
        }
        write = functools.partial(
            write_results,
            self.recipe,
            self.folder,
            student=commit.folder / STUDENT,
            companions=self.start,
            teacher=teacher,
            tokenizer=self.tokenizer,
            held_out=self.held_out,
            tasks=self.tasks,
            device=self.world.device,
            facts=facts,
        )
        facts = once_with(teacher, self.world, write)
        if self.recipe.export.push is not None and self.world.is_main:
            print(f"pushed   {push(self.folder / 'export', self.recipe.export.push)}")
        return facts

    def _check_teacher(self) -> None:
        check_teacher(self.recipe, teacher_config(self.teacher_folder), load_tokenizer(self.teacher_folder))

    def _check_student(self, config: DeltaNetConfig) -> None:
        check_student(self.recipe, config, self.world.device)


def _say(text: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
