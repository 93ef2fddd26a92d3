"""Calibration as a whole, on the embedded demo teacher. Twin of convert/calibrate.py."""

from dataclasses import replace

import pytest
import torch
from demo_pair import demo_teacher, demo_windows, divergence, fresh_student

from convert.calibrate import calibrate
from convert.calibration import Settings
from convert.loading import student_from_teacher
from deltanet import DeltaNetConfig, DeltaNetForCausalLM, UserError

FAST = Settings(half_lives=(4, 16, 64), betas=(0.05, 0.3), sweeps=1, search_windows=3, search_length=96)
NEW = ("b_proj", "a_proj", "read_proj", "skip_proj", "o_proj")


@pytest.fixture(scope="module")
def teacher():
    return demo_teacher()


@pytest.fixture(scope="module")
def windows():
    return demo_windows(16), demo_windows(4, last=True)


@pytest.fixture(scope="module")
def calibrated(teacher, windows):
    student = fresh_student(teacher, "every:3")
    report = calibrate(teacher, student, windows[0], FAST)
    return student, report


def without_mixers(student):
    for block in student.model.layers:
        if block.layer_type == "linear_attention":
            torch.nn.init.zeros_(block.self_attn.o_proj.weight)
    return student


@pytest.mark.parametrize("hybrid", ["none", "global2", "swa:16"])
@pytest.mark.parametrize("sequential", [True, False])
def test_a_calibrated_student_beats_the_plain_copy_and_no_mixer_on_text_it_was_not_fitted_on(
    teacher, windows, hybrid, sequential
):
    fit, held_out = windows
    student = fresh_student(teacher, hybrid)
    plain = divergence(teacher, student, held_out)
    removed = divergence(teacher, without_mixers(fresh_student(teacher, hybrid)), held_out)
    calibrate(teacher, student, fit, Settings(**{**vars(FAST), "sequential": sequential}))
    # 2,048 tokens are few for the 20 thousand new numbers of a layer; the full text gives far more.
    assert divergence(teacher, student, held_out) < 0.6 * min(plain, removed)


def test_attention_that_sees_only_its_own_token_is_reproduced_exactly(teacher, windows):
    """Then the context is v itself, which the first skip tap carries: nothing needs a state."""
    config = DeltaNetConfig(
        **{
            **{k: v for k, v in teacher.config.to_dict().items() if k not in ("model_type", "architectures")},
            "layer_types": ["sliding_attention"] * teacher.config.num_hidden_layers,
            "sliding_window": 1,
        }
    )
    alone = DeltaNetForCausalLM(config).eval()
    alone.load_state_dict(teacher.state_dict())
    student = fresh_student(alone)
    report = calibrate(alone, student, windows[0], FAST)
    assert min(row["explained"] for row in report["layers"]) > 0.999
    # STATIC_RIDGE shrinks the tap by about 1e-4, six layers in a row.
    assert divergence(alone, student, windows[1]) < 1e-4


@torch.no_grad()
def test_the_first_token_is_the_teachers_own(teacher, windows):
    """Softmax over one token is its value: exact with the teacher's output projection, nearly so with a fitted one."""
    fit, held_out = windows
    wanted = teacher(held_out).logits[:, 0].softmax(-1)
    errors = []
    for changes in ({"refit_output": False}, {}, {"start_weight": 0.0}):
        student = fresh_student(teacher, "none")
        calibrate(teacher, student, fit, Settings(**{**vars(FAST), **changes}))
        errors.append((student(held_out).logits[:, 0].softmax(-1) - wanted).abs().sum(-1).mean())
    exact, weighed, unweighed = errors
    assert exact < 1e-4
    assert weighed < unweighed


