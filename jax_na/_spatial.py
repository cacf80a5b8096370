"""Neighborhood attention whose spatial axes are split over a mesh: neighbours exchange only the halo.

Shard ``j`` of an axis of ``length`` tokens owns the block ``[j * block, (j + 1) * block)``. Its queries see keys of that block and
of a halo: ``left`` tokens before it and ``right`` after it, as many as the neediest shard sees (:func:`halo_widths`; windows slide
inwards at the edges of the global axis, so the outer shards may reach further inwards than the others). The halo of key and value
comes by ``ppermute``, from as many neighbours as it is long; the primitives then run on the extended tile with the halo operand
(query offset, key offset, global length). Gradients flow back through the same exchange.

Invariant: every window of every query of a shard, those of the padding included, lies within the shard's extended tile.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_na import _backends, _primitives
from jax_na._exchange import exchange, from_zero_on
from jax_na._sharding import Axes, as_axes, linear_index
from jax_na._spec import Inputs, Spec, accumulation_dtype, check_inputs, check_rank, make_spec
from jax_na._window import group_length, window_bounds

Array = Any


@functools.lru_cache(maxsize=1024)
def halo_widths(length: int, shards: int, window: int, stride: int, dilation: int, is_causal: bool) -> tuple[int, int, int]:
    """``(block, left, right)``: tokens of a shard, and the most tokens before and after it that its queries see."""
    block = -(-length // shards)
    position = np.arange(block * shards)
    group = position % dilation
    start, end = window_bounds(
        position // dilation, group_length(length, dilation, group, np), window, stride, is_causal, np
    )
    first, last = (x.reshape(shards, block) for x in (start * dilation + group, (end - 1) * dilation + group))
    begin = np.arange(shards) * block
    owned = begin < length  # a shard of nothing but padding takes the place of shard 0
    left = np.where(owned, begin - first.min(-1), 0).max()
    right = np.where(owned, last.max(-1) - (begin + block - 1), 0).max()
    return block, max(int(left), 0), max(int(right), 0)


@dataclasses.dataclass(frozen=True)
class Split:
    """How a call is split: mesh axes per dimension, global lengths, and the halo of each spatial axis."""

    batch: Axes
    spatial: tuple[Axes, ...]
    heads: Axes
    sizes: tuple[tuple[str, int], ...]  # of the mesh axes
    lengths: tuple[int, ...]
    widths: tuple[tuple[int, int, int], ...]  # (block, left, right)
    kv_heads: int

    def ways(self, axes: Axes) -> int:
        sizes = dict(self.sizes)
        return math.prod(sizes[axis] for axis in axes)

    @property
    def slice_kv(self) -> bool:
        """Fewer key/value heads than devices over heads: they are replicated, and each device takes the one it needs."""
        return self.kv_heads % self.ways(self.heads) != 0

    def specs(self) -> Inputs:
        """PartitionSpecs of the operands."""

        def spec(*entries: Axes) -> PartitionSpec:
            return PartitionSpec(*(axes or None for axes in entries))

        kv = () if self.slice_kv else self.heads
        token = spec(self.batch, *self.spatial, kv)
        return Inputs(
            spec(self.batch, *self.spatial, self.heads),
            token,
            token,
            spec(self.heads),
            spec(self.batch, (), kv),
            spec(self.batch, (), kv),
        )


def _local(spec: Spec, split: Split, inputs: Inputs) -> tuple[Array, Array]:
    """What one device does, given its blocks."""
    sizes = dict(split.sizes)
    first = inputs.query.ndim - 2 - spec.rank
    key, value = inputs.key, inputs.value
    if split.slice_kv:
        head = linear_index(sizes, split.heads) // (split.ways(split.heads) // split.kv_heads)
        key, value = (lax.dynamic_slice_in_dim(x, head, 1, -2) for x in (key, value))
        if inputs.extra_key is not None:
            extra = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, head, 1, -2), (inputs.extra_key, inputs.extra_value))
            inputs = Inputs(*inputs[:4], *extra)
    rows = []
    for axis, (axes, (block, left, right)) in enumerate(zip(split.spatial, split.widths, strict=True)):
        length = split.lengths[axis]
        offset: Array = 0
        if split.ways(axes) > 1:
            key, value = (exchange(x, first + axis, axes, split.ways(axes), left, right) for x in (key, value))
            offset = linear_index(sizes, axes) * block
            offset = jnp.where(offset < length, offset, 0)
            if spec.dilation[axis] > 1:
                key, value = (from_zero_on(x, first + axis, left, offset) for x in (key, value))
        start = offset - left if spec.dilation[axis] == 1 else jnp.maximum(offset - left, 0)
        rows.append([offset, start, length])
    halo = jnp.stack([jnp.stack([jnp.asarray(entry, jnp.int32) for entry in row]) for row in rows])
    inputs = inputs._replace(key=key, value=value)
    _backends.choose(None, spec, inputs)
    return _primitives.forward(spec, inputs, halo)


@functools.lru_cache(maxsize=256)
def _mapped(spec: Spec, split: Split, mesh: Any, names: frozenset[str], given: tuple[bool, ...]) -> Any:
    """``shard_map`` of :func:`_local`, jitted once per description of a call."""
    specs = Inputs(*(s if there else None for s, there in zip(split.specs(), given, strict=True)))
    return jax.jit(
        jax.shard_map(
            functools.partial(_local, spec, split),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(split.specs().query, split.specs().query),
            axis_names=names,
        )
    )


def _split(spec: Spec, inputs: Inputs, partition: PartitionSpec, mesh_shape: dict[str, int], local: bool) -> Split:
    """Check ``partition`` against the mesh and the operands; with ``local`` the operands are already blocks."""
    query, rank = inputs.query, spec.rank
    entries = [as_axes(entry) for entry in (*partition, *(None,) * (query.ndim - len(partition)))]
    batch, spatial, heads, dim = entries[0], entries[1 : 1 + rank], entries[-2], entries[-1]
    if dim:
        raise ValueError(
            f"partition={partition} splits the head dimension: only batch, spatial axes and heads can be split"
        )
    used = [name for axes in entries for name in axes]
    for name in used:
        if name not in mesh_shape:
            raise ValueError(f"partition={partition} names {name!r}, but the mesh has axes {', '.join(mesh_shape)}")
    if len(set(used)) < len(used):
        raise ValueError(f"partition={partition} names a mesh axis twice")

    def ways(axes: Axes) -> int:
        return math.prod(mesh_shape[axis] for axis in axes)

    scale = ways if local else (lambda axes: 1)
    lengths = tuple(n * scale(axes) for n, axes in zip(spec.spatial(query), spatial, strict=True))
    num_heads, kv_heads = query.shape[-2] * scale(heads), inputs.key.shape[-2] * scale(heads)
    if not local and query.shape[0] % ways(batch):
        raise ValueError(f"batch {query.shape[0]} is not a multiple of the {ways(batch)} devices of mesh axes {batch}")
    if num_heads % ways(heads) or (kv_heads % ways(heads) and ways(heads) % kv_heads):
        raise ValueError(
            f"{num_heads} query heads and {kv_heads} key/value heads cannot be split over the {ways(heads)} devices of mesh axes "
            f"{heads}: they must divide the query heads, and divide or be a multiple of the key/value heads"
        )
    parameters = zip(lengths, spatial, spec.window, spec.stride, spec.dilation, spec.is_causal, strict=True)
    widths = tuple(
        halo_widths(length, ways(axes), window, stride, dilation, causal) if ways(axes) > 1 else (length, 0, 0)
        for length, axes, window, stride, dilation, causal in parameters
    )
    return Split(batch, tuple(spatial), heads, tuple(mesh_shape.items()), lengths, widths, kv_heads)


def sharded_neighborhood_attention(
    query: Array,
    key: Array,
    value: Array,
    window_size: int | Sequence[int],
    *,
    partition: PartitionSpec,
    mesh: Any = None,
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    bias: Array | None = None,
    additional_keys: Array | None = None,
    additional_values: Array | None = None,
    return_lse: bool = False,
    precision: Any = None,
    implementation: str | None = None,
    deterministic: bool | None = None,
    shrink_window: bool = False,
) -> Array | tuple[Array, Array]:
    """:func:`neighborhood_attention` with spatial axes (and batch, and heads) split over a mesh, exchanging only the halo.

    Along a split spatial axis each device holds a block of tokens and receives, of key and value, the tokens before and after it
    that its queries see: about half a window on each side (all of it on the left under ``is_causal``), times the dilation. Batch
    and heads need no communication. The result equals that of :func:`neighborhood_attention` on the whole arrays.

    Outside ``shard_map`` the operands are whole arrays. A length that the mesh axis does not divide is padded (and with Explicit
    axes the result is gathered along it, since no type can say how it is split); put evenly split lengths where speed matters.
    Inside a ``shard_map`` over every axis that ``partition`` names, the operands are the blocks, all of one size.

    Args:
      query, key, value, window_size and all keyword arguments but these two: as in :func:`neighborhood_attention`.
      partition: ``PartitionSpec`` of ``query``, ``[B, *spatial, H, D]``; key and value have the same, the output too. For example
        ``P("data", "x")`` splits the batch over mesh axis ``data`` and the first spatial axis over ``x``. ``D`` cannot be split.
      mesh: the mesh; default: that of ``jax.set_mesh`` or of the enclosing ``shard_map``.

    Returns:
      As :func:`neighborhood_attention`, sharded like ``query``.

    Raises:
      ValueError, TypeError: an illegal argument, or a ``partition`` that does not fit the mesh or the operands.
      NotImplementedError: the named ``implementation`` cannot serve the call.
    """
    _backends.check_name(implementation)
    given = Inputs(query, key, value, bias, additional_keys, additional_values)
    inputs = Inputs(*(None if array is None else jnp.asarray(array) for array in given))
    context = jax.sharding.get_abstract_mesh()
    mesh = context if mesh is None else mesh
    if not isinstance(partition, (PartitionSpec, tuple)):
        raise TypeError(f"partition must be a jax.sharding.PartitionSpec, got {partition!r}")
    if not isinstance(mesh, (jax.sharding.Mesh, jax.sharding.AbstractMesh)):
        raise TypeError(f"mesh must be a jax.sharding.Mesh, got {mesh!r}")
    if mesh.empty:
        raise ValueError("sharded_neighborhood_attention needs a mesh: pass mesh=..., or call it under jax.set_mesh(mesh)")
    manual = {n for n, kind in zip(context.axis_names, context.axis_types, strict=True) if kind == AxisType.Manual}
    used = {name for entry in partition for name in as_axes(entry)}
    local = bool(used & manual)
    if local and not used <= manual:
        raise ValueError(
            f"partition={partition} names axes that are manual here ({', '.join(sorted(used & manual))}) and axes that are not "
            f"({', '.join(sorted(used - manual))}): name only one kind"
        )

    # The description of the whole call: checked on global shapes.
    mesh_shape = dict(mesh.shape)
    check_rank("query", inputs.query)
    if len(partition) > inputs.query.ndim:
        raise ValueError(f"partition={partition} has {len(partition)} entries, but query has {inputs.query.ndim} axes")
    entries = [as_axes(entry) for entry in (*partition, *(None,) * (inputs.query.ndim - len(partition)))]
    ways = [math.prod(mesh_shape.get(name, 1) for name in axes) if local else 1 for axes in entries]
    whole = jax.ShapeDtypeStruct([n * w for n, w in zip(inputs.query.shape, ways, strict=True)], inputs.query.dtype)
    spec = make_spec(
        whole,
        window_size,
        stride,
        dilation,
        is_causal,
        scale,
        precision,
        implementation,
        deterministic,
        shrink_window,
    )
    check_inputs(inputs, spec)
    split = _split(spec, inputs, partition, mesh_shape, local)
    spec = dataclasses.replace(spec, sharded=True, lengths=split.lengths)
    if local:
        out, lse = _local(spec, split, inputs)
        return (out, lse) if return_lse else out

    padding = [
        (0, block * split.ways(axes) - length)
        for (block, _, _), axes, length in zip(split.widths, split.spatial, split.lengths, strict=True)
    ]
    padded = inputs
    if any(after for _, after in padding):
        pads = [(0, 0), *padding, (0, 0), (0, 0)]
        padded = inputs._replace(**{n: jnp.pad(getattr(inputs, n), pads) for n in ("query", "key", "value")})

    def place(array: Array, where: PartitionSpec) -> Array:
        explicit = AxisType.Explicit in mesh.axis_types and array is not None
        return jax.sharding.reshard(array, NamedSharding(mesh, where)) if explicit else array

    padded = Inputs(*map(place, padded, split.specs()))
    if padded.query.size:
        names = frozenset(mesh.axis_names) - manual
        given_operands = tuple(array is not None for array in padded)
        out, lse = _mapped(spec, split, mesh, names, given_operands)(padded)
    else:  # an empty batch: XLA rejects the gradient of a shard_map over nothing
        shape, dtype, where = padded.query.shape[:-1], padded.query.dtype, split.specs().query
        out = place(jnp.zeros((*shape, padded.value.shape[-1]), dtype), where)
        lse = place(jnp.zeros(shape, accumulation_dtype(dtype)), where)
    if any(after for _, after in padding):
        inner = (slice(None), *(slice(0, length) for length in split.lengths))
        # No type says that a length is split unevenly: with Explicit axes such an axis comes back whole.
        batch, *spatial, heads = split.specs().query
        whole_axes = (None if after else axes for axes, (_, after) in zip(spatial, padding, strict=True))
        even = PartitionSpec(batch, *whole_axes, heads)
        out, lse = place(out, even)[inner], place(lse, even)[inner]
    return (out, lse) if return_lse else out
