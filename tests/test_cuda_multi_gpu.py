"""What needs two GPUs or more."""

import functools

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


BATCH, HEADS = P("x"), P(None, None, None, "x")
CELLS = {  # sharding of the query, of key and value; key/value heads; collectives of the backward pass
    "batch": (BATCH, BATCH, 8, set()),
    "heads": (HEADS, HEADS, 8, set()),
    "gqa": (HEADS, HEADS, 4, set()),
    "mqa": (HEADS, P(), 1, {"all-reduce"}),
}


@functools.cache
def cell(function, kv_heads):
    """Operands and cotangent; the function of a case, and what one GPU computes."""
    case = Case("2d", (20, 21), 5, batch=8, heads=8, kv_heads=kv_heads, dim=64)
    given = case.inputs(jnp.bfloat16)[:3], case.cotangents(jnp.bfloat16)[0]
    run = function(case)
    return given, run, values_and_gradients(run)(*jax.device_put(given, jax.devices("gpu")[0]))


def check(run, given, wanted, mesh, query, token, allowed):
    """``run`` under the shardings: its numbers, and no collective but those ``allowed`` in the backward pass."""
    q, kv = NamedSharding(mesh, query), NamedSharding(mesh, token)
    (inputs, cotangent), run = given, values_and_gradients(run)
    placed = tuple(map(jax.device_put, inputs, (q, kv, kv))), jax.device_put(cotangent, q)
    with jax.set_mesh(mesh):
        compiled = run.lower(*placed).compile()
        agree(compiled(*placed), wanted)
        assert collectives(compiled) <= allowed, collectives(compiled)
        assert not collectives(jax.jit(lambda *given: run(*given)[0]).lower(*placed).compile())


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit, AxisType.Manual], ids=["auto", "explicit", "manual"])
@pytest.mark.parametrize("function", [attention, pair])
def test_batch_and_heads_need_no_collective(function, kind, name):
    query, token, kv_heads, allowed = CELLS[name]
    given, run, wanted = cell(function, kv_heads)
    mesh = mesh_of_all(AxisType.Auto if kind == AxisType.Manual else kind)
    if kind == AxisType.Manual:
        run = jax.shard_map(run, mesh=mesh, in_specs=(query, token, token), out_specs=query)
    check(run, given, wanted, mesh, query, token, allowed)


@pytest.mark.parametrize("manual", ["x", "one"], ids=["split-axis-manual", "split-axis-auto"])
@pytest.mark.parametrize("function", [attention, pair])
def test_partially_manual_shard_map(function, manual):
    given, run, wanted = cell(function, 8)
    count = len(jax.devices("gpu"))
    mesh = jax.make_mesh((count, 1), ("x", "one"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices("gpu"))
    spec = P(manual)
    run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, axis_names={manual})
    check(run, given, wanted, mesh, BATCH, BATCH, set())


@pytest.mark.parametrize("function", [attention, pair])
def test_vmap_with_spmd_axis_name(function):
    """The mapped axis is split, and the heads of each example are not folded into it."""
    given, run, wanted = cell(function, 8)
    given, wanted = jax.tree.map(lambda a: a[:, None], (given, wanted))
    check(jax.vmap(run, spmd_axis_name="x"), given, wanted, mesh_of_all(), BATCH, BATCH, set())


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
