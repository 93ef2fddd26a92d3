"""Families: our decoder, configured from a teacher's config.json, computes what the teacher's class computes."""

import json

import pytest
import torch
from tiny import edit_config, make_teacher, tokens
from transformers import AutoModelForCausalLM

from convert import convert, load_teacher
from convert.families import FAMILIES, teacher_config
from deltanet import load_student
from deltanet.errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_converted_gives_bit_equal_logits(family, tmp_path):
    original = make_teacher(tmp_path / "teacher", family)
    convert(tmp_path / "teacher", tmp_path / "student", hybrid="all", calibrate=["none"])
    student = load_student(tmp_path / "student")
    assert torch.equal(logits(student, tokens()), logits(original, tokens()))
    assert torch.equal(logits(load_teacher(tmp_path / "teacher"), tokens()), logits(original, tokens()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_bits_and_logits(dtype, tmp_path):
    original = make_teacher(tmp_path / "teacher", "qwen3", dtype=dtype)
    convert(tmp_path / "teacher", tmp_path / "student", hybrid="all", calibrate=["none"])
    student = load_student(tmp_path / "student")
    assert student.dtype == dtype
    assert torch.equal(logits(student, tokens()), logits(original, tokens()))


@pytest.mark.parametrize(
    "settings",
    [
        {"num_attention_heads": 5, "num_key_value_heads": 1, "head_dim": 6, "hidden_size": 30},
        {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
        {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 4, "hidden_size": 36},
        {"num_hidden_layers": 1},
        {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True},
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "rope_theta": 1e4,
                "original_max_position_embeddings": 32,
            }
        },
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
    ],
)
def test_odd_shapes_and_rotary_types_are_exact(settings, tmp_path):
    original = make_teacher(tmp_path / "teacher", **settings)
    assert torch.equal(logits(load_teacher(tmp_path / "teacher"), tokens()), logits(original, tokens()))


def test_the_rotary_base_survives_every_generation_of_config(tmp_path):
    """The base as `rope_theta` beside `rope_scaling`, and inside `rope_parameters`: never a silent 10000."""
    make_teacher(tmp_path / "teacher", rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    folder, found = tmp_path / "teacher", []
    spellings = [
        {"rope_parameters": None, "rope_theta": 500000.0, "rope_scaling": LLAMA3},
        {"rope_parameters": LLAMA3 | {"rope_theta": 500000.0}, "rope_theta": None, "rope_scaling": None},
        {"rope_parameters": LLAMA3, "rope_theta": 500000.0, "rope_scaling": None},
    ]
    ids = tokens(1, 256)
    for number, spelling in enumerate(spellings):
        edit_config(folder, **spelling)
        out = tmp_path / f"student{number}"
        convert(folder, out, hybrid="every:2", calibrate=["none"])
        student = load_student(out)
        again = tmp_path / f"again{number}"
        student.save_pretrained(again)
        rope = student.config.rope_parameters
        assert rope["rope_theta"] == 500000.0
        assert {key: rope[key] for key in LLAMA3} == LLAMA3
        found += [logits(student, ids), logits(load_student(again), ids)]
        teacher = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(logits(load_teacher(folder), ids), logits(teacher, ids))
    assert all(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rope_parameters": {"rope_type": "yarn-unknown", "rope_theta": 500000}}, "yarn-unknown"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "longrope"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
        ({"rope_parameters": None, "rope_scaling": {"type": "su", "factor": 2.0}}, "su"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ({"residual_multiplier": 0.22}, "residual_multiplier"),
        ({"logits_scaling": 16.0}, "logits_scaling"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "granite"}, "multipliers.*llama, mistral, qwen2, qwen3, smollm3"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "None"),
        ({"model_type": "deltanet_hybrid"}, "student already"),
        ({"num_attention_heads": 0}, "config.json"),
    ],
)
def test_arithmetic_that_the_decoder_lacks_is_refused_by_name(teacher, changes, says):
    edit_config(teacher, **changes)
    with pytest.raises(UserError, match=says):
        teacher_config(teacher)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_unreadable_config_is_a_user_error(teacher, content):
    (teacher / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json"):
        teacher_config(teacher)


def test_the_window_of_every_family_reaches_the_student(tmp_path):
    for family, types in {
        "mistral": ["sliding_attention"] * 4,
        "qwen2": ["full_attention"] * 2 + ["sliding_attention"] * 2,
        "smollm3": ["full_attention"] * 4,
    }.items():
        make_teacher(tmp_path / family, family)
        assert teacher_config(tmp_path / family).layer_types == types
    config = teacher_config(tmp_path / "smollm3")
    assert config.rope_layers == [True, False, True, False]
    assert json.loads((tmp_path / "smollm3" / "config.json").read_text())["no_rope_layers"] == [1, 0, 1, 0]
