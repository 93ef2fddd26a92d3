"""Text for calibration: what is set aside, and what the teacher writes. Twin of convert/text.py."""

import json
from types import SimpleNamespace

import pytest
import torch
from demo_pair import DEMO, demo_teacher, fresh_student
from transformers import AutoTokenizer

from convert import text
from convert.text import (
    calibration_text,
    check_sources,
    document_start,
    enough_tokens,
    nucleus,
    set_aside,
    tokenise,
    write_text,
)
from deltanet import DeltaNetConfig, DeltaNetForCausalLM, UserError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def teacher():
    return demo_teacher()


@pytest.mark.parametrize(
    ("sources", "held_out", "message"),
    [
        (["self", "nix.txt"], None, r"--calibrate nix\.txt: no such file"),
        (["self", "{}.txt"], None, r"--calibrate .*folder\.txt is a folder"),
        (["shards/*.txt"], None, r"^--calibrate shards/\*\.txt: no such file; no patterns here, name the files$"),
        (["self"], "nix.txt", r"--held-out nix\.txt: no such file"),
        (["self"], "self", r"--held-out self: not a text this can read; allowed: \.txt, .*, each also \.gz$"),
        (
            ["slef"],
            None,
            r"--calibrate slef: not a text this can read; .*, each also \.gz, self, none$",
        ),
        (["self"], "", r"--held-out : not a text"),
        (["none"], "nix.txt", r"--held-out nix\.txt: nothing is measured with --calibrate none"),
        (["self", "none"], None, "--calibrate self none: allowed: files and self, or none alone"),
        ([], None, "--calibrate : allowed"),
    ],
)
def test_texts_that_nobody_could_read_are_refused_before_any_is_written(sources, held_out, message, tmp_path):
    (tmp_path / "folder.txt").mkdir()
    sources = [source.format(tmp_path / "folder") for source in sources]
    with pytest.raises(UserError, match=message):
        check_sources(sources, held_out, object())


def test_a_short_file_is_refused_before_the_teacher_writes(tmp_path, teacher, tokenizer, monkeypatch):
    monkeypatch.setattr("convert.text.write_text", None)
    (tmp_path / "a.txt").write_text("Too short.")
    with pytest.raises(UserError, match="at least one window"):
        calibration_text(["self", str(tmp_path / "a.txt")], None, tokenizer, teacher)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.txt").write_text("Once upon a time, there was a fox. " * 200)
    teacher = SimpleNamespace(config=DeltaNetConfig(vocab_size=96, hidden_size=64, max_position_embeddings=64))
    with pytest.raises(UserError, match=r"gives token \d+, but config.json has room for 96"):
        calibration_text([str(tmp_path / "a.txt")], None, tokenizer, teacher)


def test_windows_too_short_to_measure_recall_in_are_refused(tokenizer):
    teacher = SimpleNamespace(config=DeltaNetConfig(max_position_embeddings=17))
    with pytest.raises(UserError, match=r"reaches 17 tokens, and calibration needs windows of 18"):
        calibration_text(["self"], None, tokenizer, teacher)


