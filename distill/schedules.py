"""Learning rates as pure functions of the step, so that a resumed run needs no state of a scheduler.

Step 0 is the first step taken. A warm-up of w steps rises linearly: step s < w has (s + 1) / w of the peak, so no step
is wasted at zero and step w - 1 is at the peak. Twin: tests/distill/test_schedules.py.
"""

import math
from dataclasses import dataclass

SCHEDULES = ("cosine", "wsd", "constant")


@dataclass(frozen=True)
class Schedule:
    """kind: `cosine` falls over all steps after the warm-up, `wsd` (warm-up, stable, decay) linearly over the last
    `decay_fraction` of all steps, `constant` never; the last step is at `final_fraction` of the peak."""

    kind: str
    num_steps: int
    warmup_steps: int = 0
    final_fraction: float = 0.1
    decay_fraction: float = 0.2

    def factor(self, step: int) -> float:
        """The rate at `step` over the peak rate; steps past the end stay at the last one's."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.kind == "constant":
            return 1.0
        start = self.warmup_steps
        if self.kind == "wsd":
            start = max(start, self.num_steps - max(1, round(self.decay_fraction * self.num_steps)))
        span = self.num_steps - start
        # the first step after `start` is already on the slope, and the last one at its end
        done = 0.0 if step < start or span <= 0 else min(1.0, (step - start + 1) / span)
        fallen = done if self.kind == "wsd" else (1 - math.cos(math.pi * done)) / 2
        return 1.0 - (1.0 - self.final_fraction) * fallen
