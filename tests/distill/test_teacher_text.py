"""Text that the teacher writes: seeded, resumable, free of loops, and of the size asked for."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import torch
from transformers import AutoTokenizer

from convert.loading import load_teacher
from deltanet_errors import DeltanetError, UserError
from distill import teacher_text
from distill.schema import Source
from distill.teacher_text import planned, repeats, written_source

TEACHER = load_teacher(small_run.DEMO, torch.float32)
TOKENIZER = AutoTokenizer.from_pretrained(small_run.DEMO)
SOURCE = Source(name="teacher", from_teacher=300)


@pytest.fixture(autouse=True)
def small_portions(monkeypatch):
    monkeypatch.setattr(teacher_text, "PORTION", 256)
    monkeypatch.setattr(teacher_text, "SHORT", 64)


def write(folder, seed=0, name="teacher"):
    source = written_source(SOURCE.model_copy(update={"name": name}), TEACHER, TOKENIZER, folder, seed, 64)
    return source, [json.loads(line) for name in source.path for line in open(name, encoding="utf-8")]


def test_the_same_seed_writes_the_same_text_and_another_seed_another(tmp_path):
    source, documents = write(tmp_path / "a")
    assert documents == write(tmp_path / "b")[1]
    assert documents != write(tmp_path / "c", seed=1)[1]
    others = [write(tmp_path / "d", name=name)[1] for name in ("one", "two")]
    assert documents != others[0] != others[1] != documents
    assert sum(document["tokens"] for document in documents) >= 300
    assert source.from_teacher is None
    assert len(source.path) > 1
    assert all(len(TOKENIZER(d["text"], add_special_tokens=False)["input_ids"]) > 20 for d in documents)


def test_another_nucleus_is_another_text_beside_the_first(tmp_path):
    whole, _ = write(tmp_path)
    source = SOURCE.model_copy(update={"top_p": 0.9})
    narrow = written_source(source, TEACHER, TOKENIZER, tmp_path, 0, 64)
    assert [path.rpartition("/")[2] for path in narrow.path][:1] == ["teacher-top-0.9-0000.jsonl"]
    assert not {*whole.path} & {*narrow.path}
    assert Path(whole.path[0]).read_text() != Path(narrow.path[0]).read_text()


@pytest.mark.parametrize(("changed", "told"), [({"seed": 1}, "seed 0 -> 1"), ({"seq_len": 128}, "length 64 -> 128")])
def test_text_of_another_seed_or_length_is_not_taken_for_this_one(changed, told, tmp_path):
    _, before = write(tmp_path)
    with pytest.raises(UserError, match=f"as teacher was made otherwise .{told}.; delete teacher. there"):
        written_source(SOURCE, TEACHER, TOKENIZER, tmp_path, **({"seed": 0, "seq_len": 64} | changed))
    assert write(tmp_path)[1] == before


def test_texts_begin_with_the_openings_in_turn_and_of_other_openings_are_not_taken_for_them(tmp_path):
    source = SOURCE.model_copy(update={"openings": ("Once upon a time", "The dog")})
    written = written_source(source, TEACHER, TOKENIZER, tmp_path, 0, 64)
    texts = [json.loads(line)["text"] for name in written.path for line in Path(name).read_text().splitlines()]
    assert all(text.startswith(source.openings) for text in texts)
    assert all(any(text.startswith(opening) for text in texts) for opening in source.openings)
    with pytest.raises(UserError, match=r"openings \['Once upon a time', 'The dog'\] -> None"):
        write(tmp_path)


def test_openings_take_turns_over_all_portions(tmp_path):
    """Of four rows a portion, the first four of seven openings were the only ones."""
    openings = tuple(f"{name} was" for name in ("Anna", "Ben", "The cat", "A tree", "Tom", "The sun", "Mia"))
    source = SOURCE.model_copy(update={"openings": openings, "from_teacher": 600})
    written = written_source(source, TEACHER, TOKENIZER, tmp_path, 0, 64)
    portions = [[json.loads(line)["text"] for line in Path(name).read_text().splitlines()] for name in written.path]
    assert [text.startswith(openings[:4]) for text in portions[0]] == [True] * 4
    assert [text.startswith(openings[4:] + openings[:1]) for text in portions[1]] == [True] * len(portions[1])


@pytest.mark.parametrize(
    ("opening", "told"),
    [
        (" ", "' ': allowed are plain words"),
        ("<|endoftext|>So", "allowed are plain words"),
        ("go on " * 9, "20 tokens; allowed are 16"),
    ],
)
def test_openings_that_leave_nothing_to_write_or_are_marks_are_refused(opening, told, tmp_path):
    source = SOURCE.model_copy(update={"openings": ("Well", opening)})
    with pytest.raises(UserError, match=f"source teacher: openings: .*{told}"):
        written_source(source, TEACHER, TOKENIZER, tmp_path / "written", 0, 64)


@pytest.mark.parametrize("content", [b'{"text": "a', b"\0\0\n", b'{"text": "a"}\n', b"[1]\n", b"\xff\n"])
def test_a_damaged_portion_is_named_and_written_again_once_it_is_gone(content, tmp_path):
    source, before = write(tmp_path)
    first = tmp_path / source.path[0].rpartition("/")[2]
    first.write_bytes(content)
    with pytest.raises(UserError, match=rf"{first.name}: damaged .*; delete it, and the teacher writes it again"):
        write(tmp_path)
    first.unlink()
    assert write(tmp_path)[1] == before


def test_a_killed_writing_goes_on_with_the_next_portion(tmp_path, monkeypatch):
    source, documents = write(tmp_path)
    last = tmp_path / source.path[-1].rpartition("/")[2]
    last.unlink()
    calls = []
    real = teacher_text.write_text
    monkeypatch.setattr(teacher_text, "write_text", lambda *a, **k: calls.append(1) or real(*a, **k))
    assert write(tmp_path)[1] == documents
    assert len(calls) == 1


def test_a_line_separator_that_the_teacher_writes_does_not_end_a_row(tmp_path, monkeypatch):
    rows = [{"text": "one\u2028two\x85three", "tokens": 700}]
    monkeypatch.setattr(teacher_text, "_portion", lambda *arguments: rows)
    source = Source(name="teacher", from_teacher=700)
    assert len(written_source(source, TEACHER, None, tmp_path, 0, 64).path) == 1


def test_a_row_is_as_long_as_a_sequence_within_bounds():
    assert [teacher_text._length(SOURCE, seq_len) for seq_len in (2, 300, 8192)] == [64, 300, 1024]
    chats = SOURCE.model_copy(update={"kind": "chat"})
    assert [teacher_text._length(chats, seq_len) for seq_len in (2, 600, 8192)] == [512, 600, 1024]
    source = Source(name="teacher", from_teacher=1)
    assert [teacher_text._shape(TEACHER, source, seq_len) for seq_len in (64, 256)] == [(4, 64), (1, 256)]


@pytest.mark.parametrize(("gigabytes", "rows"), [(24, 256), (80, 923), (800, 2048), (2, 1)])
def test_a_card_writes_as_many_rows_as_have_room_beside_the_teacher(gigabytes, rows, monkeypatch):
    """A teacher of 1.25 G parameters in bfloat16, whose cache takes 32 KiB a token, hence 32 MiB a row of 1,024."""
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gigabytes * 10**9)
    )
    config = SimpleNamespace(num_hidden_layers=16, num_key_value_heads=8, head_dim=64, max_position_embeddings=131072)
    weights = [torch.empty(1250, 10**6, dtype=torch.bfloat16, device="meta")]
    teacher = SimpleNamespace(
        config=config, device=torch.device("cuda"), dtype=torch.bfloat16, parameters=lambda: weights
    )
    source = Source(name="teacher", from_teacher=1)
    assert teacher_text._shape(teacher, source, 4096) == (rows, 1024)


def test_no_document_is_kept_twice_however_small_the_nucleus(tmp_path):
    """At 1e-9 a row follows from its first token, and a third of the rows begin like any document."""
    source = SOURCE.model_copy(update={"from_teacher": 500, "top_p": 1e-9})
    written = written_source(source, TEACHER, TOKENIZER, tmp_path, 0, 64)
    texts = [json.loads(line)["text"] for name in written.path for line in Path(name).read_text().splitlines()]
    assert len(texts) == len({*texts}) > 4


def test_a_portion_written_again_leaves_out_what_the_others_have(tmp_path, monkeypatch):
    rows = iter([[row("a"), row("b"), row("a")], [row("b"), row("c")], [row("c"), row("b")]])
    monkeypatch.setattr(teacher_text, "_portion", lambda *arguments: next(rows))
    source = written_source(SOURCE, TEACHER, TOKENIZER, tmp_path, 0, 64)
    assert [Path(name).read_text().count("text") for name in source.path] == [2, 1]
    Path(source.path[1]).unlink()
    written_source(SOURCE, TEACHER, TOKENIZER, tmp_path, 0, 64)
    assert json.loads(Path(source.path[1]).read_text())["text"] == "c"


def row(text):
    return {"text": text, "tokens": 100}


def test_a_turn_that_ends_parts_no_document():
    """Where a chat's turns end with the end-of-text token, a row was cut into turns of 40 tokens."""
    tokenizer = copy.deepcopy(TOKENIZER)
    start, end = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "!"])
    words = tokenizer(" a cat sat on the mat" * 10, add_special_tokens=False)["input_ids"][:40]
    row = np.array([start, *words, end, *words, start, *words])
    tokenizer.eos_token = "!"
    lengths = {}
    for template in (None, "{{ bos_token }}{% for m in messages %}{{ m.content }}!{% endfor %}"):
        tokenizer.chat_template = template
        marks = teacher_text._document_marks(tokenizer)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(teacher_text, "repeats", lambda text: False)
            lengths[template] = [d["tokens"] for d in teacher_text._documents(row, tokenizer, marks)]
    assert list(lengths.values()) == [[40, 40, 40], [81, 40]]


def test_loops_are_told_from_prose():
    assert repeats("The cat sat on the mat. " * 20)
    assert not repeats((small_run.DEMO / "text.txt").read_text()[:800])


def test_a_teacher_that_only_loops_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_text, "repeats", lambda text: True)
    with pytest.raises(DeltanetError, match="the teacher repeats itself in 20 rows"):
        write(tmp_path)


def test_a_plan_has_the_size_without_the_writing():
    tokens = planned(Source(name="teacher", from_teacher=1000), 256)
    assert len(tokens.ids) == tokens.bounds[-1] == tokens.facts.tokens == 1000
