"""Where a student comes from, as conversion.json keeps it: base model, licence, language, and the command.

Folders of this machine are named by their last part alone, since the file is published with the model.
Twin: tests/convert/publish/test_provenance.py.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path

from ..sources import HUB_ID, Source
from .licences import card_head, licence_of

NOT_SHOWN = ("source", "output", "dry_run", "overwrite", "revision")


def provenance(opened: Source, given: Mapping[str, object], defaults: Mapping[str, object]) -> dict:
    """base_model (a Hub id or None), licence (title or None), licence_metadata, language and command.

    `given` are the arguments of a conversion, `defaults` their default values; the command shows what differs.
    """
    base = opened.name if opened.origin == "hub" else _cached_id(opened.folder)
    licence = licence_of(opened.folder, base or opened.name, opened.licence)
    return {
        "base_model": base,
        "licence": licence.title if licence else None,
        "licence_metadata": licence.metadata() if licence else None,
        "language": _language(card_head(opened.folder)),
        "command": command_line(public_name(opened), opened.revision, given, defaults),
    }


def public_name(opened: Source) -> str:
    """What the source may be called in public: its id, or the last part of a path."""
    return opened.name if opened.origin in ("hub", "embedded") else Path(opened.name).expanduser().resolve().name


def command_line(name: str, revision: str | None, given: Mapping[str, object], defaults: Mapping[str, object]) -> str:
    words = ["deltanet-convert", name]
    if revision is not None:
        words += ["--revision", revision]
    for key, default in defaults.items():
        value = given[key]
        if key in NOT_SHOWN or list_of(value) == list_of(default):
            continue
        words.append("--" + key.replace("_", "-"))
        words += [] if value is True else [_shown(item) for item in list_of(value)]
    return shlex.join([*words, "-o", "OUT"])


def list_of(value: object) -> list:
    """A list or tuple as a list, anything else as the only item of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def _shown(value: object) -> str:
    """Paths by their last part; a layout such as swa:128 or ranking.json:8 has none."""
    text = str(value)
    return Path(text).name if "/" in text else text


def _language(head: dict) -> str | list[str] | None:
    # YAML 1.1 reads the code of Norwegian as false.
    items = ["no" if item is False else item for item in list_of(head.get("language"))]
    languages = [item for item in items if isinstance(item, str) and len(item) <= 16]
    return (languages if len(languages) > 1 else languages[0]) if languages else None


def _cached_id(folder: Path) -> str | None:
    """The Hub id of a folder within the Hub's cache."""
    home = folder.resolve()
    kind, _, name = home.parent.parent.name.partition("--")
    found = name.replace("--", "/", 1)
    is_cached = home.parent.name == "snapshots" and kind == "models"
    return found if is_cached and HUB_ID.fullmatch(found) else None
