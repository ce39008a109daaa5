"""JSON to strategies and back; what is refused, by name."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    DuoAttention,
    FlexPrefill,
    Full,
    MInference,
    PerHead,
    Streaming,
    XAttention,
    configuration,
)
from sparseattn_jax.head_patterns import HeadPatterns
from sparseattn_jax.strategies import STRATEGIES

SHIPPED = pathlib.Path(__file__).parents[1] / "train" / "configs"
REFERENCE = {
    "stride": 8,
    "threshold": 0.9,
    "block_size": 64,
    "sparsity_ratio": 0.2,
    "adaptive_budget": 0.3,
}


def assert_same(one: configuration.Configuration, other: configuration.Configuration) -> None:
    """Equal types, static fields, and leaves."""
    assert one.layers.keys() == other.layers.keys()
    for layer in (-1, *one.layers):
        a, b = one.of_layer(layer), other.of_layer(layer)
        assert jax.tree.structure(a) == jax.tree.structure(b)
        jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", sorted(STRATEGIES.keys() - {"duo_attention", "per_head"}))
def test_defaults_survive_the_round_trip(name: str) -> None:
    made = configuration.from_dict({"strategy": name})
    assert made.strategy == STRATEGIES[name]()
    text = json.dumps(configuration.to_dict(made))
    assert configuration.from_dict(json.loads(text)).strategy == STRATEGIES[name]()


def test_every_field_reaches_the_strategy() -> None:
    settings = {
        "strategy": "flex_prefill",
        "gamma": [0.5, 0.75],
        "tau": 1,
        "min_budget": None,
        "max_budget": 512,
        "sparsity_ratio": 0.25,
        "block_size": 64,
        "per_row": True,
    }
    made = configuration.from_dict(settings)
    assert configuration.to_dict(made) == settings
    assert settings.keys() - {"strategy"} == {f.name for f in dataclasses.fields(FlexPrefill)}
    assert made.strategy.gamma.dtype == jnp.float32


def test_files_are_read_as_they_were_written(tmp_path: pathlib.Path) -> None:
    heads = HeadPatterns.of([("vertical_and_slash", 30, 800), ("stream_llm", 128, 1024)])
    written = configuration.Configuration(
        strategy=XAttention(threshold=jnp.array([0.1, 0.7]), max_blocks=64),
        layers={0: Full(block_size=64), 3: MInference(heads=heads, adaptive_budget=0.25)},
    )
    configuration.save(written, tmp_path / "strategy.json")
    assert_same(configuration.load(tmp_path / "strategy.json"), written)


def test_strategies_within_strategies_survive_the_round_trip() -> None:
    heads = jnp.array([True, False])
    duo = DuoAttention(retrieval=XAttention(threshold=0.9), retrieval_heads=heads)
    written = configuration.Configuration(
        strategy=PerHead(first=duo, second=Streaming(exact=True), is_first=heads)
    )
    settings = json.loads(json.dumps(configuration.to_dict(written)))
    assert settings["first"]["retrieval"]["strategy"] == "xattention"
    assert settings["first"]["retrieval_heads"] == [True, False]
    assert_same(configuration.from_dict(settings), written)


@pytest.mark.parametrize("path", sorted(SHIPPED.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_examples_can_be_loaded(path: pathlib.Path) -> None:
    made = configuration.load(path)
    assert made.of_layer(0) == Full()
    assert made.of_layer(2) == made.strategy == XAttention(threshold=0.9)


def test_layers_inherit_or_are_another_strategy() -> None:
    made = configuration.from_dict(
        {
            "strategy": "xattention",
            "stride": 8,
            "block_size": 64,
            "layers": {"0-1": {"strategy": "full"}, "5": {"threshold": 0.5}},
        }
    )
    assert [type(made.of_layer(layer)) for layer in range(3)] == [Full, Full, XAttention]
    assert made.of_layer(0) == Full()
    assert made.of_layer(5) == XAttention(threshold=0.5, stride=8, block_size=64)
    assert made.of_layer(6) == made.strategy == XAttention(stride=8, block_size=64)


@pytest.mark.parametrize(
    ("strategy", "ignored"),
    [
        (XAttention(stride=8, threshold=0.9, block_size=64), {"sparsity_ratio", "adaptive_budget"}),
        (
            FlexPrefill(block_size=64, sparsity_ratio=0.2),
            {"stride", "threshold", "adaptive_budget"},
        ),
        (
            MInference(block_size=64, adaptive_budget=0.3),
            {"stride", "threshold", "sparsity_ratio"},
        ),
        (Streaming(block_size=64), REFERENCE.keys() - {"block_size"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_keys_of_the_reference_are_taken_or_ignored_with_a_sentence(strategy, ignored) -> None:
    name = next(name for name, cls in STRATEGIES.items() if cls is type(strategy))
    with pytest.warns(UserWarning) as caught:
        made = configuration.from_dict(REFERENCE, strategy=name)
    assert made.strategy == strategy
    assert {str(warning.message) for warning in caught} == {
        f"{key}={REFERENCE[key]} is ignored: {name} has no such parameter" for key in ignored
    }


def test_layers_ignore_keys_of_the_reference_too() -> None:
    settings = {"block_size": 64, "layers": {"2": {"stride": 4, "recent_size": 512}}}
    with pytest.warns(UserWarning, match="stride=4 is ignored: streaming has no such parameter"):
        made = configuration.from_dict(settings, strategy="streaming")
    assert made.of_layer(2) == Streaming(block_size=64, recent_size=512)


@pytest.mark.parametrize(
    ("settings", "strategy", "message"),
    [
        ({}, None, "the settings name no strategy; add the key or pass strategy= one of duo"),
        ({"strategy": "dense"}, None, "strategy='dense' is not known; use strategy= one of duo"),
        ({}, "dense", "strategy='dense' is not known"),
        ({"strategy": ["full"]}, None, r"strategy=\['full'\] is not known"),
        ({"strategy": "full"}, "streaming", "strategy='streaming', but the settings name 'full'"),
        ({"strategy": "full", "stride": 8}, None, "stride is no parameter of Full; it has block"),
        ({"treshold": 1}, "xattention", "treshold is no parameter of XAttention; it has threshold"),
        ({"strategy": "xattention", "stride": "8"}, None, "stride='8' must be an integer"),
        ({"strategy": "xattention", "stride": 8.0}, None, "stride=8.0 must be an integer"),
        ({"strategy": "xattention", "stride": True}, None, "stride=True must be an integer"),
        (
            {"strategy": "xattention", "threshold": [0.5, "x"]},
            None,
            r"threshold=\[0.5, 'x'\] must be a number or a list of numbers",
        ),
        ({"strategy": "flex_prefill", "per_row": 1}, None, "per_row=1 must be true or false"),
        (
            {"strategy": "per_head", "first": {"block_size": 64}},
            None,
            "second of PerHead is missing",
        ),
        (
            {"strategy": "duo_attention", "retrieval": {}, "retrieval_heads": [True]},
            None,
            r"retrieval=\{\} must be an object that names a strategy",
        ),
        (
            {"strategy": "duo_attention", "retrieval": {"strategy": "full", "stride": 8}}
            | {"retrieval_heads": [True]},
            None,
            "retrieval.stride is no parameter of Full",
        ),
        (
            {"strategy": "duo_attention", "retrieval": {"strategy": "full"}}
            | {"retrieval_heads": [0.5, True]},
            None,
            r"retrieval_heads=\[0.5, True\] must be a list of true and false",
        ),
        (
            {"strategy": "minference", "heads": 3},
            None,
            "heads=3 must be an object or null",
        ),
        (
            {"strategy": "minference", "heads": {"kinds": [0], "max_columns": 8}},
            None,
            "heads.sizes of HeadPatterns is missing",
        ),
        ({"strategy": "full", "layers": []}, None, r"layers must be a JSON object, not \[\]"),
        (
            {"strategy": "full", "layers": {"0": "full"}},
            None,
            r"layers\['0'\] must be a JSON object, not 'full'",
        ),
        (
            {"strategy": "full", "layers": {"0": {"window": 3}}},
            None,
            r"layers\['0'\]: window is no parameter of Full",
        ),
        (
            {"strategy": "full", "layers": {"0-3": {}, "2": {}}},
            None,
            r"layers\['2'\]: layer 2 is there twice",
        ),
        *[
            ({"strategy": "full", "layers": {key: {}}}, None, rf"layers\['{key}'\] must be a layer")
            for key in ("first", "3-1", "-1", "1-")
        ],
    ],
)
def test_what_cannot_be_meant_is_refused(settings: dict, strategy: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configuration.from_dict(settings, strategy=strategy)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "strategy.json is not JSON: Expecting"), ("[]", "strategy.json must be a JSON object")],
)
def test_files_that_hold_no_object_are_refused(
    tmp_path: pathlib.Path, text: str, message: str
) -> None:
    (tmp_path / "strategy.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        configuration.load(tmp_path / "strategy.json")


def test_a_strategy_that_is_not_registered_has_no_name() -> None:
    @dataclasses.dataclass(frozen=True)
    class Other(Full):
        pass

    with pytest.raises(ValueError, match="Other is not registered; use strategy= one of"):
        configuration.to_dict(configuration.Configuration(strategy=Other()))
