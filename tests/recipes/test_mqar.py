"""The recipe of MQAR, made short: it learns to recall, and the terminal says so."""

import json

from distill.run import distil
from recipes import __path__ as recipes

SHORT = (
    "data.sources.0.options={length: 16, pairs: 4}", "data.sources.0.documents=9600", "data.seq_len=16",
    "student.new.vocabulary=34", "student.new.hidden_size=32", "stages.0.steps=150", "stages.0.lr=1e-2",
    "stages.0.warmup_steps=20",
)  # fmt: skip


def test_it_learns_to_recall(tmp_path, capsys):
    distil(f"{next(iter(recipes))}/mqar.yaml", SHORT, output=tmp_path / "run")
    (result,) = json.loads((tmp_path / "run" / "evaluation.json").read_text())["tasks"].values()
    assert max(result["floors"].values()) == 0.25  # one value of the row's four
    assert result["accuracy"] > 0.95
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| trained on mqar "))
    assert f" {100 * result['accuracy']:.1f}% " in row
