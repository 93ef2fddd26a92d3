"""The output projection and its bias, by ridge regression of the wanted output on what the projection multiplies."""

import torch
from torch import nn

from .statistics import ridge


class OutputFit:
    """Gathers F^T F and F^T Y in float64 over batches; F has a constant column where the projection has a bias."""

    def __init__(self, o_proj: nn.Linear):
        self.o_proj = o_proj
        width = o_proj.in_features + (o_proj.bias is not None)
        device = o_proj.weight.device
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(width, o_proj.out_features, dtype=torch.float64, device=device)

    def add(self, features: torch.Tensor, wanted: torch.Tensor, weight: float = 1.0) -> None:
        """features (n, T, width) as o_proj gets them, wanted (n, T, D); each token counts as `weight` tokens."""
        features = features.reshape(-1, features.shape[-1])
        if self.o_proj.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], 1)
        self.gram += weight * (features.T @ features).double()
        self.cross += weight * (features.T @ wanted.reshape(len(features), -1)).double()

    def solve(self, strength: float) -> None:
        """Puts the solution into the projection, pulled towards what it holds now."""
        inner = self.o_proj.in_features
        prior = torch.zeros_like(self.cross)
        prior[:inner] = self.o_proj.weight.T
        if self.o_proj.bias is not None:
            prior[inner] = self.o_proj.bias
        solution = ridge(self.gram, self.cross, prior, strength)
        self.o_proj.weight.copy_(solution[:inner].T)
        if self.o_proj.bias is not None:
            self.o_proj.bias.copy_(solution[inner])
