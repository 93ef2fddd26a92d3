"""Softmax attention of a linear layer to its last few tokens, and to the first one of the document, where attention
parks what it does not need (without it a window of 64 tokens loses most of what it has: docs/results/students.md).

The work and the memory of a token do not grow with the text: it is in a chunk of as many tokens as the window has, and
sees nothing outside that chunk, the one before and the first token. Twin: tests/deltanet/test_local_attention.py.

Shapes: B batch, T tokens, N documents (N = B unless packed), HQ query and KV key/value heads, hd head size, W window,
n chunks of C tokens, J = W + C columns.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F

from .history import History


def remembered(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """k, v (B, T, KV, hd) -> (B, T, 2 * KV * hd + 1), what a `History` is to keep: v, k, and a one, so that a token can
    be told from the zeros before the first."""
    return torch.cat([v.flatten(2), k.flatten(2), torch.ones_like(k[..., :1, 0])], -1)


def first_of(recent: History) -> torch.Tensor:
    """(N, 2 * KV * hd + 1): the first of these tokens of every document; anything, where it has none."""
    if recent.cu_seqlens is None:
        return recent.x[:, 0]
    return recent.x[0, recent.cu_seqlens[:-1].clamp(max=recent.x.shape[1] - 1)]


def has_past(recent: History) -> torch.Tensor:
    """(N,) bool: whether a document goes on from tokens in the cache."""
    return recent.past[:, -1, -1] > 0


def forgotten(recent: History, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """k, v (B, T, KV, hd) of the token that each one drives out of the window; zeros where it has room."""
    v, k = recent.back(recent.reach)[..., :-1].unflatten(-1, (2, heads, -1)).unbind(2)
    return k, v


def local_attention(q: torch.Tensor, recent: History, first: torch.Tensor) -> torch.Tensor:
    """q (B, T, HQ, hd) -> (B, T, HQ, hd): attention to the last W tokens, this one among them, and to the document's
    first.

    recent: the history of `remembered`, with a reach of W. first: (N, 2 * KV * hd + 1) of the same kind.
    """
    if recent.cu_seqlens is not None and recent.past is not None:
        return _by_document(q, recent, first)
    tokens, heads, size = q.shape[1:]
    window, chunk = recent.reach, min(recent.reach, tokens)
    fill = -tokens % chunk
    count = (tokens + fill) // chunk
    before = _before(recent, q.device)
    if recent.cu_seqlens is None:
        keys, sink = recent.extended, first[:, None].expand(-1, count, -1)
    else:
        keys, sink = F.pad(recent.x, (0, 0, window, 0)), first[recent.document[::chunk]][None]
    keys = F.pad(keys, (0, 0, 0, fill))
    if count == 1:
        keys = torch.cat([sink[:, :, None], keys[:, None, 1:]], 2)
    else:
        chunks = keys.unflatten(1, (count + 1, window))
        # Of the chunk before, the first token is W tokens or more away from all of this one: the sink takes its place.
        keys = torch.cat([sink[:, :, None], chunks[:, :-1, 1:], chunks[:, 1:]], 2)
    seen = _seen(F.pad(before, (0, fill)).unflatten(1, (count, chunk)), window)

    group = (keys.shape[-1] // 2 // size, -1)  # a key/value head and the query heads that share it
    # Fast kernels want aligned rows, which the one behind every token's vectors spoils: hence the copy.
    keys = keys[..., :-1].unflatten(-1, (2, group[0], size)).permute(3, 0, 1, 4, 2, 5).contiguous()
    values, keys = keys.flatten(1, 2)
    queries = F.pad(q, (0, 0, 0, 0, 0, fill)).unflatten(1, (count, chunk)).unflatten(3, group)
    queries = queries.permute(0, 1, 3, 4, 2, 5).flatten(0, 1)
    seen = seen[:, :, None].expand(q.shape[0], -1, queries.shape[2], -1, -1)
    seen = seen.flatten(2, 3).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(queries.flatten(2, 3), keys, values, attn_mask=seen)
    out = out.unflatten(0, (-1, count)).unflatten(3, (-1, chunk)).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(-1, count * chunk, heads, size)[:, :tokens]


def _before(recent: History, device: torch.device) -> torch.Tensor:
    """(B or 1, T): how many tokens of its document stand before each; behind a cache at least W where W or more do."""
    if recent.cu_seqlens is not None:
        return recent.offset[None]
    token = torch.arange(recent.x.shape[1], device=device)[None]
    return token if recent.past is None else token + recent.past[..., -1].sum(1, keepdim=True).long()


def _seen(before: torch.Tensor, window: int) -> torch.Tensor:
    """before (b, n, C) -> (b, n, C, J) bool, which columns a token sees: the first token's, then those of the W - 1
    tokens before the chunk, then the chunk's own."""
    chunk = before.shape[-1]
    column = torch.arange(window + chunk, device=before.device)
    distance = window + torch.arange(chunk, device=before.device)[:, None] - column
    inside = (distance >= 0) & (distance < window) & (distance <= before[..., None])
    return torch.where(column == 0, before[..., None] >= window, inside)


def _by_document(q: torch.Tensor, recent: History, first: torch.Tensor) -> torch.Tensor:
    """Padded rows that go on from a cache, one after the other."""
    outs = []
    for index, (begin, end) in enumerate(pairwise(recent.cu_seqlens.tolist())):
        if end > begin:
            past = recent.past[index : index + 1].transpose(1, 2)
            own = History(recent.x[:, begin:end], recent.reach, past)
            outs.append(local_attention(q[:, begin:end], own, first[index : index + 1]))
    return torch.cat(outs, 1)
