"""What one process of test_engine.py does: trains a tiny module with every ZeRO stage and notes what the laws need."""

import gc
import os
import weakref

import torch
from torch import nn

STEPS, MICRO = 4, 4


class Tiny(nn.Module):
    """Trained and frozen parameters, some of 9 numbers, two groups, a loss summed over the valid tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 8)
        self.up = nn.Linear(8, 9)
        self.norm = nn.LayerNorm(9)
        self.down = nn.Linear(9, 3, bias=False)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("frequencies", torch.tensor([1.0 / 3]))

    def forward(self, ids, goal, valid):
        up = self.up(self.embed(ids))
        self.computed_in = up.dtype
        out = self.frozen(self.down(self.norm(torch.relu(up))))
        return ((out.float() - goal).square().sum(-1) * valid).sum()


def micro_batches(step: int) -> list[tuple]:
    """Four micro-batches of 3 tokens with different numbers of valid ones; at step 2 the odd ones have none."""
    draw = torch.Generator().manual_seed(step)
    batches = []
    for index in range(MICRO):
        ids = torch.randint(0, 11, (3,), generator=draw)
        goal = torch.randn(3, 3, generator=draw)
        valid = (torch.rand(3, generator=draw) > 0.3).float()
        valid[0] = 1.0
        batches.append((ids, goal, valid * 0 if step == 2 and index % 2 else valid))
    return batches


def make(settings, world, lr=1e-2):
    from distill.engine import Engine

    module = Tiny()
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "lr": lr, "weight_decay": 0.1 if lr else 0.0},
        {"params": [p for p in trained if p.ndim < 2], "lr": lr, "weight_decay": 0.0},
    ]
    return Engine(module, groups, settings, world)


def take(engine, step: int, poisoned: int | None = None) -> tuple[float, bool, float]:
    """One optimizer step; micro-batch i belongs to rank i % size. Returns mean loss, applied, gradient norm."""
    world, batches = engine.world, micro_batches(step)
    count = sum(batch[2].sum().item() for batch in batches)
    total = 0.0
    for index in range(world.rank, MICRO, world.size):
        loss = engine.forward(*batches[index])
        if index == poisoned:
            loss = loss * float("nan")
        engine.backward(loss / count)
        total += loss.item()
    applied, norm = engine.step()
    return world.sum([total])[0] / count, applied, norm


def snapshot(engine) -> dict:
    from distill.engine import MOMENTS

    keys = (None, *MOMENTS)
    return {(key, name): tensor.clone() for key in keys for name, tensor in engine.full_tensors(key)}


def trial(settings, world) -> dict:
    engine = make(settings, world)
    starts = {name: p.data_ptr() % 16 for name, p in engine.module.named_parameters() if p.requires_grad}
    frequencies = engine.module.frequencies.clone()
    fresh = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    losses = [take(engine, step) for step in range(STEPS)]
    computed_in = engine.module.computed_in
    middle = snapshot(engine)
    skipped = take(engine, STEPS, poisoned=1)
    after_skip = snapshot(engine)
    straight = [take(engine, step) for step in range(STEPS + 1, STEPS + 3)]
    end = snapshot(engine)
    engine.close()
    kept = [weakref.ref(part) for part in (engine.module, engine.optimizer)]
    del engine
    gc.collect()
    released = all(part() is None for part in kept)

    engine = make(settings, world)
    engine.load_masters(lambda name: middle[None, name])
    engine.load_moments(lambda name, key: middle[key, name], STEPS)
    loaded = snapshot(engine)
    resumed = [take(engine, step) for step in range(STEPS + 1, STEPS + 3)]
    resumed_end = snapshot(engine)
    engine.close()

    engine = make(settings, world, lr=0.0)
    engine.load_masters(lambda name: middle[None, name])
    take(engine, 0)
    still = {name: tensor.clone() for name, tensor in engine.full_tensors()}
    engine.close()
    return {
        "fresh": fresh,
        "starts": starts,
        "frequencies": frequencies,
        "losses": losses,
        "computed_in": computed_in,
        "middle": middle,
        "skipped": skipped,
        "after_skip": after_skip,
        "straight": straight,
        "end": end,
        "released": released,
        "loaded": loaded,
        "resumed": resumed,
        "resumed_end": resumed_end,
        "still": still,
    }


def work(rank: int, size: int, port: int, trials: list[tuple[int, str]], folder: str) -> None:
    """Entry of `torch.multiprocessing.spawn`; rank 0 writes the results of all trials."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, size, "127.0.0.1", port))))
    torch.set_num_threads(1)
    from distill.engine import EngineSettings
    from distill.world import start_world

    world = start_world()
    results = {
        (stage, precision): trial(EngineSettings(stage, precision, gradient_clipping=0.5), world)
        for stage, precision in trials
    }
    if world.is_main:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()
