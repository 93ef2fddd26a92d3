"""Laws of packing: tokens are conserved, nothing crosses a document, everything depends on its inputs alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.order import hashed, permutation
from distill.packing import IGNORED, assemble, pack_best_fit, pack_wrapped, with_noise, with_repeats

LENGTHS = st.lists(st.integers(0, 40), max_size=30)
BOTH = pytest.mark.parametrize("pack", [pack_wrapped, pack_best_fit])


def spans(packing):
    return sorted(piece for index in range(len(packing)) for piece in packing.pieces(index))


@BOTH
@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_every_token_is_packed_exactly_once(pack, lengths, seq_len):
    packing = pack(np.array(lengths, np.int64), seq_len)
    tokens = [(document, t) for document, start, stop in spans(packing) for t in range(start, stop)]
    assert tokens == [(document, t) for document, length in enumerate(lengths) for t in range(length)]
    for index in range(len(packing)):
        assert 0 < sum(stop - start for _, start, stop in packing.pieces(index)) <= seq_len
    assert packing.num_tokens == sum(lengths)


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17), seed=st.integers(0, 5))
def test_wrapped_fills_every_sequence_but_the_last_in_the_given_order(lengths, seq_len, seed):
    order = permutation(len(lengths), seed)
    packing = pack_wrapped(np.array(lengths, np.int64), seq_len, order)
    sizes = [sum(stop - start for _, start, stop in packing.pieces(index)) for index in range(len(packing))]
    assert all(size == seq_len for size in sizes[:-1])
    documents = packing.document.tolist()
    seen = list(dict.fromkeys(documents))
    assert seen == [document for document in order.tolist() if lengths[document] > 0]


@settings(max_examples=60, deadline=None)
@given(lengths=LENGTHS, seq_len=st.integers(1, 17))
def test_best_fit_cuts_no_document_that_fits_and_leaves_no_two_halves(lengths, seq_len):
    packing = pack_best_fit(np.array(lengths, np.int64), seq_len)
    for document, start, stop in spans(packing):
        if lengths[document] <= seq_len:
            assert (start, stop) == (0, lengths[document])
    sizes = [sum(stop - start for _, start, stop in packing.pieces(index)) for index in range(len(packing))]
    assert sum(size * 2 <= seq_len for size in sizes) <= 1  # two half-empty sequences would have been one


def test_best_fit_wastes_little_on_many_lengths():
    lengths = np.array([1 + int(value) % 700 for value in hashed(3, count=3000)])
    packing = pack_best_fit(lengths, 1024)
    assert lengths.sum() / (len(packing) * 1024) > 0.99


def test_no_target_crosses_a_document_and_positions_restart():
    sequence = assemble([np.array([5, 6, 7]), np.array([8]), np.array([9, 10])], 9, pad_id=7)
    assert sequence.input_ids.tolist() == [5, 6, 7, 8, 9, 10, 7, 7, 7]
    assert sequence.targets.tolist() == [6, 7, IGNORED, IGNORED, 10, IGNORED, IGNORED, IGNORED, IGNORED]
    assert sequence.position_ids.tolist() == [0, 1, 2, 0, 0, 1, 0, 1, 2]
    assert sequence.cu_seqlens.tolist() == [0, 3, 4, 6, 9]
    assert sequence.num_tokens == 6


def test_padding_is_known_by_place_so_a_pad_token_in_the_text_stays_a_target():
    sequence = assemble([np.array([5, 2])], 4, pad_id=2)
    assert sequence.targets.tolist() == [2, IGNORED, IGNORED, IGNORED]


def test_only_supervised_tokens_are_targets():
    marks = [np.array([True, False, True, False]), None]
    sequence = assemble([np.array([5, 6, 7, 8]), np.array([9, 10])], 6, supervised=marks)
    assert sequence.targets.tolist() == [IGNORED, 7, IGNORED, IGNORED, 10, IGNORED]


def test_what_is_to_be_said_may_be_other_than_what_stands_there():
    said = [np.array([1, 2, 3]), np.array([9, 4])]
    sequence = assemble([np.array([5, 6, 7]), np.array([9, 10])], 5, said=said)
    assert sequence.input_ids.tolist() == [5, 6, 7, 9, 10]
    assert sequence.targets.tolist() == [2, 3, IGNORED, 4, IGNORED]


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4), index=st.integers(0, 10**6))
def test_repeats_copy_an_earlier_span_of_the_same_document_only(lengths, index):
    pieces = [np.arange(length) + 1000 * place for place, length in enumerate(lengths)]
    result = with_repeats(pieces, 1.0, 7, index)
    assert [len(piece) for piece in result] == lengths
    changed = [place for place in range(len(pieces)) if not np.array_equal(pieces[place], result[place])]
    assert len(changed) == (max(lengths) >= 64)
    for place in changed:
        where = np.flatnonzero(result[place] != pieces[place])
        target, stop = where[0], where[-1] + 1
        assert 32 <= stop - target <= 447
        source = result[place][target] - 1000 * place
        assert source >= 0
        assert source + (stop - target) <= target
        np.testing.assert_array_equal(result[place][target:stop], pieces[place][source : source + stop - target])
    again = with_repeats(pieces, 1.0, 7, index)
    assert all(np.array_equal(a, b) for a, b in zip(result, again))


def test_repeats_hit_the_share_of_sequences_asked_for():
    piece = [np.arange(400)]
    hits = sum(with_repeats(piece, 0.3, 1, index)[0] is not piece[0] for index in range(4000))
    assert abs(hits / 4000 - 0.3) < 0.03  # four standard deviations of a binomial
    assert with_repeats(piece, 0.0, 1, 5) is piece


def test_noise_replaces_tokens_of_some_sequences_by_others_but_no_first_one():
    others, pieces = np.arange(5000, 5020), [np.arange(1, 400), np.array([7]), np.arange(1000, 1300)]
    hits, replaced, found = 0, 0, set()
    for index in range(2000):
        result = with_noise(pieces, 0.3, others, 1, index)
        hits += result is not pieces
        assert [(len(piece), piece[0]) for piece in result] == [(len(piece), piece[0]) for piece in pieces]
        for piece, before in zip(result, pieces):
            changed = piece[piece != before]
            replaced, found = replaced + len(changed), found.union(changed.tolist())
    assert abs(hits / 2000 - 0.3) < 0.045  # four standard deviations of a binomial
    assert abs(replaced / hits / (398 + 299) - 0.15) < 0.003
    assert found == set(others.tolist())
    assert pieces[0].tolist() == list(range(1, 400))
    again = [with_noise(pieces, 1.0, others, 1, 5) for _ in range(2)]
    assert all(np.array_equal(a, b) for a, b in zip(*again))


def test_permutations_are_permutations_and_pinned():
    assert sorted(permutation(1000, 1, 2).tolist()) == list(range(1000))
    assert permutation(1000, 1, 2).tolist() != permutation(1000, 1, 3).tolist()
    # the order of a run that is resumed years later must not move
    assert permutation(8, 0, 0).tolist() == [5, 4, 1, 0, 2, 7, 6, 3]
    assert permutation(0, 1).tolist() == []
