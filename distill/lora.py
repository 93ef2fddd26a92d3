"""Low-rank adapters (peft) in place of training whole matrices: W + scale B A, with W frozen; merged when a stage ends.

RADLADS (arXiv 2505.03005) found it worse than training everything when attention is converted, so it is off unless a
stage says `lora:`. Of the stage's trainable set, matrices of the `targets` get an adapter, the rest
(gates, norms, biases) trains as it is. A commit in the middle of a stage keeps W and the adapter apart, so resuming is
exact. Twin: tests/distill/test_lora.py.
"""

from collections.abc import Callable, Iterable, Iterator

import torch

from deltanet import DeltaNetForCausalLM
from deltanet_errors import UserError, nearest

from .schema import Stage

_BASE, _A, _B = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def is_adapter(name: str) -> bool:
    return name.endswith((_A, _B))


def plain_name(name: str) -> str:
    """The student's own name of a parameter of the adapted model."""
    return name.replace(_BASE, ".")


def scale_of(stage: Stage) -> float:
    return stage.lora.alpha / stage.lora.rank


def _matrix(name: str) -> str | None:
    """What `lora.targets` calls the matrix of a layer with this parameter name; None for anything else. Embedding and
    head are none: the one is looked up, of the other the loss reads the weights alone."""
    return name.split(".")[-2] if name.endswith("_proj.weight") else None


def check_targets(names: Iterable[str], stage: Stage) -> None:
    """Raises UserError for a target that no layer of a student of these parameters has, for what it meant would be
    trained whole."""
    known = sorted({_matrix(name) for name in names} - {None})
    for target in stage.lora.targets:
        if target not in known:
            raise UserError(
                f"stages.{stage.name}.lora.targets: {target!r} is no matrix of a layer{nearest(target, known)}; "
                f"allowed: {', '.join(known)}"
            )


def adapted(names: Iterable[str], stage: Stage) -> set[str]:
    """Those of the trained parameters that get an adapter. Raises UserError where there is none."""
    found = {name for name in names if _matrix(name) in stage.lora.targets}
    if not found:
        raise UserError(
            f"stages.{stage.name}.lora.targets: none of {', '.join(stage.lora.targets)} is a matrix the stage trains"
        )
    return found


def adapter_names(matrices: Iterable[str]) -> list[str]:
    """The names of the adapters that stand for these matrices."""
    return [name.removesuffix(".weight") + half for name in matrices for half in (_A, _B)]


def adapt(student: DeltaNetForCausalLM, names: set[str], stage: Stage, seed: int) -> None:
    """Puts adapters on the matrices `names`, equal on every rank; B starts at zero, so nothing changes at first.
    Which other parameters require a gradient stays as it is."""
    import peft

    before = {name: parameter.requires_grad for name, parameter in student.named_parameters()}
    modules = [name.removesuffix(".weight") for name in sorted(names)]
    options = peft.LoraConfig(r=stage.lora.rank, lora_alpha=stage.lora.alpha, target_modules=modules, lora_dropout=0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(options, student)
    for name, parameter in student.named_parameters():
        plain = plain_name(name)
        parameter.requires_grad_(is_adapter(name) or (before[plain] and plain not in names))


def load_adapters(student: DeltaNetForCausalLM, get: Callable[[str], torch.Tensor]) -> None:
    """Sets the adapters from a commit."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if is_adapter(name):
                parameter.copy_(get(name))


def merged(tensors: Iterable[tuple[str, torch.Tensor]], scale: float) -> Iterator[tuple[str, torch.Tensor]]:
    """The student's own tensors with every adapter added in, from those of the adapted student in their order."""
    waiting: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        if name.endswith(_BASE + "weight"):
            waiting[plain_name(name)] = tensor
        elif name.endswith(_A):
            waiting[name] = tensor
        elif name.endswith(_B):
            module = name.removesuffix(_B)
            base, a = waiting.pop(f"{module}.weight"), waiting.pop(module + _A)
            yield f"{module}.weight", (base.float() + scale * (tensor.float() @ a.float())).to(torch.float32)
        else:
            yield plain_name(name), tensor
    assert not waiting, "an adapter without its other half"


def unmerged(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The student's own tensors without the adapters."""
    return ((plain_name(name), tensor) for name, tensor in tensors if not is_adapter(name))
