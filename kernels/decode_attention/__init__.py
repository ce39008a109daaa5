"""Attention of the last few query tokens over a long cache.

Query t of sequence b stands at position p = L - T + t, where L = kv_lengths[b] counts the tokens
so far, these queries' own included. The token in slot j of the cache stands at position
P = kv_positions[b, j], by default j; a negative P marks an empty slot. Slot j is visible to query t
of kv head h iff

    0 <= P <= p,    and, where there are lists, its block j // block_kv is on the list of (b, h).

out = softmax(scale * q k^T, over the visible slots) v. A query that sees nothing, as one with
p < 0 does, has output 0 and log-sum-exp -inf.

Sequence b reads row kv_rows[b] of the cache, by default row b: so a cache may hold rows of other
layers and heads, and none is copied out.

That is all that the three kinds of cache need. A dense cache has neither lists nor positions. A
sparse decode has lists. A streaming cache, sinks and a ring of recent tokens in any order, has
positions: keys are rotated before they are cached, so where a token lies makes no difference. For
the newest token alone it needs none, since that one sees every slot that is filled.

Source: Flash-Decoding (Dao et al., 2023): the keys are split among the multiprocessors, and the
partial outputs are merged by their log-sum-exps.
"""

from collections.abc import Mapping

from jaxtyping import Array, Float, Float32, Int32

from sparseattn_jax.kernels.backends import (
    Backend,
    Implementation,
    choose,
    device_facts,
    never_refuses,
)
from sparseattn_jax.kernels.decode_attention import mosaic_sm90, xla
from sparseattn_jax.kernels.decode_attention.tiling import CallFacts

_TABLE: Mapping[Backend, Implementation[CallFacts]] = {
    "mosaic_sm90": Implementation(mosaic_sm90.run, mosaic_sm90.refusal),
    "xla": Implementation(xla.run, never_refuses),
}


def decode_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "R S K H"],
    v: Float[Array, "R S K H"],
    *,
    kv_lengths: Int32[Array, " B"],
    kv_rows: Int32[Array, " B"] | None = None,
    kv_positions: Int32[Array, "B S"] | None = None,
    kv_indices: Int32[Array, "B #K M"] | None = None,
    kv_num_blocks: Int32[Array, "B #K"] | None = None,
    block_kv: int | None = None,
    scale: float | None = None,
    backend: Backend | None = None,
) -> tuple[Float[Array, "B T N H"], Float32[Array, "B T N"]]:
    """Attends from T query tokens to a cache of capacity S; has no gradient.

    Args:
        q: queries; head n reads kv head n // (N // K).
        k: keys of the cache. Slots that no query sees may hold any finite value.
        v: values of the cache, likewise.
        kv_lengths: tokens of each sequence so far. May exceed S only with kv_positions.
        kv_rows: which row of the cache each sequence reads, in [0, R); of one that sees nothing it
            is not read. By default row b, and R = B.
        kv_positions: where the token of each slot stands, negative where the slot is empty; in any
            order. By default slot j holds token j.
        kv_indices: the lists of `kernels/block_lists.py`, per kv head, of cache blocks. By default
            every block is visible.
        kv_num_blocks: how many entries of each list count; given exactly with kv_indices.
        block_kv: slots per block; given exactly with kv_indices.
        scale: factor of the logits, by default H ** -0.5.
        backend: which implementation runs, by default the best that can.

    Returns:
        The output in q's dtype, and the natural log-sum-exp of the scaled logits.

    Raises:
        ValueError: one of kv_indices, kv_num_blocks and block_kv is given without the others; or
            the cache has not a row per sequence, and kv_rows are not given.
        UnsupportedError: the named backend cannot run this call.
    """
    given = {"kv_indices": kv_indices, "kv_num_blocks": kv_num_blocks, "block_kv": block_kv}
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise ValueError(
            f"{' and '.join(missing)} missing: pass all of {', '.join(given)} for lists of blocks, "
            "or none of them"
        )
    if kv_rows is None and k.shape[0] != q.shape[0]:
        raise ValueError(
            f"k.shape={k.shape} has {k.shape[0]} rows for {q.shape[0]} sequences; pass kv_rows, "
            "which one each sequence reads"
        )
    facts = CallFacts(
        device=device_facts(q, k, v),
        dtype=q.dtype,
        head_dim=q.shape[3],
        q_len=q.shape[1],
        group=q.shape[2] // k.shape[2],
        capacity=k.shape[1],
        block_kv=block_kv,
    )
    return choose(_TABLE, backend, facts).run(
        q,
        k,
        v,
        kv_lengths,
        kv_positions,
        kv_indices,
        kv_num_blocks,
        kv_rows=kv_rows,
        block_kv=block_kv,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
    )
