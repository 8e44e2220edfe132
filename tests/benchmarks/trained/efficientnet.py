"""EfficientNet-lite0, an image classifier: how often does it still see the same class?"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from scipy.special import softmax

from trained.subject import Array, Scores, Subject, opened

CALIBRATED = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "china.jpg",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "motorcycle_left.png",
    "page.png",
    "rocket.jpg",
)
IMAGENET = "imagenet_*.jpg"
TESTED = ("chelsea.png", "coffee.png", "coins.png", "flower.jpg", "moon.png", "retina.jpg")
SIZE = 224
CALIBRATION, TEST = 20, 50  # crops of a photograph
SURE = 0.3  # a probability
_BATCH = 20
ABOUT = """
EfficientNet-lite0 sees crops of photographs that packages carry: for calibration 20 of each of eleven of
scikit-image and scikit-learn and of each of the twenty of ImageNet in foolbox, for the test 50 of each of six
others of scikit-image and scikit-learn. "Agreement" is the share of crops whose most likely
class is the original's; "agreement, sure" has only the crops whose class the original gives at least 0.3.
"""


def subjects(real: Path) -> list[Subject]:
    """Both exports, each compared with itself."""
    return [
        Subject(
            name,
            real / f"{name}.onnx",
            about=ABOUT,
            calibration=lambda: {"image": crops((*CALIBRATED, *_imagenet()), CALIBRATION)},
            scores=lambda model, file=real / f"{name}.onnx": _scores(model, file),
            shapes={"image": (1, 3, SIZE, SIZE)},
            times={"time": {"image": (1, 3, SIZE, SIZE)}},
            asked={"params": (0.8, 0.6)},
            needs=("PIL", "foolbox", "skimage", "sklearn"),
            goals={("params", 0.8): {"agreement": 0.95}, ("params", 0.6): {"agreement": 0.85}},
        )
        for name in ("efficientnet", "efficientnet_dynamo")
    ]


@cache
def crops(names: tuple[str, ...], number: int) -> Array:
    """So many square pieces of every photograph, some mirrored, as the classifier was trained on them."""
    rng = np.random.default_rng(0)
    return np.stack([piece for name in names for piece in _pieces(_photograph(name), number, rng)])


def _photograph(name: str) -> Array:
    """A photograph that a package carries, in three colours."""
    from PIL import Image

    folders = (
        _carried("skimage", "data"),
        _carried("sklearn", "datasets/images"),
        _carried("foolbox", "data"),
    )
    (path,) = (folder / name for folder in folders if (folder / name).exists())
    return np.asarray(Image.open(path).convert("RGB"))


def _imagenet() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in _carried("foolbox", "data").glob(IMAGENET)))


def _carried(package: str, folder: str) -> Path:
    """A folder of a package, which is not imported: foolbox brings frameworks along."""
    spec = find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / folder


def _pieces(photograph: Array, number: int, rng: np.random.Generator) -> Iterator[Array]:
    from PIL import Image

    height, width = photograph.shape[:2]
    for _ in range(number):
        side = int(min(height, width) * rng.uniform(0.5, 1))
        top, left = (int(rng.integers(length - side + 1)) for length in (height, width))
        piece = Image.fromarray(photograph[top : top + side, left : left + side])
        pixels = np.asarray(piece.resize((SIZE, SIZE), Image.Resampling.BICUBIC), np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        yield ((pixels - 127) / 128).transpose(2, 0, 1)


def _scores(model: Path, original: Path) -> Scores:
    """Shares of crops, of photographs that calibration has not, whose most likely class stays the same."""
    wanted = _original(original)
    given = wanted if model == original else _logits(model)
    same = wanted.argmax(axis=1) == given.argmax(axis=1)
    sure = softmax(wanted, axis=1).max(axis=1) >= SURE
    return {"agreement": float(same.mean()), "agreement, sure": float(same[sure].mean())}


@cache
def _original(model: Path) -> Array:
    return _logits(model)


def _logits(model: Path) -> Array:
    session, images = opened(model), crops(TESTED, TEST)
    batches = (images[start : start + _BATCH] for start in range(0, len(images), _BATCH))
    return np.concatenate([session.run(None, {"image": batch})[0] for batch in batches])
