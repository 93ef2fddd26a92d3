"""DeltaMixer, the layer that stands where softmax attention stood.

    q, k, v = projections of x as the teacher's (biases, q/k-norm, RoPE); what reads and writes the state is turned as
        if all that it holds stood W tokens back if `state_positions` is `fixed`, goes through a learned map per head if
        `feature_map` is `linear`, and is then of unit length
    beta = beta_max * sigmoid(b(x))       g = -softplus(a(x))  (`gated_delta`; 0 for `delta`)
    S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T            z_t = S_t^T q_t
    y_t = W_o [ read_h(x_t) z_t  +  sum_j skip_{h,j}(x_t) v_{t-j}  +  local_h(x_t) a_t ] + bias

`read`, `skip` and `local` are one scalar per query head (and tap), linear in x; 1 and 0 in a plain copy, or 0, 0 and 1
where a_t is there, the teacher's attention within `local_window` W tokens (local_attention.py). A token is then written
into the state as it leaves the window, so z_t = S_{t-W}^T q_t: what is in the window is not read twice, and a text no
longer than that not at all (measured: docs/results/students.md). Query head h of key/value head h // group reads state
h // group (`shared`) or h (`expanded`). The operation is `deltanet.ops`.
With `exact_start` the first token of a document makes y_0 = W_o v_0 + bias, which is what softmax over one token makes.

Shapes: B batch, T tokens, D hidden size, HQ query heads, KV key/value heads, hd head size, J taps.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from deltanet_errors import UserError

from .config import DeltaNetConfig
from .history import History
from .local_attention import first_of, forgotten, has_past, local_attention, remembered
from .ops import delta_rule, delta_rule_step_
from .projections import LONGEST_STEP, Convolution, FeatureMap, Neutral
from .rollback import CAPACITY

PLAIN_HALF_LIFE = 16
"""Tokens after which an uncalibrated gated layer has forgotten half. On real teachers a plain copy that forgets
starts 5 to 20 times closer than one that does not (measured: docs/results/calibration.md)."""


def _aligned(memories: list[torch.Tensor]) -> torch.Tensor:
    """(N, C, L) side by side along C in the first one's dtype, the shorter ones filled up in front."""
    if len(memories) == 1:
        return memories[0]
    reach = max(m.shape[2] for m in memories)
    return torch.cat([F.pad(m.to(memories[0].dtype), (reach - m.shape[2], 0)) for m in memories], 1)


def _tokens(piece: slice, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if x is None else x[:, piece] for x in tensors]


