"""Documents into sequences of one length, as pure functions of their lengths; and one sequence as tensors.

`wrapped` lays documents end to end and cuts every seq_len tokens: nothing is lost, but documents are cut. `best_fit`
keeps a document of at most seq_len tokens whole and fills the rest with padding. In all, a piece never sees another:
positions restart, `cu_seqlens` separates them, and no target crosses. Twin: tests/distill/test_packing.py.
"""

import bisect
from dataclasses import dataclass

import numpy as np

from .order import below, fraction, hashed

IGNORED = -100
# Tokens of a copied span. With these in 30 % of sequences a SmolLM2-135M hybrid recalled 59 % instead of 38 % of a
# passage 256 tokens back, at 1.19x instead of 1.17x its teacher's perplexity (1 M tokens, one H100, November 2026).
SHORTEST_REPEAT, LONGEST_REPEAT = 32, 447
NOISE = 0.15
"""Of the tokens of a sequence with noise, the share that is replaced.
What it does: docs/results/students-states-alone.md."""


@dataclass(frozen=True)
class Packing:
    """Sequence i is the pieces first[i] to first[i + 1]; a piece is tokens start to stop of a document. All int64."""

    seq_len: int
    document: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    first: np.ndarray

    def __len__(self) -> int:
        return len(self.first) - 1

    @property
    def num_tokens(self) -> int:
        return int((self.stop - self.start).sum())

    def pieces(self, index: int) -> list[tuple[int, int, int]]:
        """(document, start, stop) of sequence `index`."""
        part = slice(self.first[index], self.first[index + 1])
        return list(zip(self.document[part].tolist(), self.start[part].tolist(), self.stop[part].tolist()))


def pack_wrapped(lengths: np.ndarray, seq_len: int, order: np.ndarray | None = None) -> Packing:
    """Documents end to end in the given order (default: theirs), cut every seq_len; the last sequence may be short."""
    lengths = np.asarray(lengths, np.int64)
    order = np.arange(len(lengths)) if order is None else order
    ends = np.cumsum(lengths[order])
    total = int(ends[-1]) if len(ends) else 0
    cuts = np.union1d(ends[lengths[order] > 0], np.arange(seq_len, total, seq_len))
    begins = np.concatenate([[0], cuts[:-1]]).astype(np.int64) if len(cuts) else cuts.astype(np.int64)
    where = np.searchsorted(ends, begins, side="right")
    offset = begins - (ends[where] - lengths[order[where]])
    first = np.searchsorted(begins, np.arange(0, total, seq_len))
    return Packing(seq_len, order[where], offset, offset + cuts - begins, np.append(first, len(begins)))


def pack_best_fit(lengths: np.ndarray, seq_len: int) -> Packing:
    """Best-fit decreasing: each piece goes where the least room is left. Documents over seq_len are cut into pieces."""
    lengths = np.asarray(lengths, np.int64)
    count = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), count)
    part = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    start = part * seq_len
    stop = np.minimum(start + seq_len, lengths[document])
    bins: list[list[int]] = []
    by_room: dict[int, list[int]] = {}  # room left -> bins that have it
    rooms: list[int] = []  # the keys of by_room, sorted
    for piece in np.argsort(-(stop - start), kind="stable").tolist():
        size = int(stop[piece] - start[piece])
        place = bisect.bisect_left(rooms, size)
        if place == len(rooms):
            room, target = seq_len, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            target = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[place]
        bins[target].append(piece)
        left = room - size
        if left > 0:
            if left not in by_room:
                by_room[left] = []
                bisect.insort(rooms, left)
            by_room[left].append(target)
    order = np.array([piece for pieces in bins for piece in pieces], np.int64)
    first = np.cumsum([0, *map(len, bins)]).astype(np.int64)
    return Packing(seq_len, document[order], start[order], stop[order], first)


def pack_single(lengths: np.ndarray, seq_len: int) -> Packing:
    """Every document a sequence of its own, cut at seq_len."""
    count = np.arange(len(lengths) + 1, dtype=np.int64)
    return Packing(seq_len, count[:-1], np.zeros(len(lengths), np.int64), np.minimum(lengths, seq_len), count)


