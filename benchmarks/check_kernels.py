"""Checks every shipped configuration of the kernels on a CUDA card against float64, before anything is timed.

    python benchmarks/check_kernels.py [--repeats 50] [--peer] [--shard 0/8]

For shapes x options x inputs (iid; keys of cosine 0.8 with beta near 1; beta in (1.5, 2); zero keys; decays near 0 and
near 1; scale 1): relative RMS errors of o and all gradients, finite results with every fresh allocation poisoned with
NaN, and bitwise equality over repeated runs. One line per case; exit code 1 where a bound is broken. --peer prints
flash-linear-attention's errors for the same bfloat16 inputs beside ours.
"""

# ruff: noqa: E402, C408

import argparse
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests/deltanet/ops")]

from delta_inputs import error, gradients, inputs

import deltanet.ops.triton as kernels
from deltanet.ops import chunk
from deltanet.ops.triton import launch, operator

BOUNDS = {torch.bfloat16: 0.0035, torch.float16: 0.0012, torch.float32: 1e-5}
"""bfloat16: rounding the truth alone is .0017, and twice in one case (dq and dk of normalized wide heads), .0024; small
tensors scatter around that. float16: .0002. float32: products are exact to 3e-7."""


@contextmanager
def poisoned():
    """Every torch.empty, empty_like and new_empty of floats starts as NaN."""

    def fill(made):
        return made.fill_(torch.nan) if made.is_floating_point() else made

    empty, empty_like, new_empty = torch.empty, torch.empty_like, torch.Tensor.new_empty
    with (
        patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        patch.object(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
        patch.object(torch.Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k))),
    ):
        yield


def cases():
    """(name, arguments of inputs(), dtype, segments, normalize, scale)"""
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    hard = dict(keys="cosine", beta="one")
    for size in (
        (64, 64),
        (128, 128),
        (32, 32),
        (16, 16),
        (256, 256),
        (60, 60),
        (96, 100),
        (100, 64),
        (128, 64),
        (64, 256),
    ):
        K, V = size
        for decay in (None, "mixed"):
            for more in ({}, hard):
                yield dict(T=201, K=K, V=V, decay=decay, state=True, **more), bf16, None, False, None
    for K in (64, 128):
        for decay in (None, "mixed"):
            base = dict(K=K, V=K, decay=decay, state=True)
            yield dict(T=300, G=4, **hard, **base), bf16, None, False, None
            yield dict(T=300, G=3, **base), bf16, None, False, None
            yield dict(T=1037, **hard, **base), bf16, 4, False, None
            yield dict(T=1037, G=4, **base), bf16, 3, True, None
            yield dict(T=300, lengths=(0, 1, 63, 0, 15, 221), **base), bf16, None, False, None
            yield dict(T=900, lengths=(800, 100), **base), bf16, 2, False, None
            yield dict(T=130, beta="high", **base), bf16, None, False, 1.0
            yield dict(T=130, keys="zero", beta="high", **base), bf16, None, True, 1.0
            yield dict(T=200, **base), fp16, None, False, None
            yield dict(T=200, **base), fp32, None, True, None
            yield dict(T=1, **base), bf16, None, False, None
            yield dict(T=17, **base), bf16, None, False, None
        for large in ({"values": 1e30}, {"loss": 1e30}, {"loss": 1e-30}, {"directions": 1e15}):
            for dtype in (bf16, fp32):
                made = dict(T=130, K=K, V=K, decay="mixed", state=True, **large)
                yield made, dtype, None, "directions" in large, None
        for decay in ("near0", "near1"):
            yield dict(T=600, K=K, V=K, decay=decay, state=True), bf16, None, False, None
    for decay in (None, "mixed"):
        yield dict(T=1037, K=256, V=256, decay=decay, state=True, **hard), bf16, 4, False, None
        yield dict(T=700, K=256, V=96, decay=decay, state=True), bf16, 2, False, None
    yield dict(T=2048, K=64, V=64, decay="mixed", H=4, **hard), bf16, None, False, None
    yield dict(T=2048, K=64, V=64, H=4, **hard), bf16, None, False, None
    yield dict(T=2048, K=64, V=64, decay="near1", H=4, **hard), bf16, 4, False, None


