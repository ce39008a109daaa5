"""Rotary frequencies, and how models stretch them to contexts longer than they were trained on.

A pair of channels i of a head of d channels turns by theta^(-2 i / d) per position (Su et al.,
arXiv:2104.09864, section 3.3). Below, f is that frequency, L the original context and s the factor.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sparseattn_jax.models.checks import check_positive_integer

type Frequencies = Float[np.ndarray | Array, " half"]


def plain_frequencies(*, head_dim: int, theta: float) -> Float[np.ndarray, " half"]:
    """Radians per position of each pair of channels, in float64."""
    return theta ** (-np.arange(0, head_dim, 2) / head_dim)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Scaling:
    """What the kinds of scaling have in common.

    Attributes:
        factor: s, how many times longer the context becomes.
    """

    factor: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise ValueError(
                f"factor={self.factor} must be at least 1: it divides the slow frequencies"
            )

    @property
    def magnitude(self) -> float:
        """What the rotation multiplies queries, and keys, by."""
        return 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearRopeScaling(_Scaling):
    """Position interpolation: f / s (Chen et al., arXiv:2306.15595, eq. 4)."""

    def frequencies(
        self, positions: Int32[Array, "B T"], *, head_dim: int, theta: float
    ) -> Frequencies:
        """The same at all positions."""
        return plain_frequencies(head_dim=head_dim, theta=theta) / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class DynamicRopeScaling(_Scaling):
    """Dynamic NTK scaling: a greater theta, the longer the sequence.

    With n the number of positions, which is one more than the greatest one of the call, and at
    least L,

        theta' = theta * (s n / L - (s - 1))^(d / (d - 2)),

    so that up to L nothing changes: the NTK-aware base of arXiv:2309.00071, section 3.1, made
    dynamic as in section 3.3, in the form of transformers' "dynamic". The call's rows share n. Keys
    that are kept from earlier, shorter calls stay turned by the frequencies of their time.

    Attributes:
        original_max_position: L.
    """

    original_max_position: int

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("original_max_position", self.original_max_position)

    def frequencies(
        self, positions: Int32[Array, "B T"], *, head_dim: int, theta: float
    ) -> Frequencies:
        """Those of the greatest of the positions, which may be traced."""
        plain = plain_frequencies(head_dim=head_dim, theta=theta)
        length = jnp.max(positions + 1, initial=self.original_max_position)
        stretch = self.factor * length.astype(jnp.float32) / self.original_max_position
        # theta'^(-2 i / d) = f * stretch^(-2 i / (d - 2)).
        powers = np.arange(0, head_dim, 2) / (head_dim - 2)
        divisors = (stretch - (self.factor - 1)) ** powers.astype(np.float32)
        return plain.astype(np.float32) / divisors


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3RopeScaling(_Scaling):
    """Llama 3.1's stretch of the rotary frequencies to a longer context.

    With r = L / wavelength = L f / (2 pi), a frequency f becomes

        w * f + (1 - w) * f / s,  w = clip((r - low) / (high - low), 0, 1)

    (https://github.com/meta-llama/llama-models/blob/main/models/llama3/model.py, `apply_scaling`).

    Attributes:
        low_freq_factor: `low`; frequencies that turn fewer times than this in the original context
            are divided by `factor`.
        high_freq_factor: `high`; those that turn more often than this are kept.
        original_max_position: L, the context length before the stretch.
    """

    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"low_freq_factor={self.low_freq_factor} must be positive and below "
                f"high_freq_factor={self.high_freq_factor}"
            )
        check_positive_integer("original_max_position", self.original_max_position)

    def frequencies(
        self, positions: Int32[Array, "B T"], *, head_dim: int, theta: float
    ) -> Frequencies:
        """The same at all positions."""
        plain = plain_frequencies(head_dim=head_dim, theta=theta)
        turns = self.original_max_position * plain / (2 * np.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return kept * plain + (1 - kept) * plain / self.factor


@dataclasses.dataclass(frozen=True, kw_only=True)
class YarnRopeScaling(_Scaling):
    """YaRN: fast frequencies are kept, slow ones divided, with a ramp between (arXiv:2309.00071).

    The pair that turns r times in the original context is i(r) = d ln(L / (2 pi r)) / (2 ln theta).
    With the ramp from a = i(beta_fast) to b = i(beta_slow), 0 <= a and b <= d - 1, pair i has

        (1 - w) * f + w * f / s,  w = clip((i - a) / (b - a), 0, 1)

    (section 3.2, with the ramp over pairs of https://github.com/jquesnelle/yarn and transformers'
    "yarn"). And queries and keys are multiplied by a factor, logits so by its square (section
    3.4).

    Attributes:
        original_max_position: L.
        beta_fast: pairs that turn more often than this in L are kept.
        beta_slow: pairs that turn less often than this in L are divided by s.
        truncate: whether a is rounded down and b up.
        attention_factor: multiplies queries and keys; by default m(1), where m(x) = 1 + 0.1 x ln s,
            or m(mscale) / m(mscale_all_dim) if these are given.
        mscale: see attention_factor (DeepSeek-V2, arXiv:2405.04434, section 3.1.4).
        mscale_all_dim: see attention_factor.
    """

    original_max_position: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive_integer("original_max_position", self.original_max_position)
        if not 0 < self.beta_slow < self.beta_fast < math.inf:
            raise ValueError(
                f"beta_slow={self.beta_slow} must be positive and below beta_fast={self.beta_fast}"
            )
        for name in ("attention_factor", "mscale", "mscale_all_dim"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}={value} must be a finite number above 0, or None")
        if (self.mscale is None) != (self.mscale_all_dim is None):
            raise ValueError(
                f"mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} have an effect "
                "together alone; pass both or neither"
            )
        if self.attention_factor is not None and self.mscale is not None:
            raise ValueError(
                f"attention_factor={self.attention_factor} leaves mscale={self.mscale} without "
                "effect; pass one of them"
            )

    @property
    def magnitude(self) -> float:
        """See attention_factor."""

        def m(weight: float) -> float:
            return 1 + 0.1 * weight * math.log(self.factor)

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale is not None and self.mscale_all_dim is not None:
            return m(self.mscale) / m(self.mscale_all_dim)
        return m(1.0)

    def frequencies(
        self, positions: Int32[Array, "B T"], *, head_dim: int, theta: float
    ) -> Frequencies:
        """The same at all positions."""

        def pair(turns: float) -> float:
            context = self.original_max_position / (2 * math.pi * turns)
            return head_dim * math.log(context) / (2 * math.log(theta))

        first, last = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        # Where no pair is on the ramp, it is a step.
        divided = np.clip((np.arange(head_dim // 2) - first) / max(last - first, 1e-3), 0, 1)
        plain = plain_frequencies(head_dim=head_dim, theta=theta)
        return (1 - divided) * plain + divided * plain / self.factor


type RopeScaling = LinearRopeScaling | DynamicRopeScaling | Llama3RopeScaling | YarnRopeScaling
