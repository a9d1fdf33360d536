"""What runs in a worker of Ray: a process that trains one job at a time and stays warm from job to job.

Jobs train in a thread of the worker process. `signal.alarm` works in main threads only, so a reward function must not
use it: with math-verify pass `parsing_timeout=None` and `timeout_seconds=None`, as TRL itself does in threads.
"""

from __future__ import annotations

import functools
import os
import queue
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace

from jfhpo_core.run.dispatch import Suspended
from jfhpo_core.run.parts import Paused
from jfhpo_core.run.ray_instance import end_with_raylet, hear_of_children, last_line, this_node
from jfhpo_core.run.worker import Cancelled, Staged, store_staged, train_job
from jfhpo_core.study.trial import FailureKind, SegmentResult, StepRecord
from jfhpo_core.trainers import Job, load_trainer

_trainer = functools.cache(load_trainer)


@dataclass(frozen=True)
class Loss:
    """An attempt that gave no result.

    Attributes:
        kind: Failure kind to record if every attempt fails this way; None if it is never the configuration's fault.
        details: The worker's traceback, if there is one.
    """

    reason: str
    kind: FailureKind | None = None
    details: str | None = None


Ending = SegmentResult | Staged | Suspended | Loss
"""What may come of a job on a worker."""


class WorkerProcess:
    """What runs in a worker: one job at a time.

    Args:
        trainer: Imported at once, so that the first job finds it warm.
    """

    def __init__(self, trainer: str) -> None:
        end_with_raylet()
        hear_of_children()
        _trainer(trainer).warm_up()
        self._cancelled = threading.Event()

    def ready(self) -> int:
        """Process id; answers as soon as the worker can train."""
        return os.getpid()

    def cancel(self) -> None:
        """End the running job at its next step."""
        self._cancelled.set()

    def train(self, job: Job, hand_over_bytes: int) -> Iterator[StepRecord | Ending]:
        """Yield a job's step records as they come, then what came of it; nothing more if cancelled.

        Args:
            job: What to train.
            hand_over_bytes: A checkpoint of this size or more is left to the driver to have stored.
        """
        self._cancelled.clear()
        items: queue.SimpleQueue[StepRecord | Ending | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                came = train_job(job, _trainer(job.study.trainer.name), items.put, self._cancelled.is_set)
                if isinstance(came, Staged):
                    large = came.size_bytes >= hand_over_bytes
                    came = replace(came, node=this_node()) if large else store_staged(came)
                items.put(came)
            except Cancelled:
                pass
            except Paused as pause:
                items.put(Suspended(job.trial_key, pause.step))
            except Exception as error:  # noqa: BLE001  the driver tries again, and reports what it was
                items.put(Loss(last_line(error), details=traceback.format_exc()))
            finally:
                items.put(None)

        threading.Thread(target=work, name=f"trial-{job.trial_key}", daemon=True).start()
        while (item := items.get()) is not None:
            yield item


class StorageProcess:
    """What stores the checkpoint of a segment once its devices were given back."""

    def __init__(self) -> None:
        end_with_raylet()

    def store(self, staged: Staged, again: bool) -> SegmentResult:
        """See `store_staged`."""
        return store_staged(staged, again=again)
