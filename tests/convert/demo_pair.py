"""The embedded demo teacher with a fresh student, and text, for the tests of calibration."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

import recipes
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config

DEMO = Path(recipes.__file__).parent / "demo"


def demo_teacher():
    return load_teacher(DEMO, torch.float32)


def fresh_student(teacher, hybrid: str = "none", **mixer):
    layout = parse_layout(hybrid, teacher.config.layer_types, teacher.config.sliding_window)
    return student_from_teacher(teacher, student_config(teacher.config, layout, **mixer))


def demo_windows(count: int, length: int = 128, *, last: bool = False) -> torch.Tensor:
    """(count, length) tokens from the start of the demo page, or from its end."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    ids = tokenizer((DEMO / "text.txt").read_text(encoding="utf-8"))["input_ids"]
    ids = ids[-count * length :] if last else ids[: count * length]
    return torch.tensor(ids).view(count, length)


@torch.no_grad()
def divergence(teacher, student, tokens: torch.Tensor) -> float:
    """Mean KL(teacher || student) per token, in nats."""
    reference, logs = (torch.log_softmax(model(tokens).logits, -1) for model in (teacher, student))
    return (reference.exp() * (reference - logs)).sum(-1).mean().item()
