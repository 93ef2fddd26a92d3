"""How much of a teacher's attention beyond a window a state comes to tell: with and without maps of queries and keys,
decay and positions of its own, and in texts longer than those it was fitted on.

    python -m benchmarks.feature_maps TEACHER TEXT ... [--layers 5 13 21 26] [--window 128] [--wider 192] [--steps 100]
        [--length 1024] [--held-length 4096]

One layer at a time, given the teacher's input: gates, strengths, decays and maps (and nothing that the teacher has) are
fitted to the attention's output by Adam, one sequence of --length tokens of the texts a step. Prints, per layer, the
squared error over the output's own square in a sixth of the text that nothing is fitted on, in sequences of
--held-length tokens: from --window tokens to 1,024, to 2,048 and so on; of the window alone, of one of --wider tokens,
and of the delta rule beside the window: without and with feature maps, these also with decay (`gated_delta`) and with
`state_positions: fixed`. On one thread of a CPU some 45 s a layer for SmolLM2-135M.
Twin: tests/distill/test_feature_maps.py.
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

FIRST_PLACE = 1024
"""Tokens up to which the first error is measured; every further one goes twice as far."""
RATE, WARMUP = 3e-3, 5
FIRST_STRENGTH = -3.0
"""The bias of the write strength before the first step: beta .05."""
FIRST_HALF_LIFE = 2000
"""Tokens, of a state with decay before the first step: it has to hold what has left the window."""
WINDOW, DELTA = ("local_proj.*",), ("local_proj.*", "read_proj.*", "a_proj.*", "b_proj.*")
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


def twin(
    teacher: DeltaNetForCausalLM, window: int, mixer: str = "delta", positions: str = "rotary"
) -> DeltaNetForCausalLM:
    """A plain copy without any attention layer, with that window, mixer and state_positions, shared states and feature
    maps."""
    layout = parse_layout("none", teacher.config.layer_types, teacher.config.sliding_window)
    options = {"mixer": mixer, "state_heads": "shared", "skip_taps": 0, "local_window": window, "feature_map": "linear"}
    options |= {"state_positions": positions}
    return student_from_teacher(teacher, student_config(teacher.config, layout, **options))


def places(window: int, length: int) -> list[tuple[int, int]]:
    """The parts of a sequence that have an error of their own, from the window on, as bounds."""
    ends = [end for end in (FIRST_PLACE << i for i in range(length.bit_length())) if window < end < length]
    return list(zip([window, *ends], [*ends, length]))


def error(mixer: DeltaMixer, rotation, seen: Examples, start: int, end: int | None = None) -> torch.Tensor:
    """The squared error on tokens `start` to `end`, over the square of what is wanted. rotation: cos and sin of as many
    tokens as the sequences have, or None."""
    made = [mixer(x, rotation)[0][:, start:end] - wanted[:, start:end] for x, wanted in seen]
    return sum(m.square().sum() for m in made) / sum(wanted[:, start:end].square().sum() for _, wanted in seen)


def fit(mixer: DeltaMixer, rotation, seen: Examples, trained: tuple[str, ...], steps: int, start: int) -> None:
    """Fits what is `trained` of a plain copy to the sequences, from token `start` on."""
    mixer.reset_to_plain_copy()
    with torch.no_grad():
        mixer.b_proj.bias.fill_(FIRST_STRENGTH)
        if mixer.config.mixer == "gated_delta":
            mixer.a_proj.bias.fill_(math.log(math.expm1(math.log(2) / FIRST_HALF_LIFE)))
    for name, parameter in mixer.named_parameters():
        parameter.requires_grad_(any(fnmatchcase(name, pattern) for pattern in trained))
    optimizer = torch.optim.Adam([p for p in mixer.parameters() if p.requires_grad], lr=RATE)
    for step in range(steps):
        share = min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = RATE * share
        optimizer.zero_grad()
        error(mixer, rotation, [seen[step % len(seen)]], start).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder, a preset or a Hub id")
    parser.add_argument("texts", nargs="+")
    parser.add_argument("--layers", nargs="+", type=int, default=[5, 13, 21, 26])
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--wider", type=int, default=192)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence that is fitted on")
    parser.add_argument("--held-length", type=int, help="tokens of one that is not; a multiple (default: --length)")
    parser.add_argument("--sequences", type=int, default=12, help="of --held-length, of every text")
    arguments = parser.parse_args()
    length, held_length = arguments.length, arguments.held_length or arguments.length
    if held_length % length:
        parser.error(f"--held-length {held_length}: allowed is a multiple of --length ({length})")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with open_source(arguments.teacher) as found:
        teacher, tokenizer = load_teacher(found.folder, torch.float32).to(device), load_tokenizer(found.folder)
    texts = [(read_documents(file), arguments.sequences, held_length, file) for file in arguments.texts]
    tokens = torch.cat([tokenise(tokenizer, *text) for text in texts])
    tokens = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))].to(device)
    held = max(len(tokens) // 6, 1)
    parts = tokens[:-held].reshape(-1, length), tokens[-held:]
    (seen, streams), (unseen, longer) = (
        (examples(teacher, p, arguments.layers), Stream(teacher, p[:1], 1)) for p in parts
    )
    window = arguments.window
    rows = (
        (f"window of {window}", (window,), WINDOW),
        (f"window of {arguments.wider}", (arguments.wider,), WINDOW),
        ("delta", (window,), DELTA),
        *(
            (f"{kind}, feature maps, {positions} positions", (window, kind, positions), MAPPED)
            for positions in ("rotary", "fixed")
            for kind in ("delta", "gated_delta")
        ),
    )
    students = {what: twin(teacher, *what) for what in {what for _, what, _ in rows}}
    for layer in arguments.layers:
        for name, what, trained in rows:
            mixer = students[what].model.layers[layer].self_attn
            fit(mixer, streams.rotation(layer), seen[layer], trained, arguments.steps, window)
            with torch.no_grad():
                left = [
                    f"{error(mixer, longer.rotation(layer), unseen[layer], *place):.4f} to {place[1]:,}"
                    for place in places(window, held_length)
                ]
            print(f"layer {layer}, {name}: {', '.join(left)}", flush=True)


if __name__ == "__main__":
    main()
