"""What no line of the shipped code may do, whoever writes it."""

import ast
from pathlib import Path

import cli

ROOT = Path(cli.__file__).parent
PACKAGES = ("deltanet", "convert", "distill", "recipes")


def calls_in_the_packages():
    """(where, name of the function, its keyword arguments) of every call in the shipped code."""
    packages = (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py")))
    for path in (*ROOT.glob("*.py"), *packages):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                given = {item.arg: getattr(item.value, "value", None) for item in node.keywords}
                yield f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), given


def test_no_line_unpickles_runs_foreign_code_or_loads_loosely():
    """torch.load reads weights alone, nobody trusts remote code or loads tensors without strictness."""
    found, forbidden = 0, []
    for where, function, given in calls_in_the_packages():
        found += function.endswith(("from_pretrained", "load_state_dict", "torch.load"))
        if function == "torch.load" and given.get("weights_only") is not True:
            forbidden.append(f"{where}: torch.load without weights_only=True")
        if function.startswith("pickle.") or function in ("eval", "exec", "yaml.load", "yaml.unsafe_load"):
            forbidden.append(f"{where}: {function}")
        is_loose = given.get("strict") is False and function != "Field"  # pydantic's, of a recipe's numbers
        if given.get("trust_remote_code") or is_loose:
            forbidden.append(f"{where}: {function}({given})")
    assert found > 10
    assert not forbidden
