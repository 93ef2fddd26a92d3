"""A teacher or a fresh student in memory, for calibration, distillation and measurement.

`load_teacher` reads any convertible checkpoint folder as our own decoder with every layer as the teacher has it;
`student_from_teacher` makes the neutral student of the same weights. Both carry out a plan (`plan.py`) in memory.
"""

from collections.abc import Callable
from pathlib import Path

import torch

from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet_errors import UserError

from .checkpoint import open_checkpoint
from .families import teacher_config
from .layouts import LINEAR
from .plan import make_plan, new_tensors, teacher_tensors

Get = Callable[[str], torch.Tensor]
"""A whole tensor by the model's own name for it."""


def load_teacher(
    folder: str | Path, dtype: torch.dtype | None = None, *, allow_pickle: bool = False
) -> DeltaNetForCausalLM:
    """The teacher in `folder` (safetensors and config.json of a supported family), in evaluation mode on the CPU.

    dtype None keeps the checkpoint's main dtype. Strict: raises UserError for a missing, extra or wrongly shaped
    tensor, one with NaN or Inf, an index that does not fit its shards, or a family that is not supported.
    """
    config, get, names = open_teacher(folder, allow_pickle=allow_pickle)
    dtype = dtype or config.dtype
    return _build(config, {name: _finite(get(name).to(dtype), f"{folder}: {name}") for name in names}, dtype)


def _finite(tensor: torch.Tensor, what: str) -> torch.Tensor:
    # A sum carries NaN and Inf and takes no memory; only where it does, or overflows, is every number looked at.
    if not tensor.sum().isfinite() and not tensor.isfinite().all():
        raise UserError(f"{what} holds {'NaN' if tensor.isnan().any() else 'Inf'}")
    return tensor


def open_teacher(folder: str | Path, *, allow_pickle: bool = False) -> tuple[DeltaNetConfig, Get, list[str]]:
    """The teacher in `folder` before it is read: its configuration, its tensors by our names, one at a time, and these
    names. As strict as `load_teacher`."""
    folder = Path(folder)
    checkpoint = open_checkpoint(folder, allow_pickle)
    plan = make_plan(checkpoint, teacher_config(folder))
    sources = {move.target: move.source for move in plan.moves}
    return plan.config, lambda name: checkpoint.load(sources[name]), list(sources)


def open_student(folder: str | Path) -> tuple[DeltaNetConfig, Get]:
    """The student in `folder` before it is read: its configuration, and its tensors by name, one at a time. Raises
    UserError where the folder's tensors are not those of its configuration."""
    config, checkpoint = DeltaNetConfig.from_pretrained(folder), open_checkpoint(Path(folder))
    shapes = {name: tuple(parameter.shape) for name, parameter in skeleton(config).named_parameters()}
    found = {name: checkpoint.entries[name].shape for name in checkpoint.entries}
    if wrong := sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name)):
        raise UserError(f"{folder}: the weights do not fit the configuration: {', '.join(wrong[:5])}")
    return config, checkpoint.load


def skeleton(config: DeltaNetConfig) -> DeltaNetForCausalLM:
    """The model with its parameters on `meta`, which take no memory, and its buffers (RoPE's) on the CPU."""
    with torch.device("meta"):
        model = DeltaNetForCausalLM(config)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def student_from_teacher(
    teacher: DeltaNetForCausalLM, config: DeltaNetConfig, *, share: bool = False
) -> DeltaNetForCausalLM:
    """The plain-copy student: the teacher's tensors under the same names, new tensors at their neutral values.

    `config` is the student's (`plan.student_config`). share=True shares the storage of the teacher's tensors, except
    the output projections of linear layers, which calibration refits; such a student must not be trained. Otherwise
    all are copies.
    Raises UserError where the two configurations do not describe the same tensors.
    """
    source = dict(teacher.state_dict())
    dtype = teacher.model.embed_tokens.weight.dtype
    weights = {}
    for name, shape in teacher_tensors(config).items():
        if name not in source or tuple(source[name].shape) != shape:
            raise UserError(f"the teacher has no {name} of shape {list(shape)}")
        weights[name] = source[name]
    linear = {index for index, kind in enumerate(config.layer_types) if kind == LINEAR}
    for name, tensor in weights.items():
        if not share or (".o_proj." in name and int(name.split(".")[2]) in linear):
            weights[name] = tensor.clone()
    for layer in sorted(linear):
        weights |= {move.target: move.value() for move in new_tensors(config, layer, dtype)}
    return _build(config, weights, dtype).to(teacher.device)


def _build(config: DeltaNetConfig, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> DeltaNetForCausalLM:
    """A model around these very tensors: nothing is initialised and then thrown away."""
    config.dtype = dtype
    model = skeleton(config)
    if config.tie_word_embeddings:
        weights = weights | {"lm_head.weight": weights["model.embed_tokens.weight"]}
    model.load_state_dict(weights, strict=True, assign=True)
    model.tie_weights()
    model.model.rotary_emb.to(weights["model.embed_tokens.weight"].device)
    return model.eval()
