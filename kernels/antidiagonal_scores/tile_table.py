"""The fastest tiles that were measured; `python -m benchmarks.autotune` writes this.

By kernel and key: the device's model and what the choice depends on, see `tiling.py`.
"""

from sparseattn_jax.kernels.tile_tables import Key, Row

TABLES: dict[str, dict[Key, Row]] = {
    "antidiagonal_scores": {
        ("h100", 256): Row(
            config={
                "columns": 256,
                "stages": 4,
                "cluster": 1,
                "lead": 2,
                "band": 8,
            },
            ms=4.347,
            rule_ms=4.453,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 512): Row(
            config={
                "columns": 256,
                "stages": 4,
                "cluster": 2,
                "lead": 2,
                "band": 4,
            },
            ms=7.281,
            rule_ms=7.544,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 1024): Row(
            config={
                "columns": 256,
                "stages": 4,
                "cluster": 2,
                "lead": 2,
                "band": 8,
            },
            ms=3.377,
            rule_ms=3.377,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 2048): Row(
            config={
                "columns": 256,
                "stages": 4,
                "cluster": 2,
                "lead": 2,
                "band": 4,
            },
            ms=1.599,
            rule_ms=1.648,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 4096): Row(
            config={
                "columns": 256,
                "stages": 4,
                "cluster": 2,
                "lead": 2,
                "band": 4,
            },
            ms=3.073,
            rule_ms=3.279,
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
