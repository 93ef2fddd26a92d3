"""Reading a folder: the index wins, what it promises must be there, and damage is named before anything is written."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import make_teacher, raw_tensors

from convert import convert
from convert.checkpoint import INDEX, open_checkpoint, read_header
from deltanet_errors import UserError


@pytest.fixture
def sharded(tmp_path):
    make_teacher(tmp_path / "teacher", shard="20KB")
    assert len(list((tmp_path / "teacher").glob("model-*.safetensors"))) > 3
    return tmp_path / "teacher"


def index_of(folder):
    return json.loads((folder / INDEX).read_text())


def first_of(folder, shard_number=0):
    """(file, name) of a tensor in the shard with this number."""
    file = sorted(folder.glob("model-*.safetensors"))[shard_number]
    return file, next(iter(load_file(file)))


def write_tensors(path, tensors):
    save_file(tensors, path, metadata={"format": "pt"})


def refused(folder, *says):
    """The conversion stops with one line that says all of `says`, and leaves nothing."""
    out = folder.parent / "student"
    with pytest.raises(UserError) as error:
        convert(folder, out, calibrate=["none"])
    message = str(error.value)
    assert "\n" not in message
    for text in says:
        assert text in message
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]


def test_a_missing_shard_is_named_with_a_tensor_of_it(sharded):
    file = first_of(sharded)[0]
    file.unlink()
    refused(sharded, file.name, "missing", index_tensor(sharded, file.name))


def index_tensor(folder, shard):
    return next(name for name, where in index_of(folder)["weight_map"].items() if where == shard)


def test_a_tensor_in_another_shard_than_the_index_says_is_named(sharded):
    file, name = first_of(sharded, 0)
    other = sorted(sharded.glob("model-*.safetensors"))[1]
    index = index_of(sharded)
    index["weight_map"][name] = other.name
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, other.name, name, file.name)


def test_a_tensor_in_two_shards_is_named(sharded):
    (file, name), other = first_of(sharded, 0), sorted(sharded.glob("model-*.safetensors"))[1]
    write_tensors(other, load_file(other) | {name: load_file(file)[name]})
    refused(sharded, name, file.name, other.name)


def test_a_tensor_that_the_index_does_not_name_is_left_aside_with_a_note(sharded):
    file, _ = first_of(sharded)
    before = raw_tensors(sharded)
    write_tensors(file, load_file(file) | {"model.extra": torch.ones(3)})
    report = convert(sharded, sharded.parent / "student", hybrid="all", calibrate=["none"])
    assert any("model.extra" in note and "index wins" in note for note in report["notes"])
    assert raw_tensors(sharded.parent / "student") == before


def test_a_stray_single_file_beside_the_shards_is_left_aside_with_a_note(sharded):
    before = raw_tensors(sharded)
    wrong = {name: torch.zeros(1) for name in before}
    write_tensors(sharded / "model.safetensors", wrong)
    report = convert(sharded, sharded.parent / "student", hybrid="all", calibrate=["none"])
    assert any("model.safetensors" in note and "index wins" in note for note in report["notes"])
    assert raw_tensors(sharded.parent / "student") == before


def test_a_wrong_total_size_is_a_note(sharded):
    index = index_of(sharded)
    index["metadata"]["total_size"] += 1
    (sharded / INDEX).write_text(json.dumps(index))
    report = convert(sharded, sharded.parent / "student", hybrid="all", calibrate=["none"])
    assert any("total_size" in note for note in report["notes"])


@pytest.mark.parametrize("metadata", [None, [], "x", {"total_size": None}])
def test_an_index_without_a_total_size_will_do(sharded, metadata):
    (sharded / INDEX).write_text(json.dumps(index_of(sharded) | {"metadata": metadata}))
    assert open_checkpoint(sharded).notes == []


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", "3", '{"weight_map": ["a"]}', '{"weight_map": {}}', '{"weight_map": {"a": 1}}']
)
def test_an_unreadable_index_is_named(sharded, content):
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


def test_an_index_cannot_point_outside_its_folder(sharded):
    index = index_of(sharded)
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../other.safetensors")
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "../other.safetensors", "not a file name")


def test_a_shard_that_is_a_link_to_itself_is_named(sharded):
    file, _ = first_of(sharded)
    file.unlink()
    file.symlink_to(file)
    refused(sharded, file.name)


@pytest.mark.parametrize("name", ["", ".", "a/b", "x" * 256, "a\x00b", "a\nb", "sub/"])
def test_an_index_names_files(sharded, name):
    index = index_of(sharded)
    index["weight_map"][next(iter(index["weight_map"]))] = name
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not a file name"):
        open_checkpoint(sharded)


def test_a_pointer_of_git_lfs_is_called_so(teacher):
    (teacher / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n")
    with pytest.raises(UserError, match=r"model.safetensors: a pointer of Git LFS.*git lfs pull"):
        open_checkpoint(teacher)


def test_shards_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    refused(sharded, INDEX)


def test_truncation_at_any_length_is_noticed(teacher):
    path = teacher / "model.safetensors"
    whole = path.read_bytes()
    for length in {0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(UserError, match="bytes after its last tensor"):
        read_header(path)
    path.write_bytes(whole[:-1])
    refused(teacher, "model.safetensors", "truncated")


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}',
        b'{"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a\\u001b[31m\\n": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},'
        b' "a": {"dtype": "F32", "shape": [0], "data_offsets": [8, 8]}}',
    ],
)
def test_a_corrupt_header_is_named(tmp_path, header):
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        read_header(path)
    assert str(error.value).isprintable()


def test_headers_are_read_as_the_safetensors_library_reads_them(sharded):
    checkpoint = open_checkpoint(sharded)
    raw = raw_tensors(sharded)
    assert set(checkpoint.entries) == set(raw)
    for name, data in raw.items():
        assert checkpoint.load(name).contiguous().flatten().view(torch.uint8).numpy().tobytes() == data


def test_pickled_weights_need_permission_and_run_no_code(teacher):
    weights = load_file(teacher / "model.safetensors")
    (teacher / "model.safetensors").unlink()
    torch.save(weights, teacher / "pytorch_model.bin")
    refused(teacher, "pytorch_model.bin", "--allow-pickle")
    report = convert(teacher, teacher.parent / "student", hybrid="all", calibrate=["none"], allow_pickle=True)
    assert report["tensors"]["kept_identical"] == len(weights)
    stored = load_file(teacher.parent / "student" / "model.safetensors")
    assert all(torch.equal(stored[name], weight) for name, weight in weights.items())

    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(teacher / "attacked"),)

    torch.save({"model.norm.weight": Attack()}, teacher / "pytorch_model.bin")
    with pytest.raises(UserError, match="weights_only"):
        convert(teacher, teacher.parent / "other", calibrate=["none"], allow_pickle=True)
    assert not (teacher / "attacked").exists()


ONE = torch.ones(1)


@pytest.mark.parametrize(
    ("first", "second", "index", "message"),
    [
        ([1.0], None, None, "pytorch_model.bin: holds a list, not tensors by name"),
        ({"a": 5}, None, None, "pytorch_model.bin: a is a int, not a plain tensor"),
        ({3: ONE.to_sparse()}, None, None, "pytorch_model.bin: 3 is a Tensor, not a plain tensor"),
        ({"a": ONE}, {"a": ONE}, {}, r"a is in pytorch_model.*bin too"),
        (
            {"a": ONE},
            {"b": ONE},
            {"a": 2, "b": 1},
            r"pytorch_model-2.bin: has b, which .* says is in pytorch_model.bin",
        ),
        ({"a": ONE}, {"b": ONE, "c": ONE}, {"a": 1, "b": 2}, r"model-2.bin: has c, which .* says is in no file"),
        ({"a": ONE}, {"b": ONE}, {"a": 1, "b": 2, "ghost": 2}, r"pytorch_model-2.bin: has no ghost, though"),
    ],
)
def test_pickled_weights_that_are_not_as_they_should_be_are_named(teacher, first, second, index, message):
    (teacher / "model.safetensors").unlink()
    files = {1: "pytorch_model.bin", 2: "pytorch_model-2.bin"}
    for number, state in ((1, first), (2, second)):
        if state is not None:
            torch.save(state, teacher / files[number])
    if index:
        placed = {name: files[number] for name, number in index.items()}
        (teacher / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(UserError, match=message):
        open_checkpoint(teacher, allow_pickle=True)


def test_folders_that_are_no_checkpoints_are_refused(tmp_path, teacher):
    with pytest.raises(UserError, match="not a checkpoint"):
        open_checkpoint(tmp_path)
    (teacher / "model.safetensors").rename(teacher / "adapter_model.safetensors")
    with pytest.raises(UserError, match="adapter"):
        open_checkpoint(teacher)
