"""A configuration may not ask for more memory than its weight files could fill. Twin: tests/deltanet/test_bounds.py."""

from pathlib import Path

import torch

from .errors import UserError


def refuse_oversized(build, folder: Path) -> None:
    """Raises UserError where the model that `build()` makes has more numbers than `folder`'s weights have bytes.

    A reader learns that a tensor has another shape only after the model's own has been allocated; a config.json that
    was tampered with could so take any amount of memory. `build` runs on the meta device.
    """
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    try:
        with torch.device("meta"):
            wanted = sum(parameter.numel() for parameter in build().parameters())
    except RuntimeError as error:
        raise UserError(f"{folder}: config.json makes no possible model: {str(error).splitlines()[0]}") from None
    if stored and wanted > stored:
        raise UserError(
            f"{folder}: the weights do not fit the configuration: it makes {wanted:,} numbers, the files have "
            f"{stored:,} bytes"
        )
