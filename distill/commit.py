"""Atomic checkpoints of a run: a commit is a folder that appears whole, and is believed only if its digests agree.

Written into `step-00000120.tmp-ID`, every file and folder synced, `manifest.json` (size and sha256 of each file, and
of itself) last, then renamed to `step-00000120` and the parent synced. There is no "latest" file: the newest commit is
the highest step whose manifest verifies. Old ones go only after the new one is in place, by a rename first.
Twins: tests/distill/test_commit.py (killed and out of space at every system call, corrupted in every way).
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deltanet_errors import DeltanetError, UserError

MANIFEST = "manifest.json"
LOCK = "lock"
FORMAT = 1
_NAME = re.compile(r"step-(\d{8})(\.replaced-[0-9a-f]{8})?")
_LEFT_OVER = re.compile(r"step-\d{8}\.(tmp|deleted)-[0-9a-f]{8}")


@dataclass(frozen=True)
class Commit:
    """A verified checkpoint: its folder, the number of steps done, and what `write_commit` was told about it."""

    folder: Path
    step: int
    info: dict


class Ranks(Protocol):
    """The processes of a run, as `engine.World` has them; every method is called by all of them together."""

    is_main: bool

    def gather(self, value: Any) -> list: ...
    def broadcast(self, value: Any) -> Any: ...


@dataclass(frozen=True)
class Alone:
    """A run of one process."""

    is_main: bool = True

    def gather(self, value: Any) -> list:
        return [value]

    def broadcast(self, value: Any) -> Any:
        return value


class Damaged(DeltanetError):
    """A folder that is no valid commit; the message names the file and what is wrong with it."""


def write_commit(
    root: Path,
    step: int,
    save: Callable[[Path], None],
    info: dict | None = None,
    *,
    keep: int = 2,
    ranks: Ranks | None = None,
    report: Callable[[str], None] = print,
) -> Commit:
    """Makes the commit of `step`: every rank's `save(folder)` writes its files, rank 0 seals the folder.

    `info` is JSON and comes back with the commit. All ranks commit or none: if one cannot write (its `save` raises
    OSError or DeltanetError, when no other rank waits for it any more), all raise DeltanetError, the staging folder
    goes, and earlier commits are untouched. Another error of `save` leaves at once, on its rank alone. Afterwards the
    newest `keep` (at least two) stay.
    """
    ranks = ranks or Alone()
    name = f"step-{step:08d}"
    staging, problem = None, None
    if ranks.is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
            _sweep(root)
            staging = root / f"{name}.tmp-{uuid.uuid4().hex[:8]}"
            staging.mkdir()
        except OSError as error:
            problem = _why(error)
    staging, problem = ranks.broadcast((staging, problem))
    if problem is None:
        try:
            save(staging)
        except (OSError, DeltanetError) as error:
            problem = _why(error)
        except BaseException:
            if ranks.is_main:
                shutil.rmtree(staging, ignore_errors=True)
            raise
        problem = _first(ranks.gather(problem))
    if problem is None and ranks.is_main:
        try:
            _seal(staging, step, info or {})
            _publish(staging, root / name)
        except OSError as error:
            problem = _why(error)
    problem = ranks.broadcast(problem)
    if problem is not None:
        if ranks.is_main and staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        raise DeltanetError(f"{root / name}: not committed: {problem}; earlier commits are untouched")
    if ranks.is_main:
        try:
            _retain(root, max(2, keep))
        except OSError as error:
            report(f"{root}: old commits could not be removed: {_why(error)}")
    return Commit(root / name, step, info or {})


def newest_commit(root: Path, *, ranks: Ranks | None = None, report: Callable[[str], None] = print) -> Commit | None:
    """The valid commit of the highest step, or None; rank 0 looks and all ranks get its choice.

    What does not verify is passed over, and `report` is told which file of it is damaged.
    """
    ranks = ranks or Alone()
    found = None
    if ranks.is_main:
        for folder in _candidates(root):
            try:
                found = verify(folder)
                break
            except Damaged as damage:
                report(f"{damage}; looking for an earlier commit")
    return ranks.broadcast(found)


def verify(folder: Path) -> Commit:
    """The commit in this folder, after reading every byte of it. Raises Damaged naming the first file that differs."""
    step, files, info = _read_manifest(folder)
    for name, (size, digest) in files.items():
        file = folder / name
        try:
            actual = file.lstat().st_size if file.is_file() and not file.is_symlink() else None
            if actual != size:
                what = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise Damaged(f"{file}: {what}")
            if _digest(file) != digest:
                raise Damaged(f"{file}: its sha256 is not the one in {MANIFEST}")
        except OSError as error:
            raise Damaged(f"{file}: cannot be read: {_why(error)}") from None
    extra = sorted({*_files(folder)} - files.keys() - {MANIFEST})
    if extra:
        raise Damaged(f"{folder / extra[0]}: is not in {MANIFEST}")
    return Commit(folder, step, info)


def drop_newer(root: Path, step: int) -> None:
    """Removes commits past `step`: a run that goes on from an earlier one must not find them later."""
    for folder in _candidates(root):
        if _step(folder) > step:
            _delete(folder)


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run's lock, which the system releases when the process ends, however it ends. Where nothing but the
    lock was made meanwhile, it is removed again, with the folders that were made for it.

    Raises UserError while another process holds it, DeltanetError where the folder cannot be written.
    """
    try:
        missing = [folder for folder in (run, *run.parents) if not folder.exists()]
        run.mkdir(parents=True, exist_ok=True)
        before = os.listdir(run)
        lock = os.open(run / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise DeltanetError(f"{run}: cannot be written: {_why(error)}") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = os.fstat(lock).st_nlink > 0  # else its owner has just removed it
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise DeltanetError(f"{run}: cannot be locked: {_why(error)}") from None
            is_held = False
        if not is_held:
            owner = os.pread(lock, 200, 0).decode(errors="replace").strip()
            raise UserError(f"{run}: another process works on this run ({owner}); wait for it or stop it")
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
        try:
            yield
        finally:
            _remove_unused(run, before, missing)
    finally:
        os.close(lock)


def _remove_unused(run: Path, before: list[str], missing: list[Path]) -> None:
    """Removes the lock if nothing else has come to the folder since it held `before`, and then those of the folders
    `missing` (the inmost first) that are empty: a run that was refused leaves nothing."""
    with contextlib.suppress(OSError):
        if {*os.listdir(run)} - {*before} == {LOCK}:
            (run / LOCK).unlink()
            for folder in missing:
                folder.rmdir()


def _seal(staging: Path, step: int, info: dict) -> None:
    """Syncs everything in the folder and writes its manifest, which is what makes it believable."""
    files = {}
    for name in _files(staging):
        with open(staging / name, "rb") as stream:
            os.fsync(stream.fileno())
        files[name] = [(staging / name).stat().st_size, _digest(staging / name)]
    body = {"format": FORMAT, "step": step, "files": files, "info": info}
    with open(staging / MANIFEST, "w", encoding="utf-8") as stream:
        json.dump({"sha256": _body_digest(body), **body}, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    for folder, _, _ in os.walk(staging, topdown=False):
        _sync_folder(Path(folder))


def _publish(staging: Path, final: Path) -> None:
    """The rename. A commit of the same step, made before a resume from an earlier one, steps aside under a name that
    `newest_commit` still knows, so there is no moment without it."""
    aside = None
    if final.exists():
        aside = final.with_name(f"{final.name}.replaced-{uuid.uuid4().hex[:8]}")
        os.rename(final, aside)
    os.rename(staging, final)
    _sync_folder(final.parent)
    if aside is not None:
        _delete(aside)


def _retain(root: Path, keep: int) -> None:
    """Keeps the newest `keep` commits whose manifest and sizes are sound; what is damaged counts for nothing but is
    left while it is newer than those, since it may tell somebody what happened."""
    sound = 0
    for folder in _candidates(root):
        if sound >= keep:
            _delete(folder)
            continue
        with contextlib.suppress(Damaged):
            _, files, _ = _read_manifest(folder)
            sound += all((folder / name).is_file() and (folder / name).stat().st_size == size
                         for name, (size, _) in files.items())  # fmt: skip


def _delete(folder: Path) -> None:
    doomed = folder.with_name(f"{folder.name[:13]}.deleted-{uuid.uuid4().hex[:8]}")
    os.rename(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes what killed processes left; the run's lock says that nobody else is writing."""
    for folder in root.iterdir():
        if _LEFT_OVER.fullmatch(folder.name):
            shutil.rmtree(folder, ignore_errors=True)


def _candidates(root: Path) -> list[Path]:
    """Folders named as commits, the highest step first; of one step, the replaced one last."""
    if not root.is_dir():
        return []
    named = [folder for folder in root.iterdir() if _NAME.fullmatch(folder.name) and folder.is_dir()]
    return sorted(named, key=lambda folder: (-_step(folder), folder.name))


def _step(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    return int(match[1]) if match else -1


def _read_manifest(folder: Path) -> tuple[int, dict[str, tuple[int, str]], dict]:
    path = folder / MANIFEST
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        claimed = stored.pop("sha256")
        if claimed != _body_digest(stored):
            raise Damaged(f"{path}: its own sha256 does not agree")
        if stored["format"] > FORMAT:
            raise Damaged(f"{path}: has the format {stored['format']}, this version knows {FORMAT}")
        step, files, info = stored["step"], stored["files"], stored["info"]
    except FileNotFoundError:
        raise Damaged(f"{path}: is missing") from None
    except OSError as error:
        raise Damaged(f"{path}: cannot be read: {_why(error)}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Damaged(f"{path}: is no manifest") from None
    if _NAME.fullmatch(folder.name) and _step(folder) != step:
        raise Damaged(f"{path}: is the manifest of step {step}")
    return step, {name: (size, digest) for name, (size, digest) in files.items()}, info


def _files(folder: Path) -> list[str]:
    """Every file below the folder by its relative name, but for what NFS keeps of a deleted file."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir())
    return [path.relative_to(folder).as_posix() for path in found if not path.name.startswith(".nfs")]


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _body_digest(body: dict) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _why(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _first(problems: list[str | None]) -> str | None:
    for rank, problem in enumerate(problems):
        if problem is not None:
            return problem if len(problems) == 1 else f"rank {rank}: {problem}"
    return None
