"""The tile of keys that one shard needs: its own block, extended by tokens of its neighbours.

A concatenation of halo and block would begin when the last token of the halo is there, and copy everything then. Here the tile is
a primitive of its own, ``na_tile``: its block is copied to its place while the halo travels, and only the halo after that.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jax_na._jax_internals import apply_primitive
from jax_na._sharding import Axes, lower_untyped

Array = Any


def exchange(x: Array, axis: int, names: Axes, shards: int, left: int, right: int) -> Array:
    """Extend the block ``x`` by ``left`` and ``right`` tokens of its neighbours along ``axis``; beyond the ends come zeros."""
    block = x.shape[axis]

    def receive(width: int, hops: int) -> Array:
        """``width`` tokens of the shard ``hops`` further (negative: before), those that lie nearest to this one."""
        begin = block - width if hops < 0 else 0
        piece = lax.slice_in_dim(x, begin, begin + width, axis=axis)
        pairs = [(source, source - hops) for source in range(shards) if 0 <= source - hops < shards]
        return lax.ppermute(piece, names, pairs)

    def pieces(width: int, sign: int) -> list[Array]:
        return [receive(min(block, width - start), sign * (start // block + 1)) for start in range(0, width, block)]

    before, after = [*reversed(pieces(left, -1))], pieces(right, 1)
    return na_tile_p.bind(x, *before, *after, axis=axis, place=len(before)) if before or after else x


def from_zero_on(x: Array, axis: int, left: int, offset: Array) -> Array:
    """Move what lies before position 0 to the end of the tile: where positions are divided by a dilation, none is negative."""
    if left == 0:
        return x
    width = x.shape[axis]
    x = lax.concatenate([x, lax.slice_in_dim(x, 0, left, axis=axis)], axis)
    return lax.dynamic_slice_in_dim(x, jnp.maximum(left - offset, 0), width, axis)


# --- na_tile(x, *pieces): the concatenation along ``axis`` of the pieces, with x put in before number ``place`` ----------------


def _offsets(sizes: Sequence[int], place: int) -> list[int]:
    """Where x and the pieces lie in the tile, given their sizes."""
    order = [*range(1, place + 1), 0, *range(place + 1, len(sizes))]
    starts = itertools.accumulate((sizes[i] for i in order), initial=0)
    return [start for _, start in sorted(zip(order, starts, strict=False))]


def _tile_type(x: Any, *pieces: Any, axis: int, place: int) -> Any:
    shape = list(x.shape)
    shape[axis] += sum(piece.shape[axis] for piece in pieces)
    return x.update(shape=tuple(shape), weak_type=False)


def _write_tile(*parts: Array, axis: int, place: int) -> tuple[Array]:
    sizes = [part.shape[axis] for part in parts]
    tile = jnp.empty((*parts[0].shape[:axis], sum(sizes), *parts[0].shape[axis + 1 :]), parts[0].dtype)
    for part, start in zip(parts, _offsets(sizes, place), strict=True):
        tile = lax.dynamic_update_slice_in_dim(tile, part, start, axis)
    return (tile,)


def _transpose_tile(cotangent: Any, *parts: Any, axis: int, place: int) -> list[Any]:
    sizes = [(part.aval if ad.is_undefined_primal(part) else part).shape[axis] for part in parts]
    return [
        lax.slice_in_dim(cotangent, start, start + size, axis=axis)
        for size, start in zip(sizes, _offsets(sizes, place), strict=True)
    ]


def _batch_tile(parts: Sequence[Array], dims: Sequence[int | None], *, axis: int, place: int) -> tuple[Array, int]:
    size = next(part.shape[dim] for part, dim in zip(parts, dims, strict=True) if dim is not None)
    moved = [
        jnp.broadcast_to(part, (size, *part.shape)) if dim is None else jnp.moveaxis(part, dim, 0)
        for part, dim in zip(parts, dims, strict=True)
    ]
    return na_tile_p.bind(*moved, axis=axis + 1, place=place), 0


na_tile_p = Primitive("na_tile")
na_tile_p.def_abstract_eval(_tile_type)
na_tile_p.def_impl(functools.partial(apply_primitive, na_tile_p))
mlir.register_lowering(
    na_tile_p, lambda ctx, *parts, **params: lower_untyped(ctx, functools.partial(_write_tile, **params), *parts)
)
ad.deflinear2(na_tile_p, _transpose_tile)
batching.primitive_batchers[na_tile_p] = _batch_tile
