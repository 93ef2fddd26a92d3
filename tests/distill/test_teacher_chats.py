"""Chats that the teacher writes: seeded, whole, without marks of the template in them, and read back as written."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pair import config
from word_tokenizer import CHATML, make_tokenizer

from deltanet import DeltaNetForCausalLM
from deltanet_errors import DeltanetError, UserError
from distill import teacher_text
from distill.data import Corpus, whole
from distill.recipe import parse_recipe
from distill.schema import Source
from distill.teacher_chats import SHORTEST, write_chats
from distill.teacher_text import planned, written_source
from distill.token_cache import tokenise

TOKENIZER = make_tokenizer(CHATML)
STOP = TOKENIZER.eos_token_id
SOURCE = Source(name="own", from_teacher=400, kind="chat")


@pytest.fixture(scope="module")
def teacher():
    """A random model of the tokenizer's 259 ids that likes to end its turns, else writes ASCII letters and digits."""
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(config(["full_attention"] * 2, vocab_size=259, tie_word_embeddings=False)).eval()
    plain = [TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    bias = torch.full((259,), -30.0)
    bias[plain], bias[STOP] = 0.0, 1.5

    def biased(module, inputs, output):
        return output + bias

    model.lm_head.register_forward_hook(biased)
    return model.requires_grad_(False)


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(teacher_text, "PORTION", 8 * SHORTEST)


def test_the_same_key_writes_the_same_chats_each_a_question_and_an_answer(teacher):
    chats = write_chats(teacher, TOKENIZER, 16, SHORTEST, 1, stop_ids={STOP})
    assert chats == write_chats(teacher, TOKENIZER, 16, SHORTEST, 1, stop_ids={STOP})
    assert chats != write_chats(teacher, TOKENIZER, 16, SHORTEST, 2, stop_ids={STOP})
    assert len(chats) > 4
    for chat in chats:
        assert [turn["role"] for turn in chat["messages"]] == ["user", "assistant"]
        assert all(turn["content"] and "<" not in turn["content"] for turn in chat["messages"])
        text = TOKENIZER.apply_chat_template(chat["messages"], tokenize=False)
        assert chat["tokens"] == len(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def test_a_dull_turn_drops_its_chat_and_so_does_one_without_an_end(teacher):
    chats = write_chats(teacher, TOKENIZER, 16, SHORTEST, 1, stop_ids={STOP})
    word = chats[0]["messages"][1]["content"]
    fewer = write_chats(teacher, TOKENIZER, 16, SHORTEST, 1, stop_ids={STOP}, is_dull=lambda text: text == word)
    assert all(chat["messages"][1]["content"] != word for chat in fewer)
    assert write_chats(teacher, TOKENIZER, 4, SHORTEST, 1, stop_ids={STOP}, is_dull=lambda text: True) == []
    never_written = {0}
    assert write_chats(teacher, TOKENIZER, 4, SHORTEST, 1, stop_ids=never_written) == []


def test_questions_begin_with_the_openings_in_turn_and_no_chat_is_longer_than_asked_for(teacher):
    openings = ["ab 1", "cd 2"]
    chats = write_chats(teacher, TOKENIZER, 16, 160, 1, stop_ids={STOP}, openings=openings)
    questions = [chat["messages"][0]["content"] for chat in chats]
    assert {question[:4] for question in questions} == set(openings)
    assert all(len(question) > 4 for question in questions)
    assert all(chat["tokens"] <= 160 for chat in chats)
    tight = write_chats(teacher, TOKENIZER, 32, 60, 1, stop_ids={STOP}, openings=["a b c d e f g h i j k l"])
    assert tight
    assert all(chat["tokens"] <= 60 for chat in tight)
    other = write_chats(teacher, TOKENIZER, 16, 160, 1, stop_ids={STOP}, openings=["ef"])
    assert other
    assert all(chat["messages"][0]["content"].startswith("ef") for chat in other)


def test_a_source_of_chats_is_written_once_and_becomes_supervised_answers(teacher, tmp_path):
    source = written_source(SOURCE, teacher, TOKENIZER, tmp_path / "written", 0, 128)
    assert written_source(SOURCE, teacher, TOKENIZER, tmp_path / "written", 0, 128) == source
    rows = [json.loads(line) for name in source.path for line in Path(name).read_text("utf-8").splitlines()]
    assert sum(row["tokens"] for row in rows) >= 400
    tokens = tokenise(source, TOKENIZER, tmp_path / "cache", vocab_size=259)
    assert tokens.facts.documents == len(rows)
    assert tokens.facts.stopped == len(rows)
    assert tokens.facts.tokens == sum(row["tokens"] for row in rows)
    answers = TOKENIZER.decode(tokens.ids[np.flatnonzero(tokens.marks)])
    assert answers == "".join(row["messages"][1]["content"] + "<|im_end|>" for row in rows)


def test_a_teacher_that_cannot_chat_is_named(teacher, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="has no chat template, so it writes no chats"):
        written_source(SOURCE, teacher, make_tokenizer(None), tmp_path, 0, 128)
    monkeypatch.setattr(teacher_text, "repeats", lambda text: True)
    with pytest.raises(DeltanetError, match="source own: the teacher ends none of 40 chats or repeats them; give"):
        written_source(SOURCE, teacher, TOKENIZER, tmp_path, 0, 128)


def test_a_chat_that_is_written_again_and_again_is_kept_once(teacher, tmp_path, monkeypatch):
    chat = write_chats(teacher, TOKENIZER, 16, SHORTEST, 1, stop_ids={STOP})[0]
    monkeypatch.setattr(teacher_text, "write_chats", lambda *arguments, **options: [chat, chat])
    with pytest.raises(DeltanetError, match="the teacher ends none of 40 chats or repeats them; give a chat instead"):
        written_source(SOURCE, teacher, TOKENIZER, tmp_path, 0, 128)
    rows = [line for file in sorted(tmp_path.glob("*.jsonl")) for line in file.read_text("utf-8").splitlines()]
    assert [json.loads(line) for line in rows] == [chat]


def test_a_plan_of_chats_packs_without_the_writing():
    corpus = Corpus([whole(planned(SOURCE, 128))], seq_len=128)
    assert corpus.reports[0].tokens == 400


def test_preferences_are_not_written():
    text = (
        "version: 1\nteacher: {model: demo}\nstudent: {convert: {hybrid: none}}\ndata:\n  sources:\n"
        "    - {from_teacher: 100, kind: preference}\nstages: [{kind: dpo, steps: 1}]\n"
    )
    with pytest.raises(UserError, match=r"data\.sources\.0\.kind: the teacher writes texts and chats"):
        parse_recipe(text, "r.yaml")
