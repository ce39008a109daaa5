"""Tiny models of each family, by the settings of their config.json, and their drawn weights."""

import zlib

import numpy as np

LENGTH = 12
SHORTER = 8
"""Tokens of the second of two sequences where there is padding."""

_SHAPE = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8,
    "rms_norm_eps": 1e-5,
}


def _llama(rope, **settings):
    # A small base, so that pairs of channels of each speed turn within a few tokens.
    parameters = {"rope_parameters": {"rope_theta": 100.0} | rope}
    return {"model_type": "llama"} | _SHAPE | parameters | settings


CASES = {
    "llama": _llama({"rope_type": "default"}, num_key_value_heads=4),
    "llama-linear": _llama({"rope_type": "linear", "factor": 4.0}),
    "llama-dynamic": _llama({"rope_type": "dynamic", "factor": 2.0}, num_key_value_heads=1),
    "llama-llama3": _llama(
        {
            "rope_type": "llama3",
            "factor": 4.0,
            "low_freq_factor": 0.25,
            "high_freq_factor": 1.0,
            "original_max_position_embeddings": 8,
        },
        head_dim=24,
        max_position_embeddings=32,
    ),
    "llama-yarn": _llama(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 1.0,
            "beta_slow": 0.1,
            "original_max_position_embeddings": 8,
        },
        max_position_embeddings=32,
        attention_bias=True,
        mlp_bias=True,
    ),
    "llama-yarn-mscale": _llama(
        {
            "rope_type": "yarn",
            "factor": 4.0,
            "beta_fast": 1.0,
            "beta_slow": 0.1,
            "original_max_position_embeddings": 8,
            "mscale": 1.5,
            "mscale_all_dim": 0.5,
            "truncate": False,
        },
        max_position_embeddings=32,
    ),
    "mistral": {"model_type": "mistral"} | _SHAPE | {"sliding_window": 5},
    "qwen2": {"model_type": "qwen2"}
    | _SHAPE
    | {
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3"} | _SHAPE | {"head_dim": 24, "tie_word_embeddings": True},
}
PADDED_CASES = ("llama-dynamic", "mistral", "qwen2")


def draw_weight(name, shape):
    """The values of a tensor, from its name; NumPy keeps the stream of RandomState forever."""
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if "norm" in name:
        values = 1 + 0.3 * values
    elif len(shape) == 2 and "embed_tokens" not in name:
        values = values * shape[1] ** -0.5
    return values.astype(np.float32)


def draw_tokens():
    """Two sequences [2, LENGTH]."""
    shape = (2, LENGTH)
    return np.random.RandomState(0).randint(_SHAPE["vocab_size"], size=shape, dtype=np.int32)
