"""Models too large for one device: frozen ones parted over the ranks, and a student that ZeRO 3 parts as it is read.

A frozen model (`shard`) is cut into units: every decoder layer, the embedding, the last norm, the head. A rank keeps
one contiguous part of each. A unit is gathered as it runs and let go after; the next layer is on its way meanwhile. So
all ranks must run the model together, or rank 0 alone while the others serve it (`Shards.once`).

Both read tensor by tensor: a rank never holds more than its part and one whole tensor.
Twin: tests/distill/test_sharded.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from convert.loading import Get, load_teacher, open_student, open_teacher, skeleton
from deltanet import DeltaNetForCausalLM, load_student

from .engine import ALIGNED, EngineSettings
from .stages import PREFIX
from .world import World, once, quiet_deepspeed


@dataclass
class _Unit:
    """Parameters that are gathered together, laid end to end, each from a multiple of ALIGNED numbers on."""

    parameters: list[nn.Parameter] = field(default_factory=list)
    shapes: list[torch.Size] = field(default_factory=list)
    begins: list[int] = field(default_factory=list)
    part: torch.Tensor | None = None
    arriving: tuple[torch.Tensor, Any] | None = None
    users: int = 0


class Shards:
    """The units of one frozen model, by number."""

    def __init__(self, world: World, dtype: torch.dtype, offload: bool):
        self.world, self.dtype, self.offload = world, dtype, offload
        self.units: list[_Unit] = []
        self.is_leading = False

    @property
    def num_bytes(self) -> int:
        """What this rank keeps."""
        return sum(unit.part.nbytes for unit in self.units)

    def add(self, module: nn.Module, prefix: str, get: Get, follower: bool) -> _Unit:
        """Makes the parameters of `module` (on `meta`) a unit. follower: the unit before it fetches it ahead."""
        unit, index, length = _Unit(), len(self.units), 0
        owners = [(owner, place, name) for place, owner in module.named_modules() for name in owner._parameters]
        owners = [item for item in owners if item[0]._parameters[item[2]] is not None]
        for owner, _, name in owners:
            shape = owner._parameters[name].shape
            unit.begins.append(length)
            unit.shapes.append(shape)
            length += -(-shape.numel() // ALIGNED) * ALIGNED
        size = -(-length // (self.world.size * ALIGNED)) * ALIGNED
        pin = self.offload and torch.cuda.is_available()
        unit.part = torch.zeros(
            size, dtype=self.dtype, device="cpu" if self.offload else self.world.device, pin_memory=pin
        )
        mine = self.world.rank * size
        for (owner, place, name), begin in zip(owners, unit.begins):
            whole = get(".".join(filter(None, (prefix, place, name)))).to(self.dtype).flatten()
            first, last = max(begin, mine), min(begin + whole.numel(), mine + size)
            if first < last:
                unit.part[first - mine : last - mine].copy_(whole[first - begin : last - begin])
            del whole  # before the next is read
            empty = torch.empty(0, dtype=self.dtype, device=self.world.device)
            owner._parameters[name] = nn.Parameter(empty, requires_grad=False)
            unit.parameters.append(owner._parameters[name])
        self.units.append(unit)
        follows = index + 1 if follower else None
        module.register_forward_pre_hook(lambda *_: self._open(index, follows))
        module.register_forward_hook(lambda *_: self._close(index))
        return unit

    def share(self, module: nn.Module, unit: _Unit) -> None:
        """Lets `module` have the single parameter of `unit` as its `weight`, gathered when it runs."""
        index = self.units.index(unit)
        module.weight = unit.parameters[0]
        module.register_forward_pre_hook(lambda *_: self._open(index, None))
        module.register_forward_hook(lambda *_: self._close(index))

    def whole(self, parameter: nn.Parameter) -> torch.Tensor:
        """The whole tensor of a parameter that is its unit's first; gathered now, freed with the last reference."""
        index = next(i for i, unit in enumerate(self.units) if unit.parameters[0] is parameter)
        unit = self.units[index]
        return self._arrived(index)[: math.prod(unit.shapes[0])].view(unit.shapes[0])

    def once(self, call: Callable):
        """As `world.once`: rank 0 may run the model in `call`, and the other ranks give it their parts meanwhile."""

        def lead():
            self.is_leading = True
            try:
                return call()
            finally:
                self.is_leading = False
                self.world.broadcast(None)

        if not self.world.is_main:
            while (index := self.world.broadcast(None)) is not None:
                self._send(index)[1].wait()
        return once(self.world, lead if self.world.size > 1 else call)

    def _send(self, index: int) -> tuple[torch.Tensor, Any]:
        part = self.units[index].part.to(self.world.device, non_blocking=True)
        whole = part.new_empty(len(part) * self.world.size)
        return whole, torch.distributed.all_gather_into_tensor(whole, part, async_op=True)

    def _arrived(self, index: int) -> torch.Tensor:
        unit = self.units[index]
        if self.is_leading:
            self.world.broadcast(index)
        whole, work = unit.arriving or self._send(index)
        unit.arriving = None
        work.wait()
        return whole

    def _open(self, index: int, follows: int | None) -> None:
        unit = self.units[index]
        unit.users += 1
        if unit.users > 1:
            return
        whole = self._arrived(index)
        if follows is not None and not self.is_leading:
            self.units[follows].arriving = self._send(follows)
        for parameter, shape, begin in zip(unit.parameters, unit.shapes, unit.begins):
            parameter.data = whole[begin : begin + shape.numel()].view(shape)

    def _close(self, index: int) -> None:
        unit = self.units[index]
        unit.users -= 1
        if not unit.users:
            for parameter in unit.parameters:
                parameter.data = parameter.data.new_empty(0)


