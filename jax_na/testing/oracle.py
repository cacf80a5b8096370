"""Neighborhood attention and its gradients in numpy float64, without JAX: an oracle for fuzzing thousands of small problems.

Independent of :mod:`jax_na._definition` but for the window rule; the two are held equal by a test.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from jax_na._spec import Inputs, Spec

Array = Any


class Result(NamedTuple):
    out: Array  # [B, *S, H, Dv]
    lse: Array  # [B, *S, H]
    grads: Inputs | None  # of sum(out * grad_out) + sum(lse * grad_lse)


def mask(spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array) -> Array:
    """Boolean ``[Nq, Nk]``, tokens flattened row-major."""
    result = np.ones((1, 1), bool)
    for axis in range(spec.rank):
        query_offset, key_offset, length = (int(x) for x in halo[axis])
        queries, keys = query_offset + np.arange(query_spatial[axis]), key_offset + np.arange(key_spatial[axis])
        result = np.kron(result, spec.visible(axis, queries, keys, length, np))
    return result.astype(bool)


def _bias_index(spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array) -> Array:
    """Flat index into ``bias[h]`` of every pair, ``[Nq, Nk]``; clipped where the pair is not visible."""
    queries = np.indices(query_spatial).reshape(spec.rank, -1, 1)
    keys = np.indices(key_spatial).reshape(spec.rank, 1, -1)
    index = np.zeros((queries.shape[1], keys.shape[2]), int)
    for axis in range(spec.rank):
        query = (queries[axis] + int(halo[axis][0])) // spec.dilation[axis]
        key = (keys[axis] + int(halo[axis][1])) // spec.dilation[axis]
        width = 2 * spec.window[axis] - 1
        index = index * width + np.clip(key - query + spec.window[axis] - 1, 0, width - 1)
    return index


def attention(
    spec: Spec, inputs: Inputs, halo: Array | None = None, grad_out: Array | None = None, grad_lse: Array | None = None
) -> Result:
    """Forward, and gradients where ``grad_out`` is given (``grad_lse`` defaults to zero). One batch dimension."""
    halo = spec.identity_halo(inputs.query) if halo is None else np.asarray(halo)
    query, key, value, bias, extra_key, extra_value = (None if x is None else np.asarray(x, np.float64) for x in inputs)
    assert query is not None and key is not None and value is not None
    query_spatial, key_spatial = spec.spatial(query), spec.spatial(key)
    batch, (heads, dim), (kv_heads, dim_v) = query.shape[0], query.shape[-2:], value.shape[-2:]
    members = heads // kv_heads
    q = query.reshape(batch, -1, kv_heads, members, dim)
    k = key.reshape(batch, -1, kv_heads, dim)
    v = value.reshape(batch, -1, kv_heads, dim_v)
    window_keys = k.shape[1]
    if extra_key is not None and extra_value is not None:
        k, v = np.concatenate([k, extra_key], 1), np.concatenate([v, extra_value], 1)
    seen = np.ones((q.shape[1], k.shape[1]), bool)
    seen[:, :window_keys] = mask(spec, query_spatial, key_spatial, halo)

    scores = np.einsum("bqgrd,bkgd->bgrqk", q, k, optimize=True) * spec.scale
    if bias is not None:
        index = _bias_index(spec, query_spatial, key_spatial, halo)
        table = bias.reshape(kv_heads, members, -1)
        scores[..., :window_keys] += table[:, :, index]
    scores = np.where(seen, scores, -np.inf)
    row_max = np.max(scores, -1, keepdims=True, initial=-np.inf)
    row_max = np.where(np.isfinite(row_max), row_max, 0)
    weights = np.exp(scores - row_max)
    row_sum = weights.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (np.log(row_sum) + row_max)[..., 0]
    weights = weights / np.where(row_sum == 0, 1, row_sum)
    out = np.einsum("bgrqk,bkgd->bqgrd", weights, v, optimize=True)

    def tokens(x: Array) -> Array:  # [B, G, R, Nq] -> [B, *Sq, H]
        return np.moveaxis(x, -1, 1).reshape(batch, *query_spatial, heads)

    result = Result(out.reshape(batch, *query_spatial, heads, dim_v), tokens(lse), None)
    if grad_out is None:
        return result

    grad = np.asarray(grad_out, np.float64).reshape(out.shape)
    grad_row = np.zeros(lse.shape) if grad_lse is None else np.asarray(grad_lse, np.float64)
    if grad_lse is not None:
        grad_row = np.moveaxis(grad_row.reshape(batch, -1, kv_heads, members), 1, -1)
    delta = np.einsum("bqgrd,bqgrd->bgrq", grad, out) - grad_row
    grad_v = np.einsum("bgrqk,bqgrd->bkgd", weights, grad, optimize=True)
    grad_scores = weights * (np.einsum("bqgrd,bkgd->bgrqk", grad, v, optimize=True) - delta[..., None])
    grad_q = np.einsum("bgrqk,bkgd->bqgrd", grad_scores, k, optimize=True) * spec.scale
    grad_k = np.einsum("bgrqk,bqgrd->bkgd", grad_scores, q, optimize=True) * spec.scale
    grad_bias = None
    if bias is not None:
        summed = grad_scores[..., :window_keys].sum(0).reshape(heads, -1)
        flat = np.stack([np.bincount(index.ravel(), row, bias[0].size) for row in summed])
        grad_bias = flat.reshape(bias.shape)
    has_extra = extra_key is not None
    grads = Inputs(
        grad_q.reshape(query.shape),
        grad_k[:, :window_keys].reshape(key.shape),
        grad_v[:, :window_keys].reshape(value.shape),
        grad_bias,
        grad_k[:, window_keys:] if has_extra else None,
        grad_v[:, window_keys:] if has_extra else None,
    )
    return result._replace(grads=grads)
