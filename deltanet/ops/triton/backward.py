"""Backward kernels: three walks over the chunks, each with one state in registers (README.md, "Kernels").

Given dO and the gradient dS_1 of a chunk's last state (names as in forward.py; e_i = exp(a_C - a_i)):

    dU = (tril(Q K^T o G))^T dO + diag(e) K dS_1        dR = (I + diag(b) N)^-T dU        dW = dV = diag(b) dR
    dP = tril(dO U^T) o G                               Z  = -tril*(dW U^T) o G           db_i = dR_i . X_i
    dQ = diag(e^a) dO S_0^T + dP K
    dK = -diag(e^a) dW S_0^T + diag(e) U dS_1^T + (Z + Z^T) K + dP^T Q
    dS_0 = e^{a_C} dS_1 + Q^T diag(e^a) dO - K^T diag(e^a) dW

Gradients are computed divided by `scale` and multiplied by a power of two that brings the largest |dO| near 1/4.
With a gate the walks carry dS / e^{a_1} and owe it that factor, so that strong decays do not underflow.
No sums across programs anywhere, so two runs agree bit for bit.
"""

import triton
import triton.language as tl

from .chunk import (
    between,
    decay_row,
    inverse_length,
    load_decays,
    load_rows,
    load_square,
    mm,
    mma,
    operand,
    span,
    store_rows,
    unit_operand,
    wide,
)  # fmt: skip
from .forward import chunk_adjoint, power_of_two

HEADROOM = tl.constexpr(2.0**-6)
"""Half-finished key gradients are kept in half precision times this, so that large values do not overflow."""


