"""A teacher with some layers swapped for those of its all-linear twin, on one text.

What a swap changes begins at the swapped layer, so the inputs of every layer are kept for one set of swapped layers,
and another set is run only from the first layer where the two differ.

Shapes: N windows, T tokens, D hidden size.
"""

from collections.abc import Set

import torch

from deltanet import DeltaNetForCausalLM

from ..calibration import Stream
from ..closeness import compare


class Hybrid:
    """`twin` has the teacher's norms and MLPs, and a mixer in the place of every attention; both are in float32 on one
    device. tokens (N, T) int64."""

    def __init__(self, teacher: DeltaNetForCausalLM, twin: DeltaNetForCausalLM, tokens: torch.Tensor):
        self.teacher, self.twin, self.tokens = teacher, twin, tokens
        self._stream = Stream(teacher, tokens, 1)
        self._inputs: list[torch.Tensor] = [self._stream.hidden]
        self._swapped: Set[int] = frozenset()
        self._untouched = self.rebase(frozenset())

    @property
    def num_layers(self) -> int:
        return len(self.teacher.model.layers)

    def rebase(self, swapped: Set[int]) -> torch.Tensor:
        """As `states`; the inputs of this run are kept, for later sets that differ little from this one."""
        self._inputs, self._swapped = self._inputs[:1], frozenset(swapped)
        return self._run(0, self._swapped, self._inputs)

    def states(self, swapped: Set[int]) -> torch.Tensor:
        """(N, T, D): the final hidden states with the layers `swapped` from the twin and all others the teacher's."""
        differing = self._swapped ^ set(swapped)
        return self._run(min(differing, default=self.num_layers - 1), swapped, None)

    def divergence(self, swapped: Set[int]) -> float:
        """KL(teacher || hybrid) of the next token, in nats per token."""
        hidden = {"teacher": self._untouched, "hybrid": self.states(swapped)}
        return compare(self.teacher, self.teacher, hidden, self.tokens)["hybrid"]["kl"]

    @torch.no_grad()
    def _run(self, start: int, swapped: Set[int], inputs: list[torch.Tensor] | None) -> torch.Tensor:
        stream = self._stream
        stream.hidden = self._inputs[start].clone()
        for layer in range(start, self.num_layers):
            block = (self.twin if layer in swapped else self.teacher).model.layers[layer]
            for rows in stream.rows():
                mixed = stream.mix(layer, stream.mixer_input(layer, rows), block)[1]
                stream.advance(layer, rows, mixed)
            if inputs is not None and layer + 1 < self.num_layers:
                inputs.append(stream.hidden.clone())
        return self.teacher.model.norm(stream.hidden)
