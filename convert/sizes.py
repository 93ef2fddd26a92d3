"""Sizes of files as people write them. Twin: tests/convert/test_sizes.py."""

import math
import re

from deltanet_errors import UserError

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def parse_size(option: str, text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number. Raises UserError headed by `option`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(text))
    size = float(match[1]) * UNITS.get(match[2].upper(), 0) if match else 0
    if not 0 < size < math.inf:
        raise UserError(f"{option} {text}: not a size; write it like 5GB, 500MB or 2GiB")
    return max(int(size), 1)
