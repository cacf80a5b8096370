"""The only file that reaches into jax's private modules: one place to mend when they move."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax._src.core import auto_insert_reshard
from jax._src.dispatch import apply_primitive, prim_requires_devices_during_lowering
from jax._src.sharding_impls import parse_flatten_op_sharding

__all__ = [
    "apply_primitive",
    "auto_insert_reshard",
    "needs_partitioning",
    "num_tiles",
    "partition_spec",
    "prim_requires_devices_during_lowering",
    "tile_assignment",
]


def needs_partitioning(ctx: Any) -> bool:
    """Whether XLA's partitioner still has to split what is lowered: several devices, of which not all axes are manual.

    Exported programs say no: the partitioning callback lives in this process and cannot be serialized.
    """
    module = ctx.module_context
    if getattr(module.lowering_parameters, "for_export", False):
        return False
    context = module.axis_context
    manual = getattr(context, "manual_axes", None)
    if manual is not None:  # inside a shard_map
        sizes = context.mesh.shape
        return any(sizes[name] > 1 for name in sizes if name not in manual)
    return (getattr(context, "num_devices", 1) or 1) > 1


def _devices(sharding: Any) -> np.ndarray:
    return np.asarray(sharding._device_assignment, dtype=object)


def tile_assignment(sharding: Any, ndim: int) -> tuple[list[int], np.ndarray, np.ndarray] | None:
    """Tiles per dimension (perhaps a last one over which the array is replicated), device numbers in tile order, all devices.

    ``None`` for a replicated array. ``sharding`` is what a ``custom_partitioning`` callback gets where no mesh has names.
    """
    tiles = sharding._to_xla_hlo_sharding(ndim)
    if tiles.is_replicated() or tiles.is_manual():
        return None
    return list(tiles.tile_assignment_dimensions()), np.asarray(list(tiles.tile_assignment_devices())), _devices(sharding)


def num_tiles(shardings: Any) -> tuple[int, np.ndarray]:
    """How many devices the partitioner splits over, and all devices; 1 if every one of the shardings is replicated."""
    for sharding in shardings:
        tiles = sharding._to_xla_hlo_sharding(0)
        if not tiles.is_replicated() and not tiles.is_manual():
            return len(list(tiles.tile_assignment_devices())), _devices(sharding)
    return 1, _devices(shardings[0])


def partition_spec(sharding: Any, mesh: Any, ndim: int) -> jax.sharding.PartitionSpec:
    """The sharding that a ``custom_partitioning`` callback gets, in the names of ``mesh``.

    Part of a mesh axis has no name: a sharding that splits one (key/value heads fewer than devices) is reported as replicated.
    """
    tiles = sharding._to_xla_hlo_sharding(ndim)
    try:
        return parse_flatten_op_sharding(tiles, mesh)[0]
    except ValueError:
        return jax.sharding.PartitionSpec()
