"""The report in a terminal: the table of layers, the totals, and the other results."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from rich.console import Console

from onnx_lowrank.core.outcome import Calibrated, Trial, largest_error
from onnx_lowrank.layers.withheld import withheld
from onnx_lowrank.report import layer_table as layers
from onnx_lowrank.report import proof, validation_text, words
from onnx_lowrank.report.content import Content, Total
from onnx_lowrank.report.next_steps import next_steps
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_CHOSEN = "→ "
WORTHLESS = 0.5
"""A relative error above this is closer to noise (1) than to the original: the report says so first."""


def show(report: Content, console: Console, *, every: bool = False) -> None:
    """Print a report, laid out for the width of the console.

    Args:
        report: The report.
        console: Where to print.
        every: Whether the table has the kept layers, too, and the outputs are listed all.
    """
    page = Page(console)
    _headlines(report, page)
    rewritten = [row for row in report.layers if row.option is not None]
    kept = [row for row in report.layers if row.option is None]
    if shown := rewritten + kept * every:
        page.blank()
        layers.show(report, shown, page)
    page.blank()
    _totals(report, page)
    page.line(_ratios(report))
    page.blank()
    if report.calibration is not None:
        _calibration(report.calibration, report.trials, report.then, page)
    names = {row.id: row.name for row in report.layers}
    reasons = [(row.reason or "kept by the plan", row.name) for row in kept]
    page.groups("Kept", "layer", reasons, "" if every else " (-v lists all)")
    page.groups(
        "Skipped", "operator", [(item.reason, item.name or item.weight or item.op) for item in report.skipped]
    )
    if report.calibration is not None:
        unmeasured = [(reason, names.get(layer, layer)) for layer, reason in report.calibration.unmeasured]
        page.groups("Not calibrated", "layer", unmeasured)
    if report.removed_inputs:
        removed = words.first_names(report.removed_inputs)
        page.line(f"Graph inputs removed, because they only named rewritten weights: {removed}")
    if report.merges:
        pairs = words.first_names(f"{merged.first} + {merged.second}" for merged in report.merges)
        saved = sum(merged.saved for merged in report.merges)
        page.line(
            f"Multiplied, because at most a bias is between them: {pairs} "
            f"({words.exact(saved)} parameters less)"
        )
    if report.validation is not None:
        validation_text.show(report.validation, names, page, every=every)
    for warning in report.warnings:
        page.line(f"Warning: {warning}", style="yellow")
    page.blank()
    page.line("Next:")
    for step in next_steps(report):
        page.line(step, style="dim", indent=2)


def _headlines(report: Content, page: Page) -> None:
    """Print the verdict; a model that hardly gives the original's outputs is told before all else."""
    worst = 0.0 if report.validation is None else report.validation.worst or 0.0
    if worst > WORTHLESS:
        advice = "raise the ratio" if report.calibration is not None else "give --calibration"
        page.line(f"Likely worthless: relative output error {words.number(worst)}; {advice}.", "bold red")
    if (held := withheld(report.skipped, len(report.layers))) is not None:
        fact, advice = held
        page.line(f"{report.model}: {fact}: {advice}.", "bold yellow")
    page.line(f"{report.model}: {', '.join(_verdict(report))}", "bold")
    rewritten = sum(row.option is not None for row in report.layers)
    page.line(f"{rewritten} of {len(report.layers)} layers rewritten with recipe {report.recipe}")


def _verdict(report: Content) -> Iterator[str]:
    """The ratios and the error, in the order in which a reader asks for them."""
    stored = f"bytes with {report.then}" if report.then else "bytes"
    shown = ("params", "macs", "bytes" if report.then else report.budget)
    for key, name in (("params", "parameters"), ("macs", "MACs"), ("bytes", stored)):
        ratio = report.totals.amount(key).ratio
        if ratio is not None and key in shown:
            yield f"{ratio:.3f} of the {name}"
        elif key == "bytes" and report.then:
            yield f"then {report.then}"
    for name, times in islice(_times(report), 1):  # A prediction counts where nothing was measured.
        if times.ratio is not None:
            yield f"{times.ratio:.3f} of the {name}"
    error = None if report.validation is None else largest_error(report.validation.outputs)
    if error is not None:
        yield f"output error {words.number(error)}"
    yield from _alone(report)


def _alone(report: Content) -> Iterator[str]:
    """The bytes and the error of the quantization alone, where they are known."""
    done = None if report.validation is None else report.validation.quantized
    other = None if done is None else done.undecomposed
    before = report.totals.amount("bytes").before
    if done is not None and other is not None and other.size is not None and before:
        error = words.error(largest_error(other.outputs))
        yield f"{done.kind} alone: {other.size / before:.3f} of the bytes with error {error}"


