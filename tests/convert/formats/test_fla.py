"""flash-linear-attention's format: an independent float64 reading of what is written, and the peer's own classes
where they are installed (their kernels replaced by the plain recurrence, since they need a GPU)."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from exportable import exportable
from safetensors.torch import load_file
from tiny_student import tiny_model, tokens

from convert.formats import fla, write_format
from deltanet_errors import UserError

CASES = {
    "delta": (
        "global",
        {"mixer": "delta", "beta_max": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    ),
    "delta, gated output, sliding": ("swa", {"mixer": "delta", "output_gate": True, "gate_activation": "silu"}),
    "gated, sigmoid output, no convolution": ("global", {"output_gate": True, "conv_kernel": 0}),
    "gated, untied": ("none", {"tie_word_embeddings": False, "head_dim": 6}),
}


def written(tmp_path: Path, case: str):
    layout, changes = CASES[case]
    model = exportable("fla", layout, **changes)
    model.save_pretrained(tmp_path / "student")
    return model, write_format(tmp_path / "student", tmp_path / "fla", "fla")


def norm(x, weight, eps):
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def conv(x, weight):
    """Causal, with the last tap on the current token; x (T, C), weight (C, 1, K)."""
    size = weight.shape[-1]
    padded = F.pad(x, (0, 0, size - 1, 0))
    return sum(padded[j : j + len(x)] * weight[:, 0, j] for j in range(size))


def recurrence(q, k, v, beta, decay):
    """q, k, v (T, H, d), beta, decay (T, H), token by token."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    state, out = q.new_zeros(q.shape[1], q.shape[2], v.shape[2]), []
    for t in range(len(q)):
        state = decay[t, :, None, None] * state
        told = v[t] - torch.einsum("hk,hkv->hv", k[t], state)
        state = state + torch.einsum("hk,hv->hkv", beta[t, :, None] * k[t], told)
        out.append(torch.einsum("hk,hkv->hv", q[t], state) * q.shape[2] ** -0.5)
    return torch.stack(out)


