"""SmolLM2, a decoder: how much does its perplexity grow, and how fast are a prompt and one more token?"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from trained.subject import Array, Feeds, Scores, Shapes, Subject, opened, spread, unlike
from trained.text import Part, paragraphs

TOKENS = 128
CALIBRATION, TEST = 64, 48  # windows
_BATCH = 4
_GOALS = {
    ("macs", 0.8): {"perplexity ratio": 1.3},
    ("params", 0.8): {"perplexity ratio": 1.6},
    ("macs", 0.6): {"prefill": 0.7, "decode": 0.7},
}
ABOUT = """
SmolLM2-135M reads windows of 128 tokens: 64 of Python's manual for calibration, 48 of other topics for the
test, 48 of docstrings as another kind. The ratio is the perplexity over the original's. "Prefill" is 1×128
tokens without a past; "decode" is one token after 128. The times of `output` are those of models of an
earlier version of the program, at the same ratios, and those at 0.6 of one without recovery.
"""


def subjects(real: Path) -> list[Subject]:
    """The decoder with its past as inputs."""
    folder = real / "smollm2"
    model, config, tokenizer = (folder / name for name in ("model.onnx", "config.json", "tokenizer.json"))
    if not config.exists():
        prefill, decode = {}, {}
    else:
        prefill, decode = _shapes(config, TOKENS, 0), _shapes(config, 1, TOKENS)
    return [
        Subject(
            "smollm2",
            model,
            about=ABOUT,
            calibration=lambda: _feeds(config, _windows(tokenizer, "calibration", CALIBRATION)),
            scores=lambda compressed: _scores(compressed, folder),
            shapes=prefill,
            times={"prefill": prefill, "decode": decode},
            asked={"macs": (0.9, 0.8, 0.7, 0.6), "params": (0.8,)},
            beside=(config, tokenizer),
            needs=("tokenizers",),
            goals=_GOALS,
        )
    ]


def _shapes(config: Path, tokens: int, past: int) -> Shapes:
    """The shapes of all inputs for one sequence: so many new tokens after so many past ones."""
    own = {"input_ids": (1, tokens), "attention_mask": (1, past + tokens), "position_ids": (1, tokens)}
    return own | dict.fromkeys(_past_names(config), (1, *_past_shape(config, past)))


def _past_names(config: Path) -> list[str]:
    layers = json.loads(config.read_text(encoding="utf-8"))["num_hidden_layers"]
    return [f"past_key_values.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def _past_shape(config: Path, length: int) -> tuple[int, int, int]:
    """Heads of keys and values, the past's length, and the size of a head."""
    stated = json.loads(config.read_text(encoding="utf-8"))
    size = stated.get("head_dim") or stated["hidden_size"] // stated["num_attention_heads"]
    return stated["num_key_value_heads"], length, size


@cache
def _windows(tokenizer: Path, part: Part, number: int) -> Array:
    """Windows of 128 tokens of running text, at even distances in it, none overlapping another."""
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_file(str(tokenizer))
    ids = encoder.encode("\n\n".join(paragraphs(part))).ids
    starts = range(0, len(ids) - TOKENS, TOKENS)
    return np.array([ids[start : start + TOKENS] for start in spread(starts, number)], np.int64)


def _feeds(config: Path, windows: Array) -> Feeds:
    """The first call of a conversation: all tokens are new, and the past has none."""
    positions = np.broadcast_to(np.arange(windows.shape[1]), windows.shape)
    own = {"input_ids": windows, "attention_mask": np.ones_like(windows), "position_ids": positions.copy()}
    past = np.zeros((len(windows), *_past_shape(config, 0)), np.float32)
    return own | dict.fromkeys(_past_names(config), past)


def _scores(model: Path, folder: Path) -> Scores:
    """Perplexities over the original's, on held-out topics and on docstrings."""
    original = _original(folder)
    found = original if model == folder / "model.onnx" else _perplexities(model, folder)
    same, other = (
        {"perplexity ratio": after / before, "perplexity": after}
        for before, after in zip(original, found, strict=True)
    )
    return same | unlike(other)


@cache
def _original(folder: Path) -> tuple[float, float]:
    return _perplexities(folder / "model.onnx", folder)


def _perplexities(model: Path, folder: Path) -> tuple[float, float]:
    """Perplexities on the test's windows and on those of docstrings."""
    session = opened(model)
    names = {value.name for value in session.get_inputs()}
    losses = []
    for part in ("test", "other"):
        windows, found = _windows(folder / "tokenizer.json", part, TEST), []
        for start in range(0, len(windows), _BATCH):
            batch = windows[start : start + _BATCH]
            feeds = {k: v for k, v in _feeds(folder / "config.json", batch).items() if k in names}
            found.append(_losses(session.run(["logits"], feeds)[0], batch))
        losses.append(float(np.exp(np.mean(np.concatenate(found)))))
    return losses[0], losses[1]


def _losses(logits: Array, tokens: Array) -> Array:
    """Of every token but the first −log of its probability, given those before it."""
    scores = logits[:, :-1].astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(scores, tokens[:, 1:, None], axis=-1)[..., 0]
    return np.asarray(np.log(np.exp(scores).sum(axis=-1)) - chosen)
