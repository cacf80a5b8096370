"""Unfused neighborhood attention: the attention weights as an array of their own, ``[*B, *Sq, H, prod(window)]``.

Everything here comes from one trilinear form. With ``P`` weights, ``X`` per query, ``Y`` per key, and ``key(q, w)`` the key in
slot ``w`` of query ``q``'s window (row-major from ``start`` on each axis),

    T(P, X, Y) = scale * sum over (q, w) of P[q, w] * <X[q], Y[key(q, w)]>,

and its derivatives with respect to each argument are the three products of "Faster Neighborhood Attention" (arXiv 2403.04690):

- ``na_pointwise``     dT/dP: pointwise-neighborhood:     scores of qk; gradient of av by its weights;
- ``na_neighborhood``  dT/dX: neighborhood-neighborhood:  output of av; gradient of qk by its query;
- ``na_inverse``       dT/dY: inverse-neighborhood:       gradient of qk by its key; gradient of av by its value.

Each is bilinear, and the transposes of each are the other two: so the set is closed under differentiation of every order, and
three kernels serve all of it. Slots outside a causal mask are zero in ``P`` where it is a result and ignored where it is an
operand. Every primitive takes ``(a, b, halo)``, the halo as in ``_primitives.py``.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_na import _cuda, _cuda_products, _sharding, _unfused_definition, _unfused_xla
from jax_na._jax_internals import apply_primitive, auto_insert_reshard, prim_requires_devices_during_lowering
from jax_na._spec import Inputs, Spec, accumulation_dtype

Array = Any


# --- implementations -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Products:
    """One implementation of the three products.

    Attributes:
      name: what users pass as ``implementation``.
      platforms: the platforms it lowers for; ``None`` means every one.
      why_not: from the spec, the dtype, the heads and the head dimension, the reason it cannot serve, or ``None``.
      pointwise: ``(spec, query, key, halo) -> scores``.
      neighborhood: ``(spec, weights, value, halo) -> out``.
      inverse: ``(spec, weights, array, halo, kv_shape) -> per-key array``, with ``kv_shape = (*key axes, kv heads)``.
    """

    name: str
    platforms: tuple[str, ...] | None
    why_not: Callable[[Spec, Any, int], str | None]
    pointwise: Callable[..., Array]
    neighborhood: Callable[..., Array]
    inverse: Callable[..., Array]

    def why_not_on(self, platform: str | None, spec: Spec, dtype: Any, dim: int) -> str | None:
        """Why it cannot serve on ``platform``; with ``None``, why it cannot serve anywhere."""
        if platform is not None and self.platforms is not None and platform not in self.platforms:
            return f"it runs on {', '.join(self.platforms)}, and the call is lowered for {platform}"
        return self.why_not(spec, dtype, dim)


# In order of preference; "reference" is never chosen by itself.
PRODUCTS: dict[str, Products] = {}


def register(products: Products) -> None:
    PRODUCTS[products.name] = products


def _serves(spec: Spec, dtype: Any, dim: int) -> str | None:
    return None


for _family in ("gemm", "naive"):
    _bound: list[Any] = [
        functools.partial(f, _family)
        for f in (_cuda_products.why_not, _cuda_products.pointwise, _cuda_products.neighborhood, _cuda_products.inverse)
    ]
    register(Products(f"cuda_{_family}", ("cuda",), *_bound))
register(Products("xla", None, _serves, _unfused_xla.pointwise, _unfused_xla.neighborhood, _unfused_xla.inverse))
register(
    Products(
        "reference",
        None,
        _serves,
        _unfused_definition.pointwise,
        _unfused_definition.neighborhood,
        _unfused_definition.inverse,
    )
)


def choose(platform: str | None, spec: Spec, dtype: Any, dim: int) -> Products:
    """The implementation that serves this product on ``platform`` (``None``: checked without a platform, at trace time)."""
    name = spec.implementation
    if name is not None:
        if name not in PRODUCTS:
            raise NotImplementedError(
                f"implementation={name!r} has no na_qk and na_av: for these and for return_weights expected None or one of "
                f"{', '.join(PRODUCTS)}"
            )
        reason = PRODUCTS[name].why_not_on(platform, spec, dtype, dim)
        if reason is None and platform == "cuda" and PRODUCTS[name].platforms is not None:
            reason = _cuda.missing_here()  # without a GPU here this is lowered for another machine, which may have the lane
        if reason is not None:
            raise NotImplementedError(f"implementation={name!r} cannot serve this call: {reason}")
        return PRODUCTS[name]
    for products in PRODUCTS.values():
        lane_missing = platform == "cuda" and products.platforms is not None and _cuda.lane().missing is not None
        if not lane_missing and products.why_not_on(platform, spec, dtype, dim) is None:
            return products
    raise AssertionError("the XLA implementation serves every call")


def choose_both(spec: Spec, inputs: Inputs) -> None:
    """Raise if the named implementation cannot serve qk or av of this call."""
    for array in (inputs.query, inputs.value):
        choose(None, spec, array.dtype, array.shape[-1])


# --- memory of the weights -------------------------------------------------------------------------------------------

MAX_WEIGHTS_BYTES = int(os.environ.get("JAX_NA_MAX_WEIGHTS_BYTES", 8 << 30))
"""Largest attention weights array, in bytes, that a call may ask for without ``max_weights_bytes``. Set it here or by the
environment variable ``JAX_NA_MAX_WEIGHTS_BYTES`` before import."""


# Implementations of neighborhood_attention (names in _backends.IMPLEMENTATIONS) that keep the weights in memory.
STORES_WEIGHTS = {"cuda_gemm": "cuda_gemm", "xla_unfused": "xla"}  # name there: name in PRODUCTS


def check_memory(spec: Spec, query: Array, limit: int | None) -> None:
    """Raise if the weights of ``query [.., H, D]`` would exceed ``limit`` bytes (default ``MAX_WEIGHTS_BYTES``).

    A symbolic batch counts as one: its size is known when the exported program runs, not here.
    """
    limit = MAX_WEIGHTS_BYTES if limit is None else limit
    rows, dtype = math.prod(n for n in query.shape[:-1] if isinstance(n, int)), query.dtype
    needed = rows * spec.volume * jnp.dtype(dtype).itemsize
    if needed > limit:
        raise ValueError(
            f"attention weights of {rows} rows (batch x tokens x heads) with window volume {spec.volume} in {jnp.dtype(dtype)} "
            f"take {needed} bytes, more than max_weights_bytes={limit}: raise the limit (max_weights_bytes=..., or "
            "JAX_NA_MAX_WEIGHTS_BYTES), or use a fused implementation, which never stores them"
        )


# --- primitives ------------------------------------------------------------------------------------------------------


def pointwise(spec: Spec, query: Array, key: Array, halo: Array) -> Array:
    """``[*B, *Sq, H, D], [*B, *Sk, Hkv, D] -> [*B, *Sq, H, W]``; zero outside a causal mask."""
    return _bind(na_pointwise_p, query, key, halo, spec=spec)


def neighborhood(spec: Spec, weights: Array, value: Array, halo: Array) -> Array:
    """``[*B, *Sq, H, W], [*B, *Sk, Hkv, D] -> [*B, *Sq, H, D]``."""
    return _bind(na_neighborhood_p, weights, value, halo, spec=spec)


def inverse(spec: Spec, weights: Array, array: Array, halo: Array, kv_shape: tuple[int, ...]) -> Array:
    """``[*B, *Sq, H, W], [*B, *Sq, H, D] -> [*B, *kv_shape, D]`` with ``kv_shape = (*Sk, Hkv)``."""
    result = jax.ShapeDtypeStruct((*spec.lead(array), *kv_shape, array.shape[-1]), array.dtype)
    return _bind(na_inverse_p, weights, array, halo, (result,), spec=spec, kv_shape=kv_shape)


def _bind(primitive: Primitive, a: Array, b: Array, halo: Array, results: tuple[Any, ...] = (), **params: Any) -> Array:
    a, b = _sharding.reshard_explicit(_layout(primitive, params["spec"], a), (a, b), results)
    # Inside shard_map both operands must vary over the same mesh axes; the halo has no type rule, no derivative.
    return primitive.bind(*auto_insert_reshard(a, b), jnp.asarray(halo, jnp.int32), **params)[0]


def _layout(primitive: Primitive, spec: Spec, per_query: Any) -> _sharding.Layout:
    return _sharding.product_layout(primitive.name.removeprefix("na_"), spec, per_query)


def _update(aval: Any, shape: Sequence[int]) -> list[Any]:
    return [aval.update(shape=tuple(shape), dtype=aval.dtype, weak_type=False)]


def _pointwise_abstract(query: Any, key: Any, halo: Any, *, spec: Spec) -> list[Any]:
    return _update(query, (*query.shape[:-1], spec.volume))


def _neighborhood_abstract(weights: Any, value: Any, halo: Any, *, spec: Spec) -> list[Any]:
    return _update(weights, (*weights.shape[:-1], value.shape[-1]))


def _inverse_abstract(weights: Any, array: Any, halo: Any, *, spec: Spec, kv_shape: tuple[int, ...]) -> list[Any]:
    shape = (*spec.lead(array), *kv_shape, array.shape[-1])
    names, sharding = tuple(array.sharding.spec), array.sharding
    if any(entry is not None for entry in names):
        axes = _sharding.as_axes(names[-2])
        replicated = kv_shape[-1] % math.prod(sharding.mesh.shape[axis] for axis in axes) != 0
        spread = (*names[: -2 - spec.rank], *(None,) * spec.rank, None if replicated else names[-2], None)
        sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spread))
    return [array.update(shape=shape, dtype=array.dtype, weak_type=False, sharding=sharding)]


def _pointwise_body(query: Array, key: Array, halo: Array, *, platform: str | None, spec: Spec) -> list[Array]:
    return [choose(platform, spec, query.dtype, query.shape[-1]).pointwise(spec, query, key, halo)]


def _neighborhood_body(weights: Array, value: Array, halo: Array, *, platform: str | None, spec: Spec) -> list[Array]:
    return [choose(platform, spec, value.dtype, value.shape[-1]).neighborhood(spec, weights, value, halo)]


def _inverse_body(
    weights: Array, array: Array, halo: Array, *, platform: str | None, spec: Spec, kv_shape: tuple[int, ...], group: int
) -> list[Array]:
    """``group``: query heads per key/value head. A device has its share of the heads, and at least one key/value head."""
    kv_shape = (*kv_shape[:-1], max(1, array.shape[-2] // group))
    return [choose(platform, spec, array.dtype, array.shape[-1]).inverse(spec, weights, array, halo, kv_shape)]


def _jvp(primitive: Primitive, primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
    """A bilinear function's tangent: f(da, b) + f(a, db)."""
    (a, b, halo), (da, db, _) = primals, tangents
    terms = []
    if not isinstance(da, ad.Zero):
        terms += primitive.bind(da, b, halo, **params)
    if not isinstance(db, ad.Zero):
        terms += primitive.bind(a, db, halo, **params)
    out = primitive.bind(a, b, halo, **params)
    return out, [functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(out[0])]


