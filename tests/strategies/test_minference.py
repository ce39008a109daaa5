"""MInference's patterns against the paper's rules, and the attention over them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    HeadPatterns,
    MInference,
    UnsupportedError,
    block_sparse_attention,
    minference_prefill,
    prefill_attention,
    sparse_attention,
)
from tests.kernels.xla_programs import arrays, operations
from tests.oracles import attention, minference, selection
from tests.oracles.vertical_slash import vertical_slash_scores

VERTICAL_SLASH = [("vertical_and_slash", 5, 6)] * 4
MIXED = [
    ("vertical_and_slash", 4, 7),
    ("block_sparse", 3, 1),
    ("stream_llm", 3, 10),
    ("tri_shape", 5, 9),
]
SETTINGS = {"sink_size": 2, "recent_size": 3, "last_size": 9, "num_queries": 8, "block_size": 8}


def strategy(heads: list[tuple] = VERTICAL_SLASH, **parameters) -> MInference:
    parameters = SETTINGS | parameters
    if heads is VERTICAL_SLASH:
        return MInference(vertical_size=5, slash_size=6, **parameters)
    return MInference(heads=HeadPatterns.of(heads), **parameters)


def draw(B: int = 2, T: int = 45, S: int = 59, N: int = 4, K: int = 2, H: int = 8):
    rng = np.random.default_rng(T + S)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jnp.array(2 * rng.normal(size=shape), jnp.float32) for shape in shapes]


CASES = {
    "T<S-unaligned": ({}, VERTICAL_SLASH, {}, None),
    "square": ({"T": 48, "S": 48, "K": 4, "B": 1, "H": 5}, VERTICAL_SLASH, {}, None),
    "T<block": ({"T": 3, "B": 1}, VERTICAL_SLASH, {}, None),
    "one-query": ({"T": 1, "B": 1}, VERTICAL_SLASH, {}, None),
    "lengths": ({"B": 3}, VERTICAL_SLASH, {}, [59, 37, 10]),
    "budget": ({"B": 3}, VERTICAL_SLASH, {"adaptive_budget": 0.3}, [59, 37, 10]),
    "few-of-the-forced": ({}, VERTICAL_SLASH, {"sink_size": 9, "recent_size": 20}, None),
    "mixed": ({}, MIXED, {}, None),
    "mixed-lengths": ({"B": 3}, MIXED, {}, [59, 37, 10]),
    "mixed-square": ({"T": 45, "S": 45}, MIXED, {"last_size": 1}, None),
    "mixed-budget": ({}, MIXED, {"adaptive_budget": 0.5}, None),
    "no-vertical-slash": ({}, [*MIXED[1:], ("block_sparse", 1, 1)], {}, None),
}
RUN_ALWAYS = {"budget", "mixed-lengths"}
every_case = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.full] * (name not in RUN_ALWAYS)) for name in CASES],
)


@jax.jit
def select_and_attend(strategy: MInference, lengths, *qkv):
    pattern = strategy.select(*qkv[:2], kv_lengths=lengths)
    return pattern, *sparse_attention(*qkv, pattern, kv_lengths=lengths, return_lse=True)


@jax.jit
def select(strategy: MInference, q: jax.Array, k: jax.Array):
    return strategy.select(q, k)


@functools.cache
def results(name: str):
    """(operands, pattern, output, log-sum-exp, and the oracle's blocks, columns and pairs)."""
    sizes, heads, parameters, lengths = CASES[name]
    qkv = draw(**sizes)
    lengths = None if lengths is None else np.array(lengths, np.int32)
    pattern, out, lse = select_and_attend(
        strategy(heads, **parameters), None if lengths is None else jnp.asarray(lengths), *qkv
    )
    q, k = map(np.asarray, qkv[:2])
    blocks, columns = minference.selected(
        q, k, heads=heads, kv_lengths=lengths, **(SETTINGS | parameters)
    )
    pairs = minference.kept_pairs(blocks, columns, heads, q.shape[1], k.shape[1], 8, lengths)
    return qkv, pattern, out, lse, blocks, columns, pairs


@every_case
def test_blocks_and_columns_are_those_of_the_rules(name: str) -> None:
    _, pattern, _, _, blocks, columns, _ = results(name)
    np.testing.assert_array_equal(selection.listed_blocks(pattern.blocks), blocks)
    counts, indices = np.asarray(pattern.columns.counts), np.asarray(pattern.columns.indices)
    for b, n in np.ndindex(counts.shape):
        assert indices[b, n, : counts[b, n]].tolist() == columns[b][n]


@every_case
def test_attention_sees_the_covered_pairs_once(name: str) -> None:
    qkv, _, out, lse, *_, pairs = results(name)
    expected_out, expected_lse = attention.attention(*qkv, pairs)
    np.testing.assert_allclose(out, expected_out, atol=5e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=5e-6)


@pytest.mark.parametrize("name", ["budget", pytest.param("mixed", marks=pytest.mark.full)])
def test_a_query_sees_itself_and_the_sinks(name: str) -> None:
    """Distance 0 is always there, whatever its mass; keys are not all there."""
    *_, pairs = results(name)
    offset = pairs.shape[3] - pairs.shape[2]
    diagonal = np.diagonal(pairs, offset, axis1=2, axis2=3)
    visible = pairs.any(axis=-1)
    assert visible.any() and visible.all() == (CASES[name][3] is None)
    np.testing.assert_array_equal(diagonal, visible)
    assert pairs.sum() < 0.9 * visible.sum() * pairs.shape[3]


@pytest.mark.parametrize(
    "heads", [pytest.param(VERTICAL_SLASH, marks=pytest.mark.full), MIXED], ids=["alike", "mixed"]
)
def test_gradients_under_vmap_are_those_of_the_covered_pairs(heads: list[tuple]) -> None:
    name = "lengths" if heads is VERTICAL_SLASH else "mixed-lengths"
    qkv, *_, pairs = results(name)
    lengths = jnp.array(CASES[name][3], jnp.int32)
    d_out = np.random.default_rng(0).normal(size=qkv[0].shape).astype(np.float32)

    def gradients(length: jax.Array, d_out: jax.Array, *qkv: jax.Array) -> tuple[jax.Array, ...]:
        def attend(*qkv: jax.Array) -> jax.Array:
            alone = (x[None] for x in qkv)
            return prefill_attention(*alone, strategy(heads), kv_lengths=length[None])[0]

        return jax.vjp(attend, *qkv)[1](d_out)

    found = jax.jit(jax.vmap(gradients))(lengths, d_out, *qkv)
    expected = attention.attention_gradients(*qkv, pairs, d_out, np.zeros(d_out.shape[:3]))
    for ours, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, right, atol=3e-5)


