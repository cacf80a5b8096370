"""The functional core shared by the NNX and the Linen layers: from projected tokens to attended tokens.

A layer owns parameters and random keys; everything it computes between its two projections is here, once.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jax_na
from jax_na import _backends, _unfused

Array = Any
Fit = Literal["error", "shrink", "pad"]
FITS = ("error", "shrink", "pad")


class WindowFitWarning(UserWarning):
    """A window was adapted to an input smaller than ``window_size * dilation``; the message says how."""


@dataclasses.dataclass(frozen=True)
class Geometry:
    """What a layer's queries see, one entry per spatial axis."""

    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]

    @property
    def rank(self) -> int:
        return len(self.window)

    @property
    def bias_shape(self) -> tuple[int, ...]:
        """Shape of one head's relative positional bias."""
        return tuple(2 * window - 1 for window in self.window)


def _per_axis(name: str, value: Any, rank: int) -> tuple[Any, ...]:
    entries = tuple(value) if isinstance(value, (Sequence, np.ndarray)) else (value,) * rank
    if len(entries) != rank:
        raise ValueError(f"{name}={value!r} has {len(entries)} entries, expected {rank}: one per spatial axis, or a scalar")
    return entries


def make_geometry(
    window_size: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    rank: int | None = None,
) -> Geometry:
    """Check a layer's window arguments, and take the rank from the window unless the window is a scalar."""
    if isinstance(window_size, (Sequence, np.ndarray)):
        if rank is not None and rank != len(window_size):
            raise ValueError(f"rank={rank} contradicts window_size={window_size!r}, which has {len(window_size)} entries")
        rank = len(window_size)
    elif rank is None:
        raise ValueError(
            f"window_size={window_size!r} is a scalar, so the number of spatial axes is open: give one entry per axis, "
            f"such as ({window_size!r}, {window_size!r}), or rank=1, 2 or 3"
        )
    if not 1 <= rank <= 3:
        raise ValueError(f"rank={rank}: 1, 2 or 3 spatial axes are supported")
    integers = {}
    for name, value in (("window_size", window_size), ("stride", stride), ("dilation", dilation)):
        try:
            if any(isinstance(entry, (bool, np.bool_)) for entry in _per_axis(name, value, rank)):
                raise TypeError
            integers[name] = tuple(operator.index(entry) for entry in _per_axis(name, value, rank))
        except TypeError:
            raise TypeError(f"{name} must be an integer or one integer per spatial axis, got {value!r}") from None
        for axis, entry in enumerate(integers[name]):
            if entry < 1:
                raise ValueError(f"{name}={entry} on spatial axis {axis}: it must be at least 1")
    causal = _per_axis("is_causal", is_causal, rank)
    for entry in causal:
        if not isinstance(entry, (bool, np.bool_)):
            raise TypeError(f"is_causal must be a bool or one bool per spatial axis, got {is_causal!r}")
    for axis, (window, step) in enumerate(zip(integers["window_size"], integers["stride"], strict=True)):
        if step > window:
            raise ValueError(
                f"stride={step} on spatial axis {axis} exceeds window_size={window}: the limit is stride <= window_size"
            )
    return Geometry(integers["window_size"], integers["stride"], integers["dilation"], tuple(map(bool, causal)))


def make_geometries(
    window_sizes: Sequence[Any],
    strides: Sequence[Any],
    dilations: Sequence[Any],
    is_causals: Sequence[Any],
    rank: int | None,
) -> tuple[Geometry, ...]:
    """One geometry per group of heads; a sequence of one entry serves every group."""
    lists = {"window_sizes": window_sizes, "strides": strides, "dilations": dilations, "is_causals": is_causals}
    for name, entries in lists.items():
        if not isinstance(entries, (Sequence, np.ndarray)) or not len(entries):
            raise TypeError(f"{name} must be a sequence with one entry per group of heads, got {entries!r}")
    groups = max(map(len, lists.values()))
    for name, entries in lists.items():
        if len(entries) not in (1, groups):
            raise ValueError(f"{name} has {len(entries)} entries, expected 1 or {groups}: one per group of heads")
    columns = [tuple(entries) * (groups if len(entries) == 1 else 1) for entries in lists.values()]
    geometries = tuple(make_geometry(*row, rank) for row in zip(*columns, strict=True))  # type: ignore[call-arg]
    if len({geometry.rank for geometry in geometries}) > 1:
        raise ValueError(f"window_sizes={window_sizes!r} mix ranks: every group needs the same number of spatial axes")
    return geometries


