"""What the student writes: a pure function of weights and position, ended by place, and scored only where it wrote."""

import contextlib
import json

import numpy as np
import pytest
import small_run
import torch
from safetensors.torch import load_file
from small_pair import VOCABULARY, pair
from test_data import chat_source, text_source
from word_tokenizer import make_tokenizer

from deltanet_errors import UserError
from distill.batch import make_batch, num_targets
from distill.data import whole
from distill.onpolicy import Completions, prompt_corpus, write_after
from distill.packing import IGNORED
from distill.run import distil
from distill.schema import DEFAULTS_OF, Stage
from distill.stages import Whole

PROMPTS = [np.array([3, 1, 4]), np.array([1]), np.array([5, 9, 2, 6, 5])]
CHANCES = torch.rand(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def stage(**options):
    fields = {"kind": "onpolicy", "name": "onpolicy", "steps": 1, "completion_tokens": 6, "prompt_tokens": 4}
    return Stage.model_validate(fields | DEFAULTS_OF["onpolicy"] | options)


def test_each_token_is_where_the_distribution_passes_its_number():
    _, student = pair()
    written = write_after(student, PROMPTS, CHANCES, (), VOCABULARY)
    for prompt, chances, row in zip(PROMPTS, CHANCES, written):
        assert len(row) == 6
        for at, token in enumerate(row):  # the prompt alone, without padding, cache or neighbours
            ids = torch.from_numpy(np.concatenate([prompt, row[:at]]))[None]
            rising = student(ids).logits[0, -1].double().softmax(-1).cumsum(-1)
            below = rising[token - 1] if token else 0.0
            # float32 logits, computed with a cache or without
            assert below - 1e-5 <= chances[at] * rising[-1] < rising[token] + 1e-5


def test_a_completion_ends_with_its_first_stop_token_whatever_the_others_do():
    _, student = pair()
    free = write_after(student, PROMPTS, CHANCES, (), VOCABULARY)
    stop = int(free[0][2])
    ended = write_after(student, PROMPTS, CHANCES, [stop], VOCABULARY)
    for long, short in zip(free, ended):
        places = np.flatnonzero(long == stop)
        expected = long[: places[0] + 1] if len(places) else long
        assert short.tolist() == expected.tolist()
    assert ended[0][-1] == stop


@pytest.mark.parametrize("which", [0, 1], ids=["teacher", "student"])
def test_rows_that_are_dropped_from_the_batch_leave_the_others_as_they_are(which):
    model = pair()[which]
    prompts = [np.array([3 + row, 1, 4][: 1 + row % 3]) for row in range(12)]
    chances = torch.rand(12, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    free = write_after(model, prompts, chances, (), VOCABULARY)
    stops = sorted({int(row[place]) for place, row in enumerate(free)})
    sizes = []
    model.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    ended = write_after(model, prompts, chances, stops, VOCABULARY)
    for long, short in zip(free, ended):
        first = next((place for place, token in enumerate(long) if token in stops), len(long))
        assert short.tolist() == long[: first + 1].tolist()
    assert which == 1 or sizes[-1] <= 6 < sizes[0] == 12


def test_a_small_nucleus_writes_what_is_likeliest():
    _, student = pair()
    written = write_after(student, PROMPTS, CHANCES, (), VOCABULARY, top_p=1e-6)
    for prompt, row in zip(PROMPTS, written):
        ids = torch.from_numpy(np.concatenate([prompt, row]))[None]
        assert student(ids).logits[0, len(prompt) - 1 : -1].argmax(-1).tolist() == row.tolist()


def test_no_token_beyond_the_tokenizers_is_written():
    _, student = pair()
    highest = torch.full((3, 6), 1 - 1e-16, dtype=torch.float64)
    assert max(map(max, write_after(student, PROMPTS, highest, (), 40))) == 39


def completions(student, corpus, **options):
    keys = {"key": (0, 1), "stop_ids": [0], "vocab_size": VOCABULARY, "micro_batch_size": 4}
    return Completions(student, corpus, stage(), compute=contextlib.nullcontext, **(keys | options))


def texts(folder):
    # Of the tokenizer's first ids only, since the tiny models know no more.
    source = text_source(folder, ["".join(chr(33 + (7 * i + j) % 55) for j in range(3 + i % 5)) for i in range(24)])
    return whole(source)


def test_the_same_weights_write_the_same_at_a_position_and_others_write_otherwise(tmp_path):
    _, student = pair()
    corpus = prompt_corpus([texts(tmp_path)], stage(), 16, key=(0,), weights=None)
    first = completions(student, corpus)
    rows = [first(position).input_ids.tolist() for position in range(12)]
    later = completions(student, corpus)  # as after a resume: it begins at a later micro-batch
    assert [later(position).input_ids.tolist() for position in range(8, 12)] == rows[8:]
    other = completions(student, corpus, key=(1, 1))
    assert [other(position).input_ids.tolist() for position in range(12)] != rows
    assert student.training is False


def test_only_what_was_written_is_scored_and_a_stop_token_is_part_of_it(tmp_path):
    _, student = pair()
    corpus = prompt_corpus([texts(tmp_path)], stage(), 16, key=(0,), weights=None)
    free = completions(student, corpus, stop_ids=())
    stop = int(free(0).input_ids[-2])
    write = completions(student, corpus, stop_ids=[stop])
    for position in range(12):
        sequence, prompt = write(position), corpus[position]
        size = prompt.num_tokens
        assert np.array_equal(sequence.input_ids[:size], prompt.input_ids[:size])
        wanted = sequence.input_ids[size:]
        assert sequence.targets[size - 1 : -1].tolist() == wanted.tolist()
        assert (sequence.targets != IGNORED).sum() == len(wanted) <= 6
        assert stop not in wanted[:-1]
        assert wanted[-1] == stop or len(wanted) == 6
        assert sequence.num_tokens == len(sequence.input_ids)


def test_the_prompt_of_a_chat_ends_where_the_assistant_begins(tmp_path):
    tokenizer = make_tokenizer()
    tokens = chat_source(tmp_path, [(2, 3), (30, 3), (5, 1)], tokenizer=tokenizer)
    corpus = prompt_corpus([whole(tokens)], stage(), 30 + 6, key=(0,), weights=None)
    texts = {tokenizer.decode(corpus[i].input_ids[: corpus[i].num_tokens]) for i in range(2)}
    prompt = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
    assert texts == {prompt.format("qq"), prompt.format("q" * 5)}
    (report,) = corpus.reports
    assert (report.documents, report.dropped_documents) == (3, 1)
    assert report.tokens == report.packed + report.dropped
    with pytest.raises(UserError, match="none of its 3 documents has a prompt of 1 to 4 tokens"):
        prompt_corpus([whole(tokens)], stage(), 10, key=(0,), weights=None)


@pytest.mark.parametrize("loss", ["reverse_kl", "forward_kl"])
def test_training_on_its_own_text_brings_the_student_closer_to_the_teacher(tmp_path, loss):
    teacher, student = pair()
    module = Whole(student, teacher, stage(losses=[{"name": loss}]))
    corpus = prompt_corpus([texts(tmp_path)], stage(), 16, key=(0,), weights=None)
    write = completions(student, corpus, micro_batch_size=8)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3)
    values = []
    for step in range(16):
        sequences = [write(position) for position in range(8 * step, 8 * step + 8)]
        value, _ = module(make_batch(sequences), num_targets(sequences))
        values.append(value.item())
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(values[-4:]) < 0.7 * sum(values[:4])


def test_an_onpolicy_stage_runs_and_resumes_to_the_same_weights(tmp_path):
    stages = [{"kind": "onpolicy", "steps": 4, "lr": 1e-3, "completion_tokens": 8, "prompt_tokens": 5}]
    teacher = small_run.write_teacher(tmp_path / "teacher")
    recipe = small_run.write_recipe(tmp_path / "r.yaml", teacher, stages=stages)
    options = ["training.micro_batch_size=2", 'data.sources.0.separator="\\n"']
    distil(recipe, options, output=tmp_path / "run")
    log, weights = tmp_path / "run" / "metrics.jsonl", tmp_path / "run" / "export" / "model.safetensors"
    parts = ("loss", "reverse_kl", "tokens", "gradient_norm")
    seen = lambda: [{key: json.loads(line)[key] for key in parts} for line in log.read_text().splitlines()]
    before, first = load_file(weights), seen()
    distil(recipe, options, output=tmp_path / "run", resume=str(tmp_path / "run" / "commits" / "step-00000002"))
    after = load_file(weights)
    assert seen() == first
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(UserError, match=r"stages\.0\.kind: an onpolicy stage runs under deepspeed\.stage 0, 1 or 2"):
        distil(recipe, [*options, "deepspeed.stage=3"], output=tmp_path / "other")
