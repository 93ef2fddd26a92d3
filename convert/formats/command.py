"""`deltanet-convert STUDENT -o OUT --format NAME`: a student's folder once more, in a form that others load.

Twin: tests/convert/formats/test_format_command.py.
"""

import errno
import json
import shutil
from pathlib import Path
from types import ModuleType

import torch
from transformers.utils import logging

from deltanet import DeltaNetConfig, DeltaNetForCausalLM, load_student
from deltanet_errors import UserError, nearest

from ..checkpoint import INDEX, SINGLE, open_checkpoint
from ..families import read_config
from ..links import leaves
from ..publish.card import make_card, write_card
from ..publish.files import README, SHARDS, is_published, matches
from ..publish.manifest import MANIFEST, files_in, seal
from ..staging import Staging, check_target
from . import fla, qwen3_5
from .remote_code import AUTO_MAP, remote_code

REWRITTEN = {"fla": fla, "qwen3_5": qwen3_5}
"""Formats in which the tensors have other names and shapes."""
FORMATS = ("remote", *REWRITTEN)


def check_format(name: str, config: DeltaNetConfig, where: str) -> None:
    """Raises UserError, which names every item, where a student with this configuration cannot be written as `name`."""
    if name not in FORMATS:
        raise UserError(f"{where} {name}: allowed: {', '.join(FORMATS)}{nearest(name, list(FORMATS))}")
    if name in REWRITTEN and (items := REWRITTEN[name].refusals(config)):
        raise UserError(
            f"{where} {name}: the format cannot express {'; '.join(items)}"
            + ("" if where == "--compat" else f". --compat {name} makes students without what a conversion decides")
        )


def write_format(
    student: str | Path, output: str | Path, name: str, *, overwrite: bool = False, max_shard_size: int | str = "5GB"
) -> Path:
    """Writes the folder `student` to the folder `output` in the format `name` and returns `output`.

    remote: the same weights, and the code that loads them beside them. fla, qwen3_5: the weights by the names and in
    the shapes of another program's class, which computes the same. Of the rest, what a push would send is copied,
    and no code that stood in `student`. Raises UserError for a name that does not exist, a folder that is no whole
    student, a student that the format cannot express, an `output` that may not be written, and a full disk; then
    nothing is left at `output`.
    """
    student, output = Path(student), Path(output).expanduser()
    if name not in FORMATS:
        check_format(name, DeltaNetConfig(num_hidden_layers=0), "--format")
    raw = read_config(student)
    if raw.get("model_type") != DeltaNetConfig.model_type:
        raise UserError(
            f"{student}: --format takes a student, of model_type {DeltaNetConfig.model_type!r}; "
            f"this is {raw.get('model_type')!r}"
        )
    check_format(name, DeltaNetConfig.from_pretrained(student), "--format")
    check_target(output, overwrite, student)
    open_checkpoint(student)
    if (student / README).is_file():
        make_card(student)  # what its reports lack is said of them, and not of their copies
    logging.disable_progress_bar()
    model = load_student(student)
    try:
        with Staging(output, overwrite) as staging:
            _copy(student, staging.folder, with_weights=name not in REWRITTEN)
            if name in REWRITTEN:
                raw = _rewrite(model, staging.folder, REWRITTEN[name], max_shard_size)
            else:
                raw = raw | {"auto_map": AUTO_MAP}
                for file, source in remote_code().items():
                    (staging.folder / file).write_text(source, encoding="utf-8")
            config = json.dumps(raw, indent=2, sort_keys=True) + "\n"
            (staging.folder / "config.json").write_text(config, encoding="utf-8")
            if name not in REWRITTEN:
                load_student(staging.folder)
            if (staging.folder / README).is_file():
                write_card(staging.folder, model.config, name)
            seal(staging.folder)
            staging.commit()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"-o {output}: the disk is full") from None
        raise
    return output


def _copy(student: Path, folder: Path, with_weights: bool) -> None:
    weights = (SINGLE, SHARDS, INDEX)
    for file, path in files_in(student):
        is_kept = with_weights or not any(matches(file, pattern) for pattern in weights)
        if file != MANIFEST and not file.endswith(".py") and is_kept and is_published(file, student):
            if leaves(student, path):
                raise UserError(f"{path}: a link to {path.resolve()}, outside the student's folder")
            target = folder / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


@torch.no_grad()
def _rewrite(model: DeltaNetForCausalLM, folder: Path, form: ModuleType, max_shard_size: int | str) -> dict:
    """Writes the weights and returns config.json."""
    from huggingface_hub import save_torch_state_dict

    raw = form.settings(model.config)
    made = form.tensors(dict(model.state_dict()), model.config)
    expected = form.shapes(raw)
    found = {name: tuple(value.shape) for name, value in made.items()}
    if wrong := sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)):
        raise AssertionError(f"tensors that the format has otherwise: {', '.join(wrong[:5])}")
    save_torch_state_dict(
        {name: value.contiguous() for name, value in made.items()}, folder, max_shard_size=max_shard_size
    )
    return raw
