"""Decoding: a few tokens per launch, the state read once, updated in place and written once (eq. 1 and 2).

Nothing is allocated but o, nothing waits for the host: a step can be captured in a CUDA graph. float32 throughout.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["T", "H"])
def step_kernel(
    q, k, v, beta, g, o, state, scale, T, H,
    G: tl.constexpr, K: tl.constexpr, V: tl.constexpr, KP: tl.constexpr, BV: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (B * H * V tiles): a program owns BV columns of one state, S [KP, BV], and walks the T tokens one by one."""
    NV: tl.constexpr = (V + BV - 1) // BV
    bh = tl.program_id(0) // NV
    h = bh % H
    rk = tl.arange(0, KP)
    rv = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    at = bh.to(tl.int64) * K * V + rk[:, None] * V + rv[None, :]
    inside = (rk < K)[:, None] & (rv < V)[None, :]
    S = tl.load(state + at, mask=inside, other=0.0)
    for t in tl.range(0, T):
        row = ((bh // H).to(tl.int64) * T + t) * H + h
        k_t = tl.load(k + row * K + rk, mask=rk < K, other=0.0).to(tl.float32)
        v_t = tl.load(v + row * V + rv, mask=rv < V, other=0.0).to(tl.float32)
        if NORM:
            k_t = k_t * tl.rsqrt(tl.sum(k_t * k_t, 0) + 1e-6)
        if g is not None:
            S = S * tl.exp(tl.load(g + row).to(tl.float32))
        u_t = (v_t - tl.sum(S * k_t[:, None], 0)) * tl.load(beta + row).to(tl.float32)
        S = S + k_t[:, None] * u_t[None, :]
        for i in tl.static_range(G):
            q_t = tl.load(q + (row * G + i) * K + rk, mask=rk < K, other=0.0).to(tl.float32)
            if NORM:
                q_t = q_t * tl.rsqrt(tl.sum(q_t * q_t, 0) + 1e-6)
            o_t = tl.sum(S * q_t[:, None], 0) * scale
            tl.store(o + (row * G + i) * V + rv, o_t.to(o.dtype.element_ty), mask=rv < V)
    tl.store(state + at, S, mask=inside)
