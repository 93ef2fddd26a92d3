"""The decoder of teachers and students: Attention or DeltaMixer in every block, by `config.layer_types`.

One class serves the whole Llama family; what differs is flags of the configuration. Norms, MLP, RoPE, masks and caches
are transformers' own. Read `mixer.py` for the linear layer. Twin tests: tests/deltanet/test_modeling*.py.
"""

import inspect
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import LinearAttentionLayer
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
    eager_attention_forward,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.import_utils import is_tracing
from transformers.utils.output_capturing import capture_outputs

from deltanet_errors import UserError

from .bounds import refuse_misfits, refuse_oversized, weights_folder
from .config import DeltaNetConfig
from .mixer import DeltaMixer
from .packed_attention import packed_attention
from .projections import Convolution, FeatureMap, Neutral
from .rollback import StateLayer

# transformers 5.24 renamed the argument and the output field from `past_key_values` to `cache`.
CACHE = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"


def _seen_tokens(cache, layer_idx: int = 0) -> int:
    return getattr(cache, "seen_tokens", 0)


def _padding(mask: torch.Tensor | None, tokens: int) -> torch.Tensor | None:
    """(B, T), 0 where one of these tokens is padding; None where none is and no row begins behind padding alone.
    transformers' own takes no single token for padding, but a prompt may be run in pieces; so does this one where the
    graph of decoding is recorded."""
    if mask is None or mask.ndim != 2:
        return None
    before, now = mask[:, :-tokens].bool(), mask[:, -tokens:]
    if tokens == 1 if is_tracing(mask) else now.bool().all() and (not before.shape[1] or before.any(1).all()):
        return None
    return now.contiguous()


class Counting:
    """What a cache needs for linear layers, which by themselves neither count tokens nor take them back: it counts what
    `DeltaNetModel.forward` has run (`seen_tokens`), and its linear layers can `crop` (rollback.py)."""

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)
        seen = _seen_tokens(self)
        self.seen_tokens = min(seen, tokens_to_remove) if tokens_to_remove > 0 else seen + tokens_to_remove

    def reset(self) -> None:
        super().reset()
        self.seen_tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        if any(hasattr(layer, "keys") for layer in self.layers):
            return super().get_seq_length(layer_idx)
        return _seen_tokens(self)


class CountingDynamicCache(Counting, DynamicCache):
    """The caches of transformers that are used, by a name under which they can be stored."""


class CountingStaticCache(Counting, StaticCache):
    pass


COUNTING = {DynamicCache: CountingDynamicCache, StaticCache: CountingStaticCache}


def _teach(cache, config: DeltaNetConfig) -> None:
    """Makes transformers' cache one that counts. One that was made without a configuration gets its layers here."""
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    for layer in cache.layers:
        if type(layer) is LinearAttentionLayer:
            layer.__class__ = StateLayer
    kind = type(cache)
    if not issubclass(kind, Counting):
        if kind not in COUNTING:
            COUNTING[kind] = type(f"Counting{kind.__name__}", (Counting, kind), {})
        cache.__class__ = COUNTING[kind]


