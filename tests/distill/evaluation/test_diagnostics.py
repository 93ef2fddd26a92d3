"""Twin of distill/evaluation/diagnostics.py and its parts."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from convert.closeness import layer_errors, recall_by_distance, varied
from convert.loading import load_teacher
from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer
from deltanet.modeling import CACHE
from distill.evaluation import diagnostics as titles
from distill.evaluation.branches import (
    KINDS,
    LOCAL,
    MIXER,
    NONE,
    RISE,
    STATE,
    TAPS,
    branches,
    parts_of,
    switched_off,
)
from distill.evaluation.diagnostics import OFF, diagnose
from distill.evaluation.drift import drift
from distill.evaluation.same_logits import same_logits
from distill.evaluation.states import _look, states, truncated_context


@pytest.fixture(scope="module")
def ids():
    return torch.randint(3, 1000, (3, 64), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def changed(student):
    """A student of one's own, whose skip taps say something."""
    model = copy.deepcopy(student.model)
    with torch.no_grad():
        model.model.layers[0].self_attn.skip_proj.bias.normal_(generator=torch.Generator().manual_seed(0))
    return replace(student, model=model)


@torch.no_grad()
def loss(model, ids) -> float:
    return F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()


def test_a_sound_model_says_the_same_in_every_way(changed, teacher, ids):
    found = same_logits(changed, ids[0])
    assert set(found) == {"cached", "padded", "packed"}
    assert set(same_logits(teacher, ids[0])) == {"cached", "padded"}
    for rows in (found, same_logits(teacher, ids[0])):
        for figures in rows.values():
            assert figures["largest difference"] < 1e-4 * figures["largest logit"]  # float32 rounding


def _forgets_its_cache(monkeypatch):
    monkeypatch.setattr(DeltaMixer, "_store", staticmethod(lambda layer, kind, value: layer.lazy_initialization(
        **{kind: value}) if getattr(layer, kind)[0] is None else None))  # fmt: skip


def _reads_padding(monkeypatch):
    forward = DeltaMixer.forward
    monkeypatch.setattr(
        DeltaMixer,
        "forward",
        lambda self, x, position_embeddings=None, attention_mask=None, **rest: forward(
            self, x, position_embeddings, None, **rest
        ),
    )


def _reads_on_over_documents(monkeypatch):
    mix = DeltaMixer._mix
    monkeypatch.setattr(
        DeltaMixer,
        "_mix",
        lambda self, x, positions, cache, cu_seqlens: mix(
            self, x, positions, cache, cu_seqlens if x.shape[1] != 64 else None
        ),
    )


@pytest.mark.parametrize(
    ("fault", "way"),
    [(_forgets_its_cache, "cached"), (_reads_padding, "padded"), (_reads_on_over_documents, "packed")],
)
def test_a_fault_shows_in_its_way_alone(fault, way, changed, ids, monkeypatch):
    fault(monkeypatch)
    for name, figures in same_logits(changed, ids[0]).items():
        share = figures["largest difference"] / figures["largest logit"]
        assert share > 1e-2 if name == way else share < 1e-4


@pytest.mark.parametrize(("switch", "variant"), [(STATE, "skip_alone"), (TAPS, "state_alone"), (MIXER, "no_mixer")])
def test_switching_off_is_what_zero_parameters_do(switch, variant, changed, ids):
    rise = branches(changed, None, ids)[f"layer 0, {switch}"][RISE]
    whole = loss(changed.model, ids)
    with varied(changed.model, variant):
        expected = loss(changed.model, ids) - whole
    assert rise == pytest.approx(expected, abs=1e-5)  # float32 means of some 200 tokens
    assert abs(rise) > 1e-3


def test_a_local_window_is_switched_off(changed, ids):
    config = copy.deepcopy(changed.model.config)
    config.local_window, config.exact_start = 8, False
    torch.manual_seed(0)
    model = DeltaNetForCausalLM(config).eval()
    rise = branches(replace(changed, model=model), None, ids)[f"layer 0, {LOCAL}"][RISE]
    whole = loss(model, ids)
    with varied(model, "no_mixer"):  # of a plain copy, which reads nothing else
        assert rise == pytest.approx(loss(model, ids) - whole, abs=1e-5)
    assert abs(rise) > 1e-4


