"""Finds XAttention's thresholds for a model on a text, per layer and head, and writes them as JSON.

    python -m sparseattn_jax.models.calibrate --model train/assets/llama_tiny.npz \\
        --text train/assets/state_of_the_union_1790_1835.txt --output thresholds.json

`--model` takes checkpoints in Hugging Face's format too, which need the extra `hf`.

The file is a strategy configuration: `sparseattn_jax.configuration.load` reads it, and
`sparseattn_jax.calibration.stack` makes what a scan over the model's layers takes.
"""

import dataclasses
import pathlib
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table
import tyro
from flax import nnx
from jaxtyping import Array, Float32, Int32, PyTree

from sparseattn_jax import XAttention, calibration, configuration, prefill_attention
from sparseattn_jax.measures import attention_recall, density
from sparseattn_jax.models import weights
from sparseattn_jax.models.attention import LayerRun, dense_causal_attention
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.llama import Llama

type Rule = Literal["recall", "coverage"]
type OfLayers = Float32[Array, "layers N"]

_BYTES = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Finds XAttention's thresholds for a model on a text and writes them as JSON.

    Attributes:
        model: an .npz that training wrote, or a folder in Hugging Face's format, or
            organisation/name on its hub.
        text: the calibration text: a file of text, in UTF-8 for a model with a tokenizer and read
            as bytes for an .npz, or token ids as .npy.
        output: the JSON file to write.
        recall: share of the true softmax mass to keep, in every text and head.
        rule: `recall` for the lowest thresholds that keep it, `coverage` for the published rule.
        stride: tokens per antidiagonal.
        block_size: queries and keys per block.
        num_texts: stretches of the text to calibrate on, evenly spaced.
        sequence_length: tokens of each.
        num_reductions: reductions by a tenth that the paper's dynamic programme may make from
            there; each costs as many runs of the model as it has heads.
        max_loss_increase: what these reductions may add to the loss per token, in nats.
        dtype: of the parameters and of the computation.
    """

    model: str
    text: pathlib.Path
    output: pathlib.Path = pathlib.Path("thresholds.json")
    recall: float = 0.9
    rule: Rule = "recall"
    stride: int = 16
    block_size: int = 128
    num_texts: int = 4
    sequence_length: int = 1024
    num_reductions: int = 0
    max_loss_increase: float = 0.01
    dtype: Literal["bfloat16", "float32"] = "float32"


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers, shapes and batched leaves
@dataclasses.dataclass(frozen=True, kw_only=True)
class Profile:
    """What was found for every layer and head, and what it does to the calibration texts.

    Attributes:
        thresholds: of XAttention.
        recall: share of the softmax mass that is kept, in the worst text.
        density: share of the visible blocks that is listed, on average.
    """

    thresholds: OfLayers
    recall: OfLayers
    density: OfLayers


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `arguments`, or those of the process."""
    try:
        run(tyro.cli(CommandLine, args=arguments))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def run(command: CommandLine) -> None:
    """Calibrates, writes the file and prints a table."""
    model, encode = _load(command)
    tokens = read_tokens(
        command.text,
        vocab_size=model.config.vocab_size,
        num_texts=command.num_texts,
        length=command.sequence_length,
        encode=encode,
    )
    strategy = XAttention(stride=command.stride, block_size=command.block_size)
    profile = calibrate(model, tokens, strategy=strategy, recall=command.recall, rule=command.rule)
    if command.num_reductions:
        thresholds = _reduce(model, tokens, strategy, profile.thresholds, command)
        profile = measure(model, tokens, dataclasses.replace(strategy, threshold=thresholds))
    made = calibration.to_configuration(np.asarray(profile.thresholds), strategy)
    configuration.save(made, command.output)
    console = rich.console.Console()
    console.print(_table(profile))
    console.print(f"wrote {command.output}", soft_wrap=True)


