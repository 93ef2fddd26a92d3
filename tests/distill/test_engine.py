"""The engine's laws, at every ZeRO stage with two real processes (gloo, CPU). The work is in engine_laws.py."""

import contextlib
import socket

import engine_laws
import pytest
import torch

from deltanet_errors import UserError
from distill.engine import EngineSettings

TRIALS = [(stage, precision) for precision in ("fp32", "bf16") for stage in (0, 1, 2, 3)]
EXACT, ROUNDED = "fp32", "bf16"


def run(tmp_path, size, trials):
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(engine_laws.work, (size, port, trials, str(tmp_path)), nprocs=size)
    return torch.load(tmp_path / "results.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    return run(tmp_path_factory.mktemp("two"), 2, TRIALS)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), 1, [(0, EXACT), (2, EXACT)])


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("trial", TRIALS)
def test_resumed_equals_straight_bit_for_bit(two, trial):
    result = two[trial]
    assert equal(result["loaded"], result["middle"])
    assert result["resumed"] == result["straight"]
    assert equal(result["resumed_end"], result["end"])
    assert not equal(result["end"], result["middle"])


@pytest.mark.parametrize("trial", TRIALS)
def test_nan_on_one_rank_skips_the_step_on_all_and_changes_nothing(two, trial):
    result = two[trial]
    loss, applied, norm = result["skipped"]
    assert not applied
    assert loss != loss
    assert norm != norm
    assert equal(result["after_skip"], result["middle"])


@pytest.mark.parametrize("trial", TRIALS)
def test_a_step_at_rate_zero_leaves_every_master_bit_equal(two, trial):
    result = two[trial]
    masters = {name: tensor for (key, name), tensor in result["middle"].items() if key is None}
    assert equal(result["still"], masters)


@pytest.mark.parametrize("trial", TRIALS)
def test_masters_start_as_the_float32_weights(two, trial):
    expected = dict(engine_laws.Tiny().named_parameters())
    assert equal(two[trial]["fresh"], expected)


@pytest.mark.parametrize("trial", TRIALS)
def test_a_closed_engine_leaves_nothing_in_memory(two, trial):
    assert two[trial]["released"]


@pytest.mark.parametrize("trial", TRIALS)
def test_buffers_keep_their_precision(two, trial):
    """RoPE's frequencies are a float32 buffer, which DeepSpeed would round."""
    assert torch.equal(two[trial]["frequencies"], torch.tensor([1.0 / 3]))


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if trial[0] in (1, 2)])
def test_parameters_start_at_16_bytes(two, trial):
    """Some have 9 numbers, and DeepSpeed lays parameters end to end; compiled kernels load 16 bytes at once."""
    assert set(two[trial]["starts"].values()) == {0}
    assert {"up.weight", "up.bias", "norm.weight", "down.weight"} <= two[trial]["starts"].keys()


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_stages_agree_with_zero_0(two, stage):
    # float32 sums in another order: measured 2e-8 relative on the losses; 1e-6 leaves room.
    mine, base = two[stage, EXACT]["losses"], two[0, EXACT]["losses"]
    assert [loss for loss, *_ in mine] == pytest.approx([loss for loss, *_ in base], rel=1e-6)
    assert [norm for *_, norm in mine] == pytest.approx([norm for *_, norm in base], rel=1e-5)


def test_two_processes_agree_with_one_though_their_valid_tokens_differ(one, two):
    """Step 2 leaves rank 1 with no valid token at all."""
    for trial in one:
        assert [loss for loss, *_ in two[trial]["losses"]] == pytest.approx(
            [loss for loss, *_ in one[trial]["losses"]], rel=1e-6
        )


@pytest.mark.parametrize("trial", TRIALS)
def test_products_are_made_in_the_precision_asked_for(two, trial):
    """DeepSpeed turns off an autocast that is entered around it."""
    assert two[trial]["computed_in"] == {EXACT: torch.float32, ROUNDED: torch.bfloat16}[trial[1]]


def test_bfloat16_keeps_updates_smaller_than_its_own_rounding(two):
    """After four steps no norm weight, 1.0 at first, is a bfloat16 number: the master is float32."""
    for stage in (0, 1, 2, 3):
        weight = two[stage, ROUNDED]["end"][None, "norm.weight"]
        assert (weight != weight.bfloat16().float()).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"zero_stage": 4}, "zero_stage is 4; allowed: 0, 1, 2, 3"),
        ({"precision": "fp8"}, "precision is 'fp8'; allowed: fp32, bf16"),
        ({"offload_optimizer": True}, "offload_optimizer needs zero_stage"),
        ({"zero_stage": 2, "offload_parameters": True}, "offload_parameters needs zero_stage 3"),
    ],
)
def test_impossible_settings_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        EngineSettings(**options)
