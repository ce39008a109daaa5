"""How good a selection is: what it keeps, what it costs, and the selections to compare it with.

A strategy stands between `select_random` and `select_oracle` at its own budget: its recall is
above the one and cannot be above the other.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int32, PRNGKeyArray

from sparseattn_jax.attention import block_sparse_attention, sparse_attention
from sparseattn_jax.block_mask import BlockMask
from sparseattn_jax.checks import (
    check_block_mask,
    check_kv_lengths,
    check_qk,
    check_segment_ids,
    checked,
)
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.kernels.pooled_scores import block_sums
from sparseattn_jax.kernels.products import matmul
from sparseattn_jax.pattern import SparsePattern
from sparseattn_jax.selection import diagonal_blocks, visible_and_forced
from sparseattn_jax.strategies.full import Full

type Selection = BlockMask | SparsePattern


def _check_selection(q: jax.Array, k: jax.Array, selection: Selection) -> None:
    check_block_mask(q, k, _blocks_of(selection))


def _check_lengths(selection: Selection, kv_lengths: jax.Array | None) -> None:
    wanted = _blocks_of(selection).kv_num_blocks.shape[:1]
    if kv_lengths is not None and kv_lengths.shape != wanted:
        raise ValueError(
            f"kv_lengths has shape {kv_lengths.shape}; pass one length per sequence, of shape "
            f"{wanted}"
        )


def _check_random_budget(budget: Selection, kv_lengths: jax.Array | None) -> None:
    _check_lengths(budget, kv_lengths)


def _check_budget(q: jax.Array, k: jax.Array, budget: Selection) -> None:
    check_block_mask(q, k, _blocks_of(budget))


@checked(check_qk, check_kv_lengths, check_segment_ids, _check_selection)
def attention_recall(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    selection: Selection,
    *,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, "B N"]:
    """Share of the softmax mass that a selection keeps, per head: the mean over its queries.

    A query's share is exp(lse of its listed keys - lse of its visible keys), both by sparse
    attention, so nothing of size T x S exists. Queries that see no key do not count; a head
    without others has recall 1.

    Args:
        q: queries, at the end of the keys if the selection is causal.
        k: keys.
        selection: the block mask, or the pattern, to judge.
        kv_lengths: valid keys of each sequence; the rest is padding.
        segment_ids: a query sees keys of its own segment only.
        backend: of the attention.

    Raises:
        ValueError: an argument does not fit the others, or the selection is of other lengths.
        UnsupportedError: the named backend cannot run this call.
    """
    blocks = _blocks_of(selection)
    everything = Full(block_size=blocks.block_kv).select(
        q, k, is_causal=blocks.is_causal, kv_lengths=kv_lengths
    )

    def lse_of(selection: Selection) -> Float32[Array, "B T N"]:
        operands = q, k, k  # the values do not matter
        options = {"kv_lengths": kv_lengths, "segment_ids": segment_ids, "backend": backend}
        if isinstance(selection, BlockMask):
            return block_sparse_attention(*operands, selection, return_lse=True, **options)[1]
        return sparse_attention(*operands, selection, return_lse=True, **options)[1]

    total = lse_of(everything)
    counts = jnp.isfinite(total)
    shares = jnp.exp(lse_of(selection) - jnp.where(counts, total, 0.0))
    num_queries = jnp.sum(counts, axis=1, dtype=jnp.float32)
    kept = jnp.sum(jnp.where(counts, shares, 0.0), axis=1)
    return jnp.where(num_queries == 0.0, 1.0, kept / jnp.maximum(num_queries, 1.0))


@checked(_check_lengths)
def density(
    selection: Selection, *, kv_lengths: Int32[Array, " B"] | None = None
) -> Float32[Array, "B #N"]:
    """What a selection costs: its blocks over the visible ones, per head; 0 if none is visible.

    A single column of a pattern is a part of a block, 1 / block_kv, for each query block that sees
    it outside of the listed blocks. Blocks that the lengths hide are not counted, on either side;
    those that a pattern's windows cut count whole.

    Args:
        selection: the block mask, or the pattern, to judge.
        kv_lengths: valid keys of each sequence, by default all.

    Raises:
        ValueError: there is not one length for each sequence.
    """
    visible = jnp.sum(_blocks_of(selection).num_visible(kv_lengths), axis=-1)
    visible = jnp.maximum(visible, 1).astype(jnp.float32)
    return _costs(selection, kv_lengths).sum(axis=-1) / visible[:, None]


def _check_outputs(out: jax.Array, reference: jax.Array) -> None:
    if out.shape != reference.shape or out.ndim != 4:
        raise ValueError(
            f"out.shape={out.shape} and reference.shape={reference.shape} must be one shape "
            "[batch, length, heads, head_dim]"
        )


@checked(_check_outputs)
def output_error(
    out: Float[Array, "B T N H"], reference: Float[Array, "B T N H"]
) -> Float32[Array, "B N"]:
    """Relative error |out - reference| / |reference| of each head, in the Euclidean norm.

    Args:
        out: the output to judge.
        reference: what it should be, as dense attention gives it.

    Raises:
        ValueError: the shapes differ.
    """
    out, reference = out.astype(jnp.float32), reference.astype(jnp.float32)
    error = jnp.sqrt(jnp.sum(jnp.square(out - reference), axis=(1, 3)))
    size = jnp.sqrt(jnp.sum(jnp.square(reference), axis=(1, 3)))
    return error / jnp.maximum(size, jnp.finfo(jnp.float32).tiny)


@checked(check_qk, check_kv_lengths, check_segment_ids, _check_budget)
def select_oracle(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    budget: Selection,
    *,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
) -> BlockMask:
    """The key blocks of highest true softmax mass, in each row as many as a selection has.

    No other lists with so many blocks in each row have a higher recall; single columns may. Costs
    more than dense attention, a query block and a kv head at a time: the largest array beside the
    result is [B, N / K, block_q, S].

    Args:
        q: queries, at the end of the keys if the budget is causal.
        k: keys.
        budget: the selection to compare with; its columns count as in `density`, in whole blocks.
        kv_lengths: valid keys of each sequence; the rest is padding.
        segment_ids: a query sees keys of its own segment only.

    Raises:
        ValueError: an argument does not fit the others, or the budget is of other lengths.
    """
    blocks = _blocks_of(budget)
    mass = block_mass(q, k, blocks, kv_lengths, segment_ids)
    return _highest(mass, budget, kv_lengths)


@checked(_check_random_budget)
def select_random(
    key: PRNGKeyArray, budget: Selection, *, kv_lengths: Int32[Array, " B"] | None = None
) -> BlockMask:
    """Visible key blocks drawn evenly, in each row as many as a selection has.

    Causal rows get the first block and their diagonal before others, as every strategy lists them.

    Args:
        key: of the draw; equal keys give equal lists.
        budget: the selection to compare with; its columns count as in `density`, in whole blocks.
        kv_lengths: valid keys of each sequence, by default all.

    Raises:
        ValueError: there is not one length for each sequence.
    """
    blocks = _blocks_of(budget)
    shape = (*_costs(budget, kv_lengths).shape, blocks.num_kv_blocks)
    scores = jax.random.uniform(key, shape)
    if blocks.is_causal:
        diagonals = diagonal_blocks(blocks.q_len, blocks.kv_len, blocks.block_q, blocks.block_kv)
        num_visible = blocks.num_visible(kv_lengths)
        _, forced = visible_and_forced(num_visible, jnp.asarray(diagonals), shape[-1])
        scores = jnp.where(forced[:, None], 2.0, scores)
    return _highest(scores, budget, kv_lengths)


def _blocks_of(selection: Selection) -> BlockMask:
    return selection if isinstance(selection, BlockMask) else selection.blocks


def _costs(
    selection: Selection, kv_lengths: Int32[Array, " B"] | None
) -> Float32[Array, "B #N Tb"]:
    """The blocks that each row lists, its other columns as parts of one."""
    blocks = _blocks_of(selection)
    num_visible = blocks.num_visible(kv_lengths)[:, None, :, None]
    listed = block_lists.columns_of(blocks.kv_indices) < blocks.kv_num_blocks[..., None]
    costs = jnp.sum(listed & (blocks.kv_indices < num_visible), axis=-1, dtype=jnp.float32)
    if isinstance(selection, BlockMask) or selection.columns is None:
        return costs
    columns = selection.columns
    holders = (columns.indices // blocks.block_kv)[:, :, None, :]
    is_listed = jnp.take_along_axis(blocks.to_dense(), holders, axis=-1)
    counts = block_lists.columns_of(holders) < columns.counts[:, :, None, None]
    extra = jnp.sum(counts & ~is_listed & (holders < num_visible), axis=-1, dtype=jnp.float32)
    return costs + extra / blocks.block_kv


def _highest(
    scores: Float32[Array, "B #N Tb Sb"], budget: Selection, kv_lengths: Int32[Array, " B"] | None
) -> BlockMask:
    """Of each row's visible blocks those of highest score, as many as the budget has."""
    blocks = _blocks_of(budget)
    width = jnp.ceil(_costs(budget, kv_lengths)).astype(jnp.int32)
    visible = block_lists.columns_of(scores) < blocks.num_visible(kv_lengths)[:, None, :, None]
    keep = block_lists.keep_highest(scores, visible, jnp.broadcast_to(width, scores.shape[:-1]))
    indices, counts = block_lists.from_dense(keep)
    return dataclasses.replace(blocks, kv_indices=indices, kv_num_blocks=counts)


