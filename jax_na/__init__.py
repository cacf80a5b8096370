"""Neighborhood attention for JAX."""

from jax_na._api import neighborhood_attention as neighborhood_attention
from jax_na._cuda import EXPORT_SAFETY_CHECKS as EXPORT_SAFETY_CHECKS
from jax_na._cuda import cuda_status as cuda_status
from jax_na._cuda import lane as _cuda_lane
from jax_na._explain import Explanation as Explanation
from jax_na._explain import explain as explain
from jax_na._primitives import RESIDUAL_NAMES as RESIDUAL_NAMES
from jax_na._primitives import save_attention_residuals as save_attention_residuals
from jax_na._spatial import sharded_neighborhood_attention as sharded_neighborhood_attention
from jax_na._unfused_api import na_av as na_av
from jax_na._unfused_api import na_qk as na_qk

__version__ = "0.1.0"

_cuda_lane()  # registers the CUDA handlers, so that a program exported elsewhere runs after `import jax_na`
