"""The order of samples: sequence `index` of a corpus is a pure function of (key, sources), whatever asks for it.

Every source is packed on its own (`packing.py`). Sequences of several sources are dealt in blocks: a block holds a
fixed number of each, shuffled by a hash of (key, block); within a source, sequences are permuted anew each epoch.
Without weights a block is one epoch of everything; with weights, BLOCK sequences in their proportion. So resuming is
going on at an index, and the number of processes changes nothing. Twin: tests/distill/test_data.py.
"""

import functools
import hashlib
import json
from collections.abc import Sequence as Many
from dataclasses import dataclass, replace

import numpy as np

from deltanet_errors import UserError

from .order import permutation
from .packing import Packing, Sequence, assemble, pack_best_fit, pack_single, pack_wrapped, with_noise, with_repeats
from .shares import dealt
from .token_cache import Tokens

_DOCUMENTS, _SEQUENCES, _BLOCKS, _REPEATS, _NOISE = range(5)  # what a hash is for


@dataclass(frozen=True)
class Part:
    """Documents of a source as spans of its tokens: start, stop (documents) int64. Where `middle` is given, each is a
    pair (`preferences.py`): the chosen conversation up to the middle, the rejected one behind it."""

    tokens: Tokens
    start: np.ndarray
    stop: np.ndarray
    middle: np.ndarray | None = None

    @property
    def num_tokens(self) -> int:
        return int((self.stop - self.start).sum())


@dataclass(frozen=True)
class Report:
    """What became of one source: tokens in = packed + dropped, exactly. Shares are of the packed documents."""

    source: str
    documents: int
    tokens: int
    packed: int
    dropped: int
    dropped_documents: int
    cut_answers: int
    supervised: int
    stop_share: float
    sequences: int
    padding: int


def whole(tokens: Tokens) -> Part:
    """All documents of a source."""
    if tokens.kind == "preference":
        return Part(tokens, tokens.bounds[:-1:2], tokens.bounds[2::2], tokens.bounds[1::2])
    return Part(tokens, tokens.bounds[:-1], tokens.bounds[1:])


def chosen(part: Part) -> Part:
    """The part without the answers that were rejected, as conversations of their own."""
    return part if part.middle is None else Part(part.tokens, part.start, part.middle)


def split(tokens: Tokens, held_out: float) -> tuple[Part, Part]:
    """The source without its last share of tokens, and that share. A text is cut where the share begins; a chat or
    a pair in which it begins is held out whole. Raises UserError where nothing is left to train on."""
    everything = whole(tokens)
    border = int(tokens.facts.tokens * (1 - held_out))
    edges = np.append(everything.start, everything.stop[-1])
    first = int(np.searchsorted(edges, border, side="right")) - 1  # the document in which the share begins
    cut = [border] if tokens.kind == "text" and border > edges[first] else []
    train = Part(tokens, everything.start[: first + len(cut)], np.append(everything.stop[:first], cut).astype(np.int64))
    held = Part(tokens, np.append(cut, everything.start[first + len(cut) :]).astype(np.int64), everything.stop[first:])
    if everything.middle is not None:
        train, held = (
            replace(part, middle=middle)
            for part, middle in zip((train, held), np.split(everything.middle, [len(train.start)]))
        )
    if not train.num_tokens:
        raise UserError(f"source {tokens.name}: a share of {held_out} held out leaves nothing to train on")
    return train, held


def has_target(part: Part, seq_len: int) -> bool:
    """Whether any document has a target within its first seq_len tokens."""
    if part.tokens.marks is None:
        return bool((part.stop - part.start > 1).any())
    spans = zip(part.start.tolist(), np.minimum(part.stop, part.start + seq_len).tolist())
    return any(part.tokens.marks[begin + 1 : end].any() for begin, end in spans)


