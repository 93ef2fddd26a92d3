"""Few long sequences: the affine map of every segment, and the scan that chains them (README.md, "Kernels")."""

# ruff: noqa: SIM102

import triton
import triton.language as tl

from .chunk import decay_row, load_decays, load_rows, mm, span, unit_operand, wide
from .forward import chunk_inverse, corrections, head_factor, written


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads"])
def map_kernel(
    k, v, beta, decays, start, offsets, maps, cu, shift, T, H, nseg, heads,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr,
    VARLEN: tl.constexpr, RETRY: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """S -> A S + B of every segment, A (K x K) into `maps` and B (K x V) into `offsets`, float32. Grid (documents * H *
    tiles, segments). A program walks BV columns of both, as A^T and B^T [BV, KP]: B is the state that starts from
    zero, A the one that starts from the identity and is written nothing; K K^T and the inverse serve both.
    `start` (the first state) and `shift` as in forward_kernel, whose RETRY launches this one joins."""
    NV: tl.constexpr = (VP + BV - 1) // BV
    TILES: tl.constexpr = NV if NV * BV > KP else KP // BV
    seg = tl.program_id(1)
    tile = tl.program_id(0) % TILES
    nh = tl.program_id(0) // TILES
    h = nh % H
    b, t0, t1 = span(nh // H, seg, nseg, cu, T, STEP, VARLEN)
    rk = tl.arange(0, KP)[None, :]
    rv = tile * BV + tl.arange(0, BV)[:, None]
    rc = tl.arange(0, C)
    factor = 1.0
    if RETRY:
        if tl.load(shift + nh) == 0:
            return
        factor = head_factor(v, start, nh, cu, T, H, heads, shift, V, K * V, BV, NV, C, TMA, VARLEN, FIND=True)
    At = tl.where(rv == rk, 1.0, 0.0)
    Bt = tl.zeros([BV, KP], tl.float32)
    none = tl.zeros([BV, C], tl.float32)
    row = (wide(b) * T) * H + h
    bc = tl.load(beta + row + (t0 + rc).to(tl.int64) * H, mask=t0 + rc < t1, other=0.0).to(tl.float32)
    a, total = 0.0, 0.0
    if GATED:
        decays += decay_row(nh // H, h, H, cu, T, C, VARLEN)[0]
        a, _aq, _first, total = load_decays(decays, t0, C, 1)
    for t in tl.range(t0, t1, C, num_stages=STAGES, disable_licm=True):
        after = t + C + rc
        b_next = tl.load(beta + row + after.to(tl.int64) * H, mask=after < t1, other=0.0)
        if GATED:
            a_next, _aq, _first, total_next = load_decays(decays, t + C, C, 1)
        k16 = unit_operand(load_rows(k, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False), NORM, DT)
        vt = tl.trans(load_rows(v, b, t, t1, T, h, H, tile * BV, 0, C, 1, 1, V, BV, TMA, False)).to(tl.float32)
        if RETRY:
            vt = vt * factor
        kt16 = tl.trans(k16)
        nDt16 = chunk_inverse(mm(k16, kt16), bc, a, C, GATED, DT)
        Ut = corrections(Bt.to(DT), vt, kt16, nDt16, a, GATED, DT).to(tl.float32) * bc[None, :]
        Bt = written(Bt, Ut, k16, a, total, GATED, DT)
        Ut = corrections(At.to(DT), none, kt16, nDt16, a, GATED, DT).to(tl.float32) * bc[None, :]
        At = written(At, Ut, k16, a, total, GATED, DT)
        if GATED:
            a, total = a_next, total_next
        bc = b_next.to(tl.float32)
    at = wide(nh) * nseg + seg
    tl.store(offsets + at * K * V + rk * V + rv, Bt / factor, mask=(rk < K) & (rv < V))
    tl.store(maps + at * K * K + rk * K + rv, At, mask=(rk < K) & (rv < K))


@triton.jit(do_not_specialize=["nseg"])
def scan_kernel(
    maps, offsets, first, states, last, shift, nseg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    RETRY: tl.constexpr,
):  # fmt: skip
    """states[0] = first (0 if None), states[s + 1] = A_s states[s] + B_s; what follows the last into `last`.
    REVERSE: from the last segment down, with A^T. Grid (documents * H * V tiles). Products in tf32x3.

    A map of more than 128 x 128 does not fit the shared memory: 32 of its columns at a time then, each times as many
    rows of the state, which are read back from where they were just stored."""
    NV: tl.constexpr = VP // BV
    KJ: tl.constexpr = KP if KP <= 128 else 32
    nh = (tl.program_id(0) // NV).to(tl.int64)
    if RETRY:
        if tl.load(shift + nh) == 0:
            return
    rv = ((tl.program_id(0) % NV) * BV + tl.arange(0, BV))[None, :]
    rk = tl.arange(0, KP)[:, None]
    rj = tl.arange(0, KJ)[None, :]
    at = rk * V + rv
    inside = (rk < K) & (rv < V)
    at_map = (rj * K + rk) if REVERSE else (rk * K + rj)
    rows = tl.arange(0, KJ)[:, None]
    S = tl.zeros([KP, BV], tl.float32)
    if first is not None:
        S = tl.load(first + nh * K * V + at, mask=inside, other=0.0)
    for i in tl.range(0, nseg):
        s = nseg - 1 - i if REVERSE else i
        tl.store(states + (nh * nseg + s) * K * V + at, S, mask=inside)
        B = tl.load(offsets + (nh * nseg + s) * K * V + at, mask=inside, other=0.0)
        if KJ == KP:
            A = tl.load(maps + (nh * nseg + s) * K * K + at_map, mask=(rk < K) & (rj < K), other=0.0)
            S = tl.dot(A, S, B, input_precision="tf32x3")
        else:
            tl.debug_barrier()  # what other threads stored of the state is read below
            for j in tl.range(0, KP, KJ):
                ahead = (j * K) if REVERSE else j
                A = tl.load(maps + (nh * nseg + s) * K * K + at_map + ahead, mask=(rk < K) & (rj + j < K), other=0.0)
                Z = tl.load(
                    states + (nh * nseg + s) * K * V + (rows + j) * V + rv, mask=(rows + j < K) & (rv < V), other=0.0
                )
                B = tl.dot(A, Z, B, input_precision="tf32x3")
            S = B
    if last is not None:
        tl.store(last + nh * K * V + at, S, mask=inside)
