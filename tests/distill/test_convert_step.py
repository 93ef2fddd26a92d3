"""More layers become linear on the way: what is linear keeps its bytes, layouts follow the plan, a run resumes."""

import json

import pytest
import small_run
import torch
from safetensors.torch import load_file
from small_pair import VOCABULARY, config
from small_run import DEMO
from transformers import AutoTokenizer

from convert.layouts import Layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.publish.verify import verify
from deltanet import DeltaNetConfig, DeltaNetForCausalLM, load_student
from deltanet_errors import UserError
from distill.convert_step import config_after, convert_more
from distill.dry_run import describe
from distill.recipe import load_recipe
from distill.run import distil
from distill.schema import Stage

LINEAR, FULL = "linear_attention", "full_attention"
KINDS = [LINEAR, FULL, FULL, FULL]


def step(hybrid):
    return Stage(kind="convert_step", name="more", tokens=512, hybrid=hybrid)


@pytest.fixture
def start(tmp_path):
    """(teacher, folder of a student whose first layer is linear and whose weights have been trained on)."""
    torch.manual_seed(0)
    teacher = DeltaNetForCausalLM(config([FULL] * 4)).eval().requires_grad_(False)
    for parameter in teacher.parameters():
        if parameter.ndim > 1:
            parameter.mul_(4.0)
    student = student_from_teacher(teacher, config(KINDS))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    student.save_pretrained(tmp_path / "before")
    return teacher, tmp_path / "before"


def test_a_step_changes_nothing_but_the_mixers_that_are_new(start, tmp_path):
    teacher, before = start
    original = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    tokens = torch.randint(VOCABULARY, (16, 32), generator=torch.Generator().manual_seed(1))
    assert convert_more(before, tmp_path / "after", teacher, step("layers:1"), tokens) == [2, 3]
    old, new = load_student(before), load_student(tmp_path / "after")
    assert new.config.layer_types == [LINEAR, FULL, LINEAR, LINEAR]
    refitted = {f"model.layers.{layer}.self_attn.o_proj.weight" for layer in (2, 3)}
    weights = new.state_dict()
    for name, tensor in old.state_dict().items():
        assert torch.equal(tensor, weights[name]) == (name not in refitted), name
    added = weights.keys() - old.state_dict().keys()
    assert added
    assert all(name.startswith(("model.layers.2.self_attn.", "model.layers.3.self_attn.")) for name in added)
    assert all(torch.equal(tensor, original[name]) for name, tensor in teacher.state_dict().items())


def test_the_new_layers_are_closer_to_the_teacher_than_a_plain_copy(tmp_path):
    teacher = load_teacher(DEMO, torch.float32)
    ids = AutoTokenizer.from_pretrained(DEMO)((DEMO / "text.txt").read_text(encoding="utf-8"))["input_ids"]
    fit, fresh = torch.tensor(ids[: 16 * 64]).view(16, 64), torch.tensor(ids[-8 * 64 :]).view(8, 64)
    first = Layout((LINEAR, *[FULL] * (teacher.config.num_hidden_layers - 1)), None)
    student = student_from_teacher(teacher, student_config(teacher.config, first))
    student.save_pretrained(tmp_path / "before")
    convert_more(tmp_path / "before", tmp_path / "after", teacher, step("layers:1"), fit)
    after = load_student(tmp_path / "after")
    plain = student_from_teacher(teacher, after.config)  # of layer 0 both have the plain copy
    with torch.no_grad():
        goal, made, copied = (model(fresh).logits.log_softmax(-1) for model in (teacher, after, plain))
    divergence = lambda logs: (goal.exp() * (goal - logs)).sum(-1).mean().item()
    assert divergence(made) < 0.7 * divergence(copied)


def test_the_same_step_is_the_same_bytes(start, tmp_path):
    teacher, before = start
    tokens = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(1))
    for name in ("one", "two"):
        convert_more(before, tmp_path / name, teacher, step("layers:1,3"), tokens)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "two" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("hybrid", "words"),
    [
        ("layers:0,1", r"stages\.more\.hybrid: layers:0,1 keeps attention in layer 0, which is linear by then"),
        ("layers:1,2,3", r"stages\.more\.hybrid: layers:1,2,3 makes no layer linear that is not so already"),
        ("swa", r"stages\.more\.hybrid: swa makes sliding layers, which no step can"),
        ("half", "half: unknown layout"),
    ],
)
def test_a_layout_that_is_no_step_forward_is_refused(hybrid, words):
    with pytest.raises(UserError, match=words):
        config_after(step(hybrid), config(KINDS))


