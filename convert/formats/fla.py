"""The student as flash-linear-attention's `DeltaNetForCausalLM` (mixer delta) or `GatedDeltaNetForCausalLM`.

Facts from flash-linear-attention 0.6.0, layers/delta_net.py, layers/gated_deltanet.py, layers/attn.py and
models/*/configuration_*.py. Keys and values have as many heads as queries there, so grouped heads are repeated.
The gated layer decays by exp(-exp(A_log) softplus(a x + dt_bias)), which is ours where A_log is 0. Its output gate
has no factor 2, which goes into the output projection. Twin: tests/convert/formats/test_fla.py.
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

MODEL_TYPES = ("delta_net", "gated_deltanet")
RENAMED = {
    "embed_tokens.": "embeddings.",
    "input_layernorm.": "attn_norm.",
    "post_attention_layernorm.": "mlp_norm.",
    "self_attn.": "attn.",
    "head_norm.": "o_norm.",
    "_conv.": "_conv1d.",
    "a_proj.bias": "dt_bias",
}


def refusals(config: DeltaNetConfig) -> list[str]:
    """What the student does and the format cannot, one item each."""
    items = linear_refusals(config) + attention_refusals(config)
    width = config.num_attention_heads * config.head_dim
    if of_layers(config, FULL, SLIDING):
        if config.qk_norm != "none":
            items.append("q/k norms in attention layers (qk_norm)")
        if config.o_bias:
            items.append("a bias of the output projection of attention layers (o_bias)")
        if width != config.hidden_size:
            items.append(f"attention heads of {config.head_dim}, which is not hidden_size / heads")
    if config.output_gate and config.mixer == "delta" and config.gate_activation != "silu":
        items.append(f"an output gate by {config.gate_activation} beside the mixer delta")
    return items


def settings(config: DeltaNetConfig) -> dict:
    """config.json."""
    heads = config.num_attention_heads
    found = shared_settings(config) | {
        "num_heads": heads,
        "hidden_act": "swish",
        "norm_eps": config.rms_norm_eps,
        "use_gate": config.output_gate,
        "use_short_conv": config.conv_kernel > 0,
        "conv_size": config.conv_kernel or 4,
        "allow_neg_eigval": config.beta_max == 2,
        "expand_v": 1.0,
        "attn": _attention(config),
    }
    if config.mixer == "gated_delta":
        gate = {"silu": "swish"}.get(config.gate_activation, config.gate_activation)
        own = {"head_dim": config.head_dim, "num_v_heads": None, "output_gate_activation": gate}
        return found | own | {"model_type": "gated_deltanet", "architectures": ["GatedDeltaNetForCausalLM"]}
    width = heads * config.head_dim / config.hidden_size
    own = {"expand_k": width, "expand_v": width, "use_beta": True, "qk_norm": "l2", "qk_activation": "silu"}
    return found | own | {"model_type": "delta_net", "architectures": ["DeltaNetForCausalLM"]}


def _attention(config: DeltaNetConfig) -> list[dict] | None:
    """A dictionary for the full attention layers and one for the sliding ones, whose window counts its own token in
    both programs."""
    specs = []
    for kind, window in ((FULL, None), (SLIDING, config.sliding_window)):
        if layers := of_layers(config, kind):
            specs.append(
                {
                    "layers": layers,
                    "num_heads": config.num_attention_heads,
                    "num_kv_heads": config.num_key_value_heads,
                    "qkv_bias": config.qkv_bias,
                    "window_size": window,
                    "rope_theta": rope_theta(config),
                }
            )
    return specs or None


def tensors(state: Tensors, config: DeltaNetConfig) -> Tensors:
    """The student's tensors by the format's names. The result shares memory with `state` where nothing changes."""
    found = {}
    for name, value in state.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        parts = name.split(".")
        if parts[1] == "layers" and config.layer_types[int(parts[2])] == LINEAR:
            if ".k_proj." in name or ".v_proj." in name or ".k_conv." in name or ".v_conv." in name:
                value = per_head(value, config)
            if "_conv." in name:
                value = value[:, None]
            if ".o_proj." in name and config.output_gate and config.gate_activation == "sigmoid":
                value = 2 * value
            if ".a_proj.bias" in name:
                found[_renamed(name).replace("dt_bias", "A_log")] = torch.zeros_like(value)
        found[_renamed(name)] = value
    return found


def _renamed(name: str) -> str:
    for ours, theirs in RENAMED.items():
        name = name.replace(ours, theirs)
    return name


def shapes(raw: dict) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the class builds for this config.json."""
    hidden, inner, heads = raw["hidden_size"], raw["intermediate_size"], raw["num_heads"]
    is_gated = raw["model_type"] == "gated_deltanet"
    head = raw["head_dim"] if is_gated else round(hidden * raw["expand_k"]) // heads
    width = heads * head
    specs = {layer: spec for spec in raw["attn"] or () for layer in spec["layers"]}
    found = {"model.embeddings.weight": (raw["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    if not raw["tie_word_embeddings"]:
        found["lm_head.weight"] = (raw["vocab_size"], hidden)
    for layer in range(raw["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        found |= {f"{at}{norm}.weight": (hidden,) for norm in ("attn_norm", "mlp_norm")}
        found |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        found[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        if layer in specs:
            spec, at = specs[layer], f"{at}attn."
            rows = {"q": hidden} | dict.fromkeys("kv", hidden // spec["num_heads"] * spec["num_kv_heads"])
            found |= {f"{at}{name}_proj.weight": (size, hidden) for name, size in rows.items()}
            found |= {f"{at}{name}_proj.bias": (size,) for name, size in rows.items() if spec["qkv_bias"]}
            found[f"{at}o_proj.weight"] = (hidden, hidden)
            continue
        at = f"{at}attn."
        found |= {f"{at}{name}_proj.weight": (width, hidden) for name in ("q", "k", "v")}
        found |= {f"{at}o_proj.weight": (hidden, width), f"{at}b_proj.weight": (heads, hidden)}
        found[f"{at}o_norm.weight"] = (head,)
        if is_gated:
            found |= {f"{at}a_proj.weight": (heads, hidden), f"{at}A_log": (heads,), f"{at}dt_bias": (heads,)}
        if raw["use_gate"]:
            found[f"{at}g_proj.weight"] = (width, hidden)
        if raw["use_short_conv"]:
            found |= {f"{at}{name}_conv1d.weight": (width, 1, raw["conv_size"]) for name in ("q", "k", "v")}
    return found
