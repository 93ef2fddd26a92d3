"""A forward with a cache is the same function as one without: however the prompt is cut, padded or forked."""

import copy

import pytest
import torch
from tiny_student import LAYOUTS, tiny_model, tokens
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from deltanet.modeling import CACHE
from deltanet_errors import UserError

VARIANTS = {
    "plain": {},
    "shared": {"state_heads": "shared"},
    "delta": {"mixer": "delta", "beta_max": 2.0},
    "conv": {"conv_kernel": 3, "output_gate": True, "head_norm": True},
    "conv-longer-than-taps": {"conv_kernel": 4, "skip_taps": 2},
    "bare": {"skip_taps": 0, "read_gate": False, "mixer_bias": False},
    "one-tap": {"skip_taps": 1},
    "exact-start": {"exact_start": True},
    "local": {"local_window": 6, "exact_start": True},
    "local-conv": {"local_window": 4, "conv_kernel": 6, "state_heads": "shared"},
    "mapped": {"feature_map": "linear"},
    "local-mapped": {"local_window": 6, "feature_map": "linear", "state_heads": "shared"},
    "fixed": {"state_positions": "fixed"},
    "local-fixed": {"local_window": 6, "state_positions": "fixed", "feature_map": "linear"},
    "local-untapped": {"local_window": 40, "skip_taps": 0},
    "qwen3-like": {"qk_norm": "head", "qkv_bias": True},
}
EXACT = 1e-5  # float32 logits of order 1 to 10


def run(model, ids, cache=None, **kwargs):
    out = model(ids, **{CACHE: cache}, use_cache=True, **kwargs)
    return out.logits, out[CACHE]


@pytest.mark.parametrize(
    ("layout", "variant"),
    [("global", variant) for variant in VARIANTS]
    + [(layout, v) for layout in ("none", "swa") for v in ("plain", "conv", "local")],
)
@torch.no_grad()
def test_every_split_of_a_prompt_equals_the_whole(layout, variant):
    model, ids = tiny_model(layout, **VARIANTS[variant]), tokens(2, 33)
    whole = model(ids, use_cache=False).logits
    for split in range(1, 33):
        first, cache = run(model, ids[:, :split])
        second, _ = run(model, ids[:, split:], cache)
        assert (torch.cat([first, second], 1) - whole).abs().max() < EXACT, f"split at {split}"


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_blocks_of_20_3_1_7_then_single_tokens_equal_the_whole(layout):
    model, ids = tiny_model(layout), tokens(1, 41)
    whole, parts, cache, start = model(ids, use_cache=False).logits, [], None, 0
    for size in (20, 3, 1, 7, *[1] * 10):
        logits, cache = run(model, ids[:, start : start + size], cache)
        parts.append(logits)
        start += size
    assert (torch.cat(parts, 1) - whole).abs().max() < EXACT


@torch.no_grad()
def test_a_copied_cache_continues_without_touching_its_sibling():
    model, ids = tiny_model(), tokens(1, 12)
    suffixes = tokens(1, 5, seed=5), tokens(1, 5, seed=6)
    _, cache = run(model, ids)
    caches = [copy.deepcopy(cache), cache]
    continued = [run(model, suffix, c)[0] for suffix, c in zip(suffixes, caches)]
    for suffix, logits in zip(suffixes, continued):
        whole = model(torch.cat([ids, suffix], 1)).logits[:, 12:]
        assert (logits - whole).abs().max() < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("side", ["left", "right", "inside"])
@torch.no_grad()
def test_padding_is_a_no_op_for_logits_and_for_what_follows(layout, side):
    # transformers' sliding windows count columns, padding included: inside padding, keep it within one window.
    window = {"sliding_window": 16} if (layout, side) == ("swa", "inside") else {}
    model = tiny_model(layout, conv_kernel=3, exact_start=True, **window)
    lengths, width = (3, 9, 1, 7), 9
    rows = [tokens(1, n, seed=n) for n in lengths]
    next_ids = tokens(len(rows), 1, seed=77)
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        n = row.shape[1]
        columns = {
            "left": range(width - n, width),
            "right": range(n),
            "inside": sorted(sorted(range(width), key=lambda column: column % 2)[:n]),
        }[side]
        ids[i, columns], mask[i, columns] = row[0], 1
    logits, cache = run(model, ids, attention_mask=mask)
    after, _ = run(model, next_ids, cache, attention_mask=torch.cat([mask, torch.ones_like(next_ids)], 1))
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, next_ids[i : i + 1]], 1), use_cache=False).logits[0]
        assert (logits[i][mask[i].bool()] - alone[:-1]).abs().max() < EXACT
        if layout != "swa" or side != "right":  # the rolled window holds columns, padding included
            assert (after[i, 0] - alone[-1]).abs().max() < EXACT


