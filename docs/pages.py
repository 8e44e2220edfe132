"""A hook of mkdocs: the page of the recipes, and links to files of the repository that have no page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Fill the page of the recipes, and write links that leave the pages as names of files."""
    if page.file.src_uri == "recipes.md":
        markdown = (ROOT / "passes" / "README.md").read_text(encoding="utf-8").replace("](../docs/", "](")
    markdown = markdown.replace("](../passes/README.md", "](recipes.md")
    return re.sub(r"\[([^\]]*)\]\(\.\./[^)]*\)", r"\1", markdown)
