"""Tasks whose rows come from files: every byte and pixel, both splits, and files that are not as they should be."""

import json

import numpy as np
import pytest
from task_models import Oracle, constant, subject

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.classification import A_CLASS
from distill.evaluation.tasks.example import COMMONEST
from distill.evaluation.tasks.words import vocabulary, word_tokenizer

TOKENIZER = word_tokenizer(512)
WORDS = vocabulary(TOKENIZER).words
MARKER, SEPARATOR = WORDS[:2]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return str(path)


def images(path, count=30, classes=3):
    pixels = np.random.default_rng(5).integers(0, 256, (count, 4, 5), np.uint8)
    np.savez(path, images=pixels, labels=np.arange(count) % classes)
    return str(path), pixels


def made(name, split="test", n=1000, **options):
    return list(TASKS[name].examples(0, n, options, TOKENIZER, split=split))


def read_back(example, classes):
    """(parts as numbers, label) by another way than they were written."""
    *body, marker, label = example.ids
    assert marker == MARKER
    assert example.answers == ((len(example.ids) - 1, len(example.ids)),)
    assert list(example.choices) == list(WORDS[2 : 2 + classes])
    parts = [[]]
    for token in body:
        if token == SEPARATOR:
            parts.append([])
        else:
            parts[-1].append(WORDS.index(token) - 2 - classes)
    return parts, example.choices.index(label)


def test_a_text_is_its_bytes_cut_at_length(tmp_path):
    texts = [f"Größe {index} \u2028 and more" for index in range(40)]
    file = jsonl(tmp_path / "a.jsonl", [{"text": text, "label": i % 2} for i, text in enumerate(texts)])
    seen = {}
    for split in ("train", "test"):
        for example in made("lra_text", split, file=file, length=14):
            (part,), label = read_back(example, 2)
            seen[bytes(part)] = label
            assert example.guesses == {A_CLASS: 0.5}
    assert seen == {text.encode()[:14]: i % 2 for i, text in enumerate(texts)}


def test_two_texts_share_the_length(tmp_path):
    rows = [{"text1": f"left {i}", "text2": f"right {i}", "label": i % 2} for i in range(20)]
    file = jsonl(tmp_path / "pairs.jsonl", rows)
    found = {tuple(map(bytes, read_back(e, 2)[0])) for e in made("lra_retrieval", "train", file=file, length=16)}
    assert found == {(row["text1"].encode()[:8], row["text2"].encode()[:8]) for row in rows[:18]}


