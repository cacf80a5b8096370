"""The public functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jax_na import _backends, _primitives, _unfused
from jax_na._spec import Inputs, check_inputs, make_spec

Array = Any


def neighborhood_attention(
    query: Array,
    key: Array,
    value: Array,
    window_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Array | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    deterministic: bool | None = None,
    shrink_window: bool = False,
    return_weights: bool = False,
    max_weights_bytes: int | None = None,
) -> Array | tuple[Array, ...]:
    """Attention in which each token sees only its nearest neighbours in 1, 2 or 3 dimensions.

    Args:
      query: ``[B, *spatial, H, D]`` with 1, 2 or 3 spatial axes; float16, bfloat16, float32 or float64.
      key: ``[B, *spatial, Hkv, D]``; ``H`` is a multiple of ``Hkv`` and query head ``h`` reads key head ``h // (H // Hkv)``.
      value: ``[B, *spatial, Hkv, Dv]``.
      window_size: keys each query sees, per axis (a scalar serves every axis), ``window_size * dilation <= length``.
      stride: queries that share one window, ``1 <= stride <= window_size``; 1 is a sliding window, ``window_size`` is blocked.
      dilation: distance between neighbours in the window, in tokens.
      is_causal: along such an axis a query sees only itself and tokens before it.
      scale: multiplies ``query . key``; default ``D ** -0.5``. A Python number.
      bias: relative positional bias ``[H, 2 * window - 1, ...]`` (odd windows), added to the scaled scores.
      additional_keys, additional_values: ``[B, M, Hkv, D]`` and ``[B, M, Hkv, Dv]``: tokens every query sees besides its window.
      return_lse: also return the log-sum-exp of the scores.
      precision: as in ``jax.numpy.einsum``; ``None`` follows ``jax_default_matmul_precision``.
      implementation: ``None`` (the best that serves) or a name; :func:`jax_na.explain` lists them.
      deterministic: ``True`` asks for bitwise reproducible gradients; ``None`` takes what is faster. Forward passes are always
        reproducible, and so are the gradients of ``cuda_fused``, ``cuda_naive`` and ``cuda_gemm``; ``cuda_hopper`` (and ``cuda``
        where it takes those kernels) adds up the gradient of ``query`` in the order in which blocks finish unless asked not to.
        What XLA computes (``xla``, and what surrounds the kernels) is as reproducible as XLA's own flags make it.
      shrink_window: let a window (and dilation) that does not fit the input shrink instead of raising.
      return_weights: also return the attention weights, through the unfused products (:func:`jax_na.na_qk`, softmax,
        :func:`jax_na.na_av`); ``implementation`` then names one of theirs. They take ``B * prod(spatial) * H *
        prod(window_size)`` elements of memory, a few times over when differentiated.
      max_weights_bytes: largest weights array allowed with ``return_weights`` or an implementation that stores the weights
        (``"cuda_gemm"``, ``"xla_unfused"``); default 8 GiB, or the environment variable ``JAX_NA_MAX_WEIGHTS_BYTES``.

    Returns:
      ``[B, *spatial, H, Dv]`` in the dtype of ``query``; with ``return_lse`` also ``[B, *spatial, H]``, float32, natural log,
      scale included (float64 for float64 inputs). With ``return_weights`` also, last, ``[B, *spatial, H, prod(window_size)]`` in
      the dtype of ``query``: the softmax weight of each key of the window, row-major from the window's first key, zero outside a
      causal mask. Additional keys are in the softmax but not in this array: a row then sums to one less their share.

    Raises:
      ValueError, TypeError: an illegal argument; the message names it, its value and the limit.
      NotImplementedError: the named ``implementation`` cannot serve the call.

    Source: Hassani et al., "Neighborhood Attention Transformer" (arXiv 2204.07143), "Faster Neighborhood Attention"
    (arXiv 2403.04690), "Generalized Neighborhood Attention" (arXiv 2504.16922).
    """
    if not (return_weights and isinstance(implementation, str) and implementation in _unfused.PRODUCTS):
        _backends.check_name(implementation)
    given = Inputs(query, key, value, bias, additional_keys, additional_values)
    inputs = Inputs(*(None if array is None else jnp.asarray(array) for array in given))
    spec = make_spec(
        inputs.query,
        window_size,
        stride,
        dilation,
        is_causal,
        scale,
        precision,
        implementation,
        deterministic,
        shrink_window,
    )
    check_inputs(inputs, spec)
    if return_weights or implementation in _unfused.STORES_WEIGHTS:
        _unfused.check_memory(spec, inputs.query, max_weights_bytes)
    if return_weights:
        _unfused.choose_both(spec, inputs)
        out, lse, weights = _unfused.attention(spec, inputs, spec.identity_halo(inputs.query))
        return (out, lse, weights) if return_lse else (out, weights)
    _backends.choose(None, spec, inputs)
    out, lse = _primitives.forward(spec, inputs, spec.identity_halo(inputs.query))
    return (out, lse) if return_lse else out
