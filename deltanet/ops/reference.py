"""The delta rule one token at a time: the truth that everything else is compared with.

    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T        (eq. 1)
    o_t = scale * S_t^T q_t                                                 (eq. 2)

Any float dtype; half precision is computed in float32. Differentiable by autograd. Slow on purpose.
"""

from itertools import pairwise

import torch


def delta_rule(q, k, v, beta, *, g, scale, initial_state, output_final_state, cu_seqlens, normalize_qk):
    """As `deltanet.ops.delta_rule`."""
    B, H, K, V = q.shape[0], *k.shape[2:], v.shape[3]
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, v.dtype))
    num_documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = q.new_zeros(num_documents, H, K, V, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    if cu_seqlens is None:
        o, final = _recur(q, k, v, beta, g, states, dtype, normalize_qk)
    else:
        parts = []
        for n, (a, b) in enumerate(pairwise(cu_seqlens.tolist())):
            document = [x[:, a:b] for x in (q, k, v, beta)] + [None if g is None else g[:, a:b]]
            parts.append(_recur(*document, states[n : n + 1], dtype, normalize_qk))
        o, final = (torch.cat(x, dim) for x, dim in zip(zip(*parts), (1, 0)))
    return (scale * o).to(v.dtype), final if output_final_state else None


def unit(x: torch.Tensor) -> torch.Tensor:
    """x / |x| over the last axis, with 1e-6 inside the root so that a zero vector stays zero."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def _recur(q, k, v, beta, g, S, dtype, normalize_qk):
    """One batch of documents of equal length: o (B, T, HQ, V) before scaling, and the final state."""
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    if normalize_qk:
        q, k = unit(q), unit(k)
    outputs = []
    for t in range(T):
        if g is not None:
            S = g[:, t].to(dtype).exp()[..., None, None] * S
        k_t = k[:, t, :, :, None]
        u_t = beta[:, t, :, None] * (v[:, t] - (S * k_t).sum(-2))
        S = S + k_t * u_t[:, :, None, :]
        q_t = q[:, t].reshape(B, H, HQ // H, K)
        outputs.append((q_t @ S).reshape(B, HQ, V))
    o = torch.stack(outputs, 1) if outputs else q.new_zeros(B, 0, HQ, V)
    return o, S
