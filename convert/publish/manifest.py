"""manifest.json: the size and sha256 of every other file of a checkpoint folder, and what no longer agrees with it.

safetensors finds truncation but no flipped bit in the data, so the digests are what a reader can trust. The conversion
notes them while it writes (`execute.py`); `seal` takes them of a folder that stands. Twin: test_manifest.py.
"""

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from deltanet_errors import UserError

from ..links import leaves

MANIFEST = "manifest.json"
FORMAT = 1
LARGEST = 16 << 20
"""Bytes of the longest manifest that is read; one line takes about 150."""


def as_manifest(files: Mapping[str, tuple[int, str]]) -> str:
    """The text of a manifest of `files`: name -> (bytes, sha256)."""
    listed = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in sorted(files.items())}
    return json.dumps({"format": FORMAT, "files": listed}, indent=2) + "\n"


def seal(folder: Path) -> None:
    """Writes the manifest of everything that is in `folder` now."""
    files = {name: (path.stat().st_size, sha256_of(path)) for name, path in files_in(folder) if name != MANIFEST}
    (folder / MANIFEST).write_text(as_manifest(files), encoding="utf-8")


def files_in(folder: Path) -> list[tuple[str, Path]]:
    """(name with /, path) of all that is no folder. Hidden names, such as those of git or a download, are left out."""
    found = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and not (Path(parent) / name).is_symlink()
        )
        links = [name for name in os.listdir(parent) if (Path(parent) / name).is_symlink()]
        for name in sorted({*names, *links}):
            if not name.startswith("."):
                path = Path(parent) / name
                found.append((path.relative_to(folder).as_posix(), path))
    return found


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """name -> (bytes, sha256). Raises UserError where it is missing, unreadable, or names a file outside."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{MANIFEST}: longer than {LARGEST:,} bytes")
        return parse_manifest(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{MANIFEST}: missing, so no file can be compared with its digest") from None
    except OSError as error:
        raise UserError(f"{MANIFEST}: unreadable: {error}") from None


def parse_manifest(data: bytes) -> dict[str, tuple[int, str]]:
    """name -> (bytes, sha256). Raises UserError unless `data` is, to the byte, what `as_manifest` writes."""
    try:
        listed = json.loads(data.decode("utf-8"))["files"]
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in listed.items()}
        if any(type(size) is not int or type(digest) is not str for size, digest in files.values()):
            raise TypeError("a size or a digest of another kind")
        if data != as_manifest(files).encode("utf-8"):
            raise ValueError("not as it was written, or of another format")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{MANIFEST}: unreadable: {type(error).__name__}: {error}") from None
    outside = [name for name in files if not is_plain(name)]
    if outside:
        raise UserError(f"{MANIFEST}: {outside[0]!r} is not a name within the folder")
    return files


def is_plain(name: str) -> bool:
    """Whether a name with / stays within its folder and is written the one way it can be."""
    path = PurePosixPath(name)
    return (
        name not in ("", ".")
        and str(path) == name
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
    )


def damage(folder: Path) -> list[str]:
    """One line for every file that is missing, added, a link out of the folder, or not what the manifest says."""
    try:
        listed = read_manifest(folder)
    except UserError as error:
        return [str(error)]
    present = dict(files_in(folder))
    problems = [f"{name}: missing, though {MANIFEST} lists it" for name in listed if name not in present]
    for name, path in present.items():
        if name == MANIFEST:
            continue
        if leaves(folder, path):
            problems.append(f"{name}: a link to something outside the folder")
        elif not path.exists() or not stat.S_ISREG(path.stat().st_mode):
            problems.append(f"{name}: not a plain file")
        elif name not in listed:
            problems.append(f"{name}: not in {MANIFEST}")
        elif path.stat().st_size != listed[name][0]:
            problems.append(f"{name}: has {path.stat().st_size:,} bytes; {MANIFEST} says {listed[name][0]:,}")
        elif sha256_of(path) != listed[name][1]:
            problems.append(f"{name}: its sha256 is not the one in {MANIFEST}")
    return problems
