"""The finished student as a checkpoint folder: its own dtype, sharded safetensors, the tokenizer, the recipe, what was
measured, a card, and a manifest of it all.

It appears whole or not at all, and is loaded once, strictly, before it counts. Twin: tests/distill/test_export.py.
"""

import json
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from convert.formats import check_format, write_format
from convert.publish.card import write_card
from convert.publish.files import CLOSENESS, RECIPE, RECORD, REPORT
from convert.publish.manifest import seal
from convert.publish.push import check_repository, require_token
from convert.sources import COMPANIONS
from convert.staging import Staging
from deltanet import DeltaNetConfig, load_student
from deltanet_errors import UserError

from .convert_step import config_after
from .schema import Stage

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OWN = "deltanet"
"""The format of the export itself."""
INHERITED = (RECORD, CLOSENESS, "closeness.md", "ranking.json")
"""What a conversion wrote about itself."""


def export(
    student: Path,
    companions: Path,
    out: Path,
    *,
    dtype: str = "auto",
    max_shard_size: int | str = "5GB",
    recipe: str,
    report: dict | None = None,
) -> int:
    """Writes the weights in folder `student` to `out`, with the tokenizer, licence files and records of the folder
    `companions`, and `report` as report.json; returns the number of parameters. `dtype` auto is that of `companions`'
    configuration.

    An export that stands at `out` already is replaced in one instant. Raises UserError for a full disk.
    """
    wanted = DTYPES.get(dtype) or _own_dtype(companions)
    model = load_student(student, dtype=wanted)
    model.config.dtype = wanted
    try:
        with Staging(out, overwrite=True) as staging:
            folder = staging.folder
            model.save_pretrained(folder, max_shard_size=max_shard_size)
            for pattern in (*COMPANIONS, *INHERITED):
                for path in sorted(companions.glob(pattern)):
                    target = folder / path.relative_to(companions)
                    if path.is_file():
                        target.parent.mkdir(exist_ok=True)
                        shutil.copyfile(path, target)
            (folder / RECIPE).write_text(recipe, encoding="utf-8")
            if report is not None:
                told = {key: value for key, value in report.items() if key != "export"}
                told["command"] = f"deltanet-distill {RECIPE}"
                (folder / REPORT).write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
            load_student(folder)
            write_card(folder)
            seal(folder)
            staging.commit()
    except OSError as error:
        raise UserError(f"{out}: the export cannot be written: {error.strerror or error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def add_reports(out: Path, reports: Iterable[Path]) -> None:
    """Copies reports made of a finished export into it; its card and its manifest follow."""
    for path in reports:
        shutil.copyfile(path, out / path.name)
    write_card(out)
    seal(out)


def check_formats(formats: Sequence[str], config: DeltaNetConfig, stages: Sequence[Stage]) -> None:
    """Raises UserError, before anything is trained, where the student that leaves the stages cannot be written in one
    of `export.formats`."""
    for stage in stages:
        config = config_after(stage, config)
    for name in formats:
        if name != OWN:
            check_format(name, config, "export.formats:")


def write_formats(out: Path, formats: Sequence[str], max_shard_size: int) -> list[Path]:
    """Writes the finished export `out` in every other format beside it, as export-FORMAT, and returns the folders."""
    others = [name for name in formats if name != OWN]
    return [
        write_format(out, out.with_name(f"{out.name}-{name}"), name, overwrite=True, max_shard_size=max_shard_size)
        for name in others
    ]


def check_push(repository: str | None) -> None:
    """Raises UserError, before anything is trained, where `export.push` could not be carried out."""
    if repository is not None:
        try:
            check_repository(repository)
            require_token(repository)
        except UserError as error:
            raise UserError(f"export.push: {error}") from None


def _own_dtype(folder: Path) -> torch.dtype:
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(folder, trust_remote_code=False).dtype
    return own if isinstance(own, torch.dtype) else getattr(torch, str(own or "float32").removeprefix("torch."))
