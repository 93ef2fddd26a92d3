"""Forward KL over a large vocabulary: the chunked loss beside one that makes all logits at once, time and memory.

    python -m benchmarks.loss [--tokens 8192] [--vocabulary 128256] [--width 2048]

Forward and backward on random hidden states and heads, medians of --rounds turns after two. Extra memory is the peak
above what inputs and their gradients take. The chunked loss is `distill.losses.vocabulary_loss`; the other is what
PyTorch makes of the definition. On a CPU memory is not told.
"""

import argparse
import statistics
import time

import torch

from distill.losses import Term, vocabulary_loss


def whole(hidden, weight, teacher_hidden, teacher_weight, targets):
    log_q = (hidden @ weight.T).float().log_softmax(-1)
    log_p = (teacher_hidden @ teacher_weight.T).float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum() / len(targets)


def chunked(hidden, weight, teacher_hidden, teacher_weight, targets):
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    return vocabulary_loss(hidden, weight, targets, [Term("forward_kl")], len(targets), **teacher)[0]


def turn(form, inputs) -> tuple[float, float, list[torch.Tensor]]:
    """Seconds, GiB, and the loss with its two gradients, of one forward and backward."""
    cuda = inputs[0].is_cuda
    for tensor in inputs[:2]:
        tensor.grad = torch.zeros_like(tensor)
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    began = time.perf_counter()
    loss = form(*inputs)
    loss.backward()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    extra = (torch.cuda.max_memory_allocated() - held) / 2**30 if cuda else float("nan")
    return seconds, extra, [loss.detach(), *(tensor.grad for tensor in inputs[:2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    options = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    states = [torch.randn(arguments.tokens, arguments.width, **options) for _ in range(2)]
    heads = [torch.randn(arguments.vocabulary, arguments.width, **options) * 0.02 for _ in range(2)]
    targets = torch.zeros(arguments.tokens, dtype=torch.int64, device=arguments.device)
    inputs = [states[0].requires_grad_(), heads[0].requires_grad_(), states[1], heads[1], targets]
    turns = {form: [turn(form, inputs) for _ in range(arguments.rounds + 2)][2:] for form in (chunked, whole)}
    for form, rows in turns.items():
        seconds, extra = (statistics.median(row[i] for row in rows) for i in range(2))
        print(f"{form.__name__:<8}{1e3 * seconds:>10.1f} ms{extra:>8.2f} GiB on top of inputs and gradients")
    (mine, *gradients), (other, *others) = (rows[-1][2] for rows in turns.values())
    apart = [(a.float() - b.float()).norm() / b.float().norm() for a, b in zip(gradients, others)]
    print(f"losses {mine:.6f} and {other:.6f}; gradients differ by {apart[0]:.1e} (states) and {apart[1]:.1e} (head)")


if __name__ == "__main__":
    main()
