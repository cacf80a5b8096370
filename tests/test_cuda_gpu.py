"""What only a GPU shows: random problems, shards, CUDA graphs, large offsets, reproducibility, errors."""

import dataclasses
import functools
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import check

import jax_na
from benchmarks import measure
from jax_na import _backends, _cuda, _primitives
from jax_na.testing import oracle
from jax_na.testing.cases import Case, random_case
from jax_na.testing.numerics import relative_error

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parent.parent
over_cuda = pytest.mark.parametrize(
    "implementation", [name for name in _backends.IMPLEMENTATIONS if name.startswith("cuda")]
)


def test_the_lane_is_there_and_serves_by_default():
    assert _cuda.lane().missing is None
    shape = jax.ShapeDtypeStruct((1, 32, 2, 64), jnp.bfloat16)
    assert jax_na.explain(shape, shape, shape, 5, platform="cuda").chosen == "cuda"


@over_cuda
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=["fp32", "bf16", "fp16"])
def test_random_problems(implementation, dtype):
    offset = 1000 * ["float32", "bfloat16", "float16"].index(jnp.dtype(dtype).name)
    for seed in range(offset, offset + 6):
        check(random_case(seed), implementation, dtype)


@dataclasses.dataclass(frozen=True)
class Sharded:
    """A call on a shard: a case of the local query, the local key lengths and offsets, the global lengths."""

    case: Case
    key_spatial: tuple[int, ...]
    halo: tuple[tuple[int, int, int], ...]


SHARDED = [
    Sharded(Case("1d-middle", (20,), 7), (26,), ((20, 17, 60),)),
    Sharded(Case("1d-first", (20,), 7), (23,), ((0, 0, 60),)),
    Sharded(Case("1d-first-padded", (20,), 7), (26,), ((0, -3, 60),)),
    Sharded(Case("1d-last-padded", (20,), 7, is_causal=True), (26,), ((40, 34, 60),)),
    Sharded(Case("1d-dilated-stride", (24,), 6, stride=2, dilation=2), (44,), ((24, 14, 72),)),
    Sharded(Case("2d", (9, 12), (5, 4), dilation=(1, 2)), (13, 20), ((9, 7, 27), (12, 8, 30))),
]


@over_cuda
@pytest.mark.parametrize("sharded", SHARDED, ids=lambda sharded: sharded.case.name)
def test_a_shard_with_its_halo(implementation, sharded):
    case, dtype = sharded.case, jnp.bfloat16
    spec = case.spec(implementation=implementation, sharded=True)
    inputs = case.inputs(dtype)
    rng = np.random.default_rng(3)
    shape = (1, *sharded.key_spatial, case.kv_heads, case.dim)
    inputs = inputs._replace(key=rng.standard_normal(shape).astype(dtype), value=rng.standard_normal(shape).astype(dtype))
    if _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", spec, inputs) is not None:
        return
    halo = np.array(sharded.halo, np.int32)
    grad_out, grad_lse = case.cotangents(dtype)

    @jax.jit
    def run(inputs, halo):
        values, vjp = jax.vjp(lambda inputs: _primitives.forward(spec, inputs, halo), inputs)
        return values, vjp((grad_out, grad_lse))[0]

    (out, lse), grads = run(inputs, halo)
    truth = oracle.attention(spec, inputs, halo, grad_out, grad_lse)
    assert relative_error(out, truth.out) < 2e-2
    assert relative_error(lse, truth.lse) < 2e-2
    for name in ("query", "key", "value"):
        assert relative_error(getattr(grads, name), getattr(truth.grads, name)) < 3e-2, name


