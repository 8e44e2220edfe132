"""The axes of a tensor between two layers, followed through operators that only lay out its elements anew.

An axis is a sequence of parts, the outermost first. Reshape joins and splits axes in the order of the
elements, so it joins and splits sequences of parts. One part runs through the numbers of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product as combinations
from math import prod

INSIDE = -1
"""The origin of the part that runs through the numbers of a head."""


@dataclass(frozen=True, slots=True)
class Part:
    """A factor of an axis of the tensor at which attention meets.

    Attributes:
        origin: The number of that axis, or `INSIDE`.
        stride: Steps along that axis from one index of the part to the next.
        size: Number of its indices.
    """

    origin: int
    stride: int
    size: int


Axes = tuple[tuple[Part, ...], ...]


def axes_of(origins: Iterable[int], sizes: Iterable[int]) -> Axes:
    """The axes of a tensor, one part each; an axis of size 1 has none."""
    pairs = zip(origins, sizes, strict=True)
    return tuple((Part(origin, 1, size),) if size != 1 else () for origin, size in pairs)


def regrouped(axes: Axes, sizes: Sequence[int]) -> Axes | None:
    """The axes after a Reshape to other sizes, or before one; None if a part would be cut unevenly."""
    waiting = [part for axis in reversed(axes) for part in reversed(axis)]
    made = []
    for size in sizes:
        axis: list[Part] = []
        while size > 1:
            if not waiting:
                return None
            part = waiting.pop()
            if size % part.size == 0:
                axis.append(part)
                size //= part.size
            elif part.size % size == 0:
                inner = part.size // size
                axis.append(Part(part.origin, part.stride * inner, size))
                waiting.append(Part(part.origin, part.stride, inner))
                size = 1
            else:
                return None
        made.append(_joined(axis))
    return None if waiting else tuple(made)


def permuted(axes: Axes, order: Sequence[int]) -> Axes | None:
    """The axes in another order; None if it is no order of them."""
    is_order = sorted(order) == list(range(len(axes)))
    return tuple(axes[axis] for axis in order) if is_order else None


def _joined(axis: Iterable[Part]) -> tuple[Part, ...]:
    """The parts, with neighbours of one origin joined where one runs through the other."""
    made: list[Part] = []
    for part in axis:
        last = made[-1] if made else None
        if last is not None and last.origin == part.origin and last.stride == part.stride * part.size:
            made[-1] = Part(part.origin, part.stride, last.size * part.size)
        else:
            made.append(part)
    return tuple(made)


def inside(axes: Axes, size: int) -> int | None:
    """The axis with the numbers of a head; None if it was cut.

    Args:
        axes: The axes.
        size: The size of a head.
    """
    whole = Part(INSIDE, 1, size)
    return next((index for index, axis in enumerate(axes) if whole in axis), None)


def shared_heads(many: Sequence[Part], few: Sequence[Part]) -> int | None:
    """The number of heads of one layer that meet each head of the other, one after the other.

    Args:
        many: The parts that make the heads of one layer.
        few: Those of the other layer.

    Returns:
        g, if head h of the first meets head ⌊h / g⌋ of the second; None if they meet otherwise.
    """
    number, less = (prod(part.size for part in parts) for parts in (many, few))
    if number % less or number > _MOST_HEADS:
        return None
    share = number // less
    for head, indices in enumerate(combinations(*(range(part.size) for part in many))):
        spots: dict[int, int] = {}
        for part, index in zip(many, indices, strict=True):
            spots[part.origin] = spots.get(part.origin, 0) + index * part.stride
        other = 0
        for part in few:
            if part.origin not in spots:
                return None
            other = other * part.size + spots[part.origin] // part.stride % part.size
        if other != head // share:
            return None
    return share


_MOST_HEADS = 4096
"""More heads than any model has; every head is looked at."""