# Transposes. Each product is linear in either operand; the one that is undefined gets the cotangent.


def _kv_shape(spec: Spec, array: Any) -> tuple[int, ...]:
    return tuple(array.shape[-2 - spec.rank : -1])


def _pointwise_transpose(cotangents: Sequence[Any], query: Any, key: Any, halo: Array, *, spec: Spec) -> list[Any]:
    if isinstance(cotangents[0], ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(query):
        return [neighborhood(spec, cotangents[0], key, halo), None, None]
    return [None, inverse(spec, cotangents[0], query, halo, _kv_shape(spec, key.aval)), None]


def _neighborhood_transpose(cotangents: Sequence[Any], weights: Any, value: Any, halo: Array, *, spec: Spec) -> list[Any]:
    if isinstance(cotangents[0], ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(weights):
        return [pointwise(spec, cotangents[0], value, halo), None, None]
    return [None, inverse(spec, weights, cotangents[0], halo, _kv_shape(spec, value.aval)), None]


def _inverse_transpose(
    cotangents: Sequence[Any], weights: Any, array: Any, halo: Array, *, spec: Spec, kv_shape: tuple[int, ...]
) -> list[Any]:
    if isinstance(cotangents[0], ad.Zero):
        return [None, None, None]
    if ad.is_undefined_primal(weights):
        return [pointwise(spec, array, cotangents[0], halo), None, None]
    return [None, neighborhood(spec, weights, cotangents[0], halo), None]


def _batch(primitive: Primitive, args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> Any:
    """The mapped axis becomes one more leading dimension; an operand that is not mapped is broadcast along it."""
    if dims[-1] is not None:
        raise NotImplementedError("neighborhood attention: the halo operand (shard offsets) cannot be vmapped")
    return primitive.bind(*_sharding.move_mapped(args[:-1], dims[:-1]), args[-1], **params), [0]


def _lower(primitive: Primitive, body: Callable[..., Any], platform: str, ctx: Any, *operands: Any, **params: Any) -> Any:
    """The body, for one platform."""
    per_query = ctx.avals_in[0]
    if "kv_shape" in params:
        body = functools.partial(body, group=per_query.shape[-2] // params["kv_shape"][-1])
    body = functools.partial(body, platform=platform, **params)
    return _sharding.lower(ctx, operands, body, _layout(primitive, params["spec"], per_query))


def _make(name: str, abstract: Callable[..., Any], body: Callable[..., Any], transpose: Callable[..., Any]) -> Primitive:
    primitive = Primitive(name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(primitive, functools.partial(_lower, primitive, body, platform), platform=platform)
    prim_requires_devices_during_lowering.add(primitive)
    ad.primitive_jvps[primitive] = functools.partial(_jvp, primitive)
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


na_pointwise_p = _make("na_pointwise", _pointwise_abstract, _pointwise_body, _pointwise_transpose)
na_neighborhood_p = _make("na_neighborhood", _neighborhood_abstract, _neighborhood_body, _neighborhood_transpose)
na_inverse_p = _make("na_inverse", _inverse_abstract, _inverse_body, _inverse_transpose)


# --- what is not finite ----------------------------------------------------------------------------------------------
# A tile holds tokens that some of its queries do not see; their weight is zero, but zero times NaN is NaN. So in the composed
# attention the products with weights run over cleaned operands, and a token that is not finite reaches just those that see it,
# through the scores, as NaN.


def _clean(array: Array) -> Array:
    return jnp.where(jnp.isfinite(array), array, 0)


def _poison(array: Array) -> Array:
    """NaN where a row of ``array`` (its last axis) holds anything that is not finite, else zero."""
    return jnp.where(jnp.isfinite(array).all(-1, keepdims=True), jnp.zeros((), array.dtype), jnp.nan)


# --- the composed attention ------------------------------------------------------------------------------------------


def _per_slot_bias(spec: Spec, bias: Array, query_spatial: tuple[int, ...], halo: Array) -> Array:
    """``bias [*Bb, H, 2k-1, ...]`` for every query and slot, ``[*Bb, *Sq, H, W]``.

    A query's row depends only on where its window starts relative to it, one of ``window`` values per axis: so the bias is
    first cut into ``[.., window, .., W]`` rows, and a one-hot product picks a row per query. Its transpose, a product too, sums
    the gradient over all queries alike without a scatter.
    """
    rank, window, volume = spec.rank, spec.window, spec.volume
    table = bias
    first = bias.ndim - rank
    for axis in range(rank):  # entry o + c of the axis, for relative start o and slot coordinate c
        index = jnp.arange(window[axis])[:, None] + jnp.arange(window[axis])
        table = jnp.take(table, index, axis=first + 2 * axis)
    # [*Bb, H, o_0, c_0, o_1, c_1, ..] to [*Bb, o_0, o_1, .., H, W]
    starts, slots = range(first, table.ndim, 2), range(first + 1, table.ndim, 2)
    table = jnp.transpose(table, (*range(first - 1), *starts, first - 1, *slots))
    table = table.reshape(*table.shape[: table.ndim - rank], volume)
    for axis, length in enumerate(query_spatial):
        start = _unfused_definition.axis_window(spec, axis, length, halo)[0]
        coordinate = (halo[axis][0] + jnp.arange(length)) // spec.dilation[axis]
        relative = start - coordinate + window[axis] - 1
        pick = (relative[:, None] == jnp.arange(window[axis])).astype(table.dtype)
        table = jnp.moveaxis(table, first - 1 + axis, -1)
        table = jnp.einsum("...o,io->...i", table, pick, precision=jax.lax.Precision.HIGHEST)
        table = jnp.moveaxis(table, -1, first - 1 + axis)
    return table


def scores(spec: Spec, query: Array, key: Array, bias: Array | None, halo: Array) -> Array:
    """Scaled and biased scores ``[*B, *Sq, H, W]``, -inf outside a causal mask; float32 where there is a bias."""
    return _biased(spec, pointwise(spec, query, key, halo), query, bias, halo)


def _biased(spec: Spec, result: Array, query: Array, bias: Array | None, halo: Array) -> Array:
    spatial = spec.spatial(query)
    if bias is not None:
        acc = accumulation_dtype(query.dtype)
        per_slot = _per_slot_bias(spec, bias.astype(acc), spatial, halo)
        bias_lead = per_slot.shape[: -2 - spec.rank]
        missing = (1,) * (query.ndim - per_slot.ndim)
        result = result.astype(acc) + per_slot.reshape(*bias_lead, *missing, *per_slot.shape[len(bias_lead) :])
    if any(spec.is_causal):
        inside = _unfused_definition.inside(spec, spatial, halo)[..., None, :]
        result = jnp.where(inside, result, -jnp.inf)
    return result


def attention(spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array, Array]:
    """``(out [*B, *Sq, H, Dv], lse [*B, *Sq, H], weights [*B, *Sq, H, W])``: qk, softmax in float32, av; differentiable.

    Additional keys take part in the softmax; their own weights are not among the ones returned.
    """
    query, key, value, bias, extra_key, extra_value = inputs
    acc = accumulation_dtype(query.dtype)
    window_scores = scores(spec, query, key + _poison(value), bias, halo).astype(acc)
    row_max = jnp.max(window_scores, -1, keepdims=True)
    dot = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=acc)
    if extra_key is not None:
        rows = (*query.shape[:-1], extra_key.shape[-3])
        extra_scores = dot("...qgrd,...mgd->...qgrm", _split_heads(spec, query, key.shape[-2]), extra_key)
        extra_scores = extra_scores.reshape(rows) * jnp.asarray(spec.scale, acc)
        row_max = jnp.maximum(row_max, jnp.max(extra_scores, -1, keepdims=True, initial=-jnp.inf))
    row_max = jax.lax.stop_gradient(row_max)
    exponentials = jnp.exp(window_scores - row_max)
    row_sum = jnp.sum(exponentials, -1, keepdims=True)
    if extra_key is not None:
        extra_exponentials = jnp.exp(extra_scores - row_max)
        row_sum = row_sum + jnp.sum(extra_exponentials, -1, keepdims=True)
    lse = (jnp.log(row_sum) + row_max)[..., 0]
    weights = (exponentials / row_sum).astype(query.dtype)
    out = neighborhood(dataclasses.replace(spec, scale=1.0), weights, _clean(value), halo)
    if extra_key is not None:
        extra_weights = _split_heads(spec, extra_exponentials / row_sum, key.shape[-2]).astype(query.dtype)
        extra_out = dot("...qgrm,...mgd->...qgrd", extra_weights, extra_value)
        out = (out.astype(acc) + extra_out.reshape(out.shape)).astype(query.dtype)
    return out, lse, weights


def _split_heads(spec: Spec, array: Array, kv_heads: int) -> Array:
    """``[*B, *Sq, H, X]`` to ``[*B, Nq, Hkv, H / Hkv, X]``."""
    tokens = math.prod(spec.spatial(array))
    return array.reshape(*spec.lead(array), tokens, kv_heads, array.shape[-2] // kv_heads, array.shape[-1])


# --- as an implementation of neighborhood_attention ------------------------------------------------------------------


def why_not(name: str, spec: Spec, inputs: Inputs) -> str | None:
    """``_backends.Implementation.why_not`` of the products ``name``."""
    reasons = (PRODUCTS[name].why_not(spec, array.dtype, array.shape[-1]) for array in (inputs.query, inputs.value))
    return next((reason for reason in reasons if reason is not None), None)


def forward(name: str, spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``_backends.Implementation.forward`` through the products ``name``."""
    return attention(dataclasses.replace(spec, implementation=name), inputs, halo)[:2]


def backward(
    name: str, spec: Spec, inputs: Inputs, out: Array, lse: Array, grad_out: Array, grad_lse: Array | None, halo: Array
) -> Inputs:
    """``_backends.Implementation.backward``: one product for the scores again, then four for the gradients."""
    del out
    spec = dataclasses.replace(spec, implementation=name)
    query, key, value, bias, extra_key, extra_value = inputs
    acc = accumulation_dtype(query.dtype)
    plain = dataclasses.replace(spec, scale=1.0)
    products = pointwise(spec, query, key + _poison(value), halo)
    window_scores, bias_vjp = jax.vjp(lambda bias: _biased(spec, products, query, bias, halo), bias)
    weights = jnp.exp(window_scores.astype(acc) - (lse[..., None] + _poison(grad_out)))
    grad_weights = pointwise(plain, grad_out, value, halo).astype(acc)
    # From the very products that it is subtracted from, not from out * grad_out: their rounding errors cancel.
    delta = jnp.sum(weights * grad_weights, -1, keepdims=True)
    dot = functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=acc)
    split = functools.partial(_split_heads, spec, kv_heads=key.shape[-2])
    if extra_key is not None:
        extra_scores = dot("...qgrd,...mgd->...qgrm", split(query), extra_key) * jnp.asarray(spec.scale, acc)
        extra_weights = jnp.exp(extra_scores - split(lse[..., None]))
        extra_grad = dot("...qgrd,...mgd->...qgrm", split(grad_out), extra_value)
        delta = delta + jnp.sum(extra_weights * extra_grad, -1).reshape(delta.shape)
    if grad_lse is not None:
        delta = delta - grad_lse[..., None]
    grad_scores = weights * (grad_weights - delta)
    grad_bias = bias_vjp(grad_scores.astype(window_scores.dtype))[0]
    grad_scores = grad_scores.astype(query.dtype)
    grad_query = neighborhood(spec, grad_scores, _clean(key), halo)
    grad_key = inverse(spec, grad_scores, _clean(query), halo, _kv_shape(spec, key))
    grad_value = inverse(plain, weights.astype(value.dtype), _clean(grad_out), halo, _kv_shape(spec, value))
    if extra_key is None:
        return Inputs(grad_query, grad_key, grad_value, grad_bias, None, None)

    extra_grad = (extra_weights * (extra_grad - split(delta)) * spec.scale).astype(query.dtype)
    from_extra = dot("...qgrm,...mgd->...qgrd", extra_grad, extra_key).reshape(query.shape)
    grad_query = (grad_query.astype(acc) + from_extra).astype(query.dtype)
    grad_extra_key = dot("...qgrm,...qgrd->...mgd", extra_grad, split(query)).astype(query.dtype)
    grad_extra_value = dot("...qgrm,...qgrd->...mgd", extra_weights.astype(query.dtype), split(grad_out))
    return Inputs(grad_query, grad_key, grad_value, grad_bias, grad_extra_key, grad_extra_value.astype(query.dtype))
