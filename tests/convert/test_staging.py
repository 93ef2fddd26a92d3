"""The output folder appears whole or not at all, whatever stops the conversion and wherever."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
from tiny import raw_tensors

from convert import convert
from convert.staging import Staging, check_target
from deltanet import load_student
from deltanet_errors import UserError

# Converts argv[1] to argv[2], and sends itself the signal argv[5] at call number argv[4] of os.<argv[3]>.
KILLED = """
import os, signal, sys
import convert.staging
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it ignored
real, calls = getattr(os, sys.argv[3]), 0
def counting(*arguments, **options):
    global calls
    calls += 1
    if calls == int(sys.argv[4]):
        os.kill(os.getpid(), int(sys.argv[5]))
    return real(*arguments, **options)
from convert import convert
setattr(os, sys.argv[3], counting)
convert(sys.argv[1], sys.argv[2], calibrate=["none"], max_shard_size="20KB")
print("done")
"""


def start(teacher, out, call, number, with_signal=signal.SIGKILL):
    return subprocess.run(
        [sys.executable, "-c", KILLED, teacher, out, call, str(number), str(int(with_signal))],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(("call", "number"), [("write", 1), ("write", 60), ("preadv", 90), ("fsync", 4), ("rename", 1)])
def test_a_killed_conversion_leaves_nothing_that_looks_finished_and_the_rerun_succeeds(call, number, teacher, tmp_path):
    out = tmp_path / "student"
    done = start(teacher, out, call, number)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    left = [path.name for path in tmp_path.iterdir() if path.name != "teacher"]
    assert len(left) == 1
    assert left[0].startswith(".student.converting-")
    convert(teacher, out, calibrate=["none"], max_shard_size="20KB")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]
    assert raw_tensors(teacher).items() <= raw_tensors(out).items()
    load_student(out)


def test_ctrl_c_cleans_up(teacher, tmp_path):
    done = start(teacher, tmp_path / "student", "write", 60, signal.SIGINT)
    assert "KeyboardInterrupt" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_an_error_on_the_way_leaves_nothing_and_keeps_the_old(teacher, tmp_path):
    out = tmp_path / "student"
    convert(teacher, out, hybrid="all", calibrate=["none"])
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail() -> None:
        with Staging(out, overwrite=True) as staging:
            (staging.folder / "half").write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_folders_made_to_hold_the_output_go_with_it_unless_they_are_used(tmp_path):
    def fail(neighbour: str | None) -> None:
        with Staging(tmp_path / "a" / "b" / "student"):
            if neighbour:
                (tmp_path / neighbour).write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail(None)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError):
        fail("a/other")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["other"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_overwrite_replaces_the_old_in_one_go(can_swap, teacher, tmp_path, monkeypatch):
    out = tmp_path / "student"
    convert(teacher, out, hybrid="all", calibrate=["none"])
    (out / "old.json").write_text("old")
    if not can_swap:
        monkeypatch.setattr("convert.staging.ctypes.CDLL", lambda *_, **__: object())
    convert(teacher, out, hybrid="none", calibrate=["none"], overwrite=True)
    assert not (out / "old.json").exists()
    assert set(load_student(out).config.layer_types) == {"linear_attention"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["student", "teacher"]


def test_a_second_conversion_to_the_same_place_is_refused_while_the_first_lives(tmp_path):
    with Staging(tmp_path / "student") as first:
        with pytest.raises(UserError, match="another conversion"), Staging(tmp_path / "student"):
            pass
        assert first.folder.exists()
        with Staging(tmp_path / "other"):
            pass


def test_names_with_wildcards_and_spaces_do_not_sweep_their_neighbours(tmp_path):
    neighbour = tmp_path / ".s x y.converting-12345678"
    neighbour.mkdir()
    with Staging(tmp_path / "s*") as staging:
        staging.commit()
    assert neighbour.exists()
    assert (tmp_path / "s*").is_dir()


def test_an_output_that_appears_meanwhile_is_not_touched(tmp_path):
    with Staging(tmp_path / "student") as staging:
        (tmp_path / "student").mkdir()
        with pytest.raises(UserError, match="appeared while"):
            staging.commit()
    assert [path.name for path in tmp_path.iterdir()] == ["student"]


def test_where_the_output_may_not_go(teacher, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious").write_text("x")
    app = tmp_path / "app"
    (app / "src").mkdir(parents=True)
    (app / "config.json").write_text('{"port": 80}')
    model = shutil.copytree(teacher, tmp_path / "model")
    for name in ("COPYING", "qwen.tiktoken", "tokenizer.model", "vocab.txt", ".gitattributes"):
        (model / name).write_text("x")
    check_target(model, True)
    (model / "notes" / "deep").mkdir(parents=True)
    (model / "notes" / "deep" / "mine.txt").write_text("x")
    link = tmp_path / "link"
    link.symlink_to(teacher)
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for out, overwrite, says in (
        (other, False, "exists already"),
        (other, True, "neither"),
        (file, True, "neither"),
        (link, True, "neither"),
        (loop, True, "neither"),
        (loop / "below", False, "not a folder"),
        (app, True, "neither"),
        (model, True, "would delete notes, which is no part of a checkpoint"),
        (file / "below", False, "not a folder"),
        (teacher, True, "the source"),
        (tmp_path, True, "the source"),
        (tmp_path / ("ü" * 117), False, "too long; allowed: 233 bytes"),
    ):
        with pytest.raises(UserError, match=says):
            check_target(out, overwrite, teacher if says == "the source" else None)
    with Staging(tmp_path / ("x" * 233)) as staging:
        staging.commit()
    if os.geteuid():
        other.chmod(0o500)
        with pytest.raises(UserError, match="can be written"):
            check_target(other / "student", False)
