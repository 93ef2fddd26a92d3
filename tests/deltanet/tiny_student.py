"""Small students with random weights, for the tests of the model: every gate and tap is awake."""

import torch

from deltanet import DeltaNetConfig, DeltaNetForCausalLM

LAYOUTS = {
    "none": ["linear_attention"] * 4,
    "global": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "swa": ["linear_attention", "sliding_attention", "linear_attention", "sliding_attention"],
}


def tiny_config(layout: str = "global", **changes) -> DeltaNetConfig:
    values = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "layer_types": LAYOUTS[layout],
        "sliding_window": 7 if layout == "swa" else None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "eos_token_id": None,
        "tie_word_embeddings": True,
    }
    return DeltaNetConfig(**{**values, **changes})


def tiny_model(layout: str = "global", seed: int = 0, **changes) -> DeltaNetForCausalLM:
    """Random weights everywhere: gates, taps, decays and write strengths all depend on the input."""
    torch.manual_seed(seed)
    model = DeltaNetForCausalLM(tiny_config(layout, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("norm.weight"):
                parameter.add_(0.12 * torch.randn_like(parameter))
    return model.eval()


def tokens(*shape: int, seed: int = 1, vocab: int = 97) -> torch.Tensor:
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
