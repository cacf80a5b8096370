"""The public functions of the unfused pair."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jax_na import _backends, _unfused
from jax_na._spec import Spec, check_dtype, check_given, check_heads, check_rank, check_shape, check_sizes, make_spec

Array = Any


def na_qk(
    query: Array,
    key: Array,
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Array | None = None,
    precision: Any = None,
    implementation: str | None = None,
    shrink_window: bool = False,
    max_weights_bytes: int | None = None,
) -> Array:
    """Neighborhood attention scores: every query times the keys of its window.

    Args:
      query: ``[B, *spatial, H, D]`` with 1, 2 or 3 spatial axes; float16, bfloat16, float32 or float64.
      key: ``[B, *spatial, Hkv, D]``; query head ``h`` reads key head ``h // (H // Hkv)``.
      window_size, stride, dilation, is_causal, precision, shrink_window: as in :func:`jax_na.neighborhood_attention`.
      scale: multiplies ``query . key``; default ``D ** -0.5``. A Python number.
      bias: relative positional bias ``[H, 2 * window - 1, ...]`` (odd windows), added to the scaled scores.
      implementation: ``None`` (the best that serves) or one of ``"cuda_gemm"``, ``"cuda_naive"``, ``"xla"``, ``"reference"``.
      max_weights_bytes: largest result allowed, in bytes; default 8 GiB, or the environment variable
        ``JAX_NA_MAX_WEIGHTS_BYTES``.

    Returns:
      ``[B, *spatial, H, prod(window_size)]`` in the dtype of ``query``. The last axis enumerates the keys of the query's window
      row-major, on each axis from the window's first key, in steps of ``dilation``. Entries outside a causal mask are ``-inf``
      and pass no gradient.

    Memory: the result takes ``B * prod(spatial) * H * prod(window_size)`` elements, and so does its gradient.

    Raises:
      ValueError, TypeError: an illegal argument, or a result larger than ``max_weights_bytes``.
      NotImplementedError: the named ``implementation`` cannot serve the call.

    Differentiable in query, key and bias, to any order and in both modes. Source: "Faster Neighborhood Attention",
    arXiv 2403.04690.
    """
    query, key = _given("query", query), _given("key", key)
    bias = None if bias is None else jnp.asarray(bias)
    spec = make_spec(query, window_size, stride, dilation, is_causal, scale, precision, implementation, None, shrink_window)
    check_dtype("query", query)
    check_dtype("key", key, query)
    _check_per_key("key", key, query, query.shape[-1])
    if bias is not None:
        check_dtype("bias", bias, query)
        if any(window % 2 == 0 for window in spec.window):
            raise ValueError(f"bias needs an odd window_size on every axis, got {spec.window}")
        check_shape("bias", bias, (query.shape[-2], *(2 * w - 1 for w in spec.window)), "[heads, 2 * window - 1 per axis]")
    _unfused.check_memory(spec, query, max_weights_bytes)
    _check_implementation(spec, query)
    return _unfused.scores(spec, query, key, bias, spec.identity_halo(query)).astype(query.dtype)


def na_av(
    weights: Array,
    value: Array,
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    precision: Any = None,
    implementation: str | None = None,
    shrink_window: bool = False,
) -> Array:
    """Weighted sums of the values in each query's window: what turns attention weights into the output.

    Args:
      weights: ``[B, *spatial, H, prod(window_size)]``, enumerated as :func:`na_qk` does; any numbers, not only probabilities.
        Entries outside a causal mask are ignored, whatever they hold, and get zero gradient.
      value: ``[B, *spatial, Hkv, Dv]`` in the dtype of ``weights``; head ``h`` reads value head ``h // (H // Hkv)``.
      window_size, stride, dilation, is_causal, precision, implementation, shrink_window: as in :func:`na_qk`.

    Returns:
      ``[B, *spatial, H, Dv]`` in the dtype of ``weights``.

    Raises:
      ValueError, TypeError: an illegal argument.
      NotImplementedError: the named ``implementation`` cannot serve the call.

    Differentiable in both operands, to any order and in both modes. A value that is not finite may reach, as NaN, queries near
    those that see it: tiled products multiply it by zero. (:func:`jax_na.neighborhood_attention` guards against that.)
    """
    weights, value = _given("weights", weights), _given("value", value)
    check_rank("weights", weights)
    spec = make_spec(weights, window_size, stride, dilation, is_causal, 1.0, precision, implementation, None, shrink_window)
    check_dtype("weights", weights)
    if value.dtype != weights.dtype:
        raise TypeError(f"value has dtype {value.dtype}, weights has {weights.dtype}: they must be equal")
    if weights.shape[-1] != spec.volume:
        raise ValueError(
            f"weights has shape {tuple(weights.shape)}: expected {spec.volume} entries on the last axis, the product of "
            f"window_size {spec.window}"
        )
    _check_per_key("value", value, weights, value.shape[-1])
    _check_implementation(spec, value)
    return _unfused.neighborhood(dataclasses.replace(spec, scale=1.0), weights, value, spec.identity_halo(weights))


def _given(name: str, array: Array) -> Array:
    check_given(name, array)
    return jnp.asarray(array)


def _check_per_key(name: str, array: Array, per_query: Array, dim: int) -> None:
    """Shape of an array that holds one row per key, against one that holds one row per query."""
    if array.ndim != per_query.ndim:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}: expected [batch, *spatial, kv_heads, dim] with the {per_query.ndim - 3} "
            f"spatial axes {tuple(per_query.shape[1:-2])}"
        )
    expected = (*per_query.shape[:-2], array.shape[-2], dim)
    check_shape(name, array, expected, "[batch, *spatial, kv_heads, dim], batch and spatial axes those of the queries")
    of_dim, of_heads = ("query", "query") if name == "key" else ("value", "weights")
    check_sizes({f"head_dim of {of_dim}": dim, f"heads of {of_heads}": per_query.shape[-2]})
    check_heads(per_query.shape[-2], array.shape[-2])


def _check_implementation(spec: Spec, array: Array) -> None:
    if not (isinstance(spec.implementation, str) and spec.implementation in _unfused.PRODUCTS):
        _backends.check_name(spec.implementation)
    _unfused.choose(None, spec, array.dtype, array.shape[-1])
