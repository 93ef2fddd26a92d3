"""How linear a layer is. Twin of convert/ranking/linearity.py."""

import pytest
import torch
from tiny import make_teacher, tokens

from convert import load_teacher
from convert.ranking.linearity import PARTS, LinearMap, linearity

PLANTED = 2


@pytest.fixture
def planted(tmp_path):
    """A random teacher whose layer PLANTED hands its input on unchanged."""
    make_teacher(tmp_path / "teacher")
    model = load_teacher(tmp_path / "teacher", torch.float32)
    block = model.model.layers[PLANTED]
    with torch.no_grad():
        for projection in (block.self_attn.o_proj, block.mlp.down_proj):
            projection.weight.zero_()
            projection.bias.zero_()
    return model


def test_an_exactly_linear_layer_scores_one_and_the_others_less(planted):
    ids = tokens(32, 65)
    found = linearity(planted, ids[:24], ids[24:])
    assert [row["layer"] for row in found] == [0, 1, 2, 3]
    blocks = [row["block"] for row in found]
    assert blocks[PLANTED] == pytest.approx(1, abs=1e-4)  # the ridge of 1e-6 leaves about that much
    assert max(score for layer, score in enumerate(blocks) if layer != PLANTED) < 0.98


def test_a_layer_is_less_linear_without_the_stream_it_adds_to(planted):
    ids = tokens(32, 65)
    for row in linearity(planted, ids[:24], ids[24:]):
        assert set(row) == {"layer", *PARTS}
        if row["layer"] != PLANTED:
            assert row["increment"] < row["block"]


def test_unrelated_tokens_are_not_linear_however_few_they_are():
    """On the tokens of the fit themselves 40 units would explain 40 of 60 random tokens."""
    generator = torch.Generator().manual_seed(0)
    x, y, unseen_x, unseen_y = (torch.randn(60, 40, generator=generator) for _ in range(4))
    linear_map = LinearMap(40, 40, x.device)
    linear_map.fit(x, y)
    linear_map.solve()
    linear_map.score(unseen_x, unseen_y)
    assert linear_map.share() < 0.1


def test_the_map_has_a_constant_and_is_gathered_over_batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, 6, generator=generator)
    y = x @ torch.randn(6, 3, generator=generator) + 5
    linear_map = LinearMap(6, 3, x.device)
    for some_x, some_y in zip(x[:6].split(2), y[:6].split(2)):
        linear_map.fit(some_x, some_y)
    linear_map.solve()
    for some_x, some_y in zip(x[6:], y[6:]):
        linear_map.score(some_x, some_y)
    assert linear_map.share() == pytest.approx(1, abs=1e-6)  # the ridge is 1e-6
