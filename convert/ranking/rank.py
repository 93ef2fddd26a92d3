"""One ranking from a teacher in memory, by any of METHODS. `command.py` adds reading and writing.

All methods but `linearity` look at a twin of the teacher whose layers are all linear, each calibrated on the teacher's
own stream, so that one calibration serves every layout.
"""

import copy
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet_errors import UserError, nearest

from ..calibrate import calibrate
from ..calibration import Settings
from ..closeness import layer_errors
from ..loading import student_from_teacher
from ..text import CalibrationText
from .distilled import STEPS, distilled
from .linearity import linearity
from .swap import greedy, recall, swap

METHODS = {
    "linearity": "how far the layer is from a linear map of its input: 1 less its linearity",
    "fit": "error of the calibrated mixer, over the residual stream it is added to",
    "swap": "KL(teacher || student) in nats when this layer alone is swapped",
    "recall": "rise of the loss on a repeated passage, less its rise on the first, when this layer alone is swapped",
    "greedy": "KL(teacher || student) in nats before this layer, the best next one, gets its attention back",
    "distilled": "the same, where the mixers of every candidate are distilled for some steps before they are judged",
}
"""What the score of each says. Larger means that the layer needs its attention more."""

GREEDY = ("greedy", "distilled")
"""Those that choose layer by layer, so that their order is not that of their scores."""

Progress = Callable[[float], None]


def parse_method(text: str) -> tuple[str, int]:
    """One of METHODS and, of `distilled` or `distilled:STEPS`, how many steps. Raises UserError for anything else."""
    method, colon, steps = text.partition(":")
    if method not in METHODS:
        raise UserError(f"--rank {text}: allowed are {', '.join(METHODS)}{nearest(method, list(METHODS))}")
    if colon and (method != "distilled" or not re.fullmatch(r"\d{1,18}", steps) or int(steps) < 1):
        raise UserError(f"--rank {text}: only distilled takes a number, of steps, 1 or more, as in distilled:{STEPS}")
    return method, int(steps) if colon else STEPS


def check_text(method: str, text: CalibrationText) -> None:
    if not len(text.held_out):
        raise UserError(f"--rank {method}: the text is too short to set any of it aside; give more, or --held-out")


def rounds(method: str, num_layers: int) -> int:
    """How often `rank_layers` calls `advance(1)`."""
    return num_layers * (num_layers + 1) // 2 if parse_method(method)[0] in GREEDY else num_layers


def linear_twin(
    teacher: DeltaNetForCausalLM,
    config: DeltaNetConfig,
    fit: torch.Tensor,
    *,
    folder: Path | None = None,
    advance: Progress | None = None,
) -> DeltaNetForCausalLM:
    """The calibrated student with the settings of `config`, which has no attention; it shares the teacher's weights."""
    twin = student_from_teacher(teacher, copy.deepcopy(config), share=True)
    settings = replace(Settings.for_device(teacher.device), sequential=False)
    calibrate(teacher, twin, fit, settings, folder=folder, advance=advance)
    return twin


@torch.no_grad()
def rank_layers(
    teacher: DeltaNetForCausalLM,
    method: str,
    text: CalibrationText,
    twin: DeltaNetForCausalLM | None = None,
    *,
    advance: Progress = lambda amount: None,
) -> dict:
    """ranking, all layers with the one that most needs its attention first; num_layers; method; score, in words;
    layers, `layer`, `score` and what else the method found, in the order of the ranking; tokens; seconds.

    text.fit is for `linearity` to fit its maps on, what twin (`linear_twin`, needed by all others) was calibrated on;
    `distilled` trains on; scores come from text.held_out. Raises UserError for an unknown method or where no text is
    held out.
    """
    name, steps = parse_method(method)
    check_text(method, text)
    start = time.monotonic()
    scored = text.held_out.to(teacher.device)
    if name == "linearity":
        rows = linearity(teacher, text.fit.to(teacher.device), scored, advance=advance)
        rows = [{"layer": row["layer"], "score": 1 - row["block"], **row} for row in rows]
    elif name == "fit":
        rows = [
            {"layer": row["layer"], "score": row["residual_error"], **row}
            for row in layer_errors(teacher, twin, scored)
        ]
        advance(len(rows))
    elif name == "distilled":
        rows = distilled(teacher, twin, text.fit.to(teacher.device), scored, steps, advance)
    else:
        rows = {"swap": swap, "recall": recall, "greedy": greedy}[name](teacher, twin, scored, advance)
    if name not in GREEDY:
        rows.sort(key=lambda row: -row["score"])
    return {
        "ranking": [row["layer"] for row in rows],
        "num_layers": len(rows),
        "method": method,
        "score": METHODS[name],
        "layers": rows,
        "tokens": {"fit": text.fit.numel(), "scored": scored.numel()},
        "seconds": round(time.monotonic() - start, 3),
    }
