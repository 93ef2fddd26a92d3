"""Attention in a window and to the first token, against a loop over tokens in float64."""

import pytest
import torch

from deltanet.history import History
from deltanet.local_attention import first_of, local_attention, remembered

HQ, KV, HD = 4, 2, 8


def vectors(tokens: int, batch: int = 1, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(batch, tokens, heads, HD, generator=generator, dtype=torch.float64)
    return make(HQ), make(KV), make(KV)


def by_hand(q, k, v, window: int) -> torch.Tensor:
    """(B, T, HQ, hd), token by token."""
    out = torch.empty_like(q)
    for t in range(q.shape[1]):
        seen = sorted({0, *range(max(0, t - window + 1), t + 1)})
        for head in range(HQ):
            keys, values = k[:, seen, head // (HQ // KV)], v[:, seen, head // (HQ // KV)]
            weights = torch.softmax((keys @ q[:, t, head, :, None])[..., 0] * HD**-0.5, -1)
            out[:, t, head] = (weights[..., None] * values).sum(1)
    return out


def of_text(q, k, v, window, cu_seqlens=None):
    recent = History(remembered(k, v), window, None, cu_seqlens)
    return local_attention(q, recent, first_of(recent))


@pytest.mark.parametrize("window", [1, 2, 5, 8, 40, 64])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 16, 41])
def test_a_token_sees_its_window_and_the_first_token(window, tokens):
    q, k, v = vectors(tokens, batch=2)
    got = of_text(q, k, v, window)
    assert (got - by_hand(q, k, v, window)).abs().max() < 1e-12


def test_a_window_as_long_as_the_text_is_attention_to_all_of_it():
    q, k, v = vectors(23)
    parts = (x.transpose(1, 2) for x in (q, k, v))
    whole = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    assert (of_text(q, k, v, 23) - whole.transpose(1, 2)).abs().max() < 1e-12


@pytest.mark.parametrize("window", [1, 3, 8, 30])
def test_packed_documents_do_not_see_each_other(window):
    lengths = [5, 0, 1, 20, 3, 11, 0]
    q, k, v = vectors(sum(lengths))
    ends = torch.tensor(lengths).cumsum(0)
    cu_seqlens = torch.cat([ends.new_zeros(1), ends]).int()
    got, start = of_text(q, k, v, window, cu_seqlens), 0
    for length in lengths:
        part = slice(start, start + length)
        if length:
            alone = by_hand(q[:, part], k[:, part], v[:, part], window)
            assert (got[:, part] - alone).abs().max() < 1e-12, length
        start += length


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("split", [1, 3, 4, 5, 9, 17])
def test_what_is_remembered_goes_on_as_the_whole_text(window, split):
    q, k, v = vectors(26, batch=3)
    kept = remembered(k, v)
    before = History(kept[:, :split], window)
    after = History(kept[:, split:], window, before.latest())
    got = local_attention(q[:, split:], after, first_of(before))
    assert (got - by_hand(q, k, v, window)[:, split:]).abs().max() < 1e-12


def test_documents_that_go_on_from_a_cache():
    q, k, v = vectors(30)
    kept, seen = remembered(k, v), [9, 2]  # of two documents of 14 and 16 tokens
    pieces = [slice(0, 9), slice(14, 16)]
    before = [History(kept[:, piece], 4) for piece in pieces]
    first = torch.cat([first_of(history) for history in before])
    past = torch.cat([history.latest() for history in before])
    rest = torch.cat([torch.arange(9, 14), torch.arange(16, 30)])
    recent = History(kept[:, rest], 4, past, torch.tensor([0, 5, 19]))
    got = local_attention(q[:, rest], recent, first)
    whole = [by_hand(*(x[:, part] for x in (q, k, v)), 4) for part in (slice(0, 14), slice(14, 30))]
    wanted = torch.cat([part[:, done:] for part, done in zip(whole, seen)], 1)
    assert (got - wanted).abs().max() < 1e-12


def test_gradients_are_those_of_the_loop():
    q, k, v = (x.requires_grad_() for x in vectors(19))
    weights = torch.randn(1, 19, HQ, HD, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.autograd.grad((by_hand(q, k, v, 4) * weights).sum(), (q, k, v))
    got = torch.autograd.grad((of_text(q, k, v, 4) * weights).sum(), (q, k, v))
    for a, b in zip(expected, got):
        assert (a - b).abs().max() < 1e-12