def test_layers_of_any_transformer_are_switched_off(teacher, ids):
    found = branches(teacher, None, ids)
    assert list(found) == ["none (student)", "layer 0, attention", "layer 1, attention"]
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
    assert found["layer 1, attention"][RISE] == pytest.approx(loss(model, ids) - loss(teacher.model, ids), abs=1e-5)
    again = branches(replace(teacher, model=model), None, ids)
    assert again["layer 1, attention"] == {RISE: 0.0}


def test_all_layers_go_off_together_only_where_there_are_several(changed, ids):
    layers = ["layer 0, state", "layer 0, skip taps", "layer 0, mixer", "layer 1, attention"]
    assert list(branches(changed, None, ids)) == ["none (student)", *layers]
    config = DeltaNetConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, skip_taps=0
    )
    torch.manual_seed(0)
    found = branches(replace(changed, model=DeltaNetForCausalLM(config).eval()), None, ids)
    assert list(found)[1:3] == ["all states", "all delta-rule mixers"]


def test_kinds_are_asked_of_all_delta_rule_layers_at_once_alone(changed, teacher, ids):
    kinds = branches(changed, None, ids, parts=KINDS)
    assert list(kinds) == ["none (student)", "all states", "all skip taps", "all delta-rule mixers"]
    layers = branches(changed, None, ids)  # which has one
    assert kinds["all states"] == layers["layer 0, state"]
    assert parts_of(teacher.model, KINDS) == parts_of(changed.model, NONE) == {}
    assert OFF not in diagnose(changed, teacher, ids, parts=NONE)


def test_recall_is_not_asked_of_one_linear_layer_among_others(changed, ids):
    config = copy.deepcopy(changed.model.config)
    config.layer_types = ["linear_attention", "linear_attention"]
    student = replace(changed, model=DeltaNetForCausalLM(config).eval())
    asked = [{"distance": 64, "student": 0.5, "first": {"student": 0.0}}]
    found = branches(student, None, ids, recalled=lambda model: asked)
    with_recall = [name for name, row in found.items() if "recall 64" in row]
    assert with_recall == ["none (student)", "all states", "all skip taps", "all delta-rule mixers"]


def test_the_teacher_stands_beside_by_its_loss_on_the_same_tokens(changed, teacher, ids):
    found = branches(changed, teacher, ids)
    assert list(found)[:2] == ["none (teacher)", "none (student)"]
    rise = loss(teacher.model, ids) - loss(changed.model, ids)
    assert found["none (teacher)"][RISE] == pytest.approx(rise, abs=1e-5)
    assert found["none (student)"] == {RISE: 0.0}


def test_recall_is_asked_of_every_model_and_part_while_it_is_off(changed, teacher, ids):
    def recalled(model):
        is_teacher = model is teacher.model
        mixer = model.model.layers[0].self_attn
        is_off = {"read": "read" in vars(mixer), "hooks": _count_hooks(model)}
        asked.append((is_teacher, is_off))
        return [{"distance": 64, "student": len(asked) / 10, "first": {"student": 0.0}}]

    asked = []
    found = branches(changed, teacher, ids, recalled=recalled)
    whole, state, hook = ({"read": read, "hooks": hooks} for read, hooks in ((False, 0), (True, 0), (False, 1)))
    assert asked == [(True, whole), (False, whole), (False, state), (False, hook), (False, hook), (False, hook)]
    assert [row["recall 64"] for row in found.values()] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert {row["first 64"] for row in found.values()} == {0.0}


def test_recall_with_a_part_off_is_that_of_a_model_without_it(changed, teacher):
    """By the probe of the recall section, where the mixer's parameters are zero; on what the student writes, so that
    one which was not trained guesses some of it."""
    starts = torch.tensor([[3], [40], [500], [600]])
    ids = changed.model.generate(starts, do_sample=False, min_length=128, max_length=128)
    found = diagnose(changed, teacher, ids, distances=[64, 128], seed=0)[titles.OFF]
    columns = ["recall 128", "first 128"]
    assert all(list(row) == [RISE, *columns] for row in found.values())
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0))

    def expected():
        options = {"most": 256, "tokens": titles.RECALL_TOKENS["cpu"], "distances": [128]}
        (row,) = recall_by_distance(teacher.model, changed.model, ids[order], **options)
        return row

    whole = expected()
    assert [found["none (teacher)"][name] for name in columns] == [whole["teacher"], whole["first"]["teacher"]]
    assert [found["none (student)"][name] for name in columns] == [whole["student"], whole["first"]["student"]]
    with varied(changed.model, "no_mixer"):
        off = expected()
    assert [found["layer 0, mixer"][name] for name in columns] == [off["student"], off["first"]["student"]]
    assert whole["student"] > off["student"]


