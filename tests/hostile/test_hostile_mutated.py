"""Mutated files of every kind: the command ends with a result or a sentence, within its bounds."""

from __future__ import annotations

from collections import Counter

import pytest
from corpus import KINDS
from fuzzing import Fuzzer

_FEW = 2
_MANY = 500


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files(name, server, tmp_path):
    fuzzer = Fuzzer(server, KINDS[name], tmp_path)
    for seed in range(_FEW):
        tried = fuzzer.tried(seed)
        assert not tried.fault, f"seed {seed}, {tried.file}: {tried.run.err}"


@pytest.mark.fuzz
@pytest.mark.parametrize("name", KINDS)
def test_many_mutated_files(name, server, tmp_path):
    fuzzer = Fuzzer(server, KINDS[name], tmp_path)
    codes, faults = Counter(), {}
    for seed in range(_MANY):
        tried = fuzzer.tried(seed)
        codes[tried.run.code] += 1
        if tried.fault:
            faults[seed] = f"{tried.fault}: {tried.run.message}"
    print(f"{name}: {_MANY} files, {dict(codes)}")
    assert not faults
