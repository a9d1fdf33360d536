"""Who runs a study: a tag of its run in MLflow, so that two machines do not search the same study at a time.

The owner renews the tag every few seconds, and reads it before every write that counts. A process that finds a foreign
tag watches whether it is renewed: if so, the study is refused; if not, its owner has died and the process takes over.
No clock of one machine is compared with that of another. Processes of one machine are known by their ids.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import weakref
from dataclasses import asdict, dataclass

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from requests import RequestException

from jfhpo_core.errors import LedgerError

TAG = "mlflow.jfhpo.owner"

BEAT_SECONDS = 10.0
"""Time between two renewals."""

MISSED_BEATS = 3
"""An owner that misses so many renewals in a row has died."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Claim:
    """What stands in the tag; `beat` counts the renewals."""

    host: str
    process: int
    beat: int

    @classmethod
    def read(cls, client: MlflowClient, run_id: str) -> _Claim | None:
        """The present claim; None if nobody runs the study."""
        run = client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise LedgerError(
                f"the MLflow run of the study was deleted while it was searched; restore it (mlflow runs restore "
                f"--run-id {run_id}) and run the same command again, or begin anew by `jfhpo search --forget`"
            )
        text = run.data.tags.get(TAG)
        return cls(**json.loads(text)) if text else None

    @property
    def is_mine(self) -> bool:
        """Whether this process made it."""
        return (self.host, self.process) == (socket.gethostname(), os.getpid())

    @property
    def has_died(self) -> bool:
        """Whether its process is known to have ended."""
        if self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


class Owner:
    """This process as the owner of a study. Made by `claim`."""

    def __init__(self, client: MlflowClient, run_id: str, study: str) -> None:
        self._client, self._run_id, self._study = client, run_id, study
        self._beats = 0
        self._ended = threading.Event()

    @classmethod
    def claim(cls, client: MlflowClient, run_id: str, study: str) -> Owner:
        """Become the owner of a study; waits up to `MISSED_BEATS` renewals to see whether the present one lives.

        Raises:
            LedgerError: It does.
        """
        first = _Claim.read(client, run_id)
        if first is not None and not first.is_mine and not first.has_died:
            deadline = time.monotonic() + MISSED_BEATS * BEAT_SECONDS
            while time.monotonic() < deadline:
                time.sleep(BEAT_SECONDS / 10)
                now = _Claim.read(client, run_id)
                if now is None:
                    break
                if now != first:
                    raise LedgerError(_taken(study, now))
        owner = cls(client, run_id, study)
        owner.renew()
        threading.Thread(target=_beat, args=(weakref.ref(owner), owner._ended), name="study-owner", daemon=True).start()
        return owner

    def check(self) -> None:
        """Called before a write that counts.

        Raises:
            LedgerError: Another process has taken the study over.
        """
        now = _Claim.read(self._client, self._run_id)
        if now is None:  # the other one has finished meanwhile
            raise LedgerError(
                f"study {self._study!r} was taken over by another process, which has ended; what this one knows of it "
                "is out of date: run the same command again"
            )
        if not now.is_mine:
            raise LedgerError(f"{_taken(self._study, now)}; it was taken over, and this process writes nothing more")

    def release(self) -> None:
        """Let others have the study at once."""
        self._ended.set()
        now = _Claim.read(self._client, self._run_id)
        if now is not None and now.is_mine:
            self._client.set_tag(self._run_id, TAG, "")

    def renew(self) -> None:
        """Show a sign of life."""
        self._beats += 1
        claim = _Claim(socket.gethostname(), os.getpid(), self._beats)
        self._client.set_tag(self._run_id, TAG, json.dumps(asdict(claim)))


def _beat(reference: weakref.ref[Owner], ended: threading.Event) -> None:
    """Renew an owner's claim until it is released, lost or forgotten."""
    while not ended.wait(BEAT_SECONDS):
        owner = reference()
        if owner is None:
            return
        try:
            owner.check()
            owner.renew()
        except LedgerError as error:
            logger.warning("%s", error)
            return
        except (MlflowException, RequestException) as error:
            logger.debug("the store is away, or too busy: %s", error)
        del owner


def _taken(study: str, claim: _Claim) -> str:
    return (
        f"study {study!r} is being run by process {claim.process} on {claim.host!r}; wait for it, end it, or give this "
        "study another name"
    )
