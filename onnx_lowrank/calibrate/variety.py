"""Further texts to fit to, with other tokens: a model also meets words that its calibration texts lack.

Some hundred texts hold a small part of a vocabulary, in few surroundings. A fit to them alone gives up
directions that other texts need. So some texts are read a second time, with random tokens at some places:

1. Every third text is repeated. Its copy belongs to the same share: it is fitted to, or judges the fit.
2. At most half of its tokens are replaced. Their share is half of the share of the vocabulary that the texts
   lack: texts that hold nearly all tokens are not repeated.
3. Copies do not count where the rows of tables are weighed by how often they are read.
4. Tokens that most texts hold stay (marks of their beginning and end), and so do hidden positions.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.calibrate.shares import Batch, Samples
from onnx_lowrank.engines.batches import samples as samples_of
from onnx_lowrank.engines.engine import Feed, RejectedError, UnsupportedError
from onnx_lowrank.engines.inputs import Spec, specs
from onnx_lowrank.engines.pasts import named_role
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.engines.vocabularies import vocabularies
from onnx_lowrank.files.load import Model

_log = logging.getLogger(__name__)

_EVERY = 3
"""One of three texts is repeated."""

_MOST = 0.5
"""The share of a repeated text's tokens that are replaced if the texts hold nothing of the vocabulary."""

_LEAST = 0.05
"""The least share of replaced tokens that is worth the time of a repeated text."""

_TRIED = 8  # copies that the model must take

_READ = 64  # texts at a time to count tokens


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of one input over all texts.

    Attributes:
        common: Whether most texts hold a token, shape (vocabulary,).
        share: The share of a repeated text's tokens that are replaced.
    """

    common: NDArray[np.bool_]
    share: float


@dataclass(frozen=True, slots=True)
class Varied:
    """Samples, and copies of some of them with random tokens.

    Attributes:
        samples: The samples.
        tokens: Their tokens, by input.
        wanted: The inputs of the model.
    """

    samples: Samples
    tokens: Mapping[str, Tokens]
    wanted: tuple[Spec, ...]

    @property
    def count(self) -> int:
        """Number of samples; repeated ones count once."""
        return self.samples.count

    def batches(self, size: int) -> Iterator[Batch]:
        """Read the data once; its batches are the same every time."""
        read = {False: 0, True: 0}
        for batch in self.samples.batches(size):
            yield batch
            number = samples_of(batch.feed, self.wanted)
            first = -read[batch.held] % _EVERY
            read[batch.held] += number or 1
            if first < (number or 1):
                feed = batch.feed if number is None else _every(batch.feed, first)
                yield replace(batch, feed=self._changed(feed))

    def are_taken(self, model: Model, engine: Engine) -> bool:
        """Whether a model takes the first copies: it may be undefined for some tokens."""
        feeds = (self._changed(batch.feed) for batch in self.samples.batches(1))
        try:
            with engine.open(model) as run:
                for feed in islice(feeds, _TRIED):
                    run(feed)
        except (UnsupportedError, RejectedError) as error:
            _log.debug("texts are not repeated, as the model does not take other tokens: %s", error)
            return False
        return True

    def _changed(self, feed: Feed) -> Feed:
        changed = {
            name: _replaced(feed[name], tokens, self._shown(feed, feed[name].shape))
            for name, tokens in self.tokens.items()
        }
        return {**feed, **changed}

    def _shown(self, feed: Feed, shape: tuple[int, ...]) -> NDArray[np.bool_]:
        """The positions that no mask of the same shape hides."""
        shown = np.ones(shape, bool)
        for spec in self.wanted:
            if named_role(spec) == "mask" and feed[spec.name].shape == shape:
                shown &= feed[spec.name] != 0
        return shown


def varied(model: Model, samples: Samples, engine: Engine) -> Samples:
    """Samples to fit to, with further texts if the model reads tokens that they lack, and takes others.

    Args:
        model: The model.
        samples: The samples.
        engine: Runs the model.
    """
    proto = model.proto
    known = vocabularies(proto)
    sizes = {
        spec.name: known[spec.name] for spec in specs(proto) if spec.name in known and _is_text(spec, known)
    }
    if not sizes:
        return samples
    seen = {name: np.zeros((2, size), np.int64) for name, size in sizes.items()}
    texts = dict.fromkeys(sizes, 0)
    for batch in samples.batches(_READ):
        for name, (ever, number) in seen.items():
            for row in _rows(batch.feed[name]):
                held = np.unique(row[(row >= 0) & (row < len(ever))])
                ever[held] = 1
                number[held] += 1
                texts[name] += 1
    tokens = {
        name: Tokens(2 * number >= texts[name], _MOST * (1 - float(ever.mean())))
        for name, (ever, number) in seen.items()
    }
    tokens = {name: found for name, found in tokens.items() if found.share >= _LEAST}
    for name, found in tokens.items():
        _log.debug("texts are repeated with %.0f %% other tokens in %r", 100 * found.share, name)
    made = Varied(samples, tokens, specs(proto))
    return made if tokens and made.are_taken(model, engine) else samples


def _is_text(spec: Spec, vocabulary: Mapping[str, int]) -> bool:
    """Whether an input holds tokens as integers that can be any of them, several for every sample."""
    has_rows = spec.shape is None or len(spec.shape) > 1
    is_whole = spec.dtype is not None and spec.dtype.kind in "iu"
    return has_rows and is_whole and np.iinfo(spec.dtype).max >= vocabulary[spec.name] - 1


def _every(feed: Feed, first: int) -> Feed:
    """The samples of a feed to repeat, from the first one on."""
    return {name: array[first::_EVERY] if array.ndim else array for name, array in feed.items()}


def _rows(ids: NDArray[Any]) -> NDArray[Any]:
    """The ids of every text; one text if they have no axis for several."""
    return ids.reshape(len(ids), prod(ids.shape[1:])) if ids.ndim > 1 else ids.reshape(1, ids.size)


def _replaced(ids: NDArray[Any], tokens: Tokens, shown: NDArray[np.bool_]) -> NDArray[Any]:
    """A copy of the ids of texts, with random tokens at some places; padding changes no draw."""
    made = ids.copy()
    for text, visible in zip(_rows(made), _rows(shown), strict=True):
        row = text[visible].astype(np.int64)
        random = np.random.default_rng(crc32(row.tobytes()))
        inside = np.clip(row, 0, len(tokens.common) - 1)
        chosen = (inside == row) & ~tokens.common[inside] & (random.random(row.shape) < tokens.share)
        row[chosen] = random.integers(len(tokens.common), size=row.shape)[chosen]
        text[visible] = row
    return made
