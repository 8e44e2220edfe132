"""Completion of the command line in bash, zsh and fish, by click.

`onnx-lowrank --completion bash` prints the script for a shell. The script runs the program for every
completion, with the words typed so far in its environment.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem, ShellComplete, get_completion_class

PROGRAM = "onnx-lowrank"
SHELLS = ("bash", "zsh", "fish")

_VARIABLE = "_ONNX_LOWRANK_COMPLETE"


def script(shell: str) -> str:
    """The script that a user of a shell evaluates once per session."""
    return _completer(shell, click.Command(PROGRAM)).source()


def completions(names: Sequence[str], default: str, command: Callable[[str], click.Command]) -> str | None:
    """The completions that a script asks for, as its shell reads them; None if no script asks.

    Args:
        names: The names of all commands.
        default: The command without a name.
        command: The command of a name.
    """
    shell, _, instruction = os.environ.get(_VARIABLE, "").partition("_")
    if shell not in SHELLS or instruction != "complete":
        return None
    asked = _completer(shell, click.Command(PROGRAM))
    words, incomplete = asked.get_completion_args()
    is_named = bool(words) and words[0] in names
    name = words[0] if is_named else default
    found = _completer(shell, command(name)).get_completions(words[is_named:], incomplete)
    if not words:
        found += [CompletionItem(each) for each in names if each.startswith(incomplete)]
    return "\n".join(map(asked.format_completion, found))


def _completer(shell: str, command: click.Command) -> ShellComplete:
    kind = get_completion_class(shell)
    if kind is None:
        raise LookupError(f"click completes nothing in {shell}")
    return kind(command, {"obj": {"verbose": 0}}, PROGRAM, _VARIABLE)
