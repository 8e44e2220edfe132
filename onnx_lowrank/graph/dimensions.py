"""Sizes that exporters write as sums and products of other sizes: "past_length + sequence_length"."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

# Bounds the digits of a product: longer texts give numbers that no message can show.
_LONGEST = 200
_FACTOR = r"\s*(?:[A-Za-z_][A-Za-z_0-9.]*|[0-9]{1,9})\s*"
_EXPRESSION = re.compile(rf"{_FACTOR}(?:[+*]{_FACTOR})+")


@dataclass(frozen=True, slots=True)
class Dimension:
    """A size as a polynomial in other sizes, Σ c · Π names.

    Attributes:
        terms: For every summand, the integer c and its names.
    """

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names in the dimension, in the order of the text, each once."""
        return tuple(dict.fromkeys(name for _, names in self.terms for name in names))

    def size(self, sizes: Mapping[str, int]) -> int:
        """The value of the dimension; `sizes` must have all its names."""
        return sum(factor * prod(sizes[name] for name in names) for factor, names in self.terms)

    def solved(self, total: int, sizes: Mapping[str, int]) -> tuple[str, int] | None:
        """Solve for the one size that is missing, given the value `total` of the dimension.

        Returns:
            The name and the value. None if no size or several sizes are missing, or if the equation has
            no unique solution among the whole numbers ≥ 0.
        """
        missing = [name for name in self.names if name not in sizes]
        if len(missing) != 1:
            return None
        slope = rest = 0
        for factor, names in self.terms:
            degree = Counter(names)[missing[0]]
            if degree > 1:  # not linear in the missing size
                return None
            value = factor * prod(sizes[name] for name in names if name != missing[0])
            slope, rest = (slope + value, rest) if degree else (slope, rest + value)
        if slope == 0 or (total - rest) % slope or (total - rest) // slope < 0:
            return None
        return missing[0], (total - rest) // slope


def parse(text: str) -> Dimension:
    """Parse the text of a dimension; a text that is no sum or product counts as one name."""
    if len(text) > _LONGEST or not _EXPRESSION.fullmatch(text):
        return Dimension(((1, (text,)),))
    terms = []
    for product in text.split("+"):
        factors = [factor.strip() for factor in product.split("*")]
        numbers = [int(factor) for factor in factors if factor.isdigit()]
        terms.append((prod(numbers), tuple(factor for factor in factors if not factor.isdigit())))
    return Dimension(tuple(terms))


def solve(stated: Iterable[tuple[Dimension, int]], sizes: Mapping[str, int]) -> dict[str, int]:
    """Find all sizes that follow from the known sizes and from the values of dimensions.

    Args:
        stated: Dimensions and their values; if two contradict each other, the first counts.
        sizes: The known sizes, by name.
    """
    found, stated = dict(sizes), list(stated)
    while new := next(filter(None, (dimension.solved(total, found) for dimension, total in stated)), None):
        found[new[0]] = new[1]
    return found
