"""The samples that test modules build on; they are part of `jfhpo.testing`."""

from jfhpo.testing.samples import (
    BECAUSE,
    evaluation,
    result,
    segment,
    simulated_study,
    step_record,
    study_data,
    trained,
)

__all__ = ["BECAUSE", "evaluation", "result", "segment", "simulated_study", "step_record", "study_data", "trained"]
