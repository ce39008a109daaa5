"""The xla implementation and its gradients against the float64 oracle, and the op's own errors."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparseattn_jax.kernels import streaming_attention as op
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.kernels.streaming_attention import streaming_attention, xla
from tests.drawing import block_matrix
from tests.kernels.xla_programs import (
    arrays,
    multiplications,
    operations_with_gradients,
    plant,
)
from tests.oracles import attention, streaming


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A call; `sinks` and `recents` are the sizes of each head, if they are not the same."""

    B: int = 1
    T: int = 37
    S: int = 37
    N: int = 4
    K: int = 2
    H: int = 8
    sink: int = 3
    recent: int = 5
    sinks: tuple[int, ...] | None = None
    recents: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    scale: float | None = None

    def __str__(self) -> str:
        default = Case()
        changed = [
            f"{field.name}{getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(default, field.name)
        ]
        return "-".join(changed) or "default"

    def visible(self) -> np.ndarray:
        return streaming.visible_pairs(
            self.B,
            self.T,
            self.S,
            sink_sizes=self.sinks or [self.sink] * self.N,
            recent_sizes=self.recents or [self.recent] * self.N,
            kv_lengths=self.lengths,
        )


CASES = [
    Case(),
    Case(B=2, T=21, S=50, N=6, K=2),
    Case(N=3, K=1, sink=0, H=5),
    Case(sink=0, recent=1, K=4),
    Case(sink=40, recent=1),
    Case(sink=9, recent=20, T=35, S=36),
    Case(T=1, S=30, sink=0),
    Case(B=3, T=33, lengths=(37, 12, 0)),
    Case(B=2, T=20, S=41, lengths=(25, 41), sink=30),
    Case(B=2, sinks=(0, 3, 1, 2), recents=(1, 0, 5, 4), lengths=(37, 30), scale=0.5),
    Case(T=300, S=331, N=1, K=1, sink=20, recent=150),
]


def operands(case: Case, dtype: Any = jnp.float32) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    shapes = [(case.T, case.N), (case.S, case.K), (case.S, case.K)]
    return [jnp.array(rng.normal(size=(case.B, n, h, case.H)), dtype) for n, h in shapes]


def attend(case: Case) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def array(values: tuple[int, ...] | None) -> jax.Array | None:
        return None if values is None else jnp.array(values, jnp.int32)

    return functools.partial(
        streaming_attention,
        sink_size=case.sink,
        recent_size=case.recent,
        sink_sizes=array(case.sinks),
        recent_sizes=array(case.recents),
        kv_lengths=array(case.lengths),
        scale=case.scale,
    )


def assert_equals_the_oracle(case: Case) -> None:
    qkv, keep = operands(case), case.visible()
    (out, lse), vjp = jax.vjp(attend(case), *qkv)
    expected_out, expected_lse = attention.attention(*qkv, keep, case.scale)
    np.testing.assert_allclose(out, expected_out, atol=2e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)

    rng = np.random.default_rng(1)
    d_out = jnp.array(rng.normal(size=out.shape), jnp.float32)
    d_lse = jnp.array(rng.normal(size=lse.shape), jnp.float32)
    expected = attention.attention_gradients(*qkv, keep, d_out, d_lse, case.scale)
    for gradient, reference in zip(vjp((d_out, d_lse)), expected, strict=True):
        # A sink gathers the gradients of all queries, so its rounding grows with their number.
        np.testing.assert_allclose(gradient, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_equal_the_oracle(case: Case):
    assert_equals_the_oracle(case)


# T, S, N, K, sink_size, recent_size: few, so that cases share compiled programs. The sizes are
# bounds; what heads see is drawn.
SHAPES = [
    (1, 9, 2, 1, 4, 3),
    (17, 17, 2, 2, 20, 6),
    (33, 40, 4, 2, 2, 50),
    (40, 43, 3, 1, 5, 12),
]


@given(shape=st.sampled_from(SHAPES), data=st.data())
def test_any_call_equals_the_oracle(shape: tuple[int, ...], data: st.DataObject):
    q_len, kv_len, num_heads, num_kv_heads, sink, recent = shape

    def drawn(count: int, largest: int) -> tuple[int, ...]:
        return tuple(data.draw(st.lists(st.integers(0, largest), min_size=count, max_size=count)))

    assert_equals_the_oracle(
        Case(
            B=2,
            T=q_len,
            S=kv_len,
            N=num_heads,
            K=num_kv_heads,
            sink=sink,
            recent=recent,
            sinks=drawn(num_heads, sink),
            recents=drawn(num_heads, recent),
            lengths=drawn(2, kv_len),
        )
    )


DRAWN = [
    pytest.param(Case(T=5, S=5, sink=0, recent=1), "#.... .#... ..#.. ...#. ....#", id="itself"),
    pytest.param(Case(T=5, S=5, sink=0, recent=2), "#.... ##... .##.. ..##. ...##", id="window"),
    pytest.param(Case(T=5, S=5, sink=2, recent=1), "#.... ##... ###.. ##.#. ##..#", id="sinks"),
    pytest.param(Case(T=5, S=5, sink=1, recent=2), "#.... ##... ###.. #.##. #..##", id="both"),
    pytest.param(Case(T=2, S=5, sink=1, recent=2), "#.##. #..##", id="last_queries"),
    pytest.param(Case(T=3, S=5, sink=1, recent=2, lengths=(4,)), "###.. #.##. .....", id="length"),
]


@pytest.mark.parametrize(("case", "picture"), DRAWN)
def test_queries_see_what_is_drawn(case: Case, picture: str):
    # One-hot values and equal logits: the output is the mask, divided by what a row sees.
    case = dataclasses.replace(case, N=1, K=1, H=case.S)
    q = jnp.zeros((1, case.T, 1, case.S))
    k = jnp.zeros((1, case.S, 1, case.S))
    v = jnp.eye(case.S)[None, :, None, :]
    out, lse = attend(case)(q, k, v)
    drawn = block_matrix(picture)
    np.testing.assert_array_equal(case.visible()[0, 0], drawn)
    seen = drawn.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(out[0, :, 0], drawn / np.maximum(seen, 1), rtol=1e-6)
    np.testing.assert_allclose(jnp.exp(lse[0, :, 0]), seen[:, 0], rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "fp16"])
