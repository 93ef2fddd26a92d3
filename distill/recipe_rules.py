"""The rules of a recipe that join several keys; what a single key may be is in `schema.py`.

Twin: tests/distill/test_recipe.py.
"""

from collections.abc import Iterator
from pathlib import Path

from deltanet_errors import UserError, nearest

from .schema import LONGEST_NAME, LOSSES_OF, WITHOUT_TEACHER, Recipe, Source, Stage, has_key, names_a_file
from .shares import BLOCK, dealt
from .yaml_lines import KeyPath

Broken = Iterator[tuple[KeyPath, str]]
MISSING = "missing"
# Keys of DeepSpeed's configuration that other keys of a recipe decide.
_OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "stages.N.clip",
    "optimizer": "stages.N.lr, weight_decay and adam_betas",
    "scheduler": "stages.N.schedule",
    "bf16": "training.dtype",
    "fp16": "training.dtype",
    "data_parallel_size": "the number of processes",
    "sequence_parallel_size": "the number of processes, each of which reads whole sequences",
    "zero_optimization.stage": "deepspeed.stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload_optimizer",
    "zero_optimization.offload_param": "deepspeed.offload_parameters",
}

# What to do where held-out text would be the text that is trained on: (key, remedy) by the kind of its source.
_REMEDY = {
    "from_teacher": ("name", "what the teacher writes follows from the name, so give it a name of its own"),
    "dataset": ("dataset", "say another `split:`"),
    "task": ("seed", "give it a seed of its own"),
}


def stage_sources(recipe: Recipe, stage: Stage) -> tuple[str, ...]:
    """The names of the sources a stage reads: those it says, else all that it can read."""
    return stage.sources or tuple(source.name for source in recipe.data.sources if _reads(stage, source))


def trained_sources(recipe: Recipe) -> list[Source]:
    """Those that a stage reads."""
    names = {name for stage in recipe.stages for name in stage_sources(recipe, stage)}
    return [source for source in recipe.data.sources if source.name in names]


def is_sharded(recipe: Recipe, num_processes: int, zero: int | None = None) -> bool:
    """Whether the processes keep a part of the teacher each; `zero` instead of the recipe's own stage."""
    teacher = recipe.teacher
    if teacher is None or num_processes == 1 or teacher.shard == "off":
        return False
    return teacher.shard == "on" or ((recipe.deepspeed.stage if zero is None else zero) == 3 and teacher.cache is None)


def _reads(stage: Stage, source: Source) -> bool:
    return (source.kind == "preference") == (stage.kind == "dpo")


