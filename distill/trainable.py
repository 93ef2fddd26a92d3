"""Which parameters a stage trains, at which rate, and which of them decay.

Sets by name: `mixers` (every linear layer's mixer), `attention` (every kept softmax layer's), `all`; anything else is a
pattern of parameter names (`model.layers.3.*`). Weight decay never touches norms, biases, convolutions and gates.
Twin: tests/distill/test_trainable.py.
"""

import fnmatch
import re
from collections.abc import Iterable

import torch
from torch import nn

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet_errors import UserError, nearest

from . import lora
from .schema import Stage

SETS = ("mixers", "attention", "all")
GATES = ("b_proj", "a_proj", "read_proj", "skip_proj", "local_proj", "g_proj")


def in_set(name: str, which: str, config: DeltaNetConfig) -> bool:
    """Whether the student's parameter `name` belongs to the set or pattern `which`."""
    if which == "all":
        return True
    if which in ("mixers", "attention"):
        layer = re.match(r"model\.layers\.(\d+)\.self_attn\.", name)
        linear = layer is not None and config.layer_types[int(layer[1])] == "linear_attention"
        return layer is not None and linear == (which == "mixers")
    return fnmatch.fnmatchcase(name, which)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay may act on it: matrices do, gates and everything of one dimension do not."""
    parts = name.split(".")
    is_gate = any(part in GATES for part in parts)
    is_small = any("norm" in part or part.endswith("_conv") for part in parts) or parts[-1] == "bias"
    return not (is_gate or is_small)


def trained_names(names: list[str], stage: Stage, config: DeltaNetConfig) -> list[str]:
    """Those of the student's parameter `names` that the stage trains; raises UserError for a set that names none, and
    for what a stage of its kind cannot train."""
    where = f"stages.{stage.name}.trainable"
    for which in stage.trainable:
        if not any(in_set(name, which, config) for name in names):
            raise UserError(
                f"{where}: {which!r} names no parameter of the student; allowed: "
                f"{', '.join(SETS)} or a pattern such as model.layers.0.*{nearest(which, list(SETS))}"
            )
    trained = [name for name in names if any(in_set(name, which, config) for which in stage.trainable)]
    if stage.kind == "align":
        for name in trained:
            if not in_set(name, "mixers", config):
                raise UserError(f"{where}: an align stage cannot train {name}; allowed: mixers")
    return trained


def check_stage(stage: Stage, config: DeltaNetConfig) -> list[str]:
    """The names of what the stage trains of a student of this configuration. Raises UserError, before anything is
    trained, for everything that the stage would refuse as it starts: `trainable`, `lora.targets` and `lr_groups`."""
    parameters = parameters_of(config)
    names = trained_names(list(parameters), stage, config)
    if stage.lora:
        lora.check_targets(parameters, stage)
    matrices = lora.adapted(names, stage) if stage.lora else set()
    trained = [*(name for name in names if name not in matrices), *lora.adapter_names(matrices)]
    _check_groups(trained, stage, config)
    return names


def parameters_of(config: DeltaNetConfig) -> dict[str, nn.Parameter]:
    """The parameters of a student, by name, without memory for them."""
    with torch.device("meta"):
        return dict(DeltaNetForCausalLM(config).named_parameters())


def parameter_groups(parameters: dict[str, nn.Parameter], stage: Stage, config: DeltaNetConfig) -> list[dict]:
    """The optimizer's groups of these trained parameters: `params`, `lr` (and `peak_lr`, which stays), `weight_decay`,
    `name`. Of several entries in `lr_groups` that fit a parameter, the last one counts."""
    groups: dict[tuple, dict] = {}
    for name, parameter in parameters.items():
        label, lr = "rest", stage.lr
        for which, rate in stage.lr_groups.items():
            if in_set(name, which, config):
                label, lr = which, rate
        decay = stage.weight_decay if decays(name, parameter) else 0.0
        group = groups.setdefault(
            (label, lr, decay),
            {"params": [], "lr": lr, "peak_lr": lr, "weight_decay": decay, "name": label},
        )
        group["params"].append(parameter)
    _check_groups(parameters, stage, config)
    return list(groups.values())


def _check_groups(names: Iterable[str], stage: Stage, config: DeltaNetConfig) -> None:
    for which in stage.lr_groups:
        if not any(in_set(name, which, config) for name in names):
            raise UserError(
                f"stages.{stage.name}.lr_groups: {which!r} names no parameter that the stage trains"
                f"{nearest(which, list(SETS))}"
            )
