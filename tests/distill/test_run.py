"""Whole runs in one process: what the folder holds at the end, and what is refused on the way."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import small_run
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import cli
import deltanet
from deltanet_errors import DeltanetError, UserError
from distill import recipe as recipe_module
from distill import run as run_module
from distill.batch import num_targets
from distill.commit import Damaged, locked
from distill.data import whole
from distill.dry_run import describe
from distill.evaluate import mean_parts
from distill.packing import IGNORED, assemble
from distill.prepare import Prepared, held_out_sequences
from distill.recipe import load_recipe
from distill.run import distil
from distill.token_cache import Facts, Tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    recipe = small_run.write_recipe(folder / "r.yaml", small_run.write_teacher(folder / "teacher"))
    facts = distil(recipe, ["stages.1.steps=2"], output=folder / "run")
    return folder, facts


def test_the_export_loads_with_its_tokenizer_and_is_the_last_commit(made):
    folder, _ = made
    export = folder / "run" / "export"
    assert deltanet.__version__
    model = AutoModelForCausalLM.from_pretrained(export)
    tokenizer = AutoTokenizer.from_pretrained(export)
    assert model(**tokenizer("Once upon", return_tensors="pt")).logits.shape[-1] == 1024
    last = load_file(next((folder / "run" / "commits" / "step-00000008" / "student").glob("*.safetensors")))
    exported = load_file(export / "model.safetensors")
    assert exported.keys() == last.keys()
    assert all(torch.equal(exported[name], last[name]) for name in last)


def test_the_folder_says_what_was_run_on_what_and_how_it_went(made):
    folder, facts = made
    run = folder / "run"
    assert [row["model"] for row in facts["results"]] == ["teacher", "converted", "after align", "after distil"]
    assert facts["results"][2]["kl"] < facts["results"][1]["kl"]
    assert json.loads((run / "report.json").read_text()) == facts
    assert (run / "export" / "deltanet_recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    assert json.loads((run / "environment.json").read_text())["versions"]["torch"] == torch.__version__
    inputs = json.loads((run / "inputs.json").read_text())
    assert len(inputs["teacher"]["model.safetensors"]) == 64
    report = inputs["data"]["align"][0]
    assert report["tokens"] == report["packed"] + report["dropped"]


def test_align_changes_mixers_and_leaves_every_other_tensor_byte_identical(tmp_path, made):
    folder, _ = made
    recipe = small_run.write_recipe(tmp_path / "r.yaml", folder / "teacher", stages=[{"kind": "align", "steps": 2}])
    distil(recipe, output=tmp_path / "run")
    before = load_file(tmp_path / "run" / "student" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)


def test_frozen_tensors_of_a_bfloat16_teacher_stay_exact_while_mixers_train(tmp_path):
    """They are the teacher's own in memory, and bfloat16 holds them."""
    stages = [{"kind": "align", "steps": 2}, {"kind": "distil", "steps": 2, "trainable": "mixers"}]
    teacher = small_run.write_teacher(tmp_path / "teacher")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(teacher / "model.safetensors").items()}
    save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=stages, training__dtype="bfloat16")
    distil(recipe, ["deepspeed.stage=1", "export.dtype=float32"], output=tmp_path / "run")
    before = load_file(tmp_path / "run" / "student" / "model.safetensors")
    after = load_file(tmp_path / "run" / "export" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name].float(), after[name])}
    assert changed
    assert all(name.startswith("model.layers.0.self_attn.") for name in changed)


def test_a_run_goes_on_only_with_the_recipe_it_was_started_with(made):
    folder, _ = made
    with pytest.raises(UserError, match=r"another recipe: stages\.1\.lr: 0\.001 -> 0\.5"):
        distil(folder / "r.yaml", ["stages.1.steps=2", "stages.1.lr=0.5"], output=folder / "run")


def test_a_finished_run_says_the_same_again_and_takes_changes_of_free_keys(made):
    folder, facts = made
    again = distil(folder / "r.yaml", ["stages.1.steps=2", "export.dtype=bfloat16"], output=folder / "run")
    assert again["results"] == facts["results"]
    assert AutoModelForCausalLM.from_pretrained(folder / "run" / "export").dtype == torch.bfloat16


