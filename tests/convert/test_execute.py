"""The executor: kept tensors keep their bytes, shards and digests are right, bad values and full disks stop it."""

import errno
import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_teacher, raw_tensors

from convert import convert, load_teacher
from convert.checkpoint import INDEX, open_checkpoint
from convert.execute import PIECE, execute
from convert.families import teacher_config
from convert.layouts import parse_layout
from convert.plan import make_plan, student_config
from deltanet import load_student
from deltanet_errors import DeltanetError, UserError


def planned(folder, hybrid="every:2", dtype=None):
    teacher = teacher_config(folder)
    checkpoint = open_checkpoint(folder)
    layout = parse_layout(hybrid, teacher.layer_types, teacher.sliding_window)
    return make_plan(checkpoint, student_config(teacher, layout), dtype), checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_every_kept_tensor_keeps_its_bytes(dtype, shard, tmp_path):
    make_teacher(tmp_path / "teacher", "qwen2", dtype=dtype, shard=shard)
    report = convert(
        tmp_path / "teacher", tmp_path / "student", hybrid="none", calibrate=["none"], max_shard_size=shard
    )
    source, student = raw_tensors(tmp_path / "teacher"), raw_tensors(tmp_path / "student")
    assert source.items() <= student.items()
    assert report["tensors"] == {
        "kept": len(source),
        "kept_identical": len(source),
        "refitted": 0,
        "new": len(student) - len(source),
    }
    assert (tmp_path / "student" / INDEX).exists() == (shard == "20KB")
    load_student(tmp_path / "student")


def test_shards_respect_the_limit_and_the_index_names_every_tensor(teacher, tmp_path):
    convert(teacher, tmp_path / "student", calibrate=["none"], max_shard_size="20KB")
    files = sorted((tmp_path / "student").glob("model-*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "student" / INDEX).read_text())
    total = 0
    for file in files:
        weights = load_file(file)
        size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        assert size <= 20_000 or len(weights) == 1
        assert all(index["weight_map"].pop(name) == file.name for name in weights)
        total += size
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == total


def test_the_manifest_has_the_digest_of_every_other_file(teacher, tmp_path):
    convert(teacher, tmp_path / "student", calibrate=["none"], max_shard_size="20KB")
    manifest = json.loads((tmp_path / "student" / "manifest.json").read_text())["files"]
    found = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (tmp_path / "student").iterdir()
        if path.name != "manifest.json"
    }
    assert manifest == found


def test_two_runs_write_the_same_weights(teacher, tmp_path):
    for name in ("one", "two"):
        convert(teacher, tmp_path / name, calibrate=["none"])
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_tensors_longer_than_a_piece_arrive_whole(tmp_path):
    make_teacher(tmp_path / "teacher", vocab_size=PIECE // (24 * 4) + 11, tie_word_embeddings=True)
    convert(tmp_path / "teacher", tmp_path / "student", hybrid="all", calibrate=["none"])
    assert raw_tensors(tmp_path / "teacher") == raw_tensors(tmp_path / "student")
    convert(tmp_path / "teacher", tmp_path / "half", hybrid="all", calibrate=["none"], dtype="bfloat16")
    name = "model.embed_tokens.weight"
    wanted = load_file(tmp_path / "teacher" / "model.safetensors")[name].bfloat16()
    assert torch.equal(load_file(tmp_path / "half" / "model.safetensors")[name], wanted)


def test_a_cast_counts_as_kept_but_not_as_identical(teacher, tmp_path):
    report = convert(teacher, tmp_path / "student", hybrid="all", calibrate=["none"], dtype="bfloat16")
    assert report["tensors"]["kept"] > 0
    assert report["tensors"]["kept_identical"] == 0
    student = load_student(tmp_path / "student")
    original = load_teacher(teacher, torch.bfloat16)
    assert student.dtype == torch.bfloat16
    assert all(torch.equal(weight, original.state_dict()[name]) for name, weight in student.state_dict().items())


def test_tensors_of_several_dtypes_keep_their_own(teacher, tmp_path):
    path = teacher / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].half()
    save_file(weights, path, metadata={"format": "pt"})
    report = convert(teacher, tmp_path / "student", calibrate=["none"])
    assert report["tensors"]["kept_identical"] == len(weights)
    stored = load_file(tmp_path / "student" / "model.safetensors")
    assert stored["model.norm.weight"].dtype == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), -float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_named(value, dtype, tmp_path):
    make_teacher(tmp_path / "teacher", dtype=dtype)
    path = tmp_path / "teacher" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, path, metadata={"format": "pt"})
    for calibrate in ("none", "self"):  # which reads the teacher before anything is written
        with pytest.raises(UserError, match=r"layers\.2\.mlp\.up_proj\.weight holds (NaN|Inf)"):
            convert(tmp_path / "teacher", tmp_path / "student", calibrate=[calibrate])
    assert [child.name for child in tmp_path.iterdir()] == ["teacher"]


