"""A run that is killed, or asked to stop, and started again ends in the very bytes of one that was left alone."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import small_run

SLOW = {"data__seq_len": 64, "training__batch_size": 8}  # steps long enough to be hit by a signal
DEADLINE = 240


def start(recipe, run):
    code = "import sys, cli; sys.exit(cli.distill_main(sys.argv[1:]))"
    # A run within this process has left its own rendezvous here.
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    inherited = {name: value for name, value in os.environ.items() if name not in launcher}
    environment = {**inherited, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code, str(recipe), "-o", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(recipe, run):
    process = start(recipe, run)
    out, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, err
    return out, err


def steps(run):
    """(stage, step, loss, gradient norm) of every logged step."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [(r["stage"], r["step"], r["loss"], r["gradient_norm"]) for r in records]


def wait_for(process, run, count):
    limit = time.monotonic() + DEADLINE
    while len(steps(run)) < count:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < limit
        time.sleep(0.005)


def content(folder):
    """sha256 by name of every tensor file of the last commit and of the export."""
    files = [
        *sorted((folder / "commits").iterdir())[-1].rglob("*.safetensors"),
        folder / "export" / "model.safetensors",
    ]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    recipe = small_run.write_recipe(folder / "r.yaml", small_run.write_teacher(folder / "teacher"), **SLOW)
    finish(recipe, folder / "run")
    return folder


def test_killed_then_stopped_then_finished_equals_straight(straight, tmp_path):
    recipe, run = straight / "r.yaml", tmp_path / "run"
    process = start(recipe, run)
    wait_for(process, run, 3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert len(list((run / "commits").glob("step-????????"))) == 1

    process = start(recipe, run)
    wait_for(process, run, 8)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75, err
    assert "the same command resumes" in err
    newest = sorted((run / "commits").iterdir())[-1].name
    assert newest == f"step-{len(steps(run)):08d}"

    finish(recipe, run)
    assert steps(run) == steps(straight / "run")
    assert content(run) == content(straight / "run")
    assert not list((run / "commits").glob("*.tmp-*"))
