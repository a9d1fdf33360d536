"""Run a study and look at it: as tables, as pictures, and as what a notebook shows.

Run it by `python examples/python/run_and_look.py`.
"""

from pathlib import Path

import jfhpo

STUDY = Path(__file__).parents[1] / "simulated.yaml"

study = jfhpo.load_study(STUDY, ["budget.trial_seconds=300"])
outcome = jfhpo.run(study)

print(study.comparison.round(3))
print("recommended:", study.recommended)

# One row per trial; hyperparameters are columns that begin with `params_`.
trials = study.trials
print(trials.groupby("state")["device_seconds"].agg(["count", "sum"]).round(1))
finished = trials[(trials["state"] == "completed") & (trials["purpose"] == "search")]
print(finished.sort_values("score", ascending=False)[["score", "params_learning_rate"]].head(3).round(5))

for picture in study.plots("figures"):
    print("wrote", picture)
Path("study.html").write_text(study._repr_html_(), encoding="utf-8")
print("report:", outcome.report)
