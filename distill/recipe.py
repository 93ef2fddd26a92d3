"""A recipe from its YAML file and the command line's `key.path=value`, checked whole before anything runs.

Every mistake is one line: file and line (or "command line"), key path, the value, what is allowed, the nearest
spelling. Paths in a recipe are relative to the working directory; `{recipes}` stands for the folder of the shipped
recipes. The keys are in `schema.py`, the rules that join several in `recipe_rules.py`.
Twin: tests/distill/test_recipe.py.
"""

import contextlib
import copy
import json
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from convert.text_files import kind_of
from deltanet_errors import UserError, nearest

from .recipe_rules import MISSING, broken_rules
from .redact import looks_secret, mask, names_a_secret
from .schema import DEFAULTS_OF, USUAL_NAME, Recipe, has_key
from .yaml_lines import KeyPath, dotted, read_yaml, write_yaml

COMMAND_LINE = "command line"
FOLDER = "{recipes}"
# What a run may change when it is resumed; every other key decides what is computed.
FREE_KEYS = ("logging", "export", "evaluation", "training.commit_every_steps", "training.commit_every_seconds",
             "training.keep_commits", "training.max_skipped_steps", "teacher.cache.folder")  # fmt: skip


@dataclass
class _Raw:
    """Plain values with, for every key path, where it was written."""

    value: Any
    origin: str
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """`file:line key.path` of the key, or of the nearest one around it that was written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return f"{self.places[path[:end]]} {dotted(path)}".rstrip()
        return f"{self.origin} {dotted(path)}".rstrip()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The resolved recipe: every default filled in, every rule checked.

    `overrides` are `key.path=value`, the value read as YAML; a stage or source is named by its place (`stages.0.lr`) or
    its name (`stages.align.lr`). Raises UserError for the first mistake, and says how many more there are.
    """
    file = _find(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text: {getattr(error, 'strerror', None) or error}") from None
    return parse_recipe(text, str(path), overrides)


def parse_recipe(text: str, origin: str, overrides: Sequence[str] = ()) -> Recipe:
    """As `load_recipe`, from the text of a file called `origin`."""
    raw = _read(text, origin, overrides)
    recipe, complaints = _check(raw)
    if complaints:
        culprits = {complaint: _culprit(complaint, raw, text, overrides) for complaint in complaints}
        raise _first(raw, complaints, culprits)
    return recipe


def _read(text: str, origin: str, overrides: Sequence[str]) -> _Raw:
    value, lines = read_yaml(text, origin)
    if not isinstance(value, dict):
        raise UserError(
            f"{origin}: got {_name(value)}; a recipe is a mapping with the keys {', '.join(Recipe.model_fields)}"
        )
    raw = _Raw(value, origin, {key: f"{origin}:{line}" for key, line in lines.items()})
    for override in overrides:
        _override(raw, override)
    _refuse_secrets(raw, raw.value, ())
    raw.value = _resolve(raw.value)
    return raw


def _check(raw: _Raw) -> tuple[Recipe | None, list[tuple[KeyPath, str]]]:
    """The recipe, or where it is wrong and how."""
    try:
        recipe = Recipe.model_validate(raw.value)
    except ValidationError as error:
        return None, [(_path(e["loc"], raw.value), _explain(e)) for e in error.errors()]
    return recipe, list(broken_rules(recipe))


def _culprit(complaint: tuple[KeyPath, str], raw: _Raw, text: str, overrides: Sequence[str]) -> str | None:
    """The override without which nothing is wrong at a key that the file wrote. A rule may join several keys, and only
    one of them is where it is told."""
    if raw.place(complaint[0]).startswith(COMMAND_LINE):
        return None
    for index, override in reversed(list(enumerate(overrides))):
        with contextlib.suppress(UserError):
            _, others = _check(_read(text, raw.origin, [*overrides[:index], *overrides[index + 1 :]]))
            if complaint[0] not in [path for path, _ in others]:
                return override.partition("=")[0]
    return None


def show(recipe: Recipe) -> str:
    """The resolved recipe as YAML, secrets masked and `{recipes}` put back, since it is published; loading it gives the
    same recipe."""
    shown = recipe.model_dump(mode="json")
    shown["stages"] = [{k: v for k, v in stage.items() if has_key(stage["kind"], k)} for stage in shown["stages"]]
    return write_yaml(mask(_replaced(shown, str(recipes_folder()), FOLDER)))


def changes(old: Recipe, new: Recipe) -> list[str]:
    """`key: old -> new` for every key that a resumed run may not change (see FREE_KEYS)."""
    before, after = _flat(old, FREE_KEYS), _flat(new, FREE_KEYS)
    if old.data.held_out:  # which is trained on where evaluation has sources of its own
        for recipe, values in ((old, before), (new, after)):
            values["evaluation.sources"] = "there" if recipe.evaluation.sources else "absent"
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [mask(f"{key}: {before.get(key, 'absent')!r} -> {after.get(key, 'absent')!r}") for key in keys]


def json_schema() -> dict:
    """The JSON schema editors use (`recipes/recipe.schema.json` is this)."""
    return Recipe.model_json_schema()


def _find(path: str | Path) -> Path:
    """The file itself, or else the shipped recipe of that name."""
    file = Path(path)
    if file.is_file():
        return file
    shipped = recipes_folder()
    names = sorted(found.name for found in shipped.glob("*.yaml"))
    if f"{path}.yaml" in names:
        return shipped / f"{path}.yaml"
    if str(path) in names or (file.parent.name == "recipes" and file.name in names and not file.is_absolute()):
        return shipped / file.name
    kind = kind_of(file)
    what = "no such file" if kind is None else f"is {kind}, not a file"
    raise UserError(f"{path}: {what}; shipped recipes: {', '.join(names)}{nearest(file.name, names)}")


def recipes_folder() -> Path:
    """Where the shipped recipes lie."""
    import recipes

    return Path(next(iter(recipes.__path__)))


def _override(raw: _Raw, text: str) -> None:
    key, equals, written = text.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{COMMAND_LINE}: {mask(text)!r} is not key.path=value, such as training.seed=1")
    place, parts = f"{COMMAND_LINE} {key}", key.split(".")
    if written.startswith(f"{FOLDER}/"):  # which is a mapping to YAML
        written = json.dumps(written, ensure_ascii=False)
    value, _ = read_yaml(written, COMMAND_LINE, tuple(parts))
    path, node = [], raw.value
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, list):
            places, names = [str(index) for index in range(len(node))], _called(node, tuple(path))
            if part not in places + names:
                known = [name for name in names if name is not None]
                raise UserError(f"{place}: {part!r} is none of {', '.join(places + known)}{nearest(part, known)}")
            step = (places if part in places else names).index(part)
        elif isinstance(node, dict):
            step = part
            if not last and node.get(step) is None:
                node[step] = copy.deepcopy(_defaults_of(node).get(step, {}))
        else:
            raise UserError(f"{place}: {'.'.join(parts[:depth])} is a plain value, it has no {part!r}")
        path.append(step)
        if last:
            node[step] = value
        else:
            node = node[step]
    for old in [old for old in raw.places if old[: len(path)] == tuple(path)]:
        del raw.places[old]
    raw.places[tuple(path)] = COMMAND_LINE


