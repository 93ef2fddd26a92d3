"""Chats that the teacher writes itself: given the template's empty user turn it asks, then it answers (as in Magpie,
arXiv 2406.08464), so that a chat model is distilled on its own kind of text without any data.

Kept are chats in which both turns ended by themselves, say more than once what they say, and read back through the
template. Files and portions: teacher_text.py. Twin: tests/distill/test_teacher_chats.py.
"""

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch

from convert.text_files import Messages
from convert.tokens import num_ids
from deltanet import DeltaNetForCausalLM
from deltanet.config import max_context
from deltanet_errors import UserError

from .chat import encode_chat
from .onpolicy import write_after
from .order import hashed

QUESTION, SHORTEST = 128, 512
"""Tokens of a question at most, and of a whole chat at most where sequences are shorter."""


def write_chats(
    teacher: DeltaNetForCausalLM,
    tokenizer,
    count: int,
    length: int,
    key: int,
    *,
    stop_ids: Collection[int],
    is_dull: Callable[[str], bool] = lambda text: False,
    top_p: float = 1.0,
    openings: Sequence[str] = (),
) -> list[dict]:
    """Of `count` chats those worth keeping, each `messages` (a question, an answer) and `tokens` (of the whole chat).

    A question has at most QUESTION tokens after the words of one of `openings`, which take turns; an answer has what
    the longest of the questions leaves of `length`, the tokens of a chat at most. The same key, teacher, length, top_p
    (`convert.text.nucleus`) and openings write the same. A turn for which `is_dull` holds is dropped with its chat.
    Raises UserError where the tokenizer has no chat template or the template none that can be begun.
    """
    start, end = _user_turn(tokenizer)
    limit = min(teacher.config.vocab_size, num_ids(tokenizer))
    words = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64) for text in openings or [""]]
    given = [words[row % len(words)] for row in range(count)]
    length = min(length, max_context(teacher.config))
    room = length - len(start) - max(map(len, words))
    if room < 2:
        return []
    prompts = [np.concatenate([start, first]) for first in given]
    asked = _write(teacher, prompts, (key, 0), min(QUESTION, room // 2), {*stop_ids, end}, limit, top_p)
    asked = [np.concatenate([first, ids]) for first, ids in zip(given, asked)]
    questions = [_turn(ids, {*stop_ids, end}, tokenizer) for ids in asked]
    questions = [text for text in questions if text is not None and not is_dull(text)]
    if not questions:
        return []
    chats = [[{"role": "user", "content": text}] for text in questions]
    prompts = [_render(chat, tokenizer, prompt=True) for chat in chats]
    prompts = [np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64) for text in prompts]
    left = length - max(map(len, prompts))
    if left < 1:
        return []
    answers = _write(teacher, prompts, (key, 1), left, stop_ids, limit, top_p)
    kept = []
    for chat, ids in zip(chats, answers):
        text = _turn(ids, stop_ids, tokenizer)
        if text is None or is_dull(text):
            continue
        messages: Messages = [*chat, {"role": "assistant", "content": text}]
        try:
            ids, _ = encode_chat(messages, tokenizer, stop_ids, "assistant", "")
        except UserError:  # the template shows such an answer otherwise than it was written
            continue
        if len(ids) <= length:
            kept.append({"messages": messages, "tokens": len(ids)})
    return kept


def _user_turn(tokenizer) -> tuple[np.ndarray, int]:
    """The tokens before the first word of a user, and the one after the last."""
    word = "stand-in"
    before, _, after = _render([{"role": "user", "content": word}], tokenizer).partition(word)
    opening, ending = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, after))
    if not opening or not ending:
        raise UserError("the chat template sets no marks around the words of a user, so the teacher cannot ask")
    return np.array(opening, np.int64), ending[0]


def _render(messages: Messages, tokenizer, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError("the teacher's tokenizer has no chat template, so it writes no chats")
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)


def _write(teacher, prompts, key: tuple[int, int], length: int, stop_ids: Collection[int], limit: int, top_p: float):
    chances = np.stack([hashed(*key, row, count=length) for row in range(len(prompts))]).astype(np.float64) / 2.0**64
    with torch.no_grad():
        return write_after(teacher, prompts, torch.from_numpy(chances), stop_ids, limit, top_p)


def _turn(ids: np.ndarray, stop_ids: Collection[int], tokenizer) -> str | None:
    """What the turn says; None where it did not end by itself, is empty, or holds marks of the template."""
    if int(ids[-1]) not in stop_ids or not set(ids[:-1].tolist()).isdisjoint(tokenizer.all_special_ids):
        return None
    return tokenizer.decode(ids[:-1].tolist()).strip() or None
