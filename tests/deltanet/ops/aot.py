"""Compiles exactly the kernels that a call would launch, for a card that is not there.

`recorded` runs a function of launch.py with every launch replaced by a note of its arguments; `compile_for` builds the
noted kernel ahead of time, and reads registers and spilled bytes from the binary and how it multiplies.
"""

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from deltanet.ops.triton.products import MmaSync, mma_sync

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@contextmanager
def recorded():
    """A list that fills with (kernel, arguments by name, compile options) instead of launches."""
    launches = []

    def note(self, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
        launches.append((self, dict(zip(self.arg_names, args)) | kwargs, options))

    with patch.object(JITFunction, "run", note):
        yield launches


def typed(value) -> str:
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def compile_for(capability: int, kernel, arguments: dict, options: dict) -> tuple[int, int, int, bool]:
    """Registers and bytes of stack (spills) per thread, bytes of shared memory; whether there is wgmma or tcgen05."""
    fixed = {p.name for p in kernel.params if p.is_constexpr}
    constants = {name: value for name, value in arguments.items() if name in fixed or value is None}
    signature = {name: "constexpr" if name in constants else typed(value) for name, value in arguments.items()}
    names = kernel.arg_names
    signature = {name: signature[name] for name in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, kind in signature.items() if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    with mma_sync() if isinstance(kernel, MmaSync) else nullcontext():
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    is_wgmma = bool(re.search(r"wgmma\.mma|tcgen05\.mma", built.asm["ptx"]))
    return *usage(built.asm["cubin"]), built.metadata.shared, is_wgmma


def usage(cubin: bytes) -> tuple[int, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return int(found[1]), int(found[2])