def _refuse_secrets(raw: _Raw, value: Any, path: KeyPath) -> None:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(key, str) and looks_secret(key):
                raise UserError(f"{raw.place(path)}: a key holds an access token or a password")
            if isinstance(key, str) and names_a_secret(key):
                raise UserError(
                    f"{raw.place((*path, key))}: a recipe holds no secrets, since it is copied into the run and the "
                    "export; set the service's environment variable (HF_TOKEN) or log in instead"
                )
            _refuse_secrets(raw, item, (*path, key))
    elif isinstance(value, str) and looks_secret(value):
        raise UserError(
            f"{raw.place(path)}: {mask(value)!r} holds an access token or a password, which a recipe never does"
        )


def _resolve(value: dict) -> dict:
    """A copy with the defaults that depend on other keys filled in, and `{recipes}` replaced."""
    value = _replaced(copy.deepcopy(value), FOLDER, str(recipes_folder()))
    stages = value.get("stages")
    for stage in stages if isinstance(stages, list) else []:
        if not isinstance(stage, dict):
            continue
        for key, default in _defaults_of(stage).items():
            stage.setdefault(key, copy.deepcopy(default))
        for loss in stage["losses"] if isinstance(stage.get("losses"), list) else []:
            if isinstance(loss, dict) and loss.get("name") == "dpo":
                loss.setdefault("beta", DEFAULTS_OF["dpo"]["losses"][0]["beta"])
    _fill_names(stages, ("stages",))
    for section in ("data", "evaluation"):
        sources = value[section].get("sources") if isinstance(value.get(section), dict) else None
        for source in sources if isinstance(sources, list) else []:
            if isinstance(source, dict) and source.get("task") is not None:
                source.setdefault("kind", "task")
        _fill_names(sources, (section, "sources"))
    return value


def _defaults_of(stage: dict) -> dict:
    """What a stage of this kind has where it says nothing."""
    kind = stage.get("kind")
    return DEFAULTS_OF.get(kind, {}) if isinstance(kind, str) else {}


