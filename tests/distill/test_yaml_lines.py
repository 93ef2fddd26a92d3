"""Laws of the YAML reader: numbers of YAML 1.2, everything doubtful refused with its line, writing read back equal."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltanet_errors import UserError
from distill.yaml_lines import read_yaml, write_yaml


def value(text):
    return read_yaml(f"a: {text}", "r.yaml")[0]["a"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1e-5", 1e-5), ("1E-5", 1e-5), ("1.", 1.0), (".5", 0.5), ("-2.5e+3", -2500.0), ("1e5", 1e5),
        ("017", 17), ("0o17", 15), ("0x1F", 31), ("-3", -3), ("+4", 4),
        ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("on", "on"), ("yes", "yes"), ("No", "No"), ("12:30", "12:30"), ("1_000", "1_000"),
        ("2026-11-26", "2026-11-26"),
        ("'1e-5'", "1e-5"), ('"true"', "true"), ("1e", "1e"), ("0b1", "0b1"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text, expected):
    assert value(text) == expected
    assert type(value(text)) is type(expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 2\n  c: 3\n", r"^r.yaml:4 b.c: the key is there twice, first in line 3$"),
        ("a:\n  - .nan\n", r"^r.yaml:2 a.0: .nan is not a finite number$"),
        ("a: -.inf", r"^r.yaml:1 a: -.inf is not a finite number$"),
        ("[" * 5000, r"^r.yaml: nested too deep; allowed are 100 keys above one another$"),
        ("[" * 102 + "]" * 102, r"^r.yaml: nested too deep; allowed are 100 keys above one another$"),
        (f"a: 1{'0' * 5000}", r"^r.yaml:1 a: '10{39}\.\.\.' is not a whole number of 64 bits$"),
        (f"a: 0x{'f' * 5000}", r"^r.yaml:1 a: '0xf{38}\.\.\.' is not a whole number of 64 bits$"),
        (f"a: {1 << 63}", r"^r.yaml:1 a: '9223372036854775808' is not a whole number of 64 bits$"),
        ("a: 1e999", r"^r.yaml:1 a: 1e999 is not a finite number$"),
        ("\n1: x", r"^r.yaml:2: the key '1' is not text"),
        ("[a]: x", r"^r.yaml:1: the key .* is not text"),
        ("a: !!python/object:os.system x", r"^r.yaml:1: the tag .*python/object:os.system' is not allowed"),
        ("a: !!float x", r"^r.yaml:1 a: 'x' is not a value of the tag float$"),
        ("a: [1, 2\nb: 3\n", r"^r.yaml:\d: not YAML: "),
        ("a:\n\t- 1\n", r"^r.yaml:2: not YAML: "),
        ("a: 1\n---\nb: 2\n", r"^r.yaml:2: not YAML: "),
        ("a: \x00", r"^r.yaml: not YAML: "),
        ("a: &x [*x]", r"^r.yaml:1: aliases that make the document endless"),
        ("a: &x {b: *x}", r"^r.yaml:1: aliases that make the document endless"),
    ],
)
def test_what_is_doubtful_is_refused_with_its_line(text, message):
    with pytest.raises(UserError, match=message):
        read_yaml(text, "r.yaml")


def test_aliases_that_explode_are_refused():
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    for level in range(1, 8):
        text += f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n"
    with pytest.raises(UserError, match="over 100000 values"):
        read_yaml(text, "r.yaml")


def test_every_key_knows_its_line():
    _, lines = read_yaml("a: 1\nb:\n  - c: 2\n    d: {e: 3}\n  -\n    c: 4\n", "r.yaml")
    assert lines[("a",)] == 1
    assert lines[("b", 0, "c")] == 3
    assert lines[("b", 0, "d", "e")] == 4
    assert lines[("b", 1, "c")] == 6


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
KEYS = st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_what_is_written_is_read_back(value):
    assert read_yaml(write_yaml(value), "r.yaml")[0] == value


@pytest.mark.parametrize("text", ["1e-5", "017", "on", "12:30", "1_000", ".nan", "~", "0o7", "=", "<<", "- a", "a: b"])
def test_text_that_looks_like_something_else_is_read_back(text):
    assert read_yaml(write_yaml([text, {text: text}]), "r.yaml")[0] == [text, {text: text}]