def attend(q, k, v, spec):
    """q (T, H, d), k and v (T, G, d) with RoPE by halves; a window counts the token itself."""
    T, H, d = q.shape
    angles = torch.arange(T)[:, None] * spec["rope_theta"] ** (-torch.arange(0, d, 2).double() / d)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]

    def turn(x):
        a, b = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    q, k, v = turn(q), turn(k).repeat_interleave(H // k.shape[1], 1), v.repeat_interleave(H // v.shape[1], 1)
    scores = torch.einsum("shd,thd->hst", q, k) / math.sqrt(d)
    back = torch.arange(T)[:, None] - torch.arange(T)
    seen = (back >= 0) & (back < (spec["window_size"] or T))
    return torch.einsum("hst,thd->shd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def naive(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, vocabulary) of one sequence, from the format's documents alone."""
    raw = json.loads((folder / "config.json").read_text())
    w = {name: value.double() for name, value in load_file(folder / "model.safetensors").items()}
    eps, heads = raw["norm_eps"], raw["num_heads"]
    specs = {layer: spec for spec in raw["attn"] or [] for layer in spec["layers"]}
    x = w["model.embeddings.weight"][ids]
    for layer in range(raw["num_hidden_layers"]):
        own = {name.split(f"layers.{layer}.")[1]: w[name] for name in w if f"layers.{layer}." in name}
        h = norm(x, own["attn_norm.weight"], eps)
        q, k, v = (h @ own[f"attn.{name}_proj.weight"].T for name in ("q", "k", "v"))
        if layer in specs:
            size = raw["hidden_size"] // specs[layer]["num_heads"]
            o = attend(*(y.unflatten(-1, (-1, size)) for y in (q, k, v)), specs[layer])
        else:
            if raw["use_short_conv"]:
                q, k, v = (conv(y, own[f"attn.{n}_conv1d.weight"]) for n, y in zip("qkv", (q, k, v)))
            q, k, v = (F.silu(y).unflatten(-1, (heads, -1)) for y in (q, k, v))
            beta = torch.sigmoid(h @ own["attn.b_proj.weight"].T) * (1 + raw["allow_neg_eigval"])
            decay = torch.ones_like(beta)
            if raw["model_type"] == "gated_deltanet":
                rate = F.softplus(h @ own["attn.a_proj.weight"].T + own["attn.dt_bias"])
                decay = torch.exp(-own["attn.A_log"].exp() * rate)
            o = norm(recurrence(q, k, v, beta, decay), own["attn.o_norm.weight"], eps)
            if raw["use_gate"]:
                gate = (h @ own["attn.g_proj.weight"].T).unflatten(-1, (heads, -1))
                o = o * (gate.sigmoid() if raw.get("output_gate_activation") == "sigmoid" else F.silu(gate))
        x = x + o.flatten(1) @ own["attn.o_proj.weight"].T
        h = norm(x, own["mlp_norm.weight"], eps)
        inner = F.silu(h @ own["mlp.gate_proj.weight"].T) * (h @ own["mlp.up_proj.weight"].T)
        x = x + inner @ own["mlp.down_proj.weight"].T
    head = w["model.embeddings.weight" if raw["tie_word_embeddings"] else "lm_head.weight"]
    return norm(x, w["model.norm.weight"], eps) @ head.T


@pytest.mark.parametrize("case", CASES)
def test_an_independent_reading_of_the_folder_computes_the_same(tmp_path, case):
    model, folder = written(tmp_path, case)
    ids = tokens(1, 45)
    with torch.no_grad():
        ours = model(ids).logits[0].double()
    # float32 against float64, over four layers: a few rounding errors of logits of size 1 to 10.
    assert (naive(folder, ids[0]) - ours).abs().max() < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_are_those_of_the_configuration(tmp_path, case):
    _, folder = written(tmp_path, case)
    raw = json.loads((folder / "config.json").read_text())
    found = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    assert found == fla.shapes(raw)
    assert raw["hidden_act"] == "swish"  # the only name that the peer takes


def test_the_peer_loads_it_whole_and_computes_the_same(tmp_path, monkeypatch):
    pytest.importorskip("fla")
    from fla_on_cpu import without_kernels
    from transformers import AutoModelForCausalLM

    without_kernels(monkeypatch, conv, recurrence, attend)
    for number, case in enumerate(CASES):
        model, folder = written(tmp_path / str(number), case)
        peer, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(peer).__module__.startswith("fla.models.")
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (case, info)
        ids = tokens(2, 70)  # the peer takes another path from 65 tokens on
        with torch.no_grad():
            # Two programs in float32 that sum in different orders.
            assert (peer.eval()(ids).logits - model(ids).logits).abs().max() < 1e-4, case


def test_one_error_names_everything_that_the_format_cannot_express(tmp_path):
    scaled = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    changes = {
        "qkv_bias": True,
        "mlp_bias": True,
        "qk_norm": "head",
        "state_heads": "shared",
        "state_positions": "fixed",
        "feature_map": "linear",
        "rope_parameters": scaled,
    }
    tiny_model("global", exact_start=True, **changes).save_pretrained(tmp_path / "student")
    with pytest.raises(UserError) as error:
        write_format(tmp_path / "student", tmp_path / "out", "fla")
    for item in ("RoPE in linear layers", "RoPE scaling (linear)", "qkv_activation", "qkv_bias", "mixer_bias",
                 "mlp_bias", "beta_bias", "skip_taps 4", "state_positions fixed", "feature_map linear", "read_gate",
                 "head_norm", "exact_start",
                 "state_heads", "q/k norms in attention layers", "linear_qk_norm"):  # fmt: skip
        assert item in str(error.value), item
    assert {path.name for path in tmp_path.iterdir()} == {"student"}


@pytest.mark.parametrize(
    ("changes", "item"),
    [
        ({"exact_start": True}, "exact_start"),
        ({"beta_bias": True}, "beta_bias"),
        ({"rope_layers": [True] * 4}, "RoPE in linear layers"),
        ({"rope_layers": [False] * 4}, "attention without RoPE"),
        ({"head_dim": 10}, "attention heads of 10"),
        ({"mixer": "delta", "output_gate": True}, "an output gate by sigmoid"),
        ({"skip_taps": 1}, "skip_taps 1"),
    ],
)
def test_a_single_item_is_named_alone(changes, item):
    found = fla.refusals(exportable("fla", "global", **changes).config)
    assert len(found) == 1
    assert item in found[0]
