"""Pairs of answers: read in every form they come in, never parted or mixed, and a loss that is ln 2 at the start."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from small_pair import config, pair
from word_tokenizer import make_tokenizer

from convert.loading import student_from_teacher
from deltanet_errors import DeltanetError, UserError
from distill.batch import make_batch
from distill.data import Corpus, chosen, split, whole
from distill.packing import IGNORED, assemble
from distill.preferences import keep_reference, num_pairs, pair_sums, read_pair
from distill.schema import DEFAULTS_OF, Source, Stage
from distill.stages import Dpo
from distill.token_cache import tokenise

SOURCE = Source(name="s", path=["s.jsonl"], kind="preference")
PROMPT = [{"role": "user", "content": "q"}]
GOOD, BAD = {"role": "assistant", "content": "g"}, {"role": "assistant", "content": "b"}
TOKENIZER = make_tokenizer()


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "g"},
         "rejected": {"from": "gpt", "value": "b"}},
        {"messages": PROMPT, "chosen": GOOD, "rejected": BAD},
        {"prompt": "q", "chosen": "g", "rejected": "b"},
        {"prompt": PROMPT, "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "q", "chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD]},
        {"chosen": [*PROMPT, GOOD], "rejected": [*PROMPT, BAD], "score_chosen": 4.0},
    ],
)  # fmt: skip
def test_every_form_gives_the_same_two_conversations(record):
    assert read_pair(record, SOURCE, "s:1") == ([*PROMPT, GOOD], [*PROMPT, BAD])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "q", "chosen": "g"}, "s:1: no rejected among the keys prompt, chosen"),
        ({"chosen": "g", "rejected": "b"}, "s:1 chosen: expected a prompt and then the assistant's answer"),
        ({"chosen": [*PROMPT, GOOD], "rejected": [{"role": "user", "content": "p"}, BAD]}, "answer different prompts"),
        ({"prompt": "q", "chosen": 1, "rejected": "b"}, "s:1 chosen: expected a list of messages"),
        ({"prompt": [*PROMPT, GOOD], "chosen": "g", "rejected": "b"}, "s:1 chosen: the prompt ends with the assistant"),
        ({"chosen": [*PROMPT, BAD, GOOD], "rejected": [*PROMPT, BAD, BAD]}, "chosen: the prompt ends with the assist"),
        ("text", "s:1: expected an object with chosen and rejected, got str"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(record, words):
    with pytest.raises(UserError, match=words):
        read_pair(record, SOURCE, "s:1")


def test_what_stands_beside_a_pair_opens_both_of_its_conversations():
    record = {"prompt": "q", "chosen": "g", "rejected": "b", "system": "s", "history": [["p", "a"]]}
    opening = [{"role": role, "content": text} for role, text in (("system", "s"), ("user", "p"), ("assistant", "a"))]
    assert read_pair(record, SOURCE, "s:1") == ([*opening, *PROMPT, GOOD], [*opening, *PROMPT, BAD])


def tokens_of(folder, lengths):
    """Pairs with answers of these lengths; pair i asks for the letter chr(97 + i) and is answered in it."""
    rows = []
    for index, (good, bad) in enumerate(lengths):
        letter = chr(97 + index)
        rows.append({"prompt": letter, "chosen": letter * good, "rejected": letter.upper() * bad})
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = Source(name="p", path=[str(folder / "p.jsonl")], kind="preference")
    return tokenise(source, TOKENIZER, folder / "cache", vocab_size=259)


def conversations(sequence):
    """The text of every piece with targets, and that of its targets."""
    found = []
    for a, b in zip(sequence.cu_seqlens, sequence.cu_seqlens[1:]):
        targets = sequence.targets[a:b]
        if (targets != IGNORED).any():
            found.append((TOKENIZER.decode(sequence.input_ids[a:b]), TOKENIZER.decode(targets[targets != IGNORED])))
    return found


def test_a_packed_pair_stays_together_chosen_first_and_only_its_answers_are_targets(tmp_path):
    tokens = tokens_of(tmp_path, [(1 + 5 * i % 7, 1 + 3 * i % 11) for i in range(20)])
    corpus = Corpus([whole(tokens)], seq_len=256)
    seen = []
    for index in range(len(corpus)):
        found = conversations(corpus[index])
        assert num_pairs([corpus[index]]) == len(found) / 2
        for (asked, good), (again, bad) in zip(found[::2], found[1::2]):
            letter = good[0]
            assert good == letter * good.index("<") + "<|im_end|>"
            assert bad == letter.upper() * bad.index("<") + "<|im_end|>"
            assert asked.startswith(f"<|im_start|>user\n{letter}<")
            assert again.startswith(f"<|im_start|>user\n{letter}<")
            seen.append(letter)
    assert sorted(seen) == [chr(97 + i) for i in range(20)]
    assert len(corpus) < 20  # several pairs share a sequence


def test_pairs_are_held_out_whole_and_measured_by_their_chosen_answers(tmp_path):
    tokens = tokens_of(tmp_path, [(3, 4)] * 10)
    train, held = split(tokens, 0.25)
    assert (len(train.start), len(held.start)) == (7, 3)
    assert np.array_equal(np.append(train.middle, held.middle), whole(tokens).middle)
    texts = [text for index in range(2) for text, _ in conversations(Corpus([chosen(held)], seq_len=64)[index])]
    assert texts
    assert all("hhh" in text or "iii" in text or "jjj" in text for text in texts)


def test_pairs_too_long_are_dropped_and_counted(tmp_path):
    tokens = tokens_of(tmp_path, [(3, 4), (200, 4), (3, 200)])
    (report,) = Corpus([whole(tokens)], seq_len=128).reports
    assert (report.documents, report.dropped_documents) == (3, 2)
    assert report.tokens == report.packed + report.dropped
    assert report.stop_share == 1.0
    with pytest.raises(UserError, match="source p: none of its 3 pairs fits into 32 tokens"):
        Corpus([whole(tokens)], seq_len=32)


def test_pairs_of_equal_answers_are_dropped_and_counted(tmp_path):
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "b"}]

    def reports(*rows):
        (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = Source(name="p", path=[str(tmp_path / "p.jsonl")], kind="preference")
        return Corpus([whole(tokenise(source, TOKENIZER, tmp_path / "cache", vocab_size=259))], seq_len=64).reports

    (report,) = reports(*rows)
    assert (report.documents, report.dropped_documents) == (2, 1)
    assert report.tokens == report.packed + report.dropped
    with pytest.raises(UserError, match="source p: in none of its 1 pairs do the answers differ"):
        reports(rows[0])


def stage(**loss):
    return Stage.model_validate(
        {
            "kind": "dpo",
            "name": "dpo",
            "steps": 1,
            **DEFAULTS_OF["dpo"],
            "losses": [{"name": "dpo", "beta": 0.5, **loss}],
        }
    )


def pairs_of(seed, count, vocabulary=61):
    """Sequences of one pair each, of answers of random length: tokens below 30 are liked, those above are not."""
    rng, sequences = np.random.default_rng(seed), []
    for _ in range(count):
        prompt = rng.integers(0, vocabulary, 3)
        good, bad = rng.integers(0, 30, rng.integers(2, 6)), rng.integers(30, vocabulary, rng.integers(2, 6))
        pieces = [np.concatenate([prompt, answer]) for answer in (good, bad)]
        sequences.append(assemble(pieces, 20, supervised=[np.arange(len(piece)) >= 3 for piece in pieces]))
    return sequences


def test_a_student_equal_to_its_reference_starts_at_ln_2_without_a_margin():
    teacher, student = pair()
    reference = student_from_teacher(teacher, config())
    loss, parts = Dpo(student, reference, stage(), teacher=teacher)(make_batch(pairs_of(0, 3)), 3)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-7)
    assert parts["margin"] == 0


def test_loss_and_gradient_are_those_of_the_formula_in_float64():
    teacher, student = pair()
    reference = student_from_teacher(teacher, config())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    sequences = pairs_of(0, 3)
    loss, parts = Dpo(student, reference, stage(), teacher=teacher, chunk_tokens=7)(make_batch(sequences), 3)
    loss.backward()
    made = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}

    student, reference = student.double(), reference.double()
    student.zero_grad()

    def answer(model, ids, first):
        """log p of the tokens of `ids` from `first` on, one conversation alone."""
        log_p = model(torch.tensor(ids)[None]).logits[0].log_softmax(-1)
        return sum(log_p[at - 1, ids[at]] for at in range(first, len(ids)))

    total, right = 0.0, 0
    for sequence in sequences:
        good, bad = (
            sequence.input_ids[a:b].tolist() for a, b in zip(sequence.cu_seqlens[:2], sequence.cu_seqlens[1:3])
        )
        margin = answer(student, good, 3) - answer(student, bad, 3)
        with torch.no_grad():
            before = answer(reference, good, 3) - answer(reference, bad, 3)
        margin = 0.5 * (margin - before)
        total = total - torch.log(torch.sigmoid(margin)) / 3
        right += int(margin > 0)
    assert right / 3 == pytest.approx(parts["accuracy"].item())
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)  # float32 against float64
    total.backward()
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(made[name].double(), parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


def test_pairs_do_not_see_each_other():
    teacher, student = pair()
    reference = student_from_teacher(teacher, config())
    with torch.no_grad():
        student.model.layers[0].mlp.down_proj.weight.mul_(1.5)
    module, sequences = Dpo(student, reference, stage(), teacher=teacher), pairs_of(0, 4)
    together = module(make_batch(sequences), 4)[0]
    apart = sum(module(make_batch([one]), 4)[0] for one in sequences)
    assert together.item() == pytest.approx(apart.item(), rel=1e-6)


def test_sums_are_taken_by_place_and_padding_has_none():
    batch = make_batch(pairs_of(1, 2))
    values = (batch.targets != IGNORED).float()
    good, bad = pair_sums(values, batch)
    sizes = [
        int((s.targets[a:b] != IGNORED).sum()) for s in pairs_of(1, 2) for a, b in zip(s.cu_seqlens, s.cu_seqlens[1:])
    ]
    sizes = [size for size in sizes if size]
    assert torch.stack([good, bad], 1).flatten().tolist() == sizes


def test_training_raises_the_margin_on_pairs_that_were_not_trained_on():
    teacher, student = pair()
    reference = student_from_teacher(teacher, config())
    module, unseen = Dpo(student, reference, stage(), teacher=teacher), make_batch(pairs_of(99, 16))
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    margins = []
    for step in range(12):
        if step % 4 == 0:
            margins.append(module(unseen, 16)[1]["margin"].item())
        module(make_batch(pairs_of(step, 8)), 8)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    after = module(unseen, 16)[1]
    assert margins[0] == 0 < margins[1] < margins[2] < after["margin"].item()
    assert after["accuracy"] > 0.5  # better than chance
    assert set(module(unseen, 16, measure=True)[1]) == {"ce", "forward_kl"}


def test_the_reference_is_the_student_at_the_start_and_its_damage_is_found(tmp_path, monkeypatch):
    def full(source, target):
        target.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    start, folder = tmp_path / "start", tmp_path / "references" / "dpo"
    start.mkdir()
    for bytes_of in (b"an earlier try", b"this one"):
        (start / "model.safetensors").write_bytes(bytes_of)
        keep_reference(start, folder, goes_on=False)
        assert (folder / "model.safetensors").read_bytes() == bytes_of
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space left"):
        keep_reference(start, folder, goes_on=False)
    assert [path.name for path in folder.parent.iterdir()] == ["dpo"]
    shutil.rmtree(start)
    keep_reference(start, folder, goes_on=True)
    (folder / "model.safetensors").write_bytes(b"that one")
    with pytest.raises(DeltanetError, match=r"dpo: model\.safetensors: its sha256 is not .*; restore it"):
        keep_reference(start, folder, goes_on=True)
    shutil.rmtree(folder)
    with pytest.raises(DeltanetError, match=r"dpo: gone, so the stage cannot go on"):
        keep_reference(start, folder, goes_on=True)
