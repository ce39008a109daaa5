"""From strategies and head masks to runs of layers and to the cache."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import DuoAttention, FlexPrefill, Full, PerHead, Streaming, XAttention
from sparseattn_jax.calibration import to_configuration
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.models.policy import Policy
from tests.models.small_models import CONFIG

MASKS = np.array([[True, False], [False, False], [True, True]])
SLIDING = dataclasses.replace(CONFIG, sliding_window=7, sliding_layers=(1, 2))
EXACT = Streaming(sink_size=2, recent_size=5, exact=True)


def of_layers(strategy, **layers) -> Configuration:
    return Configuration(
        strategy=strategy, layers={int(name[1:]): layer for name, layer in layers.items()}
    )


def types_of(policy: Policy) -> list[tuple[str, int]]:
    return [
        (type(strategy).__name__, length)
        for strategy, length in zip(policy.strategies, policy.run_lengths, strict=True)
    ]


def test_everything_sees_everything_by_default() -> None:
    policy = Policy.of(CONFIG)
    assert types_of(policy) == [("Full", 3)]
    assert policy.is_full.all() and policy.is_full.shape == (3, 2)
    assert policy.window is None


def test_layers_of_one_structure_are_a_run() -> None:
    configuration = of_layers(XAttention(), l1=Full(), l2=Full(block_size=64))
    assert types_of(Policy.of(CONFIG, configuration)) == [("XAttention", 1), *[("Full", 1)] * 2]
    configuration = of_layers(Full(), l0=XAttention(threshold=0.8), l1=XAttention(threshold=0.9))
    policy = Policy.of(CONFIG, configuration)
    assert types_of(policy) == [("XAttention", 2), ("Full", 1)]
    np.testing.assert_array_equal(policy.strategies[0].threshold, np.float32([0.8, 0.9]))


def test_thresholds_of_a_calibrated_file_are_stacked() -> None:
    thresholds = np.linspace(0.1, 0.9, 12, dtype=np.float32).reshape(3, 4)
    policy = Policy.of(CONFIG, to_configuration(thresholds))
    assert types_of(policy) == [("XAttention", 3)]
    np.testing.assert_array_equal(policy.strategies[0].threshold, thresholds)


def test_one_threshold_and_one_for_each_head_are_two_runs() -> None:
    configuration = of_layers(XAttention(), l2=XAttention(threshold=jnp.full(4, 0.9)))
    assert Policy.of(CONFIG, configuration).run_lengths == (2, 1)


def test_head_masks_are_of_each_layer() -> None:
    configuration = of_layers(XAttention(threshold=0.9))
    policy = Policy.of(CONFIG, configuration, head_masks=MASKS, sink_size=3, recent_size=6)
    assert types_of(policy) == [("DuoAttention", 3)]
    np.testing.assert_array_equal(policy.strategies[0].retrieval_heads, MASKS)
    np.testing.assert_array_equal(policy.strategies[0].retrieval.threshold, np.float32([0.9] * 3))
    np.testing.assert_array_equal(policy.is_full, MASKS)
    assert policy.window == (3, 6)


def test_layers_with_sliding_windows_keep_them() -> None:
    policy = Policy.of(SLIDING, of_layers(XAttention()))
    assert types_of(policy) == [("XAttention", 1), ("Streaming", 2)]
    assert policy.strategies[1] == Streaming(sink_size=0, recent_size=7, exact=True)
    assert policy.is_full.tolist() == [[True, True], [False, False], [False, False]]
    assert policy.window == (0, 7)


@pytest.mark.parametrize(
    ("strategy", "is_full"),
    [
        (EXACT, [False, False]),
        (Streaming(), [True, True]),
        (DuoAttention(retrieval=Full(), retrieval_heads=jnp.array([True, False])), [True, False]),
        (
            DuoAttention(retrieval=Full(), retrieval_heads=jnp.array([False, False, True, True])),
            [False, True],
        ),
        (PerHead(first=Full(), second=EXACT, is_first=jnp.array([True, False])), [True, True]),
    ],
    ids=["exact", "blocks", "duo", "duo-query-heads", "per-head"],
)
def test_heads_with_exact_windows_alone_forget(strategy, is_full: list) -> None:
    policy = Policy.of(CONFIG, of_layers(Full(), l1=strategy))
    assert policy.is_full.tolist() == [[True, True], is_full, [True, True]]
    assert (policy.window is None) == all(is_full)


def test_the_cache_holds_what_the_policy_says() -> None:
    policy = Policy.of(CONFIG, head_masks=MASKS, sink_size=3, recent_size=6)

    def bytes_of(policy: Policy) -> int:
        return jax.eval_shape(
            lambda: dataclasses.replace(policy).create_cache(CONFIG, batch=2, capacity=64)
        ).memory_usage()

    # Three of six heads have 64 slots, the others 9, in whole tiles of 8.
    assert bytes_of(Policy.of(CONFIG)) == 2 * 2 * 6 * 64 * 8 * 4
    assert bytes_of(policy) == 2 * 2 * 3 * (64 + 16) * 8 * 4
    half = policy.create_cache(CONFIG, batch=2, capacity=64, dtype=jnp.bfloat16)
    assert half.full_k.dtype == jnp.bfloat16


def test_is_a_tree_whose_structure_is_not_of_its_numbers() -> None:
    def structure(threshold: float, masks: np.ndarray):
        configuration = of_layers(XAttention(threshold=threshold))
        return jax.tree.structure(Policy.of(CONFIG, configuration, head_masks=masks))

    assert structure(0.9, MASKS) == structure(0.8, ~MASKS)


DUO = DuoAttention(retrieval=Full(), retrieval_heads=jnp.array([True, False]))


@pytest.mark.parametrize(
    ("config", "configuration", "options", "sentence"),
    [
        (
            CONFIG,
            of_layers(Full(), l3=Full()),
            {},
            "layers: 3 is none of the model, whose 3 layers",
        ),
        (
            CONFIG,
            None,
            {"head_masks": np.ones((4, 2), bool)},
            r"head_masks has shape \(4, 2\) .* 3 layers with 2 kv heads: pass bool of shape \(3, 2",
        ),
        (CONFIG, None, {"head_masks": np.ones((3, 4), bool)}, r"head_masks has shape \(3, 4\)"),
        (CONFIG, None, {"head_masks": np.ones((3, 2))}, "head_masks has .* dtype float64"),
        (CONFIG, None, {"head_masks": MASKS, "sink_size": -1}, "sink_size=-1 must not be negative"),
        (CONFIG, None, {"head_masks": MASKS, "recent_size": 0}, "recent_size=0 must be at least 1"),
        (
            CONFIG,
            of_layers(Full(), l1=DUO),
            {"head_masks": MASKS},
            "head_masks do not go with DuoAttention in layer 1",
        ),
        (
            CONFIG,
            of_layers(EXACT),
            {"head_masks": MASKS},
            "head_masks do not go with Streaming in layer 0",
        ),
        (
            CONFIG,
            of_layers(Full(), l0=EXACT, l2=DUO),
            {},
            r"are \(2, 5\) in layer 0 and \(64, 256\) in layer 2; the cache keeps windows of one",
        ),
        (
            CONFIG,
            of_layers(XAttention(), l2=XAttention(threshold=1.5)),
            {},
            r"XAttention of layer 2: threshold=1.5 must lie in \[0, 1\]",
        ),
        (
            CONFIG,
            of_layers(XAttention(threshold=jnp.ones(3))),
            {},
            r"XAttention of layer 0: threshold has shape \(3,\)",
        ),
        (
            CONFIG,
            of_layers(FlexPrefill(tau=-1.0)),
            {"head_masks": MASKS},
            "FlexPrefill of layer 0: tau=-1.0 must not be negative",
        ),
        (
            CONFIG,
            of_layers(dataclasses.replace(DUO, retrieval_heads=jnp.array([True] * 3))),
            {},
            r"DuoAttention of layer 0: retrieval_heads has shape \(3,\)",
        ),
        (
            CONFIG,
            of_layers(
                dataclasses.replace(DUO, retrieval_heads=jnp.array([True, False, False, False]))
            ),
            {},
            "retrieval_heads of layer 0 differ among query heads that share a kv head",
        ),
        (
            SLIDING,
            of_layers(Full(), l2=Full()),
            {},
            "layer 2 has a sliding window of 7 tokens.*; leave it out",
        ),
        (
            dataclasses.replace(SLIDING, sliding_layers=(0, 1, 2)),
            of_layers(XAttention()),
            {},
            "all 3 layers of the model have sliding windows of 7 tokens.*; pass no strategy",
        ),
        (
            SLIDING,
            None,
            {"head_masks": MASKS},
            "head_masks do not go with sliding windows, which layers 1, 2 of this model have",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_refuses(config, configuration, options: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Policy.of(config, configuration, **options)
