"""The unfused pair: na_qk, na_av, the weights of neighborhood_attention; every implementation against enumerated windows."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_na
from jax_na import _backends, _unfused
from jax_na._spec import Inputs
from jax_na.testing.cases import CASES, SHORT, Case, random_case
from jax_na.testing.numerics import relative_error

pytestmark = pytest.mark.usefixtures("quick_compilation")
CUDA = [name for name in _unfused.PRODUCTS if name.startswith("cuda")]
IMPLEMENTATIONS = [
    pytest.param("reference"),
    pytest.param("xla"),
    *(pytest.param(name, marks=pytest.mark.gpu) for name in CUDA),
]
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
over_tiled = pytest.mark.parametrize("implementation", IMPLEMENTATIONS[1:])  # all but the reference
BY_NAME = {case.name: case for case in CASES}
# Relative to the largest entry. CUDA multiplies float32 with TF32 tensor cores at default precision.
TOLERANCE = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2, "float64": 1e-12}


def tolerance(dtype, implementation) -> float:
    if jnp.dtype(dtype) == jnp.float32 and implementation == "cuda_gemm":
        return 3e-3
    return TOLERANCE[str(jnp.dtype(dtype))]


# --- the oracle ------------------------------------------------------------------------------------------------------


def axis_neighbors(x, length, window, stride, dilation, causal):
    """Positions of the keys in the window of token ``x``, None outside the causal mask: semantics.md, word by word."""
    group, i = x % dilation, x // dilation
    group_len = length // dilation + (1 if group < length % dilation else 0)
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        center = min(i // stride * stride + stride - 1, group_len - 1)
        start, end = max(center - window + 1, 0), i + 1
    else:
        center = min(i // stride * stride + stride // 2, group_len - 1)
        start = max(center - left, 0) + (group_len - right - center - 1 if center + right >= group_len else 0)
        end = start + window
    return [j * dilation + group if j < end else None for j in range(start, start + window)]


@functools.cache
def key_table(case: Case) -> np.ndarray:
    """``[tokens, window volume]``: flat index of the key in each slot, -1 where there is none."""
    spec = case.spec()
    table = []
    for token in itertools.product(*(range(n) for n in case.spatial)):
        per_axis = [
            axis_neighbors(x, n, w, s, d, c)
            for x, n, w, s, d, c in zip(
                token, case.spatial, spec.window, spec.stride, spec.dilation, spec.is_causal, strict=True
            )
        ]
        table.append(
            [-1 if None in slot else np.ravel_multi_index(slot, case.spatial) for slot in itertools.product(*per_axis)]
        )
    return np.array(table)


def products(case: Case, weights, query, key) -> dict[str, np.ndarray]:
    """The three products in float64 of ``weights [B, *S, H, W]``, ``query [B, *S, H, D]``, ``key [B, *S, Hkv, D]``."""
    weights, query, key = (np.asarray(x, np.float64) for x in (weights, query, key))
    batch, heads, kv_heads = query.shape[0], query.shape[-2], key.shape[-2]
    tokens, head = len(key_table(case)), np.arange(heads) // (heads // kv_heads)
    table, inside = key_table(case), key_table(case) >= 0
    p = np.where(inside[:, None], weights.reshape(batch, tokens, heads, -1), 0.0)
    x, y = query.reshape(batch, tokens, heads, -1), key.reshape(batch, tokens, kv_heads, -1)
    gathered = y[:, table][..., head, :]  # [B, N, W, H, D]
    result = np.zeros((batch, tokens, heads, y.shape[-1]))
    for slot in range(table.shape[1]):  # a slot's keys may repeat among queries: add.at
        seen = inside[:, slot]
        np.add.at(result, (slice(None), table[seen, slot]), p[..., slot, None][:, seen] * x[:, seen])
    result = result.reshape(batch, tokens, kv_heads, heads // kv_heads, -1).sum(3)
    return {
        "pointwise": np.where(inside[:, None], np.einsum("bnhd,bnwhd->bnhw", x, gathered), 0.0).reshape(weights.shape),
        "neighborhood": np.einsum("bnhw,bnwhd->bnhd", p, gathered).reshape(query.shape),
        "inverse": result.reshape(key.shape),
    }


# --- cases -----------------------------------------------------------------------------------------------------------


def window_arguments(case: Case) -> dict:
    arguments = case.arguments()
    del arguments["scale"]
    return arguments


def operands(case: Case, dtype, seed=0):
    """Random weights, query and key (the value is drawn like the key)."""
    rng = np.random.default_rng(seed)
    rows = (case.batch, *case.spatial, case.heads)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), dtype)

    return draw(*rows, case.spec().volume), draw(*rows, case.dim), draw(case.batch, *case.spatial, case.kv_heads, case.dim)


def check(case: Case, implementation: str, dtype) -> None:
    """qk and av and all their gradients, with full-size cotangents."""
    weights, query, key = operands(case, dtype)
    scale = case.dim**-0.5 if case.scale is None else case.scale
    arguments = {**window_arguments(case), "implementation": implementation}

    @jax.jit
    def run(weights, query, key):
        scores, qk_vjp = jax.vjp(lambda q, k: jax_na.na_qk(q, k, scale=case.scale, **arguments), query, key)
        out, av_vjp = jax.vjp(lambda p, v: jax_na.na_av(p, v, **arguments), weights, key)
        return scores, qk_vjp(weights), out, av_vjp(query)

    scores, (grad_query, grad_key), out, (grad_weights, grad_value) = run(weights, query, key)
    truth = products(case, weights, query, key)
    outside = (key_table(case) < 0).reshape(*case.spatial, 1, -1)
    assert np.array_equal(np.isneginf(np.asarray(scores, np.float64)), np.broadcast_to(outside, scores.shape))
    pairs = {
        "scores": (jnp.where(outside, 0, scores), scale * truth["pointwise"]),
        "grad_query": (grad_query, scale * truth["neighborhood"]),
        "grad_key": (grad_key, scale * truth["inverse"]),
        "out": (out, truth["neighborhood"]),
        "grad_weights": (grad_weights, truth["pointwise"]),
        "grad_value": (grad_value, truth["inverse"]),
    }
    limit = tolerance(dtype, implementation)
    for name, (actual, expected) in pairs.items():
        assert actual.dtype == jnp.dtype(dtype), name
        assert relative_error(actual, expected) <= limit, (name, relative_error(actual, expected))
    assert not np.any(np.where(outside, np.asarray(grad_weights, np.float64), 0))


# Biases and additional keys play no part in the products: on CPU their cases are left to the composed attention.
ON_CPU = [
    case
    for case in CASES
    if not (
        case.bias or case.extra or case.dim > 64 or case.scale == 0 or case.name in ("1d", "1d-even", "2d", "3d", "2d-even")
    )
]


@pytest.mark.parametrize("case", ON_CPU, ids=lambda case: case.name)
def test_float32(case):
    check(case, "xla", jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", CUDA)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32_on_gpu(case, implementation):
    check(case, implementation, jnp.float32)


@pytest.mark.parametrize("case", SHORT[::3], ids=lambda case: case.name)
def test_reference(case):
    check(case, "reference", jnp.float32)


@over_tiled
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["2d-stride-dilated-causal"])
def test_half(name, dtype, implementation):
    check(BY_NAME[name], implementation, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", CUDA)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_half_on_gpu(case, dtype, implementation):
    check(case, implementation, dtype)


def test_fuzz():
    for seed in range(4):
        check(random_case(seed, max_tokens=300, bias=False, extra=False), "xla", jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", CUDA)
@pytest.mark.parametrize("first", range(0, 40, 5))
def test_fuzz_on_gpu(first, implementation):
    for seed in range(first, first + 5):
        dtype = (jnp.float32, jnp.bfloat16, jnp.float16)[seed % 3]
        check(random_case(seed, max_tokens=300, bias=False, extra=False), implementation, dtype)


def test_float64():
    with jax.enable_x64(True):
        check(BY_NAME["2d-stride-dilated-causal"], "xla", jnp.float64)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", CUDA)
def test_highest_precision(implementation):
    """precision=HIGHEST multiplies float32 operands in full."""
    case = BY_NAME["2d-d64"]
    weights, query, key = operands(case, jnp.float32)
    arguments = {**window_arguments(case), "implementation": implementation, "precision": "highest"}
    truth = products(case, weights, query, key)
    assert relative_error(jax_na.na_qk(query, key, scale=1.0, **arguments), truth["pointwise"]) < 5e-6
    assert relative_error(jax_na.na_av(weights, key, **arguments), truth["neighborhood"]) < 5e-6


# --- bias ------------------------------------------------------------------------------------------------------------

BIASED = [
    (Case("1d", (23,), 5, stride=2, dilation=2, is_causal=True, heads=4, kv_heads=2, dim=16), jnp.float32),
    (Case("2d", (7, 9), (3, 5), dilation=(2, 1), heads=4, kv_heads=1, dim=16, batch=2), jnp.bfloat16),
    (Case("3d", (4, 5, 6), (3, 1, 5), stride=(1, 1, 3), is_causal=(True, False, False), dim=16), jnp.float16),
]


@over_implementations
@pytest.mark.parametrize(("case", "dtype"), BIASED, ids=["1d-fp32", "2d-bf16", "3d-fp16"])
def test_bias_of_the_scores(case, dtype, implementation):
    """na_qk with a relative positional bias: values, and the gradients of query, key and bias."""
    weights, query, key = operands(case, dtype)
    spec, table = case.spec(), key_table(case)
    sizes = [2 * window - 1 for window in spec.window]
    bias = jnp.asarray(np.random.default_rng(5).standard_normal((case.heads, *sizes)), dtype)
    token, other = (
        np.indices(case.spatial).reshape(spec.rank, -1, 1),
        np.array(np.unravel_index(np.maximum(table, 0), case.spatial)),
    )
    step, window = (np.reshape(x, (-1, 1, 1)) for x in (spec.dilation, spec.window))
    inside = table >= 0
    entry = np.where(
        inside, np.ravel_multi_index(tuple(np.where(inside, (other - token) // step + window - 1, 0)), sizes), 0
    )

    @jax.jit
    def run(query, key, bias, cotangent):
        call = functools.partial(jax_na.na_qk, implementation=implementation, scale=case.scale, **window_arguments(case))
        scores, vjp = jax.vjp(lambda q, k, b: call(q, k, bias=b), query, key, bias)
        return scores, vjp(cotangent)

    scores, (grad_query, grad_key, grad_bias) = run(query, key, bias, weights)
    truth, flat = products(case, weights, query, key), np.asarray(bias, np.float64).reshape(case.heads, -1)
    added = np.moveaxis(flat[:, entry], 0, 1).reshape(*case.spatial, case.heads, -1)
    outside = ~inside.reshape(*case.spatial, 1, -1)
    expected = np.where(outside, 0, case.dim**-0.5 * truth["pointwise"] + added)
    cotangent = np.where(outside, 0, np.asarray(weights, np.float64)).sum(0).reshape(-1, case.heads, spec.volume)
    summed = [np.bincount(entry.ravel(), cotangent[:, head].ravel(), flat.shape[1]) for head in range(case.heads)]
    pairs = {
        "scores": (jnp.where(outside, 0, scores), expected),
        "grad_query": (grad_query, case.dim**-0.5 * truth["neighborhood"]),
        "grad_key": (grad_key, case.dim**-0.5 * truth["inverse"]),
        "grad_bias": (grad_bias, np.reshape(summed, bias.shape)),
    }
    assert np.isneginf(np.where(outside, np.asarray(scores, np.float64), -np.inf)).all()
    limit = tolerance(dtype, implementation)
    for name, (actual, exact) in pairs.items():
        assert actual.dtype == jnp.dtype(dtype), name
        assert relative_error(actual, exact) <= limit, (name, relative_error(actual, exact))


# --- what the mask hides ---------------------------------------------------------------------------------------------


@over_implementations
def test_weights_outside_the_causal_mask_are_ignored(implementation):
    case = BY_NAME["2d-stride-dilated-causal"]
    weights, query, key = operands(case, jnp.float32)
    outside = (key_table(case) < 0).reshape(*case.spatial, 1, -1)
    arguments = {**window_arguments(case), "implementation": implementation}

    def run(weights):
        out, vjp = jax.vjp(lambda p, v: jax_na.na_av(p, v, **arguments), weights, key)
        return out, *vjp(query)

    clean = run(jnp.where(outside, 0.0, weights))
    for poison in (jnp.nan, -jnp.inf, 1e30):
        for expected, actual in zip(clean, run(jnp.where(outside, poison, weights)), strict=True):
            assert np.array_equal(expected, actual)


@over_implementations
def test_tokens_outside_the_window_do_not_reach_the_scores(implementation):
    case = BY_NAME["2d-stride"]
    _, query, key = operands(case, jnp.float32)
    arguments = {**window_arguments(case), "implementation": implementation}
    poisoned = key.at[:, 0, 0].set(jnp.nan)
    sees = (key_table(case) == 0).any(1).reshape(*case.spatial)
    scores = np.asarray(jax_na.na_qk(query, poisoned, **arguments))
    assert np.isnan(scores[0][sees]).any(-1).all() and np.isfinite(scores[0][~sees]).all()
    assert sees.sum() < sees.size


# --- transformations -------------------------------------------------------------------------------------------------

SMALL = Case("small", (5, 6), (3, 2), stride=(1, 2), dilation=(1, 2), is_causal=(True, False), heads=4, kv_heads=2, dim=4)


@over_tiled
def test_forward_mode_and_second_derivatives(implementation):
    weights, query, key = operands(SMALL, jnp.float32)
    arguments = {**window_arguments(SMALL), "implementation": implementation, "precision": "highest"}
    outside = (key_table(SMALL) < 0).reshape(*SMALL.spatial, 1, -1)

    def qk(q, k):
        return jnp.where(outside, 0.0, jax_na.na_qk(q, k, **arguments))

    def av(p, v):
        return jax_na.na_av(p, v, **arguments)

    check = functools.partial(check_grads, order=2, modes=("fwd", "rev"), eps=0.1, atol=2e-2, rtol=2e-2)
    check(qk, (query, key))
    check(av, (weights, key))


@over_implementations
def test_hessian(implementation):
    """The hessian of a bilinear form holds the form itself off its diagonal and nothing on it."""
    case = Case("tiny", (4,), 3, heads=1, kv_heads=1, dim=2)
    weights, query, key = operands(case, jnp.float32)
    arguments = {**window_arguments(case), "implementation": implementation, "scale": 1.0}

    def energy(qk):
        return jnp.sum(weights * jax_na.na_qk(qk[0], qk[1], **arguments))

    hessian = np.asarray(jax.hessian(energy)(jnp.stack([query, key]))).reshape(2, 8, 2, 8)
    table, expected = key_table(case), np.zeros((4, 2, 4, 2))
    for q, w in itertools.product(range(4), range(3)):
        expected[q, [0, 1], table[q, w], [0, 1]] += weights[0, q, 0, w]
    limit = tolerance(jnp.float32, implementation)
    np.testing.assert_allclose(hessian[0, :, 1], expected.reshape(8, 8), atol=limit, rtol=limit)
    np.testing.assert_allclose(hessian[1, :, 0], expected.reshape(8, 8).T, atol=limit, rtol=limit)
    assert not hessian[0, :, 0].any() and not hessian[1, :, 1].any()


@over_tiled
@pytest.mark.parametrize("axes", [(0, 0), (1, None), (None, 2), (-1, 0)], ids=str)
def test_vmap(axes, implementation):
    arguments = {**window_arguments(SMALL), "implementation": implementation}
    draws = [operands(SMALL, jnp.float32, seed) for seed in range(3)]
    mapped = [jnp.stack([d[i] for d in draws], 0) for i in range(3)]

    def place(i, axis):
        return draws[0][i] if axis is None else jnp.moveaxis(mapped[i], 0, axis)

    def pick(i, axis, n):
        return draws[0 if axis is None else n][i]

    for function, (a, b) in {
        lambda q, k: jax_na.na_qk(q, k, **arguments): (1, 2),
        lambda p, v: jax_na.na_av(p, v, **arguments): (0, 2),
        jax.grad(lambda p, v: jnp.sum(jax_na.na_av(p, v, **arguments) ** 2), (0, 1)): (0, 2),
    }.items():
        actual = jax.vmap(function, axes)(place(a, axes[0]), place(b, axes[1]))
        for n in range(3):
            expected = function(pick(a, axes[0], n), pick(b, axes[1], n))
            for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
                finite = jnp.isfinite(y)
                limit = 10 * tolerance(jnp.float32, implementation)
                np.testing.assert_allclose(jnp.where(finite, x[n], 0), jnp.where(finite, y, 0), rtol=limit, atol=limit)


def test_jit_remat_and_zero_batch():
    weights, query, key = operands(SMALL, jnp.float32)
    arguments = window_arguments(SMALL)
    loss = jax.checkpoint(lambda p, v: jnp.sum(jnp.sin(jax_na.na_av(p, v, **arguments))))
    expected = jax.grad(lambda p: jnp.sum(jnp.sin(jax_na.na_av(p, key, **arguments))))(weights)
    np.testing.assert_allclose(jax.jit(jax.grad(loss))(weights, key), expected, rtol=1e-5, atol=1e-6)
    assert jax_na.na_qk(query[:0], key[:0], **arguments).shape == (0, *weights.shape[1:])
    assert jax_na.na_av(weights[:0], key[:0], **arguments).shape == (0, *query.shape[1:])


# --- the composed attention ------------------------------------------------------------------------------------------

UNFUSED = [pytest.param("xla_unfused")] + [
    pytest.param(name, marks=pytest.mark.gpu) for name in _backends.IMPLEMENTATIONS if name == "cuda_gemm"
]
COMPOSED = ("1d-causal-stride", "2d-extra-bias")


def attend(inputs: Inputs, case: Case, **arguments):
    return jax_na.neighborhood_attention(
        *inputs[:3],
        bias=inputs.bias,
        additional_keys=inputs.extra_key,
        additional_values=inputs.extra_value,
        return_lse=True,
        **case.arguments(),
        **arguments,
    )


def compare(actual, expected, limit):
    leaves = zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
    errors = [relative_error(a, b) for a, b in leaves]
    assert max(errors) <= limit, errors


@pytest.mark.parametrize("implementation", UNFUSED)
@pytest.mark.parametrize("name", COMPOSED)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])
def test_composed_attention_agrees_with_the_definition(name, dtype, implementation):
    case = BY_NAME[name]
    inputs = jax.tree.map(jnp.asarray, case.inputs(dtype))
    cotangents = jax.tree.map(jnp.asarray, case.cotangents(dtype))

    def run(inputs, **arguments):
        values, vjp = jax.vjp(lambda x: attend(x, case, **arguments), inputs)
        return values, vjp(cotangents)[0]

    actual = jax.jit(lambda x: run(x, implementation=implementation))(inputs)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), inputs)
    cotangents = tuple(c.astype(jnp.float32) for c in cotangents)
    expected = jax.jit(lambda x: run(x, implementation="reference", precision="highest"))(exact)
    on_cuda = implementation.startswith("cuda")
    compare(actual, expected, {"float32": 1e-2 if on_cuda else 2e-5, "bfloat16": 4e-2}[str(jnp.dtype(dtype))])


@over_tiled
@pytest.mark.parametrize("name", COMPOSED)
def test_return_weights(name, implementation):
    """The weights are the softmax over the window (and additional keys), and differentiate like everything else."""
    case = BY_NAME[name]
    inputs = jax.tree.map(jnp.asarray, case.inputs(jnp.float32))
    limit = 1e-2 if implementation.startswith("cuda") else 2e-5  # additional keys go through XLA's own TF32 products

    @jax.jit
    def run(inputs):
        def loss(x):
            out, lse, weights = attend(x, case, implementation=implementation, return_weights=True)
            return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse, weights)

        return jax.grad(loss, has_aux=True)(inputs)

    def expected_loss(x):
        out, lse = attend(x, case, implementation="reference", precision="highest")
        return jnp.sum(jnp.sin(out)) + jnp.sum(jnp.cos(lse)), (out, lse)

    grads, (out, lse, weights) = run(inputs)
    expected_grads, expected = jax.grad(expected_loss, has_aux=True)(inputs)
    compare((grads, out, lse), (expected_grads, *expected), limit)
    bias = None if inputs.bias is None else inputs.bias
    scores = jax_na.na_qk(*inputs[:2], bias=bias, implementation="reference", precision="highest", **case.arguments())
    compare(weights, jnp.exp(scores - expected[1][..., None]), limit)
    if inputs.extra_key is None:
        np.testing.assert_allclose(weights.sum(-1), 1.0, rtol=1e-5)


def test_weights_gradient_is_the_softmax_derivative():
    """A loss on the weights themselves differentiates through the softmax."""
    case = Case("tiny", (6,), 3, is_causal=True, dim=4)
    inputs = jax.tree.map(jnp.asarray, case.inputs(jnp.float32))

    @jax.jit
    def entropy(query):
        weights = jax_na.neighborhood_attention(query, inputs.key, inputs.value, 3, is_causal=True, return_weights=True)[1]
        return jnp.sum(weights**2)

    check_grads(entropy, (inputs.query,), order=1, modes=("fwd", "rev"), atol=2e-2, rtol=2e-2)


# --- CUDA, as far as a machine without a GPU sees it ------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["cuda_gemm", "cuda_naive"])
def test_each_product_is_one_custom_call(implementation):
    """Forward is one call per operation, the gradient of each is the two other products; nothing of K or V is expanded."""
    x = jax.ShapeDtypeStruct((2, 16, 20, 4, 64), jnp.bfloat16)
    kv = jax.ShapeDtypeStruct((2, 16, 20, 2, 64), jnp.bfloat16)

    def calls(function, *shapes):
        text = jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert f'family = "{implementation.removeprefix("cuda_")}"' in text
        return [int(n) for n in re.findall(r"custom_call @jax_na_product.*?product = (\d) : i64", text)]

    def qk(q, k):
        return jax_na.na_qk(q, k, (7, 5), dilation=(1, 3), implementation=implementation)

    def av(p, v):
        return jax_na.na_av(p, v, (7, 5), dilation=(1, 3), implementation=implementation)

    weights = jax.eval_shape(qk, x, kv)
    assert calls(qk, x, kv) == [0] and calls(av, weights, kv) == [1]
    gradient = jax.grad(lambda f, *args: jnp.sum(f(*args).astype(jnp.float32)), argnums=(1, 2))
    assert sorted(calls(functools.partial(gradient, qk), x, kv)) == [1, 2]
    assert sorted(calls(functools.partial(gradient, av), weights, kv)) == [0, 2]


@pytest.mark.parametrize("lead", ["b", "n, b"])
def test_export_with_a_symbolic_batch(lead):
    """The limit on memory and the choice of tiles see a batch that is not known yet."""
    rng = np.random.default_rng(0)
    q, k = rng.normal(size=(2, *((5,) if lead == "b" else (3, 5)), 6, 2, 4)).astype(np.float32)

    def attend(q, k):
        scores = jax_na.na_qk(q, k, 3)
        return jax_na.na_av(jax.nn.softmax(scores, -1), k, 3)

    attend = attend if lead == "b" else jax.vmap(attend)

    def run(q, k):
        return attend(q, k), jax.grad(lambda q, k: jnp.sum(jnp.sin(attend(q, k))), (0, 1))(q, k)

    token = jax.ShapeDtypeStruct(jax.export.symbolic_shape(f"{lead}, 6, 2, 4"), jnp.float32)
    exported = jax.export.deserialize(jax.export.export(jax.jit(run))(token, token).serialize())
    for actual, wanted in zip(jax.tree.leaves(exported.call(q, k)), jax.tree.leaves(run(q, k)), strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", ["cuda_gemm", "cuda_naive"])
def test_symbolic_batch_on_cuda(implementation):
    token = jax.ShapeDtypeStruct(jax.export.symbolic_shape("b, 32, 2, 32"), jnp.bfloat16)
    function = jax.grad(lambda q, k: jnp.sum(jax_na.na_qk(q, k, 3, implementation=implementation)), (0, 1))
    make = functools.partial(jax.export.export, platforms=["cuda"], disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)
    assert make(jax.jit(function))(token, token).mlir_module().count("custom_call @jax_na_product") == 2


def test_float64_is_not_served_by_cuda():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="serve float16, bfloat16, float32"):
        jax_na.na_qk(
            jnp.zeros((1, 8, 1, 4), jnp.float64), jnp.zeros((1, 8, 1, 4), jnp.float64), 3, implementation="cuda_gemm"
        )


# --- errors ----------------------------------------------------------------------------------------------------------


def test_errors_name_the_argument_and_the_limit():
    x = jnp.zeros((2, 8, 9, 4, 16))
    p = jnp.zeros((2, 8, 9, 4, 9))
    with pytest.raises(ValueError, match="weights has shape .* expected 15 entries on the last axis"):
        jax_na.na_av(p, x, (3, 5))
    with pytest.raises(ValueError, match=r"value has shape .* expected \(2, 8, 9, 4, 16\)"):
        jax_na.na_av(p, x[:, :-1], 3)
    with pytest.raises(ValueError, match="key has shape .* spatial axes"):
        jax_na.na_qk(x, x[:, 0], 3)
    with pytest.raises(ValueError, match="number of query heads must be a multiple"):
        jax_na.na_qk(x, x[..., :3, :], 3)
    with pytest.raises(TypeError, match="value has dtype bfloat16, weights has float32"):
        jax_na.na_av(p, x.astype(jnp.bfloat16), 3)
    with pytest.raises(ValueError, match="odd window_size"):
        jax_na.na_qk(x, x, 4, bias=jnp.zeros((4, 7, 7)))
    for name, call in (("query", jax_na.na_qk), ("weights", jax_na.na_av)):
        with pytest.raises(TypeError, match=f"{name} is None"):
            call(None, x, 3)
    for name, call, first in (("key", jax_na.na_qk, x), ("value", jax_na.na_av, p)):
        with pytest.raises(TypeError, match=f"{name} is None"):
            call(first, None, 3)
    with pytest.raises(ValueError, match="head_dim of query is 0: it must be at least 1"):
        jax_na.na_qk(x[..., :0], x[..., :0], 3)
    with pytest.raises(ValueError, match="head_dim of value is 0: it must be at least 1"):
        jax_na.na_av(p, x[..., :0], 3)
    with pytest.raises(ValueError, match="heads of query is 0: it must be at least 1"):
        jax_na.na_qk(x[..., :0, :], x, 3)
    with pytest.raises(ValueError, match="implementation='nonsense' is unknown"):
        jax_na.na_qk(x, x, 3, implementation="nonsense")
    with pytest.raises(NotImplementedError, match="'xla_unfused' has no na_qk and na_av: .* one of .*xla"):
        jax_na.na_qk(x, x, 3, implementation="xla_unfused")
    with pytest.raises(ValueError, match=r"window_size=9 \* dilation=1 = 9 on spatial axis 0"):
        jax_na.na_qk(x, x, 9)


def test_weights_too_large_for_the_limit(monkeypatch):
    x = jax.ShapeDtypeStruct((4, 128, 128, 16, 64), jnp.bfloat16)
    needed = 4 * 128 * 128 * 16 * 1024 * 2
    for call in (
        lambda x, **limit: jax_na.na_qk(x, x, 32, **limit),
        lambda x, **limit: jax_na.neighborhood_attention(x, x, x, 32, return_weights=True, **limit),
        lambda x, **limit: jax_na.neighborhood_attention(x, x, x, 32, implementation="xla_unfused", **limit),
        lambda x, **limit: jax_na.neighborhood_attention(x, x, x, 32, implementation="cuda_gemm", **limit),
    ):
        jax.eval_shape(call, x)
        with pytest.raises(ValueError, match=f"take {needed} bytes, more than max_weights_bytes={needed - 1}"):
            jax.eval_shape(functools.partial(call, max_weights_bytes=needed - 1), x)
        monkeypatch.setattr(_unfused, "MAX_WEIGHTS_BYTES", 1000)
        with pytest.raises(ValueError, match="max_weights_bytes=1000"):
            jax.eval_shape(functools.partial(call), x)
        jax.eval_shape(functools.partial(call, max_weights_bytes=needed), x)
        monkeypatch.undo()