def test_half_precision_errs_by_its_rounding_only(dtype: Any):
    case = Case(B=2, T=21, S=50, N=6, K=2)
    qkv, keep = operands(case, dtype), case.visible()
    (out, lse), vjp = jax.vjp(attend(case), *qkv)
    expected_out, expected_lse = attention.attention(*qkv, keep)
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(out.astype(jnp.float32), expected_out, rtol=eps, atol=1e-6)
    np.testing.assert_allclose(lse, expected_lse, atol=2e-6)

    d_out, d_lse = jnp.ones_like(out), jnp.ones_like(lse)
    expected = attention.attention_gradients(*qkv, keep, d_out, d_lse)
    for gradient, reference in zip(vjp((d_out, d_lse)), expected, strict=True):
        assert gradient.dtype == dtype
        # The output in the softmax's derivative has been rounded.
        np.testing.assert_allclose(gradient.astype(jnp.float32), reference, rtol=eps, atol=5 * eps)


@pytest.mark.parametrize("sizes", [(0, 1000), (1000, 1), (36, 36)], ids=str)
def test_a_window_as_long_as_the_keys_is_dense_causal_attention(sizes: tuple[int, int]):
    case = Case(B=2, T=37, S=37, sink=sizes[0], recent=sizes[1])
    q, k, v = operands(case)
    expected = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    np.testing.assert_allclose(attend(case)(q, k, v)[0], expected, atol=2e-6)