@over_cuda
@pytest.mark.parametrize("bias_axis", [None, 0], ids=["shared-bias", "mapped-bias"])
def test_vmap_of_the_gradient(implementation, bias_axis):
    """Mapped axes are one more leading dimension; the bias table is one for all or one per mapped entry."""
    case = Case("2d", (9, 10), (3, 5), batch=2, heads=4, kv_heads=2, dim=64, bias=True)
    inputs = [case.inputs(jnp.bfloat16, seed) for seed in range(3)]
    if _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", case.spec(), inputs[0]) is not None:
        return
    stacked = [jnp.stack(arrays) for arrays in zip(*((x.query, x.key, x.value, x.bias) for x in inputs), strict=True)]
    if bias_axis is None:
        stacked[3] = stacked[3][0]

    def loss(implementation, query, key, value, bias):
        call = functools.partial(jax_na.neighborhood_attention, implementation=implementation, **case.arguments())
        return jnp.sum(jnp.sin(call(query, key, value, bias=bias).astype(jnp.float32)))

    def run(implementation):
        grad = jax.grad(functools.partial(loss, implementation), argnums=(0, 1, 2, 3))
        return jax.jit(jax.vmap(grad, in_axes=(0, 0, 0, bias_axis)))(*stacked)

    for found, expected in zip(run(implementation), run("xla"), strict=True):
        assert relative_error(found, expected) < 3e-2


@over_cuda
def test_gradients_are_reproducible_when_asked(implementation):
    case = Case("2d", (40, 37), (9, 8), batch=2, heads=4, kv_heads=2, dim=64)
    inputs = case.inputs(jnp.bfloat16)
    grad_out, _ = case.cotangents(jnp.bfloat16)

    @jax.jit
    def run(inputs):
        call = functools.partial(
            jax_na.neighborhood_attention, implementation=implementation, deterministic=True, **case.arguments()
        )
        return jax.vjp(call, inputs.query, inputs.key, inputs.value)[1](grad_out)

    spec = case.spec(implementation=implementation, deterministic=True)
    if _backends.IMPLEMENTATIONS[implementation].why_not_on("cuda", spec, inputs) is not None:
        return
    first = [np.asarray(x).view(np.uint16) for x in run(inputs)]
    for _ in range(3):
        for one, other in zip(first, run(inputs), strict=True):
            np.testing.assert_array_equal(one, np.asarray(other).view(np.uint16))


@pytest.mark.sm90
@pytest.mark.parametrize(
    "case",
    [
        Case("small", (14, 14), 7, batch=4, heads=4, kv_heads=4),
        Case("d64", (40, 37), (15, 12), heads=4, kv_heads=2, dim=64),
        Case("d128", (6, 20, 18), (5, 9, 8), stride=(1, 2, 1), dim=128),
    ],
    ids=lambda case: case.name,
)
def test_ten_thousand_launches_give_the_same_bits(case):
    inputs = [case.inputs(jnp.bfloat16, seed) for seed in range(2)]
    spec = case.spec(implementation="cuda_hopper")

    def bits(inputs):
        out, lse = _primitives.forward(spec, inputs, spec.identity_halo(inputs.query))
        return jax.lax.bitcast_convert_type(out, jnp.uint16), jax.lax.bitcast_convert_type(lse, jnp.uint32)

    @jax.jit
    def count_differing(inputs):
        first = [bits(one) for one in inputs]

        def step(i, counts):
            # Two problems in turn: otherwise the call would be the same in every step, and XLA would make it once.
            operands, expected = jax.tree.map(lambda a, b: jnp.where(i % 2 == 0, a, b), *zip(inputs, first, strict=True))
            differs = [jnp.any(a != b) for a, b in zip(bits(operands), expected, strict=True)]
            return counts[0] + jnp.any(jnp.stack(differs)), counts[1] + 1

        return jax.lax.fori_loop(0, 10_000, step, (0, 0))

    assert [int(n) for n in count_differing(inputs)] == [0, 10_000]


