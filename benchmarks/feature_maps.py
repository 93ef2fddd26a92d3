"""How much of a teacher's attention beyond a window a state comes to tell, with and without maps of queries and keys.

    python -m benchmarks.feature_maps TEACHER TEXT ... [--layers 5 13 21 26] [--window 128] [--wider 192] [--steps 100]

One layer at a time, given the teacher's input: gates, strengths and maps (and nothing that the teacher has) are fitted
to the attention's output by Adam, one sequence of 1,024 tokens of the texts a step. Prints, per layer, the squared
error over the output's own square, from --window tokens on, in a sixth of the sequences that nothing is fitted on: of
the window alone, of one of --wider tokens, of the delta rule beside the window, and of the same with feature maps. On
one thread of a CPU some 30 s a layer for SmolLM2-135M. Twin: tests/distill/test_feature_maps.py.
"""

import argparse
import math
from fnmatch import fnmatchcase

import torch

from convert.calibration import Stream
from convert.command import load_tokenizer
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.sources import open_source
from convert.text import tokenise
from convert.text_files import read_documents
from deltanet import DeltaNetForCausalLM
from deltanet.mixer import DeltaMixer

LENGTH = 1024
RATE, WARMUP = 3e-3, 5
FIRST_STRENGTH = -3.0
"""The bias of the write strength before the first step: beta .05."""
WINDOW, DELTA = ("local_proj.*",), ("local_proj.*", "read_proj.*", "b_proj.*")
MAPPED = (*DELTA, "*_map.*")

Examples = list[tuple[torch.Tensor, torch.Tensor]]
"""Of every sequence the normed input of the layer (1, T, D) and what its attention makes of it (1, T, D)."""


@torch.no_grad()
def examples(teacher: DeltaNetForCausalLM, tokens: torch.Tensor, layers: list[int]) -> dict[int, Examples]:
    """tokens (N, T) int64."""
    stream, found = Stream(teacher, tokens, 1), {}
    for layer in range(max(layers) + 1):
        for rows in stream.rows():
            x = stream.mixer_input(layer, rows)
            made = stream.mix(layer, x)[1]
            stream.advance(layer, rows, made)
            if layer in layers:
                found.setdefault(layer, []).append((x, made))
    return found


def twin(teacher: DeltaNetForCausalLM, window: int) -> DeltaNetForCausalLM:
    """A plain copy without any attention layer, with that window, `delta`, shared states and feature maps."""
    layout = parse_layout("none", teacher.config.layer_types, teacher.config.sliding_window)
    mixer = {"mixer": "delta", "state_heads": "shared", "skip_taps": 0, "local_window": window, "feature_map": "linear"}
    return student_from_teacher(teacher, student_config(teacher.config, layout, **mixer))


def error(mixer: DeltaMixer, rotation, seen: Examples, start: int) -> torch.Tensor:
    """The squared error from token `start` on, over the square of what is wanted."""
    made = [mixer(x, rotation)[0][:, start:] - wanted[:, start:] for x, wanted in seen]
    return sum(m.square().sum() for m in made) / sum(wanted[:, start:].square().sum() for _, wanted in seen)


def fitted(mixer: DeltaMixer, rotation, seen: Examples, trained: tuple[str, ...], steps: int, start: int) -> float:
    """The error on the last sixth of `seen` (one sequence at least) once what is `trained` of a plain copy has been
    fitted to the rest; the mixer is left so."""
    mixer.reset_to_plain_copy()
    with torch.no_grad():
        mixer.b_proj.bias.fill_(FIRST_STRENGTH)
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trained))
    held = max(len(seen) // 6, 1)
    optimizer = torch.optim.Adam([p for p in mixer.parameters() if p.requires_grad], lr=RATE)
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * share
        optimizer.zero_grad()
        error(mixer, rotation, [seen[step % (len(seen) - held)]], start).backward()
        optimizer.step()
    with torch.no_grad():
        return error(mixer, rotation, seen[-held:], start).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder, a preset or a Hub id")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 13, 21, 26])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--wider", type=int, default=192)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--sequences", type=int, default=12, help="of every text")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_source(arguments.teacher) as found:
        teacher, tokenizer = load_teacher(found.folder, torch.float32).to(device), load_tokenizer(found.folder)
    parts = [tokenise(tokenizer, read_documents(file), arguments.sequences, LENGTH, file) for file in arguments.texts]
    tokens = torch.cat(parts)
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))].to(device)
    seen = examples(teacher, tokens, arguments.layers)
    stream = Stream(teacher, tokens[:1], 1)
    students = {window: twin(teacher, window) for window in (arguments.window, arguments.wider)}
    rows = (
        (f"window of {arguments.window}", arguments.window, WINDOW),
        (f"window of {arguments.wider}", arguments.wider, WINDOW),
        ("delta rule", arguments.window, DELTA),
        ("delta rule, feature maps", arguments.window, MAPPED),
    )
    for layer in arguments.layers:
        for name, window, trained in rows:
            mixer = students[window].model.layers[layer].self_attn
            left = fitted(mixer, stream.rotation(layer), seen[layer], trained, arguments.steps, arguments.window)
            print(f"layer {layer}, {name}: {left:.4f}", flush=True)


if __name__ == "__main__":
    main()
