"""Which parameters move, which way, and how fast."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparseattn_jax.train import optimizer
from sparseattn_jax.train.config import OptimizerConfig

CONFIG = OptimizerConfig(
    train_weights=True,
    weights_learning_rate=0.01,
    embedding_learning_rate=0.03,
    mask_learning_rate=0.02,
    reg_learning_rate=0.05,
    warmup_ratio=0.0,
    min_lr_ratio=1.0,
    weight_decay=0.0,
    clip_norm=1.0,
)
PARAMS = {
    "weights": {"layer": {"kernel": jnp.ones((3, 2, 2)), "scale": jnp.ones((3, 2))}},
    "log_alpha": jnp.ones((2, 2)),
    "multipliers": {"linear": jnp.float32(1), "quadratic": jnp.float32(1)},
}


def moved(config: OptimizerConfig, gradient: float, steps: int = 1) -> dict:
    """How far each parameter went, all gradients being equal."""
    rule = optimizer.make_optimizer(config, num_steps=10, train_gates=True)
    params, state = PARAMS, rule.init(PARAMS)
    for _ in range(steps):
        gradients = optax.tree.full_like(params, gradient)
        updates, state = rule.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
    return optax.tree.sub(params, PARAMS)


def test_weights_and_gates_descend_and_multipliers_ascend() -> None:
    distance = moved(CONFIG, gradient=0.1)
    assert np.all(distance["weights"]["layer"]["kernel"] < 0)
    assert np.all(distance["weights"]["layer"]["scale"] < 0)
    np.testing.assert_allclose(distance["log_alpha"], -0.02, rtol=1e-4)
    np.testing.assert_allclose(distance["multipliers"]["linear"], 0.05, rtol=1e-4)
    np.testing.assert_allclose(distance["multipliers"]["quadratic"], 0.05, rtol=1e-4)


def test_matrices_move_by_orthogonal_steps_whatever_their_gradient() -> None:
    # The gradient has rank 1: its orthogonal factor has one singular value of about 1.
    for gradient in (0.1, 10.0):
        kernels = moved(CONFIG, gradient)["weights"]["layer"]["kernel"]
        for step in kernels:
            singular_values = np.linalg.svd(step, compute_uv=False)
            assert np.all(step < 0)
            assert 0.6 < singular_values[0] / 0.01 < 1.3
            assert singular_values[1] < 1e-5


def test_frozen_weights_stay_and_keep_no_state() -> None:
    frozen = dataclasses.replace(CONFIG, train_weights=False)
    distance = moved(frozen, gradient=0.1)
    assert not distance["weights"]["layer"]["kernel"].any()
    assert distance["log_alpha"].all()
    params = PARAMS | {"weights": jnp.ones((5, 7))}
    state = optimizer.make_optimizer(frozen, num_steps=10, train_gates=True).init(params)
    assert (5, 7) not in {leaf.shape for leaf in jax.tree.leaves(state)}


def test_weight_decay_spares_norms_gates_and_multipliers() -> None:
    decayed = dataclasses.replace(CONFIG, weight_decay=0.5)
    distance = moved(decayed, gradient=0.0)
    np.testing.assert_allclose(distance["weights"]["layer"]["kernel"], -0.5 * 0.01, rtol=1e-5)
    assert not distance["weights"]["layer"]["scale"].any()
    assert not distance["log_alpha"].any()
    assert not distance["multipliers"]["linear"].any()


def test_clipping_bounds_the_gradient_of_the_weights() -> None:
    # Adam alone forgets the scale of a gradient; a bound shows in steps of unequal gradients.
    def after(clip_norm: float, gradients: tuple[float, float]) -> float:
        rule = optimizer.make_optimizer(
            dataclasses.replace(CONFIG, clip_norm=clip_norm), num_steps=10, train_gates=False
        )
        params = {"weights": {"scale": jnp.ones(1)}}
        state = rule.init(params)
        for gradient in gradients:
            updates, state = rule.update(
                {"weights": {"scale": jnp.full(1, gradient)}}, state, params
            )
            params = optax.apply_updates(params, updates)
        return float(params["weights"]["scale"][0])

    assert after(1.0, (1.0, 100.0)) == after(1.0, (1.0, 1.0))
    assert after(1000.0, (1.0, 100.0)) != after(1000.0, (1.0, 1.0))


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.0), (5, 0.5), (10, 1.0), (55, 0.1 + 0.9 / 2), (100, 0.1), (200, 0.1)],
    ids=["start", "rising", "peak", "half-way", "end", "after"],
)
def test_learning_rate_rises_then_falls_as_a_cosine(step: int, expected: float) -> None:
    config = dataclasses.replace(CONFIG, warmup_ratio=0.1, min_lr_ratio=0.1)
    schedule = optimizer.learning_rate(config, peak=1.0, num_steps=100)
    np.testing.assert_allclose(schedule(step), expected, atol=1e-6)
