"""What a run writes down before its first step: the resolved recipe, where and with what it runs, what it reads.

Twin: tests/distill/test_run.py.
"""

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from convert.publish.files import CLOSENESS, EVALUATION, RECORD, REPORT
from convert.publish.manifest import MANIFEST
from deltanet_errors import UserError, one_line

from .prepare import Prepared, StagePlan
from .recipe import show
from .redact import mask
from .resume import RECIPE
from .schema import Recipe
from .token_cache import file_digest
from .world import World

INPUTS = "inputs.json"
TOLD = (MANIFEST, RECORD, CLOSENESS, REPORT, EVALUATION, "ranking.json")
"""Files of a checkpoint that tell how it was made and what was measured, such as in how many seconds."""
PACKAGES = ("deltanet", "torch", "triton", "transformers", "deepspeed", "peft", "safetensors", "datasets", "numpy")


def write_records(
    folder: Path,
    recipe: Recipe,
    teacher: Path | None,
    student: Path,
    prepared: Prepared,
    plans: list[StagePlan],
    world: World,
    came_from: Path | None = None,
) -> None:
    """Writes recipe.yaml, environment.json and inputs.json. Raises UserError where the inputs of a run that goes on,
    here or from a commit of the run in `came_from`, are no longer those it was started with."""
    inputs = {
        "teacher": {} if teacher is None else checkpoint_digests(teacher),
        "student": checkpoint_digests(student),
        "sources": {name: part.tokens.digest for name, part in prepared.train.items()},
        "stages": {plan.stage.name: plan.corpus.digest for plan in plans},
    }
    path = folder / INPUTS
    for run in {folder.absolute(), (came_from or folder).absolute()}:
        if (run / RECIPE).is_file():
            _refuse_others(inputs, run)
    data = {plan.stage.name: [asdict(report) for report in plan.reports] for plan in plans}
    write_whole(path, json.dumps(inputs | {"data": data}, indent=2))
    write_whole(folder / "environment.json", json.dumps(_environment(world), indent=2))
    write_whole(folder / RECIPE, show(recipe))


def _refuse_others(inputs: dict[str, dict], run: Path) -> None:
    """Raises UserError for the first input that is not what `run` was started with."""
    before = _read_inputs(run / INPUTS, inputs)
    for kind, digests in inputs.items():
        for name in sorted((digests.keys() | before[kind].keys()) - set(TOLD)):
            if digests.get(name) != before[kind].get(name):
                raise UserError(f"{run}: {kind} {name} is not what the run was started with; restore it")


def _read_inputs(path: Path, kinds: Iterable[str]) -> dict[str, dict]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {kind: dict(stored[kind]) for kind in kinds}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: cannot be read ({one_line(error)}), and it says what the run was started with; restore it, or "
            "give a new run an --output of its own"
        ) from None


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is there whole or not at all; a line break ends it."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def checkpoint_digests(folder: Path) -> dict[str, str]:
    """sha256 of every file that decides what a checkpoint folder is."""
    names = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".json", ".model"))
    return {path.name: file_digest(path) for path in names if path.name not in TOLD}


def _environment(world: World) -> dict:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "command": [mask(argument) for argument in sys.argv],
        "python": platform.python_version(),
        "versions": versions,
        "source": _source(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processes": world.size,
    }


def _source() -> str | None:
    """The commit of the source tree this runs from, `+changes` if it differs; None where it is no git tree."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+changes"], cwd=here, capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None
