"""What the teacher says of a stage's every target, on disk, so that the stage trains without it in memory.

The k likeliest tokens of a target are kept with the log-probability of all others together: k (2 + 2) + 4 bytes a
target, or k (2 + 4) + 4 where the vocabulary is over 65,536 (`bytes_a_target`). The loss is `losses.top_k_divergence`.

    FOLDER/NAME/00007.safetensors    sequences 7 PORTION and on, in the order in which the stage reads them
        first (S + 1) int64          where the targets of each of its S sequences begin, and the end
        ids (n, k) uint16 or int32   log_p (n, k) float16   log_rest (n) float32

NAME is the digest of everything that decides what is in it, but for how many sequences: a longer stage goes on where a
shorter one ended. A portion appears by one rename and holds the sha256 of its tensors, so a killed writing goes on, and
what is damaged is written anew. Twin: tests/distill/test_logit_cache.py.
"""

import contextlib
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from deltanet import DeltaNetForCausalLM
from deltanet_errors import DeltanetError, UserError

from .batch import make_batch
from .data import Corpus
from .losses import TopK, num_chunks_for
from .packing import IGNORED, Sequence
from .prepare import StagePlan
from .schema import Recipe
from .stages import head, run_decoder
from .token_cache import alone_in
from .world import World

FORMAT = 1
PORTION = 64  # sequences of a file
_NAMES = ("first", "ids", "log_p", "log_rest")


def bytes_a_target(top_k: int, vocab_size: int) -> int:
    """On disk, but for a header a portion and 8 bytes a sequence."""
    return top_k * (_id_dtype(vocab_size)().itemsize + 2) + 4


def check_top_k(recipe: Recipe, vocab_size: int) -> None:
    """Raises UserError where the recipe keeps more tokens than there are."""
    cache = None if recipe.teacher is None else recipe.teacher.cache
    if cache is not None and cache.top_k > vocab_size:
        raise UserError(f"teacher.cache.top_k: {cache.top_k} is more than the {vocab_size} tokens of the vocabulary")


@dataclass(frozen=True)
class LogitCache:
    """`cache[position]` is the sequence of the corpus with the teacher's `top_k` (see `Sequence`)."""

    folder: Path
    corpus: Corpus
    digest: str

    def file(self, position: int) -> Path:
        """The portion that holds it."""
        return self.folder / f"{position // PORTION:05}.safetensors"

    def __getitem__(self, position: int) -> Sequence:
        place = position % PORTION
        with safe_open(self.file(position), "np") as portion:
            begin, end = portion.get_slice("first")[place : place + 2].tolist()
            rows = (portion.get_slice(name)[begin:end] for name in ("ids", "log_p", "log_rest"))
            return replace(self.corpus[position], top_k=tuple(rows))


