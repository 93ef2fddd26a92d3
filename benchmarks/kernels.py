"""Times the kernels on one CUDA card: ours, flash-linear-attention's and causal SDPA side by side, and the copy floor.

    python benchmarks/kernels.py [--peer] [--rows a,b] [--json out.json] [--decode] [--lengths] [--first-call]

Device time: medians of CUDA-graph replays. With --peer every row runs in a process of its own, so that the peer tunes
on the very shape that is timed. "floor" is the time to copy as many bytes as the operation must move, at the measured
bandwidth of a copy: q, k, v, beta in and o out; for the backward also do in, the gradients out, and the inputs again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from triton.testing import do_bench

sys.path.insert(0, str(Path(__file__).parents[1]))

import deltanet.ops.triton as kernels

# name: B, T, query heads, state heads, D, options
ROWS = {
    "d64": (16, 2048, 32, 32, 64, {}),
    "d64-long": (1, 32768, 32, 32, 64, {}),
    "d128": (16, 2048, 16, 16, 128, {}),
    "d128-long": (1, 32768, 16, 16, 128, {}),
    "grouped": (16, 2048, 32, 8, 64, {}),
    "few": (4, 2048, 32, 32, 64, {}),
    "d64-gated": (16, 2048, 32, 32, 64, {"gated": True}),
    "d128-gated": (16, 2048, 16, 16, 128, {"gated": True}),
    "d64-long-gated": (1, 32768, 32, 32, 64, {"gated": True}),
    "few-gated": (4, 2048, 32, 32, 64, {"gated": True}),
    "d64-norm": (16, 2048, 32, 32, 64, {"normalize": True}),
    "d64-packed": (1, 32768, 32, 32, 64, {"documents": 16}),
    "d64-state": (16, 2048, 32, 32, 64, {"state": True}),
    "d64-ragged": (16, 2041, 32, 32, 64, {}),
    "d128-norm": (16, 2048, 16, 16, 128, {"normalize": True}),
}


def replayed(fn, repeats: int = 20) -> float:
    """Median milliseconds of one replay of fn as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            fn()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times)[repeats // 2]


def copy_bandwidth() -> float:
    """Bytes per second, read plus write, of a large copy."""
    x = torch.empty(2**28, dtype=torch.float32, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / do_bench(lambda: y.copy_(x), return_mode="median") * 1e3


def made(B, T, HQ, H, D, options):
    generator = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, device="cuda")
    q, k = F.normalize(normal(B, T, HQ, D), dim=-1), F.normalize(normal(B, T, H, D), dim=-1)
    v, beta, do = normal(B, T, H, D), torch.sigmoid(normal(B, T, H)), normal(B, T, HQ, D)
    q, k, v, beta, do = (x.bfloat16() for x in (q, k, v, beta, do))
    more = {}
    if options.get("gated"):
        more["g"] = -F.softplus(normal(B, T, H) - 3)
    if options.get("state"):
        more["initial_state"] = normal(B, H, D, D)
    if n := options.get("documents"):
        more["cu_seqlens"] = torch.linspace(0, T, n + 1, device="cuda").int()
    more["normalize_qk"] = bool(options.get("normalize"))
    return (q, k, v, beta), do, more


def both(rule, tensors, do) -> tuple[float, float, float]:
    """Milliseconds forward (nothing kept) and forward plus backward, and the latter's peak MiB."""
    with torch.no_grad():
        forward = replayed(lambda: rule(*tensors))
    leaves = [x.detach().requires_grad_() for x in tensors]
    step = lambda: torch.autograd.grad(rule(*leaves), leaves, do)
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - before) / 2**20
    return forward, replayed(step), peak


