"""Distils a student for every row of a table, and measures each beside its teacher.

    python -m benchmarks.students TABLE.yaml -o OUT [--rows NAME,NAME] [--jobs N] [KEY.PATH=VALUE ...]

TABLE.yaml (benchmarks/tables/) names a recipe, the texts and tasks to measure on, and for every row the keys of the
recipe that it changes; KEY.PATH=VALUE changes the recipe of every row first (teacher.model=FOLDER). What the teacher
writes and the tokens are made once, in OUT/written and OUT/tokens, for all rows; so is what it gets in the tasks, in
OUT/teacher, and a student that several rows begin with, in OUT/converted. A row that is in OUT already is not run
again; one that fails is told, the others go on. Results: OUT/ROW/eval/TEXT, OUT/ROW/tasks, OUT/students.md; and
OUT/curves.md where the table has `curve`: the numbers of tokens after which it tells how held-out text was measured
(evaluation.every_steps of the recipe). Since its rows stand in one table, an OUT keeps the recipe, the teacher and the
overrides it was begun with.

Rows are shared out over the GPUs there are (CUDA_VISIBLE_DEVICES). Small models leave a GPU waiting for their process,
so several rows at once on each (--jobs) take less time in all, and less again where `nvidia-cuda-mps-control -d` was
started before (docs/results/training_step.md).
"""

import argparse
import hashlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NotRequired

import torch
import yaml
from pydantic import AfterValidator, ConfigDict, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from convert.command import load_tokenizer
from convert.loading import load_teacher
from convert.sources import open_source
from deltanet_errors import DeltanetError, UserError, one_line
from distill.metrics import read_metrics
from distill.recipe import load_recipe
from distill.schema import Recipe
from distill.teacher_text import written_source

SHARED = ("written", "tokens")
"""Folders of a run that depend on the teacher and the data alone."""
TEACHER, CONVERTED = "teacher", "converted"
NOTE = "made_of.json"
NEAR = 0.05
"""How far, relatively, a point of a curve may be from the number of tokens it stands for: steps are whole."""
RUNNING: set[subprocess.Popen] = set()
STARTING = threading.Lock()
CONVERTING: dict[Path, threading.Lock] = defaultdict(threading.Lock)
PLACE = threading.local()
"""`PLACE.environment`: of the commands that a thread runs, what of the environment says which GPU they see."""


def _as_row_name(name: str) -> str:
    """A row's folder stands in OUT beside others."""
    if not re.fullmatch(r"[\w-][\w.-]*", name) or name in (TEACHER, CONVERTED, *SHARED):
        others = ", ".join((TEACHER, CONVERTED, *SHARED))
        raise ValueError(f"{name!r} names no row; allowed: letters, digits, '-', '_', '.' inside, and not {others}")
    return name


class Table(TypedDict):
    __pydantic_config__ = ConfigDict(extra="forbid")
    recipe: str
    texts: dict[str, str]
    tasks: NotRequired[list[str]]
    questions: NotRequired[str]
    options: NotRequired[list[str]]
    curve: NotRequired[list[int]]
    rows: dict[Annotated[str, AfterValidator(_as_row_name)], dict[str, Any] | None]


def read_table(path: Path) -> dict:
    """Raises UserError for a file that is no table, at the first thing that is wrong with it."""
    try:
        return TypeAdapter(Table).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(key) for key in first["loc"] if key != "[key]")
        keys = ", ".join(Table.__annotations__)
        raise UserError(f"{path} {where or 'as a whole'}: {first['msg']} (the keys of a table are {keys})") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read: {one_line(error)}") from None


def row_keys(row: dict | None) -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in (row or {}).items()]


def read_recipe(path: Path, table: dict, names: list[str], overrides: list[str]) -> Recipe:
    """The recipe that the rows change. Raises UserError where it is none, or a row of `names` leaves none."""
    recipe = load_recipe(table["recipe"], overrides)
    if recipe.teacher is None:
        raise UserError(f"{table['recipe']}: has no teacher, beside which the rows are measured")
    for name in names:
        try:
            load_recipe(table["recipe"], [*overrides, *row_keys(table["rows"][name])])
        except UserError as error:
            raise UserError(f"{path} row {name}: {error}") from None
    return recipe


