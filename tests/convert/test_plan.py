"""The plan accounts for every tensor, and carried out it makes the student it says."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, edit_config, make_teacher, raw_tensors, tokens

from convert import convert, load_teacher, student_from_teacher
from convert.checkpoint import open_checkpoint
from convert.families import teacher_config
from convert.layouts import parse_layout
from convert.plan import make_plan, student_config, teacher_tensors
from deltanet import DeltaNetForCausalLM, load_student
from deltanet_errors import UserError


def plan_of(folder, hybrid="every:2", dtype=None, **mixer):
    teacher = teacher_config(folder)
    layout = parse_layout(hybrid, teacher.layer_types, teacher.sliding_window)
    return make_plan(open_checkpoint(folder), student_config(teacher, layout, **mixer), dtype)


def shapes_of_model(config):
    with torch.device("meta"):
        model = DeltaNetForCausalLM(config)
    return {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if not (config.tie_word_embeddings and name == "lm_head.weight")
    }


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expected_tensors_are_the_models(family, tmp_path):
    make_teacher(tmp_path, family)
    config = teacher_config(tmp_path)
    assert teacher_tensors(config) == shapes_of_model(config)


@pytest.mark.parametrize(
    "mixer",
    [
        {},
        {"mixer": "delta", "state_heads": "shared"},
        {"skip_taps": 0, "read_gate": False, "mixer_bias": False},
        {"conv_kernel": 4, "output_gate": True, "head_norm": True},
        {"skip_taps": 1, "beta_max": 2},
        {"local_window": 8},
        {"feature_map": "linear"},
        {"feature_map": "linear", "state_heads": "shared"},
    ],
)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_the_plan_is_the_models_state_and_new_tensors_are_its_plain_copy(family, mixer, tmp_path):
    make_teacher(tmp_path, family)
    plan = plan_of(tmp_path, **mixer)
    assert {move.target: move.shape for move in plan.moves} == shapes_of_model(plan.config)
    model = DeltaNetForCausalLM(plan.config).state_dict()
    for move in plan.moves:
        if move.operation == "new":
            assert torch.equal(move.value(), model[move.target]), move.target


def test_every_source_tensor_is_moved_or_named_as_dropped(teacher):
    edit_weights(
        teacher, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    )
    plan = plan_of(teacher)
    assert set(plan.dropped) == {"model.layers.0.self_attn.rotary_emb.inv_freq"}
    moved = {move.source for move in plan.moves if move.source}
    assert moved | set(plan.dropped) == set(open_checkpoint(teacher).entries)


def test_query_heads_read_their_group_by_head(tmp_path):
    """8 query heads on 2 key/value heads of 3 channels: head h reads head h // 4, whole, in both state layouts."""
    for heads, kv_heads in ((8, 2), (6, 2), (5, 1)):
        folder = tmp_path / f"{heads}-{kv_heads}"
        sizes = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": heads * 3}
        make_teacher(folder, "smollm3", no_rope_layers=[0] * 4, head_dim=3, **sizes)

        def fill(weights):
            for name, weight in weights.items():
                if name.endswith(("k_proj.weight", "v_proj.weight")):
                    weight.copy_(torch.arange(len(weight))[:, None].expand_as(weight) + 1.0)

        edit_weights(folder, fill)
        teacher = load_teacher(folder)
        outputs = {}
        for state_heads in ("expanded", "shared"):
            config = plan_of(folder, "none", state_heads=state_heads).config
            student = student_from_teacher(teacher, config)
            mixer = student.model.layers[0].self_attn
            _, _, v, _ = mixer.project(torch.ones(1, 1, heads * 3) / (heads * 3), None)
            rows = [[3 * (h // (heads // kv_heads)) + c + 1 for c in range(3)] for h in range(heads)]
            if state_heads == "expanded":
                assert torch.allclose(mixer.expand(v)[0, 0], torch.tensor(rows).float())
            with torch.no_grad():
                outputs[state_heads] = student(tokens()).logits
        # Two groupings of the same sums.
        assert torch.allclose(outputs["expanded"], outputs["shared"], atol=1e-4)


def test_shared_and_expanded_states_give_equal_functions(tmp_path):
    make_teacher(tmp_path, "qwen3", num_attention_heads=6, num_key_value_heads=2)
    teacher = load_teacher(tmp_path)
    with torch.no_grad():
        one, other = (
            student_from_teacher(teacher, plan_of(tmp_path, "none", state_heads=kind).config)(tokens()).logits
            for kind in ("shared", "expanded")
        )
    # float32 sums in another order; the logits are of size 1 to 10.
    assert torch.allclose(one, other, atol=1e-4)


def test_a_biased_head_keeps_its_bias_in_a_linear_layer(teacher):
    plan = plan_of(teacher, "none")
    biases = [move for move in plan.moves if move.target.endswith("self_attn.o_proj.bias")]
    assert [move.operation for move in biases] == ["copy"] * 4
    student = student_from_teacher(load_teacher(teacher), plan.config)
    stored = load_file(teacher / "model.safetensors")
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        bias = f"model.layers.0.self_attn.{name}.bias"
        assert torch.equal(student.state_dict()[bias], stored[bias])


def test_a_tied_head_that_is_stored_is_dropped_or_untied(tmp_path):
    make_teacher(tmp_path, "qwen3")
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding.clone()}))
    plan = plan_of(tmp_path)
    assert "lm_head.weight" in plan.dropped
    assert plan.config.tie_word_embeddings
    edit_weights(tmp_path, lambda weights: weights.update({"lm_head.weight": embedding + 1}))
    plan = plan_of(tmp_path)
    assert not plan.config.tie_word_embeddings
    assert "lm_head.weight" in {move.target for move in plan.moves}
    assert any("not tied" in note for note in plan.notes)
    assert torch.equal(load_teacher(tmp_path).lm_head.weight, embedding + 1)


