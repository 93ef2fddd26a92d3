"""What other libraries say is told whole, on one line; a hint names another spelling, whatever its case."""

import pytest

from deltanet_errors import LONGEST_REASON, nearest, one_line


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


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("mqrr", " (did you mean 'mqar'?)"),
        ("MQAR", " (did you mean 'mqar'?)"),
        ("readme.md", " (did you mean 'README.md'?)"),
        ("mqar", ""),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_the_nearest_spelling(value, hint):
    assert nearest(value, ["needle", "mqar", "README.md"]) == hint
