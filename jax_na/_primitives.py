"""The JAX primitives: abstract evaluation, lowering, differentiation and batching rules.

Three primitives, each over the flattened :class:`Inputs`, so that every transformation works as for a built-in operation:

- ``na_forward``: ``(*inputs, halo) -> (out, lse)``;
- ``na_tangent``: ``(*tangents, *inputs, out, lse, halo) -> (tangent_out, tangent_lse)``, linear in the tangents; it is the
  forward-mode rule of ``na_forward``, and its transpose is
- ``na_backward``: ``(*inputs, out, lse, grad_out[, grad_lse], halo) -> gradients of inputs``.

Second derivatives differentiate the XLA implementation of ``na_tangent`` and ``na_backward``. Where XLA's partitioner has several
devices to split over, the primitives lower to ``custom_partitioning`` of their body: see ``_sharding.py``.
The ``halo`` operand, int32 ``[rank, 3]``, holds (query offset, key offset, global length) per axis: see ``cuda/common/problem.h``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_na import _backends, _sharding, _xla
from jax_na._jax_internals import (
    apply_primitive,
    auto_insert_reshard,
    prim_requires_devices_during_lowering,
)
from jax_na._spec import Inputs, Spec, accumulation_dtype

Array = Any

# Names of the residuals, for jax.checkpoint policies: see save_attention_residuals.
RESIDUAL_NAMES = ("jax_na_out", "jax_na_lse")
save_attention_residuals = jax.checkpoint_policies.save_only_these_names(*RESIDUAL_NAMES)


def _pack(flat: Sequence[Array], has_bias: bool, has_extra: bool) -> Inputs:
    """Inverse of :func:`_flatten`."""
    query, key, value, *rest = flat
    bias = rest.pop(0) if has_bias else None
    return Inputs(query, key, value, bias, *(rest if has_extra else (None, None)))


def _flatten(inputs: Inputs) -> tuple[list[Array], dict[str, bool]]:
    flat = [array for array in inputs if array is not None]
    return flat, {"has_bias": inputs.bias is not None, "has_extra": inputs.extra_key is not None}


def _num_inputs(has_bias: bool, has_extra: bool) -> int:
    return 3 + has_bias + 2 * has_extra


def forward(spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``(out [*B, *Sq, H, Dv], lse [*B, *Sq, H])``; differentiable."""
    flat, flags = _flatten(inputs)
    flat = _sharding.reshard_explicit(_sharding.layout("forward", spec, inputs), flat)
    # Inside shard_map every operand must vary over the same mesh axes. (Not so the halo: it has no type rule, no derivative.)
    out, lse = na_forward_p.bind(*auto_insert_reshard(*flat), jnp.asarray(halo, jnp.int32), spec=spec, **flags)
    return out, lse


# --- abstract evaluation ---------------------------------------------------------------------------------------------


def _update(aval: Any, shape: Sequence[int], dtype: Any) -> Any:
    """``aval`` with another shape; what its type says of sharding holds for the dimensions that stay."""
    spec = jax.sharding.PartitionSpec(*tuple(aval.sharding.spec)[: len(shape)])
    return aval.update(
        shape=tuple(shape), dtype=jnp.dtype(dtype), weak_type=False, sharding=aval.sharding.update(spec=spec)
    )


def _outputs(spec: Spec, inputs: Inputs) -> list[Any]:
    query, value = inputs.query, inputs.value
    return [
        _update(query, (*query.shape[:-1], value.shape[-1]), query.dtype),
        _update(query, query.shape[:-1], accumulation_dtype(query.dtype)),
    ]


def _forward_abstract(*args: Any, spec: Spec, has_bias: bool, has_extra: bool) -> list[Any]:
    return _outputs(spec, _pack(args[:-1], has_bias, has_extra))


def _tangent_abstract(*args: Any, spec: Spec, has_bias: bool, has_extra: bool) -> list[Any]:
    n = _num_inputs(has_bias, has_extra)
    return _outputs(spec, _pack(args[n : 2 * n], has_bias, has_extra))


def _backward_abstract(*args: Any, spec: Spec, has_bias: bool, has_extra: bool, has_grad_lse: bool) -> list[Any]:
    return [_update(a, a.shape, a.dtype) for a in args[: _num_inputs(has_bias, has_extra)]]


# --- the functions behind the primitives -----------------------------------------------------------------------------


def _forward_body(*args: Any, platform: str | None, spec: Spec, has_bias: bool, has_extra: bool) -> tuple[Array, ...]:
    *flat, halo = args
    inputs = _pack(flat, has_bias, has_extra)
    return tuple(_backends.choose(platform, spec, inputs).forward(spec, inputs, halo))


def _backward_body(
    *args: Any, platform: str | None, spec: Spec, has_bias: bool, has_extra: bool, has_grad_lse: bool
) -> tuple[Array, ...]:
    n = _num_inputs(has_bias, has_extra)
    inputs = _pack(args[:n], has_bias, has_extra)
    out, lse, grad_out, *grad_lse, halo = args[n:]
    choice = _backends.choose(platform, spec, inputs)
    grads = choice.backward(spec, inputs, out, lse, grad_out, grad_lse[0] if has_grad_lse else None, halo)
    return tuple(_flatten(grads)[0])


def _tangent_body(*args: Any, platform: str | None, spec: Spec, has_bias: bool, has_extra: bool) -> tuple[Array, ...]:
    del platform  # forward mode is served by the XLA implementation everywhere
    n = _num_inputs(has_bias, has_extra)
    tangents, inputs = _pack(args[:n], has_bias, has_extra), _pack(args[n : 2 * n], has_bias, has_extra)
    return tuple(_xla.tangent(spec, tangents, inputs, *args[2 * n :]))


