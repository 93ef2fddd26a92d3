"""Carries a plan out on disk: tensors stream from the source to the shards in pieces, whatever the model's size.

Per piece: read, look for NaN and Inf, write, read back from the file and compare; a second thread digests. So
`kept_identical` counts bytes that were seen in the output, and memory stays at a
few pieces. Twins: tests/convert/test_execute.py, benchmarks/convert.py.
"""

import ctypes
import hashlib
import json
import os
import queue
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from deltanet_errors import DeltanetError, UserError

from .checkpoint import INDEX, NAMES, SINGLE, Checkpoint, open_checkpoint
from .plan import Move, Plan

# Small enough for a piece to stay in a core's cache from reading to digesting.
PIECE = 1 << 20
NUM_PIECES = 8
# Longer writes make Linux 6 look for large free stretches of memory: 2.5 GB took 2.7 s of kernel time in pieces of
# 1 MiB and 0.5 s in pieces of 256 KiB (ext4, kernel 6.18).
WRITE = 256 << 10
# Linux starts to write dirty pages late; asked now and then, it has little left to do when the file is synced.
WRITE_BACK = getattr(ctypes.CDLL(None), "sync_file_range", None)
WRITE_BACK_BYTES, SYNC_FILE_RANGE_WRITE = 64 << 20, 2
if WRITE_BACK is not None:
    WRITE_BACK.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
# Bits of +Inf and -Inf, as (signed, unsigned) views: any NaN or Inf is at or above one of them.
INFINITE = {
    torch.float64: (np.int64, 0x7FF0 << 48, np.uint64, 0xFFF0 << 48),
    torch.float32: (np.int32, 0x7F80 << 16, np.uint32, 0xFF80 << 16),
    torch.float16: (np.int16, 0x7C00, np.uint16, 0xFC00),
    torch.bfloat16: (np.int16, 0x7F80, np.uint16, 0xFF80),
}


@dataclass
class Written:
    """What `execute` did: tensors by what became of them, and (bytes, sha256) of every file by name."""

    kept: int = 0
    kept_identical: int = 0
    refitted: int = 0
    new: int = 0
    files: dict[str, tuple[int, str]] = field(default_factory=dict)


def execute(
    plan: Plan,
    checkpoint: Checkpoint,
    folder: Path,
    *,
    max_shard_size: int,
    overrides: Mapping[str, torch.Tensor] | None = None,
    advance: Callable[[int], None] = lambda num_bytes: None,
) -> Written:
    """Writes the plan's tensors into `folder` as one file, or shards with an index where they exceed
    `max_shard_size` bytes, and checks the result as any source is checked.

    `overrides` replaces tensors of the plan by name (calibrated values). `advance` hears of every piece's bytes.
    Raises UserError naming the tensor that holds NaN or Inf, or a full disk.
    """
    overrides = overrides or {}
    _check_overrides(plan, overrides)
    shards = _shards(plan.moves, max_shard_size)
    written = Written()
    weight_map: dict[str, str] = {}
    for number, moves in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with CheckedFile(folder / name) as file:
            file.append(_header(moves))
            for move in moves:
                _write_tensor(file, move, checkpoint, overrides.get(move.target), advance)
                _count(written, move, move.target in overrides)
                weight_map[move.target] = name
        written.files[name] = file.result
    if len(shards) > 1:
        index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_small(folder, INDEX, json.dumps(index, indent=2) + "\n", written)
    _check_output(folder, plan)
    return written