def _totals(report: Content, page: Page) -> None:
    figures = report.totals.figures
    shown = [(figure, figure.total) for figure in figures if figure.title and figure.total is not None]
    names = [figure.title for figure, _ in shown]
    before = [(figure.show or words.exact)(total.before) for figure, total in shown]
    after = [(figure.show or words.exact)(total.after) for figure, total in shown]
    ratios = [total.ratio for _, total in shown]
    for name, times in _times(report):
        names.append(name)
        before.append(words.time(times.before))
        after.append(words.time(times.after))
        ratios.append(times.ratio)
    columns = [
        Column("total", tuple(names)),
        Column("before", tuple(before), "right"),
        Column("after", tuple(after), "right"),
        Column("ratio", tuple("–" if ratio is None else f"{ratio:.3f}" for ratio in ratios), "right"),
    ]
    page.table(columns, [""] * len(names))
    for figure, total in shown:
        if figure.unknown and total.before is None:
            page.line(figure.unknown, style="dim")
    if report.counted:
        page.line(f"MACs and times are those of {report.counted}.", style="dim")
    if report.timing is not None:
        page.line(f"time: medians of interleaved runs on {report.timing.engine};", style="dim")
        if not report.timing.calls:
            page.line(f"inputs {report.timing.inputs}.", style="dim")
        for number, call in enumerate(report.timing.calls, 1):
            page.line(f"set {number}, weight {call.weight:.3g}: {call.inputs}.", style="dim")


def _times(report: Content) -> Iterator[tuple[str, Total]]:
    """The known times of both models, measured and predicted."""
    timing = report.timing
    if timing is None:
        return
    if timing.after is not None:
        yield "time", Total(timing.before, timing.after)
    for number, call in enumerate(timing.calls, 1):
        yield f"  set {number}", Total(call.before, call.after)
    if timing.predicted is not None:
        yield "predicted time", Total(timing.before, timing.predicted)


def _ratios(report: Content) -> str:
    line = f"Ratio of {report.budget}: {report.reached:.4f}, {_asked(report)}."
    if report.solver is None or all(row.option is None for row in report.layers):
        return line
    return f"{line} {proof.sentence(report.solver, report.measure)}"


def _asked(report: Content) -> str:
    """The user's goal: a ratio or a target."""
    wanted = []
    if report.target_error is not None:
        wanted.append(f"output error at most {report.target_error:g}")
    if report.target_agreement is not None:
        wanted.append(f"agreement at least {report.target_agreement:g}")
    if not wanted:
        return f"asked for {report.asked:g}"
    return f"the smallest tried with held-out {' and '.join(wanted)}"


def _calibration(calibration: Calibrated, trials: tuple[Trial, ...], then: str, page: Page) -> None:
    """Print the source of the inputs, and the errors of the models that were tried."""
    before = f", before {then}" if then else ""
    page.line(f"Calibration on {calibration.source}")
    if not trials:
        page.blank()
        return
    ordered = sorted(trials, key=lambda trial: -trial.ratio)
    page.blank()
    _trials(ordered, page)
    if any(trial.error is not None for trial in trials):
        held = "held-out " if calibration.held else ""
        page.line(
            "output error: ‖y − ŷ‖/‖y − ȳ‖ of the model's output y, ȳ its mean (0 if y is constant), on "
            f"{held}calibration inputs; the largest of several{before}.",
            style="dim",
        )
    if any(output.neighbours is not None for trial in trials for output in trial.outputs):
        page.line(
            "agreement: for an embedding, the share of rows that keep their nearest neighbour.",
            style="dim",
        )
    for trial in ordered:
        if trial.note:
            page.line(f"{_recipe(trial)} at {trial.ratio:.4g}: {trial.note}", style="dim", indent=2)
    page.blank()


def _recipe(trial: Trial) -> str:
    return f"{trial.recipe}, recovered" if trial.recovered else trial.recipe


def _trials(trials: list[Trial], page: Page) -> None:
    """Print the table of the plans that were tried."""
    columns = [Column("ratio", tuple(f"{trial.ratio:.4g}" for trial in trials), "right")]
    if any(trial.error is not None for trial in trials):
        errors = tuple(words.error(trial.error) for trial in trials)
        columns.append(Column("output error", errors, "right"))
    if any(trial.agreement is not None for trial in trials):
        shares = tuple("–" if trial.agreement is None else f"{trial.agreement:.2%}" for trial in trials)
        columns.append(Column("agreement", shares, "right"))
    room = page.room(columns) - len(_CHOSEN)
    names = distinct([_recipe(trial) for trial in trials], max(room, 3))
    marks = (_CHOSEN if trial.chosen else " " * len(_CHOSEN) for trial in trials)
    recipe = Column("  recipe", tuple(mark + name for mark, name in zip(marks, names, strict=True)))
    page.table([recipe, *columns], ["bold" if trial.chosen else "" for trial in trials])
