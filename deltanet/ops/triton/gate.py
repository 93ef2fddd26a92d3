"""The gradient of the log decays, from what the walks left behind, and two small kernels around the backward.

    dg_t = (pairs j < t <= i inside the chunk) + sum_{j < t} z_j + sum_{i >= t} y_i + c        c = e^{a_C} <dS_1, S_0>

y_i and z_j are what token i reads of S_0 and what token j leaves in dS_1. No walk holds both states, but with
E = <S_0, dS_0> a chunk's  c = E - sum y  and the next chunk's E = c + sum z, from an exact E every STEP tokens. Where a
chunk keeps less of its state than the operands' rounding (a_C < FORGOTTEN), c is taken as 0: it would be noise.
"""

import triton
import triton.language as tl

from .backward import anchor_slot, loss_scale
from .chunk import decay_row, span, wide
from .forward import power_of_two

LOWEST_DECAY = tl.constexpr(-80.0)
"""As in ../chunk.py: exp of it is below every rounding error, and sums of 16 stay exact enough."""
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["T", "H"])
def decay_kernel(
    g, decays, cu, T, H, BH: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, VARLEN: tl.constexpr
):  # fmt: skip
    """Log decays summed from the start of every chunk, in log2: the card has an instruction for powers of two. Grid
    (documents * blocks of BH heads, parts): part p takes every so many-th STEP tokens. Chunks count from the document's
    start, as in the walks, whose segments are whole STEPs; `decays` has rows of tokens (decay_row), not of heads, so
    that a walk reads neighbours."""
    blocks = tl.cdiv(H, BH)
    n = tl.program_id(0) // blocks
    b, t0, t1 = span(n, 0, 1, cu, T, STEP, VARLEN)
    h = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)[None, None, :]
    row, padded = decay_row(n, h, H, cu, T, C, VARLEN)
    token = tl.arange(0, STEP // C)[:, None, None] * C + tl.arange(0, C)[None, :, None]
    for t in tl.range(t0 + tl.program_id(1) * STEP, t1, tl.num_programs(1) * STEP):
        inside = (t + token < t1) & (h < H)
        at = (wide(b) * T + t + token) * H + h
        sums = tl.cumsum(tl.maximum(tl.load(g + at, mask=inside, other=0.0).to(tl.float32), LOWEST_DECAY), 1)
        tl.store(decays + row + t + token, sums * LOG2_E, mask=(t - t0 + token < padded) & (h < H))


@triton.jit
def chain(keep_1, add_1, keep_2, add_2):
    """E -> keep E + add, the second after the first."""
    return keep_1 * keep_2, add_1 * keep_2 + add_2


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads", "part", "edge_part"])
def gate_kernel(
    g, pairs, z, y, edges, dg, cu, shift, largest, scale, T, H, nseg, heads, part, edge_part,
    BH: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr, EDGES: tl.constexpr,
    VARLEN: tl.constexpr, FORGOTTEN: tl.constexpr,
):  # fmt: skip
    """Grid (documents * blocks of BH heads, segments, parts): part p takes every so many-th STEP tokens of a segment.
    Tiles are [chunks, C, BH]. pairs and z come in PARTS parts, y and edges in EDGES."""
    blocks = tl.cdiv(H, BH)
    seg = tl.program_id(1)
    n = tl.program_id(0) // blocks
    b, t0, t1 = span(n, seg, nseg, cu, T, STEP, VARLEN)
    h = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    exists = h < H
    restore = scale / loss_scale(largest) / power_of_two(tl.load(shift + heads + n * H + h, mask=exists, other=0))
    slot = anchor_slot(n, seg, nseg, t0, T, cu, STEP, VARLEN)
    rc = tl.arange(0, C)[None, :, None]
    token = tl.arange(0, STEP // C)[:, None, None] * C + rc
    for t in tl.range(t0 + tl.program_id(2) * STEP, t1, tl.num_programs(2) * STEP):
        inside = (t + token < t1) & exists[None, None, :]
        at = (wide(b) * T + t + token) * H + h[None, None, :]
        decay = tl.sum(tl.maximum(tl.load(g + at, mask=inside, other=0.0).to(tl.float32), LOWEST_DECAY), 1)
        near = tl.zeros([STEP // C, C, BH], tl.float32)
        before = tl.zeros([STEP // C, C, BH], tl.float32)
        read = tl.zeros([STEP // C, C, BH], tl.float32)
        sum_left = tl.zeros([STEP // C, BH], tl.float32)
        edge = tl.zeros([BH], tl.float32)
        for i in tl.static_range(PARTS):
            left = z + i * wide(part) + at
            near += tl.load(pairs + i * wide(part) + at, mask=inside, other=0.0)
            before += tl.load(left - H, mask=inside & (rc > 0), other=0.0)
            sum_left += tl.sum(tl.load(left, mask=inside, other=0.0), 1)
        for i in tl.static_range(EDGES):
            read += tl.load(y + i * wide(part) + at, mask=inside, other=0.0)
            at_edge = i * wide(edge_part) + (slot + (t - t0) // STEP) * H + h
            edge += tl.load(edges + at_edge, mask=exists, other=0.0)
        keep = tl.where(decay > FORGOTTEN, 1.0, 0.0)
        kept, added = tl.associative_scan((keep, sum_left - keep * tl.sum(read, 1)), 0, chain)
        carried = keep * (kept * edge[None, :] + added - sum_left)
        near += tl.cumsum(before, 1) + tl.cumsum(read, 1, reverse=True) + carried[:, None, :]
        tl.store(dg + at, (near * restore[None, None, :]).to(dg.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["N"])
def largest_kernel(x, factor, out, N, BLOCK: tl.constexpr):
    """out = max(out, factor * max |x|) as float32 bits, which order like integers; exact in any order."""
    largest = tl.zeros([BLOCK], tl.float32)
    for at in tl.range(tl.program_id(0).to(tl.int64) * BLOCK, N, tl.num_programs(0) * BLOCK, num_stages=4):
        r = at + tl.arange(0, BLOCK)
        largest = tl.maximum(largest, tl.abs(tl.load(x + r, mask=r < N, other=0.0).to(tl.float32)))
    tl.atomic_max(out, (tl.max(largest, axis=0) * factor).to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["rows"])
def unit_gradient_kernel(x, dx, rows, K: tl.constexpr, KP: tl.constexpr, BLOCK: tl.constexpr):
    """In place, the gradient of x from that of x / |x|: (dx - y (y . dx)) / |x| with y = x / |x|. Rows [rows, K]."""
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, KP)
    at = r[:, None] * K + d[None, :]
    inside = (r < rows)[:, None] & (d < K)[None, :]
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    gradient = tl.load(dx + at, mask=inside, other=0.0).to(tl.float32)
    length = tl.rsqrt(tl.sum(values * values, 1) + 1e-6)[:, None]
    values = values * length
    gradient = (gradient - values * tl.sum(values * gradient, 1)[:, None]) * length
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=inside)
