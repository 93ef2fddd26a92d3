"""Which heads of a teacher recall, and how much of that a state of its own keys and queries could do.

    python -m benchmarks.induction TEACHER TEXT [--distances 160 256 512] [--rows 3] [--window 128] [--least 0.3]

In rows of 1,024 tokens of the text a passage of 48 comes again so many tokens later. A head recalls where a token of
the copy attends to the one after its match. For the heads that give it --least of their attention, every token gets a
random code in the place of its value, the delta rule writes the codes under the head's keys as tokens leave the window,
and the copy's queries read: told is how often the code after the match is the likeliest of all, by strength of
writing; that of softmax attention over the same codes stands beside it. No training, no learned projections: what the
teacher's keys and queries can do as they are. On a CPU two minutes for SmolLM2-135M.
"""

import argparse

import torch
import torch.nn.functional as F

from convert.command import load_tokenizer
from convert.layouts import parse_layout
from convert.loading import load_teacher, student_from_teacher
from convert.plan import student_config
from convert.sources import open_source
from convert.text import tokenise
from convert.text_files import read_documents
from deltanet import DeltaNetForCausalLM
from deltanet.ops import delta_rule

LENGTH, PASSAGE, START, CUE = 1024, 48, 200, 8
STRENGTHS = (1.0, 0.3, 0.1, 0.03)


def linear_twin(teacher: DeltaNetForCausalLM) -> DeltaNetForCausalLM:
    """The teacher with a mixer in the place of every attention, of the same weights."""
    layout = parse_layout("none", teacher.config.layer_types, teacher.config.sliding_window)
    return student_from_teacher(teacher, student_config(teacher.config, layout), share=True)


def queries_and_keys(
    teacher: DeltaNetForCausalLM, twin: DeltaNetForCausalLM, row: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every layer q (HQ, T, hd) and k repeated to as many heads, as the teacher's softmax sees them. row (T)."""
    found = []

    def note(layer, inputs, named):
        mixer = twin.model.layers[layer.layer_idx].self_attn
        q, k, _, _ = mixer.project(inputs[0], named["position_embeddings"])
        found.append((q[0].transpose(0, 1), k[0].transpose(0, 1).repeat_interleave(mixer.group, 0)))

    handles = [layer.self_attn.register_forward_pre_hook(note, with_kwargs=True) for layer in teacher.model.layers]
    teacher.model(input_ids=row[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """(heads, T, T), causal."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), -torch.inf).softmax(-1)


def told(read: torch.Tensor, codes: torch.Tensor, wanted: torch.Tensor) -> float:
    """The share of rows of read (n, C) nearest to the code that is wanted (n) of codes (T, C)."""
    return ((read @ codes.T).argmax(-1) == wanted).float().mean().item()


def state_read(q, k, codes, strength: float, window: int) -> torch.Tensor:
    """(T, C), what the queries read of codes that a state wrote under the keys as they left the window."""
    k, v = (F.pad(x, (0, 0, window, 0))[: len(q)][None, :, None] for x in (k, codes))
    beta = torch.full(k.shape[:3], strength) * (torch.arange(len(q)) >= window)[None, :, None]
    return delta_rule(q[None, :, None], k, v, beta, scale=1.0, normalize_qk=True)[0][0, :, 0]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", help="a folder, a preset or a Hub id")
    parser.add_argument("text")
    parser.add_argument("--distances", nargs="+", type=int, default=[160, 256, 512])
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--least", type=float, default=0.3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with open_source(arguments.teacher) as found:
        teacher, tokenizer = load_teacher(found.folder, torch.float32), load_tokenizer(found.folder)
    text = tokenise(tokenizer, read_documents(arguments.text), arguments.rows, LENGTH, arguments.text, in_order=True)
    twin = linear_twin(teacher)
    copy = torch.arange(CUE, PASSAGE - 1)
    wanted, seen, share = START + copy + 1, {}, 0.0
    for distance in arguments.distances:
        again = text.clone()
        again[:, START + distance : START + distance + PASSAGE] = text[:, START : START + PASSAGE]
        seen[distance] = [queries_and_keys(teacher, twin, row) for row in again]
        for layers in seen[distance]:
            share = share + torch.stack(
                [attention(q, k)[:, START + distance + copy, wanted].mean(-1) for q, k in layers]
            )
    share = share / (len(text) * len(arguments.distances))
    order = share.flatten().argsort(descending=True)[:12].tolist()
    places = [(at // share.shape[1], at % share.shape[1]) for at in order]
    print("attention to the token after the match, layer.head:")
    print("  " + ", ".join(f"{layer}.{head} {share[layer, head]:.2f}" for layer, head in places))
    heads = [place for place in places if share[place] >= arguments.least]
    for distance, rows in seen.items():
        shares = {name: [] for name in ("softmax", *STRENGTHS)}
        for layers in rows:
            for layer, head in heads:
                q, k = (x[head] for x in layers[layer])
                codes = F.normalize(torch.randn(LENGTH, k.shape[-1]), dim=-1)
                at = START + distance + copy
                shares["softmax"].append(told((attention(q[None], k[None])[0] @ codes)[at], codes, wanted))
                for strength in STRENGTHS:
                    read = state_read(q, k, codes, strength, arguments.window)
                    shares[strength].append(told(read[at], codes, wanted))
        cells = [f"{name} {sum(found) / len(found):.3f}" for name, found in shares.items() if found]
        print(f"told {distance} tokens back, {len(heads)} heads: {', '.join(cells)}", flush=True)


if __name__ == "__main__":
    main()
