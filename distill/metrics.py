"""What a run says while it runs: metrics.jsonl (one object a step), progress on stderr, and optional trackers.

Only rank 0 writes. metrics.jsonl holds every step once, also after a resume: what a killed run logged beyond its last
commit is cut off first. Twin: tests/distill/test_metrics.py.
"""

import contextlib
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from deltanet_errors import UserError

from .schema import Logging

SHOWN_EVERY_SECONDS = 1.0
SILENT_SECONDS = 10.0
TRACKERS = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}


class MetricsLog:
    """Appends records to `path` and passes their numbers on to the trackers."""

    def __init__(self, path: Path, sinks: list[Callable[[dict], None]] = ()):
        self.path, self.sinks = path, list(sinks)

    def keep_before(self, stage: int, step: int) -> None:
        """Drops the records of stage `stage` from step `step` on, of later stages, and a half-written last line."""
        if not self.path.exists():
            return
        kept = [line for line, record in _lines(self.path) if (record["stage_index"], record["step"]) < (stage, step)]
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self.path)

    def write(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        for sink in self.sinks:
            sink(record)


def read_metrics(path: Path) -> list[dict]:
    """The records; what is none, as a killed run or a damaged disk may leave it, is passed over."""
    return [record for _, record in _lines(path)] if path.exists() else []


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and {"stage", "stage_index", "step", "loss"} <= record.keys():
                yield line, record


def check_trackers(logging: Logging) -> None:
    """Raises UserError where a tracker that the recipe asks for is not installed."""
    for package, module in TRACKERS.items():
        if getattr(logging, package):
            _module(module, package)


def trackers(logging: Logging, folder: Path, name: str) -> list[Callable[[dict], None]]:
    """The trackers a recipe asks for; raises UserError where one is not installed."""
    sinks = []
    if logging.tensorboard:
        writer = _module(TRACKERS["tensorboard"], "tensorboard").SummaryWriter(str(folder / "tensorboard"))
        sinks.append(
            lambda record: [writer.add_scalar(k, v, record["total_step"]) for k, v in _numbers(record).items()]
        )
    if logging.wandb:
        run = _module("wandb", "wandb").init(
            project=logging.project, name=name, dir=str(folder), resume="allow", id=name
        )
        sinks.append(lambda record: run.log(_numbers(record), step=record["total_step"]))
    if logging.trackio:
        trackio = _module("trackio", "trackio")
        trackio.init(project=logging.project, name=name, resume="allow")
        sinks.append(lambda record: trackio.log(_numbers(record), step=record["total_step"]))
    return sinks


def _module(module: str, package: str):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"logging.{package}: true, but {package} is not installed (pip install {package})") from None


def _numbers(record: dict) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, int | float)}


class Progress:
    """One line on stderr: rewritten in place on a terminal, else at most one a second."""

    def __init__(self, name: str, num_steps: int, done: int = 0):
        self.name, self.num_steps, self.first = name, num_steps, done
        self.started, self.shown = time.monotonic(), 0.0
        self.in_place = sys.stderr.isatty()

    def show(self, record: dict) -> None:
        now, step = time.monotonic(), record["step"] + 1
        if now - self.shown < SHOWN_EVERY_SECONDS and step < self.num_steps:
            return
        self.shown = now
        left = (now - self.started) / max(step - self.first, 1) * (self.num_steps - step)
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        loss += "" if record["applied"] else " (skipped: loss or gradient not finite)"
        memory = f"  {record['memory_gb']:.1f} GB" if "memory_gb" in record else ""
        line = (
            f"{self.name} {step}/{self.num_steps}  loss {loss}  lr {record['lr']:.2g}  "
            f"{record['tokens_per_second']:,.0f} tokens/s{memory}  {_clock(left)} left"
        )
        end = "\n" if not self.in_place or step == self.num_steps else ""
        print(f"\r\x1b[2K{line}" if self.in_place else line, end=end, file=sys.stderr, flush=True)


class Pulse:
    """Long work that steps do not count says how far it is: a line on stderr now and then, none while it is short."""

    def __init__(self, seconds: float = SILENT_SECONDS):
        self.seconds, self.told = seconds, time.monotonic()

    def __call__(self, text: str) -> None:
        if time.monotonic() - self.told >= self.seconds:
            self.told = time.monotonic()
            print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
