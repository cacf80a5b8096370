"""Device time of whole jitted calls, and errors on sampled tokens of problems too large for a dense reference."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.problems import bound_ms
from jax_na import _primitives
from jax_na._spec import Inputs, Spec
from jax_na.testing.cases import Case
from jax_na.testing.numerics import relative_error

Array = Any

# Inputs rotate among sets that together exceed the 60 MB of L2, as they would in a model; and a program, which calls once on every
# set, takes so long that the host has dispatched the next one meanwhile.
_ROTATION_BYTES = 256 << 20
_PROGRAM_MS = 1.0
_TARGET_MS = 20.0


def random_inputs(case: Case, dtype: Any, seed: int) -> tuple[Inputs, Array]:
    """Operands and cotangent of out, made on the device."""
    shapes = case.shapes()
    keys = iter(jax.random.split(jax.random.key(seed), len(shapes) + 1))
    inputs = Inputs(**{name: jax.random.normal(next(keys), shape, dtype) for name, shape in shapes.items()})
    out_shape = (*shapes["query"][:-1], shapes["value"][-1])
    return inputs, jax.random.normal(next(keys), out_shape, dtype)


def forward(spec: Spec, inputs: Inputs) -> tuple[Array, Array]:
    return _primitives.forward(spec, inputs, spec.identity_halo(inputs.query))


def backward(spec: Spec, inputs: Inputs, out: Array, lse: Array, grad_out: Array) -> list[Array]:
    """The backward pass alone, residuals given."""
    flat = [x for x in inputs if x is not None]
    halo = jnp.asarray(spec.identity_halo(inputs.query))
    return _primitives.na_backward_p.bind(
        *flat,
        out,
        lse,
        grad_out,
        halo,
        spec=spec,
        has_bias=inputs.bias is not None,
        has_extra=inputs.extra_key is not None,
        has_grad_lse=False,
    )


def cudnn_forward(case: Case, inputs: Inputs) -> Array:
    """What a JAX user has for causal windows in one dimension without this library."""
    spec = case.spec()
    if spec.rank != 1 or not spec.is_causal[0] or (spec.stride, spec.dilation) != ((1,), (1,)):
        raise NotImplementedError("cuDNN has causal windows in one dimension only")
    window = (spec.window[0] - 1, 0)
    return jax.nn.dot_product_attention(
        inputs.query, inputs.key, inputs.value, is_causal=True, local_window_size=window, implementation="cudnn"
    )


def device_ms(function: Callable[..., Any], sets: list[tuple[Any, ...]], expected_ms: float, repeats: int = 7) -> float:
    """Milliseconds of one call of ``function`` on the device.

    One program calls it once on every argument set (equal calls of one program would be merged by XLA). Running the program
    several times without waiting keeps the device's queue full; less one run, what the host does before and after disappears.
    """
    program = jax.jit(lambda sets: [function(*arguments) for arguments in sets])
    runs = 1 + int(np.clip(_TARGET_MS / (expected_ms * len(sets)), 1, 64))

    def seconds(count: int) -> float:
        start = time.perf_counter()
        results = [program(sets) for _ in range(count)]
        jax.block_until_ready(results[-1])
        return time.perf_counter() - start

    seconds(2)
    pairs = [(seconds(1), seconds(runs)) for _ in range(repeats)]
    one, many = (statistics.median(times) for times in zip(*pairs, strict=True))
    return 1e3 * (many - one) / ((runs - 1) * len(sets))


def input_sets(case: Case, dtype: Any) -> list[tuple[Inputs, Array]]:
    """Operands and cotangents to rotate among."""
    first = random_inputs(case, dtype, 0)
    set_bytes = 2 * sum(x.nbytes for x in first[0] if x is not None)
    count = int(np.clip(max(_ROTATION_BYTES / set_bytes, _PROGRAM_MS / bound_ms(case, False)), 1, 48))
    return [first, *(random_inputs(case, dtype, seed) for seed in range(1, count))]


def time_case(
    case: Case, sets: list[tuple[Inputs, Array]], implementation: str | None, expected_ms: float
) -> dict[str, dict[str, float]]:
    """``{"fwd": {"ms", "max_error"}, "bwd": ...}`` of one problem; ``expected_ms`` of a forward sets how many calls are timed.

    Of ``cudnn`` (:func:`cudnn_forward`) only the forward.
    """
    if implementation == "cudnn":
        cudnn = functools.partial(cudnn_forward, case)
        out = jax.jit(cudnn)(sets[0][0])
        ms = device_ms(cudnn, [(inputs,) for inputs, _ in sets], expected_ms)
        return {"fwd": {"ms": ms, "max_error": sampled_forward_error(case, sets[0][0], out)}}
    spec = case.spec(implementation=implementation)
    residuals = [jax.jit(functools.partial(forward, spec))(inputs) for inputs, _ in sets]
    out, lse = residuals[0]
    fwd_ms = device_ms(functools.partial(forward, spec), [(inputs,) for inputs, _ in sets], expected_ms)
    backward_sets = [(inputs, *values, grad) for (inputs, grad), values in zip(sets, residuals, strict=True)]
    bwd_ms = device_ms(functools.partial(backward, spec), backward_sets, 3 * expected_ms)
    grads = jax.jit(functools.partial(backward, spec))(*backward_sets[0])
    inputs, grad_out = sets[0]
    return {
        "fwd": {"ms": fwd_ms, "max_error": sampled_forward_error(case, inputs, out)},
        "bwd": {"ms": bwd_ms, "max_error": sampled_backward_error(case, inputs, out, lse, grad_out, grads)},
    }


def _head(array: Array, head: int) -> np.ndarray:
    """``[*S, D]`` of batch entry 0 and one head, float64 on the host."""
    return np.asarray(array[0, ..., head, :]).astype(np.float64)


def _seen(case: Case, queries: list[np.ndarray], keys: list[np.ndarray]) -> list[np.ndarray]:
    """``[queries, keys]`` per axis: which of these coordinates see which."""
    spec = case.spec()
    return [spec.visible(axis, queries[axis], keys[axis], length, np) for axis, length in enumerate(case.spatial)]


def _window(case: Case, token: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Index of the keys that a query sees."""
    seen = _seen(case, [np.array([x]) for x in token], [np.arange(n) for n in case.spatial])
    return np.ix_(*(np.flatnonzero(x[0]) for x in seen))


