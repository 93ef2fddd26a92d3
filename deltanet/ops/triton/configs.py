"""The shipped tables of tile sizes, warps and stages: nothing is tuned at run time.

Measured on one NVIDIA H100 (docs/results/kernels.md). With four warps Triton turns products of 64 rows into wgmma on
Hopper, each waited for, and 3.4 to 3.7.0 are reported to miscompile some of them. So most walks have one warp or two;
those of 128 x 128 states in half precision that have four use mma.sync (products.py), but for one whose wgmma was
checked and is faster.
"""

from dataclasses import dataclass, replace

CHUNK = 16
"""Tokens of a chunk: the smallest tensor-core tile, so that C x C work stays small beside the state's."""
ANCHOR = 256
"""Tokens between two exact <S, dS> of the gate's gradient; segments are multiples of it when there is a gate."""
DECAY_HEADS = 32
"""Heads that a program of decay_kernel takes, however many there are, so that it is not compiled anew."""
LARGEST_WHOLE = {True: 64 * 64, False: 32 * 32}
"""The largest state that one program of the backward owns, in half precision and not."""


@dataclass(frozen=True)
class Config:
    """One kernel's columns of the state per program, warps, software-pipeline stages, and query heads at a time."""

    tile: int
    num_warps: int
    stages: int
    group: int = 4
    reads_inverse: bool = False
    """inverse_kernel finds the chunks' inverses before the walk; if not, every warp of the walk does, one by one."""
    wgmma: bool = True
    """With four warps Triton may turn products into wgmma; if not, they stay mma.sync."""


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
SCAN = dict.fromkeys((16, 32, 64, 128), Config(16, 4, 1)) | {256: Config(16, 4, 1, wgmma=False)}
"""By padded key size."""
WRITE = {
    16: Config(16, 1, 2),
    32: Config(32, 1, 2),
    64: Config(64, 2, 3, group=2),
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
QUERY = KEY | {64: Config(64, 2, 3, group=1)}
"""By padded value size; keys are tiled."""
GATED_WRITE = WRITE | {128: Config(64, 2, 3)}
GATED_KEY = KEY | {128: Config(32, 2, 2)}
TABLES = {"forward": FORWARD, "map": MAP, "scan": SCAN, "write": WRITE, "key": KEY, "query": QUERY}
GATED = TABLES | {"write": GATED_WRITE, "key": GATED_KEY}

HALF_128 = TABLES | {
    "forward": {128: Config(128, 4, 3, reads_inverse=True, wgmma=False)},  # 448 -> 242 + 61 of inverse_kernel
    "scan": {128: Config(16, 4, 1, wgmma=False)},  # 424 bytes of spills -> 0
    "write": {128: Config(128, 4, 3, group=1, reads_inverse=True, wgmma=False)},  # 446 -> 310
    "query": {128: Config(128, 4, 2, group=1)},  # 489 -> 385
}
"""Keys and values padded to 128, in half precision. Microseconds at 16 x 2048 tokens and 16 heads, before and after,
H100, 27 November 2026. Others stay: maps of 16 columns take 430 at 1 x 32768 tokens, of 32 to 128 took 462 to 700; keys
take 547, by 64 rows took 527 and spill 328 bytes when normalized. Query heads that share a state go one by one: wgmma
was checked so, and the write walk fits the 99 KiB of shared memory of compute capability 8.6, 8.9 and 12.
"""
GATED_HALF_128 = GATED | {
    "forward": HALF_128["forward"],  # 819 -> 413 + 64
    "scan": HALF_128["scan"],
    "write": {128: Config(128, 4, 2, reads_inverse=True, wgmma=False)},  # 556 -> 459
}
"""The same with a gate; keys (819) and queries (722) stay: tiles of 128 took 1774 and 895."""
INVERSE = Config(8, 1, 3)
"""Chunks, not columns, per program."""


def next_power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(size: int) -> int:
    """The tile that holds a head of this size: the next power of two, at least 16."""
    return max(16, next_power_of_two(size))


def gate_heads(K: int) -> int:
    """Heads that a program of gate_kernel takes, however many there are: 32 bytes of every token; with eight of the
    widest it would spill 912 bytes."""
    return 8 if padded(K) <= 128 else 4


def place(kernel: str, K: int, V: int, is_gated: bool, half: bool) -> tuple[dict[int, Config], int]:
    """The table of a kernel for heads of K x V, and the key in it: the padded size that every program holds whole."""
    K, V = padded(K), padded(V)
    tables = GATED if is_gated else TABLES
    if half and K == V == 128:
        tables = GATED_HALF_128 if is_gated else HALF_128
    return tables[kernel], V if kernel in ("key", "query") else K


def choose(kernel: str, K: int, V: int, is_gated: bool, half: bool) -> Config:
    """The entry of a kernel for heads of K x V, its tile no wider than what is tiled."""
    table, whole = place(kernel, K, V, is_gated, half)
    config = table[whole]
    tiled = {"map": max(padded(K), padded(V)), "key": padded(K), "query": padded(K)}.get(kernel, padded(V))
    return config if config.tile <= tiled else replace(config, tile=tiled)


def group_block(G: int, most: int) -> int:
    """Query heads that a kernel takes at a time: the largest power of two that divides G, up to `most`."""
    return min(G & -G, most)


def segments(warps: int, T: int, step: int, multiprocessors: int) -> int:
    """Into how many pieces a sequence is cut so that programs of `warps` in all fill the card: eight on each
    multiprocessor; one where that would gain less than a factor of three."""
    wanted = round(8 * multiprocessors / max(warps, 1))
    return 1 if wanted < 3 else max(1, min(wanted, T // max(step, 256)))
