"""Candidates and measured rows: what is proposed can be launched, what is measured is taken."""

import dataclasses
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import pytest

from sparseattn_jax.kernels import mosaic
from sparseattn_jax.kernels.antidiagonal_scores import tiling as scores
from sparseattn_jax.kernels.backends import Model
from sparseattn_jax.kernels.block_sparse_attention import tiling as block_sparse
from sparseattn_jax.kernels.decode_attention import tiling as decode
from sparseattn_jax.kernels.tile_tables import Row
from sparseattn_jax.kernels.vertical_slash_scores import tiling as sums

BF16 = jnp.dtype(jnp.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel with a table; `bytes` and `warpgroups` are of a config and its key's values."""

    op: str
    name: str
    keys: Sequence[tuple]
    choose: Callable[..., Any]
    rule: Callable[..., Any]
    candidates: Callable[..., list[Any]]
    bytes: Callable[..., int]
    warpgroups: Callable[[Any], tuple[int, int, int]]  # computing, loading, registers of those

    @property
    def rows(self) -> dict:
        module = importlib.import_module(f"sparseattn_jax.kernels.{self.op}.tile_table")
        return module.TABLES[self.name]

    def arguments(self, key: tuple) -> tuple:
        """Of `choose`, for a call with this key: the sums' choice takes a number of row tiles."""
        return (key[0], 4 if key[1] else 3) if self.choose is sums.tile_config else key


KERNELS = [
    Kernel(
        op="block_sparse_attention",
        name="block_sparse_attention",
        keys=block_sparse.KEYS,
        choose=block_sparse.tile_config,
        rule=block_sparse.tile_rule,
        candidates=block_sparse.candidates,
        bytes=lambda config, head_dim, *_: block_sparse.shared_memory_bytes(config, head_dim, BF16),
        warpgroups=lambda x: (x.workers * x.warpgroups, x.workers, block_sparse.LOADING_REGISTERS),
    ),
    Kernel(
        op="block_sparse_attention",
        name="block_sparse_attention_vjp",
        keys=block_sparse.VJP_KEYS,
        choose=block_sparse.vjp_config,
        rule=block_sparse.vjp_rule,
        candidates=block_sparse.vjp_candidates,
        bytes=lambda x, head_dim, *_: block_sparse.vjp_shared_memory_bytes(x, head_dim, BF16),
        warpgroups=lambda x: (block_sparse.VJP_WARPGROUPS, 1, x.loading_registers),
    ),
    Kernel(
        op="decode_attention",
        name="decode_attention",
        keys=decode.KEYS,
        choose=decode.tile_config,
        rule=decode.tile_rule,
        candidates=decode.candidates,
        bytes=lambda config, head_dim, *_: decode.shared_memory_bytes(config, head_dim),
        warpgroups=lambda x: (x.workers, x.workers, decode.LOADING_REGISTERS),
    ),
    Kernel(
        op="antidiagonal_scores",
        name="antidiagonal_scores",
        keys=scores.KEYS,
        choose=scores.tile_config,
        rule=scores.tile_rule,
        candidates=scores.candidates,
        bytes=lambda config, _: scores.shared_memory_bytes(config, config.columns // 4, BF16),
        warpgroups=lambda x: (x.threads - 1, 1, scores.LOADING_REGISTERS),
    ),
    Kernel(
        op="vertical_slash_scores",
        name="vertical_slash_scores",
        keys=sums.TABLE_KEYS,
        choose=sums.tile_config,
        rule=sums.tile_rule,
        candidates=sums.candidates,
        bytes=lambda config, head_dim, *_: sums.shared_memory_bytes(config, head_dim),
        warpgroups=lambda x: (x.workers, 1, sums.LOADING_REGISTERS),
    ),
]
EACH = [pytest.param(kernel, id=kernel.name) for kernel in KERNELS]


@pytest.mark.parametrize("kernel", EACH)
def test_every_candidate_can_be_launched(kernel: Kernel):
    for key in kernel.keys:
        configs = kernel.candidates(*key)
        assert configs[0] == kernel.rule(*key)
        assert len(set(configs)) == len(configs)
        for config in configs:
            computing, loading, loading_registers = kernel.warpgroups(config)
            at_start = mosaic.REGISTERS // (computing + loading) // 8 * 8
            later = mosaic.computing_registers(
                computing=computing, loading=loading, loading_registers=loading_registers
            )
            assert kernel.bytes(config, *key) <= mosaic.SHARED_MEMORY_BYTES
            assert (computing + loading) * mosaic.WARPGROUP_THREADS <= 1024
            # Or a warpgroup waits for ever for registers that there are not.
            asked = computing * later + loading * loading_registers
            assert asked <= (computing + loading) * at_start
            assert later >= min(at_start, 248) and at_start >= loading_registers


@pytest.mark.parametrize("kernel", EACH[:3])
def test_tiles_of_every_candidate_divide_the_blocks(kernel: Kernel):
    for key in kernel.keys:
        assert all((key[-1] or 128) % x.kv_tile == 0 for x in kernel.candidates(*key))


@pytest.mark.parametrize("kernel", EACH)
def test_there_is_a_choice(kernel: Kernel):
    assert any(len(kernel.candidates(*key)) > 1 for key in kernel.keys)


@pytest.mark.parametrize("kernel", EACH)
def test_the_rows_are_of_candidates(kernel: Kernel):
    """So they can be launched, and a config that changed its meaning is measured anew."""
    for (model, *values), row in kernel.rows.items():
        assert model in ("h100", "h200")
        assert tuple(values) in kernel.keys
        assert row.config in [dataclasses.asdict(x) for x in kernel.candidates(*values)]
        assert 0 < row.ms <= row.rule_ms


@pytest.mark.parametrize("kernel", EACH)
@pytest.mark.parametrize("model", ["h100", "h200"])
def test_a_measured_config_is_taken_on_its_model_only(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, model: Model
):
    key = next(key for key in kernel.keys if len(kernel.candidates(*key)) > 1)
    rule, fastest = kernel.candidates(*key)[:2]
    row = Row(config=dataclasses.asdict(fastest), ms=1.0, rule_ms=2.0, origin={})
    for other in ("h100", "h200"):
        monkeypatch.delitem(kernel.rows, (other, *key), raising=False)
    monkeypatch.setitem(kernel.rows, (model, *key), row)
    arguments = kernel.arguments(key)
    assert kernel.choose(*arguments, model) == fastest
    assert kernel.choose(*arguments, "h200" if model == "h100" else "h100") == rule
    assert kernel.choose(*arguments) == rule


FORWARD = block_sparse.tile_rule(128, 64, 64)
WIDE = block_sparse.tile_rule(256, 64, 64)


@pytest.mark.parametrize(
    ("config", "head_dim"),
    [
        # As ptxas 13.0 has it: 52 bytes of spills, 240 bytes, and an instruction that does not fit.
        (dataclasses.replace(FORWARD, kv_tile=128, k_stages=1, v_stages=1), 128),
        (dataclasses.replace(WIDE, queries_in_registers=True), 256),
        (dataclasses.replace(WIDE, workers=2, k_stages=1, v_stages=1), 256),
    ],
    ids=["spills", "queries-spill", "no-wgmma"],
)
def test_configs_without_registers_cannot_be_launched(
    config: block_sparse.TileConfig, head_dim: int
):
    used = block_sparse.shared_memory_bytes(config, head_dim, BF16)
    assert used <= mosaic.SHARED_MEMORY_BYTES
    assert not block_sparse.can_launch(config, head_dim)


def test_configs_that_cannot_be_launched():
    deep = dataclasses.replace(block_sparse.tile_rule(128, 128, 128), k_stages=4)
    assert not block_sparse.can_launch(deep, 128)
    wide = dataclasses.replace(block_sparse.vjp_rule(256, 128), kv_tile=128)
    assert not block_sparse.vjp_can_launch(wide, 256)
    deep = dataclasses.replace(block_sparse.vjp_rule(128, 128), q_stages=5)
    assert not block_sparse.vjp_can_launch(deep, 128)
    assert not decode.can_launch(decode.TileConfig(workers=3, kv_tile=64, stages=2), 64)
    assert not decode.can_launch(decode.TileConfig(workers=2, kv_tile=128, stages=2), 128)
    assert not sums.can_launch(sums.TileConfig(workers=2, stages=2), 256)
    narrow = scores.TileConfig(columns=128)  # 4 key blocks of 128 at stride 4
    assert scores.can_launch(narrow, 2048)
    assert not scores.can_launch(narrow, 512)
    assert not scores.can_launch(scores.TileConfig(stages=5), 2048)
