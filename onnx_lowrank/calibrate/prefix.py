"""The walk from layer to layer: the inputs of each layer in the compressed prefix and in the original model.

A cut lies before every layer. The tensors that cross a cut are kept for every batch, on disk where they
exceed a bound on memory. So each layer needs only one run of its own segment in each model. A tensor that
does not depend on a substituted layer is the same in both models, and is computed and kept once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from onnx.helper import np_dtype_to_tensor_dtype

from onnx_lowrank.calibrate.shares import Batch, together
from onnx_lowrank.calibrate.shelf import Key, Shelved
from onnx_lowrank.engines.engine import Feed, UnsupportedError
from onnx_lowrank.engines.padding import NO_PADDING, Padding
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.errors import InputError
from onnx_lowrank.files.load import Model
from onnx_lowrank.graph.walk import Walk
from onnx_lowrank.layers.binding import Binding
from onnx_lowrank.probe.segments import Segment, Segments, Substitute
from onnx_lowrank.work.executor import Threads

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Sight:
    """The tensors around a layer in one batch.

    Attributes:
        x: The layer's input in the original model, as its node reads it; None unless requested.
        x_hat: The layer's input in the compressed prefix.
        y: The layer's output in the original model, after a folded BatchNorm.
        beside: The tensor that is added to y, in the original model and in the compressed prefix, both of
            y's shape; None if there is none.
        held: Whether the batch is held out.
        shown: Whether each vector of the layer counts, shape (vectors,); None if all do.
        samples: The number of samples in the batch; 1 if it is unknown.
    """

    x: NDArray[Any] | None
    x_hat: NDArray[Any]
    y: NDArray[Any]
    beside: tuple[NDArray[Any], NDArray[Any]] | None
    held: bool
    shown: NDArray[np.bool_] | None = None
    samples: int = 1


class Step:
    """One layer of the walk.

    Attributes:
        binding: The layer.
        rectified: Whether only a Relu reads the layer's output, or its sum with `Sight.beside`.
        changed: Whether a substituted layer changes the layer's input or what is added to its output.
    """

    def __init__(
        self,
        binding: Binding,
        sights: Callable[[bool], Iterator[Sight]],
        again: Callable[[int], Iterator[Sight]],
        *,
        rectified: bool,
        changed: bool,
    ) -> None:
        self.binding = binding
        self.rectified = rectified
        self.changed = changed
        self._sights = sights
        self._again = again
        self._started: Iterator[Sight] | None = None
        self._substitute: Substitute | None = None

    def batches(self, *, original: bool = False) -> Iterator[Sight]:
        """The tensors around the layer, batch by batch, once; `again` repeats them.

        Args:
            original: Whether to include x.

        Raises:
            InputError: The disk has no room for the activations.
            UnsupportedError: The engine does not run a segment of the model.
            RejectedError: The engine fails on a batch.
        """
        if self._started is not None:
            raise RuntimeError(f"the batches of {self.binding.layer.id} have been handed out")
        self._started = self._sights(original)
        return self._started

    def again(self, every: int = 1) -> Iterator[Sight]:
        """Repeat `batches` of a rectified layer without x: every n-th batch of each share, n = `every`."""
        if not self.rectified:
            raise RuntimeError(f"the outputs of {self.binding.layer.id} are not kept, as no Relu follows it")
        return self._again(every)

    def substitute(self, weight: NDArray[Any], bias: NDArray[Any] | None = None) -> None:
        """Replace the layer's map in the compressed prefix from here on.

        Args:
            weight: The new canonical weight, shape (groups, f / groups, c / groups, *kernel), with a folded
                BatchNorm in it.
            bias: The new bias, shape (f,), with a folded BatchNorm in it; None keeps the layer's own bias.
        """
        self._substitute = Substitute(weight, bias)

    def finish(self) -> Substitute | None:
        """Run the remaining batches; returns the layer's substitute, or None if it keeps its map."""
        for _ in self.batches() if self._started is None else self._started:
            pass
        return self._substitute