def broken_rules(recipe: Recipe) -> Broken:
    """Where each rule is broken, and what to say of it."""
    yield from _check_models(recipe)
    yield from _check_cache(recipe)
    names = [source.name for source in recipe.data.sources]
    for part, sources in (("data", recipe.data.sources), ("evaluation", recipe.evaluation.sources)):
        for index, source in enumerate(sources):
            path = (part, "sources", index)
            if [source.path, source.dataset, source.from_teacher, source.task].count(None) != 3:
                yield (
                    path,
                    "say `path:` (local files), `dataset:` (of the Hub), `from_teacher:` or `task:`, one of them",
                )
            if source.from_teacher is not None and recipe.teacher is None:
                yield (*path, "from_teacher"), "there is no teacher to write it"
            yield from _check_task(source, path)
            if source.from_teacher is not None and not names_a_file(source.name):
                what = f"no '/', no '.' at its start, at most {LONGEST_NAME} bytes"
                yield (*path, "name"), f"got {source.name!r}, but files are called so; {what}"
            if source.from_teacher is None and source.top_p != 1:
                yield (*path, "top_p"), "`top_p:` belongs to `from_teacher:`"
            if source.from_teacher is None and source.openings:
                yield (*path, "openings"), "`openings:` belongs to `from_teacher:`"
            if source.from_teacher is not None and source.kind == "preference":
                yield (*path, "kind"), "the teacher writes texts and chats; `from_teacher:` makes no preferences"
            for key in ("config", "revision", "split") if source.dataset is None else ():
                if getattr(source, key) != Source.model_fields[key].default:
                    yield (*path, key), f"`{key}:` belongs to `dataset:`"
    yield from _check_written(recipe)
    trained = [_text_of(source) for source in trained_sources(recipe)]
    for index, source in enumerate(recipe.evaluation.sources):
        if (text := _text_of(source)) is not None and text in trained:
            key, remedy = _REMEDY[text[0]]
            what = f"{getattr(source, key)!r} is the very text that the stages train on; {remedy}"
            yield ("evaluation", "sources", index, key), what
    for index, name in enumerate(names):
        if name in names[:index]:
            yield ("data", "sources", index, "name"), f"{name!r} names two sources; give each a name of its own"
    weights = [source.weight is None for source in recipe.data.sources]
    if any(weights) and not all(weights):
        yield ("data", "sources", weights.index(True)), "give every source a weight, or none"
    if not any(weights):
        yield from _check_weights(recipe)
    if not recipe.stages:
        yield ("stages",), "no stage to run"
    if not recipe.data.sources:
        yield ("data", "sources"), "no source of text"
    for index, stage in enumerate(recipe.stages):
        yield from _check_stage(recipe, stage, ("stages", index), names)
    seen = [stage.name for stage in recipe.stages]
    for index, name in enumerate(seen):
        if name in seen[:index]:
            yield ("stages", index, "name"), f"{name!r} names two stages"
    for key in recipe.deepspeed.extra:
        if key in _OWNED:
            yield ("deepspeed", "extra", key), f"decided by {_OWNED[key]}, not here"
    zero = recipe.deepspeed.extra.get("zero_optimization", {})
    for key in zero if isinstance(zero, dict) else ():
        if f"zero_optimization.{key}" in _OWNED:
            owner = _OWNED[f"zero_optimization.{key}"]
            yield ("deepspeed", "extra", "zero_optimization", key), f"decided by {owner}, not here"
    if recipe.deepspeed.offload_parameters != "none" and recipe.deepspeed.stage != 3:
        yield ("deepspeed", "offload_parameters"), "needs deepspeed.stage 3"
    teacher = recipe.teacher
    if teacher is not None and teacher.offload != "none" and not is_sharded(recipe, 2):
        yield ("teacher", "offload"), "needs teacher.shard on, or deepspeed.stage 3"
    if teacher is not None and teacher.shard == "on" and teacher.cache is not None:
        yield ("teacher", "shard"), "needs a recipe without teacher.cache, which processes write each on their own"
    if teacher is not None and teacher.shard == "on" and recipe.training.compile:
        yield ("training", "compile"), "needs teacher.shard off"
    if recipe.training.compile and recipe.deepspeed.stage == 3:
        yield ("training", "compile"), "needs deepspeed.stage 0, 1 or 2: ZeRO 3 gathers parameters inside of the layers"
    if recipe.deepspeed.offload_optimizer != "none" and recipe.deepspeed.stage == 0:
        yield ("deepspeed", "offload_optimizer"), "needs deepspeed.stage 1, 2 or 3"


def uses_cache(recipe: Recipe, stage: Stage) -> bool:
    """Whether the stage reads the teacher's next tokens from disk."""
    is_kept = recipe.teacher is not None and recipe.teacher.cache is not None
    return is_kept and any(loss.name == "forward_kl" for loss in stage.losses)


def _check_cache(recipe: Recipe) -> Broken:
    if recipe.teacher is None or recipe.teacher.cache is None:
        return
    if not any(uses_cache(recipe, stage) for stage in recipe.stages):
        yield ("teacher", "cache"), "no stage has the loss forward_kl, which alone reads it; leave it out"
    for index, stage in enumerate(recipe.stages):
        path = ("stages", index)
        if stage.kind == "align":
            what = "needs the teacher's layers, and with teacher.cache it is not in memory; align in a run of its own"
            yield (*path, "kind"), f"an align stage {what}"
            continue
        if stage.kind == "onpolicy":
            what = "trains on what the student writes, which no teacher.cache can hold beforehand"
            yield (*path, "kind"), f"an onpolicy stage {what}"
            continue
        for place, loss in enumerate(stage.losses):
            allowed = [name for name in LOSSES_OF[stage.kind] if name in ("forward_kl", *WITHOUT_TEACHER)]
            if loss.name in LOSSES_OF[stage.kind] and loss.name not in allowed:
                what = "needs more of the teacher than the likeliest tokens of teacher.cache"
                yield (*path, "losses", place, "name"), f"{loss.name!r} {what}; with it allowed: {', '.join(allowed)}"
            if loss.name == "forward_kl" and loss.temperature != 1:
                what = "cannot be had of teacher.cache, which is of temperature 1"
                yield (*path, "losses", place, "temperature"), f"{loss.temperature:g} {what}"


