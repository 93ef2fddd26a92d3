"""What other libraries say is told whole, on one line."""

import pytest

from deltanet.errors import LONGEST_REASON, one_line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (ValueError("a field:\n    expected int"), "a field: expected int"),
        (KeyError("added_tokens"), "KeyError: 'added_tokens'"),
        (RuntimeError(" "), "RuntimeError"),
        (ValueError("x" * 1000), "x" * LONGEST_REASON + " ..."),
    ],
)
def test_a_reason_is_one_line(error, says):
    assert one_line(error) == says
