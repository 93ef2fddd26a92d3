"""What a teacher loses that sees a window of its text in the layers where a student of some layout is linear.

    python -m benchmarks.windows TEACHER TEXT ... [--hybrids every:4 layers:18,20] [--windows 64 128] [--recall 128 512]
        [--tokens 6144] [--without-first]

Nothing is trained and no state is read: a plain copy with a local window, which sees the document's first token too.
Prints, per layout and window, perplexity over the teacher's and KL(teacher || it) on the first --tokens tokens of every
text, in windows of 1,024, in float32; with --recall also how much it guesses of a passage of the first text that comes
again so many tokens later, beside the teacher; and with --without-first the same of sliding layers, which see no first
token. Twin: tests/distill/test_baselines.py.
"""

import argparse
from itertools import product

import torch

from convert.closeness import compare, final_states, recall_by_distance
from convert.command import load_tokenizer
from convert.layouts import LINEAR, SLIDING, Layout, parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.sources import open_source
from convert.text import tokenise
from convert.text_files import read_documents
from deltanet import DeltaNetForCausalLM
from deltanet.config import max_context

LENGTH = 1024
RECALL_TOKENS = 4096


def in_windows(teacher: DeltaNetForCausalLM, hybrid: str, window: int, has_first: bool) -> DeltaNetForCausalLM:
    """The teacher with windows where a student of that layout is linear."""
    layout = parse_layout(hybrid, teacher.config.layer_types, teacher.config.sliding_window)
    if has_first:
        mixer = {"local_window": window, "skip_taps": 0, "state_heads": "shared"}
        return student_from_teacher(teacher, student_config(teacher.config, layout, **mixer))
    types = tuple(SLIDING if kind == LINEAR else kind for kind in layout.layer_types)
    return student_from_teacher(teacher, student_config(teacher.config, Layout(types, window)))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder, a preset or a Hub id")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--hybrids", nargs="+", default=["every:4", "none"])
    parser.add_argument("--windows", nargs="+", type=int, default=[32, 64, 128, 192])
    parser.add_argument("--recall", nargs="+", type=int, default=[], help="distances in tokens")
    parser.add_argument("--tokens", type=int, default=6 * LENGTH)
    parser.add_argument("--without-first", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_source(arguments.teacher) as found:
        teacher, tokenizer = load_teacher(found.folder, torch.float32).to(device), load_tokenizer(found.folder)
    count = arguments.tokens // LENGTH
    texts = {
        file: tokenise(tokenizer, read_documents(file), count, LENGTH, file, in_order=True).to(device)
        for file in arguments.texts
    }
    whole = {file: final_states(teacher, ids) for file, ids in texts.items()}
    probe = {"most": max_context(teacher.config), "tokens": RECALL_TOKENS, "distances": arguments.recall}
    first = texts[arguments.texts[0]]
    if known := recall_by_distance(teacher, None, first, **probe):
        print("teacher: " + "; ".join(f"recall at {row['distance']} {row['teacher']:.3f}" for row in known))
    kinds = (True, False) if arguments.without_first else (True,)
    for hybrid, has_first, window in product(arguments.hybrids, kinds, arguments.windows):
        student = in_windows(teacher, hybrid, window, has_first).eval()
        cells = []
        for file, ids in texts.items():
            scores = compare(teacher, student, {"teacher": whole[file], "student": final_states(student, ids)}, ids)
            ratio = scores["student"]["perplexity"] / scores["teacher"]["perplexity"]
            cells.append(f"{file} {ratio:.3f}x, KL {scores['student']['kl']:.3f}")
        for row in recall_by_distance(None, student, first, **probe):
            cells.append(f"recall at {row['distance']} {row['student']:.3f}")
        print(f"{hybrid}, {window} tokens{' and the first' if has_first else ''}: {'; '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
