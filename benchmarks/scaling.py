"""Distils a 1B student on one GPU and on all of them: tokens a second, memory, seconds by part, the same losses.

    python -m benchmarks.scaling [--gpus N] [--seq-len 4096] [--steps 12] [--same-steps 50] [--peer] [--out FOLDER]

Teacher and `global2` student have the shapes of Llama-3.2-1B and random weights made on the machine; the text is random
tokens, packed. Everything is measured on one GPU and then on N of the same host in the same run, each a launch of
torchrun that goes through all settings; one that fails is told, and a new launch goes on behind it. `--shape tiny`
runs everything on CPUs with a toy model, to try the script; `llama-8b` needs ZeRO 3, whose student is made in parts,
as is the teacher with `--teacher-shard`.

Model FLOPs of a token (`flops_per_token`): 6 x the student's matrix parameters (forward and backward), 2 x the
teacher's, the heads included; causal softmax attention 2 T HQ hd a token and layer forward, three times that with
backward; the delta rule 6 HQ hd^2 a token and layer forward, three times that with backward. What activation
checkpointing computes twice counts once; T is the mean length of a document, a third of the
sequence. Peak of an H100: 989 TFLOP/s (bfloat16, dense).
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

PEAK = 989e12
SHAPES = {}
SHAPES["llama-1b"] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
SHAPES["llama-8b"] = SHAPES["llama-1b"] | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "tie_word_embeddings": False,
}
SHAPES["tiny"] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "tie_word_embeddings": True,
}


def flops_per_token(shape: dict, linear: list[bool], length: int) -> float:
    width = shape["hidden_size"]
    query = shape["num_attention_heads"] * shape["head_dim"]
    pair = shape["num_key_value_heads"] * shape["head_dim"]
    layer = width * (2 * query + 2 * pair) + 3 * width * shape["intermediate_size"]
    matrices = layer * shape["num_hidden_layers"] + width * shape["vocab_size"]
    softmax, delta = 2 * length * query, 6 * query * shape["head_dim"]
    teacher = 2 * matrices + softmax * shape["num_hidden_layers"]
    student = 6 * matrices + 3 * sum(delta if is_linear else softmax for is_linear in linear)
    return teacher + student


def sequence(position: int, length: int, vocabulary: int):
    """Three documents of random tokens, a function of the position alone."""
    from distill.packing import assemble

    random = np.random.default_rng(position)
    cuts = np.sort(random.integers(2, length - 2, 2))
    return assemble(np.split(random.integers(0, vocabulary, length), cuts), length)


def worker(tasks: list[dict]) -> None:
    """One process of a launch; rank 0 prints a line per result."""
    from distill.world import start_world

    world = start_world()
    for task in tasks:
        result = measure(task, world)
        if world.is_main:
            print("RESULT " + json.dumps(result), flush=True)
        gc.collect()
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    torch.distributed.destroy_process_group()


def measure(task: dict, world) -> dict:
    """Trains `steps` steps of one setting, of which the first `warmup` are not timed."""
    from convert.loading import skeleton
    from deltanet import DeltaNetConfig
    from distill.batch import make_batch
    from distill.dry_run import activation_bytes, held_bytes
    from distill.engine import Engine, EngineSettings
    from distill.loop import Job, positions_of
    from distill.schedules import Schedule
    from distill.schema import Loss, Stage
    from distill.sharded import partition, shard
    from distill.stages import PREFIX, Whole, compile_layers

    cuda = world.device.type == "cuda"
    if task.get("kernels") == "fla":
        use_fla()
    shape = SHAPES[task["shape"]]
    kept = (1, shape["num_hidden_layers"] // 2)
    kinds = ["full_attention" if i in kept else "linear_attention" for i in range(shape["num_hidden_layers"])]
    common = {
        **shape,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    low = torch.bfloat16 if task["dtype"] == "bfloat16" else torch.float32
    settings = EngineSettings(
        zero_stage=task["zero"],
        precision="bf16" if task["dtype"] == "bfloat16" else "fp32",
        offload_optimizer=task["offload_optimizer"],
        offload_parameters=task["offload_parameters"],
    )
    full = ["full_attention"] * shape["num_hidden_layers"]
    student = skeleton(DeltaNetConfig(**common, layer_types=kinds, mixer=task["mixer"], skip_taps=4))
    teacher, taught = skeleton(DeltaNetConfig(**common, layer_types=full, dtype=low)), Drawn(student, 0, world.device)
    teaching = Drawn(teacher, 1, world.device)
    if task["shard"]:
        teacher = shard(teacher, teaching, low, world, offload=task["offload_teacher"])
    else:
        teacher = teaching.fill(teacher, low).eval().requires_grad_(False)
    in_parts = task["zero"] == 3
    if not in_parts:
        student = taught.fill(student, torch.float32)
    if task["checkpointing"]:
        student.gradient_checkpointing_enable({"use_reentrant": False})
    stage = Stage(kind="distil", steps=1, losses=[Loss(name="forward_kl")])
    module, source = Whole(student, teacher, stage), None
    if in_parts:

        def source(name: str) -> torch.Tensor:
            return taught(name.removeprefix(PREFIX))

        partition(module, source, settings)
    if task["compile"] and not in_parts:
        compile_layers(module)
    groups = [{"params": list(student.parameters()), "lr": 1e-4, "peak_lr": 1e-4, "weight_decay": 0.0}]
    engine = Engine(module, groups, settings, world, source)
    job = Job(0, "scaling", task["steps"], 0, 0, 0, task["batch"], task["micro"], Schedule("constant", 1, 0), None)
    parts = Parts(world.device, teacher, student)
    losses, began = [], time.perf_counter()
    for step in range(task["steps"]):
        if step == task["warmup"]:
            parts.reset()
            began = time.perf_counter()
        positions = positions_of(step, job, world)
        batches = [[sequence(at, task["length"], shape["vocab_size"]) for at in row] for row in positions]
        (count,) = world.sum([sum(map(module.count, batches))])
        loss = 0.0
        for sequences in batches:
            batch = make_batch(sequences, world.device)
            with parts("forward"):
                share, _ = engine.forward(batch, count)
            with parts("backward"):
                engine.backward(share)
            loss += share.detach().double()
        with parts("step"):
            engine.step()
        losses.append(world.sum([float(loss)])[0])
    if cuda:
        torch.cuda.synchronize()
    measured = task["steps"] - task["warmup"]
    seconds = time.perf_counter() - began
    tokens = measured * task["batch"] * task["length"]
    rate = tokens / seconds / world.size
    low = settings.precision == "bf16"
    parts_of_teacher = world.size if task["shard"] else 1
    its_part = teaching.count / parts_of_teacher * (not task["offload_teacher"])
    held = held_bytes(task["zero"], world.size, low=low, trained=taught.count, teacher=its_part)
    activations = activation_bytes(
        student.config,
        task["micro"] * task["length"],
        low=low,
        checkpointing=task["checkpointing"],
        compiled=task["compile"] and not in_parts,
    )
    result = {
        **task,
        "gpus": world.size,
        "tokens_per_second_per_gpu": rate,
        "peak_gib": max(world.gather(max(parts.peaks.values()))),
        "peak_gib_by_part": parts.peaks,
        "held_gib": held / 2**30,
        "activations_gib": activations / 2**30,
        "seconds": {name: value / measured for name, value in parts.seconds().items()} | {"all": seconds / measured},
        "flop_use": rate
        * flops_per_token(shape, [kind != "full_attention" for kind in kinds], task["length"] / 3)
        / PEAK,
        "losses": losses,
    }
    engine.close()
    return result


class Drawn:
    """Random weights of a model on `meta`, tensor by tensor: each a function of its name, so that every process draws
    the same and none holds more than one."""

    def __init__(self, model, seed: int, device: torch.device):
        self.seed, self.device, self.width = seed, device, model.config.hidden_size
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.count = sum(shape.numel() for shape in self.shapes.values())

    def __call__(self, name: str) -> torch.Tensor:
        shape, draw = self.shapes[name], torch.Generator(self.device)
        if "norm" in name:
            return torch.ones(shape, device=self.device)
        if len(shape) < 2:
            return torch.zeros(shape, device=self.device)
        draw.manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))
        return torch.randn(shape, generator=draw, device=self.device) * 0.02

    def fill(self, model, dtype: torch.dtype):
        """The model with all of them, whole."""
        for place, owner in model.named_modules():
            for name in owner._parameters:
                full = ".".join(filter(None, (place, name)))
                if full in self.shapes:
                    owner._parameters[name] = torch.nn.Parameter(self(full).to(dtype))
        model.tie_weights()
        model.model.rotary_emb.to(self.device)
        return model


class Parts:
    """Seconds by part of the step, between CUDA events, so that nothing waits; of a CPU by the clock. And the most
    memory (GiB) that a GPU held in each part."""

    def __init__(self, device: torch.device, teacher, student):
        self.cuda, self.spans, self.peaks = device.type == "cuda", [], {}
        for name, model in (("teacher forward", teacher.model), ("student forward", student.model)):
            model.register_forward_pre_hook(lambda *_, name=name: self._open(name))
            model.register_forward_hook(lambda *_, name=name: self._close(name))

    def _now(self):
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _open(self, name: str) -> None:
        self.spans.append([name, self._now(), None])

    def _close(self, name: str) -> None:
        span = next(span for span in reversed(self.spans) if span[0] == name and span[2] is None)
        span[2] = self._now()

    def __call__(self, name: str):
        parts = self

        class Span:
            def __enter__(self):
                if parts.cuda:
                    torch.cuda.reset_peak_memory_stats()
                parts._open(name)

            def __exit__(self, *_):
                parts._close(name)
                peak = torch.cuda.max_memory_allocated() / 2**30 if parts.cuda else 0.0
                parts.peaks[name] = max(peak, parts.peaks.get(name, 0.0))

        return Span()

    def reset(self) -> None:
        self.spans, self.peaks = [], {}

    def seconds(self) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, begin, end in self.spans:
            took = begin.elapsed_time(end) / 1e3 if self.cuda else end - begin
            found[name] = found.get(name, 0.0) + took
        found["loss"] = found.pop("forward") - found["teacher forward"] - found["student forward"]
        return found


def use_fla() -> None:
    """Puts flash-linear-attention's kernels in the place of ours."""
    from fla.ops.delta_rule import chunk_delta_rule
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    import deltanet.mixer

    def rule(q, k, v, beta, *, g, scale, initial_state, output_final_state, cu_seqlens, normalize_qk):
        options = {
            "beta": beta.to(v.dtype), "scale": scale, "initial_state": initial_state,
            "output_final_state": output_final_state, "use_qk_l2norm_in_kernel": normalize_qk,
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.long(),
        }  # fmt: skip
        return chunk_delta_rule(q, k, v, **options) if g is None else chunk_gated_delta_rule(q, k, v, g=g, **options)

    deltanet.mixer.delta_rule = rule


