"""Which tasks a list of names means."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from deltanet_errors import UserError
from distill.evaluation import selection
from distill.evaluation.result import TaskResult, share
from distill.evaluation.selection import select


class Task:
    levels = {"easy": {}}

    def run(self, subject, *, seed, n, max_context):
        self.asked = (subject, seed, n, max_context)
        return TaskResult("recall", **share(1, n))


@pytest.fixture
def tasks(monkeypatch):
    known = {"recall": Task(), "needle": Task()}
    monkeypatch.setattr(selection, "TASKS", known)
    return known


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "piqa.jsonl"
    path.write_text(json.dumps({"context": "a", "continuation": "b"}) + "\n")
    return path


def test_names_files_and_all_are_taken_once_in_order(tasks, file):
    assert [task.name for task in select(["needle", str(file), "all"])] == ["needle", "piqa", "recall"]
    assert [task.name for task in select(["all"])] == ["recall", "needle"]
    assert select(["none"]) == []


def test_what_is_named_beside_all_counts_as_named(tasks):
    for names in (["all", "needle"], ["needle", "all"]):
        assert {task.name: task.is_named for task in select(names)} == {"recall": False, "needle": True}


def test_a_generated_task_gets_seed_limit_and_context(tasks):
    (task,), model = select(["recall"]), SimpleNamespace(device=torch.device("cpu"))
    assert [result.name for result in task.run(model, seed=3, limit=None, max_context=99)] == ["recall"]
    assert tasks["recall"].asked == (model, 3, selection.GENERATED_EXAMPLES["cpu"], 99)
    task.run(model, seed=3, limit=7, max_context=99)
    assert tasks["recall"].asked == (model, 3, 7, 99)


def test_a_file_for_a_task_that_makes_its_examples_is_refused():
    with pytest.raises(
        UserError,
        match=r"^--tasks mqar:rows\.tsv: mqar makes its examples and takes no file; those that do: .*lra_text",
    ):
        select(["mqar:rows.tsv"])


def test_an_unknown_task_gets_the_nearest_name(tasks):
    with pytest.raises(UserError, match=r"--tasks needel: no such task \(did you mean 'needle'\?\); tasks: recall, n"):
        select(["needel"])
    with pytest.raises(UserError, match=r"^evaluation.tasks needel: "):
        select(["needel"], "evaluation.tasks")


def test_a_missing_file_is_no_unknown_task(tasks):
    with pytest.raises(UserError, match=r"--tasks lost/piqa.jsonl: no such file"):
        select(["lost/piqa.jsonl"])


def test_a_pipe_is_called_one_and_never_read(tasks, tmp_path):
    os.mkfifo(tmp_path / "piqa.jsonl")
    with pytest.raises(UserError, match=r"--tasks .*/piqa\.jsonl: is a pipe, not a file"):
        select([str(tmp_path / "piqa.jsonl")])


def test_two_files_of_one_name_are_refused(tasks, file, tmp_path):
    (tmp_path / "other").mkdir()
    twin = tmp_path / "other" / "piqa.jsonl"
    twin.write_text(file.read_text())
    with pytest.raises(UserError, match="two results called piqa; give the file another name"):
        select([str(file), str(twin)])


@pytest.mark.parametrize("name", ["recall", "choices_norm"])
def test_no_result_takes_the_place_of_another(tasks, tmp_path, name):
    """A file called as a generated task is, or as one of the results of another set."""
    choices, twin = tmp_path / "choices.jsonl", tmp_path / f"{name}.jsonl"
    choices.write_text(json.dumps({"query": "a", "choices": ["b", "c"], "gold": 0}) + "\n")
    twin.write_text(json.dumps({"context": "a", "continuation": "b"}) + "\n")
    for names in (
        [str(choices), "all", str(twin)],
        [str(twin), "all", str(choices)],
        [str(twin), "recall", str(choices)],
    ):
        with pytest.raises(UserError, match=f"two results called {name}; give the file another name"):
            select(names)


def test_a_task_of_rows_takes_its_file_behind_a_colon(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text("".join(json.dumps({"text": "abc", "label": i % 2}) + "\n" for i in range(20)))
    (chosen,) = select([f"lra_text:{path}"])
    assert chosen.name == chosen.task.name == f"lra_text:{path}"
    assert chosen.is_generated
    assert "lra_text" not in {task.name for task in select(["all"])}
    with pytest.raises(UserError, match="task lra_text: say its `file`, a jsonl file of"):
        select(["lra_text"])
    with pytest.raises(UserError, match=r"task lra_text: /lost\.jsonl: no such file; it takes a jsonl file of"):
        select(["lra_text:/lost.jsonl"])


def test_none_stands_alone(tasks):
    with pytest.raises(UserError, match="none stands alone"):
        select(["none", "recall"])
