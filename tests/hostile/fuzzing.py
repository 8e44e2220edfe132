"""The command on mutated files of a kind: one file is mutated for every run."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from corpus import Kind
from trying import Run, Server


@dataclass(frozen=True, slots=True)
class Try:
    """A run on a mutated file.

    Attributes:
        file: The file; the next run replaces it.
        run: The run.
        fault: What the command must not do, in words; "" if it did none of it.
    """

    file: Path
    run: Run
    fault: str


class Fuzzer:
    """Mutates the files of a kind, and runs the command on them."""

    def __init__(self, server: Server, kind: Kind, folder: Path) -> None:
        """Make the good files.

        Args:
            server: Runs the command.
            kind: The kind.
            folder: An empty folder.
        """
        self._server, self._kind = server, kind
        self._good, self._place = folder / "good", folder / "place"
        self._good.mkdir()
        kind.make(self._good)
        self._files = sorted(path.relative_to(self._good) for path in self._good.glob(kind.files))
        assert self._files
        shutil.copytree(self._good, self._place)
        run = server.run(self._place, *kind.arguments)
        assert run.code == 0, run.err
        self._wanted = (self._place / "out.onnx").read_bytes()

    def tried(self, seed: int) -> Try:
        """Mutate a file, and run the command."""
        rng = np.random.default_rng(seed)
        shutil.rmtree(self._place)
        shutil.copytree(self._good, self._place)
        file = self._place / self._files[int(rng.integers(len(self._files)))]
        file.write_bytes(self._kind.mutate(rng, file.read_bytes()))
        run = self._server.run(self._place, *self._kind.arguments)
        return Try(file, run, run.fault or self._fault(run))

    def _fault(self, run: Run) -> str:
        out = self._place / "out.onnx"
        if run.code and out.exists():
            return "it failed and wrote a model"
        if self._kind.is_exact and (run.code or out.read_bytes() != self._wanted):
            return "it gave another result than with the good files"
        return "" if self._server.is_clean else "it left temporary files"
