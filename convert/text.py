"""Text for calibration: read from files or written by the teacher itself, with a part set aside that is never fitted.

A source is a file (text_files.py) or the word `self`. Sources get equal shares of the tokens, because a fit to one kind
of text does badly on others (docs/results/calibration.md).
Twin: tests/convert/test_text.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers.cache_utils import DynamicLayer

from deltanet.config import max_context
from deltanet.modeling import CACHE
from deltanet_errors import UserError, one_line

from .text_files import WORDS, Document, check_file, read_documents

HELD_OUT_SHARE = 0.1
MOST_TOKENS = 32768
SHORTEST = 18
"""Tokens of a window: both passages of closeness' recall need as many."""


@dataclass(frozen=True)
class CalibrationText:
    """Windows of token ids, (windows, length) int64: `fit` is for calibration, `held_out` only for measuring."""

    fit: torch.Tensor
    held_out: torch.Tensor


def calibration_text(
    sources: Sequence[str],
    held_out: str | None,
    tokenizer,
    teacher,
    *,
    tokens: int | None = None,
    held_out_tokens: int = 4096,
    length: int = 1024,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
) -> CalibrationText:
    """About `tokens` tokens (None: `enough_tokens` of the teacher) from `sources`, files or `self`, and up to
    `held_out_tokens` set aside.

    Without `held_out` (a file) the last tenth of every source is set aside. A short source gives what it has. The
    teacher is needed for `self` only; `advance` is told what share of its text each step has written. Raises UserError
    for an unreadable file, or one with too little text for a single window.
    """
    if tokens is None:
        tokens = MOST_TOKENS if teacher is None else enough_tokens(teacher.config)
    length = min(length, max_context(teacher.config)) if teacher is not None else length
    share = max(-(-tokens // (length * len(sources))), 1)
    aside = max(held_out_tokens // (length * (1 if held_out else len(sources))), 1)
    if length < SHORTEST:
        raise UserError(
            f"the teacher reaches {length} tokens, and calibration needs windows of {SHORTEST} tokens or more; "
            "use --calibrate none"
        )
    check_sources(sources, held_out, tokenizer)

    def of_file(source: str) -> tuple[torch.Tensor, torch.Tensor]:
        documents = read_documents(source)
        first, last = (documents, []) if held_out else set_aside(documents)
        fit = tokenise(tokenizer, first, share, length, source)
        return fit, tokenise(tokenizer, last, aside, length, source, may_be_empty=True)

    # All files first: what is wrong with one is said before minutes are spent on writing.
    parts = [None if source == "self" else of_file(source) for source in sources]
    own = tokenise(tokenizer, read_documents(held_out), aside, length, held_out) if held_out else None
    if teacher is not None:
        read = [window for part in parts if part for window in part] + ([] if own is None else [own])
        _refuse_strangers(read, teacher.config.vocab_size)
    for index, part in enumerate(parts):
        if part is None:
            if teacher is None:
                raise UserError("--calibrate self: needs a teacher to write the text")
            windows = share + aside * (not held_out)
            told = None if advance is None else lambda count, size=windows * (length - 1): advance(count / size)
            written = write_text(teacher, tokenizer, windows, length, seed, told)
            parts[index] = written[:share], written[share:]
    fit, kept = (torch.cat(half) for half in zip(*parts))
    return CalibrationText(fit, kept if own is None else own)


def check_sources(sources: Sequence[str], held_out: str | None, tokenizer) -> None:
    """Raises UserError for what can be seen of the texts before a teacher is loaded: no such file, or one that nobody
    would read."""
    if not sources or ("none" in sources and len(sources) > 1):
        raise UserError(f"--calibrate {' '.join(sources)}: allowed: files and self, or none alone")
    if "none" in sources and held_out is not None:
        raise UserError(f"--held-out {held_out}: nothing is measured with --calibrate none; leave it out")
    named = [("--calibrate", source, WORDS) for source in sources if source not in WORDS]
    for option, name, words in [*named, *([] if held_out is None else [("--held-out", held_out, ())])]:
        if tokenizer is None:
            raise UserError(f"{option} {name}: the source has no tokenizer; use --calibrate self or none")
        check_file(name, f"{option} {name}", words)


def _refuse_strangers(windows: list[torch.Tensor], vocabulary: int) -> None:
    highest = max((int(window.max()) for window in windows if window.numel()), default=0)
    if highest >= vocabulary:
        raise UserError(f"the source's tokenizer gives token {highest}, but config.json has room for {vocabulary}")


def enough_tokens(config) -> int:
    """How much text to calibrate a model of this size with: a layer has some D^2 numbers to fit (D hidden size)."""
    return max(4096, min(MOST_TOKENS, config.hidden_size**2 // 8))


def set_aside(documents: list[Document], share: float = HELD_OUT_SHARE) -> tuple[list[Document], list[Document]]:
    """The documents without their last `share` by characters, and that last share. A plain text is cut in two where
    the border falls inside it; a chat stays whole and goes to the part set aside."""
    sizes = [_size(document) for document in documents]
    border = int(sum(sizes) * (1 - share))
    first, last, start = [], [], 0
    for document, size in zip(documents, sizes):
        if start + size <= border:
            first.append(document)
        elif start >= border or not isinstance(document, str):
            last.append(document)
        else:
            first.append(document[: border - start])
            last.append(document[border - start :])
        start += size
    return first, last


def _size(document: Document) -> int:
    return len(document) if isinstance(document, str) else sum(len(turn["content"]) for turn in document)


def tokenise(
    tokenizer,
    documents: list[Document],
    windows: int,
    length: int,
    name: str,
    *,
    may_be_empty: bool = False,
    in_order: bool = False,
) -> torch.Tensor:
    """Up to `windows` windows (n, length) int64 from documents spread evenly over the list, joined one after another.

    A long document gives at most a quarter of the windows, so that no single one rules the fit, unless there is too
    little text otherwise. in_order takes the documents whole, as they stand.
    """
    needed, start = windows * length, document_start(tokenizer)
    limit = needed if in_order else max(needed // 4, length)
    order = range(len(documents)) if in_order else [i for first in range(8) for i in range(first, len(documents), 8)]
    ids: list[int] = []
    for most in (limit, needed):
        ids = []
        for index in order:
            if len(ids) >= needed:
                break
            document = documents[index]
            text = document if isinstance(document, str) else render_chat(tokenizer, document)
            # Twelve characters a token is generous for any language; tokenising a whole book for its start is slow.
            row = tokenizer(text[: most * 12], add_special_tokens=False, verbose=False)["input_ids"][:most]
            ids += ([] if start is None or not isinstance(document, str) else [start]) + row
        if len(ids) >= needed or most == needed:
            break
    count = min(len(ids) // length, windows)
    if count == 0 and not may_be_empty:
        raise UserError(f"{name}: {len(ids)} tokens of text; at least one window of {length} is needed")
    return torch.tensor(ids[: count * length], dtype=torch.int64).view(count, length)


def render_chat(tokenizer, chat: list[dict]) -> str:
    """A chat as the teacher knows it: by its template, or without one as paragraphs."""
    if getattr(tokenizer, "chat_template", None):
        return _templated(tokenizer, chat)
    return "\n\n".join(turn["content"] for turn in chat)


def _templated(tokenizer, chat: list[dict]) -> str:
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False)
    except Exception as error:  # a template is a program, and fails in every way that programs do
        raise UserError(f"{tokenizer.name_or_path}: the chat template fails: {one_line(error)}") from None


def document_start(tokenizer) -> int | None:
    """The token a document begins with: what the tokenizer itself puts there, else an end-of-text mark, else none."""
    own, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    if len(own) > len(bare) and own[-len(bare) :] == bare:
        return own[0]
    vocabulary = tokenizer.get_vocab()
    if "<|endoftext|>" in vocabulary:
        return vocabulary["<|endoftext|>"]
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


BATCH = {"cpu": 48, "cuda": 512}
"""Rows that a teacher writes at once."""


class ReservedLayer(DynamicLayer):
    """Keys and values in memory that is there from the start. Those of transformers are concatenated anew at every
    token, each time somewhere else: of many rows a card's memory is soon in pieces, and its allocator what is waited
    for."""

    def reserve(self, length: int) -> None:
        self.whole = [x.new_empty(*x.shape[:2], length, x.shape[3]) for x in (self.keys, self.values)]
        self._put(0, self.keys, self.values)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        self._put(self.keys.shape[2], key_states, value_states)
        return self.keys, self.values

    def _put(self, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        end = start + keys.shape[2]
        for whole, new in zip(self.whole, (keys, values)):
            whole[:, :, start:end] = new
        self.keys, self.values = (whole[:, :, :end] for whole in self.whole)


def _reserved(cache, length: int):
    """The cache of a first step; what grows by concatenation in it has room for `length` tokens now."""
    for layer in getattr(cache, "layers", ()):
        if type(layer) is DynamicLayer and layer.is_initialized:
            layer.__class__ = ReservedLayer
            layer.reserve(length)
    return cache


@torch.no_grad()
def write_text(
    teacher,
    tokenizer,
    windows: int,
    length: int,
    seed: int,
    advance: Callable[[float], None] | None = None,
    batch: int | None = None,
    top_p: float = 1.0,
    openings: Sequence[str] = (),
) -> torch.Tensor:
    """(windows, length) token ids sampled from the teacher at temperature 1 (`nucleus` of top_p): the same for the same
    seed and device.

    Rows are documents that begin with the words of one of `openings`, which take turns. Without them a third begin like
    a document, a third with a random token, a third like a chat where the teacher has a template (else like a
    document). No sampled token ends a row: after an end of text the teacher starts another.
    Raises UserError where these beginnings have a token that the teacher does not know.
    """
    generator = torch.Generator(teacher.device).manual_seed(seed)
    vocabulary = teacher.config.vocab_size
    named = teacher.config.bos_token_id
    start = document_start(tokenizer) if tokenizer is not None else named if named in range(vocabulary) else None
    start = 0 if start is None else start
    if openings:
        words = [[start, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in openings]
        begun = [words[row % len(words)] for row in range(windows)]
    else:
        chat = _chat_opening(tokenizer) or [start]
        begun = [[chat, [start], [start, _any_token(vocabulary, generator)]][row % 3] for row in range(windows)]
    given = torch.full((windows, length), -1, dtype=torch.int64)
    for row, beginning in enumerate(begun):
        given[row, : len(beginning)] = torch.tensor(beginning)[:length]
    _refuse_strangers([given], vocabulary)
    out = given.clone()
    batch = batch or BATCH.get(teacher.device.type, BATCH["cpu"])
    for group in (slice(first, first + batch) for first in range(0, windows, batch)):
        cache = None
        for position in range(1, length):
            ids = out[group, position - 1 : position].to(teacher.device)
            output = teacher(ids, cache=cache, use_cache=True, logits_to_keep=1)
            if cache is None:
                cache = _reserved(output[CACHE], length)
            chances = torch.softmax(output.logits[:, -1].float(), -1)
            if not chances.isfinite().all():
                raise UserError("--calibrate self: the teacher's logits are not finite, so it cannot write")
            sampled = torch.multinomial(nucleus(chances, top_p), 1, generator=generator)[:, 0].cpu()
            out[group, position] = torch.where(given[group, position] < 0, sampled, given[group, position])
            if advance is not None:
                advance(len(sampled))
    return out


FEW = 4096
"""Tokens that a nucleus is looked for among before all are sorted, which takes longer: enough for all but flat rows."""


def nucleus(chances: torch.Tensor, top_p: float, few: int = FEW) -> torch.Tensor:
    """(rows, vocabulary): the likeliest tokens of each row that together have top_p of its chance or just more,
    rescaled, the others at zero (nucleus sampling, arXiv 1904.09751). Only rows whose `few` likeliest do not settle it
    are sorted whole."""
    if top_p >= 1:
        return chances
    few = min(few, chances.shape[-1])
    falling, ids = chances.topk(few, -1)
    kept = torch.where(falling.cumsum(-1) - falling < top_p, falling, 0)
    found = torch.zeros_like(chances).scatter(-1, ids, kept / kept.sum(-1, keepdim=True))
    more = kept[:, -1] > 0
    if few < chances.shape[-1] and more.any():
        found[more] = nucleus(chances[more], top_p, chances.shape[-1])
    return found


def _any_token(vocabulary: int, generator: torch.Generator) -> int:
    return int(torch.randint(vocabulary, (1,), generator=generator, device=generator.device))


def _chat_opening(tokenizer) -> list[int]:
    """The tokens before the words of the first user in a chat; empty without a template."""
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        return []
    mark = "A"
    text = _templated(tokenizer, [{"role": "user", "content": mark}])
    before = text.rpartition(mark)[0] if text.count(mark) == 1 else text.split(mark + "<")[0]
    return tokenizer(before, add_special_tokens=False)["input_ids"]
