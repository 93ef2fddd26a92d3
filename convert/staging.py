"""A folder that appears whole or not at all.

Everything is written into a sibling `.NAME.converting-XXXX`, locked for as long as its owner lives; one rename makes it
NAME. What a killed run leaves behind is such a sibling without a lock, and the next run for the same NAME removes it.
Twin: tests/convert/test_staging.py.
"""

import contextlib
import ctypes
import errno
import fcntl
import json
import os
import shutil
import uuid
from fnmatch import fnmatch
from pathlib import Path

from deltanet_errors import DeltanetError, UserError

AT_FDCWD, RENAME_EXCHANGE = -100, 2
ENDINGS = (".safetensors", ".json", ".bin", ".jinja", ".md", ".py", ".html", ".png", ".gguf", ".yaml")
"""Of what stands in a checkpoint folder beside a tokenizer and a licence."""
LONGEST_NAME = 233
"""Bytes of OUT's name: 255 on every file system of Linux, less what the sibling's name adds."""


def check_target(out: Path, overwrite: bool, source: Path | None = None) -> None:
    """Raises UserError where OUT may not be written: it exists, is no checkpoint, or is or holds the source."""
    if source is not None:
        ours, theirs = (Path(os.path.realpath(path)) for path in (out, source))
        if ours == theirs or ours in theirs.parents:
            raise UserError(f"-o {out}: is, or holds, the source {source}")
    if len(os.fsencode(out.name)) > LONGEST_NAME:
        raise UserError(f"-o {out}: the name is too long; allowed: {LONGEST_NAME} bytes")
    if not os.path.lexists(out):
        parent = next(path for path in out.absolute().parents if os.path.lexists(path))
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise UserError(f"-o {out}: {parent} is not a folder that can be written")
        return
    if not overwrite:
        raise UserError(f"-o {out}: exists already; --overwrite replaces it once the new one is complete")
    if out.is_symlink() or not out.is_dir() or not (_is_checkpoint(out) or not any(out.iterdir())):
        raise UserError(f"-o {out}: --overwrite replaces a checkpoint folder or an empty one only, and this is neither")
    foreign = next((path for path in sorted(out.iterdir()) if not _may_go(path)), None)
    if foreign is not None:
        raise UserError(f"-o {out}: --overwrite would delete {foreign.name}, which is no part of a checkpoint; move it")


def _is_checkpoint(folder: Path) -> bool:
    """Whether there are a model's configuration and weights."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return isinstance(kind, str) and (any(folder.glob("*.safetensors")) or any(folder.glob("*.bin")))


def _may_go(path: Path) -> bool:
    """Whether it is of a kind that checkpoints have: hidden, a file with such an ending, or a folder of such files."""
    from .sources import COMPANIONS

    if path.name.startswith("."):
        return True
    if path.is_dir() and not path.is_symlink():
        return all(map(_may_go, path.iterdir()))
    return path.suffix in ENDINGS or any(fnmatch(path.name, pattern) for pattern in COMPANIONS)


class Staging:
    """`with Staging(out) as staging:` write into `staging.folder`, then `staging.commit()`.

    Left without a commit, by an error or Ctrl-C, the folder is removed, with those made to hold it. Raises UserError
    while another live process is writing the same OUT.
    """

    def __init__(self, out: Path, overwrite: bool = False):
        self.out, self.overwrite = out.absolute(), overwrite
        self.committed = False

    def __enter__(self) -> "Staging":
        self.made = [parent for parent in self.out.parents if not parent.exists()]
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self.folder = self.out.parent / f".{self.out.name}.converting-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        self._lock = os.open(self.folder, os.O_RDONLY)
        # A file system that cannot lock a folder leaves the sweep of its left-overs to people.
        with contextlib.suppress(OSError):
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return self

    def __exit__(self, *_) -> None:
        if not self.committed:
            shutil.rmtree(self.folder, ignore_errors=True)
            with contextlib.suppress(OSError):  # from the first one on that somebody else uses
                for parent in self.made:
                    parent.rmdir()
        os.close(self._lock)

    def _sweep(self) -> None:
        """Removes what dead runs for the same OUT left. A live one holds its lock."""
        for path in self.out.parent.glob(f".{_escaped(self.out.name)}.converting-????????"):
            handle = os.open(path, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            except OSError as error:
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    raise UserError(f"-o {self.out}: another conversion is writing it ({path.name})") from None
            finally:
                os.close(handle)

    def commit(self) -> None:
        """Makes everything durable, then renames. An old OUT is swapped out in the same instant, then removed."""
        for path in sorted(self.folder.rglob("*")):
            sync(path)
        sync(self.folder)
        if os.path.lexists(self.out):
            if not self.overwrite:
                raise UserError(f"-o {self.out}: appeared while the conversion was running")
            old = self._exchange()
            self.committed = True
            sync(self.out.parent)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(self.folder, self.out)
            self.committed = True
            sync(self.out.parent)

    def _exchange(self) -> Path:
        """OUT becomes the new folder; returns where the old one is now."""
        libc = ctypes.CDLL(None, use_errno=True)
        swap = getattr(libc, "renameat2", None)
        new, out = os.fsencode(self.folder), os.fsencode(self.out)
        if swap is not None and swap(AT_FDCWD, new, AT_FDCWD, out, RENAME_EXCHANGE) == 0:
            return self.folder
        # Where the kernel or the file system cannot swap, OUT is absent between two renames.
        old = self.folder.with_name(self.folder.name + ".old")
        os.rename(self.out, old)
        try:
            os.rename(self.folder, self.out)
        except OSError as error:
            os.rename(old, self.out)
            raise DeltanetError(f"-o {self.out}: could not be replaced: {error}") from error
        return old


def sync(path: Path) -> None:
    """Asks the disk to keep a file or a folder's list of names. Raises OSError, a full disk included."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _escaped(name: str) -> str:
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
