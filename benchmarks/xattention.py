"""Suites xattention_select and xattention_prefill, on structured queries and keys.

Selection is timed alone, and with the attention over what it selected; dense attention is the
peer of the whole call. Independent normal q and k have no sparsity to find, so the operands come
from sparseattn_jax.synthetic.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from benchmarks import gate
from benchmarks.measure import Options, dense_peers, measured, on_rows
from benchmarks.records import Record
from benchmarks.shapes import Shape, format_length
from sparseattn_jax import BlockMask, XAttention, sparse_attention
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.synthetic import structured_qkv

STRIDES = (8, 16)
THRESHOLD = 0.9
_SELECTION_EPSILON = 1e-3  # of the mass, for bf16 operands
_SAMPLED_BLOCKS = 4  # query blocks whose selection is judged


def run_select(options: Options, length: int) -> Iterator[Record | str]:
    """Selection alone: scores and lists."""
    q, k, _ = structured_operands(options.shape, length, seed=options.seed)
    select = jax.jit(functools.partial(_select, backend=options.backend))
    for strategy in _strategies(options.shape):
        judge = functools.partial(judge_selection, q=q, k=k, strategy=strategy)
        yield options.record(
            op="xattention_select",
            case=_case(length, strategy),
            inputs=_inputs(options.shape),
            density=float(select(strategy, q, k).density().mean()),
            ours=measured(select, (strategy, q, k), judge, options),
            peer=None,
            theirs=None,
        )


def run_prefill(options: Options, length: int) -> Iterator[Record | str]:
    """Selection and attention in one call, beside dense attention."""
    shape = options.shape
    q, k, v = structured_operands(shape, length, seed=options.seed)
    rows = gate.sample_rows(length, shape.block_size, seed=options.seed)
    judge_rows = functools.partial(
        gate.judge, q=q, k=k, v=v, rows=rows, block_size=shape.block_size
    )
    every_block = np.ones((1, len(rows), length // shape.block_size), bool)
    dense_judge = on_rows(functools.partial(judge_rows, keep=every_block), rows)
    dense = {
        peer: measured(attend, (q, k, v), dense_judge, options)
        for peer, attend in dense_peers(options).items()
    }
    prefill = jax.jit(functools.partial(_prefill, backend=options.backend))
    for strategy in _strategies(shape):
        judge = functools.partial(
            _judge_prefill, q=q, k=k, rows=rows, judge_rows=judge_rows, strategy=strategy
        )
        ours = measured(prefill, (strategy, q, k, v), judge, options)
        for peer, theirs in dense.items():
            yield options.record(
                op="xattention_prefill",
                case=_case(length, strategy),
                inputs=_inputs(shape),
                density=float(prefill(strategy, q, k, v)[1].density().mean()),
                ours=ours,
                peer=peer,
                theirs=theirs,
            )


def structured_operands(shape: Shape, length: int, *, seed: int) -> tuple[Array, Array, Array]:
    """q, k and v of the structured generator with its own defaults."""
    draw = functools.partial(
        structured_qkv,
        q_len=length,
        num_heads=shape.num_heads,
        num_kv_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        dtype=jnp.dtype(shape.dtype),
    )
    return jax.jit(draw)(jax.random.key(seed))


def judge_selection(blocks: BlockMask, *, q: Array, k: Array, strategy: XAttention) -> gate.Verdict:
    """Judges sampled rows of a selection by float32 scores of their own.

    A row is right if it lists its forced blocks and nothing invisible, its mass reaches the
    threshold, and without its lightest unforced block it would not; each up to an epsilon.
    """
    size, num_blocks = strategy.block_size, blocks.num_q_blocks
    listed = np.asarray(blocks.to_dense()[0])
    worst = 0.0
    score = jax.jit(
        functools.partial(
            antidiagonal_scores,
            stride=strategy.stride,
            block_size=size,
            is_causal=True,
            backend="xla",
        )
    )
    for row in np.unique(np.linspace(0, num_blocks - 1, _SAMPLED_BLOCKS, dtype=int)):
        scores = score(
            q[:, row * size : (row + 1) * size].astype(jnp.float32),
            k[:, : (row + 1) * size].astype(jnp.float32),
        )
        keep = listed[:, row]
        if keep[:, row + 1 :].any() or not keep[:, [0, row]].all():
            return gate.Verdict(max_error=float("inf"), max_error_allowed=_SELECTION_EPSILON)
        worst = max(worst, _worst_share(np.asarray(scores[0, :, 0]), keep[:, : row + 1]))
    return gate.Verdict(max_error=worst, max_error_allowed=_SELECTION_EPSILON)


def _worst_share(scores: np.ndarray, keep: np.ndarray) -> float:
    """How far any head's set is on the wrong side of the threshold; forced are first and last."""
    shares = scores.astype(np.float64) / scores.sum(axis=-1, keepdims=True, dtype=np.float64)
    mass = np.where(keep, shares, 0.0).sum(axis=-1)
    unforced = keep.copy()
    unforced[:, [0, -1]] = False
    lightest = np.where(unforced, shares, np.inf).min(axis=-1)
    missing = np.where(keep.all(axis=-1), 0.0, THRESHOLD - mass)
    superfluous = np.where(unforced.any(axis=-1), mass - lightest - THRESHOLD, 0.0)
    return float(np.maximum(missing, superfluous).max())


def _strategies(shape: Shape) -> list[XAttention]:
    return [
        XAttention(threshold=THRESHOLD, stride=stride, block_size=shape.block_size)
        for stride in STRIDES
    ]


def _select(strategy: XAttention, q: Array, k: Array, *, backend: Backend | None) -> BlockMask:
    return strategy.select(q, k, backend=backend).blocks


def _prefill(
    strategy: XAttention, q: Array, k: Array, v: Array, *, backend: Backend | None
) -> tuple[Array, BlockMask]:
    """The whole call; it also returns the lists, by which its output is judged."""
    pattern = strategy.select(q, k, backend=backend)
    return sparse_attention(q, k, v, pattern, backend=backend), pattern.blocks


def _judge_prefill(
    result: tuple[Array, BlockMask],
    *,
    q: Array,
    k: Array,
    rows: np.ndarray,
    judge_rows: Callable[..., gate.Verdict],
    strategy: XAttention,
) -> gate.Verdict:
    """Judges the selection first, then the output by the blocks that were selected."""
    out, blocks = result
    selection = judge_selection(blocks, q=q, k=k, strategy=strategy)
    if not selection.passed:
        return selection
    keep = np.asarray(blocks.to_dense()[0])[:, rows // strategy.block_size]
    return on_rows(functools.partial(judge_rows, keep=keep), rows)(out)


def _case(length: int, strategy: XAttention) -> str:
    return f"{format_length(length)} stride={strategy.stride} threshold={THRESHOLD}"


def _inputs(shape: Shape) -> str:
    return f"{shape}, causal, structured q/k/v of sparseattn_jax.synthetic"
