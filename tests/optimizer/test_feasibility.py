"""The feasibility classifier: against numerical integration, and on what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

from jfhpo_core.optimizer import feasibility
from jfhpo_core.optimizer.feasibility import Feasibility


def points(x: np.ndarray, size: float | np.ndarray = 0.0) -> torch.Tensor:
    return torch.tensor(np.column_stack([x, np.broadcast_to(size, len(x))]), dtype=torch.double)


def test_one_verdict_agrees_with_the_exact_posterior() -> None:
    """With one label the posterior of its latent value is one-dimensional: integrate it."""
    inputs = points(np.array([[0.5, 0.5]]))
    deviation = np.sqrt(feasibility.BIAS_VARIANCE + feasibility.LOCAL_VARIANCE)

    def moment(label: int, extra: int) -> float:
        def density(h: float) -> float:
            sign = 2 * label - 1
            return norm.pdf(h, 0, deviation) * norm.cdf(sign * (h + feasibility.OFFSET))

        return quad(lambda h: density(h) * norm.cdf(h + feasibility.OFFSET) ** extra, -12, 12)[0]

    for label in (0, 1):
        exact = moment(label, 1) / moment(label, 0)
        found = float(Feasibility.fit(inputs, torch.tensor([float(label)], dtype=torch.double)).probability(inputs))
        assert found == pytest.approx(exact, abs=0.03)


def test_a_boundary_is_learned_from_a_few_verdicts_and_moves_with_size() -> None:
    """Collapse above 0.7 on the target and above 0.9 on a model ten times smaller."""
    random = np.random.default_rng(0)
    x = random.random((40, 3))
    size = -random.choice([0.0, 1.0], 40)
    feasible = (x[:, 0] < 0.7 - 0.2 * size).astype(float)
    model = Feasibility.fit(points(x, size), torch.tensor(feasible))
    probe = np.array([[0.3, 0.5, 0.5], [0.8, 0.5, 0.5], [0.98, 0.5, 0.5]])
    on_target, on_proxy = model.probability(points(probe)).tolist(), model.probability(points(probe, -1.0)).tolist()
    assert on_target[0] > 0.9
    assert on_target[2] < 0.3
    assert on_proxy[1] > on_target[1] + 0.15


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 30), label=st.sampled_from(["all", "none", "mixed"]))
def test_probabilities_are_probabilities(seed: int, count: int, label: str) -> None:
    random = np.random.default_rng(seed)
    x = np.repeat(random.random((max(1, count // 2), 4)), 2, axis=0)[:count]
    feasible = {"all": np.ones(len(x)), "none": np.zeros(len(x)), "mixed": random.integers(0, 2, len(x))}[label]
    model = Feasibility.fit(points(x), torch.tensor(feasible, dtype=torch.double))
    probability = model.probability(points(random.random((50, 4)), -0.5))
    assert bool(((probability >= 0) & (probability <= 1)).all())


@pytest.mark.slow
def test_two_thousand_verdicts_are_no_trouble() -> None:
    x = np.random.default_rng(0).random((2000, 2))
    model = Feasibility.fit(points(x), torch.tensor((x[:, 0] < 0.6).astype(float)))
    low, high = model.probability(points(np.array([[0.3, 0.5], [0.9, 0.5]]))).tolist()
    assert low > 0.95
    assert high < 0.05


def test_functions_are_drawn_around_the_probability_and_stay_what_they_are() -> None:
    random = np.random.default_rng(0)
    x = random.random((30, 2))
    model = Feasibility.fit(points(x), torch.tensor((x[:, 0] < 0.6).astype(float)))
    anchors = points(random.random((40, 2)))
    drawn = model.drawn(anchors, torch.from_numpy(random.standard_normal((4000, 40))))
    at_anchors = drawn(anchors.expand(4000, -1, -1))
    assert torch.allclose(at_anchors.mean(0), model.probability(anchors), atol=0.05)
    assert torch.allclose(at_anchors[:, :3], drawn(anchors[:3].expand(4000, -1, -1)))
    # They agree among runs that did, and differ at the boundary.
    inside, boundary = drawn(points(np.array([[0.1, 0.5], [0.6, 0.5]])).expand(4000, -1, -1)).std(0).tolist()
    assert inside < 0.1 < boundary
