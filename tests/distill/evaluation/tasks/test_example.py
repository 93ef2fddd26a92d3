"""Answers, floors and the strategies behind them, by hand."""

import pytest

from distill.evaluation.tasks.example import COMMONEST, CONTEXT, Example, commonest, floors


def test_an_answer_of_several_tokens_is_right_as_a_whole():
    example = Example((1, 2, 3, 4, 5), ((1, 3), (4, 5)))
    assert example.positions == [1, 2, 4]
    assert example.share_right({1: 2, 2: 3, 4: 5}) == 1.0
    assert example.share_right({1: 2, 2: 9, 4: 5}) == 0.5
    assert example.share_right({1: 9, 2: 9, 4: 9}) == 0.0


def test_any_legal_token_is_right():
    example = Example((1, 2, 3), ((1, 2), (2, 3)), {1: frozenset((2, 7))})
    assert example.share_right({1: 7, 2: 3}) == 1.0
    assert example.share_right({1: 3, 2: 7}) == 0.0


def test_floors_are_those_of_the_examples_given():
    first = Example((5, 6, 5), ((1, 2), (2, 3)), guesses={"guess": 0.5})
    second = Example((6, 6), ((1, 2),))
    # Always 6: one of two answers of the first, the one of the second. From the text so far: of the first 0 of {5} and
    # one of {5, 6}; of the second 1 of {6}.
    assert commonest([first, second]) == (6, 0.75)
    assert floors([first, second]) == {"guess": 0.25, CONTEXT: pytest.approx((0.25 + 1) / 2), COMMONEST: 0.75}


def test_one_word_cannot_be_an_answer_of_different_words():
    assert commonest([Example((1, 2, 3), ((1, 3),))])[1] == 0.0
    assert commonest([Example((1, 2, 2), ((1, 3),))]) == (2, 1.0)
