"""Kinds of untrusted files: how to make good ones, how to mutate them, and the command that reads them."""
# ruff: noqa: E501 - tables, one entry a line

from __future__ import annotations

import io
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from mutating import bytes_mutated, json_mutated, message_mutated
from onnx import ModelProto, TensorProto
from PIL import Image

from attending import bert
from decoders import decoder
from onnx_lowrank import compress
from packing import packed
from rewriting import LOOP, model
from tiny import built, cnn, decaying
from tokenizing import words, written

Mutate = Callable[[np.random.Generator, bytes], bytes]

_RATIO = ("in.onnx", "out.onnx", "--ratio", "0.5")
_NO_CACHE = (*_RATIO, "--no-cache")
_MORE = ("in.onnx", "out.onnx", "--ratio", "0.7", "--no-cache")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of untrusted files.

    Attributes:
        make: Writes good files into an empty folder.
        files: A glob of the files to mutate, one at a time.
        mutate: Makes the mutated file.
        arguments: The arguments of the command.
        is_exact: Whether the command has to give the bytes that it gives with the good files.
    """

    make: Callable[[Path], object]
    files: str
    mutate: Mutate
    arguments: tuple[str, ...] = _NO_CACHE
    is_exact: bool = False


def of_message(kind: type[ModelProto] | type[TensorProto]) -> Mutate:
    """Mutations of a serialized message: most of its fields, some of its bytes."""

    def mutate(rng: np.random.Generator, data: bytes) -> bytes:
        if rng.integers(4) == 0:
            return bytes_mutated(rng, data)
        proto = kind.FromString(data)
        message_mutated(rng, proto)
        return proto.SerializeToString()

    return mutate


def of_json(rng: np.random.Generator, data: bytes) -> bytes:
    """Mutations of a JSON text."""
    return json_mutated(rng, data.decode()).encode("utf-8", "surrogatepass")


_TOML = (
    b'"',
    b"'",
    b"[",
    b"]",
    b"=",
    b"\n",
    b"nan",
    b"-inf",
    b"1e999",
    b"9" * 5000,
    b"true",
    b"{",
    b"#",
    b"\x1b",
    b"0x" + b"f" * 4000,
)


def of_toml(rng: np.random.Generator, data: bytes) -> bytes:
    """Mutations of a TOML text: its bytes, or a part of it in place of another."""
    if rng.integers(2):
        return bytes_mutated(rng, data)
    lines = data.splitlines(keepends=True)
    at = int(rng.integers(len(lines)))
    key, equals, value = lines[at].partition(b"=")
    part = _TOML[int(rng.integers(len(_TOML)))]
    lines[at] = (key + equals + part + b"\n", lines[at] * 2, key + part + equals + value, b"")[
        int(rng.integers(4))
    ]
    return b"".join(lines)


def of_members(rng: np.random.Generator, data: bytes) -> bytes:
    """Mutations of an archive: its bytes, or the bytes of a member, whose checksum stays right."""
    if rng.integers(2):
        return bytes_mutated(rng, data)
    changed = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(changed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, bytes_mutated(rng, old.read(name)))
    return changed.getvalue()


# --- good files -------------------------------------------------------------------------------------------


def _model(make: Callable[[], ModelProto]) -> Callable[[Path], object]:
    return lambda folder: onnx.save(make(), folder / "in.onnx")


def _external(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx", save_as_external_data=True, location="in.data", size_threshold=0)


def _planned(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx")
    compress(folder / "in.onnx", 0.5, dry_run=True).save_plan(folder / "plan.json")


def _cached(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx")
    compress(folder / "in.onnx", 0.5, cache=folder / "cache")


def _recipe(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx")
    shutil.copy(Path(__file__).parents[2] / "passes" / "schatten.toml", folder / "recipe.toml")


def _samples(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx")
    np.savez(folder / "samples.npz", x=np.random.default_rng(1).standard_normal((8, 8, 6, 6), np.float32))


def _test_data(folder: Path) -> None:
    onnx.save(cnn(), folder / "in.onnx")
    rng = np.random.default_rng(1)
    for number in range(3):
        place = folder / "data" / f"test_data_set_{number}"
        place.mkdir(parents=True)
        tensor = onnx.numpy_helper.from_array(rng.standard_normal((2, 8, 6, 6), np.float32), "x")
        (place / "input_0.pb").write_bytes(tensor.SerializeToString())


_EMBED = """<ir_version: 8, opset_import: ["": 17]> g (int64[N, L] input_ids) => (float[N, L, 16] y)
{ e = Gather (table, input_ids) y = MatMul (e, w) }"""


def _text(folder: Path) -> None:
    onnx.save(built(_EMBED, {"table": decaying(1, 64, 16), "w": decaying(2, 16, 16)}), folder / "in.onnx")
    written(folder / "tokenizer.json", 50)
    (folder / "text.txt").write_text(words(np.random.default_rng(1).integers(50, size=400)))


_PICTURES = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y)
{ a = Conv <pads = [1, 1, 1, 1]> (x, v) y = Conv <pads = [1, 1, 1, 1]> (a, w) }"""


