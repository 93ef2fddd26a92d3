"""The kernel gives the same divergence and gradient as the PyTorch form (Triton's interpreter on a CPU)."""

import pytest
import torch

from distill.forward_kl_kernel import forward_kl_
from distill.losses import Term, divergence, vocabulary_loss

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("size", [5, 1000, 4096, 9001])
def test_it_is_the_divergence_and_its_gradient(size, temperature):
    torch.manual_seed(size)
    student, teacher = (4 * torch.randn(3, size, device=DEVICE) for _ in range(2))
    teacher[1, : size // 2] = -torch.inf
    teacher[2, 0] = 80.0  # all mass on one token
    targets = torch.zeros(3, dtype=torch.long, device=DEVICE)
    term = Term("forward_kl", temperature=temperature)
    wanted, wanted_gradient = divergence(term, student.double(), teacher.double(), targets)
    gradient = student.clone()
    value = forward_kl_(gradient, teacher, temperature, torch.tensor(0.5, dtype=torch.float64, device=DEVICE))
    # float32 sums of `size` terms
    torch.testing.assert_close(value.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), 0.5 * wanted_gradient, rtol=1e-4, atol=1e-6)


def test_rows_may_be_strided_and_there_may_be_none():
    wide, teacher = torch.randn(4, 300, device=DEVICE), torch.randn(4, 200, device=DEVICE)
    one = torch.ones((), device=DEVICE)
    beyond = wide[:, 200:].clone()
    close = wide[:, :200].clone()
    assert torch.equal(forward_kl_(wide[:, :200], teacher, 1.0, one), forward_kl_(close, teacher, 1.0, one))
    assert torch.equal(wide[:, :200], close)
    assert torch.equal(wide[:, 200:], beyond)
    assert forward_kl_(close[:0], teacher[:0], 1.0, one).shape == (0,)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_a_gpu_is_that_of_float64(dtype):
    torch.manual_seed(0)
    hidden, weight, its_hidden, its_weight = (
        torch.randn(shape, device=DEVICE).to(dtype) for shape in ((70, 32), (5003, 32), (70, 48), (5003, 48))
    )
    targets = torch.randint(0, 5003, (70,), device=DEVICE)
    targets[::7] = -100

    def run(*tensors):
        mine = [x.clone().requires_grad_() for x in tensors[:2]]
        loss, parts = vocabulary_loss(
            *mine,
            targets,
            [Term("forward_kl", 0.7)],
            60,
            teacher_hidden=tensors[2],
            teacher_weight=tensors[3],
            vocab_size=5000,
            chunk_tokens=17,
        )
        loss.backward()
        return [loss.detach(), parts["forward_kl"], *(x.grad for x in mine)]

    made = run(hidden, weight, its_hidden, its_weight)
    wanted = run(*(x.double() for x in (hidden, weight, its_hidden, its_weight)))
    # bfloat16: logits of size sqrt(32) are rounded to 2^-9 of themselves, gradients once more
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, its in zip(made, wanted):
        assert (mine.double() - its.double()).norm() <= bound * its.double().norm()
