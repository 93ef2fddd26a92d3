"""The benchmark of several GPUs runs on two CPU processes, with all that is parted."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_parted_models_learn_as_whole_ones_do(tmp_path):
    options = "--gpus 2 --only-all --shape tiny --seq-len 64 --micro 1 --steps 5 --same-steps 2 --stages 0 3"
    command = [sys.executable, "-m", "benchmarks.scaling", *options.split(), "--teacher-shard", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout, (tmp_path / "log").read_text()
    results = json.loads((tmp_path / "scaling.json").read_text())
    losses = {(r["zero"], r["shard"]): r["losses"] for r in results if r["dtype"] == "float32"}
    whole, parted = losses[0, False], losses[3, True]
    np.testing.assert_allclose(parted, whole, rtol=1e-6)  # float32 sums in another order
    held = {r["zero"]: r["held_gib"] for r in results if r["length"] == 64}
    assert held[3] < 0.55 * held[0]
