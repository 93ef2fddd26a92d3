"""Activation checkpointing around a mixer whose operation is the Triton operator: run again, to the bit."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined

from tiny_student import tiny_model
from torch.utils.checkpoint import checkpoint

import deltanet.ops.triton as kernels
from deltanet.ops.triton import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def forwards(monkeypatch):
    """A list that grows by one (whether it saved for a gradient) with every forward of the kernels."""
    monkeypatch.setenv("DELTANET_BACKEND", "triton")
    calls, forward = [], launch.forward

    def counted(*arguments):
        calls.append(arguments[-1])
        return forward(*arguments)

    monkeypatch.setattr(launch, "forward", counted)
    return calls


@pytest.mark.parametrize(("mixer", "reentrant"), [("gated_delta", False), ("gated_delta", True), ("delta", False)])
def test_a_checkpointed_mixer_has_the_same_values_and_gradients(forwards, mixer, reentrant):
    few_heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    layer = tiny_model("none", mixer=mixer, conv_kernel=3, **few_heads).to(DEVICE).model.layers[0].self_attn
    x = torch.randn(1, 17, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def run(call):
        layer.zero_grad(set_to_none=True)
        given = x.clone().requires_grad_()
        out = call(given)
        out.square().sum().backward()
        return [out, given.grad, *(p.grad for p in layer.parameters())]

    plain = run(lambda given: layer(given)[0])
    assert forwards == [True]
    again = run(lambda given: checkpoint(lambda y: layer(y)[0], given, use_reentrant=reentrant))
    assert forwards == [True, not reentrant, True]
    assert len(plain) == len(again) > 10
    for a, b in zip(plain, again):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 16), (torch.float16, 128)])
def test_the_operators_gradient_may_be_taken_inside_a_checkpoint_of_two(forwards, dtype, size):
    made = torch.randn(4, 1, 18, 1, size, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)

    def twice(q, k, v):
        beta = torch.sigmoid(q[..., 0])
        o, state = kernels.delta_rule(q, k, v, beta, output_final_state=True, normalize_qk=True)
        return kernels.delta_rule(o, k, v, beta, initial_state=state, normalize_qk=True)[0]

    def gradients(call):
        leaves = [x.clone().requires_grad_() for x in made[:3]]
        return torch.autograd.grad(call(*leaves), leaves, made[3])

    plain = gradients(twice)
    again = gradients(lambda *leaves: checkpoint(twice, *leaves, use_reentrant=False))
    assert len(forwards) == 6
    assert all(torch.equal(a, b) for a, b in zip(plain, again))
