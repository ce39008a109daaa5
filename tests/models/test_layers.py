"""RMSNorm, rotary embedding and SwiGLU against their formulas."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import models
from sparseattn_jax.models import layers
from tests.oracles import llama as oracle

LLAMA3 = models.llama3_8b().rope_scaling


def test_rms_norm_is_its_formula():
    rng = np.random.default_rng(0)
    x, scale = rng.normal(size=(2, 3, 8)), rng.normal(size=8)
    norm = layers.RMSNorm(8, epsilon=0.1, param_dtype=jnp.float32)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    np.testing.assert_allclose(
        norm(jnp.asarray(x, jnp.float32)), oracle.rms_norm(x, scale, 0.1), rtol=1e-5
    )


def test_rms_norm_squares_in_float32():
    norm = layers.RMSNorm(4, epsilon=1e-5, param_dtype=jnp.float16)
    x = jnp.full((1, 4), 1000, jnp.float16)  # 1000^2 is infinite in float16
    out = norm(x)
    assert out.dtype == jnp.float16
    np.testing.assert_array_equal(out, np.ones((1, 4)))


def test_swiglu_is_its_formula():
    config = dataclasses.replace(models.tiny(), embed_dim=6, mlp_dim=10)
    mlp = layers.SwiGLU(config, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    weights = {
        name: rng.normal(size=getattr(mlp, name).kernel.shape) for name in ("gate", "up", "down")
    }
    for name, weight in weights.items():
        getattr(mlp, name).kernel[...] = jnp.asarray(weight, jnp.float32)
    x = rng.normal(size=(1, 3, 6))
    np.testing.assert_allclose(
        mlp(jnp.asarray(x, jnp.float32)), oracle.swiglu(x, **weights), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scaling", [None, LLAMA3], ids=["default", "llama3"])
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500000.0), (6, 10000.0)])
def test_angles_are_the_formula(head_dim, theta, scaling):
    positions = [0, 1, 17, 8191, 8192, 131071]
    angles = layers.rotary_angles(
        jnp.asarray([positions], jnp.int32), head_dim=head_dim, theta=theta, scaling=scaling
    )
    case = scaling and dataclasses.asdict(scaling)
    frequencies = [
        oracle.rope_frequency(pair, head_dim, theta, case) for pair in range(head_dim // 2)
    ]
    np.testing.assert_allclose(angles, np.outer(positions, frequencies)[None], rtol=2e-7)


def test_llama3_scaling_has_its_three_cases():
    plain, scaled = (
        layers.rotary_angles(jnp.ones((1, 1), jnp.int32), head_dim=128, theta=5e5, scaling=scaling)
        for scaling in (None, LLAMA3)
    )
    stretch = np.asarray(plain / scaled)[0, 0]
    kept, divided = np.isclose(stretch, 1), np.isclose(stretch, 8)
    between = ~kept & ~divided
    assert kept.sum() == 29
    assert divided.sum() == 29
    assert between.sum() == 6
    assert (np.diff(stretch) > -1e-5).all()


def test_rotate_turns_halves_against_each_other():
    quarter, none = jnp.pi / 2, 0.0
    angles = jnp.asarray([[[quarter, none]]], jnp.float32)
    x = jnp.asarray([[[[1, 2, 3, 4]]]], jnp.float32)
    np.testing.assert_allclose(layers.rotate(x, angles)[0, 0, 0], [-3, 2, 1, 4], atol=1e-6)


def test_rotate_keeps_the_dtype_and_turns_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(0, 1e5, size=(1, 3, 4)), jnp.float32)
    out = layers.rotate(x, angles)
    assert out.dtype == jnp.bfloat16
    exact = layers.rotate(x.astype(jnp.float32), angles)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
