"""`deltanet-convert --verify FOLDER`: everything about a checkpoint folder that can be checked without its teacher.

Digests, then tensors against config.json (names, shapes, dtypes, finite values, tying), the tokenizer, the card; where
nothing was found wrong the model is loaded strictly and writes a few tokens. Nothing in the folder is executed and
nothing is unpickled. Twin: tests/convert/publish/test_verify.py; damage of every kind: test_corruption.py.
"""

from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import torch

from deltanet.config import DeltaNetConfig
from deltanet_errors import DeltanetError, UserError, one_line

from ..checkpoint import Checkpoint, open_checkpoint
from ..command import load_tokenizer
from ..execute import PIECE, refuse_nonfinite
from ..families import read_config, teacher_config
from ..formats import REWRITTEN
from ..layouts import LINEAR
from ..plan import READABLE, new_tensors, teacher_tensors
from ..tokens import GENERATION, generation_settings, strangers
from .files import README
from .manifest import damage, read_manifest

PROMPT = "Once upon a time"
NEW_TOKENS = 8


class Invalid(DeltanetError):
    """A folder that did not pass; the message has a line for every problem."""


@dataclass
class Verified:
    """`problems` are one line each; `notes` are no fault. `text` is what the model wrote, if it came so far."""

    folder: Path
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_files: int = 0
    num_tensors: int = 0
    num_bytes: int = 0
    text: str | None = None

    def refuse(self, consequence: str = "") -> "Verified":
        """Itself, or Invalid where there is a problem."""
        if self.problems:
            count = f"{len(self.problems)} problem{'s' * (len(self.problems) > 1)}"
            raise Invalid("\n  ".join([f"{self.folder}: {count}{consequence}", *self.problems]))
        return self

    def describe(self) -> str:
        tried = "; it loads and generates" if self.text is not None else ""
        lines = [
            f"verified {self.folder}: {self.num_files} files by sha256; {self.num_tensors} tensors "
            f"({self.num_bytes:,} bytes) finite and as config.json says{tried}"
        ]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join([*lines, f"writes   {self.text}"] if tried else lines)


def verify(folder: str | Path) -> Verified:
    """Checks all of it, and raises UserError only where `folder` is no checkpoint folder at all."""
    folder = Path(folder)
    raw = read_config(folder)
    found = Verified(folder, damage(folder))
    if not found.problems:
        found.num_files = len(read_manifest(folder))
    config, expected = _config(folder, raw, found)
    if config is not None:
        _tensors(folder, config, expected, found)
        _tokenizer(folder, config, found)
    _card(folder, found)
    if not found.problems:
        _use(folder, raw, found)
    return found


def _config(folder: Path, raw: dict, found: Verified) -> tuple[DeltaNetConfig | SimpleNamespace | None, dict]:
    """The configuration, and name and shape of every tensor that it makes."""
    try:
        for form in REWRITTEN.values():
            if raw.get("model_type") in form.MODEL_TYPES:
                return SimpleNamespace(**raw | {"dtype": getattr(torch, raw["dtype"])}), form.shapes(raw)
        is_student = raw.get("model_type") == DeltaNetConfig.model_type
        config = DeltaNetConfig.from_pretrained(folder) if is_student else teacher_config(folder)
        expected = teacher_tensors(config)
        for layer, kind in enumerate(config.layer_types):
            if kind == LINEAR:
                expected |= {move.target: move.shape for move in new_tensors(config, layer, torch.float32)}
        return config, expected
    except UserError as error:
        found.problems.append(str(error))
    except Exception as error:  # transformers' validators raise many kinds; all of them mean a bad file
        found.problems.append(f"config.json: {one_line(error)}")
    return None, {}


def _tensors(folder: Path, config: DeltaNetConfig | SimpleNamespace, expected: dict, found: Verified) -> None:
    try:
        checkpoint = open_checkpoint(folder)
    except UserError as error:
        found.problems.append(str(error))
        return
    # Whatever a source is forgiven (a stray file, a wrong total_size) is a fault in what we wrote.
    found.problems += checkpoint.notes
    for name, shape in expected.items():
        entry = checkpoint.entries.get(name)
        if entry is None:
            found.problems.append(f"{name}: missing, though config.json needs it")
        elif entry.shape != shape:
            found.problems.append(f"{name}: is {list(entry.shape)}, but config.json makes it {list(shape)}")
    for name, entry in checkpoint.entries.items():
        if name not in expected:
            tied = " (config.json ties it to the embedding)" if name == "lm_head.weight" else ""
            found.problems.append(f"{name}: unexpected; config.json has no place for it{tied}")
        elif entry.dtype not in READABLE:
            found.problems.append(f"{name}: is {entry.dtype}, which is no dtype of weights")
        else:
            _finite(checkpoint, name, found)
    _dtypes(checkpoint, config, found)
    _format(checkpoint, found)
    found.num_tensors = len(checkpoint.entries)
    found.num_bytes = sum(entry.num_bytes for entry in checkpoint.entries.values())


