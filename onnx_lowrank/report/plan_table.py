"""A plan in a terminal: the layers that it rewrites, and the reasons for those that it keeps."""

from __future__ import annotations

from math import isfinite

from rich.console import Console

from onnx_lowrank.core.factors import Fit
from onnx_lowrank.core.option import Lowering
from onnx_lowrank.core.plan import Choice, Plan
from onnx_lowrank.measures import named
from onnx_lowrank.report import proof, words
from onnx_lowrank.report.page import Column, Page
from onnx_lowrank.report.shorten import distinct

_TARGETS = {
    Fit.WEIGHTS: "the weights",
    Fit.ACTIVATIONS: "the outputs of the layers on calibration inputs",
    Fit.SCALED: "the weights, scaled by the size of the inputs",
}


def show(plan: Plan, console: Console, *, is_edited: bool) -> None:
    """Print a plan.

    Args:
        plan: The plan.
        console: Where to print.
        is_edited: Whether it was changed after it was made: then nothing is proven about it.
    """
    page = Page(console)
    chosen = [choice for choice in plan.choices if choice.option is not None]
    count = f"{len(chosen)} of {len(plan.choices)} layers rewritten"
    page.line(f"{count} for {plan.ratio:g} of {plan.budget}, by recipe {plan.recipe}", "bold")
    page.line(f"It belongs to the model with SHA-256 {plan.model}.", "dim")
    if chosen:
        page.blank()
        _table(chosen, plan, page)
    page.blank()
    if is_edited:
        page.line("It was edited: proofs about the original plan do not hold for it.", "yellow")
    elif plan.solver is not None and chosen:
        page.line(proof.sentence(plan.solver, plan.measure))
    page.line(_factors(plan))
    kept = [(c.reason or "kept by the plan", c.layer) for c in plan.choices if c.option is None]
    page.groups("Kept", "layer", kept)


def _table(chosen: list[Choice], plan: Plan, page: Page) -> None:
    cells = [_option(choice) for choice in chosen]
    columns = [
        Column("option", tuple(option for option, _, _ in cells)),
        Column("k", tuple(k for _, k, _ in cells), "right"),
        Column("rank", tuple(j for _, _, j in cells), "right"),
        Column(plan.budget, tuple(words.exact(choice.cost) for choice in chosen), "right"),
        Column("error", tuple(words.error(_known(choice.error)) for choice in chosen), "right"),
    ]
    names = distinct([choice.layer for choice in chosen], max(page.room(columns), 5))
    page.table([Column("layer", names), *columns], [""] * len(chosen))
    page.line(f"error: {plan.measure}, {named(plan.measure).legend}.", style="dim")


def _option(choice: Choice) -> tuple[str, str, str]:
    option = choice.option
    if option is None:
        return "keep", "–", "–"
    if option.lowering is Lowering.NATIVE:
        return option.fold.value, str(option.k), str(option.j)
    return option.lowering.value, str(option.k), str(option.j)


def _known(error: float) -> float | None:
    return error if isfinite(error) else None


def _factors(plan: Plan) -> str:
    """The sentence about the factors that the plan asks for."""
    text = f"Factors are fitted to {_TARGETS[plan.factors]}"
    if plan.recover:
        text += ", and every layer makes up for the errors of the layers before it"
    data = "" if plan.factors is Fit.WEIGHTS else "; a replay needs --calibration with the same inputs"
    after = ""
    if plan.training is not None:
        steps = sum(one.steps for one in plan.training.rounds)
        after += (
            f" The model is then distilled in {words.exact(steps)} steps (PyTorch {plan.training.torch})."
        )
    after += f" The model is then quantized ({plan.then})." if plan.then else ""
    return f"{text}{data}.{after}"
