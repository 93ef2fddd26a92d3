"""The text that models are measured on."""

import pytest
import torch
from eval_subjects import TEXT

from deltanet_errors import UserError
from distill.evaluation.windows import read_windows


def test_a_file_gives_windows_of_its_own_tokens(teacher):
    windows = read_windows(str(TEXT), teacher, tokens=300, window=64, longest=160)
    assert windows.shape == (4, 64)
    assert teacher.tokenizer.decode(windows.flatten()[1:40]) in TEXT.read_text()


def test_without_a_wish_a_window_is_as_long_as_the_range(teacher):
    assert read_windows(str(TEXT), teacher, tokens=400, longest=160).shape == (2, 160)


def test_a_model_writes_the_same_text_for_the_same_seed(teacher):
    options = {"tokens": 64, "window": 32, "longest": 160}
    first = read_windows("self", teacher, **options, seed=3)
    assert first.shape == (2, 32)
    assert torch.equal(first, read_windows("self", teacher, **options, seed=3))
    assert not torch.equal(first, read_windows("self", teacher, **options, seed=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 161}, "--window 161: allowed is 2 to 160"),
        ({"window": 1}, "--window 1: "),
        ({"tokens": 20}, "--tokens 20: allowed is one window"),
    ],
)
def test_a_window_must_fit_the_model_and_the_tokens(options, message, teacher):
    with pytest.raises(UserError, match=message):
        read_windows(str(TEXT), teacher, longest=160, **options)


def test_too_little_text_is_refused(teacher, tmp_path):
    (tmp_path / "short.txt").write_text("Once upon a time")
    with pytest.raises(UserError, match=r"--text .*short.txt, --window 160: \d+ tokens of text; at least one"):
        read_windows(str(tmp_path / "short.txt"), teacher, longest=160)
