"""The kernels as PyTorch operators: one forward, one backward, one decoding step that writes the state in place.

Operators with fake kernels and a registered gradient, so `torch.compile(fullgraph=True)` and activation checkpointing
see one node each. Same arguments and contract as `deltanet.ops.delta_rule`.
"""

import os

import torch

from . import launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST = 256


def unsupported(q, k, v, beta, *, g=None, initial_state=None, cu_seqlens=None) -> str | None:
    """Why the kernels cannot run for these arguments here; None where they can."""
    if not q.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {q.device.type}"
    if q.is_cuda and torch.cuda.get_device_capability(q.device)[0] < 8:
        return f"{torch.cuda.get_device_name(q.device)} is older than compute capability 8.0"
    if not q.dtype == k.dtype == v.dtype:
        return f"q, k and v have different dtypes ({q.dtype}, {k.dtype}, {v.dtype})"
    if v.dtype not in DTYPES:
        return f"the dtype is {v.dtype}"
    if q.shape[3] > LARGEST or v.shape[3] > LARGEST:
        return f"a head is {max(q.shape[3], v.shape[3])} wide, above {LARGEST}"
    if 0 in q.shape or 0 in v.shape:
        return "there are no tokens, heads or channels"
    return None


def delta_rule(
    q, k, v, beta, *, g=None, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None,
    normalize_qk=False,
):  # fmt: skip
    """As `deltanet.ops.delta_rule`."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tensors = (q, k, v, beta, g, initial_state)
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    o, final, *_ = forward_operator(q, k, v, beta, g, initial_state, cu_seqlens, scale, normalize_qk, save)
    return o, final if output_final_state else None


@torch.no_grad()
def delta_rule_step_(q, k, v, beta, state, *, g=None, scale=None, normalize_qk=False):
    """As `deltanet.ops.delta_rule_step_`."""
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return step_operator(q, k, v, beta, g, state, scale, normalize_qk)


def _present(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None or x.numel() == 0 else x


def _case(q, k, v, g, cu_seqlens, normalize):
    return launch.case(q, k, v, g, cu_seqlens, normalize)


@torch.library.custom_op("deltanet::delta_rule", mutates_args=())
def forward_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    scale: float,
    normalize: bool,
    save: bool,
) -> tuple[
    torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor
]:  # fmt: skip
    """o, final state; for the gradient x, shift, starts, maps, decays, adjoints, empty where there are none."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    g = None if g is None else g.contiguous()
    first = None if initial_state is None else initial_state.float().contiguous()
    c = _case(q, k, v, g, cu_seqlens, normalize)
    o, final, *keep = launch.forward(c, q, k, v, beta, g, first, cu_seqlens, scale, save)
    return o, final, *(q.new_empty(0) if t is None or not save else t for t in keep)


@forward_operator.register_fake
def _(q, k, v, beta, g, initial_state, cu_seqlens, scale, normalize, save):
    documents = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    H, K, V = k.shape[2], k.shape[3], v.shape[3]
    o = v.new_empty(*q.shape[:3], V)
    final = q.new_empty(documents, H, K, V, dtype=torch.float32)
    none = lambda: q.new_empty(0)
    if not save:
        return o, final, *(none() for _ in range(6))
    c = _case(q, k, v, g, cu_seqlens, normalize)
    x = v.new_empty(v.shape, dtype=torch.float16 if c.half else torch.float32)
    shift = q.new_empty(2, c.heads, dtype=torch.int32)
    single = lambda rows, columns: q.new_empty(c.heads, c.segments, rows, columns, dtype=torch.float32)
    cut = c.segments > 1
    decays = none() if g is None else q.new_empty(c.num_decays, dtype=torch.float32)
    adjoints = x.new_empty(c.num_decays, launch.CHUNK) if c.entry("write").reads_inverse else none()
    return o, final, x, shift, single(K, V) if cut else none(), single(K, K) if cut else none(), decays, adjoints


@torch.library.custom_op("deltanet::delta_rule_backward", mutates_args=())
def backward_operator(
    do: torch.Tensor,
    dfinal: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    x: torch.Tensor,
    shift: torch.Tensor,
    starts: torch.Tensor,
    maps: torch.Tensor,
    decays: torch.Tensor,
    adjoints: torch.Tensor,
    scale: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv, dbeta, dg, dinitial_state; the last two empty where the input is None."""
    q, k, v, beta, do = (t.contiguous() for t in (q, k, v, beta, do))
    g = None if g is None else g.contiguous()
    dfinal = None if dfinal is None else dfinal.float().contiguous()
    c = _case(q, k, v, g, cu_seqlens, normalize)
    starts, maps, decays, adjoints = map(_present, (starts, maps, decays, adjoints))
    if starts is None and initial_state is not None:
        starts = initial_state.float().contiguous()
    *gradients, dg, dinitial = launch.backward(
        c, q, k, v, beta, g, x, shift, starts, maps, decays, adjoints, do, dfinal, cu_seqlens, scale,
        initial_state is not None,
    )  # fmt: skip
    dinitial = q.new_empty(0) if dinitial is None else dinitial.to(initial_state.dtype)
    return *gradients, q.new_empty(0) if dg is None else dg, dinitial


@backward_operator.register_fake
def _(do, dfinal, q, k, v, beta, g, initial_state, *_):
    made = [t.new_empty(t.shape) for t in (q, k, v, beta)]
    return *made, *(q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (g, initial_state))


def _save(ctx, inputs, output):
    q, k, v, beta, g, initial_state, cu_seqlens, scale, normalize, _ = inputs
    _, _, *kept = output
    ctx.mark_non_differentiable(*kept)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, beta, g, initial_state, cu_seqlens, *kept)
    ctx.scale, ctx.normalize = scale, normalize


def _gradient(ctx, do, dfinal, *_):
    q, k, v, beta, g, initial_state, *rest = ctx.saved_tensors
    if do is None:
        do = v.new_zeros(*q.shape[:3], v.shape[3])
    *gradients, dg, dinitial = backward_operator(
        do, dfinal, q, k, v, beta, g, initial_state, *rest, ctx.scale, ctx.normalize
    )
    dg = None if g is None else dg
    dinitial = None if initial_state is None else dinitial
    return *gradients, dg, dinitial, None, None, None, None


forward_operator.register_autograd(_gradient, setup_context=_save)


@torch.library.custom_op("deltanet::delta_rule_step_", mutates_args=("state",))
def step_operator(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    beta: torch.Tensor,
    g: torch.Tensor | None,
    state: torch.Tensor,
    scale: float,
    normalize: bool,
) -> torch.Tensor:
    """o (B, T, G*H, V); `state` (B, H, K, V), contiguous float32, is updated in place."""
    q, k, v, beta = (x.contiguous() for x in (q, k, v, beta))
    return launch.step(q, k, v, beta, None if g is None else g.contiguous(), state, scale, normalize)


@step_operator.register_fake
def _(q, k, v, beta, g, state, scale, normalize):
    return v.new_empty(*q.shape[:3], v.shape[3])
