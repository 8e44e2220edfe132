"""The models and the data of the cases, the same for both sides."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser

from identity.cases import CHECKOUT, SUBJECTS
from identity.sides import git

OPERATORS = """
<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
operators (float[2,6,24] x) => (float[2,6,24] y)
<int64[1] one = {1}, float[2,6,24] b, float[2,6,24] c> {
  a = Einsum <equation = "bsc,cf->bsf"> (x, einsum)
  r = Relu (a)
  b = com.microsoft.FusedMatMul <alpha = 0.5> (r, fused)
  c = com.microsoft.Attention <num_heads = 4> (b, attention, bias)
  t = Transpose <perm = [1, 0, 2]> (c)
  h = GRU <hidden_size = 24> (t, gru, state)
  s = Squeeze (h, one)
  y = Transpose <perm = [1, 0, 2]> (s)
}
"""
"""One operator of each family that the other subjects lack."""
ZOO = {
    "resnet18": ("resnet18", "float32"),
    "mobilenet_v2": ("mobilenet_v2", "float32"),
    "vit_b_16": ("vit_b_16", "float32"),
    "bert_base": ("bert_base", "float32"),
    "float16": ("resnet18", "float16"),
}
"""The network and dtype of every subject of models/zoo.py; an eighth of its width."""


def shared_folder() -> Path | None:
    """../shared of this checkout, else of the checkout that this worktree belongs to."""
    beside = (CHECKOUT, Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")).parent)
    return next((path.parent / "shared" for path in beside if (path.parent / "shared").is_dir()), None)


def subjects(shared: Path | None) -> list[str]:
    """The names of those whose models are here."""
    return [subject.name for subject in SUBJECTS if shared or not subject.file]


def prepare(folder: Path, names: Sequence[str], shared: Path | None) -> None:
    """Write models and calibration inputs, the same ones for both sides."""
    # The comparison above is tested without these, which load much.
    import scores
    import zoo

    scores.SHARED = shared or scores.SHARED
    for subject in SUBJECTS:
        path = folder / f"{subject.name}.onnx"
        if subject.name not in names:
            continue
        if subject.name in ("operators", "decoder"):
            onnx.save(_small(subject.name), path)
        elif subject.file and shared:
            shutil.copyfile(shared / "models" / f"{subject.file}.onnx", path)
        elif subject.name in ZOO:
            network, dtype = ZOO[subject.name]
            onnx.save(zoo.build(network, dtype=dtype, scale=0.125, batchnorm="resnet" in network), path)
        elif subject.name == "digits":
            shutil.copyfile(scores.DIGITS, path)
        else:
            stored = {"save_as_external_data": True, "size_threshold": 1024}
            is_digits = subject.name == "external"
            source = onnx.load(scores.DIGITS) if is_digits else zoo.build("bert_base", scale=0.125)
            onnx.save(source, path, location=path.with_suffix(".data").name, **stored)
        if subject.samples:
            feeds = _sentences() if subject.name in ZOO else scores.calibration(subject.name)
            number = subject.samples * 2  # more than are used, so that they are chosen
            np.savez(path.with_suffix(".npz"), **{name: array[:number] for name, array in feeds.items()})
    _write_odd_files(folder)


def _small(name: str) -> onnx.ModelProto:
    """A small model whose numbers a seed gives."""
    if name == "decoder":
        sys.path.append(str(CHECKOUT / "tests"))
        from decoders import decoder

        return decoder()
    proto = onnx.parser.parse_model(OPERATORS)
    rng = np.random.default_rng(2)
    shapes = {"einsum": (24, 32), "fused": (32, 24), "attention": (24, 72), "bias": (72,)}
    for tensor, shape in (shapes | {"gru": (1, 72, 24), "state": (1, 72, 24)}).items():
        values = rng.standard_normal(shape).astype(np.float32) / 5
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor))
    return proto


def _sentences() -> dict[str, Any]:
    shape = (64, 32)
    tokens = np.random.default_rng(1).integers(0, 100, shape)
    return {
        "input_ids": tokens,
        "attention_mask": np.ones(shape, int),
        "token_type_ids": np.zeros(shape, int),
    }


def _write_odd_files(folder: Path) -> None:
    """Write a changed recipe, and broken files."""
    schatten = (CHECKOUT / "passes/schatten.toml").read_text(encoding="utf-8")
    (folder / "own.toml").write_text(schatten.replace("power = 3", "power = 2"), encoding="utf-8")
    (folder / "broken.toml").write_text(schatten.replace('"sum"', '"total"'), encoding="utf-8")
    (folder / "noise.onnx").write_bytes(bytes(range(256)))
    (folder / "broken.json").write_text('{"version": 4, "layers": 3}\n', encoding="utf-8")
    np.savez(folder / "other.npz", picture=np.zeros((8, 1, 8, 8), np.float32))
