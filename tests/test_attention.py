"""The public attention functions: what they compute together, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax import (
    BlockMask,
    UnsupportedError,
    XAttention,
    block_sparse_attention,
    prefill_attention,
    sparse_attention,
    xattention_prefill,
)
from tests.oracles import attention as oracle


def draw(B: int = 1, T: int = 40, S: int = 40, N: int = 4, K: int = 2, H: int = 8):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(B, T, N, H), (B, S, K, H), (B, S, K, H)]
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def mask_for(q: jax.Array, k: jax.Array, *, is_causal: bool = True, **sizes: int) -> BlockMask:
    sizes = {"q_len": q.shape[1], "kv_len": k.shape[1], "block_q": 8, "block_kv": 8} | sizes
    num_blocks = (-(-sizes["q_len"] // sizes["block_q"]), -(-sizes["kv_len"] // sizes["block_kv"]))
    keep = jnp.ones((q.shape[0], 1, *num_blocks), bool)
    return BlockMask.from_dense(keep, is_causal=is_causal, **sizes)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("T", [40, 21], ids=["T=S", "T<S"])
def test_threshold_one_equals_dense_attention(T: int, is_causal: bool):
    q, k, v = draw(B=2, T=T, N=6)
    out, lse = jax.jit(
        lambda q, k, v: xattention_prefill(
            q, k, v, threshold=1.0, stride=4, block_size=8, is_causal=is_causal, return_lse=True
        )
    )(q, k, v)
    visible = oracle.visible_pairs(2, T, 40, is_causal=is_causal)
    keep = np.broadcast_to(visible[:, None], (2, 6, T, 40))
    expected_out, expected_lse = oracle.attention(q, k, v, keep)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_prefill_is_selection_then_attention():
    q, k, v = draw()
    strategy = XAttention(threshold=0.6, stride=4, block_size=8)
    pattern = strategy.select(q, k)
    assert 0 < float(pattern.blocks.density().mean()) < 1
    one_call = xattention_prefill(q, k, v, threshold=0.6, stride=4, block_size=8)
    np.testing.assert_array_equal(one_call, sparse_attention(q, k, v, pattern))
    np.testing.assert_array_equal(one_call, block_sparse_attention(q, k, v, pattern.blocks))
    np.testing.assert_array_equal(one_call, prefill_attention(q, k, v, strategy))


def test_a_padded_batch_equals_each_sequence_alone():
    q, k, v = draw(B=2)
    lengths = [23, 40]
    options = {"threshold": 0.7, "stride": 4, "block_size": 8}
    out = xattention_prefill(q, k, v, kv_lengths=jnp.array(lengths, jnp.int32), **options)
    for b, length in enumerate(lengths):
        alone = xattention_prefill(*(x[b : b + 1, :length] for x in (q, k, v)), **options)
        np.testing.assert_allclose(out[b : b + 1, :length], alone, atol=1e-6)
        assert not np.any(out[b, length:])


def test_gradients_flow_through_the_attention_and_not_the_selection():
    q, k, v = draw()
    pattern = XAttention(threshold=0.6, stride=4, block_size=8).select(q, k)

    def through_prefill(q, k, v):
        out = xattention_prefill(q, k, v, threshold=0.6, stride=4, block_size=8)
        return jnp.sum(jnp.square(out))

    def through_mask(q, k, v):
        return jnp.sum(jnp.square(block_sparse_attention(q, k, v, pattern.blocks)))

    for ours, fixed in zip(
        jax.grad(through_prefill, (0, 1, 2))(q, k, v),
        jax.grad(through_mask, (0, 1, 2))(q, k, v),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, fixed)


def test_it_runs_under_jit_and_vmap():
    q, k, v = draw(B=3)
    options = {"threshold": 0.7, "stride": 4, "block_size": 8}
    batched = xattention_prefill(q, k, v, **options)
    mapped = jax.jit(
        jax.vmap(
            lambda q, k, v: xattention_prefill(q[None], k[None], v[None], **options)[0],
        )
    )(q, k, v)
    np.testing.assert_allclose(mapped, batched, atol=1e-6)


def test_the_threshold_may_be_traced():
    q, k, v = draw()

    @jax.jit
    def call(threshold):
        return xattention_prefill(q, k, v, threshold=threshold, stride=4, block_size=8)

    np.testing.assert_array_equal(call(1.0), call(jnp.ones(4)))


def test_a_mask_of_one_head_serves_all():
    q, k, v = draw()
    shared = mask_for(q, k)
    keep = jnp.broadcast_to(shared.to_dense(), (1, 4, 5, 5))
    each = BlockMask.from_dense(keep, q_len=40, kv_len=40, block_q=8, block_kv=8)
    np.testing.assert_array_equal(
        block_sparse_attention(q, k, v, shared), block_sparse_attention(q, k, v, each)
    )


def test_scale_replaces_the_default():
    q, k, v = draw()
    halved = block_sparse_attention(q, k, v, mask_for(q, k), scale=0.5 * 8**-0.5)
    np.testing.assert_allclose(
        halved, block_sparse_attention(0.5 * q, k, v, mask_for(q, k)), atol=1e-6
    )


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_a_scale_that_is_not_positive_is_refused(scale: float):
    q, k, v = draw()
    with pytest.raises(ValueError, match=f"scale={scale} must be positive"):
        block_sparse_attention(q, k, v, mask_for(q, k), scale=scale)


def test_a_named_backend_that_cannot_run_says_why():
    q, k, v = draw()
    with pytest.raises(UnsupportedError, match=r"mosaic_sm90: needs compute capability 9"):
        block_sparse_attention(q, k, v, mask_for(q, k), backend="mosaic_sm90")
    with pytest.raises(UnsupportedError, match="this op has mosaic_sm90, xla"):
        xattention_prefill(q, k, v, backend="cudnn")


Q, KV, V = draw(T=8, S=8)
INT_LENGTHS = jnp.array([4], jnp.int32)


@pytest.mark.parametrize(
    ("sentence", "change"),
    [
        (r"q\.shape=\(8, 4, 8\) must be \[batch", {"q": Q[0]}),
        (r"q\.dtype=int32 must be one of", {"q": Q.astype(jnp.int32)}),
        ("q.dtype=bfloat16 and k.dtype=float32 must agree", {"q": Q.astype(jnp.bfloat16)}),
        (r"batch sizes of q \(2\) and k \(1\)", {"q": jnp.tile(Q, (2, 1, 1, 1))}),
        (r"head_dim of q \(4\) and k \(8\)", {"q": Q[..., :4]}),
        ("must have no axis of size 0", {"q": Q[:, :0]}),
        ("num_heads=3 must be a multiple of num_kv_heads=2", {"q": Q[:, :, :3]}),
        (r"v\.shape=\(1, 7, 2, 8\) must equal k\.shape", {"v": V[:, :7]}),
        ("v.dtype=float16 and k.dtype=float32", {"v": V.astype(jnp.float16)}),
        ("q_len=8 must not exceed kv_len=7 when is_causal", {"k": KV[:, :7], "v": V[:, :7]}),
        ("pass int32 of shape", {"kv_lengths": jnp.array([4.0])}),
        (r"kv_lengths=\[9\] must lie in \[0, kv_len=8\]", {"kv_lengths": INT_LENGTHS + 5}),
        ("segment_ids has shape", {"segment_ids": INT_LENGTHS}),
        ("threshold=1.5 must", {"threshold": 1.5}),
        ("threshold", {"threshold": jnp.ones(3)}),
        ("stride=5 .*block_size=8", {"stride": 5}),
    ],
    ids=lambda value: value.split("=")[0] if isinstance(value, str) else "",
)
def test_bad_input_gets_a_sentence(sentence: str, change: dict):
    arguments = {"q": Q, "k": KV, "v": V, "stride": 4, "block_size": 8} | change
    with pytest.raises(ValueError, match=sentence):
        xattention_prefill(**arguments)


def test_a_mask_made_for_other_operands_is_refused():
    q, k, v = draw(B=2)
    with pytest.raises(ValueError, match="block_mask is for q_len=24, kv_len=40"):
        block_sparse_attention(q, k, v, mask_for(q, k, q_len=24))
    with pytest.raises(ValueError, match="block_mask is for batch=1, heads=1, but q has batch=2"):
        block_sparse_attention(q, k, v, mask_for(q[:1], k))
    with pytest.raises(ValueError, match="q_len=40 must not exceed kv_len=16"):
        block_sparse_attention(q, k[:, :16], v[:, :16], mask_for(q, k[:, :16]))


def test_packed_sequences_attend_within_themselves():
    q, k, v = draw()
    segment_ids = jnp.array([[0] * 17 + [1] * 23], jnp.int32)
    packed = block_sparse_attention(q, k, v, mask_for(q, k), segment_ids=segment_ids)
    for part in (slice(0, 17), slice(17, 40)):
        alone = [x[:, part] for x in (q, k, v)]
        np.testing.assert_allclose(
            packed[:, part],
            block_sparse_attention(*alone, mask_for(alone[0], alone[1])),
            atol=1e-6,
        )
