"""The parts of the closed-form calibration (`convert/calibrate.py` runs them layer by layer)."""

from .gates import fit_gates
from .output import OutputFit
from .settings import Settings
from .statistics import SourceProducts, head_metric, ridge
from .streams import Stream
from .strengths import fit_strengths

__all__ = [
    "OutputFit",
    "Settings",
    "SourceProducts",
    "Stream",
    "fit_gates",
    "fit_strengths",
    "head_metric",
    "ridge",
]
