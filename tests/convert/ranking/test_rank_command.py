"""`deltanet-convert TEACHER --rank METHOD -o ranking.json`. Twin of convert/ranking/command.py."""

import json
import shutil

import pytest
from tiny import make_teacher

import cli
from convert.sources import open_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny random teacher with the embedded teacher's tokenizer, and its text beside it."""
    folder = tmp_path_factory.mktemp("source") / "teacher"
    make_teacher(folder, vocab_size=1024, num_hidden_layers=3, attention_bias=False)
    with open_source("demo") as demo:
        for path in demo.folder.glob("tokenizer*"):
            shutil.copy(path, folder)
        shutil.copy(demo.folder / "text.txt", folder.parent)
    return folder


def run(*arguments) -> int:
    return cli.convert_main([str(argument) for argument in arguments])


def with_text(source) -> tuple:
    return (source, "--calibrate", source.parent / "text.txt")


@pytest.mark.parametrize("method", ["linearity", "swap", "distilled:1"])
def test_a_ranking_is_written_and_hybrid_reads_it(method, source, tmp_path, capsys):
    out = tmp_path / "deep" / "ranking.json"
    assert run(*with_text(source), "--rank", method, "-o", out) == 0
    assert f"--hybrid {out}:COUNT" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["method"] == method
    assert sorted(found["ranking"]) == [0, 1, 2]
    assert [path.name for path in out.parent.iterdir()] == ["ranking.json"]
    arguments = ("--calibrate", "none", "--json", "-o", tmp_path / "student")
    assert run(source, "--hybrid", f"{out}:1", *arguments) == 0
    layout = json.loads(capsys.readouterr().out)["layout"]
    assert [index for index, kind in enumerate(layout) if kind != "linear_attention"] == found["ranking"][:1]


def test_the_next_command_has_the_mixer_that_was_planned_and_the_text(source, tmp_path, capsys):
    options = "--mixer delta --local-window 16 --feature-map linear"
    assert run(*with_text(source), "--rank", "linearity", *options.split(), "-o", tmp_path / "ranking.json") == 0
    assert (
        "ranking.json:COUNT --mixer delta --feature-map linear --local-window 16 --calibrate "
        in capsys.readouterr().out
    )


def test_json_prints_what_is_written(source, tmp_path, capsys):
    assert run(*with_text(source), "--rank", "linearity", "-o", tmp_path / "ranking.json", "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "ranking.json").read_text())


def test_a_ranking_of_another_depth_is_refused(source, tmp_path, capsys):
    out = tmp_path / "ranking.json"
    out.write_text(json.dumps({"ranking": [0, 1], "num_layers": 2}))
    assert run(source, "--hybrid", f"{out}:1", "--dry-run", "-o", tmp_path / "student") == 2
    assert "ranks 2 layers, but this teacher has 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--rank", "sawp", "-o", "OUT/r.json"], "did you mean 'swap'"),
        (["--rank", "swap"], "-o RANKING.json: missing"),
        (["--rank", "swap", "-o", "OUT/ranking"], "a ranking is a .json file"),
        (["--rank", "swap", "-o", "OUT/there.json"], "exists already"),
        (["--rank", "swap", "-o", "OUT/there.json", "--overwrite"], "a ranking only"),
        (["--rank", "swap", "-o", "OUT/r.json", "--hybrid", "none"], "--hybrid"),
        (["--rank", "swap", "-o", "OUT/r.json", "--dry-run"], "--dry-run"),
        (["--rank", "swap", "-o", "OUT/r.json", "--calibrate", "none"], "needs text"),
        (["--rank", "swap", "-o", "OUT/r.json", "--calibrate", "OUT/short.txt"], "short.txt"),
        (["--rank", "swap", "-o", "OUT/r.json", "--gate", "reed"], "--gate"),
        (["--rank", "swap", "-o", "OUT/there.json/r.json"], "not a folder"),
        (["--rank", "swap", "--verify"], "--rank swap"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(arguments, says, source, tmp_path, capsys):
    (tmp_path / "there.json").write_text('{"mine": 1}')
    (tmp_path / "short.txt").write_text("a few words")
    arguments = [argument.replace("OUT", str(tmp_path)) for argument in arguments]
    assert run(source, *arguments) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("deltanet-convert: ")]
    assert says in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["short.txt", "there.json"]
    assert (tmp_path / "there.json").read_text() == '{"mine": 1}'


def test_a_ranking_is_replaced_on_request(source, tmp_path):
    out = tmp_path / "ranking.json"
    assert run(*with_text(source), "--rank", "linearity", "-o", out) == 0
    first = json.loads(out.read_text())
    assert run(*with_text(source), "--rank", "linearity", "-o", out) == 2
    assert run(*with_text(source), "--rank", "linearity", "-o", out, "--overwrite") == 0
    again = json.loads(out.read_text())
    assert again | {"seconds": 0} == first | {"seconds": 0}
