"""A conversation as token ids, and which of them the assistant wrote, whatever the tokenizer's chat template does.

Templates rewrite: they strip, drop the reasoning of earlier turns, put in empty reasoning. So a turn is found in the
rendering of the *whole* conversation: it starts where the generation prompt of its turn ends, it ends where the text
begins that follows a stand-in for its content, and what lies between must be its content. The stop token after it is a
target too. Where any of that fails the sample is refused with the reason; nothing is guessed.
Twin: tests/distill/test_chat.py.
"""

import functools
from collections.abc import Collection

import numpy as np

from convert.text_files import Messages
from deltanet_errors import UserError, one_line


def encode_chat(
    messages: Messages, tokenizer, stop_ids: Collection[int], train_on: str, place: str
) -> tuple[np.ndarray, np.ndarray]:
    """(ids int64, supervised bool), equally long.

    train_on: `assistant` (every turn of it), `last` (the last one) or `all` (every token). stop_ids: ids that end a
    turn (the tokenizer's eos and those of the generation config). Raises UserError headed by `place`.
    """
    for number, message in enumerate(messages):
        for end in _ends(tokenizer, frozenset(stop_ids)):
            if end in message["content"]:
                raise UserError(f"{place}: message {number} holds {end!r}, which the tokenizer takes for its end")
    whole = _render(messages, tokenizer, place)
    encoding = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = np.array(encoding["input_ids"], np.int64)
    if train_on == "all":
        return ids, np.ones(len(ids), bool)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise UserError(f"{place}: no message of the assistant, so nothing to learn; its roles are {roles}")
    begins, ends = np.array(encoding["offset_mapping"]).reshape(-1, 2).T
    supervised = np.zeros(len(ids), bool)
    for turn in turns[-1:] if train_on == "last" else turns:
        start, stop = _find_turn(messages, turn, whole, tokenizer, place)
        after = stop + len(whole[stop:]) - len(whole[stop:].lstrip())
        marker = np.flatnonzero((begins >= stop) & (begins <= after) & (ends > after))
        if not len(marker) or int(ids[marker[0]]) not in stop_ids:
            found = repr(tokenizer.decode(ids[marker[:1]])) if len(marker) else "nothing"
            known = ", ".join(repr(tokenizer.decode([stop])) for stop in sorted(stop_ids))
            raise UserError(
                f"{place}: after the assistant's message {turn} the chat template writes {found}, which is no stop "
                f"token ({known}), so the student would not learn to stop; mend the template or eos_token_id of the "
                "generation config"
            )
        # By order, not by offsets: some tokenizers give whitespace none of its own.
        first = np.flatnonzero((ends > start) & (begins < stop))[0]
        supervised[first : marker[0] + 1] = True
    return ids, supervised


@functools.lru_cache(maxsize=4)
def _ends(tokenizer, stop_ids: frozenset[int]) -> tuple[str, ...]:
    """The stop tokens that a text can spell."""
    return tuple(str(token) for number, token in tokenizer.added_tokens_decoder.items() if number in stop_ids)


def _render(messages: Messages, tokenizer, place: str, prompt: bool = False) -> str:
    if not tokenizer.chat_template:
        raise UserError(f"{place}: the tokenizer has no chat template, so it cannot hold conversations")
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    except Exception as error:  # a template is a program, and fails in every way that programs do
        raise UserError(f"{place}: the chat template refuses the conversation: {one_line(error)}") from None


def _find_turn(messages: Messages, turn: int, whole: str, tokenizer, place: str) -> tuple[int, int]:
    """Where in the rendering the assistant's message `turn` stands, without what the template adds around it."""
    where = f"{place}: the assistant's message {turn}"
    if not messages[turn]["content"].strip():
        raise UserError(f"{where} is empty, so there is nothing to learn")
    before = _render(messages[:turn], tokenizer, place, prompt=True) if turn else ""
    if not whole.startswith(before):
        raise UserError(f"{where} cannot be found: the chat template rewrites what comes before it")
    stand_in = "stand-in"
    while stand_in in whole:
        stand_in += "-in"
    content = messages[turn]["content"]
    replaced = [*messages[:turn], {**messages[turn], "content": stand_in}, *messages[turn + 1 :]]
    head, found, tail = _render(replaced, tokenizer, place).partition(stand_in)
    if not found or not head.startswith(before) or not whole.endswith(tail):
        raise UserError(f"{where} cannot be found: the chat template shows it in a way that depends on its words")
    # What the template puts before a plain answer (an empty reasoning block) is not the assistant's.
    start = len(head) if whole.startswith(head) else len(before)
    stop = max(start, len(whole) - len(tail))
    shown, meant = "".join(whole[start:stop].split()), "".join(content.split())
    if not shown or not meant.endswith(shown):
        raise UserError(f"{where} is shown by the chat template as {whole[start:stop]!r}, which is not what it says")
    return start, stop
