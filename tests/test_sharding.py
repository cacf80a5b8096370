"""Batch and heads split over a mesh: every cell is checked for the collectives in HLO and for its numbers."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_na
from jax_na._sharding import plan
from jax_na._spec import Inputs
from jax_na.testing.compiled import COLLECTIVES, QUICK, collectives

pytestmark = pytest.mark.usefixtures("quick_compilation")
HEADS, DIM = 8, 4
SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 3, 5)}
WINDOW = {1: (3,), 2: (3, 3), 3: (3, 1, 3)}


def make_mesh(kind: AxisType, shape=(2, 4), names=("x", "y")):
    return jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))


@functools.lru_cache
def make_inputs(rank: int = 2, kv_heads: int = HEADS, bias: bool = False, extra: int = 0, batch: int = 4) -> Inputs:
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    spatial = SPATIAL[rank]
    return Inputs(
        normal(batch, *spatial, HEADS, DIM),
        normal(batch, *spatial, kv_heads, DIM),
        normal(batch, *spatial, kv_heads, DIM + 1),
        normal(HEADS, *(2 * k - 1 for k in WINDOW[rank])) if bias else None,
        normal(batch, extra, kv_heads, DIM) if extra else None,
        normal(batch, extra, kv_heads, DIM + 1) if extra else None,
    )


def attend(inputs: Inputs):
    return jax_na.neighborhood_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        WINDOW[inputs.query.ndim - 3],
        bias=inputs.bias,
        additional_keys=inputs.extra_key,
        additional_values=inputs.extra_value,
        return_lse=True,
    )


def total(values):
    out, lse = values
    return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse))


def loss(inputs: Inputs):
    return total(attend(inputs))


def pair(inputs: Inputs):
    """The unfused pair: every one of the three products is in its forward or backward pass."""
    rank = inputs.query.ndim - 3
    window, causal = WINDOW[rank], (False,) * (rank - 1) + (True,)
    scores = jax_na.na_qk(inputs.query, inputs.key, window, is_causal=causal, bias=inputs.bias)
    return jax_na.na_av(jax.nn.softmax(scores, -1), inputs.value, window, is_causal=causal)


def passes(function, prefix: str = ""):
    """The three passes of ``attend``, or with the prefix "pair-" those of ``pair``, or of what wraps one of them."""
    total_of = total if not prefix else lambda out: jnp.sum(jnp.sin(out))
    return {
        f"{prefix}forward": function,
        f"{prefix}backward": jax.grad(lambda inputs: total_of(function(inputs))),
        f"{prefix}tangent": lambda inputs: jax.jvp(function, (inputs,), (jax.tree.map(jnp.sin, inputs),)),
    }


PASSES = passes(attend) | passes(pair, "pair-")


def wrapped(name, wrap):
    """Pass ``name`` of ``wrap(attend)`` or ``wrap(pair)``."""
    prefix, function = ("pair-", pair) if is_pair(name) else ("", attend)
    return passes(wrap(function), prefix)[name]


def is_pair(name: str) -> bool:
    return name.startswith("pair-")


@functools.lru_cache
def expected(name: str, **arguments):
    return jax.jit(PASSES[name], compiler_options=QUICK)(make_inputs(**arguments))


def place(inputs: Inputs, mesh, batch, heads, kv_heads=..., spatial=None, bias_heads=...) -> Inputs:
    """Put the operands on ``mesh`` with the given axes on batch, heads and the first spatial axis."""
    kv_heads = heads if kv_heads is ... else kv_heads
    rest = (None,) * (inputs.query.ndim - 4)
    token = P(batch, spatial, *rest, kv_heads, None)
    specs = Inputs(
        P(batch, spatial, *rest, heads, None),
        token,
        token,
        P(heads if bias_heads is ... else bias_heads),
        P(batch, None, kv_heads, None),
        P(batch, None, kv_heads, None),
    )
    return Inputs(
        *(None if a is None else jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(inputs, specs, strict=True))
    )


def close(actual, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5), actual, wanted)


def run(function, inputs, wanted, allowed=frozenset()):
    compiled = jax.jit(function).lower(inputs).compile(QUICK)
    result = compiled(inputs)
    close(result, wanted)
    assert collectives(compiled) <= set(allowed), collectives(compiled)
    return result


over_passes = pytest.mark.parametrize("name", ["forward", "backward", "tangent"])
over_all_passes = pytest.mark.parametrize("name", PASSES)
over_kinds = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])


def in_mesh(mesh):
    return jax.set_mesh(mesh)


CELLS = {
    "batch": ("x", None, {"rank": 1}),
    "heads": (None, "y", {"rank": 2}),
    "both": ("x", "y", {"rank": 3}),
    "gqa": ("y", "x", {"kv_heads": 2}),
    "two-axes-one-dim": (None, ("x", "y"), {}),
    "extra": ("x", "y", {"kv_heads": 4, "extra": 3}),
}
PAIR_CELLS = {
    "both": ("x", "y", {}),
    "batch": ("y", None, {"rank": 1}),
    "two-axes-one-dim": (None, ("x", "y"), {"rank": 1}),
    "gqa": ("x", "y", {"rank": 1, "kv_heads": 4}),
    "gqa-few-heads": ("y", "x", {"rank": 1, "kv_heads": 2}),
}


@over_kinds
@pytest.mark.parametrize(
    ("batch", "heads", "arguments", "name"),
    [
        pytest.param(*cell, name, id=f"{cell_id}-{name}")
        for name in PASSES
        for cell_id, cell in (PAIR_CELLS if is_pair(name) else CELLS).items()
    ],
)
def test_batch_and_heads_need_no_collective(kind, name, batch, heads, arguments):
    mesh = make_mesh(kind)
    with in_mesh(mesh):
        inputs = place(make_inputs(**arguments), mesh, batch, heads)
        result = run(PASSES[name], inputs, expected(name, **arguments))
    ndim = inputs.query.ndim
    want = NamedSharding(mesh, P(batch, *(None,) * (ndim - 3), heads, None))
    full = [leaf for leaf in jax.tree.leaves(result) if leaf.ndim == ndim]
    assert full and all(leaf.sharding.is_equivalent_to(want, ndim) for leaf in full)


@over_passes
def test_auto_without_a_mesh_in_context(name):
    inputs = place(make_inputs(), make_mesh(AxisType.Auto), "x", "y")
    run(PASSES[name], inputs, expected(name))


@over_kinds
@over_all_passes
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_replicated_key_value_heads(kind, name, kv_heads):
    """More devices than key/value heads: key and value are replicated, only their gradients are summed."""
    mesh = make_mesh(kind)
    arguments = {"kv_heads": kv_heads, **({"rank": 1} if is_pair(name) else {"extra": 2})}
    allowed = {"backward": {"all-reduce", "all-gather"}, "pair-backward": {"all-reduce"}}
    with in_mesh(mesh):
        inputs = place(make_inputs(**arguments), mesh, "x", "y", kv_heads=None)
        run(PASSES[name], inputs, expected(name, **arguments), allowed.get(name, ()))


@over_kinds
@pytest.mark.parametrize(("name", "batch"), [(name, b) for name in PASSES for b in (None, "x") if b or not is_pair(name)])
def test_bias(kind, name, batch):
    """Bias is sharded like the heads; its gradient is summed over the batch axes."""
    mesh = make_mesh(kind)
    arguments = {"bias": True, "rank": 1 if is_pair(name) else 2}
    with in_mesh(mesh):
        inputs = place(make_inputs(**arguments), mesh, batch, "y")
        run(PASSES[name], inputs, expected(name, **arguments), {"all-reduce"} if "backward" in name and batch else ())


@over_kinds
@over_all_passes
def test_replicated_key_value(kind, name):
    """Key and value replicated, query sharded: each device takes its part, and only gradients travel."""
    mesh = make_mesh(kind)
    arguments = {"rank": 1 if is_pair(name) else 2}
    given = make_inputs(**arguments)
    allowed = {"all-gather", "all-reduce", "reduce-scatter"} if "backward" in name else ()
    with in_mesh(mesh):
        sharded, whole = place(given, mesh, "x", "y"), place(given, mesh, None, None)
        run(PASSES[name], whole._replace(query=sharded.query), expected(name, **arguments), allowed)


@over_kinds
@pytest.mark.parametrize("name", ["forward", "backward", "tangent", "pair-forward"])
def test_spatial_sharding_gathers_and_warns(kind, name):
    mesh = make_mesh(kind)
    with in_mesh(mesh):
        inputs = place(make_inputs(), mesh, "y", None, spatial="x")
        with pytest.warns(UserWarning, match="sharded_neighborhood_attention"):
            compiled = jax.jit(PASSES[name]).lower(inputs).compile(QUICK)
        close(compiled(inputs), expected(name))
        assert "all-gather" in collectives(compiled)


def test_spatial_and_feature_sharding_of_one_operand_gathers():
    mesh = make_mesh(AxisType.Auto)
    inputs = place(make_inputs(), mesh, None, None)
    inputs = inputs._replace(
        key=jax.device_put(inputs.key, NamedSharding(mesh, P(None, "x", None, "y"))),
        query=jax.device_put(inputs.query, NamedSharding(mesh, P(None, None, None, None, "y"))),
    )
    with pytest.warns(UserWarning, match="spatial"):
        close(jax.jit(attend)(inputs), expected("forward"))


@over_passes
def test_conflicting_shardings_follow_the_query(name):
    mesh = make_mesh(AxisType.Auto)
    given = make_inputs()
    first, second = place(given, mesh, "x", "y"), place(given, mesh, "y", "x")
    inputs = first._replace(key=second.key)
    run(PASSES[name], inputs, expected(name), COLLECTIVES)


@pytest.mark.parametrize(("check_vma", "kv_heads"), [(True, HEADS), (False, HEADS), (True, 4), (True, 1)])
@over_all_passes
def test_inside_shard_map(name, check_vma, kv_heads):
    """All axes manual; key/value heads as many as query heads, fewer, and one that every device of the heads has."""
    mesh = make_mesh(AxisType.Auto)
    arguments = {"kv_heads": kv_heads, "rank": 1 if is_pair(name) else 2}
    inputs = place(make_inputs(**arguments), mesh, "x", "y", kv_heads="y" if kv_heads > 1 else None)
    row = P("x", *(None,) * (inputs.query.ndim - 3), "y")
    specs = Inputs(row, *[row if kv_heads > 1 else P("x")] * 2)
    out_specs = row if is_pair(name) else (row, row)

    def mapped(function):
        return jax.shard_map(function, mesh=mesh, in_specs=(specs,), out_specs=out_specs, check_vma=check_vma)

    allowed = {"all-reduce"} if "backward" in name and kv_heads == 1 else ()
    run(wrapped(name, mapped), inputs, expected(name, **arguments), allowed)


def test_gradient_inside_shard_map_of_replicated_operands():
    """Inside shard_map, with bias and key/value that do not vary over the mesh: their gradients are summed."""
    mesh = make_mesh(AxisType.Auto)
    given = make_inputs(bias=True)
    given = given._replace(key=given.key[:1], value=given.value[:1])

    def broadcast(inputs):
        batch = inputs.query.shape[0]
        return inputs._replace(
            key=jnp.broadcast_to(inputs.key, (batch, *inputs.key.shape[1:])),
            value=jnp.broadcast_to(inputs.value, (batch, *inputs.value.shape[1:])),
        )

    def gradient(inputs):
        return jax.grad(lambda inputs: loss(broadcast(inputs)))(inputs)

    spec, none = P("x"), P()
    specs = Inputs(spec, none, none, none)
    run(jax.shard_map(gradient, mesh=mesh, in_specs=(specs,), out_specs=specs), given, gradient(given), {"all-reduce"})


def gathers_at_the_border(kind) -> set[str]:
    """Before 0.11, JAX gathers Explicit axes at the border of a partially manual shard_map, whatever it holds."""
    return {"all-gather"} if kind == AxisType.Explicit and jax.__version_info__ < (0, 11) else set()


@over_kinds
@over_all_passes
@pytest.mark.parametrize(("manual", "kv_heads"), [("x", HEADS), ("y", HEADS), ("x", 4)])
def test_partially_manual_shard_map(name, kind, manual, kv_heads):
    """The batch axis is manual, the heads axis is left to the partitioner or Explicit; and the other way round."""
    mesh = make_mesh(kind)
    arguments = {"batch": 8, "kv_heads": kv_heads, "rank": 1 if is_pair(name) else 2}
    with in_mesh(mesh):
        inputs = place(make_inputs(**arguments), mesh, manual, {"x": "y", "y": "x"}[manual])
        spec = P(manual)
        out_specs = spec if is_pair(name) else (spec, spec)

        def mapped(function):
            return jax.shard_map(
                function, mesh=mesh, in_specs=(Inputs(spec, spec, spec),), out_specs=out_specs, axis_names={manual}
            )

        run(wrapped(name, mapped), inputs, expected(name, **arguments), gathers_at_the_border(kind))


@over_kinds
@pytest.mark.parametrize("name", ["forward", "backward", "pair-forward", "pair-backward"])
@pytest.mark.parametrize("kv_heads", [HEADS, 1])
def test_partially_manual_shard_map_with_whole_key_and_value(name, kind, kv_heads):
    """Each device takes its part of key and value, and their gradients travel. Those of one head are a sum over devices that
    the partitioner cannot name there: the heads are gathered."""
    mesh = make_mesh(kind)
    arguments = {"rank": 1, "kv_heads": kv_heads}
    with in_mesh(mesh):
        inputs = place(make_inputs(**arguments), mesh, "x", "y", kv_heads=None)
        specs = Inputs(P("x"), P("x"), P("x"))
        out_specs = P("x") if is_pair(name) else (P("x"), P("x"))
        mapped = functools.partial(jax.shard_map, mesh=mesh, in_specs=(specs,), out_specs=out_specs, axis_names={"x"})
        allowed = {"all-gather", "all-reduce", "reduce-scatter"}
        if kv_heads == HEADS and not name.endswith("backward"):
            allowed = gathers_at_the_border(kind)
        run(wrapped(name, mapped), inputs, expected(name, **arguments), allowed)


def mapped_over_x(function, kind, in_axes=0):
    return jax.vmap(function, in_axes, spmd_axis_name="x" if kind == AxisType.Auto else None)


@over_kinds
@over_all_passes
@pytest.mark.parametrize("kv_heads", [HEADS, 4, 1])
def test_vmap_of_a_sharded_axis(kind, name, kv_heads):
    """A mapped axis that is sharded stays sharded: it is not folded into the batch. Heads are sharded too."""
    mesh = make_mesh(kind)
    arguments = {"kv_heads": kv_heads, "rank": 1 if is_pair(name) else 2}
    wanted = jax.tree.map(lambda a: a[:, None], expected(name, **arguments))
    with in_mesh(mesh):
        split = jax.tree.map(
            lambda a: jax.device_put(
                a[:, None], NamedSharding(mesh, P("x", *(None,) * (a.ndim - 2), "y" if a.shape[-2] > 1 else None))
            ),
            make_inputs(**arguments),
        )
        sums = "backward" in name and kv_heads == 1  # the gradients of key and value, over the devices of the heads
        run(mapped_over_x(PASSES[name], kind), split, wanted, {"all-reduce", "all-gather"} if sums else ())


@over_kinds
@pytest.mark.parametrize("function", [attend, pair])
def test_vmap_of_a_sharded_query_beside_key_and_value_for_all(kind, function):
    """Key and value that are not mapped, and on every device: their gradients are summed, nothing else travels."""
    mesh = make_mesh(kind)
    given = make_inputs(rank=1)
    given = given._replace(query=given.query[:, None], key=given.key[:1], value=given.value[:1])
    in_axes = (Inputs(0, None, None),)
    wanted = jax.jit(jax.vmap(function, in_axes), compiler_options=QUICK)(given)
    sums = lambda values: sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(values))  # noqa: E731
    gradient = lambda function: jax.grad(lambda inputs: sums(function(inputs)))  # noqa: E731
    wanted_gradient = jax.jit(gradient(jax.vmap(function, in_axes)), compiler_options=QUICK)(given)
    with in_mesh(mesh):
        query, whole = NamedSharding(mesh, P("x", None, None, "y")), NamedSharding(mesh, P(None, None, "y"))
        inputs = Inputs(*map(jax.device_put, given[:3], (query, whole, whole)))
        mapped = mapped_over_x(function, kind, in_axes)
        run(mapped, inputs, wanted)
        run(gradient(mapped), inputs, wanted_gradient, {"all-reduce"})


def test_vmap_with_spmd_axis_name_over_shard_map():
    mesh = make_mesh(AxisType.Auto)
    given = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), make_inputs(batch=4))
    spec = P(None, None, None, "y", None)
    specs = Inputs(spec, spec, spec)
    mapped = jax.shard_map(attend, mesh=mesh, in_specs=(specs,), out_specs=(spec, P(None, None, None, "y")))
    inputs = jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P("x", None, None, None, "y"))), given)
    compiled = jax.jit(jax.vmap(mapped, spmd_axis_name="x")).lower(inputs).compile(QUICK)
    close(jax.tree.map(lambda a: a.reshape(4, *a.shape[2:]), compiled(inputs)), expected("forward", batch=4))
    assert not collectives(compiled)


def test_eager_call_on_sharded_arrays():
    inputs = place(make_inputs(), make_mesh(AxisType.Auto), "x", "y")
    out, lse = attend(inputs)
    close((out, lse), expected("forward"))
    assert out.sharding.is_equivalent_to(inputs.query.sharding, 5)


def test_sharding_propagates_through_a_layer():
    """Shardings of weights reach the call, and the outputs keep them: the Shardy rule works in both directions."""
    mesh = make_mesh(AxisType.Auto)
    x = np.random.default_rng(0).normal(size=(4, 6, 5, 16)).astype(np.float32)
    w = np.random.default_rng(1).normal(size=(3, 16, HEADS, DIM)).astype(np.float32)

    def layer(x, w):
        return jax_na.neighborhood_attention(*jnp.einsum("bxyc,nchd->nbxyhd", x, w), 3)

    a, b = (jax.device_put(v, NamedSharding(mesh, s)) for v, s in ((x, P("x")), (w, P(None, None, "y"))))
    compiled = jax.jit(layer).lower(a, b).compile()
    assert not collectives(compiled)
    assert compiled.output_shardings.is_equivalent_to(NamedSharding(mesh, P("x", None, None, "y", None)), 5)
    np.testing.assert_allclose(compiled(a, b), layer(x, w), rtol=1e-5, atol=1e-5)


FACTORS = [("b0", "s0", "h", "d"), ("b0", "t0", "g", "d")]


@pytest.mark.parametrize(
    ("query", "key", "kv_heads", "axes", "slice_kv"),
    [
        (P("x"), P(), 8, {"b0": ("x",)}, False),
        (P(), P("x"), 8, {"b0": ("x",)}, False),
        (P(None, None, "y"), P(), 4, {"h": ("y",), "g": ("y",)}, False),
        (P(None, None, "y"), P(), 1, {"h": ("y",)}, True),
        (P(None, None, ("x", "y")), P(), 4, {"h": ("x", "y")}, True),
        (P(None, None, "y"), P(), 3, {}, False),
        (P(None, None, None, "y"), P(), 8, {}, False),
        (P("y", None, "y"), P(None, None, "x"), 8, {"b0": ("y",), "h": ("x",), "g": ("x",)}, False),
    ],
)
def test_plan(query, key, kv_heads, axes, slice_kv):
    shapes = [(4, 9, 24, 4), (4, 9, kv_heads, 4)]
    result = plan({"x": 2, "y": 4}, FACTORS, shapes, [query, key])
    assert (result.axes, result.slice_kv) == (axes, slice_kv)


# --- the unfused pair ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("manual", [{"x", "y"}, {"x"}, {"y"}], ids=["manual", "x-manual", "y-manual"])
def test_pair_inside_shard_map_without_types_of_what_varies(manual):
    """``check_vma=False``: fully manual; and one axis manual, the other left to the partitioner."""
    mesh = make_mesh(AxisType.Auto)
    inputs = place(
        make_inputs(rank=1, batch=8), mesh, *(("x", "y") if len(manual) == 2 else (*manual, *({"x", "y"} - manual)))
    )
    spec = P("x", None, "y") if len(manual) == 2 else P(*manual)
    specs = Inputs(spec, spec, spec)
    mapped = jax.shard_map(pair, mesh=mesh, in_specs=(specs,), out_specs=spec, axis_names=manual, check_vma=False)

    def both(inputs):
        return mapped(inputs), passes(mapped, "pair-")["pair-backward"](inputs)

    run(both, inputs, tuple(expected(name, rank=1, batch=8) for name in ("pair-forward", "pair-backward")))


def test_pair_inside_shard_map_with_a_replicated_key():
    """Key and value that do not vary over the mesh: their gradients are summed."""
    mesh = make_mesh(AxisType.Auto)
    given = make_inputs(rank=1)
    specs = Inputs(P(None, None, ("x", "y")), P(), P())

    def few(inputs):
        return pair(inputs._replace(key=inputs.key[:, :, :1], value=inputs.value[:, :, :1]))

    def gradient(inputs):
        return jax.grad(lambda inputs: jnp.sum(jnp.sin(few(inputs))))(inputs)

    run(jax.shard_map(gradient, mesh=mesh, in_specs=(specs,), out_specs=specs), given, gradient(given), {"all-reduce"})


@pytest.mark.parametrize("implementation", ["cuda_gemm", "cuda_naive"])
def test_pair_lowers_for_cuda_in_a_partitioned_call(implementation):
    """The custom calls are inside what the partitioner splits, not operations that it has to gather for."""
    mesh = make_mesh(AxisType.Auto)
    inputs = place(make_inputs(rank=1), mesh, "x", "y")
    function = jax.grad(lambda q, k: jnp.sum(jax_na.na_qk(q, k, 3, implementation=implementation) ** 2), (0, 1))
    text = jax.jit(function).trace(inputs.query, inputs.key).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @CustomSPMDPartitioning") == 3 and "custom_call @jax_na" not in text


def test_an_uneven_batch_is_gathered():
    result = plan({"x": 2, "y": 4}, FACTORS, [(6, 9, 8, 4), (6, 9, 8, 4)], [P("y"), P("y")])
    assert result.axes == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan({"x": 1}, FACTORS, [(6, 9, 8, 4), (6, 9, 8, 4)], [P(None, "x"), P(None, "x")])