@pytest.mark.parametrize(
    ("distances", "asked"), [([], []), ([64], [64]), ([64, 128], [128]), ([64, 128, 256, 512], [128, 512])]
)
def test_parts_are_asked_for_recall_at_128_and_at_the_longest_distance(distances, asked, student, monkeypatch):
    ids = torch.randint(3, 1000, (1, 512), generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(titles, "recall_by_distance", lambda teacher, model, held_out, **options: [
        {"distance": distance, "student": 0.0, "first": {"student": 0.0}} for distance in options["distances"]
        if 2 * distance <= options["most"] and distance <= held_out.shape[1]])  # fmt: skip
    monkeypatch.setattr(titles, "truncated_context", lambda models, ids: {})
    found = diagnose(student, None, ids, distances=distances)[titles.OFF]
    wanted = [f"{kind} {distance}" for distance in asked for kind in ("recall", "first")]
    assert all(list(row) == [RISE, *wanted] for row in found.values())


@pytest.mark.parametrize("switch", [STATE, TAPS, MIXER])
def test_what_was_switched_off_is_back_even_after_an_error(switch, changed, ids):
    with torch.no_grad():
        before = changed.model(ids).logits
    mixer = changed.model.model.layers[0].self_attn
    with pytest.raises(RuntimeError, match="broken"), switched_off(mixer, switch):
        raise RuntimeError("broken")
    with torch.no_grad():
        assert torch.equal(changed.model(ids).logits, before)


def test_states_are_those_of_the_cache(changed, ids):
    row = states(changed, ids)["layer 0"]
    norms = []
    for window in ids:
        with torch.no_grad():
            cache = changed.model(window[None], use_cache=True)[CACHE]
        norms.append(cache.layers[0].recurrent_states[0].norm(dim=(2, 3)).mean())
    assert row["state norm"] == pytest.approx(torch.stack(norms).mean().item(), rel=1e-4)
    assert row["half-life"] == pytest.approx(16, rel=1e-3)  # a plain copy
    assert row["write strength"] == pytest.approx(0.5, rel=1e-3)
    assert row["growth"] > 1


@pytest.mark.parametrize("window", [24, 40, 63, 64, 100])
@pytest.mark.parametrize("options", [{}, {"mixer": "delta", "state_positions": "fixed", "feature_map": "linear"}])
@torch.no_grad()
def test_with_a_window_states_hold_what_has_left_it(ids, changed, window, options):
    sizes = {"vocab_size": 1024, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    config = DeltaNetConfig(num_hidden_layers=1, local_window=window, **sizes, **options)
    model = DeltaNetForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "_map" in name:
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    row = states(replace(changed, model=model), ids)["layer 0"]
    held = model(ids, use_cache=True)[CACHE].layers[0].recurrent_states[0]
    assert row["state norm"] == pytest.approx(held.norm(dim=(2, 3)).mean().item(), rel=1e-4)
    assert (row["state norm"] > 0) == (window < 64)
    assert 0 <= row["growth"] < 100
    assert abs(row["key cosine"]) <= 1


def test_equal_keys_have_cosine_one_and_opposite_ones_minus_one(changed):
    mixer = changed.model.model.layers[0].self_attn
    x = torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))
    for inputs, cosine in ((x.expand(1, 6, 32), 1.0), (torch.cat([x, -x], 1), -1.0)):
        with torch.no_grad():
            found = _look(mixer, inputs, None)["cosine"]
        torch.testing.assert_close(found, torch.full_like(found, cosine), rtol=0, atol=1e-5)


def test_without_decay_there_is_no_half_life(changed, ids):
    config = DeltaNetConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, mixer="delta"
    )
    row = states(replace(changed, model=DeltaNetForCausalLM(config).eval()), ids)["layer 0"]
    assert set(row) == {"state norm", "growth", "write strength", "key cosine"}


