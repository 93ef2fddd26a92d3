"""The public operation: checks its arguments, chooses a backend, and can say why.

Equations and shapes: README.md. `DELTANET_BACKEND=chunk` (or another name) overrides the choice of a whole process.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch

from deltanet_errors import UserError, nearest

from . import chunk, recurrent, reference

BACKENDS = ("triton", "recurrent", "chunk", "reference")


@dataclass(frozen=True)
class Choice:
    """Which backend runs, and why each one before it in `BACKENDS` does not."""

    backend: str
    rejected: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} not: {why}" for name, why in self.rejected.items())
        return self.backend + (f" ({reasons})" if reasons else "")


def delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: torch.Tensor | None = None,
    normalize_qk: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T and o_t = scale * S_t^T q_t  (eq. 1, 2).

    q (B, T, G*H, K), k (B, T, H, K), v (B, T, H, V), beta (B, T, H); query head h reads state h // G.
    g (B, T, H), log decay <= 0; None for no decay.   scale: K ** -0.5 unless given.
    initial_state (N, H, K, V), zeros unless given; N = B, or the number of packed documents.
    cu_seqlens (N + 1,) int32 or int64: where documents begin and end in a batch of one; they do not see each other.
    normalize_qk: q and k are brought to length one first (1e-6 inside the root).

    Returns o (B, T, G*H, V) in v's dtype, and the final state (N, H, K, V) in float32 (float64 for float64 input), or
    None unless asked for. Raises UserError naming the argument that does not fit.
    """
    check(q, k, v, beta, g=g, state=initial_state, cu_seqlens=cu_seqlens)
    arguments = {
        "g": g,
        "scale": k.shape[3] ** -0.5 if scale is None else scale,
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
        "normalize_qk": normalize_qk,
    }
    chosen = explain_backend(q, k, v, beta, g=g, initial_state=initial_state, cu_seqlens=cu_seqlens, backend=backend)
    with torch.autocast(q.device.type, enabled=False):
        return _run(chosen.backend, "delta_rule")(q, k, v, beta, **arguments)


def delta_rule_step_(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    scale: float | None = None,
    normalize_qk: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """The next few tokens of every sequence; `state` (B, H, K, V), float32, is updated in place. No gradients.

    Arguments as `delta_rule`. Returns o (B, T, G*H, V) in v's dtype.
    """
    check(q, k, v, beta, g=g, state=state, cu_seqlens=None)
    if state.dtype not in (torch.float32, torch.float64):
        raise UserError(f"delta_rule_step_: the state is {state.dtype}; expected torch.float32")
    asked = _asked(backend)
    # An environment that names a form without steps still decodes.
    if backend and backend not in ("triton", "recurrent"):
        raise UserError(f"delta_rule_step_: backend {backend!r} has no steps; allowed: triton, recurrent")
    why = None if asked == "recurrent" else _why_not_triton(q, k, v, beta, g, state, None, named=asked == "triton")
    if asked == "triton" and why:
        raise UserError(f"delta_rule_step_: backend 'triton' cannot run here: {why}")
    name = "recurrent" if asked == "recurrent" or why else "triton"
    scale = k.shape[3] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        return _run(name, "delta_rule_step_")(q, k, v, beta, state, g=g, scale=scale, normalize_qk=normalize_qk)


def explain_backend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    *,
    g: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    backend: str | None = None,
) -> Choice:
    """The backend that `delta_rule` takes for these arguments. Raises UserError for a name that does not exist, and
    for one that cannot run: kernels without a device, `recurrent` with gradients or packed documents."""
    asked = _asked(backend)
    tensors = (q, k, v, beta, g, initial_state)
    needs_grad = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if asked == "recurrent" and (needs_grad or cu_seqlens is not None):
        why = "it has no gradients" if needs_grad else "documents are packed"
        raise UserError(f"delta_rule: backend 'recurrent' cannot run here: {why}; chunk and reference can")
    if asked and asked != "triton":
        return Choice(asked, {})
    rejected = {}
    why = _why_not_triton(q, k, v, beta, g, initial_state, cu_seqlens, named=asked == "triton")
    if asked and why:
        raise UserError(f"delta_rule: backend 'triton' cannot run here: {why}; chunk and reference can")
    if why is None:
        return Choice("triton", rejected)
    rejected["triton"] = why
    if needs_grad:
        rejected["recurrent"] = "it has no gradients"
    elif cu_seqlens is not None:
        rejected["recurrent"] = "documents are packed"
    elif q.shape[1] > recurrent.LONGEST:
        rejected["recurrent"] = f"{q.shape[1]} tokens, above {recurrent.LONGEST}"
    else:
        return Choice("recurrent", rejected)
    return Choice("chunk", rejected)