def block_mass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    blocks: BlockMask,
    kv_lengths: Int32[Array, " B"] | None,
    segment_ids: Int32[Array, "B S"] | None,
) -> Float32[Array, "B N Tb Sb"]:
    """The softmax mass of each block, summed over the queries of the row."""
    (batch, q_len, num_heads, head_dim), (kv_len, num_kv_heads) = q.shape, k.shape[1:3]
    if kv_lengths is None:
        kv_lengths = jnp.full(batch, kv_len, jnp.int32)
    block_q, lengths = blocks.block_q, kv_lengths[:, None, None]
    q = jnp.pad(q, ((0, 0), (0, -q_len % block_q), (0, 0), (0, 0)))
    q = q.reshape(batch, -1, block_q, num_kv_heads, num_heads // num_kv_heads, head_dim)
    keys = jnp.arange(kv_len)[None, None, :]

    def of_row(head: Int32[Array, ""], row: Int32[Array, ""]) -> Float32[Array, "B G Sb"]:
        index = row * block_q + jnp.arange(block_q)
        positions = (index + kv_len - q_len)[None, :, None]
        visible = (keys < lengths) & (index < q_len)[None, :, None]
        if blocks.is_causal:
            visible = visible & (keys <= positions) & (positions < lengths)
        if segment_ids is not None:
            of_queries = jnp.take(segment_ids, positions[0, :, 0], axis=1, mode="clip")
            visible = visible & (of_queries[:, :, None] == segment_ids[:, None])
        logits = matmul("btgh,bsh->bgts", q[:, row, :, head], k[:, :, head])
        weights = jax.nn.softmax(logits * head_dim**-0.5, where=visible[:, None])
        return block_sums(weights.sum(axis=2), block_size=blocks.block_kv)

    def of_head(head: Int32[Array, ""]) -> Float32[Array, "Tb B G Sb"]:
        return lax.map(lambda row: of_row(head, row), jnp.arange(q.shape[1]))

    mass = lax.map(of_head, jnp.arange(num_kv_heads))
    return mass.transpose(2, 0, 3, 1, 4).reshape(batch, num_heads, *mass.shape[1:2], -1)
