"""Hostile checkpoints and recipes: refused in one line, nothing executed, memory and time bounded, nothing leaked.

Each test is a line of docs/results/security.md. Code that runs would leave a file; `untouched` looks for it. Refusals
happen in a child process that may use MEMORY bytes more than it has and SECONDS seconds.
"""

import contextlib
import json
import os
import pickle
import resource
import signal
import struct
import traceback
from pathlib import Path

import pytest
import torch
from published import files_of
from safetensors.torch import load_file, save_file

import cli
from convert import convert
from convert.checkpoint import INDEX, open_checkpoint, read_header
from convert.command import load_tokenizer
from convert.families import teacher_config
from convert.plan import make_plan
from convert.publish.manifest import MANIFEST, as_manifest, damage, seal
from convert.publish.verify import verify
from convert.sources import open_source
from deltanet_errors import UserError
from distill.recipe import load_recipe

MEMORY, SECONDS = 512 << 20, 20
CODE = "import pathlib; pathlib.Path({!r}).write_text('executed')\n"


def vm_size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def refused(call) -> str:
    """The message of the UserError that `call` raises in a bounded child process."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        outcome = "nothing was raised"
        try:
            resource.setrlimit(resource.RLIMIT_AS, (vm_size() + MEMORY, resource.RLIM_INFINITY))
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(SECONDS)
            call()
        except UserError as error:
            outcome = f"refused: {error}"
        except BaseException:
            outcome = traceback.format_exc()
        os.write(writing, outcome.encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        outcome = pipe.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    assert status == 0, f"ended by signal {status}"
    assert outcome.startswith("refused: "), outcome
    return outcome


@pytest.fixture
def untouched(tmp_path):
    """The file that hostile code would write; gone is good."""
    path = tmp_path / "executed"
    yield path
    assert not path.exists(), "code of the checkpoint was executed"


@pytest.fixture
def out(tmp_path):
    path = tmp_path / "out"
    yield path
    assert not path.exists()
    assert not list(tmp_path.glob(".out*")), "something half-written remains"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.write_text, (self.path, "executed"))


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def header_file(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def tensor(shape, offsets, dtype="F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


# Names and links


@pytest.mark.parametrize(
    "shard", ["../other/model.safetensors", "/etc/passwd", "a/../../x.safetensors", "..", "", "a/b"]
)
def test_an_index_that_names_files_elsewhere(source, out, shard):
    save_file(load_file(source / "model.safetensors"), source.parent / "model.safetensors")
    names = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    (source / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    said = refused(lambda: convert(source, out, calibrate=["none"]))
    assert "not a file name" in said or "missing" in said


@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "config.json", "model.safetensors", "NOTICE.txt"])
def test_a_link_to_a_private_file_is_not_read_into_a_student(source, out, name):
    secret = source.parent / "secret"
    secret.write_bytes((source / name).read_bytes() if (source / name).exists() else b"private")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(secret)
    assert "a link to" in refused(lambda: convert(source, out, calibrate=["none"]))


def test_a_folder_that_only_looks_like_the_hubs_cache_gives_no_licence_to_leave_it(source, out):
    home = source.parent / "models--x--y" / "snapshots" / "rev"
    home.parent.mkdir(parents=True)
    source.rename(home)
    (home.parent.parent.parent / "private").write_text("private")
    (home / "LICENSE").symlink_to("../../../private")
    assert "a link to" in refused(lambda: convert(home, out, calibrate=["none"]))


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../x", "./config.json", "a\\..\\b"])
def test_a_manifest_that_names_files_elsewhere_is_not_followed(student, name):
    (student / MANIFEST).write_text(as_manifest({name: (1, "0" * 64)}))
    assert damage(student) == [f"{MANIFEST}: {name!r} is not a name within the folder"]


@pytest.mark.parametrize("kind", ["fifo", "folder", "endless"])
def test_what_is_no_plain_file_is_not_waited_for(source, out, kind):
    for name in ("model.safetensors", "config.json"):
        (source / name).unlink()
        if kind == "fifo":
            os.mkfifo(source / name)
        elif kind == "folder":
            (source / name).mkdir()
        else:
            (source / name).symlink_to("/dev/zero")
        refused(lambda: convert(source, out, calibrate=["none"]))


# Headers of safetensors

ONE, NONE = (json.dumps(tensor(*span)).encode() for span in (([1], [0, 4]), ([0], [4, 4])))
HEADERS = {
    "length beyond the file": (b"{}", 1 << 62),
    "length beyond safetensors' own": (b"{}", 100_000_001),
    "no JSON": (b"\x80\x04\x95pickle", None),
    "deeply nested": (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", None),
    "shape overflows": ({"a": tensor([1 << 62, 1 << 62], [0, 4])}, None),
    "shape of a million dimensions": ({"a": tensor([1] * 1_000_000, [0, 4])}, None),
    "shape of huge numbers": ({"a": tensor([10**4000] * 2000, [0, 4])}, None),
    "shape negative": ({"a": tensor([-1, -1], [0, 4])}, None),
    "shape infinite": (b'{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,4]}}', None),
    "shape of NaN": (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', None),
    "shape is a text": ({"a": tensor("11", [0, 4])}, None),
    "shape is true": ({"a": tensor([True], [0, 4])}, None),
    "offsets are fractions": ({"a": tensor([1], [0.0, 4.0])}, None),
    "offsets overlap": ({"a": tensor([1], [0, 4]), "b": tensor([1], [0, 4])}, None),
    "offsets with a hole": ({"a": tensor([1], [4, 8])}, None),
    "offsets backwards": ({"a": tensor([1], [4, 0])}, None),
    "offsets beyond the file": ({"a": tensor([1 << 40], [0, 1 << 42])}, None),
    "offsets missing": ({"a": {"dtype": "F32", "shape": [1]}}, None),
    "name twice": (b'{"a":%s,"a":%s}' % (ONE, NONE), None),
    "unknown dtype": ({"a": tensor([1], [0, 4], "OBJECT")}, None),
    "dtype is a list": ({"a": tensor([1], [0, 4], ["F32"])}, None),
    "a list": (b"[]", None),
}  # fmt: skip


@pytest.mark.parametrize("kind", HEADERS)
def test_a_hostile_header(tmp_path, kind):
    text, length = HEADERS[kind]
    path = header_file(tmp_path / "model.safetensors", text, b"\0" * 8, length)
    assert str(path) in refused(lambda: read_header(path))


def test_a_header_that_is_good_passes_by_the_same_way(tmp_path):
    path = header_file(tmp_path / "model.safetensors", {"a": tensor([1], [0, 4]), "b": tensor([], [4, 8])}, b"\0" * 8)
    assert set(read_header(path)) == {"a", "b"}


# Pickles and code


def test_a_pickle_called_safetensors(source, out, untouched):
    (source / "model.safetensors").write_bytes(pickle.dumps(Payload(untouched)))
    assert "not safetensors" in refused(lambda: convert(source, out, calibrate=["none"]))


@pytest.mark.parametrize("allowed", [False, True])
def test_a_hostile_pytorch_model_bin(source, out, untouched, allowed):
    """Not read unless the user allows pickles, and then by PyTorch's weights_only reader, which refuses it."""
    (source / "model.safetensors").unlink()
    torch.save({"a": Payload(untouched)}, source / "pytorch_model.bin")
    said = refused(lambda: convert(source, out, calibrate=["none"], allow_pickle=allowed))
    assert ("unreadable with weights_only" if allowed else "pickled weights only") in said