def test_of_a_tied_pair_the_head_may_be_the_one_that_is_stored(tmp_path):
    """safetensors.torch.save_model keeps one name of a shared tensor, and it is this one."""
    from safetensors.torch import save_model

    teacher = tmp_path / "teacher"
    original = make_teacher(teacher, "qwen3")
    save_model(original, teacher / "model.safetensors", metadata={"format": "pt"})
    assert "model.embed_tokens.weight" not in raw_tensors(teacher)
    convert(teacher, tmp_path / "student", hybrid="all", calibrate=["none"])
    assert raw_tensors(tmp_path / "student")["model.embed_tokens.weight"] == raw_tensors(teacher)["lm_head.weight"]
    with torch.no_grad():
        for model in (load_student(tmp_path / "student"), load_teacher(teacher)):
            assert torch.equal(model(tokens()).logits, original(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("model.layers.2.mlp.up_proj.weight"), r"layers\.2\.mlp\.up_proj\.weight is missing"),
        (lambda w: w.update({"model.layers.0.extra": torch.ones(1)}), r"model\.layers\.0\.extra is unexpected"),
        (lambda w: w.update({"model.norm.weight": torch.ones(25)}), r"norm\.weight is \[25\].*\[24\]"),
        (lambda w: w.update({"model.norm.weight": torch.ones(24, dtype=torch.int8)}), r"norm\.weight is torch\.int8"),
    ],
)
def test_tensors_that_do_not_fit_are_named(teacher, change, says):
    edit_weights(teacher, change)
    with pytest.raises(UserError, match=says):
        plan_of(teacher)


def test_config_and_weights_of_different_sizes_are_refused(teacher):
    edit_config(teacher, num_key_value_heads=4)
    with pytest.raises(UserError, match=r"k_proj\.weight is \[12, 24\]"):
        plan_of(teacher)


def test_a_dtype_casts_and_no_dtype_copies(teacher):
    assert {move.operation for move in plan_of(teacher, "all").moves} == {"copy"}
    plan = plan_of(teacher, "all", torch.bfloat16)
    assert {move.operation for move in plan.moves} == {"cast"}
    assert plan.config.dtype == torch.bfloat16


def test_sharing_spares_memory_but_never_the_refitted_projections(teacher):
    original = load_teacher(teacher)
    student = student_from_teacher(original, plan_of(teacher, "layers:1").config, share=True)
    same = {
        name
        for name, tensor in student.state_dict().items()
        if name in original.state_dict() and tensor.data_ptr() == original.state_dict()[name].data_ptr()
    }
    own = {name for name in original.state_dict() if name not in same}
    linear = {f"model.layers.{layer}.self_attn.o_proj.{kind}" for layer in (0, 2, 3) for kind in ("weight", "bias")}
    assert own == linear
