"""The command line, from a folder of a checkpoint to the text on the terminal."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest
import tokenizers

from sparseattn_jax import Full, XAttention, configuration, head_gates
from sparseattn_jax.configuration import Configuration
from sparseattn_jax.models import generation, hf_weights
from sparseattn_jax.models.decoding import generate, stream
from sparseattn_jax.models.policy import Policy
from sparseattn_jax.models.sampling import Sampling
from sparseattn_jax.models.tokenizer import Tokenizer
from tests.models.small_models import CONFIG, drawn

SMOLLM2 = pathlib.Path(__file__).parents[2] / ".smollm2"
TEXT = "w3 w14 w1 w5 w9 w2 w6"
TOKENS = [3, 14, 1, 5, 9, 2, 6]
EOS = CONFIG.vocab_size - 1
MASKS = np.array([[True, False], [False, False], [True, True]])
TEMPLATE = "{% for message in messages %}w20 {{ message.content }} w21{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The small model, whose tokens are the words w0, w1, ..., the last of which ends a text."""
    folder = tmp_path_factory.mktemp("model")
    hf_weights.save(drawn()[0], folder)
    words = {f"w{token}": token for token in range(EOS)} | {"<end>": EOS}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def arguments(folder: pathlib.Path, *flags: str, **options: object) -> list[str]:
    settings = {"model": folder, "max_new_tokens": 6, "dtype": "float32", "capacity": 32} | options
    if "prompt_file" not in settings:
        settings = {"prompt": TEXT} | settings
    named = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [*named, *flags]


def expected(prompt: list[int], policy: Policy | None = None, **options) -> str:
    call = {"max_new_tokens": 6, "stop_tokens": (EOS,), "capacity": 32} | options
    pieces = stream(drawn()[0], [prompt], policy=policy, **call)
    words = np.concatenate([piece.tokens[0, : piece.lengths[0]] for piece in pieces])
    return " ".join(f"w{word}" for word in words if word != EOS)


def test_the_continuation_is_printed(folder, capsys) -> None:
    generation.main(arguments(folder))
    printed, progress = capsys.readouterr()
    assert printed == expected(TOKENS) + "\n"
    assert re.search(r"prefill .* 7/7 tokens", progress)


def test_a_file_s_text_as_a_message(folder, tmp_path, capsys) -> None:
    (tmp_path / "prompt.txt").write_text("w3 w14 w1 w5 w9")
    generation.main(arguments(folder, "--chat", prompt_file=tmp_path / "prompt.txt"))
    assert capsys.readouterr().out == expected([20, 3, 14, 1, 5, 9, 21]) + "\n"


def test_strategies_and_masks_are_read(folder, tmp_path, capsys) -> None:
    strategies = Configuration(strategy=Full(block_size=8))
    configuration.save(strategies, tmp_path / "strategy.json")
    head_gates.write_head_masks(tmp_path / "masks.tsv", MASKS)
    files = {"strategy": tmp_path / "strategy.json", "head_masks": tmp_path / "masks.tsv"}
    generation.main(arguments(folder, sink_size=1, recent_size=2, **files))
    policy = Policy.of(CONFIG, strategies, head_masks=MASKS, sink_size=1, recent_size=2)
    text = expected(TOKENS, policy)
    assert capsys.readouterr().out == text + "\n"
    assert text != expected(TOKENS)


def command(folder: pathlib.Path, **options: object) -> generation.CommandLine:
    return generation.CommandLine(model=str(folder), prompt=TEXT, **options)


def test_a_folder_of_gates_says_the_sizes(folder, tmp_path) -> None:
    gates = np.array([[0.9, 0.1], [0.2, 0.3], [0.8, 0.7]])
    published = head_gates.HeadGates(gates=gates, sink_size=3, recent_size=4)
    head_gates.write_duo_attention(tmp_path, published)
    policy = generation.read_policy(command(folder, head_masks=tmp_path), CONFIG)
    assert policy.is_full.tolist() == [[True, False], [False, False], [True, True]]
    assert policy.window == (3, 4)
    given = command(folder, head_masks=tmp_path, sparsity=1.0, recent_size=9)
    policy = generation.read_policy(given, CONFIG)
    assert not policy.is_full.any() and policy.window == (3, 9)


