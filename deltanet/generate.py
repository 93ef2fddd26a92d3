"""What `deltanet-generate` does: load a folder, continue a prompt, stream the text."""

import sys
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TextStreamer,
)
from transformers.utils import logging

from deltanet_errors import UserError, nearest, one_line

from .bounds import refuse_misfits, refuse_oversized
from .config import max_context

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# Of one of these a tokenizer is read.
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise UserError(f"--device {name}: allowed: auto, cpu, cuda, cuda:N")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; allowed: auto, cpu, cuda, cuda:N") from None
    return device


def pick_dtype(name: str) -> torch.dtype | str:
    if name not in DTYPES:
        raise UserError(f"--dtype {name}: allowed are {', '.join(DTYPES)}{nearest(name, list(DTYPES))}")
    return DTYPES[name]


def load(model: str, device: torch.device, dtype: torch.dtype | str):
    """(model, tokenizer) of a checkpoint folder, student or plain transformer. Raises UserError if it is neither."""
    folder = Path(model)
    if not (folder / "config.json").is_file():
        raise UserError(f"{model}: not a checkpoint folder (no config.json)")
    loaded = load_model(folder, dtype, model)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        raise UserError(f"{model}: has no tokenizer (none of {', '.join(TOKENIZERS)})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{model}: unreadable tokenizer: {one_line(error)}") from error
    return loaded.to(device).eval(), tokenizer


def load_model(folder: Path, dtype: torch.dtype | str, name: str):
    """The model in `folder`, loaded strictly and as data. Raises UserError about `name` where its files do not make
    it whole."""
    logging.disable_progress_bar()
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' readers raise many kinds; all of them mean a bad file
        raise UserError(f"{name}: cannot be loaded: {one_line(error)}") from error
    try:
        refuse_oversized(lambda: AutoModelForCausalLM.from_config(config), folder)
        loaded, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **safe
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{name}: cannot be loaded: {one_line(error)}") from error
    refuse_misfits(info, name)
    return loaded


def generate(
    model: str,
    prompt: str,
    *,
    chat: bool = False,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    repetition_penalty: float = 1.0,
    num_beams: int = 1,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
) -> str:
    """Prints the prompt and what follows as it is made, and returns what follows.

    Raises UserError for options out of range, a folder that is no checkpoint, or a missing chat template.
    """
    checks = (
        ("--max-new-tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
        ("--temperature", temperature, temperature == 0 or 1e-4 <= temperature <= 1e4, "0 (greedy), or .0001 to 10000"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("--top-k", top_k, top_k >= 0, "0 (off) or more"),
        ("--top-p", top_p, temperature or top_p == 1, "1 where nothing is sampled; give a --temperature too"),
        ("--top-k", top_k, temperature or top_k == 0, "0 where nothing is sampled; give a --temperature too"),
        ("--repetition-penalty", repetition_penalty, 1e-2 <= repetition_penalty <= 1e2, ".01 to 100"),
        ("--num-beams", num_beams, num_beams >= 1, "1 or more"),
    )
    for option, value, allowed, range_ in checks:
        if not allowed:
            raise UserError(f"{option} {value}: allowed is {range_}")
    where, kind = pick_device(device), pick_dtype(dtype)
    prompt = _read(prompt)
    language_model, tokenizer = load(model, where, kind)
    inputs = _encode(tokenizer, prompt, chat, model, language_model.config.get_text_config())
    inputs = {key: value.to(where) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if num_beams == 1 else None
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    # Of what the folder says about generation, where a text ends counts; how it is sampled is said here.
    ends = language_model.generation_config.eos_token_id
    language_model.generation_config = GenerationConfig(eos_token_id=ends)
    pad = tokenizer.pad_token_id
    with torch.inference_mode():
        tokens = language_model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            streamer=streamer,
            logits_processor=LogitsProcessorList([_Finite(model)]),
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
            **sampling,
        )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if streamer is None:
        print(text if chat else prompt + text)
    return text


class _Finite(LogitsProcessor):
    """Stops at the first token whose scores are no numbers, of which the likeliest would be taken without a word."""

    def __init__(self, model: str):
        self.model = model

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise UserError(f"{self.model}: the model's logits are not numbers; deltanet-convert --verify may say why")
        return scores


def _read(prompt: str) -> str:
    """The prompt, or for `-` what standard input says. Raises UserError where that is no text."""
    try:
        if prompt == "-":
            if sys.stdin is None:
                raise UserError("prompt -: standard input is closed")
            prompt = sys.stdin.read().rstrip("\n")
        prompt.encode("utf-8")
    except UnicodeError as error:
        raise UserError(f"the prompt is not UTF-8: {one_line(error)}") from None
    except OSError as error:
        raise UserError(f"prompt -: standard input cannot be read: {error.strerror}") from None
    return prompt


def _encode(tokenizer, prompt: str, chat: bool, model: str, config) -> dict:
    """input_ids and attention_mask of one row. Raises UserError where there is nothing to continue, or `model`'s
    tokenizer does not fit its vocabulary."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{model}: --chat needs a chat template, and its tokenizer has none")
        messages = [{"role": "user", "content": prompt}]
        try:
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # a template is a program, and fails in every way that programs do
            raise UserError(f"{model}: the chat template fails: {one_line(error)}") from None
    else:
        inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    if inputs["input_ids"].shape[1] == 0:
        if config.bos_token_id not in range(config.vocab_size):
            raise UserError("the prompt is empty, and the model has no token to begin with")
        inputs = {
            "input_ids": torch.tensor([[config.bos_token_id]]),
            "attention_mask": torch.ones(1, 1, dtype=torch.long),
        }
    highest, length, most = int(inputs["input_ids"].max()), inputs["input_ids"].shape[1], max_context(config)
    if highest >= config.vocab_size:
        raise UserError(f"{model}: its tokenizer gives token {highest}, but the model has {config.vocab_size}")
    if length > most:
        print(f"note: the prompt has {length:,} tokens; the model is made for {most:,}", file=sys.stderr)
    return inputs
