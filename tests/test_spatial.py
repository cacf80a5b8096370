"""Spatial axes split over a mesh: equal to the unsharded call, and nothing but the halo travels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_na
from jax_na._exchange import exchange
from jax_na._spatial import halo_widths
from jax_na._window import visible
from jax_na.testing.compiled import AS_USERS, QUICK, traffic


def make_mesh(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind, kind))


def operands(spatial, heads=2, kv_heads=2, dim=4, dim_v=4, batch=2, bias_window=None, extra=0):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    given = {
        "query": normal(batch, *spatial, heads, dim),
        "key": normal(batch, *spatial, kv_heads, dim),
        "value": normal(batch, *spatial, kv_heads, dim_v),
    }
    if bias_window is not None:
        given["bias"] = normal(heads, *(2 * k - 1 for k in bias_window))
    if extra:
        given["additional_keys"] = normal(batch, extra, kv_heads, dim)
        given["additional_values"] = normal(batch, extra, kv_heads, dim_v)
    return given


def total(values):
    out, lse = values
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def compare(given, mesh, partition, *, exact=True, gradients=True, **arguments):
    """Values bitwise (``exact``), gradients within tolerance; returns the traffic of the forward and backward pass."""
    whole = functools.partial(jax_na.neighborhood_attention, return_lse=True, **arguments)
    split = functools.partial(
        jax_na.sharded_neighborhood_attention, return_lse=True, partition=partition, mesh=mesh, **arguments
    )

    def both(function):
        def run(given):
            values, vjp = jax.vjp(lambda given: function(**given), given)
            return (values, vjp(jax.grad(total)(values))) if gradients else values

        return jax.jit(run, compiler_options=AS_USERS if exact else QUICK)

    with jax.set_mesh(mesh):
        tokens = {"query", "key", "value"}
        fits = all(n % 8 == 0 for n in given["query"].shape[1:-2])
        placed = given
        if fits:
            names = [*partition, *[None] * 5][: given["query"].ndim]
            heads = names[-2] if given["key"].shape[-2] % 4 == 0 else None
            token, short = P(*names[:-2], heads), P(names[0], None, heads)
            specs = {n: token if n in tokens else P(names[-2]) if n == "bias" else short for n in given}
            placed = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in given.items()}
        compiled = both(split).lower(placed).compile()
        actual = compiled(placed)
    wanted = both(whole)(given)
    values = (actual[0], wanted[0]) if gradients else (actual, wanted)
    for a, b in zip(*values, strict=True):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    if gradients:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual[1], wanted[1])
    return traffic(compiled)


@pytest.mark.parametrize(
    ("spatial", "partition", "arguments"),
    [
        ((32,), P(None, "y"), {"window_size": 5}),
        ((32,), P(None, "y"), {"window_size": 31}),
        ((32,), P("x", "y"), {"window_size": 6, "stride": 3, "dilation": 2}),
        ((33,), P(None, ("x", "y")), {"window_size": 8, "stride": 3}),
        ((9,), P(None, ("x", "y")), {"window_size": 3, "dilation": 3}),
        ((30,), P(None, "y"), {"window_size": 7, "is_causal": True}),
        ((13,), P(None, "y"), {"window_size": 5, "stride": 2, "dilation": 2, "is_causal": True}),
        ((8, 16), P(None, "x", "y"), {"window_size": (5, 6), "stride": (2, 6), "is_causal": (False, True)}),
        ((7, 16), P(None, None, "y"), {"window_size": (5, 3), "dilation": (1, 4)}),
        ((8, 3, 8), P(None, "x", None, "y"), {"window_size": (3, 2, 5), "is_causal": (True, False, False)}),
    ],
    ids=[
        "1d",
        "multi-hop",
        "strided-dilated",
        "uneven",
        "empty-shards",
        "causal",
        "causal-uneven",
        "2d",
        "2d-dilated",
        "3d",
    ],
)
def test_equals_the_unsharded_call_bitwise(spatial, partition, arguments):
    moved = compare(operands(spatial), make_mesh(), partition, **arguments)
    assert set(moved) <= {"collective-permute"} or any(n % 8 for n in spatial), moved


@pytest.mark.parametrize(
    ("partition", "arguments"),
    [
        (P("x", "y"), {"bias_window": (3, 5), "extra": 3}),
        (P(None, "x", None, "y"), {"heads": 4, "kv_heads": 4, "dim_v": 3}),
        (P(None, "x", None, "y"), {"heads": 8, "kv_heads": 2, "extra": 2}),
        (P("x", None, "y"), {"heads": 4, "kv_heads": 1}),
    ],
    ids=["bias-and-extra", "heads", "replicated-kv-heads", "mqa"],
)
def test_with_batch_heads_and_other_operands(partition, arguments):
    moved = compare(operands((8, 16), **arguments), make_mesh(), partition, exact=False, window_size=(3, 5))
    assert "all-gather" not in moved and "all-to-all" not in moved, moved


def test_explicit_mesh():
    mesh = make_mesh(AxisType.Explicit)
    moved = compare(operands((16,)), mesh, P("x", "y"), exact=False, window_size=5)
    assert set(moved) == {"collective-permute"}, moved


def test_explicit_mesh_with_lengths_that_do_not_divide():
    """Types cannot say that a length is split unevenly: such an axis comes back whole, the others stay split."""
    mesh = make_mesh(AxisType.Explicit)
    compare(operands((7, 16)), mesh, P(None, "x", "y"), exact=False, window_size=5)
    compare(operands((13,)), mesh, P("x", "y"), exact=False, window_size=5, is_causal=True)
    split = functools.partial(jax_na.sharded_neighborhood_attention, partition=P(None, "x", "y"), mesh=mesh, window_size=5)
    with jax.set_mesh(mesh):
        out, lse = jax.eval_shape(functools.partial(split, return_lse=True), *operands((7, 16)).values())
    assert tuple(out.sharding.spec)[:3] == tuple(lse.sharding.spec)[:3] == (None, None, "y")


@pytest.mark.parametrize(
    ("length", "axes", "window", "stride", "dilation", "causal"),
    [(64, "y", 7, 1, 1, False), (64, "y", 7, 1, 1, True), (64, "y", 8, 4, 2, False), (16, ("x", "y"), 7, 1, 1, False)],
    ids=["plain", "causal", "strided-dilated", "multi-hop"],
)
def test_traffic_is_the_halo(length, axes, window, stride, dilation, causal):
    """Forward: keys and values of the halo. Backward: the exchange of the residuals is reused, its gradients come back."""
    mesh, shards = make_mesh(), 8 if isinstance(axes, tuple) else 4
    arguments = {"window_size": window, "stride": stride, "dilation": dilation, "is_causal": causal}
    block, left, right = halo_widths(length, shards, window, stride, dilation, causal)
    given = operands((length,), batch=1)
    halo = (left + right) * 2 * (4 + 4)  # tokens * heads * (D + Dv)
    if not causal and block >= window:
        assert left + right < window * dilation + stride * dilation
    if causal:
        assert right == 0
    moved = compare(given, mesh, P(None, axes), exact=False, gradients=False, **arguments)
    assert moved == {"collective-permute": halo}
    moved = compare(given, mesh, P(None, axes), exact=False, **arguments)
    assert moved == {"collective-permute": 2 * halo}


def test_halo_widths_hold_every_window():
    """Exhaustive on small axes: all keys of every query, padding included, lie in the tile, and the halo is as small as can be."""
    for length in (5, 8, 13):
        for shards in (2, 3, 4, 8):
            for window in (1, 2, 3, 5):
                for dilation in (1, 2):
                    if window * dilation > length:
                        continue
                    for stride in range(1, window + 1):
                        for causal in (False, True):
                            block, left, right = halo_widths(length, shards, window, stride, dilation, causal)
                            position = np.arange(length)
                            seen = visible(position, position, length, window, stride, dilation, causal, np)
                            key = [np.nonzero(row)[0] for row in seen]
                            needs = [
                                (q // block * block - k.min(), k.max() - (q // block + 1) * block + 1)
                                for q, k in enumerate(key)
                            ]
                            assert left >= max(0, *(a for a, _ in needs)) and right >= max(0, *(b for _, b in needs))
                            if length % shards == 0:
                                assert left == max(0, *(a for a, _ in needs)) and right == max(0, *(b for _, b in needs))


@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (5, 7), (1, 1)])
def test_exchange(left, right):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    block = 2
    x = jnp.arange(1.0, 8 * block + 1)
    spec = P("x")
    extended = jax.jit(
        jax.shard_map(lambda x: exchange(x, 0, ("x",), 8, left, right), mesh=mesh, in_specs=spec, out_specs=spec)
    )(x).reshape(8, -1)
    padded = np.pad(x, (left, right))
    for shard, row in enumerate(extended):
        np.testing.assert_array_equal(row, padded[shard * block : shard * block + left + block + right])


@pytest.mark.parametrize("names", [{"x", "y"}, {"y"}], ids=["manual", "partially-manual"])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_inside_shard_map(kind, names):
    """The operands are blocks; an axis that is not manual stays with the batch. Forward and backward."""
    mesh = make_mesh(kind)
    given = tuple(operands((16,)).values())
    arguments = {"window_size": 5, "stride": 2}
    spec = P("x", "y") if "x" in names else P(None, "y")
    call = functools.partial(jax_na.sharded_neighborhood_attention, partition=spec, **arguments)

    def mapped(q, k, v):
        return jax.shard_map(call, mesh=mesh, in_specs=spec, out_specs=spec, axis_names=names)(q, k, v)

    def both(function):
        def run(*given):
            out, vjp = jax.vjp(function, *given)
            return out, vjp(jnp.cos(out))

        return jax.jit(run, compiler_options=QUICK)

    wanted = both(functools.partial(jax_na.neighborhood_attention, **arguments))(*given)
    with jax.set_mesh(mesh):
        placed = jax.device_put(given, NamedSharding(mesh, P("x", "y")))
        compiled = both(mapped).lower(*placed).compile()
        actual = compiled(*placed)
    close(actual, wanted)
    # Before 0.11, JAX gathers Explicit axes at the border of a partially manual shard_map, whatever it holds.
    gathers = kind == AxisType.Explicit and len(names) == 1 and jax.__version_info__ < (0, 11)
    assert set(traffic(compiled)) == {"collective-permute", "all-gather"} - (set() if gathers else {"all-gather"})


def close(actual, wanted):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5), actual, wanted)


def gradient(function):
    return jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), (0, 1, 2))


@functools.cache
def split_and_whole():
    mesh = make_mesh()
    given = tuple(operands((16,)).values())
    split = functools.partial(jax_na.sharded_neighborhood_attention, partition=P("x", "y"), mesh=mesh, window_size=5)
    return NamedSharding(mesh, P("x", "y")), given, split, functools.partial(jax_na.neighborhood_attention, window_size=5)


def test_vmap():
    _, given, split, whole = split_and_whole()
    mapped = tuple(jnp.stack([a, a + 1]) for a in given)
    close(jax.jit(jax.vmap(split), compiler_options=QUICK)(*mapped), jax.vmap(whole)(*mapped))
    given = (given[0], *mapped[1:])
    mapped = jax.vmap(gradient(split), (None, 1, 1)), jax.vmap(gradient(whole), (None, 1, 1))
    given = (given[0], *(jnp.moveaxis(a, 0, 1) for a in given[1:]))
    close(jax.jit(mapped[0], compiler_options=QUICK)(*given), mapped[1](*given))


TRANSFORMED = {
    "jvp": lambda f: lambda *given: jax.jvp(f, given, tuple(map(jnp.sin, given))),
    "linearize": lambda f: lambda *given: jax.linearize(f, *given)[1](*given),
    "jacrev": lambda f: jax.jacrev(lambda *given: f(*given)[0, :, 0, 0], 1),
    "forward over reverse": lambda f: lambda *given: jax.jvp(gradient(f), given, tuple(map(jnp.cos, given)))[1],
}


@pytest.mark.parametrize("name", TRANSFORMED)
def test_derivatives(name):
    _, given, split, whole = split_and_whole()
    actual, wanted = (jax.jit(TRANSFORMED[name](f), compiler_options=QUICK)(*given) for f in (split, whole))
    close(actual, wanted)


def test_remat():
    """With the shipped policy the forward kernel runs once. The tile of keys is not saved: the halo travels at most once more."""
    where, given, split, whole = split_and_whole()
    saved = jax.checkpoint(split, policy=jax_na.save_attention_residuals)
    placed = jax.device_put(given, where)
    compiled = [jax.jit(gradient(f)).lower(*placed).compile(QUICK) for f in (split, saved)]
    close(compiled[1](*placed), gradient(whole)(*given))
    halo = (2 + 2) * 2 * (4 + 4)
    assert traffic(compiled[0]) == {"collective-permute": 2 * halo}
    again = traffic(compiled[1])  # XLA merges both exchanges where it finds them equal, as with JAX 0.10
    assert again in ({"collective-permute": 2 * halo}, {"collective-permute": 3 * halo}), again
    shapes = [jax.ShapeDtypeStruct((2, 16, 2, 32), jnp.bfloat16)] * 3
    saved = jax.checkpoint(functools.partial(split, implementation="cuda"), policy=jax_na.save_attention_residuals)
    text = jax.jit(gradient(saved)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert [text.count(f"custom_call @jax_na_{name}(") for name in ("forward", "backward")] == [1, 1]


@pytest.mark.parametrize(
    "mode",
    [jax.disable_jit, *(functools.partial(m, v) for m, v in ((jax.debug_nans, True), (jax.numpy_rank_promotion, "raise")))],
    ids=["disable_jit", "debug_nans", "numpy_rank_promotion"],
)
def test_debugging_modes(mode):
    _, given, split, whole = split_and_whole()
    wanted = gradient(whole)(*given)
    with mode():
        close(gradient(split)(*given), wanted)


def test_shapes_dtypes_and_donation():
    where, given, split, whole = split_and_whole()
    out, lse = jax.eval_shape(functools.partial(split, return_lse=True), *given)
    assert (out.shape, lse.shape) == (given[0].shape, given[0].shape[:-1])
    weak = jax.lax.broadcast_in_dim(jnp.asarray(1.0), given[0].shape, ())
    assert not split(weak, *given[1:]).weak_type
    with jax.enable_x64(True):
        for dtype in (np.float64, np.float32):
            cast = tuple(a.astype(dtype) for a in given)
            assert [a.dtype for a in jax.tree.leaves((split(*cast), gradient(split)(*cast)))] == [dtype] * 4
    query, key, value = jax.device_put(given, where)
    close(jax.jit(split, donate_argnums=0)(query, key, value), whole(*given))
    assert query.is_deleted()


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_zero_size_batch(kind):
    mesh = make_mesh(kind)
    with jax.set_mesh(mesh):
        empty = [jax.device_put(np.zeros((0, 16, 2, 4), np.float32), NamedSharding(mesh, P("x", "y")))] * 3
        split = functools.partial(jax_na.sharded_neighborhood_attention, partition=P("x", "y"), window_size=5)
        for run in (split, gradient(split), lambda *given: jax.jvp(split, given, given)):
            assert all(a.shape == empty[0].shape for a in jax.tree.leaves(jax.jit(run)(*empty)))


def test_export_for_several_devices():
    """The exchange is part of the exported program; a call on an Auto mesh is left to XLA's partitioner, and is right."""
    mesh = make_mesh()
    given = tuple(operands((16,)).values())
    whole = functools.partial(jax_na.neighborhood_attention, window_size=5)
    split = functools.partial(jax_na.sharded_neighborhood_attention, partition=P(None, "y"), mesh=mesh, window_size=5)
    for function in (whole, split):
        placed = tuple(jax.device_put(a, NamedSharding(mesh, P(None, "y"))) for a in given)
        exported = jax.export.deserialize(jax.export.export(jax.jit(function))(*placed).serialize())
        assert exported.nr_devices == 8
        np.testing.assert_allclose(jax.jit(exported.call)(*placed), whole(*given), rtol=1e-6, atol=1e-6)


