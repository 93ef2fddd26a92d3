"""A student by its id on the Hub is held to the same bounds as a folder, before memory is taken for it."""

import json
import resource

import pytest
import torch
from published import files_of
from transformers import AutoModelForCausalLM

from deltanet import DeltaNetForCausalLM, load_student
from deltanet_errors import UserError

NAME = "tester/student"


def load(hub_cache, how, **where):
    return how.from_pretrained(NAME, cache_dir=hub_cache, **where)


@pytest.mark.parametrize("how", [AutoModelForCausalLM, DeltaNetForCausalLM])
def test_an_oversized_configuration_is_refused_without_the_memory(hub, student, tmp_path, how):
    files = files_of(student)
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"vocab_size": 50_000_000}).encode()
    hub.create(NAME, files)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="the weights do not fit the configuration: it makes"):
        load(tmp_path / "hub", how)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB; it would take 1.6 GB in bfloat16


def test_what_fits_is_that_of_the_folder_in_a_revision_and_in_a_subfolder_too(hub, student, tmp_path):
    files = files_of(student)
    repository = hub.create(NAME, files | {f"inner/{name}": data for name, data in files.items()})
    first = repository.branches["main"]
    repository.commit("main", {"config.json": b"{}"}, "damaged")
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = load_student(student)(ids).logits
        for where in ({"revision": first}, {"revision": first, "subfolder": "inner"}):
            assert torch.equal(load(tmp_path / "hub", DeltaNetForCausalLM, dtype="auto", **where)(ids).logits, expected)


def test_names_of_nothing_are_one_error(hub, tmp_path):
    for name in ("tester/none", str(tmp_path / "no" / "folder")):
        with pytest.raises(OSError, match=name.replace(".", r"\.")):
            DeltaNetForCausalLM.from_pretrained(name, cache_dir=tmp_path / "hub")