def _xla_backward_body(*args: Any, **params: Any) -> tuple[Array, ...]:
    n = _num_inputs(params["has_bias"], params["has_extra"])
    inputs = _pack(args[:n], params["has_bias"], params["has_extra"])
    out, lse, grad_out, *grad_lse, halo = args[n:]
    grads = _xla.backward(params["spec"], inputs, out, lse, grad_out, grad_lse[0] if params["has_grad_lse"] else None, halo)
    return tuple(_flatten(grads)[0])


def _lower(kind: str, body: Callable[..., Any], platform: str, ctx: Any, *operands: Any, **params: Any) -> Any:
    """The body, for one platform."""
    n = _num_inputs(params["has_bias"], params["has_extra"])
    first = n if kind == "tangent" else 0
    inputs = _pack(ctx.avals_in[first : first + n], params["has_bias"], params["has_extra"])
    where = _sharding.layout(kind, params["spec"], inputs, params.get("has_grad_lse", False))
    return _sharding.lower(ctx, operands, functools.partial(body, platform=platform, **params), where)


def _make(kind: str, abstract: Callable[..., Any], body: Callable[..., Any]) -> Primitive:
    primitive = Primitive(f"na_{kind}")
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(apply_primitive, primitive))
    for platform in ("cpu", "cuda", "rocm", "tpu"):
        mlir.register_lowering(primitive, functools.partial(_lower, kind, body, platform), platform=platform)
    prim_requires_devices_during_lowering.add(primitive)
    batching.primitive_batchers[primitive] = functools.partial(_batch, primitive)
    return primitive


# --- batching --------------------------------------------------------------------------------------------------------


def _batch(primitive: Primitive, args: Sequence[Array], dims: Sequence[int | None], **params: Any) -> Any:
    """Mapped axes move to the front and become one more leading dimension; unmapped operands are broadcast along it.

    ``bias`` gets leading dimensions only when it is mapped. The halo is never mapped: it comes from mesh positions.
    """
    if dims[-1] is not None:
        raise NotImplementedError("neighborhood attention: the halo operand (shard offsets) cannot be vmapped")
    spec: Spec = params["spec"]
    bias_ndim = 1 + spec.rank
    n = _num_inputs(params["has_bias"], params["has_extra"])
    is_bias = [False] * len(args)
    if params["has_bias"]:
        # na_tangent has the tangents before the inputs; na_backward and na_forward have the inputs first.
        is_bias[3] = True
        if primitive is na_tangent_p:
            is_bias[n + 3] = True
    bias_mapped = any(b and (d is not None or a.ndim > bias_ndim) for a, d, b in zip(args, dims, is_bias, strict=True))
    needs_bias_batch = params["has_bias"] and (bias_mapped or primitive is na_backward_p)
    keep = [bias and not needs_bias_batch for bias in is_bias]
    moved = _sharding.move_mapped(args[:-1], dims[:-1], keep[:-1])
    outs = primitive.bind(*moved, args[-1], **params)
    return outs, [0] * len(outs)


# --- differentiation -------------------------------------------------------------------------------------------------


def _forward_jvp(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[list[Array], list[Array]]:
    out, lse = na_forward_p.bind(*primals, **params)
    out, lse = checkpoint_name(out, RESIDUAL_NAMES[0]), checkpoint_name(lse, RESIDUAL_NAMES[1])
    given = [ad.instantiate_zeros(t) for t in tangents[:-1]]
    return [out, lse], na_tangent_p.bind(*given, *primals[:-1], out, lse, primals[-1], **params)


def _tangent_transpose(cotangents: Sequence[Any], *args: Any, **params: Any) -> list[Any]:
    n = _num_inputs(params["has_bias"], params["has_extra"])
    grad_out, grad_lse = cotangents
    *residuals, out, lse, halo = args[n:]
    has_grad_lse = not isinstance(grad_lse, ad.Zero)
    grads = na_backward_p.bind(
        *residuals,
        out,
        lse,
        ad.instantiate_zeros(grad_out),
        *([grad_lse] if has_grad_lse else []),
        halo,
        has_grad_lse=has_grad_lse,
        **params,
    )
    wanted = [grad if ad.is_undefined_primal(arg) else None for grad, arg in zip(grads, args[:n], strict=True)]
    return wanted + [None] * (len(args) - n)


def _jvp_through_xla(primitive: Primitive, body: Callable[..., Any]) -> Callable[..., Any]:
    """Differentiate the XLA implementation ``body``, keep the primitive for the values."""

    def rule(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
        halo = primals[-1]
        given = [ad.instantiate_zeros(t) for t in tangents[:-1]]
        values = primitive.bind(*primals, **params)
        with jax.numpy_rank_promotion("allow"):
            result = jax.jvp(lambda *args: body(*args, halo, **params), tuple(primals[:-1]), tuple(given))[1]
        return values, list(result)

    return rule


na_forward_p = _make("forward", _forward_abstract, _forward_body)
na_tangent_p = _make("tangent", _tangent_abstract, _tangent_body)
na_backward_p = _make("backward", _backward_abstract, _backward_body)

ad.primitive_jvps[na_forward_p] = _forward_jvp
ad.primitive_transposes[na_tangent_p] = _tangent_transpose
ad.primitive_jvps[na_tangent_p] = _jvp_through_xla(na_tangent_p, functools.partial(_tangent_body, platform=None))
ad.primitive_jvps[na_backward_p] = _jvp_through_xla(na_backward_p, _xla_backward_body)
