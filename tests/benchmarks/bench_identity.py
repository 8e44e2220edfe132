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
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from identity.cases import CHECKOUT, Case, cases, matches
from identity.comparison import Verdict, is_allowed, judged, summary
from identity.inputs import prepare, shared_folder, subjects
from identity.sides import Known, Since, committed, git, other_side, run_all, tell


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
