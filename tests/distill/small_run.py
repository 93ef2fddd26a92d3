"""A run small enough for tests: a random teacher with the demo's tokenizer and text, and its recipe."""

import shutil
from pathlib import Path

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = Path(__file__).parents[2] / "recipes" / "demo"


def write_teacher(folder: Path, family: str = "llama", num_layers: int = 2) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        family, vocab_size=1024, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, bos_token_id=0,
        eos_token_id=0, dtype="float32", initializer_range=0.1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return folder


def teach_chats(teacher: Path) -> None:
    """Gives the teacher's tokenizer a chat template whose answers end with its end-of-text token."""
    end = "<|endoftext|>"
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}" + end + "{% endfor %}"
    template += "{% if add_generation_prompt %}[assistant] {% endif %}"
    (teacher / "chat_template.jinja").write_text(template)


def write_recipe(path: Path, teacher: Path, **changes) -> Path:
    """align 6 steps, distil 6 steps, a commit every 2; measured on the demo's lines backwards, in a file beside it.
    `changes` are `section__key=value`."""
    held = path.with_name(f"{path.stem}-held.txt")
    held.write_text("\n".join(reversed((DEMO / "text.txt").read_text(encoding="utf-8").splitlines())), encoding="utf-8")
    recipe = {
        "version": 1,
        "teacher": {"model": str(teacher)},
        # States alone: a window would see all of texts as short as these.
        "student": {"convert": {"hybrid": "layers:1", "calibrate": "none", "local_window": 0}},
        "data": {"sources": [{"path": str(DEMO / "text.txt")}], "seq_len": 32},
        "stages": [
            {"kind": "align", "steps": 6, "warmup_steps": 2},
            {"kind": "distil", "steps": 6, "lr": 1e-3, "lr_groups": {"mixers": 3e-3}, "weight_decay": 0.1},
        ],
        "training": {"batch_size": 4, "dtype": "float32", "commit_every_steps": 2, "commit_every_seconds": None},
        "evaluation": {"sources": [{"path": str(held), "name": "held"}], "tokens": 256, "prompt": "Once"},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            recipe.setdefault(section, {})[name] = value
        else:
            recipe[section] = value
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path
