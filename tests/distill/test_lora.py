"""Adapters: nothing changes at first, only they and what has none are trained, and merging is exact."""

import pytest
import small_run
import torch
from safetensors.torch import load_file
from small_pair import config, pair, sequence, stage

from deltanet_errors import UserError
from distill import lora
from distill.batch import make_batch, num_targets
from distill.run import distil
from distill.stages import Whole
from distill.trainable import check_stage, trained_names

STAGE = stage("distil", lora={"rank": 2, "alpha": 8.0, "targets": ["q_proj", "up_proj"]}, trainable=["mixers"])
SEQUENCES = [sequence(0), sequence(1)]


def adapted():
    teacher, student = pair()
    names = trained_names([name for name, _ in student.named_parameters()], STAGE, student.config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in names)
    lora.adapt(student, lora.adapted(names, STAGE), STAGE, seed=5)
    return teacher, student


def test_a_new_adapter_changes_nothing_and_is_the_same_for_the_same_seed():
    _, plain = pair()
    (_, first), (_, second) = adapted(), adapted()
    ids = torch.arange(9)[None]
    assert torch.equal(plain(ids).logits, first(ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


def test_targets_get_an_adapter_and_the_rest_of_the_set_trains_as_it_is():
    _, student = adapted()
    trained = {name for name, p in student.named_parameters() if p.requires_grad}
    assert all(".layers.0." in name or ".layers.2." in name for name in trained)
    assert not any(".up_proj." in name for name in trained)  # no mixer's matrix
    assert "model.layers.0.self_attn.q_proj.lora_A.default.weight" in trained
    assert "model.layers.0.self_attn.q_proj.base_layer.weight" not in trained
    assert "model.layers.0.self_attn.b_proj.bias" in trained


def test_merged_equals_adapted():
    teacher, student = adapted()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if lora.is_adapter(name):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    _, plain = pair()
    state = dict(lora.merged(student.named_parameters(), lora.scale_of(STAGE)))
    assert state.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(state, strict=False)
    batch = make_batch(SEQUENCES)
    before, after = (Whole(model, teacher, STAGE)(batch, num_targets(SEQUENCES))[0] for model in (student, plain))
    torch.testing.assert_close(before, after)


def test_no_matrix_to_adapt_is_an_error():
    wanted = stage("distil", lora={"targets": ["gate_proj"]}, trainable=["mixers"])
    with pytest.raises(UserError, match=r"stages\.distil\.lora\.targets: none of gate_proj is a matrix the stage"):
        lora.adapted(["model.layers.0.self_attn.q_proj.weight"], wanted)


@pytest.mark.parametrize("target", ["k_prj", "embed_tokens", "lm_head", "input_layernorm", "q_norm", "*"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_target_that_is_no_matrix_of_a_layer_is_refused(target, tied):
    """k_proj would have trained whole; the loss reads the head's weights and no adapter of it."""
    student = config(tie_word_embeddings=tied, qk_norm="head")
    wanted = stage("distil", lora={"targets": ["q_proj", target]}, trainable=["all"])
    with pytest.raises(
        UserError, match=r"stages\.distil\.lora\.targets: '.*' is no matrix of a layer.*; allowed: a_proj"
    ):
        check_stage(wanted, student)


def test_a_run_with_adapters_resumes_to_the_same_bytes_and_exports_a_plain_student(tmp_path):
    stages = [{"kind": "distil", "steps": 4, "lr": 1e-2, "lora": {"rank": 2}}]
    recipe = small_run.write_recipe(tmp_path / "r.yaml", small_run.write_teacher(tmp_path / "teacher"), stages=stages)
    distil(recipe, output=tmp_path / "straight")
    middle = tmp_path / "straight" / "commits" / "step-00000002"
    distil(recipe, output=tmp_path / "again", resume=str(middle))
    one, other = (load_file(tmp_path / run / "export" / "model.safetensors") for run in ("straight", "again"))
    start = load_file(tmp_path / "straight" / "student" / "model.safetensors")
    assert one.keys() == start.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(
        one["model.layers.0.self_attn.q_proj.weight"], start["model.layers.0.self_attn.q_proj.weight"]
    )
