"""Forward KL and its gradient from two matrices of logits in one Triton kernel: two reads of each, one write.

In plain PyTorch the same takes some ten passes over float32 copies of the logits. Values: `losses.divergence`.
Twin: tests/distill/test_forward_kl_kernel.py.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _softmax_sums(logits, size, inverse_temperature, BLOCK: tl.constexpr):
    """The log of the sum of exponentials of one row, read block by block."""
    top, total = -float("inf"), 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        z = tl.load(logits + at, mask=at < size, other=-float("inf")).to(tl.float32) * inverse_temperature
        higher = tl.maximum(top, tl.max(z, 0))
        # A block of nothing but -inf leaves `higher` at -inf, and -inf - -inf is not a number.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 0)
        top = higher
    return top + tl.log(total)


@triton.jit
def forward_kl_kernel(
    student, teacher, value, factor, student_row, teacher_row, size, temperature, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    student += row * student_row
    teacher += row * teacher_row
    inverse = 1.0 / temperature
    mine = _softmax_sums(student, size, inverse, BLOCK)
    its = _softmax_sums(teacher, size, inverse, BLOCK)
    scale = tl.load(factor).to(tl.float32) * temperature
    divergence = 0.0
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < size
        z = tl.load(student + at, mask=inside, other=0.0).to(tl.float32)
        log_q = z * inverse - mine
        log_p = tl.load(teacher + at, mask=inside, other=-float("inf")).to(tl.float32) * inverse - its
        p, q = tl.exp(log_p), tl.exp(log_q)
        divergence += tl.sum(tl.where(p > 0, p * (log_p - log_q), 0.0), 0)
        tl.store(student + at, ((q - p) * scale).to(student.dtype.element_ty), mask=inside)
    tl.store(value + row, divergence * temperature * temperature)


def forward_kl_(student: torch.Tensor, teacher: torch.Tensor, temperature: float, factor: torch.Tensor) -> torch.Tensor:
    """T^2 KL(teacher || student) per row at temperature T, (n) float32. `student` (n, V) is overwritten with the
    gradient of their sum, times `factor` (a scalar on the same device), in its own dtype; teacher (n, V) is read.

    Rows may be strided, columns not. A teacher's -inf excludes a token. Everything is computed in float32.
    """
    rows, size = student.shape
    assert teacher.shape == student.shape
    assert student.stride(1) == teacher.stride(1) == 1
    value = torch.empty(rows, dtype=torch.float32, device=student.device)
    if rows:
        block = min(4096, triton.next_power_of_2(size))
        forward_kl_kernel[(rows,)](
            student,
            teacher,
            value,
            factor,
            student.stride(0),
            teacher.stride(0),
            size,
            temperature,
            BLOCK=block,
            num_warps=8,
        )
    return value
