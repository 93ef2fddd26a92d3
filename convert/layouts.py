"""Which layers keep softmax attention: `--hybrid` text in, one transformers layer type per layer out.

Layers are counted from 0 everywhere. A layer that is kept stays what the teacher has there (full or sliding, with the
teacher's window); only `swa` sets a window of its own. Twin: tests/convert/test_layouts.py.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deltanet_errors import UserError, nearest

from .text_files import FILE, kind_of

LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
DEFAULT_WINDOW = 128
FORMS = ("global2", "swa", "swa:WINDOW", "every:N", "none", "all", "layers:I,J,...", "RANKING.json:COUNT")
LETTERS = {LINEAR: "d", FULL: "A", SLIDING: "s"}


@dataclass(frozen=True)
class Layout:
    """`layer_types`, one per layer, and the `window` of its sliding layers (None without any)."""

    layer_types: tuple[str, ...]
    window: int | None

    @property
    def linear(self) -> list[int]:
        return [index for index, kind in enumerate(self.layer_types) if kind == LINEAR]

    def picture(self) -> str:
        return picture(self.layer_types, self.window)


def picture(layer_types: Sequence[str], window: int | None = None) -> str:
    """One letter per layer in tens, and what they mean: d delta rule, A full attention, s sliding attention."""
    letters = "".join(LETTERS[kind] for kind in layer_types)
    tens = " ".join(letters[start : start + 10] for start in range(0, len(letters), 10))
    sliding = "attention in a window" if window is None else f"window {window}"
    used = [
        f"{LETTERS[kind]} = {name} x {list(layer_types).count(kind)}"
        for kind, name in ((LINEAR, "delta rule"), (FULL, "attention"), (SLIDING, sliding))
        if kind in layer_types
    ]
    return f"{tens}   ({', '.join(used)})"


def parse_layout(text: str, teacher_types: list[str], window: int | None = None, option: str = "--hybrid") -> Layout:
    """The layout that `text` (one of FORMS) gives a teacher with these layer types and this window.

    global2 keeps layers 1 and N // 2; every:N keeps the last of each N; swa makes every odd layer sliding.
    Raises UserError, headed by `option`, for an unknown form, a layer the teacher lacks, or a count out of range.
    """
    num_layers = len(teacher_types)
    name, _, value = text.partition(":")
    where = f"{option} {text}"
    if text.rpartition(":")[0].endswith(".json"):
        path, _, count = text.rpartition(":")
        kept = _ranked(Path(path), _number(where, count, 0, num_layers), num_layers, option)
    elif text.endswith(".json"):
        raise UserError(f"{where}: say how many layers keep attention: {text}:COUNT")
    elif text == "global2":
        kept = {index for index in (1, num_layers // 2) if index < num_layers}
    elif text == "none":
        kept = set()
    elif text == "all":
        kept = set(range(num_layers))
    elif name == "every" and value:
        step = _number(where, value, 1, num_layers)
        kept = set(range(step - 1, num_layers, step))
    elif name == "layers" and value:
        kept = {_number(where, index, 0, num_layers - 1) for index in value.split(",")}
    elif text == "swa" or (name == "swa" and value):
        # Of a window of one transformers' cache of a sliding layer keeps everything.
        size = _number(where, value, 2, None) if value else DEFAULT_WINDOW
        size = min(size, window) if window else size
        return Layout(tuple(SLIDING if index % 2 else LINEAR for index in range(num_layers)), size)
    else:
        guess = nearest(text, [form for form in FORMS if form.islower()])
        raise UserError(f"{where}: unknown layout; allowed: {', '.join(FORMS)}{guess}")
    types = tuple(kind if index in kept else LINEAR for index, kind in enumerate(teacher_types))
    return Layout(types, window if SLIDING in types else None)


def _number(where: str, value: str, low: int, high: int | None) -> int:
    if not re.fullmatch(r"\s*\d{1,18}\s*", value) or int(value) < low or (high is not None and int(value) > high):
        allowed = f"from {low} to {high}" if high is not None else f"of {low} or more"
        raise UserError(f"{where}: {value!r} is not a whole number {allowed}")
    return int(value)


def _ranked(path: Path, count: int, num_layers: int, option: str) -> set[int]:
    """The first `count` layers of a ranking: a JSON list, or an object with such a list as `ranking`, where the
    layer that most needs attention comes first. Where the object has `num_layers`, it is that of its teacher."""
    kind = kind_of(path)
    if kind not in (None, FILE):
        raise UserError(f"{option} {path}:{count}: the ranking is {kind}, not a file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{option} {path}: unreadable ranking: {error}") from None
    if isinstance(data, dict):
        if data.get("num_layers", num_layers) != num_layers:
            raise UserError(
                f"{option} {path}:{count}: ranks {data['num_layers']!r} layers, but this teacher has {num_layers}; "
                "make one of this teacher with --rank"
            )
        report = data.get("closeness")
        data = data.get("ranking", report.get("ranking") if isinstance(report, dict) else None)
    whole = isinstance(data, list) and all(type(index) is int and 0 <= index < num_layers for index in data)
    if not whole or len(set(data)) != len(data) or len(data) < count:
        raise UserError(
            f"{option} {path}:{count}: the ranking must be a list of {count} or more different layers "
            f"from 0 to {num_layers - 1}"
        )
    return set(data[:count])
