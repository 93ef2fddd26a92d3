"""Pathfinder after the Long Range Arena (arXiv 2011.04006, 1805.08315): do two ends lie on one dashed path?

A picture of `size` x `size` pixels holds two dashed paths that never touch, and distractors a third as long. Two ends
are marked: both of one path, or one of each, and then those whose distance is most like that of the ends of one. Pixels
are tokens, line by line: blank, line or marked end; then a marker and one of two words. Drawn in whole pixels without
smoothing, so it is like the original, and not it.
Twin: tests/distill/evaluation/tasks/test_pathfinder.py.
"""

import math
import random

from deltanet_errors import UserError

from .classification import classified
from .example import Example
from .task import Task
from .words import Vocabulary

BLANK, LINE, MARK = range(3)
DASH, GAP = 2, 1  # pixels
TURN = 0.3  # standard deviation of the turn from one dash to the next, radians
TRIES = 1000
FAR = "ends half a path apart or more belong together"
Pixel = tuple[int, int]


def pathfinder(
    rng: random.Random, vocabulary: Vocabulary, *, size: int = 32, dashes: int = 9, distractors: int = 5
) -> Example:
    """One picture with two paths of `dashes` dashes."""
    if size < 8 or dashes < 3 or distractors < 0 or dashes * (DASH + GAP) > 2 * size:
        raise UserError(
            f"task pathfinder: paths of {dashes} dashes and {distractors} distractors in {size} x {size} pixels; "
            f"allowed are 8 pixels or more and 3 dashes to {2 * size // (DASH + GAP)}"
        )
    for _ in range(TRIES):
        paths = draw_paths(rng, size, [dashes, dashes, *[max(dashes // 3, 1)] * distractors])
        if paths is not None:
            return as_example(rng, vocabulary, size, paths)
    raise UserError(f"task pathfinder: {distractors} distractors do not fit into {size} x {size} pixels")


def draw_paths(rng: random.Random, size: int, lengths: list[int]) -> list[list[Pixel]] | None:
    """Paths of so many dashes, each as its pixels in order, none next to a pixel of another; None where there is no
    room for all."""
    taken: set[Pixel] = set()
    paths = []
    for length in lengths:
        found = next((path for _ in range(TRIES) if (path := _walk(rng, size, length, taken))), None)
        if found is None:
            return None
        drawn, walked = found
        paths.append(drawn)
        taken.update((x + i, y + j) for x, y in walked for i in (-1, 0, 1) for j in (-1, 0, 1))
    return paths


def _walk(rng: random.Random, size: int, dashes: int, taken: set[Pixel]) -> tuple[list[Pixel], list[Pixel]] | None:
    """(pixels of the dashes, those and the gaps between them) of a path that turns a little after every dash; None
    where it meets the border, a pixel taken, or itself."""
    x, y, heading = rng.uniform(0, size), rng.uniform(0, size), rng.uniform(0, 2 * math.pi)
    drawn: list[Pixel] = []
    walked: list[Pixel] = []
    for step in range(dashes * (DASH + GAP) - GAP):
        pixel = (int(x), int(y))
        if not (0 <= x < size and 0 <= y < size) or pixel in taken:
            return None
        if any(abs(pixel[0] - a) < 2 and abs(pixel[1] - b) < 2 for a, b in walked[:-3]):
            return None
        walked.append(pixel)
        if step % (DASH + GAP) < DASH:
            drawn.append(pixel)
        else:
            heading += rng.gauss(0, TURN)
        stride = max(abs(math.cos(heading)), abs(math.sin(heading)))  # so that every step comes to another pixel
        x, y = x + math.cos(heading) / stride, y + math.sin(heading) / stride
    return drawn, walked


def as_example(rng: random.Random, vocabulary: Vocabulary, size: int, paths: list[list[Pixel]]) -> Example:
    """The picture as tokens, with two ends of the first two paths marked at random."""
    is_one = rng.random() < 0.5
    first, second = ((path[0], path[-1]) for path in paths[:2])
    apart = [(a, b) for a in first for b in second]
    ends = first if is_one else min(apart, key=lambda pair: abs(math.dist(*pair) - math.dist(*first)))
    picture = [BLANK] * (size * size)
    for x, y in (pixel for path in paths for pixel in path):
        picture[y * size + x] = LINE
    for x, y in ends:
        picture[y * size + x] = MARK
    example = classified("pathfinder", [picture], int(is_one), 2, 3, vocabulary)
    is_far = math.dist(*ends) >= len(paths[0]) * (DASH + GAP) / DASH / 2
    return Example(
        example.ids,
        example.answers,
        choices=example.choices,
        guesses={**example.guesses, FAR: float(is_far == is_one)},
    )


PATHFINDER = (
    Task(
        "pathfinder",
        "whether two ends lie on one dashed path",
        {
            f"{size} x {size} pixels, {dashes} dashes": {"size": size, "dashes": dashes, "distractors": distractors}
            for size, dashes, distractors in ((12, 4, 1), (20, 6, 3), (32, 9, 5))
        },
        pathfinder,
    ),
)
