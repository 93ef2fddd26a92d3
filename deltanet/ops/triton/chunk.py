"""What the delta-rule kernels share: rows of a chunk in and out, decays, the C x C inverse, products.

Everything a kernel keeps between two products stays in registers: the accumulator of a product is, register for
register, a left operand, and its transpose a right operand. `tl.trans(x).to(dtype)` (transpose first, round second) is
what makes the compiler see it. C tokens of a chunk, G query heads per state head, of which GB at a time.
"""

import triton
import triton.language as tl


@triton.jit
def wide(x):
    """x as a 64-bit integer."""
    return tl.full([], 0, tl.int64) + x


@triton.jit
def mm(a, b):
    """a b in float32: one tensor-core product of half-precision operands, three (tf32x3) of float32 ones."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, input_precision="tf32x3")
    else:
        return tl.dot(a, b)


@triton.jit
def mma(a, b, acc):
    """acc + a b, as `mm`."""
    if a.dtype == tl.float32:
        return tl.dot(a, b, acc, input_precision="tf32x3")
    else:
        return tl.dot(a, b, acc)


@triton.jit
def operand(x, DT: tl.constexpr):
    """x as an operand of products. bf16 -> fp16 is opaque to the compiler, so that it is done once, on registers, and
    not once for every form that a product wants; exact for 6e-5 <= |x| <= 65504."""
    if x.dtype == tl.bfloat16 and tl.float16 == DT:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 lo, hi; shl.b32 lo, $1, 16; and.b32 hi, $1, 0xffff0000; cvt.rn.f16x2.f32 $0, hi, lo; }",
            "=r,r",
            [x],
            dtype=tl.float16,
            is_pure=False,
            pack=2,
        )
    else:
        return x.to(DT)


@triton.jit
def inverse_length(x):
    """1 / |x| of every row, as reference.unit."""
    wide = x.to(tl.float32)
    return tl.rsqrt(tl.sum(wide * wide, 1) + 1e-6)


@triton.jit
def unit_operand(x, NORM: tl.constexpr, DT: tl.constexpr):
    """The rows of x, brought to length one first if NORM, as operands."""
    if NORM:
        return (x.to(tl.float32) * inverse_length(x)[:, None]).to(DT)
    else:
        return operand(x, DT)


@triton.jit
def span(n, seg, nseg, cu, T, STEP: tl.constexpr, VARLEN: tl.constexpr):
    """Batch row and first and last + 1 token of segment `seg` of document n; segments are multiples of STEP."""
    if VARLEN:
        b = n * 0
        begin = tl.load(cu + n).to(tl.int32)
        end = tl.load(cu + n + 1).to(tl.int32)
    else:
        b = n
        begin = 0
        end = T
    length = tl.cdiv(tl.cdiv(end - begin, nseg), STEP) * STEP
    t0 = tl.minimum(begin + seg * length, end)
    return b, t0, tl.minimum(t0 + length, end)


@triton.jit
def load_rows(
    x, b, t, t1, T, h, H, at, sub,
    C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    TMA: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Tokens t.. of heads h*G + sub*GB .., columns at..at+BD -> [C*GB, BD], row = token * GB + head.

    Zero outside the tensor, and outside the document with pointers or MASK. x: a tensor map or a pointer."""
    r = tl.arange(0, C * GB)
    inside = t + r // GB < t1
    if TMA:
        y = x.load([b, t, h * G + sub * GB, at]).reshape(C * GB, BD)
        if MASK:
            y = tl.where(inside[:, None], y, 0.0)
        return y
    else:
        d = at + tl.arange(0, BD)
        row = (wide(b) * T + t + r // GB) * (H * G) + h * G + sub * GB + r % GB
        return tl.load(x + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_rows(
    x, y, b, t, t1, T, h, H, at, sub,
    C: tl.constexpr, G: tl.constexpr, GB: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The reverse of `load_rows`; a tensor map clips at the tensor's end only, pointers at the document's."""
    if TMA:
        x.store([b, t, h * G + sub * GB, at], y.to(x.dtype).reshape(1, C, GB, BD))
    else:
        r = tl.arange(0, C * GB)
        d = at + tl.arange(0, BD)
        row = (wide(b) * T + t + r // GB) * (H * G) + h * G + sub * GB + r % GB
        inside = t + r // GB < t1
        tl.store(x + row[:, None] * D + d[None, :], y.to(x.dtype.element_ty), mask=inside[:, None] & (d < D)[None, :])


@triton.jit
def decay_row(n, h, H, cu, T, C: tl.constexpr, VARLEN: tl.constexpr):
    """Where the decay of token t of head h of document n lies, less t; and the length of a row, in whole chunks. Before
    the first row, and after the last, there is room for one chunk."""
    if VARLEN:
        begin = tl.load(cu + n).to(tl.int32)
        padded = tl.cdiv(tl.load(cu + n + 1).to(tl.int32) - begin, C) * C
        first = (wide(begin) // C + n) * C * H
    else:
        begin = 0
        padded = tl.cdiv(T, C) * C
        first = wide(n) * H * padded
    return C + first + h * wide(padded) - begin, padded


@triton.jit
def load_decays(row, t, C: tl.constexpr, GB: tl.constexpr):
    """The decay, as log2, from the start of the chunk at t through every token, [C], the same for query rows, [C*GB],
    through its first token, and through its last. `row` is of decay_row; past either end there is something unused."""
    a = tl.load(row + t + tl.arange(0, C))
    aq = a
    if GB > 1:
        aq = tl.load(row + t + tl.arange(0, C * GB) // GB)
    return a, aq, tl.load(row + t), tl.load(row + t + C - 1)


@triton.jit
def load_square(row, t, C: tl.constexpr):
    """The C x C matrix of the chunk at t, as inverse_kernel left it. `row` is C times that of decay_row."""
    i = tl.arange(0, C)
    return tl.load(row + (t + i[:, None]) * C + i[None, :])


@triton.jit
def between(a_row, a_col):
    """2^-|a_row - a_col|: the decay between two tokens, whichever is later."""
    return tl.exp2(-tl.abs(a_row[:, None] - a_col[None, :]))


@triton.jit
def unit_lower_inverse(nL, nLt, C: tl.constexpr, LOWER: tl.constexpr, UPPER: tl.constexpr, DT: tl.constexpr):
    """D = (I + L)^-1 (if LOWER), its transpose (if UPPER); nL = -L where i > j, nLt = -L^T where j > i.

    Blocks double, D <- D - D Loff D, so nothing cancels. D and D^T are carried side by side, because the accumulator
    of the one is the right operand of the other's product."""
    i = tl.arange(0, C)[:, None]
    j = tl.arange(0, C)[None, :]
    near = (i // 2) == (j // 2)
    eye = tl.where(i == j, 1.0, 0.0)
    D = eye + tl.where(near & (i > j), nL, 0.0)
    Dt = eye + tl.where(near & (j > i), nLt, 0.0)
    LEVELS: tl.constexpr = 4
    for level in tl.static_range(1, LEVELS):
        off = (((i >> level) & 1) == 1) & ((j >> level) == (i >> level) - 1)
        Loff = tl.trans(tl.where(off, nL, 0.0)).to(DT)
        D_left = D.to(DT)
        Xt = mm(Dt.to(DT), Loff)
        if UPPER or level + 1 < LEVELS:
            Dt = mma(Xt.to(DT), tl.trans(D).to(DT), Dt)
        if LOWER or level + 1 < LEVELS:
            D = mma(D_left, tl.trans(Xt).to(DT), D)
    return D, Dt
