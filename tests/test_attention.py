"""One suite over all implementations: values, gradients, exact attended sets, fuzzing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_na
from jax_na import _backends, _cuda, _definition, _primitives
from jax_na._spec import Inputs
from jax_na.testing import oracle
from jax_na.testing.cases import CASES, SHORT, Case, random_case
from jax_na.testing.compiled import AS_USERS
from jax_na.testing.numerics import relative_error, same_precision, tolerance

CUDA = [name for name in _backends.IMPLEMENTATIONS if name.startswith("cuda")]
IMPLEMENTATIONS = [pytest.param("xla"), *(pytest.param(name, marks=pytest.mark.gpu) for name in CUDA)]
over_implementations = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
jit = functools.partial(jax.jit, compiler_options=AS_USERS)
over_dims = pytest.mark.parametrize("dim", [32, *(pytest.param(dim, marks=pytest.mark.gpu) for dim in (64, 128))])


def serves_or_says_why(implementation: str, case: Case, inputs: Inputs) -> bool:
    """A case that an implementation does not serve must raise, and then there is nothing more to check."""
    platform = "cuda" if implementation.startswith("cuda") else "cpu"
    reason = _backends.IMPLEMENTATIONS[implementation].why_not_on(platform, case.spec(), inputs)
    if reason is None:
        return True
    with pytest.raises(NotImplementedError, match="cannot serve"):
        call(case, implementation, inputs)
    return False


def call(case: Case, implementation: str | None, inputs: Inputs):
    return jax_na.neighborhood_attention(
        inputs.query,
        inputs.key,
        inputs.value,
        bias=inputs.bias,
        additional_keys=inputs.extra_key,
        additional_values=inputs.extra_value,
        return_lse=True,
        implementation=implementation,
        **case.arguments(),
    )


@functools.partial(jit, static_argnums=(0, 1))
def values_and_gradients(case: Case, implementation: str, inputs: Inputs, cotangents):
    values, vjp = jax.vjp(functools.partial(call, case, implementation), inputs)
    return values, vjp(cotangents)[0]


@functools.cache
def expected_and_limits(case: Case, dtype) -> tuple[dict, dict]:
    """The oracle's values and gradients, and the error that each may have; the same for every implementation."""
    inputs, (grad_out, grad_lse) = case.inputs(dtype), case.cotangents(dtype)
    truth = oracle.attention(case.spec(), inputs, None, grad_out, grad_lse)
    assert truth.grads is not None
    halo = case.spec().identity_halo(inputs.query)
    reference, reference_grads = same_precision(case.spec(), inputs, halo, grad_out, grad_lse)
    expected = {"out": truth.out, "lse": truth.lse, **truth.grads._asdict()}
    plain = {"out": reference[0], "lse": reference[1], **reference_grads._asdict()}
    given = [name for name, value in expected.items() if value is not None]
    limits = {name: tolerance(relative_error(plain[name], expected[name]), dtype) for name in given}
    return expected, limits


def serves_forward_only(implementation: str, case: Case, inputs: Inputs) -> bool:
    """A kernel family may have no backward for a case; named by the user it must then say so."""
    family = implementation.removeprefix("cuda_")
    if family not in [f.name for f in _cuda.FAMILIES] or _cuda.candidates(case.spec(), inputs, True, family):
        return False
    with pytest.raises(NotImplementedError, match="backward pass"):
        values_and_gradients(case, implementation, inputs, case.cotangents(inputs.query.dtype))
    return True


def check(case: Case, implementation: str, dtype) -> None:
    inputs = case.inputs(dtype)
    if not serves_or_says_why(implementation, case, inputs):
        return
    expected, limits = expected_and_limits(case, dtype)
    if serves_forward_only(implementation, case, inputs):
        out, lse = jit(functools.partial(call, case, implementation))(inputs)
        actual, limits = {"out": out, "lse": lse}, {name: limits[name] for name in ("out", "lse")}
    else:
        (out, lse), grads = values_and_gradients(case, implementation, inputs, case.cotangents(dtype))
        actual = {"out": out, "lse": lse, **grads._asdict()}
    assert all(actual[name].dtype == (jnp.float32 if name == "lse" else jnp.dtype(dtype)) for name in limits)
    errors = {name: (relative_error(actual[name], expected[name]), limit) for name, limit in limits.items()}
    assert all(error <= limit for error, limit in errors.values()), errors


@over_implementations
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_float32(case, implementation):
    check(case, implementation, jnp.float32)


@over_implementations
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", SHORT, ids=lambda case: case.name)
def test_half(case, dtype, implementation):
    check(case, implementation, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", CUDA)
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in SHORT], ids=lambda case: case.name)
def test_half_on_gpu(case, dtype, implementation):
    check(case, implementation, dtype)


