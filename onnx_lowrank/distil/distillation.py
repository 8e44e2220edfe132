"""Label-free distillation: the stored tensors of a low-rank model, fitted together to the original's outputs.

Rules:

1. The original runs in the engine of the calibration, and the low-rank model in PyTorch (`distil.program`).
2. The trained tensors: `distil.trained`; the target of the fit: `distil.target`; the inputs: `distil.inputs`,
   changed by `distil.augment`; the training: `distil.learning`.
3. The held-out inputs judge every round; nothing is fitted to them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from torch import Tensor

from onnx_lowrank.calibrate.calibration import Calibration
from onnx_lowrank.calibrate.originals import Originals
from onnx_lowrank.calibrate.shares import together
from onnx_lowrank.core.plan import Round
from onnx_lowrank.distil.augment import Augmentation, chosen
from onnx_lowrank.distil.features import ends, features
from onnx_lowrank.distil.forms.form import widened
from onnx_lowrank.distil.inputs import Inputs
from onnx_lowrank.distil.learning import SEED, Learned, Learner, Report, Tensors
from onnx_lowrank.distil.losses import ERROR, losses
from onnx_lowrank.distil.program import Program, lacking, program
from onnx_lowrank.distil.schedule import replayed
from onnx_lowrank.distil.target import Arrays, Seen, Target
from onnx_lowrank.distil.teacher import Teach, teaching
from onnx_lowrank.distil.trained import Trained, trained
from onnx_lowrank.engines.engine import Feed
from onnx_lowrank.engines.inputs import specs
from onnx_lowrank.engines.pasts import caches
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.external import whole
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.hardware import cores

_log = logging.getLogger(__name__)

_DENORMAL = 1e-40
_LEAST = 1e-9  # a loss before the training, by which it is divided


@dataclass(frozen=True, slots=True)
class Distilled:
    """The result of a distillation.

    Attributes:
        values: The trained tensors in their stored dtypes, by name.
        learned: The training.
        changes: The names of the changes of inputs.
        losses: The kinds of losses, by output.
        features: The number of inner features.
        unreached: The outputs that no gradient reaches.
        stops: The operators at which gradients stopped.
        device: The device that computed.
        seed: The seed of all draws.
        torch: The version of PyTorch.
    """

    values: Mapping[str, NDArray[Any]]
    learned: Learned
    changes: tuple[str, ...]
    losses: Mapping[str, tuple[str, ...]]
    features: int
    unreached: tuple[str, ...]
    stops: tuple[str, ...]
    device: str
    seed: int = SEED
    torch: str = torch.__version__


def distil(
    original: Model,
    low: Model,
    calibration: Calibration,
    *,
    seconds: float | None,
    rounds: Sequence[Round] | None = None,
    device: str = "auto",
    report: Report,
) -> Distilled:
    """Fit the tensors of a low-rank model to the original.

    Args:
        original: The input model.
        low: The low-rank model.
        calibration: The inputs to fit to; some are held out.
        seconds: The bound on the time; None trains until the held-out loss stops falling.
        rounds: The rounds of an earlier training to repeat; None finds new ones.
        device: The device that computes: "cpu", "cuda", or "auto" for a GPU where there is one.
        report: Is told how the training goes.

    Raises:
        InputError: The tensors have no gradient, or a data file has changed.
    """
    place = _device(device)
    with settings(), ExitStack() as stack:
        course = _Course(original, low, calibration, place, stack)
        starts = {name: one.values for name, one in course.trained.items()}
        learner = Learner(starts, course.losses, course.judge, place)
        schedule = learner.schedule(seconds) if rounds is None else replayed(rounds)
        learned = learner.learn(schedule, report)
    values = {name: _stored(learned.values[name], one.values) for name, one in course.trained.items()}
    return Distilled(
        values=values,
        learned=learned,
        changes=course.augmentation.names,
        losses={name: tuple(kinds) for name, kinds in course.target.outputs.items()},
        features=len(course.target.inner),
        unreached=course.unreached,
        stops=tuple(sorted(course.program.stops)),
        device=place.type,
    )


def _device(name: str) -> torch.device:
    """The device that computes.

    Raises:
        InputError: PyTorch finds no GPU, and one is asked for.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("PyTorch, which --distil runs on, finds no GPU: choose --device auto or cpu.")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def check(model: Model, feed: Feed, device: str) -> None:
    """Check that a model can be distilled, by one run of it with gradients.

    Args:
        model: The input model.
        feed: One sample.
        device: The device that will compute, as in `distil`.

    Raises:
        InputError: It cannot.
    """
    _device(device)
    if unknown := lacking(whole_proto(model)):
        raise InputError(
            f"{model.name} has operators that --distil cannot run ({', '.join(unknown)}): leave --distil out."
        )
    values = trained(model, Walk(model.proto))
    leaves = {n: torch.from_numpy(widened(one.values)).requires_grad_() for n, one in values.items()}
    made = program(whole_proto(model), _outputs(model.proto))
    try:
        with settings():
            got = made(feed, leaves)
    except NotImplementedError as error:
        raise InputError(
            f"{model.name} has an operator that --distil cannot run ({error}): leave it out."
        ) from error
    if not any(value.requires_grad for value in got.values()) and not ends(model.proto.graph, leaves.keys()):
        raise InputError(f"No output of {model.name} has a gradient ({_stopped(made)}): leave --distil out.")


