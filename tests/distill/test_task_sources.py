"""Generated tasks as sources: what is a target, what is measured at the end, and what cannot be trained on."""

import json

import numpy as np
import pytest

from deltanet_errors import UserError
from distill.data import Corpus, whole
from distill.evaluation.selection import Chosen
from distill.evaluation.sets import read_set
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.words import word_tokenizer
from distill.packing import IGNORED
from distill.recipe import parse_recipe
from distill.run import distil
from distill.schema import Source
from distill.task_sources import check_tasks, trained_tasks
from distill.token_cache import tokenise

TEXT = """version: 1
student:
  new:
    vocabulary: 64
    hybrid: none
data:
  sources:
    - task: mqar
      options: {length: 32, pairs: 4}
      documents: 50
  seq_len: 80
stages:
  - kind: pretrain
    steps: 2
"""
TOKENIZER = word_tokenizer(64)


def parse(old="", new=""):
    assert old in TEXT
    return parse_recipe(TEXT.replace(old, new) if old else TEXT, "r.yaml")


def tokens(tmp_path, source):
    return tokenise(source, TOKENIZER, tmp_path / "tokens", vocab_size=64, stop_ids={0}, train_on="assistant")


def test_only_answers_are_targets_and_examples_are_not_cut(tmp_path):
    (source,) = parse().data.sources
    corpus = Corpus([whole(tokens(tmp_path, source))], seq_len=80)
    made = {example.ids: example for example in TASKS["mqar"].examples(0, 50, source.options, TOKENIZER, split="train")}
    assert len(corpus) == 25  # two of 32 tokens in 80, the rest is padding
    seen = []
    for index in range(len(corpus)):
        sequence = corpus[index]
        for start in (0, 32):
            ids = tuple(sequence.input_ids[start : start + 32].tolist())
            expected = np.full(32, IGNORED)
            for at in made[ids].positions:
                expected[at - 1] = made[ids].target(at)
                assert ids[at] != expected[at - 1]  # what is asked for does not stand in the text
            assert (sequence.targets[start : start + 32] == expected).all()
            seen.append(ids)
        assert (sequence.targets[64:] == IGNORED).all()
    assert sorted(seen) == sorted(made)


def test_other_seeds_give_other_examples_and_training_none_of_the_test(tmp_path):
    (source,) = parse().data.sources
    other = source.model_copy(update={"seed": 1})
    first, second = tokens(tmp_path, source), tokens(tmp_path, other)
    assert first.digest != second.digest
    assert not np.array_equal(first.ids, second.ids)
    test = {example.ids for example in trained_tasks([source])[0].task.examples(0, 50, "as trained", TOKENIZER)}
    trained = {tuple(first.ids[a:b].tolist()) for a, b in zip(first.bounds, first.bounds[1:])}
    assert len(test) == len(trained) == 50
    assert not test & trained