def _check_models(recipe: Recipe) -> Broken:
    student = recipe.student
    if student.model is None and student.convert is None and student.new is None:
        yield (
            ("student",),
            "say `model:` (a folder), `convert:` (how to make one of a teacher) or `new:` (from nothing)",
        )
    if student.new is not None and (recipe.teacher is not None or student.convert is not None):
        other = "convert" if student.convert is not None else "teacher"
        yield ("student", "new"), f"a student from nothing has no teacher; leave out `{other}:`, or `new:`"
    if recipe.teacher is not None:
        model, revision = recipe.teacher.model, recipe.teacher.revision
        if revision is not None and (model == "demo" or Path(model).exists()):
            yield ("teacher", "revision"), f"got {revision!r}, but {model} is local; only Hub repositories have any"
        return
    if student.new is None:
        yield ("teacher",), MISSING
    for index, stage in enumerate(recipe.stages):
        if stage.kind in ("align", "convert_step"):
            yield ("stages", index, "kind"), f"a stage of kind {stage.kind} needs a `teacher:`"
        for place, loss in enumerate(stage.losses):
            if stage.kind != "align" and loss.name not in WITHOUT_TEACHER:
                allowed = ", ".join(name for name in LOSSES_OF[stage.kind] if name in WITHOUT_TEACHER)
                rest = f"; without one allowed: {allowed}" if allowed else ""
                yield ("stages", index, "losses", place, "name"), f"{loss.name!r} needs a `teacher:`{rest}"


def _text_of(source: Source) -> tuple | None:
    """What decides the text of a source; None of files, which are told apart as they are looked for."""
    if source.from_teacher is not None:
        return "from_teacher", source.name
    if source.dataset is not None:
        return "dataset", source.dataset, source.config, source.split, source.revision, source.field
    return None if source.task is None else ("task", source.task, _options_of(source), source.seed)


def _options_of(source: Source) -> dict:
    """Of a task, with every default filled in; as they are where they are wrong, which is told elsewhere."""
    from .evaluation.tasks import TASKS

    try:
        return TASKS[source.task].options(source.options)
    except (KeyError, UserError):
        return source.options


def _check_written(recipe: Recipe) -> Broken:
    """No two sources of other names are written into the same files."""
    seen: dict[str, str] = {}
    for part, sources in (("data", recipe.data.sources), ("evaluation", recipe.evaluation.sources)):
        for index, source in enumerate(sources):
            if source.from_teacher is None:
                continue
            other = seen.setdefault(source.written_as, source.name)
            if other != source.name:
                what = f"its files would be called {source.written_as}, as those of {other!r}; give it another name"
                yield (part, "sources", index, "name"), what


def _check_weights(recipe: Recipe) -> Broken:
    named = {source.name: (index, source.weight) for index, source in enumerate(recipe.data.sources)}
    for stage in recipe.stages:
        read = [named[name] for name in stage_sources(recipe, stage) if name in named]
        counts = dealt([weight for _, weight in read])
        for (index, weight), count in zip(read, counts):
            if count == 0:
                what = f"is below 1/{BLOCK} of what stage {stage.name} reads, which would never see the source"
                yield ("data", "sources", index, "weight"), f"{weight:g} {what}"


