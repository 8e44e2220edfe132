"""Mutated files of every kind: the command ends with a result or a sentence, within its bounds."""

from __future__ import annotations

from collections import Counter

import pytest
from corpus import KINDS, TRAINED, trained
from fuzzing import Fuzzer

_FEW = 2
_MANY = 500
_SOME = 200


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files(name, server, tmp_path):
    fuzzer = Fuzzer(server, KINDS[name], tmp_path)
    for seed in range(_FEW):
        tried = fuzzer.tried(seed)
        assert not tried.fault, f"seed {seed}, {tried.file}: {tried.run.err}"


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files(name, server, tmp_path):
    _hold(name, Fuzzer(server, KINDS[name], tmp_path), _MANY)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TRAINED)
def test_many_mutated_trained_models(name, server, shared, tmp_path):
    _hold(name, Fuzzer(server, trained(shared / "models" / f"{name}.onnx"), tmp_path), _SOME)


def _hold(name: str, fuzzer: Fuzzer, count: int) -> None:
    """Run the command on mutated files, count how it ended, and hold every run against its bounds."""
    codes, faults = Counter(), {}
    for seed in range(count):
        tried = fuzzer.tried(seed)
        codes[tried.run.code] += 1
        if tried.fault:
            faults[seed] = f"{tried.fault}: {tried.run.message}"
    print(f"{name}: {count} files, {dict(codes)}")
    assert not faults
