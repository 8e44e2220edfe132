"""The parts of the JSON report about outputs (`documents.report_schema`)."""

from __future__ import annotations

from msgspec import Struct


class Table(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An object of the report."""


class Output(Table, frozen=True):
    """The error of one output, relative to the output of the input model.

    Attributes:
        name: Name of the output; "layer ID" for a layer that ran alone.
        relative: ‖y − ŷ‖ / ‖y‖.
        largest: Largest |y − ŷ|.
        agreement: Share of rows whose largest element is at the same place, or share of equal elements.
        note: A further sentence for the user; usually empty.
        centred: ‖y − ŷ‖ / ‖y − ȳ‖, ȳ the mean over the samples.
        is_exact: Whether the output holds integers, booleans or strings.
        cosine: For rows of norm 1, in place of agreement: the mean cosine to the original rows.
        neighbours: For rows of norm 1: the share of rows that keep their nearest other row.
        noise: The standard error of `relative` over the samples.
    """

    name: str
    relative: float | None
    largest: float | None
    agreement: float | None
    note: str
    centred: float | None
    is_exact: bool
    cosine: float | None
    neighbours: float | None
    noise: float | None = None


class Undecomposed(Table, frozen=True):
    """The input model after the same quantization, without a decomposition.

    Attributes:
        bytes: Its size; null if it was not made.
        outputs: The errors of its outputs, on the same inputs as those of the compressed model.
        note: Why it was not made or not compared, a sentence; usually empty.
    """

    bytes: int | None
    outputs: tuple[Output, ...]
    note: str


class Distilled(Table, frozen=True):
    """The distillation of the compressed model: all its tensors fitted together, without labels.

    Attributes:
        tensors: Number of tensors that were trained.
        elements: Number of their elements.
        steps: Number of steps.
        loss: The held-out loss before it, relative to itself.
        loss_after: The smallest held-out loss.
        losses: The names of the losses of every output.
        features: Number of inner features that were compared.
        changes: The names of the changes of inputs.
        unreached: The outputs that no gradient reaches.
        stops: The operators at which gradients stop.
        is_kept: Whether the model has the trained tensors: they do no worse on held-out inputs.
        is_ended: Whether an interrupt ended it.
        alone: The errors of the model before it, on the same inputs.
    """

    tensors: int
    elements: int
    steps: int
    loss: float
    loss_after: float
    losses: dict[str, tuple[str, ...]]
    features: int
    changes: tuple[str, ...]
    unreached: tuple[str, ...]
    stops: tuple[str, ...]
    is_kept: bool
    is_ended: bool
    alone: tuple[Output, ...]


class Quantized(Table, frozen=True):
    """The quantization of the compressed model. The certificates are those of the factors before it.

    Attributes:
        kind: Its name in --then.
        method: The method of ONNX Runtime's tool.
        reason: Why this method was chosen; usually empty if there is only one.
        refitted: Number of weights that were fitted to it beforehand.
        floats: Elements of the constant float32 tensors of the low-rank model.
        floats_after: Elements of those that are left.
        bytes: Size of the low-rank model.
        bytes_after: Size of the quantized model.
        alone: The errors of the low-rank model before it, on the same inputs.
        undecomposed: The quantization alone; null if no layer is rewritten, as that is the compressed model.
    """

    kind: str
    method: str
    reason: str
    refitted: int
    floats: int
    floats_after: int
    bytes: int
    bytes_after: int
    alone: tuple[Output, ...]
    undecomposed: Undecomposed | None = None
