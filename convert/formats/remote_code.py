"""The model's source as flat files for a checkpoint folder, which transformers loads with `trust_remote_code=True`.

Generated from the package itself, so that nothing is kept twice: every module of ours that the model needs, with its
imports pointed at the flat names. The Triton kernels stay out, and PyTorch's forms of the delta rule do the work.
Twin: tests/convert/formats/test_remote_code.py.
"""

import ast
from collections.abc import Mapping
from pathlib import Path

import deltanet

ROOT = Path(deltanet.__file__).parent.parent
MAIN = {("deltanet", "config"): "configuration_deltanet", ("deltanet", "modeling"): "modeling_deltanet"}
BENEATH = "deltanet_errors"
KERNELS = ("deltanet", "ops", "triton")
NO_KERNELS = 'raise ImportError("the code in the checkpoint has no kernels; install deltanet for them")'
AUTO_MAP = {
    "AutoConfig": "configuration_deltanet.DeltaNetConfig",
    "AutoModel": "modeling_deltanet.DeltaNetModel",
    "AutoModelForCausalLM": "modeling_deltanet.DeltaNetForCausalLM",
}


def remote_code() -> Mapping[str, str]:
    """File name -> source, of the configuration, the model, and all of ours that they import."""
    files, waiting = {}, list(MAIN)
    while waiting:
        module = waiting.pop()
        name = f"{flat_name(module)}.py"
        if name not in files:
            files[name], needed = _flatten(module)
            waiting += needed
    return dict(sorted(files.items()))


def flat_name(module: tuple[str, ...]) -> str:
    """`("deltanet", "ops", "chunk")`, a module's path, as the name of a file beside the others."""
    return MAIN.get(module) or "_".join(module)


def _flatten(module: tuple[str, ...]) -> tuple[str, list[tuple[str, ...]]]:
    """The source of a module with flat imports, and the modules that these name."""
    path = ROOT.joinpath(*module)
    is_package = path.is_dir()
    path = path / "__init__.py" if is_package else path.with_suffix(".py")
    source = path.read_text(encoding="utf-8")
    package = module if is_package else module[:-1]
    lines, needed = source.splitlines(), []
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom) and _is_ours(node)]
    for node in sorted(imports, key=lambda node: -node.lineno):
        base = package[: len(package) - node.level + 1] if node.level else ()
        indent = " " * node.col_offset
        if node.module:
            target = (*base, *node.module.split("."))
            needed.append(target)
            new = [f"from .{flat_name(target)} import {_names(node.names)}"]
        elif (*base, node.names[0].name) == KERNELS:
            new = [NO_KERNELS]
        else:
            new = []
            for alias in node.names:
                target = (*base, alias.name)
                needed.append(target)
                # transformers fetches only the files that a line of the first kind names.
                new.append(f"from .{flat_name(target)} import __name__ as _{alias.name}")
                new.append(f"from . import {flat_name(target)} as {alias.asname or alias.name}")
        lines[node.lineno - 1 : node.end_lineno] = [indent + line for line in new]
    head = f"# Generated from {path.relative_to(ROOT).as_posix()} of deltanet {deltanet.__version__}."
    return "\n".join([head, *lines]) + "\n", needed


def _is_ours(node: ast.ImportFrom) -> bool:
    return node.level > 0 or node.module == BENEATH


def _names(aliases: list[ast.alias]) -> str:
    return ", ".join(alias.name + (f" as {alias.asname}" if alias.asname else "") for alias in aliases)
