"""Conversion without calibration against copying the same folder, with peak memory.

    python -m benchmarks.convert [--layers 16] [--rounds 5] [--folder DIR]

Makes a random checkpoint with the shapes of Llama-3.2-1B (2.47 GB of bfloat16) in a temporary folder, then in turns
copies it (plain, and durably: copied, then synced to disk, as the conversion does) and converts it, in processes of
their own. Needs about 8 GB of disk. Figures: docs/results/convert.md.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig

from convert.families import teacher_config
from convert.plan import teacher_tensors


def write_teacher(folder: Path, layers: int) -> int:
    """The random checkpoint; returns its bytes."""
    from safetensors.torch import save_file

    folder.mkdir()
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 22, generator=generator) * 0.02).bfloat16()
    tensors = {}
    for name, shape in teacher_tensors(teacher_config(folder)).items():
        size = torch.Size(shape).numel()
        tensors[name] = block.repeat(-(-size // len(block)))[:size].reshape(shape)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def copy(source: Path, target: Path, durable: bool) -> tuple[float, float]:
    """(seconds, CPU seconds)."""
    start, busy = time.perf_counter(), time.process_time()
    shutil.copytree(source, target)
    if durable:
        for path in target.iterdir():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    return time.perf_counter() - start, time.process_time() - busy


def convert(source: Path, target: Path) -> dict:
    """The report of a conversion in a process of its own, with `process` (seconds, start of Python included) and
    `cpu` (CPU seconds of the conversion itself)."""
    program = (
        "import json, sys, time; from convert import convert; busy = time.process_time(); "
        "report = convert(sys.argv[1], sys.argv[2], calibrate=['none'], local_window=0); "
        "print(json.dumps(report | {'cpu': time.process_time() - busy}))"
    )
    command = [sys.executable, "-c", program, str(source), str(target)]
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout) | {"process": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of the random teacher (default: 16)")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement; the median counts (default: 5)")
    parser.add_argument("--folder", help="where the temporary folder goes (default: the system's)")
    arguments = parser.parse_args()
    rows: dict[str, list[tuple[float, float]]] = {"copy": [], "copy and sync": [], "convert": []}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder, "teacher"), Path(folder, "copy")
        size = write_teacher(source, arguments.layers)
        for _ in range(arguments.rounds):
            for name, row in rows.items():
                os.sync()
                time.sleep(1)
                if name == "convert":
                    report = convert(source, target)
                    row.append((report["seconds"], report["cpu"]))
                else:
                    row.append(copy(source, target, durable=name != "copy"))
                shutil.rmtree(target)
    load = os.getloadavg()[0]
    print(f"{platform.machine()}, {os.cpu_count()} CPU cores, load {load:.1f}, torch {torch.__version__}")
    base = statistics.median(wall for wall, _ in rows["copy"])
    for name, row in rows.items():
        walls, busy = [wall for wall, _ in row], statistics.median(cpu for _, cpu in row)
        middle = statistics.median(walls)
        print(
            f"{name:<14} {middle:6.2f} s ({min(walls):.2f} to {max(walls):.2f})  {middle / base:5.2f} x copy, "
            f"{busy:.2f} s of CPU"
        )
    print(f"{size / 1e9:.2f} GB; the last conversion with the start of Python: {report['process']:.2f} s")
    print(f"peak memory of the conversion: {report['peak_rss_mb']:.0f} MB; tensors: {report['tensors']}")


if __name__ == "__main__":
    main()
