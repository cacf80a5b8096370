"""Additional keys around a kernel that knows only windows.

Softmax over window and additional keys is the lse-weighted sum of a softmax over each. Backward needs no more: with the *total* lse
the recomputed weights of each part are those of the whole softmax, so each part's gradient is exact by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.nn import logsumexp

from jax_na._spec import Inputs, Spec, accumulation_dtype

Array = Any


def _grouped(array: Array, lead: int, kv_heads: int) -> Array:
    """``[*B, *S, H, X]`` as ``[*B, tokens, Hkv, H // Hkv, X]``."""
    *spatial, heads, channels = array.shape[lead:]
    return array.reshape(*array.shape[:lead], math.prod(spatial), kv_heads, heads // kv_heads, channels)


def _extra(inputs: Inputs) -> tuple[Array, Array]:
    assert inputs.extra_key is not None and inputs.extra_value is not None
    return inputs.extra_key, inputs.extra_value


def _scores(spec: Spec, inputs: Inputs) -> tuple[Array, Callable[..., Array]]:
    """Scaled scores against the additional keys, ``[*B, tokens, Hkv, H // Hkv, M]``, and the einsum for them."""
    acc = accumulation_dtype(inputs.query.dtype)
    extra_key, _ = _extra(inputs)
    lead, kv_heads = len(spec.lead(inputs.query)), inputs.key.shape[-2]

    def dot(expression: str, *operands: Array) -> Array:
        return jnp.einsum(expression, *operands, precision=spec.precision, preferred_element_type=acc)

    query = _grouped(inputs.query, lead, kv_heads)
    return dot("...ngrd,...mgd->...ngrm", query, extra_key) * jnp.asarray(spec.scale, acc), dot


def _window_only(inputs: Inputs) -> Inputs:
    return inputs._replace(extra_key=None, extra_value=None)


def forward(window_forward: Callable[..., Any], spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``window_forward`` over the window, merged with dense attention over the additional keys."""
    extra_key, extra_value = _extra(inputs)
    out, window_lse = window_forward(spec, _window_only(inputs), halo)
    if extra_key.shape[-3] == 0:
        return out, window_lse
    scores, dot = _scores(spec, inputs)
    grouped_lse = window_lse.reshape(scores.shape[:-1])
    lse = jnp.logaddexp(grouped_lse, logsumexp(scores, -1))
    weights = jnp.exp(scores - lse[..., None])
    extra = dot("...ngrm,...mgd->...ngrd", weights, extra_value.astype(weights.dtype))
    total = extra.reshape(out.shape) + out * jnp.exp(grouped_lse - lse).reshape(window_lse.shape)[..., None]
    return total.astype(out.dtype), lse.reshape(window_lse.shape)


def backward(
    window_backward: Callable[..., Inputs],
    spec: Spec,
    inputs: Inputs,
    out: Array,
    lse: Array,
    grad_out: Array,
    grad_lse: Array | None,
    halo: Array,
) -> Inputs:
    """``window_backward`` with the total output and lse, plus the gradients of the dense part."""
    extra_key, extra_value = _extra(inputs)
    grads = window_backward(spec, _window_only(inputs), out, lse, grad_out, grad_lse, halo)
    if extra_key.shape[-3] == 0:
        return grads._replace(extra_key=jnp.zeros_like(extra_key), extra_value=jnp.zeros_like(extra_value))
    scores, dot = _scores(spec, inputs)
    acc, lead, kv_heads = scores.dtype, len(spec.lead(inputs.query)), inputs.key.shape[-2]
    query, grad = (_grouped(array, lead, kv_heads) for array in (inputs.query, grad_out))
    delta = jnp.sum(out.astype(acc) * grad_out.astype(acc), -1)
    if grad_lse is not None:
        delta = delta - grad_lse
    weights = jnp.exp(scores - lse.reshape(scores.shape[:-1])[..., None])
    grad_weights = dot("...ngrd,...mgd->...ngrm", grad, extra_value)
    grad_scores = weights * (grad_weights - delta.reshape(scores.shape[:-1])[..., None]) * jnp.asarray(spec.scale, acc)
    grad_query = dot("...ngrm,...mgd->...ngrd", grad_scores, extra_key.astype(acc))
    grad_key = dot("...ngrm,...ngrd->...mgd", grad_scores, query.astype(acc))
    grad_value = dot("...ngrm,...ngrd->...mgd", weights, grad.astype(acc))
    dtype = inputs.query.dtype
    return grads._replace(
        query=(grads.query.astype(acc) + grad_query.reshape(inputs.query.shape)).astype(dtype),
        extra_key=grad_key.astype(dtype),
        extra_value=grad_value.astype(dtype),
    )
