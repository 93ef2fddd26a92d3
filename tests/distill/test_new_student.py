"""Students from nothing: what their configuration says, what cannot be, and a run that has no teacher."""

import json

import pytest
import torch
import yaml
from small_run import write_teacher

from deltanet import load_student
from deltanet_errors import UserError
from distill.new_student import HALF_LIFE, new_model, plan_new, write_new
from distill.run import distil
from distill.schema import New

SMALL = {"vocabulary": 64, "layers": 4, "hidden_size": 16, "heads": 2, "hybrid": "none", "mixer": "delta"}


def new(**changes) -> New:
    return New(**SMALL | changes)


@pytest.mark.parametrize(
    ("hybrid", "letters", "window"),
    [("none", "LLLL", None), ("all", "FFFF", None), ("global2", "LFFL", None), ("every:2", "LFLF", None),
     ("layers:0,3", "FLLF", None), ("swa:8", "LSLS", 8)],
)  # fmt: skip
def test_a_layout_decides_which_layers_have_attention_and_positions(hybrid, letters, window):
    config, tokenizer = plan_new(new(hybrid=hybrid))
    assert [kind[0].upper() for kind in config.layer_types] == list(letters)
    assert config.rope_layers == [letter != "L" for letter in letters]
    assert config.sliding_window == window
    assert config.vocab_size == len(tokenizer) == 64


def test_every_key_reaches_the_configuration():
    wish = new(intermediate_size=24, heads=4, kv_heads=2, head_dim=6, max_context=99, tied=True, mixer="gated_delta",
               state_heads="shared", feature_map="linear", skip_conv=2, local_window=8, conv=3, gate="both",
               beta_range=2)  # fmt: skip
    config, tokenizer = plan_new(wish)
    found = {
        "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "max_position_embeddings": 99, "tie_word_embeddings": True, "mixer": "gated_delta", "state_heads": "shared",
        "feature_map": "linear", "skip_taps": 2, "local_window": 8, "conv_kernel": 3, "read_gate": True,
        "output_gate": True, "beta_max": 2, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    assert {name: getattr(config, name) for name in found} == found
    assert plan_new(new())[0].intermediate_size == 2 * 16


def test_weights_follow_from_the_seed_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    write_new(new(), tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), before)  # the caller's stream is not drawn from
    torch.manual_seed(6)
    write_new(new(), tmp_path / "b")
    write_new(new(seed=1), tmp_path / "c")
    a, b, c = (load_student(tmp_path / name, dtype=torch.float32).state_dict() for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["model.embed_tokens.weight"], c["model.embed_tokens.weight"])
    # 1,024 draws of standard deviation 16^-0.5: the estimate's own deviation is 0.25 / sqrt(2048) = 0.0055; six of them
    assert a["model.embed_tokens.weight"].std().item() == pytest.approx(0.25, abs=0.033)


@pytest.mark.parametrize("hybrid", ["none", "all", "global2"])
def test_every_block_adds_nothing_at_the_start_and_learns_from_the_first_gradient(hybrid):
    config, _ = plan_new(new(hybrid=hybrid))
    model = new_model(config, 0)
    ids = torch.arange(24).view(2, 12)
    hidden = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(hidden, model.model.norm(model.model.embed_tokens(ids)))
    model(input_ids=ids, labels=ids).loss.backward()
    for block in model.model.layers:
        assert block.self_attn.o_proj.weight.grad.norm() > 0
        assert block.mlp.down_proj.weight.grad.norm() > 0


def test_a_fresh_gated_layer_forgets_half_in_its_half_life():
    config, _ = plan_new(new(mixer="gated_delta"))
    for block in new_model(config, 0).model.layers:
        _, g = block.self_attn.strengths(torch.randn(1, 3, 16))
        assert (HALF_LIFE * g).exp().flatten().tolist() == pytest.approx([0.5] * g.numel(), rel=1e-3)  # float32 bias


def test_a_tokenizer_is_taken_from_a_checkpoint(tmp_path):
    config, tokenizer = plan_new(new(tokenizer=str(write_teacher(tmp_path / "teacher"))))
    assert config.vocab_size == len(tokenizer) == 1024


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 5}, "student.new.vocabulary: a vocabulary of 5 words: allowed is 18 to 347,987"),
        ({"tokenizer": "/nowhere"}, "student.new.tokenizer: /nowhere has no tokenizer"),
        ({"heads": 3}, "student.new.heads: 3 do not divide hidden_size 16; say head_dim"),
        ({"heads": 4, "kv_heads": 3}, "student.new.kv_heads: 3 do not divide the 4 heads"),
        ({"heads": 2, "kv_heads": 4}, "student.new.kv_heads: 4 do not divide the 2 heads"),
        ({"head_dim": 5}, "student.new.head_dim: 5 is odd; RoPE turns pairs of numbers, so make it even"),
        ({"hybrid": "layers:4"}, "'4' is not a whole number from 0 to 3"),
        ({"hybrid": "some"}, "student.new.hybrid some: unknown layout"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(tmp_path, changes, message):
    with pytest.raises(UserError) as caught:
        write_new(new(**changes), tmp_path / "student")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def write_recipe(path, **new_changes):
    recipe = {
        "version": 1,
        "student": {"new": SMALL | {"layers": 2} | new_changes},
        "data": {
            "sources": [{"task": "modular", "options": {"modulus": 5}, "documents": 400}],
            "seq_len": 18, "held_out": 0.1,
        },
        "stages": [{"kind": "pretrain", "steps": 40, "lr": 1e-2}],
        "training": {"batch_size": 16, "micro_batch_size": 16, "dtype": "float32"},
        "evaluation": {"tasks": ["copying"], "task_examples": 20},
    }  # fmt: skip
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run whose first try failed: its vocabulary was too small for the task."""
    folder = tmp_path_factory.mktemp("new")
    with pytest.raises(UserError, match="task modular: needs 6 words of one token, the tokenizer has 3"):
        distil(write_recipe(folder / "recipe.yaml", vocabulary=20), output=folder / "run")
    return folder / "run", distil(write_recipe(folder / "recipe.yaml"), output=folder / "run")


def test_a_run_without_a_teacher_learns_and_exports(run):
    folder, facts = run
    assert [row["model"] for row in facts["results"]] == ["new", "after pretrain"]
    before, after = (row["perplexity"] for row in facts["results"])
    # Knowing nothing, an answer is one of 64 tokens; knowing which words are answers, one of 5. 18 is the
    # geometric mean of the two.
    assert before > 64
    assert after < 18
    assert load_student(folder / "export").config.vocab_size == 64
    assert facts["samples"] == {}


def test_a_failed_start_leaves_no_student_of_another_recipe(run):
    folder, _ = run
    assert json.loads((folder / "student" / "config.json").read_text())["vocab_size"] == 64


def test_the_page_has_the_tasks_asked_for_and_the_one_trained_on(run):
    folder, _ = run
    report = json.loads((folder / "evaluation.json").read_text())
    assert list(report["tasks"]) == ["copying", "trained on modular"]
    assert report["tasks"]["trained on modular"]["floors"]["a state at random"] == pytest.approx(1 / 5)
    assert report["teacher"] is None
    page = (folder / "evaluation.html").read_text()
    assert "trained on modular" in page
    assert "copying" in (folder / "evaluation.md").read_text()


def test_a_started_run_keeps_its_student(run, tmp_path):
    folder, _ = run
    before = (folder / "student" / "model.safetensors").stat().st_mtime_ns
    distil(folder.parent / "recipe.yaml", output=folder)
    assert (folder / "student" / "model.safetensors").stat().st_mtime_ns == before
