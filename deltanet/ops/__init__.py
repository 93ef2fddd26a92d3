"""The delta rule. Equations: README.md. Truth: reference.py. PyTorch: chunk.py, recurrent.py. Kernels: triton/."""

from .dispatch import delta_rule, delta_rule_step_, explain_backend

__all__ = ["delta_rule", "delta_rule_step_", "explain_backend"]
