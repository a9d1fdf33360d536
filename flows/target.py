"""The flow `jfhpo/target`: train the target with a given configuration and register it, without a search."""

from __future__ import annotations

import json

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from jfhpo.display.words import show_configuration
from jfhpo.orchestration.flow_run import DEFAULT_STUDY, read, run_name, run_with_page
from jfhpo.orchestration.nightly_studies import tracking_beside
from jfhpo.session import recorded
from jfhpo_core.errors import SpecError
from jfhpo_core.optimizer.cost import CostModel
from jfhpo_core.study.resolved import Study, resolve
from jfhpo_core.study.spec import NAME, StrategySpec, StudySpec
from jfhpo_core.study.trial import Configuration, Trial, configuration_key


def _name() -> str:
    return f"target {run_name(flow_run.parameters)}"


@flow(name="jfhpo", flow_run_name=_name)
def target(
    study: StudySpec | str = DEFAULT_STUDY, configuration: Configuration | None = None, approve_target: bool = False
) -> State[None]:
    """Train the study's target with one configuration over all training seeds, and register the model.

    Args:
        study: Path of a study file, relative to the folder that the deployment was made from; or a whole study.
        configuration: Hyperparameters; those not named keep the study's fixed values and the trainer's defaults. Left
            out: the configuration that the study has recommended.
        approve_target: Ask a person before the further seeds are trained.
    """
    base = resolve(read(study))
    ledger = recorded(base)
    if configuration is None:
        text = ledger.facts().get("recommended") if ledger is not None else None
        if text is None:
            raise SpecError(
                f"configuration: study {base.spec.study!r} has not recommended one yet; give one, or run jfhpo/search"
            )
        configuration = json.loads(str(text))
    spec = target_study(base, configuration, ledger.trials() if ledger is not None else [])
    get_run_logger().info("training %s as study %s", show_configuration(configuration), spec.study)
    return run_with_page(spec, approve_target)


def target_study(base: Study, configuration: Configuration, trials: list[Trial]) -> StudySpec:
    """A study that trains one configuration of another one, beside it: same experiment, same registered model.

    Args:
        base: The other study.
        configuration: What is trained.
        trials: Of the other study, to forecast the cost from.

    Raises:
        SpecError: The trainer refuses the configuration, its steps do not end at the study's rungs, or the name becomes
            too long.
    """
    batch = int(base.complete(configuration)["prompts_per_step"])
    spec = base.spec
    for level in spec.fidelity.levels:
        if level % batch:
            raise SpecError(
                f"configuration: prompts_per_step={batch} does not divide the study's rung at {level} prompts; choose "
                f"one that divides {', '.join(map(str, spec.fidelity.levels))}"
            )
    name = f"{spec.study}-target-{configuration_key(configuration)}"
    if not NAME.fullmatch(name):
        raise SpecError(f"study: {name!r}, the name of the target's study, is too long; shorten {spec.study!r}")
    horizon = spec.fidelity.horizon_prompts
    cost = CostModel.fit(base, trials).estimate(configuration, base.ladder.target.name, 0, horizon).seconds
    return spec.model_copy(
        update={
            "study": name,
            "strategy": StrategySpec(name="given", settings={"configuration": configuration}),
            "budget": spec.budget.model_copy(
                update={"trial_seconds": max(1.0, cost), "gpu_hours": None, "validation_share": 0.0}
            ),
            "baselines": [],
            "random_search": False,
            "warm_start": [],
            "tracking": tracking_beside(spec),
        }
    )
