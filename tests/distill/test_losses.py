"""Laws of the losses over the vocabulary, against float64 on whole logits.

Tolerances: float64 against float64 1e-12 relative (another order of sums); float32 1e-6 relative of the largest entry.
"""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from distill.losses import (
    CHUNK_BYTES,
    Term,
    TopK,
    divergence,
    num_chunks_for,
    token_logprobs,
    top_k_divergence,
    vocabulary_loss,
)
from distill.packing import IGNORED

POSITIONS, WIDTH, TEACHER_WIDTH, VOCABULARY = 37, 12, 9, 53
TERMS = {
    "forward": Term("forward_kl"),
    "forward_hot": Term("forward_kl", temperature=3.0),
    "reverse": Term("reverse_kl"),
    "reverse_cold": Term("reverse_kl", temperature=0.5),
    "jsd": Term("jsd", beta=0.5),
    "jsd_skewed": Term("jsd", temperature=2.0, beta=0.1),
    "ce": Term("ce"),
}
every_term = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS.keys())


def formula(term, student, teacher, targets):
    """Per row, from the definitions, for autograd."""
    if term.name == "ce":
        return cross_entropy(student, targets, reduction="none")
    T, b = term.temperature, term.beta
    log_q, log_p = (student / T).log_softmax(-1), (teacher / T).log_softmax(-1)
    q, p = log_q.exp(), log_p.exp()
    if term.name == "forward_kl":
        value = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
    elif term.name == "reverse_kl":
        value = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = torch.logaddexp(log_p + math.log(b), log_q + math.log(1 - b))
        value = b * torch.where(p > 0, p * (log_p - log_m), 0).sum(-1) + (1 - b) * (q * (log_q - log_m)).sum(-1)
    return T * T * value


def problem(seed=0, dtype=torch.float64, positions=POSITIONS, share=0.6):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    hidden = draw(positions, WIDTH).requires_grad_()
    weight = draw(VOCABULARY, WIDTH).requires_grad_()
    targets = torch.randint(VOCABULARY, (positions,), generator=generator)
    targets[torch.rand(positions, generator=generator) > share] = IGNORED
    return hidden, weight, targets, draw(positions, TEACHER_WIDTH), draw(VOCABULARY, TEACHER_WIDTH)


def chunked(term, hidden, weight, targets, teacher_hidden, teacher_weight, **options):
    options.setdefault("num_valid", int((targets != IGNORED).sum()))
    terms = term if isinstance(term, list) else [term]
    return vocabulary_loss(
        hidden, weight, targets, terms, teacher_hidden=teacher_hidden, teacher_weight=teacher_weight, **options
    )[0]


def whole(term, hidden, weight, targets, teacher_hidden, teacher_weight):
    hidden, weight = hidden.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    valid = targets != IGNORED
    student, teacher = hidden @ weight.T, teacher_hidden.double() @ teacher_weight.double().T
    loss = formula(term, student[valid], teacher[valid], targets[valid]).mean()
    return loss.detach(), torch.autograd.grad(loss, (hidden, weight))


def near(actual, expected, relative):
    error = (actual.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert error < relative, f"relative error {error:.2e}"


@every_term
@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, None])
def test_any_chunk_equals_whole_logits_in_float64(term, chunk_tokens):
    data = problem()
    loss = chunked(term, *data, chunk_tokens=chunk_tokens)
    expected, gradients = whole(term, *data)
    near(loss, expected, 1e-12)
    for actual, wanted in zip(torch.autograd.grad(loss, data[:2]), gradients):
        near(actual, wanted, 1e-12)


@every_term
def test_float32_is_within_1e6_of_float64(term):
    data = problem(dtype=torch.float32)
    loss = chunked(term, *data, chunk_tokens=8)
    expected, gradients = whole(term, *data)
    near(loss, expected, 1e-6)
    for actual, wanted in zip(torch.autograd.grad(loss, data[:2]), gradients):
        near(actual, wanted, 2e-6)  # sums over 22 rows


