"""Model configurations: the named ones, and what is refused."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax import models

SCALING = models.Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)
LINEAR = models.LinearRopeScaling(factor=2.0)
DYNAMIC = models.DynamicRopeScaling(factor=2.0, original_max_position=2048)
YARN = models.YarnRopeScaling(factor=4.0, original_max_position=32768)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
        ({"num_layers": -1}, "num_layers=-1 must be a positive integer"),
        ({"num_layers": True}, "num_layers=True must be a positive integer"),
        ({"embed_dim": 0}, "embed_dim=0 must be a positive integer"),
        ({"num_heads": 0}, "num_heads=0 must be a positive integer"),
        ({"num_kv_heads": 0}, "num_kv_heads=0 must be a positive integer"),
        ({"head_dim": 0}, "head_dim=0 must be a positive integer"),
        ({"mlp_dim": 0}, "mlp_dim=0 must be a positive integer"),
        ({"num_kv_heads": 3}, "num_heads=8 must be a multiple of num_kv_heads=3"),
        ({"head_dim": 33}, "head_dim=33 must be even"),
        ({"rope_theta": 1.0}, "rope_theta=1.0 must be a finite number above 1"),
        ({"rope_theta": float("nan")}, "rope_theta=nan must be a finite number above 1"),
        ({"norm_epsilon": 0.0}, "norm_epsilon=0.0 must be a small positive number"),
        (
            {"rope_scaling": DYNAMIC, "head_dim": 2},
            "head_dim=2 must be at least 4 with DynamicRopeScaling",
        ),
        ({"sliding_window": 0, "sliding_layers": (1,)}, "sliding_window=0 must be a positive int"),
        ({"sliding_window": 4}, r"sliding_window=4 and sliding_layers=\(\) go together"),
        ({"sliding_layers": (1,)}, r"sliding_window=None and sliding_layers=\(1,\) go together"),
        ({"sliding_window": 4, "sliding_layers": (4,)}, r"sliding_layers=\(4,\) must .* 4 layers"),
        ({"sliding_window": 4, "sliding_layers": (-1,)}, r"sliding_layers=\(-1,\) must be ascend"),
        ({"sliding_window": 4, "sliding_layers": (1, 0)}, r"sliding_layers=\(1, 0\) must be ascen"),
        ({"sliding_window": 4, "sliding_layers": (1, 1)}, r"sliding_layers=\(1, 1\) .* each once"),
        ({"max_position": 0}, "max_position=0 must be a positive integer"),
        ({"dtype": jnp.int8}, "dtype=int8 must be float32, bfloat16 or float16"),
        ({"dtype": "float64"}, "dtype=float64 must be float32, bfloat16 or float16"),
        ({"param_dtype": jnp.int32}, "param_dtype=int32 must be float32, bfloat16 or float16"),
    ],
    ids=str,
)
def test_refuses(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(models.tiny(), **changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"factor": 0.5}, "factor=0.5 must be at least 1"),
        ({"factor": float("inf")}, "factor=inf must be at least 1"),
        ({"low_freq_factor": 0.0}, "low_freq_factor=0.0 must be positive and below high_freq"),
        ({"low_freq_factor": 4.0}, "low_freq_factor=4.0 must .* below high_freq_factor=4.0"),
        ({"original_max_position": 0}, "original_max_position=0 must be a positive integer"),
    ],
    ids=str,
)
def test_rope_scaling_refuses(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(SCALING, **changes)


def test_refuses_a_table_for_a_rope_scaling():
    """A type checker, where one runs, is faster."""
    with pytest.raises((ValueError, TypeError), match="rope_scaling"):
        dataclasses.replace(models.tiny(), rope_scaling={"factor": 2.0})


@pytest.mark.parametrize(
    ("scaling", "changes", "sentence"),
    [
        (LINEAR, {"factor": 0.5}, "factor=0.5 must be at least 1"),
        (LINEAR, {"factor": float("nan")}, "factor=nan must be at least 1"),
        (DYNAMIC, {"factor": float("inf")}, "factor=inf must be at least 1"),
        (DYNAMIC, {"original_max_position": 0}, "original_max_position=0 must be a positive"),
        (YARN, {"factor": 0.0}, "factor=0.0 must be at least 1"),
        (YARN, {"original_max_position": -1}, "original_max_position=-1 must be a positive"),
        (YARN, {"beta_slow": 0.0}, "beta_slow=0.0 must be positive and below beta_fast=32.0"),
        (YARN, {"beta_fast": 1.0}, "beta_slow=1.0 must be positive and below beta_fast=1.0"),
        (YARN, {"attention_factor": -1.0}, "attention_factor=-1.0 must be a finite number above 0"),
        (YARN, {"mscale": 0.0}, "mscale=0.0 must be a finite number above 0, or None"),
        (YARN, {"mscale_all_dim": float("inf")}, "mscale_all_dim=inf must be a finite number"),
        (YARN, {"mscale": 1.0}, "mscale=1.0 and mscale_all_dim=None have an effect together"),
        (
            YARN,
            {"attention_factor": 1.0, "mscale": 2.0, "mscale_all_dim": 1.0},
            "attention_factor=1.0 leaves mscale=2.0 without effect",
        ),
    ],
    ids=str,
)
def test_other_rope_scalings_refuse(scaling, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        dataclasses.replace(scaling, **changes)


def test_sliding_layers_of_json_are_a_tuple():
    read = dataclasses.replace(models.tiny(), sliding_window=4, sliding_layers=[0, 2])
    made = dataclasses.replace(models.tiny(), sliding_window=4, sliding_layers=(0, 2))
    assert read == made
    assert hash(read) == hash(made)


def test_spellings_of_a_dtype_are_equal():
    spelled = dataclasses.replace(models.tiny(), dtype="bfloat16")
    typed = dataclasses.replace(models.tiny(), dtype=jnp.bfloat16)
    assert spelled == typed
    assert hash(spelled) == hash(typed)


def test_llama3_8b_is_the_published_shape():
    config = models.llama3_8b()
    assert config.rope_scaling == SCALING
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (32, 8, 128)
    assert (config.rope_theta, config.norm_epsilon) == (500000.0, 1e-5)