@dataclass(frozen=True, slots=True)
class _Stage:
    """The position of the walk.

    Attributes:
        index: The index of the layer.
        before: The tensors at the cut before the previous layer that depend on a substituted layer.
        changed: The same at the cut before this layer.
        substitute: The substitute of the previous layer in the compressed prefix; None if it keeps its map.
    """

    index: int
    before: frozenset[str]
    changed: frozenset[str]
    substitute: Substitute | None


_TARGET = ""
"""The name under which a layer's output in the original model is kept; no tensor has this name."""


class Prefix(Shelved):
    """Walks the layers of a model in the order of their nodes, in one pass over the data for each.

    Use it as a context manager: it keeps activations, some in a temporary folder.
    """

    def __init__(
        self,
        model: Model,
        walk: Walk,
        bindings: Iterable[Binding],
        batches: Iterable[Batch],
        engine: Engine,
        padding: Padding = NO_PADDING,
        threads: Threads | None = None,
        memory: int | None = None,
    ) -> None:
        """Prepare the walk; nothing runs yet.

        Args:
            model: The model.
            walk: Its walk.
            bindings: The layers to stop at. The walk skips layers with several uses and layers outside the
                main graph.
            batches: The calibration inputs, at least one batch; they are read once.
            engine: Runs the segments.
            padding: The padding of the inputs.
            threads: Run a few batches at the same time, if the engine allows it: a segment is a small model,
                whose operators do not keep all cores busy. None runs them one by one.
            memory: The most bytes of activations in memory; None for the usual ones.
        """
        self._memory = memory
        self._padding = padding
        self._threads = threads
        self._segments = Segments(model, walk, bindings)
        self._batches = batches
        self._engine = engine
        self._kinds: dict[str, int] = {}
        self._held: list[bool] = []
        self._shown: list[NDArray[np.bool_] | None] = []
        self._samples: list[int] = []

    def steps(self) -> Iterator[Step]:
        """The layers, one after the other; each is finished before the next one starts.

        Raises:
            InputError: There are no batches, or the disk has no room for the activations.
            UnsupportedError: The engine does not run a segment of the model, or a value that crosses a cut is
                no tensor of numbers.
            RejectedError: The engine fails on a batch.
        """
        if not self._segments.bindings:
            return
        self._start()
        changed: frozenset[str] = frozenset()
        substitute: Substitute | None = None
        for index, binding in enumerate(self._segments.bindings):
            before, changed = changed, self._segments.changed(index, changed, substitute is not None)
            stage = _Stage(index, before, changed, substitute)
            step = Step(
                binding,
                partial(self._sights, stage),
                partial(self._again, stage),
                rectified=self._segments.rectified(index),
                changed=not changed.isdisjoint(
                    (self._segments.entering(index), self._segments.beside(index))
                ),
            )
            yield step
            substitute = step.finish()
            self._clear(stage)

    def _start(self) -> None:
        """Read the data once, and keep the tensors that cross the first cut."""
        segments, shelf = self._segments, self._shelf
        segment = segments.segment(0, segments.made(0), {})
        with self._opened(segment) as run:
            for number, batch in enumerate(self._batches):
                made = run({name: batch.feed[name] for name in segment.inputs})
                self._keep(number, {name: made.get(name, batch.feed.get(name)) for name in segments.cut(0)})
                self._held.append(batch.held)
                shown = self._padding.shown(batch.feed)
                self._shown.append(None if shown is None else shown.ravel())
                self._samples.append(together(batch.feed))
                # The number of batches is unknown, and the tensors of later cuts need room, too: ask for as
                # much again.
                shelf.require(shelf.used)
        if not self._held:
            raise InputError("There are no calibration inputs: give at least one.")

    def _sights(self, stage: _Stage, original: bool) -> Iterator[Sight]:
        """One pass: it runs the original model past the layer, and the compressed prefix up to it."""
        segments, shelf, index = self._segments, self._shelf, stage.index
        x, y = segments.entering(index), segments.leaving(index)
        ahead = segments.segment(index + 1, (y, *segments.made(index + 1)), self._kinds)
        wanted = (name for name in segments.made(index) if name in stage.changed)
        behind = segments.segment(index, wanted, self._kinds, stage.substitute)
        with self._opened(ahead) as run, self._opened(behind) as rerun:

            def both(number: int) -> tuple[dict[str, Any], dict[str, Any]]:
                known = {name: shelf.get((name, False), number) for name in ahead.inputs}
                changed = {name: shelf.get((name, name in stage.before), number) for name in behind.inputs}
                return run(known), rerun(changed)

            for number, (made, remade) in enumerate(self._each(both)):
                used, held = shelf.used, self._held[number]
                self._keep(number, {name: made[name] for name in segments.made(index + 1)})
                self._keep(number, remade, changed=True)
                x_hat = shelf.get((x, x in stage.changed), number)
                whole = shelf.get((x, False), number) if original else None
                beside = self._beside(stage, made[y].shape, number)
                shown = self._counting(stage, number)
                sight = Sight(whole, x_hat, made[y], beside, held, shown, self._samples[number])
                if segments.rectified(index):
                    self._keep(number, {_TARGET: made[y]})
                if number == 0:
                    shelf.require((shelf.used - used) * (len(self._held) - 1))
                yield sight

    def _each(self, compute: Callable[[int], T]) -> Iterator[T]:
        """Compute something for every batch, in their order."""
        numbers = range(len(self._held))
        if self._threads is None:
            return map(compute, numbers)
        return self._threads.together(compute, numbers, self._engine.concurrent)

    def _again(self, stage: _Stage, every: int) -> Iterator[Sight]:
        """Repeat `_sights` from the shelf: every n-th batch of each share, n = `every`."""
        name, shelf = self._segments.entering(stage.index), self._shelf
        shares = [
            [number for number, held in enumerate(self._held) if held is share] for share in (False, True)
        ]
        for number in sorted(number for share in shares for number in share[::every]):
            held = self._held[number]
            x_hat, y = shelf.get((name, name in stage.changed), number), shelf.get((_TARGET, False), number)
            beside = self._beside(stage, y.shape, number)
            yield Sight(None, x_hat, y, beside, held, self._counting(stage, number), self._samples[number])

    def _counting(self, stage: _Stage, number: int) -> NDArray[np.bool_] | None:
        """Whether each vector of the layer counts, in one batch."""
        layer = self._segments.bindings[stage.index].layer.id
        return self._shown[number] if layer in self._padding.layers else None

    def _clear(self, stage: _Stage) -> None:
        """Delete the tensors that no later step reads."""
        for number in range(len(self._held)):
            for key in self._dead(stage):
                self._shelf.drop(key, number)

    def _beside(
        self, stage: _Stage, shape: tuple[int, ...], number: int
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """The tensor that is added to the layer's output, in both models, if it has the output's shape."""
        name = self._segments.beside(stage.index)
        if name is None:
            return None
        whole = self._shelf.get((name, False), number)
        return (
            (whole, self._shelf.get((name, name in stage.changed), number)) if whole.shape == shape else None
        )

    def _dead(self, stage: _Stage) -> set[Key]:
        """The tensors on the shelf that no later step reads."""
        cut, index = self._segments.cut, stage.index
        ahead, here = set(cut(index + 1)), set(cut(index))
        previous = set(cut(index - 1)) if index else set()
        # The next step also runs the compressed prefix from this cut, and reads its unchanged tensors.
        kept = ahead | (here - stage.changed)
        dead = {(name, False) for name in (here | (previous - stage.before)) - kept}
        if self._segments.rectified(index):
            dead.add((_TARGET, False))
        return dead | {(name, True) for name in stage.before - stage.changed}

    def _keep(self, number: int, values: Mapping[str, Any], changed: bool = False) -> None:
        for name, value in values.items():
            if not isinstance(value, np.ndarray | np.generic) or value.dtype.kind == "O":
                raise UnsupportedError(f"the value {name!r} between two layers is no tensor of numbers")
            self._kinds[name] = np_dtype_to_tensor_dtype(value.dtype)
            self._shelf.put((name, changed), number, np.asarray(value, order="C"))

    @contextmanager
    def _opened(self, segment: Segment) -> Iterator[Callable[[Feed], dict[str, Any]]]:
        """Load a segment; a segment without outputs is not loaded, and gives nothing."""
        if not segment.outputs:
            yield lambda feed: {}
            return
        with self._engine.open(segment.model) as run:
            yield run
