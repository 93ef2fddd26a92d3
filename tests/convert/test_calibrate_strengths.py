"""Half-life and write strength: what is put into a context is found again. Twin of convert/calibration/strengths.py."""

import math

import pytest
import torch

from convert.calibration import Settings, fit_strengths, head_metric
from convert.calibration.strengths import attention_targets, inverse_softplus, shifted
from deltanet import DeltaNetConfig
from deltanet.mixer import DeltaMixer


def mixer_of(**changes) -> DeltaMixer:
    values = {
        "hidden_size": 24,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "num_hidden_layers": 1,
        "layer_types": ["linear_attention"],
    }
    torch.manual_seed(0)
    mixer = DeltaMixer(DeltaNetConfig(**{**values, **changes}), 0)
    torch.nn.init.normal_(mixer.o_proj.weight)
    return mixer.requires_grad_(False)


def inputs() -> torch.Tensor:
    return torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(1))


def fit(mixer, context, **changes):
    settings = Settings(half_lives=(4, 16, 64), betas=(0.1, 0.3, 0.8), sweeps=1, importance=False)
    metric = head_metric(mixer.o_proj.weight, mixer.num_heads)
    return fit_strengths(mixer, inputs(), None, context, metric, Settings(**{**vars(settings), **changes}))


@pytest.mark.parametrize("state_heads", ["shared", "expanded"])
def test_the_half_life_and_strength_that_made_a_context_are_found(state_heads):
    mixer = mixer_of(state_heads=state_heads)
    count = mixer.config.num_state_heads
    half_life = torch.tensor([4.0, 64.0, 16.0, 4.0])[:count]
    beta = torch.tensor([0.8, 0.1, 0.3, 0.1])[:count]
    mixer.a_proj.bias.copy_(inverse_softplus(math.log(2) / half_life))
    mixer.b_proj.bias.copy_(torch.logit(beta))
    x = inputs()
    q, k, v, _ = mixer.project(x, None)
    context = mixer.read_texts(q, k, v, *mixer.strengths(x), None) * 3 + shifted(v.repeat_interleave(2, 2), 1)
    mixer.reset_to_plain_copy()
    found = fit(mixer, context)
    torch.testing.assert_close(torch.tensor(found.half_life), half_life, rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(found.beta), beta, rtol=1e-3, atol=0)
    assert min(found.explained) > 0.999
    remade = mixer.read_texts(q, k, v, *mixer.strengths(x), None) * 3 + shifted(v.repeat_interleave(2, 2), 1)
    torch.testing.assert_close(remade, context, rtol=1e-3, atol=1e-4)


def test_the_delta_rule_without_decay_is_searched_in_its_strength_alone():
    mixer = mixer_of(mixer="delta", state_heads="shared")
    mixer.b_proj.bias.copy_(torch.logit(torch.tensor([0.8, 0.1])))
    x = inputs()
    q, k, v, _ = mixer.project(x, None)
    context = mixer.read_texts(q, k, v, *mixer.strengths(x), None)
    found = fit(mixer, context)
    torch.testing.assert_close(torch.tensor(found.beta), torch.tensor([0.8, 0.1]), rtol=1e-3, atol=0)
    assert found.half_life == [math.inf, math.inf]


def test_a_slope_is_kept_only_where_it_explains_more():
    mixer = mixer_of()
    x = inputs()
    context = torch.randn(3, 64, 4, 8, generator=torch.Generator().manual_seed(3))
    without = fit(mixer, context, importance=False)
    with_slopes = fit(mixer_of(), context, importance=True, decay_slope=True)
    assert all(b >= a - 1e-5 for a, b in zip(without.explained, with_slopes.explained))
    assert x.shape[-1] == mixer.b_proj.weight.shape[-1]
    assert not mixer.b_proj.weight.any()


@pytest.mark.parametrize("window", [None, 9])
def test_attention_targets_equal_the_sums_written_out(window):
    mixer = mixer_of()
    x = inputs()[:1, :24]
    drawn, past, kept = attention_targets(mixer, x, None, window)
    q, k, _, _ = mixer.project(x, None)
    for head in (0, 3):
        weights = torch.zeros(24, 24)
        for i in range(24):
            first = 0 if window is None else max(i - window + 1, 0)
            scores = torch.stack([q[0, i, head] @ k[0, j, head // 2] / math.sqrt(8) for j in range(first, i + 1)])
            weights[i, first : i + 1] = torch.softmax(scores, 0)
        for position, t in enumerate(range(*kept.indices(24))):
            later = sum(weights[i, t] for i in range(t + 4, 24))
            assert drawn[0, position, head].exp().item() == pytest.approx(max(float(later), 1e-5), rel=1e-3)
            share = [weights[i, 1:t].sum() for i in range(t, min(t + 16, 24))]
            assert past[0, position, head].exp().item() == pytest.approx(
                max(float(sum(share) / len(share)), 1e-4), rel=1e-2
            )