def check_made_of(output: Path, making: dict) -> None:
    """Notes what the rows in OUT are made of. Raises UserError where one was begun that is made of something else."""
    note = output / NOTE
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not note.is_file() or not any(output.glob("*/*.log")):
            note.write_text(json.dumps(making, indent=2) + "\n")
        before = json.loads(note.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{note}: {one_line(error)}") from None
    for key, value in making.items():
        if before.get(key) != value:
            raise UserError(f"-o {output}: begun with {key} {before.get(key)!r}, not {value!r}; name another folder")


def execute(command: list[str], log: Path) -> bool:
    """Runs a command, whose output goes to `log`, and says whether it succeeded."""
    with log.open("a") as file:
        with STARTING:
            environment = os.environ | getattr(PLACE, "environment", {})
            child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            RUNNING.add(child)
        try:
            return child.wait() == 0
        finally:
            RUNNING.discard(child)


def end_all(number: int, _frame) -> None:
    """What SIGTERM does: every command that runs is told to end and waited for, and none starts any more. A second
    signal does not wait."""
    signal.signal(number, signal.SIG_DFL)
    with STARTING:
        children = [*RUNNING]
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
        os._exit(128 + number)


def call(main: str, arguments: list[str], log: Path) -> bool:
    """Runs a command of cli.py in a process of its own."""
    return execute([sys.executable, "-c", f"import sys, cli; sys.exit(cli.{main}(sys.argv[1:]))", *arguments], log)


def places(jobs: int) -> list[dict[str, str]]:
    """Of every thread that runs rows its PLACE.environment: `jobs` threads on each GPU there is, or without any."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
    return [{"CUDA_VISIBLE_DEVICES": gpu} for gpu in visible.split(",") if gpu] * jobs or [{}] * jobs


def write_texts(read: Recipe, folder: Path) -> None:
    """Has the teacher write what the recipe's sources ask of it, as a run would."""
    sources = [source for source in read.data.sources if source.from_teacher is not None]
    if not sources:
        return
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    with open_source(read.teacher.model, read.teacher.revision) as found:
        teacher, tokenizer = load_teacher(found.folder, dtype).to(device), load_tokenizer(found.folder)
    for source in sources:
        written_source(source, teacher, tokenizer, folder, read.data.seed, read.data.seq_len)


def measure_tasks(model: str, table: dict, folder: Path) -> bool:
    """Runs the table's tasks on one model, into folder/tasks."""
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    arguments = [model, "--text", "none", "--contexts", "none", "--tasks", *table["tasks"]]
    arguments += ["-o", str(folder / "tasks"), *table.get("options", [])]
    return call("eval_main", arguments, folder / "eval.log")


def begin(recipe: Recipe, folder: Path, log: Path) -> Path | None:
    """The student that a row's recipe converts, made in `folder` by the first row that needs it; None where it cannot
    be made."""
    options = recipe.student.convert.model_dump(exclude_none=True)
    digest = hashlib.sha256(json.dumps([recipe.teacher.model, recipe.teacher.revision, options]).encode())
    student = folder / digest.hexdigest()[:16]
    with CONVERTING[student]:
        if not student.is_dir():
            revision = {} if recipe.teacher.revision is None else {"revision": recipe.teacher.revision}
            arguments = [recipe.teacher.model, "-o", str(student)]
            for name, value in (options | revision).items():
                values = value if isinstance(value, list | tuple) else [value]
                arguments += [f"--{name.replace('_', '-')}", *map(str, values)]
            if not call("convert_main", arguments, log):
                return None
    return student


def run(row: dict | None, table: dict, overrides: list[str], folder: Path, teacher: str) -> str | None:
    """Distils one row into `folder` and measures it; returns what failed, if anything did."""
    (folder / "run").mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        (folder.parent / name).mkdir(exist_ok=True)
        if not (folder / "run" / name).exists():
            (folder / "run" / name).symlink_to(Path("../..") / name)
    began = time.monotonic()
    if not (folder / "run" / "export").is_dir():
        arguments = [table["recipe"], *overrides, *row_keys(row), "-o", str(folder / "run")]
        recipe = load_recipe(table["recipe"], arguments[1:-2])
        if recipe.student.convert is not None and recipe.student.model is None:
            student = begin(recipe, folder.parent / CONVERTED, folder / "convert.log")
            if student is None:
                return "conversion"
            arguments += ["student.convert=null", f"student.model={student}"]
        if not call("distill_main", arguments, folder / "distill.log"):
            return "distillation"
    seconds = time.monotonic() - began
    student = str(folder / "run" / "export")
    for text, file in table["texts"].items():
        arguments = [student, "--against", teacher, "--text", file, "--contexts", "none", "--tasks", "none"]
        arguments += ["-o", str(folder / "eval" / text), *table.get("options", [])]
        if not call("eval_main", arguments, folder / "eval.log"):
            return "evaluation"
    if "tasks" in table and not measure_tasks(student, table, folder):
        return "evaluation"
    if "questions" in table:
        arguments = [student, teacher, "--questions", table["questions"]]
        command = [sys.executable, "-m", "benchmarks.chats", *arguments, "--out", str(folder / "chats.json")]
        if not execute(command, folder / "eval.log"):
            return "evaluation"
    (folder / "seconds.json").write_text(json.dumps({"distil": seconds, "all": time.monotonic() - began}))
    return None


def figures(folder: Path, table: dict) -> tuple[dict[str, str], dict[str, str]]:
    """The columns that the reports in `folder` give of the student and of its teacher."""
    student, teacher = {}, {}
    for text in table["texts"]:
        report = json.loads((folder / "eval" / text / "evaluation.json").read_text())
        perplexity = report["perplexity"]
        teacher[f"{text} perplexity"] = f"{perplexity['teacher']:.3f}"
        student[f"{text} perplexity"] = f"{perplexity['student'] / perplexity['teacher']:.4f}x"
        student[f"{text} KL"] = f"{report['kl']:.4f}"
        recall = report.get("recall", {"by_distance": ()})
        probes = {f"recall at {row['distance']}": row for row in recall["by_distance"]}
        probes |= {"needle": recall["needle"]} if "needle" in recall else {}
        for probe, found in probes.items():
            for who, columns in (("student", student), ("teacher", teacher)):
                columns[f"{text} {probe}"] = f"{found[who]:.3f}"
    for who, columns in ((folder, student), (folder.parent / TEACHER, teacher)):
        report = who / "tasks" / "evaluation.json"
        for name, task in json.loads(report.read_text())["tasks"].items() if report.is_file() else ():
            columns[name] = f"{task['accuracy']:.3f} ± {task['stderr']:.3f}"
            for level, figure in task.get("by_level", {}).items():
                columns[f"{name} {level}"] = f"{figure['accuracy']:.3f}"
    if "questions" in table:
        chats = json.loads((folder / "chats.json").read_text())
        student["same words in answers"] = f"{chats['agreement']:.3f} ± {chats['agreement_stderr']:.3f}"
    return student, teacher


def curve(run: Path) -> list[tuple[int, float, float]]:
    """(tokens trained on, perplexity over the teacher's, KL) of the run's held-out text, every time it was measured."""
    teacher, first, *_, last = json.loads((run / "report.json").read_text())["results"]
    points, tokens = [(0, first["perplexity"], first["kl"])], 0
    for record in read_metrics(run / "metrics.jsonl"):
        tokens += record["tokens"]
        if "held_out_forward_kl" in record:
            points.append((tokens, math.exp(record["held_out_ce"]), record["held_out_forward_kl"]))
    points.append((tokens, last["perplexity"], last["kl"]))
    return [(tokens, perplexity / teacher["perplexity"], kl) for tokens, perplexity, kl in points]


def curve_columns(points: list[tuple[int, float, float]], wanted: list[int]) -> dict[str, str]:
    """The point nearest to each number of tokens wanted; nothing where none is NEAR."""
    columns = {}
    for tokens in (0, *wanted):
        found, ratio, kl = min(points, key=lambda point: abs(point[0] - tokens))
        is_near = abs(found - tokens) <= NEAR * tokens
        columns[f"{tokens:,} tokens"] = f"{ratio:.4f}x, KL {kl:.4f}" if is_near else ""
    return columns


def markdown(rows: dict[str, dict[str, str]]) -> str:
    names = list(dict.fromkeys(column for columns in rows.values() for column in columns))
    lines = ["| row | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(columns.get(n, "") for n in names) + " |" for row, columns in rows.items()]
    return "\n".join(lines)


def write_table(names: list[str], table: dict, output: Path) -> str:
    """OUT/students.md, of the rows that are there, and with `curve` OUT/curves.md; returns both."""
    shown: dict[str, dict[str, str]] = {}
    curves: dict[str, dict[str, str]] = {}
    for name in names:
        if (output / name / "seconds.json").is_file():
            columns, shown[TEACHER] = figures(output / name, table)
            seconds = json.loads((output / name / "seconds.json").read_text())["distil"]
            shown[name] = columns | {"seconds to distil": f"{seconds:.0f}"}
            if "curve" in table:
                curves[name] = curve_columns(curve(output / name / "run"), table["curve"])
    texts = {"students.md": markdown(shown)} | ({"curves.md": markdown(curves)} if curves else {})
    for file, text in texts.items():
        (output / file).write_text(text + "\n")
    return "\n\n".join(texts.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY.PATH=VALUE")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rows", help="only these, with commas between")
    parser.add_argument("--jobs", type=int, default=1, help="rows at once on each GPU (default: 1)")
    arguments = parser.parse_intermixed_args()
    if arguments.jobs < 1:
        parser.error(f"--jobs {arguments.jobs}: allowed is 1 or more")
    signal.signal(signal.SIGTERM, end_all)
    try:
        table = read_table(arguments.table)
        names = arguments.rows.split(",") if arguments.rows else list(table["rows"])
        if unknown := [name for name in names if name not in table["rows"]]:
            parser.error(f"--rows: {arguments.table} has no {', '.join(unknown)}; it has {', '.join(table['rows'])}")
        recipe = read_recipe(arguments.table, table, names, arguments.overrides)
        teacher = recipe.teacher.model
        making = {"recipe": table["recipe"], "teacher": teacher, "overrides": arguments.overrides}
        check_made_of(arguments.output, making)
        waiting = [name for name in names if not (arguments.output / name / "seconds.json").is_file()]
        if waiting:
            write_texts(recipe, arguments.output / "written")
    except DeltanetError as error:
        parser.exit(error.exit_code, f"{parser.prog}: {error}\n")
    torch.cuda.empty_cache()
    if "tasks" in table and not (arguments.output / TEACHER / "tasks" / "evaluation.json").is_file():
        waiting.insert(0, TEACHER)

    def finish(name: str) -> bool:
        folder = arguments.output / name
        if name == TEACHER:
            failed = None if measure_tasks(teacher, table, folder) else "evaluation"
        else:
            failed = run(table["rows"][name], table, arguments.overrides, folder, teacher)
        if failed:
            print(f"{name}: the {failed} failed; its log is in {folder}", file=sys.stderr, flush=True)
        else:
            write_table(names, table, arguments.output)
            print(f"{name}: done", flush=True)
        return failed is None

    threads = places(arguments.jobs)
    untaken = iter(threads)
    with ThreadPoolExecutor(len(threads), initializer=lambda: setattr(PLACE, "environment", next(untaken))) as pool:
        succeeded = list(pool.map(finish, waiting))
    print(write_table(names, table, arguments.output))
    sys.exit(not all(succeeded))


if __name__ == "__main__":
    main()
