"""Suites xattention_select and xattention_prefill, on structured queries and keys.

Selection is timed alone, and with the attention over what it selected; dense attention is the
peer of the whole call. Independent normal q and k have no sparsity to find, so the operands come
from sparseattn_jax.synthetic.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from benchmarks import gate
from benchmarks.measure import (
    Measured,
    Options,
    dense_peers,
    measured,
    measured_with_memory,
    on_rows,
)
from benchmarks.records import Record
from benchmarks.shapes import Shape, format_length
from sparseattn_jax import BlockMask, SparsePattern, XAttention, sparse_attention
from sparseattn_jax.kernels import block_lists
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
    return prefill_figures("xattention_prefill", _strategies(options.shape), options, length)


def prefill_figures(
    op: str, strategies: Sequence[XAttention], options: Options, length: int
) -> Iterator[Record | str]:
    """Time and memory of a prefill call by each strategy, beside those of dense attention.

    Where every dense peer fails, our figure is recorded alone.
    """
    shape = options.shape
    q, k, v = structured_operands(shape, length, seed=options.seed)
    rows = gate.sample_rows(length, shape.block_size, seed=options.seed)
    judge_rows = functools.partial(
        gate.judge, q=q, k=k, v=v, rows=rows, block_size=shape.block_size
    )
    every_block = np.ones((1, len(rows), length // shape.block_size), bool)
    dense_judge = on_rows(functools.partial(judge_rows, keep=every_block), rows)
    dense: dict[str | None, Measured | str | None] = {
        peer: measured_with_memory(attend, (q, k, v), dense_judge, options)
        for peer, attend in dense_peers(options).items()
    }
    if all(isinstance(theirs, str) for theirs in dense.values()):
        dense[None] = None
    prefill = jax.jit(functools.partial(_prefill, backend=options.backend))
    for strategy in strategies:
        case = _case(length, strategy)
        judge = _PrefillJudge(q=q, k=k, rows=rows, judge_rows=judge_rows, strategy=strategy)
        ours = measured_with_memory(prefill, (strategy, q, k, v), judge, options)
        if isinstance(ours, str):
            yield f"{op} {case}: not recorded, we failed: {ours}"
            continue
        if judge.num_dropped:
            yield (
                f"{op} {case}: not recorded, max_blocks={strategy.max_blocks} dropped "
                f"{judge.num_dropped} blocks; raise it"
            )
            continue
        for peer, theirs in dense.items():
            yield options.record(
                op=op,
                case=case,
                inputs=_inputs(shape),
                density=judge.density,
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
    sampled = np.unique(np.linspace(0, num_blocks - 1, _SAMPLED_BLOCKS, dtype=int))
    listed = listed_blocks(blocks, sampled)
    worst = 0.0
    score = gate.jit_reference(
        functools.partial(
            antidiagonal_scores,
            stride=strategy.stride,
            block_size=size,
            is_causal=True,
            backend="xla",
        )
    )
    for row, keep in zip(sampled, listed.swapaxes(0, 1), strict=True):
        scores = score(
            q[:, row * size : (row + 1) * size].astype(jnp.float32),
            k[:, : (row + 1) * size].astype(jnp.float32),
        )
        if keep[:, row + 1 :].any() or not keep[:, [0, row]].all():
            return gate.Verdict(max_error=float("inf"), max_error_allowed=_SELECTION_EPSILON)
        worst = max(worst, _worst_share(np.asarray(scores[0, :, 0]), keep[:, : row + 1]))
    return gate.Verdict(max_error=worst, max_error_allowed=_SELECTION_EPSILON)


def listed_blocks(
    blocks: BlockMask, q_blocks: Int[np.ndarray, " rows"]
) -> Bool[np.ndarray, "N rows Sb"]:
    """The key blocks that some query blocks of the first sequence list, per head."""
    return np.asarray(
        block_lists.to_dense(
            blocks.kv_indices[0][:, q_blocks],
            blocks.kv_num_blocks[0][:, q_blocks],
            blocks.num_kv_blocks,
        )
    )


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
) -> tuple[Array, SparsePattern]:
    """The whole call; it also returns the pattern, by which its output is judged."""
    pattern = strategy.select(q, k, backend=backend)
    return sparse_attention(q, k, v, pattern, backend=backend), pattern


@dataclasses.dataclass(kw_only=True)
class _PrefillJudge:
    """Judges the selection first, then the output by the blocks that were selected.

    Attributes:
        density: of what was judged last, the mean over heads.
        num_dropped: blocks that it lost to a capacity.
    """

    q: Array
    k: Array
    rows: np.ndarray
    judge_rows: Callable[..., gate.Verdict]
    strategy: XAttention
    density: float = 0.0
    num_dropped: int = 0

    def __call__(self, result: tuple[Array, SparsePattern]) -> gate.Verdict:
        out, pattern = result
        self.density = float(pattern.blocks.density().mean())
        self.num_dropped = int(pattern.num_dropped.sum())
        selection = judge_selection(pattern.blocks, q=self.q, k=self.k, strategy=self.strategy)
        if not selection.passed:
            return selection
        keep = listed_blocks(pattern.blocks, self.rows // self.strategy.block_size)
        return on_rows(functools.partial(self.judge_rows, keep=keep), self.rows)(out)


def _case(length: int, strategy: XAttention) -> str:
    case = f"{format_length(length)} stride={strategy.stride} threshold={THRESHOLD}"
    return case if strategy.max_blocks is None else f"{case} max_blocks={strategy.max_blocks}"


def _inputs(shape: Shape) -> str:
    return f"{shape}, causal, structured q/k/v of sparseattn_jax.synthetic"
