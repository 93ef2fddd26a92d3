"""The Triton kernels against the sequential truth in float64, values and every gradient.

On a CUDA card they run there; elsewhere in Triton's interpreter, in float32 and float16 (its bfloat16 is wrong).
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are defined, at the import below

import dataclasses

from delta_inputs import error, gradients, inputs

import deltanet.ops.triton as kernels
from deltanet.ops import reference
from deltanet.ops.triton import launch, operator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 5e-6, torch.float16: 8e-4}
"""float32: products in three tf32 pieces, errors near 3e-7, a few times more where decays meet. float16: half an ulp of
its rounding is 2.4e-4 relative, and operands, intermediates and the result are rounded once each."""


def check(dtype=torch.float16, *, normalize=False, tolerance=None, **made):
    given = inputs(dtype=torch.float64, **made).to(dtype)
    if given.g is not None:
        given.g = given.g.float()  # its gradient may be 1e-5, below half precision
    truth = gradients(given.to(torch.float64), reference.delta_rule, scale=0.3, normalize_qk=normalize)
    if given.cu_seqlens is not None:
        given.cu_seqlens = given.cu_seqlens.to(DEVICE)
    found = gradients(given.to(DEVICE), kernels.delta_rule, scale=0.3, normalize_qk=normalize)
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        assert error(found[name], expected) < (tolerance or TOLERANCE[dtype]), name


@pytest.fixture
def cut(monkeypatch):
    """Forces a number of segments, or plain pointers, on every call."""

    def force(segments=None, tensor_maps=True):
        def case(q, k, v, g, cu_seqlens, normalize):
            chosen = launch.case(q, k, v, g, cu_seqlens, normalize, segments)
            return dataclasses.replace(chosen, tensor_maps=chosen.tensor_maps and tensor_maps)

        monkeypatch.setattr(operator, "_case", case)

    return force


@pytest.mark.parametrize("decay", [None, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ragged_length_grouped_heads_and_states(dtype, decay):
    check(dtype, T=37, K=32, V=16, G=2, decay=decay, state=True, H=1)


@pytest.mark.parametrize("T", [1, 15, 16, 17])
def test_lengths_around_a_chunk(T):
    check(T=T, decay="mixed", H=1, tolerance=1.5e-3)  # few numbers are averaged


@pytest.mark.parametrize("size", [(60, 100), (96, 24), (20, 17)])
def test_sizes_that_are_not_powers_of_two(size):
    check(torch.float32, T=20, K=size[0], V=size[1], decay="mixed", H=1)


@pytest.mark.parametrize("decay", [None, "mixed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_heads_shared_out_over_tiles(dtype, decay):
    check(dtype, T=33, K=128, V=128, decay=decay, G=2, state=True, H=1)


@pytest.mark.parametrize("size", [(128, 96), (128, 32), (64, 128), (128, 256)])
def test_heads_that_are_wide_on_one_side(size):
    check(T=20, K=size[0], V=size[1], decay="mixed", state=True, H=1, tolerance=1.5e-3)  # few numbers are averaged


@pytest.mark.parametrize("decay", [None, "mixed"])
def test_inverses_of_packed_documents_of_wide_heads(decay):
    few = {"lengths": (0, 1, 23, 0, 16), "tolerance": 2e-3}
    check(T=40, K=128, V=96, decay=decay, state=True, H=1, G=3, normalize=True, **few)


@pytest.mark.parametrize(("heads", "size", "expected"), [(32, 64, 16), (16, 128, 16), (512, 64, 1), (256, 128, 1)])
def test_few_sequences_are_cut_until_eight_warps_are_on_every_multiprocessor(monkeypatch, heads, size, expected):
    monkeypatch.setattr(launch, "card", lambda device: (9, 132))
    q = torch.empty(1, 32768, heads, size, device="meta", dtype=torch.bfloat16)
    assert launch.case(q, q, q, None, None, False).segments == expected


def test_segments_of_wide_heads(cut):
    cut(segments=2)
    check(T=70, K=128, V=128, state=True, H=1)


@pytest.mark.parametrize(("K", "V"), [(256, 32), (200, 20)])
def test_segments_whose_maps_are_taken_in_blocks(cut, K, V):
    """A map of 256 x 256 took 544 KiB of shared memory, and no card launched it."""
    cut(segments=3)
    check(T=70, K=K, V=V, state=True, H=1)


def test_three_query_heads_go_one_by_one():
    check(T=20, G=3, H=1, decay="mixed")


@pytest.mark.parametrize("size", [32, 128])
def test_normalizes_inside(size):
    check(torch.float16, T=20, K=size, V=32, decay="mixed", normalize=True, G=2, H=1)


@pytest.mark.parametrize("decay", [None, "mixed"])
def test_packed_documents_empty_and_of_one_token(decay):
    check(T=40, K=32, V=32, lengths=(0, 1, 23, 0, 16), decay=decay, state=True, G=2, H=1)


@pytest.mark.parametrize("decay", [None, "near1"])
def test_segments_chain_exactly(cut, decay):
    cut(segments=2)
    check(torch.float32, T=270, decay=decay, state=True, H=1)


@pytest.mark.parametrize("size", [(16, 64), (64, 16)])
def test_maps_of_states_that_are_not_square(cut, size):
    cut(segments=3)
    check(T=70, K=size[0], V=size[1], state=True, H=1)


def test_gradient_of_the_gate_over_blocks_of_heads_and_tokens():
    check(torch.float32, T=280, H=3, lengths=(0, 260, 20), decay="near1", state=True)


def test_segments_of_packed_documents(cut):
    cut(segments=3)
    check(T=75, lengths=(50, 25), state=True, H=1)


def test_pointers_compute_the_same(cut):
    cut(tensor_maps=False)
    check(T=37, K=32, V=32, G=2, decay="mixed", state=True, H=1)


@pytest.mark.parametrize("keys", ["cosine", "zero"])
@pytest.mark.parametrize("beta", ["one", "high"])
def test_parallel_or_missing_keys_with_strong_writes(keys, beta):
    check(T=64, K=32, V=32, keys=keys, beta=beta, H=1, tolerance=4e-3)  # a write of 2 flips, and rounding errors add up


@pytest.mark.parametrize("decay", ["near0", "near1"])
def test_decays_that_forget_everything_or_nothing(decay):
    check(torch.float16, T=64, decay=decay, H=1, tolerance=2e-3)  # what is left near 0 is 1e-5 of what was there


@pytest.mark.parametrize(
    ("segments", "size", "state"),
    [(1, (16, 16), True), (2, (16, 16), True), (2, (64, 16), False), (2, (128, 128), True)],
)
def test_values_beyond_half_precision_stay_finite_and_exact(cut, segments, size, state):
    cut(segments=segments)
    made = inputs(64, K=size[0], V=size[1], state=state, dtype=torch.float64)
    made.v[:, :, 1] *= 3e20  # float32 inputs as the kernels take them for bfloat16: operands in half precision
    if state:
        made.initial_state[:, 1] *= 1e20
    given = made.to(torch.float32)
    truth = gradients(given.to(torch.float64), reference.delta_rule, scale=0.3, normalize_qk=False)

    chosen = operator._case
    operator_case = lambda *a: dataclasses.replace(chosen(*a), half=True, tensor_maps=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator, "_case", operator_case)
        found = gradients(given.to(DEVICE), kernels.delta_rule, scale=0.3, normalize_qk=False)
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        for head in range(2):
            axis = 1 if name in ("final_state", "dinitial_state") else 2
            pair = (x.select(axis, head) for x in (found[name], expected))
            assert error(*pair) < 1.5e-3, (name, head)  # one scale for a head, whose values differ by 1e3


@pytest.mark.parametrize("half", [True, False])
@pytest.mark.parametrize("large", [{"values": 1e30}, {"loss": 1e30}, {"loss": 1e-30}, {"directions": 1e15}])
def test_any_magnitude_that_float32_holds_is_computed_as_it_is(monkeypatch, large, half):
    chosen = operator._case
    only = lambda *a: dataclasses.replace(chosen(*a), half=half, tensor_maps=False)  # float32 inputs stand for bfloat16
    monkeypatch.setattr(operator, "_case", only)
    made = inputs(33, K=16, V=16, H=1, state=True, decay="mixed", dtype=torch.float64, **large).to(torch.float32)
    truth = gradients(made.to(torch.float64), reference.delta_rule, scale=0.3, normalize_qk="directions" in large)
    found = gradients(made.to(DEVICE), kernels.delta_rule, scale=0.3, normalize_qk="directions" in large)
    for name, expected in truth.items():
        assert found[name].isfinite().all(), name
        assert error(found[name], expected) < (1.5e-3 if half else TOLERANCE[torch.float32]), name


def test_gradient_of_the_final_state_alone():
    made = inputs(20, H=1, dtype=torch.float32).with_grad()
    _, final = made.to(DEVICE).call(kernels.delta_rule, output_final_state=True)
    final.sum().backward()
    wide = made.to(torch.float64).with_grad()
    _, expected = wide.call(reference.delta_rule, scale=0.25, output_final_state=True, normalize_qk=False)
    expected.sum().backward()
    assert error(made.v.grad, wide.v.grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("T", [1, 3])
def test_decoding_updates_the_state_in_place(T):
    made = inputs(T, B=2, G=2, K=20, V=33, decay="mixed", state=True, dtype=torch.float32)
    expected, final = made.to(torch.float64).call(
        reference.delta_rule, scale=20**-0.5, output_final_state=True, normalize_qk=True
    )
    made = made.to(DEVICE)
    o = kernels.delta_rule_step_(made.q, made.k, made.v, made.beta, made.initial_state, g=made.g, normalize_qk=True)
    assert error(o, expected) < 1e-6
    assert error(made.initial_state, final) < 1e-6


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, (16, 32)), (torch.float16, (128, 128))])
@pytest.mark.parametrize("save", [True, False])
def test_operators_keep_their_contracts(dtype, size, save):
    made = inputs(18, K=size[0], V=size[1], G=2, H=1, decay="mixed", state=True, dtype=dtype).to(DEVICE).with_grad()
    arguments = (made.q, made.k, made.v, made.beta, made.g, made.initial_state, None, 0.3, False, save)
    *_, adjoints = operator.forward_operator(*arguments)
    assert (adjoints.numel() > 0) == (save and size == (128, 128))
    torch.library.opcheck(
        operator.forward_operator,
        arguments,
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


def test_says_why_it_cannot_run():
    q = torch.zeros(1, 4, 2, 16, device=DEVICE)
    assert "dtypes" in kernels.unsupported(q, q, q.half(), q[..., 0])
    assert "float64" in kernels.unsupported(q.double(), q.double(), q.double(), q[..., 0])
    wide = torch.zeros(1, 4, 2, 300, device=DEVICE)
    assert "300" in kernels.unsupported(wide, wide, q, q[..., 0])
    assert "no tokens" in kernels.unsupported(q[:, :0], q[:, :0], q[:, :0], q[:, :0, :, 0])
    assert kernels.unsupported(q, q, q, q[..., 0]) is None
