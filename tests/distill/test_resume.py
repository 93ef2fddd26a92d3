"""Two real processes through whole runs: every ZeRO stage resumes to the same bytes, and all of them agree."""

import contextlib
import json
import socket

import pytest
import run_laws
import small_run
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

ZERO = (0, 1, 2, 3)


def spawn(recipe, size, runs):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_laws.work, (size, port, str(recipe), runs), nprocs=size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All runs: zN (ZeRO N, two processes), zN-cut (stopped in the second stage, resumed), one, whole-batch, moved;
    alone and packed, which see the same twelve documents at every step, one or four in a sequence."""
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
    texts = ["stages=[{kind: distil, steps: 4, lr: 1.0e-3}]", f"data.sources=[{{path: {write_texts(folder)}}}]"]
    for name, seq_len, batch in (("alone", 32, 12), ("packed", 128, 3)):
        sizes = [f"data.seq_len={seq_len}", f"training.batch_size={batch}", "data.packing=best_fit"]
        alone.append((str(folder / name), [*texts, *sizes], None))
    spawn(recipe, 1, alone)
    return folder


def write_texts(folder):
    """Twelve documents of 26 to 32 tokens with their end: two do not fit into 32, and just four into 128."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    words = (small_run.DEMO / "text.txt").read_text().split()
    texts = []
    for index in range(12):
        kept = words[40 * index : 40 * index + 60]
        while len(tokenizer(" ".join(kept))["input_ids"]) > 26 + index % 6 - 1:
            kept.pop()
        texts.append(" ".join(kept))
    lengths = [len(tokenizer(text)["input_ids"]) + 1 for text in texts]
    assert min(lengths) > 128 // 5
    assert max(lengths) <= 32
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


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


def test_packed_documents_train_as_each_one_by_itself(folder):
    """float32 sums in other orders, four steps long: 1e-5."""
    for key in ("loss", "gradient_norm"):
        assert curve(folder / "packed", key) == pytest.approx(curve(folder / "alone", key), rel=1e-5)
    assert curve(folder / "packed", "tokens") == curve(folder / "alone", "tokens")


def test_the_loss_falls(folder):
    for stage in ("align", "distil"):
        losses = [record["loss"] for record in records(folder / "one") if record["stage"] == stage]
        assert losses[-1] < losses[0]
