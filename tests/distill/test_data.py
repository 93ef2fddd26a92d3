"""Laws of the data: tokens are conserved, the order depends on key and sources alone, what is cut is counted."""

import itertools
import json
import threading

import numpy as np
import pytest
from word_tokenizer import CHATML, QWEN3, make_tokenizer

from deltanet_errors import DeltanetError, UserError
from distill.data import Corpus, Part, split, whole
from distill.packing import IGNORED
from distill.schema import Source
from distill.shares import BLOCK, dealt
from distill.token_cache import check_same_tokenizer, tokenise, tokenizer_digest

TOKENIZER = make_tokenizer(QWEN3)
VOCABULARY = 259


def text_source(folder, texts, name="s", tokenizer=TOKENIZER, **options):
    file = folder / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = Source(name=name, path=[str(file)])
    return tokenise(source, tokenizer, folder / "cache", vocab_size=VOCABULARY, **options)


def chat_source(folder, pairs, tokenizer=TOKENIZER, **options):
    """Conversations of one question and one answer, of the given numbers of letters."""
    rows = [[("user", "q" * question), ("assistant", "a" * answer)] for question, answer in pairs]
    file = folder / "chat.jsonl"
    file.write_text(
        "".join(json.dumps({"messages": [{"role": r, "content": c} for r, c in row]}) + "\n" for row in rows)
    )
    source = Source(name="chat", path=[str(file)], kind="chat")
    return tokenise(source, tokenizer, folder / "cache", vocab_size=VOCABULARY, **options)


def stories(count, start=0):
    """Texts of different lengths, each of letters that tell it from the others."""
    return [f"{index:05d}" * (1 + (index * 7) % 11) for index in range(start, start + count)]


def real_tokens(sequence):
    return sequence.input_ids[: sequence.num_tokens]


def test_texts_end_with_eos_and_are_all_targets(tmp_path):
    tokens = text_source(tmp_path, ["ab", "c"])
    assert TOKENIZER.decode(tokens.ids) == "ab<|im_end|>c<|im_end|>"
    assert tokens.bounds.tolist() == [0, 3, 5]
    assert tokens.ids.dtype == np.uint16
    assert (tokens.facts.documents, tokens.facts.tokens, tokens.facts.supervised, tokens.facts.stopped) == (2, 5, 5, 2)
    sequence = Corpus([whole(tokens)], seq_len=5)[0]
    # pad is eos: both stops stay targets
    assert (sequence.targets == TOKENIZER.eos_token_id).sum() == 2


def test_documents_of_one_token_have_nothing_to_say(tmp_path):
    tokens = text_source(tmp_path, [""] * 40 + ["ab"])
    single = Part(tokens, np.arange(8), np.arange(8) + 1)
    with pytest.raises(UserError, match="none of its documents has two tokens, so nothing says what comes next"):
        Corpus([single], seq_len=4)


