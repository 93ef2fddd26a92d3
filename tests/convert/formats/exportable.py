"""Small students that others' formats can express, with every weight random."""

from tiny_student import LAYOUTS, tiny_model

from convert.compat import FIELDS


def exportable(compat: str, layout: str = "global", **changes):
    fields = {key: value for key, value in FIELDS[compat].items() if key != "linear_rope"}
    rotated = [kind != "linear_attention" for kind in LAYOUTS[layout]]
    settings = {"skip_taps": 0, "read_gate": False, "conv_kernel": 4, "rope_layers": rotated}
    if compat == "qwen3_5":
        settings |= {"output_gate": True, "qk_norm": "head"}
    model = tiny_model(layout, **(fields | settings | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.data += 0.2 * parameter.data.new_tensor(range(parameter.numel())).cos()
    return model
