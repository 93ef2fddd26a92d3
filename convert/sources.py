"""SOURCE, whatever it names, as a local checkpoint folder: a folder, a .gguf file, a preset, `demo` or a Hub id.

A folder with a config.json comes before a preset of the same name. Downloads go to the Hub's own cache; a .gguf file
is dequantised into a temporary folder. Twin: tests/convert/test_sources.py.
"""

import contextlib
import importlib.resources
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deltanet.bounds import refuse_misfits
from deltanet_errors import DeltanetError, UserError, nearest, one_line

from .gguf_rotary import FREQUENCIES, gguf_rotary
from .links import refuse_links_out
from .presets import PRESETS
from .publish.hub_errors import may_pass, reason, repeated

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
COMPANIONS = (
    "*.model",
    "*.tiktoken",
    "added_tokens.json",
    "additional_chat_templates/*",
    "chat_template*",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer*",
    "vocab.*",
    "COPYING*",
    "LICENCE*",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# Tokens that end a document or a turn in the families we read; a .gguf file names only one of them as its end.
ENDS = ("<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "</s>")


@dataclass(frozen=True)
class Source:
    """`folder` holds the checkpoint; `name` is what the user asked for; `origin` says where it came from."""

    folder: Path
    name: str
    origin: str
    revision: str | None = None
    licence: str | None = None


@contextlib.contextmanager
def open_source(name: str, revision: str | None = None, allow_pickle: bool = False) -> Iterator[Source]:
    """The folder behind `name`, for as long as the `with` block runs.

    Raises UserError where nothing is called so, a file of a folder is a link out of it, access is missing or the
    machine is offline; the message says what to do.
    """
    if not name:
        raise UserError("'': the name of a model is empty; give a folder, a .gguf file, a preset or a Hub id")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error}") from None
    if revision is not None and (path.exists() or name == "demo"):
        raise UserError(f"--revision {revision}: only a Hub repository has revisions, and {name} is local")
    if (path / "config.json").is_file():
        refuse_links_out(path, ("config.json", *WEIGHTS, *COMPANIONS, *PICKLES))
        yield Source(path, name, "folder")
    elif name == "demo":
        yield Source(_demo(), name, "embedded", licence="Apache-2.0")
    elif name in PRESETS:
        preset = PRESETS[name]
        folder, commit = _download(preset.repository, revision, allow_pickle, preset.gated)
        yield Source(folder, preset.repository, "hub", commit, preset.licence)
    elif path.is_dir():
        raise UserError(f"{name}: not a checkpoint (no config.json)")
    elif path.is_file() and path.suffix == ".gguf":
        with tempfile.TemporaryDirectory(prefix="deltanet-gguf-") as folder:
            _dequantise(path, Path(folder))
            yield Source(Path(folder), name, "gguf")
    elif path.is_file():
        raise UserError(f"{name}: a file, but not a .gguf; SOURCE is a folder, a .gguf file, a preset or a Hub id")
    elif HUB_ID.fullmatch(name) and not name.endswith(".gguf"):
        folder, commit = _download(name, revision, allow_pickle, gated=False)
        yield Source(folder, name, "hub", commit)
    else:
        raise UserError(
            f"{name}: no such folder, and no preset{nearest(name, ['demo', *PRESETS])}; "
            "presets: demo, " + ", ".join(PRESETS)
        )


def _demo() -> Path:
    try:
        folder = importlib.resources.files("recipes") / "demo"
    except ModuleNotFoundError:
        folder = None
    if not isinstance(folder, Path) or not (folder / "config.json").is_file():
        raise DeltanetError("demo: this installation does not carry the embedded teacher; give a folder or a Hub id")
    return folder


def _download(repository: str, revision: str | None, allow_pickle: bool, gated: bool) -> tuple[Path, str]:
    """(folder in the Hub's cache, commit hash)."""
    from huggingface_hub import errors, snapshot_download

    patterns = [*WEIGHTS, *COMPANIONS, "config.json", "README.md", *(PICKLES if allow_pickle else ())]
    page = f"https://huggingface.co/{repository}"
    at = f" at revision {revision}" if revision else ""
    try:
        folder = Path(repeated(lambda: snapshot_download(repository, revision=revision, allow_patterns=patterns)))
    except errors.GatedRepoError:
        raise UserError(
            f"{repository}: gated; ask for access on {page}, then log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(
            f"--revision {revision}: {repository} has no such branch, tag or commit; see {page}/tree/main"
        ) from None
    except errors.RepositoryNotFoundError:
        hint = "; it is gated: ask for access there first" if gated else ""
        raise UserError(
            f"{repository}: no such repository on the Hub, or a private one; check {page}{hint}, "
            "and log in with `hf auth login` or set HF_TOKEN"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"{repository}: not a repository name: {error}") from None
    except ValueError as error:
        raise UserError(f"{repository}{at}: the repository is refused: {one_line(error)}") from None
    except Exception as error:  # the HTTP library's own errors too
        if not (may_pass(error) or isinstance(error, OSError)):
            raise
        why = reason(error) if may_pass(error) else one_line(error)
        raise UserError(
            f"{repository}{at}: no folder here, not in the local cache, and the Hub cannot be reached ({why}); go "
            f"online, or download it elsewhere with `hf download {repository}` and give the folder"
        ) from None
    return folder, folder.name


def _dequantise(path: Path, folder: Path) -> None:
    """Writes the model of a .gguf file as a checkpoint folder, in the file's own dtype, or bfloat16 if quantised."""
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError(f"{path}: reading .gguf files needs an extra: pip install 'deltanet[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        reader = gguf.GGUFReader(path)
        stored = {tensor.tensor_type.name for tensor in reader.tensors if len(tensor.shape) > 1}
        plain = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        dtype = plain.get(next(iter(stored)), torch.bfloat16) if len(stored) == 1 else torch.bfloat16
        model, info = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        model.config.rope_parameters = model.config.rope_parameters | gguf_rotary(reader, model.config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # the readers raise many kinds for a damaged or unknown file
        raise UserError(f"{path}: cannot be read as gguf: {one_line(error)}") from None
    refuse_misfits(info, str(path))
    found = sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name != FREQUENCIES)
    if found != (made := sum(parameter.numel() for parameter in model.parameters())):
        raise UserError(f"{path}: its tensors have {found:,} numbers, but transformers makes {made:,} of them")
    # What loading leaves behind claims that the weights are still quantised; save_pretrained refuses that.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for attribute in ("hf_quantizer", "quantization_method", "is_quantized"):
        if hasattr(model, attribute):
            setattr(model, attribute, None)
    model = model.to(dtype)
    model.config.dtype = dtype
    vocabulary = tokenizer.get_vocab()
    named = model.config.eos_token_id
    ends = [*(named if isinstance(named, list) else [named]), *(vocabulary.get(token) for token in ENDS)]
    model.generation_config.eos_token_id = list(dict.fromkeys(token for token in ends if token is not None))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
