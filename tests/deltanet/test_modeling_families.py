"""With no linear layer the decoder computes what the family's own class computes."""

import pytest
import torch
from tiny_student import tokens
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from deltanet import DeltaNetConfig, DeltaNetForCausalLM

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FULL = ["full_attention"] * 4
SLIDING = ["sliding_attention"] * 4
# family -> original class, its configuration, and the same facts as flags of ours
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE, rms_norm_eps=1e-5), {"rms_norm_eps": 1e-5}),
    "llama-biases": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, attention_bias=True, mlp_bias=True),
        {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    ),
    "llama-3": (
        LlamaForCausalLM,
        LlamaConfig(**SHAPE, rope_parameters=LLAMA3, tie_word_embeddings=True),
        {"tie_word_embeddings": True},
    ),
    "mistral": (
        MistralForCausalLM,
        MistralConfig(**SHAPE, head_dim=16, sliding_window=5),
        {"head_dim": 16, "layer_types": SLIDING, "sliding_window": 5},
    ),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SHAPE), {"qkv_bias": True}),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SHAPE, head_dim=12), {"head_dim": 12, "qk_norm": "head"}),
    "smollm3": (
        SmolLM3ForCausalLM,
        SmolLM3Config(**SHAPE, no_rope_layers=[1, 1, 1, 0]),
        {"rope_layers": [True, True, True, False]},
    ),
}


def pair(family: str):
    """The original with random weights (norms and biases too) and ours with the same."""
    original_class, config, flags = FAMILIES[family]
    torch.manual_seed(0)
    original = original_class(config).eval()
    with torch.no_grad():
        for parameter in original.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    values = {**SHAPE, "layer_types": FULL, "rms_norm_eps": config.rms_norm_eps, **flags}
    ours = DeltaNetForCausalLM(DeltaNetConfig(**values, rope_parameters=dict(config.rope_parameters))).eval()
    missing, unexpected = ours.load_state_dict(original.state_dict(), strict=True)
    assert not missing
    assert not unexpected
    return original, ours


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_equal_the_original_class(family):
    original, ours = pair(family)
    ids = tokens(2, 40)
    assert (original(ids).logits - ours(ids).logits).abs().max() < 1e-5


@pytest.mark.parametrize("family", ["llama-3", "mistral"])
@torch.no_grad()
def test_greedy_generation_equals_the_original_class(family):
    original, ours = pair(family)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 9)
    assert torch.equal(original.generate(ids, **options), ours.generate(ids, **options))
