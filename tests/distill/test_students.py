"""The benchmark of many students: what is run, what of it stands in its tables, and that its own tables hold."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
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
    assert [main for main, _ in calls] == ["eval_main", *["convert_main", "distill_main", "eval_main", "eval_main"] * 2]

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


def test_rows_that_begin_alike_share_one_conversion_and_others_have_their_own(tmp_path, monkeypatch):
    made = []

    def call(main, arguments, log):
        made.append(arguments)
        Path(arguments[2]).mkdir(parents=True)
        return True

    monkeypatch.setattr(students, "call", call)
    keys = ["student.convert.calibrate=[a.txt, self]", "student.convert.skip_conv=2"]
    of_the_hub = ["teacher.model=owner/name", "teacher.revision=abc"]
    rows = [[], ["stages.1.lr=1e-3", "data.repeats=0.5"], ["student.convert.hybrid=none"], of_the_hub]
    recipes = [load_recipe("quickstart.yaml", ["teacher.model=demo", *keys, *row]) for row in rows]
    folders = [students.begin(recipe, tmp_path, tmp_path / "log") for recipe in recipes]
    assert folders[0] == folders[1]
    assert len({*folders}) == len(made) == 3
    first = made[0]
    assert first[:3] == ["demo", "-o", str(folders[0])]
    assert first[first.index("--calibrate") + 1 :][:2] == ["a.txt", "self"]
    assert first[first.index("--skip-conv") + 1] == "2"
    assert made[2][-2:] == ["--revision", "abc"]
    assert cli.convert_main([*first[:2], str(tmp_path / "new"), *first[3:], "--calibrate", "none", "--dry-run"]) == 0


def test_a_curve_tells_only_what_was_measured_near():
    points = [(0, 2.0, 1.0), (98_304, 1.5, 0.5), (196_608, 1.2, 0.25)]
    assert students.curve_columns(points, [100_000, 150_000, 200_000]) == {
        "0 tokens": "2.0000x, KL 1.0000",
        "100,000 tokens": "1.5000x, KL 0.5000",
        "150,000 tokens": "",
        "200,000 tokens": "1.2000x, KL 0.2500",
    }


TABLE = {"recipe": "quickstart.yaml", "texts": {"demo": TEXT}, "rows": {"one": None, "two": {"data.seq_len": 64}}}


def started(monkeypatch, tmp_path, table, *options):
    """The exit code of the command on this table (its text, or None for no file), and the last line it says."""
    if table is not None:
        (tmp_path / "t.yaml").write_text(table if isinstance(table, str) else yaml.safe_dump(table))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    monkeypatch.setattr("sys.argv", ["students", str(tmp_path / "t.yaml"), "-o", str(tmp_path / "out"), *options])
    with pytest.raises(SystemExit) as stop:
        students.main()
    return stop.value.code


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (None, "t.yaml: cannot be read: [Errno 2] No such file"),
        ("rows: [", "t.yaml: cannot be read: while parsing"),
        ("just text", "t.yaml as a whole: Input should be a valid dictionary"),
        ({"texst": {}}, "t.yaml texst: Extra inputs are not permitted (the keys of a table are recipe, texts, tasks,"),
        ({"tasks": "needle"}, "t.yaml tasks: Input should be a valid list"),
        ({"options": ["--tokens", 64]}, "t.yaml options.1: Input should be a valid string"),
        ({"rows": {"teacher": None}}, "t.yaml rows.teacher: Value error, 'teacher' names no row; allowed: letters, "),
        ({"rows": {"tokens": None}}, "'tokens' names no row"),
        ({"rows": {"a/b": None}}, "'a/b' names no row"),
        ({"rows": {"..": None}}, "'..' names no row"),
        ({"rows": {7: None}}, "t.yaml rows.7: Input should be a valid string"),
        ({"recipe": "nowhere.yaml"}, "nowhere.yaml: "),
        ({"recipe": "mqar.yaml"}, "mqar.yaml: has no teacher, beside which the rows are measured"),
        ({"rows": {"one": {"data.seq_lem": 5}}}, "t.yaml row one: command line data.seq_lem: "),
    ],
)
def test_a_table_that_is_none_is_one_line(table, told, tmp_path, monkeypatch, capsys):
    assert started(monkeypatch, tmp_path, TABLE | table if isinstance(table, dict) else table) == 2
    said = capsys.readouterr().err
    assert told in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_another_teacher_or_other_overrides_want_a_folder_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(students, "write_texts", lambda *arguments: None)
    monkeypatch.setattr(students, "run", lambda *arguments: "distillation")
    assert started(monkeypatch, tmp_path, TABLE, "teacher.model=misspelt") == 1  # before any row was begun
    (tmp_path / "out" / "one").mkdir()
    monkeypatch.setattr(students, "run", lambda *arguments: (tmp_path / "out" / "one" / "distill.log").touch() or "all")
    assert started(monkeypatch, tmp_path, TABLE, "data.seq_len=32") == 1
    assert started(monkeypatch, tmp_path, TABLE, "data.seq_len=32", "--rows", "one") == 1
    capsys.readouterr()
    for options, told in [
        (["data.seq_len=33"], "out: begun with overrides ['data.seq_len=32'], not ['data.seq_len=33']; name"),
        (["data.seq_len=32", "teacher.model=other"], "out: begun with teacher 'demo', not 'other'; name another"),
        (["data.seqlen=32"], "command line data.seqlen: "),
    ]:
        assert started(monkeypatch, tmp_path, TABLE, *options) == 2
        said = capsys.readouterr().err
        assert told in said
        assert said.count("\n") == 1


def test_sigterm_ends_what_the_rows_run_and_begins_no_other(tmp_path):
    """Rows whose command says its process and sleeps, two at once of four."""
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(TABLE | {"rows": dict.fromkeys("abcd")}))
    log = tmp_path / "log"
    sleeps = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(300)"]
    code = f"""
