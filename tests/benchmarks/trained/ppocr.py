"""The recognizer of PP-OCR inside RapidOCR: how many characters of rendered lines does it get wrong?"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from trained.subject import Array, Feeds, Scores, Subject, spread, unlike
from trained.text import Part, sentences

FONTS = {
    "font_roboto": ("Roboto-Regular", "Roboto-BoldItalic"),
    "font_source_serif_pro": ("SourceSerifPro-Regular", "SourceSerifPro-Semibold"),
    "font_caladea": ("Caladea-Regular", "Caladea-Italic"),
}
OTHER_FONTS = {"font_source_sans_pro": ("SourceSansPro-Light", "SourceSansPro-SemiboldIt")}
CALIBRATION, TEST = 400, 200  # lines
_SEEDS = {"calibration": 1, "test": 2, "other": 3}
_PLAIN = re.compile(r"[A-Za-z0-9,.;:-]+")
_LONGEST = 24  # characters
_WIDEST = 10.0  # width over height of a calibration input; the few lines that are wider are left out
ABOUT = """
RapidOCR reads rendered lines with the recognizer of PP-OCR: some 390 lines for calibration, 200 others for
the test, 200 of docstrings in fonts that calibration has not as another kind. Spaces do not count.
"""


def subjects(real: Path) -> list[Subject]:
    """The recognizer as RapidOCR ships it."""
    shapes = {"x": (1, 3, 48, 320)}
    return [
        Subject(
            "ppocr",
            real / "ppocr_ch_PP-OCRv4_rec_infer.onnx",
            about=ABOUT,
            calibration=lambda: _inputs(real),
            scores=_scores,
            shapes=shapes,
            times={"time": shapes},
            asked={"params": (0.8, 0.6, 0.5)},
            needs=("PIL", "rapidocr_onnxruntime", *FONTS, *OTHER_FONTS),
            goals={
                ("params", ratio): {"character error rate": goal}
                for ratio, goal in ((0.8, 0.006), (0.6, 0.02), (0.5, 0.05))
            },
        )
    ]


def _lines(part: Part, number: int) -> Iterator[tuple[str, Array]]:
    """Lines of text and their pictures, in dark colours on light ones, with some noise."""
    from PIL import Image, ImageDraw, ImageFont

    rng = np.random.default_rng(_SEEDS[part])
    files = _font_files(OTHER_FONTS if part == "other" else FONTS)
    for text in spread(_texts(part), number):
        font = ImageFont.truetype(str(files[rng.integers(len(files))]), int(rng.integers(24, 48)))
        left, top, right, bottom = font.getbbox(text)
        ink, paper = (tuple(int(v) for v in rng.integers(*span, 3)) for span in ((0, 90), (190, 256)))
        margin = int(rng.integers(4, 10))
        size = (int(right - left) + 2 * margin, int(bottom - top) + 2 * margin)
        picture = Image.new("RGB", size, paper)
        ImageDraw.Draw(picture).text((margin - left, margin - top), text, ink, font)
        noisy = np.asarray(picture) + rng.normal(0, rng.uniform(0, 12), (size[1], size[0], 3))
        yield text, noisy.clip(0, 255).astype(np.uint8)


def _texts(part: Part) -> list[str]:
    """The first plain words of every sentence, as many as fit a line.

    Underscores, quotation marks and backticks are left out: the original, too, takes one for another.
    """
    lines = []
    for sentence in sentences(part):
        line = ""
        for word in filter(_PLAIN.fullmatch, sentence.split()):
            if len(line) + len(word) >= _LONGEST:
                break
            line = f"{line} {word}".strip()
        if len(line) >= _LONGEST // 2:
            lines.append(line)
    return list(dict.fromkeys(lines))


def _font_files(fonts: dict[str, tuple[str, ...]]) -> list[Path]:
    files = []
    for module, names in fonts.items():
        spec = find_spec(module)
        assert spec is not None
        assert spec.origin is not None
        files += [Path(spec.origin).parent / "files" / f"{name}.ttf" for name in names]
    return files


def _reader(model: Path) -> Any:
    from rapidocr_onnxruntime import RapidOCR

    return RapidOCR(rec_model_path=str(model))


def _inputs(real: Path) -> Feeds:
    """The pictures as RapidOCR gives them to the recognizer, all of one width."""
    recognizer = _reader(real / "ppocr_ch_PP-OCRv4_rec_infer.onnx").text_rec
    pictures = [picture for _, picture in _lines("calibration", CALIBRATION)]
    pictures = [picture for picture in pictures if picture.shape[1] <= _WIDEST * picture.shape[0]]
    return {"x": np.stack([recognizer.resize_norm_img(picture, _WIDEST) for picture in pictures])}


@cache
def _tests(part: Part) -> list[tuple[str, Array]]:
    return list(_lines(part, TEST))


def _scores(model: Path) -> Scores:
    """Character error rates on other lines, and on docstrings in a font that calibration has not."""
    reader = _reader(model)
    same, other = ({"character error rate": _error_rate(reader, _tests(part))} for part in ("test", "other"))
    return same | unlike(other)


def _error_rate(reader: Any, lines: Sequence[tuple[str, Array]]) -> float:
    """Insertions, deletions and substitutions of characters over their number; spaces do not count."""
    wrong = total = 0
    for text, picture in lines:
        found, _ = reader(picture, use_det=False, use_cls=False)
        given = "".join(line[0] for line in found or [])
        wanted, given = ("".join(words.split()) for words in (text, given))
        wrong += _edits(wanted, given)
        total += len(wanted)
    return wrong / total


def _edits(wanted: str, given: str) -> int:
    """The edit distance of Levenshtein."""
    row = list(range(len(given) + 1))
    for i, first in enumerate(wanted, 1):
        diagonal, row[0] = row[0], i
        for j, second in enumerate(given, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (first != second))
    return row[-1]
