"""Causal softmax attention over packed documents, each on its own: the work grows with the sum of their squared
lengths, where a mask over the whole row would cost the square of the row.

On a GPU in half precision one flash-attention call (torch.nn.attention.varlen) runs them all; elsewhere one
scaled_dot_product_attention a document. Twin: tests/deltanet/test_packed_attention.py.
"""

import inspect
from itertools import pairwise

import torch
import torch.nn.functional as F

try:  # torch 2.10 and later
    from torch.nn.attention.varlen import varlen_attn

    _CAN = inspect.signature(varlen_attn).parameters
except ImportError:
    _CAN = {}
VARLEN = "window_size" in _CAN


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    longest: int,
    *,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """q (1, HQ, T, hd), k and v (1, KV, T, hd) -> (1, T, HQ, hd).

    cu_seqlens (N + 1,) int32 or int64: where documents begin and end; `longest` is at least the tokens of the longest.
    window: how many tokens a query sees, itself included; None for all before it.
    """
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if VARLEN and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        return _varlen(q, k, v, cu_seqlens.int(), longest, scale, window)
    outs = [
        _one(q[:, :, begin:end], k[:, :, begin:end], v[:, :, begin:end], scale, window)
        for begin, end in pairwise(cu_seqlens.tolist())
        if end > begin
    ]
    return torch.cat(outs, 2).transpose(1, 2)


def _varlen(q, k, v, cu_seqlens, longest, scale, window):
    group = q.shape[1] // k.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    grouped = {}
    if group > 1 and "enable_gqa" in _CAN:
        grouped = {"enable_gqa": True}
    elif group > 1:
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    reach = -1 if window is None else window - 1
    out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, scale=scale, window_size=(reach, 0), **grouped)
    return out[None]


def _one(q, k, v, scale, window):
    tokens, mask = q.shape[2], None
    if window is not None and window < tokens:
        place = torch.arange(tokens, device=q.device)
        gap = place[:, None] - place
        mask = (gap >= 0) & (gap < window)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
