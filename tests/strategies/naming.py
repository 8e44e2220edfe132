"""Other names for everything in a model: legal ones that programs tend to trip over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import strategies as st
from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

ODD = (
    *(
        "w",
        "w_encoder",
        "w_decoder",
        "w_encoder_2",
        "w_bias",
        "w_encoder/constant",
        "n",
        "n/encoder",
        "n/decoder",
    ),
    *(
        "0",
        ":",
        "1:w",
        "/",
        "//",
        "#0",
        "n#1",
        ".",
        " ",
        "a b",
        "\t",
        "\n",
        "%s{}",
        "*",
        "[w]",
        "None",
        "null",
    ),
    *(
        "重み",
        "вес",
        "w\u0301",
        "\u202ew",
        "\x1b[31m",
        "\x00",
        "'",
        '"',
        "\\",
        "w.weight",
        "onnx_lowrank.run",
    ),
)
"""Names that look like those of new tensors, like paths, globs or terminal escapes, or like nothing."""


@st.composite
def namings(draw: st.DrawFn) -> Callable[[ModelProto], ModelProto]:
    """A function that gives a model other names."""
    values = draw(st.sampled_from(["plain", "paths", "odd", "odd", "text"]))
    nodes = draw(st.sampled_from([*("plain", "none", "odd") * 3, "one"]))
    order = draw(st.permutations(ODD))
    texts = (
        draw(st.lists(st.text(min_size=1, max_size=6), unique=True, max_size=4)) if values == "text" else []
    )

    def named(proto: ModelProto) -> ModelProto:
        known: dict[str, str] = {}
        taken: set[str] = set()

        def value(name: str) -> str:
            if name and name not in known:
                odd = [*texts, *order] if values in ("odd", "text") else []
                free = next((other for other in odd if other not in taken), name)
                free = f"/layers.{len(known)}/{name}:0" if values == "paths" else free
                while free in taken:
                    free += "_"
                known[name] = free
                taken.add(free)
            return known.get(name, "")

        def node(index: int, name: str) -> str:
            odd = order[index % len(order)]
            return {"plain": name, "none": "", "one": "n", "odd": odd}[nodes]

        renamed = ModelProto()
        renamed.CopyFrom(proto)
        rename(renamed, value, node)
        return renamed

    return named


def rename(proto: ModelProto, value: Callable[[str], str], node: Callable[[int, str], str]) -> None:
    """Rename all values and nodes, in place."""
    for body in _bodies(proto):
        if isinstance(body, GraphProto):
            for named in (*body.input, *body.output, *body.value_info, *body.initializer):
                named.name = value(named.name)
        else:
            body.input[:] = map(value, body.input)
            body.output[:] = map(value, body.output)
        for index, each in enumerate(body.node):
            each.name = node(index, each.name)
            each.input[:] = map(value, each.input)
            each.output[:] = map(value, each.output)


def _bodies(proto: ModelProto) -> Iterator[GraphProto | FunctionProto]:
    pending: list[Any] = [proto.graph, *proto.functions]
    while pending:
        body = pending.pop(0)
        yield body
        pending += [graph for each in body.node for graph in _graphs(each)]


def _graphs(node: NodeProto) -> list[GraphProto]:
    return [attribute.g for attribute in node.attribute if attribute.HasField("g")]
