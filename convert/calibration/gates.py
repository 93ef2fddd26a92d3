"""The read gate and the skip taps: one coefficient per head and source, linear in the layer's input x.

    minimise  sum_t || c_t - sum_m (s_m + u_m . x_t) m_t ||_M^2  +  l_m |u_m|^2    over all sources m of a head

solved by conjugate gradients in the principal axes of x, preconditioned by the system that would result if sources and
inputs were independent. No covariance per head and source is ever formed (that is S H D^2 numbers, and 50 times the
work). Twin: tests/convert/test_calibrate_gates.py compares it with least squares.

Shapes: N tokens, H heads, S sources, D hidden size.
"""

import torch

STATIC_RIDGE = 1e-4
CONSTANT_RIDGE = 1e-6
TOLERANCE = 1e-3


def fit_gates(
    x: torch.Tensor,
    pairs: torch.Tensor,
    targets: torch.Tensor,
    strength: float,
    *,
    data_dependent: bool = True,
    iterations: int = 40,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight (H, S, D) and bias (H, S) of the coefficients from x (N, D), pairs (N, H, S, S), targets (N, H, S).

    The penalty l_m is `strength` times the mean over inputs of sum_t |m_t|^2 x_t^2; the bias is hardly penalised.
    """
    static = _static(pairs, targets)
    H, S = static.shape
    if not data_dependent or len(x) < 2:
        return x.new_zeros(H, S, x.shape[1]), static
    mean = x.mean(0)
    centred = x - mean
    power, axes = torch.linalg.eigh((centred.T @ centred).double())
    axes, power = axes.to(x.dtype), power.clamp(min=0).to(x.dtype)
    constant = (power.sum() / centred.numel()).sqrt().clamp(min=1e-6)
    features = torch.cat([centred @ axes, constant.expand(len(x), 1)], 1)
    power = torch.cat([power, (constant**2 * len(x))[None]])

    sizes = pairs.diagonal(dim1=2, dim2=3)  # N H S
    mean_square = (features[:, :-1] ** 2).mean(1)
    penalty = strength * torch.einsum("n,nhs->hs", mean_square, sizes)
    penalty = penalty[..., None].expand(H, S, features.shape[1]).clone()
    penalty[..., -1] = CONSTANT_RIDGE * constant**2 * sizes.sum(0)

    def gradient_of(coefficients):  # N H S -> H S F
        weighted = torch.einsum("nhst,nht->nhs", pairs, coefficients)
        return (features.T @ weighted.flatten(1)).T.unflatten(0, (H, S))

    def system(u):
        return gradient_of((features @ u.flatten(0, 1).T).unflatten(1, (H, S))) + penalty * u

    start = x.new_zeros(H, S, features.shape[1])
    start[..., -1] = static / constant
    wanted = (features.T @ targets.flatten(1)).T.unflatten(0, (H, S))
    # At every principal axis, the S x S system of a head as if |m|^2 did not depend on x.
    independent = pairs.mean(0)[:, None] * power[:, None, None] + torch.diag_embed(penalty.transpose(1, 2))
    ridge = 1e-6 * independent.diagonal(dim1=2, dim2=3).mean(-1)[..., None, None]
    inverse = torch.linalg.inv((independent + ridge * torch.eye(S, device=x.device, dtype=x.dtype)).double())
    inverse = inverse.to(x.dtype)

    def precondition(r):
        return (inverse @ r.transpose(1, 2)[..., None])[..., 0].transpose(1, 2)

    u = _conjugate_gradients(system, wanted, start, precondition, iterations)
    weight = u[..., :-1] @ axes.T
    return weight, u[..., -1] * constant - weight @ mean


def _static(pairs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """(H, S): the best constant coefficients, in float64."""
    gram, cross = pairs.double().sum(0), targets.double().sum(0)
    ridge = STATIC_RIDGE * gram.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
    system = gram + ridge * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve(system, cross).to(pairs.dtype)


def _conjugate_gradients(system, wanted, u, precondition, iterations: int):
    """Solves system(u) = wanted for every head (first axis) by itself, from u on."""
    residual = wanted - system(u)
    direction = z = precondition(residual)
    norm = first = (residual * z).sum((1, 2), keepdim=True)
    for _ in range(iterations):
        image = system(direction)
        step = norm / (direction * image).sum((1, 2), keepdim=True).clamp(min=1e-30)
        u = u + step * direction
        residual = residual - step * image
        z = precondition(residual)
        following = (residual * z).sum((1, 2), keepdim=True)
        if bool((following <= TOLERANCE**2 * first).all()):
            break
        direction = z + following / norm.clamp(min=1e-30) * direction
        norm = following
    return u