def check_bias(geometry: Geometry) -> None:
    if any(window % 2 == 0 for window in geometry.window):
        raise ValueError(f"relative_bias=True needs an odd window_size on every axis, got {geometry.window}")


def check_heads(features: int, num_heads: int, num_kv_heads: int | None, head_dim: int | None) -> tuple[int, int]:
    """``(num_kv_heads, head_dim)`` with the defaults filled in."""
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if value is not None and not isinstance(value, (int, np.integer)):
            raise TypeError(f"{name}={value!r}: it must be an integer")
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: it must be at least 1")
    if head_dim is None:
        if features % num_heads:
            raise ValueError(
                f"in_features={features} is not a multiple of num_heads={num_heads}: choose another number of heads, "
                "or give head_dim"
            )
        head_dim = features // num_heads
    if head_dim < 1:
        raise ValueError(f"head_dim={head_dim}: it must be at least 1")
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}: query heads share key/value heads evenly"
        )
    return num_kv_heads, head_dim


def check_fit(fit: str) -> None:
    if fit not in FITS:
        raise ValueError(f"fit={fit!r} is unknown: expected one of {', '.join(map(repr, FITS))}")


def check_tokens(x: Array, features: int, rank: int) -> None:
    if x.ndim != rank + 2:
        axes = {1: "length", 2: "height, width", 3: "depth, height, width"}[rank]
        raise ValueError(
            f"input has shape {tuple(x.shape)}: a layer with a window of rank {rank} expects [batch, {axes}, features]"
        )
    if x.shape[-1] != features:
        raise ValueError(
            f"input has shape {tuple(x.shape)} with {x.shape[-1]} features, the layer has in_features={features}"
        )


