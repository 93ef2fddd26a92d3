"""One rank of two that fails, at whatever place, ends both in seconds: one message, which names it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import small_run

ENDED = 30  # seconds after the failure; the group's own timeout is four hours
pytestmark = pytest.mark.slow
PRELUDE = """
import os, signal, sys, time
import cli
from distill import loop, metrics, run, state, world

def failing(module, name, error, after=0):
    real, calls = getattr(module, name), []
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) > after:
            with open(sys.argv[3] + "-failed", "w"):
                pass
            if error is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise error
        return real(*args, **kwargs)
    setattr(module, name, call)

full = OSError(28, "No space left on device")
"""
FAILURES = {
    "a forward pass": (1, "failing(loop, 'make_batch', RuntimeError('out of luck'), 5)", "RuntimeError: out of luck"),
    "the log": (0, "failing(metrics.MetricsLog, 'write', full, 2)", "cannot be written: No space left on device"),
    "gathering for a commit": (1, "failing(state.lora, 'plain_name', MemoryError('full'), 9)", "MemoryError: full"),
    "writing weights": (1, "failing(state, 'save_file', full)", "not committed: rank 1: student/model-rank001-00001"),
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    stages = [{"kind": "distil", "steps": 4}]
    return small_run.write_recipe(folder / "r.yaml", small_run.write_teacher(folder / "teacher"), stages=stages)


def start(recipe, run, code, victim):
    """The recipe, run by two processes; `code` runs in the process of rank `victim`."""
    rest = "\nsys.exit(cli.distill_main(sys.argv[1:]))"
    return launch([PRELUDE + (code if rank == victim else "") + rest for rank in range(2)], recipe, "-o", run)


def launch(scripts, *arguments):
    """A process of each script, which meet as ranks 0, 1 ... on a free port."""
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = []
    for rank, script in enumerate(scripts):
        launched = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(scripts)),
            "MASTER_ADDR": "127.0.0.1",
        }
        environment = {**os.environ, **launched, "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", script, *map(str, arguments)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
            )
        )  # fmt: skip
    return processes


def end(processes, since):
    """(exit code, lines of stderr that the command itself printed) of both, which have ENDED seconds from `since()`."""
    limit = time.monotonic() + 120
    while not since() and any(process.poll() is None for process in processes):
        assert time.monotonic() < limit
        time.sleep(0.05)
    told = []
    try:
        for process in processes:
            _, err = process.communicate(timeout=ENDED)
            told.append(
                (process.returncode, [line for line in err.splitlines() if line.startswith("deltanet-distill:")])
            )
    finally:
        for process in processes:
            process.kill()
    return told


@pytest.mark.parametrize("place", FAILURES)
def test_a_rank_that_fails_ends_both_with_one_message_that_names_it(recipe, tmp_path, place):
    victim, code, words = FAILURES[place]
    run = tmp_path / "run"
    told = end(start(recipe, run, code, victim), lambda: (tmp_path / "run-failed").exists())
    assert [code for code, _ in told] == [1, 1]
    lines = [line for _, lines in told for line in lines]
    assert len(lines) == 1, lines
    (line,) = lines
    assert words in line
    assert f"rank {victim}" in line
    assert not list((run / "commits").glob("step-????????"))[1:]  # one before it, or none


def test_what_every_rank_raises_is_told_once_without_a_rank(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(recipe.read_text().replace("seq_len: 32", "seq_len: 16"))
    told = end(start(recipe, tmp_path / "run", "", 0), lambda: False)
    assert [code for code, _ in told] == [2, 2]
    lines = [line for _, lines in told for line in lines]
    assert len(lines) == 1, lines
    (line,) = lines
    assert "the run was started with another recipe" in line
    assert " of 2" not in line


@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_ends_the_other_too(recipe, tmp_path, victim):
    code = "failing(loop, 'make_batch', None, 5)"
    told = end(start(recipe, tmp_path / "run", code, victim), lambda: (tmp_path / "run-failed").exists())
    assert told[victim][0] == -signal.SIGKILL
    assert told[1 - victim][0] == 1


TOGETHER = """
import os, signal, sys, time
from distill.world import LOOK_SECONDS, ending_together, leave_world, start_world
with ending_together(start_world()):
    {body}
leave_world()
"""
KILLED, STUCK = "os.kill(os.getpid(), signal.SIGKILL)", "time.sleep(3600)"


def told_by(bodies):
    """(exit code, lines of stderr about a rank that is gone) of ranks that do this and no more."""
    processes = launch([TOGETHER.format(body=body) for body in bodies])
    try:
        errors = [process.communicate(timeout=ENDED + 60)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], [
        line for err in errors for line in err.splitlines() if "is gone" in line
    ]


def test_a_killed_rank_ends_those_that_would_wait_for_it_for_ever():
    """As with NCCL, whose collectives do not notice that a neighbour is gone."""
    assert told_by([STUCK, KILLED, STUCK]) == ([1, -signal.SIGKILL, 1], ["rank 1 is gone, so the others end too"])


def test_a_rank_that_parts_early_is_not_taken_for_killed():
    assert told_by(["time.sleep(6 * LOOK_SECONDS)", "pass"]) == ([0, 0], [])
