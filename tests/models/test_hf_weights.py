"""Checkpoints in Hugging Face's format: read, written, and refused with nothing half loaded."""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from sparseattn_jax import models
from sparseattn_jax.models import hf_weights, hub
from sparseattn_jax.models.weights import name_of

SETTINGS = {
    "model_type": "llama",
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
PLAIN = hf_weights.config_from_hf(SETTINGS, dtype=jnp.float32)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN = "model.layers.1.mlp.down_proj.weight"
SHAPES = {
    EMBEDDING: (11, 16),
    "model.norm.weight": (16,),
    HEAD: (11, 16),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "mlp.down_proj": (16, 24),
        }.items()
    },
}
FAMILIES = {
    "llama": {},
    "llama-tied-biases": {"tie_embeddings": True, "attention_bias": True, "output_bias": True},
    "mistral": {"sliding_window": 3, "sliding_layers": (0, 1)},
    "qwen2": {"attention_bias": True},
    "qwen3": {"qk_norm": True, "tie_embeddings": True},
}


def drawn_tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def write(folder, tensors, settings=SETTINGS):
    """A checkpoint in one file."""
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def drawn_model(config):
    """Parameters that tell each other apart."""
    graphdef, params = nnx.split(nnx.eval_shape(lambda: models.Llama(config, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)
    draw = lambda leaf: jnp.asarray(rng.random(leaf.shape, np.float32), leaf.dtype)  # noqa: E731
    return nnx.merge(graphdef, jax.tree.map(draw, params))


def parameters(model):
    leaves = jax.tree.leaves_with_path(nnx.to_pure_dict(nnx.state(model)))
    return {name_of(key): leaf for key, leaf in leaves}


def assert_same(model, other):
    assert model.config == other.config
    expected = parameters(other)
    assert parameters(model).keys() == expected.keys()
    for name, array in parameters(model).items():
        assert array.dtype == expected[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(expected[name]), name)


def test_every_tensor_comes_to_its_place(tmp_path):
    tensors = drawn_tensors()
    model = hf_weights.load(write(tmp_path, tensors), dtype=jnp.float32)
    assert model.config == PLAIN
    places = {
        "attention_norm.scale": "input_layernorm",
        "mlp_norm.scale": "post_attention_layernorm",
        "attention.query.kernel": "self_attn.q_proj",
        "attention.key.kernel": "self_attn.k_proj",
        "attention.value.kernel": "self_attn.v_proj",
        "attention.output.kernel": "self_attn.o_proj",
        "mlp.gate.kernel": "mlp.gate_proj",
        "mlp.up.kernel": "mlp.up_proj",
        "mlp.down.kernel": "mlp.down_proj",
    }
    expected = {
        "embedding": tensors[EMBEDDING],
        "head": tensors[HEAD],
        "final_norm.scale": tensors["model.norm.weight"],
    }
    for path, name in places.items():
        of_layers = [tensors[f"model.layers.{layer}.{name}.weight"].T for layer in range(2)]
        expected[f"layers.{path}"] = np.stack(of_layers)
    assert parameters(model).keys() == expected.keys()
    for path, array in parameters(model).items():
        np.testing.assert_array_equal(array, expected[path], path)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_saved_loads(name, tmp_path):
    model = drawn_model(dataclasses.replace(PLAIN, **FAMILIES[name]))
    hf_weights.save(model, tmp_path / "new")
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["config.json", "model.safetensors"]
    assert_same(hf_weights.load(tmp_path / "new", dtype=jnp.float32), model)


def test_shards_are_of_bounded_size(tmp_path):
    config = dataclasses.replace(PLAIN, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    model = drawn_model(config)
    hf_weights.save(model, tmp_path, max_shard_bytes=2000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    count = len(shards)
    assert [path.name for path in shards] == [
        f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)
    ]
    sizes = [
        sum(tensor.nbytes for tensor in safetensors.numpy.load_file(path).values())
        for path in shards
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes) == 2 * sum(map(math.prod, SHAPES.values()))
    assert max(sizes) <= 2000
    # No two neighbours would have gone into one.
    assert all(a + b > 2000 for a, b in itertools.pairwise(sizes))
    assert index["weight_map"].keys() == SHAPES.keys()
    assert_same(hf_weights.load(str(tmp_path)), model)


@pytest.mark.parametrize("stored", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16, jnp.bfloat16])
def test_dtypes_are_converted(stored, dtype, tmp_path):
    tensors = drawn_tensors(stored)
    loaded = parameters(hf_weights.load(write(tmp_path, tensors), dtype=dtype))
    for array, tensor in (
        (loaded["embedding"], tensors[EMBEDDING]),
        (loaded["layers.mlp.down.kernel"][1], tensors[DOWN].T),
    ):
        assert array.dtype == dtype
        np.testing.assert_array_equal(np.asarray(array), tensor.astype(dtype))


def test_devices_get_their_parts(tmp_path, monkeypatch):
    model = drawn_model(dataclasses.replace(PLAIN, num_kv_heads=4))
    hf_weights.save(model, tmp_path / "new", max_shard_bytes=4000)
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    asked, num_read = {}, []

    def shardings(path, shape):
        axes = {1: (), 2: (None, "model"), 3: ("data", None, "model")}[len(shape)]
        asked[path] = NamedSharding(mesh, PartitionSpec(*axes))
        return asked[path]

    read = hf_weights._Tensor.read

    def counted(self, index):
        values = read(self, index)
        num_read.append(values.size)
        return values

    monkeypatch.setattr(hf_weights._Tensor, "read", counted)
    loaded = hf_weights.load(tmp_path / "new", dtype=jnp.float32, shardings=shardings)
    assert_same(loaded, model)
    for path, array in parameters(loaded).items():
        assert array.sharding == asked[path]
    # Every part is read once, though two devices hold it or all.
    assert sum(num_read) == sum(array.size for array in parameters(model).values())


MEASURE = """
import pathlib, re, sys
import jax.numpy as jnp
from sparseattn_jax.models import hf_weights, hub
small, large = sys.argv[1:]
status = pathlib.Path("/proc/self/status")
peak = lambda: 1024 * int(re.search(r"VmHWM:\\s+([0-9]+) kB", status.read_text())[1])
hf_weights.load(small, dtype=jnp.float32)
before = peak()
model = hf_weights.load(large, dtype=jnp.float32)
print(peak() - before)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="needs Linux")
def test_the_host_holds_little_more_than_the_model(tmp_path):
    """On a CPU, whose device memory is the host's: the model itself is part of what is counted."""
    wide = {"vocab_size": 8192, "embed_dim": 512, "mlp_dim": 1536, "num_layers": 8}
    model = drawn_model(dataclasses.replace(PLAIN, **wide, num_kv_heads=4, head_dim=32))
    hf_weights.save(model, tmp_path / "large", max_shard_bytes=3 * 10**7)
    small = write(tmp_path / "small", drawn_tensors())
    size = sum(array.nbytes for array in parameters(model).values())
    assert size > 10**8
    command = [sys.executable, "-c", MEASURE, str(small), str(tmp_path / "large")]
    # Else glibc keeps blocks of up to 32 MB that were freed, each more than a tensor here.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "100000"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=env)
    imports = 10**7
    assert size < int(done.stdout) < 1.2 * size + imports


def without(name):
    def change(folder, tensors):
        write(folder, {key: tensor for key, tensor in tensors.items() if key != name})

    return change


def with_tensors(**changed):
    def change(folder, tensors):
        write(folder, {**tensors, **{name.replace("__", "."): v for name, v in changed.items()}})

    return change


def with_file(name, content):
    def change(folder, tensors):
        (folder / name).write_text(content)

    return change


def truncated(folder, tensors):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def sharded(*, missing=False, misplaced=False, unlisted=False):
    """Two shards, and an index with a fault."""

    def change(folder, tensors):
        first = {name: tensor for name, tensor in tensors.items() if name != DOWN}
        weight_map = dict.fromkeys(first, "a.safetensors") | {DOWN: "b.safetensors"}
        (folder / "model.safetensors").unlink()
        safetensors.numpy.save_file(first, folder / "a.safetensors")
        if not missing:
            safetensors.numpy.save_file({DOWN: tensors[DOWN]}, folder / "b.safetensors")
        if misplaced:
            weight_map[DOWN] = "a.safetensors"
            (folder / "b.safetensors").unlink()
        if unlisted:
            del weight_map[EMBEDDING]
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))

    return change


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        pytest.param(without(DOWN), f"lacks {DOWN}", id="missing"),
        pytest.param(without(HEAD), f"lacks {HEAD}", id="untied-without-head"),
        pytest.param(
            with_tensors(extra__weight=np.zeros(3, np.float32)),
            "holds extra.weight, which the model of its config lacks",
            id="unknown",
        ),
        pytest.param(
            with_tensors(**{DOWN.replace(".", "__"): np.zeros((24, 16), np.float32)}),
            rf"{DOWN} has shape \(24, 16\); by config.json it is \(16, 24\)",
            id="shape",
        ),
        pytest.param(
            with_tensors(**{DOWN.replace(".", "__"): np.zeros((16, 24), np.int8)}),
            f"model.safetensors: {DOWN} is I8; tensors must be F32, BF16, F16",
            id="dtype",
        ),
        pytest.param(truncated, "model.safetensors is truncated or no safetensors", id="truncated"),
        pytest.param(
            with_file("model.safetensors", "{}"),
            "truncated or no safetensors file",
            id="no-tensors",
        ),
        pytest.param(sharded(missing=True), "lacks b.safetensors, which .*index", id="no-shard"),
        pytest.param(sharded(misplaced=True), f"disagree about {DOWN}", id="misplaced"),
        pytest.param(sharded(unlisted=True), f"disagree about {EMBEDDING}", id="unlisted"),
        pytest.param(
            with_file("model.safetensors.index.json", "{}"), "lacks its weight_map", id="no-map"
        ),
        pytest.param(
            with_file("model.safetensors.index.json", '{"weight_map": {"a": ["b"]}}'),
            "lacks its weight_map, from tensors to files",
            id="odd-map",
        ),
        pytest.param(
            lambda folder, tensors: (folder / "model.safetensors").unlink(),
            "holds neither model.safetensors nor model.safetensors.index.json",
            id="no-weights",
        ),
        pytest.param(
            lambda folder, tensors: (folder / "config.json").unlink(),
            "lacks config.json",
            id="no-config",
        ),
        pytest.param(with_file("config.json", "{"), "config.json is not JSON", id="broken-config"),
        pytest.param(with_file("config.json", "[]"), "must hold an object, not list", id="list"),
        pytest.param(
            with_file("config.json", json.dumps({**SETTINGS, "attn_scale": 1})),
            "config.json: attn_scale=1 is not known here",
            id="unknown-key",
        ),
        pytest.param(
            with_file("config.json", json.dumps({**SETTINGS, "num_hidden_layers": 1})),
            r"holds model.layers.1.input_layernorm.weight, .* and 4 more, which the model",
            id="fewer-layers",
        ),
    ],
)
def test_refuses(change, sentence, tmp_path, monkeypatch):
    tensors = drawn_tensors()
    change(write(tmp_path, tensors), tensors)
    # All is known before the first weight is read.
    monkeypatch.setattr(hf_weights._Tensor, "read", None)
    with pytest.raises(ValueError, match=sentence):
        hf_weights.load(tmp_path)


