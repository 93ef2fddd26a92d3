"""Layouts: which layers keep attention, counted from 0."""

import json
import os

import pytest

from convert.layouts import FULL, LINEAR, SLIDING, parse_layout
from deltanet_errors import UserError

EIGHT = [FULL] * 8


def kept(text: str, types=EIGHT, window=None) -> list[int]:
    return [index for index, kind in enumerate(parse_layout(text, types, window).layer_types) if kind != LINEAR]


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("global2", [1, 4]),
        ("swa", [1, 3, 5, 7]),
        ("swa:16", [1, 3, 5, 7]),
        ("every:4", [3, 7]),
        ("every:3", [2, 5]),
        ("every:1", list(range(8))),
        ("none", []),
        ("all", list(range(8))),
        ("layers:0,7,3", [0, 3, 7]),
    ],
)
def test_each_form_keeps_these_layers(text, layers):
    assert kept(text) == layers


def test_swa_sets_the_window_and_never_widens_the_teachers():
    assert parse_layout("swa", EIGHT).window == 128
    assert parse_layout("swa:16", EIGHT).window == 16
    assert parse_layout("swa", [SLIDING] * 8, 64).window == 64


def test_a_kept_layer_stays_what_the_teacher_has():
    types = [FULL, FULL, FULL, FULL, SLIDING, SLIDING, SLIDING, SLIDING]
    layout = parse_layout("global2", types, 32)
    assert layout.layer_types[1] == FULL
    assert layout.layer_types[4] == SLIDING
    assert layout.window == 32
    assert parse_layout("layers:0", types, 32).window is None


@pytest.mark.parametrize("num_layers", [1, 2, 3, 5])
def test_global2_fits_any_depth(num_layers):
    expected = sorted({index for index in (1, num_layers // 2) if index < num_layers})
    assert kept("global2", [FULL] * num_layers) == expected


@pytest.mark.parametrize("content", [[5, 2, 7, 0], {"ranking": [5, 2, 7, 0]}, {"closeness": {"ranking": [5, 2, 7, 0]}}])
def test_a_ranking_keeps_its_first(tmp_path, content):
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(content))
    assert kept(f"{path}:2") == [2, 5]
    assert kept(f"{path}:0") == []
    with pytest.raises(UserError, match="list of 5 or more"):
        kept(f"{path}:5")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[true, false]", "different layers from 0 to 7"),
        ('{"closeness": [1]}', "different layers from 0 to 7"),
        ("[" * 100_000, "unreadable ranking"),
        ('{"num_layers": "8", "ranking": [1, 2]}', "ranks '8' layers, but this teacher has 8"),
    ],
)
def test_a_ranking_that_is_none_is_refused(tmp_path, content, says):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(UserError, match=says):
        parse_layout(f"{tmp_path / 'r.json'}:2", EIGHT)


def test_a_ranking_that_is_a_pipe_is_called_one_and_never_read(tmp_path):
    os.mkfifo(tmp_path / "r.json")
    with pytest.raises(UserError, match=r"r\.json:2: the ranking is a pipe, not a file"):
        parse_layout(f"{tmp_path / 'r.json'}:2", EIGHT)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("globl2", "did you mean 'global2'"),
        ("every:0", "from 1 to 8"),
        ("every:9", "from 1 to 8"),
        ("every:x", "'x'"),
        (f"every:{'9' * 5000}", "from 1 to 8"),
        ("every:", "unknown layout"),
        ("layers:8", "from 0 to 7"),
        ("layers:-1", "'-1'"),
        ("layers:", "unknown layout"),
        ("swa:0", "2 or more"),
        ("swa:1", "2 or more"),
        ("missing.json:2", "unreadable ranking"),
        ("missing.json", "COUNT"),
        ("", "unknown layout"),
    ],
)
def test_a_wrong_form_is_named(text, says):
    with pytest.raises(UserError, match=says):
        parse_layout(text, EIGHT)
