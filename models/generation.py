"""Continues a text with a checkpoint of Hugging Face's format, and prints it as it comes.

    python -m sparseattn_jax.models.generation --model SmolLM2-135M-Instruct --chat \\
        --prompt "What is sparse attention?" --max-new-tokens 100

`--strategy` takes a file that `sparseattn_jax.configuration.load` reads; `--head-masks` one of
masks, or a folder of gates, that `sparseattn_jax/head_gates.py` reads.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
import rich.console
import rich.progress
import tyro

from sparseattn_jax import configuration, head_gates
from sparseattn_jax.kernels.backends import UnsupportedError
from sparseattn_jax.models import hf_weights, hub
from sparseattn_jax.models.config import LlamaConfig
from sparseattn_jax.models.decoding import stream
from sparseattn_jax.models.policy import Policy
from sparseattn_jax.models.prefill import CHUNK_SIZE
from sparseattn_jax.models.sampling import Sampling
from sparseattn_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Continues a text with a model, and prints the continuation as it comes.

    Attributes:
        model: a folder in Hugging Face's format, or organisation/name on its hub.
        prompt: the text to continue.
        prompt_file: a file of it instead.
        chat: whether the text is a user's message, to be answered in the model's chat format.
        max_new_tokens: tokens to generate at most; the model may end before.
        strategy: JSON file of what the layers attend to in the prompt, by default everything.
        head_masks: which heads do not stream: a file of masks, one line per layer, or a folder of
            DuoAttention's gates, of which `sparsity` makes masks.
        sparsity: share of the heads that are to stream, with a folder of gates.
        sink_size: first tokens that streaming heads see; by default the folder's, or 128.
        recent_size: last tokens that they see; by default the folder's, or 1024.
        temperature: what the logits are divided by before a token is drawn; by default the most
            probable token is taken.
        top_k: tokens to draw from, the most probable ones.
        top_p: share of the probability to draw from, in the most probable tokens.
        seed: of what is drawn.
        chunk_size: tokens of the prompt that are read at a time.
        capacity: tokens that the cache has room for; by default as many as are needed.
        dtype: of the computation, the parameters and the cache.
    """

    model: str
    prompt: str | None = None
    prompt_file: pathlib.Path | None = None
    chat: bool = False
    max_new_tokens: int = 128
    strategy: pathlib.Path | None = None
    head_masks: pathlib.Path | None = None
    sparsity: float = 0.5
    sink_size: int | None = None
    recent_size: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    chunk_size: int = CHUNK_SIZE
    capacity: int | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `arguments`, or those of the process."""
    try:
        run(tyro.cli(CommandLine, args=arguments))
    except (ValueError, OSError, UnsupportedError) as error:
        sys.exit(f"error: {error}")


def run(command: CommandLine) -> None:
    """Generates, and prints text as it comes; the prompt's progress goes to stderr."""
    text = _text(command)
    sampling = Sampling(temperature=command.temperature, top_k=command.top_k, top_p=command.top_p)
    folder = hub.folder_of(command.model)
    tokenizer = Tokenizer.load(folder)
    if command.chat:
        tokens = tokenizer.chat([{"role": "user", "content": text}])
    else:
        tokens = tokenizer.encode(text)
    # Before the weights, so that a mistake in a file is told at once.
    policy = read_policy(command, hf_weights.read_config(folder, dtype=command.dtype))
    model = hf_weights.load(folder, dtype=command.dtype)
    progress = _progress()
    task = progress.add_task("prefill", total=len(tokens))
    pieces = stream(
        model,
        [tokens],
        max_new_tokens=command.max_new_tokens,
        policy=policy,
        sampling=sampling,
        stop_tokens=tokenizer.eos_ids,
        key=jax.random.key(command.seed),
        capacity=command.capacity,
        chunk_size=command.chunk_size,
        report=lambda done: progress.update(task, completed=done),
    )
    with progress:
        first = next(pieces)
    printed = tokenizer.stream()
    for piece in itertools.chain([first], pieces):
        words = map(printed.push, piece.tokens[0, : piece.lengths[0]].tolist())
        print("".join(words), end="", flush=True)
    print(printed.finish())


def read_policy(command: CommandLine, config: LlamaConfig) -> Policy:
    """The policy that the command's files say, for a model.

    Raises:
        ValueError: a file is broken or does not fit the model, or sizes are given in vain.
        OSError: a file does not exist.
    """
    strategies = None if command.strategy is None else configuration.load(command.strategy)
    sizes: dict[str, Any] = {
        name: size
        for name in ("sink_size", "recent_size")
        if (size := getattr(command, name)) is not None
    }
    if command.head_masks is None:
        for name, size in sizes.items():
            raise ValueError(
                f"{name}={size} has no use without head_masks; say in the strategy's file what "
                "heads see"
            )
        return Policy.of(config, strategies)
    if command.head_masks.is_dir():
        published = head_gates.read_duo_attention(command.head_masks)
        masks = head_gates.sparsify_by_quantile(published.gates, command.sparsity)
        sizes = {"sink_size": published.sink_size, "recent_size": published.recent_size} | sizes
    else:
        masks = head_gates.read_head_masks(command.head_masks)
    return Policy.of(config, strategies, head_masks=masks, **sizes)


def _text(command: CommandLine) -> str:
    if (command.prompt is None) == (command.prompt_file is None):
        raise ValueError("pass one of prompt and prompt_file")
    if command.prompt is not None:
        return command.prompt
    assert command.prompt_file is not None
    return command.prompt_file.read_text(encoding="utf-8")


def _progress() -> rich.progress.Progress:
    """A bar on stderr."""
    return rich.progress.Progress(
        rich.progress.TextColumn("prefill"),
        rich.progress.BarColumn(),
        rich.progress.MofNCompleteColumn(),
        rich.progress.TextColumn("tokens"),
        rich.progress.TimeElapsedColumn(),
        console=rich.console.Console(stderr=True),
    )


if __name__ == "__main__":
    main()
