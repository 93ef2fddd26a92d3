"""The chunk form is the sequential rule: values, states and every gradient."""

import itertools

import pytest
import torch
from delta_inputs import error, gradients, inputs

from deltanet import delta_rule

# float64 against float64; what is left is the order of summation over up to a thousand tokens
EXACT = 1e-10
LENGTHS = (0, 1, 2, 15, 31, 32, 33, 63, 64, 65, 127, 1000)
SHAPES = {
    "plain": {},
    "values wider": {"K": 16, "V": 24},
    "keys wider": {"K": 60, "V": 10},
    "width 100": {"K": 100, "V": 100, "H": 1},
    "grouped": {"H": 2, "G": 3},
    "batch": {"B": 3, "H": 1},
    "state": {"state": True},
}


def compare(made, tolerance=EXACT, **options):
    got = gradients(made, delta_rule, backend="chunk", **options)
    truth = gradients(made, delta_rule, backend="reference", **options)
    for name in truth:
        assert error(got[name], truth[name]) < tolerance, name
        assert got[name].isfinite().all(), name


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("decay", [None, "mixed"])
def test_every_length(length, decay):
    compare(inputs(length, decay=decay, state=True, dtype=torch.float64))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("decay", [None, "mixed"])
def test_every_shape(shape, decay):
    compare(inputs(70, decay=decay, dtype=torch.float64, **SHAPES[shape]))


@pytest.mark.parametrize(
    ("keys", "beta", "decay"),
    list(itertools.product(["iid", "cosine", "zero"], ["sigmoid", "one", "high"], [None, "near0", "near1"])),
)
def test_adversarial_inputs(keys, beta, decay):
    # parallel keys with beta up to 2 amplify rounding: the state's condition, not the method
    compare(inputs(130, keys=keys, beta=beta, decay=decay, state=True, dtype=torch.float64), tolerance=1e-8)


def test_normalising_inside():
    made = inputs(50, keys="zero", dtype=torch.float64)
    made.q, made.k = 3 * made.q, 0.2 * made.k
    compare(made, normalize_qk=True)


def test_float32_stays_near_the_truth():
    made = inputs(1000, keys="cosine", beta="one", decay="near1", state=True)
    got = gradients(made, delta_rule, backend="chunk")
    truth = gradients(made.to(torch.float64), delta_rule, backend="reference")
    for name in truth:
        assert error(got[name], truth[name]) < 2e-5, name


@pytest.mark.parametrize("decay", [None, "mixed"])
@pytest.mark.parametrize("lengths", [(1, 0, 33, 64, 2, 0), (5,), (0, 7), (40, 40, 40)])
def test_packed_documents(lengths, decay):
    compare(inputs(sum(lengths), lengths=lengths, decay=decay, state=True, G=2, dtype=torch.float64))


def test_no_gradient_crosses_a_document():
    leaves = inputs(90, lengths=(50, 40), decay="mixed").with_grad()
    o, _ = leaves.call(delta_rule, backend="chunk")
    found = torch.autograd.grad(o[:, 50:].square().sum(), list(leaves.tensors().values()))
    for gradient in found:
        assert (gradient[:, :50] == 0).all()
        assert (gradient[:, 50:] != 0).any()


@pytest.mark.parametrize("decay", [None, "mixed"])
def test_splitting_anywhere_equals_the_whole(decay):
    made = inputs(257, decay=decay, state=True, dtype=torch.float64)
    whole, final = made.call(delta_rule, backend="chunk", output_final_state=True)
    parts = ("q", "k", "v", "beta", "g")
    for split in (1, 2, 31, 32, 33, 64, 100, 128, 200, 255, 256):
        state, outputs = made.initial_state, []
        for piece in (slice(0, split), slice(split, None)):
            q, k, v, beta, g = (None if x is None else x[:, piece] for x in (getattr(made, n) for n in parts))
            o, state = delta_rule(q, k, v, beta, g=g, initial_state=state, backend="chunk", output_final_state=True)
            outputs.append(o)
        assert error(torch.cat(outputs, 1), whole) < EXACT
        assert error(state, final) < EXACT


def test_heads_are_equivariant():
    made = inputs(40, H=4, decay="mixed", dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    whole, _ = made.call(delta_rule, backend="chunk")
    q, k, v, beta, g = (x[:, :, order] for x in (made.q, made.k, made.v, made.beta, made.g))
    shuffled, _ = delta_rule(q, k, v, beta, g=g, backend="chunk")
    assert error(shuffled, whole[:, :, order]) < EXACT


@pytest.mark.parametrize("options", [{}, {"decay": "mixed"}, {"G": 2, "decay": "mixed"}, {"lengths": (3, 0, 4)}])
def test_gradcheck(options):
    leaves = inputs(7, H=1, K=3, V=2, state=True, dtype=torch.float64, **options).with_grad()
    names, tensors = zip(*leaves.tensors().items())

    def rule(*values):
        named = dict(zip(names, values))
        q, k, v, beta = (named.pop(n) for n in ("q", "k", "v", "beta"))
        return delta_rule(
            q, k, v, beta, cu_seqlens=leaves.cu_seqlens, output_final_state=True, backend="chunk", **named
        )

    assert torch.autograd.gradcheck(rule, tensors)


def test_a_constant_input_over_131072_tokens_stays_bounded():
    """|I - beta k k^T| <= 1, so the state cannot grow; it converges to the one that recalls v from k."""
    T = 131072
    unit = torch.full((1, 1, 1, 4), 0.5)
    constant = lambda x: x.expand(1, T, 1, 4)
    value = torch.tensor([[[[1.0, -2.0, 3.0, 0.5]]]])
    o, S = delta_rule(
        constant(unit), constant(unit), constant(value), torch.full((1, T, 1), 0.9), scale=1.0, backend="chunk",
        output_final_state=True,
    )  # fmt: skip
    assert S.abs().max() < 3
    assert (o[:, -1] - value[0]).abs().max() < 1e-3


@pytest.mark.parametrize("seed", range(40))
def test_random_shapes(seed):
    draw = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (1,), generator=draw))]
    lengths = pick(None, None, tuple(int(x) for x in torch.randint(0, 40, (4,), generator=draw)))
    made = inputs(
        sum(lengths) if lengths else int(torch.randint(1, 120, (1,), generator=draw)),
        B=1 if lengths else pick(1, 2),
        H=pick(1, 3),
        G=pick(1, 2),
        K=pick(2, 16, 33),
        V=pick(3, 16),
        keys=pick("iid", "cosine", "zero"),
        beta=pick("sigmoid", "one", "high"),
        decay=pick(None, "near0", "near1", "mixed"),
        state=pick(True, False),
        lengths=lengths,
        seed=seed,
        dtype=torch.float64,
    )
    compare(made, tolerance=1e-8)