def _asked(backend: str | None) -> str | None:
    """The backend named in the call or else in the environment; raises UserError for one that does not exist."""
    asked = backend or os.environ.get("DELTANET_BACKEND")
    if asked and asked not in BACKENDS:
        origin = "backend" if backend else "DELTANET_BACKEND"
        raise UserError(f"{origin} is {asked!r}; allowed: {', '.join(BACKENDS)}{nearest(asked, list(BACKENDS))}")
    return asked


def _why_not_triton(q, k, v, beta, g, state, cu_seqlens, named: bool) -> str | None:
    """`named`: the caller asked for the kernels, so Triton's interpreter may stand in for a device."""
    if not q.is_cuda and not (named and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"the tensors are on {q.device.type}"
    try:
        from . import triton
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return triton.unsupported(q, k, v, beta, g=g, initial_state=state, cu_seqlens=cu_seqlens)


def _run(backend: str, function: str) -> Callable:
    if backend == "triton":
        from . import triton

        return getattr(triton, function)
    modules = {"chunk": chunk, "recurrent": recurrent, "reference": reference}
    return getattr(modules[backend], function)


def check(q, k, v, beta, *, g, state, cu_seqlens) -> None:
    """Shapes, dtypes and devices, without looking at a value on a device. Raises UserError naming the argument."""

    def expect(name: str, x: torch.Tensor, *shape: int) -> None:
        if tuple(x.shape) != shape:
            raise UserError(f"delta_rule: {name} has shape {list(x.shape)}; expected {list(shape)}")
        if x.device != q.device:
            raise UserError(f"delta_rule: {name} is on {x.device}, q on {q.device}")
        if not x.is_floating_point():
            raise UserError(f"delta_rule: {name} is {x.dtype}; expected a floating-point dtype")

    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise UserError(f"delta_rule: q, k, v have {q.ndim}, {k.ndim}, {v.ndim} axes; expected 4 (B, T, heads, size)")
    (B, T, HQ, K), H, V = q.shape, k.shape[2], v.shape[3]
    if H == 0 or HQ % H:
        raise UserError(f"delta_rule: q has {HQ} heads, which is not a multiple of k's {H}")
    expect("q", q, B, T, HQ, K)
    expect("k", k, B, T, H, K)
    expect("v", v, B, T, H, V)
    expect("beta", beta, B, T, H)
    if g is not None:
        expect("g", g, B, T, H)
    documents = B
    if cu_seqlens is not None:
        if B != 1:
            raise UserError(f"delta_rule: cu_seqlens needs a batch of 1, not {B}")
        if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise UserError(
                f"delta_rule: cu_seqlens is {cu_seqlens.dtype} of shape {list(cu_seqlens.shape)}; "
                "expected int32 or int64 of shape [documents + 1]"
            )
        if cu_seqlens.device != q.device:
            raise UserError(f"delta_rule: cu_seqlens is on {cu_seqlens.device}, q on {q.device}")
        documents = len(cu_seqlens) - 1
        if not cu_seqlens.is_cuda:
            bounds = cu_seqlens.tolist()
            if bounds[0] != 0 or bounds[-1] != T or any(b < a for a, b in pairwise(bounds)):
                raise UserError(f"delta_rule: cu_seqlens {bounds} does not rise from 0 to {T}")
    if state is not None:
        expect("the state", state, documents, H, K, V)
