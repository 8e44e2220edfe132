"""onnx's reference implementation: slow, but it supports every type."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError, one_line
from onnx_lowrank.files.external import whole
from onnx_lowrank.files.load import Model
from onnx_lowrank.logs import without_warnings


@dataclass(frozen=True, slots=True)
class Reference:
    """onnx's reference implementation: slow, but it supports every type."""

    name: str = "onnx ReferenceEvaluator"
    concurrent: ClassVar[int] = 1
    """A run changes the filters of warnings, which all threads share."""

    @contextmanager
    def open(self, model: Model) -> Iterator[Run]:
        """Load a model.

        Raises:
            UnsupportedError: The reference implementation lacks an operator of the model.
        """
        from onnx.reference import ReferenceEvaluator  # Its import takes long, and it runs few models.

        from onnx_lowrank.engines.specified import OPERATORS

        proto = whole(model.proto, model.files, model.name) if model.files else model.proto
        try:
            evaluator: Any = ReferenceEvaluator(proto, new_ops=list(OPERATORS))
        except Exception as error:
            raise UnsupportedError(one_line(error)) from error

        def run(feed: Feed) -> dict[str, Any]:
            try:
                # The caller looks for overflow and NaN in the outputs.
                with np.errstate(all="ignore"), without_warnings():
                    return dict(zip(evaluator.output_names, evaluator.run(None, dict(feed)), strict=True))
            except Exception as error:
                raise RejectedError(one_line(error)) from error

        yield run
