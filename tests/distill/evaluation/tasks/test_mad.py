"""MAD-like tasks read back."""

import pytest
from task_models import TOKENIZER

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS


@pytest.mark.parametrize(("name", "noise"), [("mad_recall", 0.0), ("mad_noisy", 0.4)])
def test_a_key_has_one_value_and_every_key_that_came_before_is_an_answer(name, noise):
    for example in TASKS[name].examples(0, 30, {"noise": noise, "length": 100}, TOKENIZER):
        assert 99 <= len(example.ids) <= 100
        table, expected, at = {}, [], 0
        keys = {example.ids[start - 1] for start, _ in example.answers}
        while at < len(example.ids):
            token = example.ids[at]
            if token in keys:
                value = example.ids[at + 1]
                assert table.setdefault(token, value) == value
                expected.append((token, at + 1))
                at += 1
            at += 1
        seen, answers = set(), []
        for token, place in expected:
            if token in seen:
                answers.append((place, place + 1))
            seen.add(token)
        assert list(example.answers) == answers


def test_noise_takes_its_share():
    examples = list(TASKS["mad_noisy"].examples(0, 50, {"noise": 0.4, "symbols": 8, "length": 200}, TOKENIZER))
    meaning = set(range(17, 17 + 8))
    tokens = [token for example in examples for token in example.ids]
    # noise is one place in 0.4 of the draws, a pair two places in the rest: 0.4 / (0.4 + 2 * 0.6) of all tokens
    assert sum(token not in meaning for token in tokens) / len(tokens) == pytest.approx(0.25, abs=0.02)


def test_selective_copying_gives_the_words_in_their_order():
    for example in TASKS["mad_copy"].examples(0, 20, {"length": 60, "items": 7}, TOKENIZER):
        blank, marker = 17, 18
        words = example.ids[example.ids.index(marker) + 1 :]
        assert [token for token in example.ids[: -len(words) - 1] if token != blank] == list(words)
        assert len(words) == len(example.answers) == 7
    with pytest.raises(UserError, match="40 words of 14 symbols do not fit into 60 tokens"):
        list(TASKS["mad_copy"].examples(0, 1, {"length": 60, "items": 40}, TOKENIZER))
