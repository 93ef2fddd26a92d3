"""Baselines differ from teacher and plain copy in what they are to differ in, and in nothing else."""

import pytest
import torch
from small_run import write_recipe, write_teacher
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.baselines import KINDS, main, same_budget, write
from benchmarks.windows import in_windows
from convert.command import convert
from convert.loading import load_teacher
from deltanet import DeltaNetConfig, load_student
from deltanet_errors import UserError
from distill.run import distil

HYBRID = "layers:1"
"""Layers 0 and 2 are linear. Their states, 2 heads of 16 x 16, take as much as 32 tokens of one key/value head."""
WINDOW = 32


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return write_teacher(tmp_path_factory.mktemp("pair") / "teacher", num_layers=3)


@pytest.fixture(scope="module")
def plain(teacher):
    folder = teacher.with_name("plain")
    convert(teacher, folder, hybrid=HYBRID, calibrate=("none",), local_window=0)
    return load_student(folder)


def made(kind, teacher, tmp_path, **options):
    write(kind, str(teacher), tmp_path / kind, **{"hybrid": HYBRID, "local_window": 0} | options)
    return load_student(tmp_path / kind)


def ids(length):
    return torch.randint(3, 1000, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, length=24):
    return model(ids(length)).logits


def weights(model, *parts):
    return {name: w for name, w in model.state_dict().items() if all(part in name for part in parts)}


def mixers(model):
    return weights(model, "layers.0.self_attn") | weights(model, "layers.2.self_attn")


def test_a_window_costs_what_a_state_does():
    """SmolLM2-135M: 9 states of 64 x 64 in float32; 3 keys and values of 64 in bfloat16 a token."""
    shape = {"hidden_size": 576, "num_attention_heads": 9, "num_key_value_heads": 3}
    assert same_budget(DeltaNetConfig(**shape)) == 9 * 64 * 64 * 4 // (2 * 3 * 64 * 2) == 192
    assert same_budget(DeltaNetConfig(**shape, state_heads="shared")) == 64


def test_windows_are_the_teacher_on_shorter_texts_only(teacher, tmp_path):
    student = made("windows", teacher, tmp_path)
    assert student.config.local_window == WINDOW
    seen = WINDOW + 1  # the window and the first token
    mine, theirs = logits(student, seen + 1), logits(load_teacher(teacher), seen + 1)
    assert (mine[:, :seen] - theirs[:, :seen]).abs().max() < 1e-5
    assert (mine[:, seen] - theirs[:, seen]).abs().max() > 1e-4
    own = made("windows", teacher, tmp_path / "own", local_window=8, state_heads="expanded")
    assert own.config.local_window == WINDOW + 8


@pytest.mark.parametrize("has_first", [False, True])
@torch.no_grad()
def test_the_first_token_is_seen_or_not(has_first, teacher):
    whole = load_teacher(teacher, torch.float32)
    seen = 9 + has_first
    mine, theirs = logits(in_windows(whole, HYBRID, 9, has_first).eval(), seen + 1), logits(whole, seen + 1)
    assert (mine[:, :seen] - theirs[:, :seen]).abs().max() < 1e-5
    assert (mine[:, seen] - theirs[:, seen]).abs().max() > 1e-4


@torch.no_grad()
def test_windows_read_nothing_from_their_states(teacher, tmp_path):
    student = made("windows", teacher, tmp_path)
    before = logits(student, 2 * WINDOW)
    for layer in (0, 2):
        student.model.layers[layer].self_attn.b_proj.bias.fill_(3.0)
    assert torch.equal(logits(student, 2 * WINDOW), before)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"scratch"}))
@pytest.mark.parametrize("hybrid", ["all", "layers:0,1,2"])
def test_a_layout_without_linear_layers_is_no_baseline(kind, hybrid, teacher, tmp_path):
    with pytest.raises(UserError, match=f"--hybrid {hybrid}: no layer is linear, so {kind} would be the teacher"):
        made(kind, teacher, tmp_path, hybrid=hybrid)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seed", ["-1", str(1 << 63), "1" * 30])
