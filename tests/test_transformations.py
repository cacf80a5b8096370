"""Neighborhood attention under every transformation of JAX: batching, differentiation, remat, export, platforms, modes."""

import functools
import itertools
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.test_util import check_grads

import jax_na

pytestmark = pytest.mark.usefixtures("quick_compilation")
PLATFORMS = ("cpu", "cuda", "tpu", "rocm")
attend = functools.partial(jax_na.neighborhood_attention, window_size=3)
reference = functools.partial(attend, implementation="reference")
on_cuda = functools.partial(attend, implementation="cuda")
with_weights = functools.partial(attend, return_weights=True)


def pair(query, key, value, is_causal=False):
    """The same through the unfused pair."""
    weights = jax.nn.softmax(jax_na.na_qk(query, key, 3, is_causal=is_causal), -1)
    return jax_na.na_av(weights, value, 3, is_causal=is_causal)


CALLS = {"attention": attend, "pair": pair, "weights": with_weights}
over_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
over_unfused = pytest.mark.parametrize("call", [pair, with_weights], ids=["pair", "weights"])


@functools.lru_cache
def operands(*lead: int, length: int = 6, heads: int = 2, dim: int = 4, count: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=(*lead, length, heads, dim)).astype(np.float32) for _ in range(count))


def total(function, *given):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(*given)))


def gradient(function):
    return jax.grad(functools.partial(total, function), (0, 1, 2))


def close(actual, wanted, tolerance=2e-5):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=tolerance, atol=tolerance), actual, wanted)


def lowered(function, platform, *given) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on a machine without the CUDA lane, XLA serves CUDA and says so
        return jax.jit(function).trace(*given).lower(lowering_platforms=(platform,)).as_text()


# --- vmap ------------------------------------------------------------------------------------------------------------


def with_bias(query, key, value, bias, extra_key, extra_value):
    return reference(query, key, value, bias=bias, additional_keys=extra_key, additional_values=extra_value)


@functools.lru_cache
def all_operands(*lead: int):
    rng = np.random.default_rng(1)
    bias = rng.normal(size=(*lead, 2, 5)).astype(np.float32)
    return (*operands(*lead, 2), bias, *operands(*lead, 2, length=3, count=2, seed=2))


def values_and_gradients(*given):
    return with_bias(*given), jax.grad(lambda *given: total(with_bias, *given), range(6))(*given)


one_at_a_time = jax.jit(values_and_gradients)


@pytest.mark.parametrize("mapped", [m for m in itertools.product([0, None], repeat=4) if any(a == 0 for a in m)])
def test_vmap_of_any_subset(mapped):
    """Of query, (key, value), bias, additional tokens: values and gradients equal a loop."""
    q, kv, b, e = mapped
    axes = (q, kv, kv, b, e, e)
    stacked = all_operands(3)
    given = [x if axis == 0 else x[0] for x, axis in zip(stacked, axes, strict=True)]

    actual = jax.jit(jax.vmap(values_and_gradients, axes))(*given)
    looped = [one_at_a_time(*(x[i] if axis == 0 else x for x, axis in zip(given, axes, strict=True))) for i in range(3)]
    close(actual, jax.tree.map(lambda *x: jnp.stack(x), *looped))


def test_vmap_nested_and_of_other_axes():
    """Inside out over different axes and subsets: one primitive, more leading dimensions, no loop."""
    q, k, v = operands(2, 3, 1)
    function = jax.vmap(jax.vmap(attend, (0, None, 0), out_axes=1), (3, 2, 0), out_axes=2)
    given = (jnp.moveaxis(q, 0, 3), jnp.moveaxis(k[:, 0], 0, 2), v)
    wanted = jnp.stack([jnp.stack([attend(q[i, j], k[i, 0], v[i, j]) for j in range(3)]) for i in range(2)])
    close(jnp.transpose(jax.jit(function)(*given), (2, 1, 0, 3, 4, 5)), wanted)
    jaxpr = str(jax.make_jaxpr(function)(*given))
    assert jaxpr.count("na_forward[") == 1 and "scan" not in jaxpr and "while" not in jaxpr


def test_vmap_of_a_bias_twice_and_of_its_gradient():
    q, k, v, bias, *_ = all_operands(2, 3)

    def gradient_of_bias(q, k, v, bias):
        return jax.grad(lambda bias: jnp.sum(jnp.sin(attend(q, k, v, bias=bias))))(bias)

    actual = jax.jit(jax.vmap(jax.vmap(gradient_of_bias)))(q, k, v, bias)
    run = jax.jit(gradient_of_bias)
    wanted = [[run(q[i, j], k[i, j], v[i, j], bias[i, j]) for j in range(3)] for i in range(2)]
    close(actual, jnp.array(wanted))


