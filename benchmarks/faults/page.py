"""The page of the docs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.faults.records import KINDS, Record


def write(records: Sequence[Record], folder: Path) -> None:
    """Write the page of the docs."""
    rows = []
    for kind, what in KINDS.items():
        mine = [record for record in records if record.kind == kind]
        if not mine:
            rows.append(f"| `{kind}` | {what} | not run yet | | |")
            continue
        seconds = sorted(record.recovery_seconds for record in mine if record.recovery_seconds is not None)
        bad = sum(bool(record.violations) for record in mine)
        median = f"{seconds[len(seconds) // 2]:.1f} s" if seconds else ""
        rows.append(f"| `{kind}` | {what} | {len(mine)} | {bad} | {median} |")
    searches = {(record.place, record.seed) for record in records}
    places = Counter(place for place, _ in searches)
    commits = ", ".join(f"`{name}`" for name in sorted({record.commit for record in records}))
    damaged = {
        key: min((one.number for one in records if (one.place, one.seed) == key and one.kind == "checkpoint-damaged"),
                 default=len(records))
        for key in searches
    }  # fmt: skip
    exact = sum(record.number < damaged[record.place, record.seed] for record in records)
    broken = [f"- seed {one.seed}, fault {one.number}, `{one.kind}`: {'; '.join(one.violations)}" for one in records
              if one.violations]  # fmt: skip
    text = PAGE.format(
        faults=len(records), exact=exact, searches=len(searches), on_ray=places["ray"],
        on_server=places["server"], by_command=places["command"], rows="\n".join(rows), commits=commits,
        broken="None." if not broken else "\n".join(broken),
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "faults.md").write_text(text, encoding="utf-8")


PAGE = """# Faults

{faults} faults at random moments in {searches} searches ({on_ray} of them on Ray, {on_server} with their ledger on an
MLflow server, {by_command} as the command `jfhpo search`), each search in a process of its own with real checkpoints
and a real MLflow store. After a fault the search is started again, until its study is complete.
Made by `python -m benchmarks faults` (`--place ray`, `--place server`, `--place command`), from commit {commits}.

| Fault | What happens | Times | Times that something did not hold | Median time to the next new result |
|---|---|---:|---:|---:|
{rows}

The time to the next new result is that from the next start of the search, imports excluded, and includes the repeated
part of the segment that was cut off; the machine had much other work to do meanwhile. A search that survives a fault is
killed at the end of it, which counts as a fault of its own; the checks then follow both.

After the loss of the raylet, workers train on for some seconds; a search that is not complete by then ends with an
infrastructure error, and the next start goes on. While the MLflow server is away the search goes on, and what it has
acknowledged waits in the outbox; after half of those absences the search is killed before it has delivered it.

Tested elsewhere are: a training process of its own that is killed below its worker, in
`tests/trainers/openrlhf/test_search.py`; a Prefect server that is killed while a flow run searches, in
`tests/orchestration/test_study_lock.py`; a guarded MLflow server that is killed, in
`tests/mlflow_plugin/test_stores.py`; a flow run that is cancelled, in `tests/flows/test_search.py`.

## What must hold after each fault

- No result is missing whose commit had been reported before the fault, and none has changed.
- No segment is charged twice: neither within a trial nor by a second run of it in MLflow.
- The search goes on as if nothing had happened: its committed segments are, in their order, with their configurations,
  scores and charges, those of the same search undisturbed, and the one it begins next is the next one of that search.
  After a checkpoint was damaged this is not asked of a search any more: a segment may be trained again from further
  back, and cost more. {exact} of the faults came before that and were held to it.
- A search that is told something twice, or late, or whose clock jumps does not end by it.
- 30 seconds later no process of a search that has died is left.
- At the command line: the exit code is [the documented one](../reference/exit-codes.md), and the message names the way
  on (`restore --run-id ...`, `--forget`, another process that runs the study); what was refused has trained nothing.
  What was on record before a restore, an upgrade or a kill is on record after it, and the whole is in the end that of
  the undisturbed study, with no more segments trained than it has. Only who begins anew by `--forget`, or takes a study
  over from a driver that stands still, trains something twice.

## Where it did not hold

{broken}

Faults of jfhpo that were found on the way are mended, and the runs that showed them were repeated: a search whose
raylet had died waited for ever; a search ended when its MLflow server was killed while records were read; a line of the
outbox that a crash had cut off spoilt the next one; when the Prefect server was killed, a study stayed held for ever,
and a flow run could fail at its very end; a study whose database was lost as a whole was begun anew without a word, and
one whose database was cut off was refused with the wrong remedy.

The Ray worker of seed 9000 that was left stood still (SIGSTOP) when its driver was killed, and so heard nothing of it.
Since then the kernel ends workers together with their raylet; the test is in `tests/run/test_driver_death.py`, the run
of the suite was not repeated.

Five runs at the command line were taken off the record because the suite's own check was wrong (a search that had ended
before its study was deleted or its second driver came; an upgraded study that was looked for in the wrong place), and
others were run in their place.
"""