def test_sizes_of_heads_are_clipped_to_the_bounds():
    beyond = Case(sinks=(-2, 3, 99, 3), recents=(5, 99, 5, -7))
    within = dataclasses.replace(beyond, sinks=(0, 3, 3, 3), recents=(5, 5, 5, 0))
    qkv = operands(beyond)
    for got, expected in zip(attend(beyond)(*qkv), attend(within)(*qkv), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_padding_has_no_effect_and_no_gradient():
    case = Case(B=2, lengths=(20, 30))
    padding = (np.arange(case.S) >= np.array(case.lengths)[:, None])[:, :, None, None]
    qkv = operands(case)
    filled = [jnp.where(padding, 1e4, x) for x in qkv]
    results, vjp = jax.vjp(attend(case), *qkv)
    filled_results, filled_vjp = jax.vjp(attend(case), *filled)
    cotangents = jax.tree.map(jnp.ones_like, results)
    jax.tree.map(np.testing.assert_array_equal, filled_results, results)
    jax.tree.map(np.testing.assert_array_equal, filled_vjp(cotangents), vjp(cotangents))
    for gradient in vjp(cotangents):
        assert not np.where(padding, gradient, 0).any()


def test_batching_by_vmap_equals_a_batch():
    case = Case(B=3, T=33, lengths=(37, 12, 0))
    alone = Case(T=33)

    def gradients(q, k, v, length):
        call = functools.partial(attend(alone), kv_lengths=length[None])
        results, vjp = jax.vjp(call, q[None], k[None], v[None])
        return jax.tree.map(lambda x: x[0], (results, vjp(jax.tree.map(jnp.ones_like, results))))

    qkv = operands(case)
    together = jax.jit(jax.vmap(gradients))(*qkv, jnp.array(case.lengths, jnp.int32))
    results, vjp = jax.vjp(attend(case), *qkv)
    expected = results, vjp(jax.tree.map(jnp.ones_like, results))
    assert_close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    jax.tree.map(assert_close, together, expected)


@pytest.mark.parametrize("kv_len", [1000, 3000])
def test_work_follows_the_window_not_the_keys(kv_len: int):
    case = Case(T=1000, S=kv_len, N=1, K=1, H=8, sink=16, recent=48)
    work = multiplications(operations_with_gradients(attend(case), operands(case)))
    # 16 chunks of 64 queries, each with 16 sinks, 48 recent keys and 63 more; two products forward
    # and five backward.
    assert work == (2 + 5) * 16 * 64 * (16 + 48 + 63) * case.H


def test_memory_follows_the_tokens_not_their_pairs():
    case = Case(T=1000, S=1000, N=1, K=1, H=8, sink=16, recent=48)
    made = arrays(operations_with_gradients(attend(case), operands(case)))
    assert max(array.size for array in made) < 2 * case.S * case.H


def window_too_long(*args: Any, recent_size: int, **options: Any) -> Any:
    return xla.run(*args, recent_size=recent_size + 1, **options)


def window_too_short(*args: Any, recent_size: int, **options: Any) -> Any:
    return xla.run(*args, recent_size=recent_size - 1, **options)


def sink_too_many(*args: Any, sink_size: int, **options: Any) -> Any:
    return xla.run(*args, sink_size=sink_size + 1, **options)


def no_cotangent_of_lse(*args: Any, **options: Any) -> Any:
    return xla.run_vjp(*args[:-1], jnp.zeros_like(args[-1]), **options)


def shorter_window_in_gradient(*args: Any, recent_size: int, **options: Any) -> Any:
    return xla.run_vjp(*args, recent_size=recent_size - 1, **options)


FAULTS = [
    {"forward": window_too_long},
    {"forward": window_too_short},
    {"forward": sink_too_many},
    {"backward": no_cotangent_of_lse},
    {"backward": shorter_window_in_gradient},
]


@pytest.mark.parametrize("faulty", FAULTS, ids=lambda fault: next(iter(fault.values())).__name__)
def test_a_faulty_implementation_is_seen(monkeypatch: pytest.MonkeyPatch, faulty: dict):
    plant(monkeypatch, op, **faulty)
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_equals_the_oracle(Case())


def test_a_sink_counted_twice_is_seen(monkeypatch: pytest.MonkeyPatch):
    right = xla._Visibility.keys_of_chunk

    def twice(self: Any, index: jax.Array) -> jax.Array:
        """Sinks are seen in their own slots whether they are in the band or not."""
        seen = right(self, index)
        rows = index * self.geometry.chunk_size + jnp.arange(self.geometry.chunk_size)
        is_sink = jnp.arange(self.geometry.sink)[None, :] <= rows[:, None]
        return seen.at[..., : self.geometry.sink].set(is_sink[None, None, None])

    monkeypatch.setattr(xla._Visibility, "keys_of_chunk", twice)
    # Without jit, whose cache would hold the right program.
    plant(monkeypatch, op, forward=inspect.unwrap(xla.run))
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_equals_the_oracle(Case())


ERRORS = [
    (Case(sink=-1), "sink_size=-1 must not be negative"),
    (Case(recent=0), "recent_size=0 must be positive"),
    (Case(T=5, S=4), "q has 5 tokens and k only 4"),
]


@pytest.mark.parametrize(("case", "message"), ERRORS, ids=str)
def test_wrong_arguments_are_refused(case: Case, message: str):
    with pytest.raises(ValueError, match=message):
        attend(case)(*operands(case))


def test_a_backend_that_does_not_exist_is_refused():
    with pytest.raises(UnsupportedError, match="this op has mosaic_sm90, xla"):
        attend(Case())(*operands(Case()), backend="cudnn")
