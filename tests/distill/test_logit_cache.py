"""The teacher on disk: what is kept, how a writing goes on, what is damaged; and a run that trains without it."""

import gc
import json
import threading
import weakref

import numpy as np
import pytest
import small_run
import torch
from small_pair import VOCABULARY, config, pair, stage
from small_text import TWO_FILES, Text, content, files, plan

from deltanet import DeltaNetForCausalLM
from deltanet_errors import DeltanetError, Interrupted, UserError
from distill import logit_cache
from distill import run as run_module
from distill.batch import make_batch, num_targets
from distill.dry_run import describe
from distill.logit_cache import PORTION, bytes_a_target, write_cache
from distill.packing import IGNORED
from distill.recipe import load_recipe
from distill.run import distil
from distill.stages import Whole
from distill.world import World

ALONE = World(0, 1, torch.device("cpu"))


def write(folder, planned=None, teacher=None, world=ALONE, **options):
    options = {"made_by": "teacher", "top_k": 6, "vocab_size": VOCABULARY} | options
    return write_cache(folder, planned or plan(), teacher or pair()[0], world, **options)


def test_what_is_kept_is_the_teachers_distribution_to_float16(tmp_path):
    cache, (teacher, _) = write(tmp_path), pair()
    for position in (0, 3, PORTION - 1, PORTION, TWO_FILES - 1):
        found, plain = cache[position], Text()[position]
        assert np.array_equal(found.input_ids, plain.input_ids)
        logits = teacher(
            torch.from_numpy(plain.input_ids)[None],
            position_ids=torch.from_numpy(plain.position_ids)[None],
            cu_seqlens=torch.from_numpy(plain.cu_seqlens),
        ).logits[0]
        exact = logits.double().log_softmax(-1)[torch.from_numpy(plain.targets != IGNORED)]
        ids, log_p, log_rest = found.top_k
        values, order = exact.topk(6, -1)
        assert ids.shape == (num_targets([plain]), 6)
        assert np.array_equal(ids, order.numpy())
        # float16 has 11 bits; the rest is the sum of what is not kept, in float32.
        np.testing.assert_allclose(log_p, values.numpy(), rtol=2**-11, atol=1e-5)
        np.testing.assert_allclose(np.exp(log_rest), 1 - values.exp().sum(-1).numpy(), rtol=1e-5, atol=1e-6)


def test_a_stage_on_the_cache_of_the_whole_vocabulary_learns_what_it_learns_of_the_teacher(tmp_path):
    teacher, student = pair()
    cache = write(tmp_path, plan(3), teacher, top_k=VOCABULARY)
    gradients = []
    for sequences, who in (([cache[at] for at in range(3)], None), ([Text()[at] for at in range(3)], teacher)):
        student.zero_grad()
        loss, parts = Whole(student, who, stage("distil"))(make_batch(sequences), num_targets(sequences))
        loss.backward()
        gradients.append((parts["forward_kl"], torch.cat([p.grad.flatten() for p in student.parameters()])))
    (mine, here), (its, there) = gradients
    torch.testing.assert_close(mine, its, rtol=1e-3, atol=0)  # a probability moves by its 2^-11
    assert (here - there).norm() < 1e-3 * there.norm()


def test_a_student_equal_to_its_teacher_has_nearly_no_loss_and_no_gradient(tmp_path):
    teacher, _ = pair()
    twin, _ = pair()
    sequences = [write(tmp_path, plan(3), teacher)[at] for at in range(3)]
    twin.requires_grad_(True)
    loss, _ = Whole(twin, None, stage("distil"))(make_batch(sequences), num_targets(sequences))
    loss.backward()
    # log p of at most 6 or so off by its 2^-12: KL is half the mean square of that, the gradient p times it.
    assert 0 <= loss.item() < 2e-6
    assert max(p.grad.abs().max().item() for p in twin.parameters()) < 1e-2


def test_the_bytes_of_a_target_are_those_on_disk(tmp_path):
    planned = plan(PORTION)
    targets = num_targets([planned.corpus[at] for at in range(PORTION)])
    size = files(write(tmp_path, planned))[0].stat().st_size
    assert 0 < size - targets * bytes_a_target(6, VOCABULARY) < 8 * (PORTION + 1) + 1000  # where they begin, a header
    assert bytes_a_target(64, 1 << 16) == 64 * (2 + 2) + 4
    assert bytes_a_target(64, (1 << 16) + 1) == 64 * (2 + 4) + 4


