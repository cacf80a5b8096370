"""The CUDA lane as far as a machine without a GPU sees it: lowering, choice among implementations, composition, status."""

import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_na
from jax_na import _backends, _cuda, _definition, _extras, _unfused
from jax_na._spec import Inputs
from jax_na.testing import oracle
from jax_na.testing.cases import CASES, Case
from jax_na.testing.numerics import relative_error

AVAILABLE = _cuda.Lane(None, tuple(family.name for family in _cuda.FAMILIES))
NAMED = [name for name in _backends.IMPLEMENTATIONS if name.startswith("cuda") and name not in _unfused.STORES_WEIGHTS]


def lower(
    case: Case, implementation: str | None, dtype=jnp.bfloat16, gradient: bool = False, platform: str = "cuda"
) -> str:
    def call(inputs: Inputs):
        return jax_na.neighborhood_attention(
            inputs.query,
            inputs.key,
            inputs.value,
            bias=inputs.bias,
            additional_keys=inputs.extra_key,
            additional_values=inputs.extra_value,
            implementation=implementation,
            **case.arguments(),
        )

    function = jax.grad(lambda inputs: call(inputs).sum().astype(jnp.float32)) if gradient else call
    shapes = Inputs(**{name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in case.shapes().items()})
    return jax.jit(function).trace(shapes).lower(lowering_platforms=(platform,)).as_text()


def calls(text: str) -> list[tuple[str, str]]:
    """``[(target, the line)]`` of our custom calls."""
    return [(found[1], line) for line in text.splitlines() if (found := re.search(r"custom_call @(jax_na_\w+)", line))]


@pytest.mark.parametrize("implementation", NAMED)
def test_a_named_implementation_lowers_to_its_custom_call_anywhere(implementation):
    case = Case(
        "2d", (16, 20), (7, 5), stride=(2, 1), dilation=(1, 3), is_causal=(True, False), heads=4, kv_heads=2, dim=64
    )
    forward = calls(lower(case, implementation))
    assert [target for target, _ in forward] == ["jax_na_forward"]
    line = forward[0][1]
    for attribute in (
        "window = dense<[7, 5]>",
        "stride = dense<[2, 1]>",
        "dilation = dense<[1, 3]>",
        "is_causal = dense<[1, 0]>",
        "scale = 1.250000e-01 : f64",
        "precision = 0 : i64",
        "sharded = false",
        "has_bias = false",
    ):
        assert attribute in line, (attribute, line)
    only = implementation.removeprefix("cuda").removeprefix("_")
    if only:
        assert f'candidates = "{only}"' in line
    assert [target for target, _ in calls(lower(case, implementation, gradient=True))] == [
        "jax_na_forward",
        "jax_na_backward",
    ]


@pytest.mark.parametrize("implementation", NAMED)
def test_a_named_implementation_raises_on_other_platforms(implementation):
    case = Case("1d", (32,), 5, dim=64)
    with pytest.raises(
        NotImplementedError, match=f"implementation='{implementation}' cannot serve this call: it runs on cuda"
    ):
        lower(case, implementation, platform="cpu")


def test_no_platform_but_cuda_sees_a_custom_call():
    assert not calls(lower(Case("1d", (32,), 5), None, platform="cpu"))


def test_the_default_takes_the_kernels_where_there_are_some(monkeypatch):
    case = Case("2d", (14, 14), 7, dim=64)
    monkeypatch.setattr(_cuda, "lane", lambda: AVAILABLE)
    assert [target for target, _ in calls(lower(case, None))] == ["jax_na_forward"]


