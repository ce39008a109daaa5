"""Language models that take their attention as a function."""

from sparseattn_jax.models import sharding as sharding
from sparseattn_jax.models.attention import Attend as Attend
from sparseattn_jax.models.attention import CachedAttend as CachedAttend
from sparseattn_jax.models.attention import LayerRun as LayerRun
from sparseattn_jax.models.attention import dense_causal_attention as dense_causal_attention
from sparseattn_jax.models.attention import dense_runs as dense_runs
from sparseattn_jax.models.attention import stateless as stateless
from sparseattn_jax.models.config import DynamicRopeScaling as DynamicRopeScaling
from sparseattn_jax.models.config import LinearRopeScaling as LinearRopeScaling
from sparseattn_jax.models.config import Llama3RopeScaling as Llama3RopeScaling
from sparseattn_jax.models.config import LlamaConfig as LlamaConfig
from sparseattn_jax.models.config import RopeScaling as RopeScaling
from sparseattn_jax.models.config import YarnRopeScaling as YarnRopeScaling
from sparseattn_jax.models.config import llama3_8b as llama3_8b
from sparseattn_jax.models.config import tiny as tiny
from sparseattn_jax.models.decoding import Generated as Generated
from sparseattn_jax.models.decoding import generate as generate
from sparseattn_jax.models.decoding import stream as stream
from sparseattn_jax.models.llama import Llama as Llama
from sparseattn_jax.models.policy import Policy as Policy
from sparseattn_jax.models.sampling import Sampling as Sampling
