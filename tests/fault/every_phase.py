"""A small run of every phase, and what it comes to: for test_whole_runs.py and benchmarks/kills.py."""

import hashlib
import json
from pathlib import Path

import small_run

from distill.commit import newest_commit


def write_recipe(folder: Path) -> Path:
    """A recipe of every phase: calibration, a teacher that writes, three kinds of stage, an evaluation."""
    (folder / "set.jsonl").write_text(json.dumps({"context": "Once upon a", "continuation": " time"}) + "\n")
    teacher = small_run.write_teacher(folder / "teacher")
    settings = json.loads((teacher / "config.json").read_text()) | {"max_position_embeddings": 48}
    (teacher / "config.json").write_text(json.dumps(settings))
    text = str(small_run.DEMO / "text.txt")
    return small_run.write_recipe(
        folder / "r.yaml",
        teacher,
        student={"convert": {"hybrid": "layers:1", "calibrate": [text], "local_window": 0}},
        data={"sources": [{"from_teacher": 1000}, {"path": text}], "seq_len": 32},
        stages=[
            {"kind": "align", "steps": 2, "warmup_steps": 1},
            {"kind": "convert_step", "hybrid": "none", "tokens": 256},
            {"kind": "distil", "steps": 3, "lr": 1e-3},
        ],
        training__commit_every_steps=1,
        evaluation__tasks=[str(folder / "set.jsonl")],
    )


def outcome(run: Path) -> dict:
    """What a run comes to: every step it logged, what it measured, and the bytes of the parameters it exports."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("stage", "step", "total_step", "loss", "gradient_norm", "lr", "tokens", "applied")
    return {
        "steps": [[record[key] for key in keys] for record in records],
        "results": json.loads((run / "report.json").read_text())["results"],
        "evaluation": json.loads((run / "export" / "evaluation.json").read_text())["tasks"],
        "export": hashlib.sha256((run / "export" / "model.safetensors").read_bytes()).hexdigest(),
    }


def newest(run: Path) -> int:
    """The step of the newest good commit, 0 without one."""
    found = newest_commit(run / "commits", report=lambda text: None)
    return found.step if found else 0