def test_a_large_vocabulary_is_kept_in_four_bytes(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    source = Source(name="a", path=[str(tmp_path / "a.txt")])
    tokens = tokenise(source, TOKENIZER, tmp_path / "cache", vocab_size=70_000)
    assert tokens.ids.dtype == np.uint32
    assert TOKENIZER.decode(tokens.ids) == "abc<|im_end|>"


def test_the_cache_is_used_again_and_made_anew_when_anything_changes(tmp_path):
    first = text_source(tmp_path, ["ab", "c"])
    (folder,) = (tmp_path / "cache").iterdir()
    made = (folder / "ids.bin").stat().st_mtime_ns
    assert text_source(tmp_path, ["ab", "c"]).digest == first.digest
    assert [folder.name for folder in (tmp_path / "cache").iterdir()] == [first.digest[:32]]
    assert (folder / "ids.bin").stat().st_mtime_ns == made
    assert text_source(tmp_path, ["ab", "d"]).digest != first.digest
    other = make_tokenizer(QWEN3, eos="<|endoftext|>")
    assert text_source(tmp_path, ["ab", "c"], tokenizer=other).digest != first.digest
    assert len([*(tmp_path / "cache").iterdir()]) == 3
    # the name and the chat rule do not change the tokens of a text
    assert text_source(tmp_path, ["ab", "c"], train_on="last").digest == first.digest


def test_a_hub_data_set_is_read_at_a_commit_and_cached_under_it(tmp_path, monkeypatch):
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    commits, asked = {"main": "a" * 40}, []

    def load(name, config, split, revision, streaming):
        asked.append((name, config, split, revision))
        return iter([{"text": f"at {revision[:3]}"}])

    def info(self, name, revision=None):
        return type("Info", (), {"sha": commits[revision or "main"]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub.HfApi, "dataset_info", info)
    source = Source(name="s", dataset="owner/name", split="valid")
    read = lambda source: tokenise(source, TOKENIZER, tmp_path, vocab_size=VOCABULARY)
    assert TOKENIZER.decode(read(source).ids) == "at aaa<|im_end|>"
    assert read(source).digest == read(source.model_copy(update={"revision": "a" * 40})).digest
    commits["main"] = "b" * 40
    assert TOKENIZER.decode(read(source).ids) == "at bbb<|im_end|>"
    assert asked == [("owner/name", None, "valid", letter * 40) for letter in "ab"]
    with pytest.raises(UserError, match="source s: data set owner/name: 'gone'"):
        read(source.model_copy(update={"revision": "gone"}))
    with pytest.raises(UserError, match="is a folder; local files go under `path:`"):
        read(source.model_copy(update={"dataset": str(tmp_path)}))


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    digest = text_source(tmp_path, ["ab"]).digest
    (folder,) = (tmp_path / "cache").iterdir()
    folder.rename(folder.with_name(f"{folder.name}.tmp"))
    (tmp_path / "cache" / f"{folder.name}.tmp" / "ids.bin").write_bytes(b"half")
    assert text_source(tmp_path, ["ab"]).digest == digest
    assert [*(tmp_path / "cache").iterdir()] == [folder]


def test_the_same_bytes_read_as_another_kind_of_file_are_other_tokens(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "aa"}\n{"text": "b"}\n')
    (tmp_path / "a.txt").write_text((tmp_path / "a.jsonl").read_text())
    lines, text = (
        tokenise(Source(name="s", path=[str(tmp_path / name)]), TOKENIZER, tmp_path / "cache", vocab_size=VOCABULARY)
        for name in ("a.jsonl", "a.txt")
    )
    assert (lines.facts.documents, text.facts.documents) == (2, 1)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.txt").symlink_to("/proc/self/mem")  # reading it from its start is an I/O error
    with pytest.raises(UserError, match=r"source s: .*a\.txt: cannot be read: Input/output error"):
        tokenise(Source(name="s", path=[str(tmp_path / "a.txt")]), TOKENIZER, tmp_path / "cache", vocab_size=VOCABULARY)


def test_of_two_at_once_one_makes_the_tokens_and_the_other_waits_for_them(tmp_path):
    def second():
        made.append(text_source(tmp_path, stories(3), advance=lambda tokens: encoded.append(tokens)))

    def first(tokens):
        if not other.is_alive():
            other.start()
            other.join(0.3)  # it would be done by now if it did not wait

    other, made, encoded = threading.Thread(target=second), [], []
    mine = text_source(tmp_path, stories(3), advance=first)
    other.join(30)
    assert not encoded
    assert [*made[0].ids] == [*mine.ids]


@pytest.mark.parametrize("name", ["ids.bin", "bounds.bin", "marks.bin"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cache_is_refused_by_name(tmp_path, name, damage):
    chat_source(tmp_path, [(3, 4)])
    (folder,) = (tmp_path / "cache").iterdir()
    content = (folder / name).read_bytes()
    if damage == "gone":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content[:-1] + (b"" if damage == "cut" else bytes([content[-1] ^ 1])))
    with pytest.raises(UserError, match=rf"{folder.name}: damaged tokens of source chat .*; delete the folder"):
        chat_source(tmp_path, [(3, 4)])


def test_a_failure_while_encoding_leaves_no_cache(tmp_path):
    with pytest.raises(UserError, match="no text in it"):
        text_source(tmp_path, ["", "  "])
    assert [*(tmp_path / "cache").iterdir()] == []
    with pytest.raises(UserError, match="makes the id 2, but the model has 2 tokens"):
        tokenise(Source(name="s", path=[str(tmp_path / "a.txt")]), *cache_of(tmp_path), vocab_size=2)
    assert [*(tmp_path / "cache").iterdir()] == []

    def stop(tokens):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        text_source(tmp_path, ["ab"], advance=stop)
    assert [*(tmp_path / "cache").iterdir()] == []
    (tmp_path / "taken").write_text("")
    with pytest.raises(DeltanetError, match="cannot write the tokens of s"):
        tokenise(Source(name="s", path=[str(tmp_path / "a.txt")]), TOKENIZER, tmp_path / "taken", vocab_size=VOCABULARY)


def cache_of(folder):
    (folder / "a.txt").write_text("<|im_end|>")
    return TOKENIZER, folder / "cache"


def test_another_tokenizer_than_the_teachers_is_refused_by_its_first_difference():
    check_same_tokenizer(TOKENIZER, make_tokenizer(CHATML))
    assert tokenizer_digest(TOKENIZER) != tokenizer_digest(make_tokenizer(CHATML))
    with pytest.raises(UserError, match="'!' is 4 in the student and 3 in the teacher"):
        check_same_tokenizer(TOKENIZER, make_tokenizer(QWEN3, extra=["<new>"]))
    with pytest.raises(UserError, match="eos_token_id is 0 in the student and 2 in the teacher"):
        check_same_tokenizer(TOKENIZER, make_tokenizer(QWEN3, eos="<|endoftext|>"))


@pytest.mark.parametrize("packing", ["wrapped", "best_fit"])
@pytest.mark.parametrize("weights", [None, [3.0, 1.0]])
def test_every_epoch_of_every_source_has_each_token_once(tmp_path, packing, weights):
    parts = [whole(text_source(tmp_path, stories(40), "a")), whole(text_source(tmp_path, stories(9, 700), "b"))]
    corpus = Corpus(parts, seq_len=32, key=(5,), weights=weights, packing=packing)
    seen = {0: {}, 1: {}}
    for index in range(BLOCK if weights else 2 * len(corpus)):
        source, rank = corpus.locate(index)
        seen[source][rank] = real_tokens(corpus[index]).tolist()
    for source, part in enumerate(parts):
        size = corpus.sizes[source]
        assert sorted(seen[source]) == list(range(len(seen[source])))  # no rank twice, none left out
        for epoch in range(2):
            sequences = [seen[source][rank] for rank in range(epoch * size, (epoch + 1) * size)]
            assert sorted(itertools.chain(*sequences)) == sorted(part.tokens.ids.tolist())
        assert [seen[source][rank] for rank in range(size)] != [seen[source][size + rank] for rank in range(size)]
    if weights:
        assert len(seen[0]) == 3 * len(seen[1])


def test_the_order_is_a_pure_function_of_key_and_sources(tmp_path):
    def corpus(**options):
        parts = [whole(text_source(tmp_path, stories(30), "a")), whole(text_source(tmp_path, stories(30, 90), "b"))]
        return Corpus(parts, seq_len=24, **{"key": (1,), "repeats": 0.5, "weights": [1.0, 2.0]} | options)

    straight = corpus()
    ids = [straight[index].input_ids.tolist() for index in range(300)]
    # every process, asking for its own, in any order, from a corpus of its own
    for world in (1, 2, 4, 8):
        ranks = [corpus() for _ in range(world)]
        assert [ranks[index % world][index].input_ids.tolist() for index in range(296)] == ids[:296]
    for stop in (0, 1, 7, 100, 150, 299):
        assert [corpus()[index].input_ids.tolist() for index in range(stop, stop + 3) if index < 300] == ids[
            stop : stop + 3
        ]
    other = corpus(key=(2,))
    assert [other[index].input_ids.tolist() for index in range(300)] != ids
    assert other.digest != straight.digest
    assert corpus().digest == straight.digest


def test_targets_follow_the_inputs_and_never_cross_a_document(tmp_path):
    corpus = Corpus([whole(text_source(tmp_path, stories(20)))], seq_len=32)
    for index in range(len(corpus)):
        sequence = corpus[index]
        where = np.flatnonzero(sequence.targets != IGNORED)
        assert (sequence.targets[where] == sequence.input_ids[where + 1]).all()
        assert not set(where + 1) & set(sequence.cu_seqlens[:-1].tolist())
        assert (where + 1 < sequence.num_tokens).all()


def test_held_out_tokens_are_never_trained_on(tmp_path):
    tokens = text_source(tmp_path, stories(50))
    for share in (0.0, 0.05, 0.5, 0.99):
        train, held = split(tokens, share)
        spans = sorted([*zip(train.start, train.stop), *zip(held.start, held.stop)])
        covered = np.concatenate([np.arange(start, stop) for start, stop in spans])
        assert covered.tolist() == list(range(tokens.facts.tokens))
        assert held.num_tokens == tokens.facts.tokens - int(tokens.facts.tokens * (1 - share))
        assert not len(held.start) or train.stop.max() <= held.start.min()


def test_one_long_text_can_be_split_and_a_chat_is_held_out_whole(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 999)
    tokens = tokenise(
        Source(name="a", path=[str(tmp_path / "a.txt")]), TOKENIZER, tmp_path / "c", vocab_size=VOCABULARY
    )
    train, held = split(tokens, 0.1)
    assert (train.num_tokens, held.num_tokens) == (900, 100)
    chats = chat_source(tmp_path, [(5, 5)] * 10)
    train, held = split(chats, 0.25)
    assert (len(train.start), len(held.start)) == (7, 3)
    with pytest.raises(UserError, match="leaves nothing to train on"):
        split(chat_source(tmp_path, [(5, 5)]), 0.1)


def test_chats_too_long_are_cut_or_dropped_and_counted(tmp_path):
    tokens = chat_source(tmp_path, [(200, 3), (10, 200), (10, 10)])
    frame = tokens.bounds[3] - tokens.bounds[2] - 20
    corpus = Corpus([whole(tokens)], seq_len=64)
    (report,) = corpus.reports
    assert (report.documents, report.dropped_documents, report.cut_answers) == (3, 1, 1)
    assert report.tokens == 3 * frame + 203 + 210 + 20 == report.packed + report.dropped
    assert report.packed == 64 + min(64, 20 + frame)
    assert report.sequences == 2
    assert report.padding == 2 * 64 - report.packed
    assert report.stop_share == 0.5
    targets = sum(int((corpus[index].targets != IGNORED).sum()) for index in range(len(corpus)))
    assert targets == report.supervised
    (strict,) = Corpus([whole(tokens)], seq_len=64, too_long="drop").reports
    assert (strict.dropped_documents, strict.cut_answers, strict.stop_share) == (2, 0, 1.0)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 4.0], [0.1] * 7, [1e-9, 1.0], [3.0, 1e-3, 1e-3, 5e-3]])
