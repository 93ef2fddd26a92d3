"""SOURCE: folders, presets, the embedded teacher, the Hub (as far as its errors go) and .gguf files."""

import json
import math

import numpy as np
import pytest
import torch
from tiny import make_teacher, tokens

from convert import convert, load_teacher
from convert.gguf_rotary import FREQUENCIES, LLAMA3
from convert.presets import PRESETS, table
from convert.sources import COMPANIONS, open_source
from deltanet import load_student
from deltanet_errors import UserError


def opened(name, **options):
    with open_source(str(name), **options) as source:
        return source


def test_a_folder_comes_before_a_preset_of_its_name(teacher, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher.rename(tmp_path / "llama-1b")
    assert opened("llama-1b").origin == "folder"
    (tmp_path / "demo").mkdir()
    assert opened("demo").origin == "embedded"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("", "'': the name of a model is empty; give a folder"),
        ("lama-1b", "did you mean 'llama-1b'"),
        ("./nowhere", "no such folder"),
        ("/no/such/folder", "no such folder"),
        ("a/b.gguf", "no such folder"),
    ],
)
def test_a_name_that_means_nothing_is_refused(name, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        opened(name)


def test_a_home_that_nobody_has_is_refused():
    with pytest.raises(UserError, match="~nobody-has-this/model: Could not determine home"):
        open_source("~nobody-has-this/model").__enter__()


def test_a_folder_or_file_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match="not a checkpoint"):
        opened(tmp_path)
    (tmp_path / "model.onnx").write_text("x")
    with pytest.raises(UserError, match=r"not a \.gguf"):
        opened(tmp_path / "model.onnx")


def test_a_local_source_has_no_revision(teacher):
    with pytest.raises(UserError, match="--revision main"):
        opened(teacher, revision="main")


@pytest.mark.parametrize(
    ("error", "arguments", "says"),
    [
        ("GatedRepoError", {}, "ask for access.*hf auth login"),
        ("RepositoryNotFoundError", {}, "no such repository"),
        ("RevisionNotFoundError", {"revision": "v9"}, "--revision v9"),
        ("LocalEntryNotFoundError", {}, "hf download nobody/model"),
    ],
)
def test_what_the_hub_says_becomes_what_to_do(error, arguments, says, monkeypatch):
    import huggingface_hub

    kind = getattr(huggingface_hub.errors, error)

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=says):
        opened("nobody/model", **arguments)


def test_a_preset_downloads_its_repository_at_the_revision(teacher, monkeypatch):
    import huggingface_hub

    asked = {}

    def download(repository, **options):
        asked.update(options, repository=repository)
        return str(teacher)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = opened("smollm2-135m", revision="abc")
    assert asked["repository"] == source.name == "HuggingFaceTB/SmolLM2-135M"
    assert asked["revision"] == "abc"
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])
    assert set(COMPANIONS) < set(asked["allow_patterns"])
    assert source.licence == "Apache-2.0"


def test_offline_a_preset_says_how_to_get_it(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match=r"meta-llama/Llama-3\.2-1B: no folder here, not in the local cache"):
        opened("llama-1b")


def test_every_preset_is_in_the_table_with_its_licence():
    text = table()
    for name, preset in PRESETS.items():
        row = next(line for line in text.splitlines() if line.split()[0] == name)
        assert preset.repository in row
        assert preset.licence in row
        assert ("gated" in row) == preset.gated


def test_the_embedded_teacher_converts(tmp_path):
    report = convert("demo", tmp_path / "student", calibrate=["none"])
    assert report["origin"] == "embedded"
    assert report["tensors"]["kept"] == report["tensors"]["kept_identical"] > 0


def write_gguf(path, model, kind=None, add=lambda writer: None):
    """A Llama as llama.cpp's converter writes it: q and k rows interleaved, a byte-level tokenizer inside. `add` writes
    what else the file has."""
    gguf = pytest.importorskip("gguf")
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(model.config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    words = ["<unk>", "<s>", "<|im_end|>", "<|endoftext|>", *map(chr, range(33, 33 + config.vocab_size - 5)), '!"']
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, 3] + [1] * (len(words) - 4))
    writer.add_token_merges(['! "'])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    for layer in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            weight = state[f"model.layers.{layer}.{ours}.weight"]
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(theirs)
            if heads:
                weight = weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
            tensors[f"blk.{layer}.{theirs}.weight"] = weight
    for name, weight in tensors.items():
        data = weight.float().contiguous().numpy()
        if kind is not None and data.ndim > 1:
            data = gguf.quants.quantize(data, getattr(gguf.GGMLQuantizationType, kind))
            writer.add_tensor(name, data, raw_dtype=getattr(gguf.GGMLQuantizationType, kind))
        else:
            writer.add_tensor(name, data)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", [None, "Q8_0"])
