"""Damage of every kind to a folder that was whole: all of it is found by `--verify`. safetensors alone finds little.

The counts in docs/results/corruption.md are those of `python tests/convert/publish/test_corruption.py FLIPS [FOLDER]`,
which harms a copy.
"""

import itertools
import json
import random
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from published import files_of, make_source, make_student
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from convert.publish import manifest
from convert.publish.manifest import damage
from convert.publish.verify import verify
from deltanet_errors import UserError

FLIPS = 12


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << (bit % 8)
    return bytes(changed)


def detects(folder: Path, name: str, data: bytes) -> bool:
    """Whether the damage is found while `name` holds `data`."""
    path = folder / name
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        problems = damage(folder)
        # A manifest that still reads, but says other things, is told by the files it no longer fits.
        return any(problem.startswith(name) or name == manifest.MANIFEST for problem in problems)
    finally:
        path.write_bytes(whole)


def survives_safetensors(path: Path, data: bytes) -> bool:
    """Whether safetensors loads the damaged file without a word."""
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        load_file(path)
        return True
    except (SafetensorError, ValueError, KeyError):
        return False
    finally:
        path.write_bytes(whole)


def flips(folder: Path, count: int, seed: int = 0) -> Counter:
    """Flips one bit at `count` random places of every file; counts tried, found, and loaded by safetensors."""
    counted, chance = Counter(), random.Random(seed)
    for name, data in files_of(folder).items():
        for bit in chance.sample(range(8 * len(data)), min(count, 8 * len(data))):
            counted["flips"] += 1
            counted["flips found"] += detects(folder, name, flipped(data, bit))
            if name.endswith(".safetensors"):
                counted["flips in weights"] += 1
                counted["loaded by safetensors"] += survives_safetensors(folder / name, flipped(data, bit))
    return counted


def cuts(folder: Path) -> Counter:
    """Truncates every file to nothing, half, and all but one byte; zeroes, repeats and appends."""
    counted = Counter()
    for name, data in files_of(folder).items():
        half = len(data) // 2
        for kind, harmed in (
            ("truncated", b""),
            ("truncated", data[:half]),
            ("truncated", data[:-1]),
            ("zeroed", data[:half] + bytes(min(4096, len(data) - half)) + data[half + 4096 :]),
            ("appended", data + b"\0"),
        ):
            if harmed == data:
                continue
            counted[kind] += 1
            counted[f"{kind} found"] += detects(folder, name, harmed)
    return counted


def whole_files(folder: Path) -> Counter:
    """Removes, adds, renames and swaps files."""
    counted, names = Counter(), sorted(files_of(folder))
    for name in names:
        aside = folder.parent / "aside"
        shutil.move(folder / name, aside)
        counted["removed"] += 1
        counted["removed found"] += bool(damage(folder))
        shutil.move(aside, folder / name)
        renamed = folder / f"x{name}"
        (folder / name).rename(renamed)
        counted["renamed"] += 1
        counted["renamed found"] += bool(damage(folder))
        renamed.rename(folder / name)
        shutil.copy(folder / name, folder / f"model-{name}.safetensors")
        counted["added"] += 1
        counted["added found"] += bool(damage(folder))
        (folder / f"model-{name}.safetensors").unlink()
    for one, other in itertools.pairwise(names):
        first, second = (folder / one).read_bytes(), (folder / other).read_bytes()
        (folder / one).write_bytes(second)
        (folder / other).write_bytes(first)
        counted["swapped"] += 1
        counted["swapped found"] += bool(damage(folder))
        (folder / one).write_bytes(first)
        (folder / other).write_bytes(second)
    return counted


def all_found(counted: Counter) -> bool:
    kinds = [kind for kind in counted if f"{kind} found" in counted]
    return bool(kinds) and all(counted[kind] == counted[f"{kind} found"] > 0 for kind in kinds)


def test_every_flipped_bit_is_found_and_safetensors_alone_misses_most(student):
    counted = flips(student, FLIPS)
    assert all_found(counted)
    assert counted["loaded by safetensors"] > counted["flips in weights"] / 2


def test_every_bit_of_the_manifest_itself_counts(student):
    """It cannot be read, or says something else, which the files then do not fit."""
    data = (student / manifest.MANIFEST).read_bytes()
    true, unreadable = manifest.parse_manifest(data), 0
    for bit in range(8 * len(data)):
        try:
            assert manifest.parse_manifest(flipped(data, bit)) != true, data[bit // 8 - 20 : bit // 8 + 20]
        except UserError:
            unreadable += 1
    assert 0 < unreadable < 8 * len(data)


def test_truncated_zeroed_and_lengthened_files_are_found(student):
    assert all_found(cuts(student))


def test_removed_added_renamed_and_swapped_files_are_found(student):
    assert all_found(whole_files(student))
    assert verify(student).problems == []


def rewritten(folder: Path, change) -> None:
    path = sorted(folder.glob("*.safetensors"))[0]
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


TENSORS = {
    "removed": lambda tensors: tensors.pop(next(iter(tensors))),
    "added": lambda tensors: tensors.update({"model.extra": torch.zeros(2)}),
    "renamed": lambda tensors: tensors.update({"model.other": tensors.pop(next(iter(tensors)))}),
    "one value": lambda tensors: next(iter(tensors.values())).view(-1)[:1].add_(1),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_changed_tensors_are_found_by_digest_and_all_but_values_without_one(student, kind, has_manifest):
    """Whoever changes tensors and writes a new manifest is caught by names and shapes; only values pass."""
    rewritten(student, TENSORS[kind])
    if not has_manifest:
        manifest.seal(student)
    assert bool(verify(student).problems) == (has_manifest or kind != "one value")


EDITS = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "layer_types": ["full_attention", "full_attention"],
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "mixer": "delta",
    "skip_taps": 8,
    "format_version": 99,
    "num_key_value_heads": 2,
    "mixer_bias": False,
    "num_attention_heads": 0,
}


@pytest.mark.parametrize("key", EDITS)
def test_an_edited_config_is_found_by_digest_and_by_what_it_asks_for(student, key):
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: EDITS[key]}))
    assert any(problem.startswith("config.json: ") for problem in verify(student).problems)
    manifest.seal(student)
    assert verify(student).problems


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        if len(sys.argv) > 2:
            made = Path(shutil.copytree(sys.argv[2], Path(name) / "student"))
        else:
            made = make_student(Path(name) / "student", make_source(Path(name) / "source"))
        total = flips(made, int(sys.argv[1])) + cuts(made) + whole_files(made)
        print(f"{len(files_of(made))} files, {sum(map(len, files_of(made).values())):,} bytes")
        for kind, count in sorted(total.items()):
            print(f"{kind}: {count:,}")
