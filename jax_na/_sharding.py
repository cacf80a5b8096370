"""How a call is split over a mesh: batch and heads stay sharded without any collective, everything else is gathered.

One plan (:func:`plan`) serves both kinds of meshes:

- Auto axes: the primitives lower to ``custom_partitioning`` of their body (:func:`partitioned`). A Shardy rule propagates batch
  and head shardings; the partition callback then writes every operand's sharding itself, from the plan, so that a sharding
  that cannot be served is gathered, never silently misread.
- Explicit axes: the operands are first resharded to the plan (:func:`reshard_explicit`), so that the result types follow from
  those of the operands; then as with Auto axes.

Axes that are manual in the caller's ``shard_map`` need nothing: the primitives see local shapes.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_na._jax_internals import needs_partitioning, num_tiles, partition_spec, tile_assignment
from jax_na._spec import Inputs, Spec, accumulation_dtype

Array = Any
Axes = tuple[str, ...]

SPATIAL_WARNING = (
    "neighborhood attention got an operand that is sharded over a spatial axis: the spatial axes are gathered, so every device of "
    "that mesh axis computes everything. jax_na.sharded_neighborhood_attention splits spatial axes and exchanges only the halo."
)


NO_MESH = jax.sharding.AbstractMesh((), ())


@dataclasses.dataclass(frozen=True)
class Layout:
    """What the dimensions of the operands and results of a primitive mean, one string per dimension.

    ``b<i>`` is leading dimension i, ``h`` the query heads, ``g`` the key/value heads; everything else is replicated: ``s<i>`` /
    ``t<i>`` query / key tokens, ``d`` / ``e`` head dimensions, ``m`` extra tokens, ``w<i>`` bias entries, ``w`` slots of a
    window, ``u`` ``v`` the halo.
    """

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]

    def size(self, factor: str, operands: Sequence[Any], results: Sequence[Any]) -> int:
        """Size of the dimensions called ``factor``, from arrays or their types."""
        pairs = zip((*self.operands, *self.results), (*operands, *results), strict=True)
        return next(array.shape[names.index(factor)] for names, array in pairs if factor in names)


HALO = ("u", "v")


def _inputs_layout(spec: Spec, inputs: Inputs) -> list[tuple[str, ...]]:
    lead = tuple(f"b{i}" for i in range(len(spec.lead(inputs.query))))
    tokens = tuple(f"t{i}" for i in range(spec.rank))
    layout = [
        (*lead, *(f"s{i}" for i in range(spec.rank)), "h", "d"),
        (*lead, *tokens, "g", "d"),
        (*lead, *tokens, "g", "e"),
    ]
    if inputs.bias is not None:
        layout.append((*lead[: inputs.bias.ndim - 1 - spec.rank], "h", *(f"w{i}" for i in range(spec.rank))))
    if inputs.extra_key is not None:
        layout += [(*lead, "m", "g", "d"), (*lead, "m", "g", "e")]
    return layout


def layout(kind: str, spec: Spec, inputs: Inputs, has_grad_lse: bool = False) -> Layout:
    """Layout of primitive ``kind`` (forward, tangent, backward): see ``_primitives.py`` for the order of operands."""
    given = _inputs_layout(spec, inputs)
    out = (*given[0][:-1], "e")
    lse = given[0][:-1]
    if kind == "forward":
        return Layout((*given, HALO), (out, lse))
    if kind == "tangent":
        return Layout((*given, *given, out, lse, HALO), (out, lse))
    return Layout((*given, out, lse, out, *((lse,) if has_grad_lse else ()), HALO), tuple(given))


def product_layout(kind: str, spec: Spec, per_query: Any) -> Layout:
    """Layout of a product of ``_unfused.py`` (pointwise, neighborhood, inverse); ``per_query``: any ``[*B, *Sq, H, X]``."""
    lead = tuple(f"b{i}" for i in range(len(spec.lead(per_query))))
    query = (*lead, *(f"s{i}" for i in range(spec.rank)), "h")
    key = (*lead, *(f"t{i}" for i in range(spec.rank)), "g", "d")
    weights, array = (*query, "w"), (*query, "d")
    if kind == "pointwise":
        return Layout((array, key, HALO), (weights,))
    if kind == "neighborhood":
        return Layout((weights, key, HALO), (array,))
    return Layout((weights, array, HALO), (key,))


# --- the plan --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Plan:
    """Mesh axes per factor; ``slice_kv``: key/value heads are replicated and each device takes the single head it needs."""

    axes: dict[str, Axes]
    slice_kv: bool

    def spec(self, factors: Sequence[str]) -> PartitionSpec:
        return PartitionSpec(*(self.axes.get(factor) or None for factor in factors))


def as_axes(entry: Any) -> Axes:
    """An entry of a PartitionSpec as a tuple of mesh axes."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def plan(
    mesh_shape: dict[str, int],
    factors: Sequence[Sequence[str]],
    shapes: Sequence[Sequence[int]],
    specs: Sequence[PartitionSpec],
    can_reduce: bool = True,
) -> Plan:
    """Which axes shard batch and heads, from the shardings that operands and results come with: the first sharded one decides.

    Batch axes must divide the batch. Head axes must divide the key/value heads, or (``can_reduce``) be a multiple of them: then
    key and value are replicated. Axes that do neither are given up, the minor ones first. Sharded spatial axes give a warning.
    """
    sizes: dict[str, int] = {}
    wanted: dict[str, list[Axes]] = {}
    for names, shape, spec in zip(factors, shapes, specs, strict=True):
        entries = [*spec, *(None,) * (len(names) - len(spec))]
        for name, size, entry in zip(names, shape, entries, strict=True):
            sizes[name] = size
            axes = tuple(axis for axis in as_axes(entry) if mesh_shape[axis] > 1)
            if axes:
                wanted.setdefault(name, []).append(axes)
    if any(name[0] in "st" for name in wanted):
        warnings.warn(SPATIAL_WARNING, stacklevel=2)

    taken: set[str] = set()
    result: dict[str, Axes] = {}

    def ways(axes: Axes) -> int:
        return math.prod(mesh_shape[axis] for axis in axes)

    def claim(name: str, sources: Sequence[str], fits: Callable[[int], bool]) -> None:
        for axes in (axes for source in sources for axes in wanted.get(source, ())):
            axes = tuple(axis for axis in axes if axis not in taken)
            while axes and not fits(ways(axes)):
                axes = axes[:-1]
            if axes:
                result[name] = axes
                taken.update(axes)
                return

    for name in sorted(name for name in sizes if name[0] == "b"):
        claim(name, (name,), lambda n, size=sizes[name]: size % n == 0)  # type: ignore[misc]
    heads, kv_heads = sizes["h"], sizes["g"]
    claim("h", ("h", "g"), lambda n: kv_heads % n == 0 or (can_reduce and heads % n == 0 and n % kv_heads == 0))
    slice_kv = "h" in result and kv_heads % ways(result["h"]) != 0
    if "h" in result and not slice_kv:
        result["g"] = result["h"]
    return Plan(result, slice_kv)


