"""README.md of a student: the Hub's metadata, the layers, how it was made, what was measured, how to load it, limits.

Everything in it is read from the folder it is written for: config.json, conversion.json, closeness.json, and of a
distillation report.json and deltanet_recipe.yaml. What stands in none of them is not said. Twin: test_card.py.
"""

import json
from pathlib import Path

import yaml

from deltanet.config import DeltaNetConfig
from deltanet_errors import UserError

from ..closeness import VARIANTS
from ..layouts import LINEAR, Layout
from .files import CLOSENESS, EVALUATION, README, RECIPE, RECORD, REPORT
from .licences import Licence, from_head

_USE = """tokenizer = AutoTokenizer.from_pretrained(FOLDER)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```

`deltanet-convert --verify FOLDER` compares every file with the sha256 in manifest.json and checks the tensors."""
LOAD = {
    "deltanet": f"""```python
import deltanet  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # this folder, or its id on the Hub
{_USE}

Or `deltanet-generate FOLDER "Once upon a time"`.""",
    "remote": f"""The code is in this folder; the `deltanet` package need not be installed.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

# FOLDER is this folder, or its id on the Hub; on the Hub, pin the commit with revision=
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
{_USE.replace("FOLDER)", "FOLDER, trust_remote_code=True)", 1)}""",
    "fla": f"""With flash-linear-attention 0.6.0 and a GPU (and flash-attn, where layers kept attention):

```python
import fla  # registers the architecture with transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER, device_map="cuda")  # this folder, or its id on the Hub
{_USE.replace('return_tensors="pt")', 'return_tensors="pt").to("cuda")')}""",
    "qwen3_5": f"""With transformers alone, from 5.17 on; it is the class of Qwen3.5 without its vision.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(FOLDER)  # this folder, or its id on the Hub
{_USE}""",
}
"""How a folder is loaded, by its format."""
NEEDS = {
    "deltanet": "It needs the `deltanet` package; a reader without it does not know the architecture.",
    "remote": "Its code is fixed at the version that wrote it, and runs without kernels.",
    "fla": "It was written for flash-linear-attention 0.6.0; other versions were not tried.",
    "qwen3_5": "Only transformers' class was compared with the student; other programs that serve it were not tried.",
}


def write_card(folder: Path, config: DeltaNetConfig | None = None, form: str | None = None) -> None:
    """Writes `folder`/README.md. Raises UserError where what the folder holds makes no valid card."""
    (folder / README).write_text(make_card(folder, config, form), encoding="utf-8")


def make_card(folder: Path, config: DeltaNetConfig | None = None, form: str | None = None) -> str:
    """The text. `config` is the student's and `form` the folder's format, where config.json does not say them."""
    from .verify import check_card

    raw = _json(folder / "config.json")
    config = config or DeltaNetConfig.from_dict(raw)
    form = form or ("remote" if raw.get("auto_map") else "deltanet")
    record, report = _json(folder / RECORD), _json(folder / REPORT)
    closeness, tasks = _json(folder / CLOSENESS), _json(folder / EVALUATION).get("tasks") or {}
    recipe = (folder / RECIPE).read_text(encoding="utf-8") if (folder / RECIPE).is_file() else ""
    base, source = record.get("base_model"), record.get("source")
    licence = from_head(record["licence_metadata"]) if record.get("licence_metadata") else None
    name = f"{Path(base or source or config.source_model_type or 'student').name}-deltanet"
    sections = [
        f"# {name}",
        _opening(config, base, source, record.get("revision"), report),
        "## Layers",
        _layers(config),
        "## How it was made",
        _making(record, report, recipe),
        "## Measured",
        _measured(closeness, report, tasks),
        "## How to load it",
        LOAD[form],
        "## Limits",
        _limits(config, bool(report), form, recipe),
        "## Licence",
        _licence(licence),
    ]
    results = _results(recipe, closeness, report, tasks)
    head = _metadata(name, base, licence, record.get("language"), recipe, bool(report), results)
    text = f"---\n{head}\n---\n\n" + "\n\n".join(sections) + "\n"
    check_card(text, str(folder / README))
    return text


