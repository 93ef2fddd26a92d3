"""Likelihoods of continuations: the same in batches as alone, and the same as transformers itself gives them."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltanet_errors import UserError
from distill.evaluation import scoring
from distill.evaluation.scoring import Request, encode, score
from distill.evaluation.tasks.words import opening_ids

PAIRS = [
    ("Once upon a time there was a", " little dog who lived in a big house"),
    ("The", " cat"),
    ("She looked at the sky and", " smiled"),
    ("Tom and Lily went to the park. They saw a big", " ball"),
    ("", "Once"),
]
# Sums of some ten float32 log-probabilities; padding changes only the order in which matrix products are summed.
CLOSE = 2e-4


def plain(model, tokenizer, context: str, continuation: str) -> tuple[float, bool]:
    """Transformers alone, one row."""
    before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    after = tokenizer(context + continuation)["input_ids"][len(tokenizer(context)["input_ids"]) :]
    with torch.no_grad():
        logs = model(torch.tensor([before + after])).logits[0].log_softmax(-1)
    rows = logs[len(before) - 1 : -1]
    return sum(rows[i, t].item() for i, t in enumerate(after)), rows.argmax(-1).tolist() == after


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_a_padded_batch_gives_what_transformers_gives_row_by_row(which, folders, request):
    subject = request.getfixturevalue(which)
    folder = folders[0 if which == "teacher" else 1]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    scores = score(subject, [encode(subject, *pair) for pair in PAIRS], batch_tokens=1000)
    for pair, found in zip(PAIRS, scores):
        likelihood, is_greedy = plain(model, tokenizer, *pair)
        assert found.log_likelihood == pytest.approx(likelihood, abs=CLOSE)
        assert found.is_greedy == is_greedy


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_the_size_of_a_batch_changes_nothing(which, request):
    subject = request.getfixturevalue(which)
    requests = [encode(subject, *pair) for pair in PAIRS]
    alone, together = score(subject, requests, batch_tokens=1), score(subject, requests, batch_tokens=10_000)
    for one, other in zip(alone, together):
        assert one.log_likelihood == pytest.approx(other.log_likelihood, abs=CLOSE)
        assert one.is_greedy == other.is_greedy


def test_a_batch_holds_as_many_rows_as_the_logits_of_their_continuations_allow(student, monkeypatch):
    made, forward = [], student.model.forward

    def watched(ids, **rest):
        out = forward(ids, **rest)
        made.append(out.logits.shape[:2])
        return out

    monkeypatch.setattr(student.model, "forward", watched)
    requests = [Request((*range(5, 24), last), 18) for last in range(30, 38)]  # two tokens each, of one context
    requests = [Request((n, *request.ids[1:]), 18) for n, request in enumerate(requests)]
    monkeypatch.setattr(scoring, "LOGIT_BYTES", 4 * 1024 * 6)  # six positions of 1,024 tokens
    score(student, requests, batch_tokens=1000)
    assert made == [(3, 2), (3, 2), (2, 2)]


def test_what_a_model_would_say_itself_is_greedy_and_nothing_else(student):
    prompt = student.tokenizer("Once upon a time")["input_ids"]
    out = student.model.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False, eos_token_id=None)
    ids = out[0].tolist()
    other = [*ids[:-1], (ids[-1] + 1) % 1024]
    found = score(student, [Request(tuple(ids), len(prompt)), Request(tuple(other), len(prompt))])
    assert [one.is_greedy for one in found] == [True, False]


def test_all_last_tokens_of_a_context_share_one_row_and_sum_to_one(student, monkeypatch):
    rows = []
    forward = student.model.forward
    monkeypatch.setattr(student.model, "forward", lambda ids, **rest: rows.append(len(ids)) or forward(ids, **rest))
    found = score(student, [Request((5, 6, 7, last), 3) for last in range(1024)])
    assert rows == [1]
    total = sum(torch.tensor([one.log_likelihood for one in found], dtype=torch.float64).exp())
    assert total.item() == pytest.approx(1, abs=1e-5)  # float32 softmax over 1024


def test_white_space_between_the_two_belongs_to_the_continuation(student):
    assert encode(student, "a dog ", "ran") == encode(student, "a dog", " ran")


def test_a_context_beyond_the_range_is_cut_on_its_left(student):
    request = encode(student, "word " * 399 + "word", " end")
    assert request.is_cut
    assert len(request.ids) == student.max_context
    short = encode(student, "word", " end")
    assert not short.is_cut
    assert request.ids[request.start :] == short.ids[short.start :]


def test_a_continuation_beyond_the_range_and_an_empty_one_are_refused(student):
    with pytest.raises(UserError, match="longer than the model's range, 160"):
        encode(student, "a", " word" * 400)
    with pytest.raises(UserError, match="nothing to score"):
        encode(student, "a dog", "")


def test_only_what_stands_before_a_text_opens_it():
    class Ends:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 40, 2] if add_special_tokens else [40]}

    class Bare:
        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [40]}

    assert opening_ids(Ends()) == [1]
    assert opening_ids(Bare()) == []
