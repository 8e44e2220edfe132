"""RapidOCR reads text with a compressed recognizer in place of its own."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from onnx_lowrank import compress

pytestmark = [
    pytest.mark.toolchains,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(
        find_spec("rapidocr_onnxruntime") is None, reason="rapidocr-onnxruntime is not installed"
    ),
]
TEXT = "Low-rank models read 2026 lines"


def picture() -> np.ndarray:
    """A line of text, black on white."""
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (620, 80), "white")
    ImageDraw.Draw(image).text((20, 16), TEXT, fill="black", font=ImageFont.load_default(36))
    return np.asarray(image)


def test_the_client_reads_with_a_compressed_recognizer(tmp_path):
    import rapidocr_onnxruntime

    own = Path(rapidocr_onnxruntime.__file__).parent / "models" / "ch_PP-OCRv4_rec_infer.onnx"
    with compress(own, 0.9) as result:
        result.save(tmp_path / "rec.onnx")
    assert (tmp_path / "rec.onnx").stat().st_size < 0.95 * own.stat().st_size
    for model in (own, tmp_path / "rec.onnx"):
        lines, _ = rapidocr_onnxruntime.RapidOCR(rec_model_path=str(model))(picture())
        assert "".join(text for _, text, _ in lines).replace(" ", "") == TEXT.replace(" ", "")