def test_a_seed_that_is_none_and_a_folder_that_is_there_are_each_one_line(seed, teacher, tmp_path, capsys, monkeypatch):
    for options, told in [
        ([tmp_path / "new", "--seed", seed], f"--seed {seed}: allowed is a whole number from 0 to 2^63 - 1"),
        ([tmp_path], f"-o {tmp_path}: exists already; delete it, or name another folder"),
    ]:
        monkeypatch.setattr("sys.argv", ["baselines", "scratch", str(teacher), "-o", *map(str, options)])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err.splitlines()[-1] == f"baselines: error: {told}"
    assert not list(tmp_path.iterdir())


def test_scratch_has_the_students_shapes_and_random_weights(teacher, plain, tmp_path):
    student = made("scratch", teacher, tmp_path)
    found, wanted = student.state_dict(), plain.state_dict()
    assert {name: w.shape for name, w in found.items()} == {name: w.shape for name, w in wanted.items()}
    same = {name for name in found if torch.equal(found[name], wanted[name])}
    assert {name for name, w in found.items() if w.ndim == 2 and w.abs().max() > 0}.isdisjoint(same)
    spread = found["model.layers.1.self_attn.q_proj.weight"].std().item()
    assert spread == pytest.approx(student.config.initializer_range, rel=0.1)
    write("scratch", str(teacher), tmp_path / "again", hybrid=HYBRID, local_window=0)
    write("scratch", str(teacher), tmp_path / "other", hybrid=HYBRID, seed=1, local_window=0)
    assert torch.equal(logits(load_student(tmp_path / "again")), logits(student))
    assert not torch.equal(logits(load_student(tmp_path / "other")), logits(student))


def test_random_mixers_are_all_that_differs(teacher, plain, tmp_path):
    student, fresh = made("random-mixers", teacher, tmp_path), made("scratch", teacher, tmp_path)
    for name, weight in student.state_dict().items():
        origin = fresh if name in mixers(student) else plain
        assert torch.equal(weight, origin.state_dict()[name]), name
    assert len(mixers(student)) == len(mixers(plain)) > 8


def test_repeated_rows_are_the_known_mistake(tmp_path):
    """Two key/value heads for four query heads: a head that should be whole has every row twice."""
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=1024, num_hidden_layers=3, attention_bias=True, initializer_range=0.3, **shape)
    model = LlamaForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim == 1 else None
    model.save_pretrained(tmp_path / "teacher")
    student = made("repeated-rows", tmp_path / "teacher", tmp_path)
    convert(tmp_path / "teacher", tmp_path / "plain", hybrid=HYBRID, calibrate=("none",), local_window=0)
    plain = load_student(tmp_path / "plain")

    assert (logits(student) - logits(plain)).abs().max() > 0.1
    for layer in (0, 2):
        for name in ("k_proj", "v_proj"):
            mine, origin = (getattr(m.model.layers[layer].self_attn, name) for m in (student, plain))
            for wide, rows in ((mine.weight, origin.weight), (mine.bias, origin.bias)):
                assert all(torch.equal(wide[i], rows[i // 2]) for i in range(32))
            # The same, done right, must be the plain copy: nothing but the order of rows is wrong.
            for wide, rows in ((mine.weight, origin.weight), (mine.bias, origin.bias)):
                wide.data = torch.cat([rows[8 * (head // 2) :][:8] for head in range(4)])
    torch.testing.assert_close(logits(student), logits(plain), rtol=1e-5, atol=1e-5)


def test_repeated_rows_need_heads_that_share(tmp_path):
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    ).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UserError, match="nothing is repeated"):
        made("repeated-rows", tmp_path / "teacher", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_starts_from_it(kind, teacher, tmp_path):
    write(kind, str(teacher), tmp_path / kind, hybrid=HYBRID, local_window=0)
    stages = [{"kind": "distil", "steps": 2}]
    recipe = write_recipe(tmp_path / "r.yaml", teacher, stages=stages, data__seq_len=2 * WINDOW)
    facts = distil(recipe, ["student.convert=null", f"student.model={tmp_path / kind}"], output=tmp_path / "run")
    layers = [load_student(folder).config.layer_types for folder in (tmp_path / kind, tmp_path / "run" / "export")]
    assert layers[0] == layers[1]
    assert facts["results"][-1]["kl"] < facts["results"][1]["kl"]
