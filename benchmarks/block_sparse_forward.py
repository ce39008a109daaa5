"""Suite block_sparse_forward: our forward over random block lists, against dense and sparse peers.

Lists are drawn per head: each causally visible block with a given probability, and always the
sink (first) block and the diagonal. Every peer that takes lists gets the very same ones.
"""

import functools
from collections.abc import Iterator, Mapping

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
    q, k, v = random_operands(shape, length, seed=options.seed)
    rows = gate.sample_rows(length, shape.block_size, seed=options.seed)
    num_blocks = length // shape.block_size
    keeps = {
        f"p={probability:g}": draw_blocks(
            shape.num_heads, num_blocks, probability, seed=options.seed
        )
        for probability in PROBABILITIES
    }
    judge = functools.partial(gate.judge, q=q, k=k, v=v, rows=rows, block_size=shape.block_size)
    judges = {
        case: functools.partial(judge, keep=keep[:, rows // shape.block_size])
        for case, keep in keeps.items()
    }
    list_blocks = jax.jit(functools.partial(_block_mask, shape=shape, length=length))
    attend = jax.jit(functools.partial(block_sparse_attention, backend=options.backend))
    ours, densities = {}, {}
    for case, keep in keeps.items():
        mask = list_blocks(keep[None])
        densities[case] = float(mask.density().mean())
        ours[case] = measured(attend, (q, k, v, mask), on_rows(judges[case], rows), options)

    def records_beside(peer: str, theirs: Mapping[str, Measured | str]) -> Iterator[Record | str]:
        for case in keeps:
            yield options.record(
                op="block_sparse_forward",
                case=f"{format_length(length)} {case}",
                inputs=f"{shape}, causal, random normal q/k/v, random blocks + sink + diagonal",
                density=densities[case],
                ours=ours[case],
                peer=peer,
                theirs=theirs[case],
            )

    for peer, attend_densely in dense_peers(options).items():
        # p=1 lists every visible block, so its judge is that of dense attention.
        dense = measured(attend_densely, (q, k, v), on_rows(judges["p=1"], rows), options)
        yield from records_beside(peer, dict.fromkeys(keeps, dense))
    for peer, theirs in _torch_figures(options, (q, k, v), rows, keeps, judges).items():
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
    num_heads: int, num_blocks: int, probability: float, *, seed: int
) -> Bool[np.ndarray, "N Tb Tb"]:
    """Random causally visible blocks, with the sink and the diagonal."""
    drawn = np.random.default_rng(seed).random((num_heads, num_blocks, num_blocks)) < probability
    drawn |= np.eye(num_blocks, dtype=bool)
    drawn[:, :, 0] = True
    return drawn & np.tri(num_blocks, dtype=bool)


def _block_mask(keep: Bool[Array, "1 N Tb Tb"], *, shape: Shape, length: int) -> BlockMask:
    size = shape.block_size
    return BlockMask.from_dense(keep, q_len=length, kv_len=length, block_q=size, block_kv=size)


def _torch_figures(
    options: Options,
    operands: tuple[Array, Array, Array],
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
