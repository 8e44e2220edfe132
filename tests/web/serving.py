"""The page that runs digits and its compressed form in a browser.

`PYTHONPATH=models python tests/web/serving.py` serves it. npm installs onnxruntime-web into a temporary
folder.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import evaluate_digits

from onnx_lowrank import compress

PAGE = Path(__file__).parent / "digits.html"
DIGITS = Path(__file__).parents[2] / "models" / "digits.onnx"
RATIO = 0.5
_RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the base class
        """Nothing."""


def prepare(folder: Path) -> None:
    """Fill a folder with the page, both models, the digits and onnxruntime-web.

    Raises:
        subprocess.CalledProcessError: npm cannot install the package.
    """
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "onnxruntime-web"]
    with tempfile.TemporaryDirectory() as made:
        subprocess.run(install, cwd=made, check=True, capture_output=True)
        (folder / "ort").mkdir()
        for name in _RUNTIME:
            shutil.copy(Path(made, "node_modules", "onnxruntime-web", "dist", name), folder / "ort")
    shutil.copy(PAGE, folder / "index.html")
    shutil.copy(DIGITS, folder / "original.onnx")
    with compress(DIGITS, RATIO) as result:
        result.save(folder / "compressed.onnx")
    digits = evaluate_digits.load()
    pixels = digits.test_images.reshape(len(digits.test_images), -1)
    table = {"images": pixels.tolist(), "labels": digits.test_labels.tolist()}
    (folder / "digits.json").write_text(json.dumps(table))


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """The address of a server for a folder, on this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/"
    finally:
        server.shutdown()
        server.server_close()


def main() -> None:
    """Serve the page until Enter is pressed."""
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        with served(Path(folder)) as address:
            input(f"The page is at {address}; Enter ends it.")


if __name__ == "__main__":
    main()