def test_the_task_is_measured_at_the_very_options_it_is_trained_on():
    (source,) = parse().data.sources
    text = Source(path="a.txt", name="a")
    (chosen,) = trained_tasks([text, source])
    assert chosen.name == chosen.task.name == "trained on mqar"
    assert chosen.is_generated
    assert chosen.task.levels == {"as trained": {"length": 32, "pairs": 4, "power": 0.01}}
    assert TASKS["mqar"].name == "mqar"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("      documents: 50\n", "", "data.sources.0.documents: say how many examples of the task"),
        ("task: mqar", "task: mqr", "data.sources.0.task: 'mqr' is no task (did you mean 'mqar'?); tasks: repeat, "),
        ("length: 32", "lenght: 32", "data.sources.0.options: task mqar: no option 'lenght' (did you mean 'length'?)"),
        ("length: 32", "length: long", "task mqar: length is 'long'; such as 64 is allowed"),
        ("documents: 50", "documents: 50\n      kind: chat", "data.sources.0.kind: a task is no chat"),
        ("documents: 50", "documents: 50\n      path: a.txt", "data.sources.0: say `path:` (local files), "),
        ("task: mqar", "path: a.txt", "data.sources.0.options: `options:` belongs to `task:`"),
        ("kind: pretrain", "kind: align", "stages.0.kind: a stage of kind align needs a `teacher:`"),
        ("kind: pretrain", "kind: distil", "stages.0.losses.0.name: 'forward_kl' needs a `teacher:`; without one "),
        ("kind: pretrain", "kind: dpo", "no source for a dpo stage"),
        ("version: 1", "version: 1\nteacher: {model: demo}", "student.new: a student from nothing has no teacher"),
    ],
)
def test_a_mistake_is_one_line_with_its_place(old, new, message):
    with pytest.raises(UserError) as caught:
        parse(old, new)
    assert message in str(caught.value)
    assert str(caught.value).startswith("r.yaml:")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["data.seq_len=31"],
            "source mqar: examples of up to 32 tokens do not fit into 31, and cut short they ask for",
        ),
        (["data.sources.0.options.pairs=9"], "task mqar: 9 pairs do not fit into 32 tokens"),
        (["student.new.vocabulary=20"], "task mqar: needs 9 words of one token, the tokenizer has 3"),
        (["student.new.max_context=16"], "task trained on mqar: its level 'as trained' takes 32 tokens; at most 16"),
        (
            ["student.new.vocabulary=30", "evaluation.tasks=[copying, repeat]"],
            "task repeat: needs 32 words of one token",
        ),
    ],
)
def test_what_cannot_be_trained_or_measured_is_refused_before_the_first_step(tmp_path, changes, message):
    path = tmp_path / "r.yaml"
    path.write_text(TEXT)
    with pytest.raises(UserError) as caught:
        distil(path, changes, output=tmp_path / "run")
    assert message in str(caught.value)
    assert not (tmp_path / "run" / "commits").exists()


def test_long_examples_are_dropped_where_the_recipe_says_so(tmp_path):
    source = Source(task="listops", name="listops", kind="task", documents=60, options={"shortest": 4, "longest": 30})
    part = whole(tokens(tmp_path, source))
    lengths = part.stop - part.start
    short = int((lengths <= 16).sum())
    assert 0 < short < 60
    corpus = Corpus([part], seq_len=16, too_long="drop")
    assert corpus.reports[0].dropped_documents == 60 - short


def test_a_task_of_rows_is_tokenised_anew_when_its_file_changes(tmp_path):
    rows = [{"text": f"{i:02}", "label": i % 2} for i in range(20)]
    file, words = tmp_path / "rows.jsonl", word_tokenizer(300)
    source = Source(task="lra_text", name="rows", kind="task", documents=100, options={"file": str(file)})
    made = []
    for label in (0, 1):
        rows[0]["label"] = label
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(tokenise(source, words, tmp_path / "tokens", vocab_size=300))
    first, second = made
    assert first.digest != second.digest
    assert first.facts.documents == second.facts.documents == 18  # the last tenth is for testing
    # a row is two bytes, a marker and its class, which alone is a target; one class has changed
    assert first.marks.reshape(18, 4).tolist() == [[0, 0, 0, 1]] * 18
    assert (first.ids != second.ids).sum() == (first.targets != second.targets).sum() == 1
    with pytest.raises(UserError, match="task lra_text: say its `file`, a jsonl file of"):
        tokenise(source.model_copy(update={"options": {}}), words, tmp_path / "tokens", vocab_size=300)


def test_only_generated_tasks_that_were_named_are_checked():
    task = TASKS["repeat"]
    check_tasks([Chosen("repeat", task, True, is_named=False)], TOKENIZER, 64, 9)
    check_tasks([Chosen("repeat", task, True)], TOKENIZER, 64, 96)
    with pytest.raises(UserError, match=r"task repeat: its level '64 back' takes 96 tokens; at most 95"):
        check_tasks([Chosen("repeat", task, True)], TOKENIZER, 64, 95)


def test_a_row_of_a_set_that_is_too_long_is_found_before_the_run(tmp_path):
    rows = [{"goal": "w0", "sol1": "w1", "sol2": answer, "label": 0} for answer in ("w2", "w2 " * 10)]
    path = tmp_path / "piqa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    chosen = [Chosen("piqa", read_set(path), False)]
    check_tasks(chosen, TOKENIZER, 64, 9, limit=1)
    with pytest.raises(UserError, match=r"piqa, row 2: continuation .* longer than the model's range, 9"):
        check_tasks(chosen, TOKENIZER, 64, 9)
