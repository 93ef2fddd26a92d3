"""Forward and backward of the chunkwise kernels against the recurrence token by token (arXiv 2406.06484, Figure 1).

    python benchmarks/recurrent_vs_chunk.py [--sizes 64,128,256] [--lengths 512,...,16384] [--peer] [--check]

The recurrence is `fused_recurrent_*` below: one program per state and tile of value columns, the state in registers,
one token after another; the backward walks twice. Every length has as many tokens in all (--tokens) and heads fill a
width of --width. Device time, medians of CUDA-graph replays, as benchmarks/kernels.py. --check compares both with
float64 on a small case first (without a card: in Triton's interpreter, with TRITON_INTERPRET=1). --peer times
flash-linear-attention's `fused_recurrent_delta_rule` too.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import kernels as rows

import deltanet.ops.triton as kernels
from deltanet.ops import reference

PAPER = {
    (64, 2048): 5.5, (64, 4096): 7.6, (64, 8192): 11.5,
    (128, 2048): 8.9,
}  # fmt: skip
"""Speed-ups on one H100 as quoted from Table 4 of the paper, whose kernels are of 2024, by (head size, length)."""
TILINGS = ((8, 1), (16, 2), (32, 4))
"""(columns of a state per program, warps) of the recurrence: the fastest for a shape counts. Small tiles fill the card
with few sequences; large ones leave fewer partial gradients to add."""


@triton.jit(do_not_specialize=["T", "H"])
def recurrent_forward_kernel(q, k, v, beta, o, x, scale, T, H, D: tl.constexpr, BV: tl.constexpr):
    """o = scale S^T q, and x = v - S^T k for the backward. Grid (B * H * tiles); q, k, v, o (B, T, H, D)."""
    NV: tl.constexpr = D // BV
    bh = tl.program_id(0) // NV
    rd = tl.arange(0, D)
    rv = (tl.program_id(0) % NV) * BV + tl.arange(0, BV)
    S = tl.zeros([D, BV], tl.float32)
    for t in tl.range(0, T):
        row = ((bh // H).to(tl.int64) * T + t) * H + bh % H
        q_t = tl.load(q + row * D + rd).to(tl.float32)
        k_t = tl.load(k + row * D + rd).to(tl.float32)
        x_t = tl.load(v + row * D + rv).to(tl.float32) - tl.sum(S * k_t[:, None], 0)
        S += k_t[:, None] * (x_t * tl.load(beta + row).to(tl.float32))[None, :]
        tl.store(o + row * D + rv, (tl.sum(S * q_t[:, None], 0) * scale).to(o.dtype.element_ty))
        if x is not None:
            tl.store(x + row * D + rv, x_t)


@triton.jit(do_not_specialize=["T", "H", "part"])
def recurrent_backward_kernel(
    q, k, beta, x, do, dq, dk, dv, dbeta, scale, T, H, part, D: tl.constexpr, BV: tl.constexpr
):  # fmt: skip
    """dS from the last token to the first (dv; parts of dk and dbeta per tile), then S from the first to the last
    (parts of dq, the rest of dk). Grid as the forward; dq, dk (tiles, B, T, H, D), dbeta (tiles, B, T, H) float32."""
    NV: tl.constexpr = D // BV
    bh = tl.program_id(0) // NV
    tile = (tl.program_id(0) % NV).to(tl.int64)
    rd = tl.arange(0, D)
    rv = tile * BV + tl.arange(0, BV)
    dS = tl.zeros([D, BV], tl.float32)
    for i in tl.range(0, T):
        row = ((bh // H).to(tl.int64) * T + T - 1 - i) * H + bh % H
        q_t = tl.load(q + row * D + rd).to(tl.float32)
        k_t = tl.load(k + row * D + rd).to(tl.float32)
        do_t = tl.load(do + row * D + rv).to(tl.float32) * scale
        x_t = tl.load(x + row * D + rv)
        b_t = tl.load(beta + row).to(tl.float32)
        dS += q_t[:, None] * do_t[None, :]
        du_t = tl.sum(dS * k_t[:, None], 0)
        tl.store(dbeta + tile * part + row, tl.sum(du_t * x_t, 0))
        tl.store(dk + (tile * part + row) * D + rd, tl.sum(dS * (b_t * x_t)[None, :], 1))
        tl.store(dv + row * D + rv, (b_t * du_t).to(dv.dtype.element_ty))
        dS -= k_t[:, None] * (b_t * du_t)[None, :]
    tl.debug_barrier()
    S = tl.zeros([D, BV], tl.float32)
    for t in tl.range(0, T):
        row = ((bh // H).to(tl.int64) * T + t) * H + bh % H
        k_t = tl.load(k + row * D + rd).to(tl.float32)
        do_t = tl.load(do + row * D + rv).to(tl.float32) * scale
        u_t = tl.load(x + row * D + rv) * tl.load(beta + row).to(tl.float32)
        dv_t = tl.load(dv + row * D + rv).to(tl.float32)
        at = (tile * part + row) * D + rd
        tl.store(dk + at, tl.load(dk + at) - tl.sum(S * dv_t[None, :], 1))
        S += k_t[:, None] * u_t[None, :]
        tl.store(dq + at, tl.sum(S * do_t[None, :], 1))


class Recurrent(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, scale, tile, num_warps):
        B, T, H, D = q.shape
        o, x = torch.empty_like(v), torch.empty_like(v, dtype=torch.float32)
        recurrent_forward_kernel[(B * H * (D // tile),)](
            q, k, v, beta, o, x, scale, T, H, D=D, BV=tile, num_warps=num_warps
        )
        ctx.save_for_backward(q, k, beta, x)
        ctx.scale, ctx.tile, ctx.num_warps = scale, tile, num_warps
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, beta, x = ctx.saved_tensors
        B, T, H, D = q.shape
        tiles = D // ctx.tile
        dq, dk = (torch.empty(tiles, *q.shape, dtype=torch.float32, device=q.device) for _ in range(2))
        dbeta = torch.empty(tiles, *beta.shape, dtype=torch.float32, device=q.device)
        # The kernel reads back what it wrote of dv: float32, so that its second walk sees no rounding.
        dv = torch.empty_like(x)
        recurrent_backward_kernel[(B * H * tiles,)](
            q, k, beta, x, do.contiguous(), dq, dk, dv, dbeta, ctx.scale, T, H, B * T * H,
            D=D, BV=ctx.tile, num_warps=ctx.num_warps,
        )  # fmt: skip
        dq, dk, dbeta = (whole.sum(0).to(like.dtype) for whole, like in ((dq, q), (dk, k), (dbeta, beta)))
        return dq, dk, dv.to(q.dtype), dbeta, None, None, None


def recurrent(tile, num_warps):
    return lambda q, k, v, beta: Recurrent.apply(q, k, v, beta, q.shape[3] ** -0.5, tile, num_warps)


def chunkwise(q, k, v, beta):
    return kernels.delta_rule(q, k, v, beta, scale=q.shape[3] ** -0.5)[0]


def peer(q, k, v, beta):
    from fla.ops.delta_rule import fused_recurrent_delta_rule

    return fused_recurrent_delta_rule(q, k, v, beta, scale=q.shape[3] ** -0.5)[0]


def check(device: str, dtype: torch.dtype) -> bool:
    """Values and gradients of both forms against float64, D = 64."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    made = F.normalize(normal(1, 37, 2, 64), dim=-1), F.normalize(normal(1, 37, 2, 64), dim=-1), normal(1, 37, 2, 64)
    made = [x.to(device, dtype) for x in (*made, torch.sigmoid(normal(1, 37, 2)))]
    do = normal(1, 37, 2, 64).to(device, dtype)

    def all_of(rule, tensors):
        leaves = [x.detach().requires_grad_() for x in tensors]
        o = rule(*leaves)
        return [o, *torch.autograd.grad(o, leaves, do.to(o.dtype))]

    def sequential(q, k, v, beta):
        options = {"initial_state": None, "output_final_state": False, "cu_seqlens": None, "normalize_qk": False}
        return reference.delta_rule(q, k, v, beta, g=None, scale=64**-0.5, **options)[0]

    truth = all_of(sequential, [x.double() for x in made])
    bound, right = (3.5e-3 if dtype == torch.bfloat16 else 1e-5), True
    forms = {f"recurrent, tile {tiling[0]}": recurrent(*tiling) for tiling in TILINGS}
    for name, rule in {**forms, "chunkwise": chunkwise}.items():
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(all_of(rule, made), truth)]
        right = right and max(errors) < bound
        print(f"{name}: errors of o, dq, dk, dv, dbeta " + " ".join(f"{e:.1e}" for e in errors), flush=True)
    return right


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", default="64,128,256")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384")
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    card = torch.cuda.is_available()
    if options.check and not check("cuda" if card else "cpu", torch.bfloat16 if card else torch.float32):
        print("broken")
        return 1
    if not card:
        return 0
    for D in map(int, options.sizes.split(",")):
        for T in map(int, options.lengths.split(",")):
            shape = (max(1, options.tokens // T), T, options.width // D, options.width // D, D, {})
            tensors, do, _ = rows.made(*shape)
            times = {"chunk": rows.both(chunkwise, tensors, do)[1]}
            times["recurrent"] = min(rows.both(recurrent(*tiling), tensors, do)[1] for tiling in TILINGS)
            if options.peer:
                times["peer"] = rows.both(peer, tensors, do)[1]
            said = f", paper {PAPER[D, T]}x" if (D, T) in PAPER else ""
            others = ", ".join(f"{name} {time:.2f} ms = {time / times['chunk']:.1f}x" for name, time in times.items())
            print(f"D {D}, B {shape[0]} x T {T} x {shape[2]} heads: {others}{said}", flush=True)
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
