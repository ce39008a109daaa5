"""What every layer and head attends to in generation: in the prompt, and then token by token."""

import dataclasses
import itertools
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int32

from sparseattn_jax.attention import prefill_attention
from sparseattn_jax.cached_decode import decode_attention
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.decode import QuestPages
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models.attention import LayerRun
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.strategies.duo_attention import DuoAttention
from sparseattn_jax.strategies.full import Full
from sparseattn_jax.strategies.protocol import Strategy
from sparseattn_jax.strategies.streaming import Streaming
from sparseattn_jax.windows import check_window

type PrefillAttention = Callable[..., Float[Array, "B T N H"]]
"""As `prefill_attention`: of q, k, v and a strategy, with kv_lengths by name."""

_CHECKED_LENGTH = 128


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """A strategy for every layer, and what follows from it for the cache and for new tokens.

    Strategies choose what the queries of a prompt see, in its first chunk as in all others. Heads
    whose window is exact to the token, those of `Streaming(exact=True)`, the streaming heads of
    `DuoAttention` and layers with a sliding window, keep no more than the window in the cache; all
    other heads keep everything. A new token sees all that its head keeps, or of that which is
    everything the pages that it chooses.

    Consecutive layers whose strategies differ in numbers alone are one run: one traced program,
    which gets the layer's own numbers, as thresholds and head masks, as scanned inputs.

    Attributes:
        strategies: of each run; the first axis of its arrays is over the run's layers.
        run_lengths: layers of each run.
        is_full: which kv heads keep everything.
        window: sink_size and recent_size of all the others, None if there are none.
        pages: how new tokens choose pages of what is kept, None for all of it.
        page_size: tokens per page, None without pages.
    """

    strategies: tuple[Strategy, ...]
    run_lengths: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    is_full: Bool[np.ndarray, "L K"]
    window: tuple[int, int] | None = dataclasses.field(metadata={"static": True})
    pages: QuestPages | None
    page_size: int | None = dataclasses.field(metadata={"static": True})

    @staticmethod
    def of(
        config: LlamaConfig,
        configuration: Configuration | None = None,
        *,
        head_masks: Bool[np.ndarray, "L K"] | None = None,
        sink_size: int = 128,
        recent_size: int = 1024,
        pages: QuestPages | None = None,
        page_size: int = 64,
    ) -> "Policy":
        """The policy of a model.

        Args:
            config: the model's.
            configuration: a strategy for all layers and others for single ones, by default Full.
                Layers with a sliding window keep it, whatever is said for all.
            head_masks: which kv heads see what the strategy of their layer selects; the others
                stream. `sparseattn_jax/head_gates.py` reads such masks.
            sink_size: first keys that these streaming heads see.
            recent_size: keys up to each query's own that they see.
            pages: how new tokens choose pages of the heads that keep everything, by default all.
            page_size: tokens per page; read with pages.

        Raises:
            ValueError: something does not fit the model or is out of range, or heads have exact
                windows of several sizes, which one cache cannot keep.
        """
        layers = _of_layers(config, configuration)
        for index, strategy in enumerate(layers):
            if index == 0 or strategy is not layers[index - 1]:
                _check_parameters(config, index, strategy)
        if head_masks is not None:
            check_window(sink_size, recent_size, is_causal=True)
            _check_head_masks(config, layers, head_masks)
            layers = [
                DuoAttention(
                    retrieval=strategy,
                    retrieval_heads=jnp.asarray(heads),
                    sink_size=sink_size,
                    recent_size=recent_size,
                )
                for strategy, heads in zip(layers, head_masks, strict=True)
            ]
        windows = {index: found for index, x in enumerate(layers) if (found := _window(x))}
        is_full = np.stack([_full_heads(config, *layer) for layer in enumerate(layers)])
        runs = [list(run) for _, run in itertools.groupby(map(_arrays, layers), key=_structure)]
        return Policy(
            strategies=tuple(jax.tree.map(lambda *x: jnp.stack(x), *run) for run in runs),
            run_lengths=tuple(len(run) for run in runs),
            is_full=is_full,
            window=_common(windows),
            pages=pages,
            page_size=None if pages is None else page_size,
        )

    def create_cache(
        self, config: LlamaConfig, *, batch: int, capacity: int, dtype: DTypeLike | None = None
    ) -> KVCache:
        """An empty cache.

        Args:
            config: the model's.
            batch: sequences.
            capacity: tokens that each can have.
            dtype: of keys and values, by default that of the model's computation.
        """
        sink_size, recent_size = self.window or (0, 1)
        return KVCache.create(
            num_layers=config.num_layers,
            batch=batch,
            capacity=capacity,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype if dtype is None else dtype,
            is_full=np.asarray(self.is_full),
            sink_size=sink_size,
            recent_size=recent_size,
            page_size=self.page_size,
        )

    def prefill_runs(
        self,
        num_new: Int32[Array, " B"],
        *,
        length: int,
        attention: PrefillAttention = prefill_attention,
    ) -> tuple[LayerRun, ...]:
        """How the layers attend in a chunk of a prompt, which they append to the cache.

        Args:
            num_new: tokens of each sequence in the chunk; what follows them is padding.
            length: of the prompt up to the chunk's end.
            attention: by a strategy; on several devices prefill_attention wrapped by
                `sequence_parallel.wrap`.
        """

        def attend(
            q: Float[Array, "B T N H"],
            k: Float[Array, "B T K H"],
            v: Float[Array, "B T K H"],
            strategy: Strategy,
            cache: KVCache,
            layer: Int32[Array, ""],
            /,
        ) -> tuple[Float[Array, "B T N H"], KVCache]:
            cache, keys, values = cache.extend(layer, k, v, num_new, length=length)
            out = attention(q, keys, values, strategy, kv_lengths=cache.lengths + num_new)
            return out, cache

        return tuple(
            LayerRun(num_layers=num_layers, attend=attend, per_layer=strategy)
            for num_layers, strategy in zip(self.run_lengths, self.strategies, strict=True)
        )