def test_the_definition_agrees():
    """The same through implementation="reference": the halo operand means the same to every implementation."""
    compare(operands((7, 8)), make_mesh(), P(None, None, "y"), exact=False, window_size=3, implementation="reference")


def test_errors():
    mesh = make_mesh()
    given = operands((16,), heads=6, kv_heads=3)

    def call(partition, mesh=mesh, **arguments):
        return jax_na.sharded_neighborhood_attention(**given, window_size=3, partition=partition, mesh=mesh, **arguments)

    with pytest.raises(ValueError, match="needs a mesh"):
        call(P(None, "x"), mesh=None)
    with pytest.raises(TypeError, match="mesh must be a jax.sharding.Mesh, got 'x'"):
        call(P(None, "x"), mesh="x")
    for partition in (None, NamedSharding(mesh, P(None, "x"))):
        with pytest.raises(TypeError, match="partition must be a jax.sharding.PartitionSpec, got "):
            call(partition)
    with pytest.raises(ValueError, match="head dimension"):
        call(P(None, None, None, "x"))
    with pytest.raises(ValueError, match="names 'z', but the mesh has axes x, y"):
        call(P(None, "z"))
    with pytest.raises(ValueError, match="twice"):
        call(P("x", "x"))
    with pytest.raises(ValueError, match="has 5 entries"):
        call(P(None, None, None, None, "x"))
    with pytest.raises(ValueError, match="batch 2 is not a multiple of the 4 devices"):
        call(P("y"))
    with pytest.raises(ValueError, match="6 query heads and 3 key/value heads cannot be split over the 2 devices"):
        call(P(None, None, "x"))
    with pytest.raises(ValueError, match="window_size=17"):
        jax_na.sharded_neighborhood_attention(**given, window_size=17, partition=P(None, "x"), mesh=mesh)
