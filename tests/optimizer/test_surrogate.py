"""The surrogate against closed forms written down independently with numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from botorch.acquisition import LogExpectedImprovement
from hypothesis import given, settings
from hypothesis import strategies as st

from jfhpo_core.optimizer import surrogate
from jfhpo_core.optimizer.surrogate import (
    ANY_SEED,
    JITTER,
    JointStructure,
    JointSurrogate,
    Moments,
    Observations,
    fit_parameters,
    fitted_surrogate,
    log_posterior,
    matern52,
)

DIMENSION = 3


def random_inputs(count: int, seed: int = 0, studies: int = 1) -> torch.Tensor:
    random = np.random.default_rng(seed)
    x = random.random((count, DIMENSION))
    z = -random.choice([0.0, 0.3, 0.8], (count, 1))
    t = random.choice([0.2, 0.4, 0.6, 0.8, 1.0], (count, 1))
    trial = random.integers(-1, 4, (count, 1))
    study = random.integers(0, studies, (count, 1))
    return torch.tensor(np.hstack([x, z, t, trial, study]), dtype=torch.double)


def observations(count: int, seed: int = 0) -> Observations:
    inputs = random_inputs(count, seed)
    inputs[:, DIMENSION + 2] = torch.arange(count)
    gains = 0.5 * torch.exp(-((inputs[:, 0] - 0.5) ** 2) / 0.05) * inputs[:, DIMENSION + 1]
    return Observations(inputs, gains, torch.full((count,), 4e-4, dtype=torch.double))


def model_of(data: Observations, shifting: tuple[int, ...] = (0,), draws: int = 1) -> JointSurrogate:
    return fitted_surrogate(data, data, JointStructure(DIMENSION, shifting), draws)


def some_parameters(structure: JointStructure, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(structure.prior_mean), generator=generator, dtype=torch.double)
    return structure.prior_mean + 0.5 * noise * structure.prior_deviation


def reference_covariance(structure: JointStructure, parameters: torch.Tensor, a: np.ndarray, b: np.ndarray) -> float:
    """The formula for two points, in plain numpy."""
    value = {name: parameters[place].numpy() for name, place in structure.slices.items()}
    d, scale = DIMENSION, np.exp(value["lengthscales"])

    def matern(r: float) -> float:
        return (1 + math.sqrt(5) * r + 5 * r**2 / 3) * math.exp(-math.sqrt(5) * r)

    def amplitude(t: float) -> float:
        return math.exp(-value["growth"][0] * (1 - t))

    def shifted(p: np.ndarray) -> np.ndarray:
        x = p[:d].copy()
        for index, coordinate in enumerate(structure.shifting):
            x[coordinate] += value["shift"][index] * p[d]
        return x

    def relation(p: np.ndarray) -> float:
        study = int(p[d + 3])
        return 1.0 if study == 0 else 1 / (1 + math.exp(-value["relation"][study - 1]))

    shared = math.exp(value["shared"][0]) * matern(float(np.linalg.norm((shifted(a) - shifted(b)) / scale)))
    distance = float(np.linalg.norm((a[:d] - b[:d]) / scale)) / math.exp(value["stretch"][0])
    residual = math.exp(value["residual"][0]) * matern(distance)
    over_time = matern(abs(a[d + 1] - b[d + 1]) / math.exp(value["time"][0]))
    both = over_time * (shared + min(-a[d], -b[d]) * residual)
    level = 0.0
    if a[d + 3] != b[d + 3]:
        both *= relation(a) * relation(b)
    else:
        if a[d + 2] == b[d + 2] and a[d + 2] >= 0:
            both += math.exp(value["seed"][0])
        level = math.exp(value["offset"][0]) * matern(abs(a[d] - b[d])) * matern(abs(a[d + 1] - b[d + 1]))
    return amplitude(a[d + 1]) * amplitude(b[d + 1]) * both + level


def test_covariance_is_the_documented_formula() -> None:
    structure = JointStructure(DIMENSION, [0, 2], earlier=2)
    parameters, inputs = some_parameters(structure), random_inputs(14, studies=3)
    computed = structure.covariance(parameters, inputs, inputs).numpy()
    expected = [[reference_covariance(structure, parameters, a, b) for b in inputs.numpy()] for a in inputs.numpy()]
    np.testing.assert_allclose(computed, expected, atol=1e-5)
    np.testing.assert_allclose(structure.variance(parameters, inputs).numpy(), computed.diagonal(), atol=1e-5)


def test_an_ensemble_of_parameters_is_computed_at_once() -> None:
    structure, inputs = JointStructure(DIMENSION, [0], earlier=2), random_inputs(6, studies=3)
    members = torch.stack([some_parameters(structure, seed) for seed in range(3)])
    together = structure.covariance(members, inputs, inputs)
    for member, matrix in zip(members, together, strict=True):
        np.testing.assert_allclose(matrix.numpy(), structure.covariance(member, inputs, inputs).numpy(), atol=1e-12)


def test_the_prior_is_the_documented_one() -> None:
    structure = JointStructure(DIMENSION, [0], earlier=2)
    mean = structure.prior_mean
    assert float(structure.value(mean, "lengthscales")[0].exp()) == pytest.approx(0.8)
    assert float(structure.value(mean, "growth")) == pytest.approx(0.5)
    assert float(structure.value(mean, "shift")) == 0.0
    assert torch.sigmoid(structure.value(mean, "relation")).tolist() == pytest.approx([0.82, 0.82], abs=0.005)
    assert float(structure.log_prior(mean)) == 0.0
    moved = mean.clone()
    moved[structure.slices["growth"]] += surrogate.GROWTH.deviation
    assert float(structure.log_prior(moved)) == pytest.approx(-0.5)


def test_the_target_has_no_residual_and_short_runs_differ_less() -> None:
    structure = JointStructure(DIMENSION, [])
    parameters = structure.prior_mean
    level = math.exp(surrogate.OFFSET_VARIANCE.mean)
    end = torch.tensor([[0.1, 0.2, 0.3, 0.0, 1.0, ANY_SEED, 0]], dtype=torch.double)
    assert structure.variance(parameters, end).item() == pytest.approx(1.0 + level)
    early = end.clone()
    early[0, DIMENSION + 1] = 0.5
    assert structure.variance(parameters, early).item() == pytest.approx(math.exp(-0.5) + level)
    trained = end.clone()
    trained[0, DIMENSION + 2] = 3
    assert structure.variance(parameters, trained).item() == pytest.approx(1.02 + level)
    proxy = end.clone()
    proxy[0, DIMENSION] = -1.0
    assert structure.variance(parameters, proxy).item() == pytest.approx(1.4 + level)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), count=st.integers(1, 25))
def test_covariance_is_positive_semidefinite(seed: int, count: int) -> None:
    structure = JointStructure(DIMENSION, [0], earlier=2)
    inputs = random_inputs(count, seed, studies=3)
    matrix = structure.covariance(some_parameters(structure, seed), inputs, inputs)
    assert float(torch.linalg.eigvalsh(matrix).min()) > -1e-6 * float(matrix.diagonal().max())


def test_posterior_is_gaussian_conditioning() -> None:
    data = observations(15)
    model = model_of(data)
    structure, parameters = model.structure, model.parameter_draws[0]
    inputs, train = random_inputs(6, seed=1), data.inputs
    k = structure.covariance(parameters, train, train).numpy()
    ks = structure.covariance(parameters, inputs, train).numpy()
    kss = structure.covariance(parameters, inputs, inputs).numpy()
    noise = data.variances.numpy() + JITTER
    inverse = np.linalg.inv(k + np.diag(noise))
    centred = data.values.numpy() - structure.mean(parameters, train).numpy()
    mean = structure.mean(parameters, inputs).numpy() + ks @ inverse @ centred
    covariance = kss - ks @ inverse @ ks.T
    moments = model.moments()
    found = moments.at(inputs)
    np.testing.assert_allclose(found.mean[0].numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(moments.covariance(found, found)[0].numpy(), covariance, atol=1e-6)
    np.testing.assert_allclose(found.variance[0].numpy(), covariance.diagonal(), atol=1e-6)


@pytest.mark.parametrize("draws", [1, 4], ids=["one model", "ensemble"])
def test_botorch_posterior_agrees_with_the_lean_one(draws: int) -> None:
    model = model_of(observations(20), draws=draws)
    inputs = random_inputs(7, seed=2)
    with torch.no_grad():
        posterior = model.posterior(inputs)
    means, deviations = model.moments().at(inputs).mixture()
    if draws == 1:
        mean, variance = posterior.mean, posterior.variance
    else:
        mean, variance = posterior.mixture_mean, posterior.mixture_variance
    np.testing.assert_allclose(mean.squeeze(-1).numpy(), means.numpy(), atol=1e-3)
    # BoTorch's mixture divides the spread of the members' means by one less than their number.
    np.testing.assert_allclose(variance.squeeze(-1).numpy(), deviations.square().numpy(), atol=1e-3, rtol=0.4)


def test_stock_acquisition_functions_take_the_ensemble() -> None:
    model = model_of(observations(20), draws=4)
    with torch.no_grad():
        values = LogExpectedImprovement(model, best_f=0.5)(random_inputs(9, seed=4).unsqueeze(-2))
    assert values.shape == (9,)
    assert bool(values.isfinite().all())


def test_log_posterior_is_the_normal_log_density_plus_log_prior() -> None:
    data, structure = observations(10), JointStructure(DIMENSION, [0])
    parameters = some_parameters(structure)
    covariance = structure.covariance(parameters, data.inputs, data.inputs)
    covariance += torch.diag(data.variances + JITTER)
    normal = torch.distributions.MultivariateNormal(structure.mean(parameters, data.inputs), covariance)
    constant = len(data) / 2 * math.log(2 * math.pi)
    value = log_posterior(structure, parameters, data)
    assert value is not None
    expected = float(normal.log_prob(data.values)) + constant + float(structure.log_prior(parameters))
    assert float(value) == pytest.approx(expected, abs=1e-4)


def test_the_mode_is_better_than_the_prior_mean_and_the_draws_surround_it() -> None:
    data, structure = observations(25), JointStructure(DIMENSION, [0])
    found = fit_parameters(structure, data, draws=6)
    again = fit_parameters(structure, data, draws=6)
    assert torch.equal(found, again)
    values = [log_posterior(structure, row, data) for row in (structure.prior_mean, *found)]
    assert all(value is not None for value in values)
    prior, mode, *draws = (float(value) for value in values if value is not None)
    assert mode > prior + 5
    assert len(draws) == 5
    assert max(draws) <= mode + 0.1


def test_the_ends_of_a_learning_rates_range_are_expected_to_be_worse_than_its_middle() -> None:
    structure = JointStructure(DIMENSION, (0,))
    parameters = structure.prior_mean.clone()
    parameters[structure.slices["arch"]] = math.log(1.5)
    grid = torch.full((101, DIMENSION + 4), 0.5, dtype=torch.double)
    grid[:, 0], grid[:, DIMENSION], grid[:, DIMENSION + 1] = torch.linspace(0, 1, 101), 0.0, 1.0
    mean = structure.mean(parameters, grid)
    assert float(mean[50] - mean[0]) == pytest.approx(1.5)
    assert float(mean[50] - mean[-1]) == pytest.approx(1.5)
    assert float(torch.trapezoid(mean, dx=0.01)) == pytest.approx(float(parameters[structure.slices["mean"]]), abs=1e-3)

    parameters[structure.slices["shift"]] = 0.2
    proxy = grid.clone()
    proxy[:, DIMENSION] = -1.0
    assert int(structure.mean(parameters, proxy).argmax()) == 70, "the best rate of a model of a tenth is higher"
    early = proxy.clone()
    early[:, DIMENSION + 1] = 0.25
    assert float(structure.mean(parameters, early).std()) < 0.9 * float(structure.mean(parameters, proxy).std())
    others = grid.clone()
    others[:, 0], others[:, 1] = 0.5, torch.linspace(0, 1, 101)
    assert float(structure.mean(parameters, others).std()) == 0, "what does not move with size has no arch"
    without = JointStructure(DIMENSION, ())
    assert float(without.mean(without.prior_mean, grid).std()) == 0


@pytest.mark.parametrize("peak", [0.3, 0.97], ids=["inside", "at an end"])
def test_an_arch_that_is_not_there_is_overruled(peak: float) -> None:
    """Of thirty runs of the target; the best rate lies where it lies."""
    data = observations(30)
    data.inputs[:, DIMENSION] = 0.0
    data.inputs[:, DIMENSION + 1] = 1.0
    values = -8 * (data.inputs[:, 0] - peak).square()
    model = model_of(Observations(data.inputs, values, data.variances))
    grid = torch.full((101, DIMENSION + 4), 0.5, dtype=torch.double)
    grid[:, 0], grid[:, DIMENSION], grid[:, DIMENSION + 1] = torch.linspace(0, 1, 101), 0.0, 1.0
    grid[:, DIMENSION + 2], grid[:, DIMENSION + 3] = ANY_SEED, 0.0
    means, _ = model.mean_and_deviation(grid)
    assert float(means.argmax()) / 100 == pytest.approx(peak, abs=0.06)


def test_the_best_learning_rate_is_learned_to_move_with_size() -> None:
    """Data whose optimum moves by -0.2 per decade; beta must move against it, so that the shared optimum is common."""
    random = np.random.default_rng(0)
    x, z = random.random((60, 1)), -random.choice([0.0, 1.0], (60, 1))
    gains = 0.6 * np.exp(-((x[:, 0] - (0.5 - 0.2 * z[:, 0])) ** 2) / 0.02)
    rest = np.column_stack([np.ones(60), np.arange(60), np.zeros(60)])
    data = Observations(
        torch.tensor(np.hstack([x, z, rest])), torch.tensor(gains), torch.full((60,), 1e-4, dtype=torch.double)
    )
    structure = JointStructure(1, [0])
    mode = fit_parameters(structure, data, draws=1)[0]
    assert float(structure.value(mode, "shift")) == pytest.approx(0.2, abs=0.06)


def test_an_earlier_study_counts_as_much_as_it_agrees() -> None:
    """The same data once as an agreeing and once as a contradicting earlier study."""
    random = np.random.default_rng(0)
    x = random.random(30)
    curve = 0.5 * np.sin(6 * x)
    earlier = np.arange(30) >= 8
    rows = np.column_stack([x, np.zeros(30), np.ones(30), np.arange(30), earlier])
    structure = JointStructure(1, [], earlier=1)
    relations = []
    for gains in (curve, np.where(earlier, np.cos(17 * x), curve)):
        data = Observations(torch.tensor(rows), torch.tensor(gains), torch.full((30,), 1e-4, dtype=torch.double))
        mode = fit_parameters(structure, data, draws=1)[0]
        relations.append(float(torch.sigmoid(structure.value(mode, "relation"))))
    assert relations[0] > 0.9
    assert relations[1] < relations[0] - 0.02


def test_a_second_seed_tells_more_than_a_second_look_at_the_first() -> None:
    structure = JointStructure(1, [])
    parameters = structure.prior_mean.unsqueeze(0)
    base = torch.tensor([[0.5, 0.0, 1.0, 0.0, 0.0]], dtype=torch.double)
    expectation = torch.tensor([[0.5, 0.0, 1.0, ANY_SEED, 0.0]], dtype=torch.double)
    left = []
    for trial in (0.0, 1.0):
        second = base.clone()
        second[0, 3] = trial
        inputs, noise = torch.cat([base, second]), torch.full((2,), 1e-4, dtype=torch.double)
        moments = Moments(structure, parameters, inputs, torch.zeros(1, 2, dtype=torch.double), noise)
        left.append(float(moments.at(expectation).variance))
    assert left[1] < 0.7 * left[0]


def test_pending_trainings_leave_the_mean_and_shrink_the_variance() -> None:
    model = model_of(observations(12), ())
    pending = random_inputs(2, seed=5)
    plain, fuller = model.moments(), model.moments(pending, 1e-3)
    inputs = random_inputs(8, seed=6)
    np.testing.assert_allclose(fuller.at(inputs).mean.numpy(), plain.at(inputs).mean.numpy(), atol=1e-6)
    assert bool((fuller.at(pending).variance < plain.at(pending).variance).all())


@pytest.mark.parametrize(("count", "gain"), [(1, 0.1), (3, 0.0), (30, 0.2)], ids=["one point", "all zero", "constant"])
def test_degenerate_data_give_finite_answers(count: int, gain: float) -> None:
    inputs = random_inputs(1).repeat(count, 1)
    data = Observations(
        inputs, torch.full((count,), gain, dtype=torch.double), torch.full((count,), 1e-4, dtype=torch.double)
    )
    mean, deviation = model_of(data, draws=4).mean_and_deviation(random_inputs(20, seed=9))
    assert bool(torch.isfinite(mean).all())
    assert bool(torch.isfinite(deviation).all())


def test_matern_is_one_at_zero_and_falls() -> None:
    values = matern52(torch.linspace(0, 3, 10, dtype=torch.double))
    assert float(values[0]) == 1.0
    assert bool((values.diff() < 0).all())


def test_huge_noise_returns_the_prior() -> None:
    structure, data = JointStructure(DIMENSION, []), observations(5)
    parameters = structure.prior_mean.unsqueeze(0)
    noise = torch.full((5,), 1e12, dtype=torch.double)
    found = Moments(structure, parameters, data.inputs, data.values.unsqueeze(0), noise).at(data.inputs)
    np.testing.assert_allclose(
        found.variance[0].numpy(), structure.variance(parameters, data.inputs)[0].numpy(), rtol=1e-6
    )
