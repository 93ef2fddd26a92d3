"""The shape of the tree: which way imports run, what importing costs, and that public names exist."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("deltanet", "convert", "distill", "recipes")
# Arrows run one way: cli -> distill -> convert -> deltanet; recipes are data.
ALLOWED = {
    "deltanet": {"deltanet"},
    "convert": {"convert", "deltanet", "recipes"},
    "distill": {"distill", "convert", "deltanet", "recipes"},
    "recipes": {"recipes", "deltanet", "convert", "distill"},
}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package):
    for path in sorted((ROOT / package).rglob("*.py")):
        foreign = imported(path) & {*PACKAGES, "cli", "benchmarks", "tests"} - ALLOWED[package]
        assert not foreign, f"{path.relative_to(ROOT)} imports {foreign}"


@pytest.mark.parametrize("package", ["deltanet", "convert", "distill"])
def test_importing_a_package_leaves_heavy_libraries_alone(package):
    code = (
        f"import sys; from {package} import *; "
        "print(*[m for m in ('triton', 'deepspeed', 'datasets', 'peft', 'matplotlib') if m in sys.modules])"
    )
    # transformers itself may look at triton through torch; what counts is that we do not load the kernels
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert not set(out.split()) - {"triton"}, out


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for package in (*PACKAGES, "tests", "benchmarks")
        for path in (ROOT / package).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 500
    }
    assert not long, f"over 500 lines: {long}"
