"""What a student is worth: time and memory by length of the context, beside its teacher, at batch 1.

A context of C tokens is a prompt of C - DECODED tokens, prefilled at once, and DECODED tokens after it, one at a time.
The two take turns within every round, so that what else the machine does hits both; figures are medians after a
warm-up. Memory is the weights plus the peak that prefill and decoding add; of the CPU it is read from the process's
resident set, so small models vanish in its noise. Twin: tests/distill/evaluation/test_worth.py.
"""

import ctypes
import gc
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from deltanet.modeling import CACHE
from deltanet.ops.dispatch import explain_backend

from .subject import Subject

DECODED = 32
MOST_ROUNDS, FEWEST_ROUNDS, SECONDS = 20, 3, 3.0  # rounds go on for SECONDS, between these numbers
SLOW = 10.0  # a warm-up that takes longer counts as the one round
FIGURES = ("prefill_tokens_per_second", "first_token_seconds", "decode_tokens_per_second")


def worth(
    student: Subject,
    teacher: Subject | None,
    contexts: Sequence[int],
    *,
    seed: int = 0,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict:
    """The sections `speed` and `memory` of the report, for random tokens in `contexts` of so many, more than DECODED.

    speed: device, threads, cores, load (of the machine, before), backend (`student`, `teacher`: what runs the layers),
    by_context: context, and per model the medians of FIGURES, or why there are none; crossover: per figure, from which
    context on the student is ahead.
    memory: weights_bytes, by_context (cache_bytes, peak_bytes), cache_bytes_per_token and crossover of the cache.
    """
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    speed, memory = [], []
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    for context in sorted(contexts):
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(student.vocab_size, (1, context), generator=generator)
        measured = _measure(models, ids)
        speed.append({"context": context} | {who: row["speed"] for who, row in measured.items()})
        memory.append({"context": context} | {who: row["memory"] for who, row in measured.items()})
        advance(context)
    growth = {who: cache_growth(memory, who) for who in models}
    sections = {
        "speed": {
            "device": device_name(student.device),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "load": load,
            "decoded_tokens": DECODED,
            "backend": {who: backend(subject, max(contexts)) for who, subject in models.items()},
            "by_context": speed,
        },
        "memory": {
            "weights_bytes": {who: weights_bytes(subject) for who, subject in models.items()},
            "by_context": memory,
            "cache_bytes_per_token": {who: per_token for who, (_, per_token) in growth.items()},
        },
    }
    if teacher is not None:
        sections["speed"]["crossover"] = {figure: crossover(speed, figure) for figure in FIGURES}
        sections["memory"]["crossover"] = cache_crossover(*growth["student"], *growth["teacher"])
    return sections


def _measure(models: dict[str, Subject], ids: torch.Tensor) -> dict[str, dict]:
    rounds: dict[str, list[dict]] = {who: [] for who in models}
    memory: dict[str, dict] = {}
    reasons: dict[str, str] = {}
    for who, subject in models.items():
        try:
            warm, memory[who] = _with_memory(subject, ids)
            if warm["first_token_seconds"] > SLOW:
                rounds[who].append(warm)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
                raise
            reasons[who] = memory[who] = "does not fit in memory"
    started = time.perf_counter()
    waiting = {who: subject for who, subject in models.items() if who not in reasons and not rounds[who]}
    for done in range(MOST_ROUNDS):
        if done >= FEWEST_ROUNDS and time.perf_counter() - started > SECONDS * len(waiting):
            break
        for who, subject in waiting.items():
            rounds[who].append(_once(subject, ids.to(subject.device))[0])
    medians = {
        who: reasons.get(who) or {f: statistics.median(row[f] for row in rows) for f in FIGURES} | {"rounds": len(rows)}
        for who, rows in rounds.items()
    }
    return {who: {"speed": medians[who], "memory": memory[who]} for who in models}


@torch.inference_mode()
def _once(subject: Subject, ids: torch.Tensor) -> tuple[dict[str, float], int]:
    """FIGURES of one prefill and DECODED tokens after it, and the bytes of the cache when it holds all of ids."""
    prompt = ids[:, :-DECODED]
    start = _now(subject.device)
    output = subject.model(prompt, use_cache=True, logits_to_keep=1)
    token = output.logits[:, -1].argmax(-1, keepdim=True)
    first = _now(subject.device)
    cache = output[CACHE]
    for _ in range(DECODED):
        token = subject.model(token, **{CACHE: cache}, use_cache=True).logits[:, -1].argmax(-1, keepdim=True)
    end = _now(subject.device)
    values = (prompt.shape[1] / (first - start), first - start, DECODED / (end - first))
    return dict(zip(FIGURES, values)), tensor_bytes(cache)


def _with_memory(subject: Subject, ids: torch.Tensor) -> tuple[dict[str, float], dict]:
    gc.collect()
    before = _peak_start(subject.device)
    figures, size = _once(subject, ids.to(subject.device))
    extra = max(_peak(subject.device) - before, 0)
    return figures, {"cache_bytes": size, "peak_bytes": weights_bytes(subject) + extra}


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_start(device: torch.device) -> int:
    """Forgets the peak so far; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    marks = Path("/proc/self/clear_refs")
    if marks.exists():
        # What was freed but kept by the allocator would hide what comes; without glibc it stays and does.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        marks.write_text("5")  # Linux: sets the peak of the resident set back to what it is now
    return _peak(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def weights_bytes(subject: Subject) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in subject.model.parameters())


def tensor_bytes(cache: object) -> int:
    """Bytes of every tensor that a cache holds, keys and values, states and convolutions alike."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(vars(cache)))


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif any(base.__module__ == "transformers.cache_utils" for base in type(value).__mro__):  # a cache or its layer
        yield from _tensors(vars(value))


def cache_growth(memory: Sequence[dict], who: str) -> tuple[float | None, float | None]:
    """(bytes of an empty context, bytes a token) of the line through the two longest contexts that were measured."""
    sizes = [(row["context"], row[who]["cache_bytes"]) for row in memory if isinstance(row[who], dict)]
    if len(sizes) < 2:
        return None, None
    (c0, b0), (c1, b1) = sizes[-2:]
    slope = (b1 - b0) / (c1 - c0)
    return b0 - slope * c0, slope


def crossover(rows: Sequence[dict], figure: str) -> str:
    """From which measured context on the student is ahead, in words."""
    both = [row for row in rows if isinstance(row["student"], dict) and isinstance(row["teacher"], dict)]
    if not both:
        return "not measured"
    sign = -1 if figure == "first_token_seconds" else 1
    ahead = [sign * (row["student"][figure] - row["teacher"][figure]) > 0 for row in both]
    contexts = [row["context"] for row in both]
    if all(ahead):
        return f"ahead at every context measured, from {contexts[0]} tokens"
    if not ahead[-1]:
        return f"behind at the longest context measured, {contexts[-1]} tokens"
    last_behind = max(index for index, is_ahead in enumerate(ahead) if not is_ahead)
    return f"ahead from between {contexts[last_behind]} and {contexts[last_behind + 1]} tokens on"


def cache_crossover(
    fixed: float | None, per_token: float | None, teacher_fixed: float | None, teacher_per_token: float | None
) -> str:
    """From which context on the student's cache is the smaller one, by the lines of `cache_growth`."""
    if fixed is None or teacher_fixed is None:
        return "needs two contexts"
    if per_token >= teacher_per_token:
        return "never: it grows no slower than the teacher's"
    at = max((fixed - teacher_fixed) / (teacher_per_token - per_token), 0)
    return f"smaller from {int(at) + 1} tokens on"


def backend(subject: Subject, context: int) -> str:
    """What computes the layers: the delta rule's backend for a prefill and for decoding, and attention's."""
    config = subject.model.config
    parts = []
    if subject.is_student:
        heads, kv_heads, size = config.num_attention_heads, config.num_state_heads, config.head_dim
        for what, tokens in (("prefill", min(context, 1024)), ("decoding", 1)):
            q, k = (
                torch.empty(1, tokens, count, size, device=subject.device, dtype=subject.dtype)
                for count in (heads, kv_heads)
            )
            beta = torch.empty(1, tokens, kv_heads, device=subject.device)
            parts.append(f"{what}: {explain_backend(q, k, k, beta).backend}")
    if not subject.is_student or set(config.layer_types) != {"linear_attention"}:
        parts.append(f"attention: {config._attn_implementation}")
    return ", ".join(parts)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
