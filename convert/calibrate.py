"""Closed-form calibration: makes a freshly converted student close to its teacher without a gradient step.

For every linear layer in turn, from a few thousand tokens of text:
  1. half-life, write strength and its dependence on the input, per state head   (calibration/strengths.py)
  2. read gate, skip taps and local gate, linear in the input, towards the teacher's context (calibration/gates.py)
  3. the output projection and its bias, towards the teacher's attention output   (calibration/output.py)
then both models' hidden states move on to the next layer. Nothing of a layer is kept for all tokens except its
output, its input and S (S + 1) products per head. What it gives: docs/results/calibration.md.
"""

import hashlib
import io
import json
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from deltanet import DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer
from deltanet_errors import DeltanetError, UserError, one_line

from .calibration import OutputFit, Settings, SourceProducts, Stream, fit_gates, fit_strengths, head_metric
from .calibration.strengths import beside_state, constant_direction

LINEAR = "linear_attention"
SILU_IS_ONE = 1.278465
"""Where SiLU is one."""


@torch.no_grad()
def calibrate(
    teacher: DeltaNetForCausalLM,
    student: DeltaNetForCausalLM,
    tokens: torch.Tensor,
    settings: Settings | None = None,
    *,
    folder: str | Path | None = None,
    advance: Callable[[float], None] | None = None,
) -> dict:
    """Fits the new tensors of the student's linear layers in place, and their output projections where there is no
    local window (`Settings.refit_output`); returns a report.

    teacher has attention in every layer; student has the same weights and neutral linear layers; both float32 on one
    device. tokens (N, T) int64 are windows of text. Without `settings` the device decides how wide the search is.
    With `folder`, every finished layer is kept there and a later call with the same models, tokens and settings goes
    on behind it, with the same bits. `advance(1)` is called per layer.
    The report: `seconds`, and `layers` with `layer`, `explained` (share of the teacher's output the layer reproduces on
    the stream it was fitted on), `half_life` and `beta` per state head. Raises UserError where the models do not fit.
    """
    _check(teacher, student, tokens)
    settings = settings or Settings.for_device(teacher.device)
    if settings.sequential is None:
        settings = replace(settings, sequential=set(student.config.layer_types) != {LINEAR})
    if settings.refit_output is None:
        settings = replace(settings, refit_output=not student.config.local_window)
    _own_outputs(teacher, student)
    start = time.monotonic()
    tokens = tokens.to(teacher.device)
    store = _Store(Path(folder), _fingerprint(teacher, student, tokens, settings)) if folder is not None else None
    attention = Stream(teacher, tokens, settings.batch)
    own = Stream(student, tokens, settings.batch) if settings.sequential else None
    layers = []
    stream = own or attention
    for layer, kind in enumerate(student.config.layer_types):
        block, report = student.model.layers[layer], None
        outputs = torch.empty_like(attention.hidden)
        if kind == LINEAR:
            report = store.load(layer, student) if store else None
        is_new = kind == LINEAR and report is None
        if is_new:
            try:
                report = _fit_layer(layer, attention, own, block, outputs, settings)
            except torch.linalg.LinAlgError as error:
                raise UserError(
                    f"calibration: layer {layer} cannot be fitted to this text: {one_line(error)}"
                ) from None
        else:
            for rows in attention.rows():
                outputs[rows] = attention.mix(layer, attention.mixer_input(layer, rows))[1]
        error = outputs.new_zeros((), dtype=torch.float64)
        for rows in attention.rows():
            if kind == LINEAR or own is not None:
                mixed = stream.mix(layer, stream.mixer_input(layer, rows), block)[1]
                error += (mixed - outputs[rows]).double().square().sum()
            if own is not None:
                own.advance(layer, rows, mixed)
            attention.advance(layer, rows, outputs[rows])
        if kind == LINEAR:
            report["explained"] = 1 - (error / outputs.double().square().sum().clamp(min=1e-30)).item()
            layers.append(report)
            if store and is_new:
                store.save(layer, student, report)
        if advance is not None:
            advance(1)
    return {
        "tokens": tokens.numel(),
        "settings": asdict(settings),
        "layers": layers,
        "seconds": round(time.monotonic() - start, 3),
    }


