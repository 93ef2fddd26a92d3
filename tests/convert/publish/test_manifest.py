"""The manifest's own laws; damage of every kind is in test_corruption.py."""

import json

import pytest

from convert.publish.files import is_published
from convert.publish.manifest import (
    MANIFEST,
    as_manifest,
    damage,
    files_in,
    is_plain,
    parse_manifest,
    read_manifest,
    seal,
)
from deltanet_errors import UserError

FILES = {"b/c.txt": (3, "0" * 64), "a": (0, "f" * 64)}


def test_what_is_written_is_what_is_read():
    assert parse_manifest(as_manifest(FILES).encode()) == FILES


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[]",
        '{"format": 1}',
        '{"format": 1, "files": []}',
        '{"format": 1, "files": {"a": 1}}',
        as_manifest(FILES).replace('"format": 1', '"format": 2'),
        as_manifest(FILES).replace("  ", " "),
        as_manifest(FILES).replace('"bytes": 3', '"bytes": 3.0'),
        as_manifest(FILES) + " ",
        "[" * 100_000,
    ],
)
def test_whatever_else_is_unreadable(text):
    with pytest.raises(UserError, match=r"manifest\.json: unreadable"):
        parse_manifest(text.encode())


def test_a_manifest_that_is_missing_is_told(tmp_path):
    with pytest.raises(UserError, match="missing, so no file can be compared"):
        read_manifest(tmp_path)


def test_sealing_lists_every_file_but_hidden_ones_and_itself(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("one", "sub/two", ".hidden"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("x")
    seal(tmp_path)
    assert set(read_manifest(tmp_path)) == {"one", "sub/two"}
    assert damage(tmp_path) == []
    seal(tmp_path)
    assert set(read_manifest(tmp_path)) == {"one", "sub/two"}


def test_a_linked_folder_is_no_way_around_the_list(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").write_text("x")
    seal(tmp_path / "f")
    (tmp_path / "f" / "sub").symlink_to(tmp_path / "elsewhere")
    assert [name for name, _ in files_in(tmp_path / "f")] == [MANIFEST, "sub"]
    assert damage(tmp_path / "f") == ["sub: a link to something outside the folder"]


@pytest.mark.parametrize("name", ["a", "a/b.c", "a b", "ä"])
def test_plain_names(name):
    assert is_plain(name)


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/../b", "/a", "a//b", "./a", "a/", "a\\b"])
def test_names_that_could_lead_elsewhere(name):
    assert not is_plain(name)


def test_the_list_of_what_is_published_reads_names_part_by_part(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({}))
    for name in (
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.json",
        "LICENSE.txt",
    ):
        assert is_published(name, tmp_path), name
    for name in ("optimizer.pt", "x/config.json", "tokenizer/config.json", "metrics.jsonl", "x.py", "commits/step/x"):
        assert not is_published(name, tmp_path), name
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "x.Y"}}))
    assert is_published("x.py", tmp_path)
    assert not is_published("a/x.py", tmp_path)
