"""What needs two GPUs or more."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_na
from jax_na.testing.cases import Case
from jax_na.testing.compiled import collectives

pytestmark = pytest.mark.multi_gpu


def test_every_device_is_served_by_itself():
    """The handler works on the device and the stream of the call, not on device 0."""
    case = Case("2d", (20, 21), 5, dim=64)
    run = jax.jit(functools.partial(jax_na.neighborhood_attention, **case.arguments()))
    inputs = case.inputs(jnp.bfloat16)[:3]
    results = [np.asarray(run(*jax.device_put(inputs, device)), np.float32) for device in jax.devices("gpu")]
    for result in results[1:]:
        np.testing.assert_array_equal(result, results[0])


def mesh_of_all(kind=AxisType.Auto):
    return jax.make_mesh((len(jax.devices("gpu")),), ("x",), axis_types=(kind,), devices=jax.devices("gpu"))


def values_and_gradients(function):
    def run(inputs, cotangent):
        out, vjp = jax.vjp(lambda inputs: function(*inputs), inputs)
        return out, vjp(cotangent)[0]

    return jax.jit(run)


def agree(actual, wanted):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)


def attention(case):
    return functools.partial(jax_na.neighborhood_attention, **case.arguments())


def pair(case):
    """The unfused pair: all of its products are in the forward or backward pass."""
    arguments = case.arguments()
    scale = arguments.pop("scale")

    def run(q, k, v):
        scores = jax_na.na_qk(q, k, scale=scale, **arguments)
        return jax_na.na_av(jax.nn.softmax(scores, -1), v, **arguments)

    return run


class Cell(NamedTuple):
    """Shardings of the query, and of key and value; key/value heads; collectives that the backward pass may use."""

    query: P
    token: P
    kv_heads: int
    backward: frozenset[str] = frozenset()


BATCH, HEADS = P("x"), P(None, None, None, "x")
SUMS, TRAVEL = frozenset({"all-reduce"}), frozenset({"all-reduce", "all-gather", "reduce-scatter"})
CELLS = {
    "batch": Cell(BATCH, BATCH, 8),
    "heads": Cell(HEADS, HEADS, 8),
    "gqa": Cell(HEADS, HEADS, 4),
    "mqa": Cell(HEADS, P(), 1, SUMS),
}
# Each device takes its part of key and value; their gradients travel. (In a shard_map over the axis such blocks do not fit.)
WHOLE = {"batch-whole-kv": Cell(BATCH, P(), 8, TRAVEL), "heads-whole-kv": Cell(HEADS, P(), 8, TRAVEL)}

over_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
over_functions = pytest.mark.parametrize("function", [attention, pair])


@functools.cache
def problem(function, kv_heads):
    """Operands and cotangent; the function of a case, and what one GPU computes."""
    case = Case("2d", (20, 21), 5, batch=8, heads=8, kv_heads=kv_heads, dim=64)
    given = case.inputs(jnp.bfloat16)[:3], case.cotangents(jnp.bfloat16)[0]
    run = function(case)
    return given, run, on_one(run, given)


def on_one(run, given):
    return values_and_gradients(run)(*jax.device_put(given, jax.devices("gpu")[0]))


def check(run, given, wanted, mesh, cell, forward=frozenset()):
    """``run`` under the shardings of a cell: its numbers, and no collective but those allowed."""
    q, kv = NamedSharding(mesh, cell.query), NamedSharding(mesh, cell.token)
    (inputs, cotangent), run = given, values_and_gradients(run)
    placed = tuple(map(jax.device_put, inputs, (q, kv, kv))), jax.device_put(cotangent, q)
    with jax.set_mesh(mesh):
        compiled = run.lower(*placed).compile()
        agree(compiled(*placed), wanted)
        assert collectives(compiled) <= cell.backward | forward, collectives(compiled)
        first = collectives(jax.jit(lambda *given: run(*given)[0]).lower(*placed).compile())
        assert first <= forward, first


@over_kinds
@over_functions
@pytest.mark.parametrize("cell", [*CELLS.values(), *WHOLE.values()], ids=[*CELLS, *WHOLE])
def test_batch_and_heads_need_no_collective(function, kind, cell):
    given, run, wanted = problem(function, cell.kv_heads)
    check(run, given, wanted, mesh_of_all(kind), cell)


@over_kinds
@over_functions
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_inside_shard_map(function, kind, cell):
    given, run, wanted = problem(function, cell.kv_heads)
    mesh = mesh_of_all(kind)
    run = jax.shard_map(run, mesh=mesh, in_specs=(cell.query, cell.token, cell.token), out_specs=cell.query)
    check(run, given, wanted, mesh, cell)


def split_too(spec, axis):
    """``spec`` with a further mesh axis, major to others, on the batch."""
    batch, *rest = spec or (None,)
    return P(axis if batch is None else (axis, batch), *rest)


def check_partly_manual(function, kind, cell, manual, forward=frozenset()):
    """In a shard_map where only ``manual`` is manual: "x", which is split; or "one", of size 1, and "x" is left out."""
    given, run, wanted = problem(function, cell.kv_heads)
    count = len(jax.devices("gpu"))
    mesh = jax.make_mesh((1, count), ("one", "x"), axis_types=(kind,) * 2, devices=jax.devices("gpu"))
    query, token = cell.query, cell.token
    if manual == "one":
        cell = cell._replace(query=split_too(query, "one"), token=split_too(token, "one"))
        query = token = P("one")
    run = jax.shard_map(run, mesh=mesh, in_specs=(query, token, token), out_specs=query, axis_names={manual})
    check(run, given, wanted, mesh, cell, forward)


@over_kinds
@over_functions
@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_partially_manual_shard_map_over_the_split_axis(function, kind, cell):
    check_partly_manual(function, kind, cell, "x")


@over_kinds
@over_functions
@pytest.mark.parametrize("cell", [*CELLS.values(), *WHOLE.values()], ids=[*CELLS, *WHOLE])
def test_partially_manual_shard_map_beside_the_split_axis(function, kind, cell):
    # No axis name that a sum over the heads' devices could use: they are gathered.
    gathers = TRAVEL if cell.kv_heads == 1 else frozenset()
    check_partly_manual(function, kind, cell, "one", forward=gathers)


@over_kinds
@over_functions
@pytest.mark.parametrize("kv_heads", [8, 4, 1])
def test_vmap_of_a_split_axis(function, kind, kv_heads):
    """The mapped axis is split, and the heads of each example are not folded into it."""
    given, run, wanted = problem(function, kv_heads)
    given, wanted = jax.tree.map(lambda a: a[:, None], (given, wanted))
    run = jax.vmap(run, spmd_axis_name="x" if kind == AxisType.Auto else None)
    check(run, given, wanted, mesh_of_all(kind), Cell(BATCH, BATCH, kv_heads))


@over_kinds
@over_functions
def test_vmap_of_a_split_query_beside_whole_key_and_value(function, kind):
    ((query, key, value), cotangent), run, _ = problem(function, 8)
    given = (query[:, None], key[:1], value[:1]), cotangent[:, None]
    run = functools.partial(jax.vmap, run, (0, None, None))
    wanted = on_one(run(), given)
    run = run(spmd_axis_name="x" if kind == AxisType.Auto else None)
    check(run, given, wanted, mesh_of_all(kind), Cell(BATCH, P(), 8, SUMS))


@pytest.mark.parametrize(
    ("case", "partition"),
    [
        (Case("1d", (512,), 33, dim=64), P(None, "x")),
        (Case("1d-causal", (512,), 40, is_causal=True, dim=128), P(None, "x")),
        (Case("1d-uneven", (509,), 15, stride=5, dilation=3, dim=64), P(None, "x")),
        (Case("2d-dilated", (24, 64), 7, dilation=(1, 4), dim=64), P(None, None, "x")),
        (Case("2d-multi-hop", (16, 20), (15, 5), dim=32), P(None, "x")),
        (Case("3d", (8, 12, 16), (3, 5, 7), stride=(1, 2, 3), is_causal=(True, False, False), dim=64), P(None, "x")),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_spatial_sharding(case, partition):
    mesh = mesh_of_all()
    inputs = case.inputs(jnp.bfloat16)[:3]
    cotangent = case.cotangents(jnp.bfloat16)[0]
    whole = values_and_gradients(functools.partial(jax_na.neighborhood_attention, **case.arguments()))
    split = values_and_gradients(
        functools.partial(jax_na.sharded_neighborhood_attention, mesh=mesh, partition=partition, **case.arguments())
    )
    on_one = jax.device_put((inputs, cotangent), jax.devices("gpu")[0])
    on_all = jax.device_put((inputs, cotangent), NamedSharding(mesh, P()))
    agree(split(*on_all), whole(*on_one))
    if all(n % len(jax.devices("gpu")) == 0 for n in case.spatial):
        placed = jax.device_put((inputs, cotangent), NamedSharding(mesh, partition))
        assert collectives(split.lower(*placed).compile()) == {"collective-permute"}
