"""XAttention's thresholds per head: for a wanted recall, or as far down as a score allows.

`recall_thresholds` and `coverage_thresholds` look at queries and keys of calibration texts, layer
by layer. `reduce_thresholds` is the dynamic programme of the paper (arXiv:2503.16428 section 2.3)
and asks a function of the caller how good a model is with given thresholds.

A table of thresholds [layers, N] is kept as a `configuration` with one XAttention per layer, or is
`stack`ed into a single XAttention whose threshold is scanned along with a model's layers.
"""

import ast
import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Float32, Int32

from sparseattn_jax.checks import (
    check_causal,
    check_kv_lengths,
    check_positive,
    check_qk,
    check_segment_ids,
    check_share,
    checked,
)
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.kernels import block_lists
from sparseattn_jax.kernels.antidiagonal_scores import antidiagonal_scores
from sparseattn_jax.kernels.backends import Backend
from sparseattn_jax.measures import block_mass
from sparseattn_jax.strategies.xattention import XAttention

type Thresholds = Float[np.ndarray, " N"] | Float[np.ndarray, "layers N"]


def _check_recall(q: jax.Array, recall: float | jax.Array) -> None:
    check_share(q, recall=recall)


@checked(check_qk, check_causal, _check_recall, check_kv_lengths, check_segment_ids)
def recall_thresholds(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    recall: float | Float32[Array, ""] | Float32[Array, " N"] = 0.9,
    strategy: XAttention | None = None,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, " N"]:
    """The lowest threshold of each head that keeps `recall` of the softmax mass of every text.

    Recall is `attention_recall`'s: the mean over a text's queries. A row of blocks takes up its
    next block when the threshold passes the share of the scores that it holds already, and gains
    the block's true mass; the answer is where these gains reach the wanted mass in every text, and
    half way from there to the next gain, so that rounding does not decide.

    Costs more than dense attention. Largest arrays: [B, N, Tb, Sb], and [B, N / K, block_size, S].

    Args:
        q: queries of one layer, after the rotation by position; one text per batch row.
        k: keys.
        recall: share of the mass to keep, in [0, 1]; one for all heads or one per query head.
        strategy: how blocks are scored, by default `XAttention()`; its threshold and its capacity
            are not read.
        is_causal: whether a query sees keys up to its own position only.
        kv_lengths: valid keys of each text; the rest is padding.
        segment_ids: texts packed in one row; a row counts as one text.
        backend: of the scores.

    Raises:
        ValueError: an argument is out of range or does not fit the others.
    """
    call = is_causal, kv_lengths, segment_ids, backend
    blocks = _BlockMasses.of(q, k, strategy or XAttention(), *call)
    return _lowest_thresholds(blocks, _per_head(q, recall))


@checked(check_qk, check_causal, _check_recall, check_kv_lengths, check_segment_ids)
def coverage_thresholds(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    *,
    recall: float | Float32[Array, ""] | Float32[Array, " N"] = 0.9,
    strategy: XAttention | None = None,
    is_causal: bool = True,
    kv_lengths: Int32[Array, " B"] | None = None,
    segment_ids: Int32[Array, "B S"] | None = None,
    backend: Backend | None = None,
) -> Float32[Array, " N"]:
    """Thresholds by the rule of the published profiler, for comparison with published tables.

    Of each row the fewest blocks are marked that hold `recall` of its true mass; m is the lowest
    score of a marked block. A head's threshold is the share of its scores, over all rows, in blocks
    that score at least the m of their row; the highest one of all texts counts. Nothing follows
    for the recall, which is mostly above the wanted one: one badly scored block sets m.

    Arguments, memory and errors as of `recall_thresholds`.
    """
    call = is_causal, kv_lengths, segment_ids, backend
    blocks = _BlockMasses.of(q, k, strategy or XAttention(), *call)
    needed = _per_head(q, recall)[None, :, None] * blocks.mass.sum(axis=-1)
    rank = lax.bitcast_convert_type(blocks.mass, jnp.uint32)
    marked = block_lists.shortest_prefix(rank, blocks.visible, blocks.mass, needed)
    lowest = jnp.where(marked, blocks.scores, jnp.inf).min(axis=-1, keepdims=True)
    kept = jnp.where(blocks.scores >= lowest, blocks.scores, 0.0).sum(axis=(-2, -1))
    total = blocks.scores.sum(axis=(-2, -1))
    return (kept / jnp.where(total == 0.0, 1.0, total)).max(axis=0)