class Attention(nn.Module):
    """Softmax attention, full or in a sliding window, with grouped key/value heads."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling, self.is_causal = self.head_dim**-0.5, True
        self.sliding_window = config.sliding_window if config.layer_types[layer_idx] == "sliding_attention" else None
        width, kv_width = (
            config.num_attention_heads * self.head_dim,
            config.num_key_value_heads * self.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.o_bias)
        if config.qk_norm == "head":
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache=None,
        cu_seqlens: torch.Tensor | None = None,
        longest: int | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        shape = hidden_states.shape[:-1]
        q, k, v = (
            projection(hidden_states).view(*shape, -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        if longest is not None:
            out = packed_attention(q, k, v, cu_seqlens, longest, scale=self.scaling, window=self.sliding_window)
            return self.o_proj(out.reshape(*shape, -1)), None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(out.reshape(*shape, -1).contiguous()), weights


class Block(GradientCheckpointingLayer):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.layer_type = config.layer_types[layer_idx]
        mixer = DeltaMixer if self.layer_type == "linear_attention" else Attention
        self.self_attn = mixer(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: torch.Tensor, **kwargs) -> torch.Tensor:
        mixed, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + mixed
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class DeltaNetPreTrainedModel(PreTrainedModel):
    config: DeltaNetConfig
    config_class = DeltaNetConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # transformers refuses assisted generation where this is set. Before it could record a cache's past, it should.
    _is_stateful = not hasattr(LinearAttentionLayer, "activate_past_recording")
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (Neutral, FeatureMap, Convolution)):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    @classmethod
    def from_pretrained(cls, path, *args, **kwargs):
        """As transformers' own, but strict: a missing, unexpected or wrongly shaped tensor is a UserError. Pickled
        weights are not read."""
        kwargs.setdefault("use_safetensors", True)
        folder = weights_folder(path, kwargs)
        refuse_oversized(lambda: cls(kwargs.get("config") or cls.config_class.from_pretrained(folder)), folder)
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["ignore_mismatched_sizes"] = True  # so that they reach `info`, and the message below
        model, info = super().from_pretrained(path, *args, output_loading_info=True, **kwargs)
        refuse_misfits(info, str(path))
        return (model, info) if wants_info else model


class DeltaNetModel(DeltaNetPreTrainedModel):
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        padding = config.pad_token_id
        has_padding = padding is not None and 0 <= padding < config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, padding if has_padding else None)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: torch.Tensor | None = None,
        longest: int | None = None,
        past_key_values=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, T) or inputs_embeds (B, T, D); attention_mask (B, past + T) with 0 at padding; columns behind
        those, as for a cache that is yet to be filled, say nothing.

        cu_seqlens (N + 1,) int32: B = 1 holds N packed documents, which do not see each other. longest: tokens of the
        longest of them, for a caller who knows; else the device is asked, which waits for all it has to do.
        cache and past_key_values are two names of the same argument.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = past_key_values if cache is None else cache
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, tokens = inputs_embeds.shape[:2]
        if cu_seqlens is not None and (batch != 1 or cache is not None or attention_mask is not None):
            raise ValueError("cu_seqlens needs batch 1, no cache and no attention_mask")
        use_cache = use_cache and cu_seqlens is None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cu_seqlens is None and cache is None and attention_mask is None and position_ids is not None:
            cu_seqlens = self._documents(position_ids, tokens)
        seen = _seen_tokens(cache) + tokens
        self._refuse_mask(attention_mask, seen)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, :seen]
        if position_ids is None:
            position_ids = self._positions(batch, tokens, attention_mask, cache, cu_seqlens, inputs_embeds.device)
        if cache is not None:
            _teach(cache, self.config)
            cache.seen_tokens = seen

        masks = attention_mask
        if cu_seqlens is not None and self.config._attn_implementation == "sdpa" and not self.config.attention_dropout:
            # No mask, which would be as large as the square of the row. The bound is a power of two, so that compiled
            # code sees few different ones.
            longest = int(cu_seqlens.diff().max()) if longest is None else longest
            masks, longest = dict.fromkeys(self.config.layer_types), 1 << longest.bit_length()
        else:
            longest = None
            if not isinstance(masks, dict):
                masks = self._masks(inputs_embeds, attention_mask, position_ids, cache)
        hidden_states = inputs_embeds
        rotations = self.rotary_emb(hidden_states, position_ids=position_ids)
        for index, block in enumerate(self.layers):
            rotated = self.config.rope_layers is None or self.config.rope_layers[index]
            hidden_states = block(
                hidden_states,
                position_embeddings=rotations if rotated else None,
                attention_mask=masks[block.layer_type],
                cache=cache,
                cu_seqlens=cu_seqlens,
                longest=longest,
                **kwargs,
            )
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), **{CACHE: cache})

    def _refuse_mask(self, mask, seen: int) -> None:
        """Raises ValueError for a mask that linear layers cannot follow, or that says nothing of some of the tokens."""
        if not isinstance(mask, torch.Tensor):
            return
        if mask.ndim != 2 and "linear_attention" in self.config.layer_types:
            raise ValueError(
                f"attention_mask has {mask.ndim} dimensions, but linear layers know padding only; give (batch, tokens)"
            )
        if mask.ndim == 2 and mask.shape[1] < seen:
            raise ValueError(
                f"attention_mask has {mask.shape[1]} columns for {seen} tokens, those in the cache included"
            )

    def _documents(self, position_ids: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """cu_seqlens of the documents that positions tell, as attention layers see them; None where there is one."""
        if "linear_attention" not in self.config.layer_types:
            return None
        starts = position_ids.diff(dim=-1) != 1
        if not starts.any():
            return None
        if len(position_ids) > 1:
            raise ValueError("position_ids restart within a row; packed documents go in as one row, or with a mask")
        inner = starts[0].nonzero()[:, 0] + 1
        return F.pad(F.pad(inner, (1, 0)), (0, 1), value=tokens).to(torch.int32)

    @staticmethod
    def _positions(batch, tokens, attention_mask, cache, cu_seqlens, device) -> torch.Tensor:
        """(1 or B, T): counts real tokens, restarts at each packed document, goes on where the cache ends."""
        if cu_seqlens is not None:
            token = torch.arange(tokens, device=device)
            document = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)
            return (token - cu_seqlens[document]).unsqueeze(0)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        return torch.arange(tokens, device=device).unsqueeze(0) + _seen_tokens(cache)

    def _masks(self, inputs_embeds, attention_mask, position_ids, cache) -> dict:
        """One mask per kind of layer. transformers tells packed documents by positions that restart."""
        arguments = {
            "config": self.config,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            CACHE: cache,
        }
        makers = {
            "full_attention": lambda: create_causal_mask(**arguments),
            "sliding_attention": lambda: create_sliding_window_causal_mask(**arguments),
            "linear_attention": lambda: _padding(attention_mask, inputs_embeds.shape[1]),
        }
        return {kind: makers[kind]() for kind in set(self.config.layer_types)}


class DeltaNetForCausalLM(DeltaNetPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: DeltaNetConfig):
        super().__init__(config)
        self.model = DeltaNetModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        prepared = super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache, mask = model_kwargs.get(CACHE), model_kwargs.get("attention_mask")
        if cache is not None:
            _teach(cache, self.config)
        # transformers leaves out a mask of ones, and keeps its length.
        given = getattr(generation_config, "_mask_length", None) if mask is None else mask.shape[1]
        if given and given <= (seen := _seen_tokens(cache)):
            raise UserError(f"the cache holds {seen} tokens, and the prompt has {given}: none is left to be run")
        return prepared

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        """Of a whole conversation given again with its cache, only what the cache has not seen is run.
        transformers does so itself, but not for a cache of linear layers alone."""
        seen, mask, given = _seen_tokens(kwargs.get(CACHE)), kwargs.get("attention_mask"), input_ids.shape[1]
        whole = mask is None or (isinstance(mask, torch.Tensor) and mask.shape[1] == given)
        if next_sequence_length is None and whole and 0 < seen < given:
            next_sequence_length = given - seen
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | dict | None = None,
        position_ids: torch.LongTensor | None = None,
        cache=None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        cu_seqlens: torch.Tensor | None = None,
        past_key_values=None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """As `DeltaNetModel.forward`; labels (B, T) with -100 where nothing is to be learnt; logits (B, T, vocabulary).
        Of packed documents the first token of each is never a target."""
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache if cache is not None else past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            if cu_seqlens is not None:
                starts = cu_seqlens[:-1][cu_seqlens[:-1] < cu_seqlens[1:]].long()
                labels = labels.index_fill(1, starts, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            **{CACHE: outputs.get(CACHE)},
        )


def load_student(path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu"):
    """The model in folder `path`, in its own dtype unless one is given, in evaluation mode.

    Raises UserError where the folder is not a deltanet checkpoint or its tensors do not fit the configuration.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"{path}: not a checkpoint folder (no config.json)")
    model = DeltaNetForCausalLM.from_pretrained(path, dtype=dtype or "auto")
    return model.to(device).eval()
