"""What would stop a run at a later stage, or at its end, stops it before it makes anything, and stops its plan."""

import re

import pytest
import small_run

from deltanet_errors import UserError
from distill.dry_run import describe
from distill.recipe import load_recipe
from distill.run import distil

FAULTS = [
    (["stages.distil.trainable=layers"], "stages.distil.trainable: 'layers' names no parameter"),
    (["stages.distil.lr_groups={mixer: 1}"], "stages.distil.lr_groups: 'mixer' names no .* (did you mean 'mixers'?)"),
    (["stages.distil.lora={targets: qproj}"], "stages.distil.lora.targets: none of qproj is a matrix"),
    (
        ["stages.distil.lora={}", "stages.distil.lr_groups={'*.q_proj.weight': 1}"],
        "stages.distil.lr_groups: '*.q_proj.weight' names no parameter that the stage trains",
    ),
    (["stages.align.trainable=attention"], "stages.align.trainable: an align stage cannot train model.layers.1"),
    (["student.convert.hybrid=every:0"], "student.convert.hybrid every:0: '0' is not a whole number from 1 to 2"),
    (["stages.1={kind: convert_step, hybrid: al}"], "stages.convert_step.hybrid al: unknown layout"),
    (["evaluation.contexts=[99999]"], "evaluation.contexts 99999: allowed is 64 to 2048"),
    (["evaluation.tasks=mqrr"], "evaluation.tasks mqrr: no such task (did you mean 'mqar'?)"),
    (["data.sources.0.path=absent.txt"], "source absent: absent.txt: no such file"),
    (["logging.trackio=true"], "logging.trackio: true, but trackio is not installed"),
    (["export.push=nonsense"], "export.push: nonsense: not a repository"),
    (["deepspeed.extra={zero_optimization: {nope: 1}}"], "deepspeed.extra: DeepSpeed refuses it: "),
    (["deepspeed.extra={zero_optimization: 5}"], "deepspeed.extra: DeepSpeed refuses it: TypeError"),
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
