"""What a budget is: what it counts of a layer, of a plan and of a finished model, and how it says so.

A `Budget` knows no model. Its `Meter` counts on one: it gives the allocation the costs of all options, and
binds the solver. A `Gauge` is a meter without a formula: it measures options before a plan is made, and whole
models while the plan is settled (`stages.settle`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from onnx_lowrank.allocate.cost import Costs, Line, Linear, Tariff
from onnx_lowrank.allocate.grid import Grid
from onnx_lowrank.allocate.limits import Bounds, Limits, Single
from onnx_lowrank.allocate.options import Candidates
from onnx_lowrank.core.layer import Layer
from onnx_lowrank.core.option import Fold, Option
from onnx_lowrank.core.outcome import Timing
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.files.load import Model
from onnx_lowrank.layers.found import Found
from onnx_lowrank.measures import Errors
from onnx_lowrank.progress import Progress, Silent, Step
from onnx_lowrank.report.content import Total
from onnx_lowrank.report.words import exact
from onnx_lowrank.rewrite.replace import Rewritten

if TYPE_CHECKING:
    from onnx_lowrank.budgets.latency.stopwatch import Stopwatch

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of inputs, by name."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What a measured budget measures with.

    Attributes:
        stopwatch: Times models; None where no budget asks for it.
        feed: The user's inputs to run the model on; empty where there are none.
        shapes: The shapes of inputs for which the layers were found, by name.
        progress: Where to show progress.
    """

    stopwatch: Stopwatch | None = None
    feed: Feed = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    progress: Progress = field(default_factory=Silent)


@dataclass(frozen=True, slots=True)
class Run:
    """What a run has come to.

    Attributes:
        found: The input model with its layers.
        plan: What is done with them.
        meter: The plan's budget on the model; None where nobody has made it.
        rewritten: The compressed model; None in a dry run.
        merged: Whether adjacent operators of it were multiplied.
        shapes: The shapes of inputs for which the layers were found, by name.
        timing: How long both models take; None where that is unknown.
    """

    found: Found
    plan: Plan
    meter: Meter | None = None
    rewritten: Rewritten | None = None
    merged: bool = False
    shapes: Shapes = field(default_factory=dict)
    timing: Timing | None = None


class Budget(ABC):
    """One thing that a ratio can count.

    Attributes:
        name: What `--budget`, plans and recipes call it.
        order: Its place among the budgets in help and messages.
        figure: Key of what it counts in the JSON report's totals.
        title: The row of that in the terminal's totals; "" where the times are shown in its place.
        unknown: What the report says where the amount is unknown, a sentence.
        is_measured: Whether it measures and has no formula: then plans are settled, and a finished model has
            to hold. Only others can be prices.
        tolerance: What share of the ratio a model may exceed it by before the report warns.
        is_aligned: Whether ranks are those of the provider's blocks unless the user says something else.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    figure: ClassVar[str]
    title: ClassVar[str] = ""
    unknown: ClassVar[str] = ""
    is_measured: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-9
    is_aligned: ClassVar[bool] = False

    def show(self, amount: int | None) -> str:
        """Write an amount, None where it is unknown."""
        return exact(amount)

    def check(self, found: Found) -> None:  # noqa: B027 - most count any model
        """Find out, before any work, whether a model can be counted.

        Raises:
            InputError: It cannot.
        """

    @abstractmethod
    def on(self, found: Found, tools: Tools | None = None) -> Meter:
        """What counts on a model.

        Args:
            found: The model.
            tools: What a measured budget measures with.

        Raises:
            InputError: A measured budget cannot run it.
        """

    @abstractmethod
    def total(self, run: Run) -> Total | None:
        """What both models of a run amount to; None where the report has nothing to say of it."""

    def holds(self, run: Run) -> bool:
        """Whether a finished model, whose operators were merged, costs no more than its plan has reckoned."""
        return True

    def warnings(self, run: Run, total: Total) -> Iterator[str]:
        """What would surprise the user about the amount, under whatever budget the plan was made."""
        yield from ()


class Meter(ABC):
    """A budget on one model: the `allocate.cost.Costs` of its layers, and the cost of the whole.

    Attributes:
        budget: The budget.
    """

    budget: Budget

    @property
    @abstractmethod
    def total(self) -> int:
        """The cost of the model as it is.

        Raises:
            InputError: It cannot be counted.
        """

    @property
    def counted(self) -> Costs:
        """The costs that tell which options are worth a look before anything is measured."""
        return self

    @abstractmethod
    def line(self, layer: Layer, fold: Fold, k: int) -> Line | None:
        """See `allocate.cost.Costs`."""

    @abstractmethod
    def tariff(self, layer: Layer) -> Tariff:
        """See `allocate.cost.Costs`."""

    @abstractmethod
    def of_model(self, choices: Sequence[Choice]) -> int:
        """The cost of the model under a plan."""

    def bounds(self, tables: Sequence[Candidates], limit: int) -> Bounds:
        """What binds the solver where the whole model may cost at most `limit`."""
        kept = sum(int(table.cost[0]) for table in tables)
        return Single(Limits.single(tables, limit - (self.total - kept)))

    def alone(self, table: Candidates) -> str:
        """Why a layer has no option, a phrase for the report."""
        return "no option of the recipe is cheaper"


class Counted(Meter):
    """A meter with a formula, linear in the rank."""

    @abstractmethod
    def of_layer(self, layer: Layer, option: Option | None) -> int:
        """The cost of a layer, kept (None) or decomposed.

        Raises:
            InputError: A dimension is unknown on which it depends.
        """

    def line(self, layer: Layer, fold: Fold, k: int) -> Line | None:
        """The line through the costs at the ranks 1 and 2."""
        return Linear(self.of_layer).line(layer, fold, k)

    def tariff(self, layer: Layer) -> Tariff:
        """The costs of a layer's options."""
        return Linear(self.of_layer).tariff(layer)