def write_small(folder: Path, name: str, content: str | bytes, written: Written) -> None:
    """Writes a small file and notes its digest."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    written.files[name] = (len(data), hashlib.sha256(data).hexdigest())


class CheckedFile:
    """A file under construction. `commit` writes, reads back and compares; a thread digests behind it. `result` is
    (bytes, sha256) once the `with` block has ended well."""

    def __init__(self, path: Path):
        self.path = path
        self.free: queue.Queue[bytearray] = queue.Queue()
        for _ in range(NUM_PIECES):
            self.free.put(bytearray(PIECE))
        self.filled: queue.Queue[tuple[bytearray, int] | None] = queue.Queue()
        self.seen, self.digest, self.size = bytearray(PIECE), hashlib.sha256(), 0

    def __enter__(self) -> "CheckedFile":
        self.handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.thread = threading.Thread(target=self._digest, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, kind, *_) -> None:
        self.filled.put(None)
        self.thread.join()
        os.close(self.handle)
        if kind is None:
            self.result = (self.size, self.digest.hexdigest())

    def append(self, data: bytes | memoryview) -> None:
        for offset in range(0, len(data), PIECE):
            part = data[offset : offset + PIECE]
            buffer = self.free.get()
            buffer[: len(part)] = part
            self.commit(buffer, len(part))

    def commit(self, buffer: bytearray, length: int) -> None:
        """Writes the first `length` bytes of a buffer taken from `free`, which the thread gives back."""
        view, done = memoryview(buffer), 0
        while done < length:
            done += os.write(self.handle, view[done : min(done + WRITE, length)])
        view, done = memoryview(self.seen), 0
        while done < length and (count := os.preadv(self.handle, [view[done:length]], self.size + done)):
            done += count
        same = buffer == self.seen if length == PIECE else buffer[:length] == self.seen[:length]
        if done < length or not same:
            raise DeltanetError(f"{self.path}: reads back differently from what was written")
        if WRITE_BACK is not None and (self.size + length) // WRITE_BACK_BYTES > self.size // WRITE_BACK_BYTES:
            WRITE_BACK(self.handle, 0, 0, SYNC_FILE_RANGE_WRITE)
        self.size += length
        self.filled.put((buffer, length))

    def _digest(self) -> None:
        while (item := self.filled.get()) is not None:
            buffer, length = item
            self.digest.update(memoryview(buffer)[:length])
            self.free.put(buffer)


def _write_tensor(file, move: Move, checkpoint: Checkpoint, override, advance) -> None:
    if override is not None or move.operation == "new":
        data = move.value_bytes() if override is None else _bytes(override.detach().to("cpu", move.dtype))
        for offset in range(0, len(data), PIECE):
            part = data[offset : offset + PIECE]
            buffer = file.free.get()
            buffer[: len(part)] = part
            refuse_nonfinite(buffer, len(part), move.dtype, f"the calibration's {move.target}")
            file.commit(buffer, len(part))
        advance(move.num_bytes)
        return
    entry = checkpoint.entries[move.source]
    where = f"{entry.file}: {move.source}"
    # A cast piece must fit a buffer before and after.
    widest = max(entry.dtype.itemsize, move.dtype.itemsize)
    for offset, length in checkpoint.pieces(entry, PIECE // widest * entry.dtype.itemsize):
        buffer = file.free.get()
        checkpoint.read_into(entry, offset, memoryview(buffer)[:length])
        refuse_nonfinite(buffer, length, entry.dtype, where)
        if move.operation == "cast":
            length = _cast(buffer, length, entry.dtype, move.dtype)
            refuse_nonfinite(buffer, length, move.dtype, f"{where}, cast to {move.dtype},")
        file.commit(buffer, length)
        advance(length)


def _cast(buffer: bytearray, length: int, source: torch.dtype, target: torch.dtype) -> int:
    data = _bytes(torch.frombuffer(buffer, dtype=source, count=length // source.itemsize).to(target))
    buffer[: len(data)] = data
    return len(data)


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def refuse_nonfinite(buffer: bytearray, length: int, dtype: torch.dtype, what: str) -> None:
    """Raises UserError about `what` where the first `length` bytes hold NaN or Inf of `dtype`, a float type."""
    signed, high, unsigned, low = INFINITE[dtype]
    count = length // dtype.itemsize
    if count == 0:
        return
    positive = np.frombuffer(buffer, signed, count).max() >= high
    if positive or np.frombuffer(buffer, unsigned, count).max() >= low:
        values = torch.frombuffer(buffer, dtype=dtype, count=count)
        kind = "NaN" if values.isnan().any() else "Inf"
        raise UserError(f"{what} holds {kind}")


def _count(written: Written, move: Move, is_override: bool) -> None:
    if move.operation == "new":
        written.new += 1
    elif is_override:
        written.refitted += 1
    else:
        written.kept += 1
        written.kept_identical += move.operation == "copy"


def _check_overrides(plan: Plan, overrides: Mapping[str, torch.Tensor]) -> None:
    shapes = {move.target: move.shape for move in plan.moves}
    for name, tensor in overrides.items():
        if tuple(tensor.shape) != shapes.get(name):
            raise DeltanetError(f"calibration gives {name} {list(tensor.shape)}; the plan has {shapes.get(name)}")


def _shards(moves: list[Move], limit: int) -> list[list[Move]]:
    """Moves in order, cut before the shard that would exceed `limit`; a larger tensor has a shard of its own."""
    shards: list[list[Move]] = [[]]
    size = 0
    for move in moves:
        if shards[-1] and size + move.num_bytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(move)
        size += move.num_bytes
    # Wide dtypes first, so that every tensor lies at a multiple of its element size.
    return [sorted(shard, key=lambda move: -move.dtype.itemsize) for shard in shards]


def _header(moves: list[Move]) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for move in moves:
        end = offset + move.num_bytes
        header[move.target] = {
            "dtype": NAMES[move.dtype],
            "shape": list(move.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _check_output(folder: Path, plan: Plan) -> None:
    """The output as a source: its own index and headers must hold, and give exactly the plan's tensors."""
    entries = open_checkpoint(folder).entries
    found = {name: (entry.shape, entry.dtype) for name, entry in entries.items()}
    if found != {move.target: (move.shape, move.dtype) for move in plan.moves}:
        raise DeltanetError(f"{folder}: what was written is not what was planned")
