"""What `--verify` says of whole folders and of each kind of fault, by its library and its command line."""

import json
import shutil

import pytest
import torch
from published import make_student
from safetensors.torch import load_file, save_file
from tiny import edit_config, make_teacher

import cli
from convert import convert
from convert.publish.manifest import seal
from convert.publish.verify import Invalid, check_card, verify
from deltanet_errors import UserError


def problems(folder) -> str:
    return "\n".join(verify(folder).problems)


def rewrite(folder, change) -> None:
    """Applies `change` to the tensors of the folder's only weight file, and seals what came of it."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    seal(folder)


@pytest.fixture
def whole(source, tmp_path):
    return make_student(tmp_path / "whole", source, "5GB")


@pytest.mark.parametrize("shard", ["20KB", "5GB"])
def test_what_a_conversion_writes_passes_and_generates(source, tmp_path, shard):
    found = verify(make_student(tmp_path / "s", source, shard))
    assert found.problems == []
    assert found.text.startswith("Once upon a time")
    assert found.num_tensors == len(
        {name for file in (tmp_path / "s").glob("*.safetensors") for name in load_file(file)}
    )


def test_students_of_every_kind_and_untied_ones_pass(tmp_path):
    for family in ("llama", "qwen3", "smollm3"):
        make_teacher(tmp_path / family, family)
        convert(tmp_path / family, tmp_path / f"{family}-s", calibrate=["none"], conv=3, gate="both", hybrid="every:2")
        assert verify(tmp_path / f"{family}-s").problems == []


def test_a_teacher_is_checked_too_once_it_has_a_manifest(source):
    assert verify(source).problems == ["manifest.json: missing, so no file can be compared with its digest"]
    seal(source)
    assert verify(source).problems == []


def test_missing_added_renamed_and_misshapen_tensors_are_named(whole):
    def change(tensors):
        tensors["model.extra"] = torch.zeros(2)
        tensors["model.norm.wieght"] = tensors.pop("model.norm.weight")
        tensors["model.layers.0.self_attn.b_proj.bias"] = torch.zeros(3, dtype=torch.bfloat16)

    rewrite(whole, change)
    said = problems(whole)
    assert "model.norm.weight: missing" in said
    assert "model.norm.wieght: unexpected" in said
    assert "model.extra: unexpected" in said
    assert "b_proj.bias: is [3], but config.json makes it [1]" in said


def test_a_head_stored_beside_the_embedding_it_is_tied_to_is_a_fault(whole):
    rewrite(whole, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight: unexpected; config.json has no place for it (config.json ties it" in problems(whole)
    edit_config(whole, tie_word_embeddings=False)
    seal(whole)
    assert problems(whole) == ""


def test_an_untied_model_without_a_head_is_a_fault(whole):
    edit_config(whole, tie_word_embeddings=False)
    seal(whole)
    assert "lm_head.weight: missing" in problems(whole)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_named(whole, value):
    rewrite(whole, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[-1:].fill_(value))
    assert "model.layers.0.mlp.up_proj.weight holds" in problems(whole)


def test_another_dtype_than_the_configs_is_named_and_one_odd_tensor_is_a_note(whole):
    rewrite(whole, lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].float()}))
    assert problems(whole) == ""
    assert "tensors of 2 dtypes" in verify(whole).notes[0]
    rewrite(whole, lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()}))
    assert "dtype is torch.bfloat16, but most of the weights are torch.float16" in problems(whole)
    rewrite(whole, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(16, dtype=torch.int64)}))
    assert "model.norm.weight: is torch.int64, which is no dtype of weights" in problems(whole)


def test_metadata_without_a_format_is_named(whole):
    save_file(load_file(whole / "model.safetensors"), whole / "model.safetensors")
    seal(whole)
    assert "model.safetensors: its metadata lacks format: pt" in problems(whole)


def test_an_index_that_lies_is_named(student):
    index = json.loads((student / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    index["weight_map"]["model.norm.weight"] = shards[0]
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    seal(student)
    assert "lacks model.norm.weight" in problems(student)
    index["weight_map"]["model.norm.weight"] = shards[-1]
    index["metadata"]["total_size"] += 1
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    seal(student)
    assert "total_size" in problems(student)
    index["metadata"]["total_size"] -= 1
    (student / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"stray": torch.zeros(1)}, student / "model-stray.safetensors")
    seal(student)
    assert "model-stray.safetensors: a stray file" in problems(student)


def test_a_tokenizer_larger_than_the_vocabulary_is_named(tmp_path, source):
    make_teacher(tmp_path / "small")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / "small" / name)
    convert(tmp_path / "small", tmp_path / "s", calibrate=["none"])
    assert "tokenizer: 1024 tokens, but config.json has room for 96" in problems(tmp_path / "s")


def test_special_tokens_outside_the_vocabulary_are_named(whole):
    path = whole / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [0, 5000]}))
    seal(whole)
    assert "generation_config.json: eos_token_id is 5000; the vocabulary has 1024" in problems(whole)


def test_a_card_whose_head_is_no_yaml_mapping_is_named(whole):
    for text in ("# no head", "---\n- a\n- b\n---\n", "---\na: [\n---\n", "---\n---\n"):
        (whole / "README.md").write_text(text)
        seal(whole)
        assert "README.md" in problems(whole), text
    with pytest.raises(UserError, match=r"mine\.md"):
        check_card("nothing", "mine.md")


def test_hidden_files_of_git_and_downloads_are_no_fault(student):
    (student / ".gitattributes").write_text("*.safetensors filter=lfs")
    (student / ".cache" / "huggingface").mkdir(parents=True)
    (student / ".cache" / "huggingface" / "x.lock").write_text("")
    assert problems(student) == ""


def test_the_command_says_each_problem_on_a_line_and_exits_with_1(student, capsys):
    assert cli.convert_main([str(student), "--verify"]) == 0
    assert "it loads and generates" in capsys.readouterr().out
    (student / "extra.txt").write_text("x")
    (student / "closeness.md").unlink(missing_ok=True)
    (student / "conversion.json").unlink()
    assert cli.convert_main([str(student), "--verify"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(f"{student}: 2 problems")
    assert [line.strip() for line in lines[1:]] == [
        "conversion.json: missing, though manifest.json lists it",
        "extra.txt: not in manifest.json",
    ]
    assert cli.convert_main([str(student), "--verify", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["problems"]) == 2
    with pytest.raises(Invalid):
        verify(student).refuse()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "out"], "-o: --verify only checks"),
        (["--hybrid", "none"], "--hybrid: --verify only checks"),
        (["--calibrate", "none"], "--calibrate: --verify only checks"),
        (["--dry-run"], "--dry-run: --verify only checks"),
    ],
)
def test_other_options_beside_verify_are_refused(student, arguments, says, capsys):
    assert cli.convert_main([str(student), "--verify", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_without_verify_an_output_is_needed_and_with_it_a_folder(tmp_path, capsys):
    assert cli.convert_main(["demo"]) == 2
    assert "-o OUT: missing" in capsys.readouterr().err
    assert cli.convert_main([str(tmp_path), "--verify"]) == 2
    assert "no config.json" in capsys.readouterr().err
