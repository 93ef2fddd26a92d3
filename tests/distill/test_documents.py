"""Laws of reading: every format gives the same documents, every complaint names file and line."""

import gzip
import json

import pytest

from convert.text_files import read_documents
from deltanet_errors import UserError
from distill.documents import find_files, read_source
from distill.schema import Source

TEXTS = ["one", "two\nlines", "drei ü"]


def read(path, **options):
    source = Source(name="s", path=[str(path)], **options)
    return [document for _, document in read_source(source, find_files(source))]


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_every_format_gives_the_same_documents(tmp_path):
    files = {
        "a.jsonl": lines(*({"text": text} for text in TEXTS)),
        "b.json": json.dumps([{"text": text} for text in TEXTS]),
        "c.txt": "<|end|>\n".join(TEXTS) + "<|end|>\n\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        with gzip.open(tmp_path / f"{name}.gz", "wt", encoding="utf-8") as file:
            file.write(text)
        options = {"separator": "<|end|>"} if name == "c.txt" else {}
        assert read(tmp_path / name, **options) == TEXTS
        assert read(tmp_path / f"{name}.gz", **options) == TEXTS
        assert read_documents(tmp_path / name) == read(tmp_path / name)
    assert read(tmp_path / "c.txt") == [files["c.txt"]]
    assert read(tmp_path / "a.jsonl", max_documents=2) == TEXTS[:2]
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "d.parquet")
    assert read(tmp_path / "d.parquet") == read_documents(tmp_path / "d.parquet") == TEXTS


def test_globs_are_sorted_blank_documents_skipped_and_a_byte_order_mark_dropped(tmp_path, monkeypatch):
    (tmp_path / "2.jsonl").write_text(lines({"text": "b"}, {"text": "  \n"}) + "\n")
    (tmp_path / "1.jsonl").write_bytes(b"\xef\xbb\xbf" + lines({"body": "a"}, {"body": "c"}).encode())
    assert read(tmp_path / "2.jsonl") == ["b"]
    assert read(tmp_path / "1.jsonl", field="body") == ["a", "c"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for pattern in (str(tmp_path / "*.jsonl"), "~/*.jsonl", str(tmp_path.parent / "**" / tmp_path.name / "?.jsonl")):
        assert [file.name for file in find_files(Source(name="s", path=[pattern]))] == ["1.jsonl", "2.jsonl"]


def test_places_point_at_the_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n#\nthree\n#\nfour")
    source = Source(name="s", path=[str(tmp_path / "a.txt")], separator="#\n")
    places = [place.removeprefix(str(tmp_path)) for place, _ in read_source(source, find_files(source))]
    assert places == ["/a.txt:1", "/a.txt:4", "/a.txt:6"]


def test_conversations_in_every_known_shape_are_the_same(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    shapes = [
        {"messages": turns},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"instruction": "q", "input": "", "output": "a"},
        {"prompt": "q", "completion": "a"},
        {"messages": [turns[0] | {"weight": 0}, turns[1] | {"weight": 1, "tool_calls": None}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
    ]
    (tmp_path / "a.jsonl").write_text(lines(*shapes))
    assert read(tmp_path / "a.jsonl", kind="chat") == [turns] * len(shapes)
    assert read_documents(tmp_path / "a.jsonl") == [turns] * len(shapes)
    (tmp_path / "b.jsonl").write_text(lines({"talk": turns}))
    assert read(tmp_path / "b.jsonl", kind="chat", field="talk") == [turns]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ('{"text": "a"}\n{"text": \n', {}, r"a.jsonl:2: not JSON: Expecting value"),
        ('{"text": "a"}\n{"txt": "b"}\n', {}, r"a.jsonl:2: no text or content or document among the keys txt"),
        ('{"messages": []}\n', {}, r"a.jsonl:1: no text .*`kind: chat` reads conversations"),
        ('{"text": 5}\n', {}, r"a.jsonl:1 text: expected text, got int"),
        ("[1]\n", {}, r"a.jsonl:1: expected text, got list"),
        ('{"text": "\\ud800"}\n', {}, r"a.jsonl:1 text: holds half of a surrogate pair"),
        ('{"text": "a"}\n', {"field": "body"}, r"a.jsonl:1: no body among the keys text"),
        ('{"messages": []}\n', {"kind": "chat"}, r"a.jsonl:1 messages: expected a list of messages"),
        (
            '{"messages": [{"role": "user"}]}',
            {"kind": "chat"},
            r"a.jsonl:1 messages\[0\]: expected an object with role",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "I look.", "tool_calls": [{"function": {"name": "f"}}]}]}',
            {"kind": "chat"},
            r"a.jsonl:1 messages\[0\] tool_calls: not read",
        ),
        (
            '{"messages": [{"role": "user", "content": "q", "weight": 0}, {"from": "gpt", "value": "a", "weight": 0}]}',
            {"kind": "chat"},
            r"a.jsonl:1 messages\[1\]: weight 0 is not read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a", "weight": -1}]}',
            {"kind": "chat"},
            r"a.jsonl:1 messages\[0\]: weight -1 is not read",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a", "train": false}]}',
            {"kind": "chat"},
            r"a.jsonl:1 messages\[0\]: train False is not read",
        ),
        (
            '{"weight": 0, "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}',
            {"kind": "chat"},
            r"a.jsonl:1: weight 0 is not read",
        ),
        (
            '{"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": "f()"}]}',
            {"kind": "chat"},
            r"a.jsonl:1 conversations\[1\]: turns of 'function_call' are not read",
        ),
        ('{"text": "a"}', {"kind": "chat"}, r"a.jsonl:1: no messages or .* among the keys text"),
        (
            '{"instruction": 5, "output": "a"}',
            {"kind": "chat"},
            r"a.jsonl:1 instruction\[0\]: expected an object with role",
        ),
        ('"a"', {"kind": "chat"}, r"a.jsonl:1: expected an object with messages, got str"),
        ("[" * 100_000, {}, r"a.jsonl:1: not JSON: nested too deep"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, options, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.jsonl", **options)


def test_bytes_that_are_no_text_and_broken_archives_are_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\n")
    with pytest.raises(UserError, match=r"a.txt:2: not UTF-8 \(byte 0xff\)"):
        read(tmp_path / "a.txt")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    with pytest.raises(UserError, match=r"b.jsonl:2: not UTF-8"):
        read(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines({"text": "a"}).encode())[:-9])
    with pytest.raises(UserError, match=r"c.jsonl.gz:\d: cannot be read: Compressed file ended"):
        read(tmp_path / "c.jsonl.gz")
    (tmp_path / "d.jsonl.gz").write_bytes(b"plain")
    with pytest.raises(UserError, match=r"d.jsonl.gz:1: cannot be read: Not a gzipped file"):
        read(tmp_path / "d.jsonl.gz")


