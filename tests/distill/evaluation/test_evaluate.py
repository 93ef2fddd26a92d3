"""Everything together, from folders."""

import json
import shutil

import pytest
import torch
from eval_subjects import TEXT
from test_sets import LAMBADA, PIQA, write
from transformers import AutoConfig, AutoModelForCausalLM

from deltanet_errors import UserError
from distill.evaluation import worth
from distill.evaluation.evaluate import check_contexts, evaluate, loss_curve, measure, run_tasks
from distill.evaluation.result import TaskResult, share
from distill.evaluation.selection import Chosen

OPTIONS = {"text": str(TEXT), "tokens": 200, "window": 100, "device": "cpu"}


@pytest.fixture(scope="module")
def report(folders, tmp_path_factory):
    piqa = write(tmp_path_factory.mktemp("sets") / "piqa.jsonl", PIQA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worth, "SECONDS", 0.0)
        return evaluate(folders[1], against=folders[0], tasks=[str(piqa)], contexts=[64, 128], **OPTIONS)


def test_a_report_has_every_part_and_is_plain_json(report):
    assert json.loads(json.dumps(report)) == report
    keys = {
        "perplexity",
        "kl",
        "top1_agreement",
        "by_position",
        "by_seen",
        "samples",
        "recall",
        "tasks",
        "speed",
        "memory",
        "diagnostics",
        "layers",
    }
    assert keys <= report.keys()
    assert set(report["perplexity"]) == {"teacher", "student"}
    assert set(report["recall"]["repeat"]) == {"teacher", "student"}
    assert report["tasks"]["piqa"]["n"] == report["tasks"]["piqa_letters"]["n"] == len(PIQA)
    assert 0 <= report["tasks"]["piqa"]["teacher"]["accuracy"] <= 1


def test_parts_are_asked_for_recall_as_far_as_the_recall_section(report):
    (row,) = report["recall"]["by_distance"]
    assert row["distance"] == 64  # of windows of 100 tokens
    rows = report["diagnostics"]["Part that is off"]
    assert {"none (teacher)", "none (student)", "layer 0, state", "layer 1, attention"} <= rows.keys()
    assert all({"recall 64", "first 64"} <= figures.keys() for figures in rows.values())


def test_only_times_differ_between_two_evaluations(report, folders, tmp_path):
    piqa = write(tmp_path / "piqa.jsonl", PIQA)
    again = evaluate(folders[1], against=folders[0], tasks=[str(piqa)], contexts=[], **OPTIONS)
    timed = {"seconds", "speed", "memory"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in report.items() if k not in timed}


def test_a_plain_transformer_may_stand_alone(folders, tmp_path):
    lambada = write(tmp_path / "lambada.jsonl", LAMBADA)
    alone = evaluate(folders[0], text="none", tasks=[str(lambada)], contexts=[], limit=2, device="cpu")
    assert alone["layers"] is None
    assert alone["teacher"] is None
    assert alone["tasks"]["lambada"]["n"] == 2
    assert not {"perplexity", "speed", "recall"} & alone.keys()


