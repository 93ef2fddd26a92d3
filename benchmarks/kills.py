"""Kills whole runs of deltanet-distill with -9 at random moments and looks at what they come to.

    python benchmarks/kills.py [--kills 30] [--seed 1]

A run of a tiny teacher through every phase (calibration, the teacher's writing, three stages, evaluation, export) is
started, killed at a moment drawn evenly from the time an undisturbed one takes, and started again, until it is
through; then a new one begins, until there were so many kills. A run that went through must have logged, measured and
exported what the undisturbed one did, to the bit. In the suite: tests/fault/test_whole_runs.py.
"""

import argparse
import collections
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
# In place of this script's folder, whose kernels.py transformers would take for a package of that name.
sys.path[:1] = [str(ROOT), str(ROOT / "tests" / "distill"), str(ROOT / "tests" / "fault")]
COMMAND = [sys.executable, "-W", "ignore", "-c", "import sys, cli; sys.exit(cli.distill_main(sys.argv[1:]))"]
LAST_STEP = 6


def start(recipe: Path, run: Path) -> subprocess.Popen:
    """A process that has imported what it needs and holds the run's lock."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"}
    with open(f"{run}.log", "w") as log:
        process = subprocess.Popen(
            [*COMMAND, str(recipe), "-o", str(run)], stdout=log, stderr=log, env=environment, cwd=ROOT
        )
    lock = run / "lock"
    while process.poll() is None and not (lock.is_file() and f" {process.pid} " in lock.read_text()):
        time.sleep(0.01)
    return process


def phase(run: Path, committed: int) -> str:
    """What a killed run was doing, by what it left."""
    if not (run / "student" / "config.json").is_file():
        return "conversion"
    if not (run / "recipe.yaml").is_file():
        return "preparation"
    if list(run.glob("commits/*.tmp-*")):
        return "in a commit"
    if committed < LAST_STEP:
        return "training" if committed else "before the first commit"
    return "after the last commit"


def finish(process: subprocess.Popen, run: Path) -> None:
    if process.wait() != 0:
        raise SystemExit(f"exit code {process.returncode}:\n{Path(f'{run}.log').read_text()}")


def main() -> None:
    from every_phase import newest, outcome, write_recipe

    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw, phases, through = random.Random(arguments.seed), collections.Counter(), 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        recipe, straight = write_recipe(folder), folder / "straight"
        process = start(recipe, straight)
        begun = time.monotonic()
        finish(process, straight)
        seconds, whole = time.monotonic() - begun, outcome(straight)
        print(f"undisturbed: {seconds:.1f} s from lock to end", flush=True)
        run, committed = folder / "run-0", 0
        while phases.total() < arguments.kills or run.exists():
            process = start(recipe, run)
            # The last run is let through, so that every kill is followed by a comparison.
            limit = draw.uniform(0, seconds) if phases.total() < arguments.kills else None
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                found = newest(run)
                assert found >= committed, f"{run}: step {committed} was committed, step {found} is the newest now"
                phases[phase(run, found)] += 1
                committed = found
                continue
            finish(process, run)
            assert outcome(run) == whole, f"{run}: ended differently from {straight}"
            through += 1
            run, committed = folder / f"run-{through}", 0
            print(f"through: {through}, kills so far: {phases.total()}", flush=True)
    for name, count in phases.most_common():
        print(f"{name:<28}{count:>4}")
    print(f"{phases.total()} kills, {through} runs through: no commit lost, every outcome equal to the bit")


if __name__ == "__main__":
    main()
