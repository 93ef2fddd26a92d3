"""metrics.jsonl holds every step once; trackers get the numbers; a missing tracker is named."""

import json
import sys
import types

import pytest

from deltanet_errors import UserError
from distill.metrics import MetricsLog, Pulse, read_metrics, trackers
from distill.schema import Logging


def record(stage, step, **more):
    return {
        "stage": "ab"[stage],
        "stage_index": stage,
        "step": step,
        "total_step": 3 * stage + step,
        "loss": 0.5,
        **more,
    }


def test_what_lies_beyond_the_point_of_resuming_is_cut_off(tmp_path):
    log = MetricsLog(tmp_path / "m.jsonl")
    for stage in (0, 1):
        for step in range(3):
            log.write(record(stage, step))
    with (tmp_path / "m.jsonl").open("a") as file:
        file.write('5\n{}\n\x00\n{"stage": "b", "st')
    log.keep_before(1, 2)
    assert [(r["stage_index"], r["step"]) for r in read_metrics(log.path)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    log.keep_before(0, 0)
    assert read_metrics(log.path) == []


def test_long_work_says_how_far_it_is_and_short_work_nothing(capsys):
    patient, chatty = Pulse(), Pulse(seconds=0)
    for count in range(2):
        patient(f"{count} of 2")
        chatty(f"{count} of 2")
    assert capsys.readouterr().err == "0 of 2\n1 of 2\n"


def test_a_log_that_is_not_there_yet_is_nothing_to_cut(tmp_path):
    MetricsLog(tmp_path / "m.jsonl").keep_before(0, 0)
    assert read_metrics(tmp_path / "m.jsonl") == []
    assert not (tmp_path / "m.jsonl").exists()


def test_trackers_get_the_numbers_of_every_step(tmp_path, monkeypatch):
    seen = []
    run = types.SimpleNamespace(log=lambda numbers, step: seen.append((step, numbers)))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    log = MetricsLog(tmp_path / "m.jsonl", trackers(Logging(wandb=True), tmp_path, "name"))
    log.write(record(1, 2, gradient_norm=None))
    assert seen == [(5, {"stage_index": 1, "step": 2, "total_step": 5, "loss": 0.5})]
    assert json.loads(log.path.read_text())["gradient_norm"] is None


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"logging\.trackio: true, but trackio is not installed"):
        trackers(Logging(trackio=True), tmp_path, "name")
