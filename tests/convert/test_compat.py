"""--compat: the student is one that the format can express, and calibration does not undo it."""

import pytest
from tiny import make_teacher

import cli
from convert import convert
from convert.compat import DEFAULTS, NEEDED, WITHOUT_WINDOW, resolve
from convert.formats import REWRITTEN, write_format
from deltanet import load_student
from deltanet_errors import UserError

NONE = dict.fromkeys(DEFAULTS)


@pytest.mark.parametrize(("compat", "family"), [("fla", "llama"), ("qwen3_5", "qwen3")])
def test_a_calibrated_student_can_be_written(tmp_path, compat, family):
    settings = {"attention_bias": False, "mlp_bias": False} if family == "llama" else {}
    make_teacher(tmp_path / "teacher", family, **settings)
    report = convert(tmp_path / "teacher", tmp_path / "student", compat=compat)
    assert report["closeness"] is not None
    config = load_student(tmp_path / "student").config
    assert REWRITTEN[compat].refusals(config) == []
    assert not config.exact_start
    write_format(tmp_path / "student", tmp_path / "out", compat)


@pytest.mark.parametrize("compat", NEEDED)
@pytest.mark.parametrize("name", ["skip_conv", "gate", "state_heads"])
def test_an_option_against_it_is_refused_also_at_its_usual_value(compat, name):
    other = {"skip_conv": 4, "gate": "read", "state_heads": "shared"}[name]
    with pytest.raises(UserError, match=f"--compat {compat} needs"):
        resolve(compat, NONE | {name: other})
    needed = NEEDED[compat][name]
    assert resolve(compat, NONE | {name: needed})[name] == needed


def test_what_it_leaves_open_may_be_chosen():
    assert resolve("fla", NONE | {"mixer": "delta", "conv": 2, "beta_range": 2}) == {
        "mixer": "delta", "conv": 2, "beta_range": 2, "state_heads": "expanded", "skip_conv": 0, "gate": "none",
        "local_window": 0, "state_positions": "rotary", "feature_map": "none",
    }  # fmt: skip
    assert resolve("qwen3_5", NONE)["conv"] == 4


def test_without_a_window_a_student_has_more_states_and_a_way_past_them():
    assert resolve(None, NONE | {"conv": 3}) == DEFAULTS | {"conv": 3}
    alone = DEFAULTS | WITHOUT_WINDOW
    assert resolve(None, NONE | {"local_window": 0}) == alone
    assert resolve(None, NONE | {"gate": "output"}) == alone | {"gate": "output"}
    assert resolve(None, NONE | {"local_window": 0, "state_heads": "shared", "skip_conv": 2}) == alone | {
        "state_heads": "shared", "skip_conv": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compat", "flaa"], "did you mean 'fla'?"),
        (["--compat", "fla", "--skip-conv", "4"], "--skip-conv 4: --compat fla needs --skip-conv 0"),
        (["--compat", "qwen3_5", "--mixer", "delta"], "--mixer delta: --compat qwen3_5 needs --mixer gated_delta"),
        (["--compat", "qwen3_5", "--conv", "0"], "--conv 0: --compat qwen3_5 needs a convolution"),
        (["--compat", "qwen3_5"], "attention without q/k norms"),
        (["--compat", "fla"], "biases of q, k, v in linear layers"),
        (["--compat", "fla", "--hybrid", "all"], "biases in the MLP"),
    ],
)
def test_a_student_that_could_not_be_written_is_not_made(tmp_path, capsys, options, message):
    make_teacher(tmp_path / "teacher")  # a Llama with biases
    assert cli.convert_main([str(tmp_path / "teacher"), "-o", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"teacher"}
