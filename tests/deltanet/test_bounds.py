"""What a tampered configuration asks for is refused before memory is taken for it."""

import json
import resource

import pytest
from tiny_student import tiny_config

from deltanet import DeltaNetForCausalLM, load_student
from deltanet_errors import UserError


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [{"vocab_size": 50_000_000}, {"intermediate_size": 10_000_000}, {"vocab_size": 10**15}, {"hidden_size": 10**9}],
)
def test_a_configuration_larger_than_its_weights_is_refused_without_the_memory(tmp_path, changes):
    DeltaNetForCausalLM(tiny_config()).save_pretrained(tmp_path)
    edit(tmp_path, **changes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UserError, match="config"):
        load_student(tmp_path)
    taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert taken < 200_000  # KB; the least of these models would take 6 GB


def test_layers_without_number_are_refused(tmp_path):
    DeltaNetForCausalLM(tiny_config()).save_pretrained(tmp_path)
    edit(tmp_path, num_hidden_layers=10**9, layer_types=None)
    with pytest.raises(UserError, match="num_hidden_layers is 1000000000; allowed"):
        load_student(tmp_path)


def test_every_dtype_of_storage_and_shards_load(tmp_path):
    model = DeltaNetForCausalLM(tiny_config())
    for number, size in enumerate(("5GB", "20KB")):
        model.half().save_pretrained(tmp_path / str(number), max_shard_size=size)
        assert load_student(tmp_path / str(number)).num_parameters() == model.num_parameters()