@triton.jit
def loss_scale(largest):
    """The power of two that brings the largest |dO| into [1/4, 1/2), from its exponent bits."""
    exponent = tl.minimum(tl.maximum(tl.load(largest) >> 23, 1), 251)
    return ((252 - exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def spanned(Xt, rq, rc, DT: tl.constexpr):
    """For every token t, the sum of Xt[j, i] over j < t <= i: what the decay at t scales. Xt [C, C*GB]."""
    upto = tl.where(rq[:, None] >= rc[None, :], 1.0, 0.0)
    sums = tl.dot(Xt, upto, input_precision="tf32x3" if tl.float32 == DT else "tf32")
    return tl.sum(tl.where(rc[:, None] < rc[None, :], sums, 0.0), 0)


@triton.jit
def through_length(dYt, yt, inverse):
    """The gradient of x from that of y = x / |x|, columns: (dY - y (y . dY)) / |x|."""
    yt = yt.to(tl.float32)
    return (dYt - yt * tl.sum(dYt * yt, 0)[None, :]) * inverse[None, :]


@triton.jit
def query_rows(
    q, do, b, t, t1, T, h, H, at_v, sub, amplify,
    C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, TMA: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Q [C*GB, K] and dO^T [V, C*GB] of GB heads, as operands."""
    q_rows = load_rows(q, b, t, t1, T, h, H, 0, sub, C, G, GB, K, KP, TMA, False)
    do_rows = load_rows(do, b, t, t1, T, h, H, at_v, sub, C, G, GB, V, BV, TMA, VARLEN)
    return unit_operand(q_rows, NORM, DT), tl.trans(operand(do_rows * amplify.to(do_rows.dtype), DT))


@triton.jit
def key_from_queries(dKt, gate, Pt, xt, dot, qt, bc, between_t, rq, rc, C: tl.constexpr, GATED: tl.constexpr):
    """Adds dP^T Q to dK^T [K, C], and the pairs' part of dg; Pt [C, C*GB] masked, decayed; xt, dot [V, .]."""
    dPt = tl.where(rq[None, :] >= rc[:, None], mm(tl.trans(xt), dot) * bc[:, None], 0.0)
    if GATED:
        gate += spanned(Pt * dPt, rq, rc, qt.dtype)
        dPt = dPt * between_t
    return mma(qt, tl.trans(dPt).to(qt.dtype), dKt), gate


@triton.jit
def key_from_keys(dKt, gate, kk, xt, dRt, kt, bc, gamma, rc, C: tl.constexpr, GATED: tl.constexpr):
    """Adds (Z + Z^T) K to dK^T [K, C], and the pairs' part of dg; xt and dRt [V, C]. Also dR_i . X_i: dbeta."""
    i = rc[:, None]
    j = rc[None, :]
    M = mm(tl.trans(dRt), xt)
    dbeta = tl.sum(tl.where(i == j, M, 0.0), 1)
    Z = tl.where(i > j, M, 0.0)
    Z += tl.trans(Z)
    Z = Z * (bc[:, None] * -bc[None, :])
    if GATED:
        Z = Z * gamma
        gate += spanned(tl.where(j > i, Z * kk, 0.0), rc, rc, kt.dtype)
    return mma(kt, Z.to(kt.dtype), dKt), gate, dbeta


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads", "part"])
def write_kernel(
    q, k, x, beta, decays, adjoints, do, dlast, dv, dr, dk, dbeta, dgate, dz, anchors, dfirst, cu, shift, largest,
    scale, T, H, nseg, heads, part,
    G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, MAP: tl.constexpr,
    KEYS: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Walk 1, from the last chunk to the first, dS^T [BV, KP] in registers. Grid (documents * H * V tiles, segments).

    Reads q, k, x, beta, decays, adjoints (found here if None), do; writes dv and dr (dR, an operand of the other
    walks) unless None, and per V tile a part of dbeta; at a segment's start dS into `dfirst`.
    KEYS (one V tile): also what dS and the C x C matrices give of dk, unscaled into `dk`; with GATED, their parts of
    dg (`dgate`, `dz`), and dS every STEP tokens (`anchors`).
    MAP: only the offset of a segment's reverse map dS -> A^T dS + B, from zero, into `dfirst`."""
    NV: tl.constexpr = VP // BV
    seg = tl.program_id(1)
    i_v = tl.program_id(0) % NV
    nh = tl.program_id(0) // NV
    h = nh % H
    b, t0, t1 = span(nh // H, seg, nseg, cu, T, STEP, VARLEN)
    rk = tl.arange(0, KP)[None, :]
    rv = i_v * BV + tl.arange(0, BV)[:, None]
    rc = tl.arange(0, C)
    rq = tl.arange(0, C * GB) // GB
    i = rc[:, None]
    at_state = (wide(nh) * nseg + seg) * K * V + rk * V + rv
    in_state = (rk < K) & (rv < V)
    amplify = loss_scale(largest)
    restore = scale / amplify
    dSt = tl.zeros([BV, KP], tl.float32)
    if dlast is not None:
        dSt = tl.load(dlast + at_state, mask=in_state, other=0.0) / restore
    row = (wide(b) * T) * H + h
    factor = power_of_two(tl.load(shift + heads + nh))
    owed = 1.0
    chunks = tl.cdiv(t1 - t0, C)
    tc = t0 + (chunks - 1) * C + rc
    bc = tl.load(beta + row + tc.to(tl.int64) * H, mask=(tc >= t0) & (tc < t1), other=0.0).to(tl.float32)
    first, _padded = decay_row(nh // H, h, H, cu, T, C, VARLEN)
    if adjoints is not None:
        adjoints += first * C
    if GATED:
        decays += first
        a, aq, a_first, total = load_decays(decays, t0 + (chunks - 1) * C, C, GB)
    for n in tl.range(0, chunks, 1, num_stages=STAGES, disable_licm=True):
        t = t0 + (chunks - 1 - n) * C
        before = t - C + rc
        b_next = tl.load(beta + row + before.to(tl.int64) * H, mask=before >= t0, other=0.0)
        if GATED:
            a_next, aq_next, first_next, total_next = load_decays(decays, t - C, C, GB)
        k16 = unit_operand(load_rows(k, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False), NORM, DT)
        if not MAP:
            xt = tl.trans(load_rows(x, b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA, False))
        kt16 = tl.trans(k16)
        kk, gamma = 1.0, 1.0
        if GATED:
            to_end = tl.exp2(total - a) * owed
        if adjoints is None or KEYS:
            kk = mm(k16, kt16)
            if GATED:
                gamma = between(a, a)
        if adjoints is None:
            D16 = chunk_adjoint(kk, bc, a if GATED else 0.0, C, GATED, DT)
        else:
            D16 = load_square(adjoints, t, C)
        dS16 = dSt.to(DT)
        if GATED:
            dU = mm(dS16, kt16) * to_end[None, :]
            dSt = dSt * (owed * tl.exp2(total - a_first))
        else:
            dU = mm(dS16, kt16)
        for sub in tl.static_range(G // GB):
            q16, dot16 = query_rows(
                q, do, b, t, t1, T, h, H, i_v * BV, sub, amplify, C, G, GB, K, KP, V, BV, TMA, NORM, VARLEN, DT
            )
            Pt = tl.where(rq[None, :] >= i, mm(k16, tl.trans(q16)), 0.0)
            if GATED:
                Pt = Pt * between(a, aq)
            dU = mma(dot16, tl.trans(Pt).to(DT), dU)
            if GATED:
                dSt = mma((dot16.to(tl.float32) * tl.exp2(aq - a_first)[None, :]).to(DT), q16, dSt)
            else:
                dSt = mma(dot16, q16, dSt)
        dR = mm(dU.to(DT), D16)
        dW = dR * bc[None, :]
        if GATED:
            dSt = mma((dW * -tl.exp2(a - a_first)[None, :]).to(DT), k16, dSt)
            owed = tl.exp2(a_first)
        else:
            dSt = mma((-dW).to(DT), k16, dSt)
        if not MAP:
            token = row + (t + rc).to(tl.int64) * H
            inside = t + rc < t1
            if dv is not None:
                store_rows(dv, tl.trans(dW * restore), b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA_OUT)
            if dr is not None:
                store_rows(dr, tl.trans(dR.to(DT)), b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA_OUT)
            if not KEYS:
                dbeta_c = tl.sum(dR * xt.to(tl.float32), 0)
        if KEYS:
            dR16 = dR.to(DT)
            dKt = mm(tl.trans(dS16), xt) * (bc * to_end if GATED else bc)[None, :]
            gate = tl.zeros([C], tl.float32)
            if GATED:
                z = tl.sum(dKt * kt16.to(tl.float32), 0)
            for sub in tl.static_range(G // GB):
                if G != GB:
                    q16, dot16 = query_rows(
                        q, do, b, t, t1, T, h, H, i_v * BV, sub, amplify, C, G, GB, K, KP, V, BV, TMA, NORM, VARLEN, DT
                    )
                    if GATED:
                        Pt = tl.where(rq[None, :] >= i, mm(k16, tl.trans(q16)), 0.0) * between(a, aq)
                lasting = between(a, aq) if GATED else 1.0
                dKt, gate = key_from_queries(dKt, gate, Pt, xt, dot16, tl.trans(q16), bc, lasting, rq, rc, C, GATED)
            dKt, gate, dbeta_c = key_from_keys(dKt, gate, kk, xt, dR16, kt16, bc, gamma, rc, C, GATED)
            store_rows(dk, tl.trans(dKt * HEADROOM), b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA_OUT)
            if GATED:
                tl.store(dz + token, z, mask=inside)
                tl.store(dgate + token, gate, mask=inside)
                if (chunks - 1 - n) % (STEP // C) == 0:
                    slot = anchor_slot(nh // H, seg, nseg, t0, T, cu, STEP, VARLEN) + (t - t0) // STEP
                    tl.store(anchors + (slot * H + h) * K * V + rk * V + rv, dSt * owed, mask=in_state)
        if not MAP:
            tl.store(dbeta + wide(i_v) * part + token, dbeta_c * (restore / factor), mask=inside)
        bc = b_next.to(tl.float32)
        if GATED:
            a, aq, a_first, total = a_next, aq_next, first_next, total_next
    if MAP:
        tl.store(dfirst + at_state, dSt * (owed * restore), mask=in_state)
    elif dfirst is not None and seg == 0:
        tl.store(dfirst + wide(nh) * K * V + rk * V + rv, dSt * (owed * restore), mask=in_state)


@triton.jit
def anchor_slot(n, seg, nseg, t0, T, cu, STEP: tl.constexpr, VARLEN: tl.constexpr):
    """Where the states kept every STEP tokens of a segment of document n begin: disjoint for all of them."""
    if VARLEN:
        return t0 // STEP + wide(n) * nseg + seg
    else:
        return wide(n) * (T // STEP + nseg) + t0 // STEP + seg


@triton.jit(do_not_specialize=["T", "H", "nseg", "part"])
def key_kernel(
    q, k, k_full, q_full, x, beta, decays, do, dr, dlast, dk, dgate, dz, anchors, cu, largest, scale, T, H, nseg, part,
    G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """Walk 2, where write_kernel does not own whole heads: from the last chunk to the first, dS [BK, VP] in registers.
    Grid (documents * H * K tiles, segments). Reads all of write_kernel's and dr; writes what its KEYS writes, `dgate`
    and `dz` as one part per K tile."""
    NK: tl.constexpr = KP // BK
    seg = tl.program_id(1)
    i_k = tl.program_id(0) % NK
    nh = tl.program_id(0) // NK
    h = nh % H
    b, t0, t1 = span(nh // H, seg, nseg, cu, T, STEP, VARLEN)
    rk = i_k * BK + tl.arange(0, BK)[:, None]
    rv = tl.arange(0, VP)[None, :]
    rc = tl.arange(0, C)
    rq = tl.arange(0, C * GB) // GB
    in_state = (rk < K) & (rv < V)
    amplify = loss_scale(largest)
    dS = tl.zeros([BK, VP], tl.float32)
    if dlast is not None:
        dS = tl.load(dlast + (wide(nh) * nseg + seg) * K * V + rk * V + rv, mask=in_state, other=0.0)
        dS = dS / (scale / amplify)
    row = (wide(b) * T) * H + h
    owed = 1.0
    chunks = tl.cdiv(t1 - t0, C)
    tc = t0 + (chunks - 1) * C + rc
    bc = tl.load(beta + row + tc.to(tl.int64) * H, mask=(tc >= t0) & (tc < t1), other=0.0).to(tl.float32)
    if GATED:
        decays += decay_row(nh // H, h, H, cu, T, C, VARLEN)[0]
        a, aq, a_first, total = load_decays(decays, t0 + (chunks - 1) * C, C, GB)
    for n in tl.range(0, chunks, 1, num_stages=STAGES, disable_licm=True):
        t = t0 + (chunks - 1 - n) * C
        before = t - C + rc
        b_next = tl.load(beta + row + before.to(tl.int64) * H, mask=before >= t0, other=0.0)
        if GATED:
            a_next, aq_next, first_next, total_next = load_decays(decays, t - C, C, GB)
        k_rows = load_rows(k, b, t, t1, T, h, H, i_k * BK, 0, C, 1, 1, K, BK, TMA, False)
        k16 = operand(k_rows, DT)
        if NORM:
            k_length = inverse_length(load_rows(k_full, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False))
            k16 = (k_rows.to(tl.float32) * k_length[:, None]).to(DT)
        xt = tl.trans(load_rows(x, b, t, t1, T, h, H, 0, 0, C, 1, 1, V, VP, TMA, False))
        dr16 = load_rows(dr, b, t, t1, T, h, H, 0, 0, C, 1, 1, V, VP, TMA, VARLEN)
        kt16 = tl.trans(k16)
        gate = tl.zeros([C], tl.float32)
        dKt = mm(dS.to(DT), xt)
        gamma = 1.0
        kk = 1.0
        if GATED:
            gamma = between(a, a)
            kk = mm(k16, kt16)
            dKt = dKt * (bc * tl.exp2(total - a) * owed)[None, :]
            z = tl.sum(dKt * kt16.to(tl.float32), 0)
            dS = dS * (owed * tl.exp2(total - a_first))
            kt_left = (kt16.to(tl.float32) * (bc * -tl.exp2(a - a_first))[None, :]).to(DT)
            owed = tl.exp2(a_first)
        else:
            dKt = dKt * bc[None, :]
            kt_left = (kt16.to(tl.float32) * -bc[None, :]).to(DT)
        for sub in tl.static_range(G // GB):
            q_rows = load_rows(q, b, t, t1, T, h, H, i_k * BK, sub, C, G, GB, K, BK, TMA, False)
            q16 = operand(q_rows, DT)
            if NORM:
                q_wide = load_rows(q_full, b, t, t1, T, h, H, 0, sub, C, G, GB, K, KP, TMA, False)
                q16 = (q_rows.to(tl.float32) * inverse_length(q_wide)[:, None]).to(DT)
            do_rows = load_rows(do, b, t, t1, T, h, H, 0, sub, C, G, GB, V, VP, TMA, VARLEN)
            do16 = operand(do_rows * amplify.to(do_rows.dtype), DT)
            qt16 = tl.trans(q16)
            lasting = 1.0
            Pt = 1.0
            qt_left = qt16
            if GATED:
                lasting = between(a, aq)
                Pt = mm(k16, qt16) * lasting
                qt_left = (qt16.to(tl.float32) * tl.exp2(aq - a_first)[None, :]).to(DT)
            dKt, gate = key_from_queries(dKt, gate, Pt, xt, tl.trans(do16), qt16, bc, lasting, rq, rc, C, GATED)
            dS = mma(qt_left, do16, dS)
        dKt, gate, _ = key_from_keys(dKt, gate, kk, xt, tl.trans(dr16), kt16, bc, gamma, rc, C, GATED)
        store_rows(dk, tl.trans(dKt * HEADROOM), b, t, t1, T, h, H, i_k * BK, 0, C, 1, 1, K, BK, TMA_OUT)
        dS = mma(kt_left, dr16, dS)
        if GATED:
            at_part = wide(i_k) * part + row + (t + rc).to(tl.int64) * H
            tl.store(dz + at_part, z, mask=t + rc < t1)
            tl.store(dgate + at_part, gate, mask=t + rc < t1)
            if (chunks - 1 - n) % (STEP // C) == 0:
                slot = anchor_slot(nh // H, seg, nseg, t0, T, cu, STEP, VARLEN) + (t - t0) // STEP
                tl.store(anchors + (slot * H + h) * K * V + rk * V + rv, dS * owed, mask=in_state)
            a, aq, a_first, total = a_next, aq_next, first_next, total_next
        bc = b_next.to(tl.float32)


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads", "part", "edge_part"])
def query_kernel(
    q, k, k_full, q_full, x, beta, decays, do, dr, start, dk_half, dq, dk, dv, dy, anchors, edges, cu, shift, largest,
    scale,
    T, H, nseg, heads, part, edge_part,
    G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BK: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """The last walk, from the first chunk to the last, S [BK, VP] in registers, built again from `start`. Grid
    (documents * H * K tiles, segments). Reads k, x, beta, do, dr, dk_half (q, decays if GATED); writes dq, dk,
    and dv unless None.
    GATED: per K tile, S's part of dg (`dy`), and <S, dS> every STEP tokens (`edges`).
    NORM: where one tile holds whole rows, the gradients are those of q and k before they were brought to length one."""
    NK: tl.constexpr = KP // BK
    seg = tl.program_id(1)
    i_k = tl.program_id(0) % NK
    nh = tl.program_id(0) // NK
    h = nh % H
    b, t0, t1 = span(nh // H, seg, nseg, cu, T, STEP, VARLEN)
    rk = i_k * BK + tl.arange(0, BK)[:, None]
    rv = tl.arange(0, VP)[None, :]
    rc = tl.arange(0, C)
    rq = tl.arange(0, C * GB) // GB
    in_state = (rk < K) & (rv < V)
    amplify = loss_scale(largest)
    restore = scale / amplify
    S = tl.zeros([BK, VP], tl.float32)
    if start is not None:
        S = tl.load(start + (wide(nh) * nseg + seg) * K * V + rk * V + rv, mask=in_state, other=0.0)
    factor = power_of_two(tl.load(shift + heads + nh))
    S = S * factor
    restore_v = restore
    restore = restore / factor
    row = (wide(b) * T) * H + h
    bc = tl.load(beta + row + (t0 + rc).to(tl.int64) * H, mask=t0 + rc < t1, other=0.0).to(tl.float32)
    if GATED:
        decays += decay_row(nh // H, h, H, cu, T, C, VARLEN)[0]
        a, aq, _first, total = load_decays(decays, t0, C, GB)
    for t in tl.range(t0, t1, C, num_stages=STAGES, disable_licm=True):
        after = t + C + rc
        b_next = tl.load(beta + row + after.to(tl.int64) * H, mask=after < t1, other=0.0)
        if GATED:
            a_next, aq_next, _first, total_next = load_decays(decays, t + C, C, GB)
        k_rows = load_rows(k, b, t, t1, T, h, H, i_k * BK, 0, C, 1, 1, K, BK, TMA, False)
        kt16 = tl.trans(operand(k_rows, DT))
        if NORM:
            k_wide = k_rows if NK == 1 else load_rows(k_full, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False)
            k_length = inverse_length(k_wide)
            kt16 = tl.trans((k_rows.to(tl.float32) * k_length[:, None]).to(DT))
        x16 = load_rows(x, b, t, t1, T, h, H, 0, 0, C, 1, 1, V, VP, TMA, False)
        dr16 = load_rows(dr, b, t, t1, T, h, H, 0, 0, C, 1, 1, V, VP, TMA, False)
        half = load_rows(dk_half, b, t, t1, T, h, H, i_k * BK, 0, C, 1, 1, K, BK, TMA, False)
        S16 = S.to(DT)
        dKt = mm(S16, tl.trans(dr16)) * -bc[None, :]
        if dv is not None:
            dV = dr16.to(tl.float32) * (bc * restore_v)[:, None]
            store_rows(dv, dV, b, t, t1, T, h, H, 0, 0, C, 1, 1, V, VP, TMA_OUT)
        if GATED:
            if t % STEP == t0 % STEP:
                slot = anchor_slot(nh // H, seg, nseg, t0, T, cu, STEP, VARLEN) + (t - t0) // STEP
                dS = tl.load(anchors + (slot * H + h) * K * V + rk * V + rv, mask=in_state, other=0.0)
                tl.store(edges + wide(i_k) * edge_part + slot * H + h, tl.sum(tl.sum(S * dS, 1), 0))
            dKt = dKt * tl.exp2(a)[None, :]
            y = tl.sum(dKt * kt16.to(tl.float32), 0)
        for sub in tl.static_range(G // GB):
            do_rows = load_rows(do, b, t, t1, T, h, H, 0, sub, C, G, GB, V, VP, TMA, VARLEN)
            do16 = operand(do_rows * amplify.to(do_rows.dtype), DT)
            dP = tl.where(rq[:, None] >= rc[None, :], mm(do16, tl.trans(x16)) * bc[None, :], 0.0)
            dQt = mm(S16, tl.trans(do16))
            if NORM or GATED:
                q_rows = load_rows(q, b, t, t1, T, h, H, i_k * BK, sub, C, G, GB, K, BK, TMA, False)
                qt = tl.trans(q_rows.to(tl.float32))
            if NORM:
                if NK == 1:
                    q_length = inverse_length(q_rows)
                else:
                    q_wide = load_rows(q_full, b, t, t1, T, h, H, 0, sub, C, G, GB, K, KP, TMA, False)
                    q_length = inverse_length(q_wide)
                qt = qt * q_length[None, :]
            if GATED:
                dP = dP * between(aq, a)
                dQt = dQt * tl.exp2(aq)[None, :]
                y += tl.sum(tl.reshape(tl.sum(dQt * qt, 0), [C, GB]), 1)
            dQt = mma(kt16, tl.trans(dP).to(DT), dQt)
            if NORM and NK == 1:
                dQt = through_length(dQt, qt, q_length)
            store_rows(dq, tl.trans(dQt * restore), b, t, t1, T, h, H, i_k * BK, sub, C, G, GB, K, BK, TMA_OUT)
        if GATED:
            kt_left = (kt16.to(tl.float32) * (bc * tl.exp2(total - a))[None, :]).to(DT)
            S = S * tl.exp2(total)
            tl.store(dy + wide(i_k) * part + row + (t + rc).to(tl.int64) * H, y, mask=t + rc < t1)
            a, aq, total = a_next, aq_next, total_next
        else:
            kt_left = (kt16.to(tl.float32) * bc[None, :]).to(DT)
        S = mma(kt_left, x16, S)
        dKt += tl.trans(half.to(tl.float32)) * (1 / HEADROOM)
        if NORM and NK == 1:
            dKt = through_length(dKt, kt16, k_length)
        store_rows(dk, tl.trans(dKt * restore), b, t, t1, T, h, H, i_k * BK, 0, C, 1, 1, K, BK, TMA_OUT)
        bc = b_next.to(tl.float32)
