"""A student on a CUDA device, on the kernels: the same function as on a CPU."""

import pytest
import torch
from tiny_student import LAYOUTS, tiny_model, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
VARIANTS = {
    "expanded": {},
    "shared": {"state_heads": "shared"},
    "delta": {"mixer": "delta", "beta_max": 2.0},
    "local": {"local_window": 16},
    "mapped": {"feature_map": "linear", "state_heads": "shared"},
    "local-mapped": {"local_window": 16, "feature_map": "linear"},
    "local-fixed": {"local_window": 16, "feature_map": "linear", "state_positions": "fixed"},
}


def both(layout: str, variant: str):
    changes = {"head_dim": 16, **VARIANTS[variant]}
    return tiny_model(layout, **changes), tiny_model(layout, **changes).cuda()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_values_and_gradients_equal_those_of_a_cpu(layout, variant):
    cpu, gpu = both(layout, variant)
    ids = tokens(2, 150)
    expected, got = cpu(ids, labels=ids), gpu(ids.cuda(), labels=ids.cuda())
    assert (
        expected.logits - got.logits.cpu()
    ).abs().max() < 2e-3  # TF32 products inside the kernels, three per product
    expected.loss.backward()
    got.loss.backward()
    for (name, a), b in zip(cpu.named_parameters(), gpu.parameters()):
        assert (a.grad - b.grad.cpu()).norm() <= 5e-3 * a.grad.norm() + 1e-6, name


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_bfloat16_cached_decoding_follows_the_whole(layout):
    _, gpu = both(layout, "expanded")
    gpu, ids = gpu.bfloat16(), tokens(2, 80).cuda()
    whole, cache, parts = gpu(ids, use_cache=False).logits.float(), None, []
    for piece in ids.split([50, 10, 1, 1, 18], 1):
        out = gpu(piece, past_key_values=cache, use_cache=True)
        cache = out.get("cache", out.get("past_key_values"))
        parts.append(out.logits.float())
    assert (torch.cat(parts, 1) - whole).norm() < 0.02 * whole.norm()


def test_packed_documents_stay_apart():
    _, gpu = both("none", "expanded")
    ids = tokens(1, 130).cuda()
    cu_seqlens = torch.tensor([0, 70, 71, 130], dtype=torch.int32, device="cuda")
    embeds = gpu.get_input_embeddings()(ids).detach().requires_grad_()
    logits = gpu(inputs_embeds=embeds, cu_seqlens=cu_seqlens).logits
    alone = gpu(ids[:, 71:], use_cache=False).logits
    assert (logits[:, 71:] - alone).abs().max() < 2e-3
    logits[:, 71:].logsumexp(-1).sum().backward()
    assert (embeds.grad[:, :71] == 0).all()


def test_generation_equals_that_of_a_cpu():
    cpu, gpu = both("global", "expanded")
    ids = tokens(2, 40)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(cpu.generate(ids, **options), gpu.generate(ids.cuda(), **options).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rejected_tokens_are_taken_back(layout):
    cpu, gpu = both(layout, "expanded")
    ids = tokens(1, 12).repeat(1, 3)
    options = {"max_new_tokens": 30, "do_sample": False}
    assisted = gpu.generate(ids.cuda(), prompt_lookup_num_tokens=4, **options)
    assert torch.equal(cpu.generate(ids, **options), assisted.cpu())


def test_compiles_without_a_graph_break():
    _, gpu = both("none", "expanded")
    ids = tokens(2, 64).cuda()
    compiled = torch.compile(gpu, fullgraph=True)
    loss = compiled(ids, labels=ids, use_cache=False).loss
    loss.backward()
    assert abs(loss - gpu(ids, labels=ids, use_cache=False).loss) < 1e-3
