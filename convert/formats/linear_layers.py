"""What flash-linear-attention and transformers' Qwen3.5 have in common: their linear layer, and what it cannot be.

q, k, v = SiLU(convolution(projection x))      beta = sigmoid(b x)      o = RMSNorm(head_dim^-1/2 z)
"""

import torch

from deltanet.config import DeltaNetConfig

from ..layouts import LINEAR

Tensors = dict[str, torch.Tensor]


def linear_refusals(config: DeltaNetConfig) -> list[str]:
    """What the student's linear layers do and the format's cannot, one item each."""
    if LINEAR not in config.layer_types:
        return []
    rotated = config.rope_layers or [True] * config.num_hidden_layers
    found = {
        "RoPE in linear layers": any(turn for turn, kind in zip(rotated, config.layer_types) if kind == LINEAR),
        f"no SiLU on q, k and v (qkv_activation {config.qkv_activation})": config.qkv_activation != "silu",
        "q/k norms in linear layers (linear_qk_norm)": config.qk_norm == "head" and config.linear_qk_norm,
        "biases of q, k, v in linear layers (qkv_bias)": config.qkv_bias,
        "a bias of the output projection of linear layers (mixer_bias)": config.mixer_bias or config.o_bias,
        "a bias of the write strength (beta_bias)": config.beta_bias,
        f"positions of its own (state_positions {config.state_positions})": config.state_positions != "rotary",
        f"maps of queries and keys (feature_map {config.feature_map})": config.feature_map != "none",
        f"the skip convolution (skip_taps {config.skip_taps})": config.skip_taps > 0,
        f"attention beside the state (local_window {config.local_window})": config.local_window > 0,
        "the read gate (read_gate)": config.read_gate,
        "no norm of what is read (head_norm)": not config.head_norm,
        "the first token's own value (exact_start)": config.exact_start,
        "states shared by query heads (state_heads)": config.num_state_heads != config.num_attention_heads,
    }
    return [item for item, is_so in found.items() if is_so]


def attention_refusals(config: DeltaNetConfig) -> list[str]:
    """The same of the layers that kept attention, and of the MLPs."""
    rotated = config.rope_layers or [True] * config.num_hidden_layers
    attends = LINEAR not in config.layer_types or len(set(config.layer_types)) > 1
    kind = (config.rope_parameters or {}).get("rope_type", "default")
    found = {
        f"RoPE scaling ({kind})": attends and kind != "default",
        "attention without RoPE": not all(turn for turn, name in zip(rotated, config.layer_types) if name != LINEAR),
        "biases in the MLP (mlp_bias)": config.mlp_bias,
        f"the activation {config.hidden_act} in the MLP": config.hidden_act not in ("silu", "swish"),
    }
    return [item for item, is_so in found.items() if is_so]


def of_layers(config: DeltaNetConfig, *kinds: str) -> list[int]:
    return [index for index, kind in enumerate(config.layer_types) if kind in kinds]


def per_head(weight: torch.Tensor, config: DeltaNetConfig) -> torch.Tensor:
    """(KV * hd, ...) of k or v -> (HQ * hd, ...), the rows of key/value head h // group for every query head h."""
    group = config.num_attention_heads // config.num_key_value_heads
    heads = weight.unflatten(0, (config.num_key_value_heads, config.head_dim))
    return heads.repeat_interleave(group, 0).flatten(0, 1)


def shared_settings(config: DeltaNetConfig) -> dict:
    """Keys of config.json that all have under one name."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings", "initializer_range")
    names += ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "use_cache")
    dtype = str(config.dtype or torch.float32).removeprefix("torch.")
    return {name: getattr(config, name) for name in names} | {"dtype": dtype}


def rope_theta(config: DeltaNetConfig) -> float:
    return float((config.rope_parameters or {}).get("rope_theta", 10000.0))