def _results(recipe: str, closeness: dict, report: dict, tasks: dict) -> list:
    """What the Hub shows as evaluation results: of the student on held-out text, and of each task."""
    from huggingface_hub import EvalResult

    row, text = {}, "text set aside from the calibration's"
    if report.get("results"):
        row, text = report["results"][-1], f"held-out text: {', '.join(_held_out(recipe))}"
    elif closeness:
        row = {"perplexity": closeness["student_perplexity"], "kl": closeness["kl"]}
    names = {"perplexity": "perplexity", "kl": "KL(teacher || student), nats per token"}
    results = [
        EvalResult("text-generation", "held-out", text, key, round(row[key], 6), metric_name=title)
        for key, title in names.items()
        if key in row
    ]
    return results + [
        EvalResult("text-generation", task, task, "accuracy", round(result["accuracy"], 6), metric_name="accuracy")
        for task, result in tasks.items()
    ]


def _metadata(
    name: str, base: str | None, licence: Licence | None, language, recipe: str, trained: bool, results: list
) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        base_model=base,
        base_model_relation="finetune" if base else None,
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["deltanet", "linear-attention", "hybrid", *(["distillation"] if trained else [])],
        datasets=_datasets(recipe) or None,
        model_name=name if results else None,
        eval_results=results or None,
        **(licence.metadata() if licence else {}),
    )
    return data.to_yaml()


def _opening(config: DeltaNetConfig, base: str | None, source: str | None, revision: str | None, report: dict) -> str:
    linear, total = config.layer_types.count(LINEAR), config.num_hidden_layers
    if report.get("results") and not _teacher(report):
        return (
            f"A model trained from nothing: {linear} of its {total} attention layers run on the delta rule "
            f"(`{config.mixer}`), in linear time and with a state that does not grow."
        )
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"`{source}`" if source else "a transformer"
    pinned = f" at `{revision}`" if revision else ""
    how = "converted and then distilled from it" if report else "converted from it, and not trained since"
    return (
        f"A student of {origin}{pinned}: {linear} of its {total} attention layers run on the delta rule "
        f"(`{config.mixer}`), in linear time and with a state that does not grow. It was {how}."
    )


def _layers(config: DeltaNetConfig) -> str:
    lines = [f"```\n{Layout(tuple(config.layer_types), config.sliding_window).picture()}\n```"]
    if LINEAR in config.layer_types:
        size = config.head_dim
        lines.append(
            f"Layers are counted from 0. A delta-rule layer keeps {config.num_state_heads} states of {size} x {size} "
            "numbers, however long the text is"
            + (
                f" of the tokens before the last {config.local_window}; to those and the first it attends."
                if config.local_window
                else "."
            )
            + (" Learned maps turn queries and keys before they reach a state." if config.feature_map != "none" else "")
            + (
                f" It is read as if all that it holds stood {config.local_window} tokens back."
                if config.state_positions == "fixed"
                else ""
            )
        )
    return "\n\n".join(lines)


def _making(record: dict, report: dict, recipe: str) -> str:
    lines = [f"```\n{command}\n```" for command in (record.get("command"), report.get("command")) if command]
    tensors = record.get("tensors") or {}
    if "kept_identical" in tensors:
        lines.append(
            f"The conversion kept {tensors['kept']} tensors of the source ({tensors['kept_identical']} byte for byte), "
            f"refitted {tensors['refitted']} and made {tensors['new']} new ones."
        )
    if report.get("tokens"):
        lines.append(f"The distillation saw {report['tokens']:,} tokens.")
    if recipe:
        lines.append(f"The recipe with every default filled in (`{RECIPE}`):\n\n```yaml\n{recipe.rstrip()}\n```")
    return "\n\n".join(lines or ["The folder does not say."])


