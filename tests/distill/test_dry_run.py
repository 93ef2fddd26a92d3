"""The plan of a run, printed and not carried out."""

import json
import types

import pytest
import small_run

from deltanet_errors import UserError
from distill.command import run
from distill.dry_run import describe
from distill.recipe import load_recipe, parse_recipe
from distill.run import distil


def test_the_plan_counts_what_the_run_will_do(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    text = describe(load_recipe(recipe), tmp_path / "cache")
    assert "1 of 2 layers linear" in text
    stage = next(line for line in text.splitlines() if line.startswith("align"))
    assert stage.split()[:6] == ["align", "align", "6", "4", "x", "32"]
    assert "768" in stage  # 6 steps of 4 sequences of 32 tokens
    assert "0" in next(line for line in text.splitlines() if line.endswith("<- this recipe"))


def test_it_says_how_often_every_source_is_read(tmp_path):
    (tmp_path / "small.txt").write_text("once " * 700)
    (tmp_path / "large.txt").write_text("upon a time " * 7000)
    sources = [
        {"name": "small", "path": str(tmp_path / "small.txt"), "weight": 3},
        {"name": "large", "path": str(tmp_path / "large.txt"), "weight": 1},
    ]
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, data__sources=sources)
    lines = [line.split() for line in describe(load_recipe(recipe), tmp_path / "cache").splitlines()]
    begun = [
        next(line for line in lines if line[:1] == [name]) for name in ("small", "large")
    ]  # of the table of sources
    small, large = (int(line[4].replace(",", "")) for line in begun)
    stage = lines.index(next(line for line in lines if line[:1] == ["align"]))
    assert lines[stage + 1] == ["small", "75.0%", "of", "it", f"{24 * 0.75 / small:.2f}"]
    assert lines[stage + 2] == ["large", "25.0%", "of", "it", f"{24 * 0.25 / large:.2f}"]


def test_a_source_that_stages_read_in_ways_of_their_own_has_a_line_for_each(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    small_run.teach_chats(teacher)
    turns = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon a time there was a dog. " * 8}]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(40)))
    stages = [{"kind": "distil", "steps": 1, "seq_len": 32}, {"kind": "long", "steps": 1, "seq_len": 128}]
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml",
        teacher,
        data={"sources": [{"name": "chats", "path": str(tmp_path / "chats.jsonl"), "kind": "chat"}]},
        stages=stages,
    )
    lines = describe(load_recipe(recipe), tmp_path / "cache").splitlines()
    short, long = (line for line in lines if line.startswith("chats "))
    assert short.endswith("answers cut: 40  in distil")
    assert long.endswith("in long")
    assert "cut" not in long
    assert int(short.split()[3].replace(",", "")) > 0 == int(long.split()[3])


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


def dry_run(recipe, *overrides, output=None, resume="auto"):
    arguments = {"recipe": recipe, "overrides": list(overrides), "output": output, "resume": resume}
    run(types.SimpleNamespace(**arguments, print_config=False, dry_run=True))


def content(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_it_says_where_the_run_would_go_on_and_refuses_what_the_run_would(tmp_path, capsys):
    stages = [{"kind": "align", "steps": 2}, {"kind": "distil", "steps": 5}]
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"), stages=stages, training__keep_commits=9
    )
    folder = tmp_path / "run"
    dry_run(recipe, output=folder)
    assert capsys.readouterr().out.startswith(f"run      {folder}: begins with the first step\n")
    assert not folder.exists()

    distil(recipe, output=folder)
    capsys.readouterr()
    before = content(folder)
    commits = folder / "commits"
    for resume, words in [
        ("auto", f"goes on from {commits / 'step-00000007'}, where distil has done 5 steps"),
        (str(commits / "step-00000004"), f"goes on from {commits / 'step-00000004'}, where distil has done 2 steps"),
    ]:
        dry_run(recipe, output=folder, resume=resume)
        assert capsys.readouterr().out.startswith(f"run      {folder}: {words}\n")
    for overrides, resume, words in [
        ([], "never", "--resume never: .* holds the commit step-00000007"),
        ([], str(tmp_path / "nowhere"), "no such commit; say auto, never or a folder in"),
        ([], str(tmp_path), f"no commit .no manifest.json.; say auto, never or a folder in {commits}"),
        (["stages.distil.lr=0.5"], "auto", r"started with another recipe: stages\.1\.lr: .* -> 0\.5"),
    ]:
        with pytest.raises(UserError, match=words):
            dry_run(recipe, *overrides, output=folder, resume=resume)
    assert content(folder) == before  # not even the commits past the one that was named have gone

    with pytest.raises(UserError, match=r"student\.convert\.calibrate: absent.txt: no such file"):
        dry_run(recipe, "student.convert.calibrate=absent.txt", output=tmp_path / "new")
    with pytest.raises(UserError, match=r"-o .*r\.yaml is a file, not a folder"):
        dry_run(recipe, output=recipe)

    victim = next((commits / "step-00000007").rglob("*.safetensors"))
    victim.write_bytes(victim.read_bytes()[:-1])
    dry_run(recipe, output=folder)
    told = capsys.readouterr()
    assert f"{victim.name}: has " in told.err
    assert "step-00000006, where distil has done 4 steps" in told.out


def test_what_would_stop_the_run_later_stops_the_plan(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    for overrides, words in [
        (["evaluation.sources=[]", "data.held_out=0"], "nothing is held out"),
        (["evaluation.tasks=[nothing]"], "nothing"),
        ([f"student.model={tmp_path}"], "student.model: .* is there and no checkpoint"),
        (["student.convert=null", f"student.model={tmp_path / 'nowhere'}"], "is not a checkpoint folder"),
    ]:
        with pytest.raises(UserError, match=words):
            describe(load_recipe(recipe, overrides), tmp_path / "cache")


def counted(text):
    """The bytes of this recipe on one process."""
    line = next(line for line in text.splitlines() if line.endswith("<- this recipe"))
    number, unit = line.split()[1:3]
    return float(number.replace(",", "")) * {"MB": 1e6, "GB": 1e9}[unit]


def test_memory_grows_with_the_micro_batch_and_falls_with_checkpointing_and_compilation(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")

    def memory(**training):
        training = {"batch_size": 512, "dtype": "float32", "commit_every_steps": 2} | training
        return counted(
            describe(
                load_recipe(small_run.write_recipe(tmp_path / "r.yaml", teacher, training=training)), tmp_path / "c"
            )
        )

    # A token of a layer: 8 x 32 of the stream, 8 x 32 of the heads, 4 x 48 of the MLP, in float32; 2 layers, 32 tokens.
    sequence, logits = 4 * 2 * 32 * (8 * 32 + 8 * 32 + 4 * 48), 32 * 1024 * 20
    one, all_512 = memory(micro_batch_size=1), memory(micro_batch_size=512)
    assert all_512 - one == pytest.approx(511 * (sequence + logits), rel=1e-3)
    assert all_512 - memory(micro_batch_size=512, compile=True) == pytest.approx(512 * sequence / 4, rel=1e-3)
    checkpointed = memory(micro_batch_size=512, activation_checkpointing=True)
    assert all_512 - checkpointed == pytest.approx(512 * (sequence / 2 - 4 * 2 * 32 * 32), rel=1e-3)