@over_cuda
@pytest.mark.xdist_group("memory")  # 40 GB of device memory: one at a time
def test_offsets_beyond_two_to_the_31(implementation):
    """The last batch entry of a tensor of more than 2^31 elements against the same entry alone."""
    length, heads, dim = 1 << 14, 16, 64
    batch = (1 << 31) // (length * heads * dim) + 2
    keys = jax.random.split(jax.random.key(0), 4)
    full = [jax.random.normal(key, (batch, length, heads, dim), jnp.bfloat16) for key in keys]
    assert full[0].size > 1 << 31

    @jax.jit
    def run(query, key, value, grad_out):
        call = functools.partial(jax_na.neighborhood_attention, window_size=9, implementation=implementation)
        out, vjp = jax.vjp(call, query, key, value)
        return out, *vjp(grad_out)

    results = [np.asarray(x[-1:].astype(jnp.float32)) for x in run(*full)]
    alone = run(*(x[-1:] for x in full))
    for found, expected in zip(results, alone, strict=True):
        assert relative_error(found, np.asarray(expected.astype(jnp.float32))) < 1e-2


@pytest.mark.parametrize("implementation", ["cuda_fused", "cuda_hopper", "cuda"])
def test_memory_of_the_hunyuan_video_row(implementation):
    """Forward allocates out and lse; backward the gradients, a float32 copy of dq at most, and lse and delta of each query."""
    case = Case("hunyuan", (30, 48, 80), (18, 24, 24), heads=24, kv_heads=24, dim=128)
    spec, shape = case.spec(implementation=implementation), case.shapes()["query"]
    array = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    inputs, rows = _primitives.Inputs(array, array, array), math.prod(shape[:-1])
    lse = jax.ShapeDtypeStruct(shape[:-1], jnp.float32)
    slack = 1 << 20  # halo, tile counters, window tables, alignment

    forward = jax.jit(functools.partial(measure.forward, spec)).lower(inputs).compile().memory_analysis()
    assert 0 <= forward.output_size_in_bytes - (2 * rows * case.dim + 4 * rows) < slack
    assert forward.temp_size_in_bytes < slack
    backward = (
        jax.jit(functools.partial(measure.backward, spec)).lower(inputs, array, lse, array).compile().memory_analysis()
    )
    assert 0 <= backward.output_size_in_bytes - 3 * 2 * rows * case.dim < slack
    copies = 0 if implementation == "cuda_fused" else 1
    assert backward.temp_size_in_bytes < 4 * rows * case.dim * copies + 8 * rows + slack


@over_cuda
def test_inside_cuda_graphs(implementation, tmp_path):
    """Command buffers forced on: the calls are captured into a graph, replayed, and give the same numbers."""
    script = f"""
        import functools, jax, jax.numpy as jnp, numpy as np, jax_na
        call = functools.partial(jax_na.neighborhood_attention, window_size=(7, 5), implementation={implementation!r})
        keys = jax.random.split(jax.random.key(0), 4)
        arrays = [jax.random.normal(key, (2, 30, 33, 4, 64), jnp.bfloat16) for key in keys]
        @jax.jit
        def run(query, key, value, grad):
            out, vjp = jax.vjp(call, query, key, value)
            return out, *vjp(grad)
        first = run(*arrays)
        for _ in range(4):  # fresh buffers: the graph is updated, then replayed
            again = run(*(x + 0 for x in arrays))
        for one, other in zip(first, again):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=2e-2, atol=2e-2)
        plain = jax.jit(lambda *a: jax.vjp(functools.partial(call, implementation="xla"), *a[:3])[1](a[3]))(*arrays)
        for one, other in zip(again[1:], plain):
            np.testing.assert_allclose(np.asarray(one, np.float32), np.asarray(other, np.float32), rtol=5e-2, atol=5e-2)
    """
    flags = (
        "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUDNN,CUSTOM_CALL --xla_gpu_graph_min_graph_size=1 "
        f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, cwd=ROOT)
    thunks = {path.name: path.read_text() for path in tmp_path.glob("*jit_run*thunk_sequence*.txt")}
    captured = [text for text in thunks.values() if "kCommandBuffer" in text and "kCustomCall" in text]
    assert captured, thunks


