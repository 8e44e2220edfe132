"""Values in a store: digests tell different values apart, and values come back as they were."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnx_lowrank.core.factors import Moments, Spectra
from onnx_lowrank.core.layer import Rows
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.files.keeping import Keeper, digest, environment
from onnx_lowrank.files.store import Entry, Store
from onnx_lowrank.linalg.narrowing import Channels, PackedScores, Scores, Values
from onnx_lowrank.work.moments import LayerMoments
from onnx_lowrank.work.narrowing import WidthErrors
from onnx_lowrank.work.scoring import ActivationErrors

ONES = np.ones((2, 3))

DIFFERENT = [
    None,
    True,
    1,
    1.0,
    np.float64(1),
    np.float32(1),
    "1",
    b"1",
    "",
    (),
    ("",),
    ((),),
    ("a", "b"),
    ("ab",),
    ("a", ("b",)),
    {"a": "b"},
    {"a": 1, "b": 2},
    {"b": 2, "a": 1},  # Sums follow the order of a mapping.
    frozenset({"a", "b"}),
    Fold.ENCODE,
    "encode",
    Option(Fold.ENCODE, 1, 2),
    Option(Fold.ENCODE, 2, 1),
    Rows(1, 2),
    ONES,
    ONES.T,
    ONES.reshape(-1),
    ONES.astype(np.float32),
    ONES.astype(np.float16),
    ONES.astype(ml_dtypes.bfloat16),
    ONES.astype(np.int64),
    np.zeros((0, 3)),
    np.zeros((3, 0)),
    np.array(["a", "b"]),
    np.array(["a", "b"], dtype=object),
    np.dtype(np.float32),
]


def test_different_values_have_different_digests():
    assert len({digest(value) for value in DIFFERENT}) == len(DIFFERENT)


def test_equal_values_have_equal_digests():
    backwards = ONES.copy()[::-1][::-1]
    assert digest(ONES, {"a", "b"}) == digest(backwards, {"b", "a"})
    assert digest("a") != digest("a", "a")


@given(st.text(), st.text())
def test_the_boundary_of_two_texts_counts(first, second):
    assert (digest(first, second) == digest(first + second, "")) == (second == "")


def test_a_value_without_digest_is_refused():
    with pytest.raises(TypeError, match="object has no digest"):
        digest(object())


def test_the_content_of_a_reference_stands_for_it():
    @dataclass
    class Reference:
        place: str

        @property
        def content(self) -> str:
            return "bytes"

    assert digest(Reference("here")) == digest(Reference("there")) != digest("bytes")


def test_the_environment_tells_devices_and_providers_apart():
    kinds = [("CPUExecutionProvider", "cpu"), ("CPUExecutionProvider", "cuda"), ("Other", "cpu")]
    assert len({digest(environment(*kind)) for kind in kinds}) == len(kinds)


@pytest.fixture
def keeper(tmp_path: Path) -> Keeper:
    return Keeper(Store(tmp_path), "test")


SCORES = Scores(ONES, 2 * ONES, 3, None)
VALUES = [
    ({(Fold.ENCODE, 1): ONES, (Fold.ROWS, 4): 2 * ONES}, Spectra),
    (ActivationErrors({(Fold.DECODE, 2): ONES}, float("inf")), ActivationErrors),
    (WidthErrors(Channels(np.arange(4)), ONES), WidthErrors),
    (WidthErrors(Values(ONES, 2), ONES), WidthErrors),
    (WidthErrors(SCORES, ONES), WidthErrors),
    (WidthErrors(PackedScores(SCORES, (Rows(0, 2), Rows(2, 2)), ONES), ONES), WidthErrors),
    ([ONES, 0 * ONES], list[np.typing.NDArray[np.float64]]),
    (ONES, np.typing.NDArray[np.float64]),
    (LayerMoments(Moments(3, ONES, ONES, 2.5), None, counts=np.arange(3)), LayerMoments),
]


@pytest.mark.parametrize(("value", "kind"), VALUES)
def test_a_value_comes_back_with_the_same_bits(keeper, value, kind):
    assert keeper.get(keeper.key(1), kind) is None
    keeper.put(keeper.key(1), value)
    found = keeper.get(keeper.key(1), kind)
    assert type(found) is type(value)
    assert digest(found) == digest(value)
    if isinstance(value, Mapping):
        assert list(found) == list(value)


def test_a_value_of_another_type_counts_as_absent(keeper):
    values = [pair for pair in VALUES if pair[1] is not LayerMoments]  # All its fields have defaults.
    for value, own in values:
        keeper.put(keeper.key(1), value)
        for _, kind in values:
            assert (keeper.get(keeper.key(1), kind) is not None) == (kind is own), (own, kind)


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xc1",
        b"\x91" * 20_000,
        msgspec.msgpack.encode({("encode", 1): 1}),
        msgspec.msgpack.encode({("encode", 1): -2}),
        msgspec.msgpack.encode({("encode", 1): "0"}),
        msgspec.msgpack.encode({("diagonal", 1): 0}),
        msgspec.msgpack.encode([0]),
    ],
)
def test_a_forged_text_counts_as_absent(tmp_path, text):
    store = Store(tmp_path)
    keeper = Keeper(store, "test")
    store.put(keeper.key(1), Entry(text, (ONES,)))
    assert keeper.get(keeper.key(1), Spectra) is None


def test_a_forged_way_counts_as_absent(tmp_path):
    store = Store(tmp_path)
    keeper = Keeper(store, "test")
    for way in ({"order": 0, "basis": 1}, {}, [], 3, {"order": "x"}):
        store.put(keeper.key(1), Entry(msgspec.msgpack.encode({"way": way, "relative": 0}), (ONES,)))
        assert keeper.get(keeper.key(1), WidthErrors) is None


def test_an_array_of_another_dtype_counts_as_absent(keeper):
    keeper.put(keeper.key(1), {(Fold.ENCODE, 1): ONES.astype(np.float32)})
    assert keeper.get(keeper.key(1), Spectra) is None


def test_keys_depend_on_all_parts(tmp_path):
    store = Store(tmp_path)
    first, second = Keeper(store, "a"), Keeper(store, "b")
    keys = [first.key(1), first.key(2), first.of(1).key(), second.key(1), first.of(1).key(1)]
    assert len(set(keys)) == len(keys)
    assert first.of(1).key(1) == Keeper(store, "a").of(1).key(1)
