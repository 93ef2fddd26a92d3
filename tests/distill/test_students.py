"""The benchmark of many students: what is run, what of it stands in its tables, and that its own tables hold."""

import json
from pathlib import Path

import pytest
import small_run
import yaml

import cli
from benchmarks import students
from distill.recipe import load_recipe

ROOT = Path(__file__).parents[2]
TABLES = sorted((ROOT / "benchmarks" / "tables").glob("*.yaml"))
TEXT = str(small_run.DEMO / "text.txt")


@pytest.fixture
def calls(monkeypatch):
    """The commands of cli.py that were run, here in this process."""
    made = []

    def call(main, arguments, log):
        made.append((main, arguments))
        return getattr(cli, main)(arguments) == 0

    monkeypatch.setattr(students, "call", call)
    return made


def test_rows_are_measured_and_the_teacher_once(tmp_path, calls):
    teacher = str(small_run.write_teacher(tmp_path / "small"))
    stages = [{"kind": "distil", "steps": 4, "lr": 1e-3}]
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=stages)
    table = {
        "recipe": str(recipe),
        "texts": {"demo": TEXT},
        "tasks": ["needle"],
        "options": ["--limit", "2", "--tokens", "64", "--window", "64"],
        "curve": [256, 999],
    }
    rows = {"often": {"evaluation.every_steps": 2}, "other": {"student.convert.hybrid": "layers:0"}}
    out = tmp_path / "out"
    assert students.measure_tasks(teacher, table, out / "teacher")
    for name, row in rows.items():
        assert students.run(row, table, [], out / name, teacher) is None
    evaluated = [arguments[0] for main, arguments in calls if main == "eval_main" and "needle" in arguments]
    assert evaluated == [teacher, *(str(out / name / "run" / "export") for name in rows)]
    assert len(calls) == 1 + 3 * len(rows)

    students.write_table(list(rows), table, out)
    header, _, *lines = (out / "students.md").read_text().splitlines()
    names = [name.strip() for name in header.strip("|").split("|")]
    whole = [name for name in names if "tokens" not in name]  # not a single level of a task
    assert whole == [
        "row",
        "demo perplexity",
        "demo recall at 64",
        "demo needle",
        "needle",
        "demo KL",
        "seconds to distil",
    ]
    cells = {line.split("|")[1].strip(): dict(zip(names, map(str.strip, line.strip("|").split("|")))) for line in lines}
    assert list(cells) == ["teacher", *rows]
    for name in cells:
        report = json.loads((out / name / "tasks" / "evaluation.json").read_text())
        assert report["teacher"] is None
        task = report["tasks"]["needle"]
        assert cells[name]["needle"] == f"{task['accuracy']:.3f} ± {task['stderr']:.3f}"

    # A step is 4 x 32 tokens; only the first row looks between the start and the end.
    results = json.loads((out / "often" / "run" / "report.json").read_text())["results"]
    points = students.curve(out / "often" / "run")
    assert [tokens for tokens, _, _ in points] == [0, 256, 512]
    assert points[0][2] == results[1]["kl"] > points[1][2] > points[2][2] == results[2]["kl"]
    assert points[2][1] == results[2]["perplexity"] / results[0]["perplexity"]
    assert [tokens for tokens, _, _ in students.curve(out / "other" / "run")] == [0, 512]
    shown = (out / "curves.md").read_text().splitlines()
    assert shown[0] == "| row | 0 tokens | 256 tokens | 999 tokens |"
    assert shown[2] == f"| often | {' | '.join(f'{ratio:.4f}x, KL {kl:.4f}' for _, ratio, kl in points[:2])} |  |"
    assert shown[3].endswith(" |  |  |")


def test_a_curve_tells_only_what_was_measured_near():
    points = [(0, 2.0, 1.0), (98_304, 1.5, 0.5), (196_608, 1.2, 0.25)]
    assert students.curve_columns(points, [100_000, 150_000, 200_000]) == {
        "0 tokens": "2.0000x, KL 1.0000",
        "100,000 tokens": "1.5000x, KL 0.5000",
        "150,000 tokens": "",
        "200,000 tokens": "1.2000x, KL 0.2500",
    }


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_of_a_table_is_a_recipe(path):
    table = yaml.safe_load(path.read_text())
    for name, row in table["rows"].items():
        keys = [f"{key}={json.dumps(value)}" for key, value in (row or {}).items()]
        recipe = load_recipe(ROOT / table["recipe"], keys)
        assert (recipe.student.convert is None) == (recipe.student.model is not None), name
