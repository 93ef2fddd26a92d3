"""The flat copy of the model's source: complete, the same every time, and loading where the package is absent."""

import ast
import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from tiny_student import tiny_model, tokens

from convert.formats import write_format
from convert.formats.remote_code import AUTO_MAP, ROOT, flat_name, remote_code

# -S keeps .pth files, and so an editable install, from being read.
LOADER = """
import importlib.util, sys
sys.path.append(sys.argv[1])
assert importlib.util.find_spec("deltanet") is None, "the package can be imported, so this would show nothing"
import torch
from transformers import AutoModelForCausalLM
folder, given, out = sys.argv[2:]
model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
ids = torch.load(given, weights_only=True)
with torch.no_grad():
    logits = model.eval()(ids).logits
written = model.generate(ids, max_new_tokens=12, do_sample=False)
assert not any(name.split(".")[0] == "deltanet" for name in sys.modules)
keys = [len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")]
torch.save({"logits": logits, "written": written, "keys": keys, "class": type(model).__module__}, out)
"""


def load_without_the_package(folder: Path, ids: torch.Tensor, scratch: Path) -> subprocess.CompletedProcess:
    torch.save(ids, scratch / "ids.pt")
    command = [sys.executable, "-I", "-S", "-c", LOADER, sysconfig.get_path("purelib")]
    command += [str(folder), str(scratch / "ids.pt"), str(scratch / "out.pt")]
    environment = os.environ | {"HF_HOME": str(scratch / "hf"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=scratch, env=environment)


def write_student(folder: Path, layout: str, **changes):
    model = tiny_model(layout, **changes)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("layout", "changes"),
    [("global", {}), ("swa", {"conv_kernel": 3, "output_gate": True, "head_norm": True, "state_heads": "shared"})],
)
def test_a_process_without_the_package_computes_the_same(tmp_path, layout, changes):
    model = write_student(tmp_path / "student", layout, **changes)
    write_format(tmp_path / "student", tmp_path / "remote", "remote")
    ids = tokens(2, 41)  # longer than a chunk of 32, and no multiple of it
    done = load_without_the_package(tmp_path / "remote", ids, tmp_path)
    assert done.returncode == 0, done.stderr
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    assert out["class"].startswith("transformers_modules.")
    assert out["keys"] == [0, 0, 0]
    with torch.no_grad():
        # The same operations on the same machine: not a bit may differ.
        assert torch.equal(out["logits"], model(ids).logits)
    assert torch.equal(out["written"], model.generate(ids, max_new_tokens=12, do_sample=False))


def test_a_missing_tensor_is_refused_there_too(tmp_path):
    from safetensors.torch import load_file, save_file

    write_student(tmp_path / "student", "global")
    write_format(tmp_path / "student", tmp_path / "remote", "remote")
    path = tmp_path / "remote" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.self_attn.b_proj.bias"]
    save_file(tensors, path, {"format": "pt"})
    done = load_without_the_package(tmp_path / "remote", tokens(1, 4), tmp_path)
    assert done.returncode != 0
    assert "missing: model.layers.0.self_attn.b_proj.bias" in done.stderr


def test_every_file_says_what_its_source_says():
    """Apart from the imports, each is its module's syntax tree."""
    modules = {
        flat_name(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / "deltanet_errors.py", *(ROOT / "deltanet").rglob("*.py"))
        if path.name != "__init__.py"
    }
    modules[flat_name(("deltanet", "ops"))] = ROOT / "deltanet" / "ops" / "__init__.py"

    class WithoutImports(ast.NodeTransformer):
        def visit_ImportFrom(self, node):
            return None if node.level or node.module == "deltanet_errors" else node

        def visit_Raise(self, node):
            return None if "has no kernels" in ast.unparse(node) else node

    for name, text in remote_code().items():
        ours, source = (
            ast.dump(WithoutImports().visit(ast.parse(code)))
            for code in (text, modules[Path(name).stem].read_text(encoding="utf-8"))
        )
        assert ours == source, name


def test_the_copy_is_complete_flat_and_the_same_every_time():
    files = remote_code()
    assert files == remote_code()
    for name, text in files.items():
        tree = ast.parse(text)
        fetched = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1, f"{name} reaches out of its folder"
                named = [node.module] if node.module else [alias.name for alias in node.names]
                assert all(f"{module}.py" in files for module in named), f"{name} imports {named}"
                assert set(named) <= fetched, f"{name}: transformers would not fetch {named}"
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & {"triton", "deltanet"}
    for target in AUTO_MAP.values():
        module, name = target.split(".")
        assert f"class {name}(" in files[f"{module}.py"]


def test_the_configuration_names_the_code_and_keeps_the_rest(tmp_path):
    write_student(tmp_path / "student", "global")
    write_format(tmp_path / "student", tmp_path / "remote", "remote")
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("student", "remote"))
    assert after == before | {"auto_map": AUTO_MAP}
