"""Ids outside of the vocabulary are noted of a source, and a fault in what we publish."""

import json

import pytest
from tiny import VOCABULARY, edit_config, tokens

from convert import convert, load_teacher
from convert.publish.manifest import seal
from convert.publish.verify import verify
from convert.tokens import GENERATION, generation_settings, strangers
from deltanet import DeltaNetConfig, load_student
from deltanet_errors import UserError


class Tokenizer(list):
    """The ids of its tokens."""

    def get_vocab(self):
        return {str(token): token for token in self}


def test_every_stranger_is_named_with_its_file():
    config = DeltaNetConfig(vocab_size=96, eos_token_id=[2, 96], pad_token_id=-1)
    assert strangers(Tokenizer(range(97)), config, {"bos_token_id": "x", "eos_token_id": 3}) == [
        "tokenizer: 97 tokens, but config.json has room for 96",
        "config.json: eos_token_id is 96; the vocabulary has 96",
        f"{GENERATION}: bos_token_id is 'x'; the vocabulary has 96",
    ]
    assert strangers(Tokenizer([3, 96]), DeltaNetConfig(vocab_size=96, eos_token_id=2), {}) != []
    assert strangers(None, DeltaNetConfig(vocab_size=96, eos_token_id=2), {}) == []


@pytest.mark.parametrize("content", ["{", "[]", "null", "3"])
def test_unreadable_generation_settings_are_refused_and_verified(teacher, tmp_path, content):
    convert(teacher, tmp_path / "student", calibrate=["none"])
    for folder in (teacher, tmp_path / "student"):
        (folder / GENERATION).write_text(content)
    with pytest.raises(UserError, match=f"{GENERATION}: unreadable"):
        generation_settings(teacher)
    with pytest.raises(UserError, match=f"{GENERATION}: unreadable"):
        convert(teacher, tmp_path / "other", calibrate=["none"])
    assert not (tmp_path / "other").exists()
    seal(tmp_path / "student")
    assert [f"{GENERATION}: unreadable" in problem for problem in verify(tmp_path / "student").problems] == [True]


def test_strangers_are_notes_of_a_conversion_and_problems_of_its_student(teacher, tmp_path):
    edit_config(teacher, pad_token_id=VOCABULARY)
    (teacher / GENERATION).write_text(json.dumps({"eos_token_id": [2, "x", None]}))
    notes = [
        f"config.json: pad_token_id is {VOCABULARY}; the vocabulary has {VOCABULARY}",
        f"{GENERATION}: eos_token_id is 'x'; the vocabulary has {VOCABULARY}",
    ]
    assert set(notes) < set(convert(teacher, tmp_path / "student", calibrate=["none"])["notes"])
    assert verify(tmp_path / "student").problems == notes


@pytest.mark.parametrize("padding", [VOCABULARY, 10 * VOCABULARY, -1, -10 * VOCABULARY])
def test_a_padding_token_that_no_text_holds_is_in_nobodys_way(padding, teacher, tmp_path):
    edit_config(teacher, pad_token_id=padding)
    convert(teacher, tmp_path / "student", calibrate=["none"])
    for model in (load_teacher(teacher), load_student(tmp_path / "student")):
        assert model.config.pad_token_id == padding
        assert model.model.embed_tokens.padding_idx is None
        assert model.generate(tokens(1, 5), max_new_tokens=2, pad_token_id=0).shape == (1, 7)
