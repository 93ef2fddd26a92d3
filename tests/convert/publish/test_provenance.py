"""conversion.json says where a student comes from, without a folder of this machine."""

import json
import shlex

import pytest

import cli
from convert import convert
from convert.command import defaults_of
from convert.publish.licences import card_head
from convert.publish.provenance import command_line, list_of


def test_the_command_shows_what_differs_from_the_defaults_and_parses_back():
    defaults = defaults_of(convert)
    texts = ["/home/me/a b.txt", "self"]
    given = {**defaults, "source": "x", "output": "y", "hybrid": "swa:64", "calibrate": texts, "conv": 3}
    line = command_line("owner/name", "abc", given, defaults)
    for part in (
        "deltanet-convert owner/name --revision abc",
        "--hybrid swa:64",
        "--conv 3",
        "'a b.txt' self",
        "-o OUT",
    ):
        assert part in line
    parsed = vars(cli.convert_parser().parse_intermixed_args(shlex.split(line)[1:]))
    different = {key for key, value in defaults.items() if key in parsed and list_of(parsed[key]) != list_of(value)}
    assert different == {"hybrid", "conv", "calibrate", "revision"}
    assert (parsed["hybrid"], parsed["conv"], parsed["calibrate"]) == ("swa:64", 3, ["a b.txt", "self"])
    plain = defaults | {"source": "demo", "output": "o"}
    assert command_line("demo", None, plain, defaults) == "deltanet-convert demo -o OUT"


def test_what_is_published_names_no_folder_of_this_machine(student, made):
    for path in student.rglob("*"):
        if path.suffix != ".safetensors" and path.is_file():
            text = path.read_text()
            assert str(made[0].parent) not in text, path
    record = json.loads((student / "conversion.json").read_text())
    assert (record["source"], record["output"], record["base_model"]) == ("source", "student", None)


def test_a_folder_of_the_hubs_cache_gives_its_repository(source, tmp_path):
    home = tmp_path / "models--owner--some-name" / "snapshots" / ("a" * 40)
    home.parent.mkdir(parents=True)
    source.rename(home)
    convert(home, tmp_path / "s", calibrate=["none"])
    assert json.loads((tmp_path / "s" / "conversion.json").read_text())["base_model"] == "owner/some-name"


@pytest.mark.parametrize(
    ("head", "language"),
    [("language: no", "no"), ("language: [en, no]", ["en", "no"]), ("language: {a: b}", None), ("license: mit", None)],
)
def test_the_languages_of_the_source_go_on(head, language, source, tmp_path):
    (source / "README.md").write_text(f"---\n{head}\n---\n")
    convert(source, tmp_path / "s", calibrate=["none"])
    assert card_head(tmp_path / "s").get("language") == language
