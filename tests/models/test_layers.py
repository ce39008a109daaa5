"""RMSNorm, rotary embedding and SwiGLU against their formulas."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import models
from sparseattn_jax.models import layers
from tests.oracles import llama as oracle

LLAMA3 = models.llama3_8b().rope_scaling
YARN = models.YarnRopeScaling(factor=4.0, original_max_position=32768)  # Qwen2.5's and Qwen3's
SCALINGS = {
    "default": None,
    "linear": models.LinearRopeScaling(factor=2.5),
    "dynamic": models.DynamicRopeScaling(factor=2.0, original_max_position=4096),
    "dynamic-longer": models.DynamicRopeScaling(factor=2.0, original_max_position=200000),
    "llama3": LLAMA3,
    "yarn": YARN,
    "yarn-exact": dataclasses.replace(YARN, truncate=False, beta_fast=16.0, beta_slow=2.0),
    "yarn-short": dataclasses.replace(YARN, original_max_position=5),  # no pair is kept
    "yarn-long": dataclasses.replace(YARN, original_max_position=10**9),  # none is divided
}


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
        name: {"kernel": rng.normal(size=getattr(mlp, name).kernel.shape)}
        for name in ("gate", "up", "down")
    }
    for name, weight in weights.items():
        getattr(mlp, name).kernel[...] = jnp.asarray(weight["kernel"], jnp.float32)
    x = rng.normal(size=(1, 3, 6))
    np.testing.assert_allclose(
        mlp(jnp.asarray(x, jnp.float32)), oracle.swiglu(x, **weights), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scaling", SCALINGS.values(), ids=SCALINGS.keys())
@pytest.mark.parametrize(("head_dim", "theta"), [(128, 500000.0), (6, 10000.0)])
def test_angles_are_the_formula(head_dim, theta, scaling):
    positions = [0, 1, 17, 8191, 8192, 131071]
    angles = layers.rotary_angles(
        jnp.asarray([positions], jnp.int32), head_dim=head_dim, theta=theta, scaling=scaling
    )
    case = oracle.described_scaling(scaling)
    frequencies = [
        oracle.rope_frequency(pair, head_dim, theta, case, length=131072)
        for pair in range(head_dim // 2)
    ]
    np.testing.assert_allclose(angles, np.outer(positions, frequencies)[None], rtol=5e-7)


def test_dynamic_scaling_depends_on_the_greatest_position_of_the_call():
    """Traced: one program for calls below the original context and above it."""

    @jax.jit
    def first_angles(last):
        positions = jnp.stack([jnp.ones(2, jnp.int32), jnp.stack([0, last])])
        scaling = models.DynamicRopeScaling(factor=2.0, original_max_position=100)
        return layers.rotary_angles(positions, head_dim=8, theta=1e4, scaling=scaling)[0, 0]

    plain = first_angles(3)
    np.testing.assert_array_equal(first_angles(99), plain)
    # Twice the context: theta' = theta * 3^(8 / 6), so pair i turns 3^(i / 3) times more slowly.
    np.testing.assert_allclose(plain / first_angles(199), 3 ** (np.arange(4) / 3), rtol=1e-6)


def test_yarn_has_its_three_cases():
    """The pairs that turn 32 times and once in 32768 positions are 23.6 and 39.7 of 64."""
    plain, scaled = (
        layers.rotary_angles(jnp.ones((1, 1), jnp.int32), head_dim=128, theta=1e6, scaling=scaling)
        for scaling in (None, YARN)
    )
    stretch = np.asarray(plain / scaled)[0, 0]
    assert np.isclose(stretch, 1).nonzero()[0].max() == 23
    assert np.isclose(stretch, 4).nonzero()[0].min() == 40
    assert (np.diff(stretch) > -1e-5).all()


@pytest.mark.parametrize(
    ("changes", "magnitude"),
    [
        ({}, 1 + 0.1 * math.log(4)),
        ({"factor": 1.0}, 1.0),
        ({"attention_factor": 1.25}, 1.25),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 2.0, "mscale_all_dim": 0.5}, (2 * math.log(4) + 10) / (0.5 * math.log(4) + 10)),
    ],
    ids=str,
)
def test_yarn_magnitude(changes, magnitude):
    scaling = dataclasses.replace(YARN, **changes)
    assert math.isclose(scaling.magnitude, magnitude)
    assert math.isclose(scaling.magnitude, oracle.rope_magnitude(oracle.described_scaling(scaling)))


@pytest.mark.parametrize("name", ["linear", "dynamic", "llama3"])
def test_other_scalings_have_no_magnitude(name):
    assert SCALINGS[name].magnitude == 1


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
    out = layers.rotate(x, angles, magnitude=1.0)
    np.testing.assert_allclose(out[0, 0, 0], [-3, 2, 1, 4], atol=1e-6)
    doubled = layers.rotate(x, angles, magnitude=2.0)
    np.testing.assert_array_equal(doubled, 2 * out)


def test_rotate_keeps_the_dtype_and_turns_in_float32():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 2, 8)), jnp.bfloat16)
    angles = jnp.asarray(rng.uniform(0, 1e5, size=(1, 3, 4)), jnp.float32)
    out = layers.rotate(x, angles, magnitude=1.0)
    assert out.dtype == jnp.bfloat16
    exact = layers.rotate(x.astype(jnp.float32), angles, magnitude=1.0)
    np.testing.assert_array_equal(out, exact.astype(jnp.bfloat16))
