"""BlockMask against drawings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.block_mask import BlockMask, num_visible_blocks
from tests.drawing import block_matrix

CAUSAL = block_matrix("""
    #...
    .#..
    #.#.
    ..##
""")


def mask_of(drawing: np.ndarray, **changes) -> BlockMask:
    sizes = {"q_len": 15, "kv_len": 15, "block_q": 4, "block_kv": 4, "is_causal": True} | changes
    return BlockMask.from_dense(jnp.array(drawing)[None, None], **sizes)


def test_to_dense_gives_the_drawing_back():
    np.testing.assert_array_equal(mask_of(CAUSAL).to_dense()[0, 0], CAUSAL)


def test_transpose_lists_query_blocks_per_key_block():
    q_indices, q_num_blocks = mask_of(CAUSAL).transpose()
    np.testing.assert_array_equal(q_num_blocks[0, 0], [2, 1, 2, 1])
    np.testing.assert_array_equal(q_indices[0, 0, 2, :2], [2, 3])


def test_intersect_keeps_what_both_list():
    other = block_matrix("""
        #...
        #...
        #.#.
        #..#
    """)
    both = block_matrix("""
        #...
        ....
        #.#.
        ...#
    """)
    intersection = mask_of(CAUSAL).intersect(mask_of(other))
    np.testing.assert_array_equal(intersection.to_dense()[0, 0], both)


def test_density_counts_the_causally_visible_blocks_only():
    assert float(mask_of(CAUSAL).density()[0, 0]) == pytest.approx(6 / 10)
    assert float(mask_of(CAUSAL, is_causal=False).density()[0, 0]) == pytest.approx(6 / 16)


@pytest.mark.parametrize(
    ("case", "lengths", "drawing"),
    [
        ("square", (15, 15), "#... ##.. ###. ####"),
        ("queries at the end of the keys", (8, 16), "###. ####"),
        ("offset within a block", (6, 15), "####  ####"),
        ("fewer queries than a block", (2, 9), "###"),
    ],
)
def test_visible_blocks_of_causal_queries(case: str, lengths: tuple[int, int], drawing: str):
    q_len, kv_len = lengths
    counts = num_visible_blocks(q_len=q_len, kv_len=kv_len, block_q=4, block_kv=4, is_causal=True)
    drawn = block_matrix(drawing)
    visible = np.arange(drawn.shape[1]) < np.asarray(counts[0])[:, None]
    np.testing.assert_array_equal(visible, drawn, err_msg=case)


def test_a_capacity_keeps_the_highest_scores_and_counts_the_rest():
    scores = jnp.array([[5.0, 0, 0, 0], [1, 2, 0, 0], [3, 1, 2, 0], [1, 4, 4, 2]])[None, None]
    keep = jnp.tri(4, dtype=bool)
    mask, num_dropped = BlockMask.from_scores(
        scores, keep[None, None], 2, q_len=16, kv_len=16, block_q=4, block_kv=4
    )
    expected = block_matrix("""
        #...
        ##..
        #.#.
        .##.
    """)
    assert mask.kv_indices.shape == (1, 1, 4, 2)
    np.testing.assert_array_equal(mask.to_dense()[0, 0], expected)
    np.testing.assert_array_equal(num_dropped, [[3]])


def test_str_draws_each_head():
    assert str(mask_of(CAUSAL)) == "\n".join(
        [
            "BlockMask(q_len=15, kv_len=15, block_q=4, block_kv=4, is_causal=True)",
            "sequence 0, head 0, density 0.600",
            "#...",
            ".#..",
            "#.#.",
            "..##",
        ]
    )


def test_str_coarsens_a_large_mask_and_names_the_heads_it_leaves_out():
    keep = jnp.tile(jnp.eye(128, dtype=bool), (1, 10, 1, 1))
    lines = str(BlockMask.from_dense(keep, q_len=128, kv_len=128, block_q=1, block_kv=1))
    assert lines.splitlines()[2] == "+" + "." * 63
    assert lines.endswith("and 2 more heads")


def test_str_of_a_traced_mask_names_its_shape():
    drawn = []
    jax.jit(lambda mask: drawn.append(str(mask)))(mask_of(CAUSAL))
    assert "int32[1,1,4,4]" in drawn[0]


def test_it_passes_through_jit_vmap_and_tree_map():
    mask = mask_of(CAUSAL)
    returned = jax.jit(lambda mask: mask)(mask)
    assert returned.q_len == 15
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), mask)
    densities = jax.vmap(lambda mask: mask.density())(stacked)
    np.testing.assert_allclose(densities, jnp.full((2, 1, 1), 0.6), rtol=1e-6)


def test_keep_of_another_shape_is_refused_with_the_wanted_one():
    with pytest.raises(ValueError, match=r"need bool \[batch, heads or 1, 5, 4\]"):
        mask_of(CAUSAL, q_len=17)


def test_block_sizes_must_be_positive():
    with pytest.raises(ValueError, match="block_q=0 must be at least 1"):
        mask_of(CAUSAL, block_q=0)


def test_scores_of_another_shape_are_refused():
    with pytest.raises(ValueError, match="must equal keep"):
        BlockMask.from_scores(
            jnp.zeros((1, 1, 4, 3)), jnp.array(CAUSAL)[None, None], 2, q_len=16, kv_len=16
        )


def test_masks_of_other_lengths_do_not_intersect():
    with pytest.raises(ValueError, match="cannot be intersected"):
        mask_of(CAUSAL).intersect(mask_of(CAUSAL, q_len=14))
