"""A tiny random teacher with the demo's tokenizer, its plain-copy student, and text, as folders."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from convert.command import convert

DEMO = Path(__file__).parents[3] / "recipes" / "demo"
TEXT = DEMO / "text.txt"
RANGE = 160


def write_pair(folder: Path) -> tuple[Path, Path]:
    """(teacher, student): two layers, width 32, contexts up to RANGE; the student's layer 0 is on the delta rule."""
    teacher, student = folder / "teacher", folder / "student"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, dtype="float32",
        initializer_range=0.3, max_position_embeddings=RANGE,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(teacher)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, teacher / name)
    convert(teacher, student, hybrid="layers:1", calibrate=("none",), local_window=0)
    return teacher, student