@every_term
def test_bfloat16_gradients_keep_their_dtype_and_are_near(term):
    data = problem(dtype=torch.bfloat16, positions=400)
    loss = chunked(term, *data, chunk_tokens=5)
    _, gradients = whole(term, *data)
    assert loss.dtype == torch.float32
    for actual, wanted in zip(torch.autograd.grad(loss, data[:2]), gradients):
        assert actual.dtype == torch.bfloat16
        # logits are rounded to 8 bits before the softmax, which moves probabilities by up to |logit| 2^-8
        error = (actual.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error < 0.02


def test_terms_add_up_with_their_weights_and_are_reported_unweighted():
    data = problem()
    terms = [Term("forward_kl", weight=0.7), Term("ce", weight=0.2)]
    total, parts = vocabulary_loss(
        *data[:3],
        terms,
        int((data[2] != IGNORED).sum()),
        teacher_hidden=data[3],
        teacher_weight=data[4],
        chunk_tokens=9,
    )
    forward, ce = whole(terms[0], *data), whole(terms[1], *data)
    near(total, 0.7 * forward[0] + 0.2 * ce[0], 1e-12)
    near(parts["forward_kl"], forward[0], 1e-12)
    near(parts["ce"], ce[0], 1e-12)
    for actual, first, second in zip(torch.autograd.grad(total, data[:2]), forward[1], ce[1]):
        near(actual, 0.7 * first + 0.2 * second, 1e-12)


@pytest.mark.parametrize("name", ["forward", "forward_hot", "reverse", "reverse_cold", "jsd", "jsd_skewed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name, dtype):
    hidden, weight, targets, *_ = problem(dtype=dtype)
    loss = chunked(TERMS[name], hidden, weight, targets, hidden, weight, chunk_tokens=8)
    assert loss == 0
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, (hidden, weight)))


@every_term
def test_positions_that_are_not_valid_change_nothing_even_if_they_hold_nan(term):
    hidden, weight, targets, teacher_hidden, teacher_weight = problem()
    loss = chunked(term, hidden, weight, targets, teacher_hidden, teacher_weight)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    more = torch.full((1000, WIDTH), math.nan, dtype=hidden.dtype)
    padded = torch.cat([hidden.detach(), more]).requires_grad_()
    teacher = torch.cat([teacher_hidden, more[:, :TEACHER_WIDTH]])
    ignored = torch.cat([targets, torch.full((1000,), IGNORED)])
    again = chunked(term, padded, weight, ignored, teacher, teacher_weight)
    grad_padded, grad_weight = torch.autograd.grad(again, (padded, weight))
    assert again == loss
    assert torch.equal(grad_padded[:POSITIONS], gradients[0])
    assert torch.equal(grad_weight, gradients[1])
    assert (grad_padded[POSITIONS:] == 0).all()
    assert (gradients[0][targets == IGNORED] == 0).all()


@every_term
@pytest.mark.parametrize("parts", [1, 2, 4, 8])
def test_micro_batches_of_unequal_valid_tokens_sum_to_the_whole(term, parts):
    data = problem(positions=40, share=0.3)
    count = int((data[2] != IGNORED).sum())
    expected, gradients = whole(term, *data)
    losses = [
        chunked(term, hidden, data[1], targets, teacher, data[4], num_valid=count)
        for hidden, targets, teacher in zip(*(data[i].tensor_split(parts) for i in (0, 2, 3)))
    ]
    near(sum(losses), expected, 1e-12)
    for actual, wanted in zip(torch.autograd.grad(sum(losses), data[:2]), gradients):
        near(actual, wanted, 1e-12)


@every_term
def test_without_a_valid_token_the_loss_and_its_gradients_are_zero(term):
    data = problem()
    data[2].fill_(IGNORED)
    for num_valid in (0, torch.tensor(0), 5):
        loss = chunked(term, *data, num_valid=num_valid)
        assert loss == 0
        assert all((gradient == 0).all() for gradient in torch.autograd.grad(loss, data[:2]))


def test_the_direction_and_the_temperature_rule_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2) at T = 1; at T = 2 the logits are doubled to keep p and q."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]).double(), torch.tensor([[0.25, 0.25, 0.5]]).double()
    target = torch.tensor([0])
    exactly = lambda value: torch.tensor([value], dtype=torch.float64)
    for T in (1.0, 2.0):
        forward, gradient = divergence(Term("forward_kl", temperature=T), T * q.log(), T * p.log(), target)
        near(forward, exactly(T * T * 0.25 * math.log(2)), 1e-12)  # 1/2 log 2 + 0 + 1/4 log 1/2
        near(gradient, T * torch.tensor([[-0.25, 0.0, 0.25]]), 1e-12)
    reverse, _ = divergence(Term("reverse_kl"), (2 * q).log(), p.log(), target)
    near(reverse, exactly(0.25 * math.log(2)), 1e-12)
    skewed = (0.25 * math.log(0.25 / 0.375) + 0.25 * math.log(1.0) + 0.5 * math.log(0.5 / 0.375)) / 2
    skewed += (0.5 * math.log(0.5 / 0.375) + 0.25 * math.log(0.25 / 0.375)) / 2
    near(divergence(Term("jsd", beta=0.5), q.log(), p.log(), target)[0], exactly(skewed), 1e-12)
    near(divergence(Term("ce"), q.log(), None, target)[0], exactly(math.log(4)), 1e-12)


