"""One side of the comparison: its checkout, the runs of its command, and the outcomes that are known."""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from identity.cases import CHECKOUT, Case
from identity.comparison import Outcome

CACHE = user_cache_path("onnx-lowrank") / "identity"
PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "click", "rich", "ml-dtypes")
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
TIMEOUT = 900
"""Seconds after which a command is stopped."""

MEASURED = re.compile(r"(?<= in )[0-9.]+(?= s\b)|[0-9.]+(?= GiB in flight)")
"""Numbers that -v prints and that no two runs share: seconds, and a share of the free memory."""

# `python -m onnx_lowrank` of one tree, whose clock is replaced by its tests' recorded times.
LAUNCHER = """
import importlib.util, os, runpy, sys
from pathlib import Path
tree = Path(os.environ["PYTHONPATH"])
import onnx_lowrank
if not Path(onnx_lowrank.__file__).is_relative_to(tree):
    sys.exit("This is not the package of the tree: the witness has to learn where it is now.")
spec = importlib.util.spec_from_file_location("timing", tree / "tests" / "timing.py")
timing = importlib.util.module_from_spec(spec)
spec.loader.exec_module(timing)
measuring = timing.Recorded.__bases__[0]
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "onnx_lowrank":
        for key in [key for key, value in vars(module).items() if value is measuring]:
            setattr(module, key, timing.Recorded)
runpy.run_module("onnx_lowrank", run_name="__main__", alter_sys=True)
"""


def git(*words: str) -> str:
    """What a git command says.

    Raises:
        SystemExit: It failed.
    """
    done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        tell(f"git {' '.join(words)}: {done.stderr.strip()}")
        raise SystemExit(2)
    return done.stdout.strip()


@contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """Check out another revision in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-identity-") as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            git("worktree", "add", "--detach", "--quiet", str(tree), revision)
            yield tree
        finally:
            shutil.rmtree(tree, ignore_errors=True)
            git("worktree", "prune")


def outcome(case: Case, tree: Path, inputs: Path) -> Outcome:
    """Run a case with the package of a tree."""
    with tempfile.TemporaryDirectory(dir=inputs.parent, prefix="run-") as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        environment |= THREADS | {"PYTHONPATH": str(tree), "COLUMNS": "120", "NO_COLOR": "1"}
        environment |= {"XDG_CACHE_HOME": str(inputs.parent / "cache"), "PYTHONDONTWRITEBYTECODE": "1"}
        codes, stdout, stderr = [], [], []
        for words in case.commands:
            given = [f"../{inputs.name}/{word[1:]}" if word.startswith("@") else word for word in words]
            command = [sys.executable, "-c", LAUNCHER, *given]
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, timeout=TIMEOUT, check=False
            )
            codes.append(done.returncode)
            stdout.append(done.stdout.decode())
            stderr.append(MEASURED.sub("…", done.stderr.decode()))
        files = {path.name: _file(path) for path in sorted(Path(folder).rglob("*")) if path.is_file()}
    return {"codes": codes, "stdout": "".join(stdout), "stderr": "".join(stderr), "files": files}


def _file(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    if path.suffix == ".json":
        return {"text": data.decode()}
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def environment_key() -> str:
    """Everything that can change the bytes, except the program and its inputs."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else [platform.processor()]
    processor = sorted({line for line in lines if line.startswith(("model name", "flags"))}) or lines
    packages = {name: version(name) for name in PACKAGES}
    return json.dumps([packages, platform.python_version(), os.cpu_count(), processor, THREADS, LAUNCHER])


def key(case: Case, inputs: Path, environment: str) -> str:
    """The key of a case in the cache: a digest of its commands, the files they name and the environment."""
    digest = hashlib.sha256(json.dumps([case.commands, environment]).encode())
    named = {word[1:].partition(".")[0] for words in case.commands for word in words if word[0] == "@"}
    for path in sorted(inputs.iterdir()):
        if path.stem in named:
            digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class Known:
    """The outcomes of one revision on disk; there are none for a changed working tree."""

    def __init__(self, revision: str | None, inputs: Path) -> None:
        self._folder = None if revision is None else CACHE / revision
        self._inputs = inputs
        self._environment = environment_key()

    def _path(self, case: Case) -> Path | None:
        return self._folder and self._folder / f"{key(case, self._inputs, self._environment)}.json.gz"

    def get(self, case: Case) -> Outcome | None:
        """The known outcome of a case; None if there is none."""
        path = self._path(case)
        if path is None or not path.is_file():
            return None
        found: Outcome = json.loads(gzip.decompress(path.read_bytes()))
        return found

    def put(self, case: Case, result: Outcome) -> None:
        """Keep an outcome, whole or not at all."""
        if path := self._path(case):
            path.parent.mkdir(parents=True, exist_ok=True)
            partly = path.with_suffix(f".{os.getpid()}")
            partly.write_bytes(gzip.compress(json.dumps(result).encode()))
            partly.replace(path)


def run_all(chosen: Sequence[Case], tree: Path, inputs: Path, jobs: int) -> Iterator[tuple[Case, Outcome]]:
    """The outcomes of cases in their order, some at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        try:
            yield from zip(chosen, pool.map(partial(outcome, tree=tree, inputs=inputs), chosen), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def other_side(
    revision: str, chosen: Sequence[Case], inputs: Path, options: argparse.Namespace
) -> dict[str, Outcome]:
    """The outcomes of the other revision; only those that the cache lacks are computed."""
    known, begin = Known(revision, inputs), Since()
    found = {} if options.fresh else {case.name: known.get(case) for case in chosen}
    done = {name: result for name, result in found.items() if result is not None}
    missing = [case for case in chosen if case.name not in done]
    tell(f"{revision[:10]}: {len(done)} cases are known, {len(missing)} to run")
    if missing:
        with worktree(revision) as tree:
            for case, result in run_all(missing, tree, inputs, options.jobs):
                known.put(case, result)
                done[case.name] = result
    tell(f"{revision[:10]}: {begin.spent()}")
    return done


def committed() -> str | None:
    """The revision of the working tree; None if it has changes."""
    return None if git("status", "--porcelain") else git("rev-parse", "HEAD")


class Since:
    """Times since it was made."""

    def __init__(self) -> None:
        self._clock, self._processor = time.monotonic(), self._children()

    @staticmethod
    def _children() -> float:
        times = os.times()
        return times.children_user + times.children_system

    def spent(self) -> str:
        """Elapsed seconds, and the commands' processor seconds, which depend less on other work."""
        seconds, processor = time.monotonic() - self._clock, self._children() - self._processor
        return f"{seconds:.0f} s, {processor:.0f} s of the processor"


def tell(text: str) -> None:
    """Print progress for the user."""
    print(text, file=sys.stderr, flush=True)
