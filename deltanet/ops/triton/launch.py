"""The host's side of the kernels: allocate, choose, launch. Plain functions; operator.py makes them operators.

Kernels read tensors through tensor maps where the card and the strides allow it (Hopper, rows of a multiple of 16
bytes, half precision), else through pointers. No function here looks at a value on the device.
"""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .backward import key_kernel, query_kernel, write_kernel
from .configs import (
    ANCHOR,
    CHUNK,
    DECAY_HEADS,
    INVERSE,
    LARGEST_WHOLE,
    Config,
    choose,
    gate_heads,
    group_block,
    padded,
    segments,
)  # fmt: skip
from .decode import step_kernel
from .forward import forward_kernel, inverse_kernel
from .gate import decay_kernel, gate_kernel, largest_kernel, unit_gradient_kernel
from .products import built
from .segments import map_kernel, scan_kernel


def ceil_div(a: int, b: int) -> int:  # triton's own is wrapped for kernels, which the host pays at every call
    return -(-a // b)


@cache
def card(device: torch.device) -> tuple[int, int]:
    """Compute capability (major) and multiprocessors; a stand-in where the interpreter plays the card."""
    if device.type != "cuda":
        return 9, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major, properties.multi_processor_count


@dataclass(frozen=True)
class Case:
    """What fixes the kernels and grids of one call, apart from data."""

    B: int
    T: int
    H: int
    G: int
    K: int
    V: int
    documents: int
    is_gated: bool
    is_packed: bool
    normalizes: bool
    half: bool
    tensor_maps: bool
    segments: int

    @property
    def step(self) -> int:
        return ANCHOR if self.is_gated else CHUNK

    @property
    def whole(self) -> bool:
        """One program of the backward owns a whole state."""
        return padded(self.K) * padded(self.V) <= LARGEST_WHOLE[self.half]

    def entry(self, kernel: str) -> Config:
        return choose(kernel, self.K, self.V, self.is_gated, self.half)

    @property
    def heads(self) -> int:
        return self.documents * self.H

    @property
    def num_decays(self) -> int:
        """Of chunk_decays."""
        chunks = self.T // CHUNK + self.documents if self.is_packed else self.B * ceil_div(self.T, CHUNK)
        return (chunks * self.H + 2) * CHUNK

    @cached_property
    def shape_flags(self) -> dict:
        return {
            "G": self.G,
            "K": self.K,
            "V": self.V,
            "KP": padded(self.K),
            "VP": padded(self.V),
            "C": CHUNK,
            "STEP": self.step,
            "TMA": self.tensor_maps,
            "TMA_OUT": self.tensor_maps and not self.is_packed,
            "GATED": self.is_gated,
            "NORM": self.normalizes,
            "VARLEN": self.is_packed,
            "DT": tl.float16 if self.half else tl.float32,
        }


def case(q, k, v, g, cu_seqlens, normalize: bool, num_segments: int | None = None) -> Case:
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    half = v.dtype != torch.float32
    major, multiprocessors = card(q.device)
    documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    if num_segments is None:
        config = choose("forward", K, V, g is not None, half)
        warps = documents * H * (padded(V) // config.tile) * config.num_warps
        step = CHUNK if g is None else ANCHOR
        # documents of a pack are cut alike, by their mean length
        num_segments = segments(warps, T // max(documents, 1), step, multiprocessors)
    aligned = K % 8 == 0 and V % 8 == 0 and all(x.storage_offset() % 8 == 0 for x in (q, k, v))
    return Case(
        B, T, H, HQ // H, K, V, documents, g is not None, cu_seqlens is not None, normalize, half,
        half and aligned and major >= 9, num_segments,
    )  # fmt: skip


def rows(c: Case, x: torch.Tensor | None, heads: int, width: int):
    """A (B, T, heads, size) tensor as the kernels read it: in boxes of CHUNK tokens, `heads` heads, `width` columns."""
    if x is None or not c.tensor_maps:
        return x
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, CHUNK, heads, width])


def written(c: Case, x: torch.Tensor | None, heads: int, width: int):
    """As `rows`, for a tensor that kernels write: a tensor map cannot stop at a document's end."""
    return x if c.is_packed else rows(c, x, heads, width)


def forward(c: Case, q, k, v, beta, g, initial_state, cu_seqlens, scale: float, save: bool):
    """o, final state, and for the backward x, shift, starts, maps, decays, adjoints, each None where not needed."""
    KP, VP = padded(c.K), padded(c.V)
    config = c.entry("forward")
    GB = group_block(c.G, config.group)
    BV = config.tile
    n = c.segments
    single = q.new_empty
    o = torch.empty(c.B, c.T, c.G * c.H, c.V, dtype=v.dtype, device=q.device)
    final = single(c.documents, c.H, c.K, c.V, dtype=torch.float32)
    x = torch.empty(v.shape, dtype=torch.float16 if c.half else torch.float32, device=q.device) if save else None
    shift = torch.zeros(2, c.heads, dtype=torch.int32, device=q.device)
    decays = chunk_decays(c, g, cu_seqlens)
    inverses, adjoints = chunk_inverses(c, k, beta, decays, cu_seqlens, save)
    maps = offsets = starts = None
    if n > 1:
        maps = single(c.heads, n, c.K, c.K, dtype=torch.float32)
        offsets = single(c.heads, n, c.K, c.V, dtype=torch.float32)
        starts = single(c.heads, n, c.K, c.V, dtype=torch.float32)
    inputs = [rows(c, q, GB, KP), rows(c, k, 1, KP), rows(c, v, 1, BV), beta, decays, inverses]
    outputs = [written(c, o, GB, BV), written(c, x, 1, BV)]
    flags = c.shape_flags | {"GB": GB, "BV": BV, "STAGES": config.stages, "num_warps": config.num_warps}
    sizes = (c.T, c.H, n, c.heads)
    for retry in range(2 if c.half else 1):
        if n > 1:
            segment_maps(c, k, v, beta, decays, initial_state, offsets, maps, cu_seqlens, shift, retry)
            scan(c, maps, offsets, initial_state, starts, None, shift, reverse=False, retry=retry)
        built(forward_kernel, config)[(c.heads * (VP // BV), n)](
            *inputs, *outputs, initial_state if n == 1 else starts, final, cu_seqlens, shift, scale, *sizes,
            RETRY=retry and (1 if n == 1 else 2), **flags,
        )  # fmt: skip
    return o, final, x, shift, starts, maps, decays, adjoints


def chunk_inverses(c: Case, k, beta, decays, cu_seqlens, save: bool):
    """Of all chunks, for the forward and, if `save`, for the backward, each None where its walk finds its own."""
    reads, saves = c.entry("forward").reads_inverse, save and c.entry("write").reads_inverse
    made = lambda: torch.empty(c.num_decays, CHUNK, dtype=torch.float16 if c.half else torch.float32, device=k.device)
    inverses, adjoints = made() if reads else None, made() if saves else None
    if reads or saves:
        flags = {key: value for key, value in c.shape_flags.items() if key not in ("G", "V", "VP", "STEP", "TMA_OUT")}
        mean_length = ceil_div(c.T, c.documents) if c.is_packed else c.T
        inverse_kernel[(c.heads, ceil_div(mean_length, CHUNK * INVERSE.tile))](
            rows(c, k, 1, padded(c.K)), beta, decays, inverses, adjoints, cu_seqlens, c.T, c.H,
            STAGES=INVERSE.stages, num_warps=INVERSE.num_warps, **flags,
        )  # fmt: skip
    return inverses, adjoints


def chunk_decays(c: Case, g, cu_seqlens):
    """Decays summed from the start of every chunk, in log2, or None without a gate."""
    if not c.is_gated:
        return None
    decays = torch.empty(c.num_decays, dtype=torch.float32, device=g.device)
    parts = min(ceil_div(c.T, ANCHOR), 64)
    decay_kernel[(c.documents * ceil_div(c.H, DECAY_HEADS), parts)](
        g, decays, cu_seqlens, c.T, c.H, BH=DECAY_HEADS, C=CHUNK, STEP=ANCHOR, VARLEN=c.is_packed, num_warps=4
    )
    return decays


def segment_maps(c: Case, k, v, beta, decays, initial_state, offsets, maps, cu_seqlens, shift, retry: int) -> None:
    KP, VP = padded(c.K), padded(c.V)
    config = c.entry("map")
    flags = {key: value for key, value in c.shape_flags.items() if key not in ("G", "TMA_OUT")}
    built(map_kernel, config)[(c.heads * (max(KP, VP) // config.tile), c.segments)](
        rows(c, k, 1, KP), rows(c, v, 1, config.tile), beta, decays, initial_state, offsets, maps, cu_seqlens, shift,
        c.T, c.H, c.segments, c.heads,
        BV=config.tile, STAGES=config.stages, RETRY=retry, num_warps=config.num_warps, **flags,
    )  # fmt: skip


def scan(c: Case, maps, offsets, first, states, last, shift, *, reverse: bool, retry: int) -> None:
    config = c.entry("scan")
    BV = config.tile
    built(scan_kernel, config)[(c.heads * (padded(c.V) // BV),)](
        maps, offsets, first, states, last, shift, c.segments,
        K=c.K, V=c.V, KP=padded(c.K), VP=padded(c.V), BV=BV, REVERSE=reverse, RETRY=retry, num_warps=config.num_warps,
    )  # fmt: skip


def largest(c: Case, do, dfinal, scale: float) -> torch.Tensor:
    """The largest |do| and |dfinal| / scale, as float32 bits."""
    out = torch.zeros(1, dtype=torch.int32, device=do.device)
    for x, factor in ((do, 1.0), (dfinal, 1.0 / abs(scale))):
        if x is not None:
            grid = (min(ceil_div(x.numel(), 2048), 8 * card(x.device)[1]),)
            largest_kernel[grid](x, factor, out, x.numel(), BLOCK=2048, num_warps=4)
    return out


def in_place_of(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The memory of x as another dtype of the same size, or memory of its own."""
    return x.view(dtype) if x.dtype.itemsize == dtype.itemsize else torch.empty_like(x, dtype=dtype)


def backward(
    c: Case, q, k, v, beta, g, x, shift, starts, maps, decays, adjoints, do, dfinal, cu_seqlens, scale: float,
    wants_initial: bool,
):  # fmt: skip
    """dq, dk, dv, dbeta, dg (None without a gate), dinitial (None unless wanted).

    Half-finished dk, and dR where one walk can finish dv, live in the memory of dk and dv."""
    KP, VP = padded(c.K), padded(c.V)
    n = c.segments
    B, T, H, heads = c.B, c.T, c.H, c.heads
    write, key, query = (c.entry(kernel) for kernel in ("write", "key", "query"))
    BV, BK = (VP, KP) if c.whole else (write.tile, query.tile)
    single = lambda *shape: torch.empty(shape, dtype=torch.float32, device=q.device)
    most = largest(c, do, dfinal, scale)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dk_half = in_place_of(dk, x.dtype)
    dr = in_place_of(dv, x.dtype) if c.whole else torch.empty_like(x)
    dbeta = single(VP // BV, B, T, H)
    dinitial = single(c.documents, H, c.K, c.V) if wants_initial else None
    part = B * T * H
    pairs = z = y = anchors = edges = None
    key_tiles = 1 if c.whole else KP // key.tile
    if c.is_gated:
        slots = T // ANCHOR + c.documents * n if c.is_packed else B * (T // ANCHOR + n)
        pairs, z, y = single(key_tiles, B, T, H), single(key_tiles, B, T, H), single(KP // BK, B, T, H)
        anchors, edges = single(slots, H, c.K, c.V), single(KP // BK, slots, H)
    edge_part = edges[0].numel() if c.is_gated else 0
    flags = c.shape_flags

    GB = group_block(c.G, write.group)
    writing = flags | {"GB": GB, "BV": BV, "STAGES": write.stages, "num_warps": write.num_warps}
    inputs = [rows(c, q, GB, KP), rows(c, k, 1, KP), rows(c, x, 1, BV), beta, decays, adjoints, rows(c, do, GB, BV)]
    sizes = (T, H, n, heads, part)
    dlast = dfinal
    if n > 1:
        offsets, dlast = single(heads, n, c.K, c.V), single(heads, n, c.K, c.V)
        built(write_kernel, write)[(heads * (VP // BV), n)](
            *inputs, *[None] * 8, offsets, cu_seqlens, shift, most, scale, *sizes,
            MAP=True, KEYS=False, **writing,
        )  # fmt: skip
        scan(c, maps, offsets, dfinal, dlast, None, shift, reverse=True, retry=0)
    built(write_kernel, write)[(heads * (VP // BV), n)](
        *inputs, dlast, None if c.whole else written(c, dv, 1, BV), written(c, dr, 1, BV), written(c, dk_half, 1, KP),
        dbeta, pairs, z, anchors, dinitial, cu_seqlens, shift, most, scale, *sizes,
        MAP=False, KEYS=c.whole, **writing,
    )  # fmt: skip
    if not c.whole:
        GB = group_block(c.G, key.group)
        built(key_kernel, key)[(heads * (KP // key.tile), n)](
            rows(c, q, GB, key.tile), rows(c, k, 1, key.tile), rows(c, k, 1, KP), rows(c, q, GB, KP),
            rows(c, x, 1, VP), beta, decays, rows(c, do, GB, VP), rows(c, dr, 1, VP), dlast,
            written(c, dk_half, 1, key.tile), pairs, z, anchors, cu_seqlens, most, scale, T, H, n, part,
            GB=GB, BK=key.tile, STAGES=key.stages, num_warps=key.num_warps, **flags,
        )  # fmt: skip
    GB = group_block(c.G, query.group)
    built(query_kernel, query)[(heads * (KP // BK), n)](
        rows(c, q, GB, BK), rows(c, k, 1, BK), rows(c, k, 1, KP), rows(c, q, GB, KP), rows(c, x, 1, VP), beta,
        decays, rows(c, do, GB, VP), rows(c, dr, 1, VP), starts, rows(c, dk_half, 1, BK), written(c, dq, GB, BK),
        written(c, dk, 1, BK), written(c, dv, 1, VP) if c.whole else None, y, anchors, edges, cu_seqlens, shift,
        most, scale, *sizes, edge_part,
        GB=GB, BK=BK, STAGES=query.stages, num_warps=query.num_warps, **flags,
    )  # fmt: skip
    if c.normalizes and KP != BK:
        for value, gradient in ((q, dq), (k, dk)):
            block = max(1, 4096 // KP)
            num_rows = value.numel() // c.K
            unit_gradient_kernel[(ceil_div(num_rows, block),)](
                value, gradient, num_rows, K=c.K, KP=KP, BLOCK=block, num_warps=4
            )
    dg = None
    if c.is_gated:
        dg = torch.empty_like(g)
        BH = gate_heads(c.K)
        parts = min(ceil_div(ceil_div(T, n), ANCHOR), 64)
        gate_kernel[(c.documents * ceil_div(H, BH), n, parts)](
            g, pairs, z, y, edges, dg, cu_seqlens, shift, most, scale, T, H, n, heads, part, edge_part,
            BH=BH, C=CHUNK, STEP=ANCHOR, PARTS=key_tiles, EDGES=KP // BK, VARLEN=c.is_packed,
            FORGOTTEN=-8.3 if c.half else -14.0, num_warps=4,
        )  # fmt: skip
    dbeta = dbeta[0] if dbeta.shape[0] == 1 else dbeta.sum(0)
    return dq, dk, dv, dbeta.to(beta.dtype), dg, dinitial


def step(q, k, v, beta, g, state, scale: float, normalize: bool) -> torch.Tensor:
    """o of a few tokens; `state` is updated in place."""
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    KP = padded(K)
    BV = min(max(16, 2048 // KP), padded(V))
    o = torch.empty(B, T, HQ, V, dtype=v.dtype, device=q.device)
    step_kernel[(B * H * ceil_div(V, BV),)](
        q, k, v, beta, g, o, state, scale, T, H,
        G=HQ // H, K=K, V=V, KP=KP, BV=BV, NORM=normalize, num_warps=2,
    )  # fmt: skip
    return o
