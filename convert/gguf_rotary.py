"""The rotary scaling of a .gguf file, which transformers' reader leaves out without a word (5.24).

Linear and yarn stand among the metadata. Of Llama 3.1 to 3.3 llama.cpp's converter keeps the effect alone: a tensor of
what the wavelength of each frequency is multiplied by. Twin: tests/convert/test_sources.py.
"""

import copy

from deltanet_errors import UserError

FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""All that was published; the factor is 8 or 32."""


def gguf_rotary(reader, config) -> dict:
    """Entries of `rope_parameters` that the file behind gguf's `reader` adds to those of `config`, the model's. Raises
    UserError for a scaling that they cannot express."""
    kind = reader.fields["general.architecture"].contents()
    head = f"{kind}.rope.scaling."
    given = {key.removeprefix(head): field.contents() for key, field in reader.fields.items() if key.startswith(head)}
    given.pop("finetuned", None)
    factor, length = given.pop("factor", 1.0), given.pop("original_context_length", None)
    name = given.pop("type", "linear")
    tensor = next((tensor for tensor in reader.tensors if tensor.name == FREQUENCIES), None)
    if given or name not in ("none", "linear", "yarn"):
        raise UserError(f"rope scaling {name} {given or ''} cannot be read; allowed: none, linear, yarn, Llama 3's")
    if tensor is not None and (tensor.data != 1).any():
        return _llama3(tensor.data, config)
    if name == "none" or factor in (0, 1):
        return {}
    length = {} if length is None else {"original_max_position_embeddings": int(length)}
    return {"rope_type": name, "factor": float(factor)} | (length if name == "yarn" else {})


def _llama3(stretched, config) -> dict:
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found = LLAMA3 | {"factor": float(stretched.max())}
    config = copy.deepcopy(config)
    frequencies = []
    for scaling in (found, {"rope_type": "linear", "factor": 1.0}):
        config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"]} | scaling
        frequencies.append(ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config)[0])
    scaled, plain = frequencies
    stretched = torch.tensor(stretched)
    # The file has them in float32, of which a quotient of two keeps six digits.
    if stretched.shape != plain.shape or not torch.allclose(plain / scaled, stretched, rtol=1e-4):
        raise UserError(f"{FREQUENCIES} is not the rope scaling of Llama 3.1 to 3.3, which alone can be read")
    return found
