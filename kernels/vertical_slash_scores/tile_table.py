"""The fastest tiles that were measured; `python -m benchmarks.autotune` writes this.

By kernel and key: the device's model and what the choice depends on, see `tiling.py`.
"""

from sparseattn_jax.kernels.tile_tables import Key, Row

TABLES: dict[str, dict[Key, Row]] = {
    "vertical_slash_scores": {
        ("h100", 64, False): Row(
            config={
                "workers": 1,
                "stages": 4,
            },
            ms=0.3781,
            rule_ms=0.3781,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 64, True): Row(
            config={
                "workers": 2,
                "stages": 4,
            },
            ms=0.3767,
            rule_ms=0.3767,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 128, False): Row(
            config={
                "workers": 1,
                "stages": 4,
            },
            ms=0.437,
            rule_ms=0.437,
            origin={
                "device": "NVIDIA H100 80GB HBM3",
                "jax": "0.11.2",
                "jaxlib": "0.11.2",
                "runtime": "cuda 13000",
                "commit": "03405f1",
                "date": "2026-11-24",
            },
        ),
        ("h100", 128, True): Row(
            config={
                "workers": 2,
                "stages": 2,
            },
            ms=0.4364,
            rule_ms=0.4364,
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
