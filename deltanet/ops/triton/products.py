"""Kernels of four warps and more whose products stay mma.sync where Triton would choose wgmma (or tcgen05).

Triton 3.6 has no option for it: its passes read DISABLE_MMA_V3 (Hopper) and DISABLE_MMA_V5 (Blackwell) from the
environment, which also enter the key of its cache on disk. So the variables are set for as long as such a kernel
compiles, at its first launch; later launches and other kernels see the environment as it was.
"""

import os
import threading
from contextlib import contextmanager
from functools import cache

from triton.runtime.jit import JITFunction

from .configs import Config

SWITCHES = ("DISABLE_MMA_V3", "DISABLE_MMA_V5")
compiling = threading.RLock()
"""Held while the switches are set: what one thread puts back, another may still need."""


@contextmanager
def mma_sync():
    """Kernels compiled inside have no wgmma. The environment is as before afterwards, also after an error."""
    with compiling:
        before = {name: os.environ.get(name) for name in SWITCHES}
        os.environ.update(dict.fromkeys(SWITCHES, "1"))
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


class MmaSync(JITFunction):
    """A kernel that compiles by `mma_sync`."""

    def _do_compile(self, *arguments, **options):
        with mma_sync():
            return super()._do_compile(*arguments, **options)


@cache
def by_mma_sync(kernel: JITFunction) -> JITFunction:
    if not isinstance(kernel, JITFunction):
        return kernel  # the interpreter's
    return MmaSync(kernel.fn, do_not_specialize=kernel.do_not_specialize)


def built(kernel: JITFunction, config: Config) -> JITFunction:
    """The kernel as an entry of the tables wants its products."""
    return kernel if config.wgmma else by_mma_sync(kernel)
