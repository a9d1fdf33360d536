"""The knowledge gradient against closed forms and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm

from jfhpo_core.acquisition import (
    TargetKnowledgeGradient,
    expected_improvement,
    knowledge_gradient,
    normal_nodes,
)
from jfhpo_core.surrogate import JointSurrogate, Moments, Observations


def surrogate(seed: int = 0) -> JointSurrogate:
    random = np.random.default_rng(seed)
    inputs = np.column_stack(
        [random.random((20, 2)), -random.choice([0.0, 0.8], 20), random.choice([0.2, 0.6, 1.0], 20)]
    )
    gains = 0.5 * np.exp(-((inputs[:, 0] - 0.4) ** 2) / 0.05) * inputs[:, -1]
    noise = torch.full((20,), 4e-4, dtype=torch.double)
    return JointSurrogate(Observations(torch.tensor(inputs), torch.tensor(gains), noise), [0]).fit()


def target_points(count: int = 30) -> torch.Tensor:
    x = np.random.default_rng(1).random((count, 2))
    return torch.tensor(np.column_stack([x, np.zeros(count), np.ones(count)]))


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
    candidate = torch.tensor([[0.45, 0.5, -0.8, 1.0]], dtype=torch.double)
    acquisition = TargetKnowledgeGradient(model, targets, 4e-4)
    with torch.no_grad():
        value = float(acquisition(candidate.unsqueeze(-2)))
        moments = model.moments()
        noise = acquisition.variance + model.kernel.seed_variance(candidate)
        mean, deviation = moments.mean(candidate), (moments.variance(candidate) + noise).sqrt()
        best = moments.mean(targets).max()
        rises = []
        for node in normal_nodes(64):
            train, gains = model.train_inputs[0], model.train_targets
            conditioned = Moments(
                model.kernel,
                model.mean_module,
                torch.cat([train, candidate]),
                torch.cat([gains, mean + node * deviation]),
                torch.cat([model.noise_variances(), noise]),
            )
            rises.append(float(conditioned.mean(targets).max() - best))
    assert value == pytest.approx(sum(rises) / len(rises) * model.scale, rel=0.05, abs=1e-5)


def test_a_pending_copy_makes_the_same_training_worth_less() -> None:
    model, targets = surrogate(), target_points()
    candidate = torch.tensor([[0.45, 0.5, 0.0, 1.0]], dtype=torch.double)
    alone = TargetKnowledgeGradient(model, targets, 4e-4)(candidate.unsqueeze(-2))
    again = TargetKnowledgeGradient(model, targets, 4e-4, pending=candidate)(candidate.unsqueeze(-2))
    assert float(again) < float(alone)


def test_a_longer_training_tells_more_about_the_target() -> None:
    model, targets = surrogate(), target_points()
    acquisition = TargetKnowledgeGradient(model, targets, 4e-4)
    rows = [[0.42, 0.5, 0.0, 1.0], [0.42, 0.5, 0.0, 0.2]]
    full, short = acquisition(torch.tensor(rows, dtype=torch.double).unsqueeze(-2)).tolist()
    assert full > short


def test_expected_improvement_is_its_closed_form() -> None:
    means, deviations = torch.tensor([0.1, 0.5], dtype=torch.double), torch.tensor([0.2, 0.1], dtype=torch.double)
    expected = [
        s * ((m - 0.3) / s * norm.cdf((m - 0.3) / s) + norm.pdf((m - 0.3) / s)) for m, s in ((0.1, 0.2), (0.5, 0.1))
    ]
    np.testing.assert_allclose(expected_improvement(means, deviations, 0.3).numpy(), expected, rtol=1e-9)
    assert math.isclose(float(expected_improvement(means[:1], deviations[:1], 9.0)), 0.0, abs_tol=1e-12)
