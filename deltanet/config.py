"""The configuration of a student: a Llama-family decoder, which mixer each layer has, and what that mixer is.

A family's peculiarities are flags here, never subclasses (`convert/families.py` holds them as data).
A teacher is the same decoder with no `linear_attention` layer. The model that reads this is `modeling.py`.
"""

import math
import sys

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from deltanet_errors import UserError, nearest, one_line

FORMAT_VERSION = 1
MOST_LAYERS = 10_000
"""More than any model has; lists with an entry per layer are made before a tensor is looked at."""
LAYER_TYPES = ("linear_attention", "full_attention", "sliding_attention")
WIDEST = 4096
"""Tokens of a local window that are always allowed; more only of a model with as many positions, since every layer's
cache has room for all of them."""
MIXERS = ("gated_delta", "delta")
STATE_HEADS = ("shared", "expanded")
FEATURE_MAPS = ("none", "linear")
STATE_POSITIONS = ("rotary", "fixed")
SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
ROTARY = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
ROTARY_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow")
ROTARY_ANY = ("mscale", "mscale_all_dim")


def refuse_sizes(settings: dict, where: str) -> None:
    """Raises UserError for the first size that is no whole number from 1 on; None stands for a default."""
    for key in SIZES:
        value = settings.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise UserError(f"{where}{key} is {value!r}; allowed: 1 or more")


def refuse_rotary(settings: dict, where: str) -> None:
    """Raises UserError for the first rotary setting whose value makes no frequencies."""
    for key in (*ROTARY, *ROTARY_OPTIONAL):
        value = settings.get(key)
        if key not in settings or (value is None and key in ROTARY_OPTIONAL):
            continue
        low = 1 if key == "rope_theta" else 0
        if type(value) not in (int, float) or not low < value < math.inf:
            raise UserError(f"{where}{key} is {value!r}; allowed: a number above {low}")
    for key in ROTARY_ANY:
        value = settings.get(key)
        if value is not None and (type(value) not in (int, float) or not abs(value) < math.inf):
            raise UserError(f"{where}{key} is {value!r}; allowed: a number")
    low, high = settings.get("low_freq_factor", 0), settings.get("high_freq_factor", math.inf)
    if low >= high:
        raise UserError(f"{where}low_freq_factor is {low!r}; allowed: less than high_freq_factor ({high!r})")


def max_context(config: PreTrainedConfig) -> int:
    """Tokens of the longest text that the positions of a decoder, ours or another, allow; of one that tells none, any.
    Of two kinds of RoPE max_position_embeddings may be what the factor is yet to stretch."""
    longest = getattr(config, "max_position_embeddings", sys.maxsize)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("linear", "yarn"):
        longest = max(longest, int(rope["factor"] * (rope.get("original_max_position_embeddings") or longest)))
    return longest