@over_unfused
def test_vmap_of_the_unfused_calls(call):
    """Nested, over different axes and subsets, and of gradients: equal to a loop."""
    q, k, v = operands(2, 3, 1)

    def both(*given):
        return call(*given), gradient(call)(*given)

    actual = jax.jit(jax.vmap(jax.vmap(both, (0, None, 0)), (3, 2, 0)))(
        jnp.moveaxis(q, 0, 3), jnp.moveaxis(k[:, 0], 0, 2), v
    )
    run = jax.jit(both)
    looped = [[run(q[i, j], k[i, 0], v[i, j]) for j in range(3)] for i in range(2)]
    close(actual, jax.tree.map(lambda *x: jnp.stack(x).reshape(2, 3, *x[0].shape), *itertools.chain(*looped)))


# --- differentiation ---------------------------------------------------------------------------------------------------


def test_gradients_in_both_modes_to_second_order():
    with jax.enable_x64(True):
        given = tuple(x.astype(np.float64) for x in operands(1))
        check_grads(jax.jit(attend), given, order=2, modes=("fwd", "rev"), eps=1e-4)


def test_jacobians_linearize_and_transpose():
    given = operands(1, length=4)
    tangents = operands(1, length=4, seed=5)
    close(jax.jit(jax.jacrev(attend))(*given), jax.jit(jax.jacfwd(reference))(*given))
    out, linear = jax.linearize(attend, *given)
    close((out, linear(*tangents)), jax.jvp(reference, given, tangents))
    close(jax.linear_transpose(linear, *given)(out), jax.vjp(reference, *given)[1](out))


def test_hessian_vector_products():
    """Forward over reverse, reverse over forward, reverse over reverse."""
    given, direction = operands(1), operands(1, seed=7)

    def products(function):
        grad = gradient(function)

        def directional(*given):
            return jax.jvp(functools.partial(total, function), given, direction)[1]

        def inner(*given):
            return sum(jnp.vdot(a, b) for a, b in zip(grad(*given), direction, strict=True))

        return (
            lambda *given: jax.jvp(grad, given, direction)[1],
            jax.grad(directional, (0, 1, 2)),
            jax.grad(inner, (0, 1, 2)),
        )

    wanted = jax.jit(products(reference)[0])(*given)
    for product in products(attend):
        close(jax.jit(product)(*given), wanted)
    mapped = jax.jit(jax.vmap(products(attend)[0]))(*(x[None] for x in given))
    close(jax.tree.map(lambda x: x[0], mapped), wanted)


def test_gradient_of_only_some_operands_and_of_lse():
    q, k, v = operands(1)

    def loss(function, k):
        out, lse = function(q, k, v, return_lse=True)
        return jnp.sum(out * lse[..., None])

    close(jax.grad(functools.partial(loss, attend))(k), jax.grad(functools.partial(loss, reference))(k))


def test_remat_runs_the_forward_kernel_once():
    """Under the shipped policy out and lse are saved; without it the forward pass runs again."""
    given = [jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.float16)] * 3

    def kernels(policy):
        block = jax.checkpoint(lambda *given: jnp.tanh(on_cuda(*(2 * x for x in given))), policy=policy)
        text = lowered(gradient(block), "cuda", *given)
        return [len(re.findall(f"custom_call @jax_na_{name}", text)) for name in ("forward", "backward")]

    assert kernels(jax_na.save_attention_residuals) == [1, 1]
    assert kernels(jax.checkpoint_policies.nothing_saveable) == [2, 1]
    assert set(jax_na.RESIDUAL_NAMES) == {"jax_na_out", "jax_na_lse"}


def test_remat_numbers():
    given = operands(1)
    block = jax.checkpoint(attend, policy=jax_na.save_attention_residuals)
    close(jax.jit(gradient(block))(*given), gradient(attend)(*given))
    # Composes with other policies.
    both = jax.checkpoint_policies.save_from_both_policies(
        jax_na.save_attention_residuals, jax.checkpoint_policies.dots_saveable
    )
    close(jax.jit(gradient(jax.checkpoint(attend, policy=both)))(*given), gradient(attend)(*given))


