"""The unfused products on CUDA: each of the three primitives becomes one custom call, served by a kernel family.

``cuda/gemm`` multiplies tiles on tensor cores, ``cuda/naive`` computes directly; ``cuda/common/product.h`` says what both take.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax import lax

from jax_na import _cuda
from jax_na._cuda import DTYPES, PRODUCT_TARGET
from jax_na._spec import Spec

Array = Any

_POINTWISE, _NEIGHBORHOOD, _INVERSE = range(3)  # enum Product


def why_not(family: str, spec: Spec, dtype: Any, dim: int) -> str | None:
    """The static reason the kernels of ``family`` cannot serve a product, or ``None``."""
    del dim
    built = _cuda.lane().product_families  # empty where the lane is missing: then this is lowered for another machine
    if built and family not in built:
        return "it is not in this build"
    if str(dtype) not in DTYPES:
        return f"the CUDA kernels serve {', '.join(DTYPES)}, the operands have {dtype}"
    if spec.volume >= 1 << 26:
        return f"a window of {spec.volume} keys: the limit is {1 << 26}"
    return None


def _call(
    family: str, product: int, spec: Spec, a: Array, b: Array, halo: Array, shape: tuple[int, ...], dtype: Any
) -> Array:
    call = jax.ffi.ffi_call(PRODUCT_TARGET, jax.ShapeDtypeStruct(shape, dtype))
    return call(
        a,
        b,
        halo,
        window=np.array(spec.window, np.int64),
        stride=np.array(spec.stride, np.int64),
        dilation=np.array(spec.dilation, np.int64),
        is_causal=np.array(spec.is_causal, np.int64),
        scale=np.float64(spec.scale),
        precision=np.int64(spec.precision != lax.Precision.DEFAULT),
        product=np.int64(product),
        sharded=np.bool_(spec.sharded),
        family=family,
    )


def pointwise(family: str, spec: Spec, query: Array, key: Array, halo: Array) -> Array:
    """``[*B, *Sq, H, D], [*B, *Sk, Hkv, D] -> [*B, *Sq, H, W]``."""
    return _call(family, _POINTWISE, spec, query, key, halo, (*query.shape[:-1], spec.volume), query.dtype)


def neighborhood(family: str, spec: Spec, weights: Array, value: Array, halo: Array) -> Array:
    """``[*B, *Sq, H, W], [*B, *Sk, Hkv, D] -> [*B, *Sq, H, D]``."""
    return _call(family, _NEIGHBORHOOD, spec, weights, value, halo, (*weights.shape[:-1], value.shape[-1]), value.dtype)


def inverse(family: str, spec: Spec, weights: Array, array: Array, halo: Array, kv_shape: tuple[int, ...]) -> Array:
    """``[*B, *Sq, H, W], [*B, *Sq, H, D] -> [*B, *kv_shape, D]``."""
    shape = (*spec.lead(array), *kv_shape, array.shape[-1])
    return _call(family, _INVERSE, spec, weights, array, halo, shape, array.dtype)
