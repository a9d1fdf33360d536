"""Watch a search from Python, interrupt it, look at what it has, and let it go on: nothing is trained twice.

Run it by `python examples/python/interrupt_and_continue.py`.
"""

from pathlib import Path

import jfhpo
from jfhpo_core.run.search import Progress

STUDY = Path(__file__).parents[1] / "simulated.yaml"
SEGMENTS = 5

study = jfhpo.load_study(STUDY, ["study=interrupted", "budget.trial_seconds=300"])


def stop_early(progress: Progress) -> None:
    """End the call as Ctrl-C would, after a few segments."""
    ended = sum(len(trial.segments) for trial in progress.trials)
    print(f"{progress.phase}: {len(progress.trials)} trials, {progress.spent_seconds:.0f} s spent")
    if ended >= SEGMENTS:
        raise KeyboardInterrupt


try:
    jfhpo.run(study, on_progress=stop_early)
except KeyboardInterrupt:
    before = study.trials
    print(f"interrupted with {len(before)} trials")

outcome = jfhpo.run(study)
after = study.trials
done = before.index[before["state"].isin(["completed", "stopped"])]
kept = (after.loc[done, "device_seconds"] == before.loc[done, "device_seconds"]).all()
print(f"finished with {len(after)} trials; those that were finished before cost nothing again: {kept}")
print("recommended:", study.recommended)
