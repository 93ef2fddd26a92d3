"""One ranking from a teacher in memory, by any of METHODS. `command.py` adds reading and writing.

All methods but `linearity` look at a twin of the teacher whose layers are all linear, each calibrated on the teacher's
own stream, so that one calibration serves every layout.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet.errors import UserError, nearest

from ..calibrate import calibrate
from ..calibration import Settings
from ..closeness import layer_errors
from ..loading import student_from_teacher
from ..text import CalibrationText
from .linearity import linearity
from .swap import greedy, recall, swap

METHODS = {
    "linearity": "how far the layer is from a linear map of its input: 1 less its linearity",
    "fit": "error of the calibrated mixer, over the residual stream it is added to",
    "swap": "KL(teacher || student) in nats when this layer alone is swapped",
    "recall": "rise of the loss on a repeated passage, less its rise on the first, when this layer alone is swapped",
    "greedy": "KL(teacher || student) in nats before this layer, the best next one, gets its attention back",
}
"""What the score of each says. Larger means that the layer needs its attention more."""

Progress = Callable[[float], None]


def check_method(method: str) -> str:
    if method not in METHODS:
        raise UserError(f"--rank {method}: allowed are {', '.join(METHODS)}{nearest(method, list(METHODS))}")
    return method


def check_text(method: str, text: CalibrationText) -> None:
    if not len(text.held_out):
        raise UserError(f"--rank {method}: the text is too short to set any of it aside; give more, or --held-out")


def rounds(method: str, num_layers: int) -> int:
    """How often `rank_layers` calls `advance(1)`."""
    return num_layers * (num_layers + 1) // 2 if method == "greedy" else num_layers


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
    scores come from text.held_out. Raises UserError for an unknown method or where no text is held out.
    """
    check_method(method)
    check_text(method, text)
    start = time.monotonic()
    scored = text.held_out.to(teacher.device)
    if method == "linearity":
        rows = linearity(teacher, text.fit.to(teacher.device), scored, advance=advance)
        rows = [{"layer": row["layer"], "score": 1 - row["block"], **row} for row in rows]
    elif method == "fit":
        rows = [
            {"layer": row["layer"], "score": row["residual_error"], **row}
            for row in layer_errors(teacher, twin, scored)
        ]
        advance(len(rows))
    else:
        rows = {"swap": swap, "recall": recall, "greedy": greedy}[method](teacher, twin, scored, advance)
    if method != "greedy":
        rows.sort(key=lambda row: -row["score"])
    return {
        "ranking": [row["layer"] for row in rows],
        "num_layers": len(rows),
        "method": method,
        "score": METHODS[method],
        "layers": rows,
        "tokens": {"fit": text.fit.numel(), "scored": scored.numel()},
        "seconds": round(time.monotonic() - start, 3),
    }
