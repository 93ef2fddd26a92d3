"""The sequential truth does what the equations promise."""

import pytest
import torch
from delta_inputs import error, inputs

from deltanet import delta_rule

REFERENCE = {"backend": "reference", "output_final_state": True}


def test_one_token_by_hand():
    """K = V = 1, S_0 = 3, decay 1/2: S_1 = 1.5 - 0.25 * (1.5 * 2 - 5) * 2 = 2.5 and o = 2 * 2.5 * 7 = 35."""
    one = lambda x: torch.tensor(float(x)).view(1, 1, 1, 1)
    o, S = delta_rule(
        one(7), one(2), one(5), torch.tensor([[[0.25]]]), g=torch.tensor([[[0.5]]]).log(),
        initial_state=one(3), scale=2.0, **REFERENCE,
    )  # fmt: skip
    assert torch.allclose(S, one(2.5))
    assert torch.allclose(o, one(35))


def test_beta_zero_keeps_the_state():
    made = inputs(20, state=True, dtype=torch.float64)
    made.beta.zero_()
    o, S = made.call(delta_rule, **REFERENCE)
    assert torch.equal(S, made.initial_state)
    assert error(o, torch.einsum("bthk,bhkv->bthv", made.q, S) / 4) < 1e-14


def test_orthonormal_keys_written_with_beta_one_are_recalled_exactly():
    keys = torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q.view(1, 16, 1, 16)
    values = torch.randn(1, 16, 1, 16, dtype=torch.float64)
    _, S = delta_rule(keys, keys, values, torch.ones(1, 16, 1, dtype=torch.float64), **REFERENCE)
    o, _ = delta_rule(
        keys, keys, values, torch.zeros(1, 16, 1, dtype=torch.float64), initial_state=S, scale=1.0, **REFERENCE
    )
    assert (o - values).abs().max() < 1e-12


def test_a_key_written_again_with_beta_one_is_overwritten():
    k = torch.zeros(1, 2, 1, 16, dtype=torch.float64)
    k[..., 3] = 1
    v = torch.randn(1, 2, 1, 16, dtype=torch.float64)
    o, _ = delta_rule(k, k, v, torch.ones(1, 2, 1, dtype=torch.float64), scale=1.0, **REFERENCE)
    assert (o - v).abs().max() < 1e-14


def test_query_heads_read_the_state_of_their_group():
    made = inputs(12, H=3, G=2, decay="mixed", dtype=torch.float64)
    grouped, _ = made.call(delta_rule, **REFERENCE)
    for head in range(6):
        h = slice(head // 2, head // 2 + 1)
        k, v, beta, g = (x[:, :, h] for x in (made.k, made.v, made.beta, made.g))
        alone, _ = delta_rule(made.q[:, :, head : head + 1], k, v, beta, g=g, **REFERENCE)
        # Some CPUs sum the products of a larger batch in another order.
        torch.testing.assert_close(grouped[:, :, head : head + 1], alone, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype):
    o, S = inputs(5, state=True, dtype=dtype).call(delta_rule, **REFERENCE)
    assert o.dtype == dtype
    assert S.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
