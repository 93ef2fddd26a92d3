"""Random choices as pure functions of integers: the same on every machine, process count and library version.

A key of integers is hashed by splitmix64; a permutation sorts hashed indices. numpy's own generators promise no stable
streams between versions, and a run may be resumed with another one. Twin: tests/distill/test_packing.py.
"""

import numpy as np

_MASK = (1 << 64) - 1


def _splitmix(value: np.ndarray) -> np.ndarray:
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def hashed(*key: int, count: int = 1) -> np.ndarray:
    """`count` independent uint64 values that depend on nothing but the integers of `key`."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for part in key:
            state = _splitmix(state ^ np.uint64(part & _MASK))
        return _splitmix(state + _splitmix(np.arange(count, dtype=np.uint64)))


def permutation(count: int, *key: int) -> np.ndarray:
    """A permutation of range(count), int64."""
    return np.argsort(hashed(*key, count=count), kind="stable")


def below(limit: int, value: np.uint64) -> int:
    """A hashed value as an integer in [0, limit)."""
    return int(value) % limit


def fraction(value: np.uint64) -> float:
    """A hashed value as a number in [0, 1)."""
    return int(value) / 2.0**64