def linear_index(mesh_shape: dict[str, int], axes: Axes) -> Array:
    """This device's number along ``axes`` together, the first one major."""
    index = jnp.zeros((), jnp.int32)
    for axis in axes:
        index = index * mesh_shape[axis] + lax.axis_index(axis)
    return index


def _kv_head(chosen: Plan, mesh_shape: dict[str, int], kv_heads: int) -> Array:
    """The one key/value head this device's query heads read."""
    axes = chosen.axes["h"]
    return linear_index(mesh_shape, axes) // (math.prod(mesh_shape[axis] for axis in axes) // kv_heads)


def _slice_kv(args: Sequence[Array], factors: Sequence[Sequence[str]], head: Array) -> list[Array]:
    return [
        lax.dynamic_slice_in_dim(arg, head, 1, names.index("g")) if "g" in names else arg
        for arg, names in zip(args, factors, strict=True)
    ]


# --- Auto axes: custom_partitioning ------------------------------------------------------------------------------------


def _rule(where: Layout, heads: int, kv_heads: int, mesh: Mesh) -> SdyShardingRule:
    """Shardy rule: batch and heads pass through, every other factor needs replication.

    Query heads are (key/value head, member of its group), so that the sharding of one propagates to the other, but only where
    that cannot split a mesh axis between the two: part of an axis is of no use to the plan. (Where no operand has key/value
    heads, they have nowhere else to get a sharding from; part of an axis is then cut from the replicated result.)
    """
    rename: dict[str, Any] = {}
    only_result = not any("g" in names for names in where.operands)
    if heads == kv_heads:
        rename = {"h": "g"}
    elif kv_heads > 1 and (only_result or (not mesh.empty and all(kv_heads % size == 0 for size in mesh.shape.values()))):
        rename = {"h": CompoundFactor("g", "r")}

    def mapping(names: Sequence[str]) -> ArrayMapping:
        return ArrayMapping(*(rename.get(name, name) for name in names))

    order: list[str] = []
    for names in (*where.operands, *where.results):
        order += [name for name in names if name not in order]
    replicated = tuple(name for name in order if name[0] not in "bhg")
    sizes = {"r": heads // kv_heads} if isinstance(rename.get("h"), CompoundFactor) else {}
    return SdyShardingRule(
        tuple(mapping(names) for names in where.operands),
        tuple(mapping(names) for names in where.results),
        need_replication_factors=replicated,
        **sizes,  # type: ignore[arg-type]
    )


def _anonymous_mesh(shardings: Sequence[Any], where: Sequence[Sequence[str]]) -> tuple[Mesh, list[PartitionSpec]]:
    """A mesh made from the tile assignment of the first sharded operand, where the partitioner knows no named one.

    That is so for the axes that a partially manual shard_map leaves to the partitioner. The axes get names: ``dim0``, ``dim1``, ...
    """
    specs = [PartitionSpec() for _ in shardings]
    for number, (sharding, names) in enumerate(zip(shardings, where, strict=True)):
        tiling = tile_assignment(sharding, len(names))
        if tiling is None or not {"h", "g"} & set(names):
            continue
        dims, order, devices = tiling
        axes = [i for i, size in enumerate(dims) if size > 1]
        grid = order.reshape(dims)
        stride = {i: int(grid.take(1, i).flat[0] - grid.flat[0]) for i in axes}
        major_first = sorted(axes, key=lambda i: -stride[i])
        mesh_devices = devices[: grid.size].reshape([dims[i] for i in major_first])
        in_order = np.arange(grid.size).reshape(mesh_devices.shape)
        back = [major_first.index(i) for i in axes]
        if not np.array_equal(in_order.transpose(back).reshape(dims), grid):
            continue
        specs[number] = PartitionSpec(*(f"dim{i}" if dims[i] > 1 else None for i in range(len(names))))
        return Mesh(mesh_devices, tuple(f"dim{i}" for i in major_first)), specs
    count, devices = num_tiles(shardings)
    return Mesh(devices[:count], ("dim0",)), specs


def lower_untyped(ctx: Any, function: Callable[..., Any], *operands: Any) -> Any:
    """Lower ``function`` as if no mesh were there: what one device computes sees local shapes, and types that speak of a mesh
    (shardings in a partition callback, what varies over a ``shard_map``) would stand in its way."""
    untyped = [jax.core.ShapedArray(a.shape, a.dtype) for a in ctx.avals_in]
    # Rank promotion: that option is about the user's code.
    with jax.sharding.use_abstract_mesh(NO_MESH), jax.numpy_rank_promotion("allow"):
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=untyped), *operands)


