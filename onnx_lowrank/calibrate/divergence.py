"""The error of a language model's scores: the divergence of the distributions over tokens.

A row of scores (logits) has an element for every token of the vocabulary, and its softmax is the distribution
of the token there. The model is as good as the distributions are, and thousands of unlikely tokens count for
nothing in them, while ‖y − ŷ‖² is almost only their sum. So scores are compared by

    error = Σ KL(p ‖ p̂) / Σ KL(p ‖ p̄),

summed over the positions; p̄ is the mean of all p. The logarithm of the perplexity is a cross-entropy: on
texts that the original model writes, it grows by the mean of KL(p ‖ p̂).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS = 64  # that are in memory as distributions


def are_token_scores(
    scores: NDArray[Any], feed: Mapping[str, NDArray[Any]], vocabulary: Mapping[str, int]
) -> bool:
    """Whether an output has an element for every token of the vocabulary, at each position of the ids.

    Args:
        scores: The output.
        feed: The inputs of the model.
        vocabulary: The number of tokens for each input of ids.
    """
    return scores.ndim == 3 and any(
        scores.shape == (*feed[name].shape, tokens) for name, tokens in vocabulary.items() if name in feed
    )


def log_shares(scores: NDArray[Any]) -> NDArray[np.float32]:
    """The logarithm of the softmax of every row."""
    shifted = scores.astype(np.float32) - scores.max(axis=-1, keepdims=True).astype(np.float32)
    found: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def divergence(wanted: NDArray[np.float32], scores: NDArray[Any]) -> float:
    """Σ KL(p ‖ p̂) over the rows; infinite if p̂ is not finite there.

    Args:
        wanted: log p, shape (…, tokens); rows of NaN do not count.
        scores: The scores whose softmax is p̂, of the same shape.
    """
    total = 0.0
    rows, others = (array.reshape(-1, array.shape[-1]) for array in (wanted, scores))
    counted = np.flatnonzero(~np.isnan(rows[:, 0]))
    for start in range(0, len(counted), _ROWS):
        part = counted[start : start + _ROWS]
        if not np.isfinite(others[part]).all():
            return float("inf")
        total += _divergence(rows[part], log_shares(others[part]))
    return total


def spread(batches: Sequence[NDArray[np.float32]]) -> float:
    """Σ KL(p ‖ p̄) over the rows of all batches of log p, with the mean p̄ of all rows."""
    rows = [row for batch in batches for row in batch.reshape(-1, batch.shape[-1]) if not np.isnan(row[0])]
    if not rows:
        return 0.0
    mean = np.zeros(len(rows[0]))
    for row in rows:
        mean += np.exp(row)
    with np.errstate(divide="ignore"):
        log_mean = np.log(mean / len(rows))
    return sum(_divergence(row, log_mean) for row in rows)


def _divergence(log_p: NDArray[Any], log_q: NDArray[Any]) -> float:
    """Σ p (log p − log q); terms with p = 0 are 0."""
    p = np.exp(log_p)
    with np.errstate(invalid="ignore"):  # 0 · ∞ where both are 0
        terms = np.where(p > 0, p * (log_p - log_q), 0)
    return max(float(terms.sum(dtype=np.float64)), 0.0)
