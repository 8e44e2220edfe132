"""The cases: models, recipes, budgets, options, and commands that fail."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

CHECKOUT = Path(__file__).parents[3]

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
