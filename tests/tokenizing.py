"""Small tokenizers as files: one word, one token."""

from __future__ import annotations

import json
from pathlib import Path

CLS, SEP = 1, 2
FIRST = 3
"""The id of the word w0; w1 has the next one, and so on."""


def words(numbers) -> str:
    """A text of words of five letters with spaces between."""
    return " ".join(f"w{number:04d}" for number in numbers)


def written(path: Path, count: int, *, specials: bool = True, **replaced) -> Path:
    """Write a tokenizer of `count` words; with `specials` it adds [CLS] before a text and [SEP] after it."""
    vocabulary = {"[UNK]": 0, "[CLS]": CLS, "[SEP]": SEP}
    vocabulary |= {f"w{number:04d}": FIRST + number for number in range(count)}
    ids = {"[CLS]": CLS, "[SEP]": SEP}
    marks = [{"SpecialToken": {"id": name, "type_id": 0}} for name in ids]
    template = {
        "type": "TemplateProcessing",
        "single": [marks[0], {"Sequence": {"id": "A", "type_id": 0}}, marks[1]],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {name: {"id": name, "ids": [id_], "tokens": [name]} for name, id_ in ids.items()},
    }
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": template if specials else None,
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
    }
    path.write_text(json.dumps(tokenizer | replaced))
    return path