def _finite(checkpoint: Checkpoint, name: str, found: Verified) -> None:
    entry = checkpoint.entries[name]
    buffer = bytearray(PIECE)
    try:
        for offset, length in checkpoint.pieces(entry, PIECE):
            checkpoint.read_into(entry, offset, memoryview(buffer)[:length])
            refuse_nonfinite(buffer, length, entry.dtype, name)
    except UserError as error:
        found.problems.append(str(error))


def _dtypes(checkpoint: Checkpoint, config: DeltaNetConfig | SimpleNamespace, found: Verified) -> None:
    sizes: dict[torch.dtype, int] = {}
    for entry in checkpoint.entries.values():
        sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.num_bytes // entry.dtype.itemsize
    main = max(sizes, key=lambda dtype: sizes[dtype], default=config.dtype)
    if config.dtype is not None and main != config.dtype:
        found.problems.append(f"config.json: dtype is {config.dtype}, but most of the weights are {main}")
    if len(sizes) > 1:
        found.notes.append(f"tensors of {len(sizes)} dtypes: {', '.join(str(dtype) for dtype in sizes)}")


def _format(checkpoint: Checkpoint, found: Verified) -> None:
    from safetensors import safe_open

    for path in dict.fromkeys(entry.file for entry in checkpoint.entries.values()):
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("format") != "pt":
                found.problems.append(f"{path.name}: its metadata lacks format: pt")


def _tokenizer(folder: Path, config: DeltaNetConfig | SimpleNamespace, found: Verified) -> None:
    try:
        tokenizer = load_tokenizer(folder)
    except UserError as error:
        found.problems.append(str(error))
        return
    if tokenizer is None:
        found.notes.append("no tokenizer")
    generation: dict = {}
    try:
        generation = generation_settings(folder)
    except UserError as error:
        found.problems.append(str(error))
    if not (folder / GENERATION).is_file():
        found.problems.append(f"{GENERATION}: missing")
    found.problems += strangers(tokenizer, config, generation)


def _card(folder: Path, found: Verified) -> None:
    if not (folder / README).is_file():
        found.notes.append(f"no {README}")
        return
    try:
        check_card((folder / README).read_text(encoding="utf-8"), README)
    except (UserError, UnicodeDecodeError) as error:
        found.problems.append(str(error))


def check_card(text: str, where: str) -> None:
    """Raises UserError where a model card's head is no YAML mapping, or none is there."""
    from huggingface_hub import ModelCard

    try:
        card = ModelCard(text)
    except Exception as error:  # PyYAML and the card's own checks raise many kinds
        raise UserError(f"{where}: its YAML head cannot be read: {one_line(error)}") from None
    if not card.data.to_dict():
        raise UserError(f"{where}: has no YAML head between two lines ---")


@torch.no_grad()
def _use(folder: Path, raw: dict, found: Verified) -> None:
    """Loads as a reader does, strictly, and continues a prompt greedily. What only runs elsewhere is not tried."""
    if raw.get("model_type") in REWRITTEN["fla"].MODEL_TYPES:
        found.notes.append("not loaded, which takes flash-linear-attention and a GPU")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()

    try:
        model = _reader(raw)(folder)
        tokenizer = load_tokenizer(folder)
        ids = torch.tensor([tokenizer(PROMPT)["input_ids"] if tokenizer else [1]])
        if not model(ids).logits.isfinite().all():
            found.problems.append("the model's logits are not finite")
        out = model.generate(ids, max_new_tokens=NEW_TOKENS, min_new_tokens=1, do_sample=False, pad_token_id=0)
        found.text = tokenizer.decode(out[0]) if tokenizer else str(out[0].tolist())
    except Exception as error:  # whatever goes wrong here, the folder cannot be used
        found.problems.append(f"does not load and generate: {one_line(error)}")


def _reader(raw: dict):
    """What loads a checkpoint folder of this config.json."""
    from transformers import AutoModelForCausalLM

    from deltanet import load_student

    from ..loading import load_teacher

    if raw.get("model_type") in REWRITTEN["qwen3_5"].MODEL_TYPES:
        return lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    return load_student if raw.get("model_type") == DeltaNetConfig.model_type else load_teacher