from pathlib import Path
from benchmarks import students
students.write_texts = lambda *arguments: None
students.run = lambda *arguments: None if students.execute({sleeps}, Path({str(log)!r})) else "distillation"
students.main()
"""
    command = [sys.executable, "-c", code, str(tmp_path / "t.yaml"), "-o", str(tmp_path / "out"), "--jobs", "2"]
    parent = subprocess.Popen(command, cwd=ROOT)
    try:
        while not log.is_file() or len(log.read_text().split()) < 2:
            assert parent.poll() is None
            time.sleep(0.1)
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 128 + signal.SIGTERM
    finally:
        parent.kill()
    children = [int(line) for line in log.read_text().split()]
    assert len(children) == 2
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_rows_are_shared_out_over_the_gpus(tmp_path, monkeypatch):
    together, log = threading.Barrier(4, timeout=60), tmp_path / "log"

    def run(*arguments):
        together.wait()  # so that every row has a thread of its own
        students.execute([sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"], log)

    monkeypatch.setattr(students, "run", run)
    monkeypatch.setattr(students, "write_texts", lambda *arguments: None)
    monkeypatch.setattr(students, "write_table", lambda *arguments: "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,GPU-5")
    assert started(monkeypatch, tmp_path, TABLE | {"rows": dict.fromkeys("abcd")}, "--jobs", "2") == 0
    assert sorted(log.read_text().split()) == ["3", "3", "GPU-5", "GPU-5"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(students.torch.cuda, "device_count", lambda: 0)
    assert students.places(2) == [{}, {}]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_row_of_a_table_is_a_recipe(path):
    table = students.read_table(path)
    for name, row in table["rows"].items():
        recipe = load_recipe(ROOT / table["recipe"], students.row_keys(row))
        assert (recipe.student.convert is None) == (recipe.student.model is not None), name