def measure(name: str, peer: bool) -> dict:
    B, T, HQ, H, D, options = ROWS[name]
    (q, k, v, beta), do, more = made(*ROWS[name])
    g = more.pop("g", None)
    tensors = (q, k, v, beta) if g is None else (q, k, v, beta, g)

    def ours(q, k, v, beta, g=None):
        return kernels.delta_rule(q, k, v, beta, g=g, scale=D**-0.5, **more)[0]

    bandwidth = copy_bandwidth()
    queries, states = 2 * B * T * HQ * D, 2 * B * T * H * D
    floor = [(2 * queries + 2 * states) / bandwidth * 1e3, (5 * queries + 6 * states) / bandwidth * 1e3]
    found = {"row": name, "card": torch.cuda.get_device_name(), "copy TB/s": bandwidth / 1e12, "floor": floor}
    found["ours"] = both(ours, tensors, do)
    if not peer:
        return found
    expanded = [x.repeat_interleave(HQ // H, 2).contiguous() for x in tensors[1:]]

    def attention(q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    if "documents" not in options:
        found["sdpa"] = both(attention, (q, *expanded[:2]), do)
    else:
        return found
    options = {"use_qk_l2norm_in_kernel": more["normalize_qk"], "initial_state": more.get("initial_state")}
    if g is None:
        from fla.ops.delta_rule import chunk_delta_rule

        found["fla"] = both(
            lambda q, k, v, b: chunk_delta_rule(q, k, v, b, scale=D**-0.5, **options)[0], (q, *expanded), do
        )
    else:
        from fla.ops.gated_delta_rule import chunk_gated_delta_rule

        with torch.no_grad():
            rule = lambda: chunk_gated_delta_rule(q, *expanded[:2], beta=expanded[2], g=expanded[3], scale=D**-0.5)
            found["fla"] = [replayed(rule), float("nan"), float("nan")]
    return found


def decoding() -> list[str]:
    """One token, 32 heads, D = 64: microseconds in a graph, against reading and writing the state once."""
    lines, bandwidth = [], copy_bandwidth()
    for B in (1, 16, 256):
        q, k, v = (torch.randn(B, 1, 32, 64, device="cuda").bfloat16() for _ in range(3))
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        beta = torch.rand(B, 1, 32, device="cuda").bfloat16()
        states = [torch.randn(B, 32, 64, 64, device="cuda") for _ in range(4)]

        def steps(q=q, k=k, v=v, beta=beta, states=states):
            for state in states:
                kernels.delta_rule_step_(q, k, v, beta, state)

        with torch.no_grad():
            each = replayed(steps) / len(states) * 1e3
        floor = 2 * states[0].numel() * 4 / bandwidth * 1e6
        lines.append(f"decode batch {B}: {each:.2f} us, state floor {floor:.2f} us, {each / floor:.2f}x")
    return lines


def lengths() -> list[str]:
    """One sequence of 32 heads, D = 64, forward: every doubling from 32K to 1,048,576 tokens."""
    lines, before = [], None
    for T in (2**n for n in range(15, 21)):
        q, k, v, beta = made(1, T, 32, 32, 64, {})[0]
        with torch.no_grad():
            each = replayed(lambda tensors=(q, k, v, beta): kernels.delta_rule(*tensors, scale=0.125))
        more = "" if before is None else f", {each / before:.2f}x of half as many"
        lines.append(f"{T} tokens: {each:.3f} ms{more}")
        before = each
        torch.cuda.empty_cache()
    return lines


def first_call() -> list[str]:
    """Forward and backward of one shape with nothing compiled before, and what other B, T and H compile after it."""
    lines = []
    for row in ("d64", "d64-gated", "d128", "d128-gated"):
        with tempfile.TemporaryDirectory() as cache:
            command = [sys.executable, __file__, "--compiles", row]
            told = subprocess.run(command, env=os.environ | {"TRITON_CACHE_DIR": cache}, capture_output=True, text=True)
        lines += (told.stdout or told.stderr).strip().splitlines()[-1:]
    return lines


def compiles(row: str) -> str:
    _, _, _, _, D, options = ROWS[row]
    torch.zeros(1, device="cuda")
    cache, took, files = Path(os.environ["TRITON_CACHE_DIR"]), [], []
    for B, T, H in ((2, 512, 4), (3, 500, 4), (1, 1000, 6), (5, 77, 8)):
        tensors, do, more = made(B, T, H, H, D, options)
        g = more.pop("g", None)
        leaves = [x.requires_grad_() for x in (*tensors, *([] if g is None else [g]))]
        torch.cuda.synchronize()
        start = time.perf_counter()
        o = kernels.delta_rule(*tensors, g=g, scale=D**-0.5, **more)[0]
        torch.autograd.grad(o, leaves, do)
        torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
        files.append(len(list(cache.iterdir())))
    more = files[-1] - files[0]
    return f"{row}: first call {took[0]:.1f} s, {files[0]} entries of Triton's cache; other B, T, H {more} more"


def shown(found: dict) -> str:
    cells = [f"{found['row']:15}", "ours {:.3f} / {:.3f}, {:.0f} MiB".format(*found["ours"])]
    cells.append("floor {:.3f} / {:.3f}".format(*found["floor"]))
    for other in ("fla", "sdpa"):
        if other in found:
            forward, step, peak = found[other]
            ratios = forward / found["ours"][0], step / found["ours"][1]
            cells.append(f"{other} {forward:.3f} / {step:.3f}, {peak:.0f} MiB = {ratios[0]:.2f}x / {ratios[1]:.2f}x")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peer", action="store_true", help="time flash-linear-attention and SDPA too")
    parser.add_argument("--rows", default=",".join(ROWS), help="with commas between, or '' for none: %(default)s")
    parser.add_argument("--json", help="append one JSON object per row")
    parser.add_argument("--decode", action="store_true", help="also the decoding step")
    parser.add_argument("--lengths", action="store_true", help="also one sequence of 32K to 1,048,576 tokens")
    parser.add_argument("--first-call", action="store_true", help="also what compiling takes")
    parser.add_argument("--compiles", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := [name for name in options.rows.split(",") if name and name not in ROWS]:
        parser.error(f"--rows: no {', '.join(unknown)}; there are {', '.join(ROWS)}")
    if not torch.cuda.is_available():
        parser.error("needs a CUDA card")
    if options.compiles:
        print(compiles(options.compiles))
        return
    names = [name for name in options.rows.split(",") if name]
    for name in names:
        if options.peer and len(names) > 1:
            more = ["--json", options.json] if options.json else []
            subprocess.run([sys.executable, __file__, "--peer", "--rows", name, *more], check=False)
            continue
        found = measure(name, options.peer)
        print(shown(found), flush=True)
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps(found) + "\n")
        torch.cuda.empty_cache()
    if options.decode:
        print("\n".join(decoding()))
    if options.lengths:
        print("\n".join(lengths()))
    if options.first_call:
        print("\n".join(first_call()))


if __name__ == "__main__":
    main()
