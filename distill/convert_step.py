"""More layers of a student that is being distilled become linear, between two stages (arXiv 2408.15237, section 4).

Converting 25, then 50, then 75 % of the layers with a stage after each step lets every step start from a student that
works. Layers that are linear already keep their bytes, as does everything else; the newly linear ones keep the
student's projections, get the mixer's new tensors, and are calibrated towards the teacher's attention in closed form,
each in a teacher of which they are the only linear layers. Twin: tests/distill/test_convert_step.py.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from convert.calibrate import calibrate
from convert.layouts import FULL, LINEAR, Layout, parse_layout
from convert.loading import student_from_teacher
from convert.plan import student_config
from convert.staging import Staging
from deltanet import DeltaNetConfig, DeltaNetForCausalLM, load_student
from deltanet_errors import UserError

from .data import Corpus
from .schema import Stage

_MIXER = ("mixer", "state_heads", "state_positions", "feature_map", "beta_max", "skip_taps", "local_window",
          "read_gate", "mixer_bias", "conv_kernel", "qkv_activation", "linear_qk_norm", "beta_bias", "output_gate",
          "gate_activation", "head_norm", "exact_start")  # fmt: skip


def config_after(stage: Stage, config: DeltaNetConfig) -> DeltaNetConfig:
    """The student's configuration after the stage, which was `config` before; the same for every other kind.

    Raises UserError for a layout that gives a linear layer its attention back, that changes an attention layer, or
    that makes no layer linear.
    """
    if stage.kind != "convert_step":
        return config
    where, before = f"stages.{stage.name}.hybrid: {stage.hybrid}", config.layer_types
    plain = parse_layout(stage.hybrid, [FULL] * len(before), option=f"stages.{stage.name}.hybrid").layer_types
    if not set(plain) <= {LINEAR, FULL}:
        raise UserError(f"{where} makes sliding layers, which no step can; say the layers that keep attention")
    back = [index for index, kind in enumerate(plain) if kind == FULL and before[index] == LINEAR]
    if back:
        raise UserError(f"{where} keeps attention in layer {back[0]}, which is linear by then")
    types = tuple(LINEAR if kind == LINEAR else before[index] for index, kind in enumerate(plain))
    if list(types) == list(before):
        raise UserError(f"{where} makes no layer linear that is not so already")
    turned = [rotated for rotated, kind in zip(config.rope_layers or (), before) if kind == LINEAR]
    linear_rope = any(turned) or not turned
    return student_config(
        config, Layout(types, config.sliding_window), linear_rope=linear_rope, exact_start=config.exact_start
    )


def windows(corpus: Corpus, num_tokens: int) -> torch.Tensor:
    """About num_tokens of the stage's text as windows (N, T) int64, the first sequences of its order end to end,
    without padding. T is the stage's sequence length, or less where there is less text."""
    parts, found = [], 0
    for index in range(len(corpus)):
        sequence = corpus[index]
        parts.append(torch.from_numpy(sequence.input_ids[: sequence.num_tokens]))
        found += sequence.num_tokens
        if found >= num_tokens:
            break
    text = torch.cat(parts)
    length = min(corpus.seq_len, len(text))
    return text[: len(text) // length * length].view(-1, length)


@torch.no_grad()
def convert_more(start: Path, out: Path, teacher: DeltaNetForCausalLM, stage: Stage, tokens: torch.Tensor) -> list[int]:
    """Writes the student in `start` after the stage to the folder `out`, in float32; returns the new linear layers.

    teacher has attention in every layer, float32; tokens (N, T) int64 are what the new layers are fitted on.
    """
    student = load_student(start, dtype=torch.float32)
    config = config_after(stage, student.config)
    pairs = enumerate(zip(student.config.layer_types, config.layer_types))
    new = [index for index, (before, after) in pairs if before != after]
    replaced = tuple(f"model.layers.{index}.self_attn." for index in new)
    weights = {
        name: tensor
        for name, tensor in student.state_dict().items()
        if not _is_tied(name, config) and not name.startswith(replaced)
    }
    for name, tensor in _calibrated(student, teacher, config, new, tokens):
        weights[name] = tensor
    config.dtype = torch.float32
    with Staging(out, overwrite=True) as staging:
        weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
        save_file(weights, staging.folder / "model.safetensors", metadata={"format": "pt"})
        (staging.folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        load_student(staging.folder)
        staging.commit()
    return new


def _is_tied(name: str, config: DeltaNetConfig) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def _calibrated(student, teacher, config, new: list[int], tokens) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, value) of every tensor of the new linear layers' mixers."""
    types = tuple(LINEAR if index in new else kind for index, kind in enumerate(teacher.config.layer_types))
    mixer = {name: getattr(config, name) for name in _MIXER}
    turned = teacher.config.rope_layers or [True] * len(types)
    ours = config.rope_layers or [True] * len(types)
    mixer["rope_layers"] = [ours[index] if index in new else turned[index] for index in range(len(types))]
    between = student_config(teacher.config, Layout(types, teacher.config.sliding_window), **mixer)
    fitted = student_from_teacher(teacher, between, share=True)
    for index in new:
        block, own = fitted.model.layers[index], student.model.layers[index]
        # Assigned, not copied into: `fitted` shares its tensors with the teacher.
        trained = own.self_attn.state_dict()
        state = {
            name: trained.get(name, tensor).to(teacher.device, copy=True)
            for name, tensor in block.self_attn.state_dict().items()
        }
        block.self_attn.load_state_dict(state, assign=True)
        norm = own.input_layernorm.weight.to(teacher.device, copy=True)
        block.input_layernorm.weight = torch.nn.Parameter(norm, requires_grad=False)
    calibrate(teacher, fitted, tokens.to(teacher.device))
    for index in new:
        for name, tensor in fitted.model.layers[index].self_attn.state_dict().items():
            yield f"model.layers.{index}.self_attn.{name}", tensor


class Untrained:
    """Stands for the engine of a stage without any: there is nothing that it holds."""

    @staticmethod
    def full_tensors(key: str | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(())
