"""The student as transformers' `Qwen3_5ForCausalLM`, which loads without this package and without remote code.

Facts from transformers 5.24, models/qwen3_5. Its norms multiply by 1 + weight (not that of linear layers). Attention
has an output gate, which biases hold open, and biases on all projections or on none. A linear layer has as many
heads of keys and values as of queries here. It decays by exp(-exp(A_log) softplus(a x + dt_bias)), as ours where A_log
is 0. Twin: tests/convert/formats/test_qwen3_5.py.
"""

import torch

from deltanet.config import DeltaNetConfig

from ..layouts import FULL, LINEAR, SLIDING
from .linear_layers import (
    Tensors,
    attention_refusals,
    linear_refusals,
    of_layers,
    per_head,
    rope_theta,
    shared_settings,
)

MODEL_TYPES = ("qwen3_5_text",)
OPEN = 30.0
"""A bias whose sigmoid is one in float32."""


def refusals(config: DeltaNetConfig) -> list[str]:
    """What the student does and the format cannot, one item each."""
    items = linear_refusals(config) + attention_refusals(config)
    if of_layers(config, LINEAR):
        found = {
            f"no decay (mixer {config.mixer})": config.mixer != "gated_delta",
            "a write strength up to 2 (beta_max)": config.beta_max != 1,
            "no convolution (conv_kernel 0)": config.conv_kernel == 0,
            "no SiLU output gate (output_gate, gate_activation)": not config.output_gate
            or config.gate_activation != "silu",
        }
        items += [item for item, is_so in found.items() if is_so]
    if of_layers(config, SLIDING):
        items.append("sliding-window attention")
    if of_layers(config, FULL) and config.qk_norm != "head":
        items.append("attention without q/k norms (qk_norm none; teachers of the Qwen3 family have them)")
    if not of_layers(config, FULL):
        items.append("no layer of full attention, without which transformers' cache for this class does not count")
    return items


def settings(config: DeltaNetConfig) -> dict:
    """config.json."""
    heads = config.num_attention_heads
    return shared_settings(config) | {
        "model_type": "qwen3_5_text",
        "architectures": ["Qwen3_5ForCausalLM"],
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_bias": True,
        "attention_dropout": config.attention_dropout,
        # The sections are for pictures; of text all three have the same positions.
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": rope_theta(config),
            "partial_rotary_factor": 1.0,
            "mrope_interleaved": True,
            "mrope_section": _sections(config.head_dim),
        },
        "layer_types": list(config.layer_types),
        "linear_conv_kernel_dim": config.conv_kernel,
        "linear_key_head_dim": config.head_dim,
        "linear_value_head_dim": config.head_dim,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
    }


def _sections(head_dim: int) -> list[int]:
    """Thirds of the head_dim / 2 frequencies; the first is the largest."""
    half = head_dim // 2
    return [half - 2 * (half // 3), half // 3, half // 3]


def tensors(state: Tensors, config: DeltaNetConfig) -> Tensors:
    """The student's tensors by the format's names."""
    found = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if "layernorm." in name or name == "model.norm.weight":
            value = value - 1
        if ".self_attn." not in name:
            found[name] = value
    for layer, kind in enumerate(config.layer_types):
        at = f"model.layers.{layer}."
        own = {
            name.removeprefix(f"{at}self_attn."): value
            for name, value in state.items()
            if name.startswith(f"{at}self_attn.")
        }
        made = _linear(own, config) if kind == LINEAR else _attention(own, config)
        found |= {f"{at}{name}": value.contiguous() for name, value in made.items()}
    return found


def _linear(own: Tensors, config: DeltaNetConfig) -> Tensors:
    def joined(kind: str) -> torch.Tensor:
        q, k, v = (own[f"{name}_{kind}.weight"] for name in ("q", "k", "v"))
        return torch.cat([q, per_head(k, config), per_head(v, config)])

    return {
        "linear_attn.in_proj_qkv.weight": joined("proj"),
        "linear_attn.conv1d.weight": joined("conv")[:, None],
        "linear_attn.in_proj_z.weight": own["g_proj.weight"],
        "linear_attn.in_proj_b.weight": own["b_proj.weight"],
        "linear_attn.in_proj_a.weight": own["a_proj.weight"],
        "linear_attn.dt_bias": own["a_proj.bias"],
        "linear_attn.A_log": torch.zeros_like(own["a_proj.bias"]),
        "linear_attn.norm.weight": own["head_norm.weight"],
        "linear_attn.out_proj.weight": own["o_proj.weight"],
    }


def _attention(own: Tensors, config: DeltaNetConfig) -> Tensors:
    """Of every query head's rows in q_proj the second half makes the gate."""
    heads = (config.num_attention_heads, config.head_dim)
    weight = own["q_proj.weight"].unflatten(0, heads)
    zero = weight.new_zeros(config.hidden_size)
    bias = own.get("q_proj.bias", weight.new_zeros(heads[0] * heads[1])).unflatten(0, heads)
    found = {
        "q_proj.weight": torch.cat([weight, torch.zeros_like(weight)], 1).flatten(0, 1),
        "q_proj.bias": torch.cat([bias, torch.full_like(bias, OPEN)], 1).flatten(),
        "o_proj.weight": own["o_proj.weight"],
        "o_proj.bias": own.get("o_proj.bias", zero),
    }
    for name in ("k_proj", "v_proj"):
        weight = own[f"{name}.weight"]
        found |= {f"{name}.weight": weight, f"{name}.bias": own.get(f"{name}.bias", weight.new_zeros(len(weight)))}
    for name in ("q_norm", "k_norm"):
        found[f"{name}.weight"] = own[f"{name}.weight"] - 1
    return {f"self_attn.{name}": value for name, value in found.items()}


def shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the class builds for this config.json."""
    from transformers import AutoModelForCausalLM, Qwen3_5TextConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**raw))
    found = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    if raw["tie_word_embeddings"]:
        del found["lm_head.weight"]
    return found
