"""Decoding: a few tokens, the state updated in place, nothing kept for gradients (eq. 1 and 2, as reference.py)."""

import torch

from .reference import unit

LONGEST = 16
"""Tokens up to which walking one by one beats a chunk's matrix products."""


@torch.no_grad()
def delta_rule_step_(q, k, v, beta, state, *, g, scale, normalize_qk):
    """As `deltanet.ops.delta_rule_step_`."""
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    q, k, v_, beta = (x.to(state.dtype) for x in (q, k, v, beta))
    if normalize_qk:
        q, k = unit(q), unit(k)
    o = v.new_empty(B, T, HQ, V)
    for t in range(T):
        if g is not None:
            state *= g[:, t].to(state.dtype).exp()[..., None, None]
        k_t = k[:, t, :, None]  # B H 1 K
        u_t = beta[:, t, :, None, None] * (v_[:, t, :, None] - k_t @ state)
        state += k_t.mT @ u_t
        o[:, t] = (scale * (q[:, t].reshape(B, H, HQ // H, K) @ state)).reshape(B, HQ, V)
    return o


def delta_rule(q, k, v, beta, *, g, scale, initial_state, output_final_state, cu_seqlens, normalize_qk):
    """As `deltanet.ops.delta_rule`, for a plain batch and without gradients."""
    shape = (q.shape[0], k.shape[2], k.shape[3], v.shape[3])
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, v.dtype))
    state = q.new_zeros(shape, dtype=dtype) if initial_state is None else initial_state.to(dtype, copy=True)
    o = delta_rule_step_(q, k, v, beta, state, g=g, scale=scale, normalize_qk=normalize_qk)
    return o, state if output_final_state else None
