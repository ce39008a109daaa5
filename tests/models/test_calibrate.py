"""The calibration of a model on a text, from the command line to the file."""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from flax import nnx

from sparseattn_jax import XAttention, calibration, configuration, models
from sparseattn_jax.models import calibrate, hf_weights, weights
from sparseattn_jax.models.tokenizer import Tokenizer
from tests.models.small_models import CONFIG, SLIDING_CONFIG, drawn

SMOLLM2 = pathlib.Path(__file__).parents[2] / ".smollm2"
ASSETS = pathlib.Path(__file__).parents[2] / "train" / "assets"
SHIPPED = {
    "model": ASSETS / "llama_tiny.npz",
    "text": ASSETS / "state_of_the_union_1790_1835.txt",
}
STRATEGY = XAttention(stride=4, block_size=8)


def arguments(**options) -> list[str]:
    named = {name.replace("_", "-"): str(value) for name, value in (SHIPPED | options).items()}
    return [part for name, value in named.items() for part in (f"--{name}", value)]


@pytest.fixture(scope="module")
def shipped() -> models.Llama:
    return weights.load(SHIPPED["model"])


@pytest.fixture(scope="module")
def tokens(shipped) -> jax.Array:
    size = shipped.config.vocab_size
    return calibrate.read_tokens(SHIPPED["text"], vocab_size=size, num_texts=2, length=64)


def test_the_shipped_model_is_loaded(shipped, tokens) -> None:
    assert shipped.config.num_layers == 4 and shipped.config.dtype == jnp.float32
    log_probabilities = jax.nn.log_softmax(jax.jit(shipped)(tokens)[:, :-1])
    loss = -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()
    # A model that had learnt nothing would lose log(256) = 5.5 nats a byte.
    assert loss < 2.5


@pytest.mark.full
def test_every_head_of_every_layer_keeps_the_recall(shipped, tokens) -> None:
    profile = calibrate.calibrate(shipped, tokens, strategy=STRATEGY, recall=0.9)
    assert profile.thresholds.shape == profile.recall.shape == profile.density.shape == (4, 8)
    assert (profile.recall >= 0.9 - 1e-5).all()
    assert (profile.density < 1.0).any()


def test_what_is_measured_is_what_was_found(shipped, tokens) -> None:
    thresholds = jnp.asarray(np.linspace(0.0, 1.0, 32, dtype=np.float32).reshape(4, 8))
    strategy = XAttention(threshold=thresholds, stride=4, block_size=8)
    profile = calibrate.measure(shipped, tokens, strategy)
    np.testing.assert_array_equal(profile.thresholds, thresholds)
    np.testing.assert_allclose([profile.recall[3, 7], profile.density[3, 7]], 1.0, atol=1e-5)


@pytest.mark.full
def test_the_loss_at_threshold_1_is_that_of_dense_attention(shipped, tokens) -> None:
    everything = XAttention(threshold=jnp.ones((4, 8)), stride=4, block_size=8)
    log_probabilities = jax.nn.log_softmax(jax.jit(shipped)(tokens)[:, :-1])
    dense = -jnp.take_along_axis(log_probabilities, tokens[:, 1:, None], axis=-1).mean()
    loss = jax.jit(lambda strategy: calibrate.mean_loss(shipped, tokens, strategy))(everything)
    np.testing.assert_allclose(loss, dense, atol=1e-4)


def _rows(printed: str) -> list[tuple[str, str]]:
    """The layer and its lowest recall in every line of a table."""
    return re.findall(r"│ (\d+) .*│ (0\.\d{4}|1\.0000) +│ \S+ +│$", printed, re.MULTILINE)


def test_the_command_writes_what_the_model_can_scan(tmp_path, capsys) -> None:
    output = tmp_path / "thresholds.json"
    sizes = {"stride": 4, "block_size": 8, "num_texts": 2, "sequence_length": 64}
    calibrate.main(arguments(output=output, recall=0.8, **sizes))
    stacked = calibration.stack(configuration.load(output), 4)
    assert (stacked.stride, stacked.block_size) == (4, 8)
    assert stacked.threshold.shape == (4, 8)
    assert (stacked.threshold >= 0).all() and (stacked.threshold < 1).all()
    printed = capsys.readouterr().out
    assert f"wrote {output}" in printed.replace("\n", "")
    # One line per layer, each with a recall of 0.8 and more.
    rows = _rows(printed)
    assert [int(layer) for layer, _ in rows] == [0, 1, 2, 3]
    assert min(float(recall) for _, recall in rows) >= 0.8


