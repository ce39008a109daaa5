"""What transformers computes for tiny models of each family: writes llama.npz and llama.json.

    python -m tests.goldens.make_llama_goldens

from the repository's root, in an environment of its own: `pip install torch transformers numpy`, of
the versions that llama.json names. Weights are not stored: both sides draw them from the tensors'
names, which are, with their shapes and each model's config.json as transformers writes it.

Of each case CASE of llama_cases.py there are, in float32,

    CASE/logits [2, LENGTH, V]
    CASE/hidden [L, 2, LENGTH, D]      the residual stream after each layer; the last one normed
    CASE/left, CASE/right [SHORTER, V] logits of the second sequence's last or first SHORTER tokens,
                                       where the rest of it is padding
"""

# pyright: reportMissingImports=false
# torch and transformers are installed where this is run, not where types are checked.

import json
import pathlib
import platform

import numpy as np
import torch
import transformers

from tests.goldens import llama_cases

_FOLDER = pathlib.Path(__file__).parent


def main():
    """Writes both files."""
    arrays, cases = {}, {}
    for name, settings in llama_cases.CASES.items():
        model = build(settings)
        cases[name] = {
            "config": json.loads(model.config.to_json_string()),
            "tensors": {
                tensor: " ".join(map(str, value.shape))
                for tensor, value in model.named_parameters()
            },
        }
        tokens = llama_cases.draw_tokens()
        logits, hidden = run(model, tokens, np.ones_like(tokens))
        arrays |= {f"{name}/logits": logits, f"{name}/hidden": hidden}
        for side in ("left", "right") if name in llama_cases.PADDED_CASES else ():
            mask = padding_mask(side)
            arrays[f"{name}/{side}"] = run(model, tokens, mask)[0][1, mask[1] == 1]
    np.savez_compressed(_FOLDER / "llama.npz", **arrays)
    provenance = {
        "command": "python -m tests.goldens.make_llama_goldens",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "numpy": np.__version__,
        },
        "cases": cases,
    }
    (_FOLDER / "llama.json").write_text(json.dumps(provenance, indent=1) + "\n")


def build(settings):
    """A model in float32 with drawn weights."""
    config = transformers.AutoConfig.for_model(**settings)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(torch.from_numpy(llama_cases.draw_weight(name, tuple(value.shape))))
    return model.eval()


def padding_mask(side):
    """1 at tokens and 0 at padding: [2, LENGTH], the first sequence has none."""
    mask = np.ones((2, llama_cases.LENGTH), np.int64)
    padding = llama_cases.LENGTH - llama_cases.SHORTER
    mask[1, slice(padding) if side == "left" else slice(-padding, None)] = 0
    return mask


def run(model, tokens, mask):
    """Logits and, after each layer, hidden states; positions do not count padding."""
    positions = np.maximum(mask.cumsum(axis=1) - 1, 0)
    with torch.no_grad():
        out = model(
            input_ids=torch.from_numpy(tokens).long(),
            attention_mask=torch.from_numpy(mask),
            position_ids=torch.from_numpy(positions),
            output_hidden_states=True,
            use_cache=False,
        )
    return out.logits.numpy(), np.stack([hidden.numpy() for hidden in out.hidden_states[1:]])


if __name__ == "__main__":
    main()
