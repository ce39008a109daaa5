"""What a run is made of: frozen dataclasses, read from TOML files.

No field has a default here: a file of `configs/` states them all, and the command line overrides.
"""

import dataclasses
import json
import math
import pathlib
import tomllib
import typing
from typing import Any, Literal

from sparseattn_jax import models

CONFIGS = pathlib.Path(__file__).parent / "configs"
ASSETS = pathlib.Path(__file__).parent / "assets"

VOCAB_SIZE = 256


class InvalidRunError(ValueError):
    """What was asked for cannot be run; the message says why, and what to change."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives, and how long.

    Attributes:
        name: of the run's folder.
        directory: folder of all runs.
        seed: of the weights, the data and the gates.
        num_steps: optimizer steps.
        log_every: steps between two lines of metrics.jsonl.
        save_every: steps between two checkpoints.
        keep_checkpoints: how many of them stay.
    """

    name: str
    directory: str
    seed: int
    num_steps: int
    log_every: int
    save_every: int
    keep_checkpoints: int

    def __post_init__(self) -> None:
        if not self.name or self.name in (".", "..") or set(self.name) & set("/\\"):
            raise InvalidRunError(f"run.name={self.name!r} must name a folder")
        _check_at_least(0, "run", seed=self.seed)
        _check_at_least(
            1,
            "run",
            num_steps=self.num_steps,
            log_every=self.log_every,
            save_every=self.save_every,
            keep_checkpoints=self.keep_checkpoints,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The LLaMA that reads bytes.

    Attributes:
        initial_weights: an .npz that an earlier run wrote: its path, or its name in train/assets.
            Empty to draw the weights.
        num_layers: decoder layers.
        embed_dim: width of the residual stream.
        num_heads: query heads.
        num_kv_heads: key/value heads.
        head_dim: width of a head.
        mlp_dim: width of the feed-forward layer.
        rope_theta: base of the rotary frequencies.
        dtype: of the computation; weights are held in float32.
    """

    initial_weights: str
    num_layers: int
    embed_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    rope_theta: float
    dtype: Literal["float32", "bfloat16"]

    def __post_init__(self) -> None:
        try:
            self.llama()
        except ValueError as error:
            raise InvalidRunError(f"model: {error}") from error

    def llama(self) -> models.LlamaConfig:
        """The model's own configuration."""
        return models.LlamaConfig(
            vocab_size=VOCAB_SIZE,
            num_layers=self.num_layers,
            embed_dim=self.embed_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            mlp_dim=self.mlp_dim,
            rope_theta=self.rope_theta,
            rope_scaling=None,
            norm_epsilon=1e-5,
            tie_embeddings=True,
            dtype=self.dtype,
            param_dtype="float32",
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Stretches of real text with planted codes, and questions about them at the end.

    Attributes:
        text: a text file: its path, or its name in train/assets.
        held_out: share of the text, its end, that only evaluation reads.
        sequence_length: bytes the model reads per record.
        batch_size: records per step.
        num_needles: codes planted per record, at random depths.
        num_questions: codes asked for per record, at most num_needles.
        min_depth: bytes of text before the first planted code.
        min_distance: bytes of text between the last planted code and the first question.
        answer_weight: weight of a byte of an answer in the loss; other bytes weigh 1.
    """

    text: str
    held_out: float
    sequence_length: int
    batch_size: int
    num_needles: int
    num_questions: int
    min_depth: int
    min_distance: int
    answer_weight: float

    def __post_init__(self) -> None:
        _check_at_least(
            1,
            "data",
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            num_needles=self.num_needles,
            num_questions=self.num_questions,
        )
        _check_at_least(0, "data", min_depth=self.min_depth, min_distance=self.min_distance)
        if self.num_questions > self.num_needles:
            raise InvalidRunError(
                f"data.num_questions={self.num_questions} must not exceed "
                f"data.num_needles={self.num_needles}: a code is asked for once"
            )
        if not 0 < self.held_out < 1:
            raise InvalidRunError(
                f"data.held_out={self.held_out} must lie between 0 and 1: training and evaluation "
                "both need text"
            )
        if not 0 <= self.answer_weight < math.inf:
            raise InvalidRunError(f"data.answer_weight={self.answer_weight} must not be negative")


@dataclasses.dataclass(frozen=True, kw_only=True)
class GatesConfig:
    """Hard-concrete gates per layer and KV head (PruLong, arXiv:2506.17121).

    Attributes:
        train: whether the model has gates and they learn; without, attention is dense.
        initial_log_alpha: mean of the gates' parameters at the start; 4 is open.
        initial_stddev: their standard deviation.
        sink_size: bytes at the start that a streaming head keeps seeing, in whole blocks.
        recent_size: bytes before the query that a streaming head sees, in whole blocks.
        block_size: of the block-sparse attention.
        start_head_sparsity: target share of streaming heads at step 0.
        end_head_sparsity: target at the end, and the sparsity of head_masks.tsv.
        sparsity_warmup_ratio: share of the steps over which the target moves.
    """

    train: bool
    initial_log_alpha: float
    initial_stddev: float
    sink_size: int
    recent_size: int
    block_size: int
    start_head_sparsity: float
    end_head_sparsity: float
    sparsity_warmup_ratio: float

    def __post_init__(self) -> None:
        _check_at_least(0, "gates", sink_size=self.sink_size)
        _check_at_least(1, "gates", recent_size=self.recent_size, block_size=self.block_size)
        _check_shares(
            "gates",
            start_head_sparsity=self.start_head_sparsity,
            end_head_sparsity=self.end_head_sparsity,
            sparsity_warmup_ratio=self.sparsity_warmup_ratio,
        )
        if not 0 <= self.initial_stddev < math.inf:
            raise InvalidRunError(
                f"gates.initial_stddev={self.initial_stddev} must not be negative"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Muon on the weights' matrices, Adam on all else; one schedule's shape for all.

    Attributes:
        train_weights: whether the weights learn; frozen otherwise.
        weights_learning_rate: peak rate of the weights' matrices.
        embedding_learning_rate: peak rate of the embedding and the norms.
        mask_learning_rate: peak rate of the gates.
        reg_learning_rate: peak rate of the Lagrangian multipliers, which ascend.
        warmup_ratio: share of the steps over which the rates rise to their peak.
        min_lr_ratio: what the cosine falls to at the end, as a share of the peak.
        weight_decay: decoupled decay of the weights' matrices; nothing else has any.
        clip_norm: bound on the norm of the weights' gradient.
    """

    train_weights: bool
    weights_learning_rate: float
    embedding_learning_rate: float
    mask_learning_rate: float
    reg_learning_rate: float
    warmup_ratio: float
    min_lr_ratio: float
    weight_decay: float
    clip_norm: float

    def __post_init__(self) -> None:
        _check_shares("optimizer", warmup_ratio=self.warmup_ratio, min_lr_ratio=self.min_lr_ratio)
        for name in (
            "weights_learning_rate",
            "embedding_learning_rate",
            "mask_learning_rate",
            "reg_learning_rate",
            "weight_decay",
            "clip_norm",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidRunError(
                    f"optimizer.{name}={getattr(self, name)} must not be negative"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Questions on held-out text, after the last step.

    Attributes:
        num_batches: of data.batch_size records each.
        num_random_masks: random masks of the learned sparsity to compare with.
    """

    num_batches: int
    num_random_masks: int

    def __post_init__(self) -> None:
        _check_at_least(
            1,
            "evaluation",
            num_batches=self.num_batches,
            num_random_masks=self.num_random_masks,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One run.

    Attributes:
        run: where it lives, and how long.
        model: the network.
        data: what it reads.
        gates: which heads keep full attention.
        optimizer: how it learns.
        evaluation: what is measured at the end.
    """

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    gates: GatesConfig
    optimizer: OptimizerConfig
    evaluation: EvaluationConfig

    def __post_init__(self) -> None:
        if not (self.gates.train or self.optimizer.train_weights):
            raise InvalidRunError(
                "gates.train and optimizer.train_weights are both false; let one of them learn"
            )
        if not self.gates.train:
            return
        window = self.gates.recent_size + self.gates.block_size
        if self.data.min_distance < window:
            raise InvalidRunError(
                f"data.min_distance={self.data.min_distance} must be at least {window}, "
                "gates.recent_size + gates.block_size: a streaming head must not see the codes"
            )
        sinks = -(-self.gates.sink_size // self.gates.block_size) * self.gates.block_size
        if self.data.min_depth < sinks:
            raise InvalidRunError(
                f"data.min_depth={self.data.min_depth} must be at least {sinks}, the whole blocks "
                "of gates.sink_size: a streaming head must not see the codes"
            )


def load(name: str) -> TrainConfig:
    """Reads a TOML file: its path, or the name of one in `configs/`."""
    path = CONFIGS / f"{name}.toml" if (CONFIGS / f"{name}.toml").exists() else pathlib.Path(name)
    try:
        table = tomllib.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(file.stem for file in CONFIGS.glob("*.toml")))
        raise InvalidRunError(
            f"--config {name}: no such file; pass a path, or one of {shipped}"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise InvalidRunError(f"--config {name}: not TOML: {error}") from error
    return from_table(TrainConfig, table, where="")


def find_asset(name: str) -> pathlib.Path:
    """The file of that name in `assets/`, or at that path."""
    path = ASSETS / name if (ASSETS / name).exists() else pathlib.Path(name)
    if not path.is_file():
        raise InvalidRunError(f"{name}: no such file, here or in {ASSETS}")
    return path


def to_toml(config: TrainConfig) -> str:
    """The file that `load` reads back as the same configuration."""
    sections = []
    for name, section in dataclasses.asdict(config).items():
        # JSON writes strings, numbers and booleans as TOML does.
        lines = [f"{key} = {json.dumps(value)}" for key, value in section.items()]
        sections.append("\n".join([f"[{name}]", *lines]))
    return "\n\n".join(sections) + "\n"


def from_table[C](cls: type[C], table: dict[str, Any], *, where: str) -> C:
    """A dataclass from the nested tables of a TOML file; every field must be there, and no more."""
    fields = {field.name: field.type for field in dataclasses.fields(typing.cast(Any, cls))}
    for key in table:
        if key not in fields:
            raise InvalidRunError(f"{where}{key} is no setting; there are {', '.join(fields)}")
    missing = [key for key in fields if key not in table]
    if missing:
        raise InvalidRunError(f"{where}{missing[0]} is not set")
    values = {key: _value(kind, table[key], f"{where}{key}") for key, kind in fields.items()}
    return cls(**values)


def first_difference(ours: TrainConfig, other: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """The first setting that differs from a configuration in nested tables, with both values."""
    for section, settings in dataclasses.asdict(ours).items():
        for key, value in settings.items():
            theirs = other.get(section, {}).get(key)
            if theirs != value:
                return f"{section}.{key}", value, theirs
    return None


def _value(kind: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise InvalidRunError(f"{where} must be a table of settings, got {value!r}")
        return from_table(typing.cast(type, kind), value, where=f"{where}.")
    if typing.get_origin(kind) is Literal:
        if value not in typing.get_args(kind):
            choices = ", ".join(map(repr, typing.get_args(kind)))
            raise InvalidRunError(f"{where}={value!r} must be one of {choices}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise InvalidRunError(f"{where}={value!r} must be of type {kind.__name__}")
    return value


def _check_at_least(bound: int, section: str, **values: int) -> None:
    for name, value in values.items():
        if value < bound:
            raise InvalidRunError(f"{section}.{name}={value} must be at least {bound}")


def _check_shares(section: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise InvalidRunError(f"{section}.{name}={value} must lie in [0, 1]")