@pytest.mark.full
def test_the_command_reduces_thresholds_within_the_loss(tmp_path, shipped, tokens) -> None:
    files = [tmp_path / name for name in ("profiled.json", "reduced.json")]
    sizes = {"stride": 4, "block_size": 8, "num_texts": 2, "sequence_length": 64}
    calibrate.main(arguments(output=files[0], **sizes))
    bound = {"num_reductions": 4, "max_loss_increase": 0.01}
    calibrate.main(arguments(output=files[1], **bound, **sizes))
    loss = jax.jit(lambda strategy: calibrate.mean_loss(shipped, tokens, strategy))
    profiled, reduced = (calibration.stack(configuration.load(file), 4) for file in files)
    assert (reduced.threshold <= profiled.threshold).all()
    assert (reduced.threshold < profiled.threshold).any()
    assert loss(reduced) <= loss(profiled) + 0.01 + 1e-4


def test_token_ids_are_read_from_arrays(tmp_path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(300, 310))
    found = calibrate.read_tokens(tmp_path / "ids.npy", vocab_size=310, num_texts=3, length=4)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found[:, 0], [300, 303, 306])
    np.testing.assert_array_equal(found[2], [306, 307, 308, 309])


@pytest.mark.parametrize(
    ("ids", "options", "message"),
    [
        (None, {"vocab_size": 300}, "is read as bytes, but the model has vocab_size=300"),
        (None, {"length": 99}, "has 10 tokens, fewer than sequence_length=99"),
        (None, {"num_texts": 0}, "num_texts=0 must be at least 1"),
        (None, {"length": 1}, "sequence_length=1 at least 2"),
        (np.ones((2, 9), int), {}, r"holds int64 of shape \(2, 9\); save token ids as one row"),
        (np.ones(9), {}, r"holds float64 of shape \(9,\); save token ids as one row"),
        (np.arange(250, 260), {}, "has token ids from 250 to 259; the model has vocab_size=256"),
    ],
    ids=["vocabulary", "short", "texts", "length", "axes", "floats", "unknown"],
)
def test_texts_that_do_not_fit_are_refused(tmp_path, ids, options: dict, message: str) -> None:
    if ids is None:
        path = tmp_path / "text.txt"
        path.write_text("ten bytes.")
    else:
        path = tmp_path / "ids.npy"
        np.save(path, ids)
    call = {"vocab_size": 256, "num_texts": 1, "length": 4} | options
    with pytest.raises(ValueError, match=message):
        calibrate.read_tokens(path, **call)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small model, whose tokens are the words w0, w1, ...; a text begins with the last one."""
    folder = tmp_path_factory.mktemp("model")
    hf_weights.save(drawn()[0], folder)
    _save_tokenizer(folder, CONFIG.vocab_size)
    return folder


def _save_tokenizer(folder: pathlib.Path, vocab_size: int) -> None:
    bos = vocab_size - 1
    words = {f"w{token}": token for token in range(bos)} | {"<s>": bos}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<s>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))


def _save_words(path: pathlib.Path, ids: np.ndarray) -> pathlib.Path:
    path.write_text(" ".join(f"w{token}" for token in ids), encoding="utf-8")
    return path


WORDS = np.random.default_rng(0).integers(CONFIG.vocab_size - 1, size=60)
SIZES = {"stride": 4, "block_size": 8, "num_texts": 2, "sequence_length": 40}


def test_every_stretch_of_a_text_starts_as_prompts_do(folder, tmp_path) -> None:
    text, encode = _save_words(tmp_path / "text.txt", WORDS[:7]), Tokenizer.load(folder).encode
    size = CONFIG.vocab_size
    found = calibrate.read_tokens(text, vocab_size=size, num_texts=2, length=4, encode=encode)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, [[size - 1, *WORDS[:3]], [size - 1, *WORDS[4:7]]])
    with pytest.raises(ValueError, match=r"has 8 tokens, fewer than sequence_length=9"):
        calibrate.read_tokens(text, vocab_size=size, num_texts=1, length=9, encode=encode)
    # A tokenizer of another model, whose ids this one lacks.
    with pytest.raises(ValueError, match=r"has token ids from \d+ to \d+; .* vocab_size=5"):
        calibrate.read_tokens(text, vocab_size=5, num_texts=1, length=4, encode=encode)


def test_a_checkpoint_of_hugging_face_s_format(folder, tmp_path, capsys) -> None:
    text, output = _save_words(tmp_path / "text.txt", WORDS), tmp_path / "thresholds.json"
    calibrate.main(arguments(model=folder, text=text, output=output, recall=0.8, **SIZES))
    assert f"wrote {output}" in capsys.readouterr().out.replace("\n", "")
    found = calibration.stack(configuration.load(output), CONFIG.num_layers)
    # By the model as it was before it was saved.
    tokens = calibrate.read_tokens(
        text,
        vocab_size=CONFIG.vocab_size,
        num_texts=SIZES["num_texts"],
        length=SIZES["sequence_length"],
        encode=Tokenizer.load(folder).encode,
    )
    profile = calibrate.calibrate(drawn()[0], tokens, strategy=STRATEGY, recall=0.8)
    assert found.threshold.shape == (CONFIG.num_layers, CONFIG.num_heads)
    np.testing.assert_allclose(found.threshold, profile.thresholds, atol=1e-6)
    assert (profile.recall >= 0.8 - 1e-5).all() and (profile.density < 1).any()


def sliding(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    config = dataclasses.replace(CONFIG, sliding_window=6, sliding_layers=(0, 1, 2))
    hf_weights.save(drawn(config)[0], copy)
    # Token ids need no tokenizer.
    np.save(copy / "ids.npy", WORDS)
    return {"model": copy, "text": copy / "ids.npy"}


def made_for_short_texts(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 12}
    (copy / "config.json").write_text(json.dumps(settings))
    return {"model": copy}


def in_latin_1(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    (copy / "latin.txt").write_bytes("é".encode("latin-1"))
    return {"text": copy / "latin.txt"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (sliding, "layers 0, 1, 2 of this model have a sliding window of 6 tokens"),
        (made_for_short_texts, "sequence_length=40 exceeds the max_position=12 that the model was"),
        (in_latin_1, r"latin\.txt is not UTF-8: "),
    ],
    ids=["sliding", "max_position", "utf-8"],
)
def test_the_command_refuses_checkpoints_and_texts(folder, tmp_path, options, message: str) -> None:
    text = _save_words(tmp_path / "text.txt", WORDS)
    files = {"model": folder, "text": text, "output": tmp_path / "out.json"}
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        calibrate.main(arguments(**files | options(folder, tmp_path), **SIZES))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.json").exists()


def test_sliding_windows_are_refused() -> None:
    model, tokens = drawn(SLIDING_CONFIG)[0], jnp.zeros((1, 8), jnp.int32)
    per_layer = XAttention(threshold=jnp.ones((3, 4)), stride=4, block_size=8)
    calls = [
        lambda: calibrate.calibrate(model, tokens, strategy=STRATEGY, recall=0.9),
        lambda: calibrate.measure(model, tokens, per_layer),
        lambda: calibrate.mean_loss(model, tokens, per_layer),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="layers 1, 2 of this model have a sliding window of"):
            call()


def test_a_npz_needs_no_extra() -> None:
    program = (
        "import sys; sys.modules |= dict.fromkeys(['safetensors', 'tokenizers', 'jinja2']); "
        "import sparseattn_jax.models.calibrate"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="no SmolLM2 at .smollm2; `.ci/smollm2.py .smollm2` makes it"
)
@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2_keeps_the_recall(tmp_path, capsys, dtype: str) -> None:
    output = tmp_path / "thresholds.json"
    sizes = {"stride": 8, "block_size": 32, "num_texts": 2, "sequence_length": 256}
    calibrate.main(arguments(model=SMOLLM2, output=output, dtype=dtype, **sizes))
    found = calibration.stack(configuration.load(output), 30)
    assert found.threshold.shape == (30, 9)
    assert (found.threshold > 0).any() and (found.threshold < 1).all()
    rows = _rows(capsys.readouterr().out)
    assert [int(layer) for layer, _ in rows] == list(range(30))
    assert min(float(recall) for _, recall in rows) >= 0.9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere.npz"}, "error: .*No such file.*nowhere.npz"),
        (
            {"model": SHIPPED["text"]},
            r"error: model=\S+ is a file, but no .npz that training wrote",
        ),
        ({"model": "nowhere"}, "error: source=nowhere is neither a folder nor the name of a model"),
        ({"model": ASSETS}, "error: .* lacks tokenizer.json"),
        ({"text": "nowhere.txt"}, "error: .*No such file.*nowhere.txt"),
        ({"recall": 1.5}, r"error: recall=1.5 must lie in \[0, 1\]"),
        ({"stride": 6, "block_size": 8}, "error: stride=6 must divide block_size=8"),
    ],
    ids=["no-file", "no-npz", "no-folder", "no-checkpoint", "text", "recall", "stride"],
)
def test_the_command_says_what_is_wrong(tmp_path, options: dict, message: str) -> None:
    options = {"output": tmp_path / "out.json", "sequence_length": 32, "num_texts": 1} | options
    with pytest.raises(SystemExit, match=message):
        calibrate.main(arguments(**options))
    assert not (tmp_path / "out.json").exists()


def test_a_file_without_an_array_is_refused(tmp_path) -> None:
    with np.load(SHIPPED["model"]) as file:
        arrays = {name: file[name] for name in file.files if name != "final_norm.scale"}
    np.savez(tmp_path / "part.npz", **arrays)
    with pytest.raises(ValueError, match=r"odd: \['final_norm\.scale'\]"):
        weights.load(tmp_path / "part.npz")


def test_a_model_in_another_dtype(shipped) -> None:
    half = weights.load(SHIPPED["model"], dtype=jnp.bfloat16)
    assert half.config.dtype == half.config.param_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(half))} == {jnp.dtype("bfloat16")}
    assert jax.tree.structure(nnx.state(half)) == jax.tree.structure(nnx.state(shipped))
