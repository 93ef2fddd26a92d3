"""The kernel gives the same value and gradient as the PyTorch form (Triton's interpreter on a CPU)."""

import pytest
import torch
import torch.nn.functional as F

from distill.cosine_kernel import one_minus_cosine
from distill.hidden_losses import cosine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def wanted(student, teacher, valid, factor):
    student = student.detach().double().requires_grad_()
    value = 1 - F.cosine_similarity(student[valid], teacher.double()[valid], dim=-1)
    value.backward(factor.double())
    return value.detach(), student.grad


@pytest.mark.parametrize("size", [1, 5, 64, 576, 1000])
def test_it_is_the_cosine_and_its_gradient(size):
    torch.manual_seed(size)
    student, teacher = (3 * torch.randn(12, size, device=DEVICE) for _ in range(2))
    teacher[3], teacher[4], teacher[5] = student[3], -2 * student[4], 0  # parallel, opposite, of no length
    student[6] *= 1e15
    teacher[6] *= 1e15
    valid = torch.tensor([0, 3, 4, 5, 6, 9, 11], device=DEVICE)
    factor = torch.randn(len(valid), device=DEVICE)
    expected, expected_gradient = wanted(student, teacher, valid, factor)
    student.requires_grad_()
    value = one_minus_cosine(student, teacher, valid)
    value.backward(factor)
    # float32 sums of `size` terms; parallel rows have a gradient that is all rounding
    torch.testing.assert_close(value.detach().double(), expected, rtol=1e-5, atol=1e-6)
    length = student.detach().double().norm(dim=-1, keepdim=True)
    torch.testing.assert_close(student.grad.double() * length, expected_gradient * length, rtol=1e-5, atol=1e-5)
    others = torch.ones(12, dtype=torch.bool, device=DEVICE).index_fill(0, valid, False)
    assert (student.grad[others] == 0).all()


def test_rows_that_are_not_valid_may_hold_anything_and_rows_may_be_strided():
    wide, teacher = torch.randn(6, 40, device=DEVICE), torch.randn(6, 30, device=DEVICE)
    wide[2], teacher[3] = torch.nan, torch.inf
    valid = torch.tensor([0, 1, 4, 5], device=DEVICE)
    strided, close = wide[:, 5:35].detach(), wide[:, 5:35].clone()
    results = []
    for student in (strided.requires_grad_(), close.requires_grad_()):
        value = one_minus_cosine(student, teacher, valid)
        value.sum().backward()
        results.append((value, student.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].isfinite().all()


def test_there_may_be_no_valid_row():
    student, teacher = torch.randn(4, 8, device=DEVICE, requires_grad=True), torch.randn(4, 8, device=DEVICE)
    value = one_minus_cosine(student, teacher, torch.arange(0, device=DEVICE))
    value.sum().backward()
    assert value.shape == (0,)
    assert (student.grad == 0).all()


def test_the_teacher_gets_no_gradient():
    student, teacher = (torch.randn(4, 8, device=DEVICE, requires_grad=True) for _ in range(2))
    one_minus_cosine(student, teacher, torch.arange(4, device=DEVICE)).sum().backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_gpu_is_that_of_float64(dtype):
    torch.manual_seed(0)
    student, teacher = (torch.randn(2, 300, 576, device=DEVICE).to(dtype) for _ in range(2))
    valid = torch.arange(0, 600, 3, device=DEVICE)
    made, its = student.clone().requires_grad_(), student.double().requires_grad_()
    value, expected = cosine(made, teacher, valid, 900), cosine(its, teacher.double(), valid, 900)
    value.backward()
    expected.backward()
    assert abs(value.double() - expected) <= 1e-6 * expected
    # bfloat16: what is written is rounded to 2^-9 of itself
    bound = 1e-5 if dtype == torch.float32 else 4e-3
    assert (made.grad.double() - its.grad).norm() <= bound * its.grad.norm()
