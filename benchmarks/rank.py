"""Compares ways to choose which layers keep attention: the students that each choice gives, on text that nothing saw.

    python -m benchmarks.rank TEACHER --calibrate TEXT --measure TEXT --keep 2 4

Every ranking comes from --calibrate alone. Every distinct choice is then converted and calibrated like any other, and
measured on the first windows of --measure: its perplexity over the teacher's / mean KL(teacher || student) in nats,
and how much of a repeated passage it recalls (`convert.closeness.recall`). Rankings and figures are kept in --folder,
where a later call with the same arguments finds them.
Results so far: docs/results/ranking.md.
"""

import argparse
import copy
import json
import time
from pathlib import Path

import torch

from convert.calibrate import calibrate
from convert.closeness import compare, final_states, recall
from convert.command import load_tokenizer
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.ranking.rank import METHODS, linear_twin, rank_layers
from convert.text import calibration_text, tokenise
from convert.text_files import read_documents
from deltanet.generate import pick_device

RECALL_TOKENS = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="checkpoint folder")
    parser.add_argument("--calibrate", nargs="+", required=True, metavar="TEXT", help="files")
    parser.add_argument("--measure", required=True, metavar="TEXT", help="a file that nothing is fitted on")
    parser.add_argument("--keep", nargs="+", type=int, default=[2, 4], help="numbers of layers that keep attention")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--layouts", nargs="+", default=[], metavar="LAYOUT", help="further choices, as for --hybrid")
    parser.add_argument("--tokens", type=int, default=8192, help="that maps and mixers are fitted on")
    parser.add_argument("--scored", type=int, default=4096, help="tokens set aside, from which the scores come")
    parser.add_argument("--windows", type=int, default=8, help="windows of up to 1024 tokens measured")
    parser.add_argument("--folder", type=Path, default=Path("runs/rank"), help="what is done stays here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    device = pick_device(arguments.device)
    teacher = load_teacher(arguments.teacher, torch.float32).to(device)
    tokenizer, length = load_tokenizer(arguments.teacher), min(1024, teacher.config.max_position_embeddings)
    text = calibration_text(
        arguments.calibrate,
        None,
        tokenizer,
        teacher,
        tokens=arguments.tokens,
        held_out_tokens=arguments.scored,
        seed=arguments.seed,
    )
    measured = tokenise(
        tokenizer, read_documents(arguments.measure), arguments.windows, length, arguments.measure, in_order=True
    ).to(device)
    types = teacher.config.layer_types
    plain = student_config(teacher.config, parse_layout("none", types, teacher.config.sliding_window))
    missing = [method for method in arguments.methods if not (arguments.folder / f"{method}.json").exists()]
    twin = None
    if set(missing) - {"linearity"}:
        twin = linear_twin(teacher, plain, text.fit, folder=arguments.folder / "twin")
    layouts: dict[str, list[str]] = {}
    for method in arguments.methods:
        path = arguments.folder / f"{method}.json"
        if not path.exists():
            path.write_text(json.dumps(rank_layers(teacher, method, text, twin)))
        found = json.loads(path.read_text())
        print(f"{method}: {found['ranking']}, {found['seconds']:.0f} s", flush=True)
        for row in found["layers"]:
            print("  ", {key: round(value, 4) for key, value in row.items()})
        for keep in arguments.keep:
            layouts.setdefault(_kept(f"{path}:{keep}", teacher), []).append(f"{method}:{keep}")
    for keep in arguments.keep:
        for layout in (f"every:{len(types) // keep}", *(["global2"] if keep == 2 else [])):
            layouts.setdefault(_kept(layout, teacher), []).append(layout)
    for layout in arguments.layouts:
        layouts.setdefault(_kept(layout, teacher), []).append("given")
    reference = final_states(teacher, measured)
    recalled = recall(None, teacher, measured, tokens=RECALL_TOKENS, seed=arguments.seed)["repeat"]["student"]
    print(f"\n{measured.numel():,} tokens; the teacher recalls {recalled:.3f}\n")
    print("| keeps attention | chosen by | x teacher (KL) | recall | seconds |\n| --- | --- | --- | --- | --- |")
    for layout, names in sorted(layouts.items(), key=lambda item: len(item[0])):
        path = arguments.folder / f"{layout.replace(':', '-')}.json"
        if not path.exists():
            path.write_text(json.dumps(_measure(layout, teacher, text.fit, measured, reference, arguments.seed)))
        figures = json.loads(path.read_text())
        print(
            f"| {layout.removeprefix('layers:')} | {', '.join(names)} | {figures['x']:.3f} ({figures['kl']:.3f}) "
            f"| {figures['recall']:.3f} | {figures['seconds']:.0f} |",
            flush=True,
        )


def _kept(layout: str, teacher) -> str:
    """The same layout as a list of layers, so that equal choices are measured once."""
    types = teacher.config.layer_types
    linear = parse_layout(layout, types, teacher.config.sliding_window).linear
    return "layers:" + ",".join(str(layer) for layer in range(len(types)) if layer not in linear)


def _measure(layout: str, teacher, fit: torch.Tensor, measured: torch.Tensor, reference, seed: int) -> dict:
    start = time.monotonic()
    kept = parse_layout(layout, teacher.config.layer_types, teacher.config.sliding_window)
    student = student_from_teacher(teacher, copy.deepcopy(student_config(teacher.config, kept)), share=True)
    calibrate(teacher, student, fit)
    hidden = {"teacher": reference, "student": final_states(student, measured)}
    scores = compare(teacher, student, hidden, measured)
    recalled = recall(None, student, measured, tokens=RECALL_TOKENS, seed=seed)["repeat"]["student"]
    return {
        "x": scores["student"]["perplexity"] / scores["teacher"]["perplexity"],
        "kl": scores["student"]["kl"],
        "recall": recalled,
        "seconds": time.monotonic() - start,
    }


if __name__ == "__main__":
    main()
