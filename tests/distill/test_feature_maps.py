"""What benchmarks/feature_maps.py fits is the student's own mixer, to what the teacher's attention makes."""

import sys

import pytest
import torch
from small_run import write_teacher

from benchmarks.feature_maps import DELTA, MAPPED, WINDOW, error, examples, fitted, main, twin
from convert.calibration import Stream
from convert.loading import load_teacher

TOKENS, LAYER = 64, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("feature_maps") / "teacher", num_layers=2)


@pytest.fixture(scope="module")
def fit(folder):
    teacher = load_teacher(folder, torch.float32)
    tokens = torch.randint(3, 60, (12, TOKENS), generator=torch.Generator().manual_seed(0))
    seen = examples(teacher, tokens, [LAYER])[LAYER]
    rotation = Stream(teacher, tokens[:1], 1).rotation(LAYER)

    def left(window, trained, steps=60):
        mixer = twin(teacher, window).model.layers[LAYER].self_attn
        before = [p.clone() for p in (mixer.q_proj.weight, mixer.o_proj.weight)]
        found = fitted(mixer, rotation, seen, trained, steps, 8)
        assert found == error(mixer, rotation, seen[-2:], 8)
        assert all(torch.equal(a, b) for a, b in zip(before, (mixer.q_proj.weight, mixer.o_proj.weight)))
        return mixer, error(mixer, rotation, seen[:-2], 8).item()

    return left


def test_a_window_over_the_whole_text_leaves_nothing_to_tell(fit):
    assert fit(TOKENS, WINDOW, steps=0)[1] < 1e-9


def test_a_state_is_fitted_beyond_a_window_and_maps_beyond_that(fit):
    alone, delta, mapped = (fit(8, trained)[1] for trained in (WINDOW, DELTA, MAPPED))
    assert mapped < delta < alone


def test_what_is_not_trained_stays_as_it_was(fit):
    mixer, _ = fit(8, DELTA, steps=3)
    assert not mixer.q_map.weight.any()
    assert mixer.read_proj.weight.any()


def test_it_runs(folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} of {i}" for i in range(3000)))
    arguments = f"feature_maps {folder} {text} --layers 1 --window 16 --wider 24 --steps 2 --sequences 2"
    monkeypatch.setattr(sys, "argv", arguments.split())
    main()
    assert "layer 1, delta rule, feature maps: " in capsys.readouterr().out