def _fit_layer(layer, attention, own, block, outputs, settings) -> dict:
    """Fits the mixer of the student's `block` and fills `outputs` (N, T, D) with what the teacher's makes."""
    mixer: DeltaMixer = block.self_attn
    config = mixer.config
    heads = (config.num_attention_heads, config.head_dim)
    stream = own or attention
    rotation = stream.rotation(layer, config)
    metric = head_metric(mixer.o_proj.weight, config.num_attention_heads)
    if config.output_gate and config.gate_activation == "silu":
        picked = stream.mixer_input(layer, next(iter(attention.rows())))
        mixer.g_proj.weight.copy_(SILU_IS_ONE * constant_direction(picked).expand_as(mixer.g_proj.weight))
    found = _search(layer, attention, own, mixer, metric, settings)
    first = int(config.exact_start)  # of a window's first token nothing is left to fit

    products, inputs = SourceProducts(metric), []
    for rows in attention.rows():
        context, outputs[rows] = attention.mix(layer, attention.mixer_input(layer, rows))
        x = stream.mixer_input(layer, rows)
        sources, target = _sources(mixer, x, rotation, context.unflatten(-1, heads))
        products.add([source[:, first:] for source in sources], target[:, first:])
        inputs.append(x[:, first:].flatten(0, 1))
    pairs, targets = products.take()
    depends = settings.data_dependent and (config.read_gate or config.skip_taps > 0)
    weight, bias = fit_gates(torch.cat(inputs), pairs, targets, settings.gate_ridge, data_dependent=depends)
    _set_gates(mixer, weight, bias)
    del pairs, targets, inputs

    if settings.refit_output:
        fit = OutputFit(mixer.o_proj)
        for rows in attention.rows():
            features, _ = stream.mix(layer, stream.mixer_input(layer, rows), block)
            wanted = outputs[rows]
            if own is not None and settings.catch_up:
                wanted = wanted + settings.catch_up * (attention.hidden[rows] - own.hidden[rows])
            fit.add(features, wanted)
            if config.exact_start:
                fit.add(features[:, :1], wanted[:, :1], weight=settings.start_weight)
        fit.solve(settings.output_ridge)

    return {"layer": layer, "half_life": found.half_life, "beta": found.beta}


def _search(layer, attention, own, mixer, metric, settings):
    """Step 1 on windows spread evenly over the text, so that every source of it is seen."""
    count = min(settings.search_windows, len(attention.hidden))
    picked = torch.linspace(0, len(attention.hidden) - 1, count, device=attention.hidden.device).round().long()
    length = min(settings.search_length, attention.hidden.shape[1])
    # The attention is causal, so the first tokens of a window do not depend on how many follow.
    context = torch.cat([attention.mix(layer, attention.mixer_input(layer, rows))[0] for rows in _chunks(picked)])
    context = context[:, :length].unflatten(-1, (mixer.num_heads, mixer.head_dim))
    teacher_x = attention.mixer_input(layer, picked)[:, :length]
    x = teacher_x if own is None else own.mixer_input(layer, picked)[:, :length]
    teacher = attention.model.layers[layer].self_attn
    own_rotation, rotation = (
        found and tuple(part[:, :length] for part in found)
        for found in (attention.rotation(layer, config) for config in (mixer.config, teacher.config))
    )
    of_teacher = (teacher_x, teacher.sliding_window, teacher, rotation)
    return fit_strengths(mixer, x, own_rotation, context, metric, settings, *of_teacher)


def _chunks(picked: torch.Tensor, size: int = 4):
    return (picked[start : start + size] for start in range(0, len(picked), size))


