"""The CUDA lane: the extension that holds the kernels, what each kernel family serves, and the custom calls.

A call that is lowered for ``cuda`` becomes one XLA custom call (``jax_na_forward`` or ``jax_na_backward``) with its static
description as attributes (``cuda/ffi/attributes.h``). Among them is an ordered list of candidate families: Python knows what serves
a call statically, the handler knows the GPU it runs on and takes the first candidate for it. So a machine without a GPU can
lower and export for one, and a program runs on different GPUs.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export, lax

from jax_na import _extras
from jax_na._spec import Inputs, Spec

Array = Any

FORWARD_TARGET = "jax_na_forward"
BACKWARD_TARGET = "jax_na_backward"
PRODUCT_TARGET = "jax_na_product"  # the unfused products: _cuda_products.py
DTYPES = ("float16", "bfloat16", "float32")

# Pass as ``disabled_checks`` to ``jax.export.export``: jax does not know these custom calls to be stable.
EXPORT_SAFETY_CHECKS = tuple(
    export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD_TARGET, BACKWARD_TARGET, PRODUCT_TARGET)
)


# --- the extension ---------------------------------------------------------------------------------------------------


def _runtime_ffi_version() -> tuple[int, int] | None:
    """FFI API version of the installed jaxlib, read from the headers it ships."""
    import jaxlib

    header = Path(jaxlib.__path__[0]) / "include/xla/ffi/api/c_api.h"
    try:
        text = header.read_text()
    except OSError:
        return None
    found = [re.search(rf"#define XLA_FFI_API_{part} (\d+)", text) for part in ("MAJOR", "MINOR")]
    return (int(found[0][1]), int(found[1][1])) if found[0] and found[1] else None


@dataclasses.dataclass(frozen=True)
class Lane:
    """What became of loading the extension.

    Attributes:
      missing: why it cannot be used, ``None`` if it can.
      families, product_families: of neighborhood attention and of the unfused products, in this build.
    """

    missing: str | None
    families: tuple[str, ...] = ()
    product_families: tuple[str, ...] = ()

    def __str__(self) -> str:
        if self.missing is not None:
            return f"CUDA kernels are not available: {self.missing}"
        fused, unfused = ", ".join(self.families), ", ".join(self.product_families)
        return f"CUDA kernels are available: {fused}; for the unfused products {unfused}"


@functools.cache
def lane() -> Lane:
    """Load the extension and register its handlers with XLA, once. Never raises."""
    try:
        extension = importlib.import_module("jax_na._cuda_kernels")
    except ModuleNotFoundError:
        return Lane(
            "this installation of jax_na was built without them; install the CUDA toolkit (nvcc) and, where its source is, run "
            "pip install --force-reinstall --no-deps . -Ccmake.define.JAX_NA_CUDA=ON"
        )
    except Exception as error:  # an extension for another platform, Python or C++ runtime
        return Lane(f"the extension does not load ({type(error).__name__}: {error}); reinstall jax_na")
    built, runtime = tuple(extension.ffi_api_version()), _runtime_ffi_version()
    if runtime is not None and (built[0] != runtime[0] or built[1] > runtime[1]):
        return Lane(
            f"the extension was compiled with XLA's FFI API {built[0]}.{built[1]} and the installed jaxlib has "
            f"{runtime[0]}.{runtime[1]}; upgrade jaxlib, or rebuild jax_na against jaxlib's headers"
        )
    try:
        for name, capsule in extension.targets().items():
            jax.ffi.register_ffi_target(name, capsule, platform="CUDA")
    except Exception as error:
        return Lane(f"XLA refuses the handlers ({type(error).__name__}: {error})")
    return Lane(None, tuple(extension.families()), tuple(extension.product_families()))


def cuda_status() -> str:
    """One sentence: which CUDA kernel families this installation has, or why it has none."""
    return str(lane())


def missing_here() -> str | None:
    """Why a program lowered for CUDA would fail on this very machine; ``None`` where there is no GPU, or nothing is missing."""
    missing = lane().missing
    if missing is None:
        return None
    try:
        return missing if jax.devices("cuda") else None
    except RuntimeError:
        return None


# --- what each family serves -----------------------------------------------------------------------------------------


def _no_workspace(spec: Spec, inputs: Inputs) -> int:
    return 0


def why_not_capability(capability: int | None, needed: int, exact: bool = False) -> str | None:
    """Why kernels for compute capability ``needed`` (times ten) do not run on a device of ``capability``; ``None``: not known."""
    if capability is None or (capability == needed if exact else capability >= needed):
        return None
    return (
        f"it needs compute capability {needed / 10:.1f}{'' if exact else ' or newer'}, the device has {capability / 10:.1f}"
    )


@dataclasses.dataclass(frozen=True)
class Family:
    """A kernel family, as ``cuda/ffi/dispatch.cc`` lists it by the same name.

    Attributes:
      capability: compute capability it needs, 10 * major + minor.
      exact: it runs on that capability only, instead of that and newer ones.
      why_not: ``(spec, inputs, is_backward)``: the static reason it cannot serve a call, or ``None``.
      forward_workspace, backward_workspace: bytes of scratch memory from ``(spec, inputs)``.
      head_dim_multiple: head dimensions are padded with zeros to a multiple of it.
      serves_extra: additional keys are handled in the kernel; otherwise they are composed around it (``_extras.py``).
    """

    name: str
    capability: int
    exact: bool
    why_not: Callable[[Spec, Inputs, bool], str | None]
    forward_workspace: Callable[[Spec, Inputs], int] = _no_workspace
    backward_workspace: Callable[[Spec, Inputs], int] = _no_workspace
    head_dim_multiple: int = 1
    serves_extra: bool = False

    def why_not_on(self, capability: int | None) -> str | None:
        return why_not_capability(capability, self.capability, self.exact)


def _why_not_dtype(spec: Spec, inputs: Inputs, is_backward: bool = False) -> str | None:
    del spec, is_backward
    dtype = str(inputs.query.dtype)
    return None if dtype in DTYPES else f"the CUDA kernels serve {', '.join(DTYPES)}, query has {dtype}"


def delta_bytes(spec: Spec, inputs: Inputs) -> int:
    """float32, one per query and head."""
    del spec
    return 4 * math.prod(inputs.query.shape[:-1])


def _why_not_fused(spec: Spec, inputs: Inputs, is_backward: bool = False) -> str | None:
    reason = _why_not_dtype(spec, inputs, is_backward)
    dim = max(inputs.query.shape[-1], inputs.value.shape[-1])
    if reason is None and dim > 256:
        reason = f"the fused kernels serve head dimensions up to 256, query and value have up to {dim}"
    if is_backward and inputs.extra_key is not None and not all(isinstance(n, int) for n in inputs.query.shape):
        reason = reason or "the fused kernels split additional keys by the batch size, and that is symbolic"
    return reason


def fused_workspace_bytes(spec: Spec, inputs: Inputs) -> int:
    """Of the backward pass: ``cuda/fused/workspace_sm80.h`` in Python."""
    blocks = 528
    heads, dim = inputs.query.shape[-2:]
    kv_heads, dim_v = inputs.value.shape[-2:]
    batch, queries = math.prod(spec.lead(inputs.query)), math.prod(spec.spatial(inputs.query))
    parts = [8 * batch * queries * heads]
    if inputs.bias is not None:
        parts.append(4 * -(-blocks // heads) * heads * math.prod(2 * window - 1 for window in spec.window))
    if inputs.extra_key is not None:
        extra = inputs.extra_key.shape[-3]
        tiles, columns = batch * kv_heads * -(-extra // 64), queries * (heads // kv_heads)
        splits = max(1, min(-(-(blocks // 2) // tiles), -(-columns // 1024))) if tiles else 0
        parts.append(4 * splits * batch * extra * kv_heads * (dim + dim_v))
    return sum(-(-part // 256) * 256 for part in parts)


def _why_not_hopper(spec: Spec, inputs: Inputs, is_backward: bool) -> str | None:
    """``why_not_forward`` in ``cuda/fused/plan_sm90.cc`` and the checks of ``hopper::backward``, for what is known statically."""
    dtype, dim, dim_v = str(inputs.query.dtype), inputs.query.shape[-1], inputs.value.shape[-1]
    dims = (32, 64, 128) if is_backward else (32, 64, 128, 256)
    if dtype not in ("float16", "bfloat16"):
        return f"the Hopper kernels serve float16 and bfloat16, query has {dtype}"
    if dim != dim_v or dim not in dims:
        served = ", ".join(map(str, dims))
        return f"the Hopper kernels serve equal head dimensions of key and value in {served}, not {dim} and {dim_v}"
    if inputs.bias is not None:
        return "the Hopper kernels have no bias"
    if not spec.scale > 0:
        return f"the Hopper kernels need a positive scale, not {spec.scale}"
    queries, keys = spec.spatial(inputs.query), spec.spatial(inputs.key)
    for axis, (dilation, q_len, kv_len) in enumerate(zip(spec.dilation, queries, keys, strict=True)):
        if dilation > 8 and (q_len % dilation or kv_len % dilation):
            return (
                f"the Hopper kernels need a dilation of at most 8, or one that divides its axis: axis {axis} has dilation "
                f"{dilation} and {q_len} queries, {kv_len} keys"
            )
    rows = [math.prod(array.shape[:-1]) for array in (inputs.query, inputs.key)]
    if any(
        isinstance(count, int) and count >= 2**31 for count in rows
    ):  # of a symbolic batch, the kernels see it at run time
        return "the Hopper kernels count tokens and heads in 31 bits"
    return None


def hopper_backward_bytes(spec: Spec, inputs: Inputs) -> int:
    """``BackwardWorkspace`` in ``cuda/fused/backward_sm90.h``: counters, lse and delta, window tables, sums of dq; if
    deterministic, norms of dO and the extrema of keys and values."""
    rows, kv_heads = math.prod(inputs.query.shape[:-1]), inputs.key.shape[-2]
    axis_tokens = sum(spec.spatial(inputs.key)) + 3 - len(spec.window)
    parts = [256, 8 * rows, 8 * axis_tokens, 4 * rows * inputs.query.shape[-1]]
    if spec.deterministic:
        parts += [4 * rows, 8 * math.prod(spec.lead(inputs.query)) * kv_heads]
    return sum(-(-part // 256) * 256 for part in parts)


# In order of preference: among those that serve a call statically, the first that runs on the device of the call is taken.
FAMILIES: tuple[Family, ...] = (
    Family("hopper", 90, True, _why_not_hopper, backward_workspace=hopper_backward_bytes),
    Family(
        "fused",
        80,
        False,
        _why_not_fused,
        backward_workspace=fused_workspace_bytes,
        head_dim_multiple=8,
        serves_extra=True,
    ),
    Family("naive", 80, False, _why_not_dtype, backward_workspace=delta_bytes),
)


def candidates(spec: Spec, inputs: Inputs, is_backward: bool, only: str | None = None) -> list[Family]:
    """The families that serve a call statically, in order of preference, without those that no device would reach."""
    built = lane().families  # empty where the lane is missing: then this is lowered for another machine
    result: list[Family] = []
    for family in FAMILIES:
        if only not in (None, family.name) or (built and family.name not in built):
            continue
        if any(not earlier.exact and earlier.capability <= family.capability for earlier in result):
            continue
        if family.why_not(spec, inputs, is_backward) is None:
            result.append(family)
    return result


def _reasons(only: str | None, spec: Spec, inputs: Inputs, is_backward: bool) -> str:
    """Why no family serves a call."""
    built = lane().families
    reasons = {}
    for family in FAMILIES:
        if only in (None, family.name):
            missing = built and family.name not in built
            reasons[family.name] = "it is not in this build" if missing else str(family.why_not(spec, inputs, is_backward))
    if len(set(reasons.values())) == 1:
        return next(iter(reasons.values()))
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def why_not(only: str | None, spec: Spec, inputs: Inputs) -> str | None:
    """``why_not`` of the implementations "cuda" (``only=None``) and "cuda_<only>"."""
    return None if candidates(spec, inputs, False, only) else _reasons(only, spec, inputs, False)


# --- the custom calls ------------------------------------------------------------------------------------------------


def _attributes(spec: Spec, families: list[Family], inputs: Inputs, has_grad_lse: bool) -> dict[str, Any]:
    """As ``cuda/ffi/attributes.h`` decodes them."""
    return {
        "window": np.array(spec.window, np.int64),
        "stride": np.array(spec.stride, np.int64),
        "dilation": np.array(spec.dilation, np.int64),
        "is_causal": np.array(spec.is_causal, np.int64),
        "scale": np.float64(spec.scale),
        "precision": np.int64(spec.precision != lax.Precision.DEFAULT),
        "deterministic": np.bool_(spec.deterministic),
        "sharded": np.bool_(spec.sharded),
        "has_bias": np.bool_(inputs.bias is not None),
        "has_extra": np.bool_(inputs.extra_key is not None),
        "has_grad_lse": np.bool_(has_grad_lse),
        "candidates": ",".join(family.name for family in families),
    }


def _like(array: Array, shape: tuple[int, ...] | None = None, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape if shape is None else shape, array.dtype if dtype is None else dtype)


def _workspace(num_bytes: list[int]) -> jax.ShapeDtypeStruct:
    """Scratch memory is one more result: the handler allocates nothing, so that CUDA graphs can capture it."""
    static = all(isinstance(count, int) for count in num_bytes)
    return jax.ShapeDtypeStruct((max(num_bytes) if static else sum(num_bytes),), jnp.uint8)  # symbols may have no maximum


def _flat(inputs: Inputs) -> list[Array]:
    return [array for array in inputs if array is not None]


def _pad(array: Array, multiple: int) -> Array:
    missing = -array.shape[-1] % multiple
    return jnp.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)]) if missing else array


def _pad_inputs(inputs: Inputs, families: list[Family]) -> tuple[Inputs, int]:
    """Head dimensions as every candidate takes them. Zeros change neither scores nor the other columns of the output."""
    multiple = math.lcm(*(family.head_dim_multiple for family in families))
    padded = {
        name: _pad(array, multiple) for name, array in inputs._asdict().items() if array is not None and name != "bias"
    }
    return inputs._replace(**padded), multiple


def _forward_call(families: list[Family], spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    dim_v = inputs.value.shape[-1]
    inputs, _ = _pad_inputs(inputs, families)
    query = inputs.query
    results = (
        _like(query, (*query.shape[:-1], inputs.value.shape[-1])),
        _like(query, query.shape[:-1], jnp.float32),
        _workspace([family.forward_workspace(spec, inputs) for family in families]),
    )
    call = jax.ffi.ffi_call(FORWARD_TARGET, results)
    out, lse, _ = call(*_flat(inputs), halo, **_attributes(spec, families, inputs, False))
    return out[..., :dim_v], lse


def _backward_call(
    families: list[Family],
    spec: Spec,
    inputs: Inputs,
    out: Array,
    lse: Array,
    grad_out: Array,
    grad_lse: Array | None,
    halo: Array,
) -> Inputs:
    given = inputs
    inputs, multiple = _pad_inputs(inputs, families)
    out, grad_out = _pad(out, multiple), _pad(grad_out, multiple)
    results = (
        *(_like(array) for array in _flat(inputs)),
        _workspace([family.backward_workspace(spec, inputs) for family in families]),
    )
    call = jax.ffi.ffi_call(BACKWARD_TARGET, results)
    attributes = _attributes(spec, families, inputs, grad_lse is not None)
    *grads, _ = call(*_flat(inputs), out, lse, grad_out, *([] if grad_lse is None else [grad_lse]), halo, **attributes)
    remaining = iter(grads)
    return Inputs(*(None if array is None else next(remaining)[..., : array.shape[-1]] for array in given))


def _families_for(only: str | None, spec: Spec, inputs: Inputs, is_backward: bool) -> list[Family]:
    found = candidates(spec, inputs, is_backward, only)
    if not found:  # a family may serve the forward pass of a call and not its backward
        which = "backward" if is_backward else "forward"
        raise NotImplementedError(f"no CUDA kernel for the {which} pass: {_reasons(only, spec, inputs, is_backward)}")
    return found


def forward(only: str | None, spec: Spec, inputs: Inputs, halo: Array) -> tuple[Array, Array]:
    """``(out, lse)`` by the best family, or by the family ``only``."""
    families = _families_for(only, spec, inputs, False)
    call = functools.partial(_forward_call, families)
    if inputs.extra_key is None or all(family.serves_extra for family in families):
        return call(spec, inputs, halo)
    return _extras.forward(call, spec, inputs, halo)


def backward(
    only: str | None,
    spec: Spec,
    inputs: Inputs,
    out: Array,
    lse: Array,
    grad_out: Array,
    grad_lse: Array | None,
    halo: Array,
) -> Inputs:
    """Gradients of every given operand by the best family, or by the family ``only``."""
    families = _families_for(only, spec, inputs, True)
    call = functools.partial(_backward_call, families)
    if inputs.extra_key is None or all(family.serves_extra for family in families):
        return call(spec, inputs, out, lse, grad_out, grad_lse, halo)
    return _extras.backward(call, spec, inputs, out, lse, grad_out, grad_lse, halo)
