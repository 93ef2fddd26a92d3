"""Does the compiler at hand multiply correctly with four warps on Hopper? (Triton 3.4 to 3.7.0 is reported not to.)

    python benchmarks/hopper_products.py

Few entries of our table of configurations have four warps, because of reports against chunk kernels of another library
with chunks of 64 and four warps (flash-linear-attention, issues 640 and 984): products whose operand is the transpose
of another product's result, which four warps compute by wgmma. The kernels below are the smallest with that shape: the
gradients of masked scores, and of the inverse of a chunk. Each runs with 1, 2, 4 and 8 warps on bfloat16 and is
compared with float64; a warp count whose error is three times that of one warp is called wrong. Prints versions, one
line per kernel and size, and the verdict; exit code 0 whatever it is, 1 where even one warp is wrong.

Without a card TRITON_INTERPRET=1 checks the kernels' arithmetic in float16.
"""

import argparse
import sys

import torch
import triton
import triton.language as tl

CHUNK = 64
WARPS = (1, 2, 4, 8)
ROUNDED = 0.02
"""Largest relative error of products of bfloat16 operands whose intermediate results are rounded to bfloat16 too."""


@triton.jit
def scores_kernel(q, k, v, do, dq, dk, dv, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Of o = tril(q k^T) v: dq, dk and dv of one chunk per program, rows [C, D], BD columns at a time."""
    r = tl.arange(0, C)
    at = tl.program_id(0) * C * D + r[:, None] * D
    lower = r[:, None] >= r[None, :]
    P = tl.zeros([C, C], tl.float32)
    dP = tl.zeros([C, C], tl.float32)
    for i in range(D // BD):
        d = i * BD + tl.arange(0, BD)[None, :]
        P = tl.dot(tl.load(q + at + d), tl.trans(tl.load(k + at + d)), P)
        dP = tl.dot(tl.load(do + at + d), tl.trans(tl.load(v + at + d)), dP)
    P16 = tl.where(lower, P, 0.0).to(q.dtype.element_ty)
    dP16 = tl.where(lower, dP, 0.0).to(q.dtype.element_ty)
    for i in range(D // BD):
        d = i * BD + tl.arange(0, BD)[None, :]
        tl.store(dq + at + d, tl.dot(dP16, tl.load(k + at + d)))
        tl.store(dk + at + d, tl.dot(tl.trans(dP16), tl.load(q + at + d)))
        tl.store(dv + at + d, tl.dot(tl.trans(P16), tl.load(do + at + d)))


@triton.jit
def inverse_kernel(inv, k, beta, dw, dk, dbeta, D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr):
    """Of w = inv diag(beta) k, inv = (I + tril*(diag(beta) k k^T))^-1 [C, C]: dk and dbeta of one chunk per program."""
    r = tl.arange(0, C)
    at = tl.program_id(0) * C * D + r[:, None] * D
    square = tl.program_id(0) * C * C + r[:, None] * C + r[None, :]
    b = tl.load(beta + tl.program_id(0) * C + r).to(tl.float32)
    A = tl.load(inv + square)
    dA = tl.zeros([C, C], tl.float32)
    db = tl.zeros([C], tl.float32)
    for i in range(D // BD):
        d = i * BD + tl.arange(0, BD)[None, :]
        kd = tl.load(k + at + d)
        dwd = tl.load(dw + at + d)
        kb = (kd.to(tl.float32) * b[:, None]).to(kd.dtype)
        dA = tl.dot(dwd, tl.trans(kb), dA)
        dkb = tl.dot(tl.trans(A), dwd)
        db += tl.sum(dkb * kd.to(tl.float32), 1)
        tl.store(dk + at + d, dkb * b[:, None])
    dA = tl.dot(tl.trans(A), dA.to(A.dtype))
    dL = tl.where(r[:, None] > r[None, :], -tl.dot(dA.to(A.dtype), tl.trans(A)), 0.0).to(A.dtype)
    for i in range(D // BD):
        d = i * BD + tl.arange(0, BD)[None, :]
        kd = tl.load(k + at + d)
        kb = (kd.to(tl.float32) * b[:, None]).to(kd.dtype)
        dkb = tl.dot(dL, kd)
        db += tl.sum(dkb * kd.to(tl.float32), 1)
        tl.store(dk + at + d, tl.load(dk + at + d) + dkb * b[:, None] + tl.dot(tl.trans(dL), kb))
    tl.store(dbeta + tl.program_id(0) * C + r, db)


def scores(D: int, device: str, dtype: torch.dtype):
    """(launch of (num_warps, block) -> results, truth)"""
    generator = torch.Generator().manual_seed(D)
    q, k, v, do = (torch.randn(4, CHUNK, D, generator=generator).to(device, dtype) for _ in range(4))
    q, k = q * D**-0.5, k * 1.0

    def launch(num_warps, block):
        made = [torch.full_like(q, torch.nan, dtype=torch.float32) for _ in range(3)]
        scores_kernel[(len(q),)](q, k, v, do, *made, D=D, BD=block, C=CHUNK, num_warps=num_warps)
        return made

    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    o = (leaves[0] @ leaves[1].mT).tril() @ leaves[2]
    return launch, torch.autograd.grad(o, leaves, do.double())


def inverse(D: int, device: str, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(D)
    k = torch.nn.functional.normalize(torch.randn(4, CHUNK, D, generator=generator), dim=-1).to(device, dtype)
    beta = torch.rand(4, CHUNK, generator=generator).to(device, dtype)
    dw = torch.randn(4, CHUNK, D, generator=generator).to(device, dtype)
    leaves = [x.double().requires_grad_() for x in (k, beta)]
    L = (leaves[1][..., None] * (leaves[0] @ leaves[0].mT)).tril(-1)
    inv = torch.linalg.inv(torch.eye(CHUNK, device=device, dtype=torch.float64) + L)
    truth = torch.autograd.grad(inv @ (leaves[1][..., None] * leaves[0]), leaves, dw.double())

    def launch(num_warps, block):
        made = [torch.full_like(x, torch.nan, dtype=torch.float32) for x in (k, beta)]
        given = (inv.detach().to(dtype).contiguous(), k, beta, dw)
        inverse_kernel[(len(k),)](*given, *made, D=D, BD=block, C=CHUNK, num_warps=num_warps)
        return made

    return launch, truth


def main() -> int:
    argparse.ArgumentParser(description=__doc__).parse_args()
    card = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if card else ("cpu", torch.float16)
    name = torch.cuda.get_device_name() if card else "no card, the interpreter"
    print(f"triton {triton.__version__}, torch {torch.__version__}, {name}")
    wrong, sound = [], True
    for kernel in (scores, inverse):
        for D, block in ((64, 64), (128, 64), (128, 128), (256, 64)):
            launch, truth = kernel(D, device, dtype)
            errors = {}
            for num_warps in WARPS if card else WARPS[:1]:
                try:
                    found = launch(num_warps, block)
                    errors[num_warps] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth))
                except Exception as failure:
                    print(f"{kernel.__name__} D {D} block {block}, {num_warps} warps: {str(failure)[:120]}")
            print(
                f"{kernel.__name__} D {D} block {block}: " + ", ".join(f"{n} warps {e:.1e}" for n, e in errors.items())
            )
            sound = sound and errors.get(1, 1.0) < ROUNDED
            wrong += [(kernel.__name__, D, n) for n, e in errors.items() if not e < 3 * errors[1]]
    if not sound:
        print("BROKEN: one warp is wrong already, so this says nothing")
    elif wrong:
        print(f"WRONG: {wrong}")
    else:
        print("every warp count agrees: this compiler does not show the fault here")
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
