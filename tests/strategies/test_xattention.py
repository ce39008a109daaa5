"""XAttention's sets against scores and selection by their formulas."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import Full, UnsupportedError, XAttention, prefill_attention
from tests.oracles import attention, selection
from tests.oracles import xattention as scoring


def draw(B=1, T=48, S=48, N=2, K=1, H=8, dtype=jnp.float32):
    """Queries and keys whose scores are spread out, so that thresholds bite."""
    rng = np.random.default_rng(T + S)
    q, k = rng.normal(size=(B, T, N, H)), rng.normal(size=(B, S, K, H))
    return jnp.array(2.5 * q, dtype), jnp.array(2.5 * k, dtype)


def faults(pattern, q, k, strategy, *, epsilon=1e-5, is_causal=True, kv_lengths=None):
    """What is wrong with a pattern by scores in float64."""
    call = {"is_causal": is_causal, "kv_lengths": kv_lengths}
    size = strategy.block_size
    scores = scoring.antidiagonal_scores(q, k, stride=strategy.stride, block_size=size, **call)
    visible, forced = selection.visible_and_forced(q.shape[0], q.shape[1], k.shape[1], size, **call)
    threshold = np.broadcast_to(strategy.threshold, (q.shape[2],))
    keep = selection.listed_blocks(pattern.blocks)
    return selection.rows_at_fault(keep, scores, threshold, forced, visible, epsilon=epsilon)


CASES = {
    "square": ({}, {}, {}),
    "odd-length": ({"T": 45, "S": 45}, {}, {}),
    "shorter-than-a-block": ({"T": 5, "S": 5}, {}, {}),
    "T<S-aligned": ({"T": 16}, {}, {}),
    "T<S-unaligned": ({"T": 21, "S": 61}, {}, {}),
    "non-causal": ({"T": 21, "S": 61}, {}, {"is_causal": False}),
    "per-head": ({"N": 3}, {"threshold": [0.2, 0.7, 0.95]}, {}),
    "gqa-3:1": ({"N": 6, "K": 2}, {}, {}),
    "stride-8": ({"T": 61, "S": 61}, {"stride": 8}, {}),
    "stride-16": ({"T": 80, "S": 93}, {"stride": 16, "block_size": 16}, {}),
    "block-64": ({"T": 200, "S": 280}, {"block_size": 64, "stride": 8}, {}),
    "block-128": ({"T": 200, "S": 500}, {"block_size": 128, "stride": 16}, {}),
    "lengths": ({"B": 3}, {}, {"kv_lengths": [48, 22, 0]}),
    "lengths-T<S": ({"B": 3, "T": 21}, {}, {"kv_lengths": [48, 37, 10]}),
    "lengths-non-causal": (
        {"B": 3, "T": 21},
        {},
        {"kv_lengths": [48, 10, 0], "is_causal": False},
    ),
}


@functools.partial(jax.jit, static_argnames="is_causal")
def select_in_jit(strategy, q, k, lengths, *, is_causal):
    return strategy.select(q, k, is_causal=is_causal, kv_lengths=lengths)


def select(strategy, q, k, *, is_causal=True, kv_lengths=None):
    lengths = None if kv_lengths is None else jnp.array(kv_lengths, jnp.int32)
    return select_in_jit(strategy, q, k, lengths, is_causal=is_causal)


@pytest.mark.parametrize(("shape", "settings", "call"), CASES.values(), ids=CASES)
def test_keeps_the_right_blocks(shape: dict, settings: dict, call: dict):
    q, k = draw(**shape)
    settings = {"threshold": 0.8, "stride": 4, "block_size": 8} | settings
    settings["threshold"] = jnp.array(settings["threshold"], jnp.float32)
    strategy = XAttention(**settings)
    pattern = select(strategy, q, k, **call)
    assert faults(pattern, q, k, strategy, **call) == []
    np.testing.assert_array_equal(pattern.num_dropped, 0)


def test_bf16_operands_keep_the_right_blocks():
    q, k = draw(T=45, S=61, dtype=jnp.bfloat16)
    strategy = XAttention(threshold=0.8, stride=4, block_size=8)
    pattern = select(strategy, q, k)
    assert faults(pattern, q, k, strategy, epsilon=1e-3) == []


def test_another_threshold_is_seen_as_wrong():
    q, k = draw()
    kept = select(XAttention(threshold=0.6, stride=4, block_size=8), q, k)
    assert faults(kept, q, k, XAttention(threshold=0.8, stride=4, block_size=8)) != []


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_threshold_1_is_full(is_causal: bool):
    q, k = draw(B=2, T=21, S=61)
    everything = select(Full(block_size=8), q, k, is_causal=is_causal)
    kept = select(XAttention(threshold=1.0, stride=4, block_size=8), q, k, is_causal=is_causal)
    kept, everything = (selection.listed_blocks(x.blocks) for x in (kept, everything))
    np.testing.assert_array_equal(kept, np.broadcast_to(everything, kept.shape))


def test_threshold_0_keeps_the_first_block_and_the_diagonal():
    q, k = draw(T=21, S=61)
    pattern = select(XAttention(threshold=0.0, stride=4, block_size=8), q, k)
    kept = selection.listed_blocks(pattern.blocks)
    _, forced = selection.visible_and_forced(1, 21, 61, 8, is_causal=True)
    np.testing.assert_array_equal(kept, np.broadcast_to(forced, kept.shape))


def test_a_padded_batch_equals_each_sequence_alone():
    q, k = draw(B=3, N=4, K=2)
    strategy = XAttention(threshold=0.8, stride=4, block_size=8)
    lengths = [48, 37, 6]
    together = selection.listed_blocks(select(strategy, q, k, kv_lengths=lengths).blocks)
    for b, length in enumerate(lengths):
        alone = select(strategy, q[b : b + 1, :length], k[b : b + 1, :length])
        alone = selection.listed_blocks(alone.blocks)[0]
        rows, columns = alone.shape[1:]
        np.testing.assert_array_equal(together[b, :, :rows, :columns], alone)
        together[b, :, :rows, :columns] = False
    assert not together.any()


def test_a_capacity_keeps_forced_blocks_and_counts_what_it_drops():
    q, k = draw(T=40, S=61, N=2)
    unlimited = select(XAttention(threshold=0.95, stride=4, block_size=8), q, k)
    limited = select(XAttention(threshold=0.95, stride=4, block_size=8, max_blocks=4), q, k)
    assert limited.blocks.kv_indices.shape[-1] == 4
    kept, kept_unlimited = (selection.listed_blocks(x.blocks) for x in (limited, unlimited))
    assert not (kept & ~kept_unlimited).any()
    _, forced = selection.visible_and_forced(1, 40, 61, 8, is_causal=True)
    assert kept[np.broadcast_to(forced, kept.shape)].all()
    dropped = (kept_unlimited & ~kept).sum(axis=(-2, -1))
    assert (limited.num_dropped > 0).all()
    np.testing.assert_array_equal(limited.num_dropped, dropped)


def test_a_traced_threshold_makes_one_program():
    q, k = draw()
    traces = []

    @jax.jit
    def density(threshold):
        traces.append(threshold)
        strategy = XAttention(threshold=threshold, stride=4, block_size=8)
        return strategy.select(q, k).blocks.density().mean()

    densities = [float(density(jnp.float32(threshold))) for threshold in (0.2, 0.6, 1.0)]
    assert densities == sorted(densities)
    assert densities[0] < densities[-1] == 1.0
    assert len(traces) == 1


def test_selection_has_no_gradient():
    q, k = draw()

    def mass(q, k, threshold):
        pattern = XAttention(threshold=threshold, stride=4, block_size=8).select(q, k)
        return pattern.blocks.density().sum() + 0.0 * q.sum()

    gradients = jax.jit(jax.grad(mass, argnums=(0, 1, 2)))(q, k, jnp.float32(0.8))
    for gradient in gradients:
        np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threshold": 1.5}, r"threshold=1.5 must lie in \[0, 1\]"),
        ({"threshold": -0.1}, r"threshold=-0.1 must lie in \[0, 1\]"),
        ({"threshold": float("nan")}, r"threshold=nan must lie in \[0, 1\]"),
        ({"threshold": jnp.array([0.5, 2.0])}, r"threshold=\[0.5, 2.0\] must lie in \[0, 1\]"),
        ({"threshold": jnp.ones(3)}, r"threshold has shape \(3,\); .* of shape \(2,\)"),
        ({"stride": 6, "block_size": 8}, "stride=6 must divide block_size=8"),
        ({"stride": 0}, "stride=0 must be at least 1"),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
        ({"block_size": 16, "max_blocks": 1}, "max_blocks=1 must be at least 2"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_parameters_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        XAttention(**settings).select(*draw())


@pytest.mark.parametrize(
    ("q", "k", "message"),
    [
        (jnp.ones((1, 40, 2, 8)), jnp.ones((1, 32, 2, 8)), "q_len=40 must not exceed kv_len=32"),
        (jnp.ones((1, 32, 3, 8)), jnp.ones((1, 32, 2, 8)), "num_heads=3 must be a multiple of"),
        (
            jnp.ones((1, 32, 2, 8)),
            jnp.ones((1, 32, 2, 8), jnp.bfloat16),
            "q.dtype=float32 and k.dtype=bfloat16 must agree",
        ),
    ],
    ids=["T>S", "heads", "dtypes"],
)
def test_bad_operands_are_refused(q: jax.Array, k: jax.Array, message: str):
    with pytest.raises(ValueError, match=message):
        XAttention().select(q, k)


@pytest.mark.parametrize(
    ("settings", "is_causal", "least"),
    [
        ({}, True, 3),
        ({"keep_recent": True}, False, 2),
        ({"keep_sink": True, "keep_recent": True}, False, 3),
    ],
    ids=["causal", "recent", "sink-and-recent"],
)
def test_a_capacity_must_hold_two_diagonals(settings: dict, is_causal: bool, least: int):
    q, k = draw(T=20, S=61)
    strategy = XAttention(stride=4, block_size=8, max_blocks=least - 1, **settings)
    with pytest.raises(ValueError, match=f"max_blocks={least - 1} must be at least {least}"):
        strategy.select(q, k, is_causal=is_causal)


def packed(*lengths: int) -> np.ndarray:
    """[1, S] ids of sequences packed one after another."""
    return np.repeat(np.arange(len(lengths))[None], lengths, axis=1)


SEGMENTS = {
    "at-blocks": packed(16, 24, 8),
    "anywhere": packed(13, 20, 15),
    "several-in-a-block": packed(18, 1, 2, 1, 9, 17),
    "one": packed(48),
}


def select_packed(strategy, q, k, segments, lengths=None):
    return select_packed_in_jit(strategy, q, k, jnp.array(segments, jnp.int32), lengths)


@jax.jit
def select_packed_in_jit(strategy, q, k, segment_ids, lengths):
    return strategy.select(q, k, segment_ids=segment_ids, kv_lengths=lengths)


def blocks_of(pairs: np.ndarray) -> np.ndarray:
    """[B, 1, Tb, Sb]: the blocks of 8 that hold a visible pair."""
    padding = [(0, -length % 8) for length in pairs.shape[1:]]
    pairs = np.pad(pairs, [(0, 0), *padding])
    rows, columns = (length // 8 for length in pairs.shape[1:])
    return pairs.reshape(-1, 1, rows, 8, columns, 8).any(axis=(3, 5))


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("T", [48, 29], ids=["T=S", "T<S"])
def test_packed_rows_see_their_own_segments(segments: np.ndarray, T: int):
    q, k = draw(T=T)
    pairs = attention.visible_pairs(1, T, 48, is_causal=True, segment_ids=segments)
    visible = blocks_of(pairs)
    for threshold in (1.0, 0.6, 0.0):
        strategy = XAttention(threshold=jnp.float32(threshold), stride=4, block_size=8)
        pattern = select_packed(strategy, q, k, segments)
        kept = selection.listed_blocks(pattern.blocks)
        _, diagonal = selection.visible_and_forced(1, T, 48, 8, is_causal=True)
        diagonal[..., 0] = False
        forced = visible & (diagonal | (np.cumsum(visible, axis=-1) == 1))
        scores = scoring.antidiagonal_scores(
            q, k, stride=4, block_size=8, is_causal=True, segment_ids=segments
        )
        assert selection.rows_at_fault(kept, scores, np.full(2, threshold), forced, visible) == []


def test_a_packed_row_equals_each_sequence_alone():
    q, k = draw(N=4, K=2)
    strategy = XAttention(threshold=jnp.float32(0.8), stride=4, block_size=8)
    kept = selection.listed_blocks(select_packed(strategy, q, k, SEGMENTS["at-blocks"]).blocks)
    for first, stop in ((0, 16), (16, 40), (40, 48)):
        alone = selection.listed_blocks(select(strategy, q[:, first:stop], k[:, first:stop]).blocks)
        part = (
            slice(None),
            slice(None),
            slice(first // 8, stop // 8),
            slice(first // 8, stop // 8),
        )
        np.testing.assert_array_equal(kept[part], alone)
        kept[part] = False
    assert not kept.any()


def test_packed_rows_of_a_padded_batch_equal_shorter_ones():
    q, k = draw()
    strategy = XAttention(threshold=jnp.float32(0.8), stride=4, block_size=8)
    segments = SEGMENTS["anywhere"]
    lengths = jnp.array([37], jnp.int32)
    padded = selection.listed_blocks(select_packed(strategy, q, k, segments, lengths).blocks)
    alone = select_packed(strategy, q[:, :37], k[:, :37], segments[:, :37])
    np.testing.assert_array_equal(padded[:, :, :5, :5], selection.listed_blocks(alone.blocks))
    assert not padded[:, :, 5:].any() and not padded[..., 5:].any()


def test_attention_to_packed_rows_at_threshold_1_is_full():
    q, k = draw(N=4, K=2)
    segment_ids = jnp.array(SEGMENTS["several-in-a-block"], jnp.int32)
    options = {"segment_ids": segment_ids}
    sparse = XAttention(threshold=1.0, stride=4, block_size=8)
    expected = prefill_attention(q, k, k, Full(block_size=8), **options)
    np.testing.assert_allclose(prefill_attention(q, k, k, sparse, **options), expected, atol=1e-5)


def test_packed_sequences_without_causality_are_refused():
    q, k = draw()
    with pytest.raises(UnsupportedError, match="takes segment_ids only if is_causal"):
        XAttention().select(q, k, is_causal=False, segment_ids=jnp.zeros((1, 48), jnp.int32))


@pytest.mark.parametrize("lengths", [None, [61, 20]], ids=["all", "lengths"])
@pytest.mark.parametrize("keep", ["sink", "recent", "both"])
def test_rows_that_are_not_causal_keep_what_they_are_told_to(keep: str, lengths: list[int] | None):
    q, k = draw(B=2, T=21, S=61)
    settings = {"keep_sink": keep != "recent", "keep_recent": keep != "sink"}
    strategy = XAttention(threshold=jnp.float32(0.3), stride=4, block_size=8, **settings)
    pattern = select(strategy, q, k, is_causal=False, kv_lengths=lengths)
    call = {"is_causal": False, "kv_lengths": lengths}
    visible, _ = selection.visible_and_forced(2, 21, 61, 8, **call)
    forced = np.zeros_like(visible)
    for i in range(21):
        forced[:, :, i // 8, (i + 40) // 8] |= settings["keep_recent"]
    forced[..., 0] |= settings["keep_sink"]
    scores = scoring.antidiagonal_scores(q, k, stride=4, block_size=8, **call)
    kept = selection.listed_blocks(pattern.blocks)
    assert selection.rows_at_fault(kept, scores, np.full(2, 0.3), forced & visible, visible) == []


def test_causal_rows_keep_sink_and_diagonal_in_any_case():
    q, k = draw()
    patterns = [
        select(XAttention(threshold=0.4, stride=4, block_size=8, **settings), q, k)
        for settings in ({}, {"keep_sink": True, "keep_recent": True})
    ]
    jax.tree.map(np.testing.assert_array_equal, *patterns)


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(UnsupportedError, match="backend='cudnn'"):
        XAttention().select(*draw(), backend="cudnn")
