"""The definition of neighborhood attention: masked dense attention in a few plain lines.

The oracle of every test and, as ``implementation="reference"``, something to read and to debug with. It materializes all
``tokens x tokens`` scores.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_na._spec import Inputs, Spec, accumulation_dtype

Array = Any


def mask(spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array) -> Array:
    """Boolean ``[*Sq, *Sk]``: which keys each query sees. ``halo`` is int32 ``[rank, 3]`` (query offset, key offset, length)."""
    result = jnp.ones((), bool)
    for axis in range(spec.rank):
        query_offset, key_offset, length = halo[axis][0], halo[axis][1], halo[axis][2]
        queries, keys = query_offset + jnp.arange(query_spatial[axis]), key_offset + jnp.arange(key_spatial[axis])
        one_axis = spec.visible(axis, queries, keys, length)
        shape = [1] * (2 * spec.rank)
        shape[axis], shape[spec.rank + axis] = one_axis.shape
        result = result & one_axis.reshape(shape)
    return result


def relative_bias(
    spec: Spec, bias: Array, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array
) -> Array:
    """``bias [*Bb, H, 2k-1, ...]`` spread over all pairs, ``[*Bb, H, *Sq, *Sk]``: entry key - query + k - 1 per axis."""
    rank = spec.rank
    indices = []
    for axis in range(rank):
        query = (halo[axis][0] + jnp.arange(query_spatial[axis])) // spec.dilation[axis]
        key = (halo[axis][1] + jnp.arange(key_spatial[axis])) // spec.dilation[axis]
        index = jnp.clip(key[None, :] - query[:, None] + spec.window[axis] - 1, 0, 2 * spec.window[axis] - 2)
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = index.shape
        indices.append(index.reshape(shape))
    return bias[(..., *indices)]


def attention(spec: Spec, inputs: Inputs, halo: Array, weights_dtype: Any = None) -> tuple[Array, Array]:
    """Output ``[*B, *Sq, H, Dv]`` in the input dtype and lse ``[*B, *Sq, H]``.

    ``weights_dtype`` rounds the attention weights before they meet the values, as a kernel on tensor cores must: the
    same-precision reference that tolerances in tests are taken from.
    """
    query, key, value, bias, extra_key, extra_value = inputs
    query_spatial, key_spatial = spec.spatial(query), spec.spatial(key)
    lead, (heads, dim), kv_heads = spec.lead(query), query.shape[-2:], key.shape[-2]
    acc = accumulation_dtype(query.dtype)
    dot = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=acc)

    # Query heads split into (kv head, member), tokens flattened: q [*B, Nq, G, R, D], k [*B, Nk, G, D].
    num_keys = math.prod(key_spatial)
    q = query.reshape(*lead, math.prod(query_spatial), kv_heads, heads // kv_heads, dim)
    k = key.reshape(*lead, num_keys, kv_heads, dim)
    v = value.reshape(*lead, num_keys, kv_heads, value.shape[-1])
    scores = dot("...qgrd,...kgd->...grqk", q, k) * jnp.asarray(spec.scale, acc)
    if bias is not None:
        spread = relative_bias(spec, bias.astype(acc), query_spatial, key_spatial, halo)
        blead = bias.shape[: -1 - spec.rank]
        spread = spread.reshape(*blead, *(1,) * (len(lead) - len(blead)), *scores.shape[len(lead) :])
        scores = scores + spread
    seen = mask(spec, query_spatial, key_spatial, halo).reshape(q.shape[len(lead)], k.shape[len(lead)])
    scores = jnp.where(seen, scores, -jnp.inf)
    if extra_key is not None and extra_value is not None:
        extra_scores = dot("...qgrd,...kgd->...grqk", q, extra_key) * jnp.asarray(spec.scale, acc)
        scores = jnp.concatenate([scores, extra_scores], -1)
        v = jnp.concatenate([v, extra_value], -3)
    row_max = jax.lax.stop_gradient(jnp.max(scores, -1, keepdims=True, initial=-jnp.inf))
    row_max = jnp.where(jnp.isfinite(row_max), row_max, 0)
    weights = jnp.exp(scores - row_max)
    row_sum = jnp.sum(weights, -1, keepdims=True)
    lse = (jnp.log(row_sum) + row_max)[..., 0]
    weights = weights / jnp.where(row_sum == 0, 1, row_sum)
    weights_dtype = acc if weights_dtype is None else weights_dtype
    out = dot("...grqk,...kgd->...qgrd", weights.astype(weights_dtype), v.astype(weights_dtype))
    lse = jnp.moveaxis(lse, -1, len(lead)).reshape(*lead, *query_spatial, heads)
    return out.reshape(*lead, *query_spatial, heads, value.shape[-1]).astype(query.dtype), lse


def forward(spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    return attention(spec, inputs, halo)


def backward(
    spec: Spec, inputs: Inputs, out: Array, lse: Array, grad_out: Array, grad_lse: Array | None, halo: Array
) -> Inputs:
    del out, lse
    primal, vjp = jax.vjp(lambda inputs: attention(spec, inputs, halo), inputs)
    return vjp((grad_out, jnp.zeros_like(primal[1]) if grad_lse is None else grad_lse))[0]