@over_unfused
def test_forward_mode_of_the_unfused_calls(call):
    """jvp, linearize and its transpose, against the attention of the definition (of the weights: against finite differences)."""
    given, tangents = operands(1), operands(1, seed=5)

    def out(function):
        return lambda *given: jax.tree.leaves(function(*given))[0]

    close(jax.jit(functools.partial(jax.jvp, out(call)))(given, tangents), jax.jvp(reference, given, tangents))
    values, linear = jax.linearize(out(call), *given)
    close(jax.linear_transpose(linear, *given)(values), jax.vjp(reference, *given)[1](values))
    check_grads(jax.jit(call), given, order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


def test_inside_scan_and_cond():
    q, k, v = operands(1)

    def layers(q, k, v):
        def body(x, _):
            return jax.lax.cond(jnp.sum(x) > 1e6, lambda x: x, lambda x: attend(x, k, v), x), None

        return jax.lax.scan(body, q, length=3)[0]

    def unrolled(q, k, v):
        for _ in range(3):
            q = attend(q, k, v)
        return q

    close(jax.jit(gradient(layers))(q, k, v), jax.jit(gradient(unrolled))(q, k, v))


# --- what cannot be done says so ---------------------------------------------------------------------------------------


def test_traced_static_arguments_raise_one_sentence():
    given = operands(1)
    with pytest.raises(TypeError, match="scale must be a Python number"):
        jax.jit(lambda scale: attend(*given, scale=scale))(0.5)
    with pytest.raises(TypeError, match="scale must be a Python number"):
        jax.grad(lambda scale: jnp.sum(attend(*given, scale=scale)))(0.5)
    with pytest.raises(TypeError, match="window_size must be an integer"):
        jax.vmap(lambda window: jax_na.neighborhood_attention(*given, window))(jnp.arange(1, 3))


def test_a_symbolic_spatial_axis_raises_one_sentence():
    (length,) = export.symbolic_shape("n")
    shape = jax.ShapeDtypeStruct((1, length, 2, 4), jnp.float32)
    with pytest.raises(TypeError, match="spatial axis 0 of query has the symbolic length n"):
        export.export(jax.jit(attend))(shape, shape, shape)


def test_a_mapped_halo_raises_one_sentence():
    from jax_na import _primitives
    from jax_na._spec import Inputs, Spec

    spec = Spec((3,), (1,), (1,), (False,), 1.0, sharded=True)
    inputs = Inputs(*operands(1))
    with pytest.raises(NotImplementedError, match="halo operand .* cannot be vmapped"):
        jax.vmap(lambda halo: _primitives.forward(spec, inputs, halo)[0])(jnp.zeros((2, 1, 3), jnp.int32))


# --- platforms, export, compilation --------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
def test_lowers_for_every_platform(platform):
    given = [jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.bfloat16)] * 3

    def pair(q, k, v):
        return jax_na.na_av(jax.nn.softmax(jax_na.na_qk(q, k, 3), -1), v, 3)

    for function in (attend, gradient(attend), lambda *given: jax.jvp(attend, given, given), pair, gradient(pair)):
        assert "custom_call @jax_na" not in lowered(function, platform, *given) or platform == "cuda"
    assert "custom_call @jax_na_backward" in lowered(gradient(on_cuda), "cuda", *given)


def test_export_serialize_reload_run_and_differentiate():
    given = operands(1)
    for function in (attend, gradient(attend)):
        exported = export.export(jax.jit(function), platforms=["cpu"])(*given)
        reloaded = export.deserialize(exported.serialize(vjp_order=1))
        close(reloaded.call(*given), function(*given))
    reloaded = export.deserialize(export.export(jax.jit(attend))(*given).serialize(vjp_order=2))
    close(jax.jit(gradient(reloaded.call))(*given), gradient(attend)(*given))

    def squared(function, *given):
        return sum(jnp.sum(g**2) for g in gradient(function)(*given))

    close(jax.grad(functools.partial(squared, reloaded.call))(*given), jax.grad(functools.partial(squared, attend))(*given))


@over_unfused
def test_export_of_the_unfused_calls(call):
    given = operands(1)
    reloaded = export.deserialize(export.export(jax.jit(call))(*given).serialize(vjp_order=1))
    close(jax.jit(reloaded.call)(*given), call(*given))
    close(jax.jit(gradient(reloaded.call))(*given), jax.jit(gradient(call))(*given))


