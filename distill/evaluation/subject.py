"""A model to be measured, with what its measurements need to know. Twin: tests/distill/evaluation/test_subject.py."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from convert.command import load_tokenizer
from convert.sources import open_source
from convert.tokens import num_ids
from deltanet import DeltaNetConfig
from deltanet.config import max_context
from deltanet.generate import load_model, pick_device, pick_dtype
from deltanet_errors import UserError


@dataclass(frozen=True)
class Reader:
    """What texts are read with, before there is a model: as much of a Subject."""

    tokenizer: PreTrainedTokenizerBase
    max_context: int
    known_ids: int


@dataclass(frozen=True)
class Subject:
    """A student or a plain transformer, in evaluation mode on `device`.

    name is what the user called it; max_context is the longest text, in tokens, that its positions allow.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    dtype: torch.dtype
    max_context: int

    @property
    def is_student(self) -> bool:
        """Whether it is a model of ours with at least one layer on the delta rule."""
        config = self.model.config
        return isinstance(config, DeltaNetConfig) and "linear_attention" in config.layer_types

    @property
    def known_ids(self) -> int:
        """How many ids the model has an embedding for."""
        return self.model.config.get_text_config().vocab_size

    @property
    def vocab_size(self) -> int:
        """How many ids both the tokenizer and the model know; rows of the head beyond are padding."""
        return min(self.known_ids, num_ids(self.tokenizer))


def check_ids(reader: Reader | Subject, highest: int, where: str) -> None:
    """Raises UserError, headed by `where`, for an id that the model has no embedding for."""
    if highest >= reader.known_ids:
        raise UserError(
            f"{where}: the tokenizer makes the id {highest}, but the model has {reader.known_ids} tokens: this is not "
            "the model's tokenizer"
        )


def load_subject(path: str | Path, *, device: str = "auto", dtype: str = "auto") -> Subject:
    """The model in `path`: a checkpoint folder, or whatever else `deltanet-convert` takes as its source.

    device `auto` is the first CUDA device, else the CPU; dtype `auto` is the checkpoint's own on CUDA and float32 on
    a CPU, where lower precision saves no time and blurs comparisons. Raises UserError for a folder that is missing, is
    no checkpoint, has no tokenizer, or whose tensors do not fit its configuration or make no numbers.
    """
    where, kind = pick_device(device), pick_dtype(dtype)
    if kind == "auto" and where.type == "cpu":
        kind = torch.float32
    with open_source(str(path)) as source:
        tokenizer = load_tokenizer(source.folder)
        if tokenizer is None:
            raise UserError(f"{path}: has no tokenizer (no tokenizer.json), so no text can be read")
        model = load_model(source.folder, kind, str(path))
    model = model.to(where).eval().requires_grad_(False)
    _check_numbers(model, str(path))
    return Subject(str(path), model, tokenizer, where, model.dtype, max_context(model.config.get_text_config()))


@torch.no_grad()
def _check_numbers(model: PreTrainedModel, path: str) -> None:
    """Raises UserError where the logits are NaN: every likeliest token and every choice would be the first one."""
    logits = model(torch.zeros(1, 1, dtype=torch.int64, device=model.device), use_cache=False).logits
    if logits.isnan().any():
        raise UserError(
            f"{path}: its logits are NaN in {model.dtype}, so nothing can be measured; are its weights whole?"
        )
