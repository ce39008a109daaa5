"""LLaMA from its formulas, in float64 NumPy, one token and one head at a time."""

import math

import numpy as np


def rms_norm(x, scale, epsilon):
    """arXiv:1910.07467, eq. 4, with epsilon under the root."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    """arXiv:2002.05202, eq. 6, without biases."""
    return (silu(x @ gate) * (x @ up)) @ down


def rope_frequency(pair, head_dim, theta, scaling=None):
    """Radians per position of one pair of channels; `scaling` by its three cases."""
    frequency = theta ** (-2 * pair / head_dim)
    if scaling is None:
        return frequency
    wavelength = 2 * math.pi / frequency
    original = scaling["original_max_position"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


def rope(x, position, theta, scaling=None):
    """One head's vector, its halves read as the real and imaginary parts of complex numbers."""
    half = len(x) // 2
    turns = [rope_frequency(pair, len(x), theta, scaling) * position for pair in range(half)]
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * np.array(turns))
    return np.concatenate([turned.real, turned.imag])


def attention(q, k, v, gates=None):
    """Causal grouped-query attention of one sequence: q [T, N, H], k and v [T, K, H].

    `gates` [K] scales the outputs of the query heads that read each kv head.
    """
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for token in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv_head = head // group
            logits = k[: token + 1, kv_head] @ q[token, head] / math.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            out[token, head] = weights @ v[: token + 1, kv_head] / weights.sum()
            if gates is not None:
                out[token, head] *= gates[kv_head]
    return out


def forward(weights, tokens, config, *, positions=None, gates=None):
    """Logits [B, T, V].

    Args:
        weights: nested dict of the model's parameters, layers stacked.
        tokens: [B, T].
        config: dict of the model's configuration.
        positions: [B, T], by default 0, 1, ...
        gates: [L, K] factors of the attention output.
    """
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    sequences = zip(tokens, positions, strict=True)
    return np.stack([_sequence(weights, row, place, config, gates) for row, place in sequences])


def _sequence(weights, tokens, positions, config, gates):
    epsilon, head_dim = config["norm_epsilon"], config["head_dim"]
    x = weights["embedding"][tokens]
    for index in range(config["num_layers"]):
        layer = _layer(weights["layers"], index)
        projections = layer["attention"]
        normed = rms_norm(x, layer["attention_norm"]["scale"], epsilon)
        q, k, v = (
            (normed @ projections[name]["kernel"]).reshape(len(tokens), -1, head_dim)
            for name in ("query", "key", "value")
        )
        q, k = (_rope_heads(heads, positions, config) for heads in (q, k))
        heads = attention(q, k, v, None if gates is None else gates[index])
        x = x + heads.reshape(len(tokens), -1) @ projections["output"]["kernel"]
        normed = rms_norm(x, layer["mlp_norm"]["scale"], epsilon)
        x = x + swiglu(normed, *(layer["mlp"][name]["kernel"] for name in ("gate", "up", "down")))
    x = rms_norm(x, weights["final_norm"]["scale"], epsilon)
    return x @ weights["embedding" if config["tie_embeddings"] else "head"].T


def _layer(stacked, index):
    if isinstance(stacked, dict):
        return {name: _layer(child, index) for name, child in stacked.items()}
    return stacked[index]


def _rope_heads(heads, positions, config):
    out = np.empty_like(heads)
    for token, position in enumerate(positions):
        for head in range(heads.shape[1]):
            out[token, head] = rope(
                heads[token, head], position, config["rope_theta"], config["rope_scaling"]
            )
    return out
