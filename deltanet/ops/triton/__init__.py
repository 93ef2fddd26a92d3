"""The delta rule in Triton: `delta_rule` (training and inference) and `delta_rule_step_` (decoding, in place)."""

from .operator import delta_rule, delta_rule_step_, unsupported

__all__ = ["delta_rule", "delta_rule_step_", "unsupported"]
