"""The embedded demo teacher (`recipes/demo`): it loads as a plain Llama, is small, and tells stories.

Its twin is `recipes/train_demo_teacher.py`, which made the folder; bounds below follow from the shipped files alone.
"""

import math
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import recipes

DEMO = Path(recipes.__file__).parent / "demo"
PAGE = (DEMO / "text.txt").read_text(encoding="utf-8")
STORIES = PAGE.strip().split("\n\n")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def losses(model, tokenizer):
    """Nats of every token of every story of the page, its end included; one vector a story."""
    nats = []
    for story in STORIES:
        ids = torch.tensor([[0, *tokenizer(story, add_special_tokens=False).input_ids, 0]])
        with torch.no_grad():
            logits = model(ids[:, :-1]).logits[0]
        nats.append((F.cross_entropy(logits, ids[0, 1:], reduction="none"), ids[0, 1:]))
    return nats


def greedy(model, tokenizer, prompt: str) -> str:
    ids = torch.tensor([[0, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    with torch.no_grad():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=80)
    return tokenizer.decode(out[0, 1:], skip_special_tokens=True)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_it_is_one_small_file_of_bfloat16():
    path = DEMO / "model.safetensors"
    assert path.stat().st_size <= 4_000_000
    with safe_open(path, "pt") as tensors:
        assert tensors.metadata() == {"format": "pt"}
        assert "lm_head.weight" not in tensors.keys()  # noqa: SIM118 (a safe_open handle is no mapping)
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118


def test_it_is_a_tied_grouped_query_llama(model, tokenizer):
    config = model.config
    assert type(model) is LlamaForCausalLM
    assert (config.num_attention_heads, config.num_key_value_heads, config.num_hidden_layers) == (6, 2, 6)
    assert config.rope_parameters["rope_type"] == "default"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert config.vocab_size == len(tokenizer) == 1024
    for holder in (config, model.generation_config, tokenizer):
        assert holder.bos_token_id == holder.eos_token_id == holder.pad_token_id == 0


@pytest.mark.parametrize("text", ['One day, Lily saw a cat.\nIt said, "Hi!"', "  two  blanks ", "naïve – 猫 🐈", ""])
def test_the_tokenizer_returns_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_the_tokenizer_is_made_for_stories(tokenizer):
    ids = tokenizer(PAGE, add_special_tokens=False).input_ids
    assert len(PAGE) / len(ids) > 3.0  # one byte a token without merges
    assert 8_000 <= len(PAGE) <= 16_000
    assert len(STORIES) >= 10


def test_context_predicts_the_page(losses):
    """Below half of the page's own unigram entropy, a bound that no model without context can reach."""
    nats, ids = (torch.cat(parts) for parts in zip(*losses))
    counts = Counter(ids.tolist())
    unigram = -sum(n / len(ids) * math.log(n / len(ids)) for n in counts.values())
    assert nats.mean().item() < 0.5 * unigram < 0.5 * math.log(1024)


def test_it_knows_where_a_story_ends(losses):
    """The end token costs far less than the 4.5 nats or so of its frequency (one in 200 tokens)."""
    ends = torch.stack([nats[-1] for nats, _ in losses])
    frequency = len(losses) / sum(len(ids) for _, ids in losses)
    assert ends.mean().item() < 0.5 * -math.log(frequency)


@pytest.mark.parametrize(
    "prompt", ["", "One day, a little dog named Max", "Once upon a time, there was a boy named Tom."]
)
def test_greedy_text_is_made_of_words_and_goes_on(model, tokenizer, prompt):
    told = words(greedy(model, tokenizer, prompt))
    known = set(words(PAGE)) | set(words(prompt))
    assert len(told) > 50
    assert sum(word in known for word in told) >= 0.95 * len(told), [word for word in told if word not in known]
    fours = list(zip(told, told[1:], told[2:], told[3:]))
    assert len(set(fours)) > 0.7 * len(fours), " ".join(told)  # a loop of a sentence would leave far fewer
