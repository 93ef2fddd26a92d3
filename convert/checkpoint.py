"""Reading a checkpoint folder: which tensor lies where, and the checks that must hold before anything is written.

The rule where index and shards disagree: *the index wins*. What it names must be there, once, in the shard it names;
what it does not name (a tensor in a shard, a stray file) is left aside with a note; a wrong total_size is a note.
Headers are checked byte for byte; data is read in bounded pieces, never mapped. Twin: tests/convert/test_checkpoint.py.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from deltanet_errors import UserError, one_line

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # safetensors' own limit
LONGEST_NAME = 255  # of a file, in bytes, on every file system of Linux
POINTER = b"version "  # how a file of Git LFS begins; as the length of a header it would be far too long
LARGEST_SIZE, MOST_DIMENSIONS = 1 << 48, 8
"""Of a tensor in a header; beyond that a file only means to keep us busy with arithmetic."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a source: bytes `begin` to `end` of `file`, or for pickled weights a `tensor` in memory."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int
    tensor: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.begin


@dataclass
class Checkpoint:
    """The tensors of a folder by name, in file order, and the `notes` about what was left aside."""

    folder: Path
    entries: dict[str, Entry]
    notes: list[str] = field(default_factory=list)
    _open: tuple[Path, int] | None = field(default=None, repr=False)

    def read_into(self, entry: Entry, offset: int, buffer: memoryview) -> None:
        """Fills `buffer` with the tensor's bytes from `offset` on. Raises UserError where the file ends early."""
        if entry.tensor is not None:
            flat = entry.tensor.contiguous().reshape(-1).view(torch.uint8)
            buffer[:] = flat[offset : offset + len(buffer)].numpy().data
            return
        handle, done = self._handle(entry.file), 0
        while done < len(buffer):
            count = os.preadv(handle, [buffer[done:]], entry.begin + offset + done)
            if count == 0:
                raise UserError(f"{entry.file}: ends inside {entry.name}")
            done += count

    def _handle(self, path: Path) -> int:
        """The file that is being read stays open, one at a time."""
        if self._open is None or self._open[0] != path:
            self.close()
            self._open = (path, os.open(path, os.O_RDONLY))
        return self._open[1]

    def close(self) -> None:
        if self._open is not None:
            os.close(self._open[1])
            self._open = None

    def __del__(self) -> None:
        self.close()

    def pieces(self, entry: Entry, size: int) -> Iterator[tuple[int, int]]:
        """(offset, length) of the tensor's bytes in pieces of at most `size`."""
        for offset in range(0, entry.num_bytes, size):
            yield offset, min(size, entry.num_bytes - offset)

    def load(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own."""
        entry = self.entries[name]
        data = bytearray(entry.num_bytes)
        self.read_into(entry, 0, memoryview(data))
        return torch.frombuffer(data, dtype=entry.dtype).reshape(entry.shape) if data else _empty(entry)


def _empty(entry: Entry) -> torch.Tensor:
    return torch.empty(entry.shape, dtype=entry.dtype)


def open_checkpoint(folder: Path, allow_pickle: bool = False) -> Checkpoint:
    """Finds the weights of `folder` and checks every header against the index and the file sizes.

    Raises UserError naming tensor and file for: no weights; pickled weights unless allowed; a truncated or corrupt
    file; a missing shard; a tensor that is not where the index says, or is in two shards.
    """
    index = folder / INDEX
    if index.is_file():
        return _open_indexed(folder, index)
    if (folder / SINGLE).is_file():
        checkpoint = Checkpoint(folder, read_header(folder / SINGLE))
        _note_strays(checkpoint, {SINGLE})
        return checkpoint
    parts = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(name.startswith("model-") for name in parts):
        raise UserError(f"{folder}: has the shard {parts[0]}, but no {INDEX}")
    if parts and all(name.startswith("adapter") for name in parts):
        raise UserError(f"{folder}: holds an adapter ({parts[0]}), not a model; merge it into its base first")
    pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
    if pickles and not allow_pickle:
        raise UserError(
            f"{folder}: has pickled weights only ({pickles[0]}); --allow-pickle reads them "
            "(with weights_only, so no code runs), safetensors need no such trust"
        )
    if pickles:
        return _open_pickled(folder, pickles)
    raise UserError(f"{folder}: not a checkpoint (no {SINGLE} and no {INDEX})")


def _open_indexed(folder: Path, index: Path) -> Checkpoint:
    weight_map, total_size = _read_index(index)
    headers: dict[str, dict[str, Entry]] = {}
    for shard in dict.fromkeys(weight_map.values()):
        path = folder / shard
        if Path(shard).name != shard or not shard.isprintable() or not 0 < len(os.fsencode(shard)) <= LONGEST_NAME:
            raise UserError(f"{index}: names the shard {shard!r}, which is not a file name")
        if not path.is_file():
            tensor = next(name for name, where in weight_map.items() if where == shard)
            raise UserError(f"{path}: missing, though {INDEX} says it holds {tensor}")
        headers[shard] = read_header(path)
    holders: dict[str, str] = {}
    for shard, header in headers.items():
        for name in header:
            if name in holders:
                raise UserError(f"{folder}: {name} is in two shards, {holders[name]} and {shard}")
            holders[name] = shard
    for name, shard in weight_map.items():
        if holders.get(name) != shard:
            found = f"it is in {holders[name]}" if name in holders else "no shard has it"
            raise UserError(f"{folder / shard}: lacks {name}, though {INDEX} says it is there ({found})")
    entries = {name: headers[shard][name] for shard in headers for name in headers[shard] if name in weight_map}
    checkpoint = Checkpoint(folder, entries)
    for name, shard in holders.items():
        if name not in weight_map:
            checkpoint.notes.append(f"{shard}: {name} is not in {INDEX}; left aside (the index wins)")
    _note_strays(checkpoint, set(headers))
    held = sum(entry.num_bytes for entry in entries.values())
    if total_size is not None and total_size != held:
        checkpoint.notes.append(f"{INDEX}: total_size is {total_size}, the tensors have {held} bytes; ignored")
    return checkpoint


def _read_index(index: Path) -> tuple[dict[str, str], int | None]:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{index}: unreadable index: {type(error).__name__}: {error}") from None
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    sound = isinstance(weight_map, dict) and all(isinstance(shard, str) for shard in weight_map.values())
    if not weight_map or not sound:
        raise UserError(f"{index}: unreadable index: its weight_map must say the file of every tensor")
    metadata = data.get("metadata")
    return weight_map, metadata.get("total_size") if isinstance(metadata, dict) else None


def _note_strays(checkpoint: Checkpoint, used: set[str]) -> None:
    for path in sorted(checkpoint.folder.glob("*.safetensors")):
        if path.name not in used:
            reason = "the index wins" if (checkpoint.folder / INDEX).is_file() else f"{SINGLE} wins"
            checkpoint.notes.append(f"{path.name}: a stray file; left aside ({reason})")


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of one safetensors file, in file order.

    Raises UserError unless the header parses, the spans follow each other without hole or overlap, each has the bytes
    its shape and dtype need, no name comes twice, and the file ends with the last tensor.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if start == POINTER:
            raise UserError(f"{path}: a pointer of Git LFS, not the weights themselves; `git lfs pull` fetches them")
        if len(start) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise UserError(f"{path}: truncated or not safetensors ({size} bytes, header of {length})")
        text = file.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
        header.pop("__metadata__", None)
        spans = sorted((*value["data_offsets"], name) for name, value in header.items())
        entries, end = {}, 0
        for begin, stop, name in spans:
            if not name.isprintable():
                raise ValueError(f"the name {name!r} has characters that cannot be printed")
            if header[name]["dtype"] not in DTYPES:
                raise UserError(f"{path}: {name} has the dtype {header[name]['dtype']}, which is not supported")
            dtype, shape = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
            sizes = (*shape, begin, stop)
            if len(shape) > MOST_DIMENSIONS or any(type(n) is not int or not 0 <= n < LARGEST_SIZE for n in sizes):
                raise ValueError(f"the shape or span of {name} is not made of possible sizes")
            if begin != end or stop - begin != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"the bytes {begin} to {stop} of {name} do not fit {list(shape)} {dtype}")
            entries[name] = Entry(name, dtype, shape, path, 8 + length + begin, 8 + length + stop)
            end = stop
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: corrupt safetensors header: {error}") from None
    if 8 + length + end != size:
        kind = "truncated" if size < 8 + length + end else "has bytes after its last tensor"
        raise UserError(f"{path}: {kind} ({size} bytes, the header promises {8 + length + end})")
    return entries


def _no_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)} comes twice")
    return result


def _open_pickled(folder: Path, files: list[str]) -> Checkpoint:
    """Pickled weights the user allowed: PyTorch's weights_only unpickler, which runs no code of the file."""
    checkpoint = Checkpoint(folder, {})
    index = folder / "pytorch_model.bin.index.json"
    promised = _read_index(index)[0] if index.is_file() else {}
    files = list(dict.fromkeys(promised.values())) or files
    for file in files:
        path = folder / file
        if Path(file).name != file or not path.is_file():
            raise UserError(f"{path}: missing, though {index.name} names it")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # the unpickler raises many kinds; each means the file cannot be trusted or read
            raise UserError(f"{path}: unreadable with weights_only: {one_line(error)}") from None
        if not isinstance(state, dict):
            raise UserError(f"{path}: holds a {type(state).__name__}, not tensors by name")
        for name, tensor in state.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                raise UserError(f"{path}: {name} is a {type(tensor).__name__}, not a plain tensor of weights")
            if name in checkpoint.entries:
                raise UserError(f"{path}: {name} is in {checkpoint.entries[name].file.name} too")
            if promised and promised.get(name) != file:
                raise UserError(f"{path}: has {name}, which {index.name} says is in {promised.get(name) or 'no file'}")
            size = tensor.numel() * tensor.element_size()
            checkpoint.entries[name] = Entry(name, tensor.dtype, tuple(tensor.shape), path, 0, size, tensor)
    absent = next((name for name in promised if name not in checkpoint.entries), None)
    if absent is not None:
        raise UserError(f"{folder / promised[absent]}: has no {absent}, though {index.name} says so")
    return checkpoint
