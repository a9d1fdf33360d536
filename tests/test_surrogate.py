"""The surrogate against closed forms written down independently with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jfhpo_core import surrogate
from jfhpo_core.surrogate import JointFidelityKernel, JointSurrogate, Moments, Observations, matern52

DIMENSION = 3


def random_inputs(count: int, seed: int = 0, dimension: int = DIMENSION) -> torch.Tensor:
    random = np.random.default_rng(seed)
    x = random.random((count, dimension))
    z = -random.choice([0.0, 0.3, 0.8], (count, 1))
    t = random.choice([0.2, 0.4, 0.6, 0.8, 1.0], (count, 1))
    return torch.tensor(np.hstack([x, z, t]), dtype=torch.double)


def observations(count: int, seed: int = 0) -> Observations:
    inputs = random_inputs(count, seed)
    gains = 0.5 * torch.exp(-((inputs[:, 0] - 0.5) ** 2) / 0.05) * inputs[:, -1]
    return Observations(inputs, gains, torch.full((count,), 4e-4, dtype=torch.double))


def reference_covariance(kernel: JointFidelityKernel, a: np.ndarray, b: np.ndarray) -> float:
    """The kernel's formula for two points, in plain numpy."""
    value = {name: parameter.detach().numpy() for name, parameter in kernel.parameters_.named_parameters()}
    scale = np.exp(value["lengthscales"])

    def matern(r: float) -> float:
        return (1 + math.sqrt(5) * r + 5 * r**2 / 3) * math.exp(-math.sqrt(5) * r)

    def saturation(t: float) -> float:
        tau = math.exp(value["tau"][0])
        return (1 - math.exp(-t / tau)) / (1 - math.exp(-1 / tau))

    def shifted(p: np.ndarray) -> np.ndarray:
        x = p[:DIMENSION].copy()
        for index, coordinate in enumerate(kernel.shifting):
            x[coordinate] += value["shift"][index] * p[DIMENSION]
        return x

    shared = math.exp(value["shared"][0]) * matern(float(np.linalg.norm((shifted(a) - shifted(b)) / scale)))
    distance = float(np.linalg.norm((a[:DIMENSION] - b[:DIMENSION]) / scale)) / math.exp(value["stretch"][0])
    residual = math.exp(value["residual"][0]) * matern(distance)
    below = min(-a[DIMENSION], -b[DIMENSION])
    over_time = matern(abs(a[-1] - b[-1]) / math.exp(value["time"][0]))
    return (
        saturation(a[-1]) * saturation(b[-1]) * over_time * (shared + below * (residual + math.exp(value["size"][0])))
    )


def test_covariance_is_the_documented_formula() -> None:
    kernel = JointFidelityKernel(DIMENSION, [0])
    with torch.no_grad():
        kernel.parameters_.shift.fill_(0.2)
        kernel.parameters_.lengthscales.copy_(torch.tensor([-1.0, 0.0, 0.5]))
    inputs = random_inputs(12)
    computed = kernel.forward(inputs, inputs).detach().numpy()
    expected = [[reference_covariance(kernel, a, b) for b in inputs.numpy()] for a in inputs.numpy()]
    np.testing.assert_allclose(computed, expected, atol=1e-5)
    np.testing.assert_allclose(kernel.variance(inputs).detach().numpy(), computed.diagonal(), atol=1e-5)


def test_prior_parameters_begin_at_their_prior_means() -> None:
    kernel = JointFidelityKernel(DIMENSION, [0])
    assert float(kernel.parameters_.lengthscales.exp()[0].detach()) == pytest.approx(0.8)
    assert float(kernel.parameters_.tau.exp().detach()) == pytest.approx(0.6)
    assert float(kernel.parameters_.shift.detach()) == 0.0
    assert float(kernel.parameters_.log_prior().detach()) == 0.0
    with torch.no_grad():
        kernel.parameters_.tau += surrogate.TIME_CONSTANT.deviation
    assert float(kernel.parameters_.log_prior().detach()) == pytest.approx(-0.5)


def test_curves_start_at_zero_and_the_target_has_no_residual() -> None:
    kernel = JointFidelityKernel(DIMENSION, [])
    start = torch.tensor([[0.1, 0.2, 0.3, -0.5, 0.0]], dtype=torch.double)
    end = torch.tensor([[0.1, 0.2, 0.3, 0.0, 1.0]], dtype=torch.double)
    assert kernel.variance(start).item() == 0.0
    assert kernel.forward(end, end).item() == pytest.approx(kernel.parameters_.shared.exp().item(), abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 25))
def test_covariance_is_positive_semidefinite(seed: int, count: int) -> None:
    kernel = JointFidelityKernel(DIMENSION, [0])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in kernel.parameters_.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.double) * 0.5)
    inputs = random_inputs(count, seed)
    matrix = kernel.forward(inputs, inputs).detach()
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-6 * float(matrix.diagonal().max())


