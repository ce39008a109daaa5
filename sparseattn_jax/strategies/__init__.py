"""The registry of strategies: a new one is a file here and a line below."""

from collections.abc import Mapping

from sparseattn_jax.strategies.duo_attention import DuoAttention
from sparseattn_jax.strategies.flex_prefill import FlexPrefill
from sparseattn_jax.strategies.full import Full
from sparseattn_jax.strategies.minference import MInference
from sparseattn_jax.strategies.per_head import PerHead
from sparseattn_jax.strategies.protocol import Strategy
from sparseattn_jax.strategies.streaming import Streaming
from sparseattn_jax.strategies.xattention import XAttention

STRATEGIES: Mapping[str, type[Strategy]] = {
    "duo_attention": DuoAttention,
    "flex_prefill": FlexPrefill,
    "full": Full,
    "minference": MInference,
    "per_head": PerHead,
    "streaming": Streaming,
    "xattention": XAttention,
}