# What one device computes: ``function`` on its parts of the operands.
na_local_p = Primitive("na_local")
na_local_p.multiple_results = True
na_local_p.def_abstract_eval(lambda *args, function, results: [jax.core.ShapedArray(*result) for result in results])
mlir.register_lowering(na_local_p, lambda ctx, *operands, function, results: lower_untyped(ctx, function, *operands))


def lower(ctx: Any, operands: Sequence[Any], body: Callable[..., Any], where: Layout) -> Any:
    """Lower ``body(*operands) -> results``; in a ``custom_partitioning`` where the partitioner has devices to split over."""
    if not needs_partitioning(ctx):
        return lower_untyped(ctx, body, *operands)
    whole = tuple((aval.shape, aval.dtype) for aval in ctx.avals_out)
    heads, kv_heads = (where.size(factor, ctx.avals_in, ctx.avals_out) for factor in "hg")
    return lower_untyped(ctx, partitioned(body, where, whole, heads, kv_heads), *operands)


def partitioned(
    body: Callable[..., Any], where: Layout, whole: tuple[Any, ...], heads: int, kv_heads: int
) -> custom_partitioning:
    """``body(*operands) -> results`` with the rules by which XLA splits it; ``whole``: shapes and dtypes of the results."""
    factors = (*where.operands, *where.results)

    def partition(mesh: Mesh, args: Any, results: Any) -> Any:
        given = [*args, *results]
        named = mesh.size in (1, num_tiles([a.sharding for a in given])[0])  # not in a partially manual shard_map
        if named:
            specs = [partition_spec(a.sharding, mesh, len(a.shape)) for a in given]
        else:
            mesh, specs = _anonymous_mesh([a.sharding for a in given], factors)
        mesh_shape = dict(mesh.shape)
        chosen = plan(mesh_shape, factors, [a.shape for a in given], specs, can_reduce=named)
        if not named:  # a sum over devices cannot be named here: gather the batch where a result (of bias) would need one
            summed = {name for name in chosen.axes if name[0] == "b" and any(name not in names for names in where.results)}
            chosen = Plan({name: axes for name, axes in chosen.axes.items() if name not in summed}, chosen.slice_kv)
        # A result that lacks a sharded factor is a partial sum on each device: the gradients of bias and of replicated key, value.
        every = {axis for axes in chosen.axes.values() for axis in axes}
        reduced = [
            tuple(sorted(every - {axis for name in names for axis in chosen.axes.get(name, ())})) for names in where.results
        ]

        def local(*operands: Array) -> tuple[Array, ...]:
            if not chosen.slice_kv:
                outputs = list(body(*operands))
            else:
                head = _kv_head(chosen, mesh_shape, kv_heads)
                outputs = list(body(*_slice_kv(operands, where.operands, head)))
                for i, names in enumerate(where.results):
                    if "g" in names:
                        axis = names.index("g")
                        shape = list(outputs[i].shape)
                        shape[axis] = kv_heads
                        full = jnp.zeros(shape, outputs[i].dtype)
                        outputs[i] = lax.dynamic_update_slice_in_dim(full, outputs[i], head, axis)
            for i, axes in enumerate(reduced):
                if axes:
                    total = lax.psum(outputs[i].astype(accumulation_dtype(outputs[i].dtype)), axes)
                    outputs[i] = total.astype(outputs[i].dtype)
            return tuple(outputs)

        shard = [NamedSharding(mesh, chosen.spec(names)) for names in factors]
        n = len(where.operands)
        parts = tuple((s.shard_shape(a.shape), a.dtype) for s, a in zip(shard[n:], results, strict=True))

        def on_one_device(*operands: Array) -> tuple[Array, ...]:
            return tuple(na_local_p.bind(*operands, function=local, results=parts))

        return mesh, on_one_device, tuple(shard[n:]), tuple(shard[:n])

    def call(*operands: Array) -> tuple[Array, ...]:  # custom_partitioning wants the types, and no constants
        return tuple(na_local_p.bind(*operands, function=body, results=whole))

    wrapped = custom_partitioning(call)

    def rule(mesh: Mesh, *types: Any) -> SdyShardingRule:
        return _rule(where, heads, kv_heads, mesh)

    wrapped.def_partition(partition, decode_shardings=False, sharding_rule=rule)
    return wrapped


