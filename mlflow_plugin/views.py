"""Saved views of a study's experiment: the columns and charts that people of this field look for first.

MLflow's UI keeps its saved views (button "Views" above the runs) in tags of the experiment: a name, times, and the
page's state as JSON, deflated. A page opened with `viewStateShareKey=ID` comes up in that state.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from jfhpo_core.study.models import Ladder
from jfhpo_core.study.spec import StudySpec
from mlflow_plugin.presentation import RECOMMENDED, STUDIES_VIEW, TRIALS_VIEW, log_name, logarithmic

TAG = "mlflow.sharedViewState."
"""Followed by the view's id."""
FULL_LENGTH = "jfhpo-full-length-{}"
"""Id of the view of a model's full-length runs; its charts compare like with like."""

STANDING = ("tags.`jfhpo.state`", "params.`model`", "metrics.`eval/score`", "metrics.`spent/device_seconds`")
"""Columns before the hyperparameters: where a trial stands."""
REASONS = ("tags.`jfhpo.source`", "tags.`jfhpo.why`", "tags.`jfhpo.stopped_by`", "tags.`jfhpo.failure`")
"""Columns after them: why it was trained, and why it ended."""
OUTCOME = ("tags.`jfhpo.state`", "metrics.`study/recommended_score`", "metrics.`study/recommended_standard_error`")
"""Columns of studies, before the recommended values."""
SECTIONS = ("eval", "train", "spent", "time", "progress", "saved", "recommended", "study")
"""Sections that MLflow makes of metric names."""
UNFOLDED = ("eval", "study")
"""Those of them that come up unfolded."""
AT_A_GLANCE = "At a glance"

RUN_NAME = "attributes.`Run Name`"
"""MLflow's id of the column of run names, which every table has."""
WIDTHS = {RUN_NAME: 320, **dict.fromkeys(REASONS, 260)}
"""Pixels of columns with texts; a run's name ends with how far it got."""
LEAST_WIDTH = 100
"""Pixels of other columns, unless their header needs more: MLflow cuts what is longer."""
CHARACTER_WIDTH = 8
HEADER_MARGIN = 24


def saved_views(study: StudySpec, ladder: Ladder, created: int) -> dict[str, str]:
    """Tags of the experiment that make the saved views.

    Args:
        study: The study file.
        ladder: Its models.
        created: Time that the views bear, in milliseconds since the epoch.
    """
    columns = [*STANDING, *(f"params.`{name}`" for name in study.space), *REASONS]
    lines, planes = _charts(study)
    trials = {"orderByKey": "tags.`mlflow.runName`", "searchFilter": "tags.`jfhpo.source` != ''"}
    views = {TRIALS_VIEW: ("Trials", {**trials, **_state(columns, lines)})}
    for model in (ladder.target, *reversed(ladder.proxies)):
        full = {
            "orderByKey": "metrics.`eval/score`",
            "searchFilter": f"tags.`jfhpo.state` = 'completed' and params.model = '{model.name}'",
        }
        name = f"Full length on {model.name}{' (the target)' if model == ladder.target else ''}"
        views[FULL_LENGTH.format(model.name)] = (name, {**full, **_state(columns, [*planes, *lines])})
    nights = {"orderByKey": "tags.`mlflow.runName`", "searchFilter": "tags.`jfhpo.study` != ''"}
    found = [*OUTCOME, *(f"tags.`{RECOMMENDED}.{name}`" for name in study.space)]
    views[STUDIES_VIEW] = ("Studies", {**nights, **_state(found, [])})
    return {f"{TAG}{view}": _envelope(name, state, created) for view, (name, state) in views.items()}


def _charts(study: StudySpec) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What the UI draws first: learning curves and score against cost; parameters against the score.

    The latter only tell something about runs of one model and one length.
    """
    score = {"key": "eval/score", "type": "METRIC"}
    shown = {"deleted": False, "isGenerated": False, "metricSectionId": "jfhpo", "displayName": None}
    line = {"lineSmoothness": 0, "scaleType": "linear", "xAxisScaleType": "linear", "runsCountToCompare": 100}
    on_log_scale = logarithmic(study.space)
    axes = [log_name(name) if name in on_log_scale else name for name in study.space]
    parallel = {"type": "PARALLEL", "selectedParams": axes, "showAllRuns": False}
    planes: list[dict[str, Any]] = [
        {"uuid": "jfhpo-parallel", **parallel, "selectedMetrics": ["eval/score"], "runsCountToCompare": 100}
    ]
    lines: list[dict[str, Any]] = [
        {
            "uuid": "jfhpo-learning",
            "type": "LINE",
            "metricKey": "eval/score",
            "selectedMetricKeys": ["eval/score"],
            "xAxisKey": "step",
            "useGlobalXaxisKey": False,
            **line,
        },
        {
            "uuid": "jfhpo-cost",
            "type": "SCATTER",
            "xaxis": {"key": "spent/device_seconds", "type": "METRIC"},
            "yaxis": score,
            "runsCountToCompare": 100,
        },
    ]
    if len(axes) > 1:
        first, second = ({"key": name, "type": "PARAM"} for name in axes[:2])
        plane = {"xaxis": first, "yaxis": second, "zaxis": score}
        planes.append({"uuid": "jfhpo-contour", "type": "CONTOUR", **plane, "runsCountToCompare": 100})
    return [{**chart, **shown} for chart in lines], [{**chart, **shown} for chart in planes]


def _state(columns: Sequence[str], charts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    sections = [
        {"uuid": "jfhpo", "name": AT_A_GLANCE, "display": True, "isReordered": False, "columns": 2, "cardHeight": 420}
    ]
    sections += [
        {"uuid": f"jfhpo-{name}", "name": name, "display": name in UNFOLDED, "isReordered": False, "isGenerated": True}
        for name in SECTIONS
    ]
    return {
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(columns),
        "columnOrder": [RUN_NAME, *columns],  # widths count for these only
        "columnWidths": {column: _width(column) for column in (RUN_NAME, *columns)},
        "runsHiddenMode": "SHOW_ALL",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": True,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
        "compareRunCharts": list(charts),
        "compareRunSections": sections,
    }


def _width(column: str) -> int:
    """Pixels that a column needs."""
    header = column.split("`")[1]
    return WIDTHS.get(column, max(LEAST_WIDTH, CHARACTER_WIDTH * len(header) + HEADER_MARGIN))


def _envelope(name: str, state: Mapping[str, Any], created: int) -> str:
    packed = base64.b64encode(zlib.compress(json.dumps(state, separators=(",", ":")).encode(), 9)).decode()
    return json.dumps({"name": name, "createdAt": created, "updatedAt": created, "state": f"deflate;{packed}"})
