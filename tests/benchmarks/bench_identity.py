"""Check of refactorings: the command gives the same results as at another revision, to the byte.

    python tests/benchmarks/bench_identity.py --against REV [--only GLOB] [--quick] [--jobs N] [--json FILE]

REV is checked out into a temporary worktree, and both trees run the command over the same cases: models,
recipes, budgets, with calibration and without, replayed plans, and commands that fail. The script compares
the exit codes, the printed text, every written file (models and their external data by their bytes), and
every field of plans and reports. It prints one line for each case, and exits with 1 if any case differs.

Every command is `python -m onnx_lowrank` in its own process, with one BLAS thread. This script uses no name
inside the package, because modules may move between the two revisions. Clocks do not repeat, so no times are
measured: each tree's `Recorded` stopwatch from tests/timing.py replaces the stopwatch of the package in every
module that uses it. So `--budget latency` takes part, and every key of a report is compared.

Models, inputs and the names of recipes come from the working tree, so they are the same on both sides. Models
of ../shared take part if that folder exists: beside the checkout, beside the main checkout of a worktree, or
at the path given by --shared.

The results of REV are kept in the user's cache folder, by revision, command, inputs, packages and processor.
So are the results of the working tree, if it is a commit without changes: a step from commit to commit runs
only one side.

Name a difference that a change is meant to make; everything else stays strict:

    --allow "*latency*:report.warnings*" --allow "errors/no-input:stderr*"
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
from platformdirs import user_cache_path

CHECKOUT = Path(__file__).parents[2]
CACHE = user_cache_path("onnx-lowrank") / "identity"
PACKAGES = ("numpy", "onnx", "onnx-graphsurgeon", "onnxruntime", "scipy", "click", "rich", "ml-dtypes")
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
TIMEOUT = 900
"""Seconds after which a command is stopped."""

SHOWN = 6
"""So many differences of a case are printed; `--json` has them all."""

LONGEST = 100
"""Characters of a value that are printed."""

ABSENT = "absent"

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

Outcome = dict[str, Any]
"""Of one case: codes (one a command), stdout and stderr, and files, each as a text or by its digest."""


# --- what is compared ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Difference:
    """One field that is not the same.

    Attributes:
        path: Of the field, as in report.layers[3].error.
        before: Its value at the other revision, as JSON, or `ABSENT`.
        after: Its value in the working tree, as JSON, or `ABSENT`.
    """

    path: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}: {_short(self.before)} → {_short(self.after)}"


def differences(before: Outcome, after: Outcome) -> list[Difference]:
    """All differences between two outcomes of a case; none if they are the same to the byte."""
    old, new = dict(_leaves(_fields(before))), dict(_leaves(_fields(after)))
    found = [
        Difference(path, old.get(path, ABSENT), new.get(path, ABSENT))
        for path in old | new
        if old.get(path) != new.get(path)
    ]
    named = {re.split(r"[.\[]", difference.path)[0] for difference in found}
    texts, others = _texts(before), _texts(after)
    return found + [
        Difference(name, "the same fields", "in other bytes")
        for name, text in texts.items()
        if name in others and name not in named and text != others[name]
    ]


def _fields(outcome: Outcome) -> dict[str, Any]:
    """An outcome with its texts as lines, and with JSON texts parsed."""
    parts = {"code": outcome["codes"]}
    parts |= {name: _parsed(text) for name, text in _texts(outcome).items()}
    binary = {name: file for name, file in outcome["files"].items() if "text" not in file}
    return parts | {name: f"{file['bytes']} bytes, sha256 {file['sha256']}" for name, file in binary.items()}


def _texts(outcome: Outcome) -> dict[str, str]:
    texts = {name.removesuffix(".json"): file.get("text") for name, file in outcome["files"].items()}
    written = {name: text for name, text in texts.items() if text is not None}
    return {"stdout": outcome["stdout"], "stderr": outcome["stderr"]} | written


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text.splitlines()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The paths of all leaves, and their values as JSON, which tells 1 from 1.0."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, json.dumps(value, ensure_ascii=False)


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def is_allowed(case: str, difference: Difference, globs: Sequence[str]) -> bool:
    """Whether a glob over `case:field` matches a difference; the glob's brackets are literal."""
    return any(fnmatchcase(f"{case}:{difference.path}", glob.replace("[", "[[]")) for glob in globs)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison of one case.

    Attributes:
        case: Its name.
        differs: The differences that are not allowed.
        allowed: The differences that --allow names.
    """

    case: str
    differs: tuple[Difference, ...]
    allowed: tuple[Difference, ...]

    @property
    def status(self) -> str:
        """One of same, allowed and differs."""
        return "differs" if self.differs else "allowed" if self.allowed else "same"

    def line(self) -> str:
        """The verdict in one line."""
        said = [
            f"{word}: {_listed(found)}"
            for word, found in (("differs", self.differs), ("allowed", self.allowed))
            if found
        ]
        return f"{self.case}: {'; '.join(said) or 'same'}"


def judged(case: str, before: Outcome, after: Outcome, allow: Sequence[str] = ()) -> Verdict:
    """Compare two outcomes of a case.

    Args:
        case: Its name.
        before: The outcome of the other revision.
        after: The outcome of the working tree.
        allow: Globs over `case:field` of differences that are expected.
    """
    found = differences(before, after)
    allowed = tuple(one for one in found if is_allowed(case, one, allow))
    return Verdict(case, tuple(one for one in found if one not in allowed), allowed)


def summary(verdicts: Sequence[Verdict]) -> str:
    """The number of cases of each status."""
    counts = {word: sum(one.status == word for one in verdicts) for word in ("same", "differs", "allowed")}
    allowed = f", {counts['allowed']} allowed" if counts["allowed"] else ""
    return f"{len(verdicts)} cases, {counts['same']} same, {counts['differs']} differ{allowed}"


def _listed(found: Sequence[Difference]) -> str:
    more = f", and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return ", ".join(map(str, found[:SHOWN])) + more


# --- the cases ----------------------------------------------------------------------------------------

Words = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Case:
    """Commands that run in turn in an empty folder.

    Attributes:
        name: The printed name, which --only and --allow match.
        commands: The arguments of each command; `@NAME` stands for a file of the inputs.
    """

    name: str
    commands: tuple[Words, ...]

    @property
    def is_quick(self) -> bool:
        """Whether --quick includes it."""
        return matches(self.name, QUICK) and not matches(self.name, NOT_QUICK)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that takes part.

    Attributes:
        name: The name of the model.
        shapes: Input shapes that make its MACs known.
        samples: The number of its calibration inputs; 0 for no calibration.
        file: Its name in ../shared/models; "" for a model of this project.
        budgets: The budgets for recipes that need no calibration.
        fitted: The budgets for runs with calibration.
    """

    name: str
    shapes: Mapping[str, str]
    samples: int = 0
    file: str = ""
    budgets: Words = ("params", "macs")
    fitted: Words = ("params",)

    @property
    def shape_words(self) -> Words:
        """The options that state the shapes."""
        return tuple(
            word for name, sizes in self.shapes.items() for word in ("--input-shape", f"{name}={sizes}")
        )