# --- Explicit axes: the types say how the operands are sharded -------------------------------------------------------------


def reshard_explicit(where: Layout, operands: Sequence[Array], results: Sequence[Any] = ()) -> list[Array]:
    """On a mesh with Explicit axes, give the operands the types of the plan; elsewhere, return them unchanged.

    ``where`` names the operands and further ones after them (the halo), which are left out. ``results``: types of the results,
    where the operands alone do not tell every size.
    """
    mesh = next((m for m in (jax.typeof(array).sharding.mesh for array in operands) if not m.empty), NO_MESH)
    if AxisType.Explicit not in mesh.axis_types:
        return list(operands)
    factors = where.operands[: len(operands)]
    specs = [jax.typeof(array).sharding.spec for array in operands]
    known = where.results if results else ()
    chosen = plan(
        dict(mesh.shape),
        (*factors, *known),
        [array.shape for array in (*operands, *results)],
        [*specs, *(PartitionSpec() for _ in results)],
    )
    return [
        jax.sharding.reshard(array, NamedSharding(mesh, chosen.spec(names)))
        for array, names in zip(operands, factors, strict=True)
    ]


def move_mapped(args: Sequence[Array], dims: Sequence[int | None], keep: Sequence[bool] = ()) -> list[Array]:
    """Operands of a batching rule with the mapped axis first; those that are not mapped are broadcast along it.

    On a mesh with Explicit axes the new axis is sharded as the mapped ones are: the operands of a product must agree in type,
    or its transpose would get a cotangent of another. ``keep``: which unmapped operands stay as they are.
    """
    first, axis = next((array, dim) for array, dim in zip(args, dims, strict=True) if dim is not None)
    size, sharding = first.shape[axis], jax.typeof(first).sharding
    entry = sharding.spec[axis]

    def move(array: Array, dim: int | None, keep: bool) -> Array:
        if dim is not None:
            return jnp.moveaxis(array, dim, 0)
        if keep:
            return array
        spread = None if entry is None else sharding.update(spec=PartitionSpec(entry, *jax.typeof(array).sharding.spec))
        return lax.broadcast(array, (size,), out_sharding=spread)

    return [move(*given) for given in zip(args, dims, keep or (False,) * len(args), strict=True)]
