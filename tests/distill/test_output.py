"""A folder that cannot be written is refused by its option, before the work."""

import os

import pytest

from deltanet_errors import UserError
from distill.output import output_folder


def test_a_folder_that_is_there_or_can_be_made_is_taken(tmp_path):
    assert output_folder(tmp_path) == tmp_path
    assert output_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "^-o '': the name of the folder is empty$"),
        ("file", "^-o file: file is a file, not a folder$"),
        ("file/below", "^-o file/below: .*file is a file, not a folder$"),
        ("x" * 300, "^-o x+: File name too long$"),
    ],
)
def test_anything_else_is_refused(tmp_path, monkeypatch, name, message):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        output_folder(name)


def test_a_folder_that_is_not_ours_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match=f"^-o {tmp_path}/run: {tmp_path} is not writable$"):
        output_folder(tmp_path / "run")
