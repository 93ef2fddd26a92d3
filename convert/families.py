"""What differs between the source families, as data, and the student's configuration made from a teacher's.

A family is a row of `FAMILIES`. Where a field of the row is a string, it names the field of the teacher's config that
decides. transformers' own config class of the family supplies every default a `config.json` leaves out.
Anything that would change the arithmetic and is not in the row is refused by name (`_refuse`). Twin: test_families.py.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig

from deltanet.config import MOST_LAYERS, DeltaNetConfig, refuse_rotary, refuse_sizes
from deltanet_errors import UserError, nearest, one_line


@dataclass(frozen=True)
class Family:
    """`sliding`: where the config has a window, layers see it: those that its `layer_types` names, or else all."""

    qkv_bias: bool | str = False
    o_bias: bool | str = False
    mlp_bias: bool | str = False
    qk_norm: str = "none"
    sliding: bool = False
    rope_layers: str | None = None


FAMILIES = {
    "llama": Family(qkv_bias="attention_bias", o_bias="attention_bias", mlp_bias="mlp_bias"),
    "mistral": Family(sliding=True),
    "qwen2": Family(qkv_bias=True, sliding=True),
    "qwen3": Family(qkv_bias="attention_bias", o_bias="attention_bias", qk_norm="head", sliding=True),
    "smollm3": Family(
        qkv_bias="attention_bias",
        o_bias="attention_bias",
        mlp_bias="mlp_bias",
        sliding=True,
        rope_layers="no_rope_layers",
    ),
}

DTYPES = ["float32", "bfloat16", "float16", "float64"]
ROPE_TYPES = ("default", "linear", "llama3", "yarn")

# Why families that people ask for do not work: what their arithmetic has and the decoder has not.
REASONS = {
    "granite": "scalar multipliers on embeddings, attention, residuals and logits",
    "phi3": "fused projections and longrope",
    "olmo2": "norms after the sub-layers and over the whole width",
    "olmo3": "norms after the sub-layers and over the whole width",
    "gemma": "scaled embeddings and (1 + w) norms",
    "gemma2": "soft caps, four norms per layer and scaled embeddings",
    "gemma3": "four norms per layer and two rotary bases",
    "gemma3_text": "four norms per layer and two rotary bases",
    "mixtral": "mixtures of experts",
    "qwen2_moe": "mixtures of experts",
    "qwen3_moe": "mixtures of experts",
    "gpt2": "learned positions and layer norms with bias",
}

# Keys of other families whose presence changes the arithmetic, with the values that do not.
NEUTRAL = {
    "attention_multiplier": (None,),
    "attn_logit_softcapping": (None, 0, 0.0),
    "embedding_multiplier": (None, 1, 1.0),
    "final_logit_softcapping": (None, 0, 0.0),
    "is_causal": (None, True),
    "logit_scale": (None, 1, 1.0),
    "logits_scaling": (None, 1, 1.0),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "partial_rotary_factor": (None, 1, 1.0),
    "per_layer_config": (None, {}),
    "query_pre_attn_scalar": (None,),
    "residual_multiplier": (None, 1, 1.0),
}

COPIED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "attention_dropout",
)


def read_config(folder: Path) -> dict:
    """config.json of a checkpoint folder as it is written. Raises UserError where there is none to read."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: not a checkpoint (no config.json)")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: unreadable: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: holds a {type(raw).__name__}, not an object")
    layers = raw.get("num_hidden_layers", 0)
    if type(layers) is not int or not 0 <= layers <= MOST_LAYERS:
        raise UserError(f"{path}: num_hidden_layers is {repr(layers)[:40]}; allowed: 1 to {MOST_LAYERS:,}")
    return raw


