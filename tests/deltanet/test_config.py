"""What a configuration says of a model beyond its sizes."""

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig

from deltanet import DeltaNetConfig
from deltanet.config import max_context

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0}  # fmt: skip


@pytest.mark.parametrize("kind", [DeltaNetConfig, LlamaConfig])
@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        ({"rope_type": "default"}, 64),
        (LLAMA3, 64),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_a_text_may_be_as_long_as_the_rotary_embedding_reaches(kind, rope, longest):
    assert max_context(kind(max_position_embeddings=64, rope_parameters={"rope_theta": 1e4} | rope)) == longest


def test_without_a_rotary_embedding_a_text_may_be_as_long_as_there_are_positions():
    assert max_context(DeltaNetConfig(max_position_embeddings=64, rope_parameters=None)) == 64
    assert max_context(MambaConfig()) > 2**40  # tells no range
    assert max_context(GPT2Config(n_positions=64)) == 64
