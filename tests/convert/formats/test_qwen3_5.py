"""transformers' Qwen3.5 classes load what is written and compute the same; what they cannot express is refused."""

import importlib.util
import json

import pytest
import torch
import transformers
from exportable import exportable
from safetensors.torch import load_file
from tiny import make_teacher
from tiny import tokens as text
from tiny_student import tiny_model, tokens
from transformers import AutoModelForCausalLM

import cli
from convert import convert
from convert.formats import qwen3_5, write_format
from convert.publish.verify import verify
from deltanet import load_student
from deltanet_errors import UserError

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("fla") is not None and not torch.cuda.is_available(),
    reason="with flash-linear-attention installed transformers runs its kernels, which need a GPU",
)
CASES = [
    ("global", {}),
    ("global", {"tie_word_embeddings": False, "head_dim": 10, "conv_kernel": 2}),
]


@pytest.mark.parametrize(("layout", "changes"), CASES)
def test_transformers_loads_it_whole_and_computes_the_same(tmp_path, layout, changes):
    model = exportable("qwen3_5", layout, **changes)
    model.save_pretrained(tmp_path / "student")
    write_format(tmp_path / "student", tmp_path / "out", "qwen3_5")
    theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(theirs) is transformers.Qwen3_5ForCausalLM
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = tokens(2, 150)
    with torch.no_grad():
        assert (theirs.eval()(ids).logits - model(ids).logits).abs().max() < 1e-4
    # The tensors' shapes are also what verification expects of the folder.
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    found = {name: tuple(value.shape) for name, value in load_file(tmp_path / "out" / "model.safetensors").items()}
    assert found == qwen3_5.shapes(raw)


def test_a_converted_qwen3_teacher_is_exported_and_decodes_the_same(tmp_path):
    make_teacher(tmp_path / "teacher", "qwen3")
    report = convert(tmp_path / "teacher", tmp_path / "student", compat="qwen3_5", calibrate=["none"])
    assert any(name.endswith("q_norm.weight") for name in report["dropped"])
    arguments = [tmp_path / "student", "--format", "qwen3_5", "-o", tmp_path / "out"]
    assert cli.convert_main([str(argument) for argument in arguments]) == 0
    assert verify(tmp_path / "out").problems == []
    model = load_student(tmp_path / "student")
    with torch.no_grad():  # a plain copy lets nothing through its output gates: wake everything that is new
        for number, (name, parameter) in enumerate(model.named_parameters()):
            if "self_attn" in name:
                torch.manual_seed(number)
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "awake")
    write_format(tmp_path / "awake", tmp_path / "again", "qwen3_5")
    theirs, ids = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval(), text(1, 20)
    with torch.no_grad():
        assert (theirs(ids).logits - model(ids).logits).abs().max() < 1e-4
    written = [one.generate(ids, max_new_tokens=12, do_sample=False) for one in (theirs, model)]
    assert torch.equal(*written)


def test_one_error_names_everything_that_the_format_cannot_express(tmp_path):
    changes = {"mixer": "delta", "beta_max": 2, "exact_start": True, "mlp_bias": True}
    tiny_model("swa", **changes).save_pretrained(tmp_path / "student")
    with pytest.raises(UserError) as error:
        write_format(tmp_path / "student", tmp_path / "out", "qwen3_5")
    for item in ("mixer delta", "beta_max", "conv_kernel 0", "output_gate", "sliding-window", "exact_start", "mlp_bias",
                 "RoPE in linear layers", "qkv_activation none"):  # fmt: skip
        assert item in str(error.value), item
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


@pytest.mark.parametrize(
    ("changes", "item"),
    [
        ({"qk_norm": "none"}, "attention without q/k norms"),
        ({"gate_activation": "sigmoid"}, "no SiLU output gate"),
        ({"exact_start": True}, "exact_start"),
        ({"state_heads": "shared"}, "state_heads"),
        ({"linear_qk_norm": True}, "linear_qk_norm"),
        ({"beta_max": 2}, "beta_max"),
        ({"layer_types": ["linear_attention"] * 4, "rope_layers": [False] * 4}, "no layer of full attention"),
    ],
)
def test_a_single_item_is_named_alone(changes, item):
    found = qwen3_5.refusals(exportable("qwen3_5", **changes).config)
    assert len(found) == 1
    assert item in found[0]
