"""docs/recipe.md: every key of a recipe in a table, made from the schema, so that it cannot lag behind.

    python -m distill.recipe_reference > docs/recipe.md

Twin: tests/distill/test_recipe_reference.py.
"""

import json

from .recipe import json_schema
from .schema import DEFAULTS_OF, LOSSES_OF

HEAD = """# The keys of a recipe

Made from the schema by `python -m distill.recipe_reference`. A recipe is a YAML file of `version: 1` and these
sections; `deltanet-distill RECIPE --print-config` shows one with every default filled in, and `section.key=VALUE`
behind it changes a key. What the stages do: [distil.md](distil.md).

- Paths are relative to the folder where the command runs; `{recipes}` in one is the folder of the shipped recipes.
- `weight` of a source is its share of the sequences, in proportion to the others': all sources have one, or none does.
- Without `separator` a text file is one document; of .jsonl, .json and .parquet every row is one.
- `losses` is a list such as `[{name: forward_kl}, {name: hidden_cosine, weight: 5}]`.
"""
SECTIONS = {  # the section of a recipe -> the definition of what stands in it
    "teacher": "Teacher",
    "teacher.cache": "Cache",
    "student": "Student",
    "student.convert": "Convert",
    "student.new": "New",
    "data": "Data",
    "data.sources[], evaluation.sources[]": "Source",
    "stages[]": "Stage",
    "stages[].losses[]": "Loss",
    "stages[].lora": "Lora",
    "training": "Training",
    "deepspeed": "DeepSpeed",
    "logging": "Logging",
    "evaluation": "Evaluation",
    "export": "Export",
}


def reference() -> str:
    definitions = json_schema()["$defs"]
    parts = [HEAD]
    for section, name in SECTIONS.items():
        lines = [f"## {section}", "", "| key | default | |", "|---|---|---|"]
        required = definitions[name].get("required", [])
        for key, value in definitions[name]["properties"].items():
            default = "required" if key in required else f"`{json.dumps(value.get('default'))}`"
            lines.append(f"| `{key}` | {default.replace('`null`', 'none')} | {_meaning(value)} |")
        parts.append("\n".join(lines) + "\n")
    parts.append(_stages())
    return "\n".join(parts)


def _stages() -> str:
    lines = ["## What a kind of stage has of its own", "", "| kind | defaults | losses |", "|---|---|---|"]
    for kind, losses in LOSSES_OF.items():
        defaults = ", ".join(f"`{key}: {json.dumps(value)}`" for key, value in DEFAULTS_OF[kind].items())
        lines.append(f"| `{kind}` | {defaults} | {', '.join(f'`{loss}`' for loss in losses)} |")
    return "\n".join(lines) + "\n"


def _meaning(value: dict) -> str:
    """What the schema says of a key: its description, then what is allowed."""
    said = [value.get("description", ""), *_forms(value)]
    return "; ".join(filter(None, said)).replace("|", "\\|")


def _forms(value: dict) -> list[str]:
    """The values that are allowed, where they are few or within bounds."""
    if "anyOf" in value:
        return [form for one in value["anyOf"] for form in _forms(one)]
    if "enum" in value:
        return [", ".join(f"`{one}`" for one in value["enum"])]
    if "$ref" in value.get("items", {}) or "$ref" in value:
        return []
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    return [" and ".join(f"{sign} {value[key]:g}" for key, sign in bounds.items() if key in value)]


if __name__ == "__main__":
    print(reference(), end="")
