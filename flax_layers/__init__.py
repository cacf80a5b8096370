"""Flax layers built on neighborhood attention. NNX here; the Linen versions are in :mod:`flax_layers.linen`."""

from flax_layers._functional import WindowFitWarning as WindowFitWarning
from flax_layers._nnx import MLP as MLP
from flax_layers._nnx import HydraNeighborhoodAttention as HydraNeighborhoodAttention
from flax_layers._nnx import NeighborhoodAttention as NeighborhoodAttention
from flax_layers._nnx import NeighborhoodTransformerBlock as NeighborhoodTransformerBlock
from flax_layers._nnx import StochasticDepth as StochasticDepth
