"""`deltanet-eval` on the command line."""

import json
import os

import pytest
from eval_subjects import TEXT

import cli
from distill.evaluation import evaluate, worth
from distill.evaluation.command import write_reports

OPTIONS = ["--text", str(TEXT), "--tokens", "100", "--window", "50", "--tasks", "none", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    monkeypatch.setattr(worth, "SECONDS", 0.0)


def test_three_forms_of_one_report_are_written_and_one_is_printed(folders, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    arguments = [str(folders[1]), "--against", str(folders[0]), *OPTIONS, "--contexts", "64", "-o", str(out)]
    assert cli.eval_main(arguments) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["evaluation.html", "evaluation.json", "evaluation.md"]
    assert printed.startswith((out / "evaluation.md").read_text())
    assert printed.splitlines()[-1] == f"page: {out}/evaluation.html"
    assert json.loads((out / "evaluation.json").read_text())["perplexity"].keys() == {"teacher", "student"}


def test_a_report_that_cannot_be_written_is_printed_all_the_same(folders, tmp_path, capsys):
    (tmp_path / "evaluation.html").mkdir()
    (tmp_path / "evaluation.html" / "mine").touch()
    assert cli.eval_main([str(folders[1]), *OPTIONS, "--contexts", "none", "-o", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "## In short" in printed.out
    assert f"{tmp_path}: the report cannot be written" in printed.err
    assert json.loads((tmp_path / "evaluation.unfinished.json").read_text())["perplexity"]


def test_what_was_measured_before_an_interruption_is_kept_until_the_next_report(folders, tmp_path, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    arguments = [str(folders[1]), *OPTIONS, "--contexts", "none", "-o", str(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "diagnose", stop)
        assert cli.eval_main(arguments) == 130
    unfinished = tmp_path / "evaluation.unfinished.json"
    assert f"measured so far: {unfinished}\n" in capsys.readouterr().err
    kept = json.loads(unfinished.read_text())
    assert list(kept["seconds"]) == ["language", "recall"]
    assert [path.name for path in tmp_path.iterdir()] == [unfinished.name]
    assert cli.eval_main([*arguments, "--tasks", "nowhere.jsonl"]) == 2  # refused, so nothing is measured anew
    assert json.loads(unfinished.read_text()) == kept
    assert cli.eval_main(arguments) == 0
    assert json.loads((tmp_path / "evaluation.json").read_text())["perplexity"] == kept["perplexity"]
    assert not unfinished.exists()


def test_the_last_thing_printed_is_everything_in_one_figure_each(folders, tmp_path, capsys):
    rows = [{"goal": f"do {i}", "sol1": "this", "sol2": "that", "label": i % 2} for i in range(5)]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--text", "none", "--tasks", str(tmp_path / "piqa.jsonl"), "--contexts", "none", "--device", "cpu"]
    assert cli.eval_main([str(folders[1]), *arguments]) == 0
    printed = capsys.readouterr().out
    last = printed[printed.rindex("## ") :]
    assert last.startswith("## In short")
    cells = [cell.strip() for cell in last.split("|")]
    assert cells[cells.index("piqa") + 1] in {f"{20 * right}.0%" for right in range(6)}


def test_json_is_one_object_on_standard_output(folders, capfd):
    assert cli.eval_main([str(folders[1]), *OPTIONS, "--contexts", "none", "--json"]) == 0
    captured = capfd.readouterr()
    assert json.loads(captured.out)["perplexity"].keys() == {"student"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contexts", "many"], "--contexts many: allowed are numbers of tokens, or none alone"),
        (["--contexts", "9" * 5000], "9: allowed are numbers of tokens, or none alone"),
        (["--contexts", "none", "64"], "--contexts none: allowed are"),
        (["-o", "FILE/out"], "is a file, not a folder"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(arguments, message, folders, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    arguments = [argument.replace("FILE", str(tmp_path / "file")) for argument in arguments]
    assert cli.eval_main([str(folders[1]), *OPTIONS, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_report_is_not_written_into_a_checkpoint_whose_manifest_it_would_break(folders, capsys):
    _, student = folders
    before = sorted(path.name for path in student.iterdir())
    assert cli.eval_main([str(student), "-o", str(student), "--text", "none", "--tasks", "none"]) == 2
    assert "a checkpoint whose manifest.json would no longer fit" in capsys.readouterr().err
    assert sorted(path.name for path in student.iterdir()) == before


def test_a_failed_write_leaves_the_former_report(tmp_path, monkeypatch):
    import distill.evaluation.command as command
    from deltanet_errors import UserError

    (tmp_path / "evaluation.json").write_text("old")
    monkeypatch.setattr(command, "markdown", lambda report: "new")
    monkeypatch.setattr(command, "page", lambda report: "new")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command.os, "replace", full)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        write_reports(tmp_path, {})
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    assert (tmp_path / "evaluation.json").read_text() == "old"


def test_what_a_killed_process_left_goes_with_the_next_report(tmp_path, monkeypatch):
    import distill.evaluation.command as command

    monkeypatch.setattr(command, "markdown", lambda report: "new")
    monkeypatch.setattr(command, "page", lambda report: "new")
    child = os.fork()
    if not child:
        command.os.replace = lambda *_: os._exit(9)
        try:
            write_reports(tmp_path, {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert list(tmp_path.iterdir())
    write_reports(tmp_path, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.html", "evaluation.json", "evaluation.md"]
