"""The student a run starts from is the one its recipe makes, whatever an earlier try left in its place."""

import json
import shutil

import pytest
import small_run

from convert.command import convert
from deltanet import DeltaNetConfig
from deltanet_errors import UserError
from distill.first_student import first_student
from distill.recipe import load_recipe
from distill.resume import RECIPE


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return small_run.write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture
def made(teacher, tmp_path):
    """`made(*overrides)`: the layers of the student of a run in tmp_path / "run", and what was said."""
    own = shutil.copytree(teacher, tmp_path / "teacher")
    text = tmp_path / "text.txt"
    text.write_text((small_run.DEMO / "text.txt").read_text()[:6000])
    (tmp_path / "run").mkdir()
    recipe = small_run.write_recipe(tmp_path / "r.yaml", own)

    def make(*overrides):
        said = []
        folder = first_student(load_recipe(recipe, overrides), tmp_path / "run", own, said.append)
        return DeltaNetConfig.from_pretrained(folder).layer_types, said

    return make


def test_the_student_of_an_earlier_try_is_used_where_the_same_made_it(made):
    types, said = made()
    assert types == ["linear_attention", "full_attention"]
    assert len(said) == 1
    assert made() == (types, [])
    assert made("stages.0.lr=1e-5", "training.seed=7") == (types, [])


def test_it_is_made_again_where_an_option_has_changed(made, tmp_path):
    made()
    types, said = made("student.convert.hybrid=layers:0")
    assert types == ["full_attention", "linear_attention"]
    assert "is of an earlier try (convert hybrid: layers:1 -> layers:0) and is made again" in said[0]
    assert made("student.convert.hybrid=layers:0") == (types, [])
    assert not list((tmp_path / "run").glob(".*"))


def test_it_is_made_again_where_the_teacher_has_changed(made, tmp_path):
    made()
    weights = tmp_path / "teacher" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert "teacher model.safetensors: " in made()[1][0]
    assert (tmp_path / "run" / "student" / "model.safetensors").read_bytes()[-1:] == bytes(data[-1:])


def test_it_is_made_again_where_the_text_of_the_calibration_has_changed(made, tmp_path):
    text = tmp_path / "text.txt"
    option = f"student.convert.calibrate=[{text}]"
    made(option)
    text.write_text(text.read_text() + "And they lived happily.")
    assert f"file {text}: " in made(option)[1][0]


def test_one_that_stopped_before_it_was_noted_is_made_again(made, tmp_path):
    made()
    (tmp_path / "run" / "student.json").unlink()
    assert "it is not noted what it was made of" in made()[1][0]


def test_the_student_of_a_run_that_has_started_is_left_alone(made, tmp_path):
    made()
    (tmp_path / "run" / RECIPE).write_text("started: true")
    (tmp_path / "run" / "student.json").unlink()
    assert made()[1] == []


def test_a_student_elsewhere_is_used_if_it_is_what_would_be_made_and_refused_if_not(made, tmp_path):
    elsewhere = f"student.model={tmp_path / 'elsewhere'}"
    convert(tmp_path / "teacher", tmp_path / "elsewhere", hybrid="layers:1", calibrate=["none"], local_window=0)
    assert made(elsewhere)[1] == []
    with pytest.raises(UserError, match=r"elsewhere is there and not what student\.convert makes: its layer_types is"):
        made(elsewhere, "student.convert.hybrid=none")
    with pytest.raises(UserError, match="its mixer is gated_delta, not delta"):
        made(elsewhere, "student.convert.mixer=delta")


def test_a_student_elsewhere_that_this_run_made_otherwise_is_refused(made, tmp_path):
    elsewhere = f"student.model={tmp_path / 'elsewhere'}"
    made(elsewhere)
    before = (tmp_path / "elsewhere" / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"was made otherwise \(convert seed: 0 -> 1\); delete it, or name another"):
        made(elsewhere, "student.convert.seed=1")
    assert (tmp_path / "elsewhere" / "model.safetensors").read_bytes() == before
    assert json.loads((tmp_path / "run" / "student.json").read_text())["convert"]["seed"] == 0


def test_a_damaged_note_is_taken_for_none(made, tmp_path):
    made()
    (tmp_path / "run" / "student.json").write_text("{")
    assert "it is not noted what it was made of" in made()[1][0]


@pytest.mark.parametrize("overrides", [[], ["student.convert=null"]])
def test_a_folder_that_holds_something_else_is_refused_by_name(made, tmp_path, overrides):
    other = tmp_path / "other"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"^student\.model: .*other is (there and no|not a) checkpoint"):
        made(f"student.model={other}", *overrides)
    (other / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"^student\.model: .*other/config.json is no configuration: "):
        made(f"student.model={other}", *overrides)
    with pytest.raises(UserError, match=r"^student\.model: .*teacher is a llama and no student; `convert:` or"):
        made(f"student.model={tmp_path / 'teacher'}", *overrides)
    assert (other / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("key", ["calibrate", "held_out"])
def test_a_text_that_is_not_there_is_refused_by_its_key(made, key):
    with pytest.raises(UserError, match=f"^student.convert.{key}: absent.txt: no such file$"):
        made(f"student.convert.{key}=absent.txt")


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(made, tmp_path):
    with pytest.raises(UserError, match=r"student\.model: .*nowhere is not a checkpoint folder"):
        made("student.convert=null", f"student.model={tmp_path / 'nowhere'}")
