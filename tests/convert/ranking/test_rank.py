"""Twin of convert/ranking/rank.py: all methods end in one form, which a layout can read."""

import json

import pytest
import torch
from demo_pair import demo_windows
from matters import IMPORTANT, teacher_and_twin

from convert.layouts import FULL, parse_layout
from convert.plan import student_config
from convert.ranking.rank import GREEDY, METHODS, linear_twin, rank_layers, rounds
from convert.text import CalibrationText
from deltanet_errors import UserError


@pytest.fixture(scope="module")
def pair():
    return teacher_and_twin()


@pytest.fixture(scope="module")
def text():
    return CalibrationText(demo_windows(8, 96), demo_windows(2, 64, last=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_ranking_holds_every_layer_and_a_layout_reads_it(method, pair, text, tmp_path):
    told = []
    method = "distilled:1" if method == "distilled" else method
    found = rank_layers(pair[0], method, text, pair[1], advance=told.append)
    assert sum(told) == rounds(method, 6)
    assert sorted(found["ranking"]) == list(range(6))
    assert [row["layer"] for row in found["layers"]] == found["ranking"]
    if method not in (*GREEDY, "distilled:1"):
        scores = [row["score"] for row in found["layers"]]
        assert scores == sorted(scores, reverse=True)
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps(found))
    layout = parse_layout(f"{path}:2", [FULL] * 6)
    assert {layer for layer in range(6) if layer not in layout.linear} == set(found["ranking"][:2])


@pytest.mark.parametrize("method", ["swap", "greedy"])
def test_the_layer_that_matters_comes_first(method, pair, text):
    assert rank_layers(pair[0], method, text, pair[1])["ranking"][0] == IMPORTANT


def test_only_held_out_text_is_scored(pair, text):
    found = rank_layers(pair[0], "swap", CalibrationText(text.fit[:0], text.held_out), pair[1])
    assert found["layers"] == rank_layers(pair[0], "swap", text, pair[1])["layers"]
    assert found["tokens"] == {"fit": 0, "scored": 128}


def test_text_without_a_part_set_aside_is_refused(pair, text):
    with pytest.raises(UserError, match="too short to set any of it aside"):
        rank_layers(pair[0], "linearity", CalibrationText(text.fit, text.held_out[:0]))


def test_an_unknown_method_is_named_with_those_allowed(pair, text):
    with pytest.raises(UserError, match=r"--rank sawp: allowed are linearity, .*did you mean 'swap'"):
        rank_layers(pair[0], "sawp", text)


def test_the_twin_is_calibrated_on_the_teachers_own_stream(pair, text):
    teacher = pair[0]
    config = student_config(teacher.config, parse_layout("none", teacher.config.layer_types))
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    twin = linear_twin(teacher, config, text.fit)
    better, worse = (rank_layers(teacher, "fit", text, some)["layers"] for some in (twin, pair[1]))
    for layer in range(6):
        assert _of(better, layer)["relative_error"] < _of(worse, layer)["relative_error"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def _of(rows, layer):
    return next(row for row in rows if row["layer"] == layer)