def _sources(mixer: DeltaMixer, x, rotation, context) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The sources whose coefficients are free, each (n, T, HQ, d), and what they are to make."""
    q, k, v, _ = mixer.project(x, rotation)
    z = mixer.read_texts(q, k, v, *mixer.strengths(x), rotation)
    if not mixer.config.read_gate and not mixer.config.skip_taps:
        return [mixer.combine(x, z, None).unflatten(-1, z.shape[2:])], context
    beside = beside_state(mixer, q, k, v)
    return ([z, *beside], context) if mixer.config.read_gate or not beside else (beside, context - z)


def _set_gates(mixer: DeltaMixer, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Writes coefficients (H, S, D) and (H, S) into read_proj (source 0, where there is one), skip_proj and local_proj.

    A mixer with neither takes the scale of what it reads into its output projection.
    """
    first = 0
    if not mixer.config.read_gate and not mixer.config.skip_taps:
        mixer.o_proj.weight.mul_(bias[:, 0].repeat_interleave(mixer.head_dim))
    if mixer.config.read_gate:
        mixer.read_proj.weight.copy_(weight[:, 0])
        mixer.read_proj.bias.copy_(bias[:, 0])
        first = 1
    last = first + mixer.config.skip_taps
    if mixer.config.skip_taps:
        mixer.skip_proj.weight.copy_(weight[:, first:last].flatten(0, 1))
        mixer.skip_proj.bias.copy_(bias[:, first:last].flatten())
    if mixer.config.local_window:
        mixer.local_proj.weight.copy_(weight[:, last])
        mixer.local_proj.bias.copy_(bias[:, last])


def _own_outputs(teacher, student) -> None:
    """A student may share its teacher's tensors to save memory; what is fitted must not be shared."""
    for block, original in zip(student.model.layers, teacher.model.layers):
        shared = original.self_attn.o_proj.weight
        if block.layer_type == LINEAR and block.self_attn.o_proj.weight.data_ptr() == shared.data_ptr():
            block.self_attn.o_proj.weight = torch.nn.Parameter(shared.detach().clone())
            bias = original.self_attn.o_proj.bias
            if bias is not None:
                block.self_attn.o_proj.bias = torch.nn.Parameter(bias.detach().clone())


def _check(teacher, student, tokens) -> None:
    if LINEAR in teacher.config.layer_types:
        raise UserError("calibration: the teacher must have attention in every layer")
    if teacher.config.num_hidden_layers != student.config.num_hidden_layers:
        raise UserError("calibration: teacher and student must have the same layers")
    if tokens.ndim != 2 or tokens.shape[0] == 0 or tokens.shape[1] < 2:
        raise UserError(
            f"calibration: tokens have shape {list(tokens.shape)}; windows of two or more tokens are needed"
        )
    for name, model in (("teacher", teacher), ("student", student)):
        if model.dtype != torch.float32:
            raise UserError(f"calibration: the {name} is {model.dtype}; torch.float32 is needed")


def _fingerprint(teacher, student, tokens, settings) -> str:
    digest = hashlib.sha256(json.dumps([asdict(settings), student.config.to_dict()], default=str).encode())
    digest.update(tokens.cpu().numpy().tobytes())
    for tensor in teacher.state_dict().values():
        digest.update(tensor.flatten()[:: max(tensor.numel() // 64, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


class _Store:
    """Finished layers on disk, each under the fingerprint of everything that made it."""

    def __init__(self, folder: Path, fingerprint: str):
        self.folder, self.fingerprint = folder, fingerprint

    def _names(self, layer: int, student) -> list[str]:
        prefix = f"model.layers.{layer}.self_attn."
        return [name for name in student.state_dict() if name.startswith(prefix)]

    def save(self, layer: int, student, report: dict) -> None:
        state = student.state_dict()
        tensors = {name: state[name] for name in self._names(layer, student)}
        whole = {"fingerprint": self.fingerprint, "report": report, "tensors": tensors}
        path = self.folder / f"layer-{layer}.pt"
        self.folder.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(whole, buffer)  # to a file, it would tell of a full disk by an error without its cause
        path.with_suffix(".part").write_bytes(buffer.getbuffer())
        path.with_suffix(".part").replace(path)

    def load(self, layer: int, student) -> dict | None:
        """Puts the tensors of a finished layer into the student and returns its report, or None."""
        path = self.folder / f"layer-{layer}.pt"
        if not path.is_file():
            return None
        try:
            whole = torch.load(path, map_location=student.device, weights_only=True)
        except Exception as error:  # torch.load raises many kinds for a file that is cut short
            raise DeltanetError(f"{path}: unreadable; delete it and calibrate again: {error}") from None
        if whole["fingerprint"] != self.fingerprint:
            return None
        state = student.state_dict()
        for name, tensor in whole["tensors"].items():
            state[name].copy_(tensor)
        return whole["report"]
