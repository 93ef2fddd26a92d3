"""What a stage computes: zero where nothing is to be learnt, only mixers in align, no leak between documents."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from small_pair import KINDS, pair, sequence, stage

from distill.batch import make_batch, num_real, num_targets
from distill.stages import Align, Whole, compile_layers, share_frozen
from distill.trainable import trained_names

SEQUENCES = [sequence(position) for position in range(3)]
BATCH = make_batch(SEQUENCES)


def test_a_batch_is_its_sequences_end_to_end():
    assert BATCH.input_ids.shape == (1, sum(len(s.input_ids) for s in SEQUENCES))
    bounds = BATCH.cu_seqlens.tolist()
    assert bounds == sorted(set(bounds))
    assert bounds[-1] == BATCH.input_ids.shape[1]
    assert all(BATCH.position_ids[0, start] == 0 for start in bounds[:-1])
    spans = zip(np.cumsum([0, *(len(s.input_ids) for s in SEQUENCES)]), SEQUENCES)
    assert BATCH.real.tolist() == [start + i for start, s in spans for i in range(s.num_tokens)]
    assert len(BATCH.real) == num_real(SEQUENCES)
    assert int((BATCH.targets >= 0).sum()) == num_targets(SEQUENCES)
    assert BATCH.valid.tolist() == (BATCH.targets[0] >= 0).nonzero()[:, 0].tolist()
    assert BATCH.longest == int(BATCH.cu_seqlens.diff().max())


def test_align_is_the_mean_over_layers_of_each_mixer_against_its_attention():
    teacher, student = pair()
    module = Align(student, teacher, stage("align", losses=[{"name": "mixer_mse"}]))
    loss, _ = module(BATCH, num_real(SEQUENCES))
    states = {}
    for index in (0, 2):
        teacher.model.layers[index].self_attn.register_forward_hook(
            lambda _, args, kwargs, out, index=index: states.update({index: (args[0], kwargs, out[0])}),
            with_kwargs=True,
        )
    teacher.model(BATCH.input_ids, position_ids=BATCH.position_ids, cu_seqlens=BATCH.cu_seqlens, use_cache=False)
    by_hand = 0.0
    for index, (x, kwargs, wanted) in states.items():
        made = student.model.layers[index].self_attn(x, kwargs["position_embeddings"], cu_seqlens=BATCH.cu_seqlens)[0]
        by_hand += (made - wanted)[0, BATCH.real].square().mean(-1).sum() / num_real(SEQUENCES) / 2
    torch.testing.assert_close(loss, by_hand)


def test_align_names_its_parameters_as_the_student_does_and_trains_every_one():
    teacher, student = pair()
    module = Align(student, teacher, stage("align"))
    names = {name.removeprefix("student.") for name, _ in module.named_parameters()}
    assert names == set(trained_names([n for n, _ in student.named_parameters()], stage("align"), student.config))
    module(BATCH, num_real(SEQUENCES))[0].backward()
    without = [name for name, p in module.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad is None for p in teacher.parameters())


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        teacher, student = pair()
        module = Align(student, teacher, stage("align"))
        module.checkpointing = checkpointing
        module(BATCH, num_real(SEQUENCES))[0].backward()
        gradients.append({name: p.grad for name, p in module.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("loss", ["forward_kl", "reverse_kl", "jsd", "hidden_mse"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(loss):
    teacher, _ = pair()
    twin, _ = pair()
    twin.requires_grad_(True)
    value, parts = Whole(twin, teacher, stage("distil", losses=[{"name": loss}]))(BATCH, num_targets(SEQUENCES))
    value.backward()
    # float32 log-softmax of equal logits: exactly equal inputs give exactly zero differences.
    assert value.item() == pytest.approx(0, abs=1e-7)
    assert parts[loss].item() == pytest.approx(0, abs=1e-7)
    assert max(p.grad.abs().max().item() for p in twin.parameters() if p.grad is not None) < 1e-7


def test_cross_entropy_is_the_models_own_loss():
    _, student = pair()
    labels = torch.full_like(BATCH.targets, -100)
    labels[:, 1:] = BATCH.targets[:, :-1]
    logits = student(BATCH.input_ids, position_ids=BATCH.position_ids, cu_seqlens=BATCH.cu_seqlens).logits
    expected = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    value, _ = Whole(student, None, stage("pretrain"))(BATCH, num_targets(SEQUENCES))
    torch.testing.assert_close(value, expected)


def test_terms_add_up_by_their_weights():
    teacher, student = pair()
    losses = [
        {"name": "forward_kl", "weight": 2.0},
        {"name": "ce", "weight": 0.5},
        {"name": "hidden_cosine", "weight": 3.0},
        {"name": "layer_cosine", "weight": 0.1},
    ]
    value, parts = Whole(student, teacher, stage("distil", losses=losses))(BATCH, num_targets(SEQUENCES))
    assert value.item() == pytest.approx(sum(item["weight"] * parts[item["name"]].item() for item in losses), rel=1e-6)
    assert all(part.item() > 0 for part in parts.values())


def test_measuring_gives_cross_entropy_and_divergence_whatever_the_stage_trains_on():
    teacher, student = pair()
    module = Whole(student, teacher, stage("distil", losses=[{"name": "hidden_mse"}]))
    assert set(module(BATCH, num_targets(SEQUENCES), measure=True)[1]) == {"ce", "forward_kl"}
    assert set(Whole(student, None, stage("pretrain"))(BATCH, 9, measure=True)[1]) == {"ce"}


def test_micro_batches_add_up_to_the_batch():
    teacher, student = pair()
    count = num_targets(SEQUENCES)
    module = Whole(student, teacher, stage("distil"))
    module(BATCH, count)[0].backward()
    whole = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    for one in SEQUENCES:
        module(make_batch([one]), count)[0].backward()
    for name, parameter in module.named_parameters():
        # float32 sums in another order
        torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-7, msg=name)


def test_no_valid_target_gives_a_zero_gradient_for_every_parameter():
    teacher, student = pair()
    some = sequence(0)
    nothing = make_batch([replace(some, targets=np.full_like(some.targets, -100))])
    losses = [{"name": "forward_kl"}, {"name": "hidden_mse"}]
    module = Whole(student, teacher, stage("distil", losses=losses))
    module(nothing, 1)[0].backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())


def test_frozen_tensors_are_shared_with_the_teacher_and_trained_ones_are_not():
    teacher, student = pair()
    trained = trained_names([n for n, _ in student.named_parameters()], stage("align"), student.config)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in trained)
    saved = share_frozen(student, teacher)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        assert (parameter is theirs.get(name)) == (name not in trained)
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert saved == sum(p.numel() * 4 for name, p in student.named_parameters() if name not in trained)
    assert KINDS[1] == "full_attention"


def test_a_bfloat16_teacher_lends_what_it_holds_exactly_and_only_to_a_student_that_computes_in_it():
    teacher, student = pair()
    teacher.bfloat16()
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(False)
        if "norm" not in name:
            parameter.data = parameter.data.bfloat16().float()  # as from a checkpoint in bfloat16
    rounded = student.model.layers[1].mlp.up_proj.weight
    rounded.data[0, 0] += 1e-4  # which bfloat16 cannot hold
    assert share_frozen(student, teacher) == 0
    saved = share_frozen(student, teacher, torch.bfloat16)
    theirs = dict(teacher.named_parameters())
    alone = {name for name, parameter in student.named_parameters() if parameter is not theirs.get(name)}
    assert "model.layers.1.mlp.up_proj.weight" in alone
    assert all(name in alone or parameter.dtype == torch.bfloat16 for name, parameter in student.named_parameters())
    assert {name for name in alone if name in theirs} == {"model.layers.1.mlp.up_proj.weight"}
    lent = [parameter for name, parameter in student.named_parameters() if name not in alone]
    assert saved == sum(4 * parameter.numel() for parameter in lent)


def test_compiled_layers_compute_the_same():
    made = []
    for compiled in (False, True):
        teacher, student = pair()
        found = []
        for module in (Whole(student, teacher, stage("distil")), Align(student, teacher, stage("align"))):
            names = [name for name, _ in module.named_parameters()]
            if compiled:
                compile_layers(module, backend="eager")  # traced by layers, but run by no compiler's code
            module(BATCH, module.count(SEQUENCES))[0].backward()
            assert [name for name, _ in module.named_parameters()] == names
            found += [parameter.grad.clone() for parameter in module.parameters()]
            student.zero_grad()
        made.append(found)
    for mine, its in zip(*made, strict=True):
        torch.testing.assert_close(its, mine)


COMPILED = """
from test_stages import BATCH, SEQUENCES, Align, compile_layers, pair, stage

teacher, student = pair()
module = Align(student, teacher, stage("align"))
compile_layers(module)
module(BATCH, module.count(SEQUENCES))[0].backward()
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
def test_a_second_process_compiles_from_the_cache_of_the_first(tmp_path):
    """Which torch 2.13 gets wrong for traced graphs that return views: garbage in their sizes."""
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parents[1])))
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", COMPILED], env=environment, check=True)


def test_rows_of_other_documents_never_exhaust_the_compiler():
    teacher, student = pair()
    module = Whole(student, teacher, stage("distil"))
    compile_layers(module, backend="eager")
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for count in (1, 3, 2, 7, 20, 5, 11):
            sequences = [sequence(position) for position in range(count)]
            module(make_batch(sequences), module.count(sequences))[0].backward()
            with torch.no_grad():
                module(make_batch(sequences), module.count(sequences))
