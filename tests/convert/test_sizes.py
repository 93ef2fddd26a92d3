"""Sizes are read as people write them."""

import pytest

from convert.sizes import parse_size
from deltanet_errors import UserError


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("2GiB", 2**31), ("1.5 KB", 1500), ("123", 123)],
)
def test_sizes(text, size):
    assert parse_size("--max-shard-size", text) == size


@pytest.mark.parametrize("text", ["5XB", "0GB", "-1GB", "big", "", "1e3", "9" * 400])
def test_anything_else_is_refused(text):
    with pytest.raises(UserError, match=f"^--max-shard-size {text}: not a size; write it like 5GB"):
        parse_size("--max-shard-size", text)