def test_the_largest_finite_values_pass(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        folder = tmp_path / str(dtype)
        make_teacher(folder, dtype=dtype)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] = torch.finfo(dtype).max
        weights["model.norm.weight"][1] = torch.finfo(dtype).min
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        convert(folder, tmp_path / f"student-{dtype}", calibrate=["none"])


def test_a_cast_that_overflows_is_named(teacher, tmp_path):
    weights = load_file(teacher / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm\.weight, cast to torch\.float16, holds Inf"):
        convert(teacher, tmp_path / "student", calibrate=["none"], dtype="float16")


def test_overrides_replace_tensors_and_wrong_ones_are_refused(teacher, tmp_path):
    plan, checkpoint = planned(teacher)
    (tmp_path / "out").mkdir()
    fitted = {
        "model.layers.0.self_attn.o_proj.weight": torch.full((24, 24), 0.5),
        "model.layers.0.self_attn.b_proj.bias": torch.arange(4.0),
    }
    written = execute(plan, checkpoint, tmp_path / "out", max_shard_size=10**9, overrides=fitted)
    assert written.refitted == 1
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in fitted.items())
    for wrong in ({"model.nothing": torch.ones(1)}, {"model.norm.weight": torch.ones(1)}):
        with pytest.raises(DeltanetError, match=next(iter(wrong))):
            execute(plan, checkpoint, tmp_path / "out", max_shard_size=10**9, overrides=wrong)


def test_bytes_that_read_back_differently_stop_the_conversion(teacher, tmp_path, monkeypatch):
    real = os.preadv

    def damaged(handle, buffers, offset):
        count = real(handle, buffers, offset)
        if ".converting-" in os.readlink(f"/proc/self/fd/{handle}"):
            buffers[0][count // 2] ^= 1
        return count

    monkeypatch.setattr(os, "preadv", damaged)
    with pytest.raises(DeltanetError, match="reads back differently"):
        convert(teacher, tmp_path / "student", calibrate=["none"])
    assert [child.name for child in tmp_path.iterdir()] == ["teacher"]


@pytest.mark.parametrize(("call", "after"), [("write", 0), ("write", 3), ("write", 40), ("fsync", 0), ("fsync", 3)])
def test_a_full_disk_at_any_moment_is_one_line_and_leaves_nothing(call, after, teacher, tmp_path, monkeypatch):
    real, calls = getattr(os, call), 0

    def full(*arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(UserError, match="disk is full"):
        convert(teacher, tmp_path / "student", calibrate=["none"])
    monkeypatch.undo()
    assert [child.name for child in tmp_path.iterdir()] == ["teacher"]


def test_a_disk_that_takes_no_large_files_is_told_how_to_be_given_small_ones(teacher, tmp_path, monkeypatch):
    def too_large(*arguments):
        raise OSError(errno.EFBIG, "File too large")

    monkeypatch.setattr(os, "write", too_large)
    with pytest.raises(UserError, match=r"-o .*: the disk takes no file so large; give a smaller --max-shard-size"):
        convert(teacher, tmp_path / "student", calibrate=["none"])
    assert [child.name for child in tmp_path.iterdir()] == ["teacher"]


def test_memory_does_not_grow_with_the_model(tmp_path):
    """128 MB of weights in 64 tensors of 2 MB: the peak above an idle process stays at a few pieces."""
    program = """
import sys, torch
from pathlib import Path
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.execute import execute
from convert.plan import Move, Plan
from convert.command import _peak_memory
from safetensors.torch import save_file
folder = Path(sys.argv[1])
checkpoint = open_checkpoint(folder / "in")
moves = [Move(e.name, e.shape, e.dtype, "copy", e.name) for e in checkpoint.entries.values()]
before = _peak_memory()
execute(Plan(None, moves), checkpoint, folder, max_shard_size=10**9)
print(_peak_memory() - before)
"""
    (tmp_path / "in").mkdir()
    block = torch.ones(1 << 20, dtype=torch.bfloat16)
    save_file({f"t{number}": block * number for number in range(64)}, tmp_path / "in" / "model.safetensors")
    done = subprocess.run([sys.executable, "-c", program, tmp_path], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 6 * (2 << 20) + 8 * PIECE
