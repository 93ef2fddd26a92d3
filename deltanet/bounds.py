"""A configuration may not ask for more memory than its weight files could fill, nor for other tensors than theirs.

Twins: tests/deltanet/test_bounds.py, tests/convert/publish/test_student_of_hub.py.
"""

from pathlib import Path

import torch

from deltanet_errors import UserError


def weights_folder(name: str | Path, given: dict) -> Path:
    """`name` where it is a folder, else the folder in the cache with the configuration and the weights of the Hub's
    repository `name`; `given` are the arguments of `from_pretrained`. Raises OSError where there is no such repository.
    """
    from huggingface_hub import errors, snapshot_download

    inner = given.get("subfolder") or ""
    if Path(name).is_dir():
        return Path(name, inner)
    options = {key: given.get(key) for key in ("revision", "cache_dir", "token")}
    wanted = [str(Path(inner, pattern)) for pattern in ("config.json", "model*.safetensors", "model*.index.json")]
    try:
        folder = snapshot_download(
            str(name), allow_patterns=wanted, local_files_only=bool(given.get("local_files_only")), **options
        )
    except errors.HFValidationError as error:
        raise OSError(f"{name}: neither a folder nor the name of a repository: {error}") from None
    return Path(folder, inner)


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


def refuse_misfits(info: dict, name: str) -> None:
    """Raises UserError about `name` where `info`, what from_pretrained tells of its loading, has a tensor that is
    missing, unexpected or of another shape than the configuration makes it."""
    problems = [
        f"{what}: {', '.join(map(_named, sorted(info[key])[:5]))}{' ...' if len(info[key]) > 5 else ''}"
        for key, what in (
            ("missing_keys", "missing"),
            ("unexpected_keys", "unexpected"),
            ("mismatched_keys", "wrong shape"),
        )
        if info.get(key)
    ]
    if problems:
        raise UserError(f"{name}: the weights do not fit the configuration: {'; '.join(problems)}")


def _named(entry: str | tuple) -> str:
    """A tensor's name, or of (name, shape in the file, shape in the model) all three."""
    return entry if isinstance(entry, str) else f"{entry[0]} is {list(entry[1])} and not {list(entry[2])}"
