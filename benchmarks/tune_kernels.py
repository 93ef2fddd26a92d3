"""Opt-in tuning: times candidate entries of the configuration table on this card, kernel by kernel.

    python benchmarks/tune_kernels.py d64 d128 d128-gated ... [--compile-only] [--tiles 16,32,64] [--warps 1,2]
                                      [--reads-inverse] [--mma-sync]

Rows are those of benchmarks/kernels.py. Prints, per kernel, microseconds of every candidate (tile, warps, stages, query
heads at a time; all with inverses found before the walk, or without wgmma, as asked), and of inverse_kernel among those
as shipped; nothing is written: the winners go into deltanet/ops/triton/configs.py by hand, after
benchmarks/check_kernels.py has passed with them. --compile-only fills Triton's cache, which several processes may do at
once.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import kernels as rows

import deltanet.ops.triton as kernels
from deltanet.ops.triton import configs

OF = {
    "forward": "forward_kernel",
    "map": "map_kernel",
    "write": "write_kernel",
    "key": "key_kernel",
    "query": "query_kernel",
}


def candidates(options, size: int, G: int):
    tiles = [t for t in options.tiles if t <= size and 2048 <= t * size <= 16384]
    groups = [g for g in (1, 2, 4) if g <= G] if G > 1 else [4]
    for tile, num_warps, stages, group in itertools.product(tiles, options.warps, (2, 3), groups):
        yield configs.Config(tile, num_warps, stages, group, options.reads_inverse, not options.mma_sync)


def kernel_times(step, repeats: int = 5) -> dict[str, float]:
    """Microseconds of every kernel of one step, by name."""
    step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            step()
        torch.cuda.synchronize()
    return {event.key: event.self_device_time_total / repeats for event in profile.key_averages()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="+")
    parser.add_argument("--compile-only", action="store_true")
    numbers = lambda text: [int(n) for n in text.split(",")]
    parser.add_argument("--tiles", type=numbers, default="16,32,64")
    parser.add_argument("--warps", type=numbers, default="1,2")
    parser.add_argument("--reads-inverse", action="store_true", help="forward and write walks that find no inverse")
    parser.add_argument("--mma-sync", action="store_true", help="no wgmma, which four warps and more have on Hopper")
    parser.add_argument("--kernels", default=",".join(OF), help="empty: only the times as shipped")
    options = parser.parse_args()
    for row in options.rows:
        _, _, HQ, H, D, _ = rows.ROWS[row]
        made = (1, 512, HQ, H, D, rows.ROWS[row][5]) if options.compile_only else rows.ROWS[row]
        tensors, do, more = rows.made(*made)
        g = more.pop("g", None)
        leaves = [x.detach().requires_grad_() for x in (*tensors, *([] if g is None else [g]))]

        def rule(q, k, v, beta, g=None, more=more, D=D):
            return kernels.delta_rule(q, k, v, beta, g=g, scale=D**-0.5, **more)[0]

        step = lambda leaves=leaves, do=do: torch.autograd.grad(rule(*leaves), leaves, do)
        if not options.compile_only:
            times = kernel_times(step)
            text = ", ".join(f"{name[:40]} {time:.0f}" for name, time in sorted(times.items(), key=lambda x: -x[1])[:9])
            print(f"{row}: {text}", flush=True)
        for kernel in filter(None, options.kernels.split(",")):
            table, key = configs.place(kernel, D, D, g is not None, half=True)
            shipped, results = table[key], []
            for config in candidates(options, D, HQ // H):
                table[key] = config
                try:
                    time = 0.0 if options.compile_only else kernel_times(step, 3).get(OF[kernel], float("nan"))
                    if options.compile_only:
                        step()
                    results.append((time, config))
                except Exception as failure:
                    print(f"{row} {kernel} {config}: {str(failure)[:100]}", flush=True)
            table[key] = shipped
            if not options.compile_only:
                best = ", ".join(
                    f"{c.tile}/{c.num_warps}/{c.stages}/{c.group}: {t:.0f}"
                    for t, c in sorted(results, key=lambda x: x[0])
                )
                print(f"  {kernel} (shipped {shipped.tile}/{shipped.num_warps}/{shipped.stages}): {best}", flush=True)


if __name__ == "__main__":
    main()
