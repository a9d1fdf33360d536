"""What errors of MLflow, its database and its server mean, in our words."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

from mlflow.exceptions import MlflowException

from jfhpo_core.errors import LedgerError, LedgerUnavailable
from jfhpo_core.report.text import without_credentials

AWAY = "TEMPORARILY_UNAVAILABLE"
"""MLflow's code for a database that is locked by another process, full or away."""
TRANSIENT = {AWAY, "INTERNAL_ERROR", "REQUEST_LIMIT_EXCEEDED", "ABORTED"}
"""MLflow's codes for a server that is away, overloaded or about to restart."""
DELETED = "must be in the 'active' state"
"""What MLflow says of a run, or an experiment, that was deleted and can be restored."""
GONE = "RESOURCE_DOES_NOT_EXIST"
REFUSALS = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
Call = TypeVar("Call", bound=Callable[..., Any])


class Explaining(Protocol):
    """What has methods that call MlflowClient."""

    def explain(self, error: Exception) -> LedgerError | None:
        """What an error means in our words; None if it has no meaning but a fault of the program."""
        ...

    def signals_wait(self) -> bool:
        """Whether a signal must not interrupt a call."""
        ...


def explained(method: Call) -> Call:
    """Translate MLflow and HTTP errors into LedgerError or LedgerUnavailable."""

    @functools.wraps(method)
    def wrapped(self: Explaining, *arguments: Any, **keywords: Any) -> Any:
        from requests import RequestException

        try:
            with _signals_wait() if self.signals_wait() else contextlib.nullcontext():
                return method(self, *arguments, **keywords)
        except (MlflowException, RequestException) as error:
            told = self.explain(error)
            if told is None:
                raise
            raise told from error

    return wrapped  # type: ignore[return-value]


def meaning(error: Exception, uri: str | None, remote: bool) -> LedgerError | None:
    """What an error of MLflow means in our words; None if it has no meaning but a fault of the program.

    Args:
        error: From a call of MlflowClient.
        uri: The store that is open, without credentials; None if none is yet.
        remote: Whether it is a server.
    """
    code = error.error_code if isinstance(error, MlflowException) else None
    if code in REFUSALS:
        return LedgerError(
            f"the MLflow server refuses access ({short(error)}); set MLFLOW_TRACKING_USERNAME and "
            "MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to an account that may edit the experiment"
        )
    if code in (TRANSIENT if remote else {AWAY}) or (code is None and uri is not None):
        where = f" {uri}" if uri is not None else ""
        store = "server" if remote else "database"
        return LedgerUnavailable(f"the MLflow {store}{where} does not answer: {short(error)}")
    if DELETED in str(error) or code == GONE:
        return LedgerError(
            f"a run of the study, or its experiment, was deleted in MLflow ({short(error)}); restore it there, or "
            "run the same command again, which says what is missing and how to go on without it"
        )
    return None


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Defer SIGINT and SIGTERM until the call returns; raising inside a database call would leave it locked."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ours = {number: handler for number, handler in handlers.items() if callable(handler)}
    for number in ours:
        signal.signal(number, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def short(error: Exception) -> str:
    text = without_credentials(str(error))
    return text if len(text) <= 200 else f"{text[:200]} ..."
