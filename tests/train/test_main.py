"""The program: what a run leaves, and what becomes of killed, finished and changed runs."""

import dataclasses
import json
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import head_masks, main, step, weights
from sparseattn_jax.train.checkpoints import Checkpoints

NUM_STEPS = 60
SPEED = ("tokens_per_second", "data_wait")


@pytest.fixture(scope="module")
def config(tiny_config, tmp_path_factory) -> configs.TrainConfig:
    """A run long enough to be killed half-way; steps take milliseconds."""
    run = dataclasses.replace(
        tiny_config.run,
        directory=str(tmp_path_factory.mktemp("runs")),
        num_steps=NUM_STEPS,
        save_every=10,
        keep_checkpoints=2,
    )
    return dataclasses.replace(tiny_config, run=run)


def named(config: configs.TrainConfig, name: str) -> configs.TrainConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, name=name))


def folder(config: configs.TrainConfig) -> pathlib.Path:
    return pathlib.Path(config.run.directory) / config.run.name


def start(config: configs.TrainConfig) -> subprocess.Popen:
    """The program as a user starts it, its settings in a file."""
    path = pathlib.Path(config.run.directory) / f"{config.run.name}.toml"
    path.write_text(configs.to_toml(config))
    return subprocess.Popen(
        [sys.executable, "-m", "sparseattn_jax.train.main", "--config", str(path)],
        stdout=subprocess.PIPE,
        text=True,
    )


def metrics(config: configs.TrainConfig) -> list[dict]:
    lines = (folder(config) / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in SPEED} for record in records]


def final_state(config: configs.TrainConfig, weights) -> list[np.ndarray]:
    checkpoints = Checkpoints(folder(config) / "checkpoints", keep=config.run.keep_checkpoints)
    state = checkpoints.restore(NUM_STEPS, like=step.initial_state(config, weights))
    checkpoints.close()
    return jax.tree.leaves(state)


@pytest.fixture(scope="module")
def processes(config) -> dict[str, subprocess.Popen]:
    """Two runs of one configuration, side by side: one will finish, the other be killed."""
    return {name: start(named(config, name)) for name in ("unbroken", "killed")}


@pytest.fixture(scope="module")
def killed(config, processes) -> configs.TrainConfig:
    """A run that was killed after step 25, five steps after its last checkpoint."""
    killed, process = named(config, "killed"), processes["killed"]
    log = folder(killed) / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not log.exists() or log.read_bytes().count(b"\n") < 25:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(log.read_text().splitlines()) < NUM_STEPS
    # What a kill in the middle of a write leaves.
    with log.open("a") as file:
        file.write('{"step": 2')
    return killed


@pytest.fixture(scope="module")
def unbroken(config, processes, killed) -> tuple[configs.TrainConfig, str]:
    """A finished run and what it printed."""
    process = processes["unbroken"]
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    return named(config, "unbroken"), output


def test_a_run_leaves_its_files(unbroken) -> None:
    config, output = unbroken
    assert configs.load(str(folder(config) / "config.toml")) == config
    mask = head_masks.read_tsv(folder(config) / "head_masks.tsv", num_layers=2, num_kv_heads=2)
    assert mask.sum() == 1
    assert (folder(config) / "head_masks.png").read_bytes().startswith(b"\x89PNG")
    assert [record["step"] for record in metrics(config)] == list(range(1, NUM_STEPS + 1))
    kept = sorted(int(path.name) for path in (folder(config) / "checkpoints").iterdir())
    assert kept == [NUM_STEPS - 10, NUM_STEPS]
    for words in (f"step {NUM_STEPS}/{NUM_STEPS}", "sparsity", "tokens/s", "kept by 1 of 4"):
        assert words in output
    for row in ("dense", "learned", "random", "streaming"):
        assert row in output


def test_the_sparsity_comes_to_its_target(unbroken) -> None:
    config, _ = unbroken
    first, last = metrics(config)[0], metrics(config)[-1]
    assert first["sparsity"] < 0.02
    assert abs(last["sparsity"] - config.gates.end_head_sparsity) < 0.2


def test_a_killed_run_goes_on_to_the_same_end(killed, unbroken, tiny_weights) -> None:
    process = start(killed)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert f"goes on after step 20 of {NUM_STEPS}" in output
    whole, _ = unbroken
    assert metrics(killed) == metrics(whole)
    for file in ("summary.json", "head_masks.tsv"):
        assert (folder(killed) / file).read_text() == (folder(whole) / file).read_text()
    for ours, theirs in zip(
        final_state(killed, tiny_weights), final_state(whole, tiny_weights), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_a_finished_run_prints_its_summary_again(unbroken, capsys) -> None:
    config, output = unbroken
    before = (folder(config) / "metrics.jsonl").read_bytes()
    main.run(config)
    again = capsys.readouterr().out
    assert "finished; --fresh starts it over" in again
    summary = output[output.index("Full attention is kept by") :]
    assert summary in again
    assert (folder(config) / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_configuration_is_refused(unbroken) -> None:
    config, _ = unbroken
    other = dataclasses.replace(
        config, gates=dataclasses.replace(config.gates, end_head_sparsity=0.5)
    )
    with pytest.raises(
        configs.InvalidRunError,
        match=r"holds a run with gates\.end_head_sparsity=0\.7, and this one asks for 0\.5; pass",
    ):
        main.run(other)


def test_the_program_says_what_is_wrong_without_a_traceback() -> None:
    with pytest.raises(SystemExit, match=r"error: nowhere.npz: no such file"):
        main.main(["--model.initial-weights", "nowhere.npz", "--run.name", "never"])


def test_pre_training_leaves_weights_and_starts_over_when_told(
    tiny_config, tiny_model, tmp_path, capsys
) -> None:
    config = dataclasses.replace(
        tiny_config,
        run=dataclasses.replace(
            tiny_config.run, directory=str(tmp_path), name="pretrain", num_steps=3, log_every=2
        ),
        gates=dataclasses.replace(tiny_config.gates, train=False),
        optimizer=dataclasses.replace(
            tiny_config.optimizer,
            train_weights=True,
            weights_learning_rate=0.01,
            embedding_learning_rate=0.01,
        ),
    )
    main.run(config)
    first = metrics(config)
    assert [record["step"] for record in first] == [2, 3]
    assert "needles: 1" in capsys.readouterr().out
    llama = tiny_model.llama()
    trained = weights.load(folder(config) / "weights.npz", llama)
    initial = weights.load(pathlib.Path(config.model.initial_weights), llama)
    assert (trained["embedding"] != initial["embedding"]).any()

    main.run(config, fresh=True)
    assert "finished" not in capsys.readouterr().out
    assert metrics(config) == first
