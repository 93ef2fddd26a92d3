"""What parameters take while only mixers train: teacher and student share what is frozen and equal.

    python -m benchmarks.frozen_memory TEACHER [--hybrid LAYOUT] [--dtype bfloat16]

Counted are the bytes of all storages that parameters of the two models lie in, each once, as a stage has them before
its engine is made: gradients, masters and moments of the mixers come on top. Results so far: docs/distil.md.
"""

import argparse
from pathlib import Path

import torch

from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from distill.schema import Stage
from distill.stages import share_frozen
from distill.trainable import trained_names


def stored(*models: torch.nn.Module) -> int:
    """Bytes of the storages of all parameters."""
    found = {}
    for model in models:
        for parameter in model.parameters():
            storage = parameter.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="checkpoint folder")
    parser.add_argument("--hybrid", default="global2", metavar="LAYOUT")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="that a stage computes in")
    arguments = parser.parse_args()
    dtype, teacher = getattr(torch, arguments.dtype), load_teacher(arguments.teacher, torch.float32)
    layout = parse_layout(arguments.hybrid, teacher.config.layer_types, teacher.config.sliding_window)
    student = student_from_teacher(teacher, student_config(teacher.config, layout))
    teacher = teacher.requires_grad_(False).to(dtype)
    names = [name for name, _ in student.named_parameters()]
    trained = set(trained_names(names, Stage(kind="align", trainable=("mixers",)), student.config))
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    mixers = sum(p.numel() * p.element_size() for p in student.parameters() if p.requires_grad)
    before, model = stored(teacher, student), stored(teacher)
    share_frozen(student, teacher, dtype)
    print("| stage in | teacher | its mixers, float32 | both before sharing | both in a stage |")
    print("| --- | ---: | ---: | ---: | ---: |")
    figures = (model, mixers, before, stored(teacher, student))
    print(f"| {arguments.dtype} | {' | '.join(f'{figure / 1e6:,.2f} MB' for figure in figures)} |")


if __name__ == "__main__":
    main()
