"""The processes of a run: how they meet, agree on something, and end together when one of them fails.

A rank that fails alone would leave the others waiting in a collective until its timeout, which is hours, since rank 0
may convert or tokenise that long. So a failure is noted in the store in which the processes met, every rank looks there
twice a second, and all are gone some seconds later with one message. A killed rank notes nothing: the kernel tells
the others of its machine (`pidfd_open`), and these note it. Twin: tests/fault/test_ranks.py.
"""

import atexit
import contextlib
import itertools
import logging
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta

import torch

from deltanet_errors import DeltanetError

LOOK_SECONDS = 0.5  # between two looks at the store
AGREE_SECONDS = 2.0  # in which ranks that fail alike have all failed
GRACE_SECONDS = 5.0  # for the others to fail by themselves and tidy up
_LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_numbers = itertools.count()


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Element-wise sum over all ranks, in float64; every rank gets the result."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values

    def broadcast(self, value):
        """Rank 0's picklable `value`, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0, device=self.device)
        return box[0]


def own_part(whole: torch.Tensor, world: World) -> torch.Tensor:
    """This rank's part (ceil(n / size),) of the n numbers of `whole`; the last parts are filled up with zeros."""
    length = -(-whole.numel() // world.size)
    part = whole.flatten()[world.rank * length : (world.rank + 1) * length]
    return torch.nn.functional.pad(part, (0, length - part.numel()))


def once(world: World, call: Callable):
    """Rank 0's result of `call`, on every rank; its error is raised on every rank too, so that none waits."""
    result, error = None, None
    if world.is_main:
        try:
            result = call()
        except Exception as problem:
            error = problem
    result, error = world.broadcast((result, error))
    if error is not None:
        raise error
    return result


def start_world(timeout_minutes: float = 240.0) -> World:
    """Joins the processes a launcher (torchrun, deepspeed) has started, or starts alone where none has.

    The timeout is long since rank 0 converts and tokenises while the others wait. CUDA with nccl where there is a
    device, else the CPU with gloo. On a CPU DeepSpeed would compile a shared-memory
    collective at the first start (39 s, needs g++); it is switched off, gloo does the same.
    """
    if "RANK" not in os.environ:
        # Port 0 is whichever is free as it is opened; one looked for beforehand may be taken by then.
        os.environ.update(zip(_LAUNCHED, ("0", "1", "0", "127.0.0.1", "0")))
    has_cuda = torch.cuda.is_available()
    if not has_cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = quiet_deepspeed()
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if has_cuda:
        torch.cuda.set_device(local_rank)
    deepspeed.init_distributed(
        "nccl" if has_cuda else "gloo", timeout=timedelta(minutes=timeout_minutes), auto_mpi_discovery=False
    )
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    return World(torch.distributed.get_rank(), torch.distributed.get_world_size(), device)


def leave_world() -> None:
    """Takes leave of the other processes, if `start_world` was called; the process ends after it."""
    if torch.distributed.is_initialized():
        quiet_deepspeed().comm.destroy_process_group()


def quiet_deepspeed():
    """DeepSpeed, imported at first use, quiet, and kept from compiling anything."""
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    return deepspeed


@contextlib.contextmanager
def ending_together(world: World) -> Iterator[None]:
    """Within it an error on any rank ends all processes in seconds, with the error's exit code.

    An error that all ranks raise leaves as it is; one of a single rank as a DeltanetError that names the rank, and the
    other processes end without a word. Either way it has the attribute `is_echo` on all ranks but one, which is the
    one to print it.
    """
    if world.size == 1:
        yield
        return
    watch = _Watch(world)
    watch.start()
    try:
        yield
    except Exception as error:
        watch.dismiss()
        is_first, is_shared = watch.fail(error)
        if not is_shared:
            code = getattr(error, "exit_code", 1)
            atexit.register(_end_at_once, code)  # the others have gone in the middle of something
            kind = type(error) if isinstance(error, DeltanetError) else DeltanetError
            text = str(error) if isinstance(error, DeltanetError) else f"{type(error).__name__}: {error}"
            named = kind(f"rank {world.rank} of {world.size}: {text}")
            named.is_echo = not is_first
            raise named from error
        error.is_echo = not is_first
        raise
    watch.dismiss()
    watch.part()


def _end_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _neighbours(world: World) -> dict[int, int]:
    """The rank of every other process of this machine, by a descriptor that can be read once the process has ended.
    Empty where there is no such thing: pidfd_open is Linux's, and some containers forbid it."""
    if not hasattr(os, "pidfd_open"):
        return {}
    home = (socket.gethostname(), os.stat("/proc/self/ns/pid").st_ino)  # process ids mean the same in both
    found = {}
    for rank, (other, pid) in enumerate(world.gather((home, os.getpid()))):
        if rank != world.rank and other == home:
            with contextlib.suppress(OSError):
                found[os.pidfd_open(pid)] = rank
    return found


class _Watch(threading.Thread):
    """Looks for failures and deaths of other ranks, in a thread, since the main one may wait in a collective."""

    def __init__(self, world: World):
        super().__init__(daemon=True)
        self.world, self.dismissed = world, threading.Event()
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = torch.distributed.TCPStore(address, port, is_master=False)
        self.store = torch.distributed.PrefixStore(f"deltanet/{attempt}/{next(_numbers)}", store)
        self.neighbours = _neighbours(world)

    def run(self) -> None:
        while not self.dismissed.wait(LOOK_SECONDS):
            try:
                self._note_killed()
                noted = self.store.add("failed", 0) + self.store.add("killed", 0)
                code = int(self.store.get("code")) if noted else None
            except RuntimeError:  # the store went with the process that kept it
                if self.world.rank == 1 and not self.dismissed.is_set():
                    self._tell_gone(0)
                code = 1
            if code is not None and not self.dismissed.wait(GRACE_SECONDS):
                os._exit(code)

    def dismiss(self) -> None:
        self.dismissed.set()
        self.join()

    def fail(self, error: Exception) -> tuple[bool, bool]:
        """Notes the failure; whether this rank is the first with one, and whether all ranks have one."""
        try:
            self._note_killed()  # of which this failure may be the consequence
            self.store.set("code", str(getattr(error, "exit_code", 1)))
            is_first = self.store.add("failed", 1) == 1 and not self.store.add("killed", 0)
            limit = time.monotonic() + AGREE_SECONDS
            while self.store.add("failed", 0) < self.world.size:
                if time.monotonic() > limit:
                    return is_first, False
                time.sleep(0.05)
            self.part()
        except RuntimeError:
            return self.world.rank == 1, False
        return is_first, True

    def _note_killed(self) -> None:
        """Notes every neighbour that ended before it parted or failed; of those who see it one tells."""
        poll = select.poll()  # select.select takes no descriptor above 1023
        for descriptor in self.neighbours:
            poll.register(descriptor, select.POLLIN)
        for descriptor, _ in poll.poll(0):
            rank = self.neighbours.pop(descriptor)
            os.close(descriptor)
            if self.store.add("failed", 0) or self.store.add(f"parted/{rank}", 0):
                continue
            self.store.set("code", "1")
            if self.store.add("killed", 1) == 1:
                self._tell_gone(rank)

    @staticmethod
    def _tell_gone(rank: int) -> None:
        print(f"rank {rank} is gone, so the others end too", file=sys.stderr, flush=True)

    def part(self) -> None:
        """Keeps rank 0, and with it the store, until no rank looks any more."""
        self.store.add(f"parted/{self.world.rank}", 1)
        self.store.add("done", 1)
        limit = time.monotonic() + GRACE_SECONDS
        while self.world.is_main and self.store.add("done", 0) < self.world.size and time.monotonic() < limit:
            time.sleep(0.05)
