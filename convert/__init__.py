"""Turns a pretrained transformer into a student whose layers run on the delta rule."""

from .command import convert
from .loading import load_teacher, student_from_teacher

__all__ = ["convert", "load_teacher", "student_from_teacher"]
