"""Learns which heads need full attention, or pre-trains the model whose heads they are.

    python -m sparseattn_jax.train.main                       # configs/masks.toml
    python -m sparseattn_jax.train.main --config pretrain     # configs/pretrain.toml
    python -m sparseattn_jax.train.main --gates.end-head-sparsity 0.5 --run.name half

A run that was interrupted goes on when the same command is given again.
"""

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Annotated

import jax
import numpy as np
import rich.console
import tyro

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import data, evaluation, head_masks, report, weights
from sparseattn_jax.train.checkpoints import Checkpoints
from sparseattn_jax.train.config import InvalidRunError, TrainConfig
from sparseattn_jax.train.gated_model import draw_weights
from sparseattn_jax.train.step import TrainState, initial_state, make_train_step

_DEFAULT_CONFIG = "masks"


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine:
    """Trains a small LLaMA, or the masks of its heads. Every setting of a file can be overridden.

    Attributes:
        config: a TOML file of settings: its path, or the name of one in train/configs.
        fresh: delete what the run's folder holds and start over.
        settings: those of the file, overridden one by one.
    """

    config: str = _DEFAULT_CONFIG
    fresh: bool = False
    settings: Annotated[TrainConfig, tyro.conf.arg(name="")]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line: `arguments`, or those of the process."""
    try:
        command = parse(sys.argv[1:] if arguments is None else arguments)
        run(command.settings, fresh=command.fresh)
    except InvalidRunError as error:
        sys.exit(f"error: {error}")


def parse(arguments: Sequence[str]) -> CommandLine:
    """The command line's settings over those of the file that it names."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=_DEFAULT_CONFIG)
    name = first.parse_known_args(list(arguments))[0].config
    default = CommandLine(config=name, settings=configs.load(name))
    return tyro.cli(CommandLine, args=list(arguments), default=default)


def run(config: TrainConfig, *, fresh: bool = False) -> None:
    """Trains to the end, from the last checkpoint if the run's folder has one, and reports."""
    console = rich.console.Console()
    directory = pathlib.Path(config.run.directory) / config.run.name
    if fresh and (directory / "config.toml").exists():
        shutil.rmtree(directory)
    checkpoints = Checkpoints(directory / "checkpoints", keep=config.run.keep_checkpoints)
    start = checkpoints.latest_step()
    if start is not None:
        _refuse_other_config(config, checkpoints.config(start), directory)
    summary_file = directory / "summary.json"
    if summary_file.exists():
        console.print(
            f"{directory} holds this run, finished; --fresh starts it over.", soft_wrap=True
        )
        report.print_summary(console, json.loads(summary_file.read_text()), directory)
        return

    (directory / "config.toml").write_text(configs.to_toml(config))
    training_text, held_out_text = data.load_text(config.data)
    state = initial_state(config, _initial_weights(config))
    if start is not None:
        console.print(
            f"{directory} goes on after step {start} of {config.run.num_steps}.", soft_wrap=True
        )
        state = checkpoints.restore(start, like=state)
    state = _train(config, state, training_text, checkpoints, directory, console)
    checkpoints.close()
    summary = _finish(config, state, held_out_text, directory)
    _write_whole(summary_file, json.dumps(summary, indent=1))
    report.print_summary(console, summary, directory)


def _train(
    config: TrainConfig,
    state: TrainState,
    text: data.Text,
    checkpoints: Checkpoints,
    directory: pathlib.Path,
    console: rich.console.Console,
) -> TrainState:
    start, stop = int(state.step), config.run.num_steps
    train_step = make_train_step(config)
    batches = data.training_batches(text, config.data, seed=config.run.seed, start=start, stop=stop)
    tokens_per_step = config.data.batch_size * config.data.sequence_length
    meter = report.Meter(tokens_per_step=tokens_per_step, start=start)
    with (
        report.MetricsFile(directory / "metrics.jsonl", start=start) as metrics_file,
        report.Progress(console, num_steps=stop, start=start) as progress,
    ):
        for step, batch in enumerate(meter.timed(batches), start=start + 1):
            state, metrics = train_step(state, batch)
            if step % config.run.log_every == 0 or step == stop:
                values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                record = {"step": step, **values, **meter.read(step)}
                metrics_file.write(record)
                progress.show(record)
            if step % config.run.save_every == 0 or step == stop:
                checkpoints.save(step, state, config)
                if config.optimizer.train_weights:
                    weights.save(
                        directory / "weights.npz", config.model.llama(), state.params["weights"]
                    )
    return state


def _finish(
    config: TrainConfig, state: TrainState, text: data.Text, directory: pathlib.Path
) -> dict:
    """Writes the masks and scores them, or the dense model where none were learned."""
    if not config.gates.train:
        scores = evaluation.score_needles(config, state.params["weights"], text)
        return report.summarise(scores, mask=None)
    log_alpha = state.params["log_alpha"]
    mask = head_masks.round_to_sparsity(log_alpha, config.gates.end_head_sparsity)
    head_masks.write_tsv(directory / "head_masks.tsv", mask)
    gates = np.asarray(head_masks.deterministic_gates(log_alpha))
    report.draw_gates(directory / "head_masks.png", gates, mask)
    scores = evaluation.score_masks(config, state.params["weights"], mask, text)
    return report.summarise(scores, mask)


def _initial_weights(config: TrainConfig):
    llama = config.model.llama()
    if not config.model.initial_weights:
        return draw_weights(llama, jax.random.fold_in(jax.random.key(config.run.seed), 2))
    return weights.load(configs.find_asset(config.model.initial_weights), llama)


def _refuse_other_config(config: TrainConfig, stored: dict, directory: pathlib.Path) -> None:
    difference = configs.first_difference(config, stored)
    if difference is not None:
        name, ours, theirs = difference
        raise InvalidRunError(
            f"{directory} holds a run with {name}={theirs!r}, and this one asks for {ours!r}; "
            f"pass --fresh to replace that run, or another --run.name"
        )


def _write_whole(path: pathlib.Path, text: str) -> None:
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.replace(path)


if __name__ == "__main__":
    main()