def test_a_block_is_dealt_whole_and_each_weight_gets_its_share_to_one_sequence(weights):
    counts = dealt(weights)
    assert sum(counts) == BLOCK
    assert all(abs(count - weight / sum(weights) * BLOCK) < 1 for count, weight in zip(counts, weights))


def test_nothing_to_learn_stops_before_the_first_step(tmp_path):
    tokens = chat_source(tmp_path, [(200, 3)] * 4)
    with pytest.raises(UserError, match=r"source chat: none of its 4 conversations has an answer within 64 tokens"):
        Corpus([whole(tokens)], seq_len=64)
    tokens = text_source(tmp_path, ["short"])
    with pytest.raises(UserError, match=r"source s: 6 tokens in all, fewer than one sequence of 64"):
        Corpus([whole(tokens)], seq_len=64)


def test_every_answer_keeps_its_stop_token_though_padding_is_the_same_id(tmp_path):
    tokens = chat_source(tmp_path, [(4, 5), (6, 9), (1, 2)])
    assert tokens.facts.stopped == 3
    corpus = Corpus([whole(tokens)], seq_len=128)
    stops = sum(int((corpus[index].targets == TOKENIZER.eos_token_id).sum()) for index in range(len(corpus)))
    assert stops == 3
    assert corpus.reports[0].stop_share == 1.0