def _fill_names(items: Any, path: KeyPath) -> None:
    for item, name in zip(items, _called(items, path)) if isinstance(items, list) else ():
        if name is not None:
            item["name"] = name


def _called(items: list, path: KeyPath) -> list[str | None]:
    """What the stages, sources or losses in the list at `path` are called: what they say, or else by kind or place."""
    names, kinds = [], []
    for item in items:
        item = item if isinstance(item, dict) else {}
        name, kind = item.get("name"), item.get("kind")
        kinds.append(kind)
        if name is None and path == ("stages",) and isinstance(kind, str):
            name = kind if kinds.count(kind) == 1 else f"{kind}{kinds.count(kind)}"
        elif name is None and path[-1] == "sources":
            name = _usual_name(item, USUAL_NAME if path[0] == "data" else "evaluation")
        names.append(name if isinstance(name, str) else None)
    return names


def _usual_name(source: dict, of_written: str) -> str | None:
    """A source's name by file or data set; `of_written` is that of what the teacher writes."""
    place = source.get("path") or source.get("dataset") or source.get("task")
    place = place[0] if isinstance(place, list) and place else place
    if isinstance(place, str):
        return Path(place).name.split(".")[0]
    return of_written if source.get("from_teacher") is not None else None


def _replaced(value: Any, old: str, new: str) -> Any:
    """A copy in which every string has `new` for `old`."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, dict):
        return {key: _replaced(item, old, new) for key, item in value.items()}
    return [_replaced(item, old, new) for item in value] if isinstance(value, list) else value


def _path(loc: tuple, value: Any) -> KeyPath:
    """pydantic's location without what is no key of the recipe (the `[key]` it adds for a mapping's key)."""
    return tuple(part for part in loc if part != "[key]")


def _first(raw: _Raw, complaints: list[tuple[KeyPath, str]], culprits: dict) -> UserError:
    places = []
    for complaint in dict.fromkeys(complaints):
        path, message = complaint
        culprit = culprits[complaint]
        where = raw.place(path) if culprit is None else f"{COMMAND_LINE} {culprit}: {dotted(path)}".removesuffix(": ")
        places.append((where, message))
    order = {place: rank for rank, place in enumerate(raw.places.values())}
    # a key is often missing because another one is misspelt, so that one is told first
    places.sort(key=lambda item: (item[1] == MISSING, order.get(item[0].rpartition(" ")[0], len(order))))
    more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
    return UserError(mask(f"{places[0][0]}: {places[0][1]}{more}"))


_EXPECTED = {
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "at least one entry",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}
_LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _explain(error: dict) -> str:
    kind, got, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key, allowed = str(error["loc"][-1]), _keys_at(error["loc"][:-1])
        return f"unknown key{nearest(key, allowed)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return MISSING
    if kind == "literal_error" and error["loc"][0] == "stages" and got == "calibrate":
        return "calibration is no stage: `student.convert` does it (`calibrate:`), and convert_step for its own layers"
    if kind == "literal_error":
        allowed = context["expected"].replace(" or ", ", ").replace("'", "")
        return f"got {_name(got)}, allowed: {allowed}{nearest(str(got), allowed.split(', '))}"
    if kind == "value_error":
        return str(context["error"])
    if kind in _EXPECTED:
        return f"got {_name(got)}, expected {_EXPECTED[kind]}"
    for limit, word in _LIMITS.items():
        if limit in context and kind.startswith(("greater", "less")):
            return f"got {_name(got)}, expected a number {word} {context[limit]:g}"
    return f"got {_name(got)}: {error['msg']}"


def _name(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list | tuple):
        what = "mapping" if isinstance(value, dict) else "list"
        return f"a {what}" if value else f"an empty {what}"
    shown = repr(mask(value)) if isinstance(value, str) else str(value).lower()
    return f"{shown} (text)" if isinstance(value, str) else shown


def _keys_at(loc: tuple) -> list[str]:
    """The keys of the section that pydantic's location leads to."""
    model = Recipe
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel] | None:
    """The model inside `Model | None`, `tuple[Model, ...]` and the like."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, typing.get_args(annotation))), None)


def _flat(recipe: Recipe, without: tuple[str, ...]) -> dict[str, Any]:
    def walk(value: Any, path: str):
        if path in without:
            return
        if isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, f"{path}.{key}" if path else key)
        elif isinstance(value, list) and value:
            for index, item in enumerate(value):
                yield from walk(item, f"{path}.{index}")
        else:
            yield path, value

    return dict(walk(recipe.model_dump(mode="json"), ""))


if __name__ == "__main__":
    print(json.dumps(json_schema(), indent=1))