@pytest.mark.parametrize("greys", [256, 8])
def test_an_image_is_its_pixels_line_by_line(tmp_path, greys):
    file, pixels = images(tmp_path / "i.npz")
    found = [read_back(example, 3) for example in made("lra_image", "train", file=file, greys=greys)]
    wanted = [([(image.astype(int) * greys // 256).flatten().tolist()], i % 3) for i, image in enumerate(pixels[:27])]
    assert sorted(found) == sorted(wanted)


def test_the_last_tenth_is_for_testing_or_a_second_file_is(tmp_path):
    first = jsonl(tmp_path / "a.jsonl", [{"text": f"a{i:02}", "label": i % 2} for i in range(40)])
    second = jsonl(tmp_path / "b.jsonl", [{"text": f"b{i:02}", "label": i % 2} for i in range(5)])

    def texts(split, **options):
        return {bytes(read_back(example, 2)[0][0]).decode() for example in made("lra_text", split, **options)}

    assert texts("test", file=first) == {f"a{i}" for i in range(36, 40)}
    assert texts("train", file=first) == {f"a{i:02}" for i in range(36)}
    assert texts("test", file=first, test=second) == {f"b{i:02}" for i in range(5)}
    assert texts("train", file=first, test=second) == {f"a{i:02}" for i in range(40)}


def test_seeds_order_the_rows_and_more_of_them_begin_alike(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{i:03}", "label": i % 2} for i in range(300)])
    task = TASKS["lra_text"]
    draw = lambda seed, n: [e.ids for e in task.examples(seed, n, {"file": file}, TOKENIZER, split="train")]
    assert draw(0, 20) == draw(0, 50)[:20] != draw(1, 20)
    assert len(set(draw(0, 1000))) == 270


def test_an_oracle_and_a_constant_score_what_they_should(tmp_path):
    file = jsonl(tmp_path / "a.jsonl", [{"text": f"{i:03}", "label": int(i % 4 == 0)} for i in range(400)])
    task = TASKS["lra_text"].of(file)
    told = list(task.examples(0, 40, "its rows", TOKENIZER))
    result = task.run(subject(Oracle(512, told), TOKENIZER), seed=0, n=40, max_context=2048)
    assert (result.accuracy, result.n) == (1.0, 40)
    assert result.floors[COMMONEST] == 0.75
    always = constant(told[0].choices[0], 512, TOKENIZER)
    assert task.run(always, seed=0, n=40, max_context=2048).accuracy == 0.75


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("lra_text", "", "a.file: no rows in it; it takes a jsonl file of"),
        ("lra_text", "{", "a.file:1: not JSON"),
        (
            "lra_text",
            '{"text": 3, "label": 1}',
            "a.file:1: expected are `text` (string) and `label` (whole number from 0)",
        ),
        ("lra_text", '\n{"text": "a", "label": -1}', "a.file:2: expected are `text` (string) and `label`"),
        ("lra_text", '{"text": "a", "label": true}', "a.file:1: expected are `text` (string) and `label`"),
        ("lra_text", "[1]", "a.file:1: expected are `text`"),
        ("lra_text", '{"text": "\\ud800", "label": 0}', "a.file:1: holds half of a surrogate pair"),
        ("lra_text", '{"text": "a", "label": 0}', "a.file: 1 rows of 1 classes; allowed is 2 or more"),
        (
            "lra_text",
            '{"text": "a", "label": 9999}\n' * 2,
            "task lra_text: needs 10258 words of one token",
        ),
        ("lra_retrieval", '{"text": "a", "label": 0}', "a.file:1: expected are `text1` (string), `text2` (string)"),
        ("lra_image", "no archive", "a.file: no npz file of `images` and `labels`"),
    ],
)
def test_a_file_that_is_not_as_it_should_be_is_one_line(tmp_path, name, content, message):
    (tmp_path / "a.file").write_text(content)
    with pytest.raises(UserError) as caught:
        made(name, file=str(tmp_path / "a.file"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": np.zeros(2, int)}, "no npz file of `images` and `labels`"),
        ({"images": np.zeros((2, 4, 4), np.float32), "labels": np.zeros(2, int)}, "images (2, 4, 4) float32"),
        ({"images": np.zeros((2, 4, 4, 3), np.uint8), "labels": np.zeros(2, int)}, "images (2, 4, 4, 3) uint8"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.zeros(3, int)}, "labels (3,) int64"),
        ({"images": np.zeros((2, 4, 4), np.uint8), "labels": np.array([0, -1])}, "whole numbers from 0"),
    ],
)
def test_images_of_another_kind_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "i.npz", **arrays)
    with pytest.raises(UserError) as caught:
        made("lra_image", file=str(tmp_path / "i.npz"))
    assert message in str(caught.value)


def test_missing_files_and_wrong_options_are_refused(tmp_path):
    file, _ = images(tmp_path / "i.npz")
    texts = jsonl(tmp_path / "a.jsonl", [{"text": "abc", "label": i % 2} for i in range(4)])
    for name, options, message in (
        ("lra_image", {}, "task lra_image: say its `file`, an npz file of images"),
        ("lra_image", {"file": "/lost"}, "task lra_image: /lost: no such file"),
        ("lra_image", {"file": file, "test": "/lost"}, "task lra_image: /lost: no such file"),
        ("lra_text", {"file": texts, "length": 0}, "task lra_text: length 0; allowed is 1 or more"),
        ("lra_image", {"file": file, "greys": 300}, "greys 300; allowed is 2 to 256"),
        ("lra_image", {"file": file, "length": 3}, "no option 'length'; options: file, test, greys"),
    ):
        with pytest.raises(UserError) as caught:
            made(name, **options)
        assert message in str(caught.value)
