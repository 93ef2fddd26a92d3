"""The plan of a conversion: for every source tensor what becomes of it, and every new tensor with its first value.

Pure data. `--dry-run` prints it, `execute.py` streams it to files, `loading.py` carries it out in memory: one path.
New tensors start neutral, so that a plain copy reads its state as the delta rule gives it: see `new_tensors`, whose
twin is `DeltaMixer.reset_to_plain_copy`. Tests: tests/convert/test_plan.py.
"""

import math
import re
from dataclasses import dataclass, field

import torch

from deltanet.config import DeltaNetConfig
from deltanet.mixer import PLAIN_HALF_LIFE
from deltanet_errors import UserError

from .checkpoint import Checkpoint
from .layouts import LINEAR, Layout

WEIGHT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
READABLE = (*WEIGHT_DTYPES.values(), torch.float64)
# Buffers that older checkpoints store and nobody reads.
BUFFERS = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)|.*\.self_attn\.(masked_bias|bias)")
PLAIN_DECAY_BIAS = math.log(math.expm1(math.log(2) / PLAIN_HALF_LIFE))


@dataclass(frozen=True)
class Move:
    """One tensor of the student.

    operation: `copy` (the source's bytes), `cast` (to `dtype`), or `new` (every value is `fill`, except the last
    column where `last_column` says otherwise).
    """

    target: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    operation: str
    source: str | None = None
    fill: float = 0.0
    last_column: float | None = None

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self) -> torch.Tensor:
        """The first value of a `new` tensor."""
        return torch.frombuffer(bytearray(self.value_bytes()), dtype=self.dtype).reshape(self.shape)

    def value_bytes(self) -> bytes:
        """The same as bytes, made without torch's threads, which would wait busily beside a streaming writer."""
        last = self.fill if self.last_column is None else self.last_column
        one, other = (bytes(torch.tensor([x], dtype=self.dtype).view(torch.uint8).tolist()) for x in (self.fill, last))
        columns = self.shape[-1]
        return (one * (columns - 1) + other) * (math.prod(self.shape) // columns)

    def describe(self) -> str:
        if self.operation != "new":
            return self.operation
        rest = f", last column {self.last_column:g}" if self.last_column is not None else ""
        return f"new, {self.fill:g}{rest}"


@dataclass
class Plan:
    """config: the student's. moves: in file order. dropped: source tensor -> why. notes: what the user should know."""

    config: DeltaNetConfig
    moves: list[Move]
    dropped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(move.num_bytes for move in self.moves)

    def count(self, operation: str) -> int:
        return sum(move.operation == operation for move in self.moves)


def teacher_tensors(config: DeltaNetConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a student with this configuration has from its teacher, in the model's
    order. Of a teacher's own configuration, all that it has."""
    hidden, inner = config.hidden_size, config.intermediate_size
    width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    projections = (
        ("self_attn.q_proj", (width, hidden), config.qkv_bias),
        ("self_attn.k_proj", (kv_width, hidden), config.qkv_bias),
        ("self_attn.v_proj", (kv_width, hidden), config.qkv_bias),
        ("self_attn.o_proj", (hidden, width), config.o_bias),
        ("mlp.gate_proj", (inner, hidden), config.mlp_bias),
        ("mlp.up_proj", (inner, hidden), config.mlp_bias),
        ("mlp.down_proj", (hidden, inner), config.mlp_bias),
    )
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if config.qk_norm == "head":
        norms |= {"self_attn.q_norm": config.head_dim, "self_attn.k_norm": config.head_dim}
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name, shape, has_bias in projections:
            shapes[f"{prefix}.{name}.weight"] = shape
            if has_bias:
                shapes[f"{prefix}.{name}.bias"] = shape[:1]
        for name, size in norms.items():
            if f"{prefix}.{name}.weight" not in unused_norms(config):
                shapes[f"{prefix}.{name}.weight"] = (size,)
    shapes["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    return shapes


def unused_norms(config: DeltaNetConfig) -> set[str]:
    """Names of the teacher's q/k norms that the student's linear layers do without."""
    if config.qk_norm == "none" or config.linear_qk_norm:
        return set()
    linear = [index for index, kind in enumerate(config.layer_types) if kind == LINEAR]
    return {f"model.layers.{layer}.self_attn.{name}.weight" for layer in linear for name in ("q_norm", "k_norm")}


def new_tensors(config: DeltaNetConfig, layer: int, dtype: torch.dtype) -> list[Move]:
    """What a linear layer has and no teacher: feature maps that change nothing (weights 0), beta one half, half-life
    16 tokens, read gate 1, taps 0 (with a local window that 1 and the read gate 0), convolution `first_tap` times the
    identity, output gate's projection 0, output bias 0."""
    hidden, heads, states = config.hidden_size, config.num_attention_heads, config.num_state_heads
    width, kv_width = heads * config.head_dim, config.num_key_value_heads * config.head_dim
    moves: list[Move] = []

    def add(name: str, shape: tuple[int, ...], fill: float = 0.0, last_column: float | None = None) -> None:
        target = f"model.layers.{layer}.self_attn.{name}"
        moves.append(Move(target, shape, dtype, "new", None, fill, last_column))

    def add_linear(name: str, rows: int, bias: float | None = 0.0) -> None:
        add(f"{name}.weight", (rows, hidden))
        if bias is not None:
            add(f"{name}.bias", (rows,), bias)

    if config.feature_map == "linear":
        add("q_map.weight", (heads, config.head_dim, config.head_dim))
        add("k_map.weight", (states, config.head_dim, config.head_dim))
    add_linear("b_proj", states, 0.0 if config.beta_bias else None)
    if config.mixer == "gated_delta":
        add_linear("a_proj", states, PLAIN_DECAY_BIAS)
    if config.read_gate:
        add_linear("read_proj", heads, config.first_read)
    if config.skip_taps:
        add_linear("skip_proj", heads * config.skip_taps)
    if config.local_window:
        add_linear("local_proj", heads, 1.0)
    if config.mixer_bias and not config.o_bias:
        add("o_proj.bias", (hidden,))
    if config.conv_kernel:
        for name, channels in (("q_conv", width), ("k_conv", kv_width), ("v_conv", kv_width)):
            add(f"{name}.weight", (channels, config.conv_kernel), 0.0, config.first_tap)
    if config.output_gate:
        add("g_proj.weight", (width, hidden))
    if config.head_norm:
        add("head_norm.weight", (config.head_dim,), 1.0)
    return moves


def student_config(teacher: DeltaNetConfig, layout: Layout, *, linear_rope: bool = True, **mixer) -> DeltaNetConfig:
    """The teacher's configuration with the layout's layers and the mixer's settings (fields of DeltaNetConfig).
    Without `linear_rope` q and k of linear layers are not rotated.

    `exact_start` is on unless said otherwise, but not where nothing else scales what is read than the output
    projection, which would then scale the first token's value too.
    """
    settings = teacher.to_dict()
    for key in ("model_type", "transformers_version", "architectures"):
        settings.pop(key, None)
    settings |= {"layer_types": list(layout.layer_types), "sliding_window": layout.window}
    settings["exact_start"] = bool(mixer.get("read_gate", True) or mixer.get("skip_taps", True))
    if not linear_rope:
        rotated = teacher.rope_layers or [True] * teacher.num_hidden_layers
        settings["rope_layers"] = [was and kind != LINEAR for was, kind in zip(rotated, layout.layer_types)]
    settings |= mixer
    config = DeltaNetConfig(**settings)
    config.architectures = ["DeltaNetForCausalLM"]
    return config


def make_plan(checkpoint: Checkpoint, config: DeltaNetConfig, dtype: torch.dtype | None = None) -> Plan:
    """Accounts for every tensor of the source. `dtype` None keeps each tensor's own.

    A tied head that the file stores all the same is dropped when its bytes are the embedding's; otherwise the two
    are untied, as transformers does. Where the file has the head alone, it is the embedding too. Raises UserError
    naming missing, extra, wrongly shaped or unreadable tensors.
    """
    plan = Plan(config, [], notes=list(checkpoint.notes))
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if config.tie_word_embeddings and {head, embedding} <= checkpoint.entries.keys():
        if _same_bytes(checkpoint, head, embedding):
            plan.dropped[head] = "equals the embedding it is tied to"
        else:
            config.tie_word_embeddings = False
            plan.notes.append(f"{head} differs from {embedding}, so the two are not tied, whatever config.json says")
    expected = teacher_tensors(config)
    sources = {name: name for name in expected}
    if config.tie_word_embeddings and head in checkpoint.entries and embedding not in checkpoint.entries:
        sources[embedding] = head
    _check_names(checkpoint, sources, plan)
    main = dtype or _main_dtype(checkpoint, sources)
    linear = {index for index, kind in enumerate(config.layer_types) if kind == LINEAR}
    done: set[int] = set()
    for name, shape in expected.items():
        layer = int(name.split(".")[2]) if name.startswith("model.layers.") else None
        if layer in linear - done:
            plan.moves += new_tensors(config, layer, main)
            done.add(layer)
        source = sources[name]
        entry = checkpoint.entries[source]
        if entry.shape != shape:
            raise UserError(
                f"{entry.file}: {source} is {list(entry.shape)}, but {checkpoint.folder / 'config.json'} "
                f"makes it {list(shape)}"
            )
        if entry.dtype not in READABLE:
            raise UserError(f"{entry.file}: {source} is {entry.dtype}; allowed: float32, bfloat16, float16, float64")
        target = dtype or entry.dtype
        plan.moves.append(Move(name, shape, target, "copy" if target == entry.dtype else "cast", source))
    config.dtype = main
    return plan


def _check_names(checkpoint: Checkpoint, sources: dict[str, str], plan: Plan) -> None:
    missing = [source for source in sources.values() if source not in checkpoint.entries]
    if missing:
        raise UserError(f"{checkpoint.folder}: {_some(missing)} missing, though config.json needs it")
    extra, known, unused = [], set(sources.values()), unused_norms(plan.config)
    for name in checkpoint.entries:
        if name in known or name in plan.dropped:
            continue
        if name in unused:
            plan.dropped[name] = "linear layers of this student have no q/k norm"
        elif BUFFERS.fullmatch(name):
            plan.dropped[name] = "a buffer that is computed, not learnt"
        else:
            extra.append(name)
    if extra:
        entry = checkpoint.entries[extra[0]]
        raise UserError(f"{entry.file}: {_some(extra)} unexpected: config.json has no place for it")


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more are" if len(names) > 1 else " is")


def _same_bytes(checkpoint: Checkpoint, one: str, other: str) -> bool:
    a, b = checkpoint.entries[one], checkpoint.entries[other]
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    for offset, length in checkpoint.pieces(a, 1 << 24):
        left, right = bytearray(length), bytearray(length)
        checkpoint.read_into(a, offset, memoryview(left))
        checkpoint.read_into(b, offset, memoryview(right))
        if left != right:
            return False
    return True


def _main_dtype(checkpoint: Checkpoint, sources: dict[str, str]) -> torch.dtype:
    """The dtype most of the weights' bytes have."""
    weights: dict[torch.dtype, int] = {}
    for source in sources.values():
        entry = checkpoint.entries[source]
        weights[entry.dtype] = weights.get(entry.dtype, 0) + math.prod(entry.shape)
    return max(weights, key=lambda dtype: weights[dtype])
