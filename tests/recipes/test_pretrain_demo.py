"""The recipe that makes a teacher from nothing, by the very lines at its head, for a few steps."""

import json
import shutil

import torch
from transformers import LlamaForCausalLM

from deltanet import load_student
from distill.recipe import recipes_folder
from distill.run import distil

RECIPE = recipes_folder() / "pretrain-demo.yaml"
DEMO = recipes_folder() / "demo"


def test_what_it_makes_is_a_plain_llama_that_has_learnt_something(tmp_path):
    head = RECIPE.read_text(encoding="utf-8").partition("version:")[0].splitlines()
    lines = [line.removeprefix("#   ") for line in head if "set_seed" in line or "_pretrained" in line]
    code = "\n".join(lines).replace("recipes/demo", str(DEMO)).replace('"fresh"', "FRESH")
    exec(code, {"FRESH": str(tmp_path / "fresh")})
    overrides = [
        f"teacher.model={tmp_path / 'fresh'}", f"data.sources.0.path={DEMO / 'text.txt'}", "data.seq_len=64",
        "stages.0.steps=6", "stages.0.warmup_steps=0", "training.batch_size=8", "training.micro_batch_size=8",
        "training.dtype=float32", "data.held_out=0.1", "evaluation.tokens=512",
    ]  # fmt: skip
    facts = distil(RECIPE, overrides, output=tmp_path / "run")
    before, after = facts["results"][0]["perplexity"], facts["results"][-1]["perplexity"]
    assert 700 < before < 1500  # of 1024 tokens: it knows nothing
    assert after < 0.6 * before
    export = tmp_path / "run" / "export"
    student = load_student(export)
    assert set(student.config.layer_types) == {"full_attention"}
    shutil.copy(tmp_path / "fresh" / "config.json", export / "config.json")
    llama = LlamaForCausalLM.from_pretrained(export)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, student(ids).logits, rtol=1e-4, atol=1e-4)
    assert json.loads((export / "config.json").read_text())["model_type"] == "llama"
