"""config.json of Hugging Face: what is read from it, what is refused, and what is written."""

import dataclasses

import jax.numpy as jnp
import pytest

from sparseattn_jax import models
from sparseattn_jax.models.hf_config import config_from_hf, config_to_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
MISTRAL = {**LLAMA, "model_type": "mistral", "sliding_window": None}
QWEN2 = {**LLAMA, "model_type": "qwen2"}
QWEN3 = {**LLAMA, "model_type": "qwen3", "head_dim": 8}
PLAIN = models.LlamaConfig(
    vocab_size=97,
    num_layers=3,
    embed_dim=24,
    num_heads=4,
    num_kv_heads=2,
    head_dim=6,
    mlp_dim=40,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_epsilon=1e-5,
    tie_embeddings=False,
    max_position=64,
    dtype=jnp.bfloat16,
    param_dtype=jnp.bfloat16,
)
LINEAR = models.LinearRopeScaling(factor=2.0)
DYNAMIC = models.DynamicRopeScaling(factor=2.0, original_max_position=64)
LLAMA3 = models.Llama3RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=16
)
YARN = models.YarnRopeScaling(factor=4.0, original_max_position=16)
BANDS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"


def plain(**changes):
    return dataclasses.replace(PLAIN, **changes)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        pytest.param(LLAMA, PLAIN, id="llama"),
        pytest.param({**LLAMA, "tie_word_embeddings": True}, plain(tie_embeddings=True), id="tied"),
        pytest.param({**LLAMA, "head_dim": 8}, plain(head_dim=8), id="head_dim"),
        pytest.param({**LLAMA, "rms_norm_eps": 1}, plain(norm_epsilon=1.0), id="whole-number"),
        pytest.param(
            {**LLAMA, "attention_bias": True, "mlp_bias": True},
            plain(attention_bias=True, output_bias=True, mlp_bias=True),
            id="llama-biases",
        ),
        pytest.param(
            {key: LLAMA[key] for key in LLAMA if "key_value" not in key and "max" not in key},
            plain(num_kv_heads=4, max_position=None),
            id="first-llama",
        ),
        pytest.param(MISTRAL, PLAIN, id="mistral-without-window"),
        pytest.param(
            {**MISTRAL, "sliding_window": 5},
            plain(sliding_window=5, sliding_layers=(0, 1, 2)),
            id="mistral",
        ),
        pytest.param(QWEN2, plain(attention_bias=True), id="qwen2"),
        pytest.param(
            {**QWEN2, "use_sliding_window": False, "sliding_window": 9, "max_window_layers": 1},
            plain(attention_bias=True),
            id="qwen2-window-unused",
        ),
        pytest.param(
            {**QWEN2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            plain(attention_bias=True, sliding_window=9, sliding_layers=(1, 2)),
            id="qwen2-first-layer-full",
        ),
        pytest.param(
            {**QWEN2, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 9},
            plain(attention_bias=True),
            id="qwen2-all-layers-full",
        ),
        pytest.param(QWEN3, plain(head_dim=8, qk_norm=True), id="qwen3"),
        pytest.param(
            {
                **QWEN3,
                "attention_bias": True,
                "use_sliding_window": True,
                "sliding_window": 9,
                "max_window_layers": 28,
                "layer_types": [SLIDING, FULL, SLIDING],
            },
            plain(
                head_dim=8,
                qk_norm=True,
                attention_bias=True,
                output_bias=True,
                sliding_window=9,
                sliding_layers=(0, 2),
            ),
            id="qwen3-layer-types",
        ),
    ],
)
def test_reads(settings, expected):
    assert config_from_hf(settings) == expected


