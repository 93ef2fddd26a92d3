"""What a step of a small student costs a GPU and its host: forward and backward of distillation, without an optimizer.

    python -m benchmarks.training_step [--sequences 32] [--taps 4] [--local-window 0] [--hidden-cosine]
        [--compile] [--profile]

SmolLM2-135M's shapes, one attention layer in four, gated_delta, random weights in bfloat16, packed sequences of 1,024
random tokens. Prints milliseconds and tokens a second over --steps, peak memory, and with --profile the kernels' and
operators' times of one step. Start it twice at once, with and without `nvidia-cuda-mps-control -d`, to see what a host
that is too slow leaves unused.
"""

import argparse
import time

import torch

from convert.loading import skeleton
from deltanet import DeltaNetConfig
from deltanet.config import STATE_HEADS
from distill.batch import make_batch
from distill.schema import Loss, Stage
from distill.stages import Whole, compile_layers

from .scaling import Drawn, sequence

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
}
LENGTH = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--taps", type=int, default=4)
    parser.add_argument("--local-window", type=int, default=0)
    parser.add_argument("--state-heads", default="expanded", choices=STATE_HEADS)
    parser.add_argument("--hidden-cosine", action="store_true", help="the loss on hidden states too")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(SHAPE["num_hidden_layers"])]
    mixer = {"skip_taps": arguments.taps, "local_window": arguments.local_window, "state_heads": arguments.state_heads}
    student = DeltaNetConfig(**SHAPE, layer_types=kinds, mixer="gated_delta", **mixer)
    teacher = DeltaNetConfig(**SHAPE, layer_types=["full_attention"] * len(kinds), dtype=torch.bfloat16)
    models = [skeleton(config) for config in (student, teacher)]
    models = [Drawn(model, seed, device).fill(model, torch.bfloat16) for seed, model in enumerate(models)]
    models[1].eval().requires_grad_(False)
    losses = ["forward_kl", *(["hidden_cosine"] if arguments.hidden_cosine else [])]
    module = Whole(*models, Stage(kind="distil", steps=1, losses=[Loss(name=name) for name in losses]))
    if arguments.compile:
        compile_layers(module)
    batch = make_batch([sequence(i, LENGTH, SHAPE["vocab_size"]) for i in range(arguments.sequences)], device)

    def step() -> None:
        module(batch, batch.valid.numel())[0].backward()
        module.zero_grad(set_to_none=True)

    def finished() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    for _ in range(min(3, arguments.steps)):
        step()
    began = finished()
    for _ in range(arguments.steps):
        step()
    seconds = (finished() - began) / arguments.steps
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    print(f"{1e3 * seconds:.1f} ms a step, {arguments.sequences * LENGTH / seconds:,.0f} tokens/s, {peak:.1f} GiB")
    if arguments.profile:
        with torch.profiler.profile() as profile:
            step()
            finished()
        for of in ("self_cpu_time_total", "self_device_time_total"):
            print(profile.key_averages().table(sort_by=of, row_limit=30, max_name_column_width=60))


if __name__ == "__main__":
    main()
