"""cuDNN on a GPU gives what `xla` gives, gradients included."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparseattn_jax.kernels.dense_attention import dense_attention

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("T", "S"), [(512, 512), (300, 300), (256, 384)])
def test_values_and_gradients(T: int, S: int, dtype: str, is_causal: bool) -> None:
    if is_causal and T != S:
        pytest.skip("cuDNN puts causal queries at the start of the keys")
    rng = np.random.default_rng(0)
    q, d_out = (jnp.asarray(rng.normal(size=(2, T, 8, 128)), dtype) for _ in range(2))
    k, v = (jnp.asarray(rng.normal(size=(2, S, 2, 128)), dtype) for _ in range(2))

    def outputs(backend: str, *qkv: jax.Array) -> list[np.ndarray]:
        def attend(*qkv: jax.Array) -> jax.Array:
            options = {"is_causal": is_causal, "scale": 128**-0.5, "needs_lse": False}
            return dense_attention(*qkv, backend=backend, **options)[0]

        out, vjp = jax.vjp(attend, *qkv)
        return [np.asarray(x, np.float32) for x in (out, *vjp(d_out.astype(out.dtype)))]

    exact = outputs("xla", *(x.astype(jnp.float32) for x in (q, k, v)))
    rounded = outputs("xla", q, k, v)
    for found, right, like in zip(outputs("cudnn", q, k, v), exact, rounded, strict=True):
        assert np.abs(found - right).max() <= 2 * np.abs(like - right).max() + 2e-2