def test_the_defaults_select_everything_up_to_the_slash_size() -> None:
    q, k, v = draw(B=1, T=70, S=70, N=2, K=1)
    out = jax.jit(minference_prefill)(q, k, v)
    everything = np.broadcast_to(np.tri(70, dtype=bool), (1, 2, 70, 70))
    np.testing.assert_allclose(out, attention.attention(q, k, v, everything)[0], atol=5e-6)


def test_ties_take_the_lower_key_and_the_shorter_distance() -> None:
    """All keys are equal, so all columns have the same mass, but for causality."""
    q, k = jnp.ones((1, 32, 1, 8)), jnp.ones((1, 32, 1, 8))
    few = {"sink_size": 0, "recent_size": 1, "num_queries": 1, "block_size": 4}
    pattern = select(MInference(vertical_size=3, slash_size=5, **few), q, k)
    assert pattern.columns.indices.tolist() == [[[0, 1, 2]]]
    listed = selection.listed_blocks(pattern.blocks)[0, 0]
    # Distances 0 to 4 reach back to the block before the previous one's first key.
    np.testing.assert_array_equal(listed, np.tri(8, dtype=bool) & ~np.tri(8, k=-2, dtype=bool))


def test_distances_are_taken_from_the_shortest_on() -> None:
    q, k, _ = draw(B=1, T=48, S=48)
    parameters = SETTINGS | {"recent_size": 20, "block_size": 1}
    pattern = select(MInference(vertical_size=2, slash_size=13, **parameters), q, k)
    # 20 are the least here, and 50 where more are forced.
    away = np.arange(48)[:, None] - np.arange(48)
    listed = selection.listed_blocks(pattern.blocks)
    np.testing.assert_array_equal(listed, np.tile((away >= 0) & (away < 20), (1, 4, 1, 1)))


def test_no_columns_at_all() -> None:
    q, k, v = draw(B=1, T=48, S=48)
    parameters = SETTINGS | {"sink_size": 0}
    pattern = select(MInference(vertical_size=0, slash_size=3, **parameters), q, k)
    assert pattern.columns is None
    out = sparse_attention(q, k, v, pattern)
    np.testing.assert_array_equal(out, block_sparse_attention(q, k, v, pattern.blocks))


def test_each_head_equals_itself_among_its_like() -> None:
    qkv, _, mixed, *_ = results("mixed-lengths")
    lengths = jnp.array(CASES["mixed-lengths"][3], jnp.int32)
    for head, pattern in enumerate(MIXED):
        heads = HeadPatterns.of([pattern] * 4, max_columns=4)
        alike = select_and_attend(MInference(heads=heads, **SETTINGS), lengths, *qkv)[1]
        np.testing.assert_allclose(alike[:, :, head], mixed[:, :, head], atol=1e-6)


@pytest.mark.full
def test_layers_can_be_scanned() -> None:
    q, k, v = draw(B=1, T=45, S=45)
    layers = [HeadPatterns.of(heads, max_columns=5) for heads in (MIXED, VERTICAL_SLASH)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)

    def attend(x: jax.Array, heads: HeadPatterns) -> tuple[jax.Array, None]:
        return prefill_attention(x, k, v, MInference(heads=heads, **SETTINGS)), None

    scanned, _ = jax.lax.scan(attend, q, stacked)
    expected = attend(attend(q, layers[0])[0], layers[1])[0]
    np.testing.assert_allclose(scanned, expected, atol=1e-6)


