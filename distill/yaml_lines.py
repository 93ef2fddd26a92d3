"""Reading YAML strictly, with the line of every key, and writing it so that reading gives the same values.

Scalars follow YAML 1.2: `1e-5` is a number, `017` is seventeen, `on`, `yes`, `12:30` and `1_000` are text. Refused,
each with its line: a key twice, `.nan` and `.inf`, whole numbers of more than 64 bits, tags, keys that are not text,
and what is nested deeper than DEEPEST. Twin: tests/distill/test_yaml_lines.py.
"""

import math
import re
from typing import Any

import yaml

from deltanet_errors import UserError

KeyPath = tuple[str | int, ...]
LARGEST = 100_000  # values in one document, aliases expanded
DEEPEST = 100  # keys above one another
SHOWN = 40  # characters of a value in a message

_RULES = [  # (tag, pattern, first characters), tried in this order
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", list("-+.")),
]


_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML version would take for something other than text."""

    def ignore_aliases(self, data):
        return True

    def represent_text(self, text):
        # plain and single-quoted styles would fold these line breaks into spaces
        return self.represent_scalar("tag:yaml.org,2002:str", text, '"' if _BREAKS.search(text) else None)


_Dumper.add_representer(str, _Dumper.represent_text)


for _tag, _pattern, _first in _RULES:
    _compiled = re.compile(rf"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _compiled, _first)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _compiled, _first)


def read_yaml(text: str, origin: str, at: KeyPath = ()) -> tuple[Any, dict[KeyPath, int]]:
    """The value of a document and the line (from 1) of every key path in it; `origin` heads the error messages.

    at: the key whose value this is, where `origin` is not a file and has no lines; paths begin with it. Raises
    UserError `origin:line: ...`, or with `at` `origin key.path: ...`, for anything this file's head refuses and for
    broken YAML.
    """
    place = _Place(origin, at)
    try:
        if len(at) > DEEPEST:
            raise RecursionError
        node = _Loader(text).get_single_node()
        return (None if node is None else _value(node, at, place, ())), place.lines
    except RecursionError:
        where = f"{origin} {_short(dotted(at))}".rstrip()
        raise UserError(f"{where}: nested too deep; allowed are {DEEPEST} keys above one another") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = place.of(mark.line + 1 if mark else None)
        raise UserError(f"{where}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{place.of()}: not YAML: {str(error).splitlines()[0]}") from None


class _Place:
    """Where a document comes from, and the line of every key in it."""

    def __init__(self, origin: str, at: KeyPath):
        self.origin, self.at, self.lines = origin, at, {}

    def of(self, line: int | None = None, path: KeyPath = ()) -> str:
        """`file:line key.path`, or of an override `command line key.path`."""
        where = self.origin if self.at or line is None else f"{self.origin}:{line}"
        return f"{where} {dotted(path or self.at)}".rstrip()


def _value(node: yaml.Node, path: KeyPath, place: _Place, above: tuple) -> Any:
    line = node.start_mark.line + 1
    place.lines.setdefault(path, line)
    if node in above or len(place.lines) > LARGEST:
        raise UserError(f"{place.of(line)}: aliases that make the document endless, or over {LARGEST} values")
    if len(path) > DEEPEST:
        raise RecursionError
    tag = node.tag.removeprefix("tag:yaml.org,2002:")
    if isinstance(node, yaml.SequenceNode) and tag == "seq":
        return [_value(item, (*path, i), place, (*above, node)) for i, item in enumerate(node.value)]
    if isinstance(node, yaml.MappingNode) and tag == "map":
        result = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                shown = key if isinstance(key, str) else "a list or mapping"
                raise UserError(f"{place.of(key_line)}: the key {shown!r} is not text; quote it")
            inner = (*path, key)
            if key in result:
                first = "" if place.at else f", first in line {place.lines[inner]}"
                raise UserError(f"{place.of(key_line, inner)}: the key is there twice{first}")
            place.lines[inner] = key_line
            result[key] = _value(value_node, inner, place, (*above, node))
        return result
    if isinstance(node, yaml.ScalarNode) and tag in ("str", "null", "bool", "int", "float"):
        return _scalar(tag, node.value, place.of(line, path))
    raise UserError(f"{place.of(line)}: the tag {node.tag!r} is not allowed; plain values only")


def _scalar(tag: str, text: str, where: str) -> Any:
    try:
        if tag == "str":
            return text
        if tag == "null":
            return None
        if tag == "bool":
            return {"true": True, "false": False}[text.lower()]
        if tag == "int":
            number = int(text, 0) if text[:2] in ("0o", "0x") else int(text)
            if -(1 << 63) <= number < 1 << 63:
                return number
            raise ValueError
        number = float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
    except (ValueError, KeyError):
        kind = "whole number of 64 bits" if tag == "int" else f"value of the tag {tag}"
        raise UserError(f"{where}: {_short(text)!r} is not a {kind}") from None
    if not math.isfinite(number):
        raise UserError(f"{where}: {_short(text)} is not a finite number")
    return number


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def write_yaml(value: Any) -> str:
    """Block YAML of plain values; `read_yaml` gives them back exactly."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def dotted(path: KeyPath) -> str:
    """`("stages", 0, "lr")` as `stages.0.lr`."""
    return ".".join(map(str, path))
