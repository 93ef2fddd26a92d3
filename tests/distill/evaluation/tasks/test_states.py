"""State tracking, computed anew with matrices and counts."""

import itertools

import numpy as np
import pytest
from task_models import TOKENIZER

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS

FIRST = 17  # the first word; it is the marker


@pytest.mark.parametrize("modulus", [2, 5])
def test_sums_are_modulo(modulus):
    for example in TASKS["modular"].examples(0, 50, {"length": 11, "modulus": modulus}, TOKENIZER):
        *numbers, marker, answer = (token - FIRST - 1 for token in example.ids)
        assert marker == -1
        assert len(numbers) == 11
        assert answer == sum(numbers) % modulus
    assert TASKS["parity"].make is TASKS["modular"].make


@pytest.mark.parametrize("elements", [3, 4])
def test_products_are_those_of_permutation_matrices(elements):
    group = list(itertools.permutations(range(elements)))
    matrices = [np.eye(elements, dtype=int)[list(one)] for one in group]
    for example in TASKS["permutations"].examples(0, 50, {"length": 9, "elements": elements}, TOKENIZER):
        *drawn, _, answer = (token - FIRST - 1 for token in example.ids)
        product = np.eye(elements, dtype=int)
        for index in drawn:
            product = product @ matrices[index]
        assert (product == matrices[answer]).all()


def test_impossible_options_are_refused():
    with pytest.raises(UserError, match="of 9 elements; allowed is 1 or more of 2 to 5"):
        list(TASKS["permutations"].examples(0, 1, {"elements": 9}, TOKENIZER))
    with pytest.raises(UserError, match="modulus 1"):
        list(TASKS["modular"].examples(0, 1, {"modulus": 1}, TOKENIZER))