def test_ids_over_65535_are_kept_whole(tmp_path):
    """A head whose likeliest tokens are its last ones."""
    torch.manual_seed(0)
    teacher = DeltaNetForCausalLM(config(["full_attention"], vocab_size=70_000, tie_word_embeddings=False)).eval()
    order = torch.arange(70_000) / 70_000
    teacher.lm_head.weight.data = order[:, None] * torch.ones(16)
    teacher.model.norm.weight.data.zero_()
    teacher.model.norm.weight.data[0] = 1.0
    cache = write(tmp_path, plan(1), teacher, top_k=3, vocab_size=70_000)
    ids = cache[0].top_k[0]
    assert set(ids.flatten().tolist()) <= {0, 1, 2, 69_997, 69_998, 69_999}  # by the sign of the state
    assert ids.max() == 69_999


def test_a_writing_that_was_stopped_goes_on_with_what_is_missing(tmp_path):
    whole = content(write(tmp_path / "whole"))

    def stop(sequences):
        raise Interrupted("signal")

    with pytest.raises(Interrupted):
        write(tmp_path / "cut", advance=stop)
    (first,) = (path for path in (tmp_path / "cut").rglob("*.safetensors"))
    before, done = first.stat().st_mtime_ns, []
    assert content(write(tmp_path / "cut", advance=done.append)) == whole
    assert first.stat().st_mtime_ns == before
    assert done == [TWO_FILES - PORTION]  # the second portion alone was written


def test_what_is_whole_asks_nothing_of_the_teacher(tmp_path, monkeypatch):
    cache = write(tmp_path)
    before = content(cache)
    monkeypatch.setattr(logit_cache, "_portion", None)
    assert content(write(tmp_path)) == before
    assert content(write(tmp_path, plan(TWO_FILES - 3))) == before  # a shorter stage of the same text


def test_a_longer_stage_goes_on_where_the_shorter_one_ended(tmp_path):
    longer = PORTION + 9
    write(tmp_path / "grown")
    assert content(write(tmp_path / "grown", plan(longer))) == content(write(tmp_path / "new", plan(longer)))


def test_micro_batches_change_no_more_than_float32_sums_do(tmp_path):
    ones, eights = (write(tmp_path / str(size), plan(9, size)) for size in (1, 8))
    for at in range(9):
        for mine, its in zip(ones[at].top_k, eights[at].top_k):
            np.testing.assert_allclose(mine.astype(float), its.astype(float), rtol=2**-10, atol=1e-5)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "foreign"])
def test_a_damaged_portion_is_named_and_written_anew(tmp_path, damage):
    cache = write(tmp_path)
    before, victim = content(cache), files(cache)[1]
    if damage == "bit":
        data = bytearray(victim.read_bytes())
        data[-3] ^= 4
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(victim.read_bytes()[:-3])
    elif damage == "empty":
        victim.write_bytes(b"")
    else:
        victim.write_bytes(files(write(tmp_path / "other", made_by="another"))[1].read_bytes())
    said = []
    assert content(write(tmp_path, report=said.append)) == before
    assert len(said) == 1
    assert str(victim) in said[0]
    assert ("of another teacher" if damage == "foreign" else "damaged") in said[0]


@pytest.mark.parametrize(
    "other",
    [{"made_by": "other"}, {"top_k": 5}, {"vocab_size": 60}, {"bfloat16": True}, {"planned": plan(digest="other")}],
)
def test_another_teacher_text_k_vocabulary_or_precision_is_another_cache(tmp_path, other):
    cache = write(tmp_path)
    before = content(cache)
    assert write(tmp_path, **other).folder != cache.folder
    assert content(cache) == before


