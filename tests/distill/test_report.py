"""The table that people read, and the files beside it."""

import json

from distill.report import table, write_report

ROWS = [
    {"model": "teacher", "perplexity": 10.0},
    {"model": "converted", "perplexity": 25.0, "kl": 0.9},
    {"model": "after distil", "perplexity": 10.5, "kl": 0.05},
]


def test_the_ratio_is_to_the_teacher():
    lines = table(ROWS).splitlines()
    assert lines[0].split() == ["perplexity", "x", "teacher", "KL,", "nats/token"]
    assert lines[1].split() == ["teacher", "10.000", "1.000", "-"]
    assert lines[3].split() == ["after", "distil", "10.500", "1.050", "0.0500"]


def test_a_report_is_written_for_machines_and_for_people(tmp_path):
    facts = {"results": ROWS, "samples": {"student": "Once"}, "tokens": 1000, "held_out_tokens": 99}
    metrics = [{"stage": "align", "step": step, "loss": loss} for step, loss in enumerate([2.0, None, 1.0])]
    text = write_report(tmp_path, facts, metrics)
    assert json.loads((tmp_path / "report.json").read_text()) == facts
    assert table(ROWS) in text
    assert "student writes: Once" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
