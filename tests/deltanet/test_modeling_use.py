"""What users do with a student: generate, train, save, load, compile, add LoRA."""

import json

import pytest
import torch
from tiny_student import LAYOUTS, tiny_config, tiny_model, tokens
from transformers import AutoModel, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from deltanet import DeltaNetConfig, DeltaNetForCausalLM, UserError, load_student, mixer
from deltanet.modeling import DeltaNetModel

GREEDY = {"max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20, "temperature": 0.8}, {"prefill_chunk_size": 4}],
    ids=["greedy", "beam", "sample", "chunked-prefill"],
)
def test_generation_with_and_without_cache_agree(layout, options):
    model, ids = tiny_model(layout), tokens(2, 10)
    outputs = []
    for use_cache in (True, False):
        if "prefill_chunk_size" in options and not use_cache:
            continue
        torch.manual_seed(3)
        outputs.append(model.generate(ids, **{**GREEDY, **options}, use_cache=use_cache))
    if "prefill_chunk_size" in options:
        outputs.append(model.generate(ids, **GREEDY, use_cache=False))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"use_cache": False}, {"prompt_lookup_num_tokens": 3}])
def test_embeddings_of_a_prompt_do_for_the_prompt(layout, options):
    if "prompt_lookup_num_tokens" in options and "reset" not in vars(DynamicLayer):
        pytest.skip("an older transformers, which looks nothing up for embeddings")
    model, ids = tiny_model(layout), tokens(1, 10)
    embedded = model.generate(inputs_embeds=model.model.embed_tokens(ids), **GREEDY, **options)
    assert torch.equal(embedded, model.generate(ids, **GREEDY, **options)[:, 10:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_left_padded_batch_generates_what_each_row_generates_alone(layout):
    model = tiny_model(layout)
    rows = [tokens(1, n, seed=n) for n in (3, 8)]
    ids = torch.cat([torch.cat([torch.zeros(1, 8 - r.shape[1], dtype=torch.long), r], 1) for r in rows])
    mask = torch.tensor([[0] * (8 - r.shape[1]) + [1] * r.shape[1] for r in rows])
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 8:], model.generate(row, **GREEDY)[0, row.shape[1] :])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_turn_continues_from_the_cache(layout):
    model, first, second = tiny_model(layout), tokens(1, 6), tokens(1, 4, seed=8)
    turn = model.generate(first, **GREEDY, return_dict_in_generate=True)
    cache = turn.cache if "cache" in turn else turn.past_key_values
    ids = torch.cat([turn.sequences, second], 1)
    name = "cache" if "cache" in turn else "past_key_values"
    continued = model.generate(ids, **GREEDY, **{name: cache})
    assert torch.equal(continued, model.generate(ids, **GREEDY, use_cache=False))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    model, ids = tiny_model().train(), tokens(2, 20)
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-6), name


@pytest.mark.parametrize("changes", [{}, {"qk_norm": "head"}])
def test_under_autocast_the_delta_rule_reads_the_low_precision(monkeypatch, changes):
    """In float32, as norms and rotations leave q and k there, its kernels are many times slower."""
    seen, rule = [], mixer.delta_rule

    def watched(q, k, v, *args, **kwargs):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return rule(q, k, v, *args, **kwargs)

    monkeypatch.setattr(mixer, "delta_rule", watched)
    with torch.autocast("cpu", torch.bfloat16):
        tiny_model("none", **changes)(tokens(1, 9))
    assert set(seen) == {torch.bfloat16}


def test_every_parameter_of_a_student_gets_a_gradient():
    model, ids = tiny_model("swa", conv_kernel=3, output_gate=True, head_norm=True).train(), tokens(2, 20)
    model(ids, labels=ids).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]


