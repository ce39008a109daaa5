"""Generation: prompts by chunks, then token by token, many steps in each call of the device."""

import dataclasses
import functools
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float32, Int32, Key, PyTree

from sparseattn_jax.attention import prefill_attention
from sparseattn_jax.checks import check_positive
from sparseattn_jax.decode import QuestPages
from sparseattn_jax.kv_cache import KVCache
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.llama import Llama
from sparseattn_jax.models.policy import Policy, PrefillAttention, decode_runs
from sparseattn_jax.models.prefill import CHUNK_SIZE, prefill
from sparseattn_jax.models.sampling import Sampling, sample

_STEPS_PER_CALL = 64
_CAPACITY_STEP = 128

type Tokens = Int32[Array, "B steps"]


@dataclasses.dataclass(frozen=True)
class Generated:
    """Tokens that follow prompts.

    Attributes:
        tokens: of each sequence, then padding.
        lengths: how many are real; the last one is a stop token if the sequence ended by one.
    """

    tokens: Int32[np.ndarray, "B T"]
    lengths: Int32[np.ndarray, " B"]


class Options(TypedDict, total=False):
    """What `generate` takes by name; see `stream`."""

    policy: Policy | None
    sampling: Sampling
    stop_tokens: Sequence[int]
    pad_token: int
    key: Key[Array, ""] | None
    capacity: int | None
    chunk_size: int
    attention: PrefillAttention


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    **options: Unpack[Options],
) -> Generated:
    """The continuations of prompts, max_new_tokens wide; arguments and errors as of `stream`."""
    pieces = list(
        stream(
            model,
            prompts,
            max_new_tokens=max_new_tokens,
            steps_per_call=_STEPS_PER_CALL,
            **options,
        )
    )
    tokens = np.concatenate([piece.tokens for piece in pieces], axis=1)
    missing = max_new_tokens - tokens.shape[1]
    padding = ((0, 0), (0, missing))
    return Generated(
        tokens=np.pad(tokens, padding, constant_values=options.get("pad_token", 0)),
        lengths=np.sum([piece.lengths for piece in pieces], axis=0, dtype=np.int32),
    )


def stream(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    policy: Policy | None = None,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    pad_token: int = 0,
    key: Key[Array, ""] | None = None,
    capacity: int | None = None,
    chunk_size: int = CHUNK_SIZE,
    attention: PrefillAttention = prefill_attention,
    steps_per_call: int = 8,
    report: Callable[[int], None] | None = None,
) -> Iterator[Generated]:
    """The continuations of prompts as they come: the first tokens, then pieces of a few steps.

    The pieces, side by side, are what `generate` returns, whatever their size. What is drawn for a
    sequence depends on the key, its place in the batch and its logits alone. Programs are kept,
    those of prompts by the model's shape, the policy's structure, the batch, the capacity and the
    chunks, those of new tokens by the same but strategies and chunks.

    Args:
        model: the model.
        prompts: token ids of each sequence, of any lengths.
        max_new_tokens: tokens to generate at most.
        policy: what the layers attend to, by default everything.
        sampling: how tokens are chosen, by default the most probable one.
        stop_tokens: a sequence ends with the first of these, which is part of it.
        pad_token: what follows in sequences that ended before others.
        key: of the random numbers; needed if the sampling has a temperature.
        capacity: of the cache, by default what is needed, rounded up by up to a sixteenth, or to a
            multiple of 128, so that few programs are compiled.
        chunk_size: see `prefill`.
        attention: of the prompts, see `prefill`.
        steps_per_call: tokens of each sequence in a piece; each piece costs a call of the device.
        report: is told how many tokens of the longest prompt are done, after each chunk.

    Raises:
        ValueError: an argument is out of range, or the prompts and the new tokens exceed the cache
            or what the model was made for.
    """
    check_positive(max_new_tokens=max_new_tokens, steps_per_call=steps_per_call)
    tokens, lengths = _padded(prompts, model.config)
    longest = tokens.shape[1] + max_new_tokens
    _check_room(longest, max_new_tokens, capacity, model.config)
    sampling = Sampling() if sampling is None else sampling
    if key is None and sampling.temperature is not None:
        raise ValueError(
            f"temperature={sampling.temperature} draws tokens; pass key=jax.random.key(seed)"
        )
    keys = jax.random.split(jax.random.key(0) if key is None else key, len(tokens))
    policy = Policy.of(model.config) if policy is None else policy
    return _pieces(
        *(model, tokens, lengths, policy, keys),
        _Rules(
            sampling=sampling,
            stop_tokens=jnp.asarray(stop_tokens, jnp.int32),
            pad_token=jnp.asarray(pad_token, jnp.int32),
            max_new_tokens=jnp.asarray(max_new_tokens, jnp.int32),
        ),
        capacity=_capacity(longest) if capacity is None else capacity,
        chunk_size=chunk_size,
        attention=attention,
        steps_per_call=steps_per_call,
        report=report,
    )


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers and shapes
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rules:
    """How sequences go on and end."""

    sampling: Sampling
    stop_tokens: Int32[Array, " stops"]
    pad_token: Int32[Array, ""]
    max_new_tokens: Int32[Array, ""]


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers and shapes
@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """Where sequences are: the tokens before `last` are in the cache."""

    cache: KVCache
    last: Int32[Array, " B"]
    is_done: Bool[Array, " B"]
    num_steps: Int32[Array, ""]


type _Carry = tuple[_State, Tokens, Int32[Array, " B"]]