def test_a_gguf_file_is_dequantised_and_stops_at_every_end(kind, tmp_path):
    original = make_teacher(tmp_path / "teacher", **GGUF_SIZES)
    path = tmp_path / "tiny.gguf"
    write_gguf(path, original, kind)
    convert(path, tmp_path / "student", hybrid="all", calibrate=["none"])
    config = json.loads((tmp_path / "student" / "config.json").read_text())
    assert config["dtype"] == ("float32" if kind is None else "bfloat16")
    assert "quantization_config" not in config
    ends = json.loads((tmp_path / "student" / "generation_config.json").read_text())["eos_token_id"]
    assert ends == [2, 3]
    with torch.no_grad():
        made, wanted = load_student(tmp_path / "student")(tokens()).logits, original(tokens()).logits
    if kind is None:
        assert torch.equal(made, wanted)
    else:
        # 8-bit blocks and bfloat16 round at 2^-8; four layers add up.
        assert (made - wanted).norm() < 0.1 * wanted.norm()


GGUF_SIZES = {"hidden_size": 64, "intermediate_size": 96, "attention_bias": False, "mlp_bias": False}


def stretched(factor, length=8192):
    """`rope_freqs` of llama.cpp's converter, for heads of 16 and the base 10000."""
    found = []
    for number in range(0, 16, 2):
        waves = length * 10000.0 ** (-number / 16) / (2 * math.pi)  # in the context of the pretraining
        smooth = min(max((waves - 1) / 3, 0), 1)
        found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def scaling(name, factor, length=None):
    def add(writer):
        writer.add_string("llama.rope.scaling.type", name)
        writer.add_rope_scaling_factor(factor)
        writer.add_rope_scaling_finetuned(True)
        if length is not None:
            writer.add_rope_scaling_orig_ctx_len(length)

    return add


@pytest.mark.parametrize(
    ("rope", "add"),
    [
        ({"rope_type": "linear", "factor": 4.0}, scaling("linear", 4.0)),
        ({"rope_type": "linear", "factor": 4.0}, lambda writer: writer.add_rope_scaling_factor(4.0)),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            scaling("yarn", 4.0, 64),
        ),
        (LLAMA3 | {"factor": 8.0}, lambda writer: writer.add_tensor(FREQUENCIES, stretched(8.0))),
        (LLAMA3 | {"factor": 32.0}, lambda writer: writer.add_tensor(FREQUENCIES, stretched(32.0))),
        ({"rope_type": "default"}, lambda writer: writer.add_tensor(FREQUENCIES, np.ones(8, np.float32))),
        ({"rope_type": "default"}, scaling("none", 4.0)),
    ],
)
def test_the_rotary_scaling_of_a_gguf_file_reaches_the_student(rope, add, tmp_path):
    original = make_teacher(tmp_path / "teacher", rope_parameters=rope | {"rope_theta": 1e4}, **GGUF_SIZES)
    write_gguf(tmp_path / "tiny.gguf", original, add=add)
    convert(tmp_path / "tiny.gguf", tmp_path / "student", hybrid="all", calibrate=["none"])
    with torch.no_grad():
        made = load_student(tmp_path / "student")(tokens(1, 256)).logits
        assert torch.equal(made, original(tokens(1, 256)).logits)


@pytest.mark.parametrize(
    ("add", "says"),
    [
        (scaling("longrope", 4.0), "rope scaling longrope"),
        (lambda writer: writer.add_rope_scaling_attn_factors(2.0), "attn_factor"),
        (lambda writer: writer.add_tensor(FREQUENCIES, stretched(8.0, 4096)), f"{FREQUENCIES} is not"),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)), "numbers, but transformers"),
        (lambda writer: writer.tensors[0].pop("token_embd.weight"), "missing: model.embed_tokens.weight"),
    ],
)
def test_what_the_reader_of_gguf_files_leaves_out_is_refused(add, says, tmp_path):
    write_gguf(tmp_path / "tiny.gguf", make_teacher(tmp_path / "teacher", **GGUF_SIZES), add=add)
    with pytest.raises(UserError, match=rf"tiny\.gguf: .*{says}"):
        opened(tmp_path / "tiny.gguf")


def test_a_file_that_only_ends_in_gguf_is_refused(tmp_path):
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UserError, match="cannot be read as gguf"):
        opened(tmp_path / "model.gguf")


def test_load_teacher_takes_what_convert_takes(teacher):
    assert load_teacher(str(teacher), torch.bfloat16).dtype == torch.bfloat16