def test_a_saved_student_loads_bit_equal_by_auto_class(tmp_path):
    model, ids = tiny_model(), tokens(1, 12)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is DeltaNetForCausalLM
    assert torch.equal(model(ids).logits, loaded(ids).logits)
    assert torch.equal(model(ids).logits, load_student(tmp_path)(ids).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_the_decoder_alone_loads_from_a_saved_student(tied, tmp_path):
    model, ids = tiny_model(tie_word_embeddings=tied), tokens(1, 12)
    model.save_pretrained(tmp_path)
    decoder = AutoModel.from_pretrained(tmp_path)
    assert type(decoder) is DeltaNetModel
    assert torch.equal(decoder(ids).last_hidden_state, model.model(ids).last_hidden_state)


@pytest.mark.parametrize("fault", ["missing", "unexpected", "wrong shape"])
def test_weights_that_do_not_fit_are_refused_by_name(tmp_path, fault):
    from safetensors.torch import load_file, save_file

    tiny_model().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.b_proj.weight"
    if fault == "missing":
        del weights[name]
    elif fault == "unexpected":
        weights[name.replace("b_proj", "c_proj")] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(1, 48)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((UserError, RuntimeError), match=r"[bc]_proj"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["format_version"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="format_version is 99"):
        DeltaNetConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mixer", "gated"),
        ("state_heads", "both"),
        ("beta_max", 3.0),
        ("layer_types", ["linear_attention"] * 3 + ["linear"]),
        ("layer_types", ["linear_attention"] * 3),
        ("num_key_value_heads", 4),
        ("num_key_value_heads", 0),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("max_position_embeddings", 0),
        ("sliding_window", -1),
        ("skip_taps", -1),
        ("local_window", -1),
        ("local_window", 3),
        ("hidden_act", "sillu"),
        ("rms_norm_eps", -1.0),
        ("rms_norm_eps", float("nan")),
        ("attention_dropout", 1.0),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 0.0}),
    ],
)
def test_a_configuration_out_of_range_names_its_field(field, value):
    with pytest.raises(UserError, match=field):
        tiny_config(**{field: value})


def test_a_local_window_needs_a_read_gate():
    with pytest.raises(UserError, match=r"local_window is 8, but config\.read_gate is off"):
        tiny_config(local_window=8, read_gate=False)


def test_a_value_of_a_wrong_type_in_a_file_is_a_user_error(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"mixer": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="'mixer': TypeError: Field 'mixer' expected str, got int") as error:
        load_student(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}: config: ")
    assert "\n" not in str(error.value)


def test_a_plain_copy_is_neutral():
    """Fresh mixers: gate 1, taps 0, bias 0, so the layer is W_o applied to what is read from the state."""
    model = DeltaNetForCausalLM(tiny_config("none"))
    mixer = model.model.layers[0].self_attn
    x = torch.randn(1, 6, 48)
    from deltanet.history import History

    z, v = torch.randn(1, 6, 6, 8), torch.randn(1, 6, 16)
    assert torch.equal(mixer.combine(x, z, History(v, 3)), z.flatten(2))
    assert mixer.o_proj.bias.abs().sum() == 0
    beta, g = mixer.strengths(x)
    assert torch.allclose(beta, torch.full_like(beta, 0.5))
    assert torch.allclose(g.exp() ** 16, torch.full_like(g, 0.5), atol=1e-5)


def test_shared_and_expanded_states_agree_when_the_group_writes_alike():
    """Expanded head h reads key/value head h // group: never a modulo, never rows."""
    shared, expanded = tiny_model("none", state_heads="shared"), tiny_model("none", state_heads="expanded")
    weights = shared.state_dict()
    for name in list(weights):
        if ".b_proj." in name or ".a_proj." in name:
            weights[name] = weights[name].repeat_interleave(3, dim=0)
    expanded.load_state_dict(weights)
    ids = tokens(2, 30)
    with torch.no_grad():
        assert (shared(ids).logits - expanded(ids).logits).abs().max() < 1e-5


@pytest.mark.slow
def test_compiled_equals_eager():
    model, ids = tiny_model(), tokens(2, 24)
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager")(ids, use_cache=False).logits
        assert (compiled - model(ids, use_cache=False).logits).abs().max() < 1e-5


def test_lora_trains_saves_loads_and_merges(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "b_proj"]
    ids = tokens(2, 20)
    adapted = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    adapted(input_ids=ids, labels=ids).loss.backward()
    trained = [n for n, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert all(any(target in name for name in trained) for target in targets)
    adapted.eval()
    logits = adapted(input_ids=ids).logits
    adapted.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path).eval()
    assert torch.allclose(reloaded(input_ids=ids).logits, logits, atol=1e-6)
    merged = reloaded.merge_and_unload()
    assert (merged(input_ids=ids).logits - logits).abs().max() < 1e-4
