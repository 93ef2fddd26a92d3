"""The evaluation that a recipe asks for."""

import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
from small_run import write_recipe, write_teacher
from test_sets import PIQA, write

from deltanet_errors import UserError
from distill.evaluation import worth
from distill.evaluation.at_end import whole_windows
from distill.run import distil
from distill.stages import compile_layers


def test_a_run_ends_with_its_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(worth, "SECONDS", 0.0)
    piqa = write(tmp_path / "piqa.jsonl", PIQA)
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        write_teacher(tmp_path / "teacher"),
        stages=[{"kind": "align", "steps": 2}],
        evaluation__tasks=[str(piqa)],
        evaluation__task_examples=3,
        evaluation__contexts=[128, 64],
    )
    run = tmp_path / "run"
    facts = distil(recipe, output=run)
    report = json.loads((run / "evaluation.json").read_text())
    assert report["student"] == facts["export"]
    assert report["tasks"]["piqa"]["n"] == 3
    assert [row["context"] for row in report["speed"]["by_context"]] == [64, 128]
    assert [record["step"] for record in report["losses"]] == [0, 1]
    # The run's own table has the same models on the same text, by another path through float32.
    wanted = facts["results"][-1]
    assert report["window"] == 32
    assert report["kl"] == pytest.approx(wanted["kl"], rel=1e-4)
    assert report["perplexity"]["student"] == pytest.approx(wanted["perplexity"], rel=1e-4)
    printed = capsys.readouterr().out
    assert f"page     {run}/evaluation.html" in printed
    ends = printed[printed.index("## In short") :].split("|")
    at = next(index for index, cell in enumerate(ends) if cell.strip() == "piqa")
    assert ends[at + 2].strip() == f"{100 * report['tasks']['piqa']['accuracy']:.1f}%"
    assert (run / "evaluation.html").read_text().startswith("<!doctype html>")


def test_a_run_that_compiles_ends_with_its_page_too(tmp_path, monkeypatch):
    monkeypatch.setattr("distill.run.compile_layers", partial(compile_layers, backend="eager"))
    recipe = write_recipe(
        tmp_path / "recipe.yaml",
        write_teacher(tmp_path / "teacher"),
        stages=[{"kind": "distil", "steps": 2}],
        evaluation__tasks=["repeat"],
        evaluation__task_examples=2,
        training__compile=True,
    )
    distil(recipe, output=tmp_path / "run")
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert report["diagnostics"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation__tasks": ["lost.jsonl"]}, "evaluation.tasks lost.jsonl: no such file"),
        ({"evaluation__contexts": [10**6]}, "evaluation.contexts 1000000: allowed is 64 to 2048"),
    ],
)
def test_what_cannot_be_measured_at_the_end_is_refused_at_the_start(changes, message, tmp_path):
    recipe = write_recipe(tmp_path / "recipe.yaml", write_teacher(tmp_path / "teacher"), **changes)
    with pytest.raises(UserError, match=message):
        distil(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_padded_sequences_are_no_windows():
    ids = np.arange(8)
    whole, padded = (SimpleNamespace(input_ids=ids, num_tokens=n) for n in (8, 7))
    assert whole_windows([padded, whole, padded, whole]).tolist() == [ids.tolist()] * 2
    assert whole_windows([padded]) is None
