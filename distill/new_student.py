"""A student made from nothing: its configuration, its random weights and its tokenizer, as a checkpoint folder.

Twin: tests/distill/test_new_student.py.
"""

import math
from pathlib import Path

import torch

from convert.command import load_tokenizer, mixer_options
from convert.compat import DEFAULTS
from convert.layouts import FULL, LINEAR, parse_layout
from convert.staging import Staging
from convert.tokens import num_ids
from deltanet import DeltaNetConfig, DeltaNetForCausalLM
from deltanet_errors import UserError

from .evaluation.tasks.words import word_tokenizer
from .schema import Mixer, New

HALF_LIFE = 1024
"""Tokens after which a fresh gated layer has forgotten half; it learns to forget sooner where that helps."""


def plan_new(wish: New) -> tuple[DeltaNetConfig, object]:
    """(configuration, tokenizer) of the student. Raises UserError for a layout, shape or tokenizer that cannot be."""
    tokenizer = _tokenizer(wish)
    layout = parse_layout(wish.hybrid, [FULL] * wish.layers, option="student.new.hybrid")
    _check_heads(wish)
    config = DeltaNetConfig(
        vocab_size=num_ids(tokenizer),
        hidden_size=wish.hidden_size,
        intermediate_size=wish.intermediate_size or 2 * wish.hidden_size,
        num_hidden_layers=wish.layers,
        num_attention_heads=wish.heads,
        num_key_value_heads=wish.kv_heads,
        head_dim=wish.head_dim,
        max_position_embeddings=wish.max_context,
        tie_word_embeddings=wish.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        layer_types=list(layout.layer_types),
        sliding_window=layout.window,
        rope_layers=[kind != LINEAR for kind in layout.layer_types],
        **mixer_fields(wish),
        initializer_range=wish.hidden_size**-0.5,  # a matrix then keeps the size of what it reads
    )
    return config, tokenizer


def mixer_fields(wish: Mixer) -> dict:
    """The fields of DeltaNetConfig that a recipe's section of mixer options decides."""
    options = {name: getattr(wish, name, None) for name in DEFAULTS}  # student.new has no RoPE to turn back
    return mixer_options(**options, compat=getattr(wish, "compat", None))


def _tokenizer(wish: New):
    if wish.tokenizer is None:
        try:
            return word_tokenizer(wish.vocabulary)
        except UserError as error:
            raise UserError(f"student.new.vocabulary: {error}") from None
    tokenizer = load_tokenizer(Path(wish.tokenizer))
    if tokenizer is None:
        raise UserError(f"student.new.tokenizer: {wish.tokenizer} has no tokenizer (no tokenizer.json)")
    return tokenizer


def _check_heads(wish: New) -> None:
    if wish.head_dim is None and wish.hidden_size % wish.heads:
        raise UserError(f"student.new.heads: {wish.heads} do not divide hidden_size {wish.hidden_size}; say head_dim")
    if wish.heads % (wish.kv_heads or wish.heads):
        raise UserError(f"student.new.kv_heads: {wish.kv_heads} do not divide the {wish.heads} heads")
    head_dim = wish.head_dim or wish.hidden_size // wish.heads
    if head_dim % 2:
        raise UserError(f"student.new.head_dim: {head_dim} is odd; RoPE turns pairs of numbers, so make it even")


def new_model(config: DeltaNetConfig, seed: int) -> DeltaNetForCausalLM:
    """A model of random weights, float32, which follow from the seed. Every block adds nothing at the start.

    Embeddings have entries of size width^-1/2 and the outputs of fresh blocks of about 1, so that after one block no
    layer could tell which token it stands on: two layers of attention then stayed at guessing on MQAR for 2,000 steps,
    which they learn in 300 like this (docs/results/tasks.md).
    """
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        model = DeltaNetForCausalLM(config)
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
        if hasattr(block.self_attn, "a_proj"):
            torch.nn.init.constant_(block.self_attn.a_proj.bias, math.log(math.expm1(math.log(2) / HALF_LIFE)))
    return model


def write_new(wish: New, folder: Path) -> None:
    """Writes the student of `plan_new` and `new_model` to `folder`, whole or not at all."""
    config, tokenizer = plan_new(wish)
    model = new_model(config, wish.seed)
    with Staging(folder, overwrite=True) as staging:
        model.save_pretrained(staging.folder)
        tokenizer.save_pretrained(staging.folder)
        staging.commit()
