"""One forward and backward of the kernels in this process as on a Hopper card that is not there: everything is compiled
and launched but the launch itself. Prints as JSON the kernels launched, those of them that hold wgmma, and the switches
of products.py afterwards. Run by test_triton_products.py, in a process of its own, since Triton has one driver."""

import json
import os

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from deltanet.ops.triton import backward, forward, launch, products

launched: list[str] = []


class Launcher:
    def __init__(self, source, metadata):
        self.name = source.fn.__name__

    def __call__(self, *arguments, **options):
        launched.append(self.name)


class Utils:
    def load_binary(self, name, binary, shared, device):
        return 1, 1, 64, 0, 1024  # module, function, registers, spills, threads

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}


class Card:
    launcher_cls, utils = Launcher, Utils()

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(Card())
launch.card = lambda device: (9, 132)
q, k, v = (torch.randn(1, 40, 400, 128, dtype=torch.bfloat16) for _ in range(3))  # so many heads that none is cut
beta = torch.rand(1, 40, 400, dtype=torch.bfloat16)
c = launch.case(q, k, v, None, None, False)
made = launch.forward(c, q, k, v, beta, None, None, None, 1.0, True)
launch.backward(c, q, k, v, beta, None, *made[2:], torch.zeros_like(v), None, None, 1.0, False)
plain = [getattr(module, name) for module in (forward, backward) for name in dir(module) if name.endswith("_kernel")]
kernels = [*plain, *map(products.by_mma_sync, plain)]
with_wgmma = {
    kernel.fn.__name__
    for kernel in kernels
    for compiled in kernel.device_caches[0][0].values()
    if "wgmma.mma" in compiled.asm["ptx"]
}
switches = {name: os.environ.get(name) for name in products.SWITCHES}
print(json.dumps({"launched": launched, "wgmma": sorted(with_wgmma), "switches": switches}))