def shrink_to_fit(geometry: Geometry, lengths: Sequence[int]) -> Geometry:
    """The ``fit="shrink"`` rule: the largest dilation that fits; if 1 is still too much, the largest window of its parity.

    With dilation ``length // window`` this is the rule by which the published models chose their dilations.
    """
    windows, strides, dilations = [], [], []
    for length, window, stride, dilation in zip(lengths, geometry.window, geometry.stride, geometry.dilation, strict=True):
        if window * dilation > length:
            dilation = max(1, length // window)
            if window > length:
                window = max(1, length - (window - length) % 2)
            stride = min(stride, window)
        windows.append(window)
        strides.append(stride)
        dilations.append(dilation)
    return Geometry(tuple(windows), tuple(strides), tuple(dilations), geometry.is_causal)


def fit_geometry(geometry: Geometry, lengths: Sequence[int], fit: Fit) -> tuple[Geometry, tuple[int, ...]]:
    """The geometry that serves an input of these lengths, and the tokens to append on each axis (with ``fit="pad"``)."""
    needed = tuple(w * d for w, d in zip(geometry.window, geometry.dilation, strict=True))
    none = (0,) * geometry.rank
    if all(n <= length for n, length in zip(needed, lengths, strict=True)):
        return geometry, none
    product = f"window_size={geometry.window} * dilation={geometry.dilation} = {needed}"
    about = f"{product} exceeds the input's {tuple(lengths)} tokens"
    if fit == "error":
        raise ValueError(
            f"{about}: use a smaller window or dilation, or fit='shrink' (a smaller dilation, then a smaller window) "
            "or fit='pad' (zeros appended on each axis)"
        )
    if fit == "pad":
        padding = tuple(max(0, n - length) for n, length in zip(needed, lengths, strict=True))
        warnings.warn(f"{about}: padded by {padding} zero tokens (fit='pad')", WindowFitWarning, stacklevel=2)
        return geometry, padding
    shrunk = shrink_to_fit(geometry, lengths)
    warnings.warn(
        f"{about}: using window_size={shrunk.window}, dilation={shrunk.dilation} (fit='shrink')",
        WindowFitWarning,
        stacklevel=2,
    )
    return shrunk, none


def joint_padding(geometries: Sequence[Geometry], lengths: Sequence[int], fit: Fit) -> tuple[int, ...]:
    """Tokens to append so that every group's window fits, for layers whose groups share the projected tokens."""
    if fit != "pad":
        return (0,) * len(lengths)
    return tuple(map(max, zip(*(fit_geometry(geometry, lengths, fit)[1] for geometry in geometries), strict=True)))


def pad_tokens(x: Array, padding: Sequence[int]) -> Array:
    """Append zero tokens: ``x [B, *spatial, C]``."""
    if not any(padding):
        return x
    return jnp.pad(x, ((0, 0), *((0, amount) for amount in padding), (0, 0)))


def crop_tokens(x: Array, lengths: Sequence[int]) -> Array:
    """Undo :func:`pad_tokens`."""
    return x[(slice(None), *(slice(length) for length in lengths))]


def split_heads(qkv: Array, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Array, Array, Array]:
    """``[..., (H + 2 Hkv) * D]`` into query, key and value ``[..., heads, D]``.

    With ``Hkv == H`` the layout is the published one, ``(3, H, D)``.
    """
    query, key, value = jnp.split(qkv, (num_heads * head_dim, (num_heads + num_kv_heads) * head_dim), axis=-1)
    heads = (num_heads, num_kv_heads, num_kv_heads)
    return tuple(  # type: ignore[return-value]
        x.reshape(*x.shape[:-1], n, head_dim) for x, n in zip((query, key, value), heads, strict=True)
    )


def gelu(x: Array) -> Array:
    """Exact GELU, ``x Phi(x)``, computed in float32 at least; its backward pass starts from ``x`` alone.

    By ``erf``, as PyTorch does. ``jax.nn.gelu`` takes ``erfc``, 2.3 times as long on an H200, and in a training step of
    DiNAT-tiny its autodiff held 2.2 GiB more (9.5, now 7.3).
    """

    def exact(x: Array) -> Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return (0.5 * wide * (1.0 + jax.lax.erf(wide * math.sqrt(0.5)))).astype(x.dtype)

    return jax.checkpoint(exact)(x)


def merge_heads(x: Array) -> Array:
    """``[..., H, D]`` into ``[..., H * D]``."""
    return x.reshape(*x.shape[:-2], math.prod(x.shape[-2:]))


def crop_bias(bias: Array, window: Sequence[int]) -> Array:
    """The centre of a relative positional bias ``[H, 2k-1, ...]`` for a smaller window of the same parity."""
    full = bias.shape[1:]
    return bias[(slice(None), *(slice((f + 1) // 2 - w, (f + 1) // 2 + w - 1) for f, w in zip(full, window, strict=True)))]


def _pair_of(implementation: str | None) -> str | None:
    """What a layer's ``implementation`` is called for ``na_qk`` and ``na_av``; ``None``, the best, for one without the pair."""
    _backends.check_name(implementation)
    name = _unfused.STORES_WEIGHTS.get(implementation, implementation) if implementation else None
    return name if name in _unfused.PRODUCTS else None


def attend(
    query: Array,
    key: Array,
    value: Array,
    geometry: Geometry,
    *,
    scale: float | None = None,
    bias: Array | None = None,
    precision: Any = None,
    implementation: str | None = None,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Neighborhood attention of ``[B, *spatial, heads, D]`` tokens.

    Args:
      query, key, value: projected tokens.
      geometry: it fits the input (see :func:`fit_geometry`).
      scale, precision, implementation: as in :func:`jax_na.neighborhood_attention`.
      bias: relative positional bias ``[H, 2k-1, ...]``, of this geometry's window or a larger one.
      dropout: applied to the attention weights, which then have to exist: the unfused pair serves the call, by
        ``implementation`` where that has the pair, else by the best that does.
    """
    if bias is not None:
        bias = crop_bias(bias, geometry.window).astype(query.dtype)
    window: dict[str, Any] = {"stride": geometry.stride, "dilation": geometry.dilation, "is_causal": geometry.is_causal}
    if dropout is None:
        return jax_na.neighborhood_attention(
            query,
            key,
            value,
            geometry.window,
            **window,
            scale=scale,
            bias=bias,
            precision=precision,
            implementation=implementation,
        )
    window |= {"precision": precision, "implementation": _pair_of(implementation)}
    scores = jax_na.na_qk(query, key, geometry.window, **window, scale=scale, bias=bias)
    weights = jax.nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
    return jax_na.na_av(dropout(weights.astype(value.dtype)), value, geometry.window, **window)


@dataclasses.dataclass(frozen=True)
class HeadGroup:
    """Heads of a Hydra layer that share a geometry, and are served by one call: ``heads`` are their numbers, ascending."""

    geometry: Geometry
    heads: tuple[int, ...]


def divide_heads(num_heads: int, groups: int) -> tuple[int, ...]:
    """Heads per group: evenly, a remainder to the last groups, one each."""
    if groups > num_heads:
        raise ValueError(f"{groups} window groups for num_heads={num_heads}: each group needs at least one head")
    base, rest = divmod(num_heads, groups)
    return tuple(base + (1 if group >= groups - rest else 0) for group in range(groups))


def distinct_calls(geometries: Sequence[Geometry], sizes: Sequence[int]) -> tuple[HeadGroup, ...]:
    """The calls that serve groups of these sizes: groups of equal geometry are joined."""
    heads: dict[Geometry, list[int]] = {}
    first = 0
    for geometry, size in zip(geometries, sizes, strict=True):
        heads.setdefault(geometry, []).extend(range(first, first + size))
        first += size
    return tuple(HeadGroup(geometry, tuple(numbers)) for geometry, numbers in heads.items())


def take_heads(x: Array, heads: Sequence[int]) -> Array:
    """Heads of ``[..., H, D]``, by a slice where their numbers are contiguous."""
    if heads[-1] - heads[0] + 1 == len(heads):
        return x[..., heads[0] : heads[-1] + 1, :]
    return x[..., np.asarray(heads), :]


def hydra_attend(
    query: Array,
    key: Array,
    value: Array,
    geometries: Sequence[Geometry],
    sizes: Sequence[int],
    *,
    biases: Sequence[Array] | None,
    fit: Fit = "error",
    **options: Any,
) -> Array:
    """Attention with heads in groups: group ``g`` has ``sizes[g]`` consecutive heads, ``geometries[g]`` and ``biases[g]``.

    One call per distinct geometry; a single one is a plain call over all heads. ``options`` go to :func:`attend`.
    """
    lengths = query.shape[1:-2]
    fitted = [fit_geometry(geometry, lengths, fit)[0] for geometry in geometries]
    if biases is not None:
        biases = [crop_bias(bias, geometry.window) for bias, geometry in zip(biases, fitted, strict=True)]
    calls = distinct_calls(fitted, sizes)
    outs = []
    for call in calls:
        bias = None
        if biases is not None:
            bias = jnp.concatenate([b for b, g in zip(biases, fitted, strict=True) if g == call.geometry])
        q, k, v = (take_heads(x, call.heads) for x in (query, key, value))
        outs.append(attend(q, k, v, call.geometry, bias=bias, **options))
    if len(outs) == 1:
        return outs[0]
    order = np.argsort(np.concatenate([call.heads for call in calls]))
    out = jnp.concatenate(outs, axis=-2)
    return out if np.array_equal(order, np.arange(len(order))) else out[..., order, :]