_IMAGE = {"image": "1,3,224,224"}
_SOUND = {"input": "1,512", "state": "2,1,128"}
_TOKENS = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), "1,32")
_PAST = {"input_ids": "1,4", "past_key_values_0_key": "1,2,3,8"}
_ALL = ("params", "macs", "latency")
SUBJECTS = (
    Subject("digits", {"image": "1,1,8,8"}, 64, budgets=_ALL, fitted=_ALL),
    Subject("resnet20", {"input": "1,3,32,32"}, 64, "resnet20_cifar10", _ALL, _ALL),
    Subject("magika", {"bytes": "1,2048"}, 24, "magika_v3_3", _ALL),
    Subject("ultraface", {"input": "1,3,240,320"}, 6, "ultraface_rfb320"),
    Subject("silero_vad", _SOUND, file="silero_vad"),
    Subject("silero_vad_half", _SOUND, file="silero_vad_half", budgets=_ALL),
    Subject("resnet18", _IMAGE, budgets=_ALL),
    Subject("mobilenet_v2", _IMAGE),
    Subject("vit_b_16", _IMAGE),
    Subject("bert_base", _TOKENS, 32, budgets=_ALL),
    Subject("float16", _IMAGE),
    Subject("external", {"image": "1,1,8,8"}, budgets=("params", "macs", "bytes")),
    Subject("external_bert", _TOKENS, budgets=("params", "bytes")),
    Subject("operators", {}, budgets=("params", "macs", "bytes")),
    Subject("decoder", _PAST, budgets=("params", "macs")),
)
OPERATORS = """
<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
operators (float[2,6,24] x) => (float[2,6,24] y)
<int64[1] one = {1}, float[2,6,24] b, float[2,6,24] c> {
  a = Einsum <equation = "bsc,cf->bsf"> (x, einsum)
  r = Relu (a)
  b = com.microsoft.FusedMatMul <alpha = 0.5> (r, fused)
  c = com.microsoft.Attention <num_heads = 4> (b, attention, bias)
  t = Transpose <perm = [1, 0, 2]> (c)
  h = GRU <hidden_size = 24> (t, gru, state)
  s = Squeeze (h, one)
  y = Transpose <perm = [1, 0, 2]> (s)
}
"""
"""One operator of each family that the other subjects lack."""
ZOO = {
    "resnet18": ("resnet18", "float32"),
    "mobilenet_v2": ("mobilenet_v2", "float32"),
    "vit_b_16": ("vit_b_16", "float32"),
    "bert_base": ("bert_base", "float32"),
    "float16": ("resnet18", "float16"),
}
"""The network and dtype of every subject of models/zoo.py; an eighth of its width."""

