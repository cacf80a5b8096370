"""The XLA implementation: runs on every platform JAX has. Blocked over query tiles, softmax in float32.

Each step of a loop takes one tile of queries and the box of keys that holds their windows (``_tiles.py``) through two dense
products; the backward pass recomputes the probabilities from lse. Nothing of size ``tokens x tokens`` or ``tokens x
window`` exists. Plain ``jax.numpy`` and ``jax.lax``, so it is differentiable again: second derivatives go through
:func:`backward` and :func:`tangent`.

A box holds keys that some of its queries do not see. Their probability is zero, but zero times NaN is NaN; so products with
probabilities run over operands whose non-finite entries are replaced by zero (:func:`_clean`), and a non-finite token
reaches exactly those that see it through the scores instead, as NaN (:func:`_poison`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from jax_na._spec import Inputs, Spec, accumulation_dtype
from jax_na._tiles import Tiles, int32, loop, make_tiles

Array = Any

# Shapes in the steps: g, b, h dilation groups, batch entries and key/value heads of the step; r query heads per key/value
# head; t queries of the tile; k keys of the box; m additional keys.
_SCORES = "gbhrtd,gbhkd->gbhrtk"
_VALUES = "gbhrtk,gbhkd->gbhrtd"
_KEY_SUMS = "gbhrtk,gbhrtd->gbhkd"
_EXTRA_SCORES = "gbhrtd,bhmd->gbhrtm"
_EXTRA_VALUES = "gbhrtm,bhmd->gbhrtd"
_EXTRA_SUMS = "gbhrtm,gbhrtd->bhmd"


def _clean(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _poison(x: Array) -> Array:
    """NaN where a row of ``x`` (its last axis) holds anything that is not finite, else zero."""
    return jnp.where(jnp.isfinite(x).all(-1, keepdims=True), jnp.zeros((), x.dtype), jnp.nan)


def _has_extra(inputs: Inputs) -> bool:
    return inputs.extra_key is not None and inputs.extra_key.shape[-3] > 0


class _Call:
    """What forward, backward and tangent share: the operands in tile layout and the scores of a step."""

    def __init__(self, spec: Spec, inputs: Inputs, halo: Array) -> None:
        self.spec = spec
        self.inputs = inputs
        self.acc = accumulation_dtype(inputs.query.dtype)
        self.tiles: Tiles = make_tiles(spec, inputs, halo)
        self.lead = spec.lead(inputs.query)
        self.extra = _has_extra(inputs)

    def dot(self, subscripts: str, a: Array, b: Array) -> Array:
        return jnp.einsum(subscripts, a, b, precision=self.spec.precision, preferred_element_type=self.acc)

    def heads_first(self, extra: Array) -> Array:
        """Additional tokens ``[*B, M, Hkv, C]`` to ``[B, Hkv, M, C]``."""
        return extra.reshape(-1, *extra.shape[-3:]).swapaxes(1, 2)

    def box(self, buffer: Array, coords: Array) -> Array:
        return self.tiles.box(buffer, coords).astype(self.acc)

    def extra_chunk(self, extra: Array, coords: Array) -> Array:
        """The step's batch entries and heads of ``[B, Hkv, M, C]``."""
        _, b, h = self.tiles.plan.chunk
        index = int32((coords[1] * b, coords[2] * h, 0, 0))
        return jax.lax.dynamic_slice(extra, index, (b, h, *extra.shape[2:])).astype(self.acc)

    def add_extra(self, buffer: Array, coords: Array, update: Array) -> Array:
        _, b, h = self.tiles.plan.chunk
        index = int32((coords[1] * b, coords[2] * h, 0, 0))
        return jax.lax.dynamic_update_slice(buffer, jax.lax.dynamic_slice(buffer, index, update.shape) + update, index)

    def zeros_like(self, x: Array) -> Array:
        """An accumulator of the shape of ``x`` (that varies over the same manual mesh axes)."""
        return jnp.zeros_like(x, self.acc)


