"""LLaMA and its variants from their formulas, in float64 NumPy, one token and head at a time."""

import dataclasses
import math

import numpy as np


def rms_norm(x, scale, epsilon):
    """arXiv:1910.07467, eq. 4, with epsilon under the root."""
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + epsilon) * scale


def silu(x):
    return x / (1 + np.exp(-x))


def swiglu(x, gate, up, down):
    """arXiv:2002.05202, eq. 6, of three projections."""
    return linear(silu(linear(x, gate)) * linear(x, up), down)


def linear(x, projection):
    """A kernel, and a bias where there is one."""
    return x @ projection["kernel"] + projection.get("bias", 0)


def described(config):
    """The model's configuration as a dictionary."""
    return dataclasses.asdict(config) | {"rope_scaling": described_scaling(config.rope_scaling)}


def described_scaling(scaling):
    """A rotary scaling as a dictionary, with its kind."""
    return scaling and dataclasses.asdict(scaling) | {"kind": type(scaling).__name__}


def rope_frequency(pair, head_dim, theta, scaling=None, length=1):
    """Radians per position of one pair of channels, in a call with positions below `length`."""
    frequency = theta ** (-2 * pair / head_dim)
    if scaling is None:
        return frequency
    kind, factor = scaling["kind"], scaling["factor"]
    if kind == "LinearRopeScaling":
        return frequency / factor
    original = scaling["original_max_position"]
    if kind == "DynamicRopeScaling":
        if length <= original:
            return frequency
        stretch = factor * length / original - (factor - 1)
        return (theta * stretch ** (head_dim / (head_dim - 2))) ** (-2 * pair / head_dim)
    if kind == "YarnRopeScaling":
        return _yarn_frequency(pair, head_dim, theta, scaling)
    wavelength = 2 * math.pi / frequency
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


def _yarn_frequency(pair, head_dim, theta, scaling):
    """arXiv:2309.00071, section 3.2, by the three cases of a pair on or beside the ramp."""
    frequency = theta ** (-2 * pair / head_dim)
    # The pair, not whole, that turns beta_fast or beta_slow times in the original context.
    ends = []
    for beta, rounded in ((scaling["beta_fast"], math.floor), (scaling["beta_slow"], math.ceil)):
        wanted = 2 * math.pi * beta / scaling["original_max_position"]
        end = -math.log(wanted, theta) * head_dim / 2
        ends.append(rounded(end) if scaling["truncate"] else end)
    first, last = max(ends[0], 0), min(ends[1], head_dim - 1)
    if pair <= first:
        return frequency
    if pair >= last:
        return frequency / scaling["factor"]
    ramp = (pair - first) / (last - first)
    return (1 - ramp) * frequency + ramp * frequency / scaling["factor"]


def rope_magnitude(scaling):
    """arXiv:2309.00071, section 3.4: sqrt(1 / t) = 0.1 ln(s) + 1, or what replaces it."""
    if scaling is None or scaling["kind"] != "YarnRopeScaling":
        return 1
    if scaling["attention_factor"] is not None:
        return scaling["attention_factor"]
    log = math.log(scaling["factor"])
    if scaling["mscale"] is not None:
        return (0.1 * scaling["mscale"] * log + 1) / (0.1 * scaling["mscale_all_dim"] * log + 1)
    return 0.1 * log + 1


def rope(x, position, theta, scaling=None, length=1):
    """One head's vector, its halves read as the real and imaginary parts of complex numbers."""
    half = len(x) // 2
    frequencies = [rope_frequency(p, len(x), theta, scaling, length) for p in range(half)]
    turned = (x[:half] + 1j * x[half:]) * np.exp(1j * position * np.array(frequencies))
    return np.concatenate([turned.real, turned.imag]) * rope_magnitude(scaling)


def attention(q, k, v, gates=None, window=None):
    """Causal grouped-query attention of one sequence: q [T, N, H], k and v [T, K, H].

    `gates` [K] scales the outputs of the query heads that read each kv head; with a window a
    token sees that many tokens, itself counted.
    """
    group = q.shape[1] // k.shape[1]
    out = np.zeros_like(q)
    for token in range(q.shape[0]):
        for head in range(q.shape[1]):
            kv_head = head // group
            seen = slice(0 if window is None else max(0, token + 1 - window), token + 1)
            logits = k[seen, kv_head] @ q[token, head] / math.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            out[token, head] = weights @ v[seen, kv_head] / weights.sum()
            if gates is not None:
                out[token, head] *= gates[kv_head]
    return out


def forward(weights, tokens, config, *, positions=None, gates=None):
    """Logits [B, T, V].

    Args:
        weights: nested dict of the model's parameters, layers stacked.
        tokens: [B, T].
        config: dict of the model's configuration, as `described` makes it.
        positions: [B, T], by default 0, 1, ...
        gates: [L, K] factors of the attention output.
    """
    if positions is None:
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    length = positions.max() + 1  # of all sequences
    sequences = zip(tokens, positions, strict=True)
    return np.stack(
        [_sequence(weights, row, place, length, config, gates) for row, place in sequences]
    )


def _sequence(weights, tokens, positions, length, config, gates):
    epsilon, head_dim = config["norm_epsilon"], config["head_dim"]
    x = weights["embedding"][tokens]
    for index in range(config["num_layers"]):
        layer = _layer(weights["layers"], index)
        projections = layer["attention"]
        normed = rms_norm(x, layer["attention_norm"]["scale"], epsilon)
        q, k, v = (
            linear(normed, projections[name]).reshape(len(tokens), -1, head_dim)
            for name in ("query", "key", "value")
        )
        if config["qk_norm"]:
            q = rms_norm(q, projections["query_norm"]["scale"], epsilon)
            k = rms_norm(k, projections["key_norm"]["scale"], epsilon)
        q, k = (_rope_heads(heads, positions, length, config) for heads in (q, k))
        window = config["sliding_window"] if index in config["sliding_layers"] else None
        heads = attention(q, k, v, None if gates is None else gates[index], window)
        x = x + linear(heads.reshape(len(tokens), -1), projections["output"])
        normed = rms_norm(x, layer["mlp_norm"]["scale"], epsilon)
        x = x + swiglu(normed, *(layer["mlp"][name] for name in ("gate", "up", "down")))
    x = rms_norm(x, weights["final_norm"]["scale"], epsilon)
    return x @ weights["embedding" if config["tie_embeddings"] else "head"].T


def _layer(stacked, index):
    if isinstance(stacked, dict):
        return {name: _layer(child, index) for name, child in stacked.items()}
    return stacked[index]


def _rope_heads(heads, positions, length, config):
    out = np.empty_like(heads)
    for token, position in enumerate(positions):
        for head in range(heads.shape[1]):
            turning = config["rope_theta"], config["rope_scaling"], length
            out[token, head] = rope(heads[token, head], position, *turning)
    return out