def test_pickles_beside_good_weights_are_neither_read_nor_copied(source, tmp_path, untouched):
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pkl"):
        (source / name).write_bytes(pickle.dumps(Payload(untouched)))
    convert(source, tmp_path / "s", calibrate=["none"])
    assert not set(files_of(tmp_path / "s")) & {
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pkl",
    }


def test_a_student_whose_weights_were_exchanged_for_a_pickle(student, untouched, capsys):
    for path in student.glob("*.safetensors*"):
        path.unlink()
    torch.save({"a": Payload(untouched)}, student / "pytorch_model.bin")
    assert cli.generate_main([str(student), "hello", "--device", "cpu"]) == 2
    seal(student)
    assert "pickled weights only" in "\n".join(verify(student).problems)


def hostile_code(folder: Path, marker: Path) -> dict:
    """Code that a config may point to; importing it would leave the mark."""
    (folder / "evil.py").write_text(CODE.format(str(marker)) + "class Evil: pass\n")
    return {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil", "AutoTokenizer": ["evil.Evil", "evil.Evil"]}


def test_code_that_the_config_of_a_known_family_points_to(source, tmp_path, untouched):
    edit(source / "config.json", auto_map=hostile_code(source, untouched))
    convert(source, tmp_path / "s", calibrate=["none"])
    assert "auto_map" not in (tmp_path / "s" / "config.json").read_text()
    assert "evil.py" not in files_of(tmp_path / "s")


def test_code_that_the_config_of_an_unknown_family_points_to(source, out, untouched):
    edit(source / "config.json", auto_map=hostile_code(source, untouched), model_type="evil")
    assert "model_type 'evil' cannot be converted" in refused(lambda: convert(source, out, calibrate=["none"]))


@pytest.mark.parametrize("kind", ["Evil", None])
def test_code_that_the_tokenizer_points_to_is_neither_run_nor_asked_about(source, untouched, kind, monkeypatch):
    edit(source / "tokenizer_config.json", auto_map=hostile_code(source, untouched), tokenizer_class=kind)
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # what a user in a hurry would answer
    with contextlib.suppress(UserError):
        load_tokenizer(source)


def test_code_that_a_student_points_to_is_not_run_by_loading_generating_or_verifying(student, untouched, capsys):
    edit(student / "config.json", auto_map=hostile_code(student, untouched))
    edit(student / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    seal(student)
    assert cli.generate_main([str(student), "hello", "--max-new-tokens", "2", "--device", "cpu"]) == 0
    assert verify(student).problems == []


def test_a_chat_template_cannot_leave_its_sandbox(source, untouched):
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    (source / "chat_template.jinja").write_text(escape)
    with pytest.raises(Exception, match=r"unsafe|access to attribute"):
        load_tokenizer(source).apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system ['touch {}']", "!!python/name:os.system", "!!binary x"]
)
def test_tags_in_the_yaml_of_a_card_make_no_objects(source, tmp_path, untouched, tag):
    (source / "README.md").write_text(f"---\nlicense: {tag.format(untouched)}\n---\n")
    convert(source, tmp_path / "s", calibrate=["none"])
    assert "license:" not in (tmp_path / "s" / "README.md").read_text()


def test_yaml_that_refers_to_itself_without_end_does_not_fill_the_card(source, tmp_path):
    levels = "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" for n in range(12))
    (source / "README.md").write_text(f"---\na0: &a0 [x]\n{levels}\nlicense: mit\nlanguage: *a12\n---\n")
    convert(source, tmp_path / "s", calibrate=["none"])
    assert (tmp_path / "s" / "README.md").stat().st_size < 20_000