@every_term
@pytest.mark.parametrize("T", [0.05, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_logits_give_finite_gradients_equal_to_float64(term, T, dtype):
    if term.name != "ce":
        term = Term(term.name, temperature=T, beta=term.beta)
    student = torch.tensor([[0.0, 60, -60, 3, 0], [60, 60, -60, -60, 0]]).to(dtype)
    teacher = torch.tensor([[90.0, 0, 0, 0, -90], [0, 60, 1, -1, 0]]).to(dtype)
    targets = torch.tensor([2, 0])
    value, gradient = divergence(term, student.float(), teacher.float(), targets)
    exact = student.double().requires_grad_()
    expected = formula(term, exact, teacher.double(), targets)
    (wanted,) = torch.autograd.grad(expected.sum(), exact)
    assert gradient.isfinite().all()
    near(value, expected.detach(), 1e-5)
    near(gradient, wanted, 1e-5)


@every_term
def test_a_teacher_that_excludes_tokens_gives_finite_values_and_gradients(term):
    student = torch.tensor([[0.0, 2, -1, 3, 0]])
    teacher = torch.tensor([[1.0, 0, 2, -math.inf, -math.inf]])
    value, gradient = divergence(term, student, teacher, torch.tensor([1]))
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    if term.name == "forward_kl":
        q, p = (student / term.temperature).softmax(-1), (teacher / term.temperature).softmax(-1)
        near(gradient, term.temperature * (q - p), 1e-6)


@every_term
def test_padded_vocabulary_rows_take_no_part(term):
    hidden, weight, targets, teacher_hidden, teacher_weight = problem()
    loss = chunked(term, hidden, weight, targets, teacher_hidden, teacher_weight)
    wide = torch.cat([weight.detach(), torch.full((11, WIDTH), 9.0).double()]).requires_grad_()
    wide_teacher = torch.cat([teacher_weight, torch.full((75, TEACHER_WIDTH), -3.0).double()])
    again = chunked(term, hidden, wide, targets, teacher_hidden, wide_teacher, vocab_size=VOCABULARY)
    assert again == loss
    assert (torch.autograd.grad(again, wide)[0][VOCABULARY:] == 0).all()


def test_the_number_of_chunks_ignores_how_many_positions_are_valid():
    assert num_chunks_for(1000, 50, 64) == 16
    assert num_chunks_for(8192, 128256) == math.ceil(8192 / (CHUNK_BYTES // (16 * 128256)))
    assert num_chunks_for(8192, 128256, logit_bytes=4) == math.ceil(8192 / (CHUNK_BYTES // (4 * 128256)))
    assert num_chunks_for(0, 50, 64) == 1


def test_no_tensor_of_all_logits_exists(monkeypatch):
    """The largest tensor any operation makes stays at chunk x vocabulary (and the heads themselves)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    data = problem(positions=640)
    with Watch():
        loss = chunked([Term("forward_kl"), Term("jsd"), Term("ce")], *data, chunk_tokens=16)
        torch.autograd.grad(loss, data[:2])
    assert largest <= max(16 * VOCABULARY, 640 * WIDTH)


def test_frozen_inputs_get_no_gradient_and_cost_none():
    hidden, weight, targets, *teacher = problem()
    loss = chunked(TERMS["forward"], hidden, weight.detach(), targets, *teacher)
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert chunked(TERMS["forward"], hidden, weight, targets, *teacher) == loss


def test_wrong_shapes_are_refused():
    hidden, weight, targets, teacher_hidden, teacher_weight = problem()
    with pytest.raises(ValueError, match="needs teacher"):
        vocabulary_loss(hidden, weight, targets, [Term("forward_kl")], 1)
    with pytest.raises(ValueError, match="same positions"):
        chunked(TERMS["ce"], hidden, weight, targets[1:], None, None)
    with pytest.raises(ValueError, match="vocab_size"):
        chunked(TERMS["jsd"], hidden, weight, targets, teacher_hidden, teacher_weight, vocab_size=54)


@pytest.mark.parametrize("chunk_tokens", [1, 8, None])
def test_logprobs_of_tokens_equal_log_softmax(chunk_tokens):
    hidden, weight, targets, *_ = problem()
    actual = token_logprobs(hidden, weight, targets, chunk_tokens=chunk_tokens)
    logits = hidden @ weight.T
    expected = -cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    near(actual, expected, 1e-12)
    direction = torch.linspace(-1, 1, POSITIONS).double()
    for left, right in zip(
        torch.autograd.grad(actual @ direction, (hidden, weight)),
        torch.autograd.grad(expected @ direction, (hidden, weight)),
    ):
        near(left, right, 1e-12)


def test_autocast_is_the_loss_of_inputs_rounded_to_its_type():
    draw = torch.Generator().manual_seed(3)
    hidden, teacher_hidden = torch.randn(2, 9, 8, generator=draw)
    weight, teacher_weight = torch.randn(2, 13, 8, generator=draw)
    targets = torch.arange(9)
    results = []
    for rounded in (False, True):
        h, w = (x.clone().requires_grad_() for x in (hidden, weight))
        given = [x.bfloat16() if rounded else x for x in (h, w, teacher_hidden, teacher_weight)]
        with torch.autocast("cpu", torch.bfloat16, enabled=not rounded):
            loss, _ = vocabulary_loss(
                given[0], given[1], targets, [Term("forward_kl")], 9, teacher_hidden=given[2], teacher_weight=given[3]
            )
        loss.backward()
        results.append((loss, h.grad, w.grad))
    assert results[0][1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(*results))


def likeliest(teacher, k):
    """The teacher's logits (n, V) as `TopK`, from the definition: the mass of the others is summed one by one."""
    p, ids = teacher.softmax(-1).topk(k, -1)
    others = torch.ones_like(teacher, dtype=torch.bool).scatter(-1, ids, False)
    rest = torch.where(others, teacher.softmax(-1), 0).sum(-1)
    return TopK(ids, p.log(), rest.log())


def of_events(student, kept):
    """Forward KL over the k tokens and the event that none of them comes, from the definition, for autograd."""
    q = student.softmax(-1).gather(-1, kept.ids)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (kept.log_p.exp(), q))
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("k", [1, 5, VOCABULARY - 1])
@pytest.mark.parametrize("chunk_tokens", [1, 7, None])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_of_the_likeliest_tokens_any_chunk_equals_the_definition_in_float64(k, chunk_tokens, dtype, tolerance):
    """Looser than for whole logits, since the definition here takes 1 - sum p of numbers near 1."""
    hidden, weight, targets, teacher_hidden, teacher_weight = problem(seed=k, dtype=dtype)
    valid = targets != IGNORED
    kept = likeliest((teacher_hidden.double() @ teacher_weight.double().T)[valid], k)
    terms = [Term("forward_kl", weight=0.7), Term("ce", weight=0.2)]
    loss, parts = vocabulary_loss(
        hidden, weight, targets, terms, int(valid.sum()), top_k=kept, chunk_tokens=chunk_tokens
    )
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    logits = (exact[0] @ exact[1].T)[valid]
    divergences = of_events(logits, kept).mean()
    expected = 0.7 * divergences + 0.2 * cross_entropy(logits, targets[valid])
    near(loss, expected, tolerance)
    near(parts["forward_kl"], divergences, tolerance)
    wanted = torch.autograd.grad(expected, exact)
    for actual, expected in zip(torch.autograd.grad(loss, (hidden, weight)), wanted):
        assert actual.dtype == dtype
        near(actual, expected, tolerance)


def test_of_the_likeliest_tokens_it_rises_with_k_to_the_divergence_over_all():
    generator = torch.Generator().manual_seed(1)
    student, teacher = 3 * torch.randn(2, 20, VOCABULARY, generator=generator, dtype=torch.float64)
    values = torch.stack([top_k_divergence(student, likeliest(teacher, k))[0] for k in range(1, VOCABULARY + 1)])
    assert (values.diff(dim=0) >= -1e-12).all()
    assert (values[0] > 0).all()
    whole, gradient = divergence(Term("forward_kl"), student, teacher, None)
    last, last_gradient = top_k_divergence(student, likeliest(teacher, VOCABULARY))
    near(last, whole, 1e-12)
    near(last_gradient, gradient, 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k", [1, 8, VOCABULARY])
def test_of_the_likeliest_tokens_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(k, dtype):
    """Up to float32 rounding of probabilities, which are at most 1 and summed over 22 rows."""
    hidden, weight, targets, *_ = problem(dtype=dtype)
    valid = targets != IGNORED
    logits = (hidden @ weight.T)[valid].detach().float()
    log_p = logits.log_softmax(-1)
    ids = log_p.topk(k, -1)[1]
    kept = TopK(ids, log_p.gather(-1, ids), log_p.scatter(-1, ids, -math.inf).logsumexp(-1))
    loss, _ = vocabulary_loss(hidden, weight, targets, [Term("forward_kl")], int(valid.sum()), top_k=kept)
    assert abs(loss.item()) < 1e-6
    for gradient in torch.autograd.grad(loss, (hidden, weight)):
        assert gradient.abs().max() < 1e-6 * max(hidden.abs().max(), weight.abs().max())


def test_of_the_likeliest_tokens_extreme_logits_and_excluded_tokens_stay_finite():
    student = torch.tensor([[0.0, 90, -90, 3, 0], [60.0, 60, -60, -60, 0], [200.0, 0, 0, 0, 0]])
    ids = torch.tensor([[2, 3], [0, 1], [0, 4]])
    log_p = torch.tensor([[-9.0, -math.inf], [math.log(0.5), math.log(0.5)], [0.0, -50.0]])
    sure = TopK(ids, log_p, torch.tensor([-1e-4, -40.0, -math.inf]))
    value, gradient = top_k_divergence(student, sure)
    assert value.isfinite().all()
    assert gradient.isfinite().all()
    assert gradient.sum(-1).abs().max() < 1e-3  # of probabilities that sum to 1 but for the numbers above


def test_of_the_likeliest_tokens_what_cannot_be_computed_is_refused():
    hidden, weight, targets, teacher_hidden, teacher_weight = problem()
    valid = targets != IGNORED
    kept = likeliest((teacher_hidden @ teacher_weight.T)[valid], 3)
    with pytest.raises(ValueError, match="temperature 1"):
        vocabulary_loss(hidden, weight, targets, [Term("forward_kl", temperature=2.0)], 1, top_k=kept)
    with pytest.raises(ValueError, match="needs teacher"):
        vocabulary_loss(hidden, weight, targets, [Term("reverse_kl")], 1, top_k=kept)
    with pytest.raises(ValueError, match=r"top_k has \d+ rows for \d+ valid positions"):
        vocabulary_loss(hidden, weight, torch.zeros_like(targets), [Term("forward_kl")], 1, top_k=kept)