class Gauge(Meter):
    """A meter that measures: options alone, and whole models, of which it learns.

    Attributes:
        place: What measures, with its setting, a short phrase.
    """

    @property
    @abstractmethod
    def place(self) -> str:
        """What measures, with its setting, a short phrase."""

    @abstractmethod
    def measure(self, errors: Sequence[Errors], grid: Grid[Costs], step: Step) -> None:
        """Measure what is worth it of the options of all layers, but for what is known.

        Args:
            errors: For each layer the errors of its options, by which those worth measuring are chosen.
            grid: The ranks to choose from.
            step: Told the share that is done.
        """

    @abstractmethod
    def predicted(self, options: Mapping[str, Option]) -> int:
        """The cost of the model with some layers rewritten, as far as is known."""

    @abstractmethod
    def ratio(self, model: Model) -> float:
        """The cost of another model with the same inputs over this one's.

        Raises:
            UnsupportedError: The runtime does not accept it.
            RejectedError: It fails on the inputs.
        """

    @abstractmethod
    def kinds(self, options: Mapping[str, Option]) -> Set[str]:
        """The kinds of some layers: those of one kind are alike."""

    @abstractmethod
    def remember(self, options: Mapping[str, Option], ratio: float) -> None:
        """Keep the ratio that a model with some layers rewritten was measured at, for predictions of it."""

    @abstractmethod
    def learn(self, options: Mapping[str, Option], ratio: float, limits: tuple[float, float] = ...) -> None:
        """Predict of layers that they save what they have saved together in one model.

        Args:
            options: The options of the layers that were rewritten in it.
            ratio: Its cost over this model's.
            limits: The least and the largest share of what was predicted to believe.
        """

    @abstractmethod
    def correct(
        self,
        options: Mapping[str, Option],
        reached: float,
        ratio: Callable[[Mapping[str, Option]], float],
        step: Step,
    ) -> None:
        """Measure what the options of every kind of layer save in the model.

        Args:
            options: The options to judge by, for some of the layers.
            reached: The ratio of the model in which all of them are rewritten.
            ratio: Measures the model in which some are (`ratio`).
            step: Told the share that is done.
        """

    @abstractmethod
    def timing(self, options: Mapping[str, Option], model: Model | None) -> Timing:
        """All that is known of the times of a compressed model.

        Args:
            options: The options of its layers.
            model: The model; None where it was not made.

        Raises:
            UnsupportedError: The runtime does not accept it.
            RejectedError: It fails on the inputs.
        """

    @abstractmethod
    def keep(self) -> None:
        """Keep what was measured for later runs, unless other work has disturbed it."""