@pytest.mark.parametrize(
    ("scaling", "table"),
    [
        (None, {"rope_type": "default"}),
        (LINEAR, {"rope_type": "linear", "factor": 2}),
        (DYNAMIC, {"rope_type": "dynamic", "factor": 2.0}),
        (LLAMA3, {"rope_type": "llama3", **BANDS, "original_max_position_embeddings": 16}),
        (YARN, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}),
        (
            dataclasses.replace(YARN, original_max_position=64, truncate=False, beta_fast=16.0),
            {"rope_type": "yarn", "factor": 4.0, "truncate": False, "beta_fast": 16.0},
        ),
        (
            dataclasses.replace(YARN, attention_factor=1.5),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 16,
                "attention_factor": 1.5,
                "mscale": None,
            },
        ),
    ],
    ids=["default", "linear", "dynamic", "llama3", "yarn", "yarn-options", "yarn-factor"],
)
def test_reads_both_versions_of_the_rotary_settings(scaling, table):
    expected = plain(rope_theta=500.0, rope_scaling=scaling)
    new = {**LLAMA, "rope_parameters": {**table, "rope_theta": 500.0}}
    old = {**LLAMA, "rope_theta": 500.0, "rope_scaling": table}
    older_table = {("type" if key == "rope_type" else key): table[key] for key in table}
    older = {**LLAMA, "rope_theta": 500.0, "rope_scaling": older_table}
    for settings in (new, old, older):
        assert config_from_hf(settings) == expected


def test_what_has_no_effect_is_passed_over():
    settings = {
        **LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "attention_dropout": 0.1,
        "bos_token_id": 1,
        "eos_token_id": [2, 3],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "pretraining_tp": 1,
        "rope_scaling": None,
        "torch_dtype": "float16",
        "transformers_version": "4.40.0",
        "use_cache": True,
    }
    assert config_from_hf(settings) == PLAIN


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_the_caller_chooses_the_dtype(dtype):
    assert config_from_hf(LLAMA, dtype=dtype) == plain(dtype=dtype, param_dtype=dtype)


def rope(**table):
    return {"rope_parameters": table}


