"""Sets of parameters by name, their rates and which of them decay."""

import pytest
from small_pair import pair, stage

from deltanet_errors import UserError
from distill.trainable import decays, parameter_groups, trained_names

_, STUDENT = pair()
PARAMETERS = dict(STUDENT.named_parameters())


def names(*trainable):
    return trained_names(list(PARAMETERS), stage("distil", trainable=list(trainable)), STUDENT.config)


def test_sets_part_the_layers_by_kind():
    assert {name.split(".")[2] for name in names("mixers")} == {"0", "2"}
    assert {name.split(".")[2] for name in names("attention")} == {"1"}
    assert all(".self_attn." in name for name in names("mixers", "attention"))
    assert names("all") == list(PARAMETERS)


def test_patterns_name_parameters():
    assert names("model.layers.1.mlp.*") == [n for n in PARAMETERS if n.startswith("model.layers.1.mlp.")]
    assert names("*norm*", "mixers") == [n for n in PARAMETERS if "norm" in n or n in names("mixers")]


def test_a_set_that_names_nothing_is_refused_with_the_nearest_spelling():
    with pytest.raises(
        UserError, match=r"stages\.distil\.trainable: 'mixer' names no parameter.*did you mean 'mixers'"
    ):
        names("mixer")


def test_norms_biases_and_gates_do_not_decay():
    kept = {name for name, parameter in PARAMETERS.items() if decays(name, parameter)}
    assert not any(word in name for name in kept for word in ("norm", "bias", "b_proj", "a_proj", "read_", "skip_"))
    assert "model.layers.0.self_attn.q_proj.weight" in kept
    assert "model.layers.0.mlp.up_proj.weight" in kept


def test_groups_hold_every_parameter_once_with_its_own_rate():
    wanted = stage("distil", lr=1e-4, lr_groups={"mixers": 1e-3, "*.b_proj.*": 5e-3}, weight_decay=0.1)
    groups = parameter_groups(PARAMETERS, wanted, STUDENT.config)
    rate = {id(p): group["peak_lr"] for group in groups for p in group["params"]}
    assert len(rate) == sum(len(group["params"]) for group in groups) == len(PARAMETERS)
    assert rate[id(PARAMETERS["model.layers.0.self_attn.b_proj.bias"])] == 5e-3
    assert rate[id(PARAMETERS["model.layers.0.self_attn.q_proj.weight"])] == 1e-3
    assert rate[id(PARAMETERS["model.layers.1.self_attn.q_proj.weight"])] == 1e-4
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert all((decay[id(p)] > 0) == decays(name, p) for name, p in PARAMETERS.items())


def test_a_rate_for_parameters_that_are_not_trained_is_refused():
    mixers = {name: PARAMETERS[name] for name in names("mixers")}
    with pytest.raises(UserError, match="lr_groups: 'attention' names no parameter that the stage trains"):
        parameter_groups(mixers, stage("align", lr_groups={"attention": 1e-3}), STUDENT.config)