@pytest.mark.full
def test_what_is_drawn_is_of_the_seed(folder, capsys) -> None:
    generation.main(arguments(folder, temperature=2.0, top_k=9, top_p=0.9, seed=3))
    sampling = Sampling(temperature=2.0, top_k=9, top_p=0.9)
    text = expected(TOKENS, sampling=sampling, key=jax.random.key(3))
    assert capsys.readouterr().out == text + "\n"


def truncated(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    _copied(folder, copy)
    (shard,) = copy.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-100])
    return {"model": copy}


def without_a_key(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    _copied(folder, copy)
    settings = json.loads((copy / "config.json").read_text())
    del settings["num_hidden_layers"]
    (copy / "config.json").write_text(json.dumps(settings))
    return {"model": copy}


def of_another_model(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    head_gates.write_head_masks(copy / "masks.tsv", np.ones((4, 2), bool))
    return {"head_masks": copy / "masks.tsv"}


def with_an_unknown_strategy(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    (copy / "strategy.json").write_text('{"strategy": "dense"}')
    return {"strategy": copy / "strategy.json"}


def in_a_small_position_range(folder: pathlib.Path, copy: pathlib.Path) -> dict:
    _copied(folder, copy)
    settings = json.loads((copy / "config.json").read_text()) | {"max_position_embeddings": 12}
    (copy / "config.json").write_text(json.dumps(settings))
    return {"model": copy}


def _copied(folder: pathlib.Path, copy: pathlib.Path) -> None:
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "nowhere"}, "source=nowhere is neither a folder nor the name of a model"),
        (truncated, r"\.safetensors"),
        (without_a_key, "num_hidden_layers"),
        ({"capacity": 12}, "the longest prompt has 7 tokens, .* exceed the capacity=12"),
        (in_a_small_position_range, "exceed the max_position=12 that the model was made for"),
        (of_another_model, r"head_masks has shape \(4, 2\) .* 3 layers with 2 kv heads"),
        (with_an_unknown_strategy, "strategy='dense' is not known"),
        ({"strategy": "nowhere.json"}, "No such file.*nowhere.json"),
        ({"head_masks": "nowhere.tsv"}, "No such file.*nowhere.tsv"),
        ({"sink_size": 4}, "sink_size=4 has no use without head_masks"),
        ({"prompt_file": "nowhere.txt"}, "No such file.*nowhere.txt"),
        ({"prompt_file": "a.txt", "prompt": "w1"}, "pass one of prompt and prompt_file"),
        ({"prompt": " "}, r"prompts\[0\] is empty"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a positive number"),
        ({"top_k": 5}, "top_k=5 has no use without a temperature"),
    ],
    ids=lambda value: value.__name__ if callable(value) else str(value)[:30],
)
def test_says_what_is_wrong(folder, tmp_path, capsys, options, message: str) -> None:
    if callable(options):
        options = options(folder, tmp_path)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as caught:
        generation.main(arguments(folder, **options))
    assert caught.value.code != 0 and "\n" not in str(caught.value)
    printed, progress = capsys.readouterr()
    assert printed == "" and "prefill" not in progress


@pytest.mark.skipif(
    not SMOLLM2.is_dir(), reason="no SmolLM2 at .smollm2; `.ci/smollm2.py .smollm2` makes it"
)
@pytest.mark.full
def test_smollm2_answers(capsys) -> None:
    question = "What is the capital of France?"
    options = {"prompt": question, "max_new_tokens": 12, "capacity": 128, "chunk_size": 128}
    generation.main(arguments(SMOLLM2, "--chat", **options))
    dense = capsys.readouterr().out
    assert "Paris" in dense
    model = hf_weights.load(SMOLLM2, dtype="float32")
    tokens = Tokenizer.load(SMOLLM2).chat([{"role": "user", "content": question}])
    everything = Configuration(strategy=XAttention(threshold=1.0))
    found = generate(
        model, [tokens], max_new_tokens=8, policy=Policy.of(model.config, everything), capacity=128
    )
    assert dense.startswith(Tokenizer.load(SMOLLM2).decode(found.tokens[0].tolist()))
