"""The interface of a budget: the cost of a layer, of a plan and of a finished model, and its text in reports.

A `Budget` does not depend on a model. Its `Meter` counts on one model: it gives the allocation the costs of
all options, and the solver its constraints. A `Gauge` is a meter without a formula: it measures options
before a plan is made, and whole models while the plan is settled (`stages.settling`).
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
from onnx_lowrank.core.option import Fold, Lowering, Option
from onnx_lowrank.core.outcome import Timing
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.files.load import Model
from onnx_lowrank.layers.found import Found, Layered
from onnx_lowrank.measures import Errors
from onnx_lowrank.progress import Progress, Silent, Step
from onnx_lowrank.quantize.kind import Quantizer
from onnx_lowrank.report.content import Total
from onnx_lowrank.report.words import exact
from onnx_lowrank.rewrite.replace import Rewritten

if TYPE_CHECKING:
    from onnx_lowrank.budgets.latency.stopwatch import Stopwatch

Shapes = Mapping[str, tuple[int, ...]]
"""The shapes of a model's inputs, by name."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The means by which a measured budget measures.

    Attributes:
        stopwatch: Times models; None if no budget needs it.
        feed: The user's inputs to run the model on; empty if the user gave none.
        shapes: The shapes of inputs for which the layers were found, by name.
        progress: Where to show progress.
        further: Further sets of shapes on which times count.
        weights: The share of calls with each set of shapes, `shapes` first.
        quantizer: The quantization that follows; None without one.
    """

    stopwatch: Stopwatch | None = None
    feed: Feed = field(default_factory=dict)
    shapes: Shapes = field(default_factory=dict)
    progress: Progress = field(default_factory=Silent)
    further: tuple[Shapes, ...] = ()
    weights: tuple[float, ...] = (1.0,)
    quantizer: Quantizer | None = None

    @property
    def sets(self) -> tuple[Shapes, ...]:
        """All sets of shapes on which times count."""
        return (self.shapes, *self.further)


@dataclass(frozen=True, slots=True)
class Run:
    """The result of a run.

    Attributes:
        found: The input model with its layers.
        plan: The option of every layer.
        meter: The plan's budget on the model; None if it was not needed.
        rewritten: The compressed model; None in a dry run.
        merged: Whether adjacent operators of the compressed model were multiplied into one.
        shapes: The shapes of inputs for which the layers were found, by name.
        timing: The times of both models; None if they are unknown.
        quantized: The compressed model after its quantization; None without one.
        counted: The part of `shapes` that neither the model nor the user states, a phrase; "" without any.
    """

    found: Found
    plan: Plan
    meter: Meter | None = None
    rewritten: Rewritten | None = None
    merged: bool = False
    shapes: Shapes = field(default_factory=dict)
    timing: Timing | None = None
    quantized: Model | None = None
    counted: str = ""


class Budget(ABC):
    """One quantity that a ratio can count.

    Attributes:
        name: Its name in `--budget`, plans and recipes.
        order: Its place among the budgets in help and messages.
        figure: The key of its amount in the totals of the JSON report.
        title: The title of its row in the totals in the terminal; "" if the times are shown there instead.
        is_measured: Whether it measures because it has no formula. Then plans are settled, and the finished
            model has to keep the ratio. Only budgets with a formula can be prices.
        tolerance: The share of the ratio by which a model may exceed it before the report warns.
        narrows: Whether it counts narrower layers (`Lowering.NARROW`), so plans may have some.
        shares: The factors that layers share (`Lowering.SHARED`, `Lowering.SUMMED`) that it counts, so plans
            may have some.
        keeps_rows: Whether it counts kept rows of tables (`Lowering.SPARSE`), so plans may have some.
        is_aligned: Whether ranks are multiples of the provider's block unless the user says otherwise.
    """

    name: ClassVar[str]
    order: ClassVar[int]
    figure: ClassVar[str]
    title: ClassVar[str] = ""
    is_measured: ClassVar[bool] = False
    tolerance: ClassVar[float] = 1e-9
    narrows: ClassVar[bool] = False
    shares: ClassVar[frozenset[Lowering]] = frozenset()
    keeps_rows: ClassVar[bool] = False
    is_aligned: ClassVar[bool] = False

    def show(self, amount: int | None) -> str:
        """Write an amount; None is an unknown one."""
        return exact(amount)

    def unknown(self, found: Found) -> str:
        """The sentence of the report for an unknown amount."""
        return ""

    def check(self, found: Found) -> None:  # noqa: B027 - most budgets accept any model
        """Check, before any work, that the cost of a model can be counted.

        Raises:
            InputError: It cannot be counted.
        """

    @abstractmethod
    def on(self, found: Found, tools: Tools | None = None) -> Meter:
        """The meter of this budget for a model.

        Args:
            found: The model.
            tools: The means by which a measured budget measures.

        Raises:
            InputError: A measured budget cannot run the model.
        """

    @abstractmethod
    def total(self, run: Run) -> Total | None:
        """The amounts of both models of a run; None if the report does not show them."""

    def holds(self, source: Layered, plan: Plan, rewritten: Rewritten) -> bool:
        """Whether a finished model with merged operators costs no more than its plan predicted."""
        return True

    def warnings(self, run: Run, total: Total) -> Iterator[str]:
        """Warnings about an unexpected amount, whichever budget the plan was made with."""
        yield from ()


class Meter(ABC):
    """A budget on one model: the `allocate.cost.Costs` of its layers, and the cost of the whole model.

    Attributes:
        budget: The budget.
    """

    budget: Budget

    @property
    @abstractmethod
    def total(self) -> int:
        """The cost of the unchanged model.

        Raises:
            InputError: It cannot be counted.
        """

    @property
    def gauge(self) -> Gauge | None:
        """This meter, if it measures: then plans are settled and finished models are timed by it."""
        return None

    @property
    def counted(self) -> Costs:
        """The costs that select options to consider before anything is measured."""
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
        """The constraints of the solver if the whole model may cost at most `limit`."""
        kept = sum(int(table.cost[0]) for table in tables)
        return Single(Limits.single(tables, limit - (self.total - kept)))

    def alone(self, table: Candidates) -> str:
        """The reason why a layer has no option, a phrase for the report."""
        return "no option of the recipe is cheaper"


class Counted(Meter):
    """A meter with a formula that is linear in the rank."""

    @abstractmethod
    def of_layer(self, layer: Layer, option: Option | None) -> int:
        """The cost of a layer, kept (None) or decomposed.

        Raises:
            InputError: The cost depends on an unknown dimension.
        """

    def line(self, layer: Layer, fold: Fold, k: int) -> Line | None:
        """The line through the costs at the ranks 1 and 2."""
        return Linear(self.of_layer).line(layer, fold, k)

    def tariff(self, layer: Layer) -> Tariff:
        """The costs of a layer's options."""
        return Linear(self.of_layer).tariff(layer)


