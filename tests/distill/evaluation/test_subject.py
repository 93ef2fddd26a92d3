"""What is loaded to be measured, and what is refused."""

import json
import shutil

import pytest
import torch
from eval_subjects import RANGE
from safetensors.torch import load_file, save_file

from deltanet_errors import UserError
from distill.evaluation.subject import load_subject


def test_a_student_and_a_plain_transformer_are_told_apart(teacher, student):
    assert not teacher.is_student
    assert student.is_student
    for subject in (teacher, student):
        assert subject.max_context == RANGE
        assert subject.dtype == torch.float32
        assert not subject.model.training
        assert subject.vocab_size == 1024


def test_a_lower_precision_is_taken_only_when_asked_for_on_a_cpu(folders):
    assert load_subject(folders[1], device="cpu", dtype="bfloat16").dtype == torch.bfloat16


def test_a_text_may_be_as_long_as_the_rotary_embedding_reaches(folders, tmp_path):
    for index, folder in enumerate(folders):
        shutil.copytree(folder, tmp_path / str(index))
        config = json.loads((folder / "config.json").read_text())
        config["rope_parameters"] |= {"rope_type": "linear", "factor": 4.0}
        (tmp_path / str(index) / "config.json").write_text(json.dumps(config))
        assert load_subject(tmp_path / str(index), device="cpu").max_context == 4 * RANGE


def test_a_missing_folder_is_named():
    with pytest.raises(UserError, match="no/such/model"):
        load_subject("./no/such/model")


def test_a_model_without_tokenizer_is_refused(folders, tmp_path):
    shutil.copytree(folders[0], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "bare" / name).unlink()
    with pytest.raises(UserError, match="no tokenizer"):
        load_subject(tmp_path / "bare")


@pytest.mark.parametrize("which", [0, 1])
def test_a_model_that_makes_no_numbers_is_refused(which, folders, tmp_path):
    shutil.copytree(folders[which], tmp_path / "hurt")
    path = tmp_path / "hurt" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = float("nan")
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"hurt: its logits are NaN in torch\.float32"):
        load_subject(tmp_path / "hurt")


@pytest.mark.parametrize("which", [0, 1])
def test_a_lost_tensor_is_an_error_and_not_a_random_one(which, folders, tmp_path):
    shutil.copytree(folders[which], tmp_path / "hurt")
    path = tmp_path / "hurt" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_subject(tmp_path / "hurt")