def _pieces(
    model: Llama,
    tokens: Int32[np.ndarray, "B T"],
    lengths: Int32[np.ndarray, " B"],
    policy: Policy,
    keys: Key[Array, " B"],
    rules: _Rules,
    *,
    capacity: int,
    chunk_size: int,
    attention: PrefillAttention,
    steps_per_call: int,
    report: Callable[[int], None] | None,
) -> Iterator[Generated]:
    cache = policy.create_cache(model.config, batch=len(tokens), capacity=capacity)
    logits, cache = prefill(
        *(model, tokens, lengths, cache, policy),
        chunk_size=chunk_size,
        attention=attention,
        report=report,
    )
    state, is_over = _started(cache, logits, rules, keys)
    del cache, logits
    # A copy, since the array is donated with the state.
    yield Generated(np.array(state.last)[:, None], np.ones(len(tokens), np.int32))
    graphdef, params = nnx.split(model)
    while not is_over:
        state, new_tokens, counts, is_over = _steps(
            graphdef, params, state, policy.pages, rules, keys, steps_per_call=steps_per_call
        )
        counts = np.asarray(counts)
        yield Generated(np.asarray(new_tokens)[:, : counts.max()], counts)


@functools.partial(jax.jit, donate_argnames="cache")
def _started(
    cache: KVCache, logits: Float32[Array, "B V"], rules: _Rules, keys: Key[Array, " B"]
) -> tuple[_State, Bool[Array, ""]]:
    """After the first tokens, and whether they are the last ones."""
    num_steps = jnp.zeros((), jnp.int32)
    tokens = _chosen(logits, rules, keys, num_steps)
    is_done = jnp.isin(tokens, rules.stop_tokens)
    state = _State(cache=cache, last=tokens, is_done=is_done, num_steps=num_steps + 1)
    return state, _is_over(state, rules)


@functools.partial(jax.jit, static_argnames=("graphdef", "steps_per_call"), donate_argnames="state")
def _steps(
    graphdef: nnx.GraphDef,
    params: PyTree,
    state: _State,
    pages: QuestPages | None,
    rules: _Rules,
    keys: Key[Array, " B"],
    *,
    steps_per_call: int,
) -> tuple[_State, Tokens, Int32[Array, " B"], Bool[Array, ""]]:
    """As many steps, or fewer if it is over before; how many tokens each sequence got."""
    model = nnx.merge(graphdef, params)

    def goes_on(carry: _Carry) -> Bool[Array, ""]:
        state, _, counts = carry
        return (counts.max() < steps_per_call) & ~_is_over(state, rules)

    def step(carry: _Carry) -> _Carry:
        state, tokens, counts = carry
        num_new = (~state.is_done).astype(jnp.int32)
        hidden, cache = model.cached_hidden_states(
            state.last[:, None],
            state.cache,
            runs=decode_runs(model.config, num_new, pages),
            positions=state.cache.lengths[:, None],
        )
        logits = model.logits(hidden)[:, 0]
        new = _chosen(logits, rules, keys, state.num_steps)
        new = jnp.where(state.is_done, rules.pad_token, new)
        state = _State(
            cache=cache.advance(num_new),
            last=new,
            is_done=state.is_done | jnp.isin(new, rules.stop_tokens),
            num_steps=state.num_steps + 1,
        )
        # One sequence at least has got a token in each step.
        return state, tokens.at[:, counts.max()].set(new), counts + num_new

    counts = jnp.zeros_like(state.last)
    tokens = jnp.broadcast_to(rules.pad_token, (len(counts), steps_per_call))
    state, tokens, counts = lax.while_loop(goes_on, step, (state, tokens, counts))
    return state, tokens, counts, _is_over(state, rules)


def _is_over(state: _State, rules: _Rules) -> Bool[Array, ""]:
    return state.is_done.all() | (state.num_steps >= rules.max_new_tokens)


def _chosen(
    logits: Float32[Array, "B V"],
    rules: _Rules,
    keys: Key[Array, " B"],
    num_steps: Int32[Array, ""],
) -> Int32[Array, " B"]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, num_steps)
    return sample(logits, rules.sampling, keys)


def _padded(
    prompts: Sequence[Sequence[int]], config: LlamaConfig
) -> tuple[Int32[np.ndarray, "B T"], Int32[np.ndarray, " B"]]:
    """Prompts as rows with padding on the right, and their lengths."""
    if not len(prompts):
        raise ValueError("prompts is empty; pass the tokens of one sequence at least")
    for number, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompts[{number}] is empty; it must have one token at least")
        least, most = min(prompt), max(prompt)
        if least < 0 or most >= config.vocab_size:
            raise ValueError(
                f"prompts[{number}] has token ids from {least} to {most}; the model has "
                f"vocab_size={config.vocab_size}"
            )
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), lengths.max()), np.int32)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[: len(prompt)] = prompt
    return tokens, lengths


def _check_room(
    longest: int, max_new_tokens: int, capacity: int | None, config: LlamaConfig
) -> None:
    limits = {"max_position": config.max_position, "capacity": capacity}
    meanings = {"max_position": "the model was made for", "capacity": "the cache is for"}
    for name, limit in limits.items():
        if limit is not None and longest > limit:
            raise ValueError(
                f"the longest prompt has {longest - max_new_tokens} tokens, which with "
                f"max_new_tokens={max_new_tokens} exceed the {name}={limit} that {meanings[name]}; "
                "shorten them"
            )


def _capacity(length: int) -> int:
    """The length, rounded up so that there are few different ones."""
    step = max(_CAPACITY_STEP, 2 ** (length - 1).bit_length() // 32)
    return -(-length // step) * step
