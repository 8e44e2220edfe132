"""The weights that a quantizer or a runtime's own operators withhold from decomposition, in words."""

from __future__ import annotations

from collections.abc import Sequence

from onnx_lowrank.core.layer import Skipped

_CAUSES = (
    ("quantiz", "quantized", "compress the float model, then quantize"),
    ("fused", "fused for one runtime", "compress the model before that optimization"),
)
"""A word of the reasons that `operators.left_alone` and `graph.weights` give, the state, and the advice."""


def withheld(skipped: Sequence[Skipped], layers: int) -> tuple[str, str] | None:
    """Why most weights of a model cannot be decomposed, and what to do: two parts of a sentence.

    Args:
        skipped: The operators that are left alone.
        layers: The number of layers that can be decomposed.

    Returns:
        The fact and the advice; None where most weights can be decomposed, or are left for other reasons.
    """
    for word, state, advice in _CAUSES:
        ops = [item.op for item in skipped if word in item.reason]
        if len(ops) > layers:
            return f"its {_counted(ops)} {state}", advice
    return None


def _counted(ops: Sequence[str]) -> str:
    """How many convolutions and other operators there are, with the verb."""
    convolutions = sum("Conv" in op for op in ops)
    others = len(ops) - convolutions
    parts = [
        f"{number} {noun}{'s' * (number != 1)}"
        for number, noun in ((convolutions, "convolution"), (others, "operator"))
        if number
    ]
    return f"{' and '.join(parts)} {'is' if len(ops) == 1 else 'are'}"
