"""Whole runs, from an empty folder to the export, to which something happens again and again until they are through:
killed, asked to stop, no room on the disk. Each ends as the run did to which nothing happened.

The script benchmarks/kills.py does the same to real processes at random moments. Twin: distill/run.py.
"""

import errno
import itertools
import random
import signal

import pytest
import warmed
from every_phase import newest, outcome, write_recipe

SEED, FIRST, MORE, MOST = 20261126, 30, 15, 40
SMALLEST = 400  # bytes of the largest file of the first try; the parameters are 195,000
# What a run does that takes long, in its order.
LONG = [
    ("convert.calibrate", "_fit_layer", signal.SIGINT),
    ("convert.command", "execute", signal.SIGTERM),
    ("distill.teacher_text", "write_text", signal.SIGINT),
    ("distill.token_cache", "_encode", signal.SIGTERM),
    ("distill.run", "compare", signal.SIGTERM),
    ("distill.run", "Engine", signal.SIGINT),
    ("distill.run", "convert_more", signal.SIGTERM),
    ("distill.results", "sample", signal.SIGINT),
    ("distill.export", "write_card", signal.SIGTERM),
    ("distill.evaluation.at_end", "measure", signal.SIGTERM),
]


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """(recipe, outcome) of a run to which nothing happened."""
    folder = tmp_path_factory.mktemp("straight")
    recipe, run = write_recipe(folder), folder / "run"
    code, text = warmed.carry_out(recipe, run)
    assert code == 0, text
    return recipe, outcome(run)


def until_through(straight, run, happenings):
    """Starts the run under one of `happenings` after the other until it is through; yields (exit code, output) of every
    start before."""
    recipe, whole = straight
    committed = 0
    for count, happens in enumerate(happenings):
        code, text = warmed.carry_out(recipe, run, happens)
        if code == 0:
            break
        assert newest(run) >= committed, text
        committed = newest(run)
        assert "Traceback" not in text
        yield code, text
        assert count < MOST
    assert outcome(run) == whole
    assert not [path for pattern in ("*.tmp*", ".*") for path in run.rglob(pattern)]


def changes():
    """Numbers of changes, of ever later ones in the mean, since the last phase must fit before them."""
    draw = random.Random(SEED)
    return (draw.randint(1, FIRST + MORE * count) for count in itertools.count())


def test_killed_at_random_changes(straight, tmp_path):
    run = tmp_path / "run"
    kills = (warmed.Killed(str(run), last) for last in changes())
    codes = [code for code, _ in until_through(straight, run, kills)]
    assert len(codes) > 5
    assert set(codes) == {-signal.SIGKILL}


def test_no_room_from_random_changes_on(straight, tmp_path):
    run, kinds = tmp_path / "run", itertools.cycle([errno.ENOSPC, errno.EROFS])
    full = (warmed.NoRoom(str(run), last, errno=kind) for last, kind in zip(changes(), kinds))
    said = list(until_through(straight, run, full))
    assert len(said) > 5
    for code, text in said:
        assert code in (1, 2), text
        line = text.splitlines()[-1]
        assert line.startswith("deltanet-distill: "), text
        assert any(words in line for words in ("No space left", "Read-only", "the disk is full")), text


def test_files_that_cannot_grow(straight, tmp_path):
    run = tmp_path / "run"
    limits = (warmed.SmallFiles(SMALLEST * 2**count) for count in itertools.count())
    said = list(until_through(straight, run, limits))
    assert len(said) > 5
    for code, text in said:
        assert code in (1, 2), text
        line = text.splitlines()[-1]
        assert any(words in line for words in ("File too large", "takes no file so large")), text


def test_asked_to_stop_in_everything_that_takes_long(straight, tmp_path):
    run = tmp_path / "run"
    signals = (warmed.Signalled(*place) for place in LONG)
    made = {}
    for (code, text), place in zip(until_through(straight, run, itertools.chain(signals, [None])), LONG):
        assert code == 75, (place, text)
        assert f"stopped by {place[2].name}; what is finished is kept" in text.splitlines()[-1], (place, text)
        for part in ("student", "written", "tokens"):
            for file in (run / part).rglob("*.*"):
                assert made.setdefault(file, file.stat().st_mtime_ns) == file.stat().st_mtime_ns, (place, file)
    assert {file.relative_to(run).parts[0] for file in made} == {"student", "written", "tokens"}
