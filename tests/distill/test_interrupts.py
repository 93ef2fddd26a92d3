"""The first signal is noted and cuts nothing, the second ends the process at once."""

import os
import signal
import subprocess
import sys

import pytest

from deltanet.errors import Interrupted
from distill.interrupts import Interrupts

TWICE = """
import os, signal
from distill.interrupts import Interrupts
with Interrupts() as interrupts:
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", interrupts.requested, flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    print("never said", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_and_the_old_handler_comes_back(number, capsys):
    before = signal.getsignal(number)
    with Interrupts() as interrupts:
        interrupts.check("nothing")
        os.kill(os.getpid(), number)
        assert interrupts.requested == number.name
        with pytest.raises(Interrupted, match=f"stopped by {number.name}; it is on disk"):
            interrupts.check("it is on disk")
    assert signal.getsignal(number) is before
    assert "stopping after a commit" in capsys.readouterr().err


def test_the_second_signal_ends_the_process_at_once():
    done = subprocess.run([sys.executable, "-c", TWICE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == "goes on SIGTERM\n"
