"""Query tiles and the boxes of keys they need: the geometry and the layouts of the blocked XLA implementation.

Dilation splits every axis into groups that do not see each other, so all geometry is in group coordinates (token ``x`` of
group ``x % dilation`` has coordinate ``x // dilation``). A *tile* is a box of ``tile`` query coordinates, a *box* the
union of its windows: ``box`` keys per axis, the same for every tile. A tile is that of ``chunk`` = (dilation groups, batch
entries, key/value heads); one *step* of the loop handles a few tiles. Tiles and boxes are read from and written to arrays in
their own heads-last layout: there is no copy of a whole tensor unless an axis has to be padded to whole tiles or dilation groups.

Whether a query sees a key of its box is, per axis, one interval: the mask is the AND of ``rank`` comparisons.

Tiles and boxes lie on a grid that starts at position 0 of the *global* axis. So a spatially sharded call walks the same
tiles with the same boxes as the unsharded one, and every query gets the same sums in the same order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jax_na._spec import Inputs, Spec
from jax_na._window import group_length, window_bounds

Array = Any


@dataclasses.dataclass(frozen=True)
class AxisPlan:
    """One spatial axis: its window and how it is cut. Lengths are in group coordinates unless they say tokens."""

    window: int
    stride: int
    dilation: int
    is_causal: bool
    query_tokens: int
    key_tokens: int
    tile: int  # queries of a tile
    box: int  # keys of a box
    num_tiles: int
    num_keys: int  # of the padded key buffer, at least `box`
    margin: int  # of the key buffer before the first local key: room for boxes that start before the shard


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a call is cut into steps."""

    axes: tuple[AxisPlan, ...]
    batch: int  # all leading dimensions collapsed
    bias_batch: int
    kv_heads: int
    members: int  # query heads per key/value head
    chunk: tuple[int, int, int]  # dilation groups, batch entries and key/value heads of a tile; each divides its total

    @property
    def rank(self) -> int:
        return len(self.axes)

    @property
    def groups(self) -> int:
        return math.prod(axis.dilation for axis in self.axes)

    @property
    def tile(self) -> tuple[int, ...]:
        return tuple(axis.tile for axis in self.axes)

    @property
    def box(self) -> tuple[int, ...]:
        return tuple(axis.box for axis in self.axes)

    @property
    def rows(self) -> tuple[int, ...]:
        """Shape of the queries of a tile that share their keys; one of length 1 is left out."""
        return (*[self.members][: self.members > 1], math.prod(self.tile))

    @property
    def scores(self) -> int:
        """Scores of one tile."""
        return math.prod(self.chunk) * self.members * math.prod(self.tile) * math.prod(self.box)

    @property
    def grid(self) -> tuple[int, ...]:
        totals = (self.groups, self.batch, self.kv_heads)
        return (*(t // c for t, c in zip(totals, self.chunk, strict=True)), *(axis.num_tiles for axis in self.axes))

    @property
    def step_groups(self) -> tuple[int, ...]:
        """Dilation groups of a tile, per axis: all groups of the last axes and a part of those of one more."""
        left, result = self.chunk[0], []
        for axis in reversed(self.axes):
            result.append(math.gcd(left, axis.dilation))
            left //= result[-1]
        return tuple(reversed(result))

    @property
    def tiles(self) -> np.ndarray:
        """int32 ``[tiles, 3 + 2 * rank]``, the ``coords`` of every tile.

        Which part of the dilation groups; first batch entry, first key/value head; the tile's index on each axis; the first
        dilation group on each axis.
        """
        part, batch, head, *tiles = np.unravel_index(np.arange(math.prod(self.grid)), self.grid)
        groups = np.unravel_index(part * self.chunk[0], [axis.dilation for axis in self.axes])
        return np.stack([part, batch * self.chunk[1], head * self.chunk[2], *tiles, *groups], -1).astype(np.int32)


# --- choosing the tile -----------------------------------------------------------------------------------------------

# Cost of a step in nanoseconds, fitted to two cores of an x86-64 server; only ratios matter, and they matter little.
# Fewer pairs than those of a tile with its box are no gain there. For 13x13 windows, backward, 320 keys a query: tiles whose halves
# share the keys that both reach (256 keys) take as long with jax 0.12 and longer with 0.10, where they need an eighth less time of
# the processors: their products are small. Boxes of queries around tiles of keys on the last axis (288 keys) do no better.
_STEP_NS = 10_000.0  # starting the two dozen operations of a step of one tile
_SCORE_NS = 0.6  # masking, exponential and sums, per score
_MAC_NS = 0.013  # one multiply-add of a matrix product
_COPY_NS = 0.25  # moving one element of a key or value box
# PERF: on a CPU jax 0.10 runs every product of this size on one thread, later versions split it over tiles and heads and lose less
# on few rows: so there steps of one tile and one head, here of all heads and several smaller tiles (13x13 windows on two cores,
# forward and backward: each takes longer with the other's). A body has as many tiles as fit in the caches together.
_STEPS_SHARE_CORES = jax.__version_info__ < (0, 11)
_LOST_ROWS = 12 if _STEPS_SHARE_CORES else 2  # a product of so many more rows would take that time at full speed
_CHUNK_SCORES = 1 << (15 if _STEPS_SHARE_CORES else 17)  # scores of one tile
_MAX_BODY = 8 if _STEPS_SHARE_CORES else 16  # tiles in one body of the loop
# The steps of a body: one has work while another waits for what a single thread computes.
_BODY_STEPS = _MAX_BODY if _STEPS_SHARE_CORES else 2
_BODY_SCORES = 1 << 19  # scores of one body


def box_length(tile: int, window: int, stride: int, is_causal: bool) -> int:
    """Keys that ``tile`` consecutive queries see together, at most, if the first is at a multiple of ``tile``."""
    firsts = range(0, tile * stride, tile)
    if is_causal:
        # The first query reaches furthest back when it is the last of its stride group; the last query sees itself.
        return max(window, *(tile + window - stride + first % stride for first in firsts))
    return max((first + tile - 1) // stride * stride - first // stride * stride + window for first in firsts)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _chunk(dilation: tuple[int, ...], batch: int, kv_heads: int, scores: int) -> tuple[int, int, int]:
    """The most heads, then batch entries, then dilation groups that keep a step of ``scores`` each within budget."""
    chosen = []
    for total in (kv_heads, batch, *reversed(dilation)):
        fitting = max((d for d in _divisors(total) if d * scores <= _CHUNK_SCORES), default=1)
        chosen.append(fitting)
        scores *= fitting
        if fitting < total:
            break
    chosen += [1] * (2 - len(chosen))
    return math.prod(chosen[2:]), chosen[1], chosen[0]


@functools.lru_cache(maxsize=1024)
def choose_tile(
    spec: Spec,
    lengths: tuple[int, ...],
    batch: int,
    kv_heads: int,
    members: int,
    dim: int,
    dim_v: int,
) -> tuple[tuple[int, ...], tuple[int, int, int]]:
    """Tile shape and chunk with the least estimated time, from a small cost model; ``lengths`` of the global axes."""
    candidates = []
    for axis in range(spec.rank):
        longest = -(-lengths[axis] // spec.dilation[axis])
        sizes = {size for size in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512) if size < longest}
        sizes |= {-(-longest // parts) for parts in (1, 2, 3, 4)}
        sizes |= {size for size in (spec.stride[axis], 2 * spec.stride[axis]) if size < longest}
        candidates.append(sorted(size for size in sizes if size <= 512))
    groups = math.prod(spec.dilation)
    best, best_cost = None, math.inf
    for tile in itertools.product(*candidates):
        rows = math.prod(tile) * members
        if rows > 1024:
            continue
        box, tiles = 1, 1
        for axis, size in enumerate(tile):
            longest = -(-lengths[axis] // spec.dilation[axis])
            box *= min(longest, box_length(size, spec.window[axis], spec.stride[axis], spec.is_causal[axis]))
            tiles *= -(-longest // size)
        scores = rows * box
        chunk = _chunk(spec.dilation, batch, kv_heads, scores)
        units = groups * batch * kv_heads * tiles
        # Matrix products on few rows run at a fraction of their speed.
        macs = (rows + _LOST_ROWS) * box * (dim + dim_v)
        cost = units / math.prod(chunk) * _STEP_NS + units * (
            scores * _SCORE_NS + macs * _MAC_NS + box * (dim + dim_v) * _COPY_NS
        )
        if scores * math.prod(chunk) > 4 * _CHUNK_SCORES:
            cost *= 1.5  # out of the cache
        if cost < best_cost:
            best, best_cost = (tile, chunk), cost
    assert best is not None
    return best


def make_plan(spec: Spec, inputs: Inputs) -> Plan:
    """Cut the call into steps."""
    query, key, value, bias = inputs.query, inputs.key, inputs.value, inputs.bias
    query_tokens, key_tokens = spec.spatial(query), spec.spatial(key)
    batch, kv_heads = math.prod(spec.lead(query)), key.shape[-2]
    members = query.shape[-2] // kv_heads
    bias_batch = 1 if bias is None else math.prod(bias.shape[: -1 - spec.rank])
    lengths = spec.lengths or query_tokens  # the global ones if known: then tiles and boxes are those of the whole call
    tile, chunk = choose_tile(spec, lengths, batch // bias_batch, kv_heads, members, query.shape[-1], value.shape[-1])
    axes = []
    for axis in range(spec.rank):
        dilation, size = spec.dilation[axis], tile[axis]
        box = box_length(size, spec.window[axis], spec.stride[axis], spec.is_causal[axis])
        if chunk[0] > 1 and dilation > 1 and ((spec.sharded and not spec.lengths) or lengths[axis] % dilation):
            box += 1  # groups of one step differ in length by one, and so does where their windows end
        longest = -(-lengths[axis] // dilation)
        if spec.sharded:
            box = min(box, longest) if spec.lengths else box
            num_tiles = -(-(query_tokens[axis] + dilation * size - 1) // (dilation * size))
            overhang = size + spec.stride[axis]  # of a box over the windows of the shard's own queries
            margin = overhang + box - spec.window[axis]
            num_keys = max(box, margin + -(-key_tokens[axis] // dilation) + 1 + overhang)
        else:
            box = min(box, longest)
            num_tiles, num_keys, margin = -(-longest // size), longest, 0
        axes.append(
            AxisPlan(
                spec.window[axis],
                spec.stride[axis],
                dilation,
                spec.is_causal[axis],
                query_tokens[axis],
                key_tokens[axis],
                size,
                box,
                num_tiles,
                num_keys,
                margin,
            )
        )
    return Plan(tuple(axes), batch, bias_batch, kv_heads, members, chunk)


# --- where things are ------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AxisGeometry:
    """Positions along one axis: numpy arrays, or traced ones in a sharded call. ``c`` indexes groups of dilation groups."""

    query_shift: Array  # tokens of the query buffer before the first local query
    key_shift: Array  # tokens of the key buffer before the first local key
    first_query: Array  # [tiles]: coordinate of the first query of each tile, less that of the key buffer's first row
    box_start: Array  # [c, tiles]: first row of the box in the key buffer
    begin: Array  # [c, tiles, chunk groups, tile]: first key of the query, counted from the start of the box
    end: Array  # likewise, exclusive


def axis_geometry(plan: Plan, axis: int, halo: Array, sharded: bool) -> AxisGeometry:
    a = plan.axes[axis]
    xp: Any = jnp if sharded else np
    query_offset, key_offset, length = (halo[axis][0], halo[axis][1], halo[axis][2]) if sharded else (0, 0, a.key_tokens)
    # Both buffers start at a multiple of the dilation, the query buffer also at a multiple of the tile.
    query_shift = query_offset % (a.dilation * a.tile)
    first_row = key_offset // a.dilation - a.margin
    key_shift = key_offset - first_row * a.dilation

    group_shape = [other.dilation for other in plan.axes]
    group = np.unravel_index(np.arange(plan.groups), group_shape)[axis].reshape(-1, 1, plan.chunk[0], 1)
    tile_start = (query_offset - query_shift) // a.dilation + a.tile * np.arange(a.num_tiles)
    query = tile_start[None, :, None, None] + np.arange(a.tile)
    start, end = window_bounds(query, group_length(length, a.dilation, group, xp), a.window, a.stride, a.is_causal, xp)
    # The keys there are: local ones inside the global axis (divisions that round up).
    first = -((group - xp.maximum(key_offset, 0)) // a.dilation)
    last = -((group - xp.minimum(key_offset + a.key_tokens, length)) // a.dilation)
    last_box = xp.maximum(-(-length // a.dilation) - a.box, 0)
    box_start = xp.clip(xp.minimum(start[..., 0].min(-1), last_box) - first_row, 0, a.num_keys - a.box)
    rows = (first_row + box_start)[:, :, None, None]
    begin, end = xp.maximum(start, first) - rows, xp.minimum(end, last) - rows
    return AxisGeometry(
        query_shift, key_shift, *(xp.asarray(x, "int32") for x in (tile_start - first_row, box_start, begin, end))
    )


@dataclasses.dataclass(frozen=True)
class Tiles:
    """A plan with its positions: moves arrays between their own layout and tiles or boxes.

    Shapes of one step, whose ``coords`` are some rows of ``plan.tiles``: tiles ``[n, members * queries, C]``, boxes
    ``[n, keys, C]``, pairs of them ``[n, *rows, keys]`` or ``[n, keys, *rows]``; n counts tiles, dilation groups, batch entries
    and heads (in this order, the last three as in ``plan.chunk``), ``rows`` is ``plan.rows``.
    """

    plan: Plan
    axes: tuple[AxisGeometry, ...]

    # --- arrays [*B, *S, heads, C] as [batch, (row, group) per axis, kv_heads, members, C]; those of keys have one member
    # PERF: dimensions of length 1 are left out, otherwise XLA copies every such array before the loop.

    def queries(self, x: Array, fill: float = 0.0) -> Array:
        """``[*B, *Sq, H, C]`` with its axes split, padded with ``fill``."""
        plan = self.plan
        heads, channels = x.shape[-2:]
        x = x.reshape(plan.batch, *(a.query_tokens for a in plan.axes), heads, channels)
        x = _embed(x, [a.num_tiles * a.tile * a.dilation for a in plan.axes], [g.query_shift for g in self.axes], fill)
        return x.reshape(self._shape([a.num_tiles * a.tile for a in plan.axes], heads // plan.kv_heads, channels))

    def queries_shape(self, channels: int) -> tuple[int, ...]:
        """Shape of a split array of queries."""
        return self._shape([a.num_tiles * a.tile for a in self.plan.axes], self.plan.members, channels)

    def keys(self, x: Array) -> Array:
        """``[*B, *Sk, Hkv, C]`` with its axes split, padded with zeros."""
        plan = self.plan
        x = x.reshape(plan.batch, *(a.key_tokens for a in plan.axes), *x.shape[-2:])
        x = _embed(x, [a.num_keys * a.dilation for a in plan.axes], [g.key_shift for g in self.axes], 0.0)
        return x.reshape(self.keys_shape(x.shape[-1]))

    def keys_shape(self, channels: int) -> tuple[int, ...]:
        """Shape of a split array of keys."""
        return self._shape([a.num_keys for a in self.plan.axes], 1, channels)

    def join_queries(self, x: Array, lead: Sequence[int]) -> Array:
        """Undoes :meth:`queries`."""
        plan = self.plan
        lengths = (a.num_tiles * a.tile * a.dilation for a in plan.axes)
        x = x.reshape(plan.batch, *lengths, plan.kv_heads * plan.members, x.shape[-1])
        x = _extract(x, [a.query_tokens for a in plan.axes], [g.query_shift for g in self.axes])
        return x.reshape(*lead, *x.shape[1:])

    def join_keys(self, x: Array, lead: Sequence[int]) -> Array:
        """``[*B, *Sk, Hkv, C]`` from a split array of keys."""
        plan = self.plan
        x = x.reshape(plan.batch, *(a.num_keys * a.dilation for a in plan.axes), plan.kv_heads, x.shape[-1])
        x = _extract(x, [a.key_tokens for a in plan.axes], [g.key_shift for g in self.axes])
        return x.reshape(*lead, *x.shape[1:])

    def tile(self, x: Array, coords: Array) -> Array:
        """The step's tiles of a split array."""
        return self._read(x, self._tile_rows, self.plan.tile, self.plan.members, coords)

    def box(self, x: Array, coords: Array) -> Array:
        """The step's boxes of a split array."""
        return self._read(x, self._box_rows, self.plan.box, 1, coords)

    def _read(self, x: Array, rows: Any, shape: Sequence[int], members: int, coords: Array) -> Array:
        rank = self.plan.rank
        positions, groups = range(1, 1 + 2 * rank, 2), range(2, 2 + 2 * rank, 2)

        def read(coords: Array) -> Array:
            index, sizes, full = self._region(rows(coords), shape, members, x.shape[-1], coords)
            region = _slice(x, index, sizes).reshape(full)
            return region.transpose(*groups, 0, 1 + 2 * rank, 2 + 2 * rank, *positions, 3 + 2 * rank)

        return each_tile(read, coords).reshape(-1, members * math.prod(shape), x.shape[-1])

    def rows(self, x: Array, fill: float = 0.0) -> Array:
        """Tiles of one number per query and head, ``[*B, *Sq, H]``: ``[tiles, n of one tile, 1, *rows]``.

        PERF: for all steps at once. Read in a step, such strided numbers end up inside its loop over the scores.
        """
        tiles = self.plan.tiles
        split = self.tile(self.queries(x[..., None], fill), jnp.asarray(tiles))
        return split.reshape(len(tiles), -1, 1, *self.plan.rows)

    def put_tile(self, x: Array, coords: Array, tiles: Array) -> Array:
        """Write the step's tiles."""
        plan = self.plan
        for c, tile in zip(coords, tiles.reshape(len(coords), -1), strict=True):
            index, sizes, _ = self._region(self._tile_rows(c), plan.tile, plan.members, x.shape[-1], c)
            x = _update(x, self._to_region(tile, plan.tile, x.shape[-1]).reshape(sizes), index)
        return x

    def add_box(self, x: Array, coords: Array, boxes: Array) -> Array:
        """Add to the step's boxes of a split array."""
        plan = self.plan
        for c, box in zip(coords, boxes.reshape(len(coords), -1), strict=True):
            index, sizes, _ = self._region(self._box_rows(c), plan.box, 1, x.shape[-1], c)
            x = _update(x, _slice(x, index, sizes) + self._to_region(box, plan.box, x.shape[-1]).reshape(sizes), index)
        return x

    def _shape(self, rows: Sequence[int], members: int, channels: int) -> tuple[int, ...]:
        plan = self.plan
        spatial = [n for row, a in zip(rows, plan.axes, strict=True) for n in (row, a.dilation)[: 1 + (a.dilation > 1)]]
        return (plan.batch, *spatial, plan.kv_heads, *[members][: members > 1], channels)

    def _tile_rows(self, coords: Array) -> list[Array]:
        return [coords[3 + i] * a.tile for i, a in enumerate(self.plan.axes)]

    def _box_rows(self, coords: Array) -> list[Array]:
        return [_row(g.box_start, coords[0], coords[3 + i]) for i, g in enumerate(self.axes)]

    def _region(
        self, rows: list[Array], shape: Sequence[int], members: int, channels: int, coords: Array
    ) -> tuple[list[Array | int], list[int], list[int]]:
        """Index and sizes of a tile's region of a split array; sizes with the dimensions that were left out."""
        plan = self.plan
        index: list[Array | int] = [coords[1]]
        sizes, full = [plan.chunk[1]], [plan.chunk[1]]
        for i, (row, size, groups) in enumerate(zip(rows, shape, plan.step_groups, strict=True)):
            kept = 1 + (plan.axes[i].dilation > 1)
            index += [row, coords[3 + plan.rank + i]][:kept]
            sizes += [size, groups][:kept]
            full += [size, groups]
        index += [coords[2], *[0][: members > 1], 0]
        sizes += [plan.chunk[2], *[members][: members > 1], channels]
        return index, sizes, [*full, plan.chunk[2], members, channels]

    def _to_region(self, x: Array, shape: Sequence[int], channels: int) -> Array:
        """Undoes the transposition of :meth:`_read`."""
        rank, plan = self.plan.rank, self.plan
        x = x.reshape(*plan.step_groups, plan.chunk[1], plan.chunk[2], -1, *shape, channels)
        spatial = (n for i in range(rank) for n in (rank + 3 + i, i))
        return x.transpose(rank, *spatial, rank + 1, rank + 2, x.ndim - 1)

    # --- pairs of a query and a key

    def mask(self, coords: Array, transposed: bool = False) -> Array:
        """Which keys of its box each query sees."""
        queries, keys, one = np.indices(self.plan.tile), np.indices(self.plan.box, np.int32), len(coords) == 1

        def bounds(table: Array, i: int, coords: Array) -> Array:
            # PERF: a row of all queries at once; were they picked afterwards, those of several tiles would lie far apart. For one
            # tile they are picked afterwards: as small operations of their own, of which jax 0.10 needs many (see `loop`).
            select = (..., queries[i].ravel())
            return _row(table, coords[0], coords[3 + i])[select] if one else _row(table[select], coords[0], coords[3 + i])

        def mask(coords: Array) -> Array:
            result: Any = None
            # PERF: flat [queries, keys] comparisons become vector code; a product of masks per axis costs ten times as much.
            for i, geometry in enumerate(self.axes):
                begin, end = (bounds(x, i, coords) for x in (geometry.begin, geometry.end))
                key = keys[i].ravel()[:, None] if transposed else keys[i].ravel()
                begin, count = (x[:, None] if transposed else x[..., None] for x in (begin, jnp.maximum(end - begin, 0)))
                # One comparison: what lies before the first key wraps around to a large number.
                seen = (key - begin).astype(jnp.uint32) < count.astype(jnp.uint32)
                result = seen if result is None else result & seen
            return result[:, None, None, :, None] if transposed else result[:, None, None, None]

        return self._pairs(each_tile(mask, coords), transposed)

    def _pairs(self, x: Array, transposed: bool) -> Array:
        """From ``[t, g, b, h, members, queries, keys]`` or ``[t, g, b, h, keys, members, queries]``; lengths may be 1."""
        # PERF: in the shape that products give: only so does XLA compute an exponential in the place of its score.
        inner = x.shape[4:] if self.plan.members > 1 else (*x.shape[4 : 4 + transposed], *x.shape[5 + transposed :])
        return jnp.broadcast_to(x, (len(x), *self.plan.chunk, *x.shape[4:])).reshape(-1, *inner)

    # --- relative bias

    def split_bias(self, bias: Array) -> Array:
        """``[*Bb, H, 2k-1, ...]`` to ``[Bb, kv_heads, members, ...]`` with room for every offset of a box."""
        plan = self.plan
        bias = bias.reshape(plan.bias_batch, plan.kv_heads, plan.members, *bias.shape[-plan.rank :])
        return jnp.pad(bias, [(0, 0)] * 3 + [(a.box + a.tile - 1,) * 2 for a in plan.axes])

    def join_bias(self, bias: Array, shape: Sequence[int]) -> Array:
        """Undoes :meth:`split_bias`."""
        inner = (slice(a.box + a.tile - 1, 1 - a.box - a.tile or None) for a in self.plan.axes)
        return bias[(..., *inner)].reshape(shape)

    def bias(self, bias: Array, coords: Array, transposed: bool = False) -> Array:
        """Bias of the step's pairs: entry key - query + window - 1 per axis."""
        pairs = (self._bias(bias, c) for c in coords)
        return self._pairs(jnp.stack([jnp.moveaxis(x, -1, 3) if transposed else x for x in pairs]), transposed)

    def _bias(self, bias: Array, coords: Array) -> Array:
        """``[1, 1, h, members, queries, keys]``."""
        plan, rank = self.plan, self.plan.rank
        batch = coords[1] * plan.bias_batch // plan.batch
        index, sizes = [batch, coords[2], 0], [1, plan.chunk[2], plan.members]
        for i, (a, geometry) in enumerate(zip(plan.axes, self.axes, strict=True)):
            ahead = (
                jnp.asarray(geometry.box_start)[coords[0], coords[3 + i]] - jnp.asarray(geometry.first_query)[coords[3 + i]]
            )
            index.append(ahead + a.box + a.window - 1)
            sizes.append(a.box + a.tile - 1)
        x = _slice(bias, index, sizes)
        for a in plan.axes:  # each turns the first remaining axis into a last pair (query, key)
            x = _toeplitz(jnp.moveaxis(x, 3, -1), a.tile)
        pairs = x.transpose(0, 1, 2, *range(3, 3 + 2 * rank, 2), *range(4, 4 + 2 * rank, 2))
        return pairs.reshape(1, *pairs.shape[:3], math.prod(plan.tile), math.prod(plan.box))


def each_tile(function: Callable[[Array], Array], coords: Array) -> Array:
    """``function`` of every tile's ``coords``, stacked."""
    return function(coords[0])[None] if len(coords) == 1 else jax.vmap(function)(coords)


def _row(table: Array, *index: Array) -> Array:
    """``table[index]`` for an index that is in range."""
    return jnp.asarray(table).at[index].get(mode="promise_in_bounds", wrap_negative_indices=False)


def int32(index: Sequence[Array]) -> list[Array]:
    """Index arguments of one dtype: in x64 mode a Python integer beside them would be int64."""
    return [jnp.asarray(i, jnp.int32) for i in index]


def _slice(x: Array, index: Sequence[Array], sizes: Sequence[int]) -> Array:
    return lax.dynamic_slice(x, int32(index), sizes, allow_negative_indices=False)


def _update(x: Array, update: Array, index: Sequence[Array]) -> Array:
    return lax.dynamic_update_slice(x, update, int32(index), allow_negative_indices=False)


def _embed(x: Array, lengths: Sequence[int], shifts: Sequence[Array], fill: float) -> Array:
    """Place the spatial axes of ``x`` (1, 2, ...) in longer ones, at ``shifts``; a shift may be traced."""
    rank = len(lengths)
    if not any(isinstance(shift, jax.Array) for shift in shifts):
        pads = [(int(s), length - int(s) - n) for s, length, n in zip(shifts, lengths, x.shape[1:], strict=False)]
        pads = [(0, 0), *pads, *[(0, 0)] * (x.ndim - 1 - rank)]
        return x if not any(map(any, pads)) else jnp.pad(x, pads, constant_values=fill)
    buffer = jnp.full((x.shape[0], *lengths, *x.shape[1 + rank :]), fill, x.dtype)
    return _update(buffer, x, (0, *shifts, *[0] * (x.ndim - 1 - rank)))


def _extract(x: Array, lengths: Sequence[int], shifts: Sequence[Array]) -> Array:
    rank = len(lengths)
    index = (0, *shifts, *[0] * (x.ndim - 1 - rank))
    return _slice(x, index, (x.shape[0], *lengths, *x.shape[1 + rank :]))


def _toeplitz(x: Array, rows: int) -> Array:
    """``[..., n]`` to ``[..., rows, n - rows + 1]`` with entry ``[i, j] = x[j - i + rows - 1]``."""
    n = x.shape[-1]
    if rows == 1:
        return x[..., None, :]
    # In row-major order the entries of one column of the result lie n - 1 apart in `rows` copies of x.
    copies = jnp.broadcast_to(x[..., None, :], (*x.shape[:-1], rows, n)).reshape(*x.shape[:-1], rows * n)
    skewed = copies[..., rows - 1 : rows - 1 + rows * (n - 1)].reshape(*x.shape[:-1], rows, n - 1)
    return skewed[..., : n - rows + 1]


def make_tiles(spec: Spec, inputs: Inputs, halo: Array) -> Tiles:
    plan = make_plan(spec, inputs)
    return Tiles(plan, tuple(axis_geometry(plan, axis, halo, spec.sharded) for axis in range(spec.rank)))


def loop(tiles: Tiles, step: Callable[..., Any], carry: Any, *each: Any) -> Any:
    """``carry = step(carry, coords, *entries)`` over all steps; arrays of ``each`` have an entry for every tile."""
    coords = tiles.plan.tiles
    # PERF: independent operations of a loop's body run beside each other on a CPU: several tiles in one keep its cores busy. XLA
    # runs one loop after the other. In jax 0.10 it gives another thread a share only where more than eight operations are ready;
    # operations on several tiles are fewer, and none of them waits for the buffer of another tile's.
    most = max(1, min(_MAX_BODY, _BODY_SCORES // tiles.plan.scores)) if len(coords) >= 32 else 1
    body = max(d for d in range(1, most + 1) if len(coords) % d == 0)
    steps = max(d for d in range(1, _BODY_STEPS + 1) if body % d == 0)
    entries = jax.tree.map(lambda x: x.reshape(-1, body // steps, *x.shape[1:]), (jnp.asarray(coords), *each))
    return lax.scan(lambda carry, xs: (step(carry, *xs), None), carry, entries, unroll=steps)[0]