def test_the_default_takes_xla_with_one_warning_where_there_are_none(monkeypatch):
    case = Case("2d", (14, 14), 7, dim=64)
    monkeypatch.setattr(_cuda, "lane", lambda: _cuda.Lane("it was left out"))
    _backends._warn_that_xla_serves.cache_clear()
    with pytest.warns(UserWarning, match="through XLA.*it was left out"):
        text = lower(case, None)
    assert not calls(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not calls(lower(case, None, gradient=True))


def test_float64_goes_to_xla(monkeypatch):
    monkeypatch.setattr(_cuda, "lane", lambda: AVAILABLE)
    with jax.enable_x64(True):
        assert not calls(lower(Case("1d", (32,), 5), None, jnp.float64))
        with pytest.raises(NotImplementedError, match="cannot serve this call.*float64"):
            lower(Case("1d", (32,), 5), "cuda", jnp.float64)


def test_a_missing_lane_is_an_error_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setattr(_cuda, "missing_here", lambda: "it was left out")
    with pytest.raises(NotImplementedError, match="implementation='cuda' cannot serve this call: it was left out"):
        lower(Case("1d", (32,), 5), "cuda")


def test_vmap_adds_a_leading_dimension_and_no_copies():
    case = Case("1d", (32,), 5)
    shapes = [jax.ShapeDtypeStruct((3, *shape), jnp.float32) for shape in case.shapes().values()]
    call = functools.partial(jax_na.neighborhood_attention, window_size=5, implementation="cuda")
    text = jax.jit(jax.vmap(call)).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert "tensor<3x1x32x2x32xf32>" in calls(text)[0][1]


def test_export_for_cuda_from_any_machine():
    call = functools.partial(jax_na.neighborhood_attention, window_size=5, implementation="cuda")
    shape = jax.ShapeDtypeStruct((1, 32, 2, 32), jnp.float16)
    exported = jax.export.export(jax.jit(call), platforms=["cuda"], disabled_checks=jax_na.EXPORT_SAFETY_CHECKS)(
        shape, shape, shape
    )
    assert "jax_na_forward" in exported.mlir_module()


@pytest.mark.parametrize("implementation", NAMED)
def test_memory_of_the_hunyuan_video_row(implementation):
    """The results of the custom calls are all they may allocate: out and lse; gradients, lse and delta, at most dq in float32."""
    case = Case("hunyuan", (30, 48, 80), (18, 24, 24), heads=24, kv_heads=24, dim=128)
    (_, forward), (_, backward) = calls(lower(case, implementation, gradient=True))

    def result_bytes(line):
        sizes = {"bf16": 2, "f32": 4, "ui8": 1}
        shapes = re.findall(r"tensor<([\dx]+)x(\w+)>", line.rpartition("->")[2])
        return [math.prod(map(int, shape.split("x"))) * sizes[dtype] for shape, dtype in shapes]

    rows = math.prod(case.shapes()["query"][:-1])
    tensor, slack = 2 * rows * case.dim, 1 << 16  # slack: tile counters, window tables, alignment
    assert result_bytes(forward) == [tensor, 4 * rows, 0]
    *gradients, workspace = result_bytes(backward)
    assert gradients == [tensor] * 3
    copies = 1 if implementation in ("cuda", "cuda_hopper") else 0
    assert workspace <= 4 * rows * case.dim * copies + 8 * rows + slack


# --- composition around the kernels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in CASES if case.extra], ids=lambda case: case.name)
def test_additional_keys_around_a_window_kernel(case):
    """`_extras` around an implementation of windows only, against the oracle with everything."""
    inputs, spec = case.inputs(np.float32), case.spec(precision=jax.lax.Precision.HIGHEST)
    grad_out, grad_lse = case.cotangents(np.float32)
    halo = spec.identity_halo(inputs.query)

    def window_forward(spec, inputs, halo):
        assert inputs.extra_key is None
        return _definition.forward(spec, inputs, halo)

    def window_backward(spec, inputs, out, lse, grad_out, grad_lse, halo):
        """As a kernel does it: weights recomputed from the lse that is given."""
        assert inputs.extra_key is None

        def through(inputs):  # d/dx of sum(P dP) + ... with P = exp(s - lse), lse and delta constants
            grad = grad_out.astype(jnp.float32)
            delta = jnp.sum(out * grad, -1) - grad_lse
            own_out, own_lse = _definition.forward(spec, inputs, halo)
            share = jax.lax.stop_gradient(jnp.exp(own_lse - lse))
            own_delta = jax.lax.stop_gradient(jnp.sum(own_out * grad, -1))
            return jnp.sum(own_out * grad * share[..., None]) + jnp.sum(own_lse * share * (own_delta - delta))

        return jax.grad(through)(inputs)

    @jax.jit
    def run(inputs):
        out, lse = _extras.forward(window_forward, spec, inputs, halo)
        return out, lse, _extras.backward(window_backward, spec, inputs, out, lse, grad_out, grad_lse, halo)

    out, lse, grads = run(inputs)
    truth = oracle.attention(spec, inputs, None, grad_out, grad_lse)
    assert relative_error(out, truth.out) < 1e-5
    assert relative_error(lse, truth.lse) < 1e-5
    for name, expected in truth.grads._asdict().items():
        if expected is not None:
            assert relative_error(getattr(grads, name), expected) < 1e-5, name


def test_no_additional_keys_at_all():
    case = Case("none", (9,), 3)
    inputs = case.inputs(np.float32)
    empty = np.zeros((1, 0, 2, 32), np.float32)
    inputs, spec = inputs._replace(extra_key=empty, extra_value=empty), case.spec()
    halo = spec.identity_halo(inputs.query)
    out, lse = _extras.forward(_definition.forward, spec, inputs, halo)
    grads = _extras.backward(_definition.backward, spec, inputs, out, lse, out, None, halo)
    assert grads.extra_key.shape == empty.shape


def test_additional_keys_of_an_empty_batch():
    inputs, spec = Case("none", (9,), 3, extra=2).inputs(np.float32), Case("none", (9,), 3).spec()
    inputs = jax.tree.map(lambda x: x[:0], inputs)
    halo = spec.identity_halo(inputs.query)
    out, lse = _extras.forward(_definition.forward, spec, inputs, halo)
    grads = _extras.backward(_definition.backward, spec, inputs, out, lse, out, lse, halo)
    assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, inputs)


