"""Tiny random teachers of every family, and what tests ask of a converted folder."""

import json
from pathlib import Path

import torch
import transformers

VOCABULARY = 96
SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 8, "tie_word_embeddings": False}),
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2, "tie_word_embeddings": True},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {"tie_word_embeddings": True, "no_rope_layer_interval": 2}),
}


def make_teacher(
    folder: Path,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    shard: str = "5GB",
    seed: int = 0,
    **settings,
):
    """Saves a random teacher in `folder` and returns it. Its biases and norms are random too, so that none can be
    lost unnoticed."""
    name, own = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**(SHARED | own | settings), dtype=dtype)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(4)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    # Loaded anew, since `.to` has rounded the rotary frequencies too, which no loaded model does.
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def edit_config(folder: Path, **changes) -> dict:
    """Changes keys of config.json (None removes one)."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None}
    path.write_text(json.dumps(config))
    return config


def tokens(rows: int = 2, length: int = 33) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(7))


def raw_tensors(folder: Path) -> dict[str, bytes]:
    """Every tensor's bytes, read by the safetensors library, not by ours."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                found[name] = file.get_tensor(name).contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return found
