"""The xla implementation and its gradients against the float64 oracle."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.block_sparse_attention import block_sparse_attention, xla
from sparseattn_jax.kernels.streaming_attention import streaming_attention
from tests.oracles import attention as oracle
from tests.oracles import streaming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    B: int = 1
    T: int = 13
    S: int = 13
    N: int = 4
    K: int = 2
    H: int = 8
    block_q: int = 4
    block_kv: int = 4
    is_causal: bool = True
    shared: bool = False
    density: float = 0.5
    lengths: tuple[int, ...] | None = None
    segments: bool = False
    windows: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{field.name}{getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return "-".join(changed) or "default"


CASES = [
    Case(),
    Case(B=2, N=6, K=2, S=19, block_kv=8),
    Case(N=3, K=1, block_q=8, is_causal=False, T=9, S=5),
    Case(B=2, shared=True, H=16),
    Case(density=1.0),
    Case(density=0.0),
    Case(T=3, S=3),
    Case(T=1, S=14, K=4),
    Case(B=3, lengths=(13, 6, 0)),
    Case(B=2, lengths=(7, 13), is_causal=False, S=17),
    Case(B=2, T=6, segments=True, density=0.8),
    Case(B=2, N=6, K=2, S=19, block_kv=8, windows=((1,) * 6, (4, 7, 30, 0, 1, 6))),
    Case(N=3, K=1, T=9, S=14, shared=True, density=0.8, windows=((9, 99, -1), (-2, 99, 3))),
    Case(B=2, lengths=(13, 6), segments=True, windows=((2, 0, 6, 1), (3, 6, 1, 9))),
]


def operands(case: Case, dtype: jnp.dtype = jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(case.T, case.N), (case.S, case.K), (case.S, case.K)]
    qkv = [jnp.array(rng.normal(size=(case.B, n, h, case.H)), dtype) for n, h in shapes]
    num_blocks = (-(-case.T // case.block_q), -(-case.S // case.block_kv))
    blocks = rng.random((case.B, 1 if case.shared else case.N, *num_blocks)) < case.density
    lengths = None if case.lengths is None else jnp.array(case.lengths, jnp.int32)
    segments = None
    if case.segments:
        segments = jnp.array(np.sort(rng.integers(0, 3, (case.B, case.S)), axis=-1), jnp.int32)
    return qkv, blocks, lengths, segments, rng


def kept_pairs(case: Case, blocks: np.ndarray, lengths, segments) -> np.ndarray:
    visible = oracle.visible_pairs(
        case.B,
        case.T,
        case.S,
        is_causal=case.is_causal,
        kv_lengths=lengths,
        segment_ids=segments,
    )
    blocks = np.broadcast_to(blocks, (case.B, case.N, *blocks.shape[2:]))
    listed = oracle.listed_pairs(blocks, case.T, case.S, case.block_q, case.block_kv)
    if case.windows is not None:
        sinks, recents = case.windows
        sizes = {"sink_sizes": sinks, "recent_sizes": recents}
        listed = listed & streaming.visible_pairs(case.B, case.T, case.S, **sizes)
    return visible[:, None] & listed


def attend(case: Case, blocks, lengths, segments, backend=None):
    indices, counts = block_lists.from_dense(jnp.array(blocks))

    def call(q, k, v):
        return block_sparse_attention(
            q,
            k,
            v,
            indices,
            counts,
            block_q=case.block_q,
            block_kv=case.block_kv,
            is_causal=case.is_causal,
            scale=case.H**-0.5,
            kv_lengths=lengths,
            segment_ids=segments,
            windows=None if case.windows is None else jnp.array(case.windows, jnp.int32),
            backend=backend,
        )

    return call


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_oracle(case: Case):
    qkv, blocks, lengths, segments, rng = operands(case)
    keep = kept_pairs(case, blocks, lengths, segments)
    (out, lse), vjp = jax.vjp(jax.jit(attend(case, blocks, lengths, segments)), *qkv)
    expected_out, expected_lse = oracle.attention(*qkv, keep)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)

    d_out = rng.normal(size=out.shape).astype(np.float32)
    d_lse = rng.normal(size=lse.shape).astype(np.float32)
    expected = oracle.attention_gradients(*qkv, keep, d_out, d_lse)
    for gradient, reference in zip(vjp((d_out, d_lse)), expected, strict=True):
        np.testing.assert_allclose(gradient, reference, atol=5e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_by_its_rounding_only(dtype):
    case = Case(B=2, N=6, K=2, S=19)
    qkv, blocks, lengths, segments, _ = operands(case, dtype)
    out, lse = attend(case, blocks, lengths, segments)(*qkv)
    expected_out, expected_lse = oracle.attention(*qkv, kept_pairs(case, blocks, lengths, segments))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected_out, rtol=float(jnp.finfo(dtype).eps), atol=1e-6
    )
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)


def test_an_unlisted_block_is_never_read():
    case = Case(T=8, S=8, N=1, K=1)
    qkv, *_ = operands(case)
    blocks = np.array([[True, False], [False, True]])[None, None]
    # NaN in the keys of query block 0's unlisted block must not reach its output, nor 1's.
    poisoned = [x.at[:, 4:].set(jnp.nan) for x in qkv]
    out, _ = attend(case, blocks, None, None)(qkv[0], *poisoned[1:])
    expected, _ = attend(case, blocks, None, None)(*qkv)
    np.testing.assert_array_equal(out[:, :4], expected[:, :4])


def test_batching_by_vmap_equals_a_loop():
    case = Case(B=3)
    qkv, blocks, *_ = operands(case)
    indices, counts = block_lists.from_dense(jnp.array(blocks))

    def one(q, k, v, indices, counts):
        batched = [x[None] for x in (q, k, v, indices, counts)]
        out, _ = block_sparse_attention(
            *batched, block_q=4, block_kv=4, is_causal=True, scale=case.H**-0.5
        )
        return out[0]

    batched = jax.vmap(one)(*qkv, indices, counts)
    np.testing.assert_allclose(batched, attend(case, blocks, None, None)(*qkv)[0], atol=1e-6)


@pytest.mark.parametrize(("kv_len", "listed"), [(16, 2), (64, 2), (64, 4)])
def test_work_is_two_products_a_listed_block(monkeypatch, kv_len: int, listed: int):
    products = []
    matmul = xla.matmul
    monkeypatch.setattr(xla, "matmul", lambda *args: products.append(1) or matmul(*args))
    q, k = jnp.zeros((1, 8, 1, 8)), jnp.zeros((1, kv_len, 1, 8))
    lists = block_lists.from_dense(jnp.arange(kv_len // 8).reshape(1, 1, 1, -1) < listed)
    with jax.disable_jit():
        block_sparse_attention(q, k, k, *lists, block_q=8, block_kv=8, is_causal=False, scale=1.0)
    assert len(products) == 2 * listed


def test_windows_that_do_not_look_back_are_refused():
    case = Case(N=1, K=1, is_causal=False, windows=((1,), (2,)))
    qkv, blocks, *_ = operands(case)
    with pytest.raises(ValueError, match="is_causal=False: windows look back"):
        attend(case, blocks, None, None)(*qkv)


def test_heads_of_all_kinds_are_what_each_is_alone():
    case = Case(B=2, S=17, N=3, K=3, windows=((0, 0, 2), (17, 17, 5)))
    qkv, blocks, *_, rng = operands(case)
    blocks[:, 0] = True
    seen = kept_pairs(case, np.ones_like(blocks), None, None)[:, 2]
    seen = np.pad(seen, ((0, 0), (0, 3), (0, 3))).reshape(2, 4, 4, 5, 4)
    blocks[:, 2] = seen.any(axis=(2, 4))
    cotangents = [jnp.array(rng.normal(size=x), jnp.float32) for x in ((2, 13, 3, 8), (2, 13, 3))]

    def results_and_gradients(attend, q, k, v, *cotangents):
        results, vjp = jax.vjp(jax.jit(attend), q, k, v)
        return *results, *vjp(cotangents)

    found = results_and_gradients(attend(case, blocks, None, None), *qkv, *cotangents)
    alone = dataclasses.replace(case, N=1, K=1, windows=None)
    kinds = [
        attend(alone, blocks[:, :1], None, None),
        attend(alone, blocks[:, 1:2], None, None),
        functools.partial(streaming_attention, sink_size=2, recent_size=5),
    ]
    for head, kind in enumerate(kinds):
        of_head = [x[:, :, head : head + 1] for x in (*qkv, *cotangents)]
        expected = results_and_gradients(kind, *of_head)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one[:, :, head : head + 1], other, atol=2e-6)
