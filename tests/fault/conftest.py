"""Puts the small run of the distillation tests within reach."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "distill"))
