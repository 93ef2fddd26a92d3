"""Decoding steps are the sequential rule, in place."""

import pytest
import torch
from delta_inputs import error, inputs

from deltanet import delta_rule
from deltanet.ops import delta_rule_step_


@pytest.mark.parametrize("decay", [None, "mixed"])
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_a_step_updates_the_state_in_place(tokens, decay):
    made = inputs(tokens, B=2, H=2, G=3, K=16, V=24, decay=decay, state=True)
    truth, final = made.to(torch.float64).call(delta_rule, backend="reference", output_final_state=True)
    state = made.initial_state.clone()
    address = state.data_ptr()
    o = delta_rule_step_(made.q, made.k, made.v, made.beta, state, g=made.g)
    assert state.data_ptr() == address
    assert error(o, truth) < 1e-6
    assert error(state, final) < 1e-6


def test_steps_one_by_one_equal_one_call():
    made = inputs(30, B=2, decay="mixed", state=True)
    whole, final = made.call(delta_rule, backend="chunk", output_final_state=True)
    state, outputs = made.initial_state.clone(), []
    for t in range(30):
        q, k, v, beta, g = (x[:, t : t + 1] for x in (made.q, made.k, made.v, made.beta, made.g))
        outputs.append(delta_rule_step_(q, k, v, beta, state, g=g))
    assert error(torch.cat(outputs, 1), whole) < 1e-5
    assert error(state, final) < 1e-5


def test_a_short_call_leaves_the_initial_state_alone():
    made = inputs(3, state=True)
    before = made.initial_state.clone()
    with torch.no_grad():
        _, final = made.call(delta_rule, backend="recurrent", output_final_state=True)
    assert torch.equal(made.initial_state, before)
    assert not torch.equal(final, before)


def test_normalising_inside_and_half_precision():
    made = inputs(4, dtype=torch.bfloat16, state=True)
    made.initial_state = made.initial_state.float()
    state = made.initial_state.clone()
    truth, _ = made.to(torch.float64).call(delta_rule, backend="reference", normalize_qk=True)
    o = delta_rule_step_(made.q, made.k, made.v, made.beta, state, normalize_qk=True)
    assert o.dtype == torch.bfloat16
    assert error(o, truth) < 4e-3  # one rounding to bfloat16
