"""Turns a pretrained transformer into a student whose layers run on the delta rule."""

import importlib

_HOMES = {"convert": "command", "load_teacher": "loading", "student_from_teacher": "loading"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """The public names, imported at first use, so that the modules which need no torch come without it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