def shard(
    model: DeltaNetForCausalLM, get: Get, dtype: torch.dtype, world: World, *, offload: bool = False
) -> DeltaNetForCausalLM:
    """The model, made on `meta` (`convert.loading.skeleton`), frozen, its weights of `get` in `dtype` parted over the
    ranks, which call this together. offload: parts are kept in CPU memory. It has the attribute `shards`."""
    shards = Shards(world, dtype, offload)
    decoder = model.model
    embedding = shards.add(decoder.embed_tokens, "model.embed_tokens", get, False)
    for index, layer in enumerate(decoder.layers):
        shards.add(layer, f"model.layers.{index}", get, index + 1 < len(decoder.layers))
    shards.add(decoder.norm, "model.norm", get, False)
    if model.config.tie_word_embeddings:
        shards.share(model.lm_head, embedding)
    else:
        shards.add(model.lm_head, "lm_head", get, False)
    decoder.rotary_emb.to(world.device)
    model.shards = shards
    return model.eval()


def frozen_teacher(
    folder: Path, dtype: torch.dtype, world: World, *, in_parts: bool, offload: bool = False
) -> DeltaNetForCausalLM:
    """The teacher in `folder`, frozen, on the device: in parts, or whole on every rank."""
    if not in_parts:
        return load_teacher(folder, dtype).requires_grad_(False).to(world.device)
    config, get, _ = open_teacher(folder)
    config.dtype = dtype
    return shard(skeleton(config), get, dtype, world, offload=offload)


def frozen_student(folder: Path, dtype: torch.dtype, world: World, *, in_parts: bool) -> DeltaNetForCausalLM:
    """The student in `folder`, likewise."""
    if not in_parts:
        return load_student(folder, dtype=dtype, device=world.device).requires_grad_(False)
    config, get = open_student(folder)
    config.dtype = dtype
    return shard(skeleton(config), get, dtype, world)


def once_with(model: DeltaNetForCausalLM | None, world: World, call: Callable):
    """As `world.once`, where `call` may run the model, in parts or not."""
    shards = getattr(model, "shards", None)
    return once(world, call) if shards is None else shards.once(call)


def student_to_part(folder: Path) -> tuple[DeltaNetForCausalLM, Get]:
    """The student in `folder` on `meta`, and its tensors by the names that a stage's module gives them."""
    config, get = open_student(folder)
    return skeleton(config).requires_grad_(True), lambda name: get(name.removeprefix(PREFIX))


def partition(module: nn.Module, get: Get, settings: EngineSettings) -> None:
    """Replaces every parameter of `module` (on `meta`) by one that ZeRO 3 has parted over the ranks, read by `get` one
    at a time, in the dtype of the working copy. Tied parameters stay tied."""
    zero, made = quiet_deepspeed().zero, {}
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    dtype = torch.bfloat16 if settings.casts_parameters else torch.float32
    context = None
    for place, owner in list(module.named_modules()):
        for name, parameter in list(owner._parameters.items()):
            if parameter is None:
                continue
            if parameter not in made:
                whole = get(".".join(filter(None, (place, name)))).to(device, dtype)
                new = nn.Parameter(whole, requires_grad=parameter.requires_grad)
                if context is None:
                    config = settings.deepspeed_config()
                    context = zero.Init(module=nn.ParameterList([new]), config_dict_or_path=config, dtype=dtype)
                else:
                    context._convert_to_zero_parameters([new])
                made[parameter] = new
                del whole
            owner._parameters[name] = made[parameter]
