"""What a JAX user can write without this library: the gather formulation and dense masked attention.

Both follow the window rule of ``jax_na`` and serve stride 1, dilation 1, not causal: what the comparison needs. Layout
heads-last, ``query, key, value [B, *spatial, H, D]``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_na._window import visible, window_bounds

Array = Any


def gather_attention(query: Array, key: Array, value: Array, window: Sequence[int]) -> Array:
    """K and V gathered to ``[B, tokens, H, window, D]``, then one product per query: the usual formulation."""
    spatial, (heads, dim) = query.shape[1:-2], query.shape[-2:]
    index = np.zeros((*spatial, *window), np.int32)
    for axis, (length, size) in enumerate(zip(spatial, window, strict=True)):
        start = window_bounds(np.arange(length), length, size, 1, False, np)[0]
        shape = [1] * (2 * len(spatial))
        shape[axis], shape[len(spatial) + axis] = length, size
        index = index * length + (start[:, None] + np.arange(size)).reshape(shape)
    index = index.reshape(math.prod(spatial), math.prod(window))

    # Heads before tokens, so that gathered rows are contiguous and each product is a batched [1, D] x [D, window].
    q, k, v = (jnp.swapaxes(x.reshape(x.shape[0], -1, heads, x.shape[-1]), 1, 2) for x in (query, key, value))
    keys, values = jnp.take(k, index, axis=2), jnp.take(v, index, axis=2)  # [B, H, N, W, D]
    scores = jnp.einsum("bhnd,bhnwd->bhnw", q, keys, preferred_element_type=jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(scores, -1).astype(value.dtype)
    out = jnp.einsum("bhnw,bhnwd->bhnd", weights, values)
    return jnp.swapaxes(out, 1, 2).reshape(*query.shape[:-1], -1)


def dense_attention(query: Array, key: Array, value: Array, window: Sequence[int]) -> Array:
    """All ``tokens x tokens`` scores, masked."""
    spatial, (heads, dim) = query.shape[1:-2], query.shape[-2:]
    mask = np.ones((1, 1), bool)
    for length, size in zip(spatial, window, strict=True):
        axis = visible(np.arange(length), np.arange(length), length, size, 1, 1, False, np)
        mask = np.kron(mask, axis)
    q, k, v = (x.reshape(x.shape[0], -1, heads, x.shape[-1]) for x in (query, key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * dim**-0.5
    weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf), -1).astype(value.dtype)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(*query.shape[:-1], -1)
