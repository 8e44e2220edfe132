"""Recipes, the files `passes/*.toml`. Each is a complete description of how to choose and fit factors."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from onnx_lowrank import measures
from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Fold
from onnx_lowrank.core.plan import Aggregate
from onnx_lowrank.documents import names
from onnx_lowrank.documents.strict import Document
from onnx_lowrank.documents.wording import shown
from onnx_lowrank.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to choose the options of all layers.

    Attributes:
        name: The file's name without its suffix.
        summary: One sentence for `--list-passes`.
        folds: The folds to choose from; empty if layers are only narrowed.
        groups: The numbers of slices k to choose from; None stands for all divisors.
        measure: Name of the measure of an option's error.
        relative: Divide the error by the norm of the layer's weight.
        aggregate: How the layers' errors are combined into one objective.
        power: The exponent of each error in a sum.
        price: Name of the budget whose cost is traded against error; None for the plan's budget.
        factors: The target of the fit of the factors.
        recover: Fit every layer so that it gives the original outputs for the inputs that the compressed
            layers before it produce.
        narrow: Drop channels between two layers, and make heads smaller, too (`Lowering.NARROW`).
        share: Give layers that read the same tensor one encoder, too (`Lowering.SHARED`), and layers whose
            results are added one decoder (`Lowering.SUMMED`).
        sparse: Keep rows of embedding tables that are read most, too (`Lowering.SPARSE`).
        tables: Decompose embedding tables, too.
        temperature: With the aggregate ratio, how far layers whose block changes its input less may differ
            from the others (`calibrate.similarity`); None for one ratio.
    """

    name: str
    summary: str
    folds: tuple[Fold, ...]
    groups: tuple[int, ...] | None
    measure: str = "spectral"
    relative: bool = True
    aggregate: Aggregate = Aggregate.MAX
    power: float = 1.0
    price: str | None = None
    factors: Fit = Fit.WEIGHTS
    recover: bool = False
    narrow: bool = False
    share: bool = False
    sparse: bool = False
    tables: bool = True
    temperature: float | None = None

    @property
    def calibrated(self) -> bool:
        """Whether it needs calibration inputs."""
        return measures.named(self.measure).calibrated or self.factors is not Fit.WEIGHTS


_Number = Annotated[float, Meta(gt=0, le=64, description="a number above 0 and at most 64")]


_NEEDS = (
    ("power", "aggregate", Aggregate.SUM),
    ("price", "aggregate", Aggregate.SUM),
    ("temperature", "aggregate", Aggregate.RATIO),
    *((key, "factors", Fit.ACTIVATIONS) for key in ("temperature", "recover", "narrow", "share", "sparse")),
)
"""Keys that mean something only where another key has one value."""


