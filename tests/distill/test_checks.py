"""What would stop a run at a later stage, or at its end, stops it before it makes anything, and stops its plan."""

import re
import shutil

import pytest
import small_run
import torch

from deltanet import DeltaNetConfig
from deltanet_errors import UserError
from distill.checks import check_recipe, check_student, check_teacher
from distill.dry_run import describe
from distill.recipe import load_recipe
from distill.run import carry_out, distil

FAULTS = [
    (["stages.distil.trainable=layers"], "stages.distil.trainable: 'layers' names no parameter"),
    (["stages.distil.lr_groups={mixer: 1}"], "stages.distil.lr_groups: 'mixer' names no .* (did you mean 'mixers'?)"),
    (["stages.distil.lora={targets: qproj}"], "stages.distil.lora.targets: 'qproj' is no matrix of a layer (did you"),
    (
        ["stages.distil.lora={}", "stages.distil.lr_groups={'*.q_proj.weight': 1}"],
        "stages.distil.lr_groups: '*.q_proj.weight' names no parameter that the stage trains",
    ),
    (["stages.align.trainable=attention"], "stages.align.trainable: an align stage cannot train model.layers.1"),
    (["student.convert.hybrid=every:0"], "student.convert.hybrid every:0: '0' is not a whole number from 1 to 2"),
    (["stages.1={kind: convert_step, hybrid: al}"], "stages.convert_step.hybrid al: unknown layout"),
    (["evaluation.contexts=[99999]"], "evaluation.contexts 99999: allowed is 64 to 2048"),
    (["data.seq_len=2049"], "data.seq_len 2049: allowed is 2 to 2048, the range of the teacher .*teacher"),
    (["stages.align.seq_len=9999"], "stages.align.seq_len 9999: allowed is 2 to 2048, the range of the teacher"),
    (
        ["data.sources=[{from_teacher: 99, kind: chat}]"],
        "source teacher: kind chat needs a chat template, and the tokenizer of the teacher .*/teacher has none",
    ),
    (["data.sources.0={path: absent.json, kind: chat, name: talk}"], "source talk: absent.json: no such file"),
    (["data.sources.0={path: '{recipes}/demo/config.json', kind: chat}"], "source config: kind chat needs a chat"),
    (["evaluation.sources.0.kind=chat"], "source held: kind chat needs a chat template"),
    (
        ["evaluation.sources.0.path={recipes}/demo/../demo/text.t*"],
        "evaluation.sources: source held: .*text.txt is the very text that the stages train on, as source text; give",
    ),
    (["evaluation.tasks=mqrr"], "evaluation.tasks mqrr: no such task (did you mean 'mqar'?)"),
    (["data.sources.0.path=absent.txt"], "source absent: absent.txt: no such file"),
    (["logging.trackio=true"], "logging.trackio: true, but trackio is not installed"),
    (["export.push=nonsense"], "export.push: nonsense: not a repository"),
    (["deepspeed.extra={zero_optimization: {nope: 1}}"], "deepspeed.extra: DeepSpeed refuses it: "),
    (["deepspeed.extra={zero_optimization: 5}"], "deepspeed.extra: DeepSpeed refuses it: TypeError"),
    (
        ["deepspeed.extra={wall_clock_breakdwn: true}"],
        "deepspeed.extra.wall_clock_breakdwn: DeepSpeed reads no such key, so it would do nothing (did you mean 'wall_"
        "clock_breakdown'?)",
    ),
    (
        ["stages=[{kind: distil, steps: 1}]", "teacher.cache.folder={recipes}/demo/text.txt"],
        "teacher.cache.folder .*/demo/text.txt: .*/demo/text.txt is a file, not a folder",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), FAULTS, ids=[fault[1].split(" ")[0] for fault in FAULTS])
def test_a_fault_of_a_later_stage_or_of_the_end_stops_the_run_and_its_plan_at_once(tmp_path, overrides, message):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    pattern = re.escape(message).replace(r"\.\*", ".*")
    with pytest.raises(UserError, match=pattern) as caught:
        distil(recipe, overrides, output=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match=pattern):
        describe(load_recipe(recipe, overrides), tmp_path / "cache")


@pytest.mark.parametrize("is_copy", [False, True])
@pytest.mark.parametrize("by", ["the stages train on, as source held", "student.convert.calibrate fits on"])
def test_text_to_be_measured_on_is_neither_trained_nor_calibrated_on_under_any_name(tmp_path, is_copy, by):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    held = tmp_path / "r-held.txt"
    used = shutil.copy(held, tmp_path / "copy.txt") if is_copy else held
    key = "data.sources.0={name: held, path: '%s'}" if "source" in by else "student.convert.calibrate=['%s']"
    with pytest.raises(UserError, match=f"held.txt is the very text that {by}; give it text of its own"):
        distil(recipe, [key % used], output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "extra",
    [
        "{wall_clock_breakdown: false, steps_per_print: 10, prescale_gradients: false, communication_data_type: fp32}",
        "{activation_checkpointing: {profile: false}, flops_profiler: {enabled: false}, aio: {queue_depth: 8}}",
        "{comms_logger: {enabled: false}, tensorboard: {enabled: false}, zero_optimization: {overlap_comm: true}}",
        "{data_types: {grad_accum_dtype: fp32}, compile: {deepcompile: false}, torch_autocast: {enabled: false}}",
    ],
)
def test_what_deepspeed_reads_may_be_among_its_extra_keys(extra, tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", tmp_path / "teacher")
    check_recipe(load_recipe(recipe, [f"deepspeed.extra={extra}"]))


def test_a_stage_without_the_teacher_may_go_beyond_its_range(tmp_path):
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"))
    longer = ["stages.distil.seq_len=2049", "stages.distil.losses=[{name: ce}]"]
    assert "2,049" in describe(load_recipe(recipe, longer), tmp_path / "cache")


def test_a_teacher_without_a_tokenizer_is_named_before_it_is_converted(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    for file in teacher.glob("tokenizer*"):
        file.unlink()
    recipe = load_recipe(small_run.write_recipe(tmp_path / "r.yaml", teacher))
    for stop in (lambda: carry_out(recipe, tmp_path / "run", "auto"), lambda: describe(recipe, tmp_path / "cache")):
        with pytest.raises(UserError, match=r"teacher\.model: .*/teacher has no tokenizer, so no text can be read"):
            stop()
    assert not (tmp_path / "run").exists()


STRETCHED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


def test_a_sequence_may_be_as_long_as_the_teachers_rotary_embedding_reaches(tmp_path):
    config = DeltaNetConfig(max_position_embeddings=64, rope_parameters=STRETCHED)
    recipe = small_run.write_recipe(tmp_path / "r.yaml", tmp_path / "teacher")
    check_teacher(load_recipe(recipe, ["data.seq_len=128"]), config, object())
    with pytest.raises(UserError, match=r"data.seq_len 129: allowed is 2 to 128, "):
        check_teacher(load_recipe(recipe, ["data.seq_len=129"]), config, object())


def test_a_context_may_be_as_long_as_the_students_rotary_embedding_reaches(tmp_path):
    config = DeltaNetConfig(max_position_embeddings=64, rope_parameters=STRETCHED)
    recipe = small_run.write_recipe(tmp_path / "r.yaml", tmp_path / "teacher")
    check_student(load_recipe(recipe, ["evaluation.contexts=[128]"]), config, torch.device("cpu"))
    with pytest.raises(UserError, match=r"evaluation.contexts 129: allowed is 64 to 128, "):
        check_student(load_recipe(recipe, ["evaluation.contexts=[129]"]), config, torch.device("cpu"))
