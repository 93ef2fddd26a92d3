"""A tiny teacher, its plain-copy student (linear, attention, linear) and packed text, for the tests of distillation."""

import numpy as np
import torch

from convert.loading import student_from_teacher
from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from distill.order import hashed
from distill.packing import assemble
from distill.schema import Stage

VOCABULARY, LENGTH = 61, 24
KINDS = ["linear_attention", "full_attention", "linear_attention"]


def config(kinds=KINDS, **options) -> DeltaNetConfig:
    fields = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(kinds),
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": list(kinds),
        "skip_taps": 2,
        "tie_word_embeddings": True,
    }
    return DeltaNetConfig(**(fields | options))


def pair(**options) -> tuple[DeltaNetForCausalLM, DeltaNetForCausalLM]:
    """(teacher, student), float32."""
    torch.manual_seed(0)
    teacher = DeltaNetForCausalLM(config(["full_attention"] * len(KINDS), **options)).eval().requires_grad_(False)
    for parameter in teacher.parameters():  # sharper than the usual start, so that there is something to learn
        if parameter.ndim > 1:
            parameter.mul_(4.0)
    return teacher, student_from_teacher(teacher, config(**options)).requires_grad_(True)


def sequence(position: int, length: int = LENGTH):
    """The text at `position`: two documents and some padding, all by hash."""
    draws = hashed(7, position, count=length)
    ids = (draws % np.uint64(VOCABULARY)).astype(np.int64)
    cut, end = 5 + position % 7, length - position % 3
    return assemble([ids[:cut], ids[cut:end]], length)


def stage(kind: str, **options) -> Stage:
    from distill.schema import DEFAULTS_OF

    return Stage.model_validate({"kind": kind, "name": kind, "steps": 4, **DEFAULTS_OF[kind], **options})
