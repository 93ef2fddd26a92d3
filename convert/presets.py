"""Teachers by short name: repository on the Hub, licence, and whether the repository must be asked for access.

`demo` is not here: it is the teacher this package carries (`sources.py`). `deltanet-convert --presets` prints all.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Preset:
    repository: str
    licence: str
    gated: bool = False


APACHE, LLAMA31, LLAMA32 = "Apache-2.0", "Llama 3.1 Community License", "Llama 3.2 Community License"

PRESETS = {
    "llama-1b": Preset("meta-llama/Llama-3.2-1B", LLAMA32, gated=True),
    "llama-1b-instruct": Preset("meta-llama/Llama-3.2-1B-Instruct", LLAMA32, gated=True),
    "llama-3b": Preset("meta-llama/Llama-3.2-3B", LLAMA32, gated=True),
    "llama-3b-instruct": Preset("meta-llama/Llama-3.2-3B-Instruct", LLAMA32, gated=True),
    "llama-8b": Preset("meta-llama/Llama-3.1-8B", LLAMA31, gated=True),
    "llama-8b-instruct": Preset("meta-llama/Llama-3.1-8B-Instruct", LLAMA31, gated=True),
    "mistral-7b": Preset("mistralai/Mistral-7B-v0.3", APACHE),
    "mistral-7b-instruct": Preset("mistralai/Mistral-7B-Instruct-v0.3", APACHE),
    "qwen2.5-0.5b": Preset("Qwen/Qwen2.5-0.5B", APACHE),
    "qwen2.5-0.5b-instruct": Preset("Qwen/Qwen2.5-0.5B-Instruct", APACHE),
    "qwen2.5-1.5b": Preset("Qwen/Qwen2.5-1.5B", APACHE),
    "qwen2.5-1.5b-instruct": Preset("Qwen/Qwen2.5-1.5B-Instruct", APACHE),
    "qwen2.5-3b": Preset("Qwen/Qwen2.5-3B", "Qwen Research License"),
    "qwen2.5-3b-instruct": Preset("Qwen/Qwen2.5-3B-Instruct", "Qwen Research License"),
    "qwen2.5-7b": Preset("Qwen/Qwen2.5-7B", APACHE),
    "qwen2.5-7b-instruct": Preset("Qwen/Qwen2.5-7B-Instruct", APACHE),
    "qwen3-0.6b": Preset("Qwen/Qwen3-0.6B", APACHE),
    "qwen3-1.7b": Preset("Qwen/Qwen3-1.7B", APACHE),
    "qwen3-4b": Preset("Qwen/Qwen3-4B", APACHE),
    "qwen3-8b": Preset("Qwen/Qwen3-8B", APACHE),
    "smollm2-135m": Preset("HuggingFaceTB/SmolLM2-135M", APACHE),
    "smollm2-135m-instruct": Preset("HuggingFaceTB/SmolLM2-135M-Instruct", APACHE),
    "smollm2-360m": Preset("HuggingFaceTB/SmolLM2-360M", APACHE),
    "smollm2-360m-instruct": Preset("HuggingFaceTB/SmolLM2-360M-Instruct", APACHE),
    "smollm2-1.7b": Preset("HuggingFaceTB/SmolLM2-1.7B", APACHE),
    "smollm2-1.7b-instruct": Preset("HuggingFaceTB/SmolLM2-1.7B-Instruct", APACHE),
    "smollm3-3b": Preset("HuggingFaceTB/SmolLM3-3B", APACHE),
}


def table() -> str:
    """The presets as aligned text."""
    rows = [("preset", "repository", "licence", "access")]
    rows += [
        (name, preset.repository, preset.licence, "gated: ask on its page" if preset.gated else "open")
        for name, preset in PRESETS.items()
    ]
    rows.append(("demo", "in this package", APACHE, "no download"))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths)), row[3]]) for row in rows)
