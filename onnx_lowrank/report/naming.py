"""The names under which a report shows layers.

A layer's id ends with the name of its weight. Where an exporter counted weights instead of naming them, the
report shows the name of the node that applies the weight:

1. The exporter made the weight's name: a number, alone or after `onnx::Op_`, `_v_`, `val_` or
   `const_fold_opt__`; or the output of a node `Const` or `Constant`, in any folder, with or without a number.
2. The exporter did not make the node's name in this way.
3. The node's name is not the name of another layer.

--include and --exclude accept both names of a layer. A plan contains only its id.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

_COUNTED = re.compile(
    r"(onnx::\w+_|_v_|val_|const_fold_opt__)?[0-9]+"  # PyTorch, graph optimizers, tf2onnx
    r"|(.*/)?Constant(_[0-9]+)?_output_0"  # PyTorch's Constant nodes
    r"|(.*/)?Const(_[0-9]+)?:0"  # TensorFlow
)


def display_names(layers: Iterable[tuple[str, str, str]]) -> tuple[str, ...]:
    """Choose the name of every layer for readers.

    Args:
        layers: Each layer's id, the name of its weight, and the name of the first node that applies it.
    """
    named = [(layer, _preferred(layer, weight, node)) for layer, weight, node in layers]
    counts = Counter(name for pair in named for name in set(pair))
    return tuple(name if counts[name] == 1 else layer for layer, name in named)


def _preferred(layer: str, weight: str, node: str) -> str:
    is_counted = _COUNTED.fullmatch(weight) and not _COUNTED.fullmatch(node)
    return node if is_counted else layer
