"""Generation equals a dense simulation, token by token; how sequences end; what is drawn."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparseattn_jax import Full, QuestPages, models
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.models import decoding
from sparseattn_jax.models.decoding import Generated, generate, stream
from sparseattn_jax.models.policy import Policy
from sparseattn_jax.models.sampling import Sampling
from tests.models.small_models import (
    CAPACITY,
    CHUNK_SIZE,
    CONFIG,
    MASKS,
    POLICIES,
    STREAMING,
    WINDOW,
    drawn,
    prompts,
    simulated,
)

PROMPTS = prompts(21, 3, 10)
NUM_NEW = 14  # the rings, of 5 tokens, go round twice
NEVER = (-1, -2, -3)
WARM = Sampling(temperature=1.5, top_k=20)
OPTIONS = {
    "max_new_tokens": NUM_NEW,
    "policy": STREAMING,
    "stop_tokens": NEVER,
    "capacity": CAPACITY,
    "chunk_size": CHUNK_SIZE,
}


def continued(**options) -> Generated:
    return generate(drawn()[0], PROMPTS, **(OPTIONS | options))


@functools.cache
def greedy() -> np.ndarray:
    found = continued()
    np.testing.assert_array_equal(found.lengths, NUM_NEW)
    return found.tokens


@pytest.mark.parametrize(
    "name", [pytest.param("everything", marks=pytest.mark.full), "streaming", "sliding"]
)
def test_tokens_are_those_of_the_simulation(name: str) -> None:
    expected = {name: [simulated(name, x, NUM_NEW)[0] for x in PROMPTS] for name in POLICIES}
    found = continued(policy=POLICIES[name])
    np.testing.assert_array_equal(found.tokens, expected[name])
    # The windows matter, and the model does not just repeat itself.
    assert expected["streaming"] != expected["everything"] != expected["sliding"]
    assert len({token for row in expected[name] for token in row}) > 5


@pytest.mark.parametrize("steps_per_call", [4, pytest.param(1, marks=pytest.mark.full)])
def test_pieces_are_the_same_tokens(steps_per_call: int) -> None:
    options = OPTIONS | {"steps_per_call": steps_per_call}
    pieces = list(stream(drawn()[0], PROMPTS, **options))
    widths = [piece.tokens.shape[1] for piece in pieces]
    assert widths[0] == 1 and set(widths[1:-1]) == {steps_per_call} and sum(widths) == NUM_NEW
    assert all((piece.lengths == width).all() for piece, width in zip(pieces, widths, strict=True))
    np.testing.assert_array_equal(np.concatenate([x.tokens for x in pieces], axis=1), greedy())


def until(rows: np.ndarray, stop: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows up to the first stop token of each, and how long that is."""
    lengths = [row.index(stop) + 1 if stop in row else len(row) for row in rows.tolist()]
    is_kept = np.arange(rows.shape[1])[None] < np.array(lengths)[:, None]
    return np.where(is_kept, rows, pad), np.array(lengths)


@pytest.mark.parametrize(("row", "place"), [(0, 6), (1, 0)], ids=["later", "at-once"])
def test_a_sequence_ends_by_itself(row: int, place: int) -> None:
    """The others go on unchanged."""
    stop = int(greedy()[row, place])
    found = continued(stop_tokens=(stop, -1, -2), pad_token=28)
    tokens, lengths = until(greedy(), stop, 28)
    assert lengths[row] <= place + 1 and len(set(lengths.tolist())) > 1
    np.testing.assert_array_equal(found.lengths, lengths)
    np.testing.assert_array_equal(found.tokens, tokens)


def test_all_sequences_may_end_early() -> None:
    stops = greedy()[:, 2].tolist()
    options = OPTIONS | {"stop_tokens": stops, "steps_per_call": 4}
    pieces = list(stream(drawn()[0], PROMPTS, **options))
    lengths = np.sum([piece.lengths for piece in pieces], axis=0)
    assert lengths.max() <= 3 and sum(piece.tokens.shape[1] for piece in pieces) == lengths.max()
    found = continued(stop_tokens=stops, pad_token=7)
    assert found.tokens.shape == (3, NUM_NEW)
    np.testing.assert_array_equal(found.lengths, lengths)
    assert all((row[length:] == 7).all() for row, length in zip(found.tokens, lengths, strict=True))


def test_one_token_needs_no_step() -> None:
    found = continued(max_new_tokens=1)
    np.testing.assert_array_equal(found.tokens, greedy()[:, :1])


def test_what_is_drawn_is_of_the_key() -> None:
    def drawn_by(seed: int) -> np.ndarray:
        return continued(sampling=WARM, key=jax.random.key(seed)).tokens

    np.testing.assert_array_equal(drawn_by(0), drawn_by(0))
    assert (drawn_by(0) != drawn_by(1)).any()
    assert (drawn_by(0) != greedy()).any()