def test_a_truncated_context_is_the_text_cut_there(teacher, ids):
    found = truncated_context({"student": teacher}, ids)
    assert list(found) == ["8 to 15 tokens", "16 to 31 tokens", "32 to 63 tokens"]
    for row, context in zip(found.values(), (8, 16, 32)):
        losses = []
        for window in ids:
            for start in range(32, 64, context):  # the last 32 tokens are scored
                with torch.no_grad():
                    logits = teacher.model(window[None, start - context : start + context]).logits[0]
                losses.append(F.cross_entropy(logits[context - 1 : -1], window[start : start + context]))
        assert row["student"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


def test_a_model_that_looks_at_one_token_has_no_use_for_context(teacher, ids):
    model = copy.deepcopy(teacher.model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    found = [row["student"] for row in truncated_context({"student": replace(teacher, model=model)}, ids).values()]
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)


def test_layers_are_as_far_from_the_teacher_as_closeness_says(student, teacher, folders, ids):
    forced, apart = drift(student, teacher, ids)
    (expected,) = layer_errors(load_teacher(folders[0]), student.model, ids)
    assert forced["layer 0"] == pytest.approx(
        {
            "cosine": expected["cosine"],
            "relative error": expected["relative_error"],
            "error / residual stream": expected["residual_error"],
        },
        rel=1e-4,
    )
    with torch.no_grad():
        mine, theirs = (one.model(ids, output_hidden_states=True).hidden_states for one in (student, teacher))
    error = (mine[1] - theirs[1]).norm() / theirs[1].norm()  # the last is normed already, the first is the embedding
    assert apart["layer 0"]["relative error"] == pytest.approx(error.item(), rel=1e-4)


def test_a_teacher_is_no_way_from_itself(teacher, ids):
    forced, apart = drift(teacher, teacher, ids)
    assert forced == {}
    assert [row["relative error"] for row in apart.values()] == [0.0, 0.0]


def test_a_student_gets_every_table_and_json_takes_them(student, teacher, ids):
    found = diagnose(student, teacher, ids, seed=0)
    assert list(found) == [titles.SAME, titles.OFF, titles.STATES, titles.CONTEXT, titles.FORCED, titles.APART]
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    figures = [value for rows in found.values() for row in rows.values() for value in row.values()]
    assert all(isinstance(value, float) and math.isfinite(value) for value in figures)
    assert found == diagnose(student, teacher, ids, seed=0)
    assert {who for row in found[titles.CONTEXT].values() for who in row} == {"student", "teacher"}


def test_a_plain_transformer_gets_what_applies(teacher, ids):
    assert list(diagnose(teacher, None, ids)) == [titles.SAME, titles.OFF, titles.CONTEXT]


def test_a_teacher_of_another_depth_adds_its_loss_only(student, teacher, ids):
    config = copy.deepcopy(teacher.model.config)
    config.num_hidden_layers, config.layer_types = 1, None
    other = replace(teacher, model=type(teacher.model)(config).eval())
    assert list(diagnose(student, other, ids)) == [titles.SAME, titles.OFF, titles.STATES, titles.CONTEXT]


@pytest.mark.parametrize("length", [2, 7, 8, 15, 16])
def test_a_short_text_gives_fewer_tables(length, student, teacher, ids):
    found = diagnose(student, teacher, ids[:, :length])
    assert (titles.SAME in found) == (length >= 8)
    assert (titles.CONTEXT in found) == (length >= 16)
    assert {titles.OFF, titles.STATES, titles.FORCED, titles.APART} <= set(found)


def test_the_model_is_as_it_was(changed, teacher, ids):
    before = {name: tensor.clone() for name, tensor in changed.model.state_dict().items()}
    with torch.no_grad():
        logits = changed.model(ids).logits
    hooks = _count_hooks(changed.model), _count_hooks(teacher.model)
    diagnose(changed, teacher, ids)
    with torch.no_grad():
        assert torch.equal(changed.model(ids).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in changed.model.state_dict().items())
    assert (_count_hooks(changed.model), _count_hooks(teacher.model)) == hooks


def _count_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
