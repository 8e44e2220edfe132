"""The strategy of recipes, as the text of their files."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from onnx_lowrank import measures
from onnx_lowrank.core.option import Fold

UNCALIBRATED = [name for name in measures.names() if not measures.named(name).calibrated]


@st.composite
def recipe_texts(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """The text of a valid recipe that needs no calibration, and its keys."""
    keys: dict[str, Any] = {
        "summary": draw(st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=9)),
        "folds": draw(st.lists(st.sampled_from([fold.value for fold in Fold]), min_size=1, unique=True)),
        "groups": draw(st.just("divisors") | st.lists(st.integers(1, 6), min_size=1, max_size=3)),
        "measure": draw(st.sampled_from(UNCALIBRATED)),
        "normalize": draw(st.sampled_from(["relative", "absolute"])),
        "aggregate": draw(st.sampled_from(["max", "sum", "uniform", "ratio"])),
        "tables": draw(st.booleans()),
    }
    if keys["aggregate"] == "sum":
        keys["power"] = draw(st.floats(0.5, 8, width=16))
    return "\n".join(f"{key} = {_toml(value)}" for key, value in keys.items()), keys


def _toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return str(value)
