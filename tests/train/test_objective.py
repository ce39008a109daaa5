"""The parts of the loss, each by its formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.train import objective


def test_language_model_loss_is_the_weighted_mean_cross_entropy() -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(2, 3, 5))
    targets = random.integers(0, 5, (2, 3))
    weights = np.array([1.0, 0.0, 10.0])
    expected = 0.0
    for row in range(2):
        for position in range(3):
            exponentials = np.exp(logits[row, position])
            probability = exponentials[targets[row, position]] / exponentials.sum()
            expected -= weights[position] * np.log(probability) / (2 * 11)
    loss = objective.language_model_loss(
        jnp.float32(logits), jnp.int32(targets), jnp.float32(weights)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_expected_sparsity_is_the_mean_probability_of_zero() -> None:
    log_alpha = jnp.array([[-1.5986, 20.0], [-20.0, 20.0]])
    np.testing.assert_allclose(objective.expected_sparsity(log_alpha), (0.5 + 1) / 4, atol=1e-4)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 0.1), (40, 0.4), (80, 0.7), (81, 0.7), (1000, 0.7)]
)
def test_target_rises_along_a_line_and_stays(step: int, expected: float) -> None:
    target = objective.target_sparsity(jnp.int32(step), start=0.1, end=0.7, warmup_steps=80)
    np.testing.assert_allclose(target, expected, rtol=1e-6)


def test_target_without_a_warm_up_is_the_end() -> None:
    target = objective.target_sparsity(jnp.int32(0), start=0.1, end=0.7, warmup_steps=0)
    np.testing.assert_allclose(target, 0.7, rtol=1e-6)


@pytest.mark.parametrize(
    ("ratio", "num_steps", "steps"), [(0.8, 1000, 800), (0.25, 10, 3), (0.0, 10, 0), (1.0, 7, 7)]
)
def test_warm_ups_are_rounded_up(ratio: float, num_steps: int, steps: int) -> None:
    assert objective.warmup_steps(ratio, num_steps) == steps


def test_lagrangian_by_its_formula() -> None:
    multipliers = {"linear": jnp.float32(3), "quadratic": jnp.float32(5)}
    value = objective.lagrangian(jnp.float32(0.2), jnp.float32(0.7), multipliers)
    np.testing.assert_allclose(value, 3 * -0.5 + 5 * 0.25, rtol=1e-6)


def test_multipliers_start_without_penalty() -> None:
    multipliers = objective.initial_multipliers()
    assert objective.lagrangian(jnp.float32(0.2), jnp.float32(0.7), multipliers) == 0


@pytest.mark.parametrize(("sparsity", "sign"), [(0.2, -1), (0.7, 0), (0.9, 1)])
def test_gradient_of_the_linear_multiplier_has_the_sign_of_the_excess(
    sparsity: float, sign: int
) -> None:
    gradient = jax.grad(objective.lagrangian, argnums=2)(
        jnp.float32(sparsity), jnp.float32(0.7), objective.initial_multipliers()
    )
    assert jnp.sign(gradient["linear"]) == sign
    assert gradient["quadratic"] >= 0