def test_export_for_cuda_needs_the_shipped_safety_checks():
    given = [jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.float16)] * 3
    with pytest.raises(ValueError, match="jax_na_forward"):
        export.export(jax.jit(on_cuda), platforms=["cuda"])(*given)
    make = functools.partial(export.export, disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)
    exported = make(jax.jit(on_cuda), platforms=["cuda"])(*given)
    reloaded = export.deserialize(exported.serialize(vjp_order=1))
    assert reloaded.platforms == ("cuda",)
    assert "jax_na_backward" in reloaded.vjp().mlir_module()
    with pytest.raises(ValueError, match="platform"):
        jax.jit(reloaded.call)(*(x.astype(np.float16) for x in operands(1, length=32, dim=32)))


def test_one_export_for_every_platform():
    given = operands(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = export.export(jax.jit(attend), platforms=PLATFORMS, disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)(*given)
    close(export.deserialize(exported.serialize()).call(*given), attend(*given))


@pytest.mark.parametrize("lead", ["b", "n, b"])
def test_export_with_a_symbolic_batch(lead):
    q, k, v = operands(5) if lead == "b" else operands(3, 5)
    bias = np.random.default_rng(3).normal(size=(2, 5)).astype(np.float32)
    token = jax.ShapeDtypeStruct(export.symbolic_shape(f"{lead}, 6, 2, 4"), jnp.float32)

    def values_and_gradients(q, k, v, bias):
        call = functools.partial(attend, return_lse=True)
        function = lambda q, k, v: call(q, k, v, bias=bias)[0]  # noqa: E731
        function = function if lead == "b" else jax.vmap(function)
        return function(q, k, v), jax.grad(lambda q, bias: jnp.sum(jnp.sin(function(q, k, v))), (0, 1))(q, bias)

    exported = export.export(jax.jit(values_and_gradients))(token, token, token, bias)
    close(export.deserialize(exported.serialize()).call(q, k, v, bias), values_and_gradients(q, k, v, bias))


@pytest.mark.parametrize("implementation", ["cuda", "cuda_hopper", "cuda_fused", "cuda_naive"])
def test_symbolic_batch_on_cuda(implementation):
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 32, 2, 32"), jnp.bfloat16)
    make = functools.partial(export.export, platforms=["cuda"], disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)
    named = functools.partial(attend, implementation=implementation)
    assert "jax_na_backward" in make(jax.jit(gradient(named)))(shape, shape, shape).mlir_module()


def test_symbolic_batch_on_cuda_with_additional_keys():
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("b, 32, 2, 32"), jnp.bfloat16)
    make = functools.partial(export.export, platforms=["cuda"], disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)

    def call(q, k, v):
        return on_cuda(q, k, v, additional_keys=k[:, :3], additional_values=v[:, :3])

    assert "jax_na_backward" in make(jax.jit(gradient(call)))(shape, shape, shape).mlir_module()


def test_ahead_of_time_compilation():
    given = operands(1)
    compiled = jax.jit(gradient(attend)).lower(*given).compile()
    close(compiled(*given), gradient(attend)(*given))


CACHED = """
import sys
import jax, numpy as np, jax.monitoring
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
import jax_na
x = np.ones((1, 8, 2, 4), np.float32)
jax.jit(jax.grad(lambda x: jax_na.neighborhood_attention(x, x, x, 3).sum())).lower(x).compile()
print("hits", sum(e.endswith("compilation_cache/cache_hits") for e in events))
"""


