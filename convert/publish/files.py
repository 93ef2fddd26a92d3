"""Which files of a student's folder are sent to the Hub: those of this list and no other."""

import json
from fnmatch import fnmatchcase
from pathlib import Path

from ..checkpoint import INDEX, SINGLE
from ..sources import COMPANIONS
from .manifest import MANIFEST

README, RECIPE, RECORD = "README.md", "deltanet_recipe.yaml", "conversion.json"
SHARDS = "model-*-of-*.safetensors"
WEIGHTS = (SINGLE, SHARDS, INDEX)
CLOSENESS, REPORT, EVALUATION = "closeness.json", "report.json", "evaluation.json"
REPORTS = (CLOSENESS, "closeness.md", "ranking.json", REPORT, EVALUATION, "evaluation.md")
PUBLISHED = ("config.json", README, MANIFEST, RECIPE, RECORD, *WEIGHTS, *REPORTS, *COMPANIONS)
CODE = "*.py"
"""Sent only where config.json names code for readers without this package (`auto_map`)."""


def is_published(name: str, folder: Path) -> bool:
    """Whether `name` (with /) of the checkpoint `folder` is on the list."""
    if fnmatchcase(name, CODE) and "/" not in name:
        return bool(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map"))
    return any(matches(name, pattern) for pattern in PUBLISHED)


def matches(name: str, pattern: str) -> bool:
    """As a glob: * stays within a part of the name."""
    parts, patterns = name.split("/"), pattern.split("/")
    return len(parts) == len(patterns) and all(map(fnmatchcase, parts, patterns))