# --- what is said ----------------------------------------------------------------------------------------------------


def test_explain_names_the_choice_and_the_reasons(monkeypatch):
    shape = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)
    explain = functools.partial(jax_na.explain, shape, shape, shape, 5)
    on_cpu = explain(platform="cpu")
    assert on_cpu.chosen == "xla"
    assert "it runs on cuda" in on_cpu.why_not["cuda"]
    monkeypatch.setattr(_cuda, "lane", lambda: AVAILABLE)
    on_gpu = explain(platform="cuda", capability=80)
    assert on_gpu.chosen == "cuda"
    assert on_gpu.forward_kernels
    assert "cuda would run on cuda, compute capability 8.0" in str(on_gpu)
    hopper = explain(platform="cuda", capability=90)
    assert all(hopper.why_not[name] is None for name in NAMED)
    assert all(reason is None or len(reason) > 10 for reason in (on_cpu.why_not | on_gpu.why_not).values())
    old = explain(platform="gpu", capability=75)
    assert old.chosen == "xla"
    assert "needs compute capability 8.0 or newer, the device has 7.5" in old.why_not["cuda_naive"]
    with pytest.raises(ValueError, match="window_size"):
        jax_na.explain(shape, shape, shape, 50)
    with pytest.raises(ValueError, match="implementation='nonsense' is unknown"):
        explain(implementation="nonsense")
    monkeypatch.setattr(_cuda, "lane", lambda: _cuda.Lane("it was left out"))
    assert explain(platform="cuda", capability=90).why_not["cuda"] == "it was left out"


def test_status_is_a_sentence_that_names_every_family_built(monkeypatch):
    assert jax_na.cuda_status().startswith("CUDA kernels are ")
    monkeypatch.setattr(_cuda, "lane", lambda: _cuda.Lane(None, ("fused", "naive"), ("gemm", "naive")))
    assert jax_na.cuda_status() == "CUDA kernels are available: fused, naive; for the unfused products gemm, naive"


def test_a_family_that_was_left_out_of_the_build_is_not_chosen(monkeypatch):
    shape = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)

    def family(**arguments):
        function = functools.partial(jax_na.na_qk, window_size=5, **arguments)
        text = jax.jit(function).trace(shape, shape).lower(lowering_platforms=("cuda",)).as_text()
        return re.search(r'family = "(\w+)"', text)[1]

    monkeypatch.setattr(_cuda, "lane", lambda: _cuda.Lane(None, ("naive",), ("gemm", "naive")))
    assert family() == "gemm"
    monkeypatch.setattr(_cuda, "lane", lambda: _cuda.Lane(None, ("naive",), ("naive",)))
    assert family() == "naive"
    for call in (family, lambda implementation: lower(Case("1d", (32,), 5), implementation)):
        with pytest.raises(NotImplementedError, match="'cuda_gemm' cannot serve this call: it is not in this build"):
            call(implementation="cuda_gemm")
    with pytest.raises(NotImplementedError, match="'cuda_fused' cannot serve this call: it is not in this build"):
        lower(Case("1d", (32,), 5), "cuda_fused")


@pytest.mark.parametrize(
    "built, runtime, fits",
    [((0, 3), (0, 3), True), ((0, 3), (0, 5), True), ((0, 5), (0, 3), False), ((0, 3), None, True)],
)
def test_an_extension_newer_than_the_runtime_is_refused(monkeypatch, built, runtime, fits):
    class Extension:
        ffi_api_version = staticmethod(lambda: built)
        targets = staticmethod(dict)
        families = staticmethod(lambda: ["naive"])
        product_families = staticmethod(lambda: ["naive"])

    monkeypatch.setattr(_cuda.importlib, "import_module", lambda name: Extension)
    monkeypatch.setattr(_cuda, "_runtime_ffi_version", lambda: runtime)
    lane = _cuda.lane.__wrapped__()
    assert (lane.missing is None) == fits
    assert (lane.families, lane.product_families) == ((("naive",), ("naive",)) if fits else ((), ()))
    if not fits:
        assert "compiled with XLA's FFI API 0.5 and the installed jaxlib has 0.3" in str(lane)


def test_an_extension_that_does_not_load_is_explained(monkeypatch):
    def refuse(name):
        raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(_cuda.importlib, "import_module", refuse)
    assert "libfoo.so" in str(_cuda.lane.__wrapped__())


def test_the_runtime_version_is_read():
    version = _cuda._runtime_ffi_version()
    assert version is not None
    assert version >= (0, 3)
