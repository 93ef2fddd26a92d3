"""Perplexity, divergence and agreement, by position."""

import math
from itertools import pairwise

import pytest
import torch
from eval_subjects import TEXT
from hypothesis import given
from hypothesis import strategies as st

from distill.evaluation.language import continuations, language, position_edges, seen
from distill.evaluation.windows import read_windows

CLOSE = 1e-5  # float32 losses of a few hundred tokens, summed in another order


@pytest.fixture(scope="module")
def windows(teacher):
    return read_windows(str(TEXT), teacher, tokens=400, window=100, longest=160)


def test_perplexity_is_that_of_transformers_own_loss(teacher, student, windows):
    report = language(student, teacher, windows)
    for who, subject in (("teacher", teacher), ("student", student)):
        with torch.no_grad():
            losses = [subject.model(row[None], labels=row[None]).loss.item() for row in windows]
        assert report["perplexity"][who] == pytest.approx(math.exp(sum(losses) / len(losses)), rel=CLOSE)


def test_divergence_and_agreement_are_those_of_the_two_distributions(teacher, student, windows):
    with torch.no_grad():
        p, q = (subject.model(windows).logits[:, :-1].double().log_softmax(-1) for subject in (teacher, student))
    report = language(student, teacher, windows)
    assert report["kl"] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-4)  # float32 against float64
    assert report["top1_agreement"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item(), abs=1e-12)
    assert report["kl"] > 0.01


def test_a_teacher_beside_itself_differs_in_nothing(teacher, windows):
    report = language(teacher, teacher, windows)
    assert report["kl"] == pytest.approx(0, abs=1e-7)  # rounding of float32 log-probabilities
    assert report["top1_agreement"] == 1
    assert report["perplexity"]["teacher"] == report["perplexity"]["student"]


def test_positions_together_are_the_whole(teacher, student, windows):
    report = language(student, teacher, windows)
    rows = report["by_position"]
    weights = [row["last"] - row["first"] + 1 for row in rows]
    assert sum(weights) == windows.shape[1] - 1
    mean = sum(w * row["kl"] for w, row in zip(weights, rows)) / sum(weights)
    assert mean == pytest.approx(report["kl"], rel=1e-9)
    nats = sum(w * math.log(row["perplexity"]["student"]) for w, row in zip(weights, rows)) / sum(weights)
    assert math.exp(nats) == pytest.approx(report["perplexity"]["student"], rel=1e-9)


def test_kinds_of_next_tokens_together_are_the_whole(teacher, student, windows):
    report = language(student, teacher, windows)
    rows = report["by_seen"]
    assert sum(row["tokens"] for row in rows) == windows.shape[0] * (windows.shape[1] - 1)
    mean = sum(row["tokens"] * row["kl"] for row in rows) / sum(row["tokens"] for row in rows)
    assert mean == pytest.approx(report["kl"], rel=1e-9)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            teacher.model(windows).logits[:, :-1].transpose(1, 2), windows[:, 1:], reduction="none"
        )
    is_pair = torch.stack([seen(window) for window in windows]) == 2
    pairs = next(row for row in rows if row["seen"] == "pair")
    assert pairs["tokens"] == is_pair.sum() > 0
    assert pairs["perplexity"]["teacher"] == pytest.approx(losses[is_pair].mean().exp().item(), rel=CLOSE)


def test_a_pair_is_seen_only_side_by_side():
    #                       5 6 5: token  6: pair  7: new  6 5: pair  7: token
    assert seen(torch.tensor([5, 6, 5, 6, 7, 6, 5, 7])).tolist() == [0, 1, 2, 0, 1, 2, 1]


@given(st.integers(1, 5000))
def test_the_ranges_of_positions_cover_each_once(length):
    edges = position_edges(length)
    assert edges[0][0] == 0
    assert edges[-1][1] == length
    assert all(before[1] == after[0] for before, after in pairwise(edges))
    assert all(start < stop for start, stop in edges)


def test_without_a_teacher_only_the_student_is_told(student, windows):
    told = []
    report = language(student, None, windows, advance=told.append)
    assert set(report) == {"tokens", "window", "perplexity", "by_position", "by_seen"}
    assert set(report["perplexity"]) == {"student"}
    assert sum(told) == windows.numel()


def test_both_go_on_greedily_from_the_same_words(teacher, student, windows):
    samples = continuations(student, teacher, windows, count=2, prompt_tokens=16, new_tokens=12)
    assert len(samples) == 2
    with torch.no_grad():
        ids = windows[0, :16]
        for _ in range(12):
            ids = torch.cat([ids, student.model(ids[None]).logits[0, -1:].argmax(-1)])
    assert samples[0]["student"] == student.tokenizer.decode(ids[16:])
    assert samples[0]["prompt"] == student.tokenizer.decode(windows[0, :16])
    assert samples[0]["text"] == student.tokenizer.decode(windows[0, 16:28])
    assert 0 <= samples[0]["same_tokens"] < 12


def test_a_model_beside_itself_writes_the_same_to_the_end(teacher, windows):
    (sample,) = continuations(teacher, teacher, windows[:1], new_tokens=12)
    assert sample["student"] == sample["teacher"]
    assert sample["same_tokens"] == 12
