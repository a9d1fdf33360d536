"""The knowledge gradient against closed forms, against simulation and against BoTorch's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from botorch.acquisition.knowledge_gradient import qMultiFidelityKnowledgeGradient
from botorch.sampling import SobolQMCNormalSampler
from scipy.stats import norm

from jfhpo_core.optimizer.acquisition import (
    NetCostUtility,
    TargetKnowledgeGradient,
    expected_improvement,
    knowledge_gradient,
    normal_nodes,
)
from jfhpo_core.optimizer.surrogate import (
    ANY_SEED,
    JointStructure,
    JointSurrogate,
    Moments,
    Observations,
    fitted_surrogate,
)

NEW_TRIAL = 99.0
MEASUREMENT = 4e-4


def surrogate(seed: int = 0, dimension: int = 2, draws: int = 1) -> JointSurrogate:
    random = np.random.default_rng(seed)
    x, size = random.random((20, dimension)), -random.choice([0.0, 0.8], 20)
    share = random.choice([0.2, 0.6, 1.0], 20)
    inputs = torch.tensor(np.column_stack([x, size, share, np.arange(20), np.zeros(20)]))
    values = torch.tensor(0.5 * np.exp(-((x[:, 0] - 0.4) ** 2) / 0.05) * share)
    data = Observations(inputs, values, torch.full((20,), MEASUREMENT, dtype=torch.double))
    return fitted_surrogate(data, data, JointStructure(dimension, []), draws)


def at_target(x: np.ndarray) -> torch.Tensor:
    count = len(x)
    return torch.tensor(
        np.column_stack([x, np.zeros(count), np.ones(count), np.full(count, ANY_SEED), np.zeros(count)])
    )


def target_points(count: int = 30) -> torch.Tensor:
    return at_target(np.random.default_rng(1).random((count, 2)))


def candidates(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[*row, NEW_TRIAL, 0.0] for row in rows], dtype=torch.double)


def test_nodes_have_the_moments_of_the_standard_normal() -> None:
    nodes = normal_nodes()
    assert float(nodes.mean()) == pytest.approx(0, abs=1e-12)
    assert float(nodes.square().mean()) == pytest.approx(1)


@pytest.mark.parametrize(("gap", "slope"), [(0.0, 1.0), (0.5, 1.0), (1.5, 0.7), (0.1, 0.01)])
def test_two_alternatives_have_a_closed_form(gap: float, slope: float) -> None:
    """E max(0, -gap + slope Z) = slope phi(u) - gap Phi(-u) with u = gap / slope."""
    means = torch.tensor([0.0, -gap], dtype=torch.double)
    slopes = torch.tensor([[0.0], [slope]], dtype=torch.double)
    u = gap / slope
    expected = slope * norm.pdf(u) - gap * norm.cdf(-u)
    assert float(knowledge_gradient(means, slopes, normal_nodes(512))) == pytest.approx(expected, abs=2e-3 * slope)


def test_many_alternatives_agree_with_simulation() -> None:
    random = np.random.default_rng(3)
    means, slopes = random.normal(size=25), random.normal(size=(25, 4)) * 0.5
    z = random.normal(size=200_000)
    expected = [float(np.max(means[:, None] + slopes[:, [c]] * z, axis=0).mean() - means.max()) for c in range(4)]
    computed = knowledge_gradient(torch.tensor(means), torch.tensor(slopes), normal_nodes(128))
    np.testing.assert_allclose(computed.numpy(), expected, atol=5e-3)


def test_an_observation_that_moves_all_means_alike_is_worth_nothing() -> None:
    means = torch.tensor([0.3, 0.1], dtype=torch.double)
    assert float(knowledge_gradient(means, torch.full((2, 1), 0.7, dtype=torch.double))) == pytest.approx(0, abs=1e-12)


def test_the_acquisition_agrees_with_refitting_on_fantasies() -> None:
    """Simulate the observation, condition a fresh posterior on it, and average the rise of the best mean."""
    model, targets = surrogate(), target_points()
    candidate = candidates([0.45, 0.5, -0.8, 1.0])
    acquisition = TargetKnowledgeGradient(model, targets, MEASUREMENT)
    value = float(acquisition(candidate.unsqueeze(-2)))
    data, variance = model.observations, MEASUREMENT
    believed = model.moments().at(candidate)
    best = model.moments().at(targets).mean.max()
    rises = []
    for node in normal_nodes(64):
        seen = believed.mean + node * (believed.variance + variance).sqrt()
        conditioned = Moments(
            model.structure,
            model.parameter_draws,
            torch.cat([data.inputs, candidate]),
            torch.cat([data.values.unsqueeze(0), seen], dim=1),
            torch.cat([data.variances, torch.full((1,), variance, dtype=torch.double)]),
        )
        rises.append(float(conditioned.at(targets).mean.max() - best))
    assert value == pytest.approx(sum(rises) / len(rises), rel=0.05, abs=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_it_agrees_with_botorchs_stock_multi_fidelity_knowledge_gradient() -> None:
    """One hyperparameter: our fine grid of target points against BoTorch's inner optimization over fantasies."""
    model = surrogate(dimension=1)
    grid = at_target(np.linspace(0, 1, 201)[:, None])
    rows = candidates([0.2, 0.0, 1.0], [0.6, 0.0, 1.0], [0.3, -0.8, 1.0], [0.45, -0.8, 0.2], [0.9, 0.0, 0.6])
    ours = TargetKnowledgeGradient(model, grid, MEASUREMENT)(rows.unsqueeze(-2)).numpy()

    def project(points: torch.Tensor) -> torch.Tensor:
        projected = points.clone()
        projected[..., 1:] = grid[0, 1:]
        return projected

    with torch.no_grad():
        current = model.posterior(grid).mean.max()
    stock = qMultiFidelityKnowledgeGradient(
        model,
        num_fantasies=64,
        sampler=SobolQMCNormalSampler(torch.Size([64]), seed=1),
        current_value=current,
        project=project,
    )
    bounds = torch.stack([grid[0], grid[-1]])
    torch.manual_seed(0)
    theirs = np.array(
        [float(stock.evaluate(row.view(1, 1, -1), bounds=bounds, num_restarts=4, raw_samples=64)) for row in rows]
    )
    np.testing.assert_allclose(ours, theirs, rtol=0.15, atol=3e-5)
    assert ours.argmax() == theirs.argmax()


