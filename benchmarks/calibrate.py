"""Measures the closed-form calibration: how close students start, per layout, and what each ingredient is worth.

    python -m benchmarks.calibrate TEACHER --calibrate TEXT ... --measure TEXT ... --table goals
    python -m benchmarks.calibrate TEACHER --calibrate self --measure TEXT ... --table ablation --layouts none

Every row is a fresh student, calibrated and measured on the first windows of every --measure file: its perplexity over
the teacher's on the same tokens / mean KL(teacher || student) in nats. Results so far: docs/results/calibration.md.
"""

import argparse
import math
import platform
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from convert.calibrate import calibrate
from convert.calibration import Settings
from convert.calibration.settings import EFFORTS
from convert.command import load_tokenizer
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.text import calibration_text, tokenise
from convert.text_files import read_documents

LAYOUTS = ("none", "global2", "every:4", "swa:128")
ABLATION = {
    "as it is": ({}, {}),
    "delta (no decay)": ({"mixer": "delta"}, {}),
    "shared states": ({"state_heads": "shared"}, {}),
    "delta, shared states": ({"mixer": "delta", "state_heads": "shared"}, {}),
    "beta up to 2": ({"beta_max": 2}, {}),
    "beta the same for every input": ({}, {"importance": False}),
    "decay depends on the input": ({}, {"decay_slope": True}),
    "gate and taps the same for every input": ({}, {"data_dependent": False}),
    "no read gate": ({"read_gate": False}, {}),
    "no skip taps": ({"skip_taps": 0}, {}),
    "1 skip tap": ({"skip_taps": 1}, {}),
    "4 skip taps": ({"skip_taps": 4}, {}),
    "8 skip taps": ({"skip_taps": 8}, {}),
    "16 skip taps": ({"skip_taps": 16}, {}),
    "first token as any other": ({"exact_start": False}, {}),
    "first token counts once": ({}, {"start_weight": 0.0}),
    "first token counts 17 times": ({}, {"start_weight": 16.0}),
    "first token counts 257 times": ({}, {"start_weight": 256.0}),
    "output projection as the teacher's": ({}, {"refit_output": False}),
    "no coordinate descent": ({}, {"sweeps": 0}),
    "fitted on the teacher's stream": ({}, {"sequential": False}),
    "fitted on the student's stream": ({}, {"sequential": True, "catch_up": 0.0}),
    "and making good earlier errors": ({}, {"sequential": True}),
    "gate ridge .003": ({}, {"gate_ridge": 0.003}),
    "gate ridge .3": ({}, {"gate_ridge": 0.3}),
    "output ridge .01": ({}, {"output_ridge": 0.01}),
    "output ridge .1": ({}, {"output_ridge": 0.1}),
}
"""What is changed, in the mixer (fields of DeltaNetConfig) and in the fit (fields of Settings)."""


class Judge:
    """Compares students with the teacher on fixed windows of several texts."""

    def __init__(self, teacher, texts: dict[str, torch.Tensor], batch: int):
        self.teacher, self.texts, self.batch = teacher, texts, batch

    @torch.no_grad()
    def __call__(self, student) -> dict[str, tuple[float, float]]:
        """Per text: student perplexity / teacher perplexity, and the mean KL per token."""
        return {name: self._compare(student, tokens) for name, tokens in self.texts.items()}

    def _compare(self, student, tokens):
        loss = divergence = 0.0
        for start in range(0, len(tokens), self.batch):
            ids = tokens[start : start + self.batch]
            reference, logs = (F.log_softmax(m(ids).logits[:, :-1].float(), -1) for m in (self.teacher, student))
            loss += (reference - logs).gather(-1, ids[:, 1:, None]).sum().item()
            divergence += F.kl_div(logs, reference, log_target=True, reduction="sum").item()
        count = tokens[:, 1:].numel()
        return math.exp(loss / count), divergence / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="checkpoint folder")
    parser.add_argument("--calibrate", nargs="+", default=["self"], metavar="TEXT", help="files, or self")
    parser.add_argument("--measure", nargs="+", required=True, metavar="TEXT", help="files that nothing is fitted on")
    parser.add_argument("--table", choices=("goals", "ablation"), default="goals")
    parser.add_argument("--only", nargs="+", help="rows of the ablation, by name")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--skip-conv", type=int, default=4)
    parser.add_argument("--effort", choices=EFFORTS, default="full")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens")
    parser.add_argument("--windows", type=int, default=32, help="windows of up to 1024 tokens measured per text")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, torch.float32).to(arguments.device)
    tokenizer = load_tokenizer(arguments.teacher)
    text = calibration_text(arguments.calibrate, None, tokenizer, teacher, tokens=arguments.tokens, seed=arguments.seed)
    measured = {Path(path).parent.name + "/" + Path(path).name: path for path in arguments.measure}
    length = min(1024, teacher.config.max_position_embeddings)
    texts = {
        name: tokenise(tokenizer, read_documents(path), arguments.windows, length, path, in_order=True)
        for name, path in measured.items()
    }
    texts = {name: tokens.to(arguments.device) for name, tokens in texts.items()}
    judge = Judge(teacher, texts, batch=4)
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}; torch {torch.__version__}; Python {platform.python_version()}; {text.fit.numel():,} tokens\n")
    print("| layout | what | seconds | explained | " + " | ".join(f"{name}: x (KL)" for name in texts) + " |")
    print("| --- | --- | --- | --- |" + " --- |" * len(texts))
    rows = {"plain copy": None, "calibrated": ({}, {})} if arguments.table == "goals" else ABLATION
    if arguments.only:
        rows = {name: rows[name] for name in arguments.only}
    for layout in arguments.layouts:
        for what, change in rows.items():
            mixer, fit = ({}, {}) if change is None else change
            kept = parse_layout(layout, teacher.config.layer_types, teacher.config.sliding_window)
            config = student_config(teacher.config, kept, **{"skip_taps": arguments.skip_conv, **mixer})
            student = student_from_teacher(teacher, config)
            start, explained = time.monotonic(), ""
            if change is not None:
                report = calibrate(teacher, student, text.fit, replace(Settings.of(arguments.effort), **fit))
                shares = [row["explained"] for row in report["layers"]]
                explained = f"{sum(shares) / len(shares):.3f}"
            seconds = f"{time.monotonic() - start:.1f}"
            scores = " | ".join(f"{times:.3f} ({kl:.3f})" for times, kl in judge(student).values())
            print(f"| {layout} | {what} | {seconds} | {explained} | {scores} |", flush=True)


if __name__ == "__main__":
    main()
