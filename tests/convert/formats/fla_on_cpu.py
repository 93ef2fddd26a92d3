"""flash-linear-attention without its kernels: each is replaced by PyTorch of the same meaning, so that the peer's own
modules, names and order of operations run on a CPU."""

import importlib

import torch
import torch.nn.functional as F


def without_kernels(monkeypatch, conv, recurrence, attend) -> None:
    layers = {name: importlib.import_module(f"fla.layers.{name}") for name in ("delta_net", "gated_deltanet", "attn")}
    modules, base = importlib.import_module("fla.modules"), {}

    def norm(self, x, residual=None, prenorm=False, **_):
        total = x if residual is None else x + residual
        out = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return (out, total) if prenorm else out

    def gated_norm(self, x, g, **_):
        gate = torch.sigmoid(g) if self.activation == "sigmoid" else F.silu(g)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight * gate

    def short(self, x, **_):
        out = torch.stack([conv(row, self.weight) for row in x])
        return (F.silu(out) if self.activation in ("silu", "swish") else out), None

    def joint_conv(x, weight, activation, **_):
        out = torch.stack([conv(row, weight[:, None]) for row in x])
        return (F.silu(out) if activation in ("silu", "swish") else out), None

    def delta(q, k, v, beta, **_):
        ones = torch.ones_like(beta[0])
        return torch.stack([recurrence(*row, ones) for row in zip(q, k, v, beta)]), None

    def gated_delta(q, k, v, g, beta, A_log, dt_bias, allow_neg_eigval=False, **_):
        decay = torch.exp(-A_log.exp() * F.softplus(g + dt_bias))
        beta = beta.sigmoid() * (2 if allow_neg_eigval else 1)
        return torch.stack([recurrence(*row) for row in zip(q, k, v, beta, decay)]), None

    def rotate(self, q, k, **_):
        base["rope_theta"] = self.base  # `attend` does the turning
        return q, k

    def softmax(q, k, v, causal, window_size):
        spec = base | {"window_size": None if window_size[0] < 0 else window_size[0] + 1}
        return torch.stack([attend(*row, spec) for row in zip(q.double(), k.double(), v.double())]).to(q.dtype)

    monkeypatch.setattr(modules.RMSNorm, "forward", norm)
    monkeypatch.setattr(modules.FusedRMSNormGated, "forward", gated_norm)
    monkeypatch.setattr(modules.ShortConvolution, "forward", short)
    monkeypatch.setattr(modules.GatedMLP, "forward", lambda self, x, **_: self.down_proj(
        F.silu(self.gate_proj(x)) * self.up_proj(x)))  # fmt: skip
    monkeypatch.setattr(layers["attn"].RotaryEmbedding, "forward", rotate)
    monkeypatch.setattr(layers["attn"], "flash_attn_func", softmax)
    monkeypatch.setattr(layers["gated_deltanet"], "causal_conv1d", joint_conv)
    for mode in ("chunk", "fused_recurrent"):
        monkeypatch.setattr(layers["delta_net"], f"{mode}_delta_rule", delta)
        monkeypatch.setattr(layers["gated_deltanet"], f"{mode}_gated_delta_rule", gated_delta)