class Gauge(Meter):
    """A meter that measures: options in isolation, and whole models, by which it corrects its predictions.

    Attributes:
        place: The runtime that measures, with its setting, a short phrase.
    """

    @property
    def gauge(self) -> Gauge:
        """This meter."""
        return self

    @property
    @abstractmethod
    def place(self) -> str:
        """The runtime that measures, with its setting, a short phrase."""

    @abstractmethod
    def measure(self, errors: Sequence[Errors], grid: Grid[Costs], step: Step) -> None:
        """Measure the promising options of all layers that have not been measured yet.

        Args:
            errors: For each layer the errors of its options, which select the promising ones.
            grid: The ranks to choose from.
            step: Receives the share that is done.
        """

    @abstractmethod
    def measure_together(
        self, narrow: Sequence[Layer], shared: Sequence[Layer], grid: Grid[Costs], step: Step
    ) -> None:
        """Measure layers that change together with others and have not been measured yet.

        Args:
            narrow: The layers that may be narrowed with their partners.
            shared: The layers that may share an encoder.
            grid: The ranks to choose from.
            step: Receives the share that is done.
        """

    @abstractmethod
    def predicted(self, options: Mapping[str, Option]) -> int:
        """The predicted cost of the model with these layers rewritten."""

    @abstractmethod
    def ratio(self, model: Model) -> float:
        """The cost of another model with the same inputs, divided by the cost of this one.

        Raises:
            UnsupportedError: The runtime does not accept the other model.
            RejectedError: The other model fails on the inputs.
        """

    @abstractmethod
    def kinds(self, options: Mapping[str, Option]) -> Set[str]:
        """The kinds of these layers, and how they change; layers of one kind are alike."""

    @abstractmethod
    def remember(self, options: Mapping[str, Option], ratio: float) -> None:
        """Keep the measured ratio of a model with these layers rewritten, as its prediction."""

    @abstractmethod
    def learn(self, options: Mapping[str, Option], ratio: float, limits: tuple[float, float] = ...) -> None:
        """Scale the predictions for some layers to their joint saving in one measured model.

        Args:
            options: The options of the layers that are rewritten in the measured model.
            ratio: The cost of the measured model over the cost of this one.
            limits: The smallest and the largest credible ratio of the measured saving to the predicted one.
        """

    @abstractmethod
    def correct(
        self,
        options: Mapping[str, Option],
        reached: float,
        ratio: Callable[[Mapping[str, Option]], float],
        step: Step,
    ) -> None:
        """Measure the saving of every kind of layer inside the model, and correct the predictions by it.

        Args:
            options: The options of the layers that are rewritten.
            reached: The measured ratio of the model with all of them.
            ratio: Measures the ratio of the model with a part of them.
            step: Receives the share that is done.
        """

    @abstractmethod
    def timing(self, options: Mapping[str, Option], model: Model | None) -> Timing:
        """The times of a compressed model, predicted, and measured if the model is given.

        Args:
            options: The options of its layers.
            model: The model; None if it was not made.

        Raises:
            UnsupportedError: The runtime does not accept the model.
            RejectedError: The model fails on the inputs.
        """

    @abstractmethod
    def keep(self) -> None:
        """Keep the measurements for later runs, unless other work disturbed them."""
