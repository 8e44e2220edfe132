"""Sets of shapes of a model's inputs, such as a decoder's prefill and its calls with one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import fsum, inf
from numbers import Integral, Real
from types import NoneType

from onnx_lowrank.calibrate.shares import counted
from onnx_lowrank.errors import InputError
from onnx_lowrank.options import require

_LARGEST_SIZE = 2**63 - 1


def sets(given: object) -> tuple[dict[str, tuple[int, ...]], ...]:
    """Check the sets of shapes; without any there is one that is empty.

    Args:
        given: Shapes by input, or several such mappings.

    Raises:
        InputError: A shape is wrong, or the sets do not name the same inputs.
    """
    wanted = "a mapping of input names to shapes, or several"
    if given is None or isinstance(given, Mapping):
        return (_shapes(given or {}),)
    require("input_shape", given, (Sequence,), wanted)
    found = []
    for each in given if isinstance(given, Sequence) else ():
        require("input_shape", each, (Mapping,), wanted)
        found.append(_shapes(each))
    counts = Counter(name for shapes in found for name in shapes)
    few = next((name for name in counts if counts[name] < len(found)), None)
    if few is not None:
        most = max(counts, key=counts.__getitem__)
        raise InputError(
            f"--input-shape gives {few!r} {counts[few]} and {most!r} {counts[most]} of {len(found)} shapes: "
            "give every input that you name the same number of shapes, one for each set."
        )
    return tuple(found) or ({},)


def weights(given: Sequence[float] | None, number: int) -> tuple[float, ...]:
    """Check the weights of the sets of shapes, and scale them to the sum 1.

    Args:
        given: A weight for each set; None weighs them equally.
        number: The number of sets.

    Raises:
        InputError: A weight is wrong, or their number.
    """
    require("weights", given, (Sequence, NoneType), "a number for each set of shapes")
    if given is None:
        return (1 / number,) * number
    for weight in given:
        require("weights", weight, (Real,), "a number for each set of shapes")
        if not 0 < weight < inf:
            raise InputError(f"--weights has the value {weight:g}: give values above 0.")
    if len(given) != number or number == 1:
        raise InputError(
            f"--weights has {counted(len(given), 'value')}, and --input-shape gives "
            f"{counted(number, 'set')} of shapes: give every input two shapes or more, and a weight for each."
        )
    # Divided first, or the sum of large weights overflows.
    parts = [float(weight) / float(max(given)) for weight in given]
    return tuple(part / fsum(parts) for part in parts)


def _shapes(given: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Check the shapes of inputs.

    Raises:
        InputError: A shape is wrong.
    """
    for name, shape in given.items():
        require(f"The shape of input {name!r}", shape, (Sequence,), "positive whole numbers")
        is_whole = all(isinstance(n, Integral) and 0 <= n <= _LARGEST_SIZE for n in shape)
        # A batch of 0 computes nothing; a past of 0 positions is that of a decoder's first call.
        if not is_whole or 0 in shape[:1]:
            raise InputError(
                f"The shape of input {name!r} is {shape}, but it must hold positive whole numbers, or 0 for "
                "an open dimension other than the first."
            )
    return {name: tuple(map(int, shape)) for name, shape in given.items()}
