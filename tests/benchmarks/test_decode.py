"""The decode suite on a CPU: what it draws, records and refuses."""

import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode, records, run

TOY = {"lengths": ("512",), "shape": "toy", "backend": "xla", "peers": ("xla",), "runs": 2}


def test_a_run_leaves_records(tmp_path: pathlib.Path) -> None:
    assert run.run(("decode",), out=tmp_path, commit="abc", **TOY) == 0
    found = {record.case: record for record in records.load(tmp_path / "cpu" / "decode.json")}
    assert set(found) == {"512 b1 10%", "512 b1 dense"}
    assert found["512 b1 10%"].density == pytest.approx(1 / 8, rel=1e-3)
    assert all(0 < record.max_error <= record.max_error_allowed for record in found.values())


def test_sets_of_blocks_are_disjoint_and_equal() -> None:
    keeps = decode.draw_disjoint_blocks((2, 3, 32), 0.1, seed=0)
    assert keeps.shape == (10, 2, 3, 32)
    np.testing.assert_array_equal(keeps.sum(axis=-1), 3)
    assert keeps.sum(axis=0).max() == 1


def test_an_output_by_another_set_is_wrong() -> None:
    shape = run.SHAPES["toy"]
    q, k, v = decode.random_cache(shape, 2, 256, seed=0)
    keeps = decode.draw_disjoint_blocks((2, shape.num_kv_heads, 4), 0.5, seed=0)
    lists = [decode.block_lists.from_dense(jnp.asarray(keep)) for keep in keeps]
    lengths = jnp.full(2, 256, jnp.int32)
    outs = decode._attend_in_turn(
        q, k, v, lengths, lists, block_size=shape.block_size, backend="xla"
    )
    operands = {"q": q, "k": k, "v": v, "block_size": shape.block_size}
    assert decode.judge_outputs(outs, keeps=keeps, **operands).passed
    assert not decode.judge_outputs(outs[::-1], keeps=keeps, **operands).passed
