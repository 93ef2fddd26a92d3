"""Laws of the chat masks: exactly what the assistant wrote is supervised, with its stop token, or it is refused."""

import numpy as np
import pytest
from word_tokenizer import CHATML, LATE_END, QWEN3, make_tokenizer

from deltanet_errors import UserError
from distill.chat import encode_chat

TURNS = [
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "<think>t1</think>a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
]
PLAIN = [{"role": "system", "content": "be kind"}, *TURNS[:1], {"role": "assistant", "content": " a b\nc "}]


def supervised_text(messages, tokenizer, train_on="assistant"):
    """The supervised runs of tokens, decoded."""
    ids, marks = encode_chat(messages, tokenizer, {tokenizer.eos_token_id}, train_on, "chat.jsonl:3")
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(ids) == whole
    runs = np.flatnonzero(np.diff(np.concatenate([[0], marks.astype(int), [0]]))).reshape(-1, 2)
    return [tokenizer.decode(ids[start:stop]) for start, stop in runs]


def test_a_template_that_rewrites_earlier_turns_supervises_what_it_shows():
    tokenizer = make_tokenizer(QWEN3)
    assert supervised_text(TURNS, tokenizer) == ["a1<|im_end|>", "a2<|im_end|>"]
    assert supervised_text(TURNS, tokenizer, "last") == ["a2<|im_end|>"]


def test_reasoning_of_the_last_turn_is_supervised_where_the_template_shows_it():
    last = [*TURNS[:3], {"role": "assistant", "content": "<think>t2</think>a2"}]
    tokenizer = make_tokenizer(QWEN3)
    assert supervised_text(last, tokenizer) == ["a1<|im_end|>", "<think>\nt2\n</think>\n\na2<|im_end|>"]


def test_a_plain_template_supervises_content_and_stop_of_every_turn():
    tokenizer = make_tokenizer(CHATML)
    assert supervised_text(PLAIN, tokenizer) == [" a b\nc <|im_end|>"]
    assert supervised_text(TURNS, tokenizer) == ["<think>t1</think>a1<|im_end|>", "a2<|im_end|>"]
    assert supervised_text(TURNS, tokenizer, "all") == [tokenizer.apply_chat_template(TURNS, tokenize=False)]


def test_an_answer_that_repeats_words_of_the_conversation_is_found_in_its_place():
    turns = [{"role": "user", "content": "assistant\nyes"}, {"role": "assistant", "content": "yes"}] * 2
    assert supervised_text(turns, make_tokenizer(CHATML)) == ["yes<|im_end|>"] * 2
    turns = [{"role": "user", "content": "stand-in"}, {"role": "assistant", "content": "stand-in"}]
    assert supervised_text(turns, make_tokenizer(CHATML)) == ["stand-in<|im_end|>"]


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<|im_start|>{{ m.role }}<|endoftext|>\n\n{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|endoftext|>\n\n{% endif %}",
        "<|im_start|>{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content | trim }}<|im_end|>"
        "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}",
        "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content.strip() }} <|im_end|>"
        "{% else %}<|im_start|>[INST] {{ m.content.strip() }} [/INST] {% endif %}{% endfor %}",
    ],
    ids=["llama3", "mistral", "llama2"],
)
def test_templates_without_a_prompt_or_with_headers_are_followed(template):
    turns = [*TURNS[:1], {"role": "assistant", "content": "a1\n"}, *TURNS[2:]]
    found = [run.replace(" ", "") for run in supervised_text(turns, make_tokenizer(template))]
    assert found == ["a1<|im_end|>", "a2<|im_end|>"]


def test_spaces_before_the_stop_token_are_supervised_with_it():
    spaced = CHATML.replace("{{ m.content }}<|im_end|>", "{{ m.content | trim }} <|im_end|>")
    assert supervised_text(PLAIN, make_tokenizer(spaced)) == ["a b\nc <|im_end|>"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_message_that_spells_the_end_of_a_turn_is_refused(number):
    turns = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "a b"}]
    turns[number]["content"] = "yes<|im_end|>\n<|im_start|>user\nand more"
    with pytest.raises(UserError, match=rf"chat.jsonl:3: message {number} holds '<\|im_end\|>', which the tokenizer"):
        supervised_text(turns, make_tokenizer(CHATML))


def test_an_end_marker_that_belongs_to_the_next_message_is_refused():
    with pytest.raises(UserError, match=r"^chat.jsonl:3: after the assistant's message 3 .* writes nothing, which is"):
        supervised_text(TURNS, make_tokenizer(LATE_END))


def test_a_marker_that_is_no_stop_token_is_refused_by_name():
    tokenizer = make_tokenizer(CHATML, eos="<|endoftext|>")
    with pytest.raises(UserError, match=r"writes '<\|im_end\|>', which is no stop token \('<\|endoftext\|>'\)"):
        supervised_text(TURNS, tokenizer)


def test_a_template_that_changes_the_words_is_refused():
    loud = CHATML.replace("{{ m.content }}", "{{ m.content | upper }}")
    with pytest.raises(UserError, match="assistant's message 1 cannot be found"):
        supervised_text(TURNS, make_tokenizer(loud))
    cut = CHATML.replace("{{ m.content }}", "{{ m.content[:8] }}")
    with pytest.raises(UserError, match="is shown by the chat template as '<think>t', which is not what it says"):
        supervised_text(TURNS, make_tokenizer(cut))


def test_a_template_whose_prompt_differs_from_the_turn_is_refused():
    odd = CHATML.replace("<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant:{% endif %}")
    with pytest.raises(UserError, match="rewrites what comes before it"):
        supervised_text(TURNS, make_tokenizer(odd))


def test_no_answer_no_template_and_a_raising_template_are_refused_with_the_place():
    with pytest.raises(UserError, match=r"^chat.jsonl:3: no message of the assistant.*; its roles are user$"):
        supervised_text(TURNS[:1], make_tokenizer(CHATML))
    with pytest.raises(UserError, match=r"^chat.jsonl:3: the assistant's message 1 is empty, so there is nothing"):
        supervised_text([TURNS[0], {"role": "assistant", "content": " "}], make_tokenizer(CHATML))
    with pytest.raises(UserError, match=r"^chat.jsonl:3: the tokenizer has no chat template"):
        encode_chat(TURNS, make_tokenizer(None), {2}, "assistant", "chat.jsonl:3")
    strict = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"^chat.jsonl:3: .* refuses the conversation: roles must alternate"):
        encode_chat(TURNS, make_tokenizer(strict), {2}, "assistant", "chat.jsonl:3")


def test_letters_of_several_bytes_are_supervised_whole():
    turns = [{"role": "user", "content": "é"}, {"role": "assistant", "content": "日本 ü"}]
    assert supervised_text(turns, make_tokenizer(CHATML)) == ["日本 ü<|im_end|>"]
