"""The differences of the outputs of two models, in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnx_lowrank.core.outcome import (
    Distilled,
    Fused,
    OutputError,
    Quantized,
    Undecomposed,
    Validation,
    largest_error,
)
from onnx_lowrank.report import other_table, words
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_ROOM = 32
"""The most characters of an output's name."""


def show(
    validation: Validation,
    names: Mapping[str, str],
    page: Page,
    title: str = "Validation",
    *,
    every: bool = False,
) -> None:
    """Print the differences of the outputs.

    Args:
        validation: The comparison.
        names: The names of layers for readers, by id.
        page: Where to print.
        title: The first word.
        every: Whether to list all outputs.
    """
    page.line(f"{title} on {validation.engine}")
    page.line(f"inputs {validation.inputs}", style="dim", indent=2)
    layers = {f"layer {layer}": f"layer {name}" for layer, name in names.items()}
    _outputs(validation.outputs, page, every=every)
    if validation.distilled is not None:
        _distilled(validation.distilled, page)
    if validation.quantized is not None:
        _quantized(validation, validation.quantized, page)
    for output in validation.alone:
        page.line(f"{layers.get(output.name, output.name)}: {_differences(output)}", indent=2)
    if validation.continuation is not None:
        found = validation.continuation
        page.line(
            f"greedy continuation of {found.prompts} prompts: {found.agreement:.0%} of {found.tokens} tokens "
            "agree",
            indent=2,
        )
    if validation.never_ran:
        silent = words.first_names(names.get(layer, layer) for layer in validation.never_ran)
        page.line(f"never ran: {silent}", style="yellow", indent=2)
    elif validation.never_ran is None:
        page.line("unknown which layers in branches ran", style="dim", indent=2)
    if validation.fused is not None:
        _fused(validation.fused, page)
    for note in validation.notes:
        page.line(note, style="yellow", indent=2)
    if validation.other is not None:
        page.blank()
        other_table.show(validation.other, page)


def _outputs(outputs: Sequence[OutputError], page: Page, *, every: bool) -> None:
    """Print the errors of all outputs, or of the worst ones."""
    shown = outputs if every else other_table.worst(outputs)
    titles = distinct([output.name for output in shown], _ROOM)
    for title, output in zip(titles, shown, strict=True):
        page.line(f"{title}: {_differences(output)}", indent=2)
    if more := len(outputs) - len(shown):
        page.line(f"{more} more outputs err less; --report has all", style="dim", indent=2)


def _distilled(found: Distilled, page: Page) -> None:
    """Print what the distillation did, and the errors before it."""
    for output in found.alone:
        page.line(f"before distillation, {output.name}: {_differences(output)}", indent=2)
    before, after = map(words.number, found.loss)
    ended = ", interrupted" if found.is_ended else ""
    state = "" if found.is_kept else "; no output may err more, so the model is the one before"
    style = "dim" if found.is_kept else "yellow"
    page.line(
        f"distilled: {words.exact(found.elements)} numbers in {found.tensors} tensors, "
        f"{words.exact(found.steps)} steps{ended}, held-out loss {before} → {after}{state}",
        indent=2,
        style=style,
    )
    inputs = f", inputs also {', '.join(found.changes)}" if found.changes else ""
    page.line(f"fitted to the outputs and to {found.features} inner features{inputs}", style="dim", indent=4)
    if found.unreached:
        names = words.first_names(found.unreached)
        page.line(f"no gradient reaches {names}: nothing was fitted to it", style="yellow", indent=4)


def _quantized(validation: Validation, found: Quantized, page: Page) -> None:
    """Print what the quantization did, the errors before it, and those of the quantization alone."""
    for output in found.alone:
        page.line(f"before {found.kind}, {output.name}: {_differences(output)}", indent=2)
    before, after = map(words.exact, found.size)
    reason = f", because {found.reason}" if found.reason else ""
    page.line(f"then {found.kind}: {found.method}{reason}", indent=2)
    left = found.floats[1] / found.floats[0] if found.floats[0] else 0.0
    page.line(
        f"{found.refitted} weights fitted to it, {before} → {after} bytes, {left:.1%} of the numbers left in "
        "float32; bounds are those of the factors before it",
        indent=4,
    )
    if found.undecomposed is not None:
        _side_by_side(validation, found, found.undecomposed, page)


def _side_by_side(validation: Validation, found: Quantized, other: Undecomposed, page: Page) -> None:
    """Print the bytes and the errors of low-rank factors, of the quantization, and of both."""
    if other.note:
        page.line(other.note, style="yellow", indent=2)
    models = [
        ("low-rank alone", found.size[0], found.alone),
        (f"{found.kind} alone", other.size, other.outputs),
        (f"low-rank, then {found.kind}", found.size[1], validation.outputs),
    ]
    models = [model for model in models if model[1] is not None]
    errors = tuple(words.error(largest_error(outputs)) for *_, outputs in models)
    columns = [
        Column("  model", tuple(f"  {name}" for name, *_ in models)),
        Column("bytes", tuple(words.exact(size) for _, size, _ in models), "right"),
        Column("output error", errors, "right"),
    ]
    page.table(columns, [""] * len(models))


def _fused(fused: Fused, page: Page) -> None:
    """Print the fused operators that were lost, or why they were not counted."""
    if fused.note:
        page.line(f"fused operators not counted: {fused.note}", style="dim", indent=2)
    elif fused.lost:
        parts = (f"{count} of {fused.before[name]} {name}" for name, count in fused.lost.items())
        page.line(f"ONNX Runtime no longer fuses {', '.join(parts)}", style="yellow", indent=2)


def _differences(output: OutputError) -> str:
    """The errors of an output of the compressed model, as one line."""
    parts = []
    if output.relative is not None:
        centred = "" if output.centred is None else f" ({words.number(output.centred)} about the mean)"
        parts.append(f"relative error {words.number(output.relative)}{centred}")
    if output.largest is not None:
        parts.append(f"largest difference {words.number(output.largest)}")
    if output.agreement is not None:
        parts.append(f"agreement {output.agreement:.1%}")
    if output.cosine is not None:
        parts.append(f"cosine {output.cosine:.3f}")
    if output.neighbours is not None:
        parts.append(f"nearest neighbour kept {output.neighbours:.1%}")
    return ". ".join(filter(None, (", ".join(parts), output.note)))
