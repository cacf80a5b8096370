"""What a call asks for: the arguments, checked once, in a hashable form that travels as a primitive parameter.

Every error a user can make is raised here, at trace time, and names the argument, the axis, the value and the limit.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_na._window import visible

Array = Any
MAX_RANK = 3
DTYPES = ("float16", "bfloat16", "float32", "float64")


class Inputs(NamedTuple):
    """The differentiable operands of one call, a pytree; ``None`` where the call has no such operand.

    Leading dimensions ``*B`` (one or more, vmap adds some) are shared by all; ``bias`` has either none of them or all the
    ones that vmap added: its entry for batch element ``b`` of the collapsed batch is ``b // (batch / bias_batch)``.
    """

    query: Array  # [*B, *Sq, H, D]
    key: Array  # [*B, *Sk, Hkv, D]
    value: Array  # [*B, *Sk, Hkv, Dv]
    bias: Array | None = None  # [*Bb, H, 2 * k_0 - 1, ...]
    extra_key: Array | None = None  # [*B, M, Hkv, D]
    extra_value: Array | None = None  # [*B, M, Hkv, Dv]


@dataclasses.dataclass(frozen=True)
class Spec:
    """Static description of a call. All tuples have one entry per spatial axis, outermost first."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    scale: float
    precision: lax.Precision = lax.Precision.DEFAULT
    implementation: str | None = None  # None: the best that can serve on the platform that is lowered for
    deterministic: bool | None = None  # None: the implementation's faster backward; True: bitwise reproducible gradients
    sharded: bool = False  # True: the halo operand holds real offsets; False: it is the identity and may be ignored
    lengths: tuple[int, ...] = ()  # of the global axes in a sharded call: for choices that must not depend on the sharding

    @property
    def rank(self) -> int:
        return len(self.window)

    @property
    def volume(self) -> int:
        """Keys in a full window."""
        return math.prod(self.window)

    def spatial(self, array: Array) -> tuple[int, ...]:
        """Spatial shape of a token tensor ``[*B, *S, H, D]``."""
        return tuple(array.shape[-2 - self.rank : -2])

    def lead(self, array: Array) -> tuple[int, ...]:
        """Leading (batch) shape of a token tensor ``[*B, *S, H, D]``."""
        return tuple(array.shape[: -2 - self.rank])

    def identity_halo(self, query: Array) -> np.ndarray:
        """The halo operand of a call that is not spatially sharded: int32 ``[rank, 3]``, rows (0, 0, length)."""
        return np.array([(0, 0, length) for length in self.spatial(query)], np.int32)

    def visible(self, axis: int, query_position: Array, key_position: Array, length: Array, xp: Any = jnp) -> Array:
        """Boolean ``[queries, keys]``: which keys each query sees along one axis, from global token positions."""
        parameters = self.window[axis], self.stride[axis], self.dilation[axis], self.is_causal[axis]
        return visible(query_position, key_position, length, *parameters, xp)


def accumulation_dtype(dtype: Any) -> Any:
    """Softmax, lse and accumulation dtype: float32, or float64 for float64 inputs."""
    return jnp.promote_types(dtype, jnp.float32)


