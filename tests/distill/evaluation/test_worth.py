"""Speed and memory: what is counted, and from where on the student is ahead."""

import pytest
import torch

from distill.evaluation import worth as module
from distill.evaluation.worth import cache_crossover, cache_growth, crossover, tensor_bytes, worth


def row(context, teacher, student):
    return {"context": context, "teacher": {"figure": teacher}, "student": {"figure": student}}


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.0)


def test_every_figure_is_measured_and_positive(teacher, student, quickly):
    told = []
    report = worth(student, teacher, [64, 128], advance=told.append)
    assert told == [64, 128]
    for found in report["speed"]["by_context"]:
        for who in ("teacher", "student"):
            assert set(found[who]) == {*module.FIGURES, "rounds"}
            assert min(found[who].values()) > 0
    assert set(report["speed"]["crossover"]) == set(module.FIGURES)
    assert report["speed"]["backend"]["student"] == "prefill: chunk, decoding: recurrent, attention: sdpa"
    assert report["speed"]["backend"]["teacher"] == "attention: sdpa"


def test_the_cache_is_counted_to_the_byte(teacher, student, quickly):
    """Keys and values of one head of 16 in float32: 128 bytes a token and layer; the delta rule's layer keeps two
    states of 16 x 16, and three values for its taps."""
    memory = worth(student, teacher, [64, 128])["memory"]
    assert [found["teacher"]["cache_bytes"] for found in memory["by_context"]] == [2 * 128 * 64, 2 * 128 * 128]
    state = 4 * (2 * 16 * 16 + 3 * 16)
    assert [found["student"]["cache_bytes"] for found in memory["by_context"]] == [128 * 64 + state, 128 * 128 + state]
    assert memory["cache_bytes_per_token"] == {"teacher": 256.0, "student": 128.0}
    assert memory["crossover"] == f"smaller from {state // 128 + 1} tokens on"


def test_weights_are_counted_once_where_they_are_tied(teacher, student, quickly):
    memory = worth(student, teacher, [64])["memory"]
    assert memory["weights_bytes"]["teacher"] == 4 * sum(p.numel() for p in teacher.model.parameters())
    assert all(found[who]["peak_bytes"] >= memory["weights_bytes"][who] for found in memory["by_context"] for who in
               ("teacher", "student"))  # fmt: skip
    assert memory["crossover"] == "needs two contexts"


def test_what_does_not_fit_is_said_and_the_rest_goes_on(teacher, student, quickly, monkeypatch):
    forward = teacher.model.forward

    def limited(ids, **rest):
        if ids.shape[1] > 50:
            raise torch.OutOfMemoryError("too much")
        return forward(ids, **rest)

    monkeypatch.setattr(teacher.model, "forward", limited)
    report = worth(student, teacher, [64, 128])
    first, second = report["speed"]["by_context"]
    assert isinstance(first["teacher"], dict)
    assert second["teacher"] == "does not fit in memory"
    assert isinstance(second["student"], dict)
    assert report["memory"]["by_context"][1]["teacher"] == "does not fit in memory"
    assert report["memory"]["cache_bytes_per_token"]["teacher"] is None


def test_other_failures_are_not_taken_for_a_lack_of_memory(student, quickly, monkeypatch):
    def broken(ids, **rest):
        raise RuntimeError("a bug")

    monkeypatch.setattr(student.model, "forward", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        worth(student, None, [64])


def test_a_student_alone_has_no_crossover(student, quickly):
    report = worth(student, None, [64])
    assert "crossover" not in report["speed"]
    assert set(report["speed"]["by_context"][0]) == {"context", "student"}


def test_the_same_seed_measures_the_same_tokens(student, quickly, monkeypatch):
    seen = []
    forward = student.model.forward
    monkeypatch.setattr(student.model, "forward", lambda ids, **rest: seen.append(ids.clone()) or forward(ids, **rest))
    worth(student, None, [64], seed=5)
    assert all(torch.equal(seen[0], ids) for ids in seen if ids.shape[1] > 1)
    assert seen[0].shape == (1, 32)  # 64 less the tokens that are decoded


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(64, 10, 11), row(128, 10, 12)], "ahead at every context measured, from 64 tokens"),
        ([row(64, 10, 9), row(128, 10, 12)], "ahead from between 64 and 128 tokens on"),
        ([row(64, 10, 11), row(128, 10, 9), row(256, 1, 2)], "ahead from between 128 and 256 tokens on"),
        ([row(64, 10, 11), row(128, 10, 9)], "behind at the longest context measured, 128 tokens"),
        ([{"context": 64, "teacher": "does not fit in memory", "student": {"figure": 1}}], "not measured"),
    ],
)
def test_the_crossover_is_the_first_context_after_which_the_student_stays_ahead(rows, words):
    assert crossover(rows, "figure") == words


def test_less_time_to_the_first_token_is_ahead():
    rows = [{"context": 64, "teacher": {"first_token_seconds": 2}, "student": {"first_token_seconds": 1}}]
    assert crossover(rows, "first_token_seconds").startswith("ahead")


def test_the_cache_grows_by_the_line_through_the_longest_contexts():
    memory = [{"context": c, "student": {"cache_bytes": b}} for c, b in ((64, 1), (128, 1000), (256, 2280))]
    assert cache_growth(memory, "student") == (-280, 10)
    assert cache_growth(memory[:1], "student") == (None, None)


def test_a_cache_that_grows_as_fast_is_never_smaller():
    assert cache_crossover(10, 5.0, 0, 5.0).startswith("never")
    assert cache_crossover(100, 5.0, 0, 10.0) == "smaller from 21 tokens on"
    assert cache_crossover(-5, 5.0, 0, 10.0) == "smaller from 1 tokens on"


def test_bytes_of_a_cache_reach_into_its_layers(student):
    output = student.model(torch.zeros(1, 4, dtype=torch.int64), use_cache=True)
    cache = output.get("cache", output.get("past_key_values"))
    assert tensor_bytes(cache) == 128 * 4 + 4 * (2 * 16 * 16 + 3 * 16)
