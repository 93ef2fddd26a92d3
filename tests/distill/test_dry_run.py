"""The plan of a run, printed and not carried out."""

import types

import small_run

from distill.command import run
from distill.dry_run import describe
from distill.recipe import load_recipe, parse_recipe


def test_the_plan_counts_what_the_run_will_do(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    text = describe(load_recipe(recipe), tmp_path / "cache")
    assert "1 of 2 layers linear" in text
    stage = next(line for line in text.splitlines() if line.startswith("align"))
    assert stage.split()[:6] == ["align", "align", "6", "4", "x", "32"]
    assert "768" in stage  # 6 steps of 4 sequences of 32 tokens
    assert "0" in next(line for line in text.splitlines() if line.endswith("<- this recipe"))


def test_the_commands_print_and_leave_nothing_behind(tmp_path, capsys):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    before = sorted(tmp_path.rglob("*"))
    arguments = types.SimpleNamespace(recipe=recipe, overrides=["stages.align.steps=9"], output=None, resume="auto")
    run(types.SimpleNamespace(**vars(arguments), print_config=True, dry_run=False))
    printed = capsys.readouterr().out
    assert parse_recipe(printed, "printed").stages[0].steps == 9
    run(types.SimpleNamespace(**vars(arguments), print_config=False, dry_run=True))
    assert "align" in capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