def test_only_new_tensors_and_output_projections_of_linear_layers_change(teacher, calibrated):
    student, _ = calibrated
    before = fresh_student(teacher, "every:3").state_dict()
    changed = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    linear = [i for i, kind in enumerate(student.config.layer_types) if kind == "linear_attention"]
    allowed = {
        f"model.layers.{i}.self_attn.{name}.{part}" for i in linear for name in NEW for part in ("weight", "bias")
    }
    assert changed <= allowed
    assert {name.split(".")[4] for name in changed} >= {"b_proj", "a_proj", "read_proj", "skip_proj", "o_proj"}


def test_beside_a_local_window_the_output_projection_stays_the_teachers(teacher, windows):
    fit, held_out = windows
    kept = fresh_student(teacher, "none", local_window=8)
    fitted = fresh_student(teacher, "none", local_window=8)
    before = divergence(teacher, kept, held_out)
    calibrate(teacher, kept, fit, FAST)
    calibrate(teacher, fitted, fit, replace(FAST, refit_output=True))
    for layer, mine, other in zip(teacher.model.layers, kept.model.layers, fitted.model.layers):
        assert torch.equal(layer.self_attn.o_proj.weight, mine.self_attn.o_proj.weight)
        assert not torch.equal(layer.self_attn.o_proj.weight, other.self_attn.o_proj.weight)
    assert divergence(teacher, kept, held_out) < before


def test_the_teacher_is_left_alone(teacher, calibrated):
    fresh = demo_teacher().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in teacher.state_dict().items())


def test_a_student_that_shares_its_teachers_tensors_does_not_change_them(teacher, windows, calibrated):
    student = student_from_teacher(teacher, calibrated[0].config, share=True)
    calibrate(teacher, student, windows[0], FAST)
    assert all(torch.equal(tensor, calibrated[0].state_dict()[name]) for name, tensor in student.state_dict().items())
    fresh = demo_teacher().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in teacher.state_dict().items())


def test_the_same_text_gives_the_same_bits(teacher, windows, calibrated):
    again = fresh_student(teacher, "every:3")
    calibrate(teacher, again, windows[0], FAST)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in calibrated[0].state_dict().items())


@pytest.mark.parametrize("sequential", [True, False])
def test_an_interrupted_calibration_goes_on_with_the_same_bits(teacher, windows, tmp_path, sequential):
    settings = Settings(**{**vars(FAST), "sequential": sequential})
    whole, parts = fresh_student(teacher, "every:3"), fresh_student(teacher, "every:3")
    calibrate(teacher, whole, windows[0][:4], settings)

    class Killed(Exception):
        pass

    finished = []

    def advance(amount):
        finished.append(amount)
        if len(finished) == 3:
            raise Killed

    with pytest.raises(Killed):
        calibrate(teacher, parts, windows[0][:4], settings, folder=tmp_path, advance=advance)
    resumed = fresh_student(teacher, "every:3")
    stamps = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(stamps) == 2  # layers 0 and 1; layer 2 is attention
    calibrate(teacher, resumed, windows[0][:4], settings, folder=tmp_path)
    assert all(torch.equal(tensor, resumed.state_dict()[name]) for name, tensor in whole.state_dict().items())
    assert all((tmp_path / name).stat().st_mtime_ns == stamp for name, stamp in stamps.items())


@pytest.mark.parametrize(("hybrid", "sequential"), [("none", False), ("every:3", True)])
def test_layers_are_fitted_in_sequence_where_some_keep_attention(teacher, windows, hybrid, sequential):
    default, named = fresh_student(teacher, hybrid), fresh_student(teacher, hybrid)
    calibrate(teacher, default, windows[0][:3], FAST)
    calibrate(teacher, named, windows[0][:3], Settings(**{**vars(FAST), "sequential": sequential}))
    assert all(torch.equal(tensor, default.state_dict()[name]) for name, tensor in named.state_dict().items())


def test_finished_layers_of_another_text_are_not_taken(teacher, windows, tmp_path):
    first, second, expected = (fresh_student(teacher, "every:3") for _ in range(3))
    calibrate(teacher, first, windows[0][:3], FAST, folder=tmp_path)
    calibrate(teacher, second, windows[0][3:6], FAST, folder=tmp_path)
    calibrate(teacher, expected, windows[0][3:6], FAST)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in expected.state_dict().items())


