"""Whole runs of `deltanet-distill` that something happens to, each in a process of its own.

The processes are forked from one that has imported everything already, so a run of a tiny teacher takes a second or
two and dies alone. What happens, happens as the run changes its folder (Python tells an audit hook of every file opened
for writing, folder made, rename and removal beforehand), or as it calls a function.
"""

import functools
import importlib
import multiprocessing
import os
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

MODULES = ["cli", "distill.run", "deepspeed", "peft", "matplotlib.backends.backend_agg", "warmed"]
MADE, GONE = {"open", "os.mkdir"}, {"os.remove", "os.rmdir", "shutil.rmtree"}
CHANGES = MADE | GONE | {"os.rename"}
DEADLINE = 240


@dataclass
class Changes:
    """Nothing; what befalls a run at its change number `last` derives from it."""

    folder: str
    last: int = 0
    count: int = 0

    def prepare(self) -> None:
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if event not in CHANGES or (event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        path = os.fsdecode(arguments[0]) if isinstance(arguments[0], str | bytes | os.PathLike) else ""
        # A tree is removed by names relative to an open folder.
        if path.startswith(self.folder) or (event in GONE and not os.path.isabs(path)):
            self.count += 1
            self.at(event)

    def at(self, event: str) -> None:
        """Called before change number `count`."""


@dataclass
class Killed(Changes):
    """kill -9 before the change."""

    def at(self, event: str) -> None:
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass
class NoRoom(Changes):
    """From the change on no file and no folder can be made; the error is `errno`."""

    errno: int = 0

    def at(self, event: str) -> None:
        if self.count >= self.last and event in MADE:
            raise OSError(self.errno, os.strerror(self.errno))


@dataclass
class SmallFiles:
    """No file can be written beyond `limit` bytes, by Python or by anything else."""

    limit: int

    def prepare(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@dataclass
class Signalled:
    """A signal as `module.name` is called; it says NOT CUT where the call ends all the same."""

    module: str
    name: str
    number: int

    def prepare(self) -> None:
        module = importlib.import_module(self.module)
        real = getattr(module, self.name)

        @functools.wraps(real)
        def call(*args, **kwargs):
            os.kill(os.getpid(), self.number)
            real(*args, **kwargs)
            print("NOT CUT", flush=True)
            os._exit(99)

        setattr(module, self.name, call)


def carry_out(recipe: Path, run: Path, happens: object | None = None) -> tuple[int, str]:
    """A run from the command line, to which `happens` happens: (exit code, negative for a signal; what it printed)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    log = Path(f"{run}.log")
    process = context.Process(target=_work, args=([str(recipe), "-o", str(run)], log, happens))
    process.start()
    process.join(DEADLINE)
    if process.exitcode is None:
        process.kill()
        raise AssertionError(f"{run}: still running after {DEADLINE} s")
    return process.exitcode, log.read_text()


def _work(arguments: list[str], log: Path, happens: object | None) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    import cli

    if happens is not None:
        happens.prepare()
    code = cli.distill_main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
