"""Every generated task, from its name: examples from a seed, and scores of models whose score is known."""

import pytest
from task_models import SIZE, TOKENIZER, constant, oracle, subject
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from word_tokenizer import make_tokenizer

from deltanet_errors import UserError
from distill.evaluation.tasks import TASKS
from distill.evaluation.tasks.answers import answers
from distill.evaluation.tasks.example import COMMONEST, commonest
from recipes import __path__ as recipes

GENERATED = {name: task for name, task in TASKS.items() if task.levels}
EVERY = pytest.mark.parametrize("task", GENERATED.values(), ids=GENERATED)
CONTEXT = 512


def rows(task, seed, split="test", level=None, n=20):
    level = level or list(task.levels)[-1]
    return [example.ids for example in task.examples(seed, n, level, TOKENIZER, split=split)]


@EVERY
def test_the_same_seed_gives_the_same_examples_and_more_of_them_begin_alike(task):
    assert rows(task, 3) == rows(task, 3)
    assert rows(task, 3)[:5] == rows(task, 3, n=5)


@EVERY
def test_seeds_and_splits_share_no_example(task):
    # of the hardest level, which has so many examples that two drawn apart never agree
    drawn = [rows(task, 0), rows(task, 1), rows(task, 0, "train"), rows(task, 1, "train")]
    everything = [row for part in drawn for row in part]
    assert len(set(everything)) == len(everything) == 80


@EVERY
def test_every_answer_stands_inside_its_example_behind_something(task):
    for level in task.levels:
        for example in task.examples(0, 3, level, TOKENIZER):
            assert example.answers
            assert all(0 < start < stop <= len(example.ids) for start, stop in example.answers)
            targets = {example.target(at) for at in example.positions}
            assert all(example.target(at) in example.right(at) for at in example.positions)
            assert max(*targets, *example.ids) < SIZE
            assert not example.choices or targets <= set(example.choices)


@EVERY
def test_a_perfect_oracle_scores_everything(task):
    result = task.run(oracle(task), seed=0, n=20, max_context=CONTEXT)
    assert (result.accuracy, result.stderr) == (1.0, 0.0)
    assert all(level["accuracy"] == 1.0 for level in result.by_level.values())
    assert result.n == sum(level["n"] for level in result.by_level.values()) >= 20
    assert all(sample["said"] == sample["answer"] for sample in result.samples)


@EVERY
def test_a_constant_model_scores_the_floor(task):
    level = next(iter(task.levels))
    examples = list(task.examples(0, 40, level, TOKENIZER))
    token, share = commonest(examples)
    only = type(task)(task.name, task.describe, {level: task.levels[level]}, task.make)
    result = only.run(constant(token), seed=0, n=40, max_context=CONTEXT)
    assert result.accuracy == pytest.approx(share, abs=1e-12)  # sums of the same fractions in another order
    assert result.floors[COMMONEST] == pytest.approx(share, abs=1e-12)
    assert share < 1


@EVERY
def test_what_a_token_by_token_loop_says_is_what_batches_say(task):
    config = LlamaConfig(
        vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=1.0,
    )  # fmt: skip
    model = subject(LlamaForCausalLM(config).eval())
    levels = list(task.levels)[:2]
    examples = [example for level in levels for example in task.examples(0, 2, level, TOKENIZER)]
    for example, said in zip(examples, answers(model, examples)):
        assert set(said) == set(example.positions)
        for at in (example.positions[0], example.positions[-1]):
            logits = model.model(
                input_ids=TOKENIZER.pad({"input_ids": [example.ids[:at]]}, return_tensors="pt").input_ids
            )
            last = logits.logits[0, -1]
            allowed = list(example.choices) or list(range(SIZE))
            assert said[at] == max(allowed, key=lambda token: last[token].item())


def test_a_pretrained_vocabulary_will_do():
    demo = AutoTokenizer.from_pretrained(f"{next(iter(recipes))}/demo")
    for name in ("repeat", "needle", "mqar", "listops", "regbench", "passkey"):
        result = TASKS[name].run(oracle(TASKS[name], 6, demo), seed=0, n=6, max_context=CONTEXT)
        assert result.accuracy == 1.0


def test_levels_that_do_not_fit_are_left_out_and_none_is_an_error():
    model = oracle(TASKS["repeat"])
    result = TASKS["repeat"].run(model, seed=0, n=8, max_context=200)
    assert list(result.by_level) == ["64 back", "128 back"]
    with pytest.raises(UserError, match=r"task repeat: its level .64 back. takes 96 tokens; at most 50"):
        TASKS["repeat"].run(model, seed=0, n=8, max_context=50)
    bytes_only = make_tokenizer()
    with pytest.raises(UserError, match=r"task mad.recall: needs 16 words of one token, the tokenizer has 0"):
        TASKS["mad_recall"].run(oracle(TASKS["mad_recall"], 1, bytes_only), seed=0, n=8, max_context=CONTEXT)


@pytest.mark.parametrize(
    ("level", "message"),
    [
        ("hard", "task mqar: no level 'hard'; levels: 64 tokens, 4 pairs"),
        ({"lenght": 64}, r"no option 'lenght' \(did you mean 'length'\?\); options: length, pairs, power"),
        ({"length": "64"}, "length is '64'; such as 64 is allowed"),
        ({"length": True}, "length is True"),
        ({"length": 64, "pairs": 17}, "17 pairs do not fit into 64 tokens; allowed is up to a quarter"),
    ],
)
def test_a_wrong_level_or_option_is_one_line(level, message):
    with pytest.raises(UserError, match=message):
        list(TASKS["mqar"].examples(0, 1, level, TOKENIZER))
