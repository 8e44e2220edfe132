"""From the data of a page to its text.

Names from a model are untrusted. The data are JSON without characters that end an element, the scripts show
them as text alone, and the page's own policy forbids every other script and every connection.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from onnx_lowrank.documents.json_text import to_text
from onnx_lowrank.errors import InputError

_FOLDER = Path(__file__).parent
_SCRIPTS = ("dom.js", "charts.js", "results.js", "layers.js", "page.js")
_LIBRARIES = ("plotly", "jinja2")
_UNSAFE = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def check_libraries() -> None:
    """Check that the libraries of a page are there.

    Raises:
        InputError: One is not installed.
    """
    for name in _LIBRARIES:
        if find_spec(name) is None:
            raise InputError(
                f'A page needs {name}, which is not installed: run `pip install "onnx-lowrank[report]"`.'
            )


def page(data: dict[str, Any]) -> str:
    """The page as HTML.

    Args:
        data: The data, from `data.of_run` or `data.of_sweep`.

    Raises:
        InputError: A library is not installed.
    """
    check_libraries()
    # Only runs that ask for a page load these.
    import jinja2
    from plotly.offline import get_plotlyjs

    files = jinja2.FileSystemLoader(_FOLDER)
    environment = jinja2.Environment(autoescape=True, loader=files, undefined=jinja2.StrictUndefined)
    scripts = (get_plotlyjs(), "\n".join(map(_text, _SCRIPTS)))
    return environment.get_template("page.html").render(
        title=data["model"],
        policy=" ".join(f"'sha256-{_digest(script)}'" for script in scripts),
        style=_text("style.css"),
        plotly=scripts[0],
        script=scripts[1],
        data=to_text(data).translate(_UNSAFE),
    )


@cache
def _text(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _digest(script: str) -> str:
    """The digest by which the policy knows a script."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
