"""The blocked XLA implementation: what the suite over all implementations does not reach.

Forced tile shapes (so that small problems take many steps), shards with a halo, forward mode, second derivatives, vmap,
values that are not finite, and memory.
"""

import contextlib
import dataclasses
import functools
import itertools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

import jax_na
from jax_na import _definition, _tiles, _xla
from jax_na._spec import Inputs
from jax_na._window import window_bounds
from jax_na.testing.cases import CASES, Case, random_case
from jax_na.testing.numerics import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")
BY_NAME = {case.name: case for case in CASES}
TOLERANCE = 2e-5


@contextlib.contextmanager
def tiling(tile, chunk=(1, 1, 1)):
    """Force the tile shape and chunk of every plan."""
    with mock.patch.object(_tiles, "choose_tile", return_value=(tile, chunk)):
        yield


def everything(spec, inputs, cotangents, tangents, halo, forward, backward, tangent):
    out, lse = forward(spec, inputs, halo)
    grads = backward(spec, inputs, out, lse, *cotangents, halo)
    return {"out": out, "lse": lse, **grads._asdict()}, tangent(spec, tangents, inputs, out, lse, halo)


def definition_tangent(spec, tangents, inputs, out, lse, halo):
    return jax.jvp(lambda x: _definition.attention(spec, x, halo), (inputs,), (tangents,))[1]


def compare(spec, inputs, halo=None, lead=None):
    """Values, gradients and tangents against the definition."""
    halo = spec.identity_halo(inputs.query) if halo is None else np.asarray(halo, np.int32)
    rng = np.random.default_rng(7)
    shape = inputs.query.shape[:-1]
    cotangents = [rng.standard_normal(s, np.float32) for s in ((*shape, inputs.value.shape[-1]), shape)]
    tangents = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(x.dtype), inputs)
    run = jax.jit(everything, static_argnums=(0, 5, 6, 7))
    blocked = run(spec, inputs, cotangents, tangents, halo, _xla.forward, _xla.backward, _xla.tangent)
    truth = run(spec, inputs, cotangents, tangents, halo, _definition.forward, _definition.backward, definition_tangent)
    errors = {}
    for name, value in blocked[0].items():
        if value is not None:
            errors[name] = relative_error(value, truth[0][name])
    sees = np.isfinite(truth[0]["lse"])  # the definition's tangents are NaN where a query sees nothing
    for name, value, expected in zip(("t_out", "t_lse"), blocked[1], truth[1], strict=True):
        where = sees if name == "t_lse" else sees[..., None]
        assert np.all(np.isfinite(value))
        errors[name] = relative_error(np.where(where, value, 0), np.where(where, expected, 0))
    assert all(error < TOLERANCE for error in errors.values()), errors


