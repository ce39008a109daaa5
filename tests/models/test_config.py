"""Model configurations: the named ones, and what is refused."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax import models

SCALING = models.Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
)


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
