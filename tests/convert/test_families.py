"""Families: our decoder, configured from a teacher's config.json, computes what the teacher's class computes."""

import json

import pytest
import torch
from tiny import edit_config, make_teacher, tokens
from transformers import AutoModelForCausalLM

from convert import convert, load_teacher
from convert.families import FAMILIES, teacher_config
from deltanet import load_student
from deltanet_errors import UserError

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}


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


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("inside", [{}, {"original_max_position_embeddings": 32}])
def test_the_length_of_pretraining_counts_where_it_stands_beside_the_rotary_settings(family, inside, tmp_path):
    """As transformers reads it: beside them it wins, and never is it the whole context without a word."""
    folder = tmp_path / "teacher"
    make_teacher(folder, family)
    scaling = {"rope_type": "yarn", "factor": 4.0} | inside
    beside = {"original_max_position_embeddings": 64, "rope_theta": 5e4}
    edit_config(folder, rope_parameters=None, rope_scaling=scaling, **beside)
    convert(folder, tmp_path / "student", hybrid="all", calibrate=["none"])
    student, ids = load_student(tmp_path / "student"), tokens(1, 128)
    assert student.config.rope_parameters["original_max_position_embeddings"] == 64
    assert torch.equal(logits(student, ids), logits(AutoModelForCausalLM.from_pretrained(folder), ids))


@pytest.mark.parametrize("kinds", ["sfsf", "ffff", "ssss"])
@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.sliding])
def test_layer_types_say_which_layers_see_the_window(family, kinds, tmp_path):
    folder = tmp_path / "teacher"
    make_teacher(folder, family)
    layer_types = [{"s": "sliding_attention", "f": "full_attention"}[kind] for kind in kinds]
    edit_config(folder, layer_types=layer_types, sliding_window=4, use_sliding_window=True)
    teacher = AutoModelForCausalLM.from_pretrained(folder)
    convert(folder, tmp_path / "student", hybrid="all", calibrate=["none"])
    assert teacher_config(folder).layer_types == layer_types
    assert torch.equal(logits(load_student(tmp_path / "student"), tokens()), logits(teacher, tokens()))


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
        ({"is_causal": False}, "is_causal is False"),
        ({"per_layer_config": {"1": {"rms_norm_eps": 0.5}}}, "per_layer_config"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "granite"}, "multipliers.*llama, mistral, qwen2, qwen3, smollm3"),
        ({"model_type": "lama"}, "did you mean 'llama'"),
        ({"model_type": None}, "None"),
        ({"model_type": "deltanet_hybrid"}, "student already"),
        ({"num_hidden_layers": "4"}, r"num_hidden_layers is '4'; allowed: 1 to"),
        ({"num_attention_heads": 0}, r"config.json: num_attention_heads is 0; allowed: 1 or more"),
        ({"num_key_value_heads": 0}, "num_key_value_heads is 0"),
        ({"num_key_value_heads": 3}, r"config.json: .*not a multiple"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_dim": "x"}, "head_dim is 'x'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
        (
            {"rms_norm_eps": "x"},
            r"'rms_norm_eps': TypeError: Field 'rms_norm_eps' expected float, got str \(value: 'x'",
        ),
        ({"attention_dropout": 1.0}, "attention_dropout is 1.0"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'.*did you mean 'silu'"),
        ({"dtype": "bf16"}, "dtype is 'bf16'; allowed: float32, bfloat16"),
        ({"dtype": [1]}, r"dtype is \[1\]"),
        ({"layer_types": 3}, "layer_types has 3"),
        ({"layer_types": ["sliding_attention"] * 4}, "allowed for llama: full_attention"),
        ({"rope_parameters": {"rope_type": [], "rope_theta": 1e4}}, r"rope_type \[\] is not supported"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": -1}},
            "rope_theta is -1; allowed: a number above 1",
        ),
        (
            {"rope_parameters": LINEAR | {"rope_type": "yarn", "rope_theta": 1.0}},
            "rope_theta is 1.0; allowed: a number",
        ),
        ({"rope_parameters": LINEAR | {"rope_type": "yarn", "mscale": "x"}}, "mscale is 'x'; allowed: a number"),
        ({"rope_parameters": LINEAR | {"rope_type": "yarn", "mscale_all_dim": True}}, "mscale_all_dim is True"),
        (
            {"original_max_position_embeddings": "64", "rope_parameters": LLAMA3 | {"rope_theta": 1e4}},
            "is '64'; allowed",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "1e4"}}, "rope_theta is '1e4'"),
        ({"rope_parameters": LINEAR | {"factor": 0}}, "factor is 0"),
        (
            {"rope_parameters": LLAMA3 | {"rope_theta": 1e4, "low_freq_factor": 4.0}},
            "low_freq_factor is 4.0; allowed: less",
        ),
        ({"rope_theta": 5e5}, "rope_theta is 500000.0, but transformers reads 10000.0"),
        ({"rope_scaling": LINEAR | {"rope_theta": 5e5}}, "rope_theta is 10000.0, but transformers reads 500000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is 'default', but transformers reads 'linear'",
        ),
    ],
)
def test_arithmetic_that_the_decoder_lacks_is_refused_by_name(teacher, changes, says):
    edit_config(teacher, **changes)
    with pytest.raises(UserError, match=says):
        teacher_config(teacher)


@pytest.mark.parametrize(
    ("family", "changes", "says"),
    [
        ("qwen3", {"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention'"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 4}, "layer_types has 'chunked_attention'"),
        ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "no sliding_window is set"),
        ("mistral", {"sliding_window": -1}, "sliding_window is -1; allowed: 1 or more"),
        ("smollm3", {"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 4 layers"),
    ],
)
def test_what_a_family_says_of_its_layers_must_make_sense(family, changes, says, tmp_path):
    make_teacher(tmp_path / "teacher", family)
    edit_config(tmp_path / "teacher", **changes)
    with pytest.raises(UserError, match=says):
        teacher_config(tmp_path / "teacher")


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
