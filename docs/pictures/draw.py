"""Draws the pictures of docs/how.md from models/digits.onnx: `python docs/pictures/draw.py`."""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from onnx_lowrank import compress

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "models" / "digits.onnx"
LAYER = "blocks.2.conv1.weight"
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 30, 40
BLUE, ORANGE, GREY = "#0072b2", "#e69f00", "#888888"


def main() -> None:
    """Write both pictures."""
    (HERE / "spectrum.svg").write_text(spectrum(), encoding="utf-8")
    (HERE / "spending.svg").write_text(spending(), encoding="utf-8")


def spectrum() -> str:
    """The singular values of one layer, unfolded in two ways, and the rank at which half are left."""
    weight = next(
        numpy_helper.to_array(tensor) for tensor in onnx.load(MODEL).graph.initializer if tensor.name == LAYER
    ).astype(np.float64)
    f, c, height, width = weight.shape
    unfolded = {
        f"encode: {f} × {c * height * width}": (weight.reshape(f, -1), BLUE),
        f"rows: {f * width} × {c * height}": (weight.transpose(0, 3, 1, 2).reshape(f * width, -1), ORANGE),
    }
    half = f * c * height * width // (2 * (f + c * height * width))
    parts = [_text(LEFT, 20, f"Singular values of {LAYER}, the largest one is 1", 14)]
    for number, (name, (matrix, color)) in enumerate(unfolded.items()):
        sigma = np.linalg.svd(matrix, compute_uv=False)[:f]
        parts.append(_curve(sigma / sigma[0], color))
        parts.append(_text(WIDTH - 220, 60 + 20 * number, name, 13, color))
    x = LEFT + half / f * (WIDTH - LEFT - 20)
    parts.append(f'<path d="M{x:.1f} 30V{HEIGHT - BOTTOM}" stroke="{GREY}" stroke-dasharray="4 3"/>')
    parts.append(_text(x + 6, 45, f"rank {half}: half of the parameters (encode)", 12, GREY))
    parts.append(_text(LEFT, HEIGHT - 15, f"1 … {f}: rank", 12, GREY))
    return _svg(parts, HEIGHT)


def spending() -> str:
    """The parameters of every layer at a ratio of 0.5, before and after."""
    rows = compress(MODEL, 0.5, dry_run=True).report.layers
    most = max(row.params.before or 0 for row in rows)
    parts = [_text(10, 20, "Parameters of every layer of digits.onnx at a ratio of 0.5", 14)]
    for number, row in enumerate(rows):
        y = 40 + 26 * number
        before, after = ((n or 0) / most * (WIDTH - 370) for n in (row.params.before, row.params.after))
        parts.append(_text(10, y + 13, row.name, 12))
        parts.append(f'<rect x="230" y="{y}" width="{before:.1f}" height="18" fill="none" stroke="{GREY}"/>')
        color = BLUE if row.option else GREY
        parts.append(f'<rect x="230" y="{y}" width="{after:.1f}" height="18" fill="{color}"/>')
        label = f"{row.option.k} slices of rank {row.option.j}" if row.option else "kept"
        parts.append(_text(238 + before, y + 13, label, 12, color))
    return _svg(parts, 50 + 26 * len(rows))


def _curve(values: NDArray[np.float64], color: str) -> str:
    step, height = (WIDTH - LEFT - 20) / len(values), HEIGHT - BOTTOM - 35
    points = " ".join(
        f"{LEFT + n * step:.1f},{HEIGHT - BOTTOM - value * height:.1f}" for n, value in enumerate(values)
    )
    return f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="2.5"/>'


def _text(x: float, y: float, text: str, size: int, color: str = "#333333") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{color}">{escape(text)}</text>'


def _svg(parts: list[str], height: int) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">'
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    )
    return "\n".join([head, *parts, "</svg>"]) + "\n"


if __name__ == "__main__":
    main()
