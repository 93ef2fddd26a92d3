"""The training loop of one stage, read from top to bottom.

A step is a pure function of (weights, moments, step number): its sequences, learning rate and random seed all follow
from the number, so a resumed run needs nothing else. All ranks decide alike, from one sum over ranks per step.
Twins: tests/distill/test_resume.py, tests/fault/.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from deltanet_errors import DeltanetError, Interrupted, UserError

from .batch import make_batch, num_real
from .engine import Engine
from .interrupts import Interrupts
from .metrics import MetricsLog, Progress
from .order import hashed
from .packing import Sequence
from .schedules import Schedule
from .world import World


@dataclass(frozen=True)
class Job:
    """One stage, ready to run. `sequence(position)` is the training text, a pure function of the position."""

    index: int
    name: str
    num_steps: int
    first_step: int
    steps_before: int
    tokens_before: int
    batch_size: int
    micro_batch_size: int
    schedule: Schedule
    sequence: Callable[[int], Sequence]
    seed: int = 0
    log_every: int = 1
    commit_every_steps: int | None = None
    commit_every_seconds: float | None = None
    measure_every_steps: int | None = None
    max_skipped_steps: int = 3


@dataclass(frozen=True)
class Rim:
    """What the loop calls at its edges, on every rank together: `commit(steps_done, tokens)` makes a checkpoint, where
    so many tokens have changed the weights, `measure()` gives the figures of the held-out text."""

    commit: Callable[[int, int], None]
    measure: Callable[[], dict[str, float]]
    log: MetricsLog
    interrupts: Interrupts


def positions_of(step: int, job: Job, world: World) -> list[list[int]]:
    """This rank's micro-batches of `step`, as positions in the order of the training text.

    Raises UserError where the batch cannot be dealt out evenly: under ZeRO every rank must run as many micro-batches.
    """
    portion = job.micro_batch_size * world.size
    if job.batch_size % portion:
        raise UserError(
            f"{job.name}: a batch of {job.batch_size} sequences cannot be dealt to {world.size} processes in "
            f"micro-batches of {job.micro_batch_size}; allowed: multiples of {portion}"
        )
    mine = job.batch_size // world.size
    start = step * job.batch_size + world.rank * mine
    size = job.micro_batch_size
    return [list(range(at, at + size)) for at in range(start, start + mine, size)]


def train(engine: Engine, job: Job, rim: Rim) -> None:
    """Runs the stage from `job.first_step` to its end and commits. Raises Interrupted (after a commit) on a signal,
    DeltanetError after `max_skipped_steps` steps in a row whose loss or gradient is not finite."""
    world, module = engine.world, engine.module
    progress = Progress(job.name, job.num_steps, job.first_step)
    committed, committed_at, skipped, before = job.first_step, time.monotonic(), 0, time.monotonic()
    learnt_from = job.tokens_before
    for step in range(job.first_step, job.num_steps):
        torch.manual_seed(int(hashed(job.seed, job.index, step, world.rank)[0]) >> 1)
        micro_batches = [[job.sequence(at) for at in positions] for positions in positions_of(step, job, world)]
        local = [sum(map(module.count, micro_batches)), sum(map(num_real, micro_batches))]
        count, tokens = world.sum(local)

        factor = job.schedule.factor(step)
        for group in engine.param_groups:
            group["lr"] = group["peak_lr"] * factor
        module.train()
        loss, parts = 0.0, {}
        for sequences in micro_batches:
            share, pieces = engine.forward(make_batch(sequences, world.device), count)
            engine.backward(share)
            loss += share.detach().double()
            for name, value in pieces.items():
                parts[name] = parts.get(name, 0.0) + value.double()
        applied, norm = engine.step()
        learnt_from += int(tokens) if applied else 0

        names = list(parts)
        due = _is_due(job, step + 1 - committed, time.monotonic() - committed_at) if world.is_main else False
        flags = [rim.interrupts.requested is not None, due, math.isfinite(loss)]
        sums = world.sum([float(loss), *(float(parts[name]) for name in names), *map(float, flags)])
        interrupted, due, finite_ranks = sums[-3] > 0, sums[-2] > 0, sums[-1]

        now = time.monotonic()
        record = {
            "stage": job.name,
            "stage_index": job.index,
            "step": step,
            "total_step": job.steps_before + step,
            "loss": sums[0] if math.isfinite(sums[0]) else None,
            **{name: value if math.isfinite(value) else None for name, value in zip(names, sums[1:])},
            "gradient_norm": norm if applied else None,
            "lr": max(group["lr"] for group in engine.param_groups),
            "applied": applied,
            "tokens": int(tokens),
            "tokens_per_second": tokens / max(now - before, 1e-9),
        }
        if world.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        before = now
        last = step + 1 == job.num_steps
        if job.measure_every_steps and (step + 1) % job.measure_every_steps == 0 and not last:
            measured = rim.measure().items()
            record |= {f"held_out_{name}": value if math.isfinite(value) else None for name, value in measured}
        if world.is_main and ((step + 1) % job.log_every == 0 or last or not applied):
            rim.log.write(record)
            progress.show(record)

        skipped = 0 if applied else skipped + 1
        if skipped >= job.max_skipped_steps:
            bad = [rank for rank, finite in enumerate(world.gather(math.isfinite(loss))) if not finite]
            raise DeltanetError(_not_finite(job, step, skipped, bad, finite_ranks < world.size))
        if interrupted or due or last:
            rim.commit(step + 1, learnt_from)
            committed, committed_at = step + 1, time.monotonic()
        if interrupted:
            raise Interrupted(
                f"stopped after step {step + 1} of {job.name}, which is committed; the same command resumes"
            )


def _is_due(job: Job, steps: int, seconds: float) -> bool:
    by_steps = job.commit_every_steps is not None and steps >= job.commit_every_steps
    return by_steps or (job.commit_every_seconds is not None and seconds >= job.commit_every_seconds)


def _not_finite(job: Job, step: int, skipped: int, ranks: list[int], in_loss: bool) -> str:
    first = step * job.batch_size
    where = (
        f"the loss on rank {', '.join(map(str, ranks))}" if in_loss else "the gradient (every rank's loss is finite)"
    )
    return (
        f"{job.name}: {where} is not finite at step {step} (sequences {first} to {first + job.batch_size - 1}); "
        f"{skipped} steps in a row were skipped, the weights are those of the last good step. "
        "Try a lower stages.N.lr or a longer warm-up"
    )