def test_shards_of_any_name_load(tmp_path):
    tensors = drawn_tensors()
    expected = hf_weights.load(write(tmp_path, tensors), dtype=jnp.float32)
    sharded()(tmp_path, tensors)
    assert_same(hf_weights.load(tmp_path, dtype=jnp.float32), expected)


def test_tables_of_rotary_frequencies_are_passed_over(tmp_path):
    tensors = drawn_tensors()
    for name in ("model.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.inv_freq"):
        tensors[name] = np.zeros(2, np.float32)
    hf_weights.load(write(tmp_path, tensors))


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
    tensors, settings = drawn_tensors(), {**SETTINGS, "tie_word_embeddings": True}
    tensors[HEAD] = tensors[EMBEDDING]
    model = hf_weights.load(write(tmp_path / "equal", tensors, settings), dtype=jnp.float32)
    assert "head" not in parameters(model)
    tensors[HEAD] = tensors[EMBEDDING] + np.eye(11, 16, dtype=np.float32)
    with pytest.raises(ValueError, match=r"ties lm_head.weight to .* but they differ"):
        hf_weights.load(write(tmp_path / "unequal", tensors, settings))
    tensors[HEAD] = tensors[HEAD][1:]
    with pytest.raises(ValueError, match=r"lm_head.weight has shape \(10, 16\)"):
        hf_weights.load(write(tmp_path / "shorter", tensors, settings))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "a.safetensors.index.json"])