def teacher_config(folder: Path) -> DeltaNetConfig:
    """The teacher in `folder` as our own decoder: every layer as the teacher has it, none linear.

    Raises UserError for a family, a rotary scaling or a setting whose arithmetic the decoder does not have.
    """
    raw = read_config(folder)
    where = folder / "config.json"
    _refuse(raw, where)
    family = FAMILIES[raw["model_type"]]
    try:
        source = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise many kinds; all of them mean a bad file
        raise UserError(f"{where}: transformers refuses it: {one_line(error)}") from None
    layers = source.num_hidden_layers
    window = getattr(source, "sliding_window", None)
    layer_types = ["full_attention"] * layers
    if window and family.sliding:
        layer_types = list(getattr(source, "layer_types", None) or ["sliding_attention"] * layers)
    if not window and "sliding_attention" in (getattr(source, "layer_types", None) or ()):
        raise UserError(f"{where}: layer_types has sliding_attention, but no sliding_window is set")
    rope_layers = None
    if family.rope_layers is not None:
        rope_layers = [bool(rotated) for rotated in getattr(source, family.rope_layers)[:layers]]
        if len(rope_layers) < layers:
            raise UserError(f"{where}: {family.rope_layers} has {len(rope_layers)} entries for {layers} layers")
        rope_layers = None if all(rope_layers) else rope_layers

    def flag(value: bool | str) -> bool:
        return bool(getattr(source, value)) if isinstance(value, str) else value

    settings = {
        "head_dim": getattr(source, "head_dim", None) or source.hidden_size // source.num_attention_heads,
        "rope_parameters": _rope(raw, source, where),
        "qkv_bias": flag(family.qkv_bias),
        "o_bias": flag(family.o_bias),
        "mlp_bias": flag(family.mlp_bias),
        "qk_norm": family.qk_norm,
        "sliding_window": window if "sliding_attention" in layer_types else None,
        "layer_types": layer_types,
        "rope_layers": rope_layers,
        "source_model_type": raw["model_type"],
        "dtype": source.dtype,
    }
    try:
        return DeltaNetConfig(**{field: getattr(source, field) for field in COPIED}, **settings)
    except Exception as error:  # its validators are transformers' too
        raise UserError(f"{where}: {one_line(error)}") from None


def _refuse(raw: dict, where: Path) -> None:
    kind = raw.get("model_type")
    if kind == DeltaNetConfig.model_type:
        raise UserError(f"{where}: this is a student already; convert the teacher it was made from")
    if not isinstance(kind, str) or kind not in FAMILIES:
        reason = f" (not supported: {REASONS[kind]})" if isinstance(kind, str) and kind in REASONS else ""
        guess = nearest(kind, list(FAMILIES)) if isinstance(kind, str) and not reason else ""
        raise UserError(
            f"{where}: model_type {kind!r} cannot be converted{reason}; these can: {', '.join(FAMILIES)}{guess}"
        )
    architectures = raw.get("architectures") or []
    for name in architectures if isinstance(architectures, list) else [architectures]:
        if not isinstance(name, str) or not name.endswith("ForCausalLM"):
            raise UserError(f"{where}: architectures has {name!r}; only ...ForCausalLM models can be converted")
    method = raw.get("quantization_config")
    if method:
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise UserError(
            f"{where}: the weights are quantised ({name}); convert the float32, bfloat16 or float16 original"
        )
    refuse_sizes(raw, f"{where}: ")
    allowed = ["full_attention"] + ["sliding_attention"] * FAMILIES[kind].sliding
    layer_types = raw.get("layer_types") or []
    for layer_type in layer_types if isinstance(layer_types, list) else [layer_types]:
        if layer_type not in allowed:
            raise UserError(f"{where}: layer_types has {layer_type!r}; allowed for {kind}: {', '.join(allowed)}")
    dtype = raw.get("dtype", raw.get("torch_dtype"))
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"{where}: dtype is {dtype!r}; allowed: {', '.join(DTYPES)}{nearest(str(dtype), DTYPES)}")
    for key, neutral in NEUTRAL.items():
        if raw.get(key) not in neutral:
            raise UserError(
                f"{where}: {key} is {raw[key]!r}, which the student's decoder does not compute; "
                f"a {kind} checkpoint has none"
            )


def _rope(raw: dict, source, where: Path) -> dict:
    """The rotary settings, wherever this generation of config.json keeps them. Never a silent default base."""
    written = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(written, dict) or any(isinstance(value, dict) for value in written.values()):
        raise UserError(f"{where}: rotary settings per layer type are not supported: {written!r}")
    kind = written.get("rope_type", written.get("type", "default"))
    source.standardize_rope_params()  # as transformers does once more before it computes frequencies: now it finds all
    rope = {key: value for key, value in source.rope_parameters.items() if key != "type"}
    for name in (kind, rope.get("rope_type")):
        if name not in ROPE_TYPES:
            raise UserError(
                f"{where}: rope_type {name!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
                f"{nearest(str(name), list(ROPE_TYPES))}"
            )
    if rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UserError(f"{where}: partial_rotary_factor {rope['partial_rotary_factor']!r} is not supported")
    refuse_rotary(rope, f"{where}: ")
    for place in (raw, raw.get("rope_scaling"), raw.get("rope_parameters")):
        for key in ("rope_theta", "rope_type"):
            stated = (place or {}).get(key)
            if stated is not None and stated != rope.get(key):
                raise UserError(f"{where}: {key} is {stated!r}, but transformers reads {rope.get(key)!r}; say one only")
    return rope
