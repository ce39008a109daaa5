"""Generation by its definitions in float64 NumPy: what is drawn from, and a dense simulation."""

import numpy as np

from tests.oracles import attention, llama


def probabilities(
    logits: np.ndarray, temperature: float, top_k: int | None, top_p: float | None
) -> np.ndarray:
    """[V]: softmax(logits / temperature), cut to the top_k first, then to the nucleus of top_p."""
    weights = np.exp(np.asarray(logits, np.float64) / temperature)
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))[:top_k]
    if top_p is not None:
        held, total = 0.0, sum(weights[token] for token in order)
        for number, token in enumerate(order, start=1):
            held += weights[token]
            if held >= top_p * total:
                order = order[:number]
                break
    kept = np.zeros_like(weights)
    kept[order] = weights[order]
    return kept / kept.sum()


def greedy(
    weights: dict,
    config: dict,
    prompt: np.ndarray,
    num_new: int,
    *,
    sinks: np.ndarray,
    recents: np.ndarray,
) -> tuple[list[int], np.ndarray]:
    """The tokens that follow a prompt, and the logits [num_new, V] that each was chosen by.

    Every token anew reads the whole sequence: head n of layer l sees the first sinks[l, n] tokens
    and the last recents[l, n] up to its own.
    """
    tokens, found = list(prompt), []
    for _ in range(num_new):
        found.append(_last_logits(weights, config, np.array(tokens), sinks, recents))
        tokens.append(int(found[-1].argmax()))
    return tokens[len(prompt) :], np.stack(found)


def _last_logits(
    weights: dict, config: dict, tokens: np.ndarray, sinks: np.ndarray, recents: np.ndarray
) -> np.ndarray:
    epsilon, head_dim, length = config["norm_epsilon"], config["head_dim"], len(tokens)
    keys, queries = np.arange(length)[None, :], np.arange(length)[:, None]
    x = weights["embedding"][tokens]
    for index in range(config["num_layers"]):
        layer = _layer(weights["layers"], index)
        projections = layer["attention"]
        normed = llama.rms_norm(x, layer["attention_norm"]["scale"], epsilon)
        q, k, v = (
            llama.linear(normed, projections[name]).reshape(length, -1, head_dim)
            for name in ("query", "key", "value")
        )
        q, k = (_rotated(heads, config["rope_theta"]) for heads in (q, k))
        sink, recent = sinks[index][:, None, None], recents[index][:, None, None]
        keep = (keys <= queries) & ((keys < sink) | (keys > queries - recent))
        heads, _ = attention.attention(q[None], k[None], v[None], keep[None])
        x = x + llama.linear(heads.reshape(length, -1), projections["output"])
        normed = llama.rms_norm(x, layer["mlp_norm"]["scale"], epsilon)
        x = x + llama.swiglu(normed, *(layer["mlp"][name] for name in ("gate", "up", "down")))
    last = llama.rms_norm(x[-1], weights["final_norm"]["scale"], epsilon)
    return weights["embedding" if config["tie_embeddings"] else "head"] @ last


def _layer(stacked: dict | np.ndarray, index: int) -> dict | np.ndarray:
    if isinstance(stacked, dict):
        return {name: _layer(child, index) for name, child in stacked.items()}
    return stacked[index]


def _rotated(heads: np.ndarray, theta: float) -> np.ndarray:
    """Every head [T, N, H] turned to its position; halves are the parts of complex numbers."""
    length, _, head_dim = heads.shape
    half = head_dim // 2
    angles = np.arange(length)[:, None] * theta ** (-np.arange(half) / half)
    turned = (heads[..., :half] + 1j * heads[..., half:]) * np.exp(1j * angles)[:, None]
    return np.concatenate([turned.real, turned.imag], axis=-1)
