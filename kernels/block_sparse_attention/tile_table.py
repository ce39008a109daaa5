"""The fastest tiles that were measured; `python -m benchmarks.autotune` writes this.

By kernel and key: the device's model and what the choice depends on, see `tiling.py`.
"""

from sparseattn_jax.kernels.tile_tables import Key, Row

TABLES: dict[str, dict[Key, Row]] = {
    "block_sparse_attention": {},
    "block_sparse_attention_vjp": {},
}
