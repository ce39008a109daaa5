"""Suite block_sparse_forward: our forward over random block lists, against dense and sparse peers.

Lists are drawn per head: each causally visible block with a given probability, and always the
sink (first) block and the diagonal. Every peer that takes lists gets the very same ones.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from benchmarks import gate
from benchmarks.measure import (
    JudgeRows,
    Measured,
    Options,
    dense_peers,
    measured,
    on_rows,
    torch_peers,
)
from benchmarks.records import Record
from benchmarks.shapes import Shape, format_length
from sparseattn_jax import BlockMask, block_sparse_attention

PROBABILITIES = (0.05, 0.1, 0.25, 0.5, 1.0)


def run(options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    shape = options.shape
    operands = random_operands(shape, length, seed=options.seed)

    def judge(out_rows: np.ndarray, *, rows: np.ndarray, keep: np.ndarray) -> gate.Verdict:
        size = shape.block_size
        keep = keep[:, rows // size]
        return gate.judge(out_rows, *operands, rows=rows, keep=keep, block_size=size)

    work = Work(
        op="block_sparse_forward",
        probabilities=PROBABILITIES,
        operands=operands,
        ours=functools.partial(block_sparse_attention, backend=options.backend),
        dense=dense_peers(options),
        judge=judge,
        inputs=f"{shape}, causal, random normal q/k/v, random blocks + sink + diagonal",
    )
    return figures(work, options, length)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a suite over random block lists times.

    Attributes:
        op: its records' op.
        probabilities: of a visible block to be listed; the last one is 1, so that the judge of
            its results is that of dense attention.
        operands: q, k and v, and for a suite of gradients that of the output.
        ours: takes the operands and a BlockMask.
        dense: by peer; take the operands.
        judge: of the sampled rows of each result.
        inputs: their records' inputs.
    """

    op: str
    probabilities: Sequence[float]
    operands: Sequence[Array]
    ours: Callable[..., Any]
    dense: Mapping[str, Callable[..., Any]]
    judge: Callable[..., gate.Verdict]
    inputs: str


def figures(work: Work, options: Options, length: int) -> Iterator[Record | str]:
    """Records of one length, and sentences about what could not be recorded."""
    shape = options.shape
    size = shape.block_size
    rows = gate.sample_rows(length, size, seed=options.seed)
    draw = functools.partial(
        draw_blocks, shape.num_heads, length, block_q=size, block_kv=size, seed=options.seed
    )
    keeps = {f"p={probability:g}": draw(probability) for probability in work.probabilities}
    judges = {
        case: functools.partial(work.judge, rows=rows, keep=keep) for case, keep in keeps.items()
    }
    list_blocks = jax.jit(functools.partial(_block_mask, shape=shape, length=length))
    compute = jax.jit(work.ours)
    ours, densities = {}, {}
    for case, keep in keeps.items():
        mask = list_blocks(keep[None])
        densities[case] = float(mask.density().mean())
        operands = (*work.operands, mask)
        ours[case] = measured(compute, operands, on_rows(judges[case], rows), options)

    def records_beside(peer: str, theirs: Mapping[str, Measured | str]) -> Iterator[Record | str]:
        for case in keeps:
            yield options.record(
                op=work.op,
                case=f"{format_length(length)} {case}",
                inputs=work.inputs,
                density=densities[case],
                ours=ours[case],
                peer=peer,
                theirs=theirs[case],
            )

    for peer, compute_densely in work.dense.items():
        # p=1 lists every visible block, so its judge is that of dense attention.
        judge = on_rows(judges["p=1"], rows)
        dense = measured(compute_densely, work.operands, judge, options)
        yield from records_beside(peer, dict.fromkeys(keeps, dense))
    for peer, theirs in _torch_figures(options, work.operands, rows, keeps, judges).items():
        yield from records_beside(peer, theirs)


def random_operands(
    shape: Shape, length: int, *, seed: int
) -> tuple[Float[Array, "1 T N H"], Float[Array, "1 T K H"], Float[Array, "1 T K H"]]:
    """Standard normal q, k and v."""

    @jax.jit
    def draw() -> tuple[Array, Array, Array]:
        keys = jax.random.split(jax.random.key(seed), 3)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        q, k, v = (
            jax.random.normal(key, (1, length, count, shape.head_dim), jnp.dtype(shape.dtype))
            for key, count in zip(keys, heads, strict=True)
        )
        return q, k, v

    return draw()


def draw_blocks(
    num_heads: int, length: int, probability: float, *, block_q: int, block_kv: int, seed: int
) -> Bool[np.ndarray, "N Tb Sb"]:
    """Random causally visible blocks, with the sink and those on the diagonal."""
    first_query = np.arange(0, length, block_q)[:, None]
    first_key = np.arange(0, length, block_kv)[None]
    visible = first_key < first_query + block_q
    forced = (first_key == 0) | (first_key + block_kv > first_query)
    drawn = np.random.default_rng(seed).random((num_heads, *visible.shape)) < probability
    return (drawn | forced) & visible


def _block_mask(keep: Bool[Array, "1 N Tb Tb"], *, shape: Shape, length: int) -> BlockMask:
    size = shape.block_size
    return BlockMask.from_dense(keep, q_len=length, kv_len=length, block_q=size, block_kv=size)


def _torch_figures(
    options: Options,
    operands: Sequence[Array],
    rows: np.ndarray,
    keeps: Mapping[str, np.ndarray],
    judges: Mapping[str, JudgeRows],
) -> dict[str, dict[str, Measured | str]]:
    """By peer and case. Dense FA4 is timed once, and stands beside every case."""
    cases_of = {"fa4": ["p=1"], "fa4_block_sparse": list(keeps)}
    calls = [(peer, case) for peer in options.peers for case in cases_of.get(peer, [])]
    figures = torch_peers(calls, operands, keeps, judges, rows, options)
    return {
        peer: {case: figures.get((peer, case)) or figures[peer, "p=1"] for case in keeps}
        for peer in dict.fromkeys(peer for peer, _ in calls)
    }
