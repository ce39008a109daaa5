"""Where parameters, caches and tokens lie on a mesh of devices, by rules for logical axes.

Every dimension of an array has a logical axis by what it counts, and rules say which mesh axes that
is spread over, as in T5X and MaxText (Roberts et al., arXiv:2203.17189, section 3.2). The compiler
splits the computation accordingly, so that a model runs by the same code on one device and on many:

    mesh = create_mesh(fsdp=2, seq=4)
    model = place(model, mesh)
    tokens = jax.device_put(tokens, token_sharding(tokens.shape, mesh))
    logits = jax.jit(model)(tokens, attend=sequence_parallel.wrap(attend, mesh))

The attention is to be wrapped on any mesh of several devices. Kernels cannot be split by the
compiler; spread sequences are attended to by heads; and with q, k and v held in place the compiler
brings each layer's weights to the tokens, where it else sums activations over fsdp.

Logical axes, and what they are spread over by default:

    batch     sequences of a batch                          data, fsdp
    length    tokens of a sequence                          seq
    embed     the residual stream, of weight matrices       fsdp (ZeRO-3, arXiv:1910.02054)
    heads     query heads, whole ones                       model (Megatron-LM, arXiv:1909.08053)
    kv_heads  key/value heads, whole ones                   model
    mlp       the feed-forward layer                        model
    vocab     tokens of the vocabulary                      model
    layers    of stacked parameters                         nothing
    rows      of a cache: (layer, kv head, sequence)        nothing
    slots     of a cache's full heads: tokens               seq, model

Norms and the biases of the residual stream are whole on every device. A size that does not divide
by its devices is refused, as by flax and jax; rules={"kv_heads": None} keeps that axis whole.
"""

import itertools
import math
import types
from collections.abc import Callable, Mapping, Sequence

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sparseattn_jax.checks import check_positive, checked
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.llama import Llama
from sparseattn_jax.models.weights import name_of

type Rules = Mapping[str, str | tuple[str, ...] | None]

MESH_AXES = ("data", "fsdp", "seq", "model")
"""Rules may name these axes on any mesh: one that lacks them is a mesh where their size is 1."""

RULES: Rules = types.MappingProxyType(
    {
        "batch": ("data", "fsdp"),
        "length": "seq",
        "embed": "fsdp",
        "heads": "model",
        "kv_heads": "model",
        "mlp": "model",
        "vocab": "model",
        "layers": None,
        "rows": None,
        "slots": ("seq", "model"),
    }
)
"""Mesh axes by logical axis; the rules that functions here take are used before these."""

_LOGICAL_AXES = {
    "embedding": ("vocab", "embed"),
    "head": ("vocab", "embed"),
    "final_norm.scale": (None,),
    "layers.attention_norm.scale": ("layers", None),
    "layers.attention.query.kernel": ("layers", "embed", "heads"),
    "layers.attention.query.bias": ("layers", "heads"),
    "layers.attention.key.kernel": ("layers", "embed", "kv_heads"),
    "layers.attention.key.bias": ("layers", "kv_heads"),
    "layers.attention.value.kernel": ("layers", "embed", "kv_heads"),
    "layers.attention.value.bias": ("layers", "kv_heads"),
    "layers.attention.output.kernel": ("layers", "heads", "embed"),
    "layers.attention.output.bias": ("layers", None),
    "layers.attention.query_norm.scale": ("layers", None),
    "layers.attention.key_norm.scale": ("layers", None),
    "layers.mlp_norm.scale": ("layers", None),
    "layers.mlp.gate.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.gate.bias": ("layers", "mlp"),
    "layers.mlp.up.kernel": ("layers", "embed", "mlp"),
    "layers.mlp.up.bias": ("layers", "mlp"),
    "layers.mlp.down.kernel": ("layers", "mlp", "embed"),
    "layers.mlp.down.bias": ("layers", None),
}
_CACHE_AXES = {
    "full_k": ("rows", "slots", None),
    "full_v": ("rows", "slots", None),
    "ring_k": ("rows", None, None),
    "ring_v": ("rows", None, None),
    "bounds.key_min": ("rows", None, None, None),
    "bounds.key_max": ("rows", None, None, None),
}


def _check_sizes(
    data: int,
    fsdp: int,
    seq: int,
    model: int,
    devices: Sequence[jax.Device] | None,  # pyright: ignore[reportInvalidTypeForm]
) -> None:
    check_positive(data=data, fsdp=fsdp, seq=seq, model=model)
    count, needed = len(jax.devices() if devices is None else devices), data * fsdp * seq * model
    if needed != count:
        raise ValueError(
            f"data={data}, fsdp={fsdp}, seq={seq} and model={model} make {needed} devices, of "
            f"{count} given; choose sizes that make {count}, or pass {needed} devices"
        )


