"""The fastest tiles that were measured; `python -m benchmarks.autotune` writes this.

By kernel and key: the device's model and what the choice depends on, see `tiling.py`.
"""

from sparseattn_jax.kernels.tile_tables import Key, Row

TABLES: dict[str, dict[Key, Row]] = {
    "decode_attention": {
        ("h100", 64, None): Row(
            config={
                "workers": 2,
                "kv_tile": 128,
                "stages": 5,
            },
            ms=0.3796,
            rule_ms=0.3796,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 64, 64): Row(
            config={
                "workers": 2,
                "kv_tile": 64,
                "stages": 10,
            },
            ms=0.1445,
            rule_ms=0.1445,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 64, 128): Row(
            config={
                "workers": 2,
                "kv_tile": 128,
                "stages": 5,
            },
            ms=0.1391,
            rule_ms=0.1391,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 128, None): Row(
            config={
                "workers": 2,
                "kv_tile": 64,
                "stages": 5,
            },
            ms=0.7153,
            rule_ms=0.7153,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 128, 64): Row(
            config={
                "workers": 2,
                "kv_tile": 64,
                "stages": 5,
            },
            ms=0.2422,
            rule_ms=0.2422,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 128, 128): Row(
            config={
                "workers": 2,
                "kv_tile": 64,
                "stages": 5,
            },
            ms=0.2415,
            rule_ms=0.2415,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
    },
}