# Configurations

CONFIGS = {
    "layers without number": {"num_hidden_layers": 10**12},
    "negative layers": {"num_hidden_layers": -1},
    "layers as text": {"num_hidden_layers": "2"},
    "hidden size without number": {"hidden_size": 10**15},
    "vocabulary without number": {"vocab_size": 10**12},
    "heads without number": {"num_attention_heads": 10**12, "num_key_value_heads": 10**12},
    "no heads": {"num_attention_heads": 0},
    "head size without number": {"head_dim": 10**15},
    "rotary of another kind": {"rope_scaling": {"rope_type": "evil", "factor": 2.0}},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_configuration(source, out, kind):
    edit(source / "config.json", **CONFIGS[kind])
    refused(lambda: convert(source, out, calibrate=["none"]))


@pytest.mark.parametrize("value", [[], {}, "x", -1, True, 1e300, [[]], {"a": []}], ids=str)
def test_any_key_of_a_configuration_with_any_kind_of_value_is_refused_or_read(source, value):
    """Never another error: whatever a key holds, it is a UserError or a configuration that fits the weights."""
    path = source / "config.json"
    config = json.loads(path.read_text())
    for key in config:
        path.write_text(json.dumps(config | {key: value}))
        with contextlib.suppress(UserError):
            make_plan(open_checkpoint(source), teacher_config(source))


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "", "null", "\ufeff{}", '{"model_type": []}'])
@pytest.mark.parametrize("name", ["config.json", INDEX])
def test_json_that_nests_without_end_or_is_none(source, out, name, text):
    (source / name).write_text(text, encoding="utf-8")
    refused(lambda: (teacher_config(source), open_checkpoint(source)))


def test_a_tokenizer_that_nests_without_end(source, out):
    (source / "tokenizer.json").write_text("[" * 100_000)
    assert "tokenizer" in refused(lambda: convert(source, out, calibrate=["none"]))


# Recipes


@pytest.mark.parametrize(
    "line",
    [
        "teacher: !!python/object/apply:os.system ['touch MARK']",
        "teacher: {model: !!python/name:os.system }",
        "? !!python/object/new:subprocess.Popen [[touch, MARK]]\n: 1",
        "teacher: {model: demo, _component_: os.system}",
        "stages: [{kind: distil, steps: 1, __class__: os.system}]",
        "data: {sources: [{path: x.txt, loader: evil.py}]}",
    ],
)
def test_a_recipe_cannot_run_code(tmp_path, untouched, line):
    path = tmp_path / "r.yaml"
    rest = {"teacher": "{model: demo}", "student": "{convert: {}}", "stages": "[{kind: distil, steps: 1}]"}
    text = "version: 1\n" + "".join(f"{key}: {value}\n" for key, value in rest.items() if not line.startswith(key))
    path.write_text(text + line.replace("MARK", str(untouched)) + "\n")
    refused(lambda: load_recipe(path))


def test_an_override_cannot_run_code(tmp_path, untouched):
    for override in (f"teacher.model=!!python/object/apply:os.system ['touch {untouched}']", "teacher.__class__=os"):
        refused(lambda override=override: load_recipe("quickstart.yaml", [override]))


def test_a_file_that_is_written_to_while_it_is_converted_is_not_half_believed(source, out, monkeypatch):
    """A header is read once; data that ends early is a refusal, never uninitialised memory."""
    with open_source(str(source)) as opened:
        checkpoint = open_checkpoint(opened.folder)
    entry = next(iter(checkpoint.entries.values()))
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[: entry.begin + 4])
    refused(lambda: checkpoint.load(entry.name))
