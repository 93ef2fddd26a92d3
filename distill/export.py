"""The finished student as a checkpoint folder: its own dtype, sharded safetensors, the tokenizer, the recipe.

It appears whole or not at all, and is loaded once, strictly, before it counts. Twin: tests/distill/test_run.py.
"""

import shutil
from pathlib import Path

import torch

from convert.sources import COMPANIONS
from convert.staging import Staging
from deltanet import load_student
from deltanet.errors import UserError

RECIPE = "deltanet_recipe.yaml"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export(
    student: Path, companions: Path, out: Path, *, dtype: str = "auto", max_shard_size: str = "5GB", recipe: str
) -> int:
    """Writes the weights in folder `student` to `out`, with the tokenizer and licence files of the folder
    `companions`; returns the number of parameters. `dtype` auto is that of `companions`' configuration.

    An export that stands at `out` already is replaced in one instant. Raises UserError for a full disk.
    """
    wanted = DTYPES.get(dtype) or _own_dtype(companions)
    model = load_student(student, dtype=wanted)
    model.config.dtype = wanted
    try:
        with Staging(out, overwrite=True) as staging:
            model.save_pretrained(staging.folder, max_shard_size=max_shard_size)
            for pattern in COMPANIONS:
                for path in sorted(companions.glob(pattern)):
                    target = staging.folder / path.relative_to(companions)
                    if path.is_file():
                        target.parent.mkdir(exist_ok=True)
                        shutil.copyfile(path, target)
            (staging.folder / RECIPE).write_text(recipe, encoding="utf-8")
            load_student(staging.folder)
            staging.commit()
    except OSError as error:
        raise UserError(f"{out}: the export cannot be written: {error.strerror or error}") from error
    return sum(parameter.numel() for parameter in model.parameters())


def _own_dtype(folder: Path) -> torch.dtype:
    from transformers import AutoConfig

    own = AutoConfig.from_pretrained(folder).dtype
    return own if isinstance(own, torch.dtype) else getattr(torch, str(own or "float32").removeprefix("torch."))