def decode_runs(
    config: LlamaConfig, num_new: Int32[Array, " B"], pages: QuestPages | None
) -> tuple[LayerRun, ...]:
    """How the layers attend at a new token, which they append to the cache.

    The strategies have no part in it, so that one program serves many policies.

    Args:
        config: the model's.
        num_new: 1 for the sequences that take the token, 0 for those that do not; what these attend
            to is of no meaning.
        pages: of the policy whose cache it is.
    """

    def attend(
        q: Float[Array, "B 1 N H"],
        k: Float[Array, "B 1 K H"],
        v: Float[Array, "B 1 K H"],
        layer_input: None,
        cache: KVCache,
        layer: Int32[Array, ""],
        /,
    ) -> tuple[Float[Array, "B 1 N H"], KVCache]:
        cache = cache.append(layer, k, v, num_new)
        return decode_attention(q, cache, layer, pages=pages), cache

    return (LayerRun(num_layers=config.num_layers, attend=attend),)


def _of_layers(config: LlamaConfig, configuration: Configuration | None) -> list[Strategy]:
    """The strategy of each layer, before head masks."""
    named: Mapping[int, Strategy] = {} if configuration is None else configuration.layers
    sliding = set(config.sliding_layers)
    for index in named:
        if index >= config.num_layers:
            raise ValueError(
                f"layers: {index} is none of the model, whose {config.num_layers} layers are "
                f"counted from 0; leave it out"
            )
        if index in sliding:
            raise ValueError(
                f"layers: layer {index} has a sliding window of {config.sliding_window} tokens, "
                "which it was trained with; leave it out"
            )
    if configuration is not None and len(sliding) == config.num_layers:
        raise ValueError(
            f"strategy: all {config.num_layers} layers of the model have sliding windows of "
            f"{config.sliding_window} tokens, which they keep; pass no strategy"
        )
    windows = Streaming(sink_size=0, recent_size=config.sliding_window or 1, exact=True)
    others = Full() if configuration is None else configuration.strategy
    return [
        windows if index in sliding else named.get(index, others)
        for index in range(config.num_layers)
    ]


def _check_head_masks(
    config: LlamaConfig, layers: Sequence[Strategy], head_masks: np.ndarray
) -> None:
    wanted = config.num_layers, config.num_kv_heads
    if head_masks.shape != wanted or head_masks.dtype != np.bool_:
        raise ValueError(
            f"head_masks has shape {head_masks.shape} and dtype {head_masks.dtype}; this model has "
            f"{wanted[0]} layers with {wanted[1]} kv heads: pass bool of shape {wanted}"
        )
    if config.sliding_layers:
        raise ValueError(
            f"head_masks do not go with sliding windows, which layers "
            f"{', '.join(map(str, config.sliding_layers))} of this model have: their heads stream "
            "already; pass no masks"
        )
    for index, strategy in enumerate(layers):
        if _window(strategy):
            raise ValueError(
                f"head_masks do not go with {type(strategy).__name__} in layer {index}, which says "
                "itself which heads stream; pass one of them"
            )


def _window(strategy: Strategy) -> tuple[int, int] | None:
    """The sizes of exact windows that heads of this strategy have."""
    if isinstance(strategy, DuoAttention) or (isinstance(strategy, Streaming) and strategy.exact):
        return strategy.sink_size, strategy.recent_size
    return None


def _common(windows: Mapping[int, tuple[int, int]]) -> tuple[int, int] | None:
    """The one size of windows of all layers that have them."""
    first = next(iter(windows.items()), None)
    for index, window in windows.items():
        if first is not None and window != first[1]:
            raise ValueError(
                f"sink_size and recent_size are {first[1]} in layer {first[0]} and {window} in "
                f"layer {index}; the cache keeps windows of one size: give all layers the same"
            )
    return None if first is None else first[1]


def _full_heads(config: LlamaConfig, index: int, strategy: Strategy) -> Bool[np.ndarray, " K"]:
    """Which kv heads of a layer keep everything."""
    if not isinstance(strategy, DuoAttention):
        return np.full(config.num_kv_heads, _window(strategy) is None)
    heads = np.asarray(strategy.retrieval_heads).reshape(config.num_kv_heads, -1)
    if (heads != heads[:, :1]).any():
        raise ValueError(
            f"layers: retrieval_heads of layer {index} differ among query heads that share a kv "
            f"head, which the cache keeps as a whole; give one for each of the "
            f"{config.num_kv_heads} kv heads"
        )
    return heads[:, 0]


def _check_parameters(config: LlamaConfig, index: int, strategy: Strategy) -> None:
    """Raises what the strategy would raise, were its numbers not traced in a scan."""

    def shape(num_heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, _CHECKED_LENGTH, num_heads, config.head_dim), config.dtype)

    try:
        jax.eval_shape(strategy.select, shape(config.num_heads), shape(config.num_kv_heads))
    except ValueError as error:
        raise ValueError(f"{type(strategy).__name__} of layer {index}: {error}") from error


def _arrays(strategy: Strategy) -> Strategy:
    """With arrays for numbers, so that they can be stacked."""

    def array(leaf: Any) -> np.ndarray:
        number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        return np.asarray(leaf, np.float32 if number else None)

    return jax.tree.map(array, strategy)


def _structure(strategy: Strategy) -> tuple:
    leaves, structure = jax.tree.flatten(strategy)
    return structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves)
