"""A student in the forms that other programs load. Twin tests: tests/convert/formats."""

from .command import FORMATS, write_format

__all__ = ["FORMATS", "write_format"]