def launch(tasks: list[dict], gpus: int, log: Path) -> Iterator[dict]:
    """The results of the tasks, in order and as they come, up to the first that failed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(gpus), "--master-port"]
    command += [str(29500 + os.getpid() % 400), "-m", "benchmarks.scaling", "--worker", json.dumps(tasks)]
    with log.open("a", buffering=1) as file:
        file.write(f"\n== {gpus} GPU, {tasks}\n")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True) as process:
            for line in process.stdout:
                if line.startswith("RESULT "):
                    yield json.loads(line[7:])
                else:
                    file.write(line)


def show(found: dict) -> None:
    seconds = "  ".join(f"{name} {value:.3f}" for name, value in found["seconds"].items())
    rate, peak = found["tokens_per_second_per_gpu"], found["peak_gib"]
    counted = found["held_gib"] + found["activations_gib"]
    memory = f"{peak:.1f} GiB ({counted:.1f} by the dry run)"
    print(f"{label(found)}: {rate:,.0f} tokens/s a GPU, {memory}, {found['flop_use']:.1%} of peak")
    peaks = "  ".join(f"{name} {value:.1f}" for name, value in found["peak_gib_by_part"].items())
    print(f"   seconds a step: {seconds}; peak GiB of rank 0: {peaks}", flush=True)


def name(task: dict) -> str:
    return f"{label(task)}, length {task['length']}"


def label(task: dict) -> str:
    options = (
        "checkpointing",
        "compile",
        "kernels",
        "shard",
        "offload_teacher",
        "offload_optimizer",
        "offload_parameters",
    )
    extras = [key.replace("_", " ") for key in options if task.get(key)]
    said = [task["shape"], task["mixer"], f"{task['gpus']} GPU", f"ZeRO {task['zero']}", task["dtype"], *extras]
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpus", type=int, default=max(torch.cuda.device_count(), 1))
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=12, help="of a measurement of speed; 0: none")
    parser.add_argument("--same-steps", type=int, default=50, help="steps of the comparison of losses; 0: none")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--peer", action="store_true", help="flash-linear-attention's kernels beside ours, on one GPU")
    parser.add_argument("--mixer", choices=("gated_delta", "delta"), default="gated_delta")
    parser.add_argument("--compile", action="store_true", help="torch.compile every layer")
    parser.add_argument("--checkpointing", action="store_true", help="also with activation checkpointing")
    parser.add_argument("--shape", choices=SHAPES, default="llama-1b")
    parser.add_argument("--micro", type=int, default=2, help="sequences of a forward pass")
    parser.add_argument("--passes", type=int, default=1, help="forward passes of a GPU and step")
    parser.add_argument("--only-all", action="store_true", help="not on one GPU, which may be too small")
    parser.add_argument("--teacher-shard", action="store_true", help="the teacher in parts, of ZeRO 3")
    parser.add_argument("--offload-teacher", action="store_true", help="its parts in CPU memory")
    parser.add_argument("--offload-optimizer", action="store_true", help="from ZeRO 1 on")
    parser.add_argument("--offload-parameters", action="store_true", help="of ZeRO 3")
    parser.add_argument("--no-plain", action="store_true", help="with --checkpointing: not without it")
    parser.add_argument("--out", type=Path, default=Path("scaling"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(json.loads(arguments.worker))
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    base = {
        "shape": arguments.shape, "length": arguments.seq_len, "steps": arguments.steps, "warmup": 4,
        "mixer": arguments.mixer, "micro": arguments.micro, "passes": arguments.passes, "dtype": "bfloat16",
        "checkpointing": False, "compile": arguments.compile,
    }  # fmt: skip
    tiny = {
        "shape": "tiny", "length": 256, "steps": arguments.same_steps, "warmup": 1, "micro": 1, "passes": 1,
        "compile": False, "same": True,
    }  # fmt: skip
    kinds = [False] * (not arguments.no_plain) + [True] * arguments.checkpointing

    def sharding(zero: int) -> dict:
        return {
            "zero": zero,
            "shard": arguments.teacher_shard and zero == 3,
            "offload_teacher": arguments.offload_teacher and zero == 3,
            "offload_optimizer": arguments.offload_optimizer and zero > 0,
            "offload_parameters": arguments.offload_parameters and zero == 3,
        }

    speed = [
        base | sharding(zero) | {"checkpointing": kind}
        for zero in arguments.stages
        for kind in kinds
        if arguments.steps
    ]
    same = [
        base | tiny | sharding(zero) | {"dtype": dtype, "batch": 2 * arguments.gpus}
        for dtype in ("float32", "bfloat16")
        for zero in arguments.stages
        if arguments.same_steps
    ]
    results: dict[str, dict] = {}
    counts = [arguments.gpus] if arguments.only_all else sorted({1, arguments.gpus})
    for gpus in counts:
        each = arguments.micro * arguments.passes
        left = [task | {"gpus": gpus, "batch": task.get("batch", each * gpus)} for task in speed + same]
        if arguments.peer and gpus == 1:
            left.append(left[0] | {"kernels": "fla"})  # last, since the kernels stay in the process
        while left:
            finished = 0
            for result in launch(left, gpus, arguments.out / "log"):
                finished += 1
                results[name(result)] = result
                (arguments.out / "scaling.json").write_text(json.dumps(list(results.values()), indent=1))
                if not result.get("same"):
                    show(result)
            if finished < len(left):
                print(f"{label(left[finished])}: failed, see {arguments.out / 'log'}", flush=True)
            left = left[finished + 1 :]
    for task in (speed + same) * (len(counts) > 1):
        pair = [results.get(name(task | {"gpus": gpus})) for gpus in counts]
        if not all(pair):
            continue
        if task in same:
            first, other = (np.array(found["losses"]) for found in pair)
            apart = np.abs(other / first - 1).max()
            print(f"ZeRO {task['zero']}, {task['dtype']}: losses on 1 and {counts[-1]} differ by {apart:.1e} at most")
        else:
            one, many = (found["tokens_per_second_per_gpu"] for found in pair)
            print(f"{label(task | {'gpus': counts[-1]})}: {many / one:.1%} of linear")


if __name__ == "__main__":
    main()