@pytest.mark.parametrize("variant", ["plain", "conv", "exact-start", "local", "local-fixed"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pieces", [(8, 1), (2, 6, 1), (1,) * 9])
@torch.no_grad()
def test_a_padded_prompt_may_be_run_in_pieces_of_one_token_too(variant, side, pieces):
    model, width = tiny_model(**VARIANTS[variant]), 9
    rows, next_ids = [tokens(1, n, seed=n) for n in (3, 9, 1, 8)], tokens(4, 2, seed=77)
    ids, mask = torch.full((len(rows), width), 5), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(width - row.shape[1], None) if side == "left" else slice(row.shape[1])
        ids[i, columns], mask[i, columns] = row[0], 1
    ids, mask = torch.cat([ids, next_ids], 1), torch.cat([mask, torch.ones_like(next_ids)], 1)
    parts, cache, start = [], None, 0
    for size in (*pieces, 1, 1):
        logits, cache = run(model, ids[:, start : start + size], cache, attention_mask=mask[:, : start + size])
        parts.append(logits)
        start += size
    logits = torch.cat(parts, 1)
    for i, row in enumerate(rows):
        alone = model(torch.cat([row, next_ids[i : i + 1]], 1), use_cache=False).logits[0]
        assert (logits[i][mask[i].bool()] - alone).abs().max() < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_mask_may_be_as_long_as_the_text_that_is_yet_to_come(layout):
    model, ids = tiny_model(layout), tokens(2, 12)
    mask = torch.zeros(2, 30, dtype=torch.long)
    mask[:, :12] = 1
    whole = model(ids, use_cache=False).logits
    assert (model(ids, attention_mask=mask, use_cache=False).logits - whole).abs().max() < EXACT
    first, cache = run(model, ids[:, :5], attention_mask=mask)
    second, _ = run(model, ids[:, 5:], cache, attention_mask=mask)
    assert (torch.cat([first, second], 1) - whole).abs().max() < EXACT


@torch.no_grad()
def test_padding_leaves_no_trace_in_the_state():
    model, row = tiny_model("none"), tokens(1, 7)
    _, alone = run(model, row)
    padded = torch.cat([torch.full((1, 4), 9), row], 1)
    mask = torch.tensor([[0] * 4 + [1] * 7])
    _, cache = run(model, padded, attention_mask=mask)
    for a, b in zip(alone.layers, cache.layers):
        assert (a.recurrent_states[0] - b.recurrent_states[0]).abs().max() < 1e-6
        assert (a.conv_states[0] - b.conv_states[0]).abs().max() < 1e-6


@pytest.mark.parametrize("cut", [2, 3, 5])
@torch.no_grad()
def test_a_row_that_begins_after_a_first_chunk_of_padding_has_its_first_token_there(cut):
    model, rows, width = tiny_model("global", exact_start=True), (tokens(1, 8), tokens(1, 5, seed=4)), 8
    ids, mask = torch.full((2, width), 5), torch.zeros(2, width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, width - row.shape[1] :], mask[i, width - row.shape[1] :] = row[0], 1
    first, cache = run(model, ids[:, :cut], attention_mask=mask[:, :cut])
    second, _ = run(model, ids[:, cut:], cache, attention_mask=mask)
    logits = torch.cat([first, second], 1)
    for i, row in enumerate(rows):
        assert (logits[i][mask[i].bool()] - model(row, use_cache=False).logits[0]).abs().max() < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_cache_made_without_a_configuration_will_do(layout):
    model, ids = tiny_model(layout, conv_kernel=3), tokens(2, 12)
    _, cache = run(model, ids[:, :7], DynamicCache())
    assert (run(model, ids[:, 7:], cache)[0] - model(ids, use_cache=False).logits[:, 7:]).abs().max() < EXACT


@pytest.mark.skipif("reset" not in vars(DynamicLayer), reason="an older transformers keeps the tokens of attention")
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_reset_cache_begins_anew(layout):
    model, ids = tiny_model(layout, conv_kernel=3, exact_start=True), tokens(2, 12)
    _, cache = run(model, tokens(2, 9, seed=4))
    cache.reset()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **options, **{CACHE: cache}), model.generate(ids, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_cache_can_be_stored(layout, tmp_path):
    model, ids = tiny_model(layout, conv_kernel=3), tokens(1, 12)
    _, cache = run(model, ids[:, :7])
    torch.save(cache, tmp_path / "prefix.pt")
    cache = torch.load(tmp_path / "prefix.pt", weights_only=False)
    assert cache.get_seq_length() == 7
    assert (run(model, ids[:, 7:], cache)[0] - model(ids, use_cache=False).logits[:, 7:]).abs().max() < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [5, 8])
def test_a_prompt_that_is_in_the_cache_already_is_refused(layout, length):
    model, ids = tiny_model(layout), tokens(1, 8)
    _, cache = run(model, ids)
    with pytest.raises(UserError, match=f"the cache holds 8 tokens, and the prompt has {length}: none is left"):
        model.generate(ids[:, :length], max_new_tokens=2, pad_token_id=0, **{CACHE: cache})


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_the_rows_of_a_cache_can_be_repeated_and_chosen(layout):
    model, rows, more = tiny_model(layout, conv_kernel=3), tokens(2, 9), tokens(4, 3, seed=4)
    _, cache = run(model, rows)
    cache.batch_repeat_interleave(3)
    chosen = torch.tensor([5, 0, 1, 3])
    cache.batch_select_indices(chosen)
    whole = model(torch.cat([rows.repeat_interleave(3, 0)[chosen], more], 1), use_cache=False).logits[:, 9:]
    assert (run(model, more, cache)[0] - whole).abs().max() < EXACT


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_a_chunk_may_be_padding_in_every_row(layout):
    model, rows = tiny_model(layout, conv_kernel=3, exact_start=True), tokens(2, 5)
    ids = torch.cat([torch.full((2, 8), 5), rows], 1)
    mask = torch.tensor([[0] * 8 + [1] * 5] * 2)
    parts, cache = [], None
    for start, end in ((0, 4), (4, 7), (7, 13)):
        logits, cache = run(model, ids[:, start:end], cache, attention_mask=mask[:, :end])
        parts.append(logits)
    assert (torch.cat(parts, 1)[:, 8:] - model(rows, use_cache=False).logits).abs().max() < EXACT


@torch.no_grad()
def test_a_mask_that_cannot_be_followed_is_refused():
    model, ids = tiny_model(), tokens(1, 9)
    _, cache = run(model, ids)
    with pytest.raises(ValueError, match="attention_mask has 3 columns for 12 tokens"):
        run(model, ids[:, :3], cache, attention_mask=torch.ones(1, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask has 4 dimensions"):
        run(model, ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