@pytest.mark.parametrize(
    ("family", "changes", "sentence"),
    [
        (LLAMA, {"model_type": "gemma"}, "model_type='gemma' must be llama, mistral, qwen2, qwen3"),
        (LLAMA, {"model_type": None}, "model_type=None must be llama"),
        (LLAMA, {"logit_scale": 2.0}, "logit_scale=2.0 is not known here"),
        (LLAMA, {"quantization_config": {}}, "quantization_config={} is not known here"),
        (LLAMA, {"sliding_window": 5}, "sliding_window=5 is not known here"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"hidden_size": "24"}, "hidden_size='24' must be of type int"),
        (LLAMA, {"hidden_size": 25}, "head_dim is missing"),
        (LLAMA, {"rms_norm_eps": None}, "rms_norm_eps is missing"),
        (LLAMA, {"vocab_size": 0}, "vocab_size=0 must be a positive integer"),
        (LLAMA, {"attention_bias": 1}, "attention_bias=1 must be of type bool"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act='gelu' must be 'silu'"),
        (LLAMA, {"pretraining_tp": 2}, "pretraining_tp=2 must be 1"),
        (LLAMA, {"rope_interleaved": True}, "rope_interleaved=True must be False"),
        (MISTRAL, {"num_key_value_heads": None}, "num_key_value_heads is missing"),
        (MISTRAL, {"attention_bias": True}, "attention_bias=True is not known here"),
        (QWEN2, {"mlp_bias": True}, "mlp_bias=True is not known here"),
        (QWEN2, {"use_sliding_window": True}, "max_window_layers is missing"),
        (
            QWEN2,
            {"use_sliding_window": True, "max_window_layers": 1},
            r"layer_types has sliding_attention at \(1, 2\), but sliding_window is missing",
        ),
        (QWEN2, {"layer_types": [FULL]}, "must name full_attention or sliding_attention for each"),
        (QWEN2, {"layer_types": [FULL, FULL, "chunked_attention"]}, "must name full_attention or"),
        (QWEN3, {"head_dim": None}, "head_dim is missing"),
        (LLAMA, {"rope_theta": 1.0}, "rope_theta=1.0 must be a finite number above 1"),
        (LLAMA, rope(rope_type="longrope"), "rope_parameters.rope_type='longrope' must be default"),
        (LLAMA, rope(rope_type="linear"), "rope_parameters.factor is missing"),
        (LLAMA, rope(rope_type="linear", factor=True), "rope_parameters.factor=True must be of"),
        (LLAMA, rope(rope_type="linear", factor=0.5), "factor=0.5 must be at least 1"),
        (LLAMA, rope(rope_type="linear", type="yarn"), "type='yarn' and .*rope_type='linear' diff"),
        (LLAMA, rope(rope_type="default", factor=2.0), "rope_parameters.factor=2.0 is not known"),
        (LLAMA, rope(partial_rotary_factor=0.5), "rope_parameters.partial_rotary_factor=0.5 is no"),
        (LLAMA, rope(full_attention={}), "rope_parameters.full_attention={} is not known"),
        (LLAMA, {"rope_scaling": {"type": "su"}}, "rope_scaling.rope_type='su' must be default"),
        (
            LLAMA,
            {"rope_scaling": {}, **rope()},
            "rope_scaling and rope_parameters are of different",
        ),
        (LLAMA, {"rope_theta": 5.0, **rope(rope_theta=6.0)}, "rope_theta=6.0 differ"),
        (
            LLAMA,
            {"max_position_embeddings": None, **rope(rope_type="dynamic", factor=2.0)},
            "max_position_embeddings is missing; rope_type='dynamic' needs it",
        ),
        (
            LLAMA,
            {"max_position_embeddings": None, **rope(rope_type="yarn", factor=2.0)},
            "rope_parameters.original_max_position_embeddings is missing",
        ),
    ],
    ids=str,
)
def test_refuses(family, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_from_hf({**family, **changes})


def test_mistral_must_say_whether_it_has_a_window():
    """transformers gives it one of 4096 if the key is absent, and none if it is null."""
    settings = {key: value for key, value in MISTRAL.items() if key != "sliding_window"}
    with pytest.raises(ValueError, match="sliding_window is missing; null means none"):
        config_from_hf(settings)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(PLAIN, id="llama"),
        pytest.param(
            plain(attention_bias=True, output_bias=True, mlp_bias=True), id="llama-biases"
        ),
        pytest.param(plain(mlp_bias=True, head_dim=10, max_position=None), id="llama-mlp-bias"),
        pytest.param(plain(sliding_window=7, sliding_layers=(0, 1, 2)), id="mistral"),
        pytest.param(plain(attention_bias=True, tie_embeddings=True), id="qwen2"),
        pytest.param(
            plain(attention_bias=True, sliding_window=7, sliding_layers=(2,)), id="qwen2-window"
        ),
        pytest.param(plain(qk_norm=True), id="qwen3"),
        pytest.param(
            plain(
                qk_norm=True,
                attention_bias=True,
                output_bias=True,
                sliding_window=7,
                sliding_layers=(0, 2),
            ),
            id="qwen3-bias-window",
        ),
        pytest.param(plain(rope_scaling=LINEAR, rope_theta=500.0), id="linear"),
        pytest.param(plain(rope_scaling=DYNAMIC), id="dynamic"),
        pytest.param(plain(rope_scaling=LLAMA3), id="llama3"),
        pytest.param(plain(rope_scaling=YARN), id="yarn"),
        pytest.param(
            plain(rope_scaling=dataclasses.replace(YARN, mscale=0.7, mscale_all_dim=1.2)),
            id="yarn-mscale",
        ),
    ],
)
def test_what_is_written_is_read(config):
    assert config_from_hf(config_to_hf(config)) == config


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"output_bias": True}, "none of llama, .* has attention_bias=False, output_bias=True"),
        ({"qk_norm": True, "mlp_bias": True}, "none of llama, .* mlp_bias=True, qk_norm=True"),
        (
            {"sliding_window": 7, "sliding_layers": (1,)},
            r"none of llama, .* sliding_window=7 and sliding_layers=\(1,\)",
        ),
        (
            {"rope_scaling": DYNAMIC, "max_position": 65},
            "max_position=65 must be original_max_position=64",
        ),
    ],
    ids=str,
)
def test_a_model_of_no_family_is_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        config_to_hf(plain(**changes))