class _Recipe(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A recipe, as its file holds it; `passes/README.md` explains the keys."""

    summary: Annotated[str, Meta(pattern=r"\S", description="a sentence")]
    folds: Annotated[tuple[Fold, ...], Meta(description=f"a list of {', '.join(Fold)}")]
    groups: Annotated[
        Literal["divisors"]
        | Annotated[
            tuple[Annotated[int, Meta(gt=0, description="a whole number above 0")], ...], Meta(min_length=1)
        ],
        Meta(description="'divisors' or a list of whole numbers above 0"),
    ]
    measure: names.MeasureName = "spectral"
    normalize: Literal["relative", "absolute"] = "relative"
    aggregate: Aggregate
    power: _Number | UnsetType = UNSET
    price: names.PriceName | UnsetType = UNSET
    factors: Fit = Fit.WEIGHTS
    recover: bool = False
    narrow: bool = False
    share: bool = False
    sparse: bool = False
    tables: bool = True
    temperature: _Number | UnsetType = UNSET

    def __post_init__(self) -> None:
        names.check("measure", self.measure, names.measures())
        if self.price is not UNSET:
            names.check("price", self.price, names.prices())
        if not self.folds and not self.narrow:
            raise ValueError(f"folds is [], but it must be a list of {', '.join(Fold)}")
        for key, other, wanted in _NEEDS:
            value, found = getattr(self, key), getattr(self, other)
            if value is not UNSET and value is not False and found is not wanted:
                raise ValueError(
                    f"{key} is {shown(value)} and needs {other} {wanted.value!r}, but {other} is "
                    f"{found.value!r}"
                )
        is_ruled = self.aggregate is Aggregate.UNIFORM or self.price is not UNSET
        for key, value, what in (
            ("narrow", self.narrow, "narrow layers"),
            ("share", self.share, "share encoders"),
            ("sparse", self.sparse, "keep rows of tables"),
        ):
            if value and is_ruled:
                raise ValueError(f"{key} is true, but a recipe with a price or a uniform rank cannot {what}")
        self._check_measure()

    def _check_measure(self) -> None:
        """Check that what is measured on calibration inputs has a measure that these give."""
        if measures.named(self.measure).calibrated:
            return
        for key, value, is_calibrated in (
            ("factors", self.factors.value, self.factors is Fit.SCALED),
            ("narrow", True, self.narrow),
            ("share", True, self.share),
            ("sparse", True, self.sparse),
        ):
            if is_calibrated:
                raise ValueError(
                    f"{key} is {shown(value)} and needs measure 'activation' or 'output', but measure is "
                    f"{self.measure!r}"
                )


_LARGEST = 2**14  # The parser of TOML takes memory that grows with the square of a dotted key's length.
_DOCUMENT = Document("recipe", _Recipe, RecipeError, "correct it", largest=_LARGEST)


def load(name: str | Path, others: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe: one that ships with the package, by its name, or a TOML file, by its path.

    Args:
        name: The name or the path.
        others: Other names that the caller accepts; the error for an unknown name lists them.

    Raises:
        RecipeError: There is no such recipe, or it has a wrong key or value.
    """
    path = Path(name)
    shipped = _folder() / f"{name}.toml"
    if path.suffix != ".toml" and shipped.is_file():
        path = shipped
    if not path.is_file():
        known = ", ".join((*others, *(recipe.stem for recipe in _shipped())))
        if path.suffix == ".toml":
            what = "is no file" if path.exists() else "does not exist"
            raise RecipeError(f"The recipe {path} {what}: check the path, or name one of {known}.")
        raise RecipeError(f"There is no recipe {str(name)!r}: name a .toml file or one of {known}.")
    return _recipe(_DOCUMENT.from_toml(_DOCUMENT.text(path), path), path.stem)


def load_all() -> tuple[Recipe, ...]:
    """All recipes that ship with the package, sorted by name."""
    return tuple(load(path.stem) for path in _shipped())


def parse(text: str, name: str) -> Recipe:
    """Make a recipe from TOML text.

    Raises:
        RecipeError: It is not TOML, a key is unknown or missing, or a value is wrong.
    """
    return _recipe(_DOCUMENT.from_toml(text, name), name)


def _recipe(table: _Recipe, name: str) -> Recipe:
    return Recipe(
        name=name,
        summary=table.summary.strip(),
        folds=tuple(fold for fold in Fold if fold in table.folds),
        groups=None if table.groups == "divisors" else tuple(sorted(set(table.groups))),
        measure=table.measure,
        relative=table.normalize == "relative",
        aggregate=table.aggregate,
        power=1.0 if table.power is UNSET else table.power,
        price=None if table.price is UNSET else table.price,
        factors=table.factors,
        recover=table.recover,
        narrow=table.narrow,
        share=table.share,
        sparse=table.sparse,
        tables=table.tables,
        temperature=None if table.temperature is UNSET else table.temperature,
    )


def _folder() -> Path:
    """The folder of the recipes: beside the modules in an installed wheel, at the top level of a checkout."""
    installed = Path(str(files("onnx_lowrank") / "passes"))
    return installed if installed.is_dir() else Path(__file__).parents[2] / "passes"


def _shipped() -> list[Path]:
    return sorted(_folder().glob("*.toml"), key=lambda path: path.stem)
