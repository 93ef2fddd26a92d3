"""What `deltanet-generate` does: load a folder, continue a prompt, stream the text."""

import sys
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.utils import logging

from .errors import UserError, nearest

DTYPES = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str) -> torch.device:
    """`auto` is the first CUDA device if there is one. Raises UserError for a device that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
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
    logging.disable_progress_bar()
    if not (folder / "config.json").is_file():
        raise UserError(f"{model}: not a checkpoint folder (no config.json)")
    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        safe = {"use_safetensors": True, "trust_remote_code": False}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **safe)
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{model}: cannot be loaded: {error}") from error
    return loaded.to(device).eval(), tokenizer


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
        ("--temperature", temperature, temperature >= 0, "0 (greedy) or more"),
        ("--top-p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
        ("--top-k", top_k, top_k >= 0, "0 (off) or more"),
        ("--repetition-penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        ("--num-beams", num_beams, num_beams >= 1, "1 or more"),
    )
    for option, value, allowed, range_ in checks:
        if not allowed:
            raise UserError(f"{option} {value}: allowed is {range_}")
    where, kind = pick_device(device), pick_dtype(dtype)
    if prompt == "-":
        prompt = sys.stdin.read().rstrip("\n")
    language_model, tokenizer = load(model, where, kind)
    if chat:
        if not tokenizer.chat_template:
            raise UserError(f"{model}: --chat needs a chat template, and its tokenizer has none")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        if inputs["input_ids"].shape[1] == 0:
            start = language_model.config.bos_token_id
            if start is None:
                raise UserError("the prompt is empty, and the model has no token to begin with")
            inputs = {
                "input_ids": torch.tensor([[start]]),
                "attention_mask": torch.ones(1, 1, dtype=torch.long),
            }
    inputs = {key: value.to(where) for key, value in inputs.items() if key in ("input_ids", "attention_mask")}
    torch.manual_seed(seed)
    streamer = TextStreamer(tokenizer, skip_prompt=chat, skip_special_tokens=True) if num_beams == 1 else None
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    # Sampling defaults that the teacher's folder carries must not leak into a greedy run.
    language_model.generation_config.update(temperature=None, top_p=None, top_k=None)
    pad = tokenizer.pad_token_id
    with torch.inference_mode():
        tokens = language_model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            num_beams=num_beams,
            repetition_penalty=repetition_penalty,
            streamer=streamer,
            pad_token_id=pad if pad is not None else tokenizer.eos_token_id,
            **sampling,
        )
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if streamer is None:
        print(text if chat else prompt + text)
    return text