def _integers(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """A scalar or one entry per axis, as ints."""
    given: Any = value if isinstance(value, (Sequence, np.ndarray)) else (value,) * rank
    try:
        if any(isinstance(v, (bool, np.bool_)) for v in given):
            raise TypeError
        result = tuple(operator.index(v) for v in given)
    except TypeError:
        raise TypeError(f"{name} must be an integer or one integer per spatial axis, got {value!r}") from None
    if len(result) != rank:
        raise ValueError(
            f"{name}={value!r} has {len(result)} entries, but query has {rank} spatial axes: give one per axis or a scalar"
        )
    return result


def _booleans(name: str, value: bool | Sequence[bool], rank: int) -> tuple[bool, ...]:
    entries = tuple(value) if isinstance(value, (Sequence, np.ndarray)) else (value,) * rank
    for entry in entries:
        if not isinstance(entry, (bool, np.bool_)):
            raise TypeError(f"{name} must be a bool or one bool per spatial axis, got {value!r}")
    if len(entries) != rank:
        raise ValueError(
            f"{name}={value!r} has {len(entries)} entries, but query has {rank} spatial axes: give one per axis or a scalar"
        )
    return tuple(bool(entry) for entry in entries)


def window_parameters(
    lengths: Sequence[int],
    window_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    shrink_window: bool = False,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """Broadcast the four window arguments to the axes of ``lengths`` and check them.

    With ``shrink_window`` an axis on which ``window * dilation > length`` gets the largest legal dilation not above its own,
    then the largest legal window not above its own, then the stride is cut to the window.
    """
    rank = len(lengths)
    windows = list(_integers("window_size", window_size, rank))
    strides = list(_integers("stride", stride, rank))
    dilations = list(_integers("dilation", dilation, rank))
    causal = _booleans("is_causal", is_causal, rank)
    for axis, length in enumerate(lengths):
        where = f"on spatial axis {axis} (length {length})"
        for name, value in (("window_size", windows[axis]), ("stride", strides[axis]), ("dilation", dilations[axis])):
            if value < 1:
                raise ValueError(f"{name}={value} {where}: it must be at least 1")
        if strides[axis] > windows[axis]:
            raise ValueError(
                f"stride={strides[axis]} {where} exceeds window_size={windows[axis]}: the limit is stride <= window_size, "
                "otherwise some keys are seen by no query"
            )
        if windows[axis] * dilations[axis] > length:
            if not shrink_window:
                fitting = [("window", length // dilations[axis]), ("dilation", length // windows[axis])]
                smaller = " or ".join(f"a {name} of at most {limit}" for name, limit in fitting if limit > 0)
                raise ValueError(
                    f"window_size={windows[axis]} * dilation={dilations[axis]} = {windows[axis] * dilations[axis]} {where}: "
                    f"the limit is window_size * dilation <= {length}. {f'Use {smaller}, pad' if smaller else 'Pad'} the input, "
                    "or pass shrink_window=True to let the window shrink to fit"
                )
            dilations[axis] = max(1, min(dilations[axis], length))
            windows[axis] = max(1, min(windows[axis], length // dilations[axis]))
            strides[axis] = min(strides[axis], windows[axis])
    return tuple(windows), tuple(strides), tuple(dilations), causal


def check_dtype(name: str, array: Array, like: Array | None = None) -> None:
    if str(array.dtype) not in DTYPES:
        raise TypeError(f"{name} has dtype {array.dtype}; supported are {', '.join(DTYPES)}")
    if like is not None and array.dtype != like.dtype:
        raise TypeError(f"{name} has dtype {array.dtype}, query has {like.dtype}: they must be equal")


def check_shape(name: str, array: Array, expected: tuple[int, ...], axes: str) -> None:
    if tuple(array.shape) != tuple(expected):
        raise ValueError(f"{name} has shape {tuple(array.shape)}, expected {tuple(expected)} = {axes}")


def check_given(name: str, array: Array) -> None:
    if array is None:
        raise TypeError(f"{name} is None: expected an array [batch, *spatial, heads, head_dim]")


def check_rank(name: str, array: Array) -> int:
    """Number of spatial axes of ``[B, *spatial, H, D]``."""
    check_given(name, array)
    rank = array.ndim - 3
    if not 1 <= rank <= MAX_RANK:
        raise ValueError(
            f"{name} has shape {tuple(array.shape)}: expected [batch, *spatial, heads, head_dim] with 1, 2 or 3 spatial axes"
        )
    return rank


def check_sizes(sizes: Mapping[str, int]) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} is {size}: it must be at least 1")


def check_heads(query_heads: int, kv_heads: int) -> None:
    if kv_heads < 1 or query_heads % kv_heads:
        raise ValueError(
            f"query has {query_heads} heads and key/value {kv_heads}: the number of query heads must be a multiple of the "
            "number of key/value heads (grouped-query attention)"
        )


def check_inputs(inputs: Inputs, spec: Spec) -> None:
    """Check shapes and dtypes of a public call (one batch dimension)."""
    query, key, value, bias, extra_key, extra_value = inputs
    check_dtype("query", query)
    check_rank("key", key)
    check_rank("value", value)
    for name, array in zip(Inputs._fields[1:], inputs[1:], strict=True):
        public = {"extra_key": "additional_keys", "extra_value": "additional_values"}.get(name, name)
        if array is not None:
            check_dtype(public, array, query)
    if key.ndim != query.ndim or value.ndim != query.ndim:
        raise ValueError(
            f"query, key and value need the same number of axes, got shapes {tuple(query.shape)}, {tuple(key.shape)}, "
            f"{tuple(value.shape)}"
        )
    batch, spatial, heads, dim = query.shape[0], spec.spatial(query), query.shape[-2], query.shape[-1]
    kv_heads, dim_v = key.shape[-2], value.shape[-1]
    check_shape("key", key, (batch, *spatial, kv_heads, dim), "[batch, *spatial, kv_heads, head_dim] of query")
    check_shape("value", value, (batch, *spatial, kv_heads, dim_v), "[batch, *spatial, kv_heads, value_dim] of key")
    check_sizes({"head_dim of query": dim, "head_dim of value": dim_v, "heads of query": heads})
    check_heads(heads, kv_heads)
    if bias is not None:
        if any(window % 2 == 0 for window in spec.window):
            raise ValueError(f"bias needs an odd window_size on every axis, got {spec.window}")
        check_shape("bias", bias, (heads, *(2 * w - 1 for w in spec.window)), "[heads, 2 * window - 1 per axis]")
    if (extra_key is None) != (extra_value is None):
        raise ValueError("additional_keys and additional_values belong together: give both or neither")
    if extra_key is not None and extra_value is not None:
        if extra_key.ndim != 4 or extra_value.ndim != 4:
            raise ValueError(
                "additional_keys and additional_values have 4 axes, [batch, tokens, kv_heads, head_dim], got shapes "
                f"{tuple(extra_key.shape)} and {tuple(extra_value.shape)}"
            )
        tokens = extra_key.shape[1]
        check_shape("additional_keys", extra_key, (batch, tokens, kv_heads, dim), "[batch, tokens, kv_heads, head_dim]")
        check_shape(
            "additional_values", extra_value, (batch, tokens, kv_heads, dim_v), "[batch, tokens, kv_heads, value_dim]"
        )


# The presets of jax.lax.DotAlgorithmPreset that are more exact than a product of 16-bit numbers.
_ALGORITHMS = dict.fromkeys(("TF32_TF32_F32", "BF16_BF16_F32_X3"), lax.Precision.HIGH) | dict.fromkeys(
    ("BF16_BF16_F32_X6", "BF16_BF16_F32_X9", "TF32_TF32_F32_X3", "F32_F32_F32", "F64_F64_F64"), lax.Precision.HIGHEST
)


def canonical_precision(precision: Any) -> lax.Precision:
    """``None`` follows ``jax_default_matmul_precision``; pairs count by their higher entry, algorithms by what they amount to."""
    if precision is None:
        precision = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined, unused-ignore]
    if precision is None:
        return lax.Precision.DEFAULT
    if isinstance(precision, (tuple, list)) and precision:
        return max((canonical_precision(p) for p in precision), key=lambda p: p.value)
    try:
        if isinstance(precision, str) and precision in lax.DotAlgorithmPreset.__members__:
            precision = lax.DotAlgorithmPreset[precision]
        if isinstance(precision, lax.DotAlgorithmPreset):
            return _ALGORITHMS.get(precision.name, lax.Precision.DEFAULT)
        return lax.Precision(precision)
    except (ValueError, TypeError):
        raise ValueError(
            f"precision={precision!r}: expected None, 'default', 'high', 'highest', a jax.lax.Precision or a pair of these, "
            "or a jax.lax.DotAlgorithmPreset"
        ) from None


def make_spec(
    query: Array,
    window_size: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    is_causal: bool | Sequence[bool],
    scale: float | None,
    precision: Any,
    implementation: str | None,
    deterministic: bool | None,
    shrink_window: bool,
) -> Spec:
    """Spec of a public call with ``query [B, *spatial, H, D]``."""
    rank = check_rank("query", query)
    for axis, length in enumerate(query.shape[1 : 1 + rank]):
        if not isinstance(length, int):
            raise TypeError(
                f"spatial axis {axis} of query has the symbolic length {length}: only batch dimensions may be symbolic"
            )
    window, strides, dilations, causal = window_parameters(
        query.shape[1 : 1 + rank], window_size, stride, dilation, is_causal, shrink_window
    )
    try:
        if isinstance(scale, str):
            raise TypeError
        scale = max(query.shape[-1], 1) ** -0.5 if scale is None else float(scale)  # without channels: check_inputs refuses
    except OverflowError:
        scale = math.inf
    except (TypeError, ValueError, jax.errors.ConcretizationTypeError):
        raise TypeError(
            f"scale must be a Python number or None, got {scale!r}: multiply query by a traced scale and pass 1.0"
        ) from None
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: it must be finite")
    if deterministic is not None and not isinstance(deterministic, (bool, np.bool_)):
        raise TypeError(f"deterministic must be True, False or None, got {deterministic!r}")
    return Spec(
        window=window,
        stride=strides,
        dilation=dilations,
        is_causal=causal,
        scale=scale,
        precision=canonical_precision(precision),
        implementation=implementation,
        deterministic=deterministic,
    )