@pytest.mark.full
def test_what_is_drawn_is_not_of_the_pieces() -> None:
    options = OPTIONS | {"sampling": WARM, "key": jax.random.key(0)}
    pieces = [piece.tokens for piece in stream(drawn()[0], PROMPTS, steps_per_call=4, **options)]
    whole = generate(drawn()[0], PROMPTS, **options).tokens
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


@pytest.mark.full
def test_a_small_nucleus_is_greedy() -> None:
    sampling = Sampling(temperature=1.0, top_p=1e-6)
    found = continued(sampling=sampling, key=jax.random.key(0))
    np.testing.assert_array_equal(found.tokens, greedy())


@pytest.mark.full
def test_pages_that_hold_everything_change_nothing() -> None:
    policy = Policy.of(
        CONFIG,
        Configuration(strategy=Full(block_size=8)),
        head_masks=MASKS,
        pages=QuestPages(top_k=8),
        page_size=8,
        **WINDOW,
    )
    np.testing.assert_array_equal(continued(policy=policy).tokens, greedy())
    few = dataclasses.replace(policy, pages=QuestPages(top_k=2))
    assert (continued(policy=few).tokens != greedy()).any()


def test_nothing_is_traced_again_for_calls_of_the_same_shapes(monkeypatch) -> None:
    greedy()
    traces = []

    def traced(self, tokens, *args, **options):
        traces.append(tokens.shape)
        return original(self, tokens, *args, **options)

    original = models.Llama.cached_hidden_states
    monkeypatch.setattr(models.Llama, "cached_hidden_states", traced)
    options = {"max_new_tokens": 3, "pad_token": 5, "stop_tokens": (8, 9, 10)}
    options = OPTIONS | {"policy": jax.tree.map(jnp.copy, STREAMING)} | options
    generate(nnx.clone(drawn()[0]), prompts(18, 21, 1, seed=1), **options)
    assert traces == []
    generate(drawn()[0], prompts(5, 5), **(options | {"max_new_tokens": 1}))
    assert traces == [(2, CHUNK_SIZE)]


def test_the_cache_is_changed_in_place() -> None:
    graphdef, params = nnx.split(drawn()[0])
    cache = jax.eval_shape(lambda: STREAMING.create_cache(CONFIG, batch=3, capacity=8192))
    of_batch = jax.ShapeDtypeStruct((3,), jnp.int32)
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = decoding._State(
        cache=cache,
        last=of_batch,
        is_done=jax.ShapeDtypeStruct((3,), jnp.bool),
        num_steps=scalar,
    )
    rules = decoding._Rules(
        sampling=Sampling(), stop_tokens=of_batch, pad_token=scalar, max_new_tokens=scalar
    )
    keys = jax.random.split(jax.random.key(0), 3)
    lowered = decoding._steps.lower(graphdef, params, state, None, rules, keys, steps_per_call=4)
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= cache.memory_usage()
    assert memory.temp_size_in_bytes < cache.memory_usage() / 4  # not even a copy of one pool


def test_capacities_are_few_and_little_larger() -> None:
    lengths = range(1, 10_000)
    found = [decoding._capacity(length) for length in lengths]
    assert all(
        length <= capacity <= max(length * 17 / 16, length + 127)
        for length, capacity in zip(lengths, found, strict=True)
    )
    assert len(set(found)) < 60
    assert decoding._capacity(131_072 + 100) == 131_072 + 8192


LIMITED = dataclasses.replace(CONFIG, max_position=30)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, r"prompts\[1\] is empty"),
        ({"prompts": [[1, 29]]}, r"prompts\[0\] has token ids from 1 to 29; .* vocab_size=29"),
        ({"prompts": [[-1, 2]]}, r"prompts\[0\] has token ids from -1 to 2"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"steps_per_call": 0}, "steps_per_call=0 must be at least 1"),
        (
            {"capacity": 30},
            "the longest prompt has 21 tokens, which with max_new_tokens=14 exceed the capacity=30",
        ),
        (
            {"config": LIMITED, "capacity": None},
            "exceed the max_position=30 that the model was made for; shorten them",
        ),
        (
            {"sampling": Sampling(temperature=0.5)},
            r"temperature=0.5 draws tokens; pass key=jax.random.key\(seed\)",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_refuses(changes: dict, sentence: str) -> None:
    changes = {"prompts": PROMPTS} | OPTIONS | changes
    model = drawn(changes.pop("config", CONFIG))[0]
    with pytest.raises(ValueError, match=sentence):
        stream(model, **changes)
