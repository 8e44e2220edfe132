"""Greedy continuation of prompts: whether a compressed decoder writes the tokens of the original.

Rules:

1. A decoder has an input for the ids of tokens, and for every past input (past_key_values.0.key) an output
   with the same name after its prefix (present.0.key). Further inputs are masks, positions, token types and
   use_cache_branch. Its logits are the output of that name, or the only one beside the presents.
2. The first call of a prompt has a past of length 0; every later call has one token, and the outputs of the
   call before as its past. So caches are tried, which no comparison of single calls does.
3. Every model continues its own text. A token agrees if it equals the original's at the same place, so one
   early difference can make all later tokens differ.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnx_lowrank.core.outcome import Continuation
from onnx_lowrank.engines.engine import Feed, RejectedError, Run, UnsupportedError
from onnx_lowrank.engines.id_limits import id_limits
from onnx_lowrank.engines.inputs import Spec, outputs, specs
from onnx_lowrank.engines.made import first_call, past_axis
from onnx_lowrank.engines.pasts import named_role
from onnx_lowrank.engines.running import Engine
from onnx_lowrank.files.load import Model, ModelProto

_log = logging.getLogger(__name__)

_RANKS = {"past": 6, "branch": 1, "mask": 2, "types": 2, "positions": 2}
"""The most axes of an input of each role."""

PROMPTS = 8
"""The most prompts that are continued."""

STEPS = 16
"""The most tokens by which a prompt is continued."""

LONGEST = 64
"""The most tokens of a prompt: the scores of all its tokens are in memory, for all prompts.

A prompt is half a text, so more also needs longer texts than the usual 128 tokens."""

_PREFIX = re.compile(r"(past|present)([._]?(key_values?|kv|states?))?[._]?")

Ids = NDArray[np.int64]
"""The ids of tokens."""


@dataclass(frozen=True, slots=True)
class Decoder:
    """The inputs and outputs by which a decoder continues a text (rule 1).

    Attributes:
        inputs: All inputs.
        ids: The name of the input for ids.
        roles: The roles of the other inputs, by name (`pasts.named_role`).
        logits: The name of the output of scores.
        presents: The output that is the next call's past, for every past input.
        positions: The number of positions that the model has; None if it is unknown.
    """

    inputs: tuple[Spec, ...]
    ids: str
    roles: Mapping[str, str]
    logits: str
    presents: Mapping[str, str]
    positions: int | None

    @property
    def batches(self) -> bool:
        """Whether one call can have several texts: ids and past have a first axis of one name."""
        firsts = {s.shape[0] for s in self.inputs if s.shape and s.name in (self.ids, *self.presents)}
        return len(firsts) == 1 and all(isinstance(first, str) for first in firsts)

    def greedy(self, run: Run, texts: Ids, steps: int = STEPS) -> Ids:
        """The tokens with which a model continues texts, the likeliest one at each step (rule 2).

        Args:
            run: Runs the model.
            texts: The ids of texts of one length, shape (texts, tokens); one text unless the model `batches`.
            steps: Number of tokens; fewer if the model has too few positions.

        Returns:
            The ids of the tokens, shape (texts, steps).

        Raises:
            UnsupportedError: The engine does not run the model.
            RejectedError: The model fails, or gives no scores.
        """
        past = _empty(self.inputs, self.ids, self.presents, len(texts))
        found = [texts[:, :0]]
        tokens, length = texts, 0
        while len(found) <= steps and (self.positions is None or length + tokens.shape[1] <= self.positions):
            made = run(past | self._others(tokens, length))
            scores = np.asarray(made[self.logits])
            if scores.ndim != 3 or not scores.size or len(scores) != len(texts):
                raise RejectedError(f"its scores have the shape {scores.shape}")
            past = {name: made[present] for name, present in self.presents.items()}
            length += tokens.shape[1]
            tokens = scores[:, -1].argmax(axis=1)[:, None]
            found.append(tokens)
        return np.concatenate(found, axis=1)

    def _others(self, tokens: Ids, length: int) -> dict[str, NDArray[Any]]:
        """The inputs beside the past, for some tokens behind a past of a length."""
        number, new = tokens.shape
        positions = length + np.arange(new)
        values = {
            "mask": np.ones((number, length + new)),
            "types": np.zeros(tokens.shape),
            "positions": np.tile(positions, (number, 1)),
            "branch": np.full(1, length > 0),
        }
        found = {self.ids: tokens.astype(next(s.dtype for s in self.inputs if s.name == self.ids))}
        for spec in self.inputs:
            if spec.name in self.roles and spec.name not in self.presents:
                value = values[self.roles[spec.name]]
                value = positions if value.ndim == 2 and len(spec.shape or (0, 0)) == 1 else value
                found[spec.name] = value.astype(spec.dtype)
        return found


def decoder(proto: ModelProto) -> Decoder | str:
    """The interface of a decoder with a cache, or the reason why a model has none, a phrase (rule 1)."""
    inputs, results = specs(proto), outputs(proto)
    roles = {spec.name: role for spec in inputs if (role := named_role(spec)) is not None}
    pasts = [spec for spec in inputs if roles.get(spec.name) == "past"]
    if not pasts:
        return "it has no past among its inputs"
    others = [spec for spec in inputs if spec.name not in roles]
    if len(others) != 1 or np.dtype(others[0].dtype).kind not in "iu" or len(others[0].shape or ()) != 2:
        return "its inputs besides the past are not only the ids of tokens, masks and positions"
    ids = others[0].name
    if any(len(spec.shape or ()) > _RANKS[roles[spec.name]] for spec in inputs if spec.name in roles):
        return "its mask or its positions have more axes than two"
    presents = _presents(pasts, results)
    if len(presents) < len(pasts):
        return f"no output belongs to the past {next(s.name for s in pasts if s.name not in presents)!r}"
    logits = [spec for spec in results if spec.name not in presents.values()]
    named = [spec for spec in logits if spec.name == "logits"] or logits
    if len(named) != 1 or len(named[0].shape or ()) != 3:
        return "which of its outputs are the scores of the next token is not clear"
    full = next((name for name, array in _empty(inputs, ids, presents, 1).items() if array.size), None)
    if full is not None:
        return f"the past {full!r} cannot be empty"
    limits = id_limits(proto)
    positions = [limits[name] for name, role in roles.items() if role == "positions" and name in limits]
    return Decoder(inputs, ids, roles, named[0].name, presents, min(positions, default=None))


def _empty(inputs: Sequence[Spec], ids: str, pasts: Container[str], number: int) -> dict[str, NDArray[Any]]:
    """The past of a first call with a number of texts, by input; it has elements if its length is fixed."""
    shapes = first_call(tuple(inputs), {ids: (number, 1)}, 1)
    found = {}
    for spec in inputs:
        if spec.name in pasts:
            shape, axis = list(shapes[spec.name]), past_axis(spec)
            if not isinstance((spec.shape or ())[axis], int):
                shape[axis] = 0
            found[spec.name] = np.zeros(shape, spec.dtype)
    return found


def _presents(pasts: Iterable[Spec], results: Iterable[Spec]) -> dict[str, str]:
    """For every past input the output with the same name after its prefix, of the same type and rank."""
    by_name = {_rest(spec.name): spec for spec in results if spec.name.lower().startswith("present")}
    pairs = ((past, by_name.get(_rest(past.name))) for past in pasts)
    return {past.name: found.name for past, found in pairs if found is not None and _alike(past, found)}


def _alike(past: Spec, present: Spec) -> bool:
    """Whether an output can be the next call's past: only sizes that a name stands for may differ."""
    if past.dtype != present.dtype:
        return False
    if past.shape is None or present.shape is None:
        return True
    both = zip(past.shape, present.shape, strict=False)
    fits = all(a == b or not (isinstance(a, int) and isinstance(b, int)) for a, b in both)
    return fits and len(past.shape) == len(present.shape)


