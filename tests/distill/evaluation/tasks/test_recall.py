"""Recall tasks read back by other means than they were written."""

import pytest
from task_models import TOKENIZER

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.recall import A_VALUE, CUE, PASSWORD, SPAN


def made(name, n=30, **options):
    return list(TASKS[name].examples(0, n, options, TOKENIZER))


@pytest.mark.parametrize(("length", "pairs"), [(64, 4), (64, 16), (128, 8)])
def test_mqar_asks_every_key_once_for_a_value_that_does_not_follow(length, pairs):
    slots = []
    for example in made("mqar", length=length, pairs=pairs):
        assert len(example.ids) == length
        table = dict(zip(example.ids[: 2 * pairs : 2], example.ids[1 : 2 * pairs : 2]))
        assert len(table) == len(set(table.values())) == pairs
        asked = [example.ids[start - 1] for start, _ in example.answers]
        assert sorted(asked) == sorted(table)
        assert [example.target(start) for start, _ in example.answers] == [table[key] for key in asked]
        assert all(example.right(start) == {example.target(start)} for start, _ in example.answers)
        # behind the pairs there are the keys that ask and blanks, so no value is given away
        assert not set(example.ids[2 * pairs :]) & set(table.values())
        assert set(example.ids[2 * pairs :]) - set(table) <= {TOKENIZER.convert_tokens_to_ids("ba")}
        assert example.guesses[A_VALUE] == 1 / pairs
        slots += [(start - 1 - 2 * pairs) // 2 for start, _ in example.answers]
    if 4 * pairs < length:  # queries crowd right behind the pairs: a uniform draw would have a mean of half the slots
        assert sum(slots) / len(slots) < 0.45 * (length - 2 * pairs) / 2


@pytest.mark.parametrize(("keys", "values"), [(1, 1), (4, 1), (3, 2)])
def test_a_needle_asks_for_all_values_of_one_key(keys, values):
    for example in made("needle", length=96, keys=keys, values=values):
        assert len(example.ids) == 96
        start = example.answers[0][0]
        marker, key = example.ids[start - 2 : start]
        hay = example.ids[: start - 2]
        held = [hay[i + 2] for i, token in enumerate(hay) if token == marker and hay[i + 1] == key]
        assert list(example.ids[start:]) == held
        assert example.right(start) == frozenset(held)
        assert hay.count(marker) == keys * values
    assert TASKS["needle"].options({"keys": 5})["length"] == 128


def test_a_passkey_stands_once_before_it_is_asked_for():
    for example in made("passkey", length=80):
        key = example.ids[-PASSWORD:]
        found = [i for i in range(80 - PASSWORD) if example.ids[i : i + PASSWORD] == key]
        assert len(found) == 1
        assert example.ids[found[0] - 1] == example.ids[-PASSWORD - 1]
        assert example.answers == ((75, 80),)


def test_a_repeated_passage_is_as_far_back_as_it_says():
    for distance in (SPAN, 64, 100):
        for example in made("repeat", distance=distance):
            assert all(example.ids[at] == example.ids[at - distance] for at in range(distance, len(example.ids)))
            assert example.positions == list(range(distance + CUE, distance + SPAN))


def test_copying_induction_and_lookup_answer_what_stood_there():
    for example in made("copying", items=9):
        assert example.ids[:9] == example.ids[10:]
        assert example.positions == list(range(10, 19))
    for example in made("induction", length=24):
        trigger = example.ids[-2]
        assert example.ids.count(trigger) == 2
        assert example.ids[example.ids.index(trigger) + 1] == example.ids[-1]
    for example in made("lookup", pairs=5):
        assert dict(zip(example.ids[0:10:2], example.ids[1:10:2]))[example.ids[-2]] == example.ids[-1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("repeat", {"distance": 5}, "distance 5; allowed is 32 or more"),
        ("needle", {"length": 16}, "4 keys of 1 values do not fit into 16 tokens"),
        ("passkey", {"length": 20}, "length 20 leaves no room"),
        ("induction", {"length": 3}, "length 3 is too short"),
        ("lookup", {"pairs": 1000}, "task lookup: needs 2001 words of one token, the tokenizer has 239"),
        ("mqar", {"length": 4096, "pairs": 200}, "task mqar: needs 401 words"),
    ],
)
def test_what_cannot_be_made_is_one_line(name, options, message):
    with pytest.raises(UserError, match=message):
        made(name, 1, **options)
