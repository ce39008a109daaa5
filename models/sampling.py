"""How the next token is chosen from the logits: the most probable one, or drawn."""

import dataclasses
import math
import typing

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float32, Int32, Key


@jax.tree_util.register_dataclass
@typing.no_type_check  # a pytree is rebuilt from tracers and shapes
@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen; by default the most probable one, of equals the first.

    With a temperature they are drawn from softmax(logits / temperature), cut off first to the top_k
    most probable tokens (Fan et al., arXiv:1805.04833, section 5.4), then to the fewest of those
    that hold top_p of what is left (the nucleus of Holtzman et al., arXiv:1904.09751, section 3.1).
    Of equally probable tokens a cut keeps those of the lowest ids.

    Attributes:
        temperature: what the logits are divided by, above 0; None to draw nothing.
        top_k: tokens to choose among, or None for all.
        top_p: share of the probability to choose among, in (0, 1], or None for all.
    """

    temperature: float | None = None
    top_k: int | None = dataclasses.field(default=None, metadata={"static": True})
    top_p: float | None = None

    def __post_init__(self) -> None:
        if self.temperature is None:
            for name in ("top_k", "top_p"):
                if (value := getattr(self, name)) is not None:
                    raise ValueError(
                        f"{name}={value} has no use without a temperature: the most probable token "
                        "is taken; pass temperature=1.0 to draw"
                    )
        # Traced values were checked before they were.
        if isinstance(self.temperature, int | float) and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be a positive number; leave it out for the "
                "most probable token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1; leave it out for all tokens")
        if isinstance(self.top_p, int | float) and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]: it is a share of probability")


def sample(
    logits: Float32[Array, "B V"], sampling: Sampling, keys: Key[Array, " B"]
) -> Int32[Array, " B"]:
    """A token for each sequence.

    Args:
        logits: of the next token.
        sampling: how to choose.
        keys: one for each sequence, so that what is drawn for one depends on no other; not read
            without a temperature.
    """
    if sampling.temperature is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    log_probabilities, tokens = candidates(logits, sampling)
    places = jax.vmap(jax.random.categorical)(keys, log_probabilities)
    return jnp.take_along_axis(tokens, places[:, None], axis=-1)[:, 0]


def candidates(
    logits: Float32[Array, "B V"], sampling: Sampling
) -> tuple[Float32[Array, "B C"], Int32[Array, "B C"]]:
    """The tokens that may be drawn, and the logarithms of their probabilities.

    With a cut they are in order of probability, and min(top_k, V) in number. Those that top_p cuts
    off have probability 0.

    Args:
        logits: of the next token.
        sampling: how to choose.

    Raises:
        ValueError: the sampling has no temperature.
    """
    if sampling.temperature is None:
        raise ValueError("temperature=None draws nothing; pass a positive number")
    vocab_size = logits.shape[-1]
    logits = logits / sampling.temperature
    if sampling.top_k is None and sampling.top_p is None:
        tokens = jnp.broadcast_to(jnp.arange(vocab_size, dtype=jnp.int32), logits.shape)
        return jax.nn.log_softmax(logits), tokens
    logits, tokens = lax.top_k(logits, min(sampling.top_k or vocab_size, vocab_size))
    if sampling.top_p is not None:
        probabilities = jax.nn.softmax(logits)
        held_before = jnp.cumsum(probabilities, axis=-1) - probabilities
        # A sum may be rounded to more than it is: the first token stays, and at 1 all of them.
        is_kept = (held_before < sampling.top_p).at[:, 0].set(True)
        logits = jnp.where(is_kept | (sampling.top_p >= 1), logits, -jnp.inf)
    return jax.nn.log_softmax(logits), tokens
