"""Packed attention is each document's own attention, values and gradients, windows and grouped heads."""

import pytest
import torch
from torch.nn.functional import pad

from deltanet.packed_attention import VARLEN, packed_attention

LENGTHS = (5, 1, 0, 40, 130, 2)


def truth(q, k, v, bounds, window):
    """In float64, from scores masked to minus infinity."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    place = torch.arange(q.shape[2], device=q.device)
    document = torch.searchsorted(bounds[1:].long(), place, right=True)
    gap = place[:, None] - place
    sees = (document[:, None] == document) & (gap >= 0) & (gap < (window or q.shape[2]))
    scores = (q @ k.mT) * 0.3
    return (scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def inputs(dtype, device="cpu"):
    torch.manual_seed(0)
    tokens = sum(LENGTHS)
    bounds = pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).int().to(device)
    return [
        torch.randn(1, heads, tokens, 16, device=device, dtype=dtype, requires_grad=True) for heads in (6, 2, 2)
    ], bounds


@pytest.mark.parametrize("window", [None, 1, 7, 200])
def test_values_and_gradients_are_those_of_a_masked_softmax(window):
    (q, k, v), bounds = inputs(torch.float64)
    out = packed_attention(q, k, v, bounds, max(LENGTHS), scale=0.3, window=window)
    wanted = truth(q, k, v, bounds, window)
    torch.testing.assert_close(out, wanted, rtol=1e-10, atol=1e-10)
    weights = torch.randn_like(wanted)
    for mine, its in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)), torch.autograd.grad((wanted * weights).sum(), (q, k, v))
    ):
        torch.testing.assert_close(mine, its, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 2, 7, 200])
def test_flash_attention_on_a_gpu_is_within_bfloat16_of_float64(window):
    assert VARLEN, "this torch has no varlen_attn with windows"
    (q, k, v), bounds = inputs(torch.bfloat16, "cuda")
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    out = packed_attention(q, k, v, bounds, max(LENGTHS), scale=0.3, window=window)
    wanted = truth(*wide, bounds, window)
    weights = torch.randn_like(out)
    grads = torch.autograd.grad((out * weights).sum(), (q, k, v))
    wanted_grads = torch.autograd.grad((wanted * weights.double()).sum(), wide)
    for mine, its in zip((out, *grads), (wanted, *wanted_grads)):
        # bfloat16 has 8 bits: rounding of probabilities and of the result, each 2^-9, as relative RMS
        assert (mine.double() - its).norm() < 8e-3 * its.norm()