class Corpus:
    """`corpus[index]` is packed sequence `index`, for every index >= 0; `len(corpus)` is one epoch of everything."""

    def __init__(
        self,
        parts: Many[Part],
        *,
        seq_len: int,
        key: Many[int] = (0,),
        weights: Many[float] | None = None,
        packing: str = "wrapped",
        too_long: str = "cut",
        repeats: float = 0.0,
        noise: float = 0.0,
        pad_id: int = 0,
        may_be_short: bool = False,
    ):
        """`packing` is for texts; chats are never cut by it and always packed best_fit, after `too_long` (cut or drop)
        has dealt with those over seq_len; `single` packs nothing. Raises UserError for a source without a target, for
        texts that do not fill a sequence unless each `may_be_short`."""
        self.seq_len, self.key, self.repeats, self.noise, self.pad_id = seq_len, tuple(key), repeats, noise, pad_id
        self.packing = packing
        prepared = [_fit(part, seq_len, too_long, may_be_short) for part in parts]
        self.parts = [part for part, _ in prepared]
        pack = pack_single if packing == "single" else pack_best_fit
        self._fixed = [None if self._is_wrapped(part) else pack(part.stop - part.start, seq_len) for part in self.parts]
        self.sizes = [
            -(-part.num_tokens // seq_len) if fixed is None else len(fixed)
            for part, fixed in zip(self.parts, self._fixed)
        ]
        self.counts = self.sizes if weights is None else dealt(weights)
        self.reports = [
            Report(**facts, sequences=size, padding=size * seq_len - facts["packed"])
            for (_, facts), size in zip(prepared, self.sizes)
        ]
        order = [key, weights, packing, too_long, repeats, seq_len, [part.tokens.digest for part in self.parts]]
        order += [noise] if noise else []  # so that a run begun before there was noise goes on
        spans = [hashlib.sha256(part.start.tobytes() + part.stop.tobytes()).hexdigest() for part in self.parts]
        self.digest = hashlib.sha256(json.dumps([order, spans]).encode()).hexdigest()
        # Bound to the object, so that a corpus that is dropped frees them.
        self._block = functools.lru_cache(maxsize=2)(self._make_block)
        self._epoch = functools.lru_cache(maxsize=2 * len(self.parts))(self._make_epoch)

    def __len__(self) -> int:
        return sum(self.sizes)

    def __getitem__(self, index: int) -> Sequence:
        if index < 0:
            raise IndexError(index)
        source, inner = self.locate(index)
        part = self.parts[source]
        packing, order = self._epoch(source, inner // self.sizes[source])
        pieces, marks, said = [], [], []
        for document, start, stop in packing.pieces(int(order[inner % self.sizes[source]])):
            edges = [part.start[document] + start, part.start[document] + stop]
            if part.middle is not None:
                edges.insert(1, part.middle[document])
            for span in map(slice, edges, edges[1:]):
                pieces.append(part.tokens.ids[span].astype(np.int64))
                marks.append(None if part.tokens.marks is None else part.tokens.marks[span].astype(bool))
                said.append(pieces[-1] if part.tokens.targets is None else part.tokens.targets[span].astype(np.int64))
        if part.tokens.marks is None:
            pieces = said = with_repeats(pieces, self.repeats, *self.key, _REPEATS, index)
            others = part.tokens.ids[: part.stop[-1]]  # what is held out lies behind
            pieces = with_noise(pieces, self.noise, others, *self.key, _NOISE, index)
        return assemble(pieces, self.seq_len, self.pad_id, marks, said)

    def locate(self, index: int) -> tuple[int, int]:
        """(source, how many sequences of that source come before)."""
        block, place = divmod(index, sum(self.counts))
        sources, ranks = self._block(block)
        source = int(sources[place])
        return source, block * self.counts[source] + int(ranks[place])

    def _is_wrapped(self, part: Part) -> bool:
        return self.packing == "wrapped" and part.tokens.kind == "text"

    def _make_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place of a block, and how many of that source come before it within the block."""
        counts = self.counts
        sources = np.repeat(np.arange(len(counts)), counts)[permutation(sum(counts), *self.key, _BLOCKS, block)]
        ranks = np.empty(len(sources), np.int64)
        for source, count in enumerate(counts):
            ranks[sources == source] = np.arange(count)
        return sources, ranks

    def _make_epoch(self, source: int, epoch: int) -> tuple[Packing, np.ndarray]:
        """The packing of a source in an epoch and the order of its sequences."""
        packing, part = self._fixed[source], self.parts[source]
        if packing is None:
            documents = permutation(len(part.start), *self.key, _DOCUMENTS, source, epoch)
            packing = pack_wrapped(part.stop - part.start, self.seq_len, documents)
        return packing, permutation(self.sizes[source], *self.key, _SEQUENCES, source, epoch)


def _fit(part: Part, seq_len: int, too_long: str, may_be_short: bool) -> tuple[Part, dict]:
    """The documents as they can be packed, and what had to go. Texts always fit, since packing may cut them."""
    tokens, lengths = part.tokens, part.stop - part.start
    facts = {"source": tokens.name, "documents": len(lengths), "tokens": int(lengths.sum())}
    if tokens.marks is None:
        if facts["tokens"] < seq_len and not may_be_short:
            raise UserError(
                f"source {tokens.name}: {facts['tokens']} tokens in all, fewer than one sequence of {seq_len}; give it "
                "more text or lower seq_len"
            )
        stopped = tokens.facts.stopped / tokens.facts.documents
        if not may_be_short and not has_target(part, seq_len):
            raise UserError(
                f"source {tokens.name}: none of its documents has two tokens, so nothing says what comes next"
            )
        return part, facts | {
            "packed": facts["tokens"], "dropped": 0, "dropped_documents": 0, "cut_answers": 0,
            "supervised": facts["tokens"], "stop_share": stopped,
        }  # fmt: skip
    if part.middle is not None:
        return _fit_pairs(part, seq_len, facts)
    if tokens.kind == "task" and too_long == "cut" and (lengths > seq_len).any():
        raise UserError(
            f"source {tokens.name}: examples of up to {lengths.max()} tokens do not fit into {seq_len}, and cut short "
            "they ask for nothing; raise seq_len, shorten them by `options:`, or say data.too_long: drop"
        )
    stop = part.stop.copy()
    keep = np.ones(len(lengths), bool)
    supervised, cut, stopped = 0, 0, 0
    for index, (begin, end) in enumerate(zip(part.start.tolist(), part.stop.tolist())):
        marked = np.flatnonzero(tokens.marks[begin:end])
        marked = marked[marked > 0]  # the first token of a document is never a target
        within = marked[marked < seq_len]
        is_long = end - begin > seq_len
        if not len(within) or (is_long and too_long == "drop"):
            keep[index] = False
            continue
        stop[index] = min(end, begin + seq_len)
        supervised += len(within)
        cut += len(within) < len(marked)
        stopped += len(within) == len(marked)
    kept = Part(tokens, part.start[keep], stop[keep])
    if not keep.any():
        raise UserError(
            f"source {tokens.name}: none of its {len(lengths)} conversations has an answer within {seq_len} tokens, so "
            "there is nothing to learn; raise seq_len"
        )
    whole_share = tokens.facts.stopped / tokens.facts.documents  # 1.0: the encoder refuses an answer without a stop
    return kept, facts | {
        "packed": kept.num_tokens, "dropped": facts["tokens"] - kept.num_tokens,
        "dropped_documents": int((~keep).sum()), "cut_answers": cut, "supervised": supervised,
        "stop_share": whole_share * stopped / int(keep.sum()),
    }  # fmt: skip


def _fit_pairs(part: Part, seq_len: int, facts: dict) -> tuple[Part, dict]:
    """The pairs of at most seq_len tokens and two answers. A longer one is dropped, since cut short it would compare
    something else, and one whose answers are equal, which compares nothing."""
    keep = part.stop - part.start <= seq_len
    if not keep.any():
        raise UserError(
            f"source {part.tokens.name}: none of its {len(keep)} pairs fits into {seq_len} tokens, the shortest has "
            f"{(part.stop - part.start).min()}; raise seq_len"
        )
    spans = zip(part.start.tolist(), part.middle.tolist(), part.stop.tolist())
    keep &= [not np.array_equal(part.tokens.ids[a:b], part.tokens.ids[b:c]) for a, b, c in spans]
    if not keep.any():
        raise UserError(f"source {part.tokens.name}: in none of its {len(keep)} pairs do the answers differ")
    kept = Part(part.tokens, part.start[keep], part.stop[keep], part.middle[keep])
    supervised = sum(int(part.tokens.marks[a:b].sum()) for a, b in zip(kept.start, kept.stop))
    return kept, facts | {
        "packed": kept.num_tokens, "dropped": facts["tokens"] - kept.num_tokens,
        "dropped_documents": int((~keep).sum()), "cut_answers": 0, "supervised": supervised,
        "stop_share": part.tokens.facts.stopped / part.tokens.facts.documents,
    }  # fmt: skip