def test_prefill_by_name_makes_the_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = {"vertical_size": 33, "slash_size": 7, "adaptive_budget": 0.25, "block_size": 16}
    parameters["heads"] = HeadPatterns.of(MIXED)
    made = []
    monkeypatch.setattr(
        "sparseattn_jax.prefill.prefill_attention",
        lambda q, k, v, strategy, **options: made.append((strategy, options)) or q,
    )
    q, k, v = draw()
    lengths = jnp.array([59, 37], jnp.int32)
    options = {"kv_lengths": lengths, "return_lse": False, "backend": "xla"}
    minference_prefill(q, k, v, **parameters, **options)
    others = {"is_causal": True, "segment_ids": None}
    assert made == [(MInference(**parameters), options | others)]


def test_a_capacity_keeps_the_distances_of_highest_mass() -> None:
    q, k, _ = draw(B=1, S=61)
    whole, kept = (select(strategy(max_blocks=most), q, k) for most in (None, 4))
    expected = everything = selection.listed_blocks(whole.blocks)
    slash = vertical_slash_scores(np.asarray(q), np.asarray(k), num_queries=8)[1][0]
    slash[:, :3] = np.inf
    away = (np.arange(6)[:, None] + 2) - np.arange(8)
    for n, mass in enumerate(slash):
        of_blocks = np.zeros(8)
        for distance in sorted(range(61), key=lambda i: -mass[i])[:6]:
            # Of the first and the last query of a block that ends with key block 7.
            for position in (56, 63):
                if distance <= position:
                    of_blocks[7 - (position - distance) // 8] += mass[distance]
        best = np.argsort(-of_blocks, kind="stable")[:4]
        expected = expected.copy()
        expected[0, n] &= np.isin(away, best)
    listed = selection.listed_blocks(kept.blocks)
    np.testing.assert_array_equal(listed, expected)
    np.testing.assert_array_equal(kept.num_dropped, (everything & ~listed).sum(axis=(-2, -1)))
    assert kept.num_dropped.sum() > 0 and not whole.num_dropped.any()
    assert kept.blocks.kv_indices.shape[-1] == 4


def test_memory_holds_no_array_of_all_pairs() -> None:
    q, k, _ = draw(B=1, T=2048, S=2048, N=2, K=1)
    made = arrays(operations(MInference().select, q, k))
    # The largest are the last queries' softmax rows, and what sums their diagonals.
    assert max(array.size for array in made) <= 2 * 2 * 64 * (2048 + 64)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"vertical_size": -1}, "vertical_size=-1 must not be negative"),
        ({"sink_size": -2}, "sink_size=-2 must not be negative"),
        ({"slash_size": 0}, "slash_size=0 must be at least 1"),
        ({"recent_size": 0}, "recent_size=0 must be at least 1"),
        ({"last_size": 0}, "last_size=0 must be at least 1"),
        ({"num_queries": 0}, "num_queries=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"max_blocks": 1}, "max_blocks=1 must be at least 2"),
        (
            {"max_blocks": 4, "heads": HeadPatterns.of(MIXED)},
            "max_blocks=4 does not go with heads",
        ),
        ({"adaptive_budget": 0.0}, r"adaptive_budget=0.0 must lie in \(0, 1\]"),
        ({"adaptive_budget": 1.5}, r"adaptive_budget=1.5 must lie in \(0, 1\]"),
        (
            {"heads": HeadPatterns.of(MIXED[:3])},
            r"heads.kinds has shape \(3,\), but q has 4 heads",
        ),
    ],
)
def test_parameters_out_of_range_raise(parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MInference(**parameters).select(*draw()[:2])


def test_a_call_without_causality_raises() -> None:
    with pytest.raises(ValueError, match="is_causal=False: MInference judges by the last queries"):
        MInference().select(*draw()[:2], is_causal=False)


def test_packed_sequences_are_refused() -> None:
    q, k, _ = draw()
    with pytest.raises(UnsupportedError, match="MInference does not take segment_ids"):
        MInference().select(q, k, segment_ids=jnp.zeros((2, 59), jnp.int32))


def test_a_named_backend_must_run_the_columns_too() -> None:
    qkv, pattern, *_ = results("mixed-lengths")
    with pytest.raises(UnsupportedError, match="needs compute capability 9"):
        sparse_attention(*qkv, pattern, backend="mosaic_sm90")


def test_a_pattern_made_for_other_operands_is_refused() -> None:
    qkv, pattern, *_ = results("mixed-lengths")
    columns = dataclasses.replace(pattern.columns, kv_len=58)
    with pytest.raises(ValueError, match=r"pattern.columns is for .*kv_len=58"):
        sparse_attention(*qkv, dataclasses.replace(pattern, columns=columns))
    windows = dataclasses.replace(pattern.windows, sinks=pattern.windows.sinks[:3])
    with pytest.raises(ValueError, match=r"pattern.windows has sinks of shape \(3,\)"):
        sparse_attention(*qkv, dataclasses.replace(pattern, windows=windows))
    blocks = dataclasses.replace(pattern.blocks, is_causal=False)
    with pytest.raises(ValueError, match="windows look back from each query"):
        sparse_attention(*qkv, dataclasses.replace(pattern, blocks=blocks))
