"""Files of texts: every format, every shape of a row, and complaints that name file and line. Twin of
convert/text_files.py."""

import gzip
import json
import os

import pytest

from convert.text_files import read_chat, read_documents, read_file
from deltanet import UserError

CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A fox."}]
ASKED, ANSWERED = CHAT
OTHER = {"role": "assistant", "content": "No."}
SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a story", "a story"),
        ({"text": "a story", "source": "x"}, "a story"),
        ({"document": "a story"}, "a story"),
        ({"text": None, "content": "a story"}, "a story"),
        ({"text": None, "messages": CHAT}, CHAT),
        ({"messages": CHAT}, CHAT),
        ({"conversations": [{"from": "human", "value": "Who are you?"}, {"from": "gpt", "value": "A fox."}]}, CHAT),
        ({"conversation": [{"from": "human", "value": "Who are you?"}, {"from": "bot", "value": "A fox."}]}, CHAT),
        ({"messages": [{**turn, "from": None, "value": None} for turn in CHAT]}, CHAT),
        (
            {"conversations": [{"role": None, "content": None, "from": "human", "value": "Who are you?"}, ANSWERED]},
            CHAT,
        ),
        (
            {
                "conversations": [{"from": "human", "value": "Who are you?"}],
                "chosen": {"from": "gpt", "value": "A fox."},
                "rejected": {"from": "gpt", "value": "No."},
            },
            CHAT,
        ),
        ({"prompt": "Who are you?", "chosen": "A fox.", "rejected": "No."}, CHAT),
        ({"prompt": "Who are you?", "chosen": CHAT, "rejected": [ASKED, OTHER]}, CHAT),
        ({"prompt": [ASKED], "chosen": [ANSWERED], "rejected": [OTHER]}, CHAT),
        ({"instruction": "Who are you?", "input": "", "output": "A fox."}, CHAT),
        (
            {"instruction": "Who", "input": "are you?", "output": "A fox."},
            [{**CHAT[0], "content": "Who\nare you?"}, CHAT[1]],
        ),
        ({"prompt": "Who are you?", "completion": "A fox."}, CHAT),
        ({"prompt": [ASKED], "completion": [ANSWERED]}, CHAT),
        ({"instruction": "Who are you?", "output": "A fox.", "system": "Be brief."}, [SYSTEM, *CHAT]),
        ({"instruction": "Who are you?", "output": "A fox.", "history": [["Hello", "Hi."]]}, [*EARLIER, *CHAT]),
        ({"conversations": CHAT, "system": "Be brief.", "tools": "[]"}, [SYSTEM, *CHAT]),
        (
            {"messages": [SYSTEM, *CHAT], "system": "Be brief.", "history": [["Hello", "Hi."]]},
            [SYSTEM, *EARLIER, *CHAT],
        ),
        ({"messages": CHAT, "system": "", "history": [], "tools": None}, CHAT),
        ({"prompt": "Who are you?", "completion": "A fox.", "system": "Be brief."}, [SYSTEM, *CHAT]),
        ({"messages": [ASKED], "chosen": ANSWERED, "rejected": OTHER, "system": "Be brief."}, [SYSTEM, *CHAT]),
        ({"messages": [ASKED, {**ANSWERED, "reasoning_content": ""}]}, CHAT),
        ({"text": "a story", "tools": "[1]", "system": "Be brief."}, "a story"),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".json.gz", ".jsonl.gz"])
def test_rows_of_every_kind_are_read(tmp_path, row, expected, suffix):
    path = tmp_path / f"rows{suffix}"
    content = json.dumps([row, row]) if ".jsonl" not in suffix else f"{json.dumps(row)}\n\n{json.dumps(row)}\n"
    path.write_bytes(gzip.compress(content.encode()) if suffix.endswith("gz") else content.encode())
    assert read_documents(path) == [expected, expected]


@pytest.mark.parametrize("field", ["history", "system"])
def test_the_key_that_is_named_as_the_chat_is_not_read_beside_it(field):
    assert read_chat({field: CHAT}, "here", field) == CHAT


@pytest.mark.parametrize("tools", [None, False, [], {}, "", "[ ]", "[]\n", "{}", "null"])
def test_no_tools_are_no_fault(tools):
    assert read_chat({"messages": CHAT, "tools": tools, "system": "  "}, "here") == CHAT


def test_dates_beyond_python_beside_a_text_do_no_harm(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    dates = {
        "day": pyarrow.array([10**7], pyarrow.date32()),
        "at": pyarrow.array([1], pyarrow.timestamp("us", "No/Zone")),
    }
    parquet.write_table(pyarrow.table({"text": ["a story"], **dates}), tmp_path / "a.parquet")
    assert read_documents(tmp_path / "a.parquet") == ["a story"]


@pytest.mark.parametrize("suffix", [".parquet", ".parquet.gz"])
def test_parquet_is_read_with_the_nulls_that_it_puts_for_absent_keys(tmp_path, suffix):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": ["a story", None], "messages": [None, CHAT]}), tmp_path / "a.parquet")
    content = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / f"b{suffix}").write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    assert read_documents(tmp_path / f"b{suffix}") == ["a story", CHAT]


def test_a_line_separator_within_a_string_does_not_end_a_row(tmp_path):
    text = "one\u2028two\x85three"
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_documents(tmp_path / "text.jsonl") == [text]