def test_posterior_is_gaussian_conditioning() -> None:
    data = observations(15)
    model = JointSurrogate(data, [0]).fit()
    inputs = random_inputs(6, seed=1)
    train = data.inputs
    with torch.no_grad():
        k = model.kernel.forward(train, train).numpy()
        ks = model.kernel.forward(inputs, train).numpy()
        kss = model.kernel.forward(inputs, inputs).numpy()
        noise = model.noise_variances().numpy() + surrogate.JITTER
        prior_train = model.mean_module(train).numpy()
        prior = model.mean_module(inputs).numpy()
    targets = data.gains.numpy() / model.scale
    inverse = np.linalg.inv(k + np.diag(noise))
    mean = prior + ks @ inverse @ (targets - prior_train)
    covariance = kss - ks @ inverse @ ks.T
    moments = model.moments()
    np.testing.assert_allclose(moments.mean(inputs).numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(moments.covariance(inputs, inputs).numpy(), covariance, atol=1e-6)
    np.testing.assert_allclose(moments.variance(inputs).numpy(), covariance.diagonal(), atol=1e-6)


def test_botorch_posterior_agrees_with_the_lean_one() -> None:
    model = JointSurrogate(observations(20), [0]).fit()
    inputs = random_inputs(7, seed=2)
    with torch.no_grad():
        posterior = model.posterior(inputs)
    moments = model.moments()
    np.testing.assert_allclose(posterior.mean.squeeze(-1).numpy(), moments.mean(inputs).numpy(), atol=1e-3)
    np.testing.assert_allclose(posterior.variance.squeeze(-1).numpy(), moments.variance(inputs).numpy(), atol=1e-3)


def test_log_posterior_is_the_normal_log_density_plus_log_prior() -> None:
    model = JointSurrogate(observations(10), [0])
    inputs, targets = model.train_inputs[0], model.train_targets
    with torch.no_grad():
        covariance = model.kernel.forward(inputs, inputs) + torch.diag(model.noise_variances() + surrogate.JITTER)
        normal = torch.distributions.MultivariateNormal(model.mean_module(inputs), covariance)
        constant = len(targets) / 2 * math.log(2 * math.pi)
        value = model.log_posterior()
        assert value is not None
        assert float(value) == pytest.approx(float(normal.log_prob(targets)) + constant, abs=1e-4)


def test_fit_raises_the_posterior_and_is_deterministic() -> None:
    data = observations(25)
    before = JointSurrogate(data, [0]).log_posterior()
    first, second = JointSurrogate(data, [0]).fit(), JointSurrogate(data, [0]).fit()
    after = first.log_posterior()
    assert before is not None
    assert after is not None
    assert float(after.detach()) > float(before.detach()) + 5
    inputs = random_inputs(5, seed=3)
    assert torch.equal(first.gain_moments(inputs)[0], second.gain_moments(inputs)[0])


def test_the_best_learning_rate_is_learned_to_move_with_size() -> None:
    """Data whose optimum moves by -0.2 per decade; beta must move against it, so that the shared optimum is common."""
    random = np.random.default_rng(0)
    x, z = random.random((60, 1)), -random.choice([0.0, 1.0], (60, 1))
    gains = 0.6 * np.exp(-((x[:, 0] - (0.5 - 0.2 * z[:, 0])) ** 2) / 0.02)
    inputs = torch.tensor(np.hstack([x, z, np.ones((60, 1))]))
    data = Observations(inputs, torch.tensor(gains), torch.full((60,), 1e-4, dtype=torch.double))
    model = JointSurrogate(data, [0]).fit()
    assert float(model.kernel.parameters_.shift.detach()) == pytest.approx(0.2, abs=0.06)


def test_pending_trainings_leave_the_mean_and_shrink_the_variance() -> None:
    model = JointSurrogate(observations(12), []).fit()
    pending = random_inputs(2, seed=5)
    plain, fuller = model.moments(), model.moments(pending, torch.full((2,), 1e-3, dtype=torch.double))
    inputs = random_inputs(8, seed=6)
    np.testing.assert_allclose(fuller.mean(inputs).numpy(), plain.mean(inputs).numpy(), atol=1e-6)
    assert bool((fuller.variance(pending) < plain.variance(pending)).all())


@pytest.mark.parametrize(("count", "gain"), [(1, 0.1), (3, 0.0), (30, 0.2)], ids=["one point", "all zero", "constant"])
def test_degenerate_data_give_finite_answers(count: int, gain: float) -> None:
    inputs = random_inputs(1).repeat(count, 1)
    data = Observations(
        inputs, torch.full((count,), gain, dtype=torch.double), torch.full((count,), 1e-4, dtype=torch.double)
    )
    mean, deviation = JointSurrogate(data, [0]).fit().gain_moments(random_inputs(20, seed=9))
    assert bool(torch.isfinite(mean).all())
    assert bool(torch.isfinite(deviation).all())


def test_matern_is_one_at_zero_and_falls() -> None:
    values = matern52(torch.linspace(0, 3, 10, dtype=torch.double))
    assert float(values[0]) == 1.0
    assert bool((values.diff() < 0).all())


def test_moments_with_huge_noise_return_the_prior() -> None:
    model = JointSurrogate(observations(5), [])
    inputs = model.train_inputs[0]
    moments = Moments(
        model.kernel, model.mean_module, inputs, model.train_targets, torch.full((5,), 1e12, dtype=torch.double)
    )
    np.testing.assert_allclose(
        moments.variance(inputs).numpy(), model.kernel.variance(inputs).detach().numpy(), rtol=1e-6
    )
