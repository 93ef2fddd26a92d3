"""The options of a mixer where the user says nothing; and `--compat NAME`: what a student must be so that it can be
written in another program's format, exactly.

Both formats apply SiLU after a short convolution, norm what is read per head, and have neither biases in linear layers
nor RoPE there. What of these the command line does not offer is set as fields of DeltaNetConfig. The formats themselves
are in `formats/`. Twin: tests/convert/test_compat.py.
"""

from deltanet_errors import UserError, nearest

DEFAULTS = {
    "mixer": "gated_delta",
    "state_heads": "shared",
    "state_positions": "rotary",
    "feature_map": "none",
    "skip_conv": 0,
    "local_window": 128,
    "conv": 0,
    "gate": "read",
    "beta_range": 1,
}
"""Of the options of a mixer, where neither the user nor --compat says otherwise. A window beside shared states takes
the memory of a state for every query head and starts nearer: KL .187 for 1.361 (SmolLM2-135M, every:4, WikiText:
docs/results/students.md), .002 for .134 (the demo's text of its own)."""
WITHOUT_WINDOW = {"state_heads": "expanded", "skip_conv": 4, "local_window": 0}
"""Of these, where --local-window is 0 or --gate has none to weigh it by: more states, and a way past them."""
_NEEDED = {
    "state_heads": "expanded",
    "state_positions": "rotary",
    "feature_map": "none",
    "skip_conv": 0,
    "local_window": 0,
}
NEEDED = {
    "fla": _NEEDED | {"gate": "none"},
    "qwen3_5": _NEEDED | {"mixer": "gated_delta", "gate": "output", "beta_range": 1},
}
"""Options that have no other value in the format."""
SUGGESTED = {"fla": {"conv": 4}, "qwen3_5": {"conv": 4}}
_BOTH = {
    "linear_rope": False,
    "qkv_activation": "silu",
    "linear_qk_norm": False,
    "beta_bias": False,
    "mixer_bias": False,
    "head_norm": True,
    "exact_start": False,
}
FIELDS = {"fla": _BOTH, "qwen3_5": _BOTH | {"gate_activation": "silu"}}
"""Arguments of `plan.student_config` beside the options."""


def option(name: str) -> str:
    """What an argument is called on the command line."""
    return "--" + name.replace("_", "-")


def resolve(compat: str | None, given: dict[str, object]) -> dict[str, object]:
    """The options of a mixer, None where the user gave none, with every value filled in. Raises UserError for a name
    of --compat that does not exist and for an option that it cannot be joined with."""
    if compat is None:
        is_alone = given["local_window"] == 0 or given["gate"] in ("output", "none")
        usual = DEFAULTS | (WITHOUT_WINDOW if is_alone else {})
        return {name: usual[name] if value is None else value for name, value in given.items()}
    if compat not in NEEDED:
        raise UserError(f"--compat {compat}: allowed are {', '.join(NEEDED)}{nearest(compat, list(NEEDED))}")
    for name, needed in NEEDED[compat].items():
        if given[name] not in (None, needed):
            raise UserError(
                f"{option(name)} {given[name]}: --compat {compat} needs {option(name)} {needed}; leave one of them out"
            )
    if compat == "qwen3_5" and given["conv"] is not None and given["conv"] < 1:
        raise UserError(f"--conv {given['conv']}: --compat qwen3_5 needs a convolution of 1 token or more")
    settled = DEFAULTS | SUGGESTED[compat] | NEEDED[compat]
    return {name: settled[name] if value is None else value for name, value in given.items()}