def _reach(case: Case, token: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    """Index of the queries that see a key."""
    seen = _seen(case, [np.arange(n) for n in case.spatial], [np.array([x]) for x in token])
    return np.ix_(*(np.flatnonzero(x[:, 0]) for x in seen))


def _samples(case: Case, count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    corners = [(0,) * len(case.spatial), tuple(s - 1 for s in case.spatial)]
    return corners + [tuple(int(rng.integers(s)) for s in case.spatial) for _ in range(count - 2)]


def sampled_forward_error(case: Case, inputs: Inputs, out: Array, count: int = 64) -> float:
    """Largest error of out over sampled tokens of one head, relative to the largest exact value."""
    query, key, value, actual = (_head(x, -1) for x in (inputs.query, inputs.key, inputs.value, out))
    exact, got = [], []
    for token in _samples(case, count):
        window = _window(case, token)
        k, v = key[window].reshape(-1, case.dim), value[window].reshape(-1, value.shape[-1])
        scores = k @ query[token] * case.spec().scale
        weights = np.exp(scores - scores.max())
        exact.append(weights @ v / weights.sum())
        got.append(actual[token])
    return relative_error(np.stack(got), np.stack(exact))


def sampled_backward_error(
    case: Case, inputs: Inputs, out: Array, lse: Array, grad_out: Array, grads: list[Array], count: int = 32
) -> float:
    """Largest error of the three gradients over sampled tokens of one head, each relative to its largest exact value."""
    query, key, value, o, do = (_head(x, -1) for x in (inputs.query, inputs.key, inputs.value, out, grad_out))
    row_lse = np.asarray(lse[0, ..., -1]).astype(np.float64)
    delta = np.sum(o * do, -1)
    actual = [_head(x, -1) for x in grads[:3]]
    scale, dim, dim_v = case.spec().scale, case.dim, value.shape[-1]
    exact: list[list[np.ndarray]] = [[], [], []]
    tokens = _samples(case, count)
    for token in tokens:
        window = _window(case, token)
        k, v = key[window].reshape(-1, dim), value[window].reshape(-1, dim_v)
        weights = np.exp(k @ query[token] * scale - row_lse[token])
        exact[0].append((weights * (v @ do[token] - delta[token])) @ k * scale)
        reach = _reach(case, token)
        q, g = query[reach].reshape(-1, dim), do[reach].reshape(-1, dim_v)
        weights = np.exp(q @ key[token] * scale - row_lse[reach].ravel())
        exact[2].append(weights @ g)
        exact[1].append((weights * (g @ value[token] - delta[reach].ravel())) @ q * scale)
    return max(
        relative_error(np.stack([a[token] for token in tokens]), np.stack(e)) for a, e in zip(actual, exact, strict=True)
    )
