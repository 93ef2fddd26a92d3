"""The cache of a linear layer, from which the last tokens can be taken back: what speculative decoding needs.

A state cannot be cut: what every token wrote is mixed, and a write of strength 1 cannot be inverted. While it records,
a layer therefore keeps the state from before the last tokens and what each of them wrote. Taking some back restores
that state and writes the others again with the code that decodes, so the state is the one plain decoding leaves.

Shapes: B sequences, T tokens, H state heads, K and V key and value size; C channels and L reach as in history.py.
"""

import torch
from transformers.cache_utils import LinearAttentionLayer

from deltanet_errors import UserError

from .ops import delta_rule_step_

CAPACITY = 128
"""Tokens whose writes a recording layer keeps. The last half of them can always be taken back."""


class StateLayer(LinearAttentionLayer):
    """transformers' cache of a linear layer, `recurrent_states[0]` (B, H, K, V) and `conv_states[0]` (B, C, L), with an
    exact `crop`. Recording starts with `activate_past_recording()`; its memory is allocated once."""

    is_croppable = True
    record_past = False
    writes = None
    """k, v, beta, g of the recorded tokens and, on the last axis, the vectors to look back on; None: none recorded."""
    length = 0
    """Recorded tokens."""
    first = None
    """(B, channels) of every sequence's first token, where the layer has a local window. It never changes while the
    sequence has a token, so `crop` leaves it."""

    def activate_past_recording(self) -> None:
        self.record_past = True

    def keep_first(self, vectors: torch.Tensor) -> None:
        """Copies vectors (B, channels) into a tensor whose address stays the same."""
        if self.first is None:
            self.first = torch.empty_like(vectors)
        self.first.copy_(vectors)

    def note(self, k, v, beta, g, vectors) -> None:
        """Records what T <= CAPACITY tokens are about to write into the (initialized) states: k (B, T, H, K), v
        (B, T, H, V), beta and g (B, T, H), vectors (B, C, T); g and vectors may be None."""
        tokens = k.shape[1]
        if self.writes is None:
            room = lambda x: None if x is None else x.new_zeros(x.shape[0], CAPACITY, *x.shape[2:])
            self.writes = [room(x) for x in (k, v, beta, g)]
            self.before, self.is_start = self.recurrent_states[0].clone(), not self.has_previous_state[0]
            self.vectors = None if vectors is None else self._past(vectors.new_zeros(*vectors.shape[:2], CAPACITY))
        excess = self.length + tokens - CAPACITY
        if excess > 0:
            self._forget(max(excess, self.length - CAPACITY // 2))
        new = slice(self.length, self.length + tokens)
        for kept, x in zip(self.writes, (k, v, beta, g)):
            if x is not None:
                kept[:, new].copy_(x)
        if vectors is not None:
            self.vectors[..., self.vectors.shape[2] - CAPACITY :][..., new].copy_(vectors)
        self.length += tokens

    def settle(self) -> None:
        """Nothing from before this moment can be taken back any more."""
        if self.writes is not None:
            self.before.copy_(self.recurrent_states[0])
            self.is_start = not self.has_previous_state[0]
            if self.vectors is not None:
                self.vectors[..., :-CAPACITY].copy_(self.conv_states[0])
        self.length = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last -tokens_to_remove of the tokens recorded since the last `crop`; the others are settled.

        Raises UserError for tokens that were not recorded, and for a positive number."""
        if tokens_to_remove > 0:
            raise UserError(f"crop({tokens_to_remove}): a linear layer takes minus the number of tokens to remove")
        kept = self.length + tokens_to_remove
        if kept < 0:
            why = f"{self.length} are recorded" if self.record_past else "activate_past_recording() was not called"
            raise UserError(f"crop({tokens_to_remove}): {-tokens_to_remove} tokens cannot be taken back: {why}")
        if tokens_to_remove < 0:
            self._write(self.before, kept)
            self.has_previous_state[0] = kept > 0 or not self.is_start
            self.recurrent_states[0].copy_(self.before)
            if self.vectors is not None:
                reach = self.vectors.shape[2] - CAPACITY
                self.conv_states[0].copy_(self.vectors[..., kept : kept + reach])
        self.settle()

    def reset(self) -> None:
        super().reset()
        self.writes, self.length = None, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        if self.first is not None:
            self.first = self.first.index_select(0, beam_idx.to(self.first.device))
        self.writes, self.length = None, 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times, as transformers' caches of attention do."""
        if self.recurrent_states[0] is not None:
            rows = torch.arange(len(self.recurrent_states[0]), device=self.device)
            self.reorder_cache(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Only these sequences, in this order."""
        if self.recurrent_states[0] is not None:
            rows = torch.arange(len(self.recurrent_states[0]), device=self.device)
            self.reorder_cache(rows[indices])

    def _past(self, room: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv_states[0].to(room.dtype), room], -1)

    def _write(self, state: torch.Tensor, count: int) -> None:
        """The first `count` recorded tokens, into `state`."""
        if count:
            k, v, beta, g = (None if x is None else x[:, :count] for x in self.writes)
            delta_rule_step_(k, k, v, beta, state, g=g, scale=1.0, normalize_qk=True)

    def _forget(self, count: int) -> None:
        """The first `count` recorded tokens can no longer be taken back."""
        self._write(self.before, count)
        self.is_start = False
        for x in (*self.writes, None if self.vectors is None else self.vectors.transpose(1, 2)):
            if x is not None:
                x[:, : x.shape[1] - count].copy_(x[:, count:].clone())
        self.length -= count