def test_chats_are_never_repeated_into_but_texts_are(tmp_path):
    chats = whole(chat_source(tmp_path, [(90, 90)] * 3))
    texts = whole(text_source(tmp_path, ["".join(map(chr, range(33, 120))) * 3] * 3))
    plain, repeated = (Corpus([chats, texts], seq_len=262, repeats=share) for share in (0.0, 1.0))
    for index in range(len(plain)):
        is_text = plain.locate(index)[0] == 1
        assert np.array_equal(plain[index].input_ids, repeated[index].input_ids) != is_text


def test_noise_is_in_texts_alone_and_leaves_their_targets_as_they_were(tmp_path):
    chats = whole(chat_source(tmp_path, [(90, 90)] * 3))
    texts, held_out = split(text_source(tmp_path, stories(40)), 0.2)
    options = {"seq_len": 262, "repeats": 0.5}
    plain, noisy = (Corpus([chats, texts], **options, noise=share) for share in (0.0, 1.0))
    assert noisy.digest != plain.digest
    for index in range(len(plain)):
        before, after = plain[index], noisy[index]
        assert np.array_equal(before.input_ids, after.input_ids) == (plain.locate(index)[0] == 0)
        assert np.array_equal(before.targets, after.targets)
        assert np.array_equal(before.position_ids, after.position_ids)
    texts, held_out = split(text_source(tmp_path, ["a" * 400, "b" * 400]), 0.5)
    only_held_out = held_out.tokens.ids[held_out.start[0] + 1]  # b
    noisy = Corpus([texts], seq_len=200, noise=1.0)
    assert not any((noisy[index].input_ids == only_held_out).any() for index in range(4))
