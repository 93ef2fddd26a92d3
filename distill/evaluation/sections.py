"""A report as sections of prose and tables, which `markdown.py` and `page.py` lay out.

Twin: tests/distill/evaluation/test_sections.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MODELS = ("teacher", "student")
SURE = 2  # standard errors
SEEN = {"new": "is new", "token": "stood before", "pair": "followed the same token before"}
SHARES = ("recall ", "first ")  # how the columns begin that are shares, in the diagnostics
SAID = ("said", "chosen", "correct")  # what a sample of a task tells of the model, not of the example


@dataclass(frozen=True)
class Table:
    """The first column is of words, the others of figures. Every cell is text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """figures: names of plots (`plots.py`). samples: what models wrote, each a dict of label -> text. folded: parts
    that the page shows when asked to."""

    title: str
    prose: Sequence[str] = ()
    tables: Sequence[Table] = ()
    figures: Sequence[str] = ()
    samples: Sequence[dict[str, str]] = ()
    folded: Sequence["Section"] = ()


def title(report: dict) -> str:
    against = f", measured against {report['teacher']}" if report["teacher"] else ""
    return f"{report['student']}{against}"


def sections(report: dict) -> list[Section]:
    """What the report holds, most important first; what was not measured is not there."""
    found = [_summary(report)]
    for key, make in (
        ("by_position", _language),
        ("tasks", _tasks),
        ("speed", _speed),
        ("memory", _memory),
        ("diagnostics", _diagnostics),
        ("losses", _losses),
        ("samples", _samples),
    ):
        if report.get(key) or (key == "tasks" and report.get("skipped_tasks")):
            found.append(make(report))
    return [*found, _how(report)]


def _models(report: dict) -> list[str]:
    return [who for who in MODELS if report[who] is not None]


def _summary(report: dict) -> Section:
    """The table of everything in one figure each."""
    rows = []

    def add(what: str, values: dict, show, compare: bool = True) -> None:
        ratio = ""
        numbers = [values.get(who) for who in MODELS]
        if compare and all(isinstance(number, int | float) for number in numbers) and numbers[0]:
            ratio = f"{numbers[1] / numbers[0]:.3f}"
        cells = ["" if number is None else show(number) for number in numbers]
        rows.append([what, *cells, ratio])

    if "perplexity" in report:
        add("perplexity", report["perplexity"], _short)
    if "kl" in report:
        add("KL(teacher ‖ student), nats a token", {"student": report["kl"]}, lambda value: f"{value:.4f}")
        add("same likeliest next token", {"student": report["top1_agreement"]}, _percent)
    for probe, label in (("repeat", "recall of a repeated passage"), ("needle", "recall of random tokens")):
        if "recall" in report:
            add(f"{label}, {report['recall']['distance']} tokens back", report["recall"][probe], _percent)
    for name, task in report.get("tasks", {}).items():
        values = {"student": task["accuracy"], "teacher": task.get("teacher", {}).get("accuracy")}
        add(name, values, _percent, compare="teacher" in task and _is_above_floors(task, "teacher"))
    for section, figures in (("speed", SPEED), ("memory", MEMORY)):
        last = report[section]["by_context"][-1] if section in report else {}
        for figure, (label, show) in figures.items():
            values = {who: last[who][figure] for who in MODELS if isinstance(last.get(who), dict)}
            if values:
                add(f"{label}, {last['context']:,} tokens", values, show)
    if report["teacher"] is None:
        return Section("In short", tables=[Table(["", "value"], [[row[0], row[2]] for row in rows])])
    return Section("In short", tables=[Table(["", "teacher", "student", "x teacher"], rows)])


def _language(report: dict) -> Section:
    positions = [(f"{row['first']}–{row['last']}", row) for row in report["by_position"]]
    count = sum(row["tokens"] for row in report["by_seen"])
    seen = [(f"{SEEN[row['seen']]}, {row['tokens'] / count:.0%}", row) for row in report["by_seen"]]
    prose = [
        f"{report['tokens']:,} tokens in windows of {report['window']:,}, by how many tokens stand before, and by "
        "whether the next token, or it and the one before it side by side, stood there already."
    ]
    tables = [_by("tokens before", [*positions, ("all", report)], report), _by("the next token", seen, report)]
    figures = ["perplexity by position"]
    if report.get("recall", {}).get("by_distance"):
        prose.append("Recall: how often a passage that comes again is guessed, by the tokens since.")
        models = _models(report)
        rows = report["recall"]["by_distance"]
        cells = [[f"{row['distance']:,}", *(_percent(row[who]) for who in models)] for row in rows]
        tables.append(Table(["distance, tokens", *(f"recall, {who}" for who in models)], cells))
        figures.append("recall by distance")
    return Section("Language", prose, tables, figures)


