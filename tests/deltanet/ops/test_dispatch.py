"""The public operation chooses a backend it can explain, and refuses what does not fit by name."""

import pytest
import torch
from delta_inputs import inputs

from deltanet import UserError, delta_rule
from deltanet.ops import delta_rule_step_, explain_backend


def choice(made, **options):
    return explain_backend(made.q, made.k, made.v, made.beta, g=made.g, cu_seqlens=made.cu_seqlens, **options)


def test_long_inputs_on_a_cpu_take_chunk_and_say_why():
    chosen = choice(inputs(100))
    assert chosen.backend == "chunk"
    assert str(chosen) == "chunk (triton not: the tensors are on cpu; recurrent not: 100 tokens, above 16)"


def test_the_interpreter_is_never_chosen_by_itself(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choice(inputs(100)).backend == "chunk"


def test_short_inputs_take_recurrent_only_without_gradients():
    assert choice(inputs(3)).backend == "recurrent"
    made = inputs(3).with_grad()
    assert choice(made).backend == "chunk"
    with torch.no_grad():
        assert choice(made).backend == "recurrent"
    assert choice(inputs(3, lengths=(1, 2))).backend == "chunk"


def test_the_environment_overrides_the_choice(monkeypatch):
    monkeypatch.setenv("DELTANET_BACKEND", "reference")
    assert choice(inputs(100)).backend == "reference"
    assert choice(inputs(100), backend="chunk").backend == "chunk"
    monkeypatch.setenv("DELTANET_BACKEND", "chunks")
    with pytest.raises(UserError, match=r"DELTANET_BACKEND is 'chunks'.*did you mean 'chunk'"):
        choice(inputs(100))


def test_all_backends_agree():
    made = inputs(12, B=2, H=2, G=2, decay="mixed", state=True)
    results = [
        made.call(delta_rule, output_final_state=True, backend=name) for name in ("reference", "chunk", "recurrent")
    ]
    for o, final in results[1:]:
        assert torch.allclose(o, results[0][0], atol=1e-5)
        assert torch.allclose(final, results[0][1], atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 9, 3, 16)}, "q has 3 heads, which is not a multiple of k's 2"),
        ({"q": torch.zeros(1, 9, 2, 15)}, r"k has shape \[1, 9, 2, 16\]; expected \[1, 9, 2, 15\]"),
        ({"k": torch.zeros(1, 9, 32)}, "expected 4"),
        ({"v": torch.zeros(1, 8, 2, 16)}, r"v has shape \[1, 8, 2, 16\]"),
        ({"beta": torch.zeros(1, 9, 1)}, "beta has shape"),
        ({"beta": torch.zeros(1, 9, 2, dtype=torch.int64)}, "beta is torch.int64"),
        ({"g": torch.zeros(1, 9)}, "g has shape"),
        ({"initial_state": torch.zeros(2, 2, 16, 16)}, "the state has shape"),
        ({"cu_seqlens": torch.tensor([0, 5])}, r"cu_seqlens \[0, 5\] does not rise from 0 to 9"),
        ({"cu_seqlens": torch.tensor([0, 6, 5, 9])}, "does not rise"),
        ({"cu_seqlens": torch.tensor([0.0, 9.0])}, "expected int32 or int64"),
        ({"k": torch.zeros(1, 9, 2, 16, device="meta")}, "k is on meta, q on cpu"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    made = inputs(9)
    for name, value in change.items():
        setattr(made, name, value)
    with pytest.raises(UserError, match=message):
        made.call(delta_rule)


def test_packed_documents_need_a_batch_of_one():
    made = inputs(9, B=2)
    made.cu_seqlens = torch.tensor([0, 9])
    with pytest.raises(UserError, match="batch of 1, not 2"):
        made.call(delta_rule)


def test_kernels_named_without_a_device_say_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = inputs(3, state=True)
    with pytest.raises(UserError, match="'triton' cannot run here: the tensors are on cpu"):
        made.call(delta_rule, backend="triton")
    with pytest.raises(UserError, match="'triton' cannot run here: the tensors are on cpu"):
        delta_rule_step_(made.q, made.k, made.v, made.beta, made.initial_state, backend="triton")


def test_a_step_refuses_forms_without_steps_and_narrow_states():
    made = inputs(1, state=True)
    arguments = (made.q, made.k, made.v, made.beta)
    with pytest.raises(UserError, match="'chunk' has no steps"):
        delta_rule_step_(*arguments, made.initial_state, backend="chunk")
    with pytest.raises(UserError, match=r"the state is torch\.float16"):
        delta_rule_step_(*arguments, made.initial_state.half())


def test_autocast_does_not_narrow_the_operation():
    made = inputs(60)
    plain, _ = made.call(delta_rule)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = made.call(delta_rule)
    assert torch.equal(plain, cast)


def test_a_step_checks_its_state():
    made = inputs(1)
    with pytest.raises(UserError, match="the state has shape"):
        delta_rule_step_(made.q, made.k, made.v, made.beta, torch.zeros(1, 2, 16, 15))


def test_recurrent_is_refused_where_it_would_be_silently_wrong():
    with pytest.raises(UserError, match="it has no gradients"):
        inputs(3).with_grad().call(delta_rule, backend="recurrent")
    with pytest.raises(UserError, match="documents are packed"):
        inputs(3, lengths=(1, 2)).call(delta_rule, backend="recurrent")


def test_a_step_refuses_a_backend_that_does_not_exist():
    made = inputs(1, state=True)
    with pytest.raises(UserError, match=r"backend is 'recurent'.*did you mean 'recurrent'"):
        delta_rule_step_(made.q, made.k, made.v, made.beta, made.initial_state, backend="recurent")
