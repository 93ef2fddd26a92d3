"""The linear layer with a window beside its state, against a loop over tokens. Its caches: test_modeling_cache.py."""

import pytest
import torch
import torch.nn.functional as F
from tiny_student import tiny_model
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from deltanet.history import History

WINDOW, TOKENS = 5, 23


def mixer_and_input(**changes):
    mixer = tiny_model("none", local_window=WINDOW, **changes).double().model.layers[0].self_attn
    x = torch.randn(2, TOKENS, 48, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return mixer, x


def by_hand(mixer, q, k, v, beta, g, reach=WINDOW) -> torch.Tensor:
    """(B, T, HQ, hd): at each token what the states say that the tokens behind the window have written."""
    k = mixer.expand(k)
    if mixer.config.feature_map == "linear":
        own = (torch.eye(8) + module.weight for module in (mixer.q_map, mixer.k_map))
        q, k = (torch.stack([x[:, :, head] @ m for head, m in enumerate(w)], 2) for x, w in zip((q, k), own))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    v, heads = mixer.expand(v), k.shape[2]
    state = q.new_zeros(len(q), heads, q.shape[-1], q.shape[-1])
    read = torch.zeros_like(q)
    for t in range(q.shape[1]):
        if (left := t - reach) >= 0:
            decay = 1.0 if g is None else g[:, left, :, None, None].exp()
            state = decay * state
            new = v[:, left] - torch.einsum("bhkv,bhk->bhv", state, k[:, left])
            state = state + torch.einsum("bhk,bhv->bhkv", k[:, left], beta[:, left, :, None] * new)
        own = state.repeat_interleave(q.shape[2] // heads, 1)
        read[:, t] = torch.einsum("bhkv,bhk->bhv", own, q[:, t])
    return read


@pytest.mark.parametrize("feature_map", ["none", "linear"])
@pytest.mark.parametrize("state_heads", ["shared", "expanded"])
@pytest.mark.parametrize("kind", ["gated_delta", "delta"])
@torch.no_grad()
def test_a_state_holds_what_has_left_the_window(kind, state_heads, feature_map):
    mixer, x = mixer_and_input(mixer=kind, state_heads=state_heads, feature_map=feature_map)
    q, k, v, _ = mixer.project(x, None)
    beta, g = mixer.strengths(x)
    read = mixer.read_texts(q, k, v, beta, g, None)
    expected = by_hand(mixer, q, k, v, beta, g)
    assert (read - expected).abs().max() < 1e-5  # beta and g are float32
    assert (read[:, :WINDOW] == 0).all()
    assert (read[:, WINDOW:].abs().amax((1, 2, 3)) > 0.01).all()
    whole = mixer.combine(x, expected, History(v.flatten(2), 3), mixer.attend(q, k, v))
    assert (mixer(x)[0] - mixer.o_proj(whole)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gated_delta", "delta"])
@pytest.mark.parametrize("reach", [0, WINDOW])
@torch.no_grad()
def test_with_fixed_positions_all_that_a_state_holds_stands_as_far_back_as_the_window_reaches(kind, reach):
    model = tiny_model("none", mixer=kind, local_window=reach, state_positions="fixed", feature_map="linear").double()
    mixer, rotary = model.model.layers[0].self_attn, model.model.rotary_emb
    _, x = mixer_and_input()
    positions = torch.arange(100, 100 + TOKENS)[None]
    rotation = rotary(x, position_ids=positions)
    q, k, v, _ = mixer.project(x, rotation)
    beta, g = mixer.strengths(x)
    plain_q, plain_k, _, _ = mixer.project(x, None)
    cos, sin = rotary(x, position_ids=torch.tensor([[reach]]))
    back = apply_rotary_pos_emb(plain_k, plain_k, cos, -sin, unsqueeze_dim=2)[0]
    expected = by_hand(mixer, plain_q, back, v, beta, g, reach)
    assert (mixer.read_texts(q, k, v, beta, g, rotation) - expected).abs().max() < 1e-5
    if reach:  # the teacher's attention in the window is turned as ever
        whole = mixer.combine(x, expected, History(v.flatten(2), 3), mixer.attend(q, k, v))
        assert (mixer(x, rotation)[0] - mixer.o_proj(whole)).abs().max() < 1e-5


@pytest.mark.parametrize("tokens", [1, WINDOW])
@torch.no_grad()
def test_a_text_no_longer_than_the_window_reads_no_state(tokens):
    mixer, x = mixer_and_input()
    before, longer = mixer(x[:, :tokens])[0], mixer(x[:, : WINDOW + 1])[0]
    mixer.read_proj.weight.normal_(generator=torch.Generator().manual_seed(3))
    assert torch.equal(before, mixer(x[:, :tokens])[0])
    assert not torch.equal(longer, mixer(x[:, : WINDOW + 1])[0])


@torch.no_grad()
def test_a_feature_map_changes_nothing_until_it_is_trained():
    mixer, x = mixer_and_input(feature_map="linear")
    trained = mixer(x)[0]
    for module in (mixer.q_map, mixer.k_map):
        module.reset_parameters()
    start = mixer(x)[0]
    mixer.features = lambda q, k, position_embeddings: (q, mixer.expand(k))
    assert torch.equal(start, mixer(x)[0])
    assert (trained - start).abs().max() > 1e-3