def test_text_of_a_parquet_file_that_is_not_utf8_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    texts = pyarrow.array([b"fine", b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: damaged, or text that is not UTF-8, at row 0 or after: "):
        read(tmp_path / "a.parquet")


def test_missing_files_folders_and_unknown_suffixes_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text("")
    with pytest.raises(UserError, match=r"source s: .*trian.jsonl: no such file \(did you mean 'train.jsonl'\?\)"):
        read(tmp_path / "trian.jsonl")
    with pytest.raises(UserError, match="no such file"):
        read(tmp_path / "*.parquet")
    with pytest.raises(UserError, match="is a folder"):
        read(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    for name in ("gone.txt", "g*.txt"):
        with pytest.raises(UserError, match=r"source s: .*gone.txt is a link to a file that is not there"):
            read(tmp_path / name)
    (tmp_path / "a.csv").write_text("")
    with pytest.raises(UserError, match=r"source s: .*a.csv: not a text this can read; allowed: \.txt"):
        read(tmp_path / "a.csv")


def test_a_file_named_twice_is_refused(tmp_path):
    """Its end would be held out under one name and trained on under the other."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").symlink_to(tmp_path / "a.txt")
    for second in ("a.txt", "*.txt", "sub/../a.txt", "sub/b.txt"):
        with pytest.raises(UserError, match=r"source s: .* is named twice, by .*a\.txt and "):
            find_files(Source(name="s", path=[str(tmp_path / "a.txt"), str(tmp_path / second)]))


def test_the_home_of_nobody_is_no_such_file():
    with pytest.raises(UserError, match=r"source s: ~nobody-at-all/x\.txt: no such file"):
        find_files(Source(name="s", path=["~nobody-at-all/x.txt"]))
