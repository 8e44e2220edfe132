"""Recipes: `passes/*.toml`, each a named, complete description of how to choose and fit factors."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from onnx_lowrank import measures
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate, Budget
from onnx_lowrank.errors import RecipeError

E = TypeVar("E", bound=StrEnum)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to choose the options of all layers.

    Attributes:
        name: The file's name without its suffix.
        summary: One sentence for `--list-passes`.
        folds: The folds to choose from.
        groups: The slice counts k to choose from; None stands for all divisors.
        measure: Name of the measure of an option's error.
        relative: Divide the error by the norm of the layer's weight.
        aggregate: How the layers' errors become one objective.
        power: The exponent of an error inside a sum.
        price: The cost that is traded against error where it is not the budget's own.
        factors: What the factors are fitted to.
        recover: Fit every layer to what the original gives, on what the compressed layers before it make of
            its inputs.
    """

    name: str
    summary: str
    folds: tuple[Fold, ...]
    groups: tuple[int, ...] | None
    measure: str = "spectral"
    relative: bool = True
    aggregate: Aggregate = Aggregate.MAX
    power: float = 1.0
    price: Budget | None = None
    factors: Fit = Fit.WEIGHTS
    recover: bool = False

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration inputs."""
        return measures.named(self.measure).calibrated or self.factors is Fit.ACTIVATIONS


def load(name: str | Path) -> Recipe:
    """Read a recipe by its name among those that ship, or from anybody's own TOML file.

    Raises:
        RecipeError: There is none of that name, or a key or value in it is wrong.
    """
    path = Path(name)
    shipped = _folder() / f"{name}.toml"
    if path.suffix != ".toml" and shipped.is_file():
        path = shipped
    if not path.is_file():
        known = ", ".join(recipe.stem for recipe in _shipped())
        raise RecipeError(f"There is no recipe {str(name)!r}: name a .toml file or one of {known}.")
    try:
        return parse(path.read_text(encoding="utf-8"), path.stem)
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text: write it as TOML.") from error


def load_all() -> tuple[Recipe, ...]:
    """All recipes that ship, by name."""
    return tuple(load(path.stem) for path in _shipped())


def parse(text: str, name: str) -> Recipe:
    """Make a recipe of its TOML text.

    Raises:
        RecipeError: It is no TOML, a key is unknown or missing, or a value is wrong.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"Recipe {name!r} is not valid TOML: {error}.") from error
    for key in table:
        if key not in _KEYS:
            raise RecipeError(f"Recipe {name!r} has an unknown key {key!r}: the keys are {', '.join(_KEYS)}.")
    for key in _REQUIRED:
        if key not in table:
            raise RecipeError(f"Recipe {name!r} lacks the key {key!r}: add it.")
    fields: dict[str, Any] = {}
    for key, value in table.items():
        try:
            field, parsed = _KEYS[key](value)
        except (ValueError, TypeError) as error:
            raise RecipeError(f"Recipe {name!r} has {key} = {value!r}, but {key} is {error}.") from error
        fields[field] = parsed
    recipe = Recipe(name=name, **fields)
    _check_combination(recipe, table)
    return recipe


def _check_combination(recipe: Recipe, table: Mapping[str, object]) -> None:
    """Reject keys that mean nothing beside the others."""
    for key in ("power", "price"):
        if key in table and recipe.aggregate is not Aggregate.SUM:
            raise RecipeError(
                f'Recipe {recipe.name!r} has {key}, which means something with aggregate = "sum" only.'
            )
    if recipe.recover and recipe.factors is not Fit.ACTIVATIONS:
        raise RecipeError(
            f"Recipe {recipe.name!r} has recover = true, which means something with "
            'factors = "activations" only.'
        )


def _folder() -> Path:
    """The folder of the recipes: in an installed wheel beside the modules, else the checkout's."""
    installed = Path(str(files("onnx_lowrank") / "passes"))
    return installed if installed.is_dir() else Path(__file__).parents[2] / "passes"


def _shipped() -> list[Path]:
    return sorted(_folder().glob("*.toml"), key=lambda path: path.stem)


def _choice(kind: type[E], value: object) -> E:
    names = [member.value for member in kind]
    if value not in names:
        raise ValueError("one of " + ", ".join(names))
    return kind(value)


def _summary(value: object) -> tuple[str, str]:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a sentence")
    return "summary", value.strip()


def _folds(value: object) -> tuple[str, tuple[Fold, ...]]:
    if not isinstance(value, list) or not value:
        raise ValueError("a list of " + ", ".join(Fold))
    chosen = {_choice(Fold, item) for item in value}
    return "folds", tuple(fold for fold in Fold if fold in chosen)


def _groups(value: object) -> tuple[str, tuple[int, ...] | None]:
    if value == "divisors":
        return "groups", None
    if not isinstance(value, list) or not value or not all(type(k) is int and k > 0 for k in value):
        raise ValueError('"divisors" or a list of positive integers')
    return "groups", tuple(sorted(set(value)))


def _measure(value: object) -> tuple[str, str]:
    if not isinstance(value, str) or value not in measures.names():
        raise ValueError("one of " + ", ".join(measures.names()))
    return "measure", value


def _price(value: object) -> tuple[str, Budget]:
    for price in _PRICES:
        if value == price:
            return "price", price
    raise ValueError("one of " + ", ".join(_PRICES))


def _normalize(value: object) -> tuple[str, bool]:
    if value not in ("relative", "absolute"):
        raise ValueError("one of relative, absolute")
    return "relative", value == "relative"


def _power(value: object) -> tuple[str, float]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 64:
        raise ValueError("a number above 0 and at most 64")
    return "power", float(value)


def _recover(value: object) -> tuple[str, bool]:
    if not isinstance(value, bool):
        raise ValueError("true or false")  # noqa: TRY004 - parse() tells what is wrong of both alike
    return "recover", value


_KEYS: Mapping[str, Callable[[object], tuple[str, object]]] = {
    "summary": _summary,
    "folds": _folds,
    "groups": _groups,
    "measure": _measure,
    "normalize": _normalize,
    "aggregate": lambda value: ("aggregate", _choice(Aggregate, value)),
    "power": _power,
    "price": _price,
    "factors": lambda value: ("factors", _choice(Fit, value)),
    "recover": _recover,
}
_PRICES = (Budget.PARAMS, Budget.MACS)  # of latency there is no formula
_REQUIRED = ("summary", "folds", "groups", "aggregate")
