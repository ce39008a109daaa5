"""Language models that take their attention as a function."""

from sparseattn_jax.models.attention import Attend as Attend
from sparseattn_jax.models.attention import dense_causal_attention as dense_causal_attention
from sparseattn_jax.models.config import Llama3RopeScaling as Llama3RopeScaling
from sparseattn_jax.models.config import LlamaConfig as LlamaConfig
from sparseattn_jax.models.config import llama3_8b as llama3_8b
from sparseattn_jax.models.config import tiny as tiny
from sparseattn_jax.models.llama import Llama as Llama
