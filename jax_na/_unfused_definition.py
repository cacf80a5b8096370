"""The three products of unfused neighborhood attention by their definition: keys and values gathered per query.

The oracle of the other implementations (``implementation="reference"``). It materializes ``[.., tokens, window, D]``.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.numpy as jnp

from jax_na._spec import Spec, accumulation_dtype
from jax_na._window import group_length, window_bounds

Array = Any


def axis_window(spec: Spec, axis: int, query_length: int, halo: Array) -> tuple[Array, Array]:
    """Window of each query along one axis: first key (group coordinate) and number of visible keys, both ``[queries]``."""
    position = halo[axis][0] + jnp.arange(query_length)
    dilation = spec.dilation[axis]
    length = group_length(halo[axis][2], dilation, position % dilation)
    start, end = window_bounds(position // dilation, length, spec.window[axis], spec.stride[axis], spec.is_causal[axis])
    return start, end - start


def _spread(spec: Spec, axis: int, array: Array) -> Array:
    """``[queries, slots]`` of one axis, shaped to broadcast as ``[*Sq, *window]``."""
    shape = [1] * (2 * spec.rank)
    shape[axis], shape[spec.rank + axis] = array.shape
    return array.reshape(shape)


def inside(spec: Spec, query_spatial: tuple[int, ...], halo: Array) -> Array:
    """Boolean ``[*Sq, window volume]``: the slots of each query's window that hold a key it sees (all, if not causal)."""
    result = jnp.ones((), bool)
    for axis, length in enumerate(query_spatial):
        count = axis_window(spec, axis, length, halo)[1]
        result = result & _spread(spec, axis, jnp.arange(spec.window[axis]) < count[:, None])
    return jnp.broadcast_to(result, (*query_spatial, *spec.window)).reshape(*query_spatial, spec.volume)


def neighbors(spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array) -> Array:
    """int32 ``[*Sq, window volume]``: flat index into the key axes of the key in each slot; out of range where there is none."""
    result = jnp.zeros((), jnp.int32)
    for axis, length in enumerate(query_spatial):
        group = (halo[axis][0] + jnp.arange(length)) % spec.dilation[axis]
        start = axis_window(spec, axis, length, halo)[0]
        slots = start[:, None] + jnp.arange(spec.window[axis])
        position = slots * spec.dilation[axis] + group[:, None] - halo[axis][1]
        result = result + _spread(spec, axis, position * math.prod(key_spatial[axis + 1 :]))
    result = jnp.broadcast_to(result, (*query_spatial, *spec.window)).reshape(*query_spatial, spec.volume)
    return jnp.where(inside(spec, query_spatial, halo), result, math.prod(key_spatial))


def _setup(spec: Spec, per_query: Array, per_key_shape: tuple[int, ...], halo: Array) -> tuple[Array, Any]:
    """Neighbor table ``[Nq, W]`` and the einsum to use."""
    rank = spec.rank
    index = neighbors(spec, spec.spatial(per_query), tuple(per_key_shape[-2 - rank : -2]), halo)
    dot = functools.partial(
        jnp.einsum, precision=spec.precision, preferred_element_type=accumulation_dtype(per_query.dtype)
    )
    return index.reshape(-1, spec.volume), dot


def _per_query(spec: Spec, array: Array, kv_heads: int) -> Array:
    """``[*B, *Sq, H, X]`` to ``[*B, Nq, Hkv, H / Hkv, X]``."""
    tokens = math.prod(spec.spatial(array))
    return array.reshape(*spec.lead(array), tokens, kv_heads, array.shape[-2] // kv_heads, array.shape[-1])


def _per_slot(spec: Spec, array: Array, index: Array) -> Array:
    """``[*B, *Sk, Hkv, X]`` gathered to ``[*B, Nq, W, Hkv, X]``; zero where a slot holds no key."""
    flat = array.reshape(*spec.lead(array), math.prod(spec.spatial(array)), *array.shape[-2:])
    return jnp.take(flat, index, axis=-3, mode="fill", fill_value=0)


def pointwise(spec: Spec, query: Array, key: Array, halo: Array) -> Array:
    index, dot = _setup(spec, query, key.shape, halo)
    scores = dot("...qgrd,...qwgd->...qgrw", _per_query(spec, query, key.shape[-2]), _per_slot(spec, key, index))
    return (scores * spec.scale).astype(query.dtype).reshape(*query.shape[:-1], spec.volume)


def neighborhood(spec: Spec, weights: Array, value: Array, halo: Array) -> Array:
    index, dot = _setup(spec, weights, value.shape, halo)
    weights = jnp.where(inside(spec, spec.spatial(weights), halo)[..., None, :], weights, 0)
    out = dot("...qgrw,...qwgd->...qgrd", _per_query(spec, weights, value.shape[-2]), _per_slot(spec, value, index))
    return (out * spec.scale).astype(weights.dtype).reshape(*weights.shape[:-1], value.shape[-1])


def inverse(spec: Spec, weights: Array, array: Array, halo: Array, kv_shape: tuple[int, ...]) -> Array:
    shape = (*spec.lead(array), *kv_shape, array.shape[-1])
    index, dot = _setup(spec, weights, shape, halo)
    weights = jnp.where(inside(spec, spec.spatial(weights), halo)[..., None, :], weights, 0)
    kv_heads = kv_shape[-1]
    terms = dot("...qgrw,...qgrd->...qwgd", _per_query(spec, weights, kv_heads), _per_query(spec, array, kv_heads))
    lead = spec.lead(array)
    result = jnp.zeros((*lead, math.prod(kv_shape[:-1]), *shape[-2:]), terms.dtype)
    result = result.at[(*(slice(None),) * len(lead), index)].add(terms, mode="drop")
    return (result * spec.scale).astype(array.dtype).reshape(shape)
