"""The kernels whose tiles `autotune.py` chooses: their keys, candidates, calls and judges.

Streaming attention has no tiles of its own: it runs block-sparse attention over 128 x 128 blocks.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from benchmarks import decode, gate
from benchmarks.block_sparse_forward import draw_blocks, random_operands
from benchmarks.block_sparse_forward_backward import random_output_gradient
from benchmarks.gradient_gate import judge_gradients
from benchmarks.shapes import SHAPES, Shape
from sparseattn_jax.kernels import antidiagonal_scores as scores
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels import vertical_slash_scores as sums
from sparseattn_jax.kernels.antidiagonal_scores import tiling as scores_tiling
from sparseattn_jax.kernels.block_sparse_attention import (
    block_sparse_attention,
    mosaic_sm90,
    mosaic_sm90_vjp,
    tiling,
)
from sparseattn_jax.kernels.decode_attention import mosaic_sm90 as decode_sm90
from sparseattn_jax.kernels.decode_attention import tiling as decode_tiling
from sparseattn_jax.kernels.vertical_slash_scores import tiling as sums_tiling

type Operands = tuple[Array, ...]
Name = Literal[
    "block_sparse_attention",
    "block_sparse_attention_vjp",
    "decode_attention",
    "antidiagonal_scores",
    "vertical_slash_scores",
]

DENSITIES = {"10%": 0.1, "100%": 1.0}
LENGTHS: dict[Name, int] = {
    "block_sparse_attention": 2**14,
    "block_sparse_attention_vjp": 2**13,
    "decode_attention": 2**15,
    "antidiagonal_scores": 2**16,
    "vertical_slash_scores": 2**17,
}
"""Tokens: operands that exceed the L2 cache, in calls that take a few milliseconds at most."""
_SEED = 0
_SCORES_EPSILON = 2e-3  # of a row's largest block sum, for weights of 11 bits
_SUMS_EPSILON = 1e-4  # of the largest sum


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """The calls by which the candidates for a key are measured.

    Attributes:
        run: takes the operands of a case, and a `config`.
        draw: operands by case, of the same shapes in all.
        judge: of a case, its operands and its result.
    """

    run: Callable[..., Any]
    draw: Callable[[], Mapping[str, Operands]]
    judge: Callable[[str, Operands, Any], gate.Verdict]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TunedKernel:
    """A kernel with a table of tiles.

    Attributes:
        op: its folder in kernels/, whose tile_table.py has the table.
        parameters: what the values of a key are.
        candidates: takes those; the rule's config comes first.
        problem: takes those.
    """

    op: str
    parameters: Sequence[str]
    keys: Sequence[tuple[int | bool | None, ...]]
    candidates: Callable[..., Sequence[Any]]
    problem: Callable[..., Problem]


def _forward(head_dim: int, block_q: int, block_kv: int) -> Problem:
    """A causal prefill over random lists."""
    length, shape = LENGTHS["block_sparse_attention"], _shape(head_dim)
    rows = gate.sample_rows(length, 128, seed=_SEED)
    keeps = _keeps(shape, length, block_q, block_kv)

    def draw() -> Mapping[str, Operands]:
        qkv = random_operands(shape, length, seed=_SEED)
        return {case: (*qkv, *_lists(keep)) for case, keep in keeps.items()}

    def judge(case: str, operands: Operands, result: tuple[Array, Array]) -> gate.Verdict:
        keep = keeps[case][:, rows // block_q]
        return gate.judge(
            _rows(result[0], rows), *operands[:3], rows=rows, keep=keep, block_size=block_kv
        )

    run = functools.partial(
        _attend, block_q=block_q, block_kv=block_kv, is_causal=True, scale=head_dim**-0.5
    )
    return Problem(run=run, draw=draw, judge=judge)


def _attend(
    q: Array, k: Array, v: Array, indices: Array, counts: Array, **options: Any
) -> tuple[Array, Array]:
    return mosaic_sm90.run(q, k, v, indices, counts, None, None, None, **options)


def _backward(head_dim: int, block_kv: int) -> Problem:
    """The gradients of a causal prefill over random lists."""
    length, block_q, shape = LENGTHS["block_sparse_attention_vjp"], 128, _shape(head_dim)
    rows = gate.sample_rows(length, 128, seed=_SEED)
    keeps = _keeps(shape, length, block_q, block_kv)
    options: dict[str, Any] = {
        "block_q": block_q,
        "block_kv": block_kv,
        "is_causal": True,
        "scale": head_dim**-0.5,
    }
    forward = jax.jit(functools.partial(block_sparse_attention, **options))

    def draw() -> Mapping[str, Operands]:
        qkv = random_operands(shape, length, seed=_SEED)
        d_out = random_output_gradient(shape, length, seed=_SEED)

        def of_case(keep: np.ndarray) -> Operands:
            lists = _lists(keep)
            out, lse = forward(*qkv, *lists)
            return *qkv, *lists, out, lse, d_out, jnp.zeros_like(lse)

        return {case: of_case(keep) for case, keep in keeps.items()}

    def judge(case: str, operands: Operands, result: Operands) -> gate.Verdict:
        return judge_gradients(
            *(_rows(x, rows) for x in result),
            operands=(*operands[:3], operands[7]),
            rows=rows,
            keep=np.repeat(keeps[case], block_q // block_kv, axis=1),
            block_size=block_kv,
        )

    def run(
        q: Array, k: Array, v: Array, indices: Array, counts: Array, *rest: Array, config: Any
    ) -> Operands:
        out, lse, d_out, d_lse = rest
        return mosaic_sm90_vjp.run(
            *(q, k, v, indices, counts, None, None, None, out, lse, d_out, d_lse),
            **options,
            config=config,
        )

    return Problem(run=run, draw=draw, judge=judge)


def _decode(head_dim: int, block_kv: int | None) -> Problem:
    """One query token for each of 16 sequences, over the cache or lists of its blocks."""
    length, batch, shape = LENGTHS["decode_attention"], 16, _shape(head_dim)
    block_size = block_kv or shape.block_size
    whole = np.ones((batch, shape.num_kv_heads, length // block_size), bool)
    keeps = {"100%": whole}
    if block_kv is not None:
        keeps["10%"] = decode.draw_disjoint_blocks(whole.shape, 0.1, seed=_SEED)[0]

    def draw() -> Mapping[str, Operands]:
        qkv = decode.random_cache(shape, batch, length, seed=_SEED)
        lengths = jnp.full((batch,), length, jnp.int32)

        def of_case(keep: np.ndarray) -> Operands:
            lists = () if block_kv is None else block_lists.from_dense(jnp.asarray(keep))
            return *qkv, lengths, *lists

        return {case: of_case(keep) for case, keep in keeps.items()}

    def judge(case: str, operands: Operands, result: tuple[Array, Array]) -> gate.Verdict:
        q, k, v = operands[:3]
        keep = keeps[case][None]
        return decode.judge_outputs([result[0]], q=q, k=k, v=v, keeps=keep, block_size=block_size)

    def run(
        q: Array,
        k: Array,
        v: Array,
        lengths: Array,
        indices: Array | None = None,
        counts: Array | None = None,
        *,
        config: decode_tiling.TileConfig,
    ) -> tuple[Array, Array]:
        return decode_sm90.run(
            *(q, k, v, lengths, None, indices, counts),
            block_kv=block_kv,
            scale=head_dim**-0.5,
            config=config,
        )

    return Problem(run=run, draw=draw, judge=judge)


def _scores(depth: int) -> Problem:
    """A causal prefill, with one of the strides and head sizes that have that depth."""
    length, block = LENGTHS["antidiagonal_scores"], 128
    head_dim = min(
        (h for h in scores_tiling.HEAD_DIMS if depth // h in scores_tiling.STRIDES),
        key=lambda h: abs(h - 128),
    )
    shape = _shape(head_dim)
    options: dict[str, Any] = {
        "stride": depth // head_dim,
        "block_size": block,
        "is_causal": True,
    }
    reference = gate.jit_reference(
        functools.partial(scores.antidiagonal_scores, **options, backend="xla")
    )

    def draw() -> Mapping[str, Operands]:
        return {"causal": random_operands(shape, length, seed=_SEED)[:2]}

    def judge(case: str, operands: Operands, result: Array) -> gate.Verdict:
        del case
        q, k = operands
        edge = 2 * block
        first = reference(q[:, :edge].astype(jnp.float32), k[:, :edge].astype(jnp.float32))
        last = reference(q[:, -edge:].astype(jnp.float32), k.astype(jnp.float32))
        pairs = (result[:, :, :2, :2], first), (result[:, :, -2:], last)
        error = max(_error(*pair, axis=-1) for pair in pairs)
        return gate.Verdict(max_error=error, max_error_allowed=_SCORES_EPSILON)

    run = functools.partial(
        scores.mosaic_sm90.run,
        kv_lengths=None,
        q_blocks=(0, length // block),
        workspace_bytes=2**29,
        **options,
    )
    return Problem(run=run, draw=draw, judge=judge)


def _sums(head_dim: int, is_even: bool) -> Problem:
    """The last 64 queries on all keys."""
    length = LENGTHS["vertical_slash_scores"]
    shape = dataclasses.replace(
        _shape(head_dim), num_heads=32 if is_even else 24
    )  # 4 or 3 per kv head
    options: dict[str, Any] = {"num_queries": 64}
    reference = gate.jit_reference(
        functools.partial(sums.vertical_slash_scores, **options, backend="xla")
    )

    def draw() -> Mapping[str, Operands]:
        q, k, _ = random_operands(shape, length, seed=_SEED)
        return {"last": (q[:, -64:], k)}

    def judge(case: str, operands: Operands, result: tuple[Array, Array]) -> gate.Verdict:
        del case
        exact = reference(*(x.astype(jnp.float32) for x in operands))
        error = max(_error(*pair, axis=None) for pair in zip(result, exact, strict=True))
        return gate.Verdict(max_error=error, max_error_allowed=_SUMS_EPSILON)

    run = functools.partial(sums.mosaic_sm90.run, kv_lengths=None, workspace_bytes=2**29, **options)
    return Problem(run=run, draw=draw, judge=judge)


def _keeps(
    shape: Shape, length: int, block_q: int, block_kv: int
) -> dict[str, Bool[np.ndarray, "N Tb Sb"]]:
    """Random causally visible blocks, by case."""
    draw = functools.partial(
        draw_blocks, shape.num_heads, length, block_q=block_q, block_kv=block_kv, seed=_SEED
    )
    return {case: draw(density) for case, density in DENSITIES.items()}


def _lists(keep: Bool[np.ndarray, "N Tb Sb"]) -> tuple[Array, Array]:
    return block_lists.from_dense(jnp.asarray(keep[None]))


def _error(found: Array, exact: Array, *, axis: int | None) -> float:
    """The largest, over the largest value along an axis or of all; inf where there is a NaN."""
    right = np.asarray(exact)
    shares = np.abs(np.asarray(found) - right) / right.max(axis=axis, keepdims=True)
    return float(np.nan_to_num(shares, nan=np.inf, posinf=np.inf).max())


def _rows(x: Array, rows: np.ndarray) -> np.ndarray:
    return np.asarray(x[0, rows], np.float32)


def _shape(head_dim: int) -> Shape:
    return dataclasses.replace(SHAPES["llama3_8b"], head_dim=head_dim)


KERNELS: dict[Name, TunedKernel] = {
    "block_sparse_attention": TunedKernel(
        op="block_sparse_attention",
        parameters=("head_dim", "block_q", "block_kv"),
        keys=tiling.KEYS,
        candidates=tiling.candidates,
        problem=_forward,
    ),
    "block_sparse_attention_vjp": TunedKernel(
        op="block_sparse_attention",
        parameters=("head_dim", "block_kv"),
        keys=tiling.VJP_KEYS,
        candidates=tiling.vjp_candidates,
        problem=_backward,
    ),
    "decode_attention": TunedKernel(
        op="decode_attention",
        parameters=("head_dim", "block_kv"),
        keys=decode_tiling.KEYS,
        candidates=decode_tiling.candidates,
        problem=_decode,
    ),
    "antidiagonal_scores": TunedKernel(
        op="antidiagonal_scores",
        parameters=("stride * head_dim",),
        keys=scores_tiling.KEYS,
        candidates=scores_tiling.candidates,
        problem=_scores,
    ),
    "vertical_slash_scores": TunedKernel(
        op="vertical_slash_scores",
        parameters=("head_dim", "even row tiles"),
        keys=sums_tiling.TABLE_KEYS,
        candidates=sums_tiling.candidates,
        problem=_sums,
    ),
}
