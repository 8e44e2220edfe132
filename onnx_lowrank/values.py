"""The values of the command's options: texts become numbers, shapes and paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from math import isfinite
from pathlib import Path

import click

from onnx_lowrank.request import ALIGN_AUTO, ALIGN_INT4

_SIZES = re.compile(r"(0|[1-9][0-9]{0,17})(,(0|[1-9][0-9]{0,17}))*")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")


def number(ctx: click.Context, param: click.Parameter, value: str | None) -> float | None:
    """A number that is neither too large nor too close to 0 for a float.

    Raises:
        click.BadParameter: It is none.
    """
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a number: write it like 0.5") from None
    exact = Decimal(value)
    if exact.is_finite() and (not isfinite(number) or bool(number) != bool(exact)):
        raise click.BadParameter(f"{value!r} is too large or too close to 0: write it like 0.5")
    return number


def count(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """A whole number.

    Raises:
        click.BadParameter: It is none.
    """
    if value is not None and not _WHOLE.fullmatch(value):
        raise click.BadParameter(f"{value!r} is not a whole number: write it like 500")
    return None if value is None else int(value)


def alignment(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    """A whole number, or a word that leaves it to the provider or to a kind of quantization.

    Raises:
        click.BadParameter: It is none.
    """
    if value is None or value in (ALIGN_AUTO, ALIGN_INT4):
        return value
    if not _WHOLE.fullmatch(value):
        raise click.BadParameter(f"{value!r} is neither {ALIGN_AUTO} nor a whole number: write it like 8")
    return int(value)


def numbers(
    what: str, example: str
) -> Callable[[click.Context, click.Parameter, str | None], tuple[float, ...] | None]:
    """The callback of an option that takes a number for each of several things.

    Args:
        what: One of the things.
        example: Numbers as they are written.
    """

    def callback(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[float, ...] | None:
        try:
            return None if value is None else tuple(float(part) for part in value.split(","))
        except ValueError:
            message = f"{value!r} is no number for each {what}: write it like {example}"
            raise click.BadParameter(message) from None

    return callback


def shapes(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> list[dict[str, tuple[int, ...]]]:
    """Sets of shapes: the first has the shape that is given first for every input, and so on.

    Raises:
        click.BadParameter: A value is no name with a shape.
    """
    given: dict[str, list[tuple[int, ...]]] = {}
    for value in values:
        name, _, sizes = value.rpartition("=")
        if not name or not _SIZES.fullmatch(sizes):
            raise click.BadParameter(f"{value!r} is no name with a shape: write it like NAME=1,3,224,224")
        given.setdefault(name, []).append(tuple(map(int, sizes.split(","))))
    sets = max(map(len, given.values()), default=0)
    return [{name: shapes[n] for name, shapes in given.items() if n < len(shapes)} for n in range(sets)]


def given_path(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """The path of a file to read.

    Raises:
        click.BadParameter: It is empty.
    """
    # Path("") would be the current folder.
    if value == "":
        raise click.BadParameter("the path is empty: name a file or leave the option out")
    return None if value is None else Path(value)


def report_paths(ctx: click.Context, param: click.Parameter, given: tuple[Path, ...]) -> tuple[Path, ...]:
    """The paths of reports.

    Raises:
        click.BadParameter: One is neither that of a .json or .html file nor stdout.
    """
    for value in given:
        if str(value) != "-" and value.suffix not in (".json", ".html"):
            raise click.BadParameter(
                f"{str(value)!r} is neither a .json nor a .html file nor -: name a .html, .nodes.json or "
                ".json file, or - for stdout"
            )
    return given


def page_path(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """The path of a page.

    Raises:
        click.BadParameter: It is not that of a .html file.
    """
    if value is not None and value.suffix != ".html":
        raise click.BadParameter(f"{str(value)!r} is no .html file: name one, such as page.html")
    return value
