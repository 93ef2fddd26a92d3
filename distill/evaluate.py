"""Perplexity on held-out text and KL to the teacher, of a model in memory, shared out over the ranks.

Twin: tests/distill/test_run.py.
"""

import contextlib
import math
from collections.abc import Callable
from collections.abc import Sequence as Many

import torch

from deltanet import DeltaNetForCausalLM

from .batch import make_batch
from .engine import World
from .packing import Sequence
from .schema import Stage
from .stages import Share, Whole

_NO_STAGE = Stage(kind="pretrain", steps=1)


@torch.no_grad()
def mean_parts(
    forward: Callable[..., Share],
    count: Callable[[list], int],
    sequences: Many[Sequence],
    world: World,
    micro_batch_size: int,
) -> dict[str, float]:
    """The mean of every part of `forward(batch, 1, measure=True)` over all sequences, equal on every rank.

    Every rank runs as many forward passes, as sharded parameters need; the odd ones out are not counted.
    """
    sums: dict[str, float] = {}
    for first in range(0, len(sequences), micro_batch_size * world.size):
        start = first + micro_batch_size * world.rank
        mine = sequences[start : start + micro_batch_size]
        _, parts = forward(make_batch(mine or sequences[-1:], world.device), 1, measure=True)
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + (float(value) if mine else 0.0)
    totals = world.sum(list(sums.values()))
    return dict(zip(sums, (total / max(count(sequences), 1) for total in totals)))


def compare(
    model: DeltaNetForCausalLM,
    teacher: DeltaNetForCausalLM | None,
    sequences: Many[Sequence],
    world: World,
    *,
    micro_batch_size: int,
    bfloat16: bool = False,
    vocab_size: int | None = None,
) -> dict[str, float]:
    """`perplexity` of the model, and with a teacher `kl`, the mean KL(teacher || model) per token in nats.

    Both models must be on `world.device`.
    """
    module = Whole(model, teacher, _NO_STAGE, vocab_size=vocab_size).eval()
    context = torch.autocast(world.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    with context:
        means = mean_parts(module, Whole.count, sequences, world, micro_batch_size)
    figures = {"perplexity": math.exp(min(means["ce"], 700.0))}
    if teacher is not None:
        figures["kl"] = means["forward_kl"]
    return figures
