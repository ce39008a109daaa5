"""The xla implementation and its gradients against the float64 oracle."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels import column_attention as op
from sparseattn_jax.kernels.attention_union import union
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention
from sparseattn_jax.kernels.column_attention import column_attention, xla
from tests.drawing import block_matrix
from tests.kernels.xla_programs import (
    arrays,
    multiplications,
    operations_with_gradients,
    plant,
)
from tests.oracles import attention as oracle


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call; `C` of the columns are drawn for each head, of which `counts` count."""

    B: int = 2
    T: int = 13
    S: int = 19
    N: int = 4
    K: int = 2
    H: int = 8
    C: int = 7
    counts: tuple[int, ...] = (7, 3, 0, 6)
    block_q: int = 4
    block_kv: int = 4
    density: float = 0.4
    shared_lists: bool = False
    is_causal: bool = True
    lengths: tuple[int, ...] | None = None
    segments: int | None = None
    workspace_bytes: int = 2**27

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{field.name}{getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return "-".join(changed) or "default"

    def drawn(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """(columns, listed blocks, segment ids)."""
        rng = np.random.default_rng(1)
        columns = [rng.permutation(self.S)[: self.C] for _ in range(self.B * self.N)]
        columns = np.sort(np.array(columns, np.int32)).reshape(self.B, self.N, self.C)
        heads = 1 if self.shared_lists else self.N
        shape = (self.B, heads, -(-self.T // self.block_q), -(-self.S // self.block_kv))
        listed = rng.random(shape) < self.density
        if self.segments is None:
            return columns, listed, None
        segments = rng.integers(0, self.segments, (self.B, self.S))
        return columns, listed, np.sort(segments).astype(np.int32)


def operands(case: Case, dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(case.T, case.N), (case.S, case.K), (case.S, case.K)]
    return [jnp.array(rng.normal(size=(case.B, n, h, case.H)), dtype) for n, h in shapes]


def attend(case: Case, *, with_blocks: bool = False) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """The op on what the case draws; with blocks, the union of both attentions."""
    columns, listed, segments = case.drawn()
    counts = np.broadcast_to(np.array(case.counts, np.int32), (case.B, case.N))
    lists = block_lists.from_dense(jnp.asarray(listed))
    options = {
        "block_q": case.block_q,
        "block_kv": case.block_kv,
        "is_causal": case.is_causal,
        "scale": case.H**-0.5,
        "kv_lengths": None if case.lengths is None else jnp.array(case.lengths, jnp.int32),
        "segment_ids": None if segments is None else jnp.array(segments),
    }

    def call(*qkv: jax.Array, **more: Any) -> tuple[jax.Array, jax.Array]:
        out = column_attention(
            *(*qkv, jnp.asarray(columns), jnp.asarray(counts), *lists),
            workspace_bytes=case.workspace_bytes,
            **(options | more),
        )
        return union(block_sparse_attention(*qkv, *lists, **options), out) if with_blocks else out

    return call


def pairs(case: Case, *, with_blocks: bool = False) -> np.ndarray:
    """[B, N, T, S] bool, by the rule."""
    columns, listed, segments = case.drawn()
    visible = oracle.visible_pairs(
        case.B,
        case.T,
        case.S,
        is_causal=case.is_causal,
        kv_lengths=case.lengths,
        segment_ids=segments,
    )
    listed = np.broadcast_to(listed, (case.B, case.N, *listed.shape[2:]))
    in_blocks = oracle.listed_pairs(listed, case.T, case.S, case.block_q, case.block_kv)
    is_column = np.zeros((case.B, case.N, 1, case.S), bool)
    for b, n in np.ndindex(case.B, case.N):
        is_column[b, n, 0, columns[b, n, : case.counts[n]]] = True
    keep = in_blocks | is_column if with_blocks else is_column & ~in_blocks
    return visible[:, None] & keep


def assert_equals_the_oracle(case: Case, *, with_blocks: bool = False) -> None:
    qkv, keep = operands(case), pairs(case, with_blocks=with_blocks)
    rng = np.random.default_rng(2)
    d_out = jnp.array(rng.normal(size=qkv[0].shape), jnp.float32)
    d_lse = jnp.array(rng.normal(size=qkv[0].shape[:3]), jnp.float32)

    def call(*qkv: jax.Array) -> Any:
        results, vjp = jax.vjp(attend(case, with_blocks=with_blocks), *qkv)
        return results, vjp((d_out, d_lse))

    (out, lse), gradients = jax.jit(call)(*qkv)
    expected_out, expected_lse = oracle.attention(*qkv, keep)
    np.testing.assert_allclose(out, expected_out, atol=3e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=3e-6)
    expected = oracle.attention_gradients(*qkv, keep, d_out, d_lse)
    for gradient, reference in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=1e-5, rtol=1e-5)


CASES = [
    Case(workspace_bytes=1),
    Case(B=3, lengths=(19, 9, 0), K=4, workspace_bytes=2 * 4 * 4 * (3 * 4 * 7)),
    Case(N=3, K=1, H=5, counts=(2, 7, 5), segments=3, shared_lists=True),
    Case(is_causal=False, lengths=(19, 11), segments=2),
    Case(B=1, T=1, density=0.0, block_q=8),
    Case(B=1, T=19, C=19, counts=(19, 18, 1, 0), block_q=3, block_kv=5),
]


RUN_ALWAYS = {CASES[0], CASES[2], CASES[3]}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[pytest.mark.full] * (case not in RUN_ALWAYS)) for case in CASES],
    ids=str,
)
def test_values_and_gradients_equal_the_oracle(case: Case):
    assert_equals_the_oracle(case)