def read_tokens(
    path: pathlib.Path,
    *,
    vocab_size: int,
    num_texts: int,
    length: int,
    encode: Callable[..., list[int]] | None = None,
) -> Int32[Array, "B T"]:
    """Evenly spaced stretches of a text, or of the token ids of an .npy file.

    Args:
        path: the file.
        vocab_size: of the model.
        num_texts: stretches to take.
        length: tokens of each.
        encode: `Tokenizer.encode` of the model. Every stretch of a text starts with what it puts
            before a text, as prompts do. By default a text's bytes are its tokens.

    Raises:
        ValueError: the text is too short, is not UTF-8 where it must be, or is not of the model's
            vocabulary.
        OSError: there is no such file.
    """
    if num_texts < 1 or length < 2:
        raise ValueError(
            f"num_texts={num_texts} must be at least 1 and sequence_length={length} at least 2"
        )
    beginning, ids = _token_ids(path, vocab_size, encode)
    size = beginning.size + ids.size
    if size < length:
        raise ValueError(f"{path} has {size} tokens, fewer than sequence_length={length}")
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(
            f"{path} has token ids from {ids.min()} to {ids.max()}; the model has vocab_size="
            f"{vocab_size}"
        )
    starts = np.linspace(0, size - length, num_texts).astype(int)
    stretches = ids[starts[:, None] + np.arange(length - beginning.size)]
    beginnings = np.broadcast_to(beginning, (num_texts, beginning.size))
    return jnp.asarray(np.concatenate([beginnings, stretches], axis=1), jnp.int32)


def calibrate(
    model: Llama,
    tokens: Int32[Array, "B T"],
    *,
    strategy: XAttention,
    recall: float,
    rule: Rule = "recall",
) -> Profile:
    """Thresholds for a recall in every layer of a model with dense attention.

    Args:
        model: the model.
        tokens: the calibration texts, all of one length.
        strategy: how blocks are scored.
        recall: share of the softmax mass to keep.
        rule: see `calibration.recall_thresholds` and `calibration.coverage_thresholds`.

    Raises:
        ValueError: recall or a parameter of the strategy is out of range, the model has layers
            with a sliding window, or the texts are longer than it was made for.
    """
    rules = {
        "recall": calibration.recall_thresholds,
        "coverage": calibration.coverage_thresholds,
    }

    def of_layer(q: Array, k: Array, _: None) -> Profile:
        found = rules[rule](q, k, recall=recall, strategy=strategy)
        return _measure_layer(q, k, dataclasses.replace(strategy, threshold=found))

    return _over_layers(model, tokens, of_layer, None)


def measure(model: Llama, tokens: Int32[Array, "B T"], strategy: XAttention) -> Profile:
    """What thresholds [layers, N] do in the layers of a model with dense attention.

    Raises:
        ValueError: as of `calibrate`.
    """
    return _over_layers(model, tokens, _measure_layer, strategy)


def mean_loss(
    model: Llama, tokens: Int32[Array, "B T"], strategy: XAttention
) -> Float32[Array, ""]:
    """The loss per token, in nats, of a model that attends by thresholds [layers, N].

    Raises:
        ValueError: as of `calibrate`.
    """
    _check_model(model.config, tokens.shape[1])

    def attend(q: Array, k: Array, v: Array, strategy: XAttention, /) -> Array:
        return prefill_attention(q, k, v, strategy)

    logits = model(tokens, attend=attend, per_layer=strategy)[:, :-1]
    log_probabilities = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()


def _load(command: CommandLine) -> tuple[Llama, Callable[..., list[int]] | None]:
    """The model, and what encodes its texts if that is not their bytes."""
    path = pathlib.Path(command.model)
    if path.suffix == ".npz":
        return weights.load(path, dtype=command.dtype), None
    if path.is_file():
        raise ValueError(
            f"model={path} is a file, but no .npz that training wrote; pass one, or a folder in "
            "Hugging Face's format, or organisation/name on its hub"
        )
    # Here, because they need the extra `hf`, and an .npz does not.
    from sparseattn_jax.models import hf_weights, hub
    from sparseattn_jax.models.tokenizer import Tokenizer

    folder = hub.folder_of(command.model)
    # First, because a folder may lack it, and weights are slow to read.
    encode = None if command.text.suffix == ".npy" else Tokenizer.load(folder).encode
    return hf_weights.load(folder, dtype=command.dtype), encode