def test_save_refuses_a_folder_with_a_checkpoint(name, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name}; save into a folder without a checkpoint"):
        hf_weights.save(drawn_model(PLAIN), tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_save_refuses_what_no_file_can_say(tmp_path):
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        hf_weights.save(drawn_model(PLAIN), tmp_path, max_shard_bytes=0)
    odd = dataclasses.replace(PLAIN, output_bias=True)
    with pytest.raises(ValueError, match=r"none of llama, .* output_bias=True"):
        hf_weights.save(drawn_model(odd), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_save_that_broke_off_does_not_load(tmp_path, monkeypatch):
    def broken(*args, **options):
        raise OSError("disk is full")

    monkeypatch.setattr(safetensors.numpy, "save_file", broken)
    with pytest.raises(OSError, match="disk is full"):
        hf_weights.save(drawn_model(PLAIN), tmp_path)
    with pytest.raises(ValueError, match=r"lacks config.json"):
        hf_weights.load(tmp_path)


def test_a_name_is_asked_of_the_hub(tmp_path, monkeypatch):
    tensors, asked = drawn_tensors(), []
    write(tmp_path, tensors)

    def folder_of(source, *, revision):
        asked.append((source, revision))
        return tmp_path

    monkeypatch.setattr(hub, "folder_of", folder_of)
    model = hf_weights.load("organisation/model", dtype=jnp.float32, revision="v2")
    np.testing.assert_array_equal(model.embedding[...], tensors[EMBEDDING])
    assert asked == [("organisation/model", "v2")]


IN_TRANSFORMERS = """
import sys
import numpy as np, torch, transformers
tokens = torch.from_numpy(np.load("tokens.npy")).long()
for name in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    with torch.no_grad():
        np.save(f"{name}.npy", model(tokens).logits.numpy())
"""
has_transformers = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


@pytest.mark.skipif(not has_transformers, reason="needs torch and transformers")
def test_what_is_saved_gives_the_same_logits_in_transformers(tmp_path):
    tokens = np.random.default_rng(0).integers(11, size=(2, 9), dtype=np.int32)
    np.save(tmp_path / "tokens.npy", tokens)
    drawn = {
        name: drawn_model(dataclasses.replace(PLAIN, **changes))
        for name, changes in FAMILIES.items()
    }
    for name, model in drawn.items():
        hf_weights.save(model, tmp_path / name, max_shard_bytes=4000)
    # Elsewhere, because transformers takes a folder called kernels for a package of that name.
    command = [sys.executable, "-P", "-c", IN_TRANSFORMERS, *FAMILIES]
    subprocess.run(command, cwd=tmp_path, check=True)
    for name, model in drawn.items():
        expected = np.load(tmp_path / f"{name}.npy")
        scale = np.abs(expected).max()
        np.testing.assert_allclose(model(tokens), expected, rtol=1e-4, atol=1e-5 * scale)
