"""Configuration: files, the command line, and what is refused."""

import dataclasses
import re
import tomllib

import pytest

from sparseattn_jax.train import config as configs
from sparseattn_jax.train import main

SHIPPED = sorted(path.stem for path in configs.CONFIGS.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_survive_being_written(name: str, tmp_path) -> None:
    config = configs.load(name)
    (tmp_path / "copy.toml").write_text(configs.to_toml(config))
    assert configs.load(str(tmp_path / "copy.toml")) == config


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_are_the_defaults_of_the_command_line(name: str) -> None:
    assert main.parse(["--config", name]).settings == configs.load(name)


def test_the_command_line_overrides_the_file() -> None:
    command = main.parse(
        ["--config=pretrain", "--run.num-steps", "7", "--model.dtype", "float32", "--fresh"]
    )
    shipped = configs.load("pretrain")
    assert command.fresh
    assert command.settings == dataclasses.replace(
        shipped,
        run=dataclasses.replace(shipped.run, num_steps=7),
        model=dataclasses.replace(shipped.model, dtype="float32"),
    )


def test_help_explains_every_setting(capsys) -> None:
    with pytest.raises(SystemExit, match="0"):
        main.parse(["--help"])
    text = capsys.readouterr().out
    for section in dataclasses.fields(configs.TrainConfig):
        for field in dataclasses.fields(section.type):
            name = f"{section.name}.{field.name}".replace("_", "-")
            assert re.search(rf"--{re.escape(name)}\b", text), name


def file_with(tmp_path, old: str, new: str) -> str:
    text = (configs.CONFIGS / "masks.toml").read_text()
    assert old in text
    path = tmp_path / "changed.toml"
    path.write_text(text.replace(old, new))
    return str(path)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seed = 0", "sed = 0", "run.sed is no setting; there are name, directory, seed"),
        ("seed = 0\n", "", "run.seed is not set"),
        ("seed = 0", "seed = 0.5", "run.seed=0.5 must be of type int"),
        ("seed = 0", "seed = true", "run.seed=True must be of type int"),
        ('dtype = "float32"', 'dtype = "int8"', "model.dtype='int8' must be one of 'float32'"),
        ("[evaluation]", "[evaluation.more]", "evaluation.more is no setting"),
        ("[run]", "evaluate = 3\n[run]", "evaluate is no setting; there are run, model"),
        ("[run]", "[run", "not TOML"),
    ],
    ids=["unknown", "missing", "float", "bool", "choice", "table", "section", "syntax"],
)
def test_files_that_are_refused(tmp_path, old: str, new: str, sentence: str) -> None:
    with pytest.raises(configs.InvalidRunError, match=re.escape(sentence)):
        configs.load(file_with(tmp_path, old, new))


def test_a_section_that_is_no_table_is_refused() -> None:
    table = tomllib.loads((configs.CONFIGS / "masks.toml").read_text()) | {"run": 3}
    with pytest.raises(configs.InvalidRunError, match="run must be a table of settings, got 3"):
        configs.from_table(configs.TrainConfig, table, where="")


