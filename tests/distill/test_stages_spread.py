"""Steps, preferences and own completions in one run: two processes, stopped and resumed, do what one does."""

import json

import pytest
import small_run
import torch
from test_resume import curve, spawn, tensors


@pytest.mark.slow
def test_two_processes_stopped_on_the_way_do_what_one_does(tmp_path):
    teacher = small_run.write_teacher(tmp_path / "teacher")
    small_run.teach_chats(teacher)
    rows = [{"prompt": f"Tell {i}", "chosen": f"a cat {i}", "rejected": f"no {i}"} for i in range(40)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    stages = [
        {"kind": "convert_step", "hybrid": "none", "tokens": 256},
        {"kind": "dpo", "steps": 2, "lr": 1e-3},
        {"kind": "onpolicy", "steps": 3, "lr": 1e-3, "completion_tokens": 8, "prompt_tokens": 5},
    ]
    sources = [
        {"path": str(tmp_path / "pairs.json"), "kind": "preference"},
        {"path": str(small_run.DEMO / "text.txt"), "separator": "\n"},
    ]
    recipe = small_run.write_recipe(
        tmp_path / "r.yaml", teacher, stages=stages, data={"sources": sources, "seq_len": 64}, deepspeed={"stage": 2}
    )
    # One sequence a micro-batch everywhere: a completion then has the same neighbours, none.
    one, two, cut = (str(tmp_path / name) for name in ("one", "two", "cut"))
    spawn(recipe, 1, [(one, [], None)])
    spawn(recipe, 2, [(two, [], None), (cut, [], (1, 0)), (cut, [], (2, 1)), (cut, [], None)])
    for key in ("loss", "gradient_norm", "tokens"):
        # float32 sums in another order
        assert curve(tmp_path / "two", key) == pytest.approx(curve(tmp_path / "one", key), rel=1e-4)
        assert curve(tmp_path / "cut", key) == curve(tmp_path / "two", key)
    straight, resumed = tensors(tmp_path / "two"), tensors(tmp_path / "cut")
    assert straight.keys() == resumed.keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
