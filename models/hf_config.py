"""config.json of Hugging Face's LLaMA, Mistral, Qwen2 and Qwen3, to and from `LlamaConfig`.

Reading fails closed: each key is used, must have the one value that the model here implements, or
is listed as of no effect on it; any other key is an error. Keys that old files lack have the values
that transformers gives them.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.rope_scaling import (
    DynamicRopeScaling,
    LinearRopeScaling,
    Llama3RopeScaling,
    RopeScaling,
    YarnRopeScaling,
)

_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",  # in training alone
        "bos_token_id",
        "dtype",  # the caller chooses it
        "eos_token_id",  # generation's
        "initializer_range",
        "is_llama_config",
        "model_type",
        "pad_token_id",
        "torch_dtype",
        "transformers.js_config",
        "transformers_version",
        "use_cache",
    }
)
_ONLY_VALUES = {"hidden_act": "silu", "pretraining_tp": 1, "rope_interleaved": False}
_ROPE_TYPES: Mapping[str, type[RopeScaling]] = {
    "linear": LinearRopeScaling,
    "dynamic": DynamicRopeScaling,
    "llama3": Llama3RopeScaling,
    "yarn": YarnRopeScaling,
}
# Of the fields of all of them, in transformers' words where these differ.
_ROPE_KEYS = {"original_max_position": "original_max_position_embeddings"}
_DEFAULT_THETA = 10000.0
_KINDS = ("full_attention", "sliding_attention")
_REQUIRED = object()


class _Settings:
    """The keys of config.json, or of its table of rotary settings, that were not yet taken."""

    def __init__(self, settings: Mapping[str, Any], where: str = ""):
        self.left = dict(settings)
        self.where = where

    def take(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a key, which must be of that kind; null counts as absent."""
        value = self.left.pop(key, None)
        if value is None:
            if default is _REQUIRED:
                raise ValueError(f"{self.where}{key} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.where}{key}={value!r} must be of type {kind.__name__}")
        return value

    def finish(self) -> None:
        """Refuses what was not taken."""
        if self.left:
            key, value = sorted(self.left.items())[0]
            raise ValueError(
                f"{self.where}{key}={value!r} is not known here, so the model could compute "
                "something else"
            )


def config_from_hf(settings: Mapping[str, Any], *, dtype: DTypeLike = jnp.bfloat16) -> LlamaConfig:
    """The model of a config.json.

    Args:
        settings: the object in the file, as version 4 or 5 of transformers writes it.
        dtype: of the parameters and of the computation.

    Raises:
        ValueError: a key is missing, not known, or of a value that the model here cannot honour.
    """
    family = settings.get("model_type")
    if family not in _ARCHITECTURES:
        raise ValueError(f"model_type={family!r} must be {', '.join(_ARCHITECTURES)}")
    taken = _Settings({k: v for k, v in settings.items() if k not in _WITHOUT_EFFECT})
    for key, value in _ONLY_VALUES.items():
        if (found := taken.take(key, type(value), value)) != value:
            raise ValueError(f"{key}={found!r} must be {value!r}: nothing else is implemented")
    embed_dim = taken.take("hidden_size", int)
    num_heads = taken.take("num_attention_heads", int)
    num_layers = taken.take("num_hidden_layers", int)
    # Files of the first LLaMA have neither grouped heads nor a head_dim of their own.
    num_kv_heads = num_heads if family == "llama" else _REQUIRED
    divides = family != "qwen3" and num_heads > 0 and embed_dim % num_heads == 0
    head_dim = embed_dim // num_heads if divides else _REQUIRED
    max_position = taken.take("max_position_embeddings", int, None)
    theta, scaling = _rope(taken, max_position)
    config = LlamaConfig(
        vocab_size=taken.take("vocab_size", int),
        num_layers=num_layers,
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=taken.take("num_key_value_heads", int, num_kv_heads),
        head_dim=taken.take("head_dim", int, head_dim),
        mlp_dim=taken.take("intermediate_size", int),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_epsilon=taken.take("rms_norm_eps", float),
        tie_embeddings=taken.take("tie_word_embeddings", bool, False),
        max_position=max_position,
        **_biases(family, taken),
        **_windows(family, taken, num_layers),
        dtype=dtype,
        param_dtype=dtype,
    )
    taken.finish()
    return config


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """The config.json of a model, in the keys that versions 4 and 5 of transformers both read.

    Raises:
        ValueError: none of the four families has all that the model has.
    """
    family = _family(config)
    settings: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": jnp.dtype(config.param_dtype).name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_to_hf(config),
        "tie_word_embeddings": config.tie_embeddings,
    }
    if config.max_position is not None:
        settings["max_position_embeddings"] = config.max_position
    if family in ("llama", "qwen3"):
        settings["attention_bias"] = config.attention_bias
    if family == "llama":
        settings["mlp_bias"] = config.mlp_bias
    if family == "mistral":
        settings["sliding_window"] = config.sliding_window
    if family in ("qwen2", "qwen3"):
        settings |= {
            "use_sliding_window": config.sliding_window is not None,
            "sliding_window": config.sliding_window,
            "layer_types": [
                _KINDS[layer in config.sliding_layers] for layer in range(config.num_layers)
            ],
        }
    return settings


