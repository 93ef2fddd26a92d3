"""A stage's text for the tests of the teacher's cache, and what such a cache holds."""

from safetensors import safe_open
from small_pair import LENGTH, sequence, stage

from distill.logit_cache import PORTION
from distill.packing import IGNORED
from distill.prepare import StagePlan

TWO_FILES = PORTION + 5


class Text:
    """Stands for a corpus: sequences of other numbers of targets, some without any."""

    def __init__(self, digest="text"):
        self.digest = digest

    def __getitem__(self, position):
        found = sequence(position)
        if position % 7 == 3:
            found.targets[:] = IGNORED
        return found


def plan(num_sequences=TWO_FILES, micro_batch_size=2, digest="text"):
    return StagePlan(0, stage("distil"), num_sequences, 1, micro_batch_size, LENGTH, Text(digest))


def files(cache):
    return sorted(cache.folder.iterdir())


def content(cache):
    """The tensors of every portion, as bytes, and what it says of itself. (The order of its header varies.)"""
    found = {}
    for file in files(cache):
        with safe_open(file, "np") as portion:
            tensors = {name: portion.get_tensor(name).tobytes() for name in ("first", "ids", "log_p", "log_rest")}
            found[file.name] = (tensors, portion.metadata())
    return found