QUICK = ("ways/*", "errors/*", "digits/*", "*/params/schatten", "resnet20/*/pca+calibration")
"""The cases of --quick, except those in `NOT_QUICK`."""

NOT_QUICK = (
    *("digits/[ml]*/power", "digits/[ml]*/svd*", "digits/[ml]*/alds-plus"),
    *("digits/macs/*+calibration", "digits/latency/[!a]*+calibration", "digits/latency/activation*"),
)
"""Cases that resemble other quick cases, so --quick leaves them out."""

WRITTEN = ("--save-plan", "plan.json", "--report", "report.json", "--device", "cpu", "--quiet")


def recipes() -> dict[str, bool]:
    """The names of the recipes of the working tree, and whether each needs calibration."""
    found = {}
    for path in sorted((CHECKOUT / "passes").glob("*.toml")):
        keys = tomllib.loads(path.read_text(encoding="utf-8"))
        is_fitted = keys.get("factors") == "activations"
        found[path.stem] = is_fitted or keys.get("measure") in ("activation", "output")
    return found


def matches(name: str, globs: Sequence[str]) -> bool:
    """Whether one of the globs is of the name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def cases(names: Sequence[str]) -> Iterator[Case]:
    """All cases of the subjects of these names, and those of commands, which need the digits alone."""
    for subject in SUBJECTS:
        if subject.name in names:
            yield from _by_weights(subject)
            yield from _calibrated(subject)
    yield from _ways(next(subject for subject in SUBJECTS if subject.name == "digits"))
    yield from _failing()


def _run(subject: Subject, *words: str) -> Words:
    return (f"@{subject.name}.onnx", "out.onnx", *WRITTEN, *subject.shape_words, *words)


def _by_weights(subject: Subject) -> Iterator[Case]:
    names = [name for name, is_calibrated in recipes().items() if not is_calibrated]
    for budget in subject.budgets:
        for recipe in names:
            command = _run(subject, "--ratio", "0.6", "--pass", recipe, "--budget", budget)
            yield Case(f"{subject.name}/{budget}/{recipe}", (command,))


def _calibrated(subject: Subject) -> Iterator[Case]:
    if not subject.samples:
        return
    fitting = [name for name, is_calibrated in recipes().items() if is_calibrated]
    given = ("--calibration", f"@{subject.name}.npz", "--calibration-samples", str(subject.samples))
    for budget in subject.fitted:
        for recipe in ("auto", *fitting, "schatten"):
            command = _run(subject, "--ratio", "0.6", "--pass", recipe, "--budget", budget, *given)
            yield Case(f"{subject.name}/{budget}/{recipe}+calibration", (command,))


def _ways(digits: Subject) -> Iterator[Case]:
    """Options of the command, on the digits."""
    given = ("--calibration", "@digits.npz", "--calibration-samples", "64")
    half = ("--ratio", "0.5")
    options = {
        "align": (*half, "--align", "8"),
        "align-auto": (*half, "--align", "auto"),
        "include": ("--ratio", "0.7", "--include", "blocks.2*"),
        "exclude": ("--ratio", "0.7", "--exclude", "*conv2*"),
        "max-error": (*half, "--max-error", "0.9"),
        "inputs": (*half, "--inputs", "@digits.npz"),
        "dry-run": (*half, "--dry-run"),
        "bytes": (*half, "--budget", "bytes"),
        "workers": (*half, "--workers", "2"),
        "workers-calibrated": (*half, *given, "--pass", "pca", "--workers", "2"),
        "time": (*half, "--time"),
        "verbose": (*half, "-v"),
        "recipe-file": (*half, "--pass", "@own.toml"),
        "report-to-stdout": (*half, "--report", "-"),
        "no-recover": (*half, *given, "--no-recover", "--pass", "activation"),
        "target-error": ("--target-error", "0.1", *given, "--pass", "activation"),
        "target-agreement": ("--target-agreement", "0.95", *given, "--pass", "pca"),
    }
    for name, words in options.items():
        yield Case(f"ways/{name}", (_run(digits, *words),))
    fitted = (*half, "--pass", "output", *given)
    for name, words, again in (("replay", half, ()), ("replay-calibrated", fitted, given)):
        replayed = ("@digits.onnx", "again.onnx", "--plan", "plan.json", *again, *WRITTEN[2:])
        yield Case(f"ways/{name}", (_run(digits, *words), replayed))
    table = ("@digits.onnx", "out.onnx", *half, *digits.shape_words, "--device", "cpu")
    yield Case("ways/table", (table,))
    for name in ("--help", "--list-passes", "--version"):
        yield Case(f"ways/{name.strip('-')}", ((name,),))


def _failing() -> Iterator[Case]:
    """Commands that end with an error message."""
    half = ("out.onnx", "--ratio", "0.5")
    failing: dict[str, Words] = {
        "out-of-reach": ("@digits.onnx", "out.onnx", "--ratio", "0.001"),
        "out-of-reach-calibrated": (
            *("@digits.onnx", "out.onnx", "--ratio", "0.001"),
            *("--calibration", "@digits.npz", "--pass", "pca"),
        ),
        "out-of-reach-macs": (
            *("@digits.onnx", "out.onnx", "--ratio", "0.001"),
            *("--budget", "macs", "--input-shape", "image=1,1,8,8"),
        ),
        "unknown-recipe": ("@digits.onnx", *half, "--pass", "schaten"),
        "broken-recipe": ("@digits.onnx", *half, "--pass", "@broken.toml"),
        "uncalibrated": ("@digits.onnx", *half, "--pass", "output"),
        "no-file": ("@absent.onnx", *half),
        "no-model": ("@noise.onnx", *half),
        "no-output": ("@digits.onnx", "--ratio", "0.5"),
        "no-input": (),
        "no-ratio": ("@digits.onnx", "out.onnx"),
        "ratio-out-of-range": ("@digits.onnx", "out.onnx", "--ratio", "1.5"),
        "ratio-is-no-number": ("@digits.onnx", "out.onnx", "--ratio", "half"),
        "unknown-option": ("@digits.onnx", *half, "--ratoi", "0.5"),
        "unknown-budget": ("@digits.onnx", *half, "--budget", "mac"),
        "no-shapes": ("@digits.onnx", *half, "--budget", "macs"),
        "wrong-shapes": ("@digits.onnx", *half, "--input-shape", "image=1,3,8,8"),
        "unknown-layers": ("@digits.onnx", *half, "--include", "nothing*"),
        "validation": ("@digits.onnx", *half, "--max-error", "0.0001"),
        "no-calibration": ("@digits.onnx", *half, "--calibration", "@absent.npz"),
        "other-calibration": ("@digits.onnx", *half, "--calibration", "@other.npz"),
        "broken-plan": ("@digits.onnx", "out.onnx", "--plan", "@broken.json"),
        "plan-and-ratio": ("@digits.onnx", *half, "--plan", "@broken.json"),
        "target-uncalibrated": ("@digits.onnx", "out.onnx", "--target-error", "0.1"),
        "unknown-device": ("@digits.onnx", *half, "--device", "tpu"),
    }
    for name, words in failing.items():
        device = () if "--device" in words else ("--device", "cpu")
        yield Case(f"errors/{name}", ((*words, *device, "--quiet"),))


# --- what the cases need ------------------------------------------------------------------------------


def shared_folder() -> Path | None:
    """../shared of this checkout, else of the checkout that this worktree belongs to."""
    beside = (CHECKOUT, Path(git("rev-parse", "--path-format=absolute", "--git-common-dir")).parent)
    return next((path.parent / "shared" for path in beside if (path.parent / "shared").is_dir()), None)


def subjects(shared: Path | None) -> list[str]:
    """The names of those whose models are here."""
    return [subject.name for subject in SUBJECTS if shared or not subject.file]


def prepare(folder: Path, names: Sequence[str], shared: Path | None) -> None:
    """Write models and calibration inputs, the same ones for both sides."""
    # The comparison above is tested without these, which load much.
    import scores
    import zoo

    scores.SHARED = shared or scores.SHARED
    for subject in SUBJECTS:
        path = folder / f"{subject.name}.onnx"
        if subject.name not in names:
            continue
        if subject.name in ("operators", "decoder"):
            onnx.save(_small(subject.name), path)
        elif subject.file and shared:
            shutil.copyfile(shared / "models" / f"{subject.file}.onnx", path)
        elif subject.name in ZOO:
            network, dtype = ZOO[subject.name]
            onnx.save(zoo.build(network, dtype=dtype, scale=0.125, batchnorm="resnet" in network), path)
        elif subject.name == "digits":
            shutil.copyfile(scores.DIGITS, path)
        else:
            stored = {"save_as_external_data": True, "size_threshold": 1024}
            is_digits = subject.name == "external"
            source = onnx.load(scores.DIGITS) if is_digits else zoo.build("bert_base", scale=0.125)
            onnx.save(source, path, location=path.with_suffix(".data").name, **stored)
        if subject.samples:
            feeds = _sentences() if subject.name in ZOO else scores.calibration(subject.name)
            number = subject.samples * 2  # more than are used, so that they are chosen
            np.savez(path.with_suffix(".npz"), **{name: array[:number] for name, array in feeds.items()})
    _write_odd_files(folder)


def _small(name: str) -> onnx.ModelProto:
    """A small model whose numbers a seed gives."""
    if name == "decoder":
        sys.path.append(str(CHECKOUT / "tests"))
        from decoders import decoder

        return decoder()
    proto = onnx.parser.parse_model(OPERATORS)
    rng = np.random.default_rng(2)
    shapes = {"einsum": (24, 32), "fused": (32, 24), "attention": (24, 72), "bias": (72,)}
    for tensor, shape in (shapes | {"gru": (1, 72, 24), "state": (1, 72, 24)}).items():
        values = rng.standard_normal(shape).astype(np.float32) / 5
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values, tensor))
    return proto


def _sentences() -> dict[str, Any]:
    shape = (64, 32)
    tokens = np.random.default_rng(1).integers(0, 100, shape)
    return {
        "input_ids": tokens,
        "attention_mask": np.ones(shape, int),
        "token_type_ids": np.zeros(shape, int),
    }


def _write_odd_files(folder: Path) -> None:
    """Write a changed recipe, and broken files."""
    schatten = (CHECKOUT / "passes/schatten.toml").read_text(encoding="utf-8")
    (folder / "own.toml").write_text(schatten.replace("power = 3", "power = 2"), encoding="utf-8")
    (folder / "broken.toml").write_text(schatten.replace('"sum"', '"total"'), encoding="utf-8")
    (folder / "noise.onnx").write_bytes(bytes(range(256)))
    (folder / "broken.json").write_text('{"version": 4, "layers": 3}\n', encoding="utf-8")
    np.savez(folder / "other.npz", picture=np.zeros((8, 1, 8, 8), np.float32))


# --- one side -----------------------------------------------------------------------------------------


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


# --- the command --------------------------------------------------------------------------------------


def parsed() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--against", required=True, metavar="REV", help="the revision to compare with")
    parser.add_argument("--only", action="append", metavar="GLOB", help="cases to run; repeatable")
    parser.add_argument("--quick", action="store_true", help="a part of the cases")
    parser.add_argument(
        "--allow", action="append", default=[], metavar="GLOB", help="expected, as case:field"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="commands that run at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all differences, too")
    parser.add_argument("--shared", type=Path, metavar="DIR", help="the folder of real models and data")
    parser.add_argument("--fresh", action="store_true", help="do not read the cache")
    parser.add_argument("--list", action="store_true", help="list the cases and exit")
    return parser.parse_args()


def compare(
    revision: str, chosen: Sequence[Case], inputs: Path, options: argparse.Namespace
) -> Iterator[Verdict]:
    """Run both sides and judge every case."""
    before = other_side(revision, chosen, inputs, options)
    state, begin, results = committed(), Since(), {}
    for case, result in run_all(chosen, CHECKOUT, inputs, options.jobs):
        results[case] = result
        yield judged(case.name, before[case.name], result, options.allow)
    tell(f"working tree: {begin.spent()}")
    if state is not None and state == committed():
        known = Known(state, inputs)
        for case, result in results.items():
            known.put(case, result)


def written(revision: str, verdicts: Sequence[Verdict]) -> str:
    """The verdicts as JSON."""
    listed = [{"status": verdict.status, **asdict(verdict)} for verdict in verdicts]
    return json.dumps({"against": revision, "cases": listed}, indent=2, ensure_ascii=False) + "\n"


def main() -> int:
    """Compare, and print."""
    options = parsed()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the worktree goes
    revision = git("rev-parse", "--verify", f"{options.against}^{{commit}}")
    shared = options.shared or shared_folder()
    if shared is None:
        tell("There is no folder ../shared: only this project's own models take part (--shared names it).")
    names = subjects(shared)
    globs = options.only or ["*"]
    chosen = [
        case for case in cases(names) if (case.is_quick or not options.quick) and matches(case.name, globs)
    ]
    if not chosen:
        tell("No case has such a name: --list lists them.")
        return 2
    if options.list:
        print(*(case.name for case in chosen), sep="\n")
        return 0
    verdicts = []
    with tempfile.TemporaryDirectory(prefix="onnx-lowrank-identity-") as folder:
        inputs = Path(folder).resolve() / "inputs"
        inputs.mkdir()
        prepare(inputs, names, shared)
        for verdict in compare(revision, chosen, inputs, options):
            print(verdict.line(), flush=True)
            verdicts.append(verdict)
    for glob in options.allow:
        if not any(is_allowed(one.case, found, [glob]) for one in verdicts for found in one.allowed):
            tell(f"--allow {glob} names nothing that differs.")
    print(summary(verdicts))
    if options.json:
        options.json.write_text(written(revision, verdicts), encoding="utf-8")
    return int(any(verdict.differs for verdict in verdicts))


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        sys.exit(main())
