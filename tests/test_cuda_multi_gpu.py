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


def mesh_of_all():
    return jax.make_mesh((len(jax.devices("gpu")),), ("x",), axis_types=(AxisType.Auto,), devices=jax.devices("gpu"))


def values_and_gradients(function):
    def run(inputs, cotangent):
        out, vjp = jax.vjp(lambda inputs: function(*inputs), inputs)
        return out, vjp(cotangent)[0]

    return jax.jit(run)


def agree(actual, wanted):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize("spec", [P("x"), P(None, None, None, "x")], ids=["batch", "heads"])
def test_batch_and_heads_need_no_collective(spec):
    case = Case("2d", (20, 21), 5, batch=8, heads=8, kv_heads=8, dim=64)
    inputs = case.inputs(jnp.bfloat16)[:3]
    cotangent = case.cotangents(jnp.bfloat16)[0]
    run = values_and_gradients(functools.partial(jax_na.neighborhood_attention, **case.arguments()))
    sharding = NamedSharding(mesh_of_all(), spec)
    placed = jax.device_put((inputs, cotangent), sharding)
    compiled = run.lower(*placed).compile()
    assert not collectives(compiled)
    agree(compiled(*placed), run(*jax.device_put((inputs, cotangent), jax.devices("gpu")[0])))


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
