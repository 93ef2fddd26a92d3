"""The hidden states of one model for all calibration windows, taken through its blocks one at a time.

Only the stream itself is held for all windows; what happens inside a block exists for one batch of windows.

Shapes: N windows, T tokens, D hidden size.
"""

from collections.abc import Iterator

import torch
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from deltanet.modeling import CACHE

MASKS = {"full_attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}


class Stream:
    """`hidden` (N, T, D) in float32: the input of the next block."""

    def __init__(self, model, tokens: torch.Tensor, batch: int):
        """model: DeltaNetForCausalLM in float32; tokens (N, T) int64 on the model's device."""
        self.model, self.batch = model.model, batch
        self.hidden = torch.cat([self.model.embed_tokens(tokens[rows]) for rows in self._rows(len(tokens))])
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        self.rotations = self.model.rotary_emb(self.hidden[:1], position_ids=self.positions)

    def _rows(self, count: int) -> Iterator[slice]:
        return (slice(start, start + self.batch) for start in range(0, count, self.batch))

    def rows(self) -> Iterator[slice]:
        """The batches of windows."""
        return self._rows(len(self.hidden))

    def rotation(self, layer: int, config=None):
        """cos and sin for a layer, of another model if its `config` is given; None where it rotates nothing."""
        rotated = (config or self.model.config).rope_layers
        return self.rotations if rotated is None or rotated[layer] else None

    def mixer_input(self, layer: int, rows: slice) -> torch.Tensor:
        """(n, T, D), the normed input of the block's mixer."""
        return self.model.layers[layer].input_layernorm(self.hidden[rows])

    def mix(self, layer: int, x: torch.Tensor, block=None) -> tuple[torch.Tensor, torch.Tensor]:
        """What o_proj multiplies, (n, T, width), and the mixer's output (n, T, D) for the normed input x; of another
        model's `block` if one is given."""
        block, seen = block or self.model.layers[layer], []
        hook = block.self_attn.o_proj.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
        try:
            out, _ = block.self_attn(
                x,
                position_embeddings=self.rotation(layer, block.self_attn.config),
                attention_mask=self._mask(block.layer_type, x),
            )
        finally:
            hook.remove()
        return seen[0], out

    def _mask(self, kind: str, x: torch.Tensor):
        if kind not in MASKS:
            return None
        return MASKS[kind](
            config=self.model.config,
            inputs_embeds=x,
            attention_mask=None,
            position_ids=self.positions.expand(len(x), -1),
            **{CACHE: None},
        )

    def advance(self, layer: int, rows: slice, mixed: torch.Tensor) -> None:
        """Takes a batch to the next block, given its mixer's output."""
        block = self.model.layers[layer]
        after = self.hidden[rows] + mixed
        self.hidden[rows] = after + block.mlp(block.post_attention_layernorm(after))