def _token_ids(
    path: pathlib.Path, vocab_size: int, encode: Callable[..., list[int]] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What every text starts with, and the tokens of the file."""
    nothing = np.zeros(0, np.int64)
    if path.suffix == ".npy":
        ids = np.load(path, allow_pickle=False)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(
                f"{path} holds {ids.dtype} of shape {ids.shape}; save token ids as one row of ints"
            )
        return nothing, ids
    if encode is not None:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8: {error}") from error
        ids = encode(text, add_special_tokens=False)
        return np.array(encode(""), np.int64), np.array(ids, np.int64)
    if vocab_size != _BYTES:
        raise ValueError(
            f"{path} is read as bytes, but the model has vocab_size={vocab_size}; save its "
            "token ids as .npy"
        )
    return nothing, np.frombuffer(path.read_bytes(), np.uint8)


def _check_model(config: LlamaConfig, length: int) -> None:
    """All layers attend to all that comes before, and positions reach that far."""
    if config.sliding_layers:
        raise ValueError(
            f"layers {', '.join(map(str, config.sliding_layers))} of this model have a sliding "
            f"window of {config.sliding_window} tokens, in which thresholds mean nothing; "
            "calibrate a model whose layers attend to the whole text"
        )
    if config.max_position is not None and length > config.max_position:
        raise ValueError(
            f"sequence_length={length} exceeds the max_position={config.max_position} that the "
            "model was made for; shorten it"
        )


def _measure_layer(q: Array, k: Array, strategy: XAttention) -> Profile:
    pattern = strategy.select(q, k)
    return Profile(
        thresholds=jnp.broadcast_to(strategy.threshold, (q.shape[2],)),
        recall=attention_recall(q, k, pattern).min(axis=0),
        density=density(pattern).mean(axis=0),
    )


def _over_layers(
    model: Llama,
    tokens: Int32[Array, "B T"],
    of_layer: Callable[[Array, Array, PyTree], Profile],
    per_layer: PyTree,
) -> Profile:
    """What `of_layer` makes of the queries and keys of every layer, stacked."""
    _check_model(model.config, tokens.shape[1])
    graphdef, state = nnx.split(model)

    def attend(
        q: Array, k: Array, v: Array, layer_input: PyTree, profiles: Profile, layer: Array, /
    ) -> tuple[Array, Profile]:
        found = of_layer(q, k, layer_input)
        profiles = jax.tree.map(lambda of_all, one: of_all.at[layer].set(one), profiles, found)
        return dense_causal_attention(q, k, v, None), profiles

    @jax.jit
    def profile(state: PyTree, tokens: Array, per_layer: PyTree) -> Profile:
        config = model.config
        nothing = jnp.zeros((config.num_layers, config.num_heads), jnp.float32)
        run = LayerRun(num_layers=config.num_layers, attend=attend, per_layer=per_layer)
        _, profiles = nnx.merge(graphdef, state).cached_hidden_states(
            tokens,
            Profile(thresholds=nothing, recall=nothing, density=nothing),
            runs=[run],
            positions=jnp.arange(tokens.shape[1], dtype=jnp.int32)[None],
        )
        return profiles

    return profile(state, tokens, per_layer)


def _reduce(
    model: Llama,
    tokens: Int32[Array, "B T"],
    strategy: XAttention,
    thresholds: OfLayers,
    command: CommandLine,
) -> OfLayers:
    """The most reduced thresholds that the command's bound on the loss allows."""
    graphdef, state = nnx.split(model)

    @jax.jit
    def loss(state: PyTree, thresholds: OfLayers) -> Float32[Array, ""]:
        layers = dataclasses.replace(strategy, threshold=thresholds)
        return mean_loss(nnx.merge(graphdef, state), tokens, layers)

    found = calibration.reduce_thresholds(
        lambda thresholds: -float(loss(state, jnp.asarray(thresholds))),
        np.asarray(thresholds),
        num_reductions=command.num_reductions,
    )
    least_score = float(found.scores[0]) - command.max_loss_increase
    return jnp.asarray(found.most_reduced(least_score))


def _table(profile: Profile) -> rich.table.Table:
    """One line per layer, over its heads."""
    columns = ("layer", "threshold: lowest", "mean", "highest", "recall: lowest", "density: mean")
    table = rich.table.Table(*columns)
    of_layers = (profile.thresholds, profile.recall, profile.density)
    for layer, rows in enumerate(zip(*map(np.asarray, of_layers), strict=True)):
        thresholds, recalls, densities = rows
        values = (thresholds.min(), thresholds.mean(), thresholds.max())
        cells = [f"{value:.4f}" for value in (*values, recalls.min(), densities.mean())]
        table.add_row(str(layer), *cells)
    return table


if __name__ == "__main__":
    main()