def test_a_kept_layer_stays_what_it_is():
    sliding = config([LINEAR, "sliding_attention", FULL, FULL], sliding_window=16)
    after = config_after(step("layers:1"), sliding)
    assert after.layer_types == [LINEAR, "sliding_attention", LINEAR, LINEAR]
    assert after.sliding_window == 16
    assert config_after(Stage(kind="distil", steps=1), sliding) is sliding


def test_a_run_converts_in_steps_and_trains_between_them(tmp_path):
    stages = [
        {"kind": "align", "steps": 2},
        {"kind": "convert_step", "hybrid": "none", "tokens": 512},
        {"kind": "align", "steps": 2, "trainable": "model.layers.1.self_attn.*"},
    ]
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=stages)
    assert "convert_step: 2 of 2 layers linear from here on" in describe(load_recipe(recipe), tmp_path / "cache")
    options, folder = ["training.keep_commits=9"], tmp_path / "run"
    facts = distil(recipe, options, output=folder)
    names = ["teacher", "converted", "after align", "after convert_step", "after align2"]
    assert [row["model"] for row in facts["results"]] == names
    students = [folder / "commits" / f"step-{number:08d}" / "student" for number in (2, 3, 5)]
    types = [DeltaNetConfig.from_pretrained(student).layer_types for student in students]
    assert types == [[LINEAR, FULL], [LINEAR, LINEAR], [LINEAR, LINEAR]]
    weights = [
        {name: tensor for file in student.glob("*.safetensors") for name, tensor in load_file(file).items()}
        for student in students
    ]
    for name, tensor in weights[0].items():
        assert torch.equal(weights[1][name], tensor) == (name != "model.layers.1.self_attn.o_proj.weight"), name
    changed = {name for name in weights[1] if not torch.equal(weights[1][name], weights[2][name])}
    assert changed
    assert all(name.startswith("model.layers.1.self_attn.") for name in changed)
    assert load_student(folder / "export").config.layer_types == [LINEAR, LINEAR]
    assert not (folder / "steps" / "convert_step").exists()
    # Going on from the commit before the step makes the same student.
    before = load_file(folder / "export" / "model.safetensors")
    again = distil(recipe, options, output=folder, resume=str(folder / "commits" / "step-00000002"))
    assert again["results"] == facts["results"]
    after = load_file(folder / "export" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [json.loads(line)["total_step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [
        0,
        1,
        3,
        4,
    ]


@pytest.mark.parametrize("compat", ["fla", "qwen3_5"])
def test_a_student_made_for_another_format_stays_one_over_a_step(tmp_path, compat):
    """What --compat decides beside the options of a mixer holds for the layers that become linear later too."""
    teacher = small_run.write_teacher(tmp_path / "teacher", "qwen3" if compat == "qwen3_5" else "llama", num_layers=3)
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml",
        teacher,
        student__convert={"hybrid": "layers:1,2", "calibrate": "none", "compat": compat},
        stages=[
            {"kind": "distil", "steps": 1},
            {"kind": "convert_step", "hybrid": "layers:2", "tokens": 512},
            {"kind": "distil", "steps": 1},
        ],
        export__formats=["deltanet", compat],
    )
    distil(recipe, output=tmp_path / "run")
    own = DeltaNetConfig.from_pretrained(tmp_path / "run" / "export")
    assert own.layer_types == [LINEAR, LINEAR, FULL]
    assert own.rope_layers == [False, False, True]
    assert verify(tmp_path / "run" / f"export-{compat}").problems == []


def test_a_step_that_leaves_what_a_format_needs_is_refused_before_anything_is_trained(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher", "qwen3")
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml",
        teacher,
        student__convert={"hybrid": "layers:1", "calibrate": "none", "compat": "qwen3_5"},
        stages=[{"kind": "distil", "steps": 1}, {"kind": "convert_step", "hybrid": "none"}],
        export__formats=["qwen3_5"],
    )
    with pytest.raises(UserError, match=r"export\.formats: qwen3_5: .* cannot express no layer of full attention"):
        distil(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / "student").exists()


def test_a_step_that_cannot_be_is_refused_before_anything_is_trained(tmp_path):
    stages = [{"kind": "align", "steps": 1}, {"kind": "convert_step", "hybrid": "layers:0"}]
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=stages)
    with pytest.raises(UserError, match="layers:0 keeps attention in layer 0, which is linear by then"):
        distil(recipe, output=tmp_path / "run")
    assert not (tmp_path / "run" / "commits").exists()
    with pytest.raises(UserError, match=r"stages\.1\.hybrid: say which layers keep attention"):
        distil(recipe, ["stages.1.hybrid=null"], output=tmp_path / "run")
    with pytest.raises(UserError, match=r"stages\.1\.steps: a convert_step stage has no such key"):
        distil(recipe, ["stages.1.steps=3"], output=tmp_path / "run")