@contextmanager
def settings() -> Iterator[None]:
    """PyTorch's settings for the time of a training: repeatable, on all cores, without denormal numbers."""
    threads, is_repeatable = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    flushes = bool((torch.full((1,), _DENORMAL) * 1.0 == 0).all())
    torch.set_num_threads(cores())
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_flush_denormal(True)  # Gradients of sure answers are denormal, which slows products tenfold.
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        torch.set_flush_denormal(flushes)
        torch.use_deterministic_algorithms(is_repeatable, warn_only=warns)
        torch.set_num_threads(threads)


def _stored(values: NDArray[np.float32], before: NDArray[Any]) -> NDArray[Any]:
    """Trained numbers in the dtype of the stored ones, which stay where that cannot hold the new ones."""
    with np.errstate(over="ignore"):
        made = values.astype(before.dtype)
    return np.where(np.isfinite(made), made, before).reshape(before.shape)


class _Course:
    """All that one training needs."""

    def __init__(
        self, original: Model, low: Model, calibration: Calibration, device: torch.device, stack: ExitStack
    ) -> None:
        walk = Walk(low.proto)
        self.trained: dict[str, Trained] = trained(low, walk)
        self._calibration = calibration
        self._caches = caches(original.proto)
        # Products in bfloat16 are several times as fast on GPUs; losses and tensors stay in float32.
        self._precision = torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda")
        self._padding = calibration.statistics.padding
        known = {name for node in original.proto.graph.node for name in node.output}
        self.ends = ends(low.proto.graph, self.trained.keys())
        inner = features(self.ends, known)
        self._teach: Teach = stack.enter_context(teaching(original, calibration.engine, inner))
        self._kept = Originals(calibration.memory.outputs)
        size, memory = calibration.statistics.batch, calibration.memory.activations
        self._inputs = Inputs(calibration.trimmed, specs(original.proto), size, memory)
        starts = {name: torch.from_numpy(widened(one.values)) for name, one in self.trained.items()}
        outputs = _outputs(low.proto)
        self.program = program(whole_proto(low), (*outputs, *inner), device=str(device))
        self.target, self.unreached = self._compared(low, outputs, inner, starts)
        self.augmentation = self._changes()
        self._start(starts)

    def losses(self, seed: int) -> Iterator[Callable[[Tensors], Tensor]]:
        """The loss on one changed batch after the other."""
        draws = np.random.default_rng(seed)
        while True:
            for feed in self._inputs.batches(draws):
                changed = self.augmentation(feed, draws)
                wanted = self._teach(changed)

                def loss(tensors: Tensors, feed: Feed = changed, wanted: Arrays = wanted) -> Tensor:
                    with self._precision:
                        got = self.program(feed, tensors)
                    return self.target.loss(got, wanted, feed)

                yield loss

    def judge(self, tensors: Tensors) -> tuple[float, bool]:
        """The held-out loss of the outputs, of all values if no output has a gradient; and whether it counts.

        It does not where the error of an output, which reports show, is larger than at the start.
        """
        terms = self._held_terms(tensors, self.target.outputs or None)
        errors = {key: value for key, value in terms.items() if key[1] == ERROR}
        is_fit = all(value <= self.target.starts[key] for key, value in errors.items())
        return float(self.target.total(terms)), is_fit

    def _held_terms(self, tensors: Tensors, names: Iterable[str] | None) -> dict[tuple[str, str], float]:
        sums: dict[tuple[str, str], float] = {}
        count = 0
        for wanted, feed in self._held():
            with torch.no_grad():
                got = self.program(feed, tensors)
            size = together(feed)
            count += size
            for key, value in self.target.terms(got, wanted, feed, names).items():
                sums[key] = sums.get(key, 0.0) + size * float(value)
        return {key: value / max(count, 1) for key, value in sums.items()}

    def _held(self) -> Iterator[tuple[Arrays, Feed]]:
        """The original's values on the held-out batches, or on all if none is held out."""
        samples, size = self._calibration.samples, self._inputs.size
        for number, batch in enumerate(self._calibration.compared.batches(size)):
            if batch.held or not samples.held:
                yield self._kept.outputs(number, partial(self._teach, batch.feed)), batch.feed

    def _compared(
        self, low: Model, outputs: Sequence[str], inner: Sequence[str], starts: Tensors
    ) -> tuple[Target, tuple[str, ...]]:
        """The compared values, and the outputs that no gradient reaches."""
        wanted, feed = next(self._held())
        leaves = {name: value.clone().requires_grad_() for name, value in starts.items()}
        got = self.program(feed, leaves)
        with_gradient = {name for name, value in got.items() if value.requires_grad and name in wanted}
        alike = {name for name in with_gradient if got[name].shape == wanted[name].shape}
        inner = [name for name in inner if name in alike]
        compared = [name for name in outputs if name in alike and name not in self._caches]
        if not compared and not inner:
            raise InputError(
                f"No output of {low.name} has a gradient ({_stopped(self.program)}): leave --distil out."
            )
        seen = Seen()
        for values, inputs in self._held():
            seen.add(
                {name: self._padding.hide(name, values[name], inputs) for name in (*compared, *inner)}, inputs
            )
        self.known = known = seen.known()
        powers = {name: known[name].power for name in inner}
        unreached = tuple(name for name in outputs if name not in with_gradient)
        compared_by = {name: losses(known[name]) for name in compared}
        return Target(compared_by, powers, self._padding, self.program.device), unreached

    def _changes(self) -> Augmentation:
        """The changes of inputs that the original takes for inputs of the same kind."""
        draws = np.random.default_rng(SEED)
        feed = next(self._inputs.batches(draws), None)
        return Augmentation({}) if feed is None else chosen(feed, self._sureness, draws)

    def _sureness(self, feed: Feed) -> list[float]:
        """For each compared output, the mean of its largest probabilities, or how much it varies."""
        values, found = self._teach(feed), []
        for name in self.target.outputs:
            y = torch.from_numpy(np.asarray(values[name], np.float32))
            if self.known[name].is_class:
                shares = y if self.known[name].is_share else torch.softmax(y, dim=-1)
                found.append(float(shares.amax(dim=-1).mean()))
            else:
                found.append(float(y.std()))
        return found

    def _start(self, starts: Tensors) -> None:
        """Note the losses before the training, and the way to keep to the memory."""
        device = self.program.device
        terms = self._held_terms({name: value.to(device) for name, value in starts.items()}, None)
        self.target.starts.update({key: max(value, _LEAST) for key, value in terms.items()})
        if self.program.taken > self._calibration.memory.activations:
            self.program.cuts = frozenset(self.ends)


def _outputs(proto: ModelProto) -> tuple[str, ...]:
    """The names of the outputs that are tensors."""
    kinds = {output.name: output.type.WhichOneof("value") for output in proto.graph.output if output.name}
    return tuple(name for name, kind in kinds.items() if kind in ("tensor_type", None))


def whole_proto(model: Model) -> ModelProto:
    """The model with all weights in its proto."""
    return whole(model.proto, model.files, model.name) if model.files else model.proto


def _stopped(made: Program) -> str:
    """The reason why gradients stop, a phrase."""
    if made.stops:
        return f"it stops at {', '.join(sorted(made.stops))}"
    return "no stored tensor of its main graph is a weight"
