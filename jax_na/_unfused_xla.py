"""The three products of unfused neighborhood attention on any platform, blocked over query tiles.

A tile is a box of queries of one dilation group; the keys it needs are the box that spans their windows, its *band*. One dense
product per tile against the band; between the tile product ``[tile, band]`` and the weights ``[tile, window]`` stands a gather
along the last axis, in one direction or the other. K and V are never expanded by the window.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from jax_na._spec import Spec, accumulation_dtype
from jax_na._unfused_definition import axis_window

Array = Any

# The cost model of a tile, in multiply-adds: what a loop iteration costs beside its product, and one element of the gather.
_ITERATION_COST = 50_000
_GATHER_COST = 40
_MAX_TILE_SCORES = 1 << 24  # elements of one tile's [batch, heads, tile, band] product


class _Tile(NamedTuple):
    """Index tables of one tile: T queries, E keys of the band, W slots of the window."""

    query: Array  # [T] flat query index; at least Nq (dropped) where the tile overhangs
    key: Array  # [E] flat key index; at least Nk (dropped, read as zero) where the band overhangs
    column: Array  # [T, W] band column of each slot
    slot: Array  # [T, E] slot of each band column
    inside_slots: Array  # [T, W] the slot holds a key that the query sees
    inside_band: Array  # [T, E] the query sees the key


def _band_extent(tile: int, window: int, stride: int, group: int) -> int:
    """Keys that span the windows of ``tile`` consecutive queries of one group."""
    return min(window + -(-(tile - 1) // stride) * stride, max(group, window))


def _choose_tile(
    spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], rows: int, dim: int
) -> tuple[int, ...]:
    """Tile box with the least estimated cost; ``rows`` is batch times query heads."""
    groups = [-(-length // dilation) for length, dilation in zip(query_spatial, spec.dilation, strict=True)]
    options = []
    for group in groups:
        sizes = {group, *(1 << p for p in range(group.bit_length()))}
        sizes |= {-(-group // n) for n in range(1, 9)}
        options.append(sorted(sizes))

    def cost(tile: tuple[int, ...]) -> tuple[bool, float]:
        tiles = math.prod(d * -(-g // t) for d, g, t in zip(spec.dilation, groups, tile, strict=True))
        band = 1
        for axis, t in enumerate(tile):
            band *= _band_extent(t, spec.window[axis], spec.stride[axis], -(-key_spatial[axis] // spec.dilation[axis]))
        volume = math.prod(tile)
        product = rows * volume * (band * (dim + 4) + spec.volume * _GATHER_COST) + (rows * band + volume * band) * 4
        return rows * volume * band > _MAX_TILE_SCORES and volume > 1, tiles * (_ITERATION_COST + product)

    return min(itertools.product(*options), key=cost)


class _Tiling:
    """The tiles of one call: how many, and the index tables of the i-th."""

    def __init__(
        self, spec: Spec, query_spatial: tuple[int, ...], key_spatial: tuple[int, ...], halo: Array, rows: int, dim: int
    ):
        self.spec, self.query_spatial, self.key_spatial = spec, query_spatial, key_spatial
        self.tile = _choose_tile(spec, query_spatial, key_spatial, rows, dim)
        self.counts = []  # tiles per axis, dilation groups included
        self.tables = []  # per axis: query, key, start, length, each [count, tile or band]
        for axis, tile in enumerate(self.tile):
            query_length, key_length, dilation = query_spatial[axis], key_spatial[axis], spec.dilation[axis]
            group_length = -(-query_length // dilation)
            per_group = -(-group_length // tile)
            band = _band_extent(tile, spec.window[axis], spec.stride[axis], -(-key_length // dilation))
            self.counts.append(dilation * per_group)
            # Query t of tile (group, n) is local position group + dilation * (n * tile + t): consecutive group coordinates.
            residue, first = jnp.divmod(jnp.arange(dilation * per_group), per_group)
            query = residue[:, None] + dilation * (first[:, None] * tile + jnp.arange(tile))
            start, length = axis_window(spec, axis, query_length, halo)
            clipped = jnp.minimum(query, query_length - 1)
            start, length = start[clipped], jnp.where(query < query_length, length[clipped], 0)
            begin = jnp.min(jnp.where(query < query_length, start, jnp.iinfo(start.dtype).max), axis=1)
            begin = jnp.where(query[:, 0] < query_length, begin, 0)
            group = (halo[axis][0] + residue) % dilation
            key = (begin[:, None] + jnp.arange(band)) * dilation + group[:, None] - halo[axis][1]
            self.tables.append((query, key, start - begin[:, None], length))

    def __len__(self) -> int:
        return math.prod(self.counts)

    def __getitem__(self, i: Array) -> _Tile:
        rank, window = self.spec.rank, self.spec.window
        bands = [table[1].shape[1] for table in self.tables]
        query, key, column, slot = (jnp.zeros((), jnp.int32),) * 4
        query_ok, key_ok, inside_slots, inside_band = (jnp.ones((), bool),) * 4

        def spread(array: Array, axis: int, axes: int) -> Array:
            shape = [1] * axes
            for n, size in zip((axis, axis + rank), array.shape, strict=False):
                shape[n] = size
            return array.reshape(shape)

        for axis in reversed(range(rank)):
            n, i = i % self.counts[axis], i // self.counts[axis]
            q, k, start, length = (lax.dynamic_index_in_dim(table, n, keepdims=False) for table in self.tables[axis])
            query = query + spread(q * math.prod(self.query_spatial[axis + 1 :]), axis, rank)
            query_ok = query_ok & spread(q < self.query_spatial[axis], axis, rank)
            key = key + spread(k * math.prod(self.key_spatial[axis + 1 :]), axis, rank)
            key_ok = key_ok & spread((k >= 0) & (k < self.key_spatial[axis]), axis, rank)
            slots, columns = jnp.arange(window[axis]), jnp.arange(bands[axis]) - start[:, None]
            column = column + spread((start[:, None] + slots) * math.prod(bands[axis + 1 :]), axis, 2 * rank)
            inside_slots = inside_slots & spread(slots < length[:, None], axis, 2 * rank)
            slot = slot + spread(columns * math.prod(window[axis + 1 :]), axis, 2 * rank)
            inside_band = inside_band & spread((columns >= 0) & (columns < length[:, None]), axis, 2 * rank)

        tile, band, volume = math.prod(self.tile), math.prod(bands), self.spec.volume
        num_queries, num_keys = math.prod(self.query_spatial), math.prod(self.key_spatial)
        # Overhanging rows get distinct indices out of range, so that scatters may call their indices unique.
        return _Tile(
            jnp.where(query_ok.reshape(tile), query.reshape(tile), num_queries + jnp.arange(tile)),
            jnp.where(key_ok.reshape(band), key.reshape(band), num_keys + jnp.arange(band)),
            column.reshape(tile, volume),
            slot.reshape(tile, band),
            inside_slots.reshape(tile, volume),
            inside_band.reshape(tile, band),
        )


def _flat(spec: Spec, array: Array) -> Array:
    """``[*B, *S, heads, X]`` to ``[batch, tokens, heads, X]``."""
    return array.reshape(math.prod(spec.lead(array)), math.prod(spec.spatial(array)), *array.shape[-2:])


def _take(array: Array, index: Array) -> Array:
    return jnp.take(array, index, axis=1, mode="fill", fill_value=0)


def _rows(tile: Array, kv_heads: int) -> Array:
    """``[batch, T, H, X]`` to ``[batch, T, Hkv, H / Hkv, X]``."""
    return tile.reshape(*tile.shape[:2], kv_heads, tile.shape[2] // kv_heads, tile.shape[3])


def _from_band(product: Array, tile: _Tile) -> Array:
    """``[batch, T, Hkv, R, E]`` to weights ``[batch, T, H, W]``; zero outside the mask."""
    product = product.reshape(*product.shape[:2], product.shape[2] * product.shape[3], product.shape[-1])
    # Where a causal mask cuts the window short its far slots may lie beyond the band.
    column = jnp.minimum(tile.column, product.shape[-1] - 1)[None, :, None, :]
    return jnp.where(tile.inside_slots[None, :, None, :], jnp.take_along_axis(product, column, axis=-1), 0)


def _to_band(weights: Array, tile: _Tile) -> Array:
    """Weights ``[batch, T, H, W]`` to ``[batch, T, H, E]``; zero where the query does not see the key."""
    slot = jnp.clip(tile.slot, 0, weights.shape[-1] - 1)[None, :, None, :]
    return jnp.where(tile.inside_band[None, :, None, :], jnp.take_along_axis(weights, slot, axis=-1), 0)


def _dot(spec: Spec, dtype: Any) -> Any:
    return functools.partial(jnp.einsum, precision=spec.precision, preferred_element_type=accumulation_dtype(dtype))


def _rows_of(array: Array, rank: int) -> int:
    """Batch times heads, for the choice of a tile; a symbolic batch, not known here, counts as one."""
    return math.prod(n for n in array.shape[: -2 - rank] if isinstance(n, int)) * array.shape[-2]


def pointwise(spec: Spec, query: Array, key: Array, halo: Array) -> Array:
    tiling = _Tiling(spec, spec.spatial(query), spec.spatial(key), halo, _rows_of(query, spec.rank), query.shape[-1])
    q, k, dot, kv_heads = _flat(spec, query), _flat(spec, key), _dot(spec, query.dtype), key.shape[-2]

    def body(i: Array, scores: Array) -> Array:
        tile = tiling[i]
        product = dot("btgrd,begd->btgre", _rows(_take(q, tile.query), kv_heads), _take(k, tile.key)) * spec.scale
        rows = _from_band(product.astype(query.dtype), tile)
        return scores.at[:, tile.query].set(rows, mode="drop", unique_indices=True)

    scores = lax.fori_loop(0, len(tiling), body, jnp.zeros((*q.shape[:-1], spec.volume), query.dtype))
    return scores.reshape(*query.shape[:-1], spec.volume)


def neighborhood(spec: Spec, weights: Array, value: Array, halo: Array) -> Array:
    tiling = _Tiling(spec, spec.spatial(weights), spec.spatial(value), halo, _rows_of(weights, spec.rank), value.shape[-1])
    w, v, dot, kv_heads = _flat(spec, weights), _flat(spec, value), _dot(spec, value.dtype), value.shape[-2]

    def body(i: Array, out: Array) -> Array:
        tile = tiling[i]
        band = _rows(_to_band(_take(w, tile.query), tile), kv_heads)
        product = dot("btgre,begd->btgrd", band, _take(v, tile.key)) * spec.scale
        rows = product.reshape(*product.shape[:2], out.shape[2], out.shape[3]).astype(out.dtype)
        return out.at[:, tile.query].set(rows, mode="drop", unique_indices=True)

    out = lax.fori_loop(0, len(tiling), body, jnp.zeros((*w.shape[:-1], v.shape[-1]), value.dtype))
    return out.reshape(*weights.shape[:-1], value.shape[-1])


def inverse(spec: Spec, weights: Array, array: Array, halo: Array, kv_shape: tuple[int, ...]) -> Array:
    kv_spatial, kv_heads = kv_shape[:-1], kv_shape[-1]
    tiling = _Tiling(spec, spec.spatial(weights), kv_spatial, halo, _rows_of(weights, spec.rank), array.shape[-1])
    w, x, dot = _flat(spec, weights), _flat(spec, array), _dot(spec, array.dtype)

    def body(i: Array, result: Array) -> Array:
        tile = tiling[i]
        band = _rows(_to_band(_take(w, tile.query), tile), kv_heads)
        terms = dot("btgre,btgrd->begd", band, _rows(_take(x, tile.query), kv_heads))
        return result.at[:, tile.key].add(terms, mode="drop", unique_indices=True)

    shape = (x.shape[0], math.prod(kv_spatial), kv_heads, x.shape[-1])
    result = lax.fori_loop(0, len(tiling), body, jnp.zeros(shape, accumulation_dtype(array.dtype)))
    result = (result * spec.scale).astype(array.dtype)
    return result.reshape(*spec.lead(array), *kv_shape, array.shape[-1])