def truth_of(given, scale, normalize):
    wide = given.to(torch.float64)
    return gradients(wide, chunk.delta_rule, scale=scale, normalize_qk=normalize)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument(
        "--shard", default="0/1", help="i/n: every n-th case from i on; compiling takes most of the time"
    )
    options = parser.parse_args()
    broken, worst, started = 0, {}, time.time()
    shard, shards = map(int, options.shard.split("/"))
    for made, dtype, segments, normalize, scale in list(cases())[shard::shards]:
        operator._case = lambda q, k, v, g, cu, n, s=segments: launch.case(q, k, v, g, cu, n, s)
        given = inputs(dtype=torch.float64, **made).to(dtype).to("cuda")
        if given.cu_seqlens is not None:
            given.cu_seqlens = given.cu_seqlens.cuda()
        if given.g is not None:
            given.g = given.g.float()
        scale = made["K"] ** -0.5 if scale is None else scale
        truth = truth_of(given, scale, normalize)
        call = dict(scale=scale, normalize_qk=normalize)
        try:
            with poisoned():
                found = gradients(given, kernels.delta_rule, **call)
            torch.cuda.synchronize()
        except Exception as failure:
            print(f"FAILED {made} {dtype}: {str(failure)[:300]}", flush=True)
            broken += 1
            continue
        errors = {name: error(found[name], truth[name]) for name in truth}
        finite = all(bool(x.isfinite().all()) for x in found.values())
        same = True
        for _ in range(options.repeats):
            again = gradients(given, kernels.delta_rule, **call)
            same = same and all(torch.equal(again[name], found[name]) for name in found)
        few = 3.0 if made["T"] < 32 or made.get("decay") == "near0" else 1.0
        bound = BOUNDS[dtype] * few
        # a gradient in the dtype of its input; dg and states are float32 but come from the same operands
        right = finite and same and max(errors.values()) <= bound
        broken += not right
        worst[dtype] = max(worst.get(dtype, 0.0), *errors.values())
        text = " ".join(f"{name} {value:.1e}" for name, value in errors.items())
        verdict = "ok " if right else "BAD"
        print(
            f"{verdict} {made} {str(dtype)[6:]} seg {segments} norm {normalize} | {text} | finite {finite} same {same}",
            flush=True,
        )
    rounded = {str(dtype)[6:]: round(value, 5) for dtype, value in worst.items()}
    print(f"{broken} broken; worst {rounded}; {time.time() - started:.0f} s")
    if options.peer:
        compare_with_peer()
    return 1 if broken else 0


def compare_with_peer() -> None:
    from fla.ops.delta_rule import chunk_delta_rule

    operator._case = launch.case

    def peer(q, k, v, beta, *, g, scale, initial_state, output_final_state, cu_seqlens, normalize_qk):
        return chunk_delta_rule(q, k, v, beta, scale=scale, initial_state=initial_state, output_final_state=True)

    names = ("o", "dq", "dk", "dv", "dbeta")
    print("\n| D | keys, beta | which | " + " | ".join(names) + " |\n" + "|---" * 8 + "|")
    for K, H in ((64, 32), (128, 16)):
        for label, more in (("iid, sigmoid(N)", {}), ("cosine 0.8, near 1", dict(keys="cosine", beta="one"))):
            given = inputs(2048, H=H, K=K, V=K, dtype=torch.float64, **more).to(torch.bfloat16).to("cuda")
            truth = truth_of(given, K**-0.5, False)
            for who, rule in (("ours", kernels.delta_rule), ("FLA", peer)):
                found = gradients(given, rule, scale=K**-0.5, normalize_qk=False)
                row = " | ".join(f"{error(found[name], truth[name]):.4f}" for name in names)
                print(f"| {K} | {label} | {who} | {row} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
