"""The XLA implementation: runs on every platform JAX has. Blocked over query tiles, softmax in float32.

Each step of a loop takes a few tiles of queries, each with the box of keys that holds its windows (``_tiles.py``), through two
dense products; the backward pass recomputes the probabilities from lse. Nothing of size ``tokens x tokens`` or
``tokens x window`` exists. Plain ``jax.numpy`` and ``jax.lax``, so it is differentiable again: second derivatives go
through :func:`backward` and :func:`tangent`.

A box holds keys that some of its queries do not see. Their probability is zero, but zero times NaN is NaN; so products with
probabilities run over operands whose non-finite entries are replaced by zero (:func:`_clean`), and a non-finite token
reaches exactly those that see it through the scores instead, as NaN (:func:`_poison`).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jax_na._spec import Inputs, Spec, accumulation_dtype
from jax_na._tiles import Tiles, each_tile, int32, loop, make_tiles

Array = Any
State = dict[str, Array]


def _clean(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), x, 0)


def _poison(x: Array) -> Array:
    """NaN where a row of ``x`` (its last axis) holds anything that is not finite, else zero."""
    # PERF: times zero as a product of matrices; XLA's own reduction takes many times as long on a CPU.
    zeros = jnp.zeros((x.shape[-1], 1), x.dtype)
    return jnp.matmul(lax.stop_gradient(x), zeros, precision=lax.Precision.HIGHEST)


class _Call:
    """What forward, backward and tangent share: the geometry, the operands split for the steps, products and parts of them."""

    def __init__(self, spec: Spec, inputs: Inputs, halo: Array) -> None:
        self.spec = spec
        self.acc = accumulation_dtype(inputs.query.dtype)
        self.tiles: Tiles = make_tiles(spec, inputs, halo)
        self.lead = spec.lead(inputs.query)
        self.has_extra = inputs.extra_key is not None and inputs.extra_key.shape[-3] > 0
        self.operands = [x for x in inputs if x is not None] + ([halo] if spec.sharded else [])
        self.bias: Any = None if inputs.bias is None else self.tiles.split_bias(inputs.bias.astype(self.acc))
        self.extra_key, self.extra_value = self.extra(inputs)  # both None where there are no additional keys

    def extra(self, inputs: Inputs) -> list[Any]:
        """Additional tokens ``[*B, M, Hkv, C]`` as ``[B, Hkv, M, C]``."""
        extras: tuple[Any, Any] = (inputs.extra_key, inputs.extra_value)
        return [x.reshape(-1, *x.shape[-3:]).swapaxes(1, 2) if self.has_extra else None for x in extras]

    def product(self, a: Array, b: Array, contract: tuple[int, int] = (-1, -2)) -> Array:
        """Matrix products ``[n, ., .]`` over one of the last two axes of each operand."""
        # PERF: with one batch axis and two others XLA passes them as they are to its CPU library; else it transposes first.
        dimensions = (((3 + contract[0],), (3 + contract[1],)), ((0,), (0,)))
        return lax.dot_general(a, b, dimensions, precision=self.spec.precision, preferred_element_type=self.acc)

    def fold(self, x: Array) -> Array:
        """``[n, *rows, C]`` as ``[n, members * queries, C]``."""
        return x.reshape(len(x), -1, x.shape[-1])

    def unfold(self, x: Array) -> Array:
        """Undoes :meth:`fold`."""
        return x.reshape(len(x), *self.tiles.plan.rows, x.shape[-1])

    def fold_t(self, x: Array) -> Array:
        """``[n, k, *rows]`` as ``[n, k, members * queries]``."""
        return x.reshape(*x.shape[:2], -1)

    def unfold_t(self, x: Array) -> Array:
        """Undoes :meth:`fold_t`."""
        return x.reshape(*x.shape[:2], *self.tiles.plan.rows)

    def tile(self, x: Array, coords: Array) -> Array:
        return self.tiles.tile(x, coords).astype(self.acc)

    def box(self, x: Array, coords: Array) -> Array:
        return self.tiles.box(x, coords).astype(self.acc)

    def clean_box(self, x: Array, coords: Array) -> Array:
        return _clean(self.box(x, coords))

    def key_box(self, x: Array, poison: Array, coords: Array) -> Array:
        """A box of keys, NaN where ``poison`` has it. PERF: in the step; before the loop it would be a copy of all keys."""
        return self.box(x, coords) + self.box(poison, coords)

    def extra_chunk(self, x: Array, coords: Array) -> Array:
        """``[n, M, C]``, what the step needs of ``[B, Hkv, M, C]``."""
        chunk = self.tiles.plan.chunk

        def read(coords: Array) -> Array:
            region = lax.dynamic_slice(x, int32((coords[1], coords[2], 0, 0)), (*chunk[1:], *x.shape[2:]))
            return jnp.broadcast_to(region, (*chunk, *x.shape[2:]))

        return each_tile(read, coords).reshape(-1, *x.shape[2:]).astype(self.acc)

    def add_extra(self, x: Array, coords: Array, update: Array) -> Array:
        """Add ``[n, M, C]`` to what the step needs."""
        for c, part in zip(coords, update.reshape(len(coords), *self.tiles.plan.chunk, *x.shape[2:]).sum(1), strict=True):
            index = int32((c[1], c[2], 0, 0))
            x = lax.dynamic_update_slice(x, lax.dynamic_slice(x, index, part.shape) + part, index)
        return x

    def zeros(self, shape: tuple[int, ...], dtype: Any = None) -> Array:
        """Something to accumulate in, that varies over the same manual mesh axes as the operands."""
        dtype = self.acc if dtype is None else dtype
        return jnp.zeros(shape, dtype) + sum(jnp.zeros_like(x, dtype, shape=()) for x in self.operands)


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
    queries, keys, values, poison = tiles.queries(query), tiles.keys(key), tiles.keys(value), tiles.keys(_poison(value))

    def step(state: State, coords: Array) -> State:
        q = call.tile(queries, coords) * spec.scale
        scores = call.unfold(call.product(q, call.key_box(keys, poison, coords), (-1, -1)))
        if call.bias is not None:
            scores = scores + tiles.bias(call.bias, coords)
        # PERF: without the barrier XLA masks twice, for the maximum and again for the exponential, which then needs a new buffer:
        # one that the exponential of another tile has to leave first, so that they run one after the other.
        scores = lax.optimization_barrier(jnp.where(tiles.mask(coords), scores, -jnp.inf))
        row_max = jnp.max(scores, -1, keepdims=True)
        if call.has_extra:
            extra_scores = call.unfold(call.product(q, call.extra_chunk(call.extra_key, coords), (-1, -1)))
            row_max = jnp.maximum(row_max, jnp.max(extra_scores, -1, keepdims=True))
        row_max = lax.stop_gradient(jnp.where(jnp.isfinite(row_max), row_max, 0))
        weights = jnp.exp(scores - row_max)
        row_sum = jnp.sum(weights, -1, keepdims=True)
        out = call.product(call.fold(weights), call.clean_box(values, coords))
        if call.has_extra:
            weights = jnp.exp(extra_scores - row_max)
            row_sum = row_sum + jnp.sum(weights, -1, keepdims=True)
            out = out + call.product(call.fold(weights), call.extra_chunk(call.extra_value, coords))
        out = (call.unfold(out) / jnp.where(row_sum == 0, 1, row_sum)).astype(query.dtype)
        return {
            "out": tiles.put_tile(state["out"], coords, out),
            "lse": tiles.put_tile(state["lse"], coords, row_max + jnp.log(row_sum)),
        }

    state = {
        "out": call.zeros(tiles.queries_shape(value.shape[-1]), query.dtype),
        "lse": call.zeros(tiles.queries_shape(1)),
    }
    state = loop(tiles, step, state)
    return tiles.join_queries(state["out"], call.lead), tiles.join_queries(state["lse"], call.lead)[..., 0]


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
    call.operands += [out, lse, grad_out]
    tiles = call.tiles
    queries, keys, values = tiles.queries(query), tiles.keys(key), tiles.keys(value)
    # An infinite key is NaN to whoever sees it, also where the forward gives it a weight of zero.
    poison = tiles.keys(_poison(key) + _poison(value))

    # ds = p * (dp - delta): the gradient of lse enters as delta does. A query that sees nothing has lse = -inf.
    # PERF: XLA's sum of a product takes forty times as long as this dot on a CPU.
    delta = jnp.einsum("...d,...d->...", grad_out, out, precision=spec.precision, preferred_element_type=acc)
    row_lse = jnp.where(lse == -jnp.inf, 0, lse) + _poison(delta[..., None])[..., 0]
    if grad_lse is not None:
        delta = delta - grad_lse
        call.operands.append(grad_lse)
    grads, rows = tiles.queries(grad_out), (tiles.rows(row_lse, math.inf), tiles.rows(_clean(delta)))

    state = {
        "query": call.zeros(queries.shape, query.dtype),
        "key": call.zeros(tiles.keys_shape(key.shape[-1])),
        "value": call.zeros(tiles.keys_shape(value.shape[-1])),
    }
    if call.bias is not None:
        state["bias"] = call.zeros(call.bias.shape)
    if call.has_extra:
        state |= {"extra_key": call.zeros(call.extra_key.shape), "extra_value": call.zeros(call.extra_value.shape)}

    def step(state: State, coords: Array, rows: tuple[Array, Array]) -> State:
        state, (row_lse, row_delta) = dict(state), (x.reshape(-1, *x.shape[2:]) for x in rows)
        # PERF: behind the barrier q is read once, not again for the product that needs it clean.
        q = lax.optimization_barrier(call.tile(queries, coords) * spec.scale)
        d_out = _clean(call.tile(grads, coords))
        k = call.clean_box(keys, coords)  # PERF: one box for both of its products; the poison goes to the scores
        # PERF: of the products only one contracts its first axes if scores are laid out [keys, queries].
        scores = call.unfold_t(call.product(k, q, (-1, -1)) + call.box(poison, coords))
        if call.bias is not None:
            pairs, bias_vjp = jax.vjp(lambda bias: tiles.bias(bias, coords, transposed=True), call.bias)
            scores = scores + pairs
        weights = jnp.exp(jnp.where(tiles.mask(coords, transposed=True), scores - row_lse, -jnp.inf))
        d_weights = call.unfold_t(call.product(call.clean_box(values, coords), d_out, (-1, -1)))
        # Outside the mask d_weights is anything: it may overflow.
        d_scores = jnp.where(weights == 0, 0, weights * (d_weights - row_delta))
        d_query = call.product(call.fold_t(d_scores), k, (-2, -2))
        state["key"] = tiles.add_box(state["key"], coords, call.product(call.fold_t(d_scores), _clean(q)))
        state["value"] = tiles.add_box(state["value"], coords, call.product(call.fold_t(weights), d_out))
        if call.bias is not None:
            state["bias"] = state["bias"] + bias_vjp(d_scores)[0]
        if call.has_extra:
            lse, delta = (x.reshape(*d_query.shape[:2], 1) for x in (row_lse, row_delta))
            k, v = (call.extra_chunk(x, coords) for x in (call.extra_key, call.extra_value))
            weights = jnp.exp(call.product(q, k, (-1, -1)) - lse)
            d_scores = weights * (call.product(d_out, v, (-1, -1)) - delta)
            d_query = d_query + call.product(d_scores, k)
            d_key, d_value = call.product(d_scores, q, (-2, -2)), call.product(weights, d_out, (-2, -2))
            state["extra_key"] = call.add_extra(state["extra_key"], coords, d_key)
            state["extra_value"] = call.add_extra(state["extra_value"], coords, d_value)
        state["query"] = tiles.put_tile(state["query"], coords, (d_query * spec.scale).astype(query.dtype))
        return state

    state = loop(tiles, step, state, rows)

    def extra_grad(name: str, like: Array | None) -> Array | None:
        if like is None or not call.has_extra:
            return None if like is None else jnp.zeros_like(like)
        return state[name].swapaxes(1, 2).reshape(like.shape).astype(like.dtype)

    return Inputs(
        tiles.join_queries(state["query"], call.lead),
        tiles.join_keys(state["key"], call.lead).astype(key.dtype),
        tiles.join_keys(state["value"], call.lead).astype(value.dtype),
        None if inputs.bias is None else tiles.join_bias(state["bias"], inputs.bias.shape).astype(inputs.bias.dtype),
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
    call.operands += [*(x for x in tangents if x is not None), out, lse]
    tiles = call.tiles
    queries, keys, values, poison = tiles.queries(query), tiles.keys(key), tiles.keys(value), tiles.keys(_poison(value))
    t_queries, t_keys, t_values = tiles.queries(tangents.query), tiles.keys(tangents.key), tiles.keys(tangents.value)
    t_poison = tiles.keys(_poison(tangents.value))
    outs, lses = tiles.queries(out), tiles.queries(jnp.where(lse == -jnp.inf, 0, lse)[..., None], math.inf)
    t_bias = None if tangents.bias is None else tiles.split_bias(tangents.bias.astype(acc))
    extra = [call.extra_key, call.extra_value, *call.extra(tangents)]

    def step(state: State, coords: Array) -> State:
        q, t_q = (call.tile(x, coords) * spec.scale for x in (queries, t_queries))
        lse = call.unfold(call.tile(lses, coords))
        k, t_k = call.key_box(keys, poison, coords), call.key_box(t_keys, t_poison, coords)
        scores = call.unfold(call.product(q, k, (-1, -1)))
        t_scores = call.unfold(call.product(t_q, k, (-1, -1)) + call.product(q, t_k, (-1, -1)))
        if call.bias is not None:
            scores, t_scores = scores + tiles.bias(call.bias, coords), t_scores + tiles.bias(t_bias, coords)
        mask = tiles.mask(coords)
        weights = jnp.where(mask, jnp.exp(jnp.where(mask, scores, -jnp.inf) - lse), 0)
        t_weights = jnp.where(mask, weights * t_scores, 0)
        t_lse = jnp.sum(t_weights, -1, keepdims=True)
        v, t_v = call.clean_box(values, coords), call.clean_box(t_values, coords)
        t_out = call.product(call.fold(t_weights), v) + call.product(call.fold(weights), t_v)
        if call.has_extra:
            k, v, t_k, t_v = (call.extra_chunk(x, coords) for x in extra)
            weights = jnp.exp(call.product(q, k, (-1, -1)) - call.fold(lse))
            t_weights = weights * (call.product(t_q, k, (-1, -1)) + call.product(q, t_k, (-1, -1)))
            t_lse = t_lse + call.unfold(jnp.sum(t_weights, -1, keepdims=True))
            t_out = t_out + call.product(t_weights, v) + call.product(weights, t_v)
        t_out = (t_out - call.fold(t_lse) * call.tile(outs, coords)).astype(query.dtype)
        return {"out": tiles.put_tile(state["out"], coords, t_out), "lse": tiles.put_tile(state["lse"], coords, t_lse)}

    state = {"out": call.zeros(outs.shape, query.dtype), "lse": call.zeros(lses.shape)}
    state = loop(tiles, step, state)
    return tiles.join_queries(state["out"], call.lead), tiles.join_queries(state["lse"], call.lead)[..., 0]
