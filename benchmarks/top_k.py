"""What a cache of the teacher's k likeliest tokens keeps of the forward KL and of its gradient.

    python -m benchmarks.top_k TEACHER --calibrate TEXT --measure TEXT

A student is converted and calibrated on --calibrate; on the first windows of --measure, which nothing was fitted on,
its forward KL over the k tokens and the rest, rounded as on disk, is compared with that over the whole vocabulary.
Results so far: docs/results/top_k.md.
"""

import argparse
from pathlib import Path

import torch

from convert.calibrate import calibrate
from convert.closeness import final_states
from convert.command import load_tokenizer
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.text import calibration_text, tokenise
from convert.text_files import read_documents
from distill.logit_cache import bytes_a_target, likeliest
from distill.losses import Term, TopK, divergence, normalised, top_k_divergence

ROWS = 1024  # whose logits exist at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="checkpoint folder")
    parser.add_argument("--calibrate", nargs="+", required=True, metavar="TEXT", help="files")
    parser.add_argument("--measure", required=True, metavar="TEXT", help="a file that nothing is fitted on")
    parser.add_argument("--hybrid", default="global2", metavar="LAYOUT")
    parser.add_argument("--top-k", nargs="+", type=int, default=[8, 32, 64, 256], metavar="K")
    parser.add_argument("--tokens", type=int, default=8192, help="that mixers are fitted on")
    parser.add_argument("--windows", type=int, default=8, help="windows of up to 1024 tokens measured")
    arguments = parser.parse_args()
    teacher = load_teacher(arguments.teacher, torch.float32)
    tokenizer, length = load_tokenizer(arguments.teacher), min(1024, teacher.config.max_position_embeddings)
    text = calibration_text(arguments.calibrate, None, tokenizer, teacher, tokens=arguments.tokens, seed=0)
    documents = read_documents(arguments.measure)
    measured = tokenise(tokenizer, documents, arguments.windows, length, arguments.measure, in_order=True)
    layout = parse_layout(arguments.hybrid, teacher.config.layer_types, teacher.config.sliding_window)
    student = student_from_teacher(teacher, student_config(teacher.config, layout), share=True)
    calibrate(teacher, student, text.fit)
    states = [final_states(model, measured).flatten(0, 1) for model in (student, teacher)]
    sums = torch.zeros(len(arguments.top_k), 3, dtype=torch.float64)  # KL, squared gradient error, mass
    whole = torch.zeros(2, dtype=torch.float64)  # KL, squared gradient
    with torch.no_grad():
        for mine, its in zip(*(hidden.split(ROWS) for hidden in states)):
            logits = mine @ student.lm_head.weight.T
            value, gradient = divergence(Term("forward_kl"), logits, its @ teacher.lm_head.weight.T, None)
            whole += torch.stack([value.double().sum(), gradient.double().square().sum()])
            for index, top_k in enumerate(arguments.top_k):
                (kept,) = likeliest(its, teacher.lm_head.weight, top_k, ROWS)
                kept = normalised(TopK(kept.ids, kept.log_p.half().float(), kept.log_rest))
                value, approximate = top_k_divergence(logits, kept)
                error = (approximate - gradient).double().square().sum()
                sums[index] += torch.stack([value.double().sum(), error, kept.log_p.double().exp().sum()])
    count, size = measured.numel(), teacher.config.vocab_size
    print(f"{count:,} tokens, vocabulary {size:,}, KL over all {whole[0] / count:.4f} nats a token\n")
    print("| k | bytes a target | teacher's mass in them | KL | of the whole | error of the gradient |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for top_k, (divergences, error, mass) in zip(arguments.top_k, sums.tolist()):
        print(
            f"| {top_k} | {bytes_a_target(top_k, size)} | {mass / count:.4f} | {divergences / count:.4f} "
            f"| {divergences / whole[0].item():.3f} | {(error / whole[1].item()) ** 0.5:.3f} |"
        )


if __name__ == "__main__":
    main()