def _rest(name: str) -> str:
    """The name of a past or a present after its prefix."""
    return _PREFIX.sub("", name.lower(), count=1)


def prompts(known: Decoder, feeds: Iterable[Feed]) -> list[Ids]:
    """The first halves of the texts in feeds, without padding, each of shape (tokens,); at most `PROMPTS`.

    A half that is longer than `LONGEST` loses its beginning.

    Args:
        known: The decoder.
        feeds: Its inputs.
    """
    found: list[Ids] = []
    mask = next((name for name, role in known.roles.items() if role == "mask"), None)
    for feed in feeds:
        ids = feed[known.ids].astype(np.int64)
        # A mask covers the past, too.
        shown = np.ones(ids.shape, bool) if mask is None else feed[mask][..., -ids.shape[-1] :] != 0
        for row, seen in zip(ids, np.broadcast_to(shown, ids.shape), strict=True):
            text = row[seen]
            if len(text) and len(found) < PROMPTS:
                found.append(text[: max(1, len(text) // 2)][-LONGEST:])
        if len(found) == PROMPTS:
            break
    return found


def _together(texts: Sequence[Ids], known: Decoder) -> list[Ids]:
    """Texts of one length as one array, if the decoder takes several at once; a single text is one row."""
    if not known.batches:
        return [text[None] for text in texts]
    lengths = dict.fromkeys(map(len, texts))
    return [np.stack([text for text in texts if len(text) == length]) for length in lengths]


def continued(
    original: Model, compressed: Model, engine: Engine, feeds: Iterable[Feed]
) -> Continuation | None:
    """Compare the greedy continuations of both models (rule 3); None if the model has no cache to try.

    Args:
        original: The input model.
        compressed: The compressed model.
        engine: Runs both.
        feeds: Inputs of the models, whose first halves are the prompts.

    Raises:
        RejectedError: Only the compressed model fails.
        UnsupportedError: Likewise.
    """
    known = decoder(original.proto)
    if isinstance(known, str):
        _log.debug("no text is continued: %s", known)
        return None
    texts = prompts(known, feeds)
    groups = _together(texts, known)
    try:
        with engine.open(original) as run:
            wanted = [known.greedy(run, group) for group in groups]
    except (UnsupportedError, RejectedError) as error:
        _log.debug("no text is continued: the model fails on a prompt (%s)", error)
        return None
    with engine.open(compressed) as run:
        given = [known.greedy(run, group) for group in groups]
    tokens = sum(tokens.size for tokens in wanted)
    agreed = sum(int(np.count_nonzero(ours == theirs)) for ours, theirs in zip(wanted, given, strict=True))
    if not tokens:
        _log.debug("no text is continued: the model has no positions behind the prompts")
        return None
    return Continuation(len(texts), tokens, agreed)
