"""optimum: the models of a folder, with their configuration and tokenizer."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from onnx_lowrank import cli
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import load

_TEXT, _TOKENIZER = ".txt", "tokenizer.json"


def compress_folder(source: Path, target: Path, options: Sequence[str]) -> None:
    """Run `onnx-lowrank` on every model in a folder, and copy all other files.

    Args:
        source: The folder, as optimum exports one.
        target: The folder for the results, under the same names.
        options: Options of `onnx-lowrank`. If one names a text, the folder's tokenizer.json reads it.

    Raises:
        SystemExit: A model cannot be compressed, with the exit code of `onnx-lowrank`.
    """
    try:
        models = _models(source, target)
        options = [*options, *_tokenizer(source, options)]
    except InputError as error:
        print(f"optimum-cli: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    weights = set(models)
    for model in models:
        made = target / model.relative_to(source)
        weights |= _data_files(model)
        with _folder(made.parent):
            _run([str(model), str(made), *options])
    for file in sorted(file for file in source.rglob("*") if file.is_file() and file not in weights):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)


@contextmanager
def _folder(path: Path) -> Iterator[None]:
    """A folder that is made if there is none, and stays after an error only if it holds a file."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with suppress(OSError):  # Another file may lie there by now.
            for folder in new:
                folder.rmdir()
        raise


def _models(source: Path, target: Path) -> list[Path]:
    if not source.is_dir():
        raise InputError(f"{source} is no folder: name the folder that holds the ONNX model.")
    if target.resolve().is_relative_to(source.resolve()):
        raise InputError(f"{target} is in the folder of the input model: name another folder.")
    models = sorted(source.rglob("*.onnx"))
    if not models:
        raise InputError(f"{source} holds no .onnx file: export the model first.")
    return models


def _tokenizer(source: Path, options: Sequence[str]) -> list[str]:
    """The option that names the folder's tokenizer, if another option names a text."""
    has_text = any(Path(value).suffix == _TEXT for value in options)
    return ["--tokenizer", str(source / _TOKENIZER)] if has_text else []


def _data_files(model: Path) -> set[Path]:
    """The files of a model's external data."""
    with ExitStack() as resources:
        try:
            found = load(model, resources)
        except InputError:
            return set()  # The command says why.
        return {model.parent / name for name in found.files.keys() - found.temporary}


def _run(arguments: Sequence[str]) -> None:
    """Run the command, which exits.

    Raises:
        SystemExit: It failed.
    """
    try:
        cli.main(arguments)
    except SystemExit as end:
        if end.code:
            raise
