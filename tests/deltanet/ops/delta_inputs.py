"""Random and adversarial inputs of the delta rule, and how two results are compared.

Keys may be nearly parallel (where each write erases the last), writes may overshoot (beta up to 2), keys may be zero,
decays may forget everything at once or nothing at all.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F


@dataclass
class Inputs:
    """Arguments of `delta_rule`; q (B, T, G*H, K), k (B, T, H, K), v (B, T, H, V), beta and g (B, T, H). `loss` is what
    `gradients` multiplies its loss by."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    beta: torch.Tensor
    g: torch.Tensor | None = None
    initial_state: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    loss: float = 1.0

    def tensors(self) -> dict[str, torch.Tensor]:
        """What has a gradient, by name."""
        names = ("q", "k", "v", "beta", "g", "initial_state")
        return {name: x for name in names if (x := getattr(self, name)) is not None}

    def to(self, *args) -> "Inputs":
        return replace(self, **{name: x.to(*args) for name, x in self.tensors().items()})

    def with_grad(self) -> "Inputs":
        return replace(self, **{name: x.detach().clone().requires_grad_() for name, x in self.tensors().items()})

    def call(self, rule, **options):
        return rule(
            self.q,
            self.k,
            self.v,
            self.beta,
            g=self.g,
            initial_state=self.initial_state,
            cu_seqlens=self.cu_seqlens,
            **options,
        )


def inputs(
    T: int,
    *,
    B: int = 1,
    H: int = 2,
    G: int = 1,
    K: int = 16,
    V: int = 16,
    keys: str = "iid",
    beta: str = "sigmoid",
    decay: str | None = None,
    state: bool = False,
    lengths: tuple[int, ...] | None = None,
    values: float = 1.0,
    directions: float = 1.0,
    loss: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """keys: iid, cosine (0.8 with each other), zero (every third key is 0); always of length at most one.
    beta: sigmoid (of a normal), one (near 1), high (1.5 to 2).  decay: None, near0 (forgets at once), near1, mixed.
    lengths: packed documents that add up to T.  values, directions, loss: v and the state, q and k, and the loss of
    `gradients` are multiplied by them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k = F.normalize(normal(B, T, H * G, K), dim=-1), F.normalize(normal(B, T, H, K), dim=-1)
    if keys == "cosine":
        common = F.normalize(normal(B, 1, H, K), dim=-1)
        k = F.normalize(k * 0.2**0.5 + common * 0.8**0.5, dim=-1)
    elif keys == "zero":
        k[:, ::3] = 0
    elif keys != "iid":
        raise ValueError(keys)
    strength = torch.sigmoid(normal(B, T, H) + (5.0 if beta == "one" else 0.0))
    if beta == "high":
        strength = 1.5 + 0.5 * strength
    g = None
    if decay is not None:
        near0, near1 = -20 * torch.sigmoid(normal(B, T, H)) - 10, -1e-3 * torch.sigmoid(normal(B, T, H))
        mixed = -F.softplus(3 * normal(B, T, H) - 2)
        g = {"near0": near0, "near1": near1, "mixed": mixed}[decay]
    cu_seqlens = None
    if lengths is not None:
        if sum(lengths) != T:
            raise ValueError(f"{lengths} does not add up to {T}")
        cu_seqlens = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    documents = B if lengths is None else len(lengths)
    first = values * normal(documents, H, K, V) if state else None
    v = values * normal(B, T, H, V)
    return Inputs(directions * q, directions * k, v, strength, g, first, cu_seqlens, loss).to(dtype)


def error(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative root-mean-square error of a against b, in float64; 0 where both are empty or zero."""
    a, b = a.double().cpu(), b.double().cpu()
    size = b.norm()
    return float((a - b).norm() / size) if size > 0 else float((a - b).norm())


def gradients(made: Inputs, rule, **options) -> dict[str, torch.Tensor]:
    """o, the final state, and the gradient of a fixed mix of both with respect to every input, by name."""
    leaves = made.with_grad()
    o, final = leaves.call(rule, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(99)
    weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x) for x in (o, final)]
    loss = sum((x * (made.loss * w)).sum() for x, w in zip((o, final), weights))
    names = leaves.tensors()
    found = torch.autograd.grad(loss, list(names.values()), allow_unused=True, materialize_grads=True)
    return {"o": o.detach(), "final_state": final.detach()} | {f"d{n}": d for n, d in zip(names, found)}