def _check_task(source: Source, path: KeyPath) -> Broken:
    if source.task is None:
        for key in ("options", "documents", "seed"):
            # A recipe that was shown names every key, so a default is no mistake.
            if getattr(source, key) != Source.model_fields[key].default:
                yield (*path, key), f"`{key}:` belongs to `task:`"
        if source.kind == "task":
            yield (*path, "kind"), "say which `task:`"
        return
    from .evaluation.tasks import TASKS

    if source.task not in TASKS:
        yield (
            (*path, "task"),
            f"{source.task!r} is no task{nearest(source.task, list(TASKS))}; tasks: {', '.join(TASKS)}",
        )
        return
    if source.kind != "task":
        yield (*path, "kind"), f"a task is no {source.kind}; leave `kind:` out"
    if source.documents is None:
        yield (*path, "documents"), "say how many examples of the task"
    try:
        TASKS[source.task].options(source.options)
    except UserError as error:
        yield (*path, "options"), str(error)


def _check_stage(recipe: Recipe, stage, path: KeyPath, names: list) -> Broken:
    for key in sorted(key for key in stage.model_fields_set if not has_key(stage.kind, key)):
        keys = [name for name in type(stage).model_fields if has_key(stage.kind, name)]
        yield (*path, key), f"a {stage.kind} stage has no such key; allowed: {', '.join(keys)}"
    if stage.kind == "convert_step":
        if stage.hybrid is None:
            yield (*path, "hybrid"), "say which layers keep attention"
    elif (stage.steps is None) == (stage.tokens is None):
        yield path, "say `steps:` or `tokens:`, one of them"
    for index, loss in enumerate(stage.losses):
        allowed = LOSSES_OF[stage.kind]
        if loss.name not in allowed:
            yield (*path, "losses", index, "name"), f"{loss.name!r} is no loss of a {stage.kind} stage; " \
                f"allowed: {', '.join(allowed)}"  # fmt: skip
        if loss.name in [other.name for other in stage.losses[:index]]:
            yield (
                (*path, "losses", index, "name"),
                f"{loss.name!r} is there twice; the metrics have one column of a name",
            )
    for index, name in enumerate(stage.sources or ()):
        if name in stage.sources[:index]:
            yield (*path, "sources", index), f"{name!r} is there twice; how much of it is read, its weight says"
    if not stage.losses and stage.kind != "convert_step":
        yield (*path, "losses"), "no loss to train on"
    if stage.kind == "onpolicy" and recipe.deepspeed.stage == 3:
        yield (*path, "kind"), "an onpolicy stage runs under deepspeed.stage 0, 1 or 2: under 3 each token that the " \
            "student writes would gather all its parameters"  # fmt: skip
    seq_len = stage.seq_len or recipe.data.seq_len
    if stage.kind == "onpolicy" and stage.completion_tokens >= seq_len:
        yield (*path, "completion_tokens"), f"{stage.completion_tokens} leaves no room for a prompt in {seq_len} tokens"
    if stage.kind == "onpolicy" and recipe.data.train_on == "all":
        read = stage_sources(recipe, stage)
        if any(source.kind == "chat" and source.name in read for source in recipe.data.sources):
            yield (*path, "kind"), "an onpolicy stage takes from a chat what comes before its first target, which is " \
                "nothing with data.train_on all"  # fmt: skip
    if stage.kind == "dpo" and len(stage.losses) > 1:
        yield (*path, "losses"), f"a dpo stage has one loss, not {len(stage.losses)}"
    readable = [source.name for source in recipe.data.sources if _reads(stage, source)]
    if not readable and names:
        kind = "`kind: preference`" if stage.kind == "dpo" else "text or chats"
        yield path, f"no source for a {stage.kind} stage, which reads {kind}"
    for index, name in enumerate(stage.sources):
        if name not in readable:
            what = f"is no source that a {stage.kind} stage can read" if name in names else "is no source"
            yield (*path, "sources", index), f"{name!r} {what}; allowed: {', '.join(readable)}{nearest(name, readable)}"
    batch = stage.batch_size or recipe.training.batch_size
    micro = stage.micro_batch_size or recipe.training.micro_batch_size
    if batch % micro:
        own = [(*path, key) for key in ("micro_batch_size", "batch_size") if getattr(stage, key) is not None]
        where = own[0] if own else ("training", "batch_size")
        yield where, f"a batch of {batch} sequences is no multiple of a micro-batch of {micro}"
    if stage.steps is not None and stage.warmup_steps > stage.steps:
        yield (*path, "warmup_steps"), f"{stage.warmup_steps} is more than the stage's {stage.steps} steps"
