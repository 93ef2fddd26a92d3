"""The first signal cuts what may be cut and is noted elsewhere, the second ends the process at once."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from deltanet_errors import Interrupted
from distill.interrupts import Interrupts

TWICE = """
import os, signal
from distill.interrupts import Interrupts
with Interrupts() as interrupts, interrupts.at_once(), interrupts.noted():
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", interrupts.requested, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never said", flush=True)
"""


def send(number):
    os.kill(os.getpid(), number)


def work(body):
    """`body(interrupts)` as a run does it."""
    with Interrupts() as interrupts, interrupts.at_once():
        body(interrupts)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_cuts_work_even_where_errors_are_caught_and_the_old_handler_comes_back(number):
    before, reached = signal.getsignal(number), []

    def body(interrupts):
        with contextlib.suppress(Exception):
            send(number)
        reached.append("went on")

    with pytest.raises(Interrupted, match=f"stopped by {number.name}; what is finished is kept"):
        work(body)
    assert not reached
    assert signal.getsignal(number) is before


def test_training_is_not_cut_and_ends_after_what_it_was_doing(capsys):
    reached = []

    def body(interrupts):
        with interrupts.noted():
            send(signal.SIGTERM)
            reached.append(interrupts.requested)
        reached.append("never")

    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        work(body)
    assert reached == ["SIGTERM"]
    assert "stopping after a commit" in capsys.readouterr().err


def test_what_training_raises_itself_leaves_as_it_is():
    def body(interrupts):
        with interrupts.noted():
            send(signal.SIGTERM)
            raise Interrupted("step 3 is committed")

    with pytest.raises(Interrupted, match="step 3 is committed"):
        work(body)


def test_a_signal_that_came_before_ends_the_block_before_it_begins():
    reached = []
    with Interrupts() as interrupts:
        send(signal.SIGTERM)  # outside any block it is noted
        with pytest.raises(Interrupted), interrupts.at_once():
            reached.append("begun")
    assert not reached


@pytest.mark.parametrize("goes_on", [lambda interrupts: None, lambda interrupts: interrupts.noted().__enter__()])
def test_what_swallows_the_cut_only_delays_the_end(goes_on):
    def body(interrupts):
        with contextlib.suppress(BaseException):  # as libraries do that try one thing after another
            send(signal.SIGINT)
        goes_on(interrupts)

    with pytest.raises(Interrupted, match="stopped by SIGINT"):
        work(body)


def test_a_terminal_that_closes_counts_once_and_not_at_all_under_nohup():
    reached = []

    def body(interrupts):
        with interrupts.noted():
            send(signal.SIGHUP)
            send(signal.SIGHUP)
            reached.append(interrupts.requested)

    with pytest.raises(Interrupted, match="stopped by SIGHUP"):
        work(body)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        work(lambda interrupts: (send(signal.SIGHUP), reached.append("went on")))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert reached == ["SIGHUP", "went on"]


def test_the_second_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "goes on SIGTERM\n"
