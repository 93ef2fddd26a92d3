"""`deltanet-convert STUDENT --format NAME`: what is written, what is refused, and that nothing half-made stays."""

import json

import pytest
from published import files_of, make_source
from tiny import make_teacher
from tiny_student import tiny_model

import cli
from convert import convert
from convert.publish.verify import verify
from deltanet import load_student


@pytest.fixture
def student(tmp_path):
    tiny_model("global").save_pretrained(tmp_path / "student")
    return tmp_path / "student"


def run(*arguments) -> int:
    return cli.convert_main([str(argument) for argument in arguments])


def test_the_command_writes_a_folder_that_the_package_loads_too(student, tmp_path, capsys):
    assert run(student, "--format", "remote", "-o", tmp_path / "out", "--json") == 0
    printed = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(printed) == {"format": "remote", "output": str(tmp_path / "out")}
    load_student(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()


def test_what_is_written_verifies(tmp_path):
    convert(make_source(tmp_path / "teacher"), tmp_path / "student", hybrid="layers:1", calibrate=["none"])
    assert run(tmp_path / "student", "--format", "remote", "-o", tmp_path / "out") == 0
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "remot"], "did you mean 'remote'?"),
        (["--format", "remote", "--conv", "4"], "--conv: --format remote only writes the student again"),
        (["--format", "remote", "--calibrate", "none"], "--calibrate: --format remote only writes"),
        (["--format", "remote", "--rank", "swap"], "--format remote: --rank writes no student"),
        (["--format", "remote", "--verify"], "--format remote: --verify only checks a folder"),
    ],
)
def test_wrong_options_are_refused_and_nothing_is_written(student, tmp_path, capsys, options, message):
    assert run(student, "-o", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


def test_a_teacher_is_refused(tmp_path, capsys):
    make_teacher(tmp_path / "teacher")
    assert run(tmp_path / "teacher", "--format", "remote", "-o", tmp_path / "out") == 2
    assert "this is 'llama'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.safetensors", None, "not a checkpoint (no model.safetensors"),
        ("model.safetensors", "version https://git-lfs", "a pointer of Git LFS"),
        ("config.json", {"mixer": 3}, "Field 'mixer' expected str, got int"),
        ("conversion.json", {"": "["}, "student/conversion.json: unreadable"),
    ],
)
def test_a_student_that_is_not_whole_is_refused_by_its_own_name(name, content, message, tmp_path, capsys):
    convert(make_source(tmp_path / "teacher"), tmp_path / "student", calibrate=["none"])
    path = tmp_path / "student" / name
    if content is None:
        path.unlink()
    elif isinstance(content, dict):
        path.write_text(content.get("") or json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_text(content)
    capsys.readouterr()
    assert run(tmp_path / "student", "--format", "remote", "-o", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"student", "teacher"}


def test_an_existing_folder_stays_unless_it_may_be_replaced(student, tmp_path, capsys):
    tiny_model("swa").save_pretrained(tmp_path / "out")
    before = files_of(tmp_path / "out")
    assert run(student, "--format", "remote", "-o", tmp_path / "out") == 2
    assert "exists already" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before
    assert run(student, "--format", "remote", "-o", tmp_path / "out", "--overwrite") == 0
    assert load_student(tmp_path / "out").config.layer_types == load_student(student).config.layer_types


def test_a_link_out_of_the_student_is_refused(student, tmp_path, capsys):
    (tmp_path / "private").write_text("a secret")
    (student / "LICENSE").symlink_to(tmp_path / "private")
    assert run(student, "--format", "remote", "-o", tmp_path / "out") == 2
    assert "LICENSE: a link to" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"student", "private"}


def test_code_and_strangers_in_the_student_are_not_carried_along(student, tmp_path):
    (student / "deltanet_extra.py").write_text("raise SystemExit")
    (student / "notes.md").write_text("mine")
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "deltanet_extra.Other"}}))
    assert run(student, "--format", "remote", "-o", tmp_path / "out") == 0
    assert not {"deltanet_extra.py", "notes.md"} & set(files_of(tmp_path / "out"))
    assert "deltanet_extra" not in (tmp_path / "out" / "config.json").read_text()
