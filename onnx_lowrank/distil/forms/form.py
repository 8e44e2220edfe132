"""Words for the forms of operators: a form computes the outputs of a node with PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from ml_dtypes import bfloat16
from numpy.typing import NDArray
from torch import Tensor

_CPU = torch.device("cpu")

FLOATS = frozenset(np.dtype(kind) for kind in (np.float16, np.float32, np.float64, bfloat16))
"""The types of floats that tensors hold, those of half precision as single precision."""

Value: TypeAlias = Tensor | NDArray[Any] | None
"""An operand: a tensor, an array that depends on no trainable number, or None where it is left out."""


@dataclass(frozen=True, slots=True)
class Call:
    """One node with its operands.

    Attributes:
        attributes: The attributes of the node, as Python values.
        operands: The operands.
        opset: The version of the operator set.
        outputs: The number of outputs.
        device: The device that computes.
    """

    attributes: dict[str, Any]
    operands: Sequence[Value]
    opset: int
    outputs: int = 1
    device: torch.device = _CPU

    def __len__(self) -> int:
        return len(self.operands)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or its default."""
        return self.attributes.get(name, default)

    def has(self, index: int) -> bool:
        """Whether an operand is given."""
        return index < len(self.operands) and self.operands[index] is not None

    def tensor(self, index: int) -> Tensor:
        """An operand as a tensor."""
        return as_tensor(self.operands[index], self.device)

    def optional(self, index: int) -> Tensor | None:
        """An operand as a tensor, or None where it is left out."""
        return self.tensor(index) if self.has(index) else None

    def tensors(self) -> list[Tensor]:
        """All operands as tensors."""
        return [as_tensor(operand, self.device) for operand in self.operands]

    def ints(self, index: int, attribute: str | None = None) -> list[int] | None:
        """Whole numbers that are an operand, or an attribute in older operator sets; None without both."""
        if self.has(index):
            operand = self.operands[index]
            found = operand.detach().cpu().numpy() if isinstance(operand, Tensor) else operand
            return [int(number) for number in np.ravel(np.asarray(found))]
        given = None if attribute is None else self.get(attribute)
        return None if given is None else [int(number) for number in np.ravel(given)]

    def text(self, name: str, default: str) -> str:
        """An attribute that is a text, or its default."""
        given = self.get(name)
        return default if given is None else str(given.decode())


Form: TypeAlias = Callable[[Call], Value | tuple[Value, ...]]

FORMS: dict[tuple[str, str], Form] = {}
"""The forms by the domain and the type of the operator."""


def form(*types: str, domain: str = "") -> Callable[[Form], Form]:
    """Register a function as the form of operators.

    A form raises NotImplementedError for a variant that it does not have, so that the reference
    implementation runs it.
    """

    def register(function: Form) -> Form:
        for name in types:
            FORMS[domain, name] = function
        return function

    return register


def as_tensor(value: Value, device: torch.device = _CPU) -> Tensor:
    """An operand as a tensor on a device; floats of less than 32 bits have 32.

    Raises:
        ValueError: The operand is left out.
    """
    if value is None:
        raise ValueError("an operand that the form needs is left out")
    return value if isinstance(value, Tensor) else torch.from_numpy(widened(value)).to(device)


def widened(array: NDArray[Any]) -> NDArray[Any]:
    """A copy of an array, with at least 32 bits a float: gradients of half precision underflow."""
    is_narrow = array.dtype in (np.dtype(np.float16), np.dtype(bfloat16))
    return np.array(array, np.float32 if is_narrow else array.dtype)
