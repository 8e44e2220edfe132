"""MiniLM, a sentence encoder, in four exports: how like the original's are the embeddings?"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from trained.subject import Array, Feeds, Scores, Subject, opened, spread, unlike
from trained.text import Part, sentences

EXPORTS = {
    "minilm": "exported by TorchScript",
    "minilm_dynamo": "exported by dynamo",
    "minilm_fused": "after ONNX Runtime's optimizer for BERT, which makes Attention of Q, K and V",
    "minilm_fused_fp16": "the same in float16",
}
INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TOKENS = 64
CALIBRATION, TEST = 600, 1000  # sentences
_BATCH = 50
PARTS: tuple[Part, ...] = ("test", "other")
_GOALS = {
    ("macs", 0.8): {"cosine": 0.985, "rank correlation": 0.98},
    ("macs", 0.6): {"cosine": 0.955, "rank correlation": 0.94, "time": 0.7},
    ("params", 0.8): {"cosine": 0.993},
    ("params", 0.5): {"cosine": 0.93},
}
ABOUT = """
The model encodes sentences of Python's manual (`pydoc_data.topics`): 600 for calibration, 1,000 of other
topics for the test, 1,000 of docstrings of numpy and scipy as another kind, of 64 tokens each. "Cosine" is
the mean cosine of an embedding and that of the original, `minilm`. "Nearest kept" is the share of sentences
with the same nearest neighbour; "ten nearest kept" the share of the ten nearest; "rank correlation" is
Spearman's, of the similarities of all pairs.
"""


def subjects(real: Path) -> list[Subject]:
    """The four exports; all are compared with the first one's embeddings."""
    tokenizer, original = real / "minilm_tokenizer" / "tokenizer.json", real / "minilm.onnx"
    shapes = dict.fromkeys(INPUTS, (1, 128))
    return [
        Subject(
            name,
            real / f"{name}.onnx",
            about=f"MiniLM, {export}. {ABOUT}",
            calibration=lambda: _tokens(tokenizer, "calibration", CALIBRATION),
            scores=lambda model: _scores(model, original, tokenizer),
            shapes=shapes,
            times={"time": shapes},
            asked={"params": (0.8, 0.5), "macs": (0.8, 0.6)},
            beside=(tokenizer, original),
            needs=("tokenizers",),
            goals=_GOALS,
        )
        for name, export in EXPORTS.items()
    ]


@cache
def _tokens(tokenizer: Path, part: Part, number: int) -> Feeds:
    """Sentences as the model reads them, cut or padded to 64 tokens."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    encoder.enable_truncation(TOKENS)
    encoder.enable_padding(length=TOKENS)
    encoded = encoder.encode_batch(spread(sentences(part), number))
    rows = zip(INPUTS, ("ids", "attention_mask", "type_ids"), strict=True)
    return {name: np.array([getattr(text, field) for text in encoded], np.int64) for name, field in rows}


def _scores(model: Path, original: Path, tokenizer: Path) -> Scores:
    """The scores on held-out topics, and on docstrings."""
    found = []
    for part in PARTS:
        wanted = _embeddings(original, tokenizer, part)
        given = wanted if model == original else _embed(model, _tokens(tokenizer, part, TEST))
        found.append(_likeness(wanted, given))
    same, other = found
    return same | unlike(other)


@cache
def _embeddings(original: Path, tokenizer: Path, part: Part) -> Array:
    return _embed(original, _tokens(tokenizer, part, TEST))


def _embed(model: Path, feeds: Feeds) -> Array:
    session = opened(model)
    names = [value.name for value in session.get_inputs()]
    number = len(feeds[names[0]])
    starts = range(0, number, _BATCH)
    batches = ({name: feeds[name][start : start + _BATCH] for name in names} for start in starts)
    return np.concatenate([session.run(None, batch)[0] for batch in batches]).astype(np.float64)


def _likeness(wanted: Array, given: Array) -> Scores:
    """How well embeddings replace others, both of unit length, one a row."""
    before, after = wanted @ wanted.T, given @ given.T
    pairs = np.triu_indices(len(before), 1)
    ranks = [rankdata(similarities[pairs]) for similarities in (before, after)]
    first, second = _neighbours(before), _neighbours(after)
    return {
        "cosine": float(np.sum(wanted * given, axis=1).mean()),
        "nearest kept": float(np.mean(first[:, 0] == second[:, 0])),
        "ten nearest kept": float(np.mean([_share(*row) for row in zip(first, second, strict=True)])),
        "rank correlation": float(np.corrcoef(*ranks)[0, 1]),
    }


def _neighbours(similarities: Array) -> Array:
    """The ten most similar others of every row, the most similar first."""
    others = similarities - 4 * np.eye(len(similarities))
    return np.argsort(-others, axis=1)[:, :10]


def _share(wanted: Iterable[int], given: Iterable[int]) -> float:
    expected = set(wanted)
    return len(expected & set(given)) / len(expected)