def raw_call(out_length=16, **changes):
    """The forward custom call with attributes and an output of one's own, to see what the handler says."""
    array = jnp.ones((1, 16, 2, 32), jnp.float32)
    spec = Case("1d", (16,), 3).spec()
    inputs = _primitives.Inputs(array, array, array)
    attributes = _cuda._attributes(spec, [_cuda.FAMILIES[-1]], inputs, False) | changes
    results = (
        jax.ShapeDtypeStruct((1, out_length, 2, 32), array.dtype),
        jax.ShapeDtypeStruct(array.shape[:-1], jnp.float32),
        jax.ShapeDtypeStruct((0,), jnp.uint8),
    )
    call = jax.ffi.ffi_call(_cuda.FORWARD_TARGET, results)
    halo = jnp.asarray(spec.identity_halo(array))
    return jax.block_until_ready(jax.jit(lambda *args: call(*args, **attributes))(array, array, array, halo))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"candidates": "nonsense"}, "no kernel family serves.*nonsense is not in this build"),
        ({"window": np.array([17])}, "does not allow window 17"),
        ({"window": np.array([3, 3])}, "one entry for each of 1 to 3 axes"),
        ({"out_length": 15}, r"out is \[1, 15, 2, 32\] of element type \d+, expected 1024 elements"),
        ({"has_bias": np.bool_(True)}, "4 operands and 3 results, which its attributes do not explain"),
    ],
)
def test_what_goes_wrong_in_the_handler_is_an_exception(changes, message):
    raw_call()
    with pytest.raises(jax.errors.JaxRuntimeError, match=message):
        raw_call(**changes)


@pytest.mark.sm90
@pytest.mark.parametrize("target", ["forward", "backward"])
def test_a_launch_that_fails_is_an_exception(target):
    """Told to take nothing but PTX, the driver refuses the Hopper kernels (SASS only) when they are launched.

    The program is the custom call alone and its operands come from the host: XLA's own kernels would not load either.
    """
    script = f"""
        import jax, jax.numpy as jnp, ml_dtypes, numpy as np
        from jax_na import _cuda, _primitives
        from jax_na.testing.cases import Case
        case = Case("1d", (64,), 9, dim=64)
        spec, inputs = case.spec(), case.inputs(ml_dtypes.bfloat16)
        family = next(family for family in _cuda.FAMILIES if family.name == "hopper")
        rows = np.zeros(inputs.query.shape[:-1], np.float32)
        halo = np.asarray(spec.identity_halo(inputs.query))
        like = lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype)
        workspace = jax.ShapeDtypeStruct((family.{target}_workspace(spec, inputs),), jnp.uint8)
        if {target!r} == "forward":
            operands, results = (*inputs[:3], halo), (like(inputs.query), like(rows), workspace)
        else:
            operands = (*inputs[:3], inputs.query, rows, inputs.query, halo)
            results = (*map(like, inputs[:3]), workspace)
        call = jax.ffi.ffi_call("jax_na_{target}", results)
        _cuda.lane()
        run = jax.jit(lambda *operands: call(*operands, **_cuda._attributes(spec, [family], inputs, False)))
        try:
            jax.block_until_ready(run(*map(jax.device_put, operands)))
        except jax.errors.JaxRuntimeError as error:
            print("raised:", error)
    """
    environment = os.environ | {
        "CUDA_FORCE_PTX_JIT": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-c", textwrap.dedent(script)]
    said = subprocess.run(command, check=True, env=environment, cwd=ROOT, capture_output=True, text=True).stdout
    assert f"raised: INTERNAL: jax_na: {target} of family hopper, device 0: " in said
    assert "no kernel image is available for execution on the device" in said


def test_concurrent_calls_on_threads():
    """Handlers hold no state between calls: threads and streams may overlap."""
    import concurrent.futures

    case = Case("2d", (20, 21), 5, dim=64)
    run = jax.jit(functools.partial(jax_na.neighborhood_attention, **case.arguments()))
    inputs = [jax.device_put(case.inputs(jnp.float32, seed)[:3]) for seed in range(8)]
    expected = [np.asarray(run(*x)) for x in inputs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for found, truth in zip(pool.map(lambda x: np.asarray(run(*x)), inputs), expected, strict=True):
                np.testing.assert_array_equal(found, truth)
