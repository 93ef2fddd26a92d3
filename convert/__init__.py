"""Turns a pretrained transformer into a student whose layers run on the delta rule."""

from .loading import load_teacher, student_from_teacher

__all__ = ["load_teacher", "student_from_teacher"]
