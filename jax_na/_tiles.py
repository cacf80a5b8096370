"""Query tiles and the boxes of keys they need: the geometry and the layouts of the blocked XLA implementation.

Dilation splits every axis into groups that do not see each other, so all geometry is in group coordinates (token ``x`` of
group ``x % dilation`` has coordinate ``x // dilation``). A *tile* is a box of ``tile`` query coordinates, a *box* the
union of its windows: ``box`` keys per axis, the same for every tile. One *step* of the loop handles one tile of ``chunk``
= (dilation groups, batch entries, key/value heads); ``coords`` [3 + rank] are its indices on the grid of steps.

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
    chunk: tuple[int, int, int]  # dilation groups, batch entries and key/value heads of one step; each divides its total

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
    def grid(self) -> tuple[int, ...]:
        totals = (self.groups, self.batch, self.kv_heads)
        return (*(t // c for t, c in zip(totals, self.chunk, strict=True)), *(axis.num_tiles for axis in self.axes))

    @property
    def steps(self) -> np.ndarray:
        """int32 ``[steps, 3 + rank]``: the ``coords`` of every step."""
        return np.stack(np.unravel_index(np.arange(math.prod(self.grid)), self.grid), -1).astype(np.int32)


# --- choosing the tile -----------------------------------------------------------------------------------------------

# Cost of a step in nanoseconds, fitted to two cores of an x86-64 server; only ratios matter, and they matter little.
_STEP_NS = 50_000.0  # starting the dozen operations of a step
_SCORE_NS = 0.6  # masking, exponential and sums, per score
_MAC_NS = 0.013  # one multiply-add of a matrix product
_COPY_NS = 0.25  # moving one element of a key or value box
_CHUNK_SCORES = 1 << 18  # scores of one step: 1 MiB of float32 stays in the second-level cache


def box_length(tile: int, window: int, stride: int, is_causal: bool) -> int:
    """Keys that ``tile`` consecutive queries see together, at most, if the first is at a multiple of ``tile``."""
    firsts = range(0, tile * stride, tile)
    if is_causal:
        # The first query reaches furthest back when it is the last of its stride group; the last query sees itself.
        return max(window, *(tile + window - stride + first % stride for first in firsts))
    return max((first + tile - 1) // stride * stride - first // stride * stride + window for first in firsts)


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _chunk(groups: int, batch: int, kv_heads: int, scores: int) -> tuple[int, int, int]:
    """The most heads, then batch entries, then dilation groups that keep a step of ``scores`` each within budget."""
    chosen = []
    for total in (kv_heads, batch, groups):
        fitting = max((d for d in _divisors(total) if d * scores <= _CHUNK_SCORES), default=1)
        chosen.append(fitting)
        scores *= fitting
        if fitting < total:
            break
    chosen += [1] * (3 - len(chosen))
    return chosen[2], chosen[1], chosen[0]


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
        chunk = _chunk(groups, batch, kv_heads, scores)
        units = groups * batch * kv_heads * tiles
        # Matrix products on few rows run at a fraction of their speed.
        macs = max(rows, 32) * box * (dim + dim_v)
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
    lengths = (
        spec.lengths or query_tokens
    )  # the global ones, if they are known: then tiles and boxes are those of the whole call
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

    Shapes of one step: a tile ``[g, b, h, members, queries, C]``, a box ``[g, b, h, keys, C]``; g, b, h as in
    ``plan.chunk``.
    """

    plan: Plan
    axes: tuple[AxisGeometry, ...]

    # --- queries

    def split_queries(self, x: Array, fill: float = 0.0) -> Array:
        """``[*B, *Sq, H, C]`` to ``[steps, *tile]``; rows that are no query get ``fill``."""
        plan, rank = self.plan, self.plan.rank
        x = x.reshape(plan.batch, *(a.query_tokens for a in plan.axes), plan.kv_heads, plan.members, -1)
        lengths = [a.num_tiles * a.tile * a.dilation for a in plan.axes]
        x = _embed(x, lengths, [g.query_shift for g in self.axes], fill)
        shape = [n for a in plan.axes for n in (a.num_tiles, a.tile, a.dilation)]
        x = x.reshape(plan.batch, *shape, plan.kv_heads, plan.members, -1)
        tiles, inner, groups = (tuple(range(1 + i, 1 + 3 * rank, 3)) for i in range(3))
        heads = 1 + 3 * rank
        x = x.transpose(*groups, 0, heads, *tiles, heads + 1, *inner, heads + 2)
        g, b, h = plan.chunk
        x = x.reshape(-1, g, plan.batch // b, b, plan.kv_heads // h, h, *x.shape[rank + 2 :])
        x = x.transpose(0, 2, 4, *range(6, 6 + rank), 1, 3, 5, *range(6 + rank, x.ndim))
        return x.reshape(-1, g, b, h, plan.members, math.prod(plan.tile), x.shape[-1])

    def join_queries(self, x: Array, lead: Sequence[int]) -> Array:
        """``[steps, *tile]`` to ``[*B, *Sq, H, C]``: undoes :meth:`split_queries`."""
        plan, rank = self.plan, self.plan.rank
        g, b, h = plan.chunk
        x = x.reshape(*plan.grid, g, b, h, plan.members, *plan.tile, x.shape[-1])
        tiles = tuple(range(3, 3 + rank))
        x = x.transpose(0, 3 + rank, 1, 4 + rank, 2, 5 + rank, *tiles, *range(6 + rank, x.ndim))
        x = x.reshape(*(a.dilation for a in plan.axes), plan.batch, plan.kv_heads, *x.shape[6:])
        batch, heads, tiles = rank, rank + 1, tuple(range(rank + 2, 2 * rank + 2))
        members, inner = 2 * rank + 2, tuple(range(2 * rank + 3, 3 * rank + 3))
        spatial = [n for i in range(rank) for n in (tiles[i], inner[i], i)]
        x = x.transpose(batch, *spatial, heads, members, x.ndim - 1)
        x = x.reshape(plan.batch, *(a.num_tiles * a.tile * a.dilation for a in plan.axes), plan.kv_heads * plan.members, -1)
        x = _extract(x, [a.query_tokens for a in plan.axes], [g.query_shift for g in self.axes])
        return x.reshape(*lead, *x.shape[1:])

    # --- keys

    def split_keys(self, x: Array) -> Array:
        """``[*B, *Sk, Hkv, C]`` to the key buffer ``[groups, batch, kv_heads, *rows, C]``."""
        plan, rank = self.plan, self.plan.rank
        x = x.reshape(plan.batch, *(a.key_tokens for a in plan.axes), plan.kv_heads, -1)
        x = _embed(x, [a.num_keys * a.dilation for a in plan.axes], [g.key_shift for g in self.axes], 0.0)
        x = x.reshape(plan.batch, *(n for a in plan.axes for n in (a.num_keys, a.dilation)), plan.kv_heads, x.shape[-1])
        rows, groups = tuple(range(1, 1 + 2 * rank, 2)), tuple(range(2, 2 + 2 * rank, 2))
        x = x.transpose(*groups, 0, 1 + 2 * rank, *rows, 2 + 2 * rank)
        return x.reshape(plan.groups, *x.shape[rank:])

    def join_keys(self, x: Array, lead: Sequence[int]) -> Array:
        """Undoes :meth:`split_keys`."""
        plan, rank = self.plan, self.plan.rank
        x = x.reshape(*(a.dilation for a in plan.axes), *x.shape[1:])
        spatial = [n for i in range(rank) for n in (rank + 2 + i, i)]
        x = x.transpose(rank, *spatial, rank + 1, x.ndim - 1)
        x = x.reshape(plan.batch, *(a.num_keys * a.dilation for a in plan.axes), plan.kv_heads, x.shape[-1])
        x = _extract(x, [a.key_tokens for a in plan.axes], [g.key_shift for g in self.axes])
        return x.reshape(*lead, *x.shape[1:])

    def _box_index(self, coords: Array) -> tuple[Array, ...]:
        first = (coords[i] * size for i, size in enumerate(self.plan.chunk))
        starts = (jnp.asarray(g.box_start)[coords[0], coords[3 + i]] for i, g in enumerate(self.axes))
        return tuple(int32((*first, *starts, 0)))

    def box(self, buffer: Array, coords: Array) -> Array:
        """The step's box of a key buffer: ``[g, b, h, keys, C]``."""
        sizes = (*self.plan.chunk, *self.plan.box, buffer.shape[-1])
        box = lax.dynamic_slice(buffer, self._box_index(coords), sizes)
        return box.reshape(*self.plan.chunk, -1, buffer.shape[-1])

    def add_box(self, buffer: Array, coords: Array, box: Array) -> Array:
        """Add to the step's box of a key buffer."""
        sizes = (*self.plan.chunk, *self.plan.box, buffer.shape[-1])
        index = self._box_index(coords)
        return lax.dynamic_update_slice(buffer, lax.dynamic_slice(buffer, index, sizes) + box.reshape(sizes), index)

    # --- pairs of a query and a key

    def mask(self, coords: Array) -> Array:
        """Which keys of the box each query of the tile sees: ``[g, 1, 1, 1, queries, keys]``."""
        plan, rank = self.plan, self.plan.rank
        result: Any = None
        for i, (a, geometry) in enumerate(zip(plan.axes, self.axes, strict=True)):
            begin, end = (jnp.asarray(e)[coords[0], coords[3 + i]][:, :, None] for e in (geometry.begin, geometry.end))
            key = jnp.arange(a.box, dtype=begin.dtype)
            seen = (key >= begin) & (key < end)
            shape = [1] * (2 * rank)
            shape[i], shape[rank + i] = a.tile, a.box
            seen = seen.reshape(-1, *shape)
            result = seen if result is None else result & seen
        return result.reshape(-1, 1, 1, 1, math.prod(plan.tile), math.prod(plan.box))

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

    def bias(self, bias: Array, coords: Array) -> Array:
        """Bias of the step's pairs: ``[1, 1, h, members, queries, keys]``, entry key - query + window - 1 per axis."""
        plan, rank = self.plan, self.plan.rank
        batch = coords[1] * plan.chunk[1] * plan.bias_batch // plan.batch
        index, sizes = [batch, coords[2] * plan.chunk[2], 0], [1, plan.chunk[2], plan.members]
        for i, (a, geometry) in enumerate(zip(plan.axes, self.axes, strict=True)):
            ahead = (
                jnp.asarray(geometry.box_start)[coords[0], coords[3 + i]] - jnp.asarray(geometry.first_query)[coords[3 + i]]
            )
            index.append(ahead + a.box + a.window - 1)
            sizes.append(a.box + a.tile - 1)
        x = lax.dynamic_slice(bias, int32(index), sizes)
        for a in plan.axes:  # each turns the first remaining axis into a last pair (query, key)
            x = _toeplitz(jnp.moveaxis(x, 3, -1), a.tile)
        pairs = x.transpose(0, 1, 2, *range(3, 3 + 2 * rank, 2), *range(4, 4 + 2 * rank, 2))
        return pairs.reshape(1, *pairs.shape[:3], math.prod(plan.tile), math.prod(plan.box))


def int32(index: Sequence[Array]) -> list[Array]:
    """Index arguments of one dtype: in x64 mode a Python integer beside them would be int64."""
    return [jnp.asarray(i, jnp.int32) for i in index]


def _embed(x: Array, lengths: Sequence[int], shifts: Sequence[Array], fill: float) -> Array:
    """Place the spatial axes of ``x`` (1, 2, ...) in longer ones, at ``shifts``; a shift may be traced."""
    rank = len(lengths)
    if not any(isinstance(shift, jax.Array) for shift in shifts):
        pads = [(int(s), length - int(s) - n) for s, length, n in zip(shifts, lengths, x.shape[1:], strict=False)]
        pads = [(0, 0), *pads, *[(0, 0)] * (x.ndim - 1 - rank)]
        return x if not any(map(any, pads)) else jnp.pad(x, pads, constant_values=fill)
    buffer = jnp.full((x.shape[0], *lengths, *x.shape[1 + rank :]), fill, x.dtype)
    return lax.dynamic_update_slice(buffer, x, int32((0, *shifts, *[0] * (x.ndim - 1 - rank))))


def _extract(x: Array, lengths: Sequence[int], shifts: Sequence[Array]) -> Array:
    rank = len(lengths)
    index = int32((0, *shifts, *[0] * (x.ndim - 1 - rank)))
    return lax.dynamic_slice(x, index, (x.shape[0], *lengths, *x.shape[1 + rank :]))


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


def loop(tiles: Tiles, step: Callable[..., Any], carry: Any, xs: Any) -> tuple[Any, Any]:
    """``step(carry, coords, *xs) -> (carry, ys)`` over all steps."""
    return lax.scan(lambda carry, x: step(carry, *x), carry, (jnp.asarray(tiles.plan.steps), *xs))
