"""What a linear layer remembers besides its state: the last few vectors of every document, for taps and convolutions.

`History` answers one question, "the vector j tokens earlier in the same document", for plain batches, for packed
documents, and for both continuing from a cache. Before the first token of a document everything is zero.

Shapes: B batch, T tokens, N documents (N = B unless packed), C channels, L how far back it can look.
"""

import torch
import torch.nn.functional as F


class History:
    """Looks back over x (B, T, C) for up to `reach` tokens.

    past: (N, C, reach) the vectors before the first token of each document, oldest first, or None for zeros.
    cu_seqlens: (N + 1,) document boundaries when B = 1 holds packed documents, else None.
    """

    def __init__(
        self,
        x: torch.Tensor,
        reach: int,
        past: torch.Tensor | None = None,
        cu_seqlens: torch.Tensor | None = None,
    ):
        self.x, self.reach, self.cu_seqlens = x, reach, cu_seqlens
        num_documents = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if past is None:
            self.past = None
        else:
            self.past = past.to(x.dtype).transpose(1, 2)
        if cu_seqlens is None:
            before = x.new_zeros(num_documents, reach, x.shape[2]) if past is None else self.past
            self.extended = torch.cat([before, x], dim=1)
        else:
            token = torch.arange(x.shape[1], device=x.device)
            self.document = torch.searchsorted(cu_seqlens[1:].to(token.dtype), token, right=True)
            self.offset = token - cu_seqlens[self.document]

    def back(self, j: int) -> torch.Tensor:
        """(B, T, C): at each token the vector j tokens earlier in its document (0 <= j <= reach)."""
        if j == 0:
            return self.x
        tokens = self.x.shape[1]
        if self.cu_seqlens is None:
            return self.extended[:, self.reach - j : self.reach - j + tokens]
        inside = (self.offset >= j)[None, :, None]
        shifted = F.pad(self.x, (0, 0, j, 0))[:, :tokens]
        if self.past is None:
            return torch.where(inside, shifted, 0)
        slot = (self.reach + self.offset - j).clamp(0, self.reach - 1)
        return torch.where(inside, shifted, self.past[self.document, slot][None])

    def windows(self) -> torch.Tensor:
        """(B, T, C, reach + 1): at each token the vectors of `back`, this token's last; not of packed documents."""
        return self.extended.unfold(1, self.reach + 1, 1)

    def is_first(self, new: torch.Tensor | None = None) -> torch.Tensor:
        """(1, T) bool: the first token of a document; with `new` (N,) bool only of those documents."""
        if self.cu_seqlens is None:
            return (torch.arange(self.x.shape[1], device=self.x.device) == 0)[None]
        first = self.offset == 0
        return (first if new is None else first & new[self.document])[None]

    def latest(self) -> torch.Tensor:
        """(N, C, reach): the last vectors of every document, oldest first, to be the `past` of what follows."""
        if self.cu_seqlens is None:
            return self.extended[:, self.extended.shape[1] - self.reach :].transpose(1, 2)
        starts, ends = self.cu_seqlens[:-1, None], self.cu_seqlens[1:, None]
        position = ends - self.reach + torch.arange(self.reach, device=self.x.device)
        rows = self.x[0, position.clamp(0, self.x.shape[1] - 1)]
        inside = (position >= starts)[..., None]
        if self.past is None:
            return torch.where(inside, rows, 0).transpose(1, 2)
        slot = (self.reach + position - starts).clamp(0, self.reach - 1)
        older = torch.gather(self.past, 1, slot[..., None].expand(-1, -1, self.x.shape[2]))
        return torch.where(inside, rows, older).transpose(1, 2)