@strict
class DeltaNetConfig(PreTrainedConfig):
    """Args beyond the usual Llama ones:

    layer_types: per layer `linear_attention` (the delta rule), `full_attention` or `sliding_attention`.
    rope_layers: per layer, whether q and k are rotated (SmolLM3 has layers without); None means all.
    qkv_bias, o_bias, mlp_bias: which projections of *attention* layers and MLPs carry a bias.
    qk_norm: `head` for an RMS norm over head_dim of q and k before RoPE (Qwen3), else `none`.
    mixer: `gated_delta` (input-dependent decay) or `delta` (none).
    state_heads: one state per key/value head (`shared`) or one per query head (`expanded`).
    state_positions: a state reads and writes q and k as RoPE turned them (`rotary`), or as if every token that it holds
        stood as far back as the local window reaches (`fixed`).
    feature_map: `linear` for a learned map per head of the q and k that read and write the state, else `none`.
    beta_max: the write strength lies in (0, beta_max); 1 or 2.
    skip_taps: how many tokens of v (this one and the ones before) bypass the state; 0 switches it off.
    read_gate: a scalar per head, linear in the input, multiplies what is read from the state.
    local_window: to how many last tokens, and the document's first, a linear layer attends as well; a token is written
        into the state as it leaves them. 0 switches it off.
    mixer_bias: the linear mixer's output projection has a bias.
    conv_kernel: a causal depthwise convolution over q, k and v, identity at the start; 0 switches it off.
    qkv_activation: `silu` after the convolution (if any) on q, k and v of linear layers, else `none`.
    linear_qk_norm: linear layers too have the norms of `qk_norm`.
    beta_bias: the write strength's projection has a bias.
    output_gate: a gate per channel on what is read; 1 at the start if it is a sigmoid.
    gate_activation: of the output gate; `sigmoid` (times 2) or `silu`.
    head_norm: an RMS norm per head on head_dim^-1/2 times what the mixer reads, before the output gate.
    exact_start: the first token of a document passes its own value, as softmax attention over one token does.
    format_version: layout of the checkpoint; a newer one than this code knows is refused.
    """

    model_type = "deltanet_hybrid"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = "none"
    attention_dropout: float | int = 0.0
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    rope_layers: list[bool] | None = None

    mixer: str = "gated_delta"
    state_heads: str = "expanded"
    state_positions: str = "rotary"
    feature_map: str = "none"
    beta_max: float | int = 1.0
    skip_taps: int = 4
    read_gate: bool = True
    local_window: int = 0
    mixer_bias: bool = True
    conv_kernel: int = 0
    qkv_activation: str = "none"
    linear_qk_norm: bool = True
    beta_bias: bool = True
    output_gate: bool = False
    gate_activation: str = "sigmoid"
    head_norm: bool = False
    exact_start: bool = False

    source_model_type: str | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        refuse_sizes(vars(self), "config.")
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if not 0 <= self.num_hidden_layers <= MOST_LAYERS:
            raise UserError(f"config.num_hidden_layers is {self.num_hidden_layers}; allowed: up to {MOST_LAYERS:,}")
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] * self.num_hidden_layers
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """As transformers' own; an error names the folder."""
        try:
            return super().from_pretrained(path, **kwargs)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As transformers' own; a value of a wrong type is a UserError too."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except StrictDataclassError as error:
            raise UserError(f"config: {one_line(error)}") from None

    def check(self) -> None:
        """Raises UserError naming the first field whose value is not allowed."""
        for field, allowed in (
            ("mixer", MIXERS),
            ("state_heads", STATE_HEADS),
            ("state_positions", STATE_POSITIONS),
            ("feature_map", FEATURE_MAPS),
            ("qk_norm", ("none", "head")),
            ("qkv_activation", ("none", "silu")),
            ("gate_activation", ("sigmoid", "silu")),
            ("beta_max", (1, 2)),
        ):
            if getattr(self, field) not in allowed:
                raise UserError(f"config.{field} is {getattr(self, field)!r}; allowed: {', '.join(map(str, allowed))}")
        if self.format_version > FORMAT_VERSION:
            raise UserError(
                f"config.format_version is {self.format_version}; this version of deltanet reads up to {FORMAT_VERSION}"
            )
        for index, kind in enumerate(self.layer_types):
            if kind not in LAYER_TYPES:
                raise UserError(f"config.layer_types[{index}] is {kind!r}; allowed: {', '.join(LAYER_TYPES)}")
        for field in ("layer_types", "rope_layers"):
            value = getattr(self, field)
            if value is not None and len(value) != self.num_hidden_layers:
                raise UserError(f"config.{field} has {len(value)} entries for {self.num_hidden_layers} layers")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UserError(
                f"config.num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if "sliding_attention" in self.layer_types and not self.sliding_window:
            raise UserError("config.layer_types has sliding_attention, but config.sliding_window is not set")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(f"config.sliding_window is {self.sliding_window}; allowed: 1 or more")
        if not 0 <= self.rms_norm_eps < math.inf:
            raise UserError(f"config.rms_norm_eps is {self.rms_norm_eps}; allowed: 0 or more")
        if not 0 <= self.attention_dropout < 1:
            raise UserError(f"config.attention_dropout is {self.attention_dropout}; allowed: 0 to less than 1")
        refuse_rotary(self.rope_parameters or {}, "config.rope_parameters: ")
        self._check_activation()
        for field in ("skip_taps", "conv_kernel", "local_window"):
            if getattr(self, field) < 0:
                raise UserError(f"config.{field} is {getattr(self, field)}; allowed: 0 (off) or more")
        widest = max(WIDEST, self.max_position_embeddings)
        if self.local_window > widest:
            raise UserError(f"config.local_window is {self.local_window}; allowed: up to {widest:,}")
        if self.local_window and not self.read_gate:
            raise UserError(f"config.local_window is {self.local_window}, but config.read_gate is off; it needs one")
        if 0 < self.local_window < self.skip_taps:
            raise UserError(
                f"config.local_window is {self.local_window}; allowed: 0 (off), or from skip_taps ({self.skip_taps}) on"
            )

    def _check_activation(self) -> None:
        from transformers.activations import ACT2FN

        if self.hidden_act not in ACT2FN:
            guess = nearest(self.hidden_act, list(ACT2FN))
            raise UserError(f"config.hidden_act is {self.hidden_act!r}; allowed: an activation of transformers{guess}")

    @property
    def first_tap(self) -> float:
        """The convolution's weight of the current token at the start. SiLU is nearly linear where its input is small,
        and what follows it (the norms of q, k and of what is read) does not mind the scale."""
        return 1.0 if self.qkv_activation == "none" else 0.1

    @property
    def first_read(self) -> float:
        """The read gate in a plain copy: nothing is read beside a local window, which is part of the teacher's
        attention as it stands."""
        return 0.0 if self.local_window else 1.0

    @property
    def mixer_in_words(self) -> str:
        """What the linear layers are, such as "gated_delta, shared states, fixed positions, a window of 256"."""
        parts = [self.mixer, f"{self.state_heads} states"]
        parts += [f"{self.state_positions} positions"] if self.state_positions != "rotary" else []
        parts += [f"{self.feature_map} feature maps"] if self.feature_map != "none" else []
        parts += [f"a window of {self.local_window}"] if self.local_window else []
        return ", ".join(parts)

    @property
    def num_state_heads(self) -> int:
        """How many delta-rule states a linear layer keeps."""
        return self.num_key_value_heads if self.state_heads == "shared" else self.num_attention_heads
