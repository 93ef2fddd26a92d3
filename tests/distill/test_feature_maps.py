"""What benchmarks/feature_maps.py fits is the student's own mixer, to what the teacher's attention makes."""

import sys

import pytest
import torch
from small_run import write_teacher

from benchmarks.feature_maps import DELTA, MAPPED, WINDOW, error, examples, fit, main, places, twin
from convert.calibration import Stream
from convert.loading import load_teacher

TOKENS, LAYER = 64, 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("feature_maps") / "teacher", num_layers=2)


@pytest.fixture(scope="module")
def fitted(folder):
    teacher = load_teacher(folder, torch.float32)
    tokens = torch.randint(3, 60, (10, TOKENS), generator=torch.Generator().manual_seed(0))
    seen = examples(teacher, tokens, [LAYER])[LAYER]
    rotation = Stream(teacher, tokens[:1], 1).rotation(LAYER)

    def left(window, trained, steps=60, kind="delta"):
        mixer = twin(teacher, window, kind).model.layers[LAYER].self_attn
        before = [p.clone() for p in (mixer.q_proj.weight, mixer.o_proj.weight)]
        fit(mixer, rotation, seen, trained, steps, 8)
        assert all(torch.equal(a, b) for a, b in zip(before, (mixer.q_proj.weight, mixer.o_proj.weight)))
        return mixer, error(mixer, rotation, seen, 8).item()

    return left


def test_a_window_over_the_whole_text_leaves_nothing_to_tell(fitted):
    assert fitted(TOKENS, WINDOW, steps=0)[1] < 1e-9


def test_a_state_is_fitted_beyond_a_window_and_maps_beyond_that(fitted):
    alone, delta, mapped = (fitted(8, trained)[1] for trained in (WINDOW, DELTA, MAPPED))
    assert mapped < delta < alone


def test_what_is_not_trained_stays_as_it_was(fitted):
    mixer, _ = fitted(8, DELTA, steps=3)
    assert not mixer.q_map.weight.any()
    assert mixer.read_proj.weight.any()


def test_decay_is_fitted_where_there_is_one(fitted):
    mixer, _ = fitted(8, DELTA, steps=3, kind="gated_delta")
    assert mixer.a_proj.weight.any()


def test_the_places_cover_a_sequence_from_the_window_on():
    assert places(128, 1024) == [(128, 1024)]
    assert places(128, 4096) == [(128, 1024), (1024, 2048), (2048, 4096)]
    assert places(128, 3000) == [(128, 1024), (1024, 2048), (2048, 3000)]
    assert places(2000, 4096) == [(2000, 2048), (2048, 4096)]
    assert places(16, 64) == [(16, 64)]


def test_the_error_of_a_part_is_that_part_alone(folder):
    teacher = load_teacher(folder, torch.float32)
    tokens = torch.randint(3, 60, (2, TOKENS), generator=torch.Generator().manual_seed(0))
    seen, rotation = examples(teacher, tokens, [LAYER])[LAYER], Stream(teacher, tokens[:1], 1).rotation(LAYER)
    mixer = twin(teacher, 16).model.layers[LAYER].self_attn
    mixer.reset_to_plain_copy()
    with torch.no_grad():  # a window sees all up to its length, and misses something behind it
        assert error(mixer, rotation, seen, 0, 16) < 1e-9 < 1e-4 < error(mixer, rotation, seen, 16, 64)


def test_it_runs(folder, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"word{i * i % 97} of {i}" for i in range(3000)))
    arguments = f"feature_maps {folder} {text} --layers 1 --window 16 --wider 24 --steps 2 --sequences 2 --length 32"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--held-length", "64"])
    main()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 7
    assert printed[3].startswith("layer 1, delta, feature maps, rotary positions: 0.")
    assert printed[3].endswith(" to 64")


def test_lengths_that_do_not_fit_are_refused(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", f"feature_maps {folder} none.txt --length 48 --held-length 64".split())
    with pytest.raises(SystemExit):
        main()
    assert "--held-length 64: allowed is a multiple of --length (48)" in capsys.readouterr().err