def _by(what: str, rows: Sequence[tuple[str, dict]], report: dict) -> Table:
    """Figures of `language.py`, a row for each (label, figures)."""
    models, cells = _models(report), []
    for label, row in rows:
        cells.append([label, *(_short(row["perplexity"][who]) for who in models)])
        if "kl" in report:
            ratio = row["perplexity"]["student"] / row["perplexity"]["teacher"]
            cells[-1] += [f"{ratio:.3f}", f"{row['kl']:.4f}", _percent(row["top1_agreement"])]
    compared = ["x teacher", "KL, nats", "same likeliest"] if "kl" in report else []
    return Table([what, *(f"perplexity, {who}" for who in models), *compared], cells)


def _tasks(report: dict) -> Section:
    models, rows = _models(report), []
    for name, task in report["tasks"].items():
        floor = max(task["floors"].items(), key=lambda item: item[1], default=("", 0.0))
        above = [who for who in models if _is_above_floors(task, who)]
        rows.append(
            [
                name,
                *(_with_error(_part(task, who)) for who in models),
                f"{_percent(floor[1])} {floor[0]}".strip(),
                ("both" if len(above) == 2 else "".join(above)) or "none",
                f"{task['n']:,}",
            ]
        )
    columns = ["task", *models, "best trivial strategy", "above it", "examples"]
    prose = [
        "Share right, ± its standard error. A model that is not above the best trivial strategy by "
        f"{SURE} standard errors has shown nothing.",
        *(line for name, task in report["tasks"].items() for line in (*_partial(name, task), *_further(name, task))),
        *(f"Not run: {reason}." for reason in report.get("skipped_tasks", {}).values()),
    ]
    return Section(
        "Tasks",
        prose,
        [Table(columns, rows)] if rows else [],
        [f"task {name}" for name, task in report["tasks"].items() if len(task["by_level"]) > 1],
        folded=[_task(name, task, models) for name, task in report["tasks"].items()],
    )


def _part(task: dict, who: str) -> dict:
    """The figures of one model."""
    return task if who == "student" else task["teacher"]


def _with_error(figures: dict) -> str:
    return f"{_percent(figures['accuracy'])} ± {100 * figures['stderr']:.1f}"


def _is_above_floors(task: dict, who: str) -> bool:
    figures = _part(task, who)
    return figures["accuracy"] - max(task["floors"].values(), default=0.0) > SURE * figures["stderr"]


def _task(name: str, task: dict, models: Sequence[str]) -> Section:
    """Levels, and examples with what each model said."""
    rows = [
        [level, *(_with_error(_part(task, who)["by_level"][level]) for who in models)] for level in task["by_level"]
    ]
    samples = []
    for index, sample in enumerate(task["samples"]):
        shown = {label: str(text) for label, text in sample.items() if label not in SAID}
        for who in models:
            for label in SAID:
                if label in sample:
                    shown[f"{label}, {who}"] = str(_part(task, who)["samples"][index][label])
        samples.append(shown)
    return Section(name, tables=[Table(["level", *models], rows)] if rows else [], samples=samples)


def _partial(name: str, task: dict) -> list[str]:
    """One line of what understanding a part of the task is worth, whatever model was measured."""
    shown = [f"{strategy} {_percent(share)}" for strategy, share in task["partial_floors"].items()]
    return [f"{name}, floors without any model: {', '.join(shown)}."] if shown else []


def _further(name: str, task: dict) -> list[str]:
    """One line of a task's further figures: `piqa_letters: says A student 100.0%, teacher 52.3%; ...`."""
    parts = []
    theirs = task.get("teacher", {}).get("figures", {})
    for figure in dict.fromkeys([*task["figures"], *theirs]):
        shown = [
            f"{who} {_percent(values[figure]) if values[figure] <= 1 else _short(values[figure])}"
            for who, values in (("student", task["figures"]), ("teacher", theirs))
            if figure in values
        ]
        parts.append(f"{figure}: {', '.join(shown)}")
    return [f"{name}: {'; '.join(parts)}."] if parts else []


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _seconds(value: float) -> str:
    return f"{1000 * value:,.1f} ms" if value < 10 else f"{value:,.1f} s"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024 or unit == "GiB":
            return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
        value /= 1024
    raise AssertionError


