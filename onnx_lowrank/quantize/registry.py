"""The lookup of a kind of quantization by its name."""

from __future__ import annotations

from onnx_lowrank import quantize
from onnx_lowrank.errors import InputError
from onnx_lowrank.quantize.kind import Kind


def named(name: str) -> Kind:
    """The kind with this name; its packages are installed.

    Raises:
        InputError: No kind has this name, or a package that it needs is missing.
    """
    if name not in quantize.names():
        raise InputError(f"--then is {name[:60]!r}: choose one of {', '.join(quantize.names())}.")
    kind: Kind = quantize.found()[name]
    kind.check()
    return kind