def _measured(closeness: dict, report: dict, tasks: dict) -> str:
    lines = []
    if report.get("results"):
        held = report.get("held_out_tokens")
        lines.append(f"On {held:,} held-out tokens of the recipe's text:" if held else "On held-out text:")
        lines.append(_table(report["results"], _teacher(report)))
    if tasks:
        lines.append("Tasks, share right with its standard error, on the same examples (`evaluation.md` has more):")
        lines.append(_task_table(tasks))
    if closeness:
        teacher = closeness["teacher_perplexity"]
        rows = [{"model": "teacher", "perplexity": teacher}]
        rows.append({"model": "student", "perplexity": closeness["student_perplexity"], "kl": closeness["kl"]})
        rows += [{"model": label, **closeness[key]} for key, label in VARIANTS.items() if key in closeness]
        recalled = closeness["recall"]
        told = "; ".join(
            f"{probe} {recalled[probe]['teacher']:.3f} and {recalled[probe]['student']:.3f}"
            for probe in ("repeat", "needle")
        )
        lines.append(f"Before any training, on {closeness['tokens']:,} tokens set aside from the calibration's text:")
        lines.append(_table(rows, teacher))
        lines.append(
            f"Recall over {recalled['distance']} tokens, share right of teacher and student: {told}. "
            "`closeness.md` has every layer."
        )
    return "\n\n".join(lines or ["Nothing was measured."])


def _teacher(report: dict) -> float | None:
    """The teacher's perplexity, where the run had a teacher."""
    first = report["results"][0]
    return first["perplexity"] if first["model"] == "teacher" else None


def _table(rows: list[dict], teacher: float | None) -> str:
    lines = ["| | perplexity | x teacher | KL, nats/token |", "| --- | ---: | ---: | ---: |"]
    for row in rows:
        kl = f"{row['kl']:.4f}" if "kl" in row else "-"
        ratio = f"{row['perplexity'] / teacher:.4g}" if teacher else "-"
        lines.append(f"| {row['model']} | {row['perplexity']:.4g} | {ratio} | {kl} |")
    return "\n".join(lines)


def _task_table(tasks: dict) -> str:
    lines = ["| task | examples | teacher | student |", "| --- | ---: | ---: | ---: |"]
    for task, result in tasks.items():
        both = [result.get("teacher"), result]
        shown = [f"{one['accuracy']:.3f} ± {one['stderr']:.3f}" if one else "-" for one in both]
        lines.append(f"| {task} | {result['n']} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _limits(config: DeltaNetConfig, trained: bool, form: str, recipe: str) -> str:
    lines = [
        "What is not in the tables above was not measured; nobody has looked at its safety.",
        "The model inherits what its source gets wrong, and its biases.",
        NEEDS[form],
    ]
    if LINEAR in config.layer_types:
        lines.append(
            "A state of fixed size forgets: exact recall over long distances is weaker than with attention everywhere."
        )
        if longest := _longest(recipe):
            lines.append(f"It was trained on sequences of up to {longest:,} tokens; in longer texts it is weaker.")
    if LINEAR in config.layer_types and form in ("deltanet", "remote"):
        lines.append("Assisted generation needs transformers 5.24 or newer, and sequences without padding.")
    if not trained:
        lines.append("It is a start for distillation; no gradient step has been made.")
    return "\n".join(f"- {line}" for line in lines)


def _licence(licence: Licence | None) -> str:
    if licence is None:
        return "The source's licence could not be read. A student inherits it; find it out before you pass this on."
    lines = [f"{licence.title}, inherited from the source." + (f" Text: {licence.link}" if licence.link else "")]
    lines += [f"- {obligation}" for obligation in licence.obligations]
    if licence.notice:
        lines += ["", licence.notice]
    return "\n".join(lines)


def _sources(recipe: str, section: str) -> list[dict]:
    data = yaml.safe_load(recipe) if recipe else {}
    return list(((data or {}).get(section) or {}).get("sources") or ())


def _held_out(recipe: str) -> list[str]:
    """Names of the text a run was measured on: the evaluation's sources, or else the data's."""
    sources = _sources(recipe, "evaluation") or _sources(recipe, "data")
    paths = [source.get("path") or source.get("dataset") or "the teacher's own" for source in sources]
    firsts = [path[0] if isinstance(path, list) else path for path in paths]
    return [source.get("name") or Path(first).name for source, first in zip(sources, firsts)]


def _longest(recipe: str) -> int | None:
    """Tokens of the longest sequences of a run."""
    told = (yaml.safe_load(recipe) if recipe else None) or {}
    usual = (told.get("data") or {}).get("seq_len")
    return max((stage.get("seq_len") or usual or 0 for stage in told.get("stages") or ()), default=usual) or None


def _datasets(recipe: str) -> list[str]:
    return sorted({source["dataset"] for source in _sources(recipe, "data") if source.get("dataset")})


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: unreadable: {error}") from None
