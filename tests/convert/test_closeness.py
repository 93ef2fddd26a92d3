"""The closeness report on the embedded demo teacher. Twin of convert/closeness.py."""

import json
import math

import pytest
import torch
from demo_pair import demo_teacher, demo_windows, divergence, fresh_student

from convert.calibrate import calibrate
from convert.calibration import Settings
from convert.closeness import VARIANTS, as_markdown, closeness, files, recall, recall_by_distance, varied
from convert.layouts import parse_layout
from deltanet import DeltaNetForCausalLM

FAST = Settings(half_lives=(4, 32), betas=(0.05, 0.3), sweeps=0, search_windows=2, search_length=64)


@pytest.fixture(scope="module")
def teacher():
    return demo_teacher()


@pytest.fixture(scope="module")
def held_out():
    return demo_windows(4, last=True)


@pytest.fixture(scope="module")
def student(teacher):
    student = fresh_student(teacher, "global2")
    calibrate(teacher, student, demo_windows(8), FAST)
    return student


@pytest.fixture(scope="module")
def report(teacher, student, held_out):
    return closeness(teacher, student, held_out)


def test_perplexity_and_divergence_are_those_of_a_plain_forward(teacher, student, held_out, report):
    with torch.no_grad():
        losses = [model(held_out, labels=held_out).loss.item() for model in (teacher, student)]
    assert report["teacher_perplexity"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
    assert report["student_perplexity"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
    kl = divergence(teacher, student, held_out)
    assert report["kl"] == pytest.approx(kl, rel=0.05)  # that mean has one more token per window


def test_a_student_with_nothing_converted_equals_its_teacher(teacher, held_out):
    report = closeness(teacher, fresh_student(teacher, "all"), held_out)
    assert report["kl"] == pytest.approx(0, abs=1e-6)
    assert report["student_perplexity"] == report["teacher_perplexity"]
    assert report["layers"] == report["ranking"] == []
    assert report["recall"]["repeat"]["teacher"] == report["recall"]["repeat"]["student"]
    assert not set(VARIANTS) & set(report)


def test_the_calibrated_student_is_closer_than_every_variant_of_it(report):
    there = [name for name in VARIANTS if name != "local_alone"]
    assert {name for name in VARIANTS if name in report} == set(there)
    assert all(report["kl"] < report[name]["kl"] for name in there)


def test_a_branch_alone_is_the_mixer_without_the_others(teacher, held_out):
    student = fresh_student(teacher, "global2", local_window=8)
    report = closeness(teacher, student, held_out)
    assert report["local_alone"] == report["plain_copy"]  # which reads nothing else
    assert report["state_alone"] == report["skip_alone"]  # nothing but the first token's own value


def test_the_plain_copy_is_a_fresh_student(teacher, student, held_out, report):
    expected = closeness(teacher, fresh_student(teacher, "global2"), held_out)
    assert report["plain_copy"]["kl"] == pytest.approx(expected["kl"], rel=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_leaves_the_student_as_it_was(teacher, student, held_out, name):
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    with torch.no_grad():
        logits = student(held_out[:1]).logits
        with varied(student, name, teacher):
            assert not torch.equal(student(held_out[:1]).logits, logits)
        assert torch.equal(student(held_out[:1]).logits, logits)
    assert all(torch.equal(tensor, before[key]) for key, tensor in student.state_dict().items())


def test_a_layer_that_makes_nothing_has_error_one_and_no_direction(teacher, held_out):
    student = fresh_student(teacher, "layers:0,1,2,3,4")
    with varied(student, "no_mixer", teacher):
        (row,) = closeness(teacher, student, held_out)["layers"]
    assert row["layer"] == 5
    assert row["relative_error"] == pytest.approx(1)
    assert row["cosine"] == pytest.approx(0)
    assert 0 < row["residual_error"] < 1


def test_the_ranking_names_linear_layers_by_their_error_in_the_stream(report, tmp_path, teacher):
    errors = {row["layer"]: row["residual_error"] for row in report["layers"]}
    assert set(errors) == {0, 2, 4, 5}
    assert report["ranking"] == sorted(errors, key=errors.get, reverse=True)
    (tmp_path / "ranking.json").write_text(files(report)["ranking.json"])
    layout = parse_layout(f"{tmp_path}/ranking.json:2", teacher.config.layer_types)
    kept = [index for index, kind in enumerate(layout.layer_types) if kind == "full_attention"]
    assert kept == sorted(report["ranking"][:2])


def test_a_trained_model_recalls_a_repeated_passage_and_a_random_one_does_not(teacher, held_out):
    torch.manual_seed(0)
    untrained = DeltaNetForCausalLM(teacher.config).eval()
    result = recall(teacher, untrained, held_out)
    assert result["repeat"]["teacher"] > 0.3
    assert result["repeat"]["student"] < 0.05
    assert result["distance"] == 56


def test_recall_is_measured_as_far_as_the_text_and_the_models_reach(teacher, held_out):
    assert held_out.shape[1] == 128

    def distances(most):
        rows = recall_by_distance(None, teacher, held_out, most=most, tokens=256)
        return {row["distance"]: row["student"] for row in rows}

    found = distances(2048)
    assert [*found] == [64, 128]
    assert [*distances(200)] == [64]
    assert distances(100) == {}
    assert found[64] > 0.3
    (row,) = recall_by_distance(None, teacher, held_out, most=2048, tokens=256, distances=(128, 256))
    assert (row["distance"], row["student"]) == (128, found[128])


def test_what_is_guessed_at_first_is_that_of_the_passage_alone(teacher, held_out):
    """So that what recall is above it comes from the passage itself."""
    (row,) = recall_by_distance(teacher, teacher, held_out, most=2048, tokens=512, distances=(64,))
    with torch.no_grad():
        expected = teacher(held_out[:, :64]).logits[:, 7:-1].argmax(-1)
    right = (expected == held_out[:, 8:64]).float().mean().item()
    assert row["first"] == {"teacher": pytest.approx(right), "student": pytest.approx(right)}
    assert right > 0.3


def test_the_token_budget_bounds_the_work(teacher, student, held_out):
    assert closeness(teacher, student, held_out, tokens=256, recall_tokens=64)["tokens"] == 256


def test_the_same_seed_gives_the_same_report(teacher, student, held_out, report):
    assert closeness(teacher, student, held_out) == report


def test_the_files_hold_the_report(report):
    written = files(report)
    assert json.loads(written["closeness.json"]) == json.loads(json.dumps(report))
    assert written["closeness.md"] == as_markdown(report)
    for label in ("**student**", "mixer removed", "random mixer", "plain copy", "needle"):
        assert label in written["closeness.md"]
    assert len([line for line in as_markdown(report).splitlines() if line.startswith("|     ")]) >= 4
