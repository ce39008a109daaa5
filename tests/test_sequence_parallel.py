"""Attention spread over devices is that of one device: values, gradients, per-head inputs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh

from sparseattn_jax import DuoAttention, Full, XAttention, prefill_attention, xattention_prefill
from sparseattn_jax.sequence_parallel import HeadLayout, wrap
from tests.kernels.xla_programs import operations

B, T, H = 2, 16, 4


def mesh_of(**axes: int) -> Mesh:
    sizes = tuple(axes.values())
    types = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(sizes, tuple(axes), types, devices=jax.devices()[: np.prod(sizes)])


def operands(num_heads: int, num_kv_heads: int, length: int = T) -> list[jax.Array]:
    rng = np.random.default_rng(0)
    heads = num_heads, num_kv_heads, num_kv_heads
    return [jnp.asarray(rng.normal(size=(B, length, n, H)), jnp.float32) for n in heads]


assert_close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)


def drawn(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).uniform(0.1, 0.9, size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("heads", "ranks", "sharing", "kv_per_rank", "group"),
    [
        ((32, 8), 2, 1, 4, 4),
        ((32, 8), 4, 1, 2, 4),
        ((32, 8), 8, 1, 1, 4),
        ((32, 8), 16, 2, 1, 2),
        ((9, 3), 2, 1, 2, 3),
        ((9, 3), 4, 1, 1, 3),
        ((9, 3), 8, 2, 1, 2),
        ((9, 3), 16, 3, 1, 1),
        ((28, 4), 16, 4, 1, 2),
        ((8, 1), 8, 8, 1, 1),
        ((4, 4), 8, 1, 1, 1),
    ],
    ids=str,
)
def test_layout_is_the_drawn_one(
    heads: tuple[int, int], ranks: int, sharing: int, kv_per_rank: int, group: int
) -> None:
    layout = HeadLayout.of(*heads, ranks)
    assert (layout.sharing, layout.kv_per_rank, layout.group) == (sharing, kv_per_rank, group)
    assert layout.padding == 1 - heads[0] / (ranks * kv_per_rank * group)


def test_heads_of_each_rank() -> None:
    """9 query and 3 kv heads: on 2 ranks kv head 2 is padded; on 8, 2 ranks share each."""
    on_two, on_eight = HeadLayout.of(9, 3, 2), HeadLayout.of(9, 3, 8)
    assert on_two.spread_kv(jnp.arange(3), 0).tolist() == [0, 1, 2, 2]
    queries = on_two.spread_queries(jnp.arange(9), 0).reshape(2, 6).tolist()
    assert queries == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 6, 7, 8]]
    assert on_eight.spread_kv(jnp.arange(3), 0).tolist() == [0, 0, 1, 1, 2, 2, 2, 2]
    queries = on_eight.spread_queries(jnp.arange(9), 0).reshape(8, 2).tolist()
    assert queries == [[0, 1], [2, 2], [3, 4], [5, 5], [6, 7], [8, 8], [8, 8], [8, 8]]


@given(group=st.integers(1, 9), num_kv_heads=st.integers(1, 9), ranks=st.integers(1, 17))
def test_every_rank_has_whole_groups_in_order(group: int, num_kv_heads: int, ranks: int) -> None:
    num_heads = group * num_kv_heads
    layout = HeadLayout.of(num_heads, num_kv_heads, ranks)
    spread = layout.spread_queries(jnp.arange(num_heads), 0)
    queries = np.array(spread).reshape(ranks, layout.kv_per_rank, layout.group)
    kv = np.array(layout.spread_kv(jnp.arange(num_kv_heads), 0)).reshape(ranks, -1)
    assert (queries // group == kv[..., None]).all()
    assert (np.diff(queries) >= 0).all()
    assert set(queries.ravel()) == set(range(num_heads))
    # A rank gets each kv head once, but for the padding.
    assert all((np.diff(heads) > 0).all() for heads in kv if num_kv_heads - 1 not in heads)
    assert layout.collect_queries(spread, 0).tolist() == list(range(num_heads))
    assert 0 <= layout.padding < 1


def gated(q: jax.Array, k: jax.Array, v: jax.Array, gates: jax.Array, *, scales) -> jax.Array:
    """Dense causal attention times a gate per kv head and a scale per query head."""
    out = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    gates = jnp.repeat(gates, q.shape[2] // k.shape[2])
    return out * (gates * scales["of"])[None, None, :, None]


@pytest.mark.parametrize(
    ("heads", "axes"),
    [
        ((9, 3), {"data": 2, "seq": 4}),
        ((9, 3), {"seq": 8}),
        ((8, 2), {"fsdp": 2, "seq": 2, "model": 2}),
        pytest.param((9, 3), {"seq": 2}, marks=pytest.mark.full),
        pytest.param((9, 3), {"seq": 1}, marks=pytest.mark.full),
        pytest.param((4, 4), {"seq": 8}, marks=pytest.mark.full),
        pytest.param((8, 1), {"seq": 4, "data": 2}, marks=pytest.mark.full),
        pytest.param((10, 2), {"model": 2, "seq": 4}, marks=pytest.mark.full),
        pytest.param((9, 3), {"expert": 2, "seq": 2}, marks=pytest.mark.full),
        pytest.param((8, 2), {"data": 2, "seq": 1, "model": 2}, marks=pytest.mark.full),
    ],
    ids=str,
)
def test_values_and_gradients_are_those_of_one_device(
    heads: tuple[int, int], axes: dict[str, int]
) -> None:
    q, k, v = operands(*heads)
    weights, gates, scales = drawn(*q.shape), drawn(heads[1]), {"of": drawn(heads[0])}

    def of_loss(attend):
        def loss(q, k, v, gates, scales):
            out = attend(q, k, v, gates, scales=scales)
            return (weights * out).sum(), out

        grad = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3, 4), has_aux=True))
        return grad(q, k, v, gates, scales)

    jax.tree.map(assert_close, of_loss(wrap(gated, mesh_of(**axes))), of_loss(gated))


def test_a_strategy_selects_as_on_one_device() -> None:
    """XAttention with a threshold for each head, and gradients through it."""
    q, k, v = operands(9, 3)
    weights = drawn(*q.shape)
    options = {"threshold": drawn(9), "stride": 2, "block_size": 4, "backend": "xla"}
    options |= {"kv_lengths": jnp.array([16, 11], jnp.int32), "return_lse": True}
    options["segment_ids"] = jnp.array([[0] * 5 + [1] * 11, [3] * 16], jnp.int32)

    def of_loss(attend):
        def loss(q, k, v):
            out, lse = attend(q, k, v, **options)
            return (weights * out).sum(), (out, lse)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)

    found = of_loss(wrap(xattention_prefill, mesh_of(data=2, seq=4)))
    expected = of_loss(xattention_prefill)
    jax.tree.map(assert_close, found, expected)
    everything = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    last = expected[1][0][1, :11]  # of the sequence that has one segment
    assert np.abs(last - everything[1, :11]).max() > 0.1  # something was left out


def test_head_masks_reach_their_ranks() -> None:
    """More keys than queries, a mask per kv head; ranks share kv heads."""
    q, (_, k, v) = operands(4, 2, 8)[0], operands(4, 2)
    strategy = DuoAttention(
        retrieval=Full(block_size=4),
        retrieval_heads=jnp.array([False, True]),
        sink_size=1,
        recent_size=3,
    )
    found = jax.jit(wrap(prefill_attention, mesh_of(seq=4)))(q, k, v, strategy)
    assert_close(found, prefill_attention(q, k, v, strategy))


def test_a_kv_head_is_sent_once() -> None:
    """To each rank that needs it: of 8 query and 2 kv heads on 4 ranks, half a group to each."""
    q, k, v = operands(8, 2)
    wrapped = wrap(prefill_attention, mesh_of(seq=4))
    sent = [
        equation.invars[0].aval.shape
        for equation, _ in operations(wrapped, q, k, v, Full(block_size=8))
        if equation.primitive.name == "all_to_all"
    ]
    assert sent == [(B, T // 4, 8, H), (B, T // 4, 4, H), (B, T // 4, 4, H), (B, T, 2, H)]


def attend_and_transpose(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jnp.swapaxes(q, 1, 2)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"axes": {"data": 2}}, "seq_axis='seq' is none of the mesh's axes .*'data'.*; name one"),
        ({"batch_axes": ("data", "seq")}, "seq_axis='seq', batch_axes=.* must be different axes"),
        ({"head_axis": "seq"}, "head_axis='seq' must be different axes"),
        ({"explicit": True}, r"axis_types=\(Explicit, Explicit\); all must be AxisType.Auto"),
        ({"length": 6}, "q_len=6 must be a multiple of the 4 ranks of mesh axis 'seq'; pad it"),
        ({"kv_length": 10}, "kv_len=10 must be a multiple of the 4 ranks of mesh axis 'seq'"),
        ({"axes": {"data": 4, "seq": 2}}, r"batch=2 .* of the 4 devices of mesh axes \('data',\)"),
        (
            {"axes": {"model": 2, "seq": 2}},
            "num_kv_heads=3 .* 2 devices of mesh axis 'model'; pass",
        ),
        ({"inputs": [drawn(4)]}, r"inputs\[0\] has shape \(4,\); .* 9, by kv head, 3, or have no"),
        ({"inputs": [1, {"a": drawn(1)}]}, r"inputs\[1\]\['a'\] has shape \(1,\)"),
        ({"options": {"gates": drawn(2, 3)}}, r"gates has shape \(2, 3\); arrays are by query"),
        ({"options": {"kv_lengths": jnp.ones(3, jnp.int32)}}, r"kv_lengths has shape \(3,\)"),
        ({"options": {"segment_ids": jnp.ones(3, jnp.int32)}}, r"segment_ids has shape \(3,\)"),
        (
            {"attend": attend_and_transpose},
            r"attend returned .*\(1, 3, 16, 4\); .* \(1, 16, 3\)",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_refuses(changes: dict, sentence: str) -> None:
    axes = changes.pop("axes", {"data": 2, "seq": 4})
    mesh = mesh_of(**axes)
    if changes.pop("explicit", False):
        mesh = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Explicit,) * 2)
    length = changes.pop("length", T)
    q, k, v = operands(9, 3, length)
    if "kv_length" in changes:
        _, k, v = operands(9, 3, changes.pop("kv_length"))
    inputs, options = changes.pop("inputs", ()), changes.pop("options", {})
    with pytest.raises(ValueError, match=sentence):
        wrap(**{"attend": gated, "mesh": mesh} | changes)(q, k, v, *inputs, **options)


@pytest.mark.parametrize(
    ("numbers", "sentence"),
    [
        ((9, 3, 0), "num_ranks=0 must be at least 1"),
        ((8, 3, 2), "num_heads=8 must be a multiple of num_kv_heads=3"),
    ],
    ids=str,
)
def test_layout_refuses(numbers: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        HeadLayout.of(*numbers)


@pytest.mark.full
def test_a_threshold_for_all_heads_and_a_strategy_of_numbers() -> None:
    """What has no axes goes to all devices, numbers as they are."""
    q, k, v = operands(4, 2)
    wrapped = jax.jit(wrap(prefill_attention, mesh_of(seq=2, data=2)))
    for threshold in (0.5, jnp.float32(0.5)):
        strategy = XAttention(threshold=threshold, stride=2, block_size=4)
        expected = prefill_attention(q, k, v, strategy)
        assert_close(wrapped(q, k, v, strategy), expected)
