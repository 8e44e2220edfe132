"""What attacks are made of: a small model to change, and the table of all attacks."""
# ruff: noqa: E501 - nodes as text, one model a line

from __future__ import annotations

from collections.abc import Callable

from onnx import ModelProto

from tiny import built, decaying

HUGE = 2**40

ATTACKS: dict[str, Callable[[], ModelProto]] = {}
"""The attacks by name."""


def attack(make: Callable[[], ModelProto]) -> Callable[[], ModelProto]:
    ATTACKS[make.__name__.replace("_", " ")] = make
    return make


def matrices(
    nodes: str = "", *, inputs: str = "float[N, 16] x", opset: int = 17, head: str = "", **more: object
) -> ModelProto:
    """A model that multiplies by a matrix, and has further nodes and initializers."""
    text = f"""<ir_version: 10, opset_import: ["": {opset}, "local": 1]>
    g ({inputs}) => (float[N, 16] y) {{ {nodes} y = MatMul (x, w) }} {head}"""
    return built(text, {"w": decaying(1, 16, 16), **more})


def function_chain(levels: int) -> ModelProto:
    functions = [
        f"""<domain: "local", opset_import: ["": 17, "local": 1]> f{n} (x) => (y) {{ y = local.f{n + 1} (x) }}"""
        for n in range(levels)
    ]
    functions.append(f"""<domain: "local", opset_import: ["": 17]> f{levels} (x) => (y) {{ y = Relu (x) }}""")
    return matrices("z = local.f0 (x)", head=" ".join(functions))


ESCAPES = "\x1b[31m\x1b]0;owned\x07\r\n\u202e\u2066\x9b31m\u200b\ufeff[red]"
"""Text that moves a terminal's cursor, changes its title and colours, or turns the direction of the text."""
