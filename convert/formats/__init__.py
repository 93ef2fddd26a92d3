"""A student in the forms that other programs load. Twin tests: tests/convert/formats."""

from .command import FORMATS, REWRITTEN, check_format, write_format

__all__ = ["FORMATS", "REWRITTEN", "check_format", "write_format"]