def _per_head(q: Array, recall: float | Array) -> Float32[Array, " N"]:
    return jnp.broadcast_to(jnp.asarray(recall, jnp.float32), (q.shape[2],))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockMasses:
    """What every block of every row holds, and what it is thought to hold; 0 if invisible."""

    mass: Float32[Array, "B N Tb Sb"]
    scores: Float32[Array, "B N Tb Sb"]
    visible: Bool[Array, "B N Tb Sb"]
    forced: Bool[Array, "B N Tb Sb"]

    @classmethod
    def of(
        cls,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        strategy: XAttention,
        is_causal: bool,
        kv_lengths: Int32[Array, " B"] | None,
        segment_ids: Int32[Array, "B S"] | None,
        backend: Backend | None,
    ) -> "_BlockMasses":
        call = {
            "is_causal": is_causal,
            "kv_lengths": kv_lengths,
            "segment_ids": segment_ids,
            "backend": backend,
        }
        # A threshold of 1 keeps what is visible, one of 0 what is forced.
        everything, least = (
            dataclasses.replace(strategy, threshold=threshold, max_blocks=None).select(q, k, **call)
            for threshold in (1.0, 0.0)
        )
        visible = everything.blocks.to_dense()
        scores = antidiagonal_scores(
            q, k, stride=strategy.stride, block_size=strategy.block_size, **call
        )
        return cls(
            mass=block_mass(q, k, everything.blocks, kv_lengths, segment_ids),
            scores=jnp.where(visible, scores, 0.0),
            visible=visible,
            forced=least.blocks.to_dense(),
        )


def _lowest_thresholds(blocks: _BlockMasses, recall: Float32[Array, " N"]) -> Float32[Array, " N"]:
    """Of each head; see `recall_thresholds`."""
    # The order in which a row takes up its blocks: equal scores by ascending index.
    rank = jnp.where(blocks.forced, -jnp.inf, -blocks.scores)
    order = jnp.argsort(jnp.where(blocks.visible, rank, jnp.inf), axis=-1)
    scores, mass = (jnp.take_along_axis(x, order, -1) for x in (blocks.scores, blocks.mass))
    is_step = jnp.take_along_axis(blocks.visible & ~blocks.forced, order, -1)
    total = scores.sum(axis=-1, keepdims=True)
    held = jnp.pad(jnp.cumsum(scores, axis=-1)[..., :-1], ((0, 0), (0, 0), (0, 0), (1, 0)))
    # Without any score, as with all of it, only a threshold of 1 takes up more.
    share = jnp.where(total > 0.0, jnp.minimum(held / jnp.where(total > 0.0, total, 1.0), 1.0), 1.0)
    steps = _flat(jnp.where(is_step, share, 1.0))
    gains = _flat(jnp.where(is_step, mass, 0.0))
    by_share = jnp.argsort(steps, axis=-1)
    at_zero = jnp.where(blocks.forced, blocks.mass, 0.0).sum(axis=(-2, -1))
    reached = at_zero[..., None] + jnp.cumsum(jnp.take_along_axis(gains, by_share, -1), axis=-1)
    wanted = recall[None, :] * blocks.mass.sum(axis=(-2, -1))
    steps = jnp.take_along_axis(steps, by_share, -1)
    # The last step that a text needs, none by -1; then the first one that no text needs.
    last = jnp.min(jnp.where(reached >= wanted[..., None], steps, 1.0), axis=-1)
    last = jnp.where(at_zero >= wanted, -1.0, last).max(axis=0)
    following = jnp.min(jnp.where(steps > last[None, :, None], steps, 1.0), axis=(0, 2))
    threshold = jnp.where(last < 0.0, 0.0, (last + following) / 2.0)
    return jnp.where(recall >= 1.0, 1.0, threshold)


