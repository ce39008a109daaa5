"""Sparse attention for long-context language models.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, H head dim; Tb and Sb query and
key blocks, M listed blocks of a row.
"""

from sparseattn_jax import sequence_parallel as sequence_parallel
from sparseattn_jax.attention import block_sparse_attention as block_sparse_attention
from sparseattn_jax.attention import prefill_attention as prefill_attention
from sparseattn_jax.attention import sparse_attention as sparse_attention
from sparseattn_jax.block_mask import BlockMask as BlockMask
from sparseattn_jax.cached_decode import decode_attention as decode_attention
from sparseattn_jax.decode import PageBounds as PageBounds
from sparseattn_jax.decode import PageLists as PageLists
from sparseattn_jax.decode import QuestPages as QuestPages
from sparseattn_jax.decode import sparse_decode_attention as sparse_decode_attention
from sparseattn_jax.dense_prefill import full_prefill as full_prefill
from sparseattn_jax.head_patterns import HeadPatterns as HeadPatterns
from sparseattn_jax.kernels.backends import Backend as Backend
from sparseattn_jax.kernels.backends import UnsupportedError as UnsupportedError
from sparseattn_jax.kv_cache import KVCache as KVCache
from sparseattn_jax.pattern import HeadWindows as HeadWindows
from sparseattn_jax.pattern import SparsePattern as SparsePattern
from sparseattn_jax.pattern import TokenColumns as TokenColumns
from sparseattn_jax.prefill import flexprefill_prefill as flexprefill_prefill
from sparseattn_jax.prefill import minference_prefill as minference_prefill
from sparseattn_jax.prefill import streaming_prefill as streaming_prefill
from sparseattn_jax.prefill import xattention_prefill as xattention_prefill
from sparseattn_jax.strategies.duo_attention import DuoAttention as DuoAttention
from sparseattn_jax.strategies.flex_prefill import FlexPrefill as FlexPrefill
from sparseattn_jax.strategies.full import Full as Full
from sparseattn_jax.strategies.minference import MInference as MInference
from sparseattn_jax.strategies.per_head import PerHead as PerHead
from sparseattn_jax.strategies.streaming import Streaming as Streaming
from sparseattn_jax.strategies.xattention import XAttention as XAttention