SPEED = {
    "prefill_tokens_per_second": ("prefill, tokens/s", _rate),
    "first_token_seconds": ("time to first token", _seconds),
    "decode_tokens_per_second": ("decoding, tokens/s", _rate),
}
MEMORY = {"cache_bytes": ("cache", _bytes), "peak_bytes": ("peak memory", _bytes)}


def _by_context(report: dict, section: str, figures: dict) -> Table:
    models = _models(report)
    columns = ["context", *(f"{label}, {who}" for label, _ in figures.values() for who in models)]
    rows = []
    for row in report[section]["by_context"]:
        cells = [f"{row['context']:,}"]
        for figure, (_, show) in figures.items():
            cells += [show(row[who][figure]) if isinstance(row[who], dict) else row[who] for who in models]
        rows.append(cells)
    return Table(columns, rows)


def _speed(report: dict) -> Section:
    speed = report["speed"]
    threads = ""
    if speed["device"] == "cpu":
        many = "thread" if speed["threads"] == 1 else "threads"
        threads = f", {speed['threads']} {many} (load before: {speed['load']:.1f} on {speed['cores']} cores)"
    backends = "; ".join(f"{who}: {name}" for who, name in speed["backend"].items())
    prose = [
        f"Batch 1 on {speed['device']}{threads}, {report['dtype']}; medians after a warm-up. A context is a prompt and "
        f"{speed['decoded_tokens']} decoded tokens.",
        f"What runs: {backends}.",
    ]
    for figure, words in speed.get("crossover", {}).items():
        prose.append(f"{SPEED[figure][0][0].upper()}{SPEED[figure][0][1:]}: the student is {words}.")
    return Section("Speed", prose, [_by_context(report, "speed", SPEED)], ["prefill", "decoding"])


def _memory(report: dict) -> Section:
    memory = report["memory"]
    parts = []
    for who in _models(report):
        growth = memory["cache_bytes_per_token"][who]
        grows = "" if growth is None else f", a cache that grows by {growth:,.0f} bytes a token"
        parts.append(f"{who}: weights {_bytes(memory['weights_bytes'][who])}{grows}")
    prose = [f"{'; '.join(parts)}."]
    if "crossover" in memory:
        prose.append(f"The student's cache, against the teacher's: {memory['crossover']}.")
    return Section("Memory", prose, [_by_context(report, "memory", MEMORY)], ["cache", "peak memory"])


def _diagnostics(report: dict) -> Section:
    prose, tables = [], []
    for name, rows in report["diagnostics"].items():
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        cells = [[str(row), *(_cell(column, values.get(column)) for column in columns)] for row, values in rows.items()]
        tables.append(Table([name, *columns], cells))
        if any(column.startswith(SHARES) for column in columns):
            prose.append(
                "Recall N: how often a passage that comes again N tokens later is guessed; first N: the same passage "
                "when it stands there for the first time. Only what recall is above that is memory."
            )
    return Section("Diagnostics", prose, tables)


def _cell(column: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, float) and column.startswith(SHARES):
        return _percent(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _losses(report: dict) -> Section:
    stages = dict.fromkeys(record["stage"] for record in report["losses"])
    return Section(
        "Training", ["The loss of the run this student comes from, by stage."], figures=[f"loss {s}" for s in stages]
    )


def _samples(report: dict) -> Section:
    samples = []
    for sample in report["samples"]:
        shown = {"prompt": sample["prompt"]}
        shown |= {who: sample[who] for who in MODELS if who in sample}
        shown["the text itself"] = sample["text"]
        samples.append(shown)
    prose = ["Both go on greedily from the same words."] if report["teacher"] else ["It goes on greedily."]
    if report["teacher"]:
        same = ", ".join(str(sample["same_tokens"]) for sample in report["samples"])
        prose.append(f"Tokens before the two differ: {same}.")
    return Section("What they write", prose, samples=samples)


def _how(report: dict) -> Section:
    versions = ", ".join(f"{package} {number}" for package, number in report["versions"].items())
    text = f"Text: {report['text']}. " if report.get("text") else ""
    seconds = ", ".join(f"{part} {value:,.0f} s" for part, value in report["seconds"].items())
    return Section(
        "How it was measured",
        [f"{text}{report['device']}, {report['dtype']}, seed {report['seed']}. {versions}. Took: {seconds}."],
    )
