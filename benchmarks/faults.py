"""Lets one process of several fail in the middle of a run of deltanet-distill, and looks at what becomes of all.

    python -m benchmarks.faults [--processes 2] [--zero 2 3] [--resize 2 1 2]

Launched by torchrun on the machine's GPUs (NCCL), or on CPUs (gloo) where there are none, with a random teacher of two
layers. One line a fault: what was done, what happened, the seconds from the one to the other, whether it passed. Exit
code 1 where one did not. `blank` is no fault of a process: a rank whose text has no valid target, batch after batch.
With --resize a run is stopped and goes on with other numbers of processes, and its losses are compared, in float32,
with those of a run that never stopped. In the suite, on CPUs: tests/fault/test_ranks.py, tests/distill/test_resume.py.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
LIMIT = 60  # seconds in which all processes must be gone
AT = 3  # forward passes before the fault
FAULTS = {
    "kill": ("kill -9", "all ended, rank {victim} named"),
    "term": ("SIGTERM", "committed, to be resumed (75)"),
    "nan": ("NaN in the loss", "all ended, rank {victim} named"),
    "blank": ("no valid target", "came to its end, weights the same on every rank"),
}
SAME = 1e-5  # relative, of losses in float32


def worker(fault: str, victim: int, mark: Path, arguments: list[str]) -> int:
    """One process of the run."""
    import cli
    from distill.engine import Engine

    forward, calls = Engine.forward, []

    def failing(engine, *args, **kwargs):
        calls.append(1)
        share, parts = forward(engine, *args, **kwargs)
        if len(calls) == AT:
            mark.touch()
            if fault != "nan":
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        return (share * float("nan") if fault == "nan" and len(calls) >= AT else share), parts

    if fault == "blank":
        blank(int(os.environ["RANK"]) == victim, mark)
    elif int(os.environ["RANK"]) == victim:
        Engine.forward = failing
    return cli.distill_main(arguments)


def blank(is_victim: bool, mark: Path) -> None:
    """Takes every target from one rank; all compare the sums of their weights after every step."""
    from distill import loop, stages
    from distill.engine import Engine
    from distill.packing import IGNORED

    make_batch, step = loop.make_batch, Engine.step

    def without_targets(*args):
        mark.touch()
        batch = make_batch(*args)
        batch.targets.fill_(IGNORED)
        return batch

    def compared(engine):
        done = step(engine)
        sums = engine.world.gather(sum(p.detach().double().sum().item() for p in engine.module.parameters()))
        assert engine.settings.zero_stage == 3 or len(set(sums)) == 1, f"ranks hold other weights: {sums}"
        return done

    Engine.step = compared
    if is_victim:
        loop.make_batch, stages.num_targets = without_targets, lambda sequences: 0


def launch(processes: int, port: int, arguments: list[str], log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(29500 + (os.getpid() + port) % 400), "-m", "benchmarks.faults", "--worker"]
    with log.open("a") as file:
        return subprocess.Popen([*command, *arguments], stdout=file, stderr=file, cwd=ROOT, start_new_session=True)


def measure(fault: str, victim: int, zero: int, processes: int, recipe: Path, folder: Path) -> bool:
    mark, run = folder / f"{fault}-{victim}-{zero}", folder / f"run-{fault}-{victim}-{zero}"
    arguments = [fault, str(victim), str(mark), str(recipe), f"deepspeed.stage={zero}", "-o", str(run)]
    process = launch(processes, 7 * zero + 31 * victim, arguments, Path(f"{run}.log"))
    began, since = time.monotonic(), None
    while process.poll() is None:
        if since is None and mark.exists():
            since = time.monotonic()
        if time.monotonic() - (since or began + LIMIT) > LIMIT:
            break
        time.sleep(0.1)
    ended, seconds = process.poll() is not None, time.monotonic() - (since or began)
    if not ended:
        os.killpg(process.pid, signal.SIGKILL)
    said = Path(f"{run}.log").read_text()
    if fault == "term":
        found = "stopped after step" in said and any((run / "commits").glob("step-*"))
    elif fault == "blank":
        found = process.poll() == 0
    else:
        words = {"kill": [f"rank      : {victim} ", f"rank {victim} is gone"], "nan": [f"the loss on rank {victim} is"]}
        found = any(word in said for word in words[fault])
    passed = since is not None and ended and found
    done, wanted = FAULTS[fault]
    happened = wanted.format(victim=victim) if passed else f"{'ended' if ended else 'still there'}, see {run}.log"
    verdict = "pass" if passed else "FAIL"
    print(f"ZeRO {zero}, {done} on rank {victim} of {processes}: {happened}, {seconds:.1f} s  {verdict}", flush=True)
    return passed


def resize(sizes: list[int], zero: int, recipe: Path, folder: Path) -> bool:
    """One run on sizes[0] processes, stopped, then on sizes[1] and so on, against one on sizes[0] to its end."""
    began, losses = time.monotonic(), {}
    for name, parts in (("straight", sizes[:1]), ("resized", sizes)):
        run = folder / f"run-{name}-{zero}"
        for index, size in enumerate(parts):
            stops = index + 1 < len(parts)
            mark = folder / f"{name}-{zero}-{index}"
            arguments = ["term" if stops else "none", "0" if stops else "-1", str(mark), str(recipe)]
            arguments += [f"deepspeed.stage={zero}", "training.dtype=float32", "-o", str(run)]
            code = launch(size, 7 * zero + 13 * index, arguments, Path(f"{run}.log")).wait()
            if stops != (code != 0) or stops != mark.exists():
                print(f"ZeRO {zero}, on {size} processes: ended with {code}, see {run}.log  FAIL", flush=True)
                return False
        rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        losses[name] = {row["total_step"]: row["loss"] for row in rows if "total_step" in row}
    straight, resized = losses.values()
    apart = max(abs(resized[step] / loss - 1) for step, loss in straight.items())
    passed = apart <= SAME
    said = f"ZeRO {zero}, on {', then '.join(map(str, sizes))} processes: {len(straight)} losses differ by {apart:.1e}"
    verdict = f"{time.monotonic() - began:.1f} s  {'pass' if passed else 'FAIL'}"
    print(f"{said} at most from those of a run that never stopped, {verdict}", flush=True)
    return passed


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        fault, victim, mark, *arguments = sys.argv[2:]
        return worker(fault, int(victim), Path(mark), arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--zero", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--faults", nargs="*", choices=FAULTS, default=list(FAULTS))
    parser.add_argument("--resize", nargs="+", type=int, metavar="PROCESSES", help="one after the other")
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "distill"))
    import small_run

    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    training = {
        "batch_size": 2 * max(options.processes, *(options.resize or [1])),
        "dtype": dtype,
        "commit_every_steps": 100,
    }
    stages = [{"kind": "distil", "steps": 30}]
    teacher = small_run.write_teacher(folder / "teacher")
    recipe = small_run.write_recipe(folder / "r.yaml", teacher, stages=stages, training=training)
    tries = [
        (fault, rank) for fault in options.faults for rank in ((0, options.processes - 1) if fault == "kill" else (1,))
    ]
    passed = [measure(*what, zero, options.processes, recipe, folder) for zero in options.zero for what in tries]
    passed += [resize(options.resize, zero, recipe, folder) for zero in options.zero if options.resize]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