def _flat(x: Float32[Array, "B N Tb Sb"]) -> Float32[Array, "B N blocks"]:
    return x.reshape(*x.shape[:2], -1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reductions:
    """What the dynamic programme found for every number of reductions, from 0 on.

    Attributes:
        thresholds: the best ones with so many reductions.
        scores: their scores.
    """

    thresholds: Float32[np.ndarray, "reductions *heads"]
    scores: Float[np.ndarray, " reductions"]

    def most_reduced(self, least_score: float) -> Float32[np.ndarray, "*heads"]:
        """The thresholds with most reductions whose score is at least `least_score`.

        Raises:
            ValueError: no score is so high.
        """
        good = np.flatnonzero(self.scores >= least_score)
        if good.size == 0:
            raise ValueError(
                f"least_score={least_score} is above every score, the best of which is "
                f"{self.scores.max()}; lower it"
            )
        return self.thresholds[good[-1]]


def _check_programme(
    initial: np.ndarray, num_reductions: int, factor: float, max_per_head: int
) -> None:
    check_positive(max_per_head=max_per_head)
    initial = np.asarray(initial)
    if initial.ndim not in (1, 2) or initial.size == 0:
        raise ValueError(f"initial has shape {initial.shape}; pass thresholds [N] or [layers, N]")
    if not np.all((initial >= 0) & (initial <= 1)):
        raise ValueError(f"initial={initial.tolist()} must lie in [0, 1]: it holds thresholds")
    if not 0 < factor < 1:
        raise ValueError(f"factor={factor} must lie between 0 and 1: it lowers a threshold")
    most = initial.size * max_per_head
    if not 1 <= num_reductions <= most:
        raise ValueError(
            f"num_reductions={num_reductions} must lie in [1, {most}]: {initial.size} heads with "
            f"max_per_head={max_per_head} take no more"
        )


@checked(_check_programme)
def reduce_thresholds(
    score: Callable[[Thresholds], float],
    initial: Thresholds,
    *,
    num_reductions: int,
    factor: float = 0.9,
    max_per_head: int = 1,
) -> Reductions:
    """The paper's dynamic programme: which heads' thresholds to lower, for each number of times.

    With P(h, m - j, j) the score when the best known thresholds for m - j reductions in the first
    h - 1 heads have that of head h lowered j times,

        D[h][m] = max(D[h - 1][m], max over 1 <= j <= min(m, max_per_head) of P(h, m - j, j)).

    With max_per_head=1 it is the paper's D[h][m] = max(D[h - 1][m], P(h, m)), whose start is 0.9.
    If the score is a sum over heads, the result is the best of all choices; otherwise a good one.
    Where scores are equal the earlier heads are lowered.

    Args:
        score: how good a model is with given thresholds, higher is better. Called on the host about
            heads * num_reductions * max_per_head times.
        initial: thresholds to start from.
        num_reductions: up to how many reductions to make.
        factor: what a reduction multiplies a threshold by.
        max_per_head: reductions of one head at most.

    Raises:
        ValueError: an argument is out of range, or a score is not a finite number.
    """
    initial = np.asarray(initial, np.float32)

    def thresholds_of(counts: Int32[np.ndarray, " heads"]) -> Thresholds:
        powers = np.power(factor, counts.reshape(initial.shape))
        return (initial * powers).astype(np.float32)

    def score_of(counts: Int32[np.ndarray, " heads"]) -> float:
        value = float(score(thresholds_of(counts)))
        if not np.isfinite(value):
            raise ValueError(f"score returned {value}; it must return a finite number")
        return value

    # By the number of reductions, as far as the heads so far can take so many.
    unreduced = np.zeros(initial.size, np.int32)
    best = [(score_of(unreduced), unreduced)]
    for head in range(initial.size):
        of_earlier_heads = list(best)
        for number in range(1, min(num_reductions, (head + 1) * max_per_head) + 1):
            for lowered in range(1, min(number, max_per_head) + 1):
                if number - lowered >= len(of_earlier_heads):
                    continue
                counts = of_earlier_heads[number - lowered][1].copy()
                counts[head] = lowered
                found = score_of(counts), counts
                if number == len(best):
                    best.append(found)
                elif found[0] > best[number][0]:
                    best[number] = found
    return Reductions(
        thresholds=np.stack([thresholds_of(counts) for _, counts in best]),
        scores=np.array([value for value, _ in best]),
    )


def _check_table(thresholds: np.ndarray) -> None:
    thresholds = np.asarray(thresholds)
    if thresholds.ndim != 2 or 0 in thresholds.shape:
        raise ValueError(f"thresholds has shape {thresholds.shape}; pass [layers, heads]")
    if not np.all((thresholds >= 0) & (thresholds <= 1)):
        raise ValueError(
            f"thresholds are from {thresholds.min()} to {thresholds.max()}; they must lie in [0, 1]"
        )


@checked(_check_table)
def to_configuration(
    thresholds: Float[np.ndarray, "layers N"], strategy: XAttention | None = None
) -> Configuration:
    """A configuration whose layers are the strategy, by default `XAttention()`, with a row each.

    Raises:
        ValueError: the thresholds are no table, or not in [0, 1].
    """
    strategy = strategy or XAttention()
    rows = np.asarray(thresholds, np.float32)
    return Configuration(
        strategy=strategy,
        layers={
            layer: dataclasses.replace(strategy, threshold=jnp.asarray(row))
            for layer, row in enumerate(rows)
        },
    )


def stack(configuration: Configuration, num_layers: int) -> XAttention:
    """One XAttention for a scan over layers: its threshold is [layers, N], or [layers].

    A slice along the first axis is a layer's strategy, so it serves as `per_layer` of a model.

    Raises:
        ValueError: a layer has another strategy, or differs in more than its threshold.
    """
    check_positive(num_layers=num_layers)
    strategies: list[XAttention] = []
    for layer in range(num_layers):
        strategy = configuration.of_layer(layer)
        if not isinstance(strategy, XAttention):
            raise ValueError(
                f"layer {layer} has the strategy {type(strategy).__name__}; only layers of "
                "XAttention can be stacked"
            )
        strategies.append(strategy)
        if jax.tree.structure(strategy) != jax.tree.structure(strategies[0]):
            raise ValueError(
                f"layers 0 and {layer} differ in more than their thresholds; give all layers the "
                "same other parameters"
            )
    rows = np.broadcast_arrays(*(np.asarray(x.threshold, np.float32) for x in strategies))
    return dataclasses.replace(strategies[0], threshold=jnp.asarray(np.stack(rows)))


def read_table(path: str | pathlib.Path, *, name: str | None = None) -> Float32[np.ndarray, "L N"]:
    """Thresholds [layers, heads] from a file, such as the published ones, which are not shipped.

    The file is JSON, a list of lists or an object of such tables, or Python source that assigns
    nested lists of numbers, also as the first argument of a call like `torch.tensor`, to names.
    Source is read, never run.

    Args:
        path: the file; Python source ends in .py.
        name: of the table, where the file has several.

    Raises:
        ValueError: the file holds no such table, or several and no name is given, or a value is
            not in [0, 1].
    """
    path = pathlib.Path(path)
    try:
        text = path.read_text()
        found = _assigned_lists(text) if path.suffix == ".py" else json.loads(text)
    except (SyntaxError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} can be read neither as JSON nor as Python: {error}") from error
    tables: dict[str, Any] = found if isinstance(found, dict) else {"": found}
    if name is None and len(tables) != 1:
        raise ValueError(f"{path} holds {len(tables)} tables; name one of {', '.join(tables)}")
    name = next(iter(tables)) if name is None else name
    if name not in tables:
        raise ValueError(f"{path} has no table {name!r}; it has {', '.join(tables)}")
    try:
        table = np.array(tables[name], np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {name!r} is no table of numbers: {error}") from error
    _check_table(table)
    return table


def _assigned_lists(source: str) -> dict[str, list]:
    """What Python source assigns to names, where it is a list of literals or a call with one."""
    lists = {}
    for node in ast.parse(source).body:
        if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)):
            continue
        value = node.value
        if isinstance(value, ast.Call) and value.args:
            value = value.args[0]
        with contextlib.suppress(ValueError):  # not a literal
            literal = ast.literal_eval(value)
            if isinstance(literal, list):
                lists[node.targets[0].id] = literal
    return lists