def test_a_disk_that_refuses_is_one_error_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logit_cache, "save_file", full)
    with pytest.raises(DeltanetError, match=r"00000\.safetensors: cannot be written: No space left"):
        write(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("other", [TWO_FILES, TWO_FILES + 2])
def test_two_runs_write_one_cache_at_once_and_the_longer_one_stays(tmp_path, monkeypatch, other):
    """While the first has a portion written but not yet in its place, a second comes that wants as much, or more."""
    save, threads = logit_cache.save_file, []

    def slow(tensors, path, metadata):
        save(tensors, path, metadata=metadata)
        if not threads:
            threads.append(threading.Thread(target=write, args=(tmp_path, plan(other))))
            threads[0].start()
            threads[0].join(0.5)

    monkeypatch.setattr(logit_cache, "save_file", slow)
    write(tmp_path)
    threads[0].join()
    monkeypatch.undo()
    assert content(write(tmp_path)) == content(write(tmp_path / "alone", plan(other)))


def test_a_shorter_run_leaves_what_a_longer_one_has_written_meanwhile(tmp_path, monkeypatch):
    store = logit_cache._store

    def late(*args):
        monkeypatch.setattr(logit_cache, "_store", store)
        write(tmp_path, plan(TWO_FILES + 2))
        store(*args)

    monkeypatch.setattr(logit_cache, "_store", late)
    write(tmp_path)
    assert content(write(tmp_path)) == content(write(tmp_path / "alone", plan(TWO_FILES + 2)))


DISTIL = [{"kind": "distil", "steps": 4, "lr": 1e-3}, {"kind": "sft", "steps": 2, "losses": [{"name": "forward_kl"}]}]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    return small_run.write_recipe(folder / "r.yaml", small_run.write_teacher(folder / "teacher"), stages=DISTIL)


def losses(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_trains_without_the_teacher_in_memory_and_learns_the_same(small, tmp_path, monkeypatch):
    teachers, alive = [], []
    load, train = run_module.frozen_teacher, run_module.train

    def loading(*arguments, **options):
        teacher = load(*arguments, **options)
        teachers.append(weakref.ref(teacher))
        return teacher

    def training(*arguments):
        gc.collect()
        alive.append(sum(teacher() is not None for teacher in teachers))
        train(*arguments)

    monkeypatch.setattr(run_module, "frozen_teacher", loading)
    monkeypatch.setattr(run_module, "train", training)
    plain = distil(small, output=tmp_path / "plain")
    assert alive == [1, 1]
    kept = distil(small, ["teacher.cache.top_k=1024"], output=tmp_path / "kept")
    assert alive == [1, 1, 0, 0]
    assert losses(tmp_path / "kept") == pytest.approx(losses(tmp_path / "plain"), rel=1e-3)  # float16 on disk
    for mine, its in zip(kept["results"], plain["results"]):
        assert mine["model"] == its["model"]
        assert mine["perplexity"] == pytest.approx(its["perplexity"], rel=1e-3)
        assert mine.get("kl", 0) == pytest.approx(its.get("kl", 0), rel=1e-3)
    few = distil(small, ["teacher.cache.top_k=16"], output=tmp_path / "few")
    assert few["results"][-1]["kl"] < few["results"][1]["kl"]
    assert all(mine < its for mine, its in zip(losses(tmp_path / "few"), losses(tmp_path / "plain")[:1]))


def test_a_run_that_goes_on_reads_the_cache_and_ends_in_the_same_losses(small, tmp_path, monkeypatch):
    shared = f"teacher.cache={{top_k: 16, folder: {tmp_path / 'shared'}}}"
    whole = distil(small, [shared], output=tmp_path / "whole")
    before = losses(tmp_path / "whole")
    monkeypatch.setattr(logit_cache, "_portion", None)  # nothing is left to write, here or in another run
    half = str(tmp_path / "whole" / "commits" / "step-00000004")
    assert distil(small, [shared], output=tmp_path / "whole", resume=half)["results"] == whole["results"]
    distil(small, [shared], output=tmp_path / "again")
    assert losses(tmp_path / "again") == losses(tmp_path / "whole") == before


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages=[{kind: align, steps: 1}]"], r"teacher\.cache: no stage has the loss forward_kl"),
        (["stages.1={kind: align, steps: 1}"], r"stages\.1\.kind: an align stage needs the teacher's layers"),
        (["stages.1={kind: onpolicy, steps: 1}"], r"stages\.1\.kind: an onpolicy stage trains on what the student"),
        (["stages.1.losses=[{name: reverse_kl}]"], "'reverse_kl' needs more of the teacher.*: forward_kl, ce, layer_c"),
        (["stages.1.losses=[{name: jsd}]"], "'jsd' needs more of the teacher"),
        (["stages.1.losses=[{name: hidden_mse}]"], "'hidden_mse' needs more of the teacher"),
        (["stages.1.losses=[{name: forward_kl, temperature: 2.0}]"], "temperature: 2 cannot be had of teacher.cache"),
        (["teacher.cache.top_k=0"], r"teacher\.cache\.top_k: got 0"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused_by_the_recipe(small, overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe(small, ["teacher.cache.top_k=8", *overrides])


def test_more_tokens_than_there_are_is_refused_before_anything_is_kept(small, tmp_path):
    with pytest.raises(UserError, match=r"teacher\.cache\.top_k: 1025 is more than the 1024 tokens"):
        distil(small, ["teacher.cache.top_k=1025"], output=tmp_path / "run")
    assert not (tmp_path / "run" / "logits").exists()
    with pytest.raises(UserError, match=r"1025 is more than the 1024"):
        describe(load_recipe(small, ["teacher.cache.top_k=1025"]), tmp_path / "tokens")


def test_the_plan_says_what_the_cache_takes_and_leaves_the_teacher_out_of_memory(small, tmp_path):
    plain = describe(load_recipe(small), tmp_path / "tokens")
    kept = describe(load_recipe(small, ["teacher.cache.top_k=64"]), tmp_path / "tokens")
    assert "on disk" not in plain
    tokens = (4 + 2) * 4 * 32
    expected = f"64 likeliest tokens, 260 bytes a target; up to {tokens:,} targets, {tokens * 260 / 1e6:.2f} MB"
    assert expected in kept

    def used(text):
        return float(next(line for line in text.splitlines() if line.endswith("<- this recipe")).split()[1])

    assert used(kept) < used(plain)