def _symbolic_axis(spec: Spec, inputs: Inputs) -> int | None:
    """The first leading dimension whose size is a symbol of an export. Steps cannot be cut along it: it is vmapped."""
    return next((i for i, size in enumerate(spec.lead(inputs.query)) if not isinstance(size, int)), None)


def _mapped(spec: Spec, inputs: Inputs, axis: int) -> Inputs:
    """``in_axes`` of the operands: bias may lack the leading dimension."""
    has_axis = inputs.bias is not None and inputs.bias.ndim - 1 - spec.rank > axis
    axes = Inputs(*(None if array is None else axis for array in inputs))
    return axes if has_axis else axes._replace(bias=None)


def forward(spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``(out [*B, *Sq, H, Dv], lse [*B, *Sq, H])``."""
    if (axis := _symbolic_axis(spec, inputs)) is not None:
        return jax.vmap(lambda x: forward(spec, x, halo), (_mapped(spec, inputs, axis),), axis)(inputs)
    query, key, value = inputs.query, inputs.key, inputs.value
    acc = accumulation_dtype(query.dtype)
    if query.size == 0:
        return jnp.zeros((*query.shape[:-1], value.shape[-1]), query.dtype), jnp.zeros(query.shape[:-1], acc)
    call = _Call(spec, inputs, halo)
    tiles = call.tiles
    keys, values = tiles.split_keys(key + _poison(value)), tiles.split_keys(_clean(value))
    bias = None if inputs.bias is None else tiles.split_bias(inputs.bias.astype(acc))
    extra_key, extra_value = (call.heads_first(x) if call.extra else None for x in (inputs.extra_key, inputs.extra_value))

    def step(carry: None, coords: Array, q: Array) -> tuple[None, tuple[Array, Array]]:
        q = q.astype(acc) * spec.scale
        scores = call.dot(_SCORES, q, call.box(keys, coords))
        if bias is not None:
            scores = scores + tiles.bias(bias, coords)
        scores = jnp.where(tiles.mask(coords), scores, -jnp.inf)
        row_max = jnp.max(scores, -1, keepdims=True)
        if call.extra:
            extra_scores = call.dot(_EXTRA_SCORES, q, call.extra_chunk(extra_key, coords))
            row_max = jnp.maximum(row_max, jnp.max(extra_scores, -1, keepdims=True))
        row_max = jax.lax.stop_gradient(jnp.where(jnp.isfinite(row_max), row_max, 0))
        weights = jnp.exp(scores - row_max)
        row_sum = jnp.sum(weights, -1, keepdims=True)
        out = call.dot(_VALUES, weights, call.box(values, coords))
        if call.extra:
            weights = jnp.exp(extra_scores - row_max)
            row_sum = row_sum + jnp.sum(weights, -1, keepdims=True)
            out = out + call.dot(_EXTRA_VALUES, weights, call.extra_chunk(extra_value, coords))
        out = out / jnp.where(row_sum == 0, 1, row_sum)
        return carry, (out.astype(query.dtype), row_max + jnp.log(row_sum))

    out, lse = loop(tiles, step, None, (tiles.split_queries(query),))[1]
    return tiles.join_queries(out, call.lead), tiles.join_queries(lse, call.lead)[..., 0]


def backward(
    spec: Spec, inputs: Inputs, out: Array, lse: Array, grad_out: Array, grad_lse: Array | None, halo: Array
) -> Inputs:
    """Gradients of every given operand, by recomputation from lse."""
    if (axis := _symbolic_axis(spec, inputs)) is not None:
        axes = _mapped(spec, inputs, axis)
        given = (out, lse, grad_out, *([] if grad_lse is None else [grad_lse]))
        grads = jax.vmap(
            lambda x, out, lse, d_out, d_lse=None: backward(spec, x, out, lse, d_out, d_lse, halo),
            (axes, *(axis for _ in given)),
            axis,
        )(inputs, *given)
        if inputs.bias is not None and axes.bias is None:  # shared: its gradients add up
            grads = grads._replace(bias=jnp.sum(jnp.asarray(grads.bias), axis))
        return grads
    query, key, value = inputs.query, inputs.key, inputs.value
    acc = accumulation_dtype(query.dtype)
    if query.size == 0:
        return jax.tree.map(jnp.zeros_like, inputs)
    call = _Call(spec, inputs, halo)
    tiles = call.tiles
    keys, values = tiles.split_keys(key + _poison(value)), tiles.split_keys(_clean(value))
    bias = None if inputs.bias is None else tiles.split_bias(inputs.bias.astype(acc))
    extra_key, extra_value = (call.heads_first(x) if call.extra else None for x in (inputs.extra_key, inputs.extra_value))

    # ds = p * (dp - delta): the gradient of lse enters as delta does. A query that sees nothing has lse = -inf.
    delta = jnp.sum(grad_out.astype(acc) * out.astype(acc), -1, keepdims=True)
    row_lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None] + _poison(delta)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    carry = {"key": call.zeros_like(keys), "value": call.zeros_like(values)}
    if bias is not None:
        carry["bias"] = call.zeros_like(bias)
    if call.extra:
        carry |= {"extra_key": call.zeros_like(extra_key), "extra_value": call.zeros_like(extra_value)}

    def step(
        carry: dict[str, Array], coords: Array, q: Array, d_out: Array, lse: Array, delta: Array
    ) -> tuple[dict[str, Array], Array]:
        carry = dict(carry)
        q, d_out = q.astype(acc) * spec.scale, _clean(d_out.astype(acc))
        q_clean = _clean(q)
        k = call.box(keys, coords)
        scores = call.dot(_SCORES, q, k)
        if bias is not None:
            pairs, bias_vjp = jax.vjp(lambda bias: tiles.bias(bias, coords), bias)
            scores = scores + pairs
        mask = tiles.mask(coords)
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, -jnp.inf) - lse), 0)
        d_weights = call.dot(_SCORES, d_out, call.box(values, coords))
        d_scores = jnp.where(mask, weights * (d_weights - delta), 0)
        d_query = call.dot(_VALUES, d_scores, _clean(k))
        carry["key"] = tiles.add_box(carry["key"], coords, call.dot(_KEY_SUMS, d_scores, q_clean))
        carry["value"] = tiles.add_box(carry["value"], coords, call.dot(_KEY_SUMS, weights, d_out))
        if bias is not None:
            carry["bias"] = carry["bias"] + bias_vjp(jnp.sum(d_scores, (0, 1), keepdims=True))[0]
        if call.extra:
            k, v = call.extra_chunk(extra_key, coords), call.extra_chunk(extra_value, coords)
            weights = jnp.exp(call.dot(_EXTRA_SCORES, q, k) - lse)
            d_scores = weights * (call.dot(_EXTRA_SCORES, d_out, v) - delta)
            d_query = d_query + call.dot(_EXTRA_VALUES, d_scores, k)
            carry["extra_key"] = call.add_extra(carry["extra_key"], coords, call.dot(_EXTRA_SUMS, d_scores, q))
            carry["extra_value"] = call.add_extra(carry["extra_value"], coords, call.dot(_EXTRA_SUMS, weights, d_out))
        return carry, (d_query * spec.scale).astype(query.dtype)

    xs = (
        tiles.split_queries(query),
        tiles.split_queries(grad_out),
        tiles.split_queries(row_lse, math.inf),
        tiles.split_queries(delta),
    )
    sums, d_query = loop(tiles, step, carry, xs)

    def extra_grad(name: str, like: Array | None) -> Array | None:
        if like is None or not call.extra:
            return None if like is None else jnp.zeros_like(like)
        return sums[name].swapaxes(1, 2).reshape(like.shape).astype(like.dtype)

    return Inputs(
        tiles.join_queries(d_query, call.lead),
        tiles.join_keys(sums["key"].astype(key.dtype), call.lead),
        tiles.join_keys(sums["value"].astype(value.dtype), call.lead),
        None if inputs.bias is None else tiles.join_bias(sums["bias"], inputs.bias.shape).astype(inputs.bias.dtype),
        extra_grad("extra_key", inputs.extra_key),
        extra_grad("extra_value", inputs.extra_value),
    )


def tangent(spec: Spec, tangents: Inputs, inputs: Inputs, out: Array, lse: Array, halo: Array) -> tuple[Array, Array]:
    """Tangents of ``(out, lse)``: linear in ``tangents``."""
    if (axis := _symbolic_axis(spec, inputs)) is not None:
        axes = _mapped(spec, inputs, axis)
        mapped = jax.vmap(lambda t, x, out, lse: tangent(spec, t, x, out, lse, halo), (axes, axes, axis, axis), axis)
        return mapped(tangents, inputs, out, lse)
    query, key, value = inputs.query, inputs.key, inputs.value
    acc = accumulation_dtype(query.dtype)
    if query.size == 0:
        return jnp.zeros_like(out), jnp.zeros_like(lse)
    call = _Call(spec, inputs, halo)
    tiles = call.tiles
    keys, values = tiles.split_keys(key + _poison(value)), tiles.split_keys(_clean(value))
    t_keys, t_values = (
        tiles.split_keys(tangents.key + _poison(tangents.value)),
        tiles.split_keys(_clean(tangents.value)),
    )
    bias, t_bias = (None if x is None else tiles.split_bias(x.astype(acc)) for x in (inputs.bias, tangents.bias))
    extra = [
        call.heads_first(x) if call.extra else None
        for x in (inputs.extra_key, inputs.extra_value, tangents.extra_key, tangents.extra_value)
    ]

    def step(carry: None, coords: Array, q: Array, t_q: Array, out: Array, lse: Array) -> tuple[None, tuple[Array, Array]]:
        q, t_q = q.astype(acc) * spec.scale, t_q.astype(acc) * spec.scale
        k, t_k = call.box(keys, coords), call.box(t_keys, coords)
        scores = call.dot(_SCORES, q, k)
        t_scores = call.dot(_SCORES, t_q, k) + call.dot(_SCORES, q, t_k)
        if bias is not None:
            scores, t_scores = scores + tiles.bias(bias, coords), t_scores + tiles.bias(t_bias, coords)
        mask = tiles.mask(coords)
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, -jnp.inf) - lse), 0)
        t_weights = jnp.where(mask, weights * t_scores, 0)
        t_lse = jnp.sum(t_weights, -1, keepdims=True)
        t_out = call.dot(_VALUES, t_weights, call.box(values, coords))
        t_out = t_out + call.dot(_VALUES, weights, call.box(t_values, coords))
        if call.extra:
            k, v, t_k, t_v = (call.extra_chunk(x, coords) for x in extra)
            weights = jnp.exp(call.dot(_EXTRA_SCORES, q, k) - lse)
            t_weights = weights * (call.dot(_EXTRA_SCORES, t_q, k) + call.dot(_EXTRA_SCORES, q, t_k))
            t_lse = t_lse + jnp.sum(t_weights, -1, keepdims=True)
            t_out = t_out + call.dot(_EXTRA_VALUES, t_weights, v) + call.dot(_EXTRA_VALUES, weights, t_v)
        t_out = t_out - t_lse * out.astype(acc)
        return carry, (t_out.astype(query.dtype), t_lse)

    row_lse = jnp.where(lse == -jnp.inf, 0, lse)[..., None]
    xs = (
        tiles.split_queries(query),
        tiles.split_queries(tangents.query),
        tiles.split_queries(out),
        tiles.split_queries(row_lse, math.inf),
    )
    t_out, t_lse = loop(tiles, step, None, xs)[1]
    return tiles.join_queries(t_out, call.lead), tiles.join_queries(t_lse, call.lead)[..., 0]