def test_an_ensemble_averages_its_members() -> None:
    model, targets = surrogate(draws=4), target_points()
    rows = candidates([0.45, 0.5, 0.0, 1.0], [0.2, 0.1, -0.8, 0.6])
    together = TargetKnowledgeGradient(model, targets, MEASUREMENT)(rows.unsqueeze(-2))
    single = [
        TargetKnowledgeGradient(
            JointSurrogate(model.observations, model.structure, member.unsqueeze(0)), targets, MEASUREMENT
        )(rows.unsqueeze(-2))
        for member in model.parameter_draws
    ]
    np.testing.assert_allclose(together.numpy(), torch.stack(single).mean(0).numpy(), rtol=1e-6)


def test_a_target_that_cannot_be_trained_is_not_worth_learning_about() -> None:
    model, targets = surrogate(), target_points()
    row = candidates([0.45, 0.5, 0.0, 1.0]).unsqueeze(-2)
    certain = TargetKnowledgeGradient(model, targets, MEASUREMENT)(row)
    doomed = TargetKnowledgeGradient(model, targets, MEASUREMENT, torch.zeros(30, dtype=torch.double))(row)
    assert float(certain) > 0
    assert float(doomed) == 0


def test_the_utility_divides_by_the_net_price() -> None:
    model, targets = surrogate(), target_points()
    rows = candidates([0.45, 0.5, 0.0, 1.0], [0.2, 0.1, -0.8, 0.6]).unsqueeze(-2)
    plain = TargetKnowledgeGradient(model, targets, MEASUREMENT)(rows)
    price = torch.tensor([50.0, 4.0], dtype=torch.double)
    utility = NetCostUtility(lambda _: price)
    weighed = TargetKnowledgeGradient(model, targets, MEASUREMENT, utility=utility)(rows)
    np.testing.assert_allclose(weighed.numpy(), (plain / price).numpy())


def test_a_pending_copy_makes_the_same_training_worth_less() -> None:
    model, targets = surrogate(), target_points()
    candidate = candidates([0.45, 0.5, 0.0, 1.0])
    running = candidate.clone()
    running[0, 4] = NEW_TRIAL + 1
    alone = TargetKnowledgeGradient(model, targets, MEASUREMENT)(candidate.unsqueeze(-2))
    again = TargetKnowledgeGradient(model, targets, MEASUREMENT, pending=running)(candidate.unsqueeze(-2))
    assert float(again) < float(alone)


def test_a_longer_training_tells_more_about_the_target() -> None:
    model, targets = surrogate(), target_points()
    acquisition = TargetKnowledgeGradient(model, targets, MEASUREMENT)
    rows = candidates([0.42, 0.5, 0.0, 1.0], [0.42, 0.5, 0.0, 0.2])
    full, short = acquisition(rows.unsqueeze(-2)).tolist()
    assert full > short


def test_expected_improvement_is_its_closed_form() -> None:
    means, deviations = torch.tensor([0.1, 0.5], dtype=torch.double), torch.tensor([0.2, 0.1], dtype=torch.double)
    expected = [
        s * ((m - 0.3) / s * norm.cdf((m - 0.3) / s) + norm.pdf((m - 0.3) / s)) for m, s in ((0.1, 0.2), (0.5, 0.1))
    ]
    np.testing.assert_allclose(expected_improvement(means, deviations, 0.3).numpy(), expected, rtol=1e-9)
    assert math.isclose(float(expected_improvement(means[:1], deviations[:1], 9.0)), 0.0, abs_tol=1e-12)