@checked(_check_sizes)
def create_mesh(
    *,
    data: int = 1,
    fsdp: int = 1,
    seq: int = 1,
    model: int = 1,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """A mesh with all of MESH_AXES.

    Args:
        data: groups of devices that have whole copies of the parameters and sequences of their own.
        fsdp: devices that share the parameters of such a copy, each with sequences of its own.
        seq: devices that share each sequence.
        model: devices that share heads and the feed-forward layer.
        devices: by default all.

    Raises:
        ValueError: the sizes do not make the number of devices.
    """
    return jax.make_mesh(
        (data, fsdp, seq, model),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
        devices=devices,
    )


def logical_axes(path: str) -> tuple[str | None, ...]:
    """The logical axis of each dimension of a parameter, None for one that is never spread.

    Args:
        path: of the parameter in the model, as `layers.attention.key.kernel`.

    Raises:
        ValueError: the model has no such parameter.
    """
    if path not in _LOGICAL_AXES:
        raise ValueError(f"path={path!r} is no parameter of Llama; they are {list(_LOGICAL_AXES)}")
    return _LOGICAL_AXES[path]


def shardings(
    config: LlamaConfig, mesh: Mesh, rules: Rules | None = None
) -> Callable[[str, tuple[int, ...]], NamedSharding]:
    """Where the parameters of a model lie: what `hf_weights.load` takes as its `shardings`.

    Args:
        config: the model's; heads are spread as whole ones.
        mesh: the devices.
        rules: mesh axes by logical axis, where they are not those of RULES.

    Returns:
        From a parameter's path, as `layers.attention.key.kernel`, and its shape to its sharding;
        raises a ValueError if they do not divide by the devices.

    Raises:
        ValueError: rules name an axis that is not known.
    """
    mesh_axes = _mesh_axes(mesh, rules)
    units = {"heads": config.head_dim, "kv_heads": config.head_dim}

    def sharding(path: str, shape: tuple[int, ...]) -> NamedSharding:
        axes = logical_axes(path)
        sizes = [size // units.get(axis or "", 1) for axis, size in zip(axes, shape, strict=True)]
        return _sharding(path, axes, sizes, mesh, mesh_axes)

    return sharding


def place(model: Llama, mesh: Mesh, rules: Rules | None = None) -> Llama:
    """The model with its parameters on the mesh; arguments and errors as of `shardings`."""
    sharding = shardings(model.config, mesh, rules)
    graphdef, state = nnx.split(model)
    placed = jax.tree.map_with_path(
        lambda key, leaf: jax.device_put(leaf, sharding(name_of(key), leaf.shape)),
        nnx.to_pure_dict(state),
    )
    return nnx.merge(graphdef, nnx.State(placed))


def cache_shardings(cache: KVCache, mesh: Mesh, rules: Rules | None = None) -> KVCache:
    """Where a cache lies, for `jax.device_put`, or for the `out_shardings` of what creates it.

    The tokens of full heads are spread, so that a cache may be larger than a device. That is of
    use for memory alone: at every new token each layer's keys and values are brought to all
    devices. Rings are short, and whole on every device.

    Args:
        cache: or its shapes, as by `jax.eval_shape`.
        mesh: the devices.
        rules: mesh axes by logical axis, where they are not those of RULES.

    Returns:
        A sharding in place of each array.

    Raises:
        ValueError: rules name an axis that is not known, or slots or rows do not divide by the
            devices.
    """
    mesh_axes = _mesh_axes(mesh, rules)

    def of_leaf(key: tuple, leaf: jax.Array | jax.ShapeDtypeStruct) -> NamedSharding:
        axes = _CACHE_AXES.get(name_of(key), (None,) * len(leaf.shape))
        return _sharding(f"cache.{name_of(key)}", axes, leaf.shape, mesh, mesh_axes)

    return jax.tree.map_with_path(of_leaf, cache)


def token_sharding(shape: tuple[int, int], mesh: Mesh, rules: Rules | None = None) -> NamedSharding:
    """Where tokens [B, T] lie, for `jax.device_put`.

    Raises:
        ValueError: rules name an axis that is not known, or a size does not divide by the devices.
    """
    return _sharding("tokens", ("batch", "length"), shape, mesh, _mesh_axes(mesh, rules))


def _mesh_axes(mesh: Mesh, rules: Rules | None) -> dict[str, tuple[str, ...]]:
    """The axes of this mesh by logical axis."""
    if unknown := sorted({*(rules or {})} - {*RULES}):
        raise ValueError(f"rules name {unknown[0]!r}, which is none of {list(RULES)}")
    found = {}
    for logical, value in {**RULES, **(rules or {})}.items():
        named = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        for axis in named:
            if axis not in mesh.shape and axis not in MESH_AXES:
                raise ValueError(
                    f"rules[{logical!r}] names {axis!r}, which is none of the mesh's axes "
                    f"{mesh.axis_names}"
                )
        found[logical] = tuple(axis for axis in named if axis in mesh.shape)
    return found


def _sharding(
    what: str,
    axes: Sequence[str | None],
    sizes: Sequence[int],
    mesh: Mesh,
    mesh_axes: Mapping[str, tuple[str, ...]],
) -> NamedSharding:
    """By the logical axes of an array's dimensions, and the sizes that the devices must divide."""
    parts = [() if axis is None else mesh_axes[axis] for axis in axes]
    for axis, size, part in zip(axes, sizes, parts, strict=True):
        count = math.prod(mesh.shape[name] for name in part)
        if size % count:
            raise ValueError(
                f"{what} has {size} {axis}, which do not divide by the {count} devices of mesh "
                f"axes {part}; pass rules={{{axis!r}: None}} to keep them whole on every device, "
                "or another mesh"
            )
    named = list(itertools.chain.from_iterable(parts))
    if twice := {name for name in named if named.count(name) > 1}:
        raise ValueError(
            f"{what} has the axes {tuple(axes)}, of which rules spread two over mesh axis "
            f"{min(twice)!r}; spread them over different ones"
        )
    return NamedSharding(mesh, PartitionSpec(*(part or None for part in parts)))
