"""What a commit holds: the whole student, the optimizer's moments of what is being trained, and where the run stands.

The student is a checkpoint folder of its own (`student/`, float32 where trained), so a commit is at once the start of
the next stage, the source of the export, and what an evaluation reads. All tensors are whole: a commit knows neither
the ZeRO stage nor the number of processes. Every rank writes its share of the files. Tests: test_resume.py.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from deltanet import DeltaNetForCausalLM
from deltanet_errors import DeltanetError

from . import lora
from .engine import MOMENTS, Engine
from .stages import PREFIX
from .world import World

SHARD_BYTES = 1 << 30
STUDENT, ADAPTER = "student", "adapter"


@dataclass(frozen=True)
class Marks:
    """Where a run stands: `step` steps of stage number `stage_index` are done, `updates` of them changed the weights.
    `tokens` without padding have changed them since the run began. It is the `info` of a commit."""

    stage_index: int
    stage: str
    step: int
    updates: int
    world_size: int
    tokens: int = 0


class _Shards:
    """Collects tensors and writes a file whenever there is enough for one. A failure to write waits in `problem`: the
    other ranks are gathering, and a rank that left now would leave them waiting."""

    def __init__(self, folder: Path, stem: str):
        self.folder, self.stem = folder, stem
        self.pending: dict[str, torch.Tensor] = {}
        self.files: dict[str, str] = {}
        self.bytes = self.total = 0
        self.problem: DeltanetError | None = None

    def add(self, name: str, tensor: torch.Tensor) -> None:
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        self.pending[name] = tensor
        self.bytes += tensor.nbytes
        self.total += tensor.nbytes
        if self.bytes >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            file = f"{self.stem}-{len(set(self.files.values())) + 1:05}.safetensors"
            try:
                self.folder.mkdir(exist_ok=True)
                save_file(self.pending, self.folder / file, metadata={"format": "pt"})
            except (OSError, SafetensorError) as error:
                why = getattr(error, "strerror", None) or str(error)
                self.problem = self.problem or DeltanetError(f"{self.folder.name}/{file}: {why}")
            self.files |= dict.fromkeys(self.pending, file)
            self.pending, self.bytes = {}, 0


def write_state(
    folder: Path,
    engine: Engine,
    student: DeltaNetForCausalLM,
    world: World,
    *,
    adapter_scale: float | None = None,
    is_last: bool = False,
) -> None:
    """Writes this rank's share of the state into `folder`, which exists. All ranks must call it together; one that
    cannot write raises once the others no longer need it.

    adapter_scale: of a stage with low-rank adapters; they are merged into the student where `is_last`, else kept apart.
    """
    weights = _Shards(folder / STUDENT, f"model-rank{world.rank:03}")
    moments = _Shards(folder, f"optimizer-rank{world.rank:03}")
    tensors = _student_tensors(engine, student)
    if adapter_scale is not None and is_last:
        tensors = lora.merged(tensors, adapter_scale)
    for name, tensor in _mine(tensors, world):
        if lora.is_adapter(name):
            moments.add(f"{ADAPTER}.{name}", tensor)
        else:
            weights.add(lora.plain_name(name), tensor)
    weights.flush()
    for key in MOMENTS:
        for name, tensor in _mine(engine.full_tensors(key), world):
            moments.add(f"{key}.{name.removeprefix(PREFIX)}", tensor)
    moments.flush()
    parts = world.gather((weights.files, weights.total))
    if problem := weights.problem or moments.problem:
        raise problem
    if world.is_main:
        index = {"metadata": {"total_size": sum(total for _, total in parts)}, "weight_map": {}}
        for files, _ in parts:
            index["weight_map"] |= files
        (folder / STUDENT).mkdir(exist_ok=True)
        (folder / STUDENT / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        config = student.config.to_dict() | {"dtype": "float32"}
        (folder / STUDENT / "config.json").write_text(json.dumps(config, indent=2))


def load_moments(folder: Path, engine: Engine, updates: int) -> None:
    """Gives the engine back the moments of a commit of the same stage; weights come from its student folder."""
    get = _optimizer_tensors(folder)
    engine.load_moments(lambda name, key: get(f"{key}.{name.removeprefix(PREFIX)}"), updates)


def load_adapters(folder: Path, student: DeltaNetForCausalLM) -> None:
    """Gives the student its low-rank adapters back from a commit within a stage."""
    get = _optimizer_tensors(folder)
    lora.load_adapters(student, lambda name: get(f"{ADAPTER}.{name}"))


def _optimizer_tensors(folder: Path) -> Callable[[str], torch.Tensor]:
    places = {}
    for file in sorted(folder.glob("optimizer-rank*.safetensors")):
        handle = safe_open(file, "pt")
        places |= dict.fromkeys(handle.keys(), handle)

    def get(entry: str) -> torch.Tensor:
        if entry not in places:
            raise DeltanetError(f"{folder}: holds no {entry}, so the stage cannot go on from it")
        return places[entry].get_tensor(entry)

    return get


def _mine(tensors: Iterable, world: World):
    """Every rank runs through all tensors (their gathering is collective), and keeps each `size`-th one."""
    for index, item in enumerate(tensors):
        if index % world.size == world.rank:
            yield item


def _student_tensors(engine: Engine, student: DeltaNetForCausalLM):
    """The whole student: from the engine what it holds, the rest (in `align`) from the model in memory."""
    held = set()
    for name, tensor in engine.full_tensors():
        if name.startswith(PREFIX):
            held.add(name.removeprefix(PREFIX))
            yield name.removeprefix(PREFIX), tensor
    for name, parameter in student.named_parameters():
        if name not in held:
            yield name, engine.source(PREFIX + name) if parameter.is_meta else parameter
