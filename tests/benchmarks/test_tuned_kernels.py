"""The calls that tiles are measured by: drawn right, large enough, and judged."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import tuned_kernels
from benchmarks.block_sparse_forward import draw_blocks
from benchmarks.shapes import SHAPES
from benchmarks.tuned_kernels import KERNELS, Name, Operands
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention, xla
from sparseattn_jax.kernels.decode_attention import decode_attention
from sparseattn_jax.kernels.vertical_slash_scores import vertical_slash_scores

SMALL: dict[Name, tuple[tuple, int]] = {
    "block_sparse_attention": ((64, 128, 64), 512),
    "block_sparse_attention_vjp": ((64, 64), 512),
    "decode_attention": ((64, 64), 1024),
    "antidiagonal_scores": ((256,), 512),
    "vertical_slash_scores": ((64, True), 512),
}


def by_xla(name: Name, operands: Operands) -> Any:
    """What xla has for a small call."""
    prefill = {"block_q": 128, "block_kv": 64, "is_causal": True, "scale": 64**-0.5}
    if name == "block_sparse_attention":
        return block_sparse_attention(*operands, **prefill, backend="xla")
    if name == "block_sparse_attention_vjp":
        return xla.run_vjp(*operands[:5], None, None, None, *operands[5:], **prefill)
    if name == "decode_attention":
        q, k, v, lengths, indices, counts = operands
        lists = {"kv_indices": indices, "kv_num_blocks": counts, "block_kv": 64}
        return decode_attention(q, k, v, kv_lengths=lengths, **lists, backend="xla")
    if name == "antidiagonal_scores":
        options = {"stride": 4, "block_size": 128, "is_causal": True}
        return antidiagonal_scores(*operands, **options, backend="xla")
    return vertical_slash_scores(*operands, num_queries=64, backend="xla")


@pytest.mark.parametrize("name", SMALL)
def test_the_judge_takes_what_is_right_only(name: Name, monkeypatch: pytest.MonkeyPatch):
    key, length = SMALL[name]
    shape = dataclasses.replace(SHAPES["llama3_8b"], num_heads=4, num_kv_heads=2, head_dim=64)
    monkeypatch.setitem(tuned_kernels.LENGTHS, name, length)
    monkeypatch.setattr(tuned_kernels, "_shape", lambda _: shape)
    problem = KERNELS[name].problem(*key)
    found = jax.jit(functools.partial(by_xla, name))
    for case, operands in problem.draw().items():
        result = found(operands)
        assert problem.judge(case, operands, result).passed
        wrong = jax.tree.map(lambda x: x * jnp.asarray(1.1, x.dtype), result)
        assert not problem.judge(case, operands, wrong).passed
        last = jax.tree.map(lambda x: x.at[..., -1].set(jnp.nan), result)
        assert not problem.judge(case, operands, last).passed


@pytest.mark.parametrize("name", KERNELS)
def test_operands_exceed_the_cache_and_are_of_one_shape(name: Name):
    kernel = KERNELS[name]
    for key in kernel.keys[:: len(kernel.keys) - 1]:
        cases = jax.eval_shape(kernel.problem(*key).draw)
        first, *others = cases.values()
        assert all(other == first for other in others)
        assert sum(x.size * x.dtype.itemsize for x in first) > 50 * 2**20


def test_blocks_are_visible_ones_with_sink_and_diagonal():
    drawn = draw_blocks(1, 8, 0.0, block_q=4, block_kv=2, seed=0)
    np.testing.assert_array_equal(drawn[0], [[1, 1, 0, 0], [1, 0, 1, 1]])
    drawn = draw_blocks(2, 8, 1.0, block_q=2, block_kv=4, seed=0)
    np.testing.assert_array_equal(drawn[1], [[1, 0], [1, 0], [1, 1], [1, 1]])
