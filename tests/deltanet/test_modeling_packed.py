"""Packed documents do not see each other, in values and in gradients."""

import pytest
import torch
import torch.nn.functional as F
from tiny_student import LAYOUTS, tiny_model, tokens


def boundaries(*lengths: int) -> torch.Tensor:
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_packed_equals_separate(layout, attention):
    model = tiny_model(layout, conv_kernel=3, exact_start=True)
    model.set_attn_implementation(attention)
    lengths = (5, 1, 20, 0, 2, 70, 1)
    documents = [tokens(1, n, seed=i) for i, n in enumerate(lengths)]
    packed = model(torch.cat(documents, 1), cu_seqlens=boundaries(*lengths)).logits
    separate = torch.cat([model(d, use_cache=False).logits for d in documents if d.shape[1]], 1)
    assert (packed - separate).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_the_second_document_with_respect_to_the_first_is_exactly_zero(layout):
    model, ids = tiny_model(layout, conv_kernel=3, exact_start=True), tokens(1, 40)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeds, cu_seqlens=boundaries(17, 23)).logits
    logits[:, 17:].logsumexp(-1).sum().backward()
    assert (embeds.grad[:, :17] == 0).all()
    assert (embeds.grad[:, 17:] != 0).any()


@torch.no_grad()
def test_the_loss_of_packed_documents_is_the_mean_of_the_separate_ones():
    model, lengths = tiny_model(), (9, 4)
    documents = [tokens(1, n, seed=n) for n in lengths]
    packed = model(torch.cat(documents, 1), labels=torch.cat(documents, 1), cu_seqlens=boundaries(*lengths)).loss
    separate = sum(model(d, labels=d).loss * (d.shape[1] - 1) for d in documents) / (8 + 3)
    assert abs(packed - separate) < 1e-5


@torch.no_grad()
def test_a_document_does_not_change_when_its_neighbour_does():
    model, cu = tiny_model(), boundaries(11, 12)
    ids = tokens(1, 23)
    other = ids.clone()
    other[:, :11] = tokens(1, 11, seed=9)
    assert torch.equal(model(ids, cu_seqlens=cu).logits[:, 11:], model(other, cu_seqlens=cu).logits[:, 11:])


@torch.no_grad()
def test_positions_that_restart_tell_documents_to_linear_layers_too():
    model, lengths = tiny_model(conv_kernel=3, exact_start=True), (4, 1, 7)
    rows = [tokens(1, n, seed=n) for n in lengths]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    logits = model(torch.cat(rows, 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(row, use_cache=False).logits for row in rows], 1)
    assert (logits - alone).abs().max() < 1e-5
    with pytest.raises(ValueError, match="position_ids restart within a row"):
        model(torch.cat(rows, 1).repeat(2, 1), position_ids=positions.repeat(2, 1), use_cache=False)
