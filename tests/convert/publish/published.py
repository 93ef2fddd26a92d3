"""A small student with tokenizer, card and manifest, made once for all tests of its kind, and copies of it to harm."""

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from convert import convert

DEMO = Path(__file__).parents[3] / "recipes" / "demo"
CARD = "---\nlicense: llama3.2\nlanguage: [en]\n---\n# The teacher's page\n"


def make_source(folder: Path) -> Path:
    """A random two-layer Llama with the demo's tokenizer, a chat template and a licensed card."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1024, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, dtype="bfloat16",
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (folder / "README.md").write_text(CARD)
    return folder


def make_student(folder: Path, source: Path, shard: str = "20KB") -> Path:
    """Its student with one linear layer, in shards."""
    convert(source, folder, hybrid="layers:1", calibrate=["none"], max_shard_size=shard)
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
