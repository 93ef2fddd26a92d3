"""Tokens taken back leave no trace: what follows is what decoding the kept tokens alone gives."""

import copy

import pytest
import torch
from tiny_student import LAYOUTS, tiny_model, tokens
from transformers import DynamicCache

from deltanet import UserError, rollback
from deltanet.modeling import CACHE
from deltanet.rollback import StateLayer

pytestmark = pytest.mark.skipif(not hasattr(DynamicCache, "activate_past_recording"), reason="an older transformers")
VARIANTS = {
    "gated": {},
    "delta": {"mixer": "delta", "beta_max": 2.0, "state_heads": "shared"},
    "conv": {"conv_kernel": 4, "skip_taps": 2, "output_gate": True},
    "local": {"local_window": 5, "exact_start": True},
    "local-mapped": {"local_window": 5, "feature_map": "linear"},
    "local-fixed": {"local_window": 5, "state_positions": "fixed"},
    "bare": {"skip_taps": 0, "read_gate": False, "mixer_bias": False},
}
EXACT = 1e-5  # float32 logits of order 1 to 10


def run(model, ids, cache=None):
    out = model(ids, **{CACHE: cache}, use_cache=True)
    return out.logits, out[CACHE]


def recording(model, prompt, at_once=True):
    """A cache that has seen the prompt, and records; at_once: already while the prompt was read."""
    cache = DynamicCache(config=model.config)
    if at_once:
        cache.activate_past_recording()
    _, cache = run(model, prompt, cache)
    cache.activate_past_recording()
    cache.crop(0)
    return cache


def states(cache):
    return [layer.recurrent_states[0] for layer in cache.layers if isinstance(layer, StateLayer)]


@pytest.mark.parametrize(
    ("layout", "variant"), [*(("global", v) for v in VARIANTS), ("none", "conv"), ("swa", "gated")]
)
@torch.no_grad()
def test_any_number_of_accepted_tokens_continues_like_plain_decoding(layout, variant):
    model, prompt, draft = tiny_model(layout, **VARIANTS[variant]), tokens(2, 21), tokens(2, 6, seed=2)
    following = tokens(2, 4, seed=3)
    for accepted in range(7):
        cache = recording(model, prompt, at_once=accepted % 2 == 0)
        run(model, draft, cache)
        cache.crop(accepted - 6)
        _, plain = run(model, prompt)
        for t in range(accepted):
            run(model, draft[:, t : t + 1], plain)
        got, expected = run(model, following, cache)[0], run(model, following, plain)[0]
        assert (got - expected).abs().max() < EXACT, f"{accepted} accepted"
        whole = model(torch.cat([prompt, draft[:, :accepted], following], 1), use_cache=False).logits
        assert (got - whole[:, -4:]).abs().max() < EXACT


@torch.no_grad()
def test_round_after_round_leaves_the_state_of_plain_decoding():
    model, prompt = tiny_model("global", conv_kernel=3), tokens(1, 5)
    cache, kept = recording(model, prompt), prompt
    for n, accepted in enumerate([0, 3, 5, 1, 0, 2] * 4):
        draft = tokens(1, 5, seed=10 + n)
        for piece in draft.split([2, 3], 1):  # a round may take several calls
            run(model, piece, cache)
        cache.crop(accepted - 5)
        kept = torch.cat([kept, draft[:, :accepted]], 1)
    _, plain = run(model, kept)
    assert cache.get_seq_length() == kept.shape[1]
    for a, b in zip(states(cache), states(plain)):
        assert (a - b).abs().max() < EXACT


@torch.no_grad()
def test_the_first_layers_state_is_bitwise_that_of_single_steps():
    # Behind the first layer, products of several rows may round differently from those of one.
    model, prompt, draft = tiny_model("none"), tokens(1, 9), tokens(1, 5, seed=2)
    cache = recording(model, prompt, at_once=False)
    expected = copy.deepcopy(cache)
    layer, mixer = cache.layers[0], model.model.layers[0].self_attn
    seen = []
    note = layer.note
    layer.note = lambda *a: (seen.append([None if x is None else x.clone() for x in a]), note(*a))
    run(model, draft, cache)
    cache.crop(-2)
    state = expected.layers[0].recurrent_states[0]
    (k, v, beta, g, _), z = seen[0], torch.zeros(1, 1, mixer.num_heads, mixer.head_dim)
    for t in range(3):
        k_t, v_t, beta_t, g_t = (x[:, t : t + 1] for x in (k, v, beta, g))
        rollback.delta_rule_step_(z, k_t, v_t, beta_t, state, g=g_t, scale=1.0, normalize_qk=True)
    assert torch.equal(layer.recurrent_states[0], state)


@torch.no_grad()
def test_recording_longer_than_its_memory_forgets_the_oldest(monkeypatch):
    monkeypatch.setattr(rollback, "CAPACITY", 8)
    monkeypatch.setattr("deltanet.mixer.CAPACITY", 8)
    model, prompt, more = tiny_model("none", conv_kernel=3), tokens(1, 30), tokens(1, 11, seed=2)
    cache = recording(model, prompt)
    for t in range(11):
        run(model, more[:, t : t + 1], cache)
    cache.crop(-4)
    whole = model(torch.cat([prompt, more[:, :7], more[:, :3]], 1), use_cache=False).logits
    assert (run(model, more[:, :3], cache)[0] - whole[:, -3:]).abs().max() < EXACT
    with pytest.raises(UserError, match="3 are recorded"):
        cache.layers[0].crop(-9)


@torch.no_grad()
def test_everything_taken_back_begins_anew():
    model, prompt = tiny_model("none", conv_kernel=3, exact_start=True), tokens(1, 7)
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    run(model, tokens(1, 5, seed=4), cache)
    cache.crop(-5)
    whole = model(prompt, use_cache=False).logits
    assert (run(model, prompt, cache)[0] - whole).abs().max() < EXACT
    assert cache.get_seq_length() == 7


@torch.no_grad()
def test_no_step_allocates_memory_for_recording():
    model = tiny_model("none", conv_kernel=3)
    cache = recording(model, tokens(1, 9))
    kept = lambda: [x.data_ptr() for y in cache.layers for x in (*y.writes, y.before, y.vectors, *states(cache))]
    run(model, tokens(1, 3), cache)
    before = kept()
    for accepted in (0, 1, 3):
        run(model, tokens(1, 3), cache)
        cache.crop(accepted - 3)
    assert kept() == before


@torch.no_grad()
def test_refuses_what_was_not_recorded_and_changes_nothing():
    model = tiny_model("none")
    _, cache = run(model, tokens(1, 9))
    before = [x.clone() for x in states(cache)]
    with pytest.raises(UserError, match=r"crop\(-1\).*activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(UserError, match=r"crop\(3\)"):
        cache.crop(3)
    assert all(torch.equal(a, b) for a, b in zip(states(cache), before))
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("assistant", ["itself", "another", "prompt"])
def test_assisted_generation_equals_greedy(layout, assistant):
    model, prompt = tiny_model(layout, conv_kernel=3), tokens(1, 12).repeat(1, 3)
    options = {"max_new_tokens": 40, "do_sample": False}
    helpers = {
        "itself": {"assistant_model": tiny_model(layout, conv_kernel=3)},
        "another": {"assistant_model": tiny_model("none", seed=1)},
        "prompt": {"prompt_lookup_num_tokens": 4},
    }
    assert torch.equal(model.generate(prompt, **options), model.generate(prompt, **options, **helpers[assistant]))
