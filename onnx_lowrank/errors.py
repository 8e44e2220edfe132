"""The errors that a user can meet, each with its exit code."""


class LowRankError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one sentence: what is wrong, with its value, and what to do about it.

    Attributes:
        exit_code: What the command exits with when this error ends it.
    """

    exit_code = 1


class InputError(LowRankError):
    """The command, a file or an argument is wrong."""

    exit_code = 2


class RecipeError(InputError):
    """A recipe is unknown, or a key or a value in it is wrong."""


class PlanError(InputError):
    """A plan file is malformed, or it belongs to another model."""


class ReportError(InputError):
    """A JSON report is malformed."""


class BudgetError(LowRankError):
    """The budget cannot be met.

    Attributes:
        smallest_ratio: The smallest ratio that can be reached, or None where there is nothing to
            decompose.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_ratio: float | None = None) -> None:
        super().__init__(message)
        self.smallest_ratio = smallest_ratio


class ValidationError(LowRankError):
    """The compressed model does not do what the input model does; nothing was written."""

    exit_code = 4