def write_cache(
    folder: Path,
    plan: StagePlan,
    teacher: DeltaNetForCausalLM,
    world: World,
    *,
    made_by: object,
    top_k: int,
    vocab_size: int,
    bfloat16: bool = False,
    report: Callable[[str], None] = lambda text: None,
    advance: Callable[[int], None] = lambda sequences: None,
) -> LogitCache:
    """The cache of all sequences that the stage reads, whole: portions that are missing or damaged are written.

    made_by: JSON, what the teacher is. Rows of its head from vocab_size on take no part. bfloat16 computes in it. All
    ranks call it together, on storage they share, and share the portions out; the teacher may be in parts. `report` is
    told of damage, `advance` how many sequences are written; what it raises leaves whole portions. Raises DeltanetError
    where the disk refuses a portion.
    """
    corpus, num_sequences = plan.corpus, plan.num_steps * plan.batch_size
    identity = [FORMAT, PORTION, made_by, corpus.digest, top_k, vocab_size, str(teacher.dtype), bfloat16]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    cache = LogitCache(folder / digest[:32], corpus, digest)
    wanted = [range(start, min(start + PORTION, num_sequences)) for start in range(0, num_sequences, PORTION)]
    mine = [positions for positions in wanted[world.rank :: world.size] if not _is_whole(cache, positions, report)]
    missing = sorted(itertools.chain(*world.gather(mine)), key=lambda positions: positions.start)
    for begin in range(0, len(missing), world.size):
        turn = missing[begin : begin + world.size]
        # A teacher in parts needs every rank in every forward pass, so one without a portion repeats another's.
        positions = turn[min(world.rank, len(turn) - 1)]
        num_passes = max(-(-len(other) // plan.micro_batch_size) for other in turn)
        tensors = _portion(plan, positions, num_passes, teacher, world, top_k, vocab_size, bfloat16)
        if world.rank < len(turn):
            _store(cache, positions, tensors)
        advance(sum(map(len, missing[: begin + world.size])))
    world.gather(None)  # nobody reads a portion before all are written
    return cache


@torch.no_grad()
def _portion(
    plan: StagePlan,
    positions: range,
    num_passes: int,
    teacher: DeltaNetForCausalLM,
    world: World,
    top_k: int,
    vocab_size: int,
    bfloat16: bool,
) -> dict[str, np.ndarray]:
    """The tensors of a portion, by so many forward passes, of which those beyond its own are not kept."""
    counts, kept = [], []
    context = torch.autocast(world.device.type, torch.bfloat16) if bfloat16 else contextlib.nullcontext()
    starts = range(0, len(positions), plan.micro_batch_size)
    for index in range(num_passes):
        start = starts[min(index, len(starts) - 1)]
        sequences = [plan.corpus[at] for at in positions[start : start + plan.micro_batch_size]]
        batch = make_batch(sequences, world.device)
        with context:
            hidden = run_decoder(teacher, batch).last_hidden_state[batch.targets != IGNORED]
            found = likeliest(hidden, head(teacher)[:vocab_size], top_k)
        if index < len(starts):
            kept += found
            counts += [int((sequence.targets != IGNORED).sum()) for sequence in sequences]
    return {
        "first": np.cumsum([0, *counts], dtype=np.int64),
        "ids": np.concatenate([piece.ids.cpu().numpy() for piece in kept]).astype(_id_dtype(vocab_size)),
        "log_p": np.concatenate([piece.log_p.cpu().numpy() for piece in kept]).astype(np.float16),
        "log_rest": np.concatenate([piece.log_rest.cpu().numpy() for piece in kept]).astype(np.float32),
    }


def likeliest(hidden: torch.Tensor, weight: torch.Tensor, top_k: int, chunk_tokens: int | None = None) -> list[TopK]:
    """The k likeliest next tokens after the states `hidden` (n, D) by the head `weight` (V, D), in pieces of as many
    rows as have logits at once; log-probabilities at least float32."""
    pieces = []
    for rows in hidden.tensor_split(num_chunks_for(len(hidden), len(weight), chunk_tokens)):
        logits = rows @ weight.T
        log_p = logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        kept, ids = log_p.topk(top_k, -1)
        pieces.append(TopK(ids, kept, log_p.scatter_(-1, ids, -torch.inf).logsumexp(-1)))
    return pieces


def _store(cache: LogitCache, positions: range, tensors: dict[str, np.ndarray]) -> None:
    """Writes a portion, unless another run that shares the folder has by now written it, or more of it."""
    file = cache.file(positions.start)
    part = file.with_suffix(".tmp")
    try:
        with alone_in(cache.folder):
            if _is_whole(cache, positions, lambda damage: None):
                return
            try:
                save_file(tensors, part, metadata={"made_by": cache.digest, "sha256": _sha256(tensors)})
                part.replace(file)
            finally:
                part.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise DeltanetError(f"{file}: cannot be written: {getattr(error, 'strerror', None) or error}") from None


def _is_whole(cache: LogitCache, positions: range, report: Callable[[str], None]) -> bool:
    """Whether the portion is there, undamaged, and holds these sequences; `report` is told of damage."""
    file = cache.file(positions.start)
    if not file.exists():
        return False
    if problem := _problem(file, cache.digest):
        report(f"{file}: {problem}; the teacher writes it anew")
        return False
    return _num_sequences(file) >= len(positions)


def _problem(file: Path, digest: str) -> str | None:
    """What is wrong with a portion; None where it is whole and of this cache."""
    try:
        with safe_open(file, "np") as portion:
            about = portion.metadata() or {}
            if about.get("made_by") != digest:
                return "is of another teacher, text, precision or top_k"
            tensors = {name: portion.get_tensor(name) for name in _NAMES}
    except (OSError, SafetensorError) as error:
        return f"is damaged ({error})"
    is_whole = about.get("sha256") == _sha256(tensors)
    return None if is_whole else "is damaged (its sha256 is not the one it was written with)"


def _sha256(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _num_sequences(file: Path) -> int:
    with safe_open(file, "np") as portion:
        return portion.get_slice("first").get_shape()[0] - 1


def _id_dtype(vocab_size: int) -> type:
    return np.uint16 if vocab_size <= 1 << 16 else np.int32