def test_whole_numbers_serve_as_floats(tmp_path) -> None:
    config = configs.load(file_with(tmp_path, "rope_theta = 10000.0", "rope_theta = 500"))
    assert config.model.rope_theta == 500.0
    assert isinstance(config.model.rope_theta, float)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("run", {"name": ""}, "run.name='' must name a folder"),
        ("run", {"name": "a/b"}, "run.name='a/b' must name a folder"),
        ("run", {"name": ".."}, "run.name='..' must name a folder"),
        ("run", {"seed": -1}, "run.seed=-1 must be at least 0"),
        ("run", {"num_steps": 0}, "run.num_steps=0 must be at least 1"),
        ("run", {"log_every": 0}, "run.log_every=0 must be at least 1"),
        ("run", {"save_every": 0}, "run.save_every=0 must be at least 1"),
        ("run", {"keep_checkpoints": 0}, "run.keep_checkpoints=0 must be at least 1"),
        ("model", {"num_kv_heads": 3}, "model: num_heads=8 must be a multiple of num_kv_heads=3"),
        ("data", {"sequence_length": 0}, "data.sequence_length=0 must be at least 1"),
        ("data", {"batch_size": 0}, "data.batch_size=0 must be at least 1"),
        ("data", {"num_needles": 0}, "data.num_needles=0 must be at least 1"),
        ("data", {"num_questions": 0}, "data.num_questions=0 must be at least 1"),
        ("data", {"min_depth": -1}, "data.min_depth=-1 must be at least 0"),
        ("data", {"min_distance": -1}, "data.min_distance=-1 must be at least 0"),
        ("data", {"num_questions": 99}, "data.num_questions=99 must not exceed data.num_needles"),
        ("data", {"held_out": 0.0}, "data.held_out=0.0 must lie between 0 and 1"),
        ("data", {"held_out": 1.0}, "data.held_out=1.0 must lie between 0 and 1"),
        ("data", {"answer_weight": -1.0}, "data.answer_weight=-1.0 must not be negative"),
        ("gates", {"initial_stddev": -1.0}, "gates.initial_stddev=-1.0 must not be negative"),
        ("gates", {"sink_size": -1}, "gates.sink_size=-1 must be at least 0"),
        ("gates", {"recent_size": 0}, "gates.recent_size=0 must be at least 1"),
        ("gates", {"block_size": 0}, "gates.block_size=0 must be at least 1"),
        ("gates", {"end_head_sparsity": 1.5}, "gates.end_head_sparsity=1.5 must lie in [0, 1]"),
        ("gates", {"start_head_sparsity": -0.5}, "gates.start_head_sparsity=-0.5 must lie in"),
        ("gates", {"sparsity_warmup_ratio": 2.0}, "gates.sparsity_warmup_ratio=2.0 must lie in"),
        ("optimizer", {"warmup_ratio": 2.0}, "optimizer.warmup_ratio=2.0 must lie in [0, 1]"),
        ("optimizer", {"min_lr_ratio": -1.0}, "optimizer.min_lr_ratio=-1.0 must lie in [0, 1]"),
        ("optimizer", {"mask_learning_rate": -1.0}, "mask_learning_rate=-1.0 must not be negative"),
        ("optimizer", {"reg_learning_rate": -1.0}, "reg_learning_rate=-1.0 must not be negative"),
        (
            "optimizer",
            {"weights_learning_rate": float("inf")},
            "weights_learning_rate=inf must not",
        ),
        ("optimizer", {"weight_decay": -1.0}, "optimizer.weight_decay=-1.0 must not be negative"),
        ("optimizer", {"clip_norm": float("nan")}, "optimizer.clip_norm=nan must not be negative"),
        ("evaluation", {"num_batches": 0}, "evaluation.num_batches=0 must be at least 1"),
        ("evaluation", {"num_random_masks": 0}, "evaluation.num_random_masks=0 must be at least"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_that_are_refused(section: str, values: dict, sentence: str) -> None:
    with pytest.raises(configs.InvalidRunError, match=re.escape(sentence)):
        dataclasses.replace(getattr(configs.load("masks"), section), **values)


@pytest.mark.parametrize(
    ("section", "values", "sentence"),
    [
        ("gates", {"train": False}, "gates.train and optimizer.train_weights are both false"),
        ("data", {"min_distance": 3}, "data.min_distance=3 must be at least 48"),
        ("data", {"min_depth": 3}, "data.min_depth=3 must be at least 16"),
    ],
    ids=["nothing learns", "window", "sinks"],
)
def test_sections_that_do_not_fit_are_refused(section: str, values: dict, sentence: str) -> None:
    config = configs.load("masks")
    with pytest.raises(configs.InvalidRunError, match=re.escape(sentence)):
        dataclasses.replace(
            config, **{section: dataclasses.replace(getattr(config, section), **values)}
        )


def test_a_config_that_is_missing_is_refused() -> None:
    with pytest.raises(configs.InvalidRunError, match="nowhere: no such file; pass a path, or one"):
        main.parse(["--config", "nowhere"])


def test_the_first_difference_is_named() -> None:
    config = configs.load("masks")
    other = dataclasses.asdict(config)
    assert configs.first_difference(config, other) is None
    other["data"]["batch_size"] = 99
    other["evaluation"]["num_batches"] = 99
    ours = config.data.batch_size
    assert configs.first_difference(config, other) == ("data.batch_size", ours, 99)
    del other["data"]["batch_size"]
    assert configs.first_difference(config, other) == ("data.batch_size", ours, None)