def test_figures_on_other_text_do_not_stand_beside_those_from_before(made, tmp_path, capsys):
    folder, facts = made
    shutil.copytree(folder / "run", tmp_path / "run")
    (tmp_path / "other.txt").write_text("A grey owl saw 17 boats. " * 99)
    other = f"evaluation.sources=[{{path: {tmp_path / 'other.txt'}}}]"
    half = tmp_path / "run" / "commits" / "step-00000006"
    mixed = distil(folder / "r.yaml", ["stages.1.steps=2", other], output=tmp_path / "run", resume=str(half))
    assert "evaluation is of other text than before" in capsys.readouterr().err
    straight = distil(folder / "r.yaml", ["stages.1.steps=2", other], output=tmp_path / "straight")
    assert mixed["results"] == straight["results"]
    assert mixed["results"] != facts["results"]
    again = distil(folder / "r.yaml", ["stages.1.steps=2"], output=tmp_path / "run")
    assert again["results"] == [row for row in facts["results"] if row["model"] != "after align"]


def test_resume_never_refuses_a_folder_with_a_commit(made):
    folder, _ = made
    with pytest.raises(UserError, match=r"--resume never: .* holds the commit step-00000008"):
        distil(folder / "r.yaml", ["stages.1.steps=2"], output=folder / "run", resume="never")


@pytest.mark.parametrize("text", ["{", "{}", None])
def test_damaged_records_of_the_inputs_are_refused_by_name(made, text):
    folder, _ = made
    path = folder / "run" / "inputs.json"
    before = path.read_text()
    path.unlink() if text is None else path.write_text(text)
    try:
        with pytest.raises(
            UserError, match=r"inputs\.json: cannot be read .* restore it, or give a new run an --output"
        ):
            distil(folder / "r.yaml", ["stages.1.steps=2"], output=folder / "run")
    finally:
        path.write_text(before)


def test_a_commit_of_another_recipe_is_refused(made, tmp_path):
    folder, _ = made
    commit = next((folder / "run" / "commits").iterdir())
    with pytest.raises(UserError, match=r"run: the run was started with another recipe: training\.seed: 0 -> 3"):
        distil(folder / "r.yaml", ["stages.1.steps=2", "training.seed=3"], output=tmp_path, resume=str(commit))
    for resume in ("", str(folder)):
        with pytest.raises(UserError, match=f"^--resume {resume}: no (such )?commit.*; say auto, never or a folder in"):
            distil(folder / "r.yaml", ["stages.1.steps=2"], output=folder / "run", resume=resume)


def test_what_is_refused_leaves_every_commit(made):
    folder, _ = made
    commits = sorted(path.name for path in (folder / "run" / "commits").iterdir())
    source = f"evaluation.sources=[{{path: {folder / 'r.yaml'}.txt}}]"
    (folder / "r.yaml.txt").write_text("")
    with pytest.raises(UserError, match="no text in it"):
        distil(
            folder / "r.yaml",
            ["stages.1.steps=2", source],
            output=folder / "run",
            resume=str(folder / "run" / "commits" / commits[0]),
        )
    assert sorted(path.name for path in (folder / "run" / "commits").iterdir()) == commits


def test_many_differences_are_counted(made):
    folder, _ = made
    with pytest.raises(UserError, match=r"stages\.0\.kind: 'align' -> 'pretrain'.*; and \d+ more\. Change it back"):
        distil(folder / "r.yaml", ["stages=[{kind: pretrain, steps: 1}]"], output=folder / "run")


def test_a_recipe_is_read_once(tmp_path, monkeypatch, capsys):
    parse, read = recipe_module.parse_recipe, []
    monkeypatch.setattr(recipe_module, "parse_recipe", lambda *args: read.append(args[1]) or parse(*args))

    def stop():
        raise DeltanetError("far enough")

    monkeypatch.setattr(run_module, "start_world", stop)
    recipe = small_run.write_recipe(tmp_path / "r.yaml", tmp_path / "teacher")
    assert cli.distill_main([str(recipe), "-o", str(tmp_path / "run")]) == 1
    assert "far enough" in capsys.readouterr().err
    assert read == [str(recipe)]


