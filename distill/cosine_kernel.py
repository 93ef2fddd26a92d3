"""1 - cos of rows and its gradient in one Triton kernel each: two reads of the rows, one write.

In plain PyTorch a layer takes dozens of kernels over float32 copies of its hidden states.
Values: `hidden_losses.cosine`. Twin: tests/distill/test_cosine_kernel.py.
"""

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

SHORTEST = 1e-8  # as torch.nn.functional.cosine_similarity: what a norm is at least


@triton.jit
def cosine_kernel(
    student, teacher, valid, value, factor, gradient, student_row, teacher_row, size, shortest,
    BACKWARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One valid row. Forward: its value. Backward: its gradient, times `factor` of the row."""
    program = tl.program_id(0)
    row = tl.load(valid + program).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < size
    s = tl.load(student + row * student_row + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(teacher + row * teacher_row + at, mask=inside, other=0.0).to(tl.float32)
    s_norm = tl.maximum(tl.sqrt(tl.sum(s * s, 0)), shortest)
    t_norm = tl.maximum(tl.sqrt(tl.sum(t * t, 0)), shortest)
    s, t = s / s_norm, t / t_norm
    cosine = tl.sum(s * t, 0)
    if BACKWARD:
        made = (s * cosine - t) / s_norm * tl.load(factor + program).to(tl.float32)
        tl.store(gradient + row * size + at, made.to(gradient.dtype.element_ty), mask=inside)
    else:
        tl.store(value + program, 1.0 - cosine)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student, teacher, valid):
        ctx.save_for_backward(student, teacher, valid)
        value = torch.empty(len(valid), dtype=torch.float32, device=student.device)
        _launch(student, teacher, valid, value=value)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, factor):
        student, teacher, valid = ctx.saved_tensors
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        _launch(student, teacher, valid, factor=factor.contiguous(), gradient=gradient)
        return gradient, None, None


def _launch(student, teacher, valid, *, value=None, factor=None, gradient=None) -> None:
    if len(valid):
        size = student.shape[1]
        cosine_kernel[(len(valid),)](
            student, teacher, valid, value, factor, gradient, student.stride(0), teacher.stride(0), size, SHORTEST,
            BACKWARD=gradient is not None, BLOCK=triton.next_power_of_2(size), num_warps=4,
        )  # fmt: skip


def one_minus_cosine(student: torch.Tensor, teacher: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """student, teacher (N, D) of any float dtype but float64, valid (n) int64 -> (n) float32, 1 - cos of these rows.

    The gradient reaches `student` alone, in its dtype, zero in rows that are not valid. Rows may be strided, columns
    not. Everything is computed in float32.
    """
    assert student.shape == teacher.shape
    assert student.stride(1) == teacher.stride(1) == 1
    return _Rows.apply(student, teacher.detach(), valid)