def random_teacher(**changes):
    """Two layers of random weights, large enough that attention prefers some tokens."""
    values = {
        "vocab_size": 1024,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    teacher = DeltaNetForCausalLM(DeltaNetConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.mul_(4) if parameter.ndim == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return teacher


@pytest.mark.parametrize(
    "family",
    [
        {"qkv_bias": True},
        {"qk_norm": "head"},
        {"rope_layers": [True, False]},
        {"o_bias": True},
        {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 9},
    ],
    ids=str,
)
def test_teachers_of_every_shape_are_followed(windows, family):
    teacher = random_teacher(**family)
    student = fresh_student(teacher)
    plain = divergence(teacher, student, windows[1])
    report = calibrate(teacher, student, windows[0], FAST)
    assert divergence(teacher, student, windows[1]) < 0.7 * plain
    assert all(0 < row["explained"] < 1 for row in report["layers"])


def test_shared_and_expanded_states_are_the_same_where_every_head_has_its_own_key(windows):
    """With one query head per key/value head both name the same mixer, so the fits must agree."""
    teacher = random_teacher(num_key_value_heads=3)
    shared, expanded = (fresh_student(teacher, state_heads=kind) for kind in ("shared", "expanded"))
    for student in (shared, expanded):
        calibrate(teacher, student, windows[0][:4], FAST)
    assert all(torch.equal(tensor, expanded.state_dict()[name]) for name, tensor in shared.state_dict().items())


@pytest.mark.parametrize(
    "mixer",
    [
        {"mixer": "delta"},
        {"state_heads": "shared"},
        {"mixer": "delta", "state_heads": "shared", "beta_max": 2},
        {"skip_taps": 0},
        {"read_gate": False},
        {"read_gate": False, "skip_taps": 0},
        {"local_window": 8},
        {"local_window": 8, "feature_map": "linear"},
        {"local_window": 8, "state_positions": "fixed"},
        {"local_window": 4, "skip_taps": 0, "state_heads": "shared"},
        {"head_norm": True},
        {"conv_kernel": 4, "output_gate": True},
        {"mixer_bias": False},
    ],
    ids=str,
)
def test_every_kind_of_mixer_comes_closer_than_its_plain_copy(teacher, windows, mixer):
    fit, held_out = windows
    student = fresh_student(teacher, "global2", **mixer)
    plain = divergence(teacher, student, held_out)
    calibrate(teacher, student, fit, FAST)
    assert divergence(teacher, student, held_out) < 0.9 * plain


def test_the_report_says_what_each_layer_got(calibrated, windows):
    _, report = calibrated
    assert [row["layer"] for row in report["layers"]] == [0, 1, 3, 4]
    assert report["tokens"] == windows[0].numel()
    for row in report["layers"]:
        assert len(row["half_life"]) == len(row["beta"]) == 6
        assert all(value > 0 for value in row["half_life"])
        assert all(0 < value < 1 for value in row["beta"])
        assert 0.3 < row["explained"] < 1


def test_a_layer_that_cannot_be_fitted_is_named(windows):
    silent = demo_teacher()
    silent.model.layers[0].input_layernorm.weight.data.zero_()
    with pytest.raises(UserError, match=r"layer 0 cannot be fitted to this text: .*cholesky"):
        calibrate(silent, fresh_student(silent), windows[0][:2], FAST)


def test_unfit_models_and_texts_are_refused_by_name(teacher, windows):
    student = fresh_student(teacher)
    with pytest.raises(UserError, match="attention in every layer"):
        calibrate(student, student, windows[0], FAST)
    with pytest.raises(UserError, match="windows"):
        calibrate(teacher, student, windows[0][0], FAST)
    with pytest.raises(UserError, match="bfloat16"):
        calibrate(teacher, fresh_student(teacher).to(torch.bfloat16), windows[0], FAST)