def test_a_second_process_is_refused(made):
    folder, _ = made
    with locked(folder / "run"), pytest.raises(UserError, match="another process works on this run"):
        distil(folder / "r.yaml", ["stages.1.steps=2"], output=folder / "run")


def test_a_student_that_says_nothing_finite_is_not_exported(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    diverging = [
        {"kind": "align", "steps": 3, "lr": 1e20, "schedule": "constant", "clip": 0},
        {"kind": "distil", "steps": 2},
    ]
    with pytest.raises(DeltanetError, match="after align: what the model says of held-out text is not finite"):
        distil(recipe, [f"stages={json.dumps(diverging)}"], output=tmp_path / "run")
    assert not (tmp_path / "run" / "export").exists()
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_commit_of_another_run_goes_on_with_the_text_it_was_trained_on_alone(tmp_path):
    (tmp_path / "t.txt").write_text((small_run.DEMO / "text.txt").read_text())
    source = {"name": "t", "path": str(tmp_path / "t.txt")}
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, data__sources=[source])
    distil(recipe, output=tmp_path / "first")
    commit = sorted((tmp_path / "first" / "commits").iterdir())[0]
    distil(recipe, output=tmp_path / "same", resume=str(commit))
    (tmp_path / "t.txt").write_text("Another text. " * 400)
    with pytest.raises(UserError, match=r"first: sources t is not what the run was started with"):
        distil(recipe, output=tmp_path / "other", resume=str(commit))


