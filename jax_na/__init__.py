"""Neighborhood attention for JAX."""

from jax_na._api import neighborhood_attention as neighborhood_attention
from jax_na._primitives import RESIDUAL_NAMES as RESIDUAL_NAMES
from jax_na._primitives import save_attention_residuals as save_attention_residuals

__version__ = "0.1.0"
