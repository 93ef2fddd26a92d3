"""The embedded teacher, changed so that the attention of a single layer matters, and a twin whose mixers are poor."""

import torch
from demo_pair import demo_teacher, fresh_student

IMPORTANT = 3
LEFT = 0.02
"""What is left of the attention of all other layers."""


@torch.no_grad()
def teacher_and_twin():
    teacher = demo_teacher()
    for layer, block in enumerate(teacher.model.layers):
        if layer != IMPORTANT:
            block.self_attn.o_proj.weight.mul_(LEFT)
    return teacher, fresh_student(teacher, "none")
