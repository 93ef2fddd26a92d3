"""The chunk form against the sequential rule on a CPU, forward and backward, side by side in one process.

    python benchmarks/ops_cpu.py [--tokens 4096] [--heads 8] [--size 64] [--threads 2]

Prints a row per case: medians of wall-clock seconds and their ratio. The sequential rule runs once (it takes seconds).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from deltanet import delta_rule


def seconds(backend: str, tensors: dict, gated: bool, repeats: int) -> float:
    """Median over `repeats` of forward plus backward."""
    taken = []
    for _ in range(repeats):
        leaves = {name: x.detach().requires_grad_() for name, x in tensors.items()}
        start = time.perf_counter()
        o, _ = delta_rule(
            leaves["q"], leaves["k"], leaves["v"], leaves["beta"], g=leaves["g"] if gated else None, backend=backend
        )
        o.sum().backward()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=64, help="of keys and values")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    shape = (1, arguments.tokens, arguments.heads)
    q, k, v = (torch.randn(*shape, arguments.size) for _ in range(3))
    tensors = {
        "q": F.normalize(q, dim=-1),
        "k": F.normalize(k, dim=-1),
        "v": v,
        "beta": torch.rand(shape),
        "g": -0.1 * torch.rand(shape),
    }
    print(f"B1 T{arguments.tokens} H{arguments.heads} K=V={arguments.size}, torch {torch.__version__}, float32")
    print("| rule | reference s | chunk s | ratio |\n|---|---|---|---|")
    for gated in (False, True):
        slow, fast = seconds("reference", tensors, gated, 1), seconds("chunk", tensors, gated, 5)
        print(f"| {'gated' if gated else 'ungated'} | {slow:.2f} | {fast:.3f} | {slow / fast:.0f}x |", flush=True)


if __name__ == "__main__":
    main()
