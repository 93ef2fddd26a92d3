"""The shipped table of tile sizes, warps and stages: nothing is tuned at run time.

Measured on one NVIDIA H100 (docs/results/kernels.md). No entry has more than two warps: with four, products of 64 rows
become wgmma, each waited for, and Triton 3.4 to 3.7.0 miscompiles some of them on Hopper.
"""

from dataclasses import dataclass

CHUNK = 16
"""Tokens of a chunk: the smallest tensor-core tile, so that C x C work stays small beside the state's."""
ANCHOR = 256
"""Tokens between two exact <S, dS> of the gate's gradient; segments are multiples of it when there is a gate."""


@dataclass(frozen=True)
class Config:
    """One kernel's columns of the state per program, warps, software-pipeline stages, and query heads at a time."""

    tile: int
    num_warps: int
    stages: int
    group: int = 4


FORWARD = {
    16: Config(16, 1, 2),
    32: Config(32, 1, 2),
    64: Config(64, 2, 3),
    128: Config(32, 1, 2),
    256: Config(16, 1, 2),
}
"""By padded key size."""
MAP = {
    16: Config(16, 1, 2),
    32: Config(32, 1, 2),
    64: Config(64, 2, 3),
    128: Config(16, 1, 2),
    256: Config(16, 2, 2),
}
"""By padded key size; a program holds a tile of two states."""
WRITE = {
    16: Config(16, 1, 2),
    32: Config(32, 1, 2),
    64: Config(64, 2, 2),
    128: Config(32, 1, 2),
    256: Config(32, 2, 2),
}
"""By padded key size."""
KEY = {
    16: Config(16, 1, 2),
    32: Config(32, 1, 2),
    64: Config(64, 2, 2),
    128: Config(32, 2, 3),
    256: Config(32, 2, 2),
}
"""By padded value size; keys are tiled."""
QUERY = dict(KEY)
"""By padded value size; keys are tiled."""
SCAN = Config(16, 4, 1)
GATED = {("write", 128): Config(64, 2, 3), ("key", 128): Config(32, 2, 2)}
"""Entries that a gate changes."""
TABLES = {"forward": FORWARD, "map": MAP, "write": WRITE, "key": KEY, "query": QUERY}


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(size: int) -> int:
    """The tile that holds a head of this size: the next power of two, at least 16."""
    return max(16, next_power_of_two(size))


def choose(kernel: str, whole: int, tiled: int, is_gated: bool) -> Config:
    """The entry for a state with `whole` (padded) rows in every program and `tiled` columns shared out."""
    config = TABLES[kernel][whole]
    if is_gated:
        config = GATED.get((kernel, whole), config)
    return Config(min(config.tile, tiled), config.num_warps, config.stages, config.group)


def group_block(G: int, most: int) -> int:
    """Query heads that a kernel takes at a time: the largest power of two that divides G, up to `most`."""
    return min(G & -G, most)


def segments(programs: int, T: int, step: int, multiprocessors: int) -> int:
    """Into how many pieces a sequence is cut so that `programs` sequences fill the card: four programs of two warps
    on each multiprocessor; one where that would gain less than a factor of three."""
    wanted = round(4 * multiprocessors / max(programs, 1))
    return 1 if wanted < 3 else max(1, min(wanted, T // max(step, 256)))
