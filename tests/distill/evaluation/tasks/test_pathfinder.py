"""Pictures of paths, read back from their tokens, and what distance alone tells."""

import random

import pytest
from task_models import TOKENIZER

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.example import floors
from distill.evaluation.tasks.pathfinder import DASH, FAR, GAP, draw_paths
from distill.evaluation.tasks.words import vocabulary

TASK = TASKS["pathfinder"]
MARKER, _, NO, YES, BLANK, LINE, MARK = vocabulary(TOKENIZER).words[:7]


def neighbours(pixel, reach=1):
    x, y = pixel
    return {(x + i, y + j) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)}


@pytest.mark.parametrize("seed", range(5))
def test_paths_keep_apart_and_have_their_dashes(seed):
    lengths = [7, 7, 2, 2]
    paths = draw_paths(random.Random(seed), 32, lengths)
    for index, (path, dashes) in enumerate(zip(paths, lengths)):
        assert len(path) == DASH * dashes
        assert all(0 <= x < 32 and 0 <= y < 32 for x, y in path)
        for other in paths[:index]:
            assert not set(path) & {near for pixel in other for near in neighbours(pixel)}
        # within a dash a step is to the pixel beside; between dashes it is over the gap
        for at in range(1, len(path)):
            reach = max(abs(a - b) for a, b in zip(path[at], path[at - 1]))
            assert reach <= (1 if at % DASH else 1 + GAP)


def test_a_picture_has_two_marks_and_its_label_says_whether_one_path_joins_them():
    for index, example in enumerate(TASK.examples(0, 60, {"size": 24, "dashes": 6, "distractors": 2}, TOKENIZER)):
        *picture, marker, label = example.ids
        assert len(picture) == 24 * 24
        assert marker == MARKER
        assert example.choices == (NO, YES)
        lit = {(at % 24, at // 24) for at, token in enumerate(picture) if token != BLANK}
        start, end = ((at % 24, at // 24) for at, token in enumerate(picture) if token == MARK)
        assert picture.count(LINE) + 2 == len(lit) == DASH * (6 + 6 + 2 + 2)
        # Followed over gaps, what hangs together with one end holds at least its own path.
        reached, edge = {start}, {start}
        while edge:
            edge = {near for pixel in edge for near in neighbours(pixel, 1 + GAP) & lit} - reached
            reached |= edge
        assert label == NO or end in reached, index


def test_pictures_can_be_as_large_as_those_of_path_x():
    (example,) = TASK.examples(0, 1, {"size": 128, "dashes": 40}, TOKENIZER)
    picture = example.ids[: 128 * 128]
    assert len(example.ids) == 128 * 128 + 2
    assert picture.count(MARK) == 2
    assert picture.count(LINE) + 2 == DASH * (40 + 40 + 5 * (40 // 3))


def test_labels_are_even_and_distance_alone_does_not_tell_them():
    examples = list(TASK.examples(0, 400, "20 x 20 pixels, 6 dashes", TOKENIZER))
    found = floors(examples)
    # 400 fair coins: standard deviation 2.5 points; four of them
    assert sum(example.ids[-1] == YES for example in examples) / 400 == pytest.approx(0.5, abs=0.1)
    assert found[FAR] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 7}, "paths of 9 dashes and 5 distractors in 7 x 7 pixels; allowed are 8 pixels or more"),
        ({"dashes": 2}, "paths of 2 dashes"),
        ({"dashes": 22}, "3 dashes to 21"),
        ({"distractors": -1}, "-1 distractors"),
        ({"size": 8, "dashes": 3, "distractors": 40}, "40 distractors do not fit into 8 x 8 pixels"),
    ],
)
def test_pictures_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        list(TASK.examples(0, 1, options, TOKENIZER))