@dataclass(frozen=True)
class Sequence:
    """One packed sequence of L = seq_len tokens, numpy.

    input_ids (L) int64; targets (L) int64: what comes next in the same piece, or IGNORED; position_ids (L) int64, from
    0 in every piece; cu_seqlens (pieces + 1) int32, ending with L. Padding is a piece of its own at the end, without
    targets; `num_tokens` says where it begins. top_k, with a cache of the teacher: ids (n, k), log_p (n, k) and
    log_rest (n) of the n targets (`losses.TopK`).
    """

    input_ids: np.ndarray
    targets: np.ndarray
    position_ids: np.ndarray
    cu_seqlens: np.ndarray
    num_tokens: int
    top_k: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


def assemble(
    pieces: list[np.ndarray],
    seq_len: int,
    pad_id: int = 0,
    supervised: list[np.ndarray | None] | None = None,
    said: list[np.ndarray] | None = None,
) -> Sequence:
    """The sequence of these token pieces; `supervised` (per piece, bool per token, None for all) says which tokens
    may be targets, `said` what the targets are where they are not the tokens themselves. Which tokens are padding is
    known by place, so `pad_id` may be a token of the text."""
    sizes = [len(piece) for piece in pieces]
    used = sum(sizes)
    assert used <= seq_len, "a packing never overfills a sequence"
    input_ids = np.full(seq_len, pad_id, np.int64)
    targets = np.full(seq_len, IGNORED, np.int64)
    position_ids = np.zeros(seq_len, np.int64)
    bounds, at = [0], 0
    for index, piece in enumerate(pieces):
        end = at + len(piece)
        input_ids[at:end] = piece
        position_ids[at:end] = np.arange(len(piece))
        if end - at > 1:
            following = np.asarray((piece if said is None else said[index])[1:], np.int64)
            marks = supervised[index] if supervised is not None else None
            targets[at : end - 1] = following if marks is None else np.where(marks[1:], following, IGNORED)
        bounds.append(end)
        at = end
    if at < seq_len:
        position_ids[at:] = np.arange(seq_len - at)
        bounds.append(seq_len)
    return Sequence(input_ids, targets, position_ids, np.array(bounds, np.int32), used)


def with_repeats(pieces: list[np.ndarray], share: float, *key: int) -> list[np.ndarray]:
    """The pieces of one sequence; in a `share` of the sequences (by hash of `key`) a span of 32 to 447 tokens of one
    piece is overwritten by a copy of an earlier span of that piece, any gap between."""
    draws = hashed(*key, count=5)
    eligible = [index for index, piece in enumerate(pieces) if len(piece) >= 2 * SHORTEST_REPEAT]
    if fraction(draws[0]) >= share or not eligible:
        return pieces
    sizes = [len(pieces[index]) for index in eligible]
    chosen = eligible[int(np.searchsorted(np.cumsum(sizes), below(sum(sizes), draws[1]), side="right"))]
    piece = np.array(pieces[chosen])
    longest = min(LONGEST_REPEAT, len(piece) // 2)
    span = SHORTEST_REPEAT + below(longest - SHORTEST_REPEAT + 1, draws[2])
    source = below(len(piece) - 2 * span + 1, draws[3])
    target = source + span + below(len(piece) - 2 * span - source + 1, draws[4])
    piece[target : target + span] = piece[source : source + span]
    return [*pieces[:chosen], piece, *pieces[chosen + 1 :]]


def with_noise(pieces: list[np.ndarray], share: float, others: np.ndarray, *key: int) -> list[np.ndarray]:
    """The pieces of one sequence; in a `share` of the sequences (by hash of `key`) NOISE of the tokens, but for the
    first of a piece, are replaced by any of `others`."""
    sizes = [len(piece) for piece in pieces]
    if fraction(hashed(*key)[0]) >= share:
        return pieces
    replaced, drawn = hashed(*key, count=1 + 2 * sum(sizes))[1:].reshape(2, -1)
    drawn = others[drawn % np.uint64(len(others))]
    noisy = np.where(replaced < np.uint64(NOISE * 2**64), drawn, np.concatenate(pieces))
    result = np.split(noisy, np.cumsum(sizes)[:-1])
    for piece, before in zip(result, pieces):
        piece[:1] = before[:1]
    return result