@pytest.mark.parametrize(
    "case", [CASES[1], pytest.param(CASES[3], marks=pytest.mark.full)], ids=str
)
def test_with_the_blocks_no_key_counts_twice(case: Case):
    assert_equals_the_oracle(case, with_blocks=True)


def test_a_column_in_a_listed_block_is_left_out():
    """Key 1 is listed for the first two queries, key 4 for the last two."""
    listed = block_matrix(
        """
        #..
        ..#
        """
    )
    expected = block_matrix(
        """
        ....
        ....
        .#..
        .#..
        """
    )
    keys = jnp.zeros((1, 6, 1, 8)).at[0, jnp.arange(6), 0, jnp.arange(6)].set(1.0)
    out, _ = column_attention(
        *(jnp.ones((1, 4, 1, 8)), keys, keys),
        *(jnp.array([[[1, 4]]], jnp.int32), jnp.array([[2]], jnp.int32)),
        *block_lists.from_dense(jnp.asarray(listed)[None, None]),
        block_q=2,
        block_kv=2,
        is_causal=True,
        scale=1.0,
    )
    np.testing.assert_array_equal(np.asarray(out)[0, :, 0, :4] > 0, expected)
    np.testing.assert_array_equal(np.asarray(out)[0, :, 0, 4:], 0)


@pytest.mark.parametrize(
    "dtype",
    [jnp.bfloat16, pytest.param(jnp.float16, marks=pytest.mark.full)],
    ids=["bf16", "fp16"],
)
def test_half_precision_stays_so(dtype: Any):
    """With the blocks too, whose union rounds the output once more."""
    case = Case(B=1)
    qkv = operands(case, dtype)
    out, lse = jax.jit(attend(case, with_blocks=True))(*qkv)
    expected_out, expected_lse = oracle.attention(
        *(np.asarray(x, np.float32) for x in qkv), pairs(case, with_blocks=True)
    )
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(np.asarray(out, np.float32), expected_out, atol=2**-7)
    np.testing.assert_allclose(lse, expected_lse, atol=1e-3)


@pytest.mark.parametrize("kv_len", [1024, 4096])
def test_work_follows_the_columns_not_the_keys(kv_len: int):
    case = Case(B=1, T=1024, S=kv_len, N=1, K=1, counts=(7,), workspace_bytes=2**12)
    work = multiplications(operations_with_gradients(attend(case), operands(case)))
    # Two products forward and five backward.
    assert work == (2 + 5) * case.T * case.C * case.H


def test_memory_holds_no_array_of_all_pairs():
    case = Case(B=1, T=1024, S=1024, N=1, K=1, counts=(7,), workspace_bytes=2**12)
    made = arrays(operations_with_gradients(attend(case), operands(case)))
    # That many entries have the lists.
    assert max(array.size for array in made) <= case.T // 4 * case.S // 4
    scores = [x for x in made if x.shape[-1:] == (case.C,) and x.dtype == jnp.float32]
    assert scores and max(array.size for array in scores) <= 2**12 // 4


def nothing_left_out(*args: Any, **options: Any) -> Any:
    """Columns of listed blocks too."""
    return xla.run(*args[:6], jnp.zeros_like(args[6]), *args[7:], **options)


def one_column_less(*args: Any, **options: Any) -> Any:
    return xla.run(*args[:4], jnp.maximum(args[4] - 1, 0), *args[5:], **options)


def acausal(*args: Any, **options: Any) -> Any:
    return xla.run(*args, **(options | {"is_causal": False}))


def no_cotangent_of_lse(*args: Any, **options: Any) -> Any:
    return xla.run_vjp(*args[:-1], jnp.zeros_like(args[-1]), **options)


FAULTS = [
    {"forward": nothing_left_out},
    {"forward": one_column_less},
    {"forward": acausal},
    {"backward": no_cotangent_of_lse},
]


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda fault: next(iter(fault.values())).__name__)
def test_a_faulty_implementation_is_seen(monkeypatch: pytest.MonkeyPatch, faulty: dict):
    plant(monkeypatch, op, **faulty)
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_equals_the_oracle(CASES[0])


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(UnsupportedError, match="this op has xla"):
        attend(Case())(*operands(Case()), backend="mosaic_sm90")
