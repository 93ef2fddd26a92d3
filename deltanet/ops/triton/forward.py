"""Forward kernels: the chunk walk, and the scan that chains segments (README.md, "Kernels").

A chunk of C = 16 tokens that starts from S_0 (all decays g = 0 when there is no gate; a_i = g_1 + .. + g_i):

    N = tril*(K K^T o G)   G_ij = exp(a_i - a_j)   W = V - diag(e^a) K S_0   X = (I + N diag(b))^-1 W   U = diag(b) X
    O = scale (diag(e^a) Q S_0 + tril(Q K^T o G) U)             S_1 = e^{a_C} S_0 + K^T diag(e^{a_C - a}) U

X_t = v_t - (what the state held for k_t): kept for the backward, in place of v, U and W.
"""
# ruff: noqa: SIM102, SIM108

import triton
import triton.language as tl

from .chunk import (
    between,
    load_decays,
    load_rows,
    mm,
    mma,
    span,
    store_rows,
    unit_lower_inverse,
    unit_operand,
    wide,
)  # fmt: skip


@triton.jit
def power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def fitting_shift(
    v, start, nh, cu, T, H, V: tl.constexpr, STATE: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr, C: tl.constexpr,
    TMA: tl.constexpr, VARLEN: tl.constexpr,
):  # fmt: skip
    """The exponent of the power of two that brings the largest |v| and |S_0| of one head below 1."""
    h = nh % H
    b, t0, t1 = span(nh // H, 0, 1, cu, T, C, VARLEN)
    most = 0.0
    for t in tl.range(t0, t1, C):
        for i in tl.static_range(NV):
            values = load_rows(v, b, t, t1, T, h, H, i * BV, 0, C, 1, 1, V, BV, TMA, VARLEN).to(tl.float32)
            most = tl.maximum(most, tl.max(tl.max(tl.abs(values), 1), 0))
    if start is not None:
        for s in tl.range(0, STATE, 1024):
            at = s + tl.arange(0, 1024)
            values = tl.load(start + wide(nh) * STATE + at, mask=at < STATE, other=0.0)
            most = tl.maximum(most, tl.max(tl.abs(values), 0))
    exponent = (most.to(tl.int32, bitcast=True) >> 23) & 255
    return tl.minimum(tl.maximum(126 - exponent, -126), 0)


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads"])
def forward_kernel(
    q, k, v, beta, decays, o, x, start, final, maps, cu, shift, scale, T, H, nseg, heads,
    G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MAP: tl.constexpr,
    RETRY: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Grid (documents * H * tiles, segments). A program owns a tile of BV columns of one state, as S^T [BV, KP], and
    walks its segment chunk by chunk. Per token and head it reads q, k, v, beta, decays and writes o, and x unless None.

    MAP: no output; the affine map S -> A S + B of every segment instead: tiles of B (from a zero state) into `final`,
    then tiles of A (from the identity, v = 0) into `maps`.
    shift (2, heads): [0] is set where half precision overflowed; the RETRY launch runs those heads only, with v times
    2^shift[1], which is found (RETRY = 1) or read (2). Everything linear in v but o and `final` keeps that factor."""
    NV: tl.constexpr = VP // BV
    TILES: tl.constexpr = NV + (KP // BV if MAP else 0)
    seg = tl.program_id(1)
    tile = tl.program_id(0) % TILES
    nh = tl.program_id(0) // TILES
    h = nh % H
    b, t0, t1 = span(nh // H, seg, nseg, cu, T, STEP, VARLEN)
    is_map = tile >= NV
    i_v = tl.where(is_map, tile - NV, tile) if MAP else tile
    rk = tl.arange(0, KP)[None, :]
    rv = i_v * BV + tl.arange(0, BV)[:, None]
    rc = tl.arange(0, C)
    rq = tl.arange(0, C * GB) // GB
    at_state = (wide(nh) * nseg + seg) * K * V + rk * V + rv
    in_state = (rk < K) & (rv < V)
    factor = 1.0
    if RETRY:
        if tl.load(shift + nh) == 0:
            return
        if RETRY == 1:
            exponent = fitting_shift(v, start, nh, cu, T, H, V, K * V, BV, NV, C, TMA, VARLEN)
            tl.store(shift + heads + nh, exponent)
        else:
            exponent = tl.load(shift + heads + nh)
        factor = power_of_two(exponent)
    St = tl.zeros([BV, KP], tl.float32)
    if MAP:
        St = tl.where(is_map & (rv == rk), 1.0, St)
    elif start is not None:
        St = tl.load(start + at_state, mask=in_state, other=0.0) * factor
    row = (wide(b) * T) * H + h
    bc = tl.load(beta + row + (t0 + rc).to(tl.int64) * H, mask=t0 + rc < t1, other=0.0).to(tl.float32)
    if GATED:
        a, aq, _first, total = load_decays(decays, row, t0, t0, t1, H, C, GB)
    for t in tl.range(t0, t1, C, num_stages=STAGES, disable_licm=True):
        after = t + C + rc
        b_next = tl.load(beta + row + after.to(tl.int64) * H, mask=after < t1, other=0.0)
        if GATED:
            a_next, aq_next, _first, total_next = load_decays(decays, row, t + C, t0, t1, H, C, GB)
        k16 = unit_operand(load_rows(k, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False), NORM, DT)
        vt = tl.trans(load_rows(v, b, t, t1, T, h, H, tl.where(is_map, 0, i_v * BV), 0, C, 1, 1, V, BV, TMA, False))
        vt = vt.to(tl.float32)
        if RETRY:
            vt = vt * factor
        if MAP:
            vt = tl.where(is_map, 0.0, vt)
        kt16 = tl.trans(k16)
        N = mm(k16, kt16)
        if GATED:
            N = N * between(a, a)
        D, _ = unit_lower_inverse(-N * bc[None, :], -N * bc[:, None], C, True, False, DT)
        nDt16 = tl.trans(-D).to(DT)
        S16 = St.to(DT)
        if GATED:
            nW = mm(S16, kt16) * tl.exp(a)[None, :] - vt
        else:
            nW = mma(S16, kt16, -vt)
        X16 = mm(nW.to(DT), nDt16).to(DT)
        Ut = X16.to(tl.float32) * bc[None, :]
        U16 = Ut.to(DT)
        if not MAP:
            for sub in tl.static_range(G // GB):
                q16 = unit_operand(load_rows(q, b, t, t1, T, h, H, 0, sub, C, G, GB, K, KP, TMA, False), NORM, DT)
                P = tl.where(rq[:, None] >= rc[None, :], mm(q16, kt16) * scale, 0.0)
                Ot = mm(S16, tl.trans(q16))
                if GATED:
                    P = P * between(aq, a)
                    Ot = Ot * (tl.exp(aq) * scale)[None, :]
                else:
                    Ot = Ot * scale
                Ot = mma(U16, tl.trans(P).to(DT), Ot)
                if RETRY:
                    Ot = Ot / factor
                store_rows(o, tl.trans(Ot), b, t, t1, T, h, H, i_v * BV, sub, C, G, GB, V, BV, TMA_OUT)
        if x is not None:
            store_rows(x, tl.trans(X16), b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA_OUT)
        if GATED:
            U16 = (Ut * tl.exp(total - a)[None, :]).to(DT)
            St = St * tl.exp(total)
            a, aq, total = a_next, aq_next, total_next
        St = mma(U16, k16, St)
        bc = b_next.to(tl.float32)
    if MAP:
        square = (wide(nh) * nseg + seg) * K * K + rk * K + rv
        tl.store(maps + square, St, mask=(rk < K) & (rv < K) & is_map)
        tl.store(final + at_state, St / factor, mask=in_state & (tile < NV))
    else:
        if seg == nseg - 1:
            tl.store(final + wide(nh) * K * V + rk * V + rv, St / factor, mask=in_state)
        if RETRY == 0 and tl.float16 == DT:
            # what overflowed stays in the state and fails the comparison; 4096 leaves room for gradients
            fits = tl.min(tl.min(tl.where(tl.abs(St) < 4096.0, 1, 0), 1), 0)
            if fits == 0:
                tl.store(shift + nh, 1)


@triton.jit(do_not_specialize=["nseg"])
def scan_kernel(
    maps, offsets, first, states, last, shift, nseg,
    K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, BV: tl.constexpr, REVERSE: tl.constexpr,
    RETRY: tl.constexpr,
):  # fmt: skip
    """states[0] = first (0 if None), states[s + 1] = A_s states[s] + B_s; what follows the last into `last`.
    REVERSE: from the last segment down, with A^T. Grid (documents * H * V tiles). Products in tf32x3."""
    NV: tl.constexpr = VP // BV
    nh = (tl.program_id(0) // NV).to(tl.int64)
    if RETRY:
        if tl.load(shift + nh) == 0:
            return
    rv = ((tl.program_id(0) % NV) * BV + tl.arange(0, BV))[None, :]
    rk = tl.arange(0, KP)[:, None]
    rj = tl.arange(0, KP)[None, :]
    at = rk * V + rv
    inside = (rk < K) & (rv < V)
    at_map = (rj * K + rk) if REVERSE else (rk * K + rj)
    S = tl.zeros([KP, BV], tl.float32)
    if first is not None:
        S = tl.load(first + nh * K * V + at, mask=inside, other=0.0)
    for i in tl.range(0, nseg):
        s = nseg - 1 - i if REVERSE else i
        tl.store(states + (nh * nseg + s) * K * V + at, S, mask=inside)
        A = tl.load(maps + (nh * nseg + s) * K * K + at_map, mask=(rk < K) & (rj < K), other=0.0)
        B = tl.load(offsets + (nh * nseg + s) * K * V + at, mask=inside, other=0.0)
        S = tl.dot(A, S, B, input_precision="tf32x3")
    if last is not None:
        tl.store(last + nh * K * V + at, S, mask=inside)
