"""Moments of activations on disk: calibration writes them once, and work items read them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.factors import Fit, Moments
from onnx_lowrank.files.keeping import digest
from onnx_lowrank.linalg.quadratic import INPUT_RIDGE, Quadratic, of_weight, shrinkage
from onnx_lowrank.linalg.scaled import of_scaled
from onnx_lowrank.linalg.tied import Tied, tied

_PARTS = ("count", "mean", "second", "independent")
_FIT, _HELD, _COUNTS = "fit", "held", "counts"


@dataclass(frozen=True, slots=True)
class LayerMoments:
    """The moments of one layer's inputs or of its outputs; empty if it has none.

    Attributes:
        inputs: Moments of its patches over the samples to fit to: (g, p) and (g, p, p).
        held: The same over the held-out samples; None without held-out samples.
        outputs: Moments of its results, after a folded BatchNorm, over the samples to fit to: (g, f / g) and
            (g, f / g, f / g).
        held_outputs: The same over the held-out samples.
        transposed: The moments of the uses that apply the transpose, if some do (`linalg.tied`). They show
            the same features as the layer's own moments: results if those are inputs, and otherwise inputs.
        least: The least ridge that moments of outputs need (`linalg.quadratic.shrinkage`).
        reason: Why the layer has no moments, a sentence; "" if it has some.
        fit: What factors are fitted to with them: ACTIVATIONS or SCALED.
        counts: How often the samples to fit to read every row of a table, shape (c,); None if it is unknown.
        held_counts: The same of the held-out samples.
    """

    inputs: Moments | None = None
    held: Moments | None = None
    outputs: Moments | None = None
    held_outputs: Moments | None = None
    transposed: LayerMoments | None = None
    least: float = 0.0
    reason: str = ""
    fit: Fit = Fit.ACTIVATIONS
    counts: NDArray[np.int64] | None = None
    held_counts: NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class MomentsRef:
    """Moments in a folder.

    Attributes:
        folder: The folder.
        number: Number of these moments in the folder.
        of_outputs: Whether they are moments of the layer's results rather than of its inputs.
        transposed: The moments of the uses that apply the transpose, if some do.
        least: The least ridge that moments of outputs need.
        fit: As in `LayerMoments`.
    """

    folder: Path
    number: int
    of_outputs: bool
    transposed: MomentsRef | None = None
    least: float = 0.0
    fit: Fit = Fit.ACTIVATIONS

    @property
    def of_inputs(self) -> bool:
        """Whether they are moments of the layer's inputs alone."""
        return not self.of_outputs and self.transposed is None

    @property
    def has_held(self) -> bool:
        """Whether the folder has moments of held-out samples."""
        return self._path(_HELD, "count").exists()

    @property
    def has_counts(self) -> bool:
        """Whether the folder has counts of the rows of a table."""
        return self._path(_FIT, _COUNTS).exists()

    @property
    def nbytes(self) -> int:
        """Bytes that the moments take in memory; 0 if the folder was deleted."""
        own = sum(path.stat().st_size for path in self.files)
        return own + (0 if self.transposed is None else self.transposed.nbytes)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of these moments, without those of transposed uses."""
        paths = (self._path(share, part) for share in (_FIT, _HELD) for part in (*_PARTS, _COUNTS))
        return tuple(path for path in paths if path.exists())

    @property
    def content(self) -> object:
        """A digest of the moments, wherever they are."""
        return _digest(self)

    def read(self) -> LayerMoments:
        """Read the moments."""
        fit, held = self._read(_FIT), self._read(_HELD)
        own = LayerMoments(outputs=fit, held_outputs=held) if self.of_outputs else LayerMoments(fit, held)
        transposed = None if self.transposed is None else self.transposed.read()
        counts, held_counts = self._counts(_FIT), self._counts(_HELD)
        known = replace(own, counts=counts, held_counts=held_counts)
        return replace(known, transposed=transposed, least=self.least, fit=self.fit)

    def write(self, fit: Moments, held: Moments | None) -> None:
        """Write moments to the folder.

        Raises:
            OSError: The disk is full.
        """
        for share, moments in ((_FIT, fit), (_HELD, held)):
            if moments is not None:
                for part in _PARTS:
                    value = getattr(moments, part)
                    np.save(self._path(share, part), np.nan if value is None else value)

    def count(self, counts: Mapping[bool, NDArray[np.int64]]) -> None:
        """Write how often the rows of a table were read, by whether the samples are held out.

        Raises:
            OSError: The disk is full.
        """
        for held, numbers in counts.items():
            np.save(self._path(_HELD if held else _FIT, _COUNTS), numbers)

    def _counts(self, share: str) -> NDArray[np.int64] | None:
        path = self._path(share, _COUNTS)
        return np.load(path) if path.exists() else None

    def _read(self, share: str) -> Moments | None:
        if not self._path(share, "count").exists():
            return None
        count, mean, second, independent = (np.load(self._path(share, part)) for part in _PARTS)
        return Moments(int(count), mean, second, None if np.isnan(independent) else float(independent))

    def _path(self, share: str, part: str) -> Path:
        return self.folder / f"{self.number}.{share}.{part}.npy"


@lru_cache(maxsize=4096)
def _digest(reference: MomentsRef) -> str:
    """A digest of moments; one after the other, many layers ask for those that they share."""
    return digest(reference.read())


def input_problem(
    weight: NDArray[Any], moments: LayerMoments, *, centred: bool, least: float = INPUT_RIDGE
) -> Quadratic:
    """The error of a layer's weight on the samples to fit to, in the metric of the fit.

    Args:
        weight: Its canonical weight.
        moments: Its moments, with those of its inputs.
        centred: Whether a bias absorbs the change of the mean.
        least: The least ridge.

    Raises:
        InputError: The moments are not finite.
    """
    if moments.inputs is None:
        raise RuntimeError("the error of a weight needs the moments of its inputs")
    if moments.fit is Fit.SCALED:
        return of_scaled(weight, moments.inputs)
    return of_weight(weight, moments.inputs, centred=centred, ridge=shrinkage(moments.inputs, least))


def tied_problem(weight: NDArray[Any], moments: LayerMoments, *, ridged: bool) -> Tied:
    """The errors of both uses of a tied layer, on the samples to fit to or on the held-out ones.

    Args:
        weight: Its canonical weight, shape (1, f, c).
        moments: Its moments, with those of the transposed uses.
        ridged: Whether to take the samples to fit to, with a ridge; otherwise held-out ones if there are any.
    """
    flipped = moments.outputs is None
    forward, back = moments, moments.transposed or LayerMoments()
    if flipped:
        forward, back = back, forward
    given, read = forward.outputs, back.inputs
    if not ridged and forward.held_outputs is not None and back.held is not None:
        given, read = forward.held_outputs, back.held
    if given is None or read is None:
        raise RuntimeError("a tied layer needs the moments of the features of both uses")
    return tied(weight, given, read, flipped=flipped, ridged=ridged)
