"""The licence a student inherits: as the Hub's metadata names it, where it is, and what it asks of who passes it on.

A preset names its licence; any other source is asked for the head of its own README.md and for a LICENSE file. What
cannot be read is not guessed. Twin: tests/convert/publish/test_licences.py.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from ..presets import PRESETS, Preset

LONGEST_CARD = 1 << 20
QWEN_LINK = "https://huggingface.co/Qwen/Qwen2.5-3B/blob/main/LICENSE"


@dataclass(frozen=True)
class Licence:
    """`identifier` is the Hub's; `name` and `link` go with the identifier `other`. `notice` is the text that has to
    travel with the model, `prefix` how its name has to begin."""

    identifier: str
    title: str
    name: str | None = None
    link: str | None = None
    obligations: tuple[str, ...] = field(default=())
    notice: str | None = None
    prefix: str | None = None

    def metadata(self) -> dict[str, str]:
        named = {"license": self.identifier, "license_name": self.name, "license_link": self.link}
        return {key: value for key, value in named.items() if value is not None}


def _llama(version: str, called: str, shown: str, prefix: str) -> Licence:
    """`called` in the licence's title, `shown` after "Built with", `prefix` of a derived model's name."""
    notice = f"{called} is licensed under the {called} Community License, Copyright © Meta Platforms, Inc."
    return Licence(
        f"llama{version}",
        f"{called} Community License",
        obligations=(
            "pass on a copy of the agreement with the model",
            f'show "Built with {shown}" where people see it',
            f'begin the name of a model made from it with "{prefix}"',
            "keep the NOTICE file with the model",
            "keep to Meta's acceptable use policy; a licence from Meta is needed above 700 million monthly users",
        ),
        notice=f"{notice} All Rights Reserved.",
        prefix=prefix,
    )


KNOWN = (
    Licence("apache-2.0", "Apache-2.0", obligations=("pass on the licence text and any NOTICE, and say what changed",)),
    Licence("mit", "MIT", obligations=("pass on the copyright notice and the licence text",)),
    Licence(
        "llama2",
        "Llama 2 Community License",
        obligations=(
            "pass on a copy of the agreement with the model",
            "keep the NOTICE file with the model",
            "keep to Meta's acceptable use policy; a licence from Meta is needed above 700 million monthly users",
            "use neither it nor what it writes to improve large language models other than Llama 2",
        ),
        notice="Llama 2 is licensed under the LLAMA 2 Community License, Copyright (c) Meta Platforms, Inc. "
        "All Rights Reserved.",
    ),
    _llama("3", "Meta Llama 3", "Meta Llama 3", "Llama 3"),
    *(_llama(version, f"Llama {version}", "Llama", "Llama") for version in ("3.1", "3.2", "3.3")),
    Licence(
        "other",
        "Qwen Research License",
        "qwen-research",
        QWEN_LINK,
        obligations=("use it for research and evaluation only, not commercially", 'show "Built with Qwen"'),
    ),
)
IDENTIFIER = re.compile(r"[a-z0-9][a-z0-9.+-]*")
"""As the Hub writes them; it takes no card with another."""
# First lines by which a LICENSE file is recognised.
HEADS = (
    (re.compile(r"Apache License\s+Version 2\.0"), "apache-2.0"),
    (re.compile(r"MIT License"), "mit"),
    (re.compile(r"LLAMA 2 COMMUNITY LICENSE", re.IGNORECASE), "llama2"),
    (re.compile(r"LLAMA 3\.1 COMMUNITY LICENSE", re.IGNORECASE), "llama3.1"),
    (re.compile(r"LLAMA 3\.2 COMMUNITY LICENSE", re.IGNORECASE), "llama3.2"),
    (re.compile(r"LLAMA 3\.3 COMMUNITY LICENSE", re.IGNORECASE), "llama3.3"),
    (re.compile(r"META LLAMA 3 COMMUNITY LICENSE", re.IGNORECASE), "llama3"),
)


def licence_of(folder: Path, name: str, stated: str | None) -> Licence | None:
    """The licence of the source in `folder`, or None where nothing tells it.

    `stated` is a preset's title; `name` the repository, looked up among the presets too.
    """
    if stated is None:
        preset = next((preset for preset in PRESETS.values() if preset.repository == name), None)
        stated = preset.licence if isinstance(preset, Preset) else None
    if stated is not None:
        return by_title(stated)
    head = card_head(folder)
    if isinstance(head.get("license"), str):
        return from_head(head)
    for path in sorted(filter(Path.is_file, [*folder.glob("LICEN[CS]E*"), *folder.glob("COPYING*")])):
        with open(path, "rb") as file:
            start = file.read(4096).decode("utf-8", errors="replace")
        for pattern, identifier in HEADS:
            if pattern.search(start):
                return next(licence for licence in KNOWN if licence.identifier == identifier)
    return None


def by_title(title: str) -> Licence:
    """The known licence of that title or identifier, or one of which only the name is known."""
    for licence in KNOWN:
        if title.lower() in (licence.title.lower(), licence.identifier) and licence.identifier != "other":
            return licence
        if title in (licence.title, licence.name):
            return licence
    return Licence("other", title, re.sub(r"[^a-z0-9.]+", "-", title.lower()).strip("-"))


def from_head(head: dict) -> Licence:
    """The licence that a card's metadata (`Licence.metadata`) names."""
    identifier = head["license"].lower()
    if not IDENTIFIER.fullmatch(identifier):
        return by_title(head["license"])
    if identifier != "other":
        known = next((licence for licence in KNOWN if licence.identifier == identifier), None)
        return known or Licence(identifier, identifier)
    name, link = head.get("license_name"), head.get("license_link")
    known = next((licence for licence in KNOWN if licence.name and licence.name == name), None)
    link = link if isinstance(link, str) else None
    return known or Licence("other", str(name or "other"), str(name) if name else None, link)


def card_head(folder: Path) -> dict:
    """The YAML head of a folder's README.md, as data only; {} where there is none that can be read."""
    path = folder / "README.md"
    if not path.is_file() or path.stat().st_size > LONGEST_CARD:
        return {}
    match = re.match(r"\s*---\r?\n(.*?)\r?\n---", path.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        head = yaml.safe_load(match[1]) if match else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return head if isinstance(head, dict) else {}