def test_the_persistent_compilation_cache_hits_in_a_second_process(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    runs = [subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout for _ in range(2)]
    assert runs == ["hits 0\n", "hits 1\n"]


# --- modes of JAX ----------------------------------------------------------------------------------------------------


@over_calls
@pytest.mark.parametrize("mode", ["debug_nans", "debug_infs", "disable_jit", "enable_checks", "numpy_rank_promotion"])
def test_debugging_modes(mode, call):
    given = operands(1)
    wanted = gradient(call)(*given)
    context = {
        "debug_nans": lambda: jax.debug_nans(True),
        "debug_infs": lambda: jax.debug_infs(True),
        "disable_jit": jax.disable_jit,
        "enable_checks": lambda: jax.enable_checks(True),
        "numpy_rank_promotion": lambda: jax.numpy_rank_promotion("raise"),
    }[mode]
    with context():
        close(gradient(call)(*given), wanted)
        close(jax.jit(lambda *given: jax.jvp(call, given, given)[0])(*given), call(*given))


@pytest.mark.parametrize("call", [attend, pair], ids=["attention", "pair"])
def test_debug_nans_with_a_causal_mask(call):
    """The scores outside the mask are -inf: neither values nor gradients make a NaN of them."""
    given = operands(1)
    causal = functools.partial(call, is_causal=True)
    wanted = gradient(functools.partial(reference, is_causal=True))(*given)
    with jax.debug_nans(True):
        close(gradient(causal)(*given), wanted)
    if call is pair:
        with jax.debug_infs(True), pytest.raises(FloatingPointError):  # they are infinite, and that mode says so
            causal(*given)


@over_calls
@pytest.mark.parametrize("poisoned", range(3), ids=["query", "key", "value"])
def test_debug_nans_finds_the_call_that_made_one(poisoned, call):
    given = list(operands(1))
    given[poisoned] = np.full_like(given[poisoned], np.nan)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        call(*given)


@over_calls
def test_x64_mode_keeps_dtypes(call):
    with jax.enable_x64(True):
        for dtype in (np.float64, np.float32, jnp.bfloat16):
            given = tuple(x.astype(dtype) for x in operands(1))
            values, grads = jax.jit(lambda *given: (call(*given), gradient(call)(*given)))(*given)
            assert all(x.dtype == dtype for x in jax.tree.leaves((values, grads)))
            if call is not pair:
                lse = jax.eval_shape(functools.partial(call, return_lse=True), *given)[1]
                assert lse.dtype == (np.float64 if dtype == np.float64 else np.float32)
        given = tuple(x.astype(np.float64) for x in operands(1))
        close(call(*given), jax.jit(call)(*given), 1e-12)
        close(jax.tree.leaves(call(*given))[0], reference(*given), 1e-12)


@over_calls
def test_donated_operands(call):
    q, k, v = (jnp.asarray(x) for x in operands(1))
    wanted = jax.tree.map(np.asarray, call(q, k, v))
    close(jax.jit(call, donate_argnums=0)(q, k, v), wanted)
    assert q.is_deleted()


@over_calls
def test_eval_shape_and_weak_types(call):
    q, k, v = operands(1)
    shapes = jax.eval_shape(lambda *given: (call(*given), gradient(call)(*given)), q, k, v)
    values = [q.shape, (*q.shape[:-1], 3)][: 2 if call is with_weights else 1]
    assert [x.shape for x in jax.tree.leaves(shapes)] == [*values, q.shape, k.shape, v.shape]
    weak = jax.lax.broadcast_in_dim(jnp.asarray(1.0), q.shape, ())
    assert weak.weak_type
    for given in ((weak, k, v), (q, weak, v), (q, k, weak), (weak, weak, weak)):
        assert all(not x.weak_type and x.dtype == np.float32 for x in jax.tree.leaves(jax.eval_shape(call, *given)))
    wanted = gradient(call)(np.ones_like(q), k, v)
    close(gradient(call)(weak, k, v), wanted)


def test_eval_shape_of_lse():
    q, k, v = operands(1)
    out, lse = jax.eval_shape(functools.partial(attend, return_lse=True), q, k, v)
    assert (out.shape, lse.shape) == (q.shape, q.shape[:-1])


@over_calls
@pytest.mark.parametrize("lead", [(0,), (0, 1), (2, 0)])
def test_zero_size_batch(lead, call):
    given = operands(*lead)
    function = call if len(lead) == 1 else jax.vmap(call)
    rows = given[0].shape
    values = [rows, (*rows[:-1], 3)][: 2 if call is with_weights else 1]

    def shapes(run):
        return [x.shape for x in jax.tree.leaves(jax.jit(run)(*given))]

    assert shapes(function) == values
    assert shapes(gradient(function)) == [rows] * 3
    assert shapes(lambda *given: jax.jvp(function, given, given)) == 2 * values


@pytest.mark.parametrize("implementation", ["reference", "xla_unfused"])
@pytest.mark.parametrize("lead", [(0,), (0, 1)])
def test_zero_size_batch_of_other_implementations(lead, implementation):
    given = (*operands(*lead), *operands(*lead, length=2, count=2))

    def call(query, key, value, extra_key, extra_value):
        extra = {"additional_keys": extra_key, "additional_values": extra_value}
        return attend(query, key, value, implementation=implementation, return_lse=True, **extra)

    function = call if len(lead) == 1 else jax.vmap(call)
    grads = jax.grad(lambda *given: total(function, *given), range(5))
    assert [x.shape for x in function(*given)] == [given[0].shape, given[0].shape[:-1]]
    assert [x.shape for x in grads(*given)] == [x.shape for x in given]
    assert [x.shape for x in jax.jvp(grads, given, given)[1]] == [x.shape for x in given]
