"""Which outputs are compared by the largest element of their rows."""

import numpy as np
import pytest

from onnx_lowrank.engines.compare import compare

RNG = np.random.default_rng(0)


def drawn(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def shares(*shape: int) -> np.ndarray:
    exponentials = np.exp(drawn(*shape))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def ids(*shape: int) -> np.ndarray:
    return RNG.integers(0, 5, shape)


IMAGE, TOKENS = {"image": drawn(1, 3, 8, 8)}, {"ids": ids(2, 7), "mask": ids(2, 7)}
STATE = {"sound": drawn(2, 64), "state": drawn(2, 2, 16), "rate": np.array(16000)}


@pytest.mark.parametrize(
    ("feed", "outputs", "expected"),
    [
        (IMAGE, {"logits": drawn(4, 10)}, {"logits"}),
        (IMAGE, {"p": shares(4, 10), "features": drawn(4, 12)}, {"p", "features"}),
        (TOKENS, {"logits": drawn(2, 7, 30)}, {"logits"}),
        (TOKENS, {"tags": drawn(2, 7, 9), "attentions": shares(2, 4, 7, 7)}, {"tags", "attentions"}),
        (TOKENS, {"logits": drawn(2, 7, 30), "present.0.key": drawn(2, 4, 7, 16)}, {"logits"}),
        ({"x": drawn(4, 10)}, {"y": drawn(4, 10)}, {"y"}),
        ({"x": drawn(4, 10), "prior": drawn(4, 10)}, {"y": drawn(4, 10)}, {"y"}),
        ({"x": drawn(4, 10)}, {"label": ids(4), "p": shares(4, 10)}, {"label", "p"}),
        (STATE, {"output": drawn(2, 1), "stateN": drawn(2, 2, 16)}, set()),
        (STATE, {"words": drawn(2, 9, 30), "stateN": drawn(2, 2, 16)}, {"words"}),
        ({"x": drawn(4, 9), "h": drawn(4, 16)}, {"y": drawn(4, 3), "hn": drawn(4, 16)}, {"y"}),
        (IMAGE, {"scores": shares(1, 20, 2), "boxes": drawn(1, 20, 4)}, {"scores"}),
        (IMAGE, {"depth": drawn(1, 1, 8, 8)}, set()),
        (IMAGE, {"pixels": shares(1, 8, 8, 5)}, {"pixels"}),
    ],
    ids=[
        *("classifier", "classifier with features", "language model", "tagger", "cache", "one layer"),
        *("two inputs", "label", "silero", "recurrent words", "recurrent classifier", "detector"),
        *("depth", "segmentation"),
    ],
)
def test_outputs_that_hold_classes_agree(
    feed: dict[str, np.ndarray], outputs: dict[str, np.ndarray], expected: set[str]
) -> None:
    errors = compare(outputs, outputs, feed)
    assert {error.name for error in errors if error.agreement is not None} == expected