def test_a_model_beside_itself_is_as_good(folders):
    twin = evaluate(folders[0], against=folders[0], tasks=["none"], contexts=[], **OPTIONS)
    assert twin["top1_agreement"] == 1
    assert twin["recall"]["repeat"]["teacher"] == twin["recall"]["repeat"]["student"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": [161]}, "--contexts 161: allowed is 64 to 160, the range of the model"),
        ({"contexts": [63]}, "--contexts 63: allowed is 64"),
        ({"limit": 0}, "--limit 0: allowed is 1 or more"),
        ({"task_context": 161}, "--task-context 161: allowed is 1 to 160, the range of the model"),
        ({"text": "lost.txt"}, "--text lost.txt: no such file"),
        ({"text": "slef"}, "--text slef: not a text this can read; .*, each also .gz, self, none"),
        ({"parts": "layer"}, "--parts layer: allowed are layers, kinds, none .did you mean 'layers'."),
        ({"tasks": ["lost"]}, "--tasks lost: no such task"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(options, message, folders, monkeypatch):
    import distill.evaluation.evaluate as module

    monkeypatch.setattr(module, "measure", lambda *a, **k: pytest.fail("measured"))
    with pytest.raises(UserError, match=message):
        evaluate(folders[1], **(OPTIONS | {"tasks": ["none"]} | options))


def test_a_row_beyond_the_range_is_refused_before_anything_is_measured(folders, tmp_path, monkeypatch):
    import distill.evaluation.evaluate as module

    monkeypatch.setattr(module, "measure", lambda *a, **k: {})
    rows = [{"text": "a dog ran"}, {"context": "a dog", "continuation": "ran " * 200}]
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = OPTIONS | {"tasks": [str(path)], "text": "none"}
    with pytest.raises(UserError, match=r"^long, row 2: .* longer than the model's range, 160"):
        evaluate(folders[0], **options)
    evaluate(folders[0], **(options | {"limit": 1}))


def test_a_model_of_fewer_ids_than_its_tokenizer_makes_is_refused(folders, tmp_path, monkeypatch):
    import distill.evaluation.evaluate as module

    monkeypatch.setattr(module, "measure", lambda *a, **k: pytest.fail("measured"))
    config = AutoConfig.from_pretrained(folders[0], vocab_size=300)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(folders[0] / name, tmp_path / "small" / name)
    (tmp_path / "set.jsonl").write_text('{"context": "a dog", "continuation": "ran away"}\n')
    for options in ({"tasks": ["none"]}, {"tasks": [str(tmp_path / "set.jsonl")], "text": "none"}):
        with pytest.raises(UserError, match=r"makes the id \d+, but the model has 300 tokens: this is not the model's"):
            evaluate(tmp_path / "small", **(OPTIONS | options))


@pytest.mark.parametrize(("longest", "contexts"), [(16, ()), (32, ()), (33, (33,)), (100, (100,)), (600, (128, 512))])
def test_contexts_that_nobody_named_leave_room_for_a_prompt(longest, contexts):
    assert check_contexts(None, longest, torch.device("cpu")) == contexts


def test_models_of_different_tokenizers_are_not_compared(folders, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folders[0], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = list(vocabulary)[500:502]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match=r"--against .*other: its tokenizer .* is not that of"):
        evaluate(folders[1], against=other, tasks=["none"], contexts=[], **OPTIONS)


def test_the_losses_are_those_of_the_run_that_made_the_export(tmp_path):
    export = tmp_path / "run" / "export"
    export.mkdir(parents=True)
    records = [
        {"stage": "distil", "stage_index": 0, "step": step, "loss": float(step) if step else None}
        for step in range(1000)
    ]
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert loss_curve(export) == []  # a folder beside some metrics, but no export
    (export / "deltanet_recipe.yaml").write_text("")
    curve = loss_curve(export)
    assert curve[0] == {"stage": "distil", "step": 1, "loss": 1.0}
    assert 300 < len(curve) <= 400
    with (tmp_path / "run" / "metrics.jsonl").open("ab") as log:
        log.write(b'5\n{"stage": "distil"}\n\xff\0\n{"stage": "dis')  # as a killed run or a damaged disk leaves it
    assert loss_curve(export) == curve


class Recall:
    """A task that a model passes by its name, up to a context of 100."""

    def run(self, subject, *, seed, n, max_context):
        if max_context > 100:
            raise UserError("task recall: no level fits")
        return TaskResult("recall", **share(n if subject.name == "good" else 0, n), by_level={"8": share(1, 2)})


class Named:
    device = torch.device("cpu")

    def __init__(self, name):
        self.name = name


def test_student_and_teacher_answer_the_same_examples():
    results, skipped = run_tasks(Named("bad"), Named("good"), [Chosen("recall", Recall(), True)], 5, 100, 0)
    assert skipped == {}
    assert results["recall"]["accuracy"] == 0
    assert results["recall"]["n"] == 5
    assert results["recall"]["teacher"]["accuracy"] == 1
    assert results["recall"]["teacher"]["by_level"] == {"8": share(1, 2)}


def test_a_task_that_cannot_be_run_is_skipped_with_its_reason_unless_it_was_named():
    everything, named = Chosen("recall", Recall(), True, is_named=False), Chosen("recall", Recall(), True)
    assert run_tasks(Named("good"), None, [everything], 5, 101, 0) == ({}, {"recall": "task recall: no level fits"})
    with pytest.raises(UserError, match="no level fits"):
        run_tasks(Named("good"), None, [named], 5, 101, 0)


@pytest.mark.parametrize(("contexts", "longest"), [((), 2048), ((64,), 2048), ((64, 4096), 4096)])
def test_tasks_are_as_long_as_the_longest_context_asked_for(contexts, longest, student, monkeypatch):
    import distill.evaluation.evaluate as module

    monkeypatch.setattr(module, "worth", lambda *a, **k: {})
    seen = []
    monkeypatch.setattr(module, "run_tasks", lambda *arguments: seen.append(arguments[4]) or ({}, {}))
    measure(student, None, windows=None, tasks=["some"], contexts=contexts, max_context=8192)
    measure(student, None, windows=None, tasks=["some"], contexts=contexts, max_context=500)
    measure(student, None, windows=None, tasks=["some"], contexts=contexts, task_context=99, max_context=8192)
    assert seen == [longest, 500, 99]
