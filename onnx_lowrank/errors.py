"""The errors that a user can meet, each with its exit code."""


class LowRankError(Exception):
    """Base of every error that this package raises on purpose.

    The message is one sentence that says what is wrong, with its value, and what to do.

    Attributes:
        exit_code: The exit code of the command if this error ends it.
    """

    exit_code = 1


class InputError(LowRankError):
    """The command, a file or an argument is wrong."""

    exit_code = 2


class EvaluatorError(InputError):
    """The user's score of a model fails."""


class RecipeError(InputError):
    """A recipe is unknown, or has a wrong key or value."""


class PlanError(InputError):
    """A plan file is malformed, or it belongs to another model."""


class ReportError(InputError):
    """A JSON report is malformed."""


class BudgetError(LowRankError):
    """The budget cannot be met.

    Attributes:
        smallest_ratio: The smallest ratio that can be reached; None if it is unknown.
    """

    exit_code = 3

    def __init__(self, message: str, smallest_ratio: float | None = None) -> None:
        super().__init__(message)
        self.smallest_ratio = smallest_ratio


class ValidationError(LowRankError):
    """The compressed model does not behave like the input model; nothing was written."""

    exit_code = 4
