"""Standard sets: which rows are understood, and what their results say."""

import json

import pytest
import torch
from rigged_model import always
from transformers import AutoModelForCausalLM, AutoTokenizer

from deltanet_errors import UserError
from distill.evaluation.sets import Choice, Cloze, read_set

PIQA = [
    {"query": "Question: dresser\n", "choices": ["replace the drawer", "finish the wood"], "gold": 1},
    {
        "query": "Question: How do I dry my hair?\n",
        "choices": ["Use a towel.", "Use a large spoon to dry"],
        "gold": 0,
    },
    {"query": "Question: What is red?\n", "choices": ["an apple", "the sky"], "gold": 0},
    {"query": "Question: Who barks?\n", "choices": ["a cat who likes milk", "a dog"], "gold": 1},
]
LAMBADA = [
    {"context": "Once upon a time there was a little", "continuation": "girl"},
    {"context": "She was happy and", "continuation": "smiled"},
    {"context": "The dog ran to the park. The park was", "continuation": "park"},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ANSWERED = "Question: What is red?\nAnswer:"


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"context": "It was a", "continuation": "dog"}, Cloze("It was a", " dog")),
        ({"context": "It was a", "continuation": " dog"}, Cloze("It was a", " dog")),
        ({"text": "It was a big dog"}, Cloze("It was a big", " dog")),
        (PIQA[2], Choice(ANSWERED, (" an apple", " the sky"), 0, "What is red?")),
        (
            {"goal": "What is red?", "sol1": "an apple", "sol2": "the sky", "label": 1},
            Choice(ANSWERED, (" an apple", " the sky"), 1, "What is red?"),
        ),
        (
            {"ctx": "He sat", "endings": ["down.", "up."], "label": "1"},
            Choice("He sat", (" down.", " up."), 1, "He sat"),
        ),
        (
            {
                "question": "What is red?",
                "choices": {"text": ["x", "y", "z"], "label": [*"123"]},
                "answerKey": "3",
            },
            Choice(ANSWERED, (" x", " y", " z"), 2, "What is red?"),
        ),
        (
            {"question": "What is red?", "choices": ["x", "y"], "answer": 1},
            Choice(ANSWERED, (" x", " y"), 1, "What is red?"),
        ),
        (
            {"question": "What is red?", "choices": ["x", "y"], "answer": "B"},
            Choice(ANSWERED, (" x", " y"), 1, "What is red?"),
        ),
    ],
)
def test_the_keys_of_a_row_tell_its_format(row, wanted, tmp_path):
    found = read_set(write(tmp_path / "some.jsonl", [row]))
    assert found.name == "some"
    assert found.rows == [wanted]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"a": 1}], ":1: no known format has the keys a; known: context, continuation"),
        ([PIQA[0], LAMBADA[0]], ":2: a row of another kind"),
        ([PIQA[0] | {"gold": 2}], ":1: the right option is number 2 of 2"),
        ([PIQA[0] | {"gold": "x"}], ':1: gold is "x"; allowed is the number of the right option'),
        ([PIQA[0] | {"gold": True}], ":1: gold is true; allowed is the number of the right option"),
        ([PIQA[0] | {"gold": 0.5}], ":1: gold is 0.5; allowed is the number of the right option"),
        ([PIQA[0] | {"gold": None}], ":1: gold is null; allowed is the number of the right option"),
        ([PIQA[0] | {"gold": -1}], ":1: the right option is number -1 of 2"),
        ([PIQA[0] | {"query": 4}], ":1: query is 4; allowed is text"),
        ([PIQA[0] | {"choices": "ab"}], ':1: choices is "ab"; allowed is a list of texts'),
        ([PIQA[0] | {"choices": ["a", 2]}], ":1: choices[1] is 2; allowed is text"),
        ([{"question": "q", "choices": ["a", "b"], "answer": "E"}], ":1: answer is 'E'; allowed: A, B"),
        (
            [{"question": "q", "choices": {"text": ["a", "b"]}, "answerKey": "A"}],
            ":1: label is null; allowed is a list",
        ),
        (
            [{"question": "q", "choices": {"text": ["a", "b"], "label": ["A"]}, "answerKey": "A"}],
            ":1: choices has 2 texts and 1 labels",
        ),
        ([{"text": "a \ud800"}], ":1: text holds half of a surrogate pair, which is no character"),
        ([PIQA[0] | {"choices": ["one"]}], ":1: 1 options; allowed: 2 to 26"),
        ([PIQA[0] | {"choices": ["one", " "]}], ":1: a continuation or an option is empty"),
        ([{"context": None, "continuation": "x"}], ":1: context is null; allowed is text"),
        ([{"text": "word"}], ":1: text has a single word"),
        (["words"], ":1: expected an object, got str"),
        ([], ": no rows in it"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_by_its_line(rows, message, tmp_path):
    path = write(tmp_path / "bad.jsonl", rows)
    with pytest.raises(UserError) as raised:
        read_set(path)
    assert str(raised.value).startswith(f"{path}{message}")


def test_a_byte_order_mark_and_lines_of_windows_are_no_matter(tmp_path):
    plain = read_set(write(tmp_path / "set.jsonl", LAMBADA)).rows
    (tmp_path / "set.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(json.dumps(row).encode() for row in LAMBADA))
    assert read_set(tmp_path / "set.jsonl").rows == plain


def test_what_is_no_json_is_named_by_its_line(tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(LAMBADA[0]) + "\n{half\n")
    with pytest.raises(UserError, match=r"bad.jsonl:2: not JSON"):
        read_set(path)


def plain_accuracies(folder, rows) -> tuple[float, float]:
    """(accuracy, accuracy per character) by transformers alone, an option at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    right = [0, 0]
    for row in rows:
        context, values = row["query"] + "Answer:", []
        for option in row["choices"]:
            start = len(tokenizer(context)["input_ids"])
            ids = tokenizer(context + " " + option, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                logs = model(ids).logits[0].log_softmax(-1)
            values.append(sum(logs[i - 1, ids[0, i]].item() for i in range(start, ids.shape[1])))
        lengths = [len(option) for option in row["choices"]]
        right[0] += int(torch.tensor(values).argmax()) == row["gold"]
        right[1] += int((torch.tensor(values) / torch.tensor(lengths)).argmax()) == row["gold"]
    return right[0] / len(rows), right[1] / len(rows)


@pytest.mark.parametrize("which", ["teacher", "student"])
def test_choices_are_scored_as_transformers_alone_would(which, folders, request, tmp_path):
    folder = folders[0 if which == "teacher" else 1]
    results = read_set(write(tmp_path / "piqa.jsonl", PIQA)).run(request.getfixturevalue(which))
    assert [result.name for result in results] == ["piqa", "piqa_norm", "piqa_letters"]
    assert (results[0].accuracy, results[1].accuracy) == plain_accuracies(folder, PIQA)
    assert all(result.n == len(PIQA) for result in results)


def test_trivial_strategies_are_worth_what_they_are_on_these_rows(student, tmp_path):
    floors = read_set(write(tmp_path / "piqa.jsonl", PIQA)).run(student)[0].floors
    assert floors == {
        "chance": 0.5,
        "always the first": 0.5,
        "always the last": 0.5,
        "the shortest": 0.75,  # all rows but the third
        "the longest": 0.25,
    }


def test_a_model_that_always_says_one_letter_is_found_out(teacher, tmp_path):
    letters = read_set(write(tmp_path / "piqa.jsonl", PIQA)).run(always(" A", teacher))[2]
    assert letters.accuracy == letters.floors["always the same letter"] == 0.5
    assert letters.stderr == 0.0  # it is right in one rotation of two, of every row
    assert letters.figures == {"says A": 1.0, "same answer in every order": 0.0}
    assert letters.by_level["right answer at A"] == {"accuracy": 1.0, "stderr": 0.0, "n": 4, "said": 1.0}
    assert letters.by_level["right answer at B"] == {"accuracy": 0.0, "stderr": 0.0, "n": 4, "said": 0.0}


def test_every_option_stands_once_at_every_letter(teacher, tmp_path, monkeypatch):
    import distill.evaluation.sets as sets

    seen = []
    encode = sets.encode
    monkeypatch.setattr(sets, "encode", lambda s, c, o: seen.append((c, o)) or encode(s, c, o))
    row = {"question": "Which?", "choices": ["one", "two", "three"], "answer": 2}
    read_set(write(tmp_path / "three.jsonl", [row])).run(teacher)
    contexts = {context for context, option in seen if option == " A"}
    assert contexts == {
        "Question: Which?\nA. one\nB. two\nC. three\nAnswer:",
        "Question: Which?\nA. three\nB. one\nC. two\nAnswer:",
        "Question: Which?\nA. two\nB. three\nC. one\nAnswer:",
    }


def test_a_cloze_is_right_where_the_model_says_it_itself(teacher, tmp_path):
    rows = [*LAMBADA, {"context": "It was", "continuation": "the"}]
    result = read_set(write(tmp_path / "lambada.jsonl", rows)).run(always(" the", teacher))[0]
    assert result.accuracy == 0.25
    assert [sample["correct"] for sample in result.samples] == [False, False, False]
    assert result.floors["the commonest answer"] == 0.25
    # `park` is one of the 7 words before it; no other answer stands in its context
    assert result.floors["a random word of the context"] == pytest.approx(1 / 7 / 4)
    assert result.figures["perplexity"] > 1


def test_a_limit_takes_the_first_rows(student, tmp_path):
    found = read_set(write(tmp_path / "piqa.jsonl", PIQA))
    told = []
    assert found.run(student, limit=3, advance=told.append)[0].n == 3
    assert sum(told) == pytest.approx(1)
