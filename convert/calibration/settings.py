"""What a calibration fits and how hard it is regularised. The defaults are the ones that lost least on text of
another kind than they were fitted on: docs/results/calibration.md has the table.
"""

from dataclasses import dataclass, replace

import torch

EFFORTS = ("quick", "full")


@dataclass(frozen=True)
class Settings:
    """Args:
    importance: the write strength depends on the input, through how much later attention a key draws.
    decay_slope: the decay depends on the input, through how much attention still looks back past a token.
    data_dependent: read gate and skip taps depend on the input; else they are one number per head and tap.
    refit_output: fit the output projection and its bias. None: where there is no local window, which needs no other
        than the teacher's (on text of another kind a fitted one loses a twelfth: docs/results/students.md).
    gate_ridge: penalty on the data-dependent part, in units of its mean squared feature.
    output_ridge: pull of the output projection towards the teacher's, in units of its mean squared feature.
    sequential: layers are fitted on the student's own stream; else on the teacher's, each by itself. None: where the
        student keeps attention layers, which suffer most from the errors of the linear layers before them.
    catch_up: share of the error that earlier layers left in the student's stream which this layer is to make good.
    start_weight: how many further tokens the first of a window counts for in the output projection, where the mixer
        passes it exactly (`exact_start`): later attention looks at it when it looks at nothing.
    half_lives, betas: the coarse grid of the search, in tokens and as shares of the largest write strength.
    sweeps: rounds of coordinate descent after the grid.
    search_windows, search_length: how much text the search sees.
    batch: windows that are run at once.
    """

    importance: bool = True
    decay_slope: bool = False
    data_dependent: bool = True
    refit_output: bool | None = None
    gate_ridge: float = 0.03
    output_ridge: float = 1.0
    sequential: bool | None = None
    catch_up: float = 1.0
    start_weight: float = 64.0
    half_lives: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 512, 1e9)
    betas: tuple[float, ...] = (0.02, 0.1, 0.25, 0.5, 0.75, 0.95)
    sweeps: int = 2
    search_windows: int = 8
    search_length: int = 1024
    batch: int = 8

    @classmethod
    def of(cls, effort: str = "full", **changes) -> "Settings":
        """`full`, or `quick`: a grid and a search text small enough for a CPU (the loss is in the results)."""
        if effort == "quick":
            settings = cls(half_lives=(1, 4, 16, 64, 256, 1e9), betas=(0.03, 0.1, 0.3, 0.7), search_length=512)
            return replace(settings, search_windows=6, **changes)
        return cls(**changes)

    @classmethod
    def for_device(cls, device: torch.device) -> "Settings":
        """What is affordable there."""
        return cls.of("quick" if device.type == "cpu" else "full")
