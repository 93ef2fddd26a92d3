"""How far the student's layers are from the teacher's, each on the teacher's own input, and where the streams part.

Both models run once over the text; hooks see what goes into the teacher's layers and what its attention makes of it.
"""

from functools import partial

import torch
from torch import nn

from convert.closeness import OutputError
from deltanet.mixer import DeltaMixer

from .branches import layers_of
from .subject import Subject

Rows = dict[str, dict[str, float]]


def comparable(student: Subject, teacher: Subject) -> bool:
    """Whether the two have the same number of layers, as wide as each other."""
    mine, theirs = (one.model.config.get_text_config() for one in (student, teacher))
    same = (mine.num_hidden_layers, mine.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
    return same and bool(layers_of(student.model)) and bool(layers_of(teacher.model))


@torch.no_grad()
def drift(student: Subject, teacher: Subject, ids: torch.Tensor) -> tuple[Rows, Rows]:
    """ids (N, T) -> of every delta-rule layer the figures of `OutputError`, given the teacher's own stream as input,
    and of every layer how far the stream behind it is from the teacher's: cosine and relative error."""
    layers = layers_of(student.model)
    forced = {i: OutputError() for i, layer in enumerate(layers) if isinstance(layer.self_attn, DeltaMixer)}
    apart = [OutputError() for _ in layers]
    for window in ids:
        streams, made = _streams(teacher, window)
        mine, _ = _streams(student, window)
        for i, error in enumerate(apart):
            theirs = streams[i + 1].to(student.device)
            error.add(mine[i + 1].float(), theirs.float(), torch.zeros_like(theirs, dtype=torch.float32))
        for i, error in forced.items():
            residual = streams[i].to(student.device)
            out = _mix(student, i, residual.to(student.dtype))
            error.add(out.float(), made[i].to(student.device).float(), residual.float())
    names = {"cosine": "cosine", "relative_error": "relative error", "residual_error": "error / residual stream"}
    alone = {f"layer {i}": {names[key]: value for key, value in e.figures().items()} for i, e in forced.items()}
    behind = {}
    for i, error in enumerate(apart):
        figures = error.figures()
        behind[f"layer {i}"] = {names[key]: figures[key] for key in ("cosine", "relative_error")}
    return alone, behind


def _streams(subject: Subject, window: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The residual stream before the first layer and after every one, and every attention's output, each (1, T, D)."""
    streams: list[torch.Tensor] = []
    made: list[torch.Tensor] = []
    layers = layers_of(subject.model)
    handles = [layers[0].register_forward_pre_hook(partial(_keep_input, streams), with_kwargs=True)]
    for layer in layers:
        handles.append(layer.register_forward_hook(partial(_keep_output, streams)))
        handles.append(layer.self_attn.register_forward_hook(partial(_keep_output, made)))
    try:
        subject.model(window[None].to(subject.device), use_cache=False, logits_to_keep=1)
    finally:
        for handle in handles:
            handle.remove()
    return streams, made


def _keep_input(kept: list, module: nn.Module, inputs: tuple, options: dict) -> None:
    kept.append(inputs[0] if inputs else options["hidden_states"])


def _keep_output(kept: list, module: nn.Module, inputs: tuple, output) -> None:
    kept.append(output if isinstance(output, torch.Tensor) else output[0])


def _mix(student: Subject, layer: int, residual: torch.Tensor) -> torch.Tensor:
    """What the student's layer makes of a residual stream (1, T, D) by its mixer."""
    decoder = student.model.get_decoder()
    block, rotated = decoder.layers[layer], student.model.config.rope_layers
    positions = torch.arange(residual.shape[1], device=residual.device)[None]
    rotation = decoder.rotary_emb(residual, position_ids=positions) if rotated is None or rotated[layer] else None
    return block.self_attn(block.input_layernorm(residual), position_embeddings=rotation)[0]
