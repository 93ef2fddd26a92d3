"""The environment while a kernel compiles whose products stay mma.sync, and afterwards."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from triton.runtime.jit import JITFunction

import deltanet
import deltanet.ops.triton as kernels
from deltanet.ops.triton import forward, products


def switches():
    return {name: os.environ.get(name) for name in products.SWITCHES}


def kernel(x):
    pass


@pytest.fixture(params=[None, "0"])
def before(monkeypatch, request):
    """The switches as the user has them."""
    for name in products.SWITCHES:
        monkeypatch.delenv(name, raising=False)
        if request.param is not None:
            monkeypatch.setenv(name, request.param)
    return switches()


@pytest.mark.parametrize("fails", [False, True])
def test_switches_are_on_while_the_kernel_compiles_and_back_afterwards(monkeypatch, before, fails):
    seen = []

    def compiles(self, *arguments, **options):
        seen.append((switches(), arguments))
        if fails:
            raise RuntimeError("no such instruction")
        return "compiled"

    monkeypatch.setattr(JITFunction, "_do_compile", compiles)
    made = products.by_mma_sync(JITFunction(kernel, do_not_specialize=["x"]))
    if fails:
        with pytest.raises(RuntimeError, match="no such instruction"):
            made._do_compile("key")
    else:
        assert made._do_compile("key") == "compiled"
    assert seen == [(dict.fromkeys(products.SWITCHES, "1"), ("key",))]
    assert switches() == before
    assert made.do_not_specialize == ["x"]


def test_no_thread_takes_the_switches_from_another(before):
    inside, done = threading.Event(), []

    def second():
        inside.wait()
        with products.mma_sync():
            done.append(switches())

    other = threading.Thread(target=second)
    other.start()
    with products.mma_sync():
        inside.set()
        other.join(0.2)
        assert not done
    other.join()
    assert done == [dict.fromkeys(products.SWITCHES, "1")]
    assert switches() == before


def test_kernels_are_launched_with_the_products_their_entries_want(tmp_path):
    clean = {k: v for k, v in os.environ.items() if k not in (*products.SWITCHES, "TRITON_INTERPRET")}
    paths = os.pathsep.join(
        str(path) for path in (Path(deltanet.__file__).parents[1], os.environ.get("PYTHONPATH", ""))
    )
    environment = clean | {"PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("fake_card.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout)
    assert found["launched"] == [
        "inverse_kernel", "forward_kernel", "forward_kernel",  # the second for heads that overflowed
        "largest_kernel", "write_kernel", "key_kernel", "query_kernel",
    ]  # fmt: skip
    assert found["wgmma"] == ["query_kernel"]
    assert found["switches"] == dict.fromkeys(products.SWITCHES)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_launch_compiles_by_them(before):
    q = torch.randn(1, 40, 2, 128, device="cuda", dtype=torch.bfloat16)
    kernels.delta_rule(q, q, q, q[..., 0].sigmoid(), normalize_qk=True)
    compiled = products.by_mma_sync(forward.forward_kernel).device_caches[torch.cuda.current_device()][0].values()
    assert compiled
    assert not any("wgmma.mma" in kernel.asm["ptx"] for kernel in compiled)
    assert switches() == before
