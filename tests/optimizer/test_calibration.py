"""The closed forms against Gaussian processes that are conditioned anew."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from jfhpo_core.optimizer.calibration import PRIOR_INFLATION, PRIOR_TRAININGS, inflation, judged_trainings, left_out

PROXY, MIDDLE, TARGET = -1.0, -0.5, 0.0
FIDELITIES = torch.tensor(
    [
        [PROXY, 0.5, 0, 0],
        [PROXY, 1.0, 0, 0],
        [MIDDLE, 1.0, 1, 0],
        [TARGET, 1.0, 2, 0],
        [MIDDLE, 0.5, 1, 0],
        [TARGET, 0.5, 2, 0],
        [TARGET, 1.0, 1, 1],
    ],
    dtype=torch.double,
)
"""(size, progress, training, study): a training of each model, and one of an earlier study that shares a number."""

MEMBERS = 3


def covariances(count: int = len(FIDELITIES), members: int = MEMBERS) -> torch.Tensor:
    roots = torch.tensor(np.random.default_rng(1).normal(size=(members, count, count)))
    return roots @ roots.mT + 0.5 * torch.eye(count, dtype=torch.double)


def residuals(count: int = len(FIDELITIES), members: int = MEMBERS) -> torch.Tensor:
    return torch.tensor(np.random.default_rng(2).normal(size=(members, count)))


def conditioned(covariance: np.ndarray, values: np.ndarray, rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Error and covariance of some rows given all others, by the textbook formula."""
    others = [index for index in range(len(values)) if index not in rows]
    gain = covariance[np.ix_(rows, others)] @ np.linalg.inv(covariance[np.ix_(others, others)])
    return values[rows] - gain @ values[others], covariance[np.ix_(rows, rows)] - gain @ covariance[
        np.ix_(others, rows)
    ]


def test_leaving_out_equals_conditioning_on_the_others() -> None:
    covariance, values = covariances(), residuals()
    precision = torch.linalg.inv(covariance)
    rows = [4, 2]
    errors, spread = left_out(precision, (precision @ values.unsqueeze(-1)).squeeze(-1), torch.tensor(rows))
    for member in range(MEMBERS):
        error, expected = conditioned(covariance[member].numpy(), values[member].numpy(), rows)
        np.testing.assert_allclose(errors[member], error)
        np.testing.assert_allclose(spread[member], expected)


def test_trainings_of_larger_models_are_judged_by_progress() -> None:
    assert [rows.tolist() for rows in judged_trainings(FIDELITIES)] == [[4, 2], [5, 3]]


def test_a_target_without_proxies_is_judged() -> None:
    alone = FIDELITIES[FIDELITIES[:, 0] == TARGET]
    assert [rows.tolist() for rows in judged_trainings(alone)] == [[1, 0]]


@pytest.mark.parametrize("rows", [[0, 1], [6], []])
def test_without_a_larger_model_the_prior_speaks(rows: list[int]) -> None:
    found = inflation(torch.linalg.cholesky(covariances()[:, rows][:, :, rows]), residuals()[:, rows], FIDELITIES[rows])
    assert found == pytest.approx(math.sqrt(PRIOR_INFLATION))


def test_factor_is_the_closed_form_over_the_mixture() -> None:
    covariance, values = covariances(), residuals()
    total = 0.0
    for rows in ([4, 2], [5, 3]):
        pairs = [conditioned(covariance[member].numpy(), values[member].numpy(), rows) for member in range(MEMBERS)]
        errors = [float(error[-1]) for error, _ in pairs]
        total += np.mean(errors) ** 2 / (np.mean([spread[-1, -1] for _, spread in pairs]) + np.var(errors))
    expected = math.sqrt((PRIOR_TRAININGS * PRIOR_INFLATION + total) / (PRIOR_TRAININGS + 2))
    assert inflation(torch.linalg.cholesky(covariance), values, FIDELITIES) == pytest.approx(expected)


@pytest.mark.parametrize("truth", [1.0, 4.0])
def test_many_trainings_outweigh_the_prior(truth: float) -> None:
    """Data whose variance is `truth` times what the covariance says: the factor finds it."""
    count = 600
    random = np.random.default_rng(3)
    x = random.random((count, 1))
    covariance = torch.tensor(np.exp(-((x - x.T) ** 2) / 0.02) + 0.1 * np.eye(count))
    factor = torch.linalg.cholesky(covariance).unsqueeze(0)
    drawn = math.sqrt(truth) * (factor @ torch.tensor(random.normal(size=(1, count, 1)))).squeeze(-1)
    fidelities = torch.zeros(count, 4, dtype=torch.double)
    fidelities[:, 1], fidelities[:, 2] = 1.0, torch.arange(count)
    assert inflation(factor, drawn, fidelities) ** 2 == pytest.approx(truth, rel=0.15)
