"""The window rule: which keys a query sees along one axis.

This is the executable form of the definition, the one every implementation is held against (C++: ``cuda/common/window.h``).
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

Array = Any


def window_bounds(i: Array, length: Array, window: int, stride: int, is_causal: bool, xp: Any = jnp) -> tuple[Array, Array]:
    """First key (inclusive) and last key (exclusive) that query ``i`` sees, all in group coordinates.

    Args:
      i: query coordinates within a dilation group of ``length`` tokens.
      length: tokens in the group, an integer or an array that broadcasts against ``i``.
      window, stride, is_causal: the axis' parameters, ``1 <= stride <= window <= length``.
      xp: array module, numpy or jax.numpy.
    """
    if is_causal:
        center = xp.minimum(i // stride * stride + stride - 1, length - 1)
        return xp.maximum(center - window + 1, 0), i + 1
    left, right = window // 2, window // 2 + window % 2 - 1
    center = xp.minimum(i // stride * stride + stride // 2, length - 1)
    start = xp.maximum(center - left, 0)
    start = start + xp.where(center + right >= length, length - right - center - 1, 0)
    return start, start + window


def group_length(length: Array, dilation: int, group: Array, xp: Any = jnp) -> Array:
    """Tokens in dilation group ``group`` of an axis of ``length`` tokens."""
    return length // dilation + xp.where(group < length % dilation, 1, 0)


def visible(
    query_position: Array,
    key_position: Array,
    length: Array,
    window: int,
    stride: int,
    dilation: int,
    is_causal: bool,
    xp: Any = jnp,
) -> Array:
    """Boolean ``[queries, keys]``: which keys each query sees along one axis, from global token positions."""
    query, key = query_position[:, None], key_position[None, :]
    group = query % dilation
    group_len = group_length(length, dilation, group, xp)
    start, end = window_bounds(query // dilation, group_len, window, stride, is_causal, xp)
    coordinate = key // dilation
    inside = (coordinate >= start) & (coordinate < end) & (key % dilation == group)
    return inside & (key >= 0) & (key < length)