def _family(config: LlamaConfig) -> str:
    """The family that has all that the model has."""
    biases = (config.attention_bias, config.output_bias, config.mlp_bias)
    slides = config.sliding_window is not None
    everywhere = config.sliding_layers == tuple(range(config.num_layers))
    if config.qk_norm and biases in ((False, False, False), (True, True, False)):
        return "qwen3"
    if not config.qk_norm and biases == (True, False, False):
        return "qwen2"
    if not config.qk_norm and not any(biases) and slides and everywhere:
        return "mistral"
    if not config.qk_norm and config.attention_bias == config.output_bias and not slides:
        return "llama"
    raise ValueError(
        f"none of {', '.join(_ARCHITECTURES)} has attention_bias={config.attention_bias}, "
        f"output_bias={config.output_bias}, mlp_bias={config.mlp_bias}, qk_norm={config.qk_norm}, "
        f"sliding_window={config.sliding_window} and sliding_layers={config.sliding_layers} at once"
    )


def _biases(family: str, taken: _Settings) -> dict[str, bool]:
    """Which projections have biases, and whether q and k are normed."""
    everywhere = (
        taken.take("attention_bias", bool, False) if family in ("llama", "qwen3") else False
    )
    return {
        "attention_bias": everywhere or family == "qwen2",
        "output_bias": everywhere,
        "mlp_bias": taken.take("mlp_bias", bool, False) if family == "llama" else False,
        "qk_norm": family == "qwen3",
    }


def _windows(family: str, taken: _Settings, num_layers: int) -> dict[str, Any]:
    """In which layers queries see a window alone, and its size."""
    if family == "llama":
        return {}
    if family == "mistral":
        # transformers has a window where the key is absent, and none where it is null.
        if "sliding_window" not in taken.left:
            raise ValueError("sliding_window is missing; null means none")
        window = taken.take("sliding_window", int, None)
        kinds = [_KINDS[window is not None]] * num_layers
    else:
        is_used = taken.take("use_sliding_window", bool, False)
        window = taken.take("sliding_window", int, None) if is_used else None
        kinds = taken.take("layer_types", list, None)
        if kinds is None:
            # The first layers see everything.
            first = taken.take("max_window_layers", int) if is_used else num_layers
            kinds = [_KINDS[layer >= first] for layer in range(num_layers)]
        for key in ("sliding_window", "max_window_layers"):  # of no effect where not yet taken
            taken.left.pop(key, None)
    if len(kinds) != num_layers or any(kind not in _KINDS for kind in kinds):
        raise ValueError(
            f"layer_types={kinds} must name {' or '.join(_KINDS)} for each of "
            f"num_hidden_layers={num_layers}"
        )
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == _KINDS[1])
    if layers and window is None:
        raise ValueError(f"layer_types has {_KINDS[1]} at {layers}, but sliding_window is missing")
    return {"sliding_window": window if layers else None, "sliding_layers": layers}


def _rope(taken: _Settings, max_position: int | None) -> tuple[float, RopeScaling | None]:
    """The base and the scaling, from version 4's two keys or from version 5's table of both."""
    old = taken.take("rope_scaling", dict, None)
    new = taken.take("rope_parameters", dict, None)
    theta = taken.take("rope_theta", float, None)
    if old is not None and new is not None:
        raise ValueError("rope_scaling and rope_parameters are of different versions; keep one")
    where = "rope_scaling." if new is None else "rope_parameters."
    table = _Settings(old or new or {}, where)
    inner = table.take("rope_theta", float, theta)
    if theta is not None and inner != theta:
        raise ValueError(f"rope_theta={theta} and {where}rope_theta={inner} differ")
    theta = _DEFAULT_THETA if inner is None else inner
    older_name = table.take("type", str, None)
    kind = table.take("rope_type", str, older_name or "default")
    if older_name not in (None, kind):
        raise ValueError(f"{where}type={older_name!r} and {where}rope_type={kind!r} differ")
    if kind == "default":
        table.finish()
        return theta, None
    if kind not in _ROPE_TYPES:
        known = ", ".join(["default", *_ROPE_TYPES])
        raise ValueError(f"{where}rope_type={kind!r} must be {known}")
    scaling = _ROPE_TYPES[kind]
    values = {}
    for field in dataclasses.fields(scaling):
        key = _ROPE_KEYS.get(field.name, field.name)
        if field.name == "original_max_position":
            values[field.name] = _original_max_position(kind, table, max_position)
        elif field.default is dataclasses.MISSING:
            values[field.name] = table.take(key, float)
        else:
            of_type = bool if field.name == "truncate" else float
            values[field.name] = table.take(key, of_type, field.default)
    table.finish()
    return theta, scaling(**values)


def _original_max_position(kind: str, table: _Settings, max_position: int | None) -> int:
    """The context before the stretch, which "dynamic" takes from the model's."""
    default = _REQUIRED if max_position is None else max_position
    if kind != "dynamic":
        return table.take("original_max_position_embeddings", int, default)
    if max_position is None:
        raise ValueError("max_position_embeddings is missing; rope_type='dynamic' needs it")
    return max_position


def _rope_to_hf(config: LlamaConfig) -> dict[str, Any] | None:
    """The table of version 4."""
    if config.rope_scaling is None:
        return None
    names = {scaling: name for name, scaling in _ROPE_TYPES.items()}
    table: dict[str, Any] = {"rope_type": names[type(config.rope_scaling)]}
    for field in dataclasses.fields(config.rope_scaling):
        value = getattr(config.rope_scaling, field.name)
        if value is not None:
            table[_ROPE_KEYS.get(field.name, field.name)] = value
    if isinstance(config.rope_scaling, DynamicRopeScaling):
        original = table.pop("original_max_position_embeddings")
        if config.max_position != original:
            raise ValueError(
                f"max_position={config.max_position} must be original_max_position={original}: "
                "config.json has one number for both with dynamic scaling"
            )
    return table
