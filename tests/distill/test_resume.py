"""Two real processes through whole runs: every ZeRO stage resumes to the same bytes, and all of them agree."""

import contextlib
import json
import socket

import pytest
import run_laws
import small_run
import torch
from safetensors.torch import load_file

ZERO = (0, 1, 2, 3)


def spawn(recipe, size, runs):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_laws.work, (size, port, str(recipe), runs), nprocs=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs: zN (ZeRO N, two processes), zN-cut (stopped in the second stage, resumed), one, accumulated, moved."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = small_run.write_recipe(folder / "r.yaml", small_run.write_teacher(folder / "teacher"))
    runs = []
    for zero in ZERO:
        overrides = [f"deepspeed.stage={zero}"]
        runs.append((str(folder / f"z{zero}"), overrides, None))
        cut = str(folder / f"z{zero}-cut")
        runs += [(cut, overrides, (1, 2)), (cut, overrides, None)]
    runs.append((str(folder / "moved"), ["deepspeed.stage=2"], (0, 3)))
    spawn(recipe, 2, runs)
    alone = [
        (str(folder / "one"), [], None),
        (str(folder / "whole-batch"), ["training.micro_batch_size=4"], None),
        (str(folder / "checkpointing"), ["training.activation_checkpointing=true"], None),
        (str(folder / "moved"), ["deepspeed.stage=2"], None),
    ]
    spawn(recipe, 1, alone)
    return folder


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def curve(run, key="loss"):
    return [record[key] for record in records(run)]


def tensors(run):
    newest = sorted((run / "commits").iterdir())[-1]
    found = {}
    for file in sorted(newest.rglob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("zero", ZERO)
def test_a_run_stopped_on_one_rank_and_resumed_ends_in_the_same_bytes(folder, zero):
    straight, cut = folder / f"z{zero}", folder / f"z{zero}-cut"
    assert [(r["stage"], r["step"]) for r in records(cut)] == [(s, i) for s in ("align", "distil") for i in range(6)]
    for key in ("loss", "gradient_norm", "lr", "tokens"):
        assert curve(cut, key) == curve(straight, key)
    mine, theirs = tensors(cut), tensors(straight)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("other", ["z1", "z2", "z3", "one", "whole-batch", "checkpointing", "moved"])
def test_zero_stages_processes_micro_batches_and_checkpointing_change_nothing(folder, other):
    """`moved` began on two processes and ended on one. float32 sums in other orders, twelve steps long: 1e-5."""
    assert curve(folder / other) == pytest.approx(curve(folder / "z0"), rel=1e-5)
    assert curve(folder / other, "tokens") == curve(folder / "z0", "tokens")


def test_the_loss_falls(folder):
    for stage in ("align", "distil"):
        losses = [record["loss"] for record in records(folder / "one") if record["stage"] == stage]
        assert losses[-1] < losses[0]