def test_a_student_that_was_lost_is_made_again(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    distil(recipe, output=tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "student")
    distil(recipe, output=tmp_path / "run")
    assert (tmp_path / "run" / "student" / "config.json").is_file()


def test_the_tokens_told_are_those_of_the_steps_also_of_a_run_that_went_on(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    small_run.teach_chats(teacher)
    turns = [{"role": "user", "content": "Once"}, {"role": "assistant", "content": "upon a time"}]
    (tmp_path / "c.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 40)  # packed with padding
    source = {"name": "c", "path": str(tmp_path / "c.jsonl"), "kind": "chat"}
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, data__sources=[source])
    told = distil(recipe, output=tmp_path / "run")["tokens"]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 12
    assert told == sum(json.loads(line)["tokens"] for line in lines) < 12 * 4 * 32
    for commit in sorted((tmp_path / "run" / "commits").iterdir())[-1:]:
        shutil.rmtree(commit)
    assert distil(recipe, output=tmp_path / "run")["tokens"] == told


def test_a_changed_teacher_is_refused(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=[{"kind": "align", "steps": 1}])
    distil(recipe, output=tmp_path / "run")
    (teacher / "config.json").write_text((teacher / "config.json").read_text() + "\n")
    with pytest.raises(UserError, match=r"teacher config\.json is not what the run was started with"):
        distil(recipe, output=tmp_path / "run")


def test_a_damaged_newest_commit_is_passed_over_but_refused_by_name(made, tmp_path, capsys):
    folder, facts = made
    recipe = small_run.write_recipe(tmp_path / "r.yaml", folder / "teacher")
    distil(recipe, ["stages.1.steps=2"], output=tmp_path / "run")
    newest = tmp_path / "run" / "commits" / "step-00000008"
    victim = next(newest.rglob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(Damaged, match="its sha256 is not the one"):
        distil(recipe, ["stages.1.steps=2"], output=tmp_path / "run", resume=str(newest))
    capsys.readouterr()
    again = distil(recipe, ["stages.1.steps=2"], output=tmp_path / "run")
    assert f"{victim.name}: its sha256" in capsys.readouterr().err
    assert again["results"] == facts["results"]


def test_steps_without_finite_loss_are_skipped_then_stop_the_run_with_the_weights_unchanged(tmp_path, monkeypatch):
    stages = [{"kind": "pretrain", "steps": 6}]
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"), stages=stages)
    forward, calls = run_module.Whole.forward, []

    def poisoned(self, batch, count, measure=False):
        loss, parts = forward(self, batch, count, measure)
        calls.append(measure)
        return (loss * float("nan") if not measure and calls.count(False) > 8 else loss), parts

    monkeypatch.setattr(run_module.Whole, "forward", poisoned)
    with pytest.raises(
        DeltanetError, match=r"the loss on rank 0 is not finite at step 4 \(sequences 16 to 19\); 3 steps"
    ):
        distil(recipe, output=tmp_path / "run")
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [record["applied"] for record in records] == [True, True, False, False, False]
    second, fourth = (
        load_file(next((tmp_path / "run" / "commits" / f"step-{step:08d}" / "student").glob("*.safetensors")))
        for step in (2, 4)
    )
    assert all(torch.equal(second[name], fourth[name]) for name in second)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.0.trainable=all"], "stages.align.trainable: an align stage cannot train .*; allowed: mixers"),
        (["stages.0.trainable=mixer"], "'mixer' names no parameter of the student.*did you mean 'mixers'"),
        (["student.convert=null", "student.model=absent"], "student.model: absent is not a checkpoint folder"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_name(made, tmp_path, overrides, words):
    folder, _ = made
    with pytest.raises(UserError, match=words):
        distil(folder / "r.yaml", overrides, output=tmp_path / "run")


def test_a_tokenizer_may_have_ids_above_the_number_of_its_tokens(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    tokenizer = json.loads((teacher / "tokenizer.json").read_text())
    vocabulary, merges = tokenizer["model"]["vocab"], tokenizer["model"]["merges"]
    needed = {part for merge in merges for part in (merge if isinstance(merge, list) else merge.split(" "))}
    unused = {token for token, index in vocabulary.items() if 600 <= index < 700 and token not in needed}
    tokenizer["model"]["merges"] = [m for m in merges if "".join(m).replace(" ", "") not in unused]
    tokenizer["model"]["vocab"] = {token: index for token, index in vocabulary.items() if token not in unused}
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len(AutoTokenizer.from_pretrained(teacher)) < max(vocabulary.values())
    (tmp_path / "a.txt").write_text("It went off. " * 200)
    sources = [{"path": str(tmp_path / "a.txt")}]
    data, stages = {"sources": sources, "seq_len": 32}, [{"kind": "pretrain", "steps": 1}]
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, data=data, stages=stages, evaluation={})
    assert distil(recipe, output=tmp_path / "run")["results"][-1]["perplexity"] < 1e4


def test_a_dpo_stage_runs_from_pairs_to_export_and_resumes_to_the_same_weights(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    small_run.teach_chats(teacher)
    rows = [{"prompt": f"Tell {i}", "chosen": f"a cat {i}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml",
        teacher,
        data={"sources": [{"path": str(tmp_path / "pairs.json"), "kind": "preference"}], "seq_len": 64},
        stages=[{"kind": "dpo", "steps": 4, "lr": 1e-3}],
    )
    whole = distil(recipe, ["data.held_out=0.2", "evaluation.sources=[]"], output=tmp_path / "whole")
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["dpo"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[3]["dpo"] < records[0]["dpo"]
    assert records[3]["margin"] > 0
    # Going on from the commit after step 2, with the reference that the run keeps.
    half = str(tmp_path / "whole" / "commits" / "step-00000002")
    before = load_file(tmp_path / "whole" / "export" / "model.safetensors")
    again = distil(recipe, ["data.held_out=0.2", "evaluation.sources=[]"], output=tmp_path / "whole", resume=half)
    assert again["results"] == whole["results"]
    after = load_file(tmp_path / "whole" / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_student_with_another_tokenizer_than_its_teachers_is_refused_before_anything_is_made(made, tmp_path):
    folder, _ = made
    student = tmp_path / "student"
    shutil.copytree(folder / "run" / "student", student)
    rules = json.loads((student / "tokenizer.json").read_text())
    first, second = list(rules["model"]["vocab"])[300:302]
    vocabulary = rules["model"]["vocab"]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (student / "tokenizer.json").write_text(json.dumps(rules))
    overrides = ["student.convert=null", f"student.model={student}"]
    with pytest.raises(UserError, match=r"student's tokenizer is not its teacher's: .* is 301 in the student and 300"):
        distil(folder / "r.yaml", overrides, output=tmp_path / "run")
    assert not (tmp_path / "run" / "tokens").exists()
    with pytest.raises(UserError, match="the student's tokenizer is not its teacher's"):
        describe(load_recipe(folder / "r.yaml", overrides), tmp_path / "cache")


@pytest.mark.parametrize("zero", [0, 2])
def test_bfloat16_learns_what_float32_learns(made, tmp_path, zero):
    folder, facts = made
    recipe = small_run.write_recipe(tmp_path / "r.yaml", folder / "teacher", training__dtype="bfloat16")
    low = distil(recipe, ["stages.1.steps=2", f"deepspeed.stage={zero}"], output=tmp_path / "run")
    for mine, exact in zip(low["results"][1:], facts["results"][1:]):
        assert mine["kl"] == pytest.approx(exact["kl"], rel=0.01)  # measured: 0.001
    start, end = (load_file(tmp_path / "run" / part / "model.safetensors") for part in ("student", "export"))
    assert all(end[name].dtype == start[name].dtype == torch.float32 for name in start)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_every_held_out_sequence_is_measured_once(ranks, micro_batch_size):
    sequences = [assemble([np.arange(size)], 16) for size in (3, 16, 7, 11, 2)]
    passes, found = [], 0.0

    def forward(batch, count, measure):
        passes[-1] += 1
        return 0.0, {"ce": (batch.targets != IGNORED).sum()}

    for rank in range(ranks):
        passes.append(0)
        world = SimpleNamespace(size=ranks, rank=rank, device=torch.device("cpu"), sum=lambda values: values)
        found += mean_parts(forward, num_targets, sequences, world, micro_batch_size)["ce"]
    assert found == pytest.approx(1.0)
    assert set(passes) == {-(-len(sequences) // (ranks * micro_batch_size))}


def held_out_part(sizes, answers=None):
    """Documents of these sizes; of chats the last `answers` tokens of each are targets."""
    bounds, count = np.cumsum([0, *sizes]), sum(sizes)
    marks = None
    if answers is not None:
        marks = np.concatenate([np.arange(size) >= size - answers for size in sizes])
    facts = Facts(len(sizes), count, count, len(sizes))
    return whole(Tokens("s", "text" if marks is None else "chat", "", np.arange(count) % 256, bounds, marks, facts))


@pytest.mark.parametrize(
    ("parts", "lengths", "targets"),
    [
        ([held_out_part([1]), held_out_part([400])], {16}, 400 - 25),  # one a sequence is no target
        ([held_out_part([12], 4), held_out_part([3])], {12}, 4 + 2),
        ([held_out_part([6], 2), held_out_part([15] * 2, 5)], {16}, 2 + 10),
        ([held_out_part([40], 3), held_out_part([9])], {16}, 8),  # an answer that no sequence reaches
        ([held_out_part([7])], {7}, 6),
    ],
)
def test_a_source_of_which_little_is_held_out_changes_nothing_for_the_others(parts, lengths, targets):
    recipe = load_recipe("quickstart", ["data.seq_len=16", "evaluation.sources=[]"])
    sequences = held_out_sequences(recipe, Prepared({}, parts, 0))
    assert {len(sequence.input_ids) for sequence in sequences} == lengths
    assert num_targets(sequences) == targets


@pytest.mark.parametrize("sizes", [[1], [1, 1, 1], [40]])
def test_a_figure_without_a_target_is_refused(sizes):
    parts = [held_out_part(sizes, 3 if sizes == [40] else None)]
    recipe = load_recipe("quickstart", ["data.seq_len=16", "evaluation.sources=[]"])
    with pytest.raises(UserError, match=r"nothing is held out .*; set data\.held_out higher"):
        held_out_sequences(recipe, Prepared({}, parts, 0))