@over_implementations
@pytest.mark.parametrize("case", SHORT[::3], ids=lambda case: case.name)
def test_highest_precision(case, implementation):
    """precision=HIGHEST: at most four times the float64 error of the definition with float32 matrix products."""
    inputs, (grad_out, grad_lse) = case.inputs(jnp.float32), case.cotangents(jnp.float32)
    if not serves_or_says_why(implementation, case, inputs):
        return
    truth = oracle.attention(case.spec(), inputs, None, grad_out, grad_lse)
    assert truth.grads is not None
    halo = case.spec().identity_halo(inputs.query)

    def errors(implementation):
        spec = case.spec(implementation=implementation, precision=jax.lax.Precision.HIGHEST)

        @jit
        def run(inputs):
            values, vjp = jax.vjp(lambda x: _primitives.forward(spec, x, halo), inputs)
            return values, vjp((grad_out, grad_lse))[0]

        (out, lse), grads = run(inputs)
        actual = {"out": out, "lse": lse, **grads._asdict()}
        expected = {"out": truth.out, "lse": truth.lse, **truth.grads._asdict()}
        return {name: relative_error(actual[name], expected[name]) for name in actual if expected[name] is not None}

    found, reference = errors(implementation), errors("reference")
    rounding = float(jnp.finfo(jnp.float32).eps)  # of the result itself: no reference is better
    assert all(found[name] <= 4 * max(reference[name], rounding) for name in found), (found, reference)


@over_implementations
@pytest.mark.parametrize(
    "case",
    [
        Case("1d", (61,), 7, dilation=3, dim=8, dim_v=61),
        Case("1d-causal", (40,), 9, stride=4, is_causal=True, dim=8, dim_v=40),
        Case("2d", (9, 11), (4, 5), stride=(3, 2), dim=16, dim_v=99),
        Case("2d-dilated-causal", (11, 9), (3, 4), dilation=(3, 2), is_causal=(False, True), dim=16, dim_v=99),
        Case("3d", (4, 5, 6), (3, 2, 5), stride=(1, 2, 3), is_causal=(True, False, False), dim=8, dim_v=120),
        Case("2d-d64", (8, 8), (5, 4), stride=(1, 2), dim=64, dim_v=64),
    ],
    ids=lambda case: case.name,
)
def test_one_hot_values_recover_the_attended_set(case, implementation):
    """Exact: a value that is the one-hot code of its token makes out[q] nonzero just at the tokens that q sees."""
    dtype = jnp.float16 if implementation == "cuda_hopper" else jnp.float32
    inputs = case.inputs(dtype)
    tokens = int(np.prod(case.spatial))
    one_hot = np.broadcast_to(np.eye(tokens, dtype=dtype)[:, None], (tokens, case.kv_heads, tokens))
    inputs = inputs._replace(value=one_hot.reshape(inputs.value.shape))
    if not serves_or_says_why(implementation, case, inputs):
        return
    out, _ = jit(functools.partial(call, case, implementation))(inputs)
    seen = np.asarray(out)[0].reshape(tokens, case.heads, tokens) > 0
    expected = oracle.mask(case.spec(), case.spatial, case.spatial, case.spec().identity_halo(inputs.query))
    np.testing.assert_array_equal(seen, np.broadcast_to(expected[:, None], seen.shape))


@pytest.mark.parametrize(
    "length, window, causal, expected",
    [
        (5, 3, False, [(0, 3), (0, 3), (1, 4), (2, 5), (2, 5)]),
        (6, 4, False, [(0, 4), (0, 4), (0, 4), (1, 5), (2, 6), (2, 6)]),
        (5, 3, True, [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5)]),
    ],
)
def test_windows_of_the_contract(length, window, causal, expected):
    spec = Case("", (length,), window, is_causal=causal).spec()
    seen = oracle.mask(spec, (length,), (length,), np.array([[0, 0, length]]))
    assert [(int(row.argmax()), int(row.argmax() + row.sum())) for row in seen] == expected


def test_dilated_window_of_the_contract():
    seen = oracle.mask(Case("", (7,), 3, dilation=2).spec(), (7,), (7,), np.array([[0, 0, 7]]))
    assert np.flatnonzero(seen[6]).tolist() == [2, 4, 6]


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_definition_and_the_numpy_oracle_agree(case):
    with jax.enable_x64(True):
        inputs = case.inputs(np.float64)
        grad_out, grad_lse = case.cotangents(np.float64)
        grad_lse = grad_lse.astype(np.float64)
        halo = case.spec().identity_halo(inputs.query)

        @jax.jit
        def run(inputs):
            values, vjp = jax.vjp(lambda x: _definition.attention(case.spec(), x, halo), inputs)
            return values, vjp((grad_out, grad_lse))[0]

        actual = run(inputs)
    truth = oracle.attention(case.spec(), inputs, None, grad_out, grad_lse)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), actual, ((truth.out, truth.lse), truth.grads)
    )


@pytest.mark.parametrize("seed", range(25))
def test_fuzz(seed):
    check(random_case(seed, max_tokens=250), "xla", jnp.float32)


