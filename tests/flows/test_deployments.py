from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def deployments(path: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))["deployments"])


def test_containers_get_the_same_deployments_as_the_clone() -> None:
    for here, there in zip(deployments("prefect.yaml"), deployments("deployments/containers.yaml"), strict=True):
        ignored = ("work_pool", "description")
        assert {name: here[name] for name in here if name not in ignored} == {
            name: there[name] for name in there if name not in ignored
        }


@pytest.mark.parametrize("deployment", deployments("prefect.yaml"), ids=lambda item: item["name"])
def test_a_deployment_leads_to_a_flow_that_takes_its_parameters(deployment: dict[str, Any]) -> None:
    from prefect.flows import load_flow_from_entrypoint

    flow = load_flow_from_entrypoint(str(ROOT / deployment["entrypoint"]))
    assert flow.name == "jfhpo"
    assert deployment["parameters"].keys() <= flow.parameters.properties.keys()
    assert (ROOT / deployment["parameters"]["study"]).exists()
    for name, schema in flow.parameters.properties.items():
        assert schema.get("description"), f"the form says nothing about {name}"
