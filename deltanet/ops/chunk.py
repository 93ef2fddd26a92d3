"""The delta rule chunk by chunk in PyTorch: differentiable everywhere, fast enough to train small students on a CPU.

Within a chunk everything is a batched matrix product (eq. 6 to 9); between chunks the state takes one affine step each
(eq. 10). Numbered equations: README.md. The truth it is compared with: reference.py.

Shapes: B batch (1 when packed), N documents, n chunks, C tokens of a chunk, H state heads, G query heads per
state head, K key size, V value size.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from .reference import unit

CHUNK = 32
LOWEST_DECAY = -80.0
"""exp of this is 1.8e-35, below every rounding error; a decay of -inf would make inf - inf in a chunk."""


def delta_rule(q, k, v, beta, *, g, scale, initial_state, output_final_state, cu_seqlens, normalize_qk):
    """As `deltanet.ops.delta_rule`; computed in float32, or float64 where an input is."""
    B, T, HQ, K = q.shape
    H, V = k.shape[2], v.shape[3]
    G = HQ // H
    dtype = torch.promote_types(torch.float32, torch.promote_types(q.dtype, v.dtype))
    q_, k_, v_, beta_ = q.to(dtype), k.to(dtype), v.to(dtype), beta.to(dtype)
    if normalize_qk:
        q_, k_ = unit(q_), unit(k_)
    g_ = None if g is None else g.to(dtype).clamp(min=LOWEST_DECAY)
    num_documents = B if cu_seqlens is None else cu_seqlens.shape[0] - 1
    state = q_.new_zeros(num_documents, H, K, V) if initial_state is None else initial_state.to(dtype)
    if T == 0 or H == 0:
        return v.new_zeros(B, T, HQ, V), state if output_final_state else None

    slots, first = (None, None) if cu_seqlens is None else _slots(cu_seqlens, T)
    q_, k_, v_, beta_ = (_split(x, slots) for x in (q_, k_, v_, beta_))  # (B, n, C, heads, ...)
    q_CK = q_.unflatten(3, (H, G)).permute(0, 1, 3, 4, 2, 5)  # B n H G C K
    k_CK, v_CV = k_.transpose(2, 3), v_.transpose(2, 3)  # B n H C .
    beta_C1 = beta_.transpose(2, 3)[..., None]
    L_CC, from_start_C1, to_end_C1, whole_11 = _decays(g_, slots, beta_C1)

    kk_CC = k_CK @ k_CK.mT
    A_CC = (beta_C1 * kk_CC * L_CC).tril(-1)
    eye = torch.eye(A_CC.shape[-1], dtype=dtype, device=q.device)
    D_CC = torch.linalg.solve_triangular(A_CC + eye, eye.expand_as(A_CC), upper=False, unitriangular=True)
    U_CV = D_CC @ (beta_C1 * v_CV)
    W_CK = D_CC @ (beta_C1 * from_start_C1 * k_CK)
    k_end_CK = to_end_C1 * k_CK
    M_KK = whole_11 * torch.eye(K, dtype=dtype, device=q.device) - k_end_CK.mT @ W_CK
    N_KV = k_end_CK.mT @ U_CV

    starts, finals = _scan(M_KK, N_KV, state, first)
    S_KV = torch.stack(starts, 1)  # B n H K V
    u_CV = U_CV - W_CK @ S_KV
    P_CC = (q_CK @ k_CK[:, :, :, None].mT) * L_CC[:, :, :, None]
    o = (from_start_C1[:, :, :, None] * q_CK) @ S_KV[:, :, :, None] + P_CC @ u_CV[:, :, :, None]
    o = o.permute(0, 1, 4, 2, 3, 5).reshape(B, -1, HQ, V)
    o = o[:, :T] if slots is None else o[:, slots]
    return (scale * o).to(v.dtype), finals if output_final_state else None


def _slots(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, list[int]]:
    """Where each of T packed tokens goes when every document is padded to whole chunks, (T,), and for every
    document the index of its first chunk, with the total at the end. Empty documents have no chunk."""
    lengths = cu_seqlens.diff().long()
    chunks = (lengths + CHUNK - 1) // CHUNK
    first = F.pad(chunks.cumsum(0), (1, 0))
    document = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths, output_size=T)
    token = torch.arange(T, device=lengths.device)
    return token - cu_seqlens.long()[document] + first[document] * CHUNK, first.tolist()


def _split(x: torch.Tensor, slots: torch.Tensor | None) -> torch.Tensor:
    """(B, T, ...) -> (B, n, C, ...); the tokens that fill up a chunk are zero, which leaves no trace in a state."""
    if slots is None:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, -x.shape[1] % CHUNK))
    else:
        length = (int(slots[-1]) // CHUNK + 1) * CHUNK
        x = x.new_zeros(x.shape[0], length, *x.shape[2:]).index_copy(1, slots, x)
    return x.unflatten(1, (-1, CHUNK))


def _decays(g, slots, like):
    """For chunks of log decays: L_ij = exp(g_{j+1} + ... + g_i) for i >= j; from the chunk's start through i; from
    i to its end; and of the whole chunk. Sums are taken segment by segment, never as differences of long sums."""
    C = CHUNK
    lower = torch.ones(C, C, dtype=torch.bool, device=like.device).tril()
    if g is None:
        one = like.new_ones(1, 1, 1, 1, 1)
        return lower.to(like.dtype).expand(1, 1, 1, C, C), one, one, one
    g_C = _split(g, slots).transpose(2, 3)  # B n H C
    pairs = g_C[..., :, None].expand(*g_C.shape, C).masked_fill(~lower.tril(-1), 0).cumsum(-2)
    L = pairs.masked_fill(~lower, -torch.inf).exp()
    from_start = g_C.cumsum(-1)
    return L, from_start[..., None].exp(), L[..., -1, :, None], from_start[..., -1:, None].exp()


def _scan(M, N, state, first):
    """State at the start of every chunk, a list of (B, H, K, V), and after the last of every document."""
    M, N = M.unbind(1), N.unbind(1)  # one pass back, where slices would each fill a whole gradient
    if first is None:
        starts = []
        for M_c, N_c in zip(M, N):
            starts.append(state)
            state = M_c @ state + N_c
        return starts, state
    starts, finals = [], []
    for document, (a, b) in enumerate(pairwise(first)):
        S = state[document : document + 1]
        for c in range(a, b):
            starts.append(S)
            S = M[c] @ S + N[c]
        finals.append(S)
    return starts, torch.cat(finals)