def test_plain_text_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("Ein Märchen.\n\nZwei.", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("Ein Märchen.".encode()))
    assert read_documents(tmp_path / "a.txt") == ["Ein Märchen.\n\nZwei."]
    assert read_documents(tmp_path / "b.txt.gz") == ["Ein Märchen."]
    (tmp_path / "c.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n')
    assert read_documents(tmp_path / "c.jsonl") == ["one"]


@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n"])
def test_text_of_windows_is_parted_like_any_other(tmp_path, separator):
    text = "\ufeffone\ntwo\n\n\n\nthree \u2028 x\n\nfour\n"
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_bytes(text.replace("\n", "\r\n").encode())
    parts = [[*read_file(tmp_path / name, separator)] for name in ("a.txt", "b.txt")]
    assert [[(place.rpartition(":")[2], part) for place, part in found] for found in parts] == [
        [("1", "one\ntwo"), ("4", ""), ("6", "three \u2028 x"), ("8", "four")]
    ] * 2
    assert read_documents(tmp_path / "b.txt") == [text[1:]]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt", b" \n", []),
        ("a.txt", b"", []),
        ("a.jsonl", b"", []),
        ("a.jsonl", b'{"text": " \\n"}\n{"text": "x"}\n""\n', ["x"]),
        ("a.json", b"[]", []),
        ("a.json", b'{"text": "x"}', ["x"]),
        ("a.json", b'"x"', ["x"]),
    ],
)
def test_blank_texts_are_no_documents_and_a_single_record_is_one(tmp_path, name, content, texts):
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == texts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", r"a\.csv: not a text this can read; allowed: \.txt"),
        ("a.json", b'[\n{"text": 1', r"a\.json:2: not JSON: Expecting ',' delimiter \(column 11\)"),
        ("a.json", b"", r"a\.json:1: not JSON"),
        ("a.jsonl", b'{"text": "x"}\nno\n', r"a\.jsonl:2: not JSON: Expecting value \(column 1\)"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "x", "text": null}\n',
            r"a\.jsonl:2: no text or content or document or messages or .*prompt and completion or instruction and "
            r"output or chosen and rejected among the keys body, text \(null\)$",
        ),
        ("a.jsonl", b'{"text": ["x"]}\n', r"a\.jsonl:1 text: expected text, got list"),
        ("a.json", b'[{"messages": [{"role": "user"}]}]', r"a\.json\[0\] messages\[0\]: expected an object with role"),
        ("a.json", b'[{"messages": "hello"}]', r"a\.json\[0\] messages: expected a list of messages"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not JSON: nested too deep"),
        ("a.json", b"[" * 100_000, r"a\.json:1: not JSON: nested too deep"),
        ("a.jsonl", b"[" + b"9" * 5000 + b"]", r"a\.jsonl:1: a number of more than 4,300 digits, which"),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "input": 3}', r"a\.jsonl:1 instruction\[0\]: expected"),
        ("a.jsonl", b'{"prompt": "x", "chosen": "y", "rejected": 3}\n{"prompt": 3, "completion": "y"}', r":2 prompt: "),
        (
            "a.jsonl",
            b'{"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}',
            r"a\.jsonl:1 messages\[0\] reasoning_content: not read; write it into the content, as text",
        ),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"conversations": [{"from": "human", "value": "x"}], "tools": "[{}]"}',
            r"a\.jsonl:2 tools: not read; write the tools into a system turn",
        ),
        (
            "a.json",
            b'[{"messages": [{"role": "system", "content": "x"}], "system": "y"}]',
            r"a\.json\[0\] system: the chat begins with another system turn; leave one of them out",
        ),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "system": 3}', r"a\.jsonl:1 system: expected text, got int"),
        (
            "a.jsonl",
            b'{"instruction": "x", "output": "y", "history": "z"}',
            r":1 history: expected a list of \[question",
        ),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "history": [["z"]]}', r":1 history: expected a list of \[qu"),
        ("a.jsonl", b'{"instruction": "x", "output": "y", "history": [["z", 3]]}', r":1 history: .*, both text$"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\\ud800"}', r"a\.jsonl:2 text: holds half of a surrogate pair"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz:1: cannot be read: Not a gzipped file"),
        ("a.txt", b"one\n\xff\xfe\xfa", r"a\.txt:2: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}', mtime=0)[:-9], r"a\.jsonl\.gz:1: cannot be read: Compressed"),
        ("a.parquet", b"PAR1", r"a\.parquet: not a parquet file"),
        ("a.parquet.gz", b"PAR1", r"a\.parquet\.gz: not a parquet file: Not a gzipped file"),
    ],
)
def test_unreadable_text_is_one_error_that_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_documents(tmp_path / name)


@pytest.mark.parametrize(("name", "content"), [(".txt", b"Eins."), ("a.TXT.GZ", gzip.compress(b"Eins.", mtime=0))])
def test_odd_names_are_read(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read_documents(tmp_path / name) == ["Eins."]


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.txt: no such file$"):
        read_documents(tmp_path / "nothing.txt")


@pytest.mark.parametrize("name", ["pipe.txt", "pipe"])
def test_a_pipe_is_called_one_and_not_waited_for(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name} is a pipe; texts are read more than once, so write them to a file"):
        read_documents(tmp_path / name)
