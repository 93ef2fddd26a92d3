"""What benchmarks/induction.py says of a teacher is what the teacher does, and its state is the delta rule's."""

import sys

import pytest
import torch
from small_run import write_teacher

from benchmarks.induction import attention, linear_twin, main, queries_and_keys, state_read, told
from convert.loading import load_teacher


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("induction") / "teacher", num_layers=2)


@torch.no_grad()
def test_its_attention_is_the_teachers(folder):
    teacher, row = load_teacher(folder, torch.float32), torch.arange(3, 43)
    mixed = []
    handle = teacher.model.layers[1].self_attn.register_forward_hook(lambda layer, x, out: mixed.append((x[0], out[0])))
    q, k = queries_and_keys(teacher, linear_twin(teacher), row)[1]
    handle.remove()
    (x, out), layer = mixed[0], teacher.model.layers[1].self_attn
    v = layer.v_proj(x)[0].unflatten(-1, (-1, layer.head_dim)).transpose(0, 1)
    made = attention(q, k) @ v.repeat_interleave(layer.num_key_value_groups, 0)
    torch.testing.assert_close(layer.o_proj(made.transpose(0, 1).flatten(1)), out[0])


def test_a_state_tells_what_has_left_the_window():
    keys, codes = torch.eye(32), torch.eye(32).flip(0)
    queries = keys.roll(10, 0)  # every token asks for the tenth before it
    asked = torch.arange(10, 32)
    assert told(state_read(queries, keys, codes, 1.0, 10)[asked], codes, asked - 10) == 1.0
    assert (state_read(queries, keys, codes, 1.0, 11)[asked] == 0).all()
    assert state_read(queries, keys, codes, 0.5, 10)[31] @ codes[21] == pytest.approx(0.5, rel=1e-5)


def test_it_runs(folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} of {i}" for i in range(3000)))
    arguments = ["induction", str(folder), str(text), "--distances", "160", "--rows", "1", "--least", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    assert "told 160 tokens back" in capsys.readouterr().out