def _pictures(folder: Path) -> None:
    onnx.save(
        built(_PICTURES, {"v": decaying(1, 16, 3, 3, 3), "w": decaying(2, 3, 16, 3, 3)}), folder / "in.onnx"
    )
    (folder / "photos").mkdir()
    rng = np.random.default_rng(1)
    for number, suffix in enumerate(("png", "jpg", "bmp", "webp", "gif", "ppm", "tif")):
        pixels = rng.integers(256, size=(12, 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.{suffix}")


_CALLS = """<ir_version: 10, opset_import: ["": 17, "local": 1]> g (float[N, 16] x, bool c) => (float[N, 16] y)
{ a = local.f (x, w) y = If (c) <then_branch = t () => (float[N, 16] p) { p = MatMul (a, w) },
  else_branch = e () => (float[N, 16] q) { q = Gemm (a, v, b) }> }
<domain: "local", opset_import: ["": 17]> f (x, w) => (y) { h = MatMul (x, w) y = Relu (h) }"""


def _calls() -> ModelProto:
    return built(_CALLS, {"w": decaying(1, 16, 16), "v": decaying(2, 16, 16), "b": np.ones(16, np.float32)})


def _loop() -> ModelProto:
    return model(LOOP.replace("COUNT", "2"), w=(24, 24))


KINDS = {
    "convolutions": Kind(_model(cnn), "in.onnx", of_message(ModelProto)),
    "a transformer": Kind(_model(bert), "in.onnx", of_message(ModelProto)),
    "a loop": Kind(_model(_loop), "in.onnx", of_message(ModelProto), _MORE),
    "packed heads": Kind(_model(lambda: packed("gpt")), "in.onnx", of_message(ModelProto)),
    "a decoder": Kind(_model(decoder), "in.onnx", of_message(ModelProto)),
    "functions and branches": Kind(_model(_calls), "in.onnx", of_message(ModelProto), _MORE),
    "a model with a data file": Kind(_external, "in.onnx", of_message(ModelProto)),
    "a data file": Kind(_external, "in.data", bytes_mutated),
    "plans": Kind(_planned, "plan.json", of_json, ("in.onnx", "out.onnx", "--plan", "plan.json", "--no-cache")),
    "recipes": Kind(_recipe, "recipe.toml", of_toml, (*_NO_CACHE, "--pass", "recipe.toml")),
    "samples": Kind(_samples, "samples.npz", of_members, (*_NO_CACHE, "--calibration", "samples.npz", "--pass", "pca")),
    "inputs": Kind(_samples, "samples.npz", of_members, (*_NO_CACHE, "--inputs", "samples.npz")),
    "test data": Kind(
        _test_data, "data/*/*.pb", of_message(TensorProto), (*_NO_CACHE, "--calibration", "data", "--pass", "pca")
    ),
    "tokenizers": Kind(
        _text, "tokenizer.json", of_json, (*_NO_CACHE, "--inputs", "text.txt", "--tokenizer", "tokenizer.json")
    ),
    "texts": Kind(_text, "text.txt", bytes_mutated, (*_NO_CACHE, "--inputs", "text.txt", "--tokenizer", "tokenizer.json")),
    "images": Kind(_pictures, "photos/*", bytes_mutated, (*_NO_CACHE, "--inputs", "photos")),
    "cache entries": Kind(_cached, "cache/**/*.entry", bytes_mutated, (*_RATIO, "--cache", "cache"), is_exact=True),
}  # fmt: skip
"""The kinds by name."""

TRAINED = ("magika_v3_3", "resnet20_cifar10", "silero_vad", "ultraface_rfb320")
"""The trained models beside the checkout, by name."""


def trained(file: Path) -> Kind:
    """A trained model as a kind of untrusted files."""
    return Kind(
        lambda folder: shutil.copy(file, folder / "in.onnx"), "in.onnx", of_message(ModelProto), _MORE
    )