def test_a_template_that_fails_is_one_error(teacher, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system') }}", raising=False)
    with pytest.raises(UserError, match="the chat template fails: no system"):
        write_text(teacher, tokenizer, 3, 32, 0)


def test_a_teacher_without_finite_logits_cannot_write(tokenizer):
    model = fresh_student(demo_teacher(), "all")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        write_text(model, tokenizer, 1, 4, 0)


def tiny_writer(**settings):
    config = DeltaNetConfig(vocab_size=96, hidden_size=16, num_hidden_layers=1, intermediate_size=16, **settings)
    return DeltaNetForCausalLM(config).eval()


@pytest.mark.parametrize("start", [400, -1, None])
def test_without_a_tokenizer_a_first_token_outside_of_the_vocabulary_is_not_used(start):
    written = write_text(tiny_writer(bos_token_id=start), None, 3, 6, 0)
    assert written.min() >= 0
    assert written.max() < 96


def test_a_template_whose_tokens_the_teacher_does_not_know_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", "zebra {{ messages[0].content }}", raising=False)
    with pytest.raises(UserError, match=r"the source's tokenizer gives token .*, but config.json has room for 96"):
        write_text(tiny_writer(), tokenizer, 3, 32, 0)


def test_what_is_set_aside_and_the_rest_are_the_whole_text_and_do_not_overlap():
    documents = ["a" * 40, "b" * 30, "c" * 30]
    first, last = set_aside(documents, 0.1)
    assert "".join(first) + "".join(last) == "".join(documents)
    assert "".join(last) == "c" * 10


def test_a_chat_is_never_cut():
    chats = [[{"role": "user", "content": "x" * 10}] for _ in range(10)]
    first, last = set_aside(chats, 0.15)
    assert first + last == chats
    assert len(last) == 2


def test_held_out_windows_share_no_text_with_those_that_are_fitted(tmp_path, tokenizer):
    path = tmp_path / "numbers.jsonl"
    path.write_text("".join(json.dumps({"text": f"number {i} " * 40}) + "\n" for i in range(100)))
    text = calibration_text([str(path)], None, tokenizer, None, tokens=2048, held_out_tokens=512, length=128)
    assert len(text.fit) == 16
    assert len(text.held_out) == 4
    seen, kept = (
        {word for row in rows for word in tokenizer.decode(row).split() if word.isdigit() and len(word) == 2}
        for rows in (text.fit, text.held_out)
    )
    assert seen & {str(i) for i in range(91, 100)} == set()
    assert kept <= {str(i) for i in range(89, 100)}


def test_a_held_out_file_replaces_the_last_tenth(tmp_path, tokenizer):
    (tmp_path / "fit.txt").write_text("one day a fox ran home. " * 400)
    (tmp_path / "other.txt").write_text("the bird sang. " * 400)
    text = calibration_text(
        [str(tmp_path / "fit.txt")], str(tmp_path / "other.txt"), tokenizer, None, tokens=512, length=64
    )
    assert "bird" in tokenizer.decode(text.held_out[0])
    assert "fox" not in tokenizer.decode(text.held_out.flatten())
    assert "bird" not in tokenizer.decode(text.fit.flatten())


def test_sources_get_equal_shares(tmp_path, tokenizer):
    for name, words in (("long", "the bird sang. " * 5000), ("short", "a fox ran. " * 500)):
        (tmp_path / f"{name}.txt").write_text(words)
    sources = [str(tmp_path / "long.txt"), str(tmp_path / "short.txt")]
    text = calibration_text(sources, None, tokenizer, None, tokens=1024, length=64)
    assert ["bird" in tokenizer.decode(row) for row in text.fit] == [True] * 8 + [False] * 8


def test_too_little_text_says_how_much_is_needed(tmp_path, tokenizer):
    (tmp_path / "short.txt").write_text("a fox")
    with pytest.raises(UserError, match=r"short\.txt: \d+ tokens of text; at least one window of 64"):
        calibration_text([str(tmp_path / "short.txt")], None, tokenizer, None, length=64)


def test_documents_begin_with_the_end_of_text_mark(tokenizer):
    start = document_start(tokenizer)
    assert tokenizer.convert_ids_to_tokens(start) == "<|endoftext|>"
    rows = tokenise(tokenizer, ["a fox ran home"] * 40, 2, 32, "rows")
    assert rows[0, 0] == start
    assert (rows == start).sum() > 5


def test_the_teacher_writes_the_same_text_for_the_same_seed(teacher, tokenizer):
    first, again, other = (write_text(teacher, tokenizer, 4, 24, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (4, 24)
    assert first[0, 0] == first[1, 0] == document_start(tokenizer)


def test_what_the_teacher_writes_is_likely_to_the_teacher(teacher, tokenizer):
    """Sampled tokens must follow the teacher's own chances: their mean loss is near the mean entropy."""
    rows = write_text(teacher, tokenizer, 8, 64, seed=3)
    with torch.no_grad():
        logs = torch.log_softmax(teacher(rows).logits[:, 2:-1], -1)
    loss = -logs.gather(-1, rows[:, 3:, None]).mean()
    entropy = -(logs.exp() * logs).sum(-1).mean()
    assert abs(loss - entropy) < 0.25  # 488 tokens, each with a spread of about 1.5 nats


def test_keys_and_values_stay_where_they_are_while_the_teacher_writes(teacher, tokenizer, monkeypatch):
    """Concatenated anew at every token they leave a card's memory in pieces; what is written is the same."""
    places = set()
    put = text.ReservedLayer._put

    def noted(layer, *args):
        put(layer, *args)
        places.add((layer.keys.data_ptr(), layer.values.data_ptr()))

    monkeypatch.setattr(text.ReservedLayer, "_put", noted)
    rows = write_text(teacher, tokenizer, 4, 24, seed=0)
    assert len(places) == teacher.config.num_hidden_layers
    monkeypatch.setattr(text, "_reserved", lambda cache, length: cache)
    assert torch.equal(rows, write_text(teacher, tokenizer, 4, 24, seed=0))


def test_progress_counts_every_written_token(teacher, tokenizer):
    told = []
    write_text(teacher, tokenizer, 3, 10, seed=0, advance=told.append)
    assert sum(told) == 3 * 9  # the first token of a row is given


def test_the_teachers_own_text_is_set_aside_by_whole_rows(teacher, tokenizer):
    text = calibration_text(["self"], None, tokenizer, teacher, tokens=128, held_out_tokens=64, length=32)
    assert text.fit.shape == (4, 32)
    assert text.held_out.shape == (2, 32)
    assert not any(torch.equal(a, b) for a in text.fit for b in text.held_out)


@pytest.mark.parametrize(("hidden", "tokens"), [(64, 4096), (192, 4608), (512, 32768), (4096, 32768)])
def test_a_larger_model_gets_more_text_up_to_a_limit(hidden, tokens):
    assert enough_tokens(DeltaNetConfig(hidden_size=hidden)) == tokens


@pytest.mark.parametrize(("source", "message"), [("self", "needs a teacher"), ("story.txt", "no tokenizer")])
def test_what_is_missing_is_named(source, message):
    with pytest.raises(UserError, match=message):
        calibration_text([source], None, None, None)


def test_the_nucleus_is_the_fewest_likeliest_tokens_that_make_up_the_share():
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    assert torch.allclose(nucleus(chances, 0.7)[0], torch.tensor([0, 2 / 3, 0, 1 / 3], dtype=torch.float64))
    assert torch.allclose(nucleus(chances, 0.76)[0], torch.tensor([0, 5 / 9, 1.5 / 9, 2.5 / 9], dtype=torch.float64))
    assert nucleus(chances, 0.7)[1].tolist() == [1, 0, 0, 0]
    assert nucleus(chances, 1.0) is chances


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.95, 1 - 1e-6])
@pytest.mark.parametrize("few", [1, 7, 64, 1000])
def test_a_nucleus_among_few_tokens_is_that_among_all(few, top_p):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 300, generator=generator, dtype=torch.float64) * torch.logspace(-1, 1.2, 24)[:, None]
    chances = logits.softmax(-1)  # from nearly even to nearly certain
    falling, ids = chances.sort(-1, descending=True)
    kept = torch.where(falling.cumsum(-1) - falling < top_p, falling, 0)
    wanted = torch.zeros_like(chances).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))
    found = nucleus(chances, top_p, few)
    assert torch.equal(found > 0, wanted > 0)
    assert torch.allclose(found, wanted, rtol=1e-12, atol=0)  # sums in another order


def test_of_tokens_that_are_equally_likely_a_nucleus_has_no_more_than_it_needs():
    for few in (2, 8):
        found = nucleus(torch.full((1, 8), 0.125), 0.6, few)
        assert found.sort().values.tolist() == [[0, 0, 0, *[pytest.approx(0.2)] * 5]]


def test_a_small_nucleus_writes_what_is_likeliest(teacher, tokenizer):
    rows = write_text(teacher, tokenizer, 3, 24, 0, top_p=1e-6)
    with torch.no_grad():
        likeliest = teacher(rows).logits.argmax(-1)
    assert torch.equal(rows[:, 3:], likeliest[:, 2:-1])
    assert not torch.equal(rows, write_text(teacher, tokenizer, 3, 24, 0))