def _strengths(beta: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor:
    """(B, T, heads or twice as many), for a `History`; zeros in it neither write nor forget."""
    return beta if g is None else torch.cat([beta, g], -1)


class DeltaMixer(nn.Module):
    def __init__(self, config: DeltaNetConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.head_dim = config, layer_idx, config.head_dim
        # The same fields, without what transformers runs at every access: ten a layer, which decoding feels.
        self.settings = SimpleNamespace(**vars(config))
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.group = self.num_heads // self.num_kv_heads
        hidden, state_heads = config.hidden_size, config.num_state_heads
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(hidden, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, hidden, bias=config.o_bias or config.mixer_bias)
        self.norms_qk = config.qk_norm == "head" and config.linear_qk_norm
        if self.norms_qk:
            self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        if config.feature_map == "linear":
            self.q_map = FeatureMap(self.num_heads, self.head_dim)
            self.k_map = FeatureMap(state_heads, self.head_dim)
        self.b_proj = Neutral(hidden, state_heads, bias=config.beta_bias)
        if config.mixer == "gated_delta":
            self.a_proj = Neutral(hidden, state_heads, math.log(math.expm1(math.log(2) / PLAIN_HALF_LIFE)))
        if config.read_gate:
            self.read_proj = Neutral(hidden, self.num_heads, config.first_read)
        if config.skip_taps:
            self.skip_proj = Neutral(hidden, self.num_heads * config.skip_taps)
        if config.local_window:
            self.local_proj = Neutral(hidden, self.num_heads, 1.0)
        if config.conv_kernel:
            self.q_conv = Convolution(width, config.conv_kernel, config.first_tap)
            self.k_conv = Convolution(kv_width, config.conv_kernel, config.first_tap)
            self.v_conv = Convolution(kv_width, config.conv_kernel, config.first_tap)
        if config.output_gate:
            self.g_proj = Neutral(hidden, width, bias=False)
        if config.head_norm:
            # As if what is read came divided by the root of head_dim.
            self.head_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps * self.head_dim)
        self.conv_reach = max(config.conv_kernel - 1, 0)
        self.skip_reach = max(config.skip_taps - 1, 0)

    def reset_to_plain_copy(self) -> None:
        """Puts every parameter that no teacher has at its neutral value."""
        for module in self.children():
            if isinstance(module, (Neutral, FeatureMap, Convolution)):
                module.reset_parameters()
        if self.config.head_norm:
            nn.init.ones_(self.head_norm.weight)
        if self.config.mixer_bias and not self.config.o_bias:
            nn.init.zeros_(self.o_proj.bias)

    def project(
        self,
        x: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
        past: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, History | None]:
        """x (B, T, D) -> q (B, T, HQ, hd), k, v (B, T, KV, hd), not yet of unit length, and the history of what the
        convolution read, or None without one. `past` is the convolution's memory (N, channels, conv_kernel - 1)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        history = None
        if self.settings.conv_kernel:
            history = History(torch.cat([q, k, v], -1), self.conv_reach, past, cu_seqlens)
            first, second = q.shape[-1], q.shape[-1] + k.shape[-1]
            q = self.q_conv(history, slice(0, first))
            k = self.k_conv(history, slice(first, second))
            v = self.v_conv(history, slice(second, None))
        if self.settings.qkv_activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k, v = (y.view(*y.shape[:2], -1, self.head_dim) for y in (q, k, v))
        if self.norms_qk:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings, unsqueeze_dim=2)
        return q.to(v.dtype), k.to(v.dtype), v, history  # under autocast norms and rotations give float32

    def strengths(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """beta and log decay g of every state head, (B, T, state heads) in float32; g is None without a gate."""
        beta = torch.sigmoid(self.b_proj(x).float())
        if self.settings.beta_max != 1:
            beta = self.settings.beta_max * beta
        g = -F.softplus(self.a_proj(x).float()) if self.settings.mixer == "gated_delta" else None
        return beta, g

    def expand(self, y: torch.Tensor) -> torch.Tensor:
        """(B, T, KV, hd) -> one row per state head: head h gets key/value head h // group."""
        return y.repeat_interleave(self.group, dim=2) if self.settings.state_heads == "expanded" else y

    def features(
        self, q: torch.Tensor, k: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q (B, T, HQ, hd) as it reads a state, and k (B, T, KV, hd) as it is written, a row per state head.

        With `fixed` positions both are turned back by as much as the token that reads is turned, with which k has left
        the window: what was written stands that far back for all that read it later, at any distance. (ReRoPE turns
        far keys so for softmax: github.com/bojone/rerope.)"""
        if self.settings.state_positions == "fixed" and position_embeddings is not None:
            cos, sin = position_embeddings
            turned = apply_rotary_pos_emb(q, k, cos, -sin, unsqueeze_dim=2)
            q, k = (y.to(q.dtype) for y in turned)
        k = self.expand(k)
        return (self.q_map(q), self.k_map(k)) if self.settings.feature_map == "linear" else (q, k)

    def read(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None = None,
        state: torch.Tensor | None = None,
        return_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """z (B, T, HQ, hd), what the query heads read from the states, and the final state if asked for. q and k are
        `features` (B, T, HQ, hd) and (B, T, state heads, hd), v (B, T, KV, hd) is as projected."""
        return delta_rule(
            q,
            k,
            self.expand(v),
            beta,
            g=g,
            scale=1.0,
            initial_state=state,
            output_final_state=return_state,
            cu_seqlens=cu_seqlens,
            normalize_qk=True,
        )

    def read_texts(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        beta: torch.Tensor,
        g: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> torch.Tensor:
        """z (B, T, HQ, hd) of whole texts, behind the local window if there is one; q, k and v are as projected."""
        k, *others = self.written(k, v, beta, g)
        return self.read(*self.features(q, k, position_embeddings), *others)[0]

    def written(
        self, k: torch.Tensor, v: torch.Tensor, beta: torch.Tensor, g: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """k, v, beta and g of whole texts at the tokens at which states take them in: those of the tokens that leave
        the local window, if there is one."""
        if reach := self.settings.local_window:
            return self._leaving(History(remembered(k, v), reach), History(_strengths(beta, g), reach))
        return k, v, beta, g

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What the teacher's attention makes of whole texts within the local window, (B, T, HQ, hd)."""
        recent = History(remembered(k, v), self.settings.local_window)
        return local_attention(q, recent, first_of(recent))

    def combine(
        self, x: torch.Tensor, z: torch.Tensor, skipped: History, local: torch.Tensor | None = None
    ) -> torch.Tensor:
        """What o_proj multiplies, (B, T, HQ * hd), from x (B, T, D), z (B, T, HQ, hd), the history of v and, with a
        local window, what its attention makes (B, T, HQ, hd)."""
        batch, tokens = x.shape[:2]
        o = z
        if self.settings.read_gate:
            o = o * self.read_proj(x)[..., None]
        if local is not None:
            o = o + local * self.local_proj(x)[..., None]
        if self.settings.skip_taps:
            taps = self.skip_proj(x).view(batch, tokens, self.num_kv_heads, self.group, -1)
            o = o.reshape(batch, tokens, self.num_kv_heads, self.group, self.head_dim)
            if tokens <= LONGEST_STEP and skipped.cu_seqlens is None:  # one product in place of two passes a tap
                window = skipped.windows().view(batch, tokens, self.num_kv_heads, self.head_dim, -1)
                o = o + taps.flip(-1) @ window.mT
            else:
                for j in range(self.settings.skip_taps):
                    v_j = skipped.back(j).view(batch, tokens, self.num_kv_heads, 1, self.head_dim)
                    o = o + taps[..., j, None] * v_j
            o = o.reshape(batch, tokens, self.num_heads, self.head_dim)
        if self.settings.head_norm:
            o = self.head_norm(o)
        o = o.reshape(batch, tokens, -1)
        if self.settings.output_gate:
            gate = self.g_proj(x)
            o = o * (F.silu(gate) if self.settings.gate_activation == "silu" else 2 * torch.sigmoid(gate))
        return o

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | None = None,
        cache=None,
        cu_seqlens: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """hidden_states (B, T, D); attention_mask (B, T), 0 where a token is padding and must leave no trace.

        Padded rows are run as packed documents, so padding anywhere is an exact no-op.
        """
        if attention_mask is None:
            return self._mix(hidden_states, position_embeddings, cache, cu_seqlens), None
        batch, tokens, width = hidden_states.shape
        real = attention_mask.bool().flatten()
        kept = real.nonzero().squeeze(1)
        if not len(kept):
            return torch.zeros_like(hidden_states), None
        lengths = attention_mask.bool().sum(1)
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)
        if position_embeddings is not None:
            position_embeddings = tuple(
                p.expand(batch, -1, -1).reshape(1, batch * tokens, -1)[:, kept] for p in position_embeddings
            )
        packed = self._mix(
            hidden_states.reshape(1, batch * tokens, width)[:, kept], position_embeddings, cache, cu_seqlens
        )
        out = hidden_states.new_zeros(batch * tokens, width, dtype=packed.dtype)
        return out.index_copy(0, kept, packed[0]).view(batch, tokens, width), None

    def _mix(self, x, position_embeddings, cache, cu_seqlens) -> torch.Tensor:
        layer = cache.layers[self.layer_idx] if cache is not None else None
        conv_past, skip_past, local_past, strengths_past = self._pasts(layer)
        q, k, v, convolved = self.project(x, position_embeddings, conv_past, cu_seqlens)
        skipped = History(v.flatten(2), self.skip_reach, skip_past, cu_seqlens)
        beta, g = self.strengths(x)
        local, kept, strengths = None, skipped, None
        if reach := self.settings.local_window:
            kept = History(remembered(k, v), reach, local_past, cu_seqlens)
            strengths = History(_strengths(beta, g), reach, strengths_past, cu_seqlens)
            local = local_attention(q, kept, self._first_vectors(layer, kept))
        is_first = self._first_tokens(layer, kept) if self.settings.exact_start else None
        left, *others = (k, v, beta, g) if strengths is None else self._leaving(kept, strengths)
        features = self.features(q, left, position_embeddings)
        histories = [h for h in (convolved, kept, strengths) if h is not None and h.reach]
        if getattr(layer, "record_past", False):
            z = self._recorded(layer, *features, *others, cu_seqlens, histories)
        else:
            z = self._advanced(layer, *features, *others, cu_seqlens)
        o = self.combine(x, z.to(x.dtype), skipped, local)
        if is_first is not None:
            o = torch.where(is_first[..., None], v.repeat_interleave(self.group, dim=2).flatten(2), o)
        if layer is not None:
            if histories:  # only now, since `skipped` may look back into the cache's own tensor
                self._store(layer, "conv_states", _aligned([h.latest() for h in histories]))
            layer.has_previous_state[0] = True
            layer.device = x.device
        return self.o_proj(o)

    def _leaving(self, recent: History, strengths: History) -> tuple[torch.Tensor | None, ...]:
        """k, v, beta and g of the tokens that have just left the local window; zeros where it is not full yet."""
        k, v = forgotten(recent, self.num_kv_heads)
        beta = strengths.back(strengths.reach)
        return k, v, *(beta.chunk(2, -1) if self.settings.mixer == "gated_delta" else (beta, None))

    def _pasts(self, layer) -> tuple[torch.Tensor | None, ...]:
        """The memories of the convolution, the taps, the local window and the strengths in it; None of those that are
        not there.

        One tensor holds them all, each right-aligned. The window's begins with the values, which the taps read."""
        memory = layer.conv_states[0] if layer is not None else None
        if memory is None:
            return None, None, None, None
        conv_channels = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim if self.conv_reach else 0
        width, window = self.num_kv_heads * self.head_dim, self.settings.local_window
        behind = conv_channels + 2 * width + 1

        def part(channels: slice, reach: int) -> torch.Tensor | None:
            return memory[:, channels, memory.shape[2] - reach :] if reach else None

        return (
            part(slice(conv_channels), self.conv_reach),
            part(slice(conv_channels, conv_channels + width), self.skip_reach),
            part(slice(conv_channels, behind), window),
            part(slice(behind, None), window),
        )

    @staticmethod
    def _first_vectors(layer, recent: History) -> torch.Tensor:
        """(N, channels), what `local_attention` wants of every document's first token; the cache keeps it."""
        if layer is None:
            return first_of(recent)
        if not layer.has_previous_state[0]:
            layer.keep_first(first_of(recent))
        elif recent.cu_seqlens is not None:  # rows of which nothing but padding was seen may begin now
            layer.keep_first(torch.where(has_past(recent)[:, None], layer.first, first_of(recent)))
        return layer.first

    def _first_tokens(self, layer, history: History) -> torch.Tensor | None:
        """(1, T), which tokens have none before them in their document; None where no token can be one."""
        if layer is None or not layer.has_previous_state[0]:
            return history.is_first()
        if history.cu_seqlens is None:
            return None
        # Of padded rows that go on from a cache, those whose memory is still empty had nothing but padding so far.
        had_some = has_past(history) if self.settings.local_window else layer.recurrent_states[0].flatten(1).any(1)
        return history.is_first(~had_some)

    def _advanced(self, layer, q, k, v, beta, g, cu_seqlens) -> torch.Tensor:
        """What the queries read (B, T, HQ, hd); the layer's state, if there is a layer, moves on."""
        state = layer.recurrent_states[0] if layer is not None else None
        in_place = state is not None and cu_seqlens is None and q.shape[1] <= LONGEST_STEP
        if in_place and not torch.is_grad_enabled():
            return delta_rule_step_(q, k, self.expand(v), beta, state, g=g, scale=1.0, normalize_qk=True)
        z, final = self.read(q, k, v, beta, g, cu_seqlens, state, return_state=layer is not None)
        if layer is not None:
            self._store(layer, "recurrent_states", final)
        return z

    def _recorded(self, layer, q, k, v, beta, g, cu_seqlens, histories) -> torch.Tensor:
        """As `_advanced`, and the last tokens can be taken back (rollback.py)."""
        if cu_seqlens is not None:
            raise UserError("a cache that records its past takes no padding: decode sequences of one length")
        vectors = _aligned([h.x.transpose(1, 2) for h in histories]) if histories else None
        if layer.recurrent_states[0] is None:
            heads, size = self.config.num_state_heads, self.head_dim
            dtype = torch.promote_types(q.dtype, torch.float32)
            self._store(layer, "recurrent_states", q.new_zeros(q.shape[0], heads, size, size, dtype=dtype))
            if histories:
                reach = max(h.reach for h in histories)
                self._store(layer, "conv_states", vectors.new_zeros(*vectors.shape[:2], reach))
        read, head = [], max(0, q.shape[1] - CAPACITY)
        if head:
            read.append(self._advanced(layer, *_tokens(slice(head), q, k, v, beta, g), None))
            if histories:
                memory = layer.conv_states[0]
                memory.copy_(torch.cat([memory, vectors[..., :head]], -1)[..., -memory.shape[2] :])
            layer.has_previous_state[0] = True
            layer.settle()
        q, k, v, beta, g = _tokens(slice(head, None), q, k, v, beta, g)
        layer.note(k, self.expand(v), beta, g, vectors[..., head:] if histories else None)
        read.append(self._advanced(layer, q, k, v, beta, g, None))
        return torch.cat(read, 1)

    @staticmethod
    def _store(layer, kind: str, value: torch.Tensor) -> None:
        """Copies into the cache's own tensor, whose address stays the same (CUDA graphs rely on it)."""
        if getattr(layer, kind)[0] is None:
            layer.lazy_initialization(**{kind: value})
        getattr(layer, kind)[0].copy_(value)
