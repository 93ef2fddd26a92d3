"""Lets one process of several fail in the middle of a run of deltanet-distill, and looks at what becomes of all.

    python -m benchmarks.faults [--processes 2] [--zero 2 3]

Launched by torchrun on the machine's GPUs (NCCL), or on CPUs (gloo) where there are none, with a random teacher of two
layers. One line a fault: what was done, what happened, the seconds from the one to the other, whether it passed. Exit
code 1 where one did not. In the suite, on CPUs: tests/fault/test_ranks.py.
"""

import argparse
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
}


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

    if int(os.environ["RANK"]) == victim:
        Engine.forward = failing
    return cli.distill_main(arguments)


def measure(fault: str, victim: int, zero: int, processes: int, recipe: Path, folder: Path) -> bool:
    mark, run = folder / f"{fault}-{victim}-{zero}", folder / f"run-{fault}-{victim}-{zero}"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command += ["--master-port", str(29500 + (os.getpid() + 7 * zero + 31 * victim) % 400), "-m", "benchmarks.faults"]
    command += ["--worker", fault, str(victim), str(mark), str(recipe), f"deepspeed.stage={zero}", "-o", str(run)]
    with open(f"{run}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)
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
    else:
        words = {"kill": [f"rank      : {victim} ", f"rank {victim} is gone"], "nan": [f"the loss on rank {victim} is"]}
        found = any(word in said for word in words[fault])
    passed = since is not None and ended and found
    done, wanted = FAULTS[fault]
    happened = wanted.format(victim=victim) if passed else f"{'ended' if ended else 'still there'}, see {run}.log"
    verdict = "pass" if passed else "FAIL"
    print(f"ZeRO {zero}, {done} on rank {victim} of {processes}: {happened}, {seconds:.1f} s  {verdict}", flush=True)
    return passed


def main() -> int:
    if sys.argv[1:2] == ["--worker"]:
        fault, victim, mark, *arguments = sys.argv[2:]
        return worker(fault, int(victim), Path(mark), arguments)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=max(torch.cuda.device_count(), 2))
    parser.add_argument("--zero", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=list(FAULTS))
    options = parser.parse_args()
    sys.path.append(str(ROOT / "tests" / "distill"))
    import small_run

    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    training = {"batch_size": 2 * options.processes, "dtype": dtype, "commit_every_steps": 100}
    stages = [{"kind": "distil", "steps": 30}]
    teacher = small_run.write_teacher(folder / "teacher")
    recipe = small_run.write_recipe(folder / "r.yaml", teacher, stages=stages, training=training)
    tries = [
        (fault, rank) for fault in options.faults for rank in ((0, options.processes - 1) if fault == "kill" else (1,))
    ]
    passed = [measure(*what, zero, options.processes, recipe, folder) for zero in options.zero for what in tries]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