@pytest.mark.parametrize(
    ("case", "tile", "chunk"),
    [
        (Case("odd", (23,), 5, batch=2, dim=8), (4,), (1, 2, 2)),
        (Case("even", (24,), 6, dim=8), (5,), (1, 1, 1)),
        (Case("stride-dilation", (23,), 4, 3, 3, batch=2, heads=4, dim=8, dim_v=6), (2,), (3, 1, 2)),
        (Case("causal-stride-dilation", (31,), 4, 3, 3, True, batch=2, dim=8, extra=3), (3,), (3, 1, 1)),
        (Case("blocked", (29,), 7, 7, heads=4, kv_heads=1, dim=8), (7,), (1, 1, 1)),
        (Case("groups-in-chunks", (26,), 3, 2, 6, heads=1, kv_heads=1, dim=8), (2,), (2, 1, 1)),
        (
            Case("2d", (13, 17), (5, 7), (1, 2), (2, 1), batch=2, heads=4, dim=8, dim_v=6, bias=True, extra=3),
            (2, 4),
            (2, 2, 1),
        ),
        (Case("2d-causal", (13, 11), (5, 3), (1, 2), (2, 3), (True, False), batch=2, dim=8, bias=True), (2, 1), (3, 1, 2)),
        (Case("2d-even-gqa", (9, 12), (4, 6), heads=6, kv_heads=2, dim=8), (4, 4), (1, 1, 1)),
        (
            Case("3d", (5, 7, 6), (3, 5, 3), (3, 2, 1), (1, 1, 2), (True, False, False), dim=8, bias=True),
            (2, 4, 1),
            (1, 1, 2),
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else None,
)
def test_forced_tiles(case, tile, chunk):
    """Many steps, partial tiles, boxes clamped at both edges, several dilation groups in one step."""
    with tiling(tile, chunk):
        assert _tiles.make_plan(case.spec(), case.inputs(np.float32)).chunk == chunk
        compare(case.spec(), case.inputs(np.float32))


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("is_causal", [False, True])
def test_box_holds_every_window(stride, is_causal):
    """The static box length is enough for every tile of every axis, and not too much without a stride."""
    for window, tile, length in itertools.product((5, 6), (1, 2, 3, 4, 6), (6, 7, 11, 24)):
        start, end = window_bounds(np.arange(length), length, window, stride, is_causal, np)
        spans = [end[i : i + tile].max() - start[i : i + tile].min() for i in range(0, length, tile)]
        box = _tiles.box_length(tile, window, stride, is_causal)
        assert max(spans) <= box
        if stride == 1:
            assert box == tile + window - 1


def shards(case, parts):
    """Split the first axis in ``parts``, with all the keys a shard's queries may see; yields (queries, keys, halo)."""
    spec = case.spec()
    length = case.spatial[0]
    size = -(-length // parts)
    reach = spec.dilation[0] * (spec.window[0] + spec.stride[0])
    for begin in range(0, length, size):
        # Near an edge windows slide inwards, so a shard there needs a whole window beyond its end.
        first, last = max(begin - reach, 0), min(begin + size + reach, length)
        halo = spec.identity_halo(np.zeros(case.shapes()["query"]))
        halo[0] = begin, first, length
        yield slice(begin, min(begin + size, length)), slice(first, last), halo


@pytest.mark.parametrize(
    ("case", "tile"),
    [
        (Case("1d", (41,), 7, batch=2, dim=8), (4,)),
        (Case("1d-stride-dilation", (53,), 4, 3, 3, dim=8, bias=False), (2,)),
        (Case("2d-causal-bias", (21, 9), (5, 3), (2, 1), (2, 1), (True, False), dim=8, bias=True, extra=2), (2, 4)),
    ],
    ids=lambda x: x.name if isinstance(x, Case) else None,
)
def test_shards_with_halo(case, tile):
    """Each shard matches the definition with the same halo, and bit by bit the rows of the unsharded call."""
    inputs = case.inputs(np.float32)
    spec = dataclasses.replace(case.spec(), sharded=True)
    with tiling(tile, (1, 1, 1)):
        forward = jax.jit(functools.partial(_xla.forward, spec))
        whole = jax.jit(functools.partial(_xla.forward, case.spec()))(inputs, None)
        for queries, keys, halo in shards(case, 3):
            local = inputs._replace(query=inputs.query[:, queries], key=inputs.key[:, keys], value=inputs.value[:, keys])
            for actual, expected in zip(forward(local, halo), whole, strict=True):
                np.testing.assert_array_equal(actual, expected[:, queries])
        compare(spec, local, halo)


def test_keys_missing_from_a_shard():
    """Queries whose keys lie elsewhere get zero, lse -inf and zero gradients; offsets need not fit the windows."""
    case = Case("part", (40,), 5, dilation=2, dim=8, bias=True)
    spec, inputs = dataclasses.replace(case.spec(), sharded=True), case.inputs(np.float32)
    local = inputs._replace(query=inputs.query[:, 3:35], key=inputs.key[:, 11:19], value=inputs.value[:, 11:19])
    halo = np.array([[3, 11, 40]], np.int32)
    with tiling((4,)):
        compare(spec, local, halo)
        out, lse = _xla.forward(spec, local, halo)
    empty = np.isneginf(lse)
    assert empty.any()
    assert not empty.all()
    assert not np.asarray(out)[empty].any()


def test_queries_beyond_the_axis():
    """Padding tokens of the last of uneven shards disturb nobody."""
    case = Case("uneven", (30,), 5, stride=2, dim=8)
    spec, inputs = dataclasses.replace(case.spec(), sharded=True), case.inputs(np.float32)
    padded = inputs._replace(
        **{n: np.pad(getattr(inputs, n)[:, 16:], [(0, 0), (0, 2), (0, 0), (0, 0)]) for n in ("query", "key", "value")}
    )
    with tiling((4,)):
        compare(spec, padded, [[16, 16, 30]])


def test_halo_from_mesh_position():
    """Inside shard_map, with a traced halo that varies over the mesh, forward and backward."""
    case = Case("mesh", (32,), 5, stride=2, dim=8, extra=2)
    inputs, spec = case.inputs(np.float32), dataclasses.replace(case.spec(), sharded=True)
    mesh = jax.make_mesh((4,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    grad_out, grad_lse = case.cotangents(np.float32)

    def local(query, inputs, grad_out, grad_lse):
        halo = jnp.stack([jax.lax.axis_index("x") * 8, 0, 32]).astype(jnp.int32)[None]
        inputs = jax.tree.map(lambda x: jax.lax.pcast(x, ("x",), to="varying"), inputs)._replace(query=query)
        with tiling((2,), (1, 1, 2)):
            out, lse = _xla.forward(spec, inputs, halo)
            grads = _xla.backward(spec, inputs, out, lse, grad_out, grad_lse, halo)
        return out, lse, grads.query, jax.lax.psum(grads.key, "x"), jax.lax.psum(grads.extra_value, "x")

    split, whole = P(None, "x"), P()
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(split, whole, split, split), out_specs=(split, split, split, whole, whole)
    )
    actual = jax.jit(run)(inputs.query, inputs, grad_out, grad_lse)
    halo = case.spec().identity_halo(inputs.query)
    out, lse = _definition.forward(case.spec(), inputs, halo)
    grads = _definition.backward(case.spec(), inputs, out, lse, grad_out, grad_lse, halo)
    expected = (out, lse, grads.query, grads.key, grads.extra_value)
    for one, other in zip(actual, expected, strict=True):
        assert relative_error(one, other) < TOLERANCE


def attend(case, implementation, inputs, return_lse=True):
    return jax_na.neighborhood_attention(
        *inputs[:3],
        bias=inputs.bias,
        additional_keys=inputs.extra_key,
        additional_values=inputs.extra_value,
        return_lse=return_lse,
        implementation=implementation,
        **case.arguments(),
    )


@pytest.mark.parametrize("name", ["1d-extra", "2d-extra-bias"])
def test_second_derivatives(name):
    """Hessian-vector products, forward over reverse, of a loss that depends on out and lse."""
    case = dataclasses.replace(BY_NAME[name], dim=8)
    inputs = case.inputs(np.float32)
    tangents = case.inputs(np.float32, seed=5)

    def product(implementation):
        def loss(inputs):
            out, lse = attend(case, implementation, inputs)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))

        return jax.jit(lambda x, t: jax.jvp(jax.grad(loss), (x,), (t,))[1])(inputs, tangents)

    for actual, expected in zip(jax.tree.leaves(product("xla")), jax.tree.leaves(product("reference")), strict=True):
        assert relative_error(actual, expected) < 5 * TOLERANCE


@pytest.mark.parametrize("mapped", ["query", "key value", "bias", "query key value bias"])
def test_vmap(mapped):
    """vmap of values and gradients over some operands equals a loop."""
    case = Case("vmap", (6, 7), (3, 5), batch=2, heads=2, kv_heads=1, dim=8, bias=True)
    inputs = case.inputs(np.float32)
    axes = Inputs(*(0 if n in mapped.split() else None for n in Inputs._fields[:4]))
    stacked = [case.inputs(np.float32, seed=s) for s in range(3)]
    given_inputs = Inputs(
        *(
            None if x is None else np.stack([getattr(s, n) for s in stacked]) if n in mapped.split() else x
            for n, x in inputs._asdict().items()
        )
    )
    grad_out, grad_lse = case.cotangents(np.float32)

    def run(implementation, inputs):
        values, vjp = jax.vjp(lambda x: attend(case, implementation, x), inputs)
        return values, vjp((grad_out, grad_lse))

    blocked = jax.jit(jax.vmap(functools.partial(run, "xla"), (axes,)))(given_inputs)
    truth = jax.jit(jax.vmap(functools.partial(run, "reference"), (axes,)))(given_inputs)
    for actual, expected in zip(jax.tree.leaves(blocked), jax.tree.leaves(truth), strict=True):
        assert relative_error(actual, expected) < TOLERANCE


def test_hvp_under_vmap():
    case = Case("hvp", (9,), 3, dim=4, heads=1, kv_heads=1)
    inputs = case.inputs(np.float32)
    directions = jax.tree.map(lambda x: np.stack([x, 2 * x, x[::-1]]), case.inputs(np.float32, seed=3))

    def loss(implementation, inputs):
        return jnp.sum(jnp.sin(attend(case, implementation, inputs)[0]))

    def products(implementation):
        grad = jax.grad(functools.partial(loss, implementation))
        return jax.jit(jax.vmap(lambda t: jax.jvp(grad, (inputs,), (t,))[1]))(directions)

    with tiling((4,)):
        blocked = products("xla")
    for actual, expected in zip(jax.tree.leaves(blocked), jax.tree.leaves(products("reference")), strict=True):
        assert relative_error(actual, expected) < 5 * TOLERANCE


@pytest.mark.parametrize("operand", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_stay_in_their_windows(operand, bad):
    """A token that is not finite reaches exactly the tokens related to it, though others share its tile and box."""
    case = Case("nan", (7, 8), (3, 3), dim=8)
    spec, inputs = case.spec(), case.inputs(np.float32)
    grad_out, grad_lse = case.cotangents(np.float32)
    halo, spot = spec.identity_halo(inputs.query), (0, 3, 4, 1, 2)  # head 1

    @jax.jit
    def run(inputs, grad_out):
        with tiling((4, 4), (1, 1, 2)):
            out, lse = _xla.forward(spec, inputs, halo)
            grads = _xla.backward(spec, inputs, out, lse, grad_out, grad_lse, halo)
        return out, grads

    clean_out, clean = run(inputs, grad_out)
    if operand == "grad_out":
        grad_out = grad_out.copy()
        grad_out[spot] = bad
    else:
        array = getattr(inputs, operand).copy()
        array[spot] = bad
        inputs = inputs._replace(**{operand: array})
    out, grads = run(inputs, grad_out)

    seen = np.asarray(_definition.mask(spec, (7, 8), (7, 8), halo))  # [query, key]
    touched = np.zeros((7, 8), bool)
    touched[3, 4] = True
    queries = touched if operand in ("query", "grad_out") else np.tensordot(seen, touched, ((2, 3), (0, 1))) > 0
    keys = np.tensordot(queries, seen, 2) > 0
    heads = np.array([False, True])
    for actual, expected, where in (
        (out, clean_out, queries & (operand != "grad_out")),
        (grads.query, clean.query, queries),
        (grads.key, clean.key, keys),
        (grads.value, clean.value, keys),
    ):
        where = where[None, :, :, None] & heads
        np.testing.assert_allclose(np.asarray(actual)[~where], np.asarray(expected)[~where], rtol=1e-5, atol=1e-5)
        if np.isnan(bad):  # an infinite key may also just get no weight
            assert not np.isfinite(np.asarray(actual)[where]).all(-1).any()


def test_nothing_of_size_tokens_squared():
    """Gradient, tangent, Hessian-vector product: twice the tokens, twice the memory, far below one score per pair."""
    attend = functools.partial(jax_na.neighborhood_attention, window_size=63, implementation="xla")

    def bytes_of(tokens):
        x = jax.ShapeDtypeStruct((1, tokens, 2, 16), jnp.float32)

        def every(q, k, v, g):
            given, tangents = (q, k, v), (g, g, g)
            _, vjp = jax.vjp(attend, *given)
            grad = jax.grad(lambda *given: jnp.sum(jnp.sin(attend(*given))), (0, 1, 2))
            return vjp(g), jax.jvp(attend, given, tangents), jax.jvp(grad, given, tangents)

        memory = jax.jit(every).lower(x, x, x, x).compile().memory_analysis()
        return memory.temp_size_in_bytes + memory.output_size_in_bytes

    small, large = bytes_of(16384), bytes_of(32768)
    assert large < 2.2 * small
    assert large < 32768**2 * 4 / 20


def test_empty_operands():
    case = Case("empty", (8,), 3, dim=8)
    inputs = Inputs(*(x[:0] for x in case.inputs(np.float32)[:3]))
    out, vjp = jax.vjp(lambda x: attend(case, "xla", x, False), inputs)
    assert out.shape == (0, 8, 2, 8)
    assert jax.tree.map(jnp.shape, vjp(out)[0]) == jax.tree.map(jnp.shape, inputs)
    no_extra = case.inputs(np.float32)._replace(
        extra_key=np.zeros((1, 0, 2, 8), np.float32), extra_value=np.zeros((1, 0, 2, 8), np.float32)
    )
    compare(case.spec(), no_extra)


@settings(max_examples=12, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**20), st.integers(0, 3))
def test_random_problems(seed, shrink):
    """Random problems with random forced tiles, against the definition."""
    case = dataclasses.replace(random_case(seed, max_tokens=150), dim=8, dim_v=6)
    rng = np.random.default_rng(seed)
    groups = [-(-length // d) for length, d in zip(case.spatial, case.spec().dilation, strict=True)]
    tile = tuple(int(rng.integers(1, max(2, n >> shrink) + 1)) for n in groups)
    totals = (int(np.prod(case.spec().dilation)), case.batch, case.kv_heads)
    chunk = tuple(int(rng.choice([d for d in range(1, n + 1) if n % d == 0])) for n in totals)
    with tiling(tile, chunk):
        compare(case.spec(), case.inputs(np.float32))