@over_implementations
@over_dims
def test_large_scores_stay_finite(dim, implementation):
    case = Case("large", (12, 13), (5, 4), dim=dim)
    dtype = jnp.bfloat16 if implementation == "cuda_hopper" else jnp.float32
    inputs = case.inputs(dtype)
    inputs = inputs._replace(query=inputs.query * 100, key=inputs.key * 100)
    values, grads = values_and_gradients(case, implementation, inputs, case.cotangents(dtype))
    assert float(np.abs(values[1]).max()) > 1e4
    assert all(bool(np.all(np.isfinite(x.astype(np.float32)))) for x in jax.tree.leaves((values, grads)))


@over_implementations
def test_nan_outside_every_window_of_a_query_does_not_reach_it(implementation):
    case = Case("nan", (16, 18), (5, 4), dim=32)
    inputs = case.inputs(jnp.bfloat16 if implementation == "cuda_hopper" else jnp.float32)
    key, value = inputs.key.copy(), inputs.value.copy()
    key[:, 3, 4], value[:, 3, 4] = np.nan, np.nan
    out, lse = jit(functools.partial(call, case, implementation))(inputs._replace(key=key, value=value))
    out, lse = np.asarray(out, np.float32), np.asarray(lse)
    expected = oracle.mask(case.spec(), case.spatial, case.spatial, case.spec().identity_halo(inputs.query))
    reached = expected[:, 3 * 18 + 4].reshape(case.spatial)
    np.testing.assert_array_equal(np.isnan(out).all((0, 3, 4)), reached)
    np.testing.assert_array_equal(np.isnan(out).any((0, 3, 4)), reached)
    np.testing.assert_array_equal(np.isnan(lse).all((0, 3)), reached)


@over_implementations
@over_dims
@pytest.mark.parametrize("operand", ["query", "key", "value", "grad_out"])
def test_nan_reaches_nothing_outside_its_windows(operand, dim, implementation):
    """Values and gradients of tokens that do not see the poisoned one are what they were, also where they share its tile."""
    # Groups of 6x5 tokens, whose keys lie in one tile of the Hopper backward; or windows that hold a fraction of the axis.
    case = Case("nan", (12, 10), 5, dilation=2, dim=32) if dim == 32 else Case("nan", (17, 20), (7, 9), dim=dim)
    dtype = jnp.bfloat16 if implementation == "cuda_hopper" else jnp.float32
    inputs, (grad_out, grad_lse) = case.inputs(dtype), case.cotangents(dtype)
    clean_values, clean_grads = values_and_gradients(case, implementation, inputs, (grad_out, grad_lse))
    head, spot = 1, (0, 3, 4, 1, 5)
    if operand == "grad_out":
        grad_out = grad_out.copy()
        grad_out[spot] = np.nan
    else:
        array = getattr(inputs, operand).copy()
        array[spot] = np.nan
        inputs = inputs._replace(**{operand: array})
    values, grads = values_and_gradients(case, implementation, inputs, (grad_out, grad_lse))

    sees = oracle.mask(case.spec(), case.spatial, case.spatial, case.spec().identity_halo(inputs.query))
    index = 3 * case.spatial[1] + 4
    one = np.arange(len(sees)) == index
    queries = sees[:, index] if operand in ("key", "value") else one
    keys = sees[queries].any(0)
    clean = {"out": clean_values[0], "lse": clean_values[1], **clean_grads._asdict()}
    actual = {"out": values[0], "lse": values[1], **grads._asdict()}
    related = {"out": queries, "lse": queries, "query": queries, "key": keys, "value": keys}
    spared = {"grad_out": ("out", "lse"), "value": ("lse", "value")}.get(operand, ())  # may or may not be NaN
    for name, tokens in related.items():
        where = np.outer(tokens, np.arange(case.heads) == head)
        found, expected = (np.asarray(x[name], np.float32).reshape(*where.shape, -1) for x in (actual, clean))
        assert name in spared or np.isnan(found[where]).any(-1).all(), name
        assert relative_error(found[~where], expected[~where]) < 2e-2, name


@over_implementations
def test_gradient_of_the_output_alone(implementation):
    """Without a cotangent of lse the backward takes a path of its own."""
    case = Case("plain", (9, 10), 3)
    dtype = jnp.bfloat16 if implementation == "cuda_hopper" else jnp.float32
    inputs = case.inputs(dtype)
    grad_out, _ = case.cotangents(dtype)
    grads = jit(jax.grad(lambda x: jnp.vdot(call(case, implementation, x)[0], grad_out).astype(jnp.float32)))(inputs)
    truth = oracle.attention(case.spec(), inputs, None, grad_out)
    assert truth.grads is not None
    for name in ("query", "key", "value"):
        limit = 2e-2 if implementation.startswith("cuda") else 1e-5  # a GPU's default precision: TF32 or the input's bf16
        assert relative_error(getattr(grads, name), getattr(truth.grads, name)) < limit, name
