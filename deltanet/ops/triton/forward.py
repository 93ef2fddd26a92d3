"""The forward kernel: the chunk walk, and the inverses it may read (README.md, "Kernels").

A chunk of C = 16 tokens that starts from S_0 (all decays g = 0 when there is no gate; a_i = g_1 + .. + g_i):

    N = tril*(K K^T o G)   G_ij = exp(a_i - a_j)   W = V - diag(e^a) K S_0   X = (I + N diag(b))^-1 W   U = diag(b) X
    O = scale (diag(e^a) Q S_0 + tril(Q K^T o G) U)             S_1 = e^{a_C} S_0 + K^T diag(e^{a_C - a}) U

X_t = v_t - (what the state held for k_t): kept for the backward, in place of v, U and W.
"""
# ruff: noqa: SIM108

import triton
import triton.language as tl

from .chunk import (
    between,
    decay_row,
    load_decays,
    load_rows,
    load_square,
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


@triton.jit
def chunk_inverse(kk, bc, a, C: tl.constexpr, GATED: tl.constexpr, DT: tl.constexpr):
    """-(I + N diag(b))^-T as an operand, from K K^T."""
    N = kk
    if GATED:
        N = N * between(a, a)
    D, _ = unit_lower_inverse(-N * bc[None, :], -N * bc[:, None], C, True, False, DT)
    return tl.trans(-D).to(DT)


@triton.jit
def chunk_adjoint(kk, bc, a, C: tl.constexpr, GATED: tl.constexpr, DT: tl.constexpr):
    """(I + diag(b) N)^-1 as an operand, from K K^T."""
    N = kk
    if GATED:
        N = N * between(a, a)
    _, Dt = unit_lower_inverse(-N * bc[:, None], -N * bc[None, :], C, False, True, DT)
    return tl.trans(Dt).to(DT)


@triton.jit(do_not_specialize=["T", "H"])
def inverse_kernel(
    k, beta, decays, inverses, adjoints, cu, T, H,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr, GATED: tl.constexpr,
    NORM: tl.constexpr, VARLEN: tl.constexpr, DT: tl.constexpr,
):  # fmt: skip
    """What no state enters, before the walks, whose every warp would find it chunk after chunk: unless None,
    -(I + N diag(b))^-T for the forward and (I + diag(b) N)^-1, which takes dU to dR, for the backward. Grid
    (documents * H, parts): a program owns every parts-th chunk of a document. Per token and head it reads k, beta,
    decays, and writes a row of C operands of each (32 bytes in half precision), where `decays` has a number."""
    nh = tl.program_id(0)
    h = nh % H
    b, t0, t1 = span(nh // H, 0, 1, cu, T, C, VARLEN)
    first, _padded = decay_row(nh // H, h, H, cu, T, C, VARLEN)
    rc = tl.arange(0, C)
    square = rc[:, None] * C + rc[None, :]
    row = (wide(b) * T) * H + h
    for t in tl.range(t0 + tl.program_id(1) * C, t1, tl.num_programs(1) * C, num_stages=STAGES):
        bc = tl.load(beta + row + (t + rc).to(tl.int64) * H, mask=t + rc < t1, other=0.0).to(tl.float32)
        a = tl.load(decays + first + t + rc) if GATED else 0.0
        k16 = unit_operand(load_rows(k, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False), NORM, DT)
        kk = mm(k16, tl.trans(k16))
        at = (first + t) * C + square
        if inverses is not None:
            tl.store(inverses + at, chunk_inverse(kk, bc, a, C, GATED, DT))
        if adjoints is not None:
            tl.store(adjoints + at, chunk_adjoint(kk, bc, a, C, GATED, DT))


@triton.jit
def corrections(S16, vt, kt16, nDt16, a, GATED: tl.constexpr, DT: tl.constexpr):
    """X^T as an operand, from S_0^T and V^T."""
    if GATED:
        nW = mm(S16, kt16) * tl.exp2(a)[None, :] - vt
    else:
        nW = mma(S16, kt16, -vt)
    return mm(nW.to(DT), nDt16).to(DT)


@triton.jit
def written(St, Ut, k16, a, total, GATED: tl.constexpr, DT: tl.constexpr):
    """S_1^T from S_0^T and U^T."""
    if GATED:
        Ut = Ut * tl.exp2(total - a)[None, :]
        St = St * tl.exp2(total)
    return mma(Ut.to(DT), k16, St)


@triton.jit
def head_factor(
    v, start, nh, cu, T, H, heads, shift, V: tl.constexpr, STATE: tl.constexpr, BV: tl.constexpr, NV: tl.constexpr,
    C: tl.constexpr, TMA: tl.constexpr, VARLEN: tl.constexpr, FIND: tl.constexpr,
):  # fmt: skip
    """The power of two that a retried head's values are multiplied by: found and noted if FIND, else as noted."""
    if FIND:
        exponent = fitting_shift(v, start, nh, cu, T, H, V, STATE, BV, NV, C, TMA, VARLEN)
        tl.store(shift + heads + nh, exponent)
    else:
        exponent = tl.load(shift + heads + nh)
    return power_of_two(exponent)


@triton.jit(do_not_specialize=["T", "H", "nseg", "heads"])
def forward_kernel(
    q, k, v, beta, decays, inverses, o, x, start, final, cu, shift, scale, T, H, nseg, heads,
    G: tl.constexpr, GB: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr,
    BV: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, STAGES: tl.constexpr, TMA: tl.constexpr,
    TMA_OUT: tl.constexpr, GATED: tl.constexpr, NORM: tl.constexpr, VARLEN: tl.constexpr, RETRY: tl.constexpr,
    DT: tl.constexpr,
):  # fmt: skip
    """Grid (documents * H * tiles, segments). A program owns a tile of BV columns of one state, as S^T [BV, KP], and
    walks its segment chunk by chunk. Per token and head it reads q, k, v, beta, decays, inverses (found here if None)
    and writes o, and x unless None.

    shift (2, heads): [0] is set where half precision overflowed; the RETRY launch runs those heads only, with v times
    2^shift[1], which is found (RETRY = 1) or read (2). Everything linear in v but o and `final` keeps that factor."""
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
    at_state = (wide(nh) * nseg + seg) * K * V + rk * V + rv
    in_state = (rk < K) & (rv < V)
    factor = 1.0
    if RETRY:
        if tl.load(shift + nh) == 0:
            return
        factor = head_factor(
            v, start, nh, cu, T, H, heads, shift, V, K * V, BV, NV, C, TMA, VARLEN, FIND=RETRY == 1
        )  # fmt: skip
    St = tl.zeros([BV, KP], tl.float32)
    if start is not None:
        St = tl.load(start + at_state, mask=in_state, other=0.0) * factor
    row = (wide(b) * T) * H + h
    bc = tl.load(beta + row + (t0 + rc).to(tl.int64) * H, mask=t0 + rc < t1, other=0.0).to(tl.float32)
    a, aq, total = 0.0, 0.0, 0.0
    first, _padded = decay_row(nh // H, h, H, cu, T, C, VARLEN)
    if inverses is not None:
        inverses += first * C
    if GATED:
        decays += first
        a, aq, _first, total = load_decays(decays, t0, C, GB)
    for t in tl.range(t0, t1, C, num_stages=STAGES, disable_licm=True):
        after = t + C + rc
        b_next = tl.load(beta + row + after.to(tl.int64) * H, mask=after < t1, other=0.0)
        if GATED:
            a_next, aq_next, _first, total_next = load_decays(decays, t + C, C, GB)
        k16 = unit_operand(load_rows(k, b, t, t1, T, h, H, 0, 0, C, 1, 1, K, KP, TMA, False), NORM, DT)
        vt = tl.trans(load_rows(v, b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA, False))
        vt = vt.to(tl.float32)
        if RETRY:
            vt = vt * factor
        kt16 = tl.trans(k16)
        if inverses is None:
            nDt16 = chunk_inverse(mm(k16, kt16), bc, a, C, GATED, DT)
        else:
            nDt16 = load_square(inverses, t, C)
        S16 = St.to(DT)
        X16 = corrections(S16, vt, kt16, nDt16, a, GATED, DT)
        Ut = X16.to(tl.float32) * bc[None, :]
        U16 = Ut.to(DT)
        for sub in tl.static_range(G // GB):
            q16 = unit_operand(load_rows(q, b, t, t1, T, h, H, 0, sub, C, G, GB, K, KP, TMA, False), NORM, DT)
            P = tl.where(rq[:, None] >= rc[None, :], mm(q16, kt16) * scale, 0.0)
            Ot = mm(S16, tl.trans(q16))
            if GATED:
                P = P * between(aq, a)
                Ot = Ot * (tl.exp2(aq) * scale)[None, :]
            else:
                Ot = Ot * scale
            Ot = mma(U16, tl.trans(P).to(DT), Ot)
            if RETRY:
                Ot = Ot / factor
            store_rows(o, tl.trans(Ot), b, t, t1, T, h, H, i_v * BV, sub, C, G, GB, V, BV, TMA_OUT)
        if x is not None:
            store_rows(x, tl.trans(X16), b, t, t1, T, h, H, i_v * BV, 0, C, 1, 1, V, BV, TMA_OUT)
        St = written(St, Ut, k16, a, total, GATED, DT)
        if GATED:
            a, aq, total = a_next, aq_next, total_next
        bc = b_next.to(tl.float32)
    if seg == nseg - 1:
        tl.store(final + wide(nh) * K * V + rk * V + rv, St / factor, mask=in_state)
    if RETRY == 0 and tl.float16 == DT:
        # what overflowed stays in the state and fails the comparison; 4096 leaves room for gradients
        fits = tl.min(tl.min(tl.where(tl.abs(St) < 4096.0, 1, 0), 1), 0)
        if fits == 0:
            tl.store(shift + nh, 1)
