"""The errors a user can meet. Each message says what was wrong, the value, the likely cause and what to do next."""


class JfhpoError(Exception):
    """Base of all errors that jfhpo raises on purpose."""


class SpecError(JfhpoError):
    """A study file, a task, a model family or a configuration is not usable. Raised before any money is spent."""


class TrialFailure(JfhpoError):  # noqa: N818  a verdict on the configuration, not a fault of the program
    """A trial failed because of its configuration: the optimizer learns from it as infeasible.

    Args:
        kind: One of `jfhpo_core.study.trial.FailureKind`'s values.
        message: What happened, quoting the decisive line.
        seconds: Simulated duration until then; None means that the wall clock is the truth.
    """

    def __init__(self, kind: str, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.seconds = seconds


class InfrastructureError(JfhpoError):
    """A worker, node or service failed. Says nothing about the configuration; the segment is tried again."""


class Interruption(JfhpoError):  # noqa: N818  nothing is wrong
    """A person has ended the study for now; it can be continued."""


class CheckpointError(JfhpoError):
    """A checkpoint is missing, incomplete or does not match its manifest."""


class LedgerError(JfhpoError):
    """The ledger refused a write or holds a study that does not match the study file."""


class LedgerUnavailable(LedgerError):  # noqa: N818  a state of the store, not a fault
    """The ledger's store does not answer for now. What was to be written can be written again later."""
